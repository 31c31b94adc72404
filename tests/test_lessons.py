"""The lessons draw what their logs say, run what is missing, and take up what was interrupted."""
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("lessons", ROOT / "benchmark_results" / "lessons.py")
lessons = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lessons)
import lessons_offline as offline
import lessons_tabular as tabular
import lessons_weights as weights

DRAWN = [name for name in lessons.NAMES if (ROOT / "benchmark_results" / "lessons" / name).is_dir()]
COMMAND = "bc.py --dataset-id hopper/medium-v0 --num-updates 40 --eval-every 20 --eval-episodes 1 --device cpu"


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "LESSONS", tmp_path / "lessons")
    monkeypatch.setattr(lessons, "WORK", tmp_path / "work")
    return tmp_path


def as_asked(has, asked):
    try:
        return float(has) == float(asked)
    except ValueError:
        return str(has) == asked


def test_a_lesson_that_was_not_run_is_named_in_the_readme():
    missing = [name for name in lessons.NAMES if name not in DRAWN]
    text = (ROOT / "README.md").read_text()
    assert all(f"The one of `{name}`" in text and f"| `{name}` |" not in text for name in missing)
    assert all(f"| `{name}` |" in text for name in DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_every_lesson_draws_from_its_committed_logs(name, places, monkeypatch, tmp_path_factory):
    """Nothing is run: the logs, which name their commit, and the commands agree."""
    monkeypatch.setattr(lessons, "WORK", tmp_path_factory.getbasetemp() / "sets")  # written once
    monkeypatch.setitem(lessons.plt.rcParams, "savefig.dpi", 60)
    shutil.copytree(ROOT / "benchmark_results" / "lessons" / name, places / "lessons" / name)
    monkeypatch.setattr(lessons.subprocess, "run", lambda *args, **kwargs: pytest.fail("a run is missing"))
    monkeypatch.setattr(sys, "argv", ["lessons.py", name])
    lessons.main()
    assert (places / "lessons" / f"{name}.png").stat().st_size > 10_000
    said = [place / "lessons" / name / "message.txt" for place in (places, ROOT / "benchmark_results")]
    assert said[0].read_text() == said[1].read_text()
    assert (ROOT / "benchmark_results" / "lessons" / f"{name}.png").exists()
    for label, command in lessons.commands_of(name).items():
        folder = places / "lessons" / name / re.sub(r"[^\w.-]+", "-", label)
        about, flags = json.loads((folder / "run.json").read_text()), json.loads((folder / "args.json").read_text())
        assert about["method"] == command.split(".py")[0] and about["commit"]
        words = command.split()[1:]
        for flag, value in zip(words, words[1:]):
            if flag.startswith("--") and not value.startswith("--") and "dataset" not in flag:
                assert as_asked(flags[flag[2:].replace("-", "_")], value), (label, flag)


def test_every_lesson_has_its_place_its_claim_what_one_would_say_and_what_it_does_not_show():
    assert set(lessons.NAMES) == set(lessons.ABOUT)
    places = [place for place, *_ in lessons.ABOUT.values()]
    assert len(set(places)) == len(places) and {int(place) for place in places} <= set(lessons.PARTS)
    for _, claim, said, limits in lessons.ABOUT.values():
        assert not claim.endswith(".") and re.fullmatch(r"[^.?!]+.*[.?!] [A-Z].*\.", said) and limits.endswith(".")


def test_the_page_is_the_one_that_is_committed(places):
    kept = ROOT / "benchmark_results" / "lessons"
    shutil.copytree(kept, places / "lessons", ignore=shutil.ignore_patterns("*.png", "*.csv", "README.md"))
    lessons.write_page()
    assert (places / "lessons" / "README.md").read_text() == (kept / "README.md").read_text()


def test_in_the_lane_world_mistakes_grow_as_h_squared_for_cloning_and_as_h_for_dagger():
    H = np.array(lessons.LANE_HORIZONS)
    for on_policy, power in (False, 2), (True, 1):
        total, wrong = lessons.lane(on_policy)
        assert np.allclose(total[:, 1], wrong) and (np.diff(total) >= 0).all()
        slope = np.polyfit(np.log(H), np.log(total.mean(0)[H]), 1)[0]
        assert power - 0.25 < slope < power + 0.01
        assert (total.mean(0)[H] < 1.01 * H**power * wrong.mean()).all()  # the theorems' bounds
    cloned, wrong = lessons.lane(False)
    assert np.isclose(wrong.mean(), 2 / 3 * (1 - 1 / lessons.LANE_BENDS) ** 7000, rtol=0.2)  # never seen in 7,000 draws
    w, rng, x, count = wrong.max(), np.random.default_rng(0), np.zeros(20_000, int), 0.0
    for _ in range(50):  # the same chain, walked
        slip = rng.random(len(x)) < np.where(x == 0, w, 2 / 3)
        count += slip.mean()
        away = np.where(x == 0, rng.choice((-1, 1), len(x)), np.sign(x))
        x = np.where(slip, x + away, x - np.sign(x)).clip(-lessons.LANE_VERGE, lessons.LANE_VERGE)
    assert np.isclose(count, cloned[wrong.argmax(), 50], rtol=0.1)


def test_what_lessons_claim_of_runs_is_in_their_logs():
    kept = ROOT / "benchmark_results" / "lessons"

    def seeds(name, label, key="return_mean"):
        run = kept / name / label
        return lessons.lately(*((lessons.losses(run, key), "value") if key == "q_start" else (lessons.evals(run), key)))

    extremes = {"half": 0, "mixed": -1}  # places of the thresholds 0 and 1
    for part, at in extremes.items():
        found = [seeds("bcq_discrete", f"{part}-{t}") for t in lessons.BCQ_THRESHOLDS]
        assert max(found.pop(at)) < min(map(min, found))  # no seed in common
    dqn, cloned, bcq, cql = (seeds("cql_discrete", f"half-{x}") for x in ("dqn", "cloning", "bcq", "cql"))
    assert max(dqn) < min(cloned) and min(bcq + cql) > lessons.lander_means()[1]
    for label in "100000", "10000":
        assert min(seeds("sac_offline", label, "q_start")) > 1e8 and max(seeds("sac_offline", label, "length_mean")) < 8
    early = lessons.evals(kept / "sac_offline" / "early")
    assert lessons.last(early, "discounted_return_mean", 500) > 3 * lessons.last(early, "discounted_return_mean", 3000)
    control = lessons.last(lessons.rows(kept / "cql" / "cql" / "sarsa.csv"), "value")
    q, earned = (lessons.last(*x) for x in ((lessons.losses(kept / "cql" / "cql", "q_start"), "value"),
                                            (lessons.evals(kept / "cql" / "cql"), "discounted_return_mean")))
    lag = lessons.returns("hopper/medium-v0", 0.99).mean() - control
    assert 0.6 < lag / (earned - q) < 0.85 and q < control
    for penalty, sign in ("0", 1), ("5", -1):
        promised, found = (np.mean(seeds("mopo", penalty, x)) for x in ("q_start", "discounted_return_mean"))
        assert sign * (promised - found) > 0
    asked = np.genfromtxt(kept / "dt" / "both" / "targets.csv", delimiter=",", names=True)
    achieved = asked["return_mean"].reshape(-1, 2)  # (targets, seeds)
    best = np.unique(asked["target"])[4]
    assert (np.diff(achieved[1:5], axis=0) > 0).all() and (achieved < best).all() and len(achieved) == 7


def test_sarsa_is_the_value_of_the_actions_of_the_data(monkeypatch):
    """Two ways from one state; the one that begins with less is worth more."""
    episodes = [SimpleNamespace(observations=np.arange(float(len(r) + 1))[:, None], actions=np.full((len(r), 1), a),
                                rewards=np.array(r), terminations=np.arange(len(r)) == len(r) - 1)
                for a, r in ((0.5, [1.0, 0.0, 2.0]), (-0.5, [0.0, 3.0]))]
    monkeypatch.setattr(lessons.minari, "MinariDataset", lambda _: SimpleNamespace(iterate_episodes=lambda: episodes))
    args = SimpleNamespace(hidden_dim=16, critic_lr=1e-2, gamma=0.9, tau=0.1, batch_size=32)
    monkeypatch.setattr(lessons.cql, "Args", lambda: args)
    *_, one, two = lessons.sarsa(S=2, num_updates=1000).split()
    known = ((1 + 0.9**2 * 2) + 0.9 * 3) / 2
    assert np.allclose([float(line.split(",")[2]) for line in (one, two)], known, atol=0.15)


def test_a_command_is_run_once_and_its_small_files_are_kept(places, capfd):
    kept = lessons.run("toy", "one", COMMAND, fresh=False)
    assert {path.name for path in kept.iterdir()} == {"args.json", "run.json", "eval.csv", "losses.csv"}
    assert str(places) not in (kept / "args.json").read_text()
    assert json.loads((kept / "run.json").read_text()).keys() > {"method", "commit", "cpu", "updates_per_second"}
    assert len(lessons.evals(kept)) == 2
    assert {row["name"] for row in lessons.rows(kept / "losses.csv")} == {"actor_loss"}
    capfd.readouterr()
    assert lessons.run("toy", "one", COMMAND, fresh=False) == kept and capfd.readouterr().out == ""


def test_an_interrupted_run_is_taken_up(places, monkeypatch):
    begun, calls = places / "work" / "toy" / "one" / "x", []
    begun.mkdir(parents=True)
    (begun / "checkpoint.pt").touch()

    def run(command, **_):
        calls.append(command)
        (begun / "run.json").write_text('{"update": 1, "wall_seconds": 1}')
        (begun / "eval.csv").write_text("update,seed\n1,0\n")

    monkeypatch.setattr(lessons.subprocess, "run", run)
    assert lessons.evals(lessons.run("toy", "one", COMMAND, fresh=False)) == [{"update": 1, "seed": 0}]
    assert calls[0][-2:] == ["--resume", str(begun)]


def test_a_wrong_name_is_told_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lessons.py", "nothing"])
    with pytest.raises(SystemExit) as stop:
        lessons.main()
    assert stop.value.code == 2 and "no lesson nothing; there are" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["correction", "cql_bound", "expectile", "stitching", "awr"])
def test_a_computed_lesson_has_no_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lessons.py", "--list", name])
    lessons.main()
    assert capsys.readouterr().out == f"{name}: computed in lessons_{'weights' if name == 'awr' else 'tabular'}.py\n"


def test_expectiles_go_from_the_mean_to_the_largest_value_of_the_data():
    found, tried = tabular.expectile_numbers(), np.array(tabular.BANDIT_TRIED)
    taus, best = tabular.BANDIT_TAUS, max(q for q, p in zip(tabular.BANDIT_Q, tried) if p)
    for tau, m in zip(taus, found.known):  # both sides of the first-order condition
        apart = np.array(tabular.BANDIT_Q) - m
        assert np.isclose(tau * (tried @ apart.clip(0)), (1 - tau) * (tried @ (-apart).clip(0)))
    assert np.abs(found.V.mean(0) - found.known).max() < 0.15 and (np.diff(found.V) > 0).all()
    assert np.isclose(found.known[taus.index(0.5)], tried @ tabular.BANDIT_Q)
    assert abs(found.known[-1] - best) < 0.4 and abs(found.V[:, -1] - best).max() < 0.7  # far from the untried 9
    assert np.abs(found.fitted - found.exact).max() < 0.15
    low, high = tabular.cloud_edges(found.grid)
    assert (found.exact[-1] - low > 0.9 * (high - low)).all() and (found.exact[-1] < high).all()
    assert np.allclose(found.exact[tabular.CLOUD_TAUS.index(0.5)], (low + high) / 2)


def test_on_the_graph_only_iql_with_a_large_tau_passes_the_exit():
    full, without = tabular.stitching_numbers()
    for found, short in (full, 3), (without, 0):
        for k, tau in enumerate(tabular.STITCH_TAUS):
            assert np.allclose(found.Q[k, 3, [7, 4]], [7, 1], atol=1e-4)  # three more steps to 10, to 4
            v = tabular.expectile((7, 1), np.array((0.2, 0.8)), tau)
            assert np.isclose(found.V[k, 3], v, atol=1e-4) and np.isclose(found.Q[k, 1, 2], v - 2, atol=1e-4)
            odds = 0.2 * found.weight[k, 3, 7] / (0.8 * found.weight[k, 3, 4])
            assert np.isclose(found.pi[k, 3, 7], odds / (1 + odds), atol=1e-3)
            on, off = 4 * found.weight[k, 1, 2], short * found.weight[k, 1, 5]
            assert np.isclose(found.reach[str(tau)], on / (on + off) * found.pi[k, 3, 7], atol=1e-3)
    assert np.isclose(full.reach["cloning"], 4 / 7 / 5) and np.isclose(without.reach["cloning"], 1 / 5)
    assert full.reach["0.9"] > 0.95 and all(chance < 0.15 for name, chance in full.reach.items() if name != "0.9")
    assert all(without.reach[name] > 0.99 for name in ("conditioned", "0.5", "0.7", "0.9"))
    assert not any(tabular.arrives(full.policies["conditioned"], asked) for asked in np.arange(-4, 12, 0.3))
    assert not any(episode[0] == 1 and episode[-1] == tabular.GOAL for episode in tabular.EPISODES)


def test_cql_bounds_the_value_of_the_policy_and_not_every_q():
    found = tabular.cql_bound_numbers()
    assert (found.start[0] > 0).sum() > 35 and found.start[0].mean() > 0.5  # plain evaluation
    beyond = tabular.CQL_ALPHAS > found.need.max()
    assert beyond.sum() > 10 and (found.start[beyond] < 0).all() and (found.start[~beyond] > 0).any(1).all()
    assert (found.error > 1e-9).any((2, 3)).all()  # at every alpha somewhere in each batch
    change = found.start[-1] - found.start[0]
    assert (change < 0).all() and np.allclose(found.start, found.start[0] + tabular.CQL_ALPHAS[:, None] / 2 * change)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_q_of_the_bound_is_the_minimum_of_cqls_objective(alpha):
    """alpha (E_pi Q - E_beta Q) + 1/2 (Q - B Q)^2 over the transitions of each batch has no slope there."""
    found, (_, table, batch) = tabular.cql_bound_numbers(), tabular.lattice(30, 50, 0.2)
    pi, at = torch.tensor(found.pi), int(np.argmin(abs(tabular.CQL_ALPHAS - alpha)))
    true = tabular.evaluated(table.prob, (table.prob * table.reward).sum(-1), pi, table.horizon)
    Q = (true + torch.tensor(found.error[at])).where(batch.mask, 0).requires_grad_()
    y = table.reward + (pi * Q.detach()).sum(-1)[:, None, None]  # (S, n, A, n)
    pairs = batch.count.sum(-1)  # (S, n, A)
    penalty = pairs.sum(-1) * (pi * Q).sum(-1) - (pairs * Q).sum(-1)
    loss = alpha * penalty.sum() + 0.5 * (batch.count * (Q.unsqueeze(-1) - y).square()).sum()
    slope, = torch.autograd.grad(loss, Q)
    assert slope[batch.mask].abs().max() < 1e-9


def test_new_data_correct_the_policy_and_old_ones_do_not():
    found = tabular.correction_numbers()
    offline, online = found.promised - found.earned
    assert np.allclose(offline[0], online[0]) and abs(online[-1]).max() < 0.01
    assert (offline[-1] > 0.01).sum() > 25 and offline[-1].mean() > 2
    assert np.allclose(offline[-1], offline[-10], atol=0.02)  # and so it stays
    assert found.earned[1, -1].mean() > found.earned[0, -1].mean() + 1


def test_only_td_advantages_tell_the_actions_of_one_state_apart():
    found, right = weights.awr_numbers(), weights.RIGHT
    carlo, td = found.advantage[-1], found.advantage[0]
    assert ((td > 0) == found.right).all() and 0.8 < ((carlo > 0) == found.right).mean() < 0.95
    half = weights.EPISODES // 2
    rare = carlo[:, half:][found.right[:, half:]]  # what the careless demonstrator does right
    assert (rare[rare < 2] < 0).mean() > 0.5
    whole = np.cumsum(found.right[0, :, ::-1], 1)[:, ::-1]  # R of Monte-Carlo, V its mean
    np.testing.assert_allclose(carlo[0], whole - whole.mean(0), atol=1e-4)
    reward = found.right[0].astype(float)
    np.testing.assert_allclose(td[0], reward - reward.mean(0), atol=1e-4)
    earned = found.policy.sum(-1).mean(1)
    assert (np.diff(earned) < 0).all() and earned[0] > weights.STEPS * right["careful"] - 0.1 > earned[-1] + 0.5


def test_what_the_maximum_picks_outside_the_data_is_passed_on():
    found = offline.extrapolation_numbers()
    assert found.picked[-1].mean() > 2 > found.all[-1].mean() > 0.8
    assert np.abs(found.data[-1]).max() < 1e-3  # over the data's actions Q is that of its policy
    assert np.allclose(found.all[-1], found.all[-5], atol=0.02)  # and so it stays
