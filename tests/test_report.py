"""The report: statistics against values worked by hand, nothing across budgets, texts in step with the raw files."""
import csv
import importlib
import importlib.util
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("report", ROOT / "benchmark_results" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
HEAD = "update,seed,episodes,return_mean,return_std,discounted_return_mean,length_mean,score"
DRAW = {name: getattr(report, name) for name in ("draw_curves", "draw_page")}
ABOUT = {"commit": "0123456789abcdef", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6", "gymnasium": "1.4.0",
         "mujoco": "4.0.0", "gpu": None, "cpu": "2 x EPYC", "threads": 1, "updates_per_second": 12.5}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository without results, whose plots are empty files."""
    for name in DRAW:
        monkeypatch.setattr(report, name, lambda *_: SimpleNamespace(savefig=lambda path, **_: path.touch()))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESAMPLES", 500)
    (tmp_path / "benchmark_results").mkdir()
    (tmp_path / "README.md").write_text(f"# A\n\n{report.BEGIN}\nold\n{report.END}\n\nb\n")
    return tmp_path


def put(root, dataset, label, *evaluations, budget=1000, scored=True, args={}, about={}, folder=None):
    """A cell whose evaluations, up to `budget`, hold these values of the seeds; None is a seed that is lost, by nan in
    the columns or, as in older files, without a row."""
    place = root / "benchmark_results" / (folder or dataset.replace("/", "-")) / label
    place.mkdir(parents=True)
    rows = [HEAD]
    for i, values in enumerate(evaluations, 1):
        rows += [f"{budget * i // len(evaluations)},{k},10," + (
                     "nan,nan,nan,nan," if x is None else f"{10 * x if scored else x},1,2,3,{x if scored else ''}")
                 for k, x in enumerate(values) if x is not None or scored]
    (place / "eval.csv").write_text("\n".join(rows) + "\n")
    (place / "args.json").write_text(json.dumps(
        {"dataset_id": dataset, "seed": 0, "num_seeds": len(evaluations[0]), "num_updates": budget, **args}))
    (place / "run.json").write_text(json.dumps({"method": label, "wall_seconds": 3723.4, **ABOUT, **about}))
    return place


def put_data(root, dataset, returns, **references):
    folder = root / "datasets" / dataset / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps(references))
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for i, x in enumerate(returns):
            file[f"episode_{i}/rewards"] = [x - 1, 1]


def rows(root, name="README.md"):
    """{first cell: the others} of all lines of tables; a later line replaces one that begins alike."""
    lines = [line.strip("|").split("|") for line in text(root, name).splitlines() if line.startswith("| ")]
    return {first.strip(): [x.strip() for x in others] for first, *others in lines}


def text(root, name="README.md"):
    return (root / name).read_text().replace("\N{NO-BREAK SPACE}", " ")


def tables(root):
    """{title: lines of cells} of the README's tables of equal budgets."""
    found, lines = {}, text(root).splitlines()
    for i, line in enumerate(lines):
        if line.startswith("**") and line.endswith("seeds**"):
            body = [x.strip("| ").split(" | ") for x in lines[i + 2:lines.index("", i + 2)]]
            found[line.strip("*")] = [["", *body[0][-len(body[2]) + 1:]], *body[2:]]
    return found


def refused(capsys, status, *argv):
    """The sentence with which the report ends."""
    with pytest.raises(SystemExit) as stop:
        report.main(list(argv))
    said = capsys.readouterr()
    assert stop.value.code == status and said.err.count("\n") == 1 and said.out == ""
    return said.err


# --- statistics ---
@pytest.mark.parametrize("df, t", [
    (1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (29, 2.04523), (99, 1.98422)])
def test_t_quantile(df, t):
    assert report.t_quantile(df) == pytest.approx(t, rel=2e-5)


def test_t_quantile_of_another_level():
    assert report.t_quantile(2, 0.9) == pytest.approx(2.91999, rel=2e-5)


def test_half_width():
    assert report.half_width(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.30265 / np.sqrt(3), rel=1e-4)


def test_iqm():
    assert report.iqm(np.array([[8.0, 1, 7, 2], [6, 3, 5, 4]])) == 4.5  # of 3, 4, 5, 6
    assert report.iqm(np.array([[100.0, 3, 1], [-50, 2, 4]])) == 2.5  # floor(6 / 4) = 1 off each end
    assert report.iqm(np.array([[1.0, 2, 9]])) == 4  # nothing to cut of three
    assert report.iqm(np.array([[[0.0, 0, 4, 0]], [[1, 1, 1, 9]]])).tolist() == [0, 1]  # draws first


def test_probability_of_improvement_with_ties():
    x, y = np.array([[1.0, 2, 3]]), np.array([[2.0, 2, 0]])
    assert report.beats(x, y) == pytest.approx((1 + 2 + 3) / 9)  # of 1: over 0; of 2: two ties, over 0; of 3: all
    assert report.beats(y, x) == pytest.approx(1 - 6 / 9)
    x, y = np.array([[1.0, 2, 3], [0, 0, 0]]), np.array([[2.0, 0], [1, 1]])  # 3 and 2 seeds
    assert report.beats(x, y) == pytest.approx(((1 + 1.5 + 2) / 6 + 0) / 2)


def test_bootstrap_against_all_resamples():
    runs = np.array([[1.0, 4, 9], [20, 26, 50]])
    means = [report.iqm(np.array([a, b])) for a in itertools.product(runs[0], repeat=3)
             for b in itertools.product(runs[1], repeat=3)]
    value, low, high = report.bootstrap(report.iqm, runs)
    assert value == (4 + 9 + 20 + 26) / 4
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=0.02)
    other = np.array([[2.0, 4], [24, 26]])
    all_x = [[a, b] for a in itertools.product(runs[0], repeat=3) for b in itertools.product(runs[1], repeat=3)]
    all_y = [[a, b] for a in itertools.product(other[0], repeat=2) for b in itertools.product(other[1], repeat=2)]
    exact = report.beats(np.array(all_x)[:, None], np.array(all_y)[None])
    value, low, high = report.bootstrap(report.beats, runs, other)
    assert value == ((0 + 1.5 + 2) / 6 + (0 + 1.5 + 2) / 6) / 2
    assert (low, high) == pytest.approx(np.percentile(exact, [2.5, 97.5]), abs=0.02)


def test_bootstrap_draws_within_datasets_and_methods_apart():
    assert report.bootstrap(report.iqm, np.array([[0.0, 0], [10, 10]])) == (5, 5, 5)
    assert report.bootstrap(report.iqm, np.array([[1.0, 5, 6]])) == (4, 1, 6)  # 1, 1, 1 is one resample in 27
    x = np.array([[0.0, 1]])
    assert report.bootstrap(report.beats, x, x) == (0.5, 0, 1)  # drawn as pairs it would always be 0.5


def test_bootstrap_repeats_to_the_digit():
    runs = np.random.RandomState(1).rand(4, 5)
    assert report.bootstrap(report.iqm, runs) == report.bootstrap(report.iqm, runs)
    draws = np.random.RandomState(0).random_sample(3)
    assert draws.tolist() == pytest.approx([0.5488135, 0.71518937, 0.60276338])  # on every machine


# --- the tables ---
def test_cells_of_scores_returns_and_single_seeds(root):
    put(root, "a/b-v0", "td3_bc", [9, 9, 9], [1, 2, 3])
    put(root, "a/b-v0", "one", [7.26])
    put(root, "a/b-v0", "five", [1, 2, 3, 4, 5])
    put(root, "a/b-v0", "lost", [1, 2, None])
    put(root, "Lake-v1", "mine", [0.5, 0.7], scored=False, args={"dataset_id": "", "env_id": "Lake-v1"})
    put(root, "Big-v1", "mine", [1233.7, 1233.7], scored=False)
    put(root, "Big-v1", "other", [1, 2], scored=False)
    report.main([])
    assert tables(root) == {
        "4 methods, 1,000 updates, 1 or 3 or 5 seeds": [
            ["", "TD3+BC", "five", "lost", "one"],
            ["`a/b-v0`", "2.0 ± 1.0", "3.0 ± 1.6", "1.5 ± 0.7", "7.3"]],  # the last evaluation, not the best
        "2 methods, 1,000 updates, 2 seeds": [
            ["", "mine", "other"], ["`Big-v1`", "return 1234 ± 0", "return 1.50 ± 0.71"]]}
    own = rows(root, "benchmark_results/REPORT.md")
    assert own["five"] == ["1,000 updates", "5", "3.0 ± 1.6", "3.0 ± 2.0 (95 %)"]  # 2.776 * sqrt(2.5 / 5)
    assert own["lost <sup>2</sup>"][-1] == "1.0, 2.0" and own["TD3+BC <sup>1</sup>"][-1] == "1.0, 2.0, 3.0"
    said = " ".join(text(root).split())
    for part in ("10 episodes per seed: mean ± standard", "Without a reference it is a return.",
                 "Alone on a task: mine, 1,000 updates, 2 seeds, on `Lake-v1` return 0.600 ± 0.141."):
        assert part in said
    assert "–" not in said and "mean of the data" not in said and "Hours" not in said and "Public" not in said


def test_a_table_for_each_set_of_datasets_without_an_empty_place(root):
    put_data(root, "a-v0", [0, 20, 40], ref_min_score=-10, ref_max_score=90)
    put_data(root, "b-v0", [0, 0], ref_min_score=-10, ref_max_score=90)
    for label, datasets in {"bc": "abc", "iql": "abc", "cql": "ab", "awac": "a"}.items():
        for dataset in datasets:
            put(root, f"{dataset}-v0", label, [10, 20, 30])
    for i in range(2):
        put(root, "a-v0", f"own-{i}", [i])
    put(root, "a-v0", "dt", [90], budget=50)
    put(root, "a-v0", "fqe", [1, 2, 3])
    report.main([])
    found, score = tables(root), "20.0 ± 10.0"
    assert list(found) == ["3 datasets, 1,000 updates, 3 seeds", "2 datasets, 1,000 updates, 3 seeds",
                           "6 methods, 1,000 updates, 1 or 3 seeds"]
    a, b, c = found.values()
    assert a == [["", "BC", "IQL"], *[[f"`{x}-v0`", score, score] for x in "abc"]]  # c has no facts of its data
    assert b == [["", "mean of the data", "BC", "CQL", "IQL"], ["`a-v0`", "30.0", score, score, score],
                 ["`b-v0`", "10.0", score, score, score]]
    assert c[0] == ["", "mean of the data", "BC", "CQL", "IQL", "AWAC", "own-0", "own-1"]
    assert rows(root)["`a-v0`"] == ["DT", "50 updates", "1", "90.0"]
    put(root, "a-v0", "bail", [5])  # a seventh: methods become rows
    report.main([])
    assert tables(root)["7 methods, 1,000 updates, 1 or 3 seeds"][:4] == [
        ["", "`a-v0`"], ["mean of the data", "30.0"], ["BC", score], ["BAIL", "5.0"]]
    assert "FQE" not in text(root) and "FQE (the policy" in text(root, "benchmark_results/REPORT.md")


def test_budgets_never_share_a_table(root):
    for label in ("bc", "iql", "cql"):
        put(root, "a-v0", label, [1, 2], budget=50_000)
    for label in ("bcq", "bear", "brac", "dt"):
        put(root, "a-v0", label, [3, 4], budget=10_000)
    put(root, "a-v0", "mopo", [5, 6], budget=50)
    put(root, "a-v0", "td3", [7, 8], budget=300, args={"num_steps": 300})
    report.main([])
    assert {title: found[0][1:] for title, found in tables(root).items()} == {
        "3 methods, 50,000 updates, 2 seeds": ["BC", "CQL", "IQL"],
        "4 methods, 10,000 updates, 2 seeds": ["DT", "BCQ", "BEAR", "BRAC"]}
    assert rows(root)["`a-v0`"] == ["MOPO", "50 updates", "2", "5.5 ± 0.7"]
    assert "Alone on a task: TD3, 300 steps, 2 seeds, on `a-v0` 7.5 ± 0.7." in text(root)


def test_the_mean_of_the_data_and_who_is_below_it(root):
    put_data(root, "a/b-v0", [0, 20, 40], ref_min_score=-10, ref_max_score=90)
    put_data(root, "c/d-v0", [0, 30])
    put(root, "a/b-v0", "bc", [31, 32, 33])
    put(root, "c/d-v0", "bc", [12, 13, 14], scored=False)
    put(root, "c/d-v0", "iql", [12, 13, 16], scored=False)
    report.main([])
    assert rows(root)["`c/d-v0`"][0] == "return 15.0"
    own = text(root, "benchmark_results/REPORT.md")
    assert "Mean of the data: 30.0." in own and "Mean of the data: return 15.0." in own
    remark = "1. BC, 1,000 updates: every run below the mean of the data (15.0). No explanation yet."
    assert remark in own and "| BC <sup>1</sup> |" in own and "| IQL |" in own  # one run of IQL is above
    assert "below the mean" not in text(root)


def test_public_implementations_stand_beside_the_cells(root):
    put(root, "a-v0", "bc", [9, 9, 9], [0, 0, 0], [9, 9, 9], [10, 20, 30])
    put(root, "a-v0", "iql", [10, 20, 30], budget=2000)
    (root / "benchmark_results" / "outside.toml").write_text("""
        [[source]]
        name = "X"
        url = "u"
        version = "v"
        command = "run me"
        about = "So."
        updates = [500, 1000]
        reference = [-100, 100]
        runs = {"a-v0/bc" = [[-100, -60], [0, -50]], "a-v0/iql" = [[1, 2]], "a-v0/dt" = [[1, 2]]}""")
    report.main([])
    assert rows(root)["`a-v0`"] == ["BC", "20.0 ± 10.0", "20.0, 25.0 (X)", "-2.5"]  # not of other budgets
    assert "X: u, v, `run me`. So." in text(root)
    own = text(root, "benchmark_results/REPORT.md")
    for by, found in ("X", "0.0, 20.0"), ("X", "50.0, 25.0"), ("here, mean of 3 seeds", "0.0, 20.0"):
        assert f"| `a-v0` | BC | {by} | 500 to 1,000 | {found} |" in own


def test_agents_that_are_no_seeds_have_no_deviation(root):
    for name in ("bear_gridworld_kl", "bear_gridworld_support"):
        put(root, "line", name, [0, 1, 2, 3, 4, 5], about={"method": "bear_gridworld"})
    put(root, "a-v0", "bc", [1, 2])
    report.main([])
    row = rows(root, "benchmark_results/REPORT.md")["BEAR's grid, KL, tight to loose"]
    assert row == ["1,000 updates", "6", "2.5", "0.0, 1.0, 2.0, 3.0, 4.0, 5.0"] and "BEAR" not in text(root)


def test_hours_of_a_default_run(root):
    (root / "algorithms").mkdir()
    for method, flag in ("bc", "num_updates: int = 1_000_000"), ("iql", "num_updates: int = 360_000"), (
            "sac", "num_steps: int = 1_000_000"), ("dt", "num_updates: int = 100_000"):
        (root / "algorithms" / f"{method}.py").write_text(f"class Args:\n    {flag}  # steps\n")
    with open(root / "README.md", "a") as file:
        file.write("| [`bc.py`](x) | a | 1 / 2 | 500, 2 |\n| [`iql.py`](x) | a | 1 / 2 | – |\n"
                   "| [`sac.py`](x) | a | 1 / 2 | 100.5, 2 |\n| [`dt.py`](x) | a | 1 / 2 | – |\n")
    put(root, "a-v0", "iql", [1, 2], budget=1000, about={"wall_seconds": 200})
    report.main([])
    found = rows(root)  # 1e6 / 500 / 3600; 360 thousand at 10 updates of single agents a second; nothing of DT
    assert found["1,000,000 updates"] == ["BC 0.56"] and found["1,000,000 steps"] == ["SAC 2.8"]
    assert found["360,000 updates, from a cell's wall time"] == ["IQL 10"] and "DT" not in text(root).split("dt.py")[0]


def test_the_data_are_remembered_where_the_set_is_not(root, capsys):
    put_data(root, "a/b-v0", [-10, -10], ref_min_score=-10, ref_max_score=90)
    put(root, "a/b-v0", "bc", [31, 32, 33])
    report.main([])
    facts = root / "benchmark_results" / "a-b-v0" / "data.json"
    assert json.loads(facts.read_text()) == {"transitions": 4, "episodes": 2, "return_mean": -10, "score": 0}
    shutil.rmtree(root / "datasets")
    report.main(["--check"])
    put_data(root, "a/b-v0", [5, 5], ref_min_score=-10, ref_max_score=90)  # recorded anew: the cells are of the old one
    report.main(["--check"])
    assert "Mean of the data: 0.0." in text(root, "benchmark_results/REPORT.md")
    capsys.readouterr()
    facts.write_text('{"score": 0}')
    assert "data.json cannot be used (no return_mean in it)" in refused(capsys, 2)


def test_flags_and_notes(root):
    put(root, "d-v0", "bc", [50, 52, 54])
    put(root, "d-v0", "iql", [60.0, 60.1, 60.2])
    put(root, "d-v0", "cql", [80, 80, 80], [64, 10, 80], [54, 90, 50], [53, 80, 80])
    put(root, "d-v0", "dt", [40, 41, 45], args={"num_updates": 5000})
    put(root, "d-v0", "mopo", [70, 80, 75], [71, 85, None])
    put(root, "d-v0", "td3_bc", [44, 50, 50])
    put(root, "d-v0", "sac_offline", [3, 5, 7], budget=500)
    put(root, "d-v0", "bc-copy", [10, 20, 30], budget=500, about={"method": "bc"})
    (root / "benchmark_results" / "notes.toml").write_text(
        '"d-v0/td3_bc" = "Too few updates."\n"d-v0/bc" = "As it should be."\n[readme]\n"d-v0/dt" = "Cut short."\n')
    report.main([])
    said = [x for x in text(root, "benchmark_results/REPORT.md").splitlines() if x[0:1].isdigit()]
    assert said == [
        "1. BC, 1,000 updates: As it should be.",
        "2. DT, 1,000 updates: update 1,000 of 5,000, 3 of 3 seeds at the end; "
        "every run below every one of BC of the same budget (50.0, 52.0, 54.0). No explanation yet.",
        "3. TD3+BC, 1,000 updates: Too few updates.",  # not below BC: one run reaches BC's lowest
        "4. CQL, 1,000 updates: at the end and in the mean of the last three evaluations more than a quarter "
        "below the best of training: 1 of 3 seeds (seed 0: 57.0 after 80.0). No explanation yet.",  # others dipped
        "5. IQL, 1,000 updates: the seeds hardly differ (deviation 0.1). No explanation yet.",
        "6. MOPO, 1,000 updates: update 1,000 of 1,000, 2 of 3 seeds at the end. No explanation yet.",
        "7. SAC offline, 500 updates: every run below every one of bc-copy of the same budget "
        "(10.0, 20.0, 30.0). No explanation yet."]
    assert rows(root, "benchmark_results/REPORT.md")["MOPO <sup>6</sup>"][-1] == "71.0, 85.0"
    assert "\n\nCut short.\n\n" in text(root) and "No explanation" not in text(root)


def test_best_of_training_and_origin_stand_in_the_report_alone(root):
    put(root, "d-v0", "bc", [50, 52], [60, 61], [57, 59], about={"gpu": "H100"})
    report.main([])
    own = rows(root, "benchmark_results/REPORT.md")
    assert own["`d-v0`: BC, 1,000 updates, 2 seeds"] == [
        "10", "0123456", "H100, 2 x EPYC, threads: 1",
        "python 3.11.7, torch 2.13.0, numpy 2.4.6, gymnasium 1.4.0, mujoco 4.0.0", "1:02:03", "12.5"]
    assert own["`d-v0`"] == ["BC, 1,000 updates, 2 seeds", "58.0", "60.5", "666"]
    assert "## Best of training" in text(root, "benchmark_results/REPORT.md") and "60.5" not in text(root)


def test_origin_as_runs_note_it_today(root):
    place, today = put(root, "d-v0", "bc", [50, 52]), {"update": 1000, "cores": 2, "device": "cpu", "commit": ""}
    for device, said in ("cpu", "2 x EPYC"), ("NVIDIA H100", "NVIDIA H100, 2 x EPYC"):
        (place / "run.json").write_text(json.dumps({
            "method": "bc", "wall_seconds": 60, **today, "device": device, "cpu": "2 x EPYC", "torch": "2.13.0"}))
        report.main([])
        assert rows(root, "benchmark_results/REPORT.md")["`d-v0`: BC, 1,000 updates, 2 seeds"][1:] == [
            "–", said, "torch 2.13.0", "0:01:00", "–"]


# --- what is compared ---
def test_nothing_is_compared_across_budgets(root):
    put(root, "a-v0", "bc", [1, 2, 3, 4, 5], budget=20_000)
    put(root, "a-v0", "iql", [4, 5, 6, 7, 8], budget=50_000)
    put(root, "b-v0", "bc", [1, 2, 3, 4, 5], budget=20_000)
    put(root, "b-v0", "iql", [4, 5, 6, 7, 8], budget=50_000)
    put(root, "b-v0", "dt", [0, 0, 0, 0, 0], budget=8000)
    assert report.groups(report.read_all()) == {}
    report.main([])
    said = " ".join(text(root, "benchmark_results/REPORT.md").split())
    assert "nothing to aggregate or to compare" in said and "IQM" not in said and "beats" not in said
    assert "of BC of the same" not in said


def test_groups_have_equal_budgets_on_the_same_datasets(root):
    for label in ("bc", "iql"):
        put(root, "a-v0", label, [1, 2, 3, 4, 5], budget=20_000)
        put(root, "b-v0", label, [4, 5, 6, 7, 8], budget=50_000)
    for dataset in "a-v0", "b-v0":
        put(root, dataset, "few", [1, 2, 3, 4], budget={"a-v0": 20_000, "b-v0": 50_000}[dataset])
        put(root, dataset, "few-copy", [1, 2, 3, 4], budget=3000)
        put(root, dataset, "cql", [7, 8, 9, 9, 9], budget=8000)
    put(root, "a-v0", "dt", [7, 8, 9, 9, 9], budget=8000)
    put(root, "b-v0", "dt", [7, 8, 9, 9, 9], budget=7000)
    put(root, "a-v0", "half", [7, 8, 9, 9, 9], budget=20_000)
    put(root, "b-v0", "half", [7, 8, 9, 9, 9, 9], budget=50_000)
    groups, both = report.groups(report.read_all()), (("a-v0", "20,000 updates"), ("b-v0", "50,000 updates"))
    assert {key: list(runs) for key, runs in groups.items()} == {both: ["bc", "iql"]}  # "half" has 5 seeds, then 6
    assert groups[both]["bc"].tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8]]
    report.main([])
    table = rows(root, "benchmark_results/REPORT.md")
    assert table["IQL, 5 seeds"][1] == "0.50 [0.26, 0.74]"


@pytest.mark.parametrize("evaluations, change", [
    ([[5] * 4], {}), ([[5, 6, 7, 8, 9], [5, 6, 7, 8, None]], {}), ([[5, 6, 7, 8, 9]], {"scored": False}),
    ([[5, 6, 7, 8, 9]], {"args": {"num_updates": 2000}})])
def test_who_cannot_be_compared(root, evaluations, change):
    """Fewer than five seeds, a seed lost, no reference, a run that was stopped; and who has a single dataset."""
    for dataset in "a-v0", "b-v0":
        put(root, dataset, "bc", [1, 2, 3, 4, 5])
        put(root, dataset, "iql", [3, 4, 5, 6, 7])
        put(root, dataset, "cql", *evaluations, **change)
    for label in "dt", "mopo":
        put(root, "c-v0", label, [1, 2, 3, 4, 5])
    assert [list(runs) for runs in report.groups(report.read_all()).values()] == [["bc", "iql"]]


# --- files ---
@pytest.mark.parametrize("name, text, said", [
    ("eval.csv", "", "no evaluation in it"),
    ("eval.csv", HEAD + "\n", "no evaluation in it"),
    ("eval.csv", HEAD + "\n1000,0,10,5,1\n", "a line is incomplete or too long"),
    ("eval.csv", HEAD + "\n1000,0,10,5,1,2,3,4,5\n", "a line is incomplete or too long"),
    ("eval.csv", HEAD + "\n1000,0,10,5,1,2,3,4", "a line is incomplete or too long"),
    ("eval.csv", HEAD + "\n1000,0,10,x,1,2,3,4\n", "could not convert string to float: 'x'"),
    ("eval.csv", HEAD + "\n1000,0,10,,1,2,3,4\n", "a number is missing"),
    ("eval.csv", HEAD + "\n1000,0,10,5,1,2,3,4\n1000,1,10,5,1,2,3,\n", "a number is missing"),
    ("eval.csv", HEAD + "\n1000,0,10,5,1,2,3,4\n1000,0,10,5,1,2,3,4\n", "a seed stands twice in an evaluation"),
    ("eval.csv", HEAD + "\n1000,7,10,5,1,2,3,4\n", "index 7 is out of bounds"),
    ("eval.csv", HEAD + "\n1000,-1,10,5,1,2,3,4\n", "a seed is below 0"),
    ("eval.csv", HEAD + "\n1000,0,10,5,1,2,3,4\n1000,0,10,nan,nan,nan,nan,\n", "a seed stands twice in an evaluation"),
    ("eval.csv", HEAD + "\n1000,0,10,nan,nan,nan,nan,\n", "no seed is finite at the end"),
    ("eval.csv", "update,seed\n1,0\n", "'episodes'"),
    ("eval.csv", None, "No such file"),
    ("run.json", "{", "Expecting property name"),
    ("run.json", "{}", "no method in it"),
    ("args.json", None, "No such file"),
    ("args.json", "[]", "no seed in it")])
def test_a_broken_file_is_named_in_one_sentence(root, capsys, name, text, said):
    path = put(root, "a-v0", "bc", [1, 2, 3]) / name
    path.unlink() if text is None else path.write_text(text)
    message = refused(capsys, 2)
    assert str(path) in message and said in message
    assert "old" in (root / "README.md").read_text() and not (root / "benchmark_results" / "REPORT.md").exists()


@pytest.mark.parametrize("change", [{"about": {"wall_seconds": None}}, {"args": {"num_updates": "many"}}])
def test_a_value_of_another_kind_is_named_in_one_sentence(root, capsys, change):
    path = put(root, "a-v0", "bc", [1, 2, 3], **change)
    assert f"{path} cannot be used" in refused(capsys, 2)


def test_what_else_is_wrong(root, capsys):
    assert "holds no results" in refused(capsys, 2)
    put(root, "a-v0", "bc", [1, 2, 3])
    notes = root / "benchmark_results" / "notes.toml"
    notes.write_text('"a-v0/iql" = "x"')
    assert "explains a-v0/iql, but there is no such cell" in refused(capsys, 2)
    notes.write_text("a-v0 iql")
    assert "notes.toml cannot be used" in refused(capsys, 2)
    (outside := root / "benchmark_results" / "outside.toml").write_text("[[source]]\nname = 'X'\n")
    notes.write_text("")
    assert "outside.toml cannot be used ('runs')" in refused(capsys, 2)
    outside.unlink()
    notes.unlink()
    for text in ("", report.END + report.BEGIN, report.BEGIN, report.BEGIN + report.END + report.END):
        (root / "README.md").write_text(text)
        assert "needs one line <!-- results: begin -->" in refused(capsys, 2)
    (root / "README.md").unlink()
    assert "needs one line <!-- results: begin -->" in refused(capsys, 2)
    put(root, "a-v0", "bc", [1, 2, 3], folder="again")
    assert "two directories hold a-v0/bc" in refused(capsys, 2)


def test_lessons_and_half_written_results_are_no_cells(root):
    put(root, "a-v0", "bc", [1, 2, 3])
    put(root, "a-v0", ".iql.new", [1, 2, 3])
    put(root, "a-v0", "cql", [1, 2, 3], folder="lessons")
    (put(root, "a-v0", "dt", [1, 2, 3], folder="lessons/dt") / "eval.csv").unlink()
    assert [cell.label for cell in report.read_all()] == ["bc"]


def test_it_writes_texts_and_plots_and_sees_what_is_out_of_date(root, capsys, monkeypatch):
    for name, draw in DRAW.items():
        monkeypatch.setattr(report, name, draw)
    monkeypatch.setattr(report, "LINES", {"a-v0": ("bc", "iql"), "c-v0": ("bc",)})
    put_data(root, "a-v0", [3, 5], ref_min_score=0, ref_max_score=10)
    for label in ("bc", "iql", "own"):
        put(root, "a-v0", label, [1, 7, 2, 1, None], [3, 4, 5, 6, 7])
        put(root, "b-v0", label, [3, 4, 5, 6, 7])
    put(root, "L-v1", "bcq_tabular", *[[0.1, -0.2]] * 40, scored=False)
    paths = [root / "README.md", root / "benchmark_results" / "REPORT.md"]
    assert "REPORT.md is not what" in refused(capsys, 1, "--check") and not paths[1].exists()
    report.main([])
    capsys.readouterr()
    assert paths[0].read_text().startswith("# A\n\n<!-- results: begin -->\n\nNormalised score")
    assert paths[0].read_text().endswith("<!-- results: end -->\n\nb\n") and "old" not in paths[0].read_text()
    plots = root / "benchmark_results" / "plots"
    assert {path.name for path in plots.iterdir()} == {"curves.png", "a-v0.png", "b-v0.png"}
    assert all(path.stat().st_size > 5000 for path in plots.iterdir())
    assert "(benchmark_results/plots/curves.png)" in text(root)
    drawn = re.findall(r"\(plots/(.*?)\)", text(root, "benchmark_results/REPORT.md"))
    assert drawn == ["a-v0.png", "b-v0.png"]
    texts = [path.read_text() for path in paths]
    report.main(["--check"])
    for path, old in zip(paths, texts):
        path.write_text(old.replace("5.0\N{NO-BREAK SPACE}±", "5.1\N{NO-BREAK SPACE}±"))
        assert path.read_text() != old
        message = refused(capsys, 1, "--check")
        assert f"{path} is not what the raw files give: run python benchmark_results/report.py" in message
        path.write_text(old)
    paths[0].write_text("c" + texts[0] + "d")  # around the part the README is the writer's
    report.main(["--check"])
    paths[0].write_text(texts[0])
    put(root, "a-v0", "cql", [1, 2, 3])
    refused(capsys, 1, "--check")
    assert [path.read_text() for path in paths] == texts


def test_many_curves_stay_below_the_height_of_a_screen(root, monkeypatch):
    for i in range(30):
        put(root, "a-v0", f"m{i}", [1, 7], [3, 4])
    put(root, "a-v0", "bc", [1, 7], [3, 4])
    figure = DRAW["draw_page"](report.read_all(), {"a-v0": [2, 2]})
    assert figure.get_size_inches()[1] * report.DPI <= 1000
    assert len(figure.axes) == 8 and max(len(axis.lines) for axis in figure.axes) == 6  # four, BC, the data
    report.plt.close(figure)


def test_the_page_holds_everything(root, monkeypatch, capsys):
    """Without the package that draws: what it gets, and that no picture is left outside."""
    pytest.importorskip("markdown_it")
    monkeypatch.syspath_prepend(ROOT / "benchmark_results")
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setitem(sys.modules, "report_html", None)  # not there after the test either
    del sys.modules["report_html"]
    put(root, "a-v0", "bc", [1, 7, 2])
    assert "--html needs altair: pip install 'altair[save]' markdown-it-py" in refused(capsys, 2, "--html")
    monkeypatch.setitem(sys.modules, "altair", SimpleNamespace(VEGALITE_VERSION="6.4.1"))
    bundle = SimpleNamespace(javascript_bundle=lambda vl_version: "// bundle " + vl_version)
    monkeypatch.setitem(sys.modules, "vl_convert", bundle)
    page = importlib.import_module("report_html")
    monkeypatch.setattr(page, "chart", lambda inside, mean, shown: {"of": [cell.name for cell in inside]})
    (root / "benchmark_results" / "lessons").mkdir()
    (root / "benchmark_results" / "lessons" / "README.md").write_text("# Lessons\n\n![x](x.png) ![y](y.png)\n")
    (root / "benchmark_results" / "lessons" / "x.png").write_bytes(b"png")
    (root / "film.gif").write_bytes(b"gif")
    with open(root / "README.md", "a") as file:
        file.write("\n![A film](film.gif)\n")
    report.main(["--html"])
    found = (root / "benchmark_results" / "report.html").read_text()
    for part in ('{"chart-a-v0": {"of": ["BC"]}}', '<div class="chart" id="chart-a-v0"></div>', "// bundle 6.4",
                 "data:image/png;base64,cG5n", "y.png is not there", "data:image/gif;base64,Z2lm", "A film",
                 "<td>1.0, 7.0, 2.0</td>"):
        assert part in found
    assert 'src="http' not in found and 'src="plots' not in found


def test_a_legend_switches_the_lines(root, monkeypatch):
    pytest.importorskip("altair")
    monkeypatch.syspath_prepend(ROOT / "benchmark_results")
    page = importlib.import_module("report_html")
    put(root, "a-v0", "bc", [1, 7], [3, 4])
    put(root, "a-v0", "iql", [1, 7])
    spec = page.chart(report.read_all(), 2.0, ["iql"])
    assert spec["params"] == [{
        "name": "on", "bind": "legend", "value": [{"method": "IQL"}], "views": spec["params"][0]["views"],
        "select": {"type": "point", "fields": ["method"], "toggle": "true"}}]
    assert spec["width"] == "container" and spec["layer"][2]["data"] == {"values": [{"mean": 2.0}]}
    assert {"method": "IQL", "x": 1000, "mean": 4, "low": 1, "high": 7} in spec["layer"][1]["data"]["values"]


# --- the committed results ---
def test_readme_and_report_are_what_the_committed_files_give():
    report.main(["--check"])


def test_the_facts_of_the_data_are_those_of_the_sets_that_ship(monkeypatch):
    kept = {cell.dataset: report.of_data(cell.dataset) for cell in report.read_all()}
    monkeypatch.setattr(report, "beside", lambda dataset: ROOT / "nowhere")
    ships = [dataset for dataset in kept if (ROOT / "datasets" / dataset / "data").exists()]
    assert {"hopper/medium-v0", "lunarlander/mixed-v0"} <= set(ships)
    for dataset in ships:
        assert report.of_data(dataset) == kept[dataset] != {}, dataset


def test_the_data_are_scored_as_the_runs():
    for cell in report.read_all():
        known = ROOT / "datasets" / cell.dataset / "data" / "metadata.json"
        if known.exists() and cell.scored:
            known = json.loads(known.read_text())
            low, high = known["ref_min_score"], known["ref_max_score"]
            place = ROOT / "benchmark_results" / cell.dataset.replace("/", "-") / cell.label / "eval.csv"
            with open(place) as file:
                for row in csv.DictReader(file):
                    score = 100 * (float(row["return_mean"]) - low) / (high - low)
                    assert float(row["score"]) == pytest.approx(score, abs=2e-3)
