"""The lessons draw what their logs say, run what is missing, and take up what was interrupted."""
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("lessons", ROOT / "benchmark_results" / "lessons.py")
lessons = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lessons)
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
def test_every_lesson_draws_from_its_committed_logs(name, places, monkeypatch):
    """Nothing is run: the logs, which name their commit, and the commands agree."""
    shutil.copytree(ROOT / "benchmark_results" / "lessons" / name, places / "lessons" / name)
    monkeypatch.setattr(lessons.subprocess, "run", lambda *args, **kwargs: pytest.fail("a run is missing"))
    monkeypatch.setattr(sys, "argv", ["lessons.py", name])
    lessons.main()
    assert (places / "lessons" / f"{name}.png").stat().st_size > 10_000
    assert (ROOT / "benchmark_results" / "lessons" / f"{name}.png").exists()
    for label, command in getattr(lessons, f"{name}_runs")(places / "data").items():
        folder = places / "lessons" / name / re.sub(r"[^\w.-]+", "-", label)
        about, flags = json.loads((folder / "run.json").read_text()), json.loads((folder / "args.json").read_text())
        assert about["method"] == command.split(".py")[0] and about["commit"]
        words = command.split()[1:]
        for flag, value in zip(words, words[1:]):
            if flag.startswith("--") and not value.startswith("--") and "dataset" not in flag:
                assert as_asked(flags[flag[2:].replace("-", "_")], value), (label, flag)


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
