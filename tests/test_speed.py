"""speed.py: its parts run, its floor is the update's own products, its control learns what td3_bc.py learns."""
import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmark_results" / "speed.py")
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


def test_a_part_is_only_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "OUT", tmp_path / "speed")
    speed.main(["--methods", "dqn_offline", "--seeds", "1", "--rounds", "1", "--seconds", "0.001", "--parts", "updates",
                "--device", "cpu"])
    assert "dqn_offline, 1, eager" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_that_of_what_is_measured():
    """In a process of its own, where nothing else allocates."""
    code = ("import sys, torch; sys.path.insert(0, sys.argv[1]); import speed; speed.forget_peak()\n"
            "peaks = [speed.peak_memory()]; big = torch.ones(50 * 2**20); peaks.append(speed.peak_memory())\n"
            "del big; speed.forget_peak(); print(*peaks, speed.peak_memory())")
    free = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    out = subprocess.run([sys.executable, "-c", code, str(ROOT / "benchmark_results")], capture_output=True, text=True,
                         env=free, check=True).stdout
    before, during, after = map(float, out.split())
    assert 180 < during - before < 260 and after < during - 150  # 200 MiB


def test_tiny_mode_writes_a_table_of_every_part(tmp_path):
    speed.main(["--out", str(tmp_path / "speed"),
                "--methods", "td3_bc", "bcq_discrete", "sac", "--seeds", "1", "2", "--rounds", "1", "--seconds", "0.001",
                "--steps", "20", "--transitions", "5000", "--env-id", "Hopper-v5", "--device", "cpu",
                "--parts", "updates", "loading", "evaluation"])
    (path,) = (tmp_path / "speed").glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    timed = {(row["method"], row["S"], row["mode"]) for row in rows if row["what"] == "updates"}
    assert timed == {(m, s, "eager") for m in ("td3_bc", "bcq_discrete", "sac") for s in "12"} | {("td3_bc", "1", "control")}
    assert {row["what"] for row in rows} == {"updates", "loading", "evaluation", "extrapolated"}
    assert all(float(row["per_second"] or row["seconds"]) > 0 for row in rows)
    facts, text = json.loads(path.with_suffix(".json").read_text()), (tmp_path / "SPEED.md").read_text()
    assert facts["torch"] == torch.__version__ and facts["torch"] in text and "| td3_bc | 1 | control |" in text


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


def test_the_control_lowers_the_loss_of_td3_bc():
    torch.manual_seed(0)
    module, agent = speed.make("td3_bc", 1, "cpu")
    control = speed.Control(agent.data, "cpu")
    losses = []
    for _ in range(60):
        control()
        losses.append(control.logged["critic_loss"])
    assert sum(losses[-10:]) < sum(losses[:10]) and control.logged["actor_loss"] == pytest.approx(-2.5, abs=3)


def test_the_committed_table_is_what_the_csv_gives(tmp_path, monkeypatch):
    if not list(speed.OUT.glob("*.csv")):
        pytest.skip("nothing has been measured yet")
    before = (ROOT / "benchmark_results" / "SPEED.md").read_text()
    monkeypatch.setattr(speed.Path, "write_text", lambda path, text: pytest.approx(0) if text == before else pytest.fail("stale"))
    speed.report()
