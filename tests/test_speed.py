"""speed.py: its parts run, its floor is the update's own products, its control learns what td3_bc.py learns."""
import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmark_results" / "speed.py")
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


def test_a_part_is_only_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "OUT", tmp_path / "speed")
    speed.main(["--rounds", "1", "--transitions", "3000", "--parts", "loading", "--device", "cpu"])
    assert "loading, Minari set of 3000 transitions" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_that_of_what_is_measured():
    big = torch.ones(200 * 2**20)  # 800 MiB here, and before in every process that comes from this one by fork
    options = SimpleNamespace(methods=["dqn"], seeds=[1], rounds=1, seconds=0.001)
    (row,) = speed.updates(options, "cpu")
    assert 150 < row["peak_alone_mib"] < 700 < len(big) * 4 / 2**20 < speed.peak_memory("cpu")


def test_every_method_is_made_with_data():
    for path in sorted((ROOT / "algorithms").glob("*.py")):
        if path.stem not in speed.TABLES:
            _, agent = speed.make(path.stem, 1, "cpu")
            assert all(loss.shape == (1,) and not loss.isnan() for loss in agent.update().values()), path.stem


def test_tiny_mode_writes_a_table_of_every_part(tmp_path):
    speed.main(["--out", str(tmp_path / "speed"),
                "--methods", "td3_bc", "--seeds", "1", "4", "--rounds", "2", "--seconds", "0.001",
                "--steps", "20", "--transitions", "5000", "--env-id", "Hopper-v5", "--device", "cpu",
                "--parts", "updates", "loading", "evaluation"])
    (path,) = (tmp_path / "speed").glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    timed = {(row["method"], row["S"], row["mode"]) for row in rows if row["what"] == "updates"}
    controls = {("td3_bc", "1", mode) for mode in ("control", "control_on_device")}
    assert timed == {("td3_bc", s, "eager") for s in "14"} | controls
    assert {row["what"] for row in rows} == {"updates", "loading", "evaluation", "extrapolated"}
    for row in rows:
        value = float(row["per_second"] or row["seconds"])
        assert value > 0 and (row["what"] == "extrapolated" or float(row["lowest"]) <= value <= float(row["highest"]))
        assert bool(row["peak_alone_mib"]) == (row["mode"] == "eager")
    facts, text = json.loads(path.with_suffix(".json").read_text()), (tmp_path / "SPEED.md").read_text()
    assert facts["torch"] == torch.__version__ and facts["torch"] in text and "| td3_bc | 1 | control |" in text
    assert "peak MiB" in text and "with 4 seeds side by side" in text


def test_a_peak_that_was_not_measured_alone_is_left_out():
    row = {"what": "updates", "method": "bc", "S": "1", "mode": "eager", "precision": "fp32", "per_second": "591.33",
           "seed_updates_per_second": "591.33", "floor_per_second": "832.11", "of_floor": "0.71064", "peak_mib": "350"}
    text = speed.text([row], {"device": "x"})
    assert text.splitlines()[-1] == "| bc | 1 | eager | fp32 | 591.3 | 591.3 | 832.1 | 0.71 |"
    slower = {**row, "S": "16", "per_second": "9", "peak_alone_mib": "340.2"}
    text = speed.text([row, slower], {"device": "x"})
    assert text.splitlines()[-1].endswith("| 0.71 | 340 |") and "loss for bc (591.3 with one, 144.0 with 16)" in text


def test_the_floor_replays_every_product_of_an_update():
    """One call of TD3+BC makes two critic updates and one actor update, each layer's products forward and backward."""
    _, agent = speed.make("td3_bc", 1, "cpu")
    with speed.Record() as record:
        agent.update()
    forward = 2 * (3 + 2 + 2) + (3 + 2)  # actor', critic', critic, twice; actor and critic; Q is a sum, no product
    backward = 2 * (2 + 1) + (2 + 3 + 2)  # weights and inputs of the critic; inputs of the critic; the actor's both
    assert len(record.calls) == forward + backward
    for product, x, y, out in record.calls:
        torch.testing.assert_close(product(x, y), product(x, y, out=out))


@pytest.mark.parametrize("on_device", [False, True])
def test_the_control_lowers_the_loss_of_td3_bc(on_device):
    torch.manual_seed(0)
    module, agent = speed.make("td3_bc", 1, "cpu")
    control = speed.Control(agent.data, "cpu", on_device)
    losses = []
    for _ in range(60):
        control()
        losses.append(control.logged["critic_loss"])
    assert sum(losses[-10:]) < sum(losses[:10]) and control.logged["actor_loss"] == pytest.approx(-2.5, abs=3)


def test_the_committed_table_is_what_the_csv_gives(tmp_path, monkeypatch):
    if not list(speed.OUT.glob("*.csv")):
        pytest.skip("nothing has been measured yet")
    before = (ROOT / "benchmark_results" / "SPEED.md").read_text()
    monkeypatch.setattr(speed.Path, "write_text", lambda path, text: None if text == before else pytest.fail("stale"))
    speed.report()
