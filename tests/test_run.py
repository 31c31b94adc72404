"""The runner of grids: skips, resumes, goes on past failures, and ends with the same files whatever kills it."""
import importlib.util
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "benchmark_results" / "run.py"
spec = importlib.util.spec_from_file_location("run", RUN)
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
RECORDERS = "sac.py", "dqn.py", "fqe.py"  # they make datasets, or judge a policy, and have no row
BC = ("python algorithms/bc.py --dataset-id hopper/medium-v0 --num-updates 2000 --eval-every 1000 --eval-episodes 1 "
      "--eval-workers 1 --hidden-dim 16 --batch-size 16 --device cpu")

# A method as run.py knows it: the same flags, files and way to stop, and a number that grows instead of an agent.
TOY = '''
import argparse, json, os, signal, sys, time
from pathlib import Path

class Args:
    dataset_id: str = "toy"
    num_updates: int = 20
    alpha: float = 2.5
    delay: float = 0.0
    crash: int = 0
    out_dir: str = "runs"
    resume: str = ""

parser = argparse.ArgumentParser()
for name, kind in Args.__annotations__.items():
    parser.add_argument("--" + name.replace("_", "-"), type=kind, default=getattr(Args, name))
args = parser.parse_args()
resume = args.resume
if resume:
    args = argparse.Namespace(**json.loads(Path(resume, "args.json").read_text()))
run, stop = Path(resume or f"{args.out_dir}/my-toy-set__toy__0__{time.time_ns()}"), []
run.mkdir(parents=True, exist_ok=True)
busy, trace = run.parent / "busy", Path(__file__).with_name("trace")

def note(*words):
    with trace.open("a") as file:
        print(*words, file=file)

def alive(pid):
    try:
        return os.kill(pid, 0) is None and "State:\\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False

def write(name, text):
    (run / (name + ".part")).write_text(text)
    (run / (name + ".part")).replace(run / name)

if busy.exists() and alive(int(busy.read_text() or 0)):
    note("two", "at", "once")
busy.write_text(str(os.getpid()))
write("args.json", json.dumps({**vars(args), "resume": ""}, indent=1))
update, x, rows = json.loads((run / "checkpoint.pt").read_text()) if resume else (0, 1, [])
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number) or signal.signal(number, signal.SIG_DFL))
note(Path(args.out_dir).name, update, os.getpid(), os.getppid(), os.environ.get("CUDA_VISIBLE_DEVICES"),
     os.environ["OMP_NUM_THREADS"], time.time(), os.environ.get("MALLOC_MMAP_MAX_"))
while update < args.num_updates:
    time.sleep(args.delay)
    update, x = update + 1, (x * 7 + update) % 1009
    if update == args.crash:
        sys.exit("toy: crashed as asked\\n")
    if update % 5 == 0:
        rows.append(f"{update},0,1,{x * args.alpha}")
    if update % 5 == 0 or stop:
        write("eval.csv", "\\n".join(["update,seed,episodes,return_mean", *rows, ""]))
        time.sleep(10 * args.delay if stop else 0)  # saving takes a while
        write("checkpoint.pt", json.dumps([update, x, rows]))
    if stop:
        busy.unlink()
        sys.stderr.write(f"toy: stopped at update {update}\\n")
        sys.exit(1)
write("policy.pt2", "")
write("run.json", json.dumps({"method": "toy", "update": update, "wall_seconds": 8.0}))
busy.unlink()
print("toy: done")
'''


class Grid:
    """A table of its own, with run.py in a process."""

    def __init__(self, folder, *commands):
        self.folder, self.results, self.runs = folder, folder / "results", folder / "runs"
        self.results.mkdir(parents=True)
        (folder / "toy.py").write_text(TOY)
        self.rows(*commands)

    def rows(self, *commands):
        """Rows `--flags` of toy.py, each with an own label a, b, ..., or whole commands."""
        toy = f"python {self.folder}/toy.py --dataset-id my/toy+set"
        commands = [x if x.startswith("python") else f"{toy} {x}" for x in commands]
        text = [f"[[cell]]\ncommand = {json.dumps(x)}\nlabel = '{label}'" for x, label in zip(commands, "abcdefgh")]
        (self.results / "grid.toml").write_text("\n".join(text))

    def start(self, *flags):
        command = [sys.executable, RUN, "--grid", self.results / "grid.toml", "--runs", self.runs, *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder)

    def run(self, *flags):
        process = self.start(*flags)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    def trace(self):
        """What toy.py noted: label, first update, pid, parent, CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS, time,
        MALLOC_MMAP_MAX_."""
        path = self.folder / "trace"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def files(self):
        """The names of all files, without times, and the contents of those that have none."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "trace"]
        names = [re.sub(r"__\d+", "", str(path.relative_to(self.folder))) for path in paths]
        return {name: path.read_text() if path.suffix == ".csv" else "" for name, path in sorted(zip(names, paths))}


def by_hand(words):
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a grid that nothing interrupted."""
    rows = "--delay 0.02", "--delay 0.02 --alpha 5", "--delay 0.02 --num-updates 17"
    grid = Grid(tmp_path_factory.mktemp("whole") / "x", *rows)
    assert grid.run("--workers", "2")[0] == 0
    return grid


def again(folder, whole, delay):
    """The same grid, not yet begun, and slower, so that there is time to interrupt it."""
    grid = Grid(folder / "x")
    text = (whole.results / "grid.toml").read_text().replace(str(whole.folder), str(grid.folder))
    (grid.results / "grid.toml").write_text(text.replace("--delay 0.02", f"--delay {delay}"))
    return grid


# --- the table of the repository ---
@pytest.fixture(scope="module")
def cells():
    return {cell.name: cell for cell in run.read_grid(RUN.with_name("grid.toml"), ROOT)}


def test_every_docstring_command_is_a_row(cells):
    rows, missing = {" ".join(cell.words) for cell in cells.values()}, {}
    for path in sorted((ROOT / "algorithms").glob("*.py")):
        text = re.sub(r"\\\n +", "", path.read_text().split('"""')[1])  # a long command goes on in the next line
        commands = re.findall(r"^    (python algorithms/.+)$", text, flags=re.M)
        assert commands, f"{path.name} has no command in its docstring"
        if path.name not in RECORDERS and set(commands) - rows:
            missing[path.name] = sorted(set(commands) - rows)
    assert missing == {}, "these commands are no rows of benchmark_results/grid.toml"


def test_every_row_names_a_file_and_its_flags(cells):
    for cell in cells.values():
        assert (ROOT / cell.words[1]).exists(), cell.name
        assert set(cell.typed) <= set(cell.default), cell.name


def test_a_switched_off_flag_and_damaged_results(tmp_path):
    (tmp_path / "grid.toml").write_text(
        '[[cell]]\ncommand = "python algorithms/bc.py --dataset-id a/b --no-track --num-seeds 3"\n')
    cell, = run.read_grid(tmp_path / "grid.toml", tmp_path / "runs")
    assert cell.typed == {"dataset_id": "a/b", "track": "False", "num_seeds": "3"}
    cell.results.mkdir(parents=True)
    (cell.results / "eval.csv").write_text("")
    (cell.results / "args.json").write_text(json.dumps({**cell.default, "dataset_id": "a/b", "num_seeds": 3}))
    for about, said in ('{"method": "bc"}', ""), ("{}", "damaged"), ("[]", "damaged"), ("{", "damaged"):
        (cell.results / "run.json").write_text(about)
        assert run.lacks(cell).startswith(said) and bool(said) == bool(run.lacks(cell))


@pytest.mark.parametrize("dataset", ["hopper-medium-v0", "hopper-medium-replay-v1"])
@pytest.mark.parametrize("method", ["bc", "td3_bc", "iql"])
def test_committed_results_count_as_finished(dataset, method, cells):
    cell = cells[f"{dataset}/{method}"]
    assert run.lacks(cell) == ""


# --- what is run ---
def test_a_grid_is_run_once_and_its_small_files_are_kept(whole):
    names = {str(path.relative_to(whole.results)) for path in whole.results.rglob("*") if path.is_file()}
    kept = [f"my-toy-set/{label}/{name}" for label in "abc" for name in ("args.json", "run.json", "eval.csv")]
    assert names == {"grid.toml", *kept}
    args = json.loads((whole.results / "my-toy-set" / "b" / "args.json").read_text())
    assert args["alpha"] == 5 and args["out_dir"] == "runs" and args["resume"] == ""
    about = json.loads((whole.results / "my-toy-set" / "b" / "run.json").read_text())
    assert about["updates_per_second"] == 20 / 8 and about["cpu"].startswith(f"{os.cpu_count()} x ") and about["python"]
    log = next((whole.runs / "my-toy-set" / "b").glob("log.txt")).read_text()
    assert log.startswith("$ python ") and log.endswith("toy: done\n")
    before, ran = whole.files(), whole.trace()
    status, out, _ = whole.run()
    assert status == 0 and "all 3 cells are finished, 0 of them now" in out
    assert whole.run("--dry-run")[1].splitlines() == [f"# my-toy-set/{label}: finished" for label in "abc"]
    assert whole.files() == before and whole.trace() == ran


def test_a_dry_run_prints_commands_that_can_be_run_by_hand(tmp_path):
    grid = Grid(tmp_path / "x", "--alpha 1", "--alpha 2")
    status, out, _ = grid.run("--dry-run", "--only", "set/b")
    assert status == 0 and not grid.runs.exists() and not grid.trace()
    reason, command = out.splitlines()
    assert reason == "# my-toy-set/b: no results yet" and "--alpha 2 --out-dir" in command
    by_hand(shlex.split(command))
    assert grid.run("--dry-run", "--only", "set/b")[1] == "# my-toy-set/b: no results yet, but its run is done\n"
    assert grid.run("--only", "set/b")[0] == 0 and len(grid.trace()) == 1  # copied, not run again
    assert [path.name for path in (grid.results / "my-toy-set").iterdir()] == ["b"]


def test_shards_are_the_grid_without_overlap(tmp_path, capsys, monkeypatch):
    grid = Grid(tmp_path / "x", *[f"--alpha {i}" for i in range(7)])
    argv = ["run.py", "--grid", str(grid.results / "grid.toml"), "--dry-run", "--shard"]
    for n in range(1, 10):
        union = []
        for i in range(1, n + 1):
            monkeypatch.setattr(sys, "argv", [*argv, f"{i}/{n}"])
            run.main()
            union += re.findall("^# (.*?):", capsys.readouterr().out, flags=re.M)
        assert sorted(union) == [f"my-toy-set/{label}" for label in "abcdefg"], n


def test_workers_share_devices_and_take_one_thread_each(tmp_path):
    grid = Grid(tmp_path / "x", *["--delay 0.05"] * 3)
    assert grid.run("--devices", "3,5")[0] == 0
    rows = grid.trace()
    assert [row[5] for row in rows] == ["1"] * 3 and [row[7] for row in rows] == ["0"] * 3
    assert sorted(row[4] for row in rows[:2]) == ["3", "5"] and rows[2][4] in ("3", "5")
    begun = [float(row[6]) for row in rows]
    assert begun[1] - begun[0] < 1 <= begun[2] - begun[0]  # a cell takes a second: two at a time, no third


def test_a_failed_cell_is_listed_and_the_others_go_on(tmp_path):
    missing = "python nowhere.py --dataset-id my/toy+set"
    rows = "--crash 7", "--no-such-flag 1", missing, "--delay 0.05", "--alpha 3", "--dataset-id full"
    grid = Grid(tmp_path / "x", *rows)
    (grid.results / "full").touch()  # nothing can be written there
    process = grid.start()
    until(lambda: [row for row in grid.trace() if row[0] == "d"])
    os.kill(int(grid.trace()[-1][2]), signal.SIGKILL)  # as the kernel does when memory runs out
    out, err = process.communicate(timeout=60)
    lines = err.splitlines()
    listed = {line.split(":")[0]: line for line in lines if line.startswith(("my-toy-set/", "full/"))}
    assert process.returncode == 1 and lines[-1].startswith("run.py: 5 of 6 cells failed")
    assert "status 1: toy: crashed as asked" in listed["my-toy-set/a"] and "log.txt" in listed["my-toy-set/a"]
    assert "unrecognized arguments: --no-such-flag 1" in listed["my-toy-set/b"]
    assert "status 2:" in listed["my-toy-set/c"] and "nowhere.py" in listed["my-toy-set/c"]
    assert "SIGKILL: " in listed["my-toy-set/d"] and "Errno" in listed["full/f"] and len(listed) == 5
    assert [path.name for path in (grid.results / "my-toy-set").iterdir()] == ["e"]
    assert grid.run("--only", "set/d")[0] == 0 and grid.trace()[-1][:2] == ["d", "0"]  # nothing to resume
    assert len(list(grid.runs.glob("my-toy-set/d/*__toy__*"))) == 1


def test_a_changed_command_is_run_anew_and_old_results_stay_until_then(tmp_path):
    grid = Grid(tmp_path / "x", "--alpha 3")
    result = grid.results / "my-toy-set" / "a"
    assert grid.run()[0] == 0
    old = (result / "eval.csv").read_text()
    grid.rows("--alpha 3.0 --num-updates=20")  # the same
    assert "0 of them now" in grid.run()[1]
    grid.rows("--alpha 4 --crash 12")
    status, out, _ = grid.run()
    assert status == 1 and "results of alpha 3.0, not 4; it is run anew" in out
    assert (result / "eval.csv").read_text() == old
    for flags, alpha in ("--alpha 4", 4.0), ("", 2.5):
        grid.rows(flags)
        assert grid.run()[0] == 0
        assert json.loads((result / "args.json").read_text())["alpha"] == alpha
        assert float((result / "eval.csv").read_text().split(",")[-1]) == float(old.split(",")[-1]) / 3 * alpha
        assert {path.name for path in result.parent.iterdir()} == {"a"}


@pytest.mark.parametrize("text", ["", "cell = 3", "[[cell]]\ncommand = 'bash x.py'", "[[cell]]\nlabel = 'x'", "[[cell]",
                                  "[[cell]]\ncommand = 'python x.py'", "[[cell]]\ncommand = 'python'",
                                  "[[cell]]\ncommand = \"python x.py --dataset-id 'a\"",
                                  "[[cell]]\ncommand = 'python x.py --dataset-id a'\nseeds = 3",
                                  "[[cell]]\ncommand = 'python x.py --dataset-id a'\nlabel = '../x'",
                                  "[[cell]]\ncommand = 'python x.py --dataset-id a'\n" * 2])
def test_a_wrong_table_ends_with_a_sentence(text, tmp_path, capsys):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        run.read_grid(tmp_path / "grid.toml", tmp_path)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("run.py: ") and len(err.splitlines()) == 1


# --- what is interrupted ---
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_cells_save_and_they_are_resumed(number, whole, tmp_path):
    grid = again(tmp_path, whole, 0.06)
    process = grid.start("--workers", "2")
    until(lambda: len(list(grid.runs.glob("*/*/*/checkpoint.pt"))) == 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.splitlines()[-1] == "run.py: stopped; start again to go on"
    assert "toy: stopped at update" in (grid.runs / "my-toy-set" / "a" / "log.txt").read_text()
    assert not list(grid.results.glob("my*")) and len(grid.trace()) == 2
    assert "--resume" in grid.run("--dry-run")[1]
    assert grid.run("--workers", "2")[0] == 0
    first = {row[0]: int(row[1]) for row in grid.trace()[2:]}
    assert first["a"] >= 5 and first["b"] >= 5 and first["c"] == 0
    assert grid.files() == whole.files()


def test_a_second_signal_kills(tmp_path):
    grid = Grid(tmp_path / "x", "--delay 1 --num-updates 100")
    process = grid.start()
    until(grid.trace)
    process.terminate()
    time.sleep(0.4)
    process.terminate()
    began = time.time()
    process.communicate(timeout=60)
    assert process.returncode == 143 and time.time() - began < 2  # to save would take ten seconds
    with pytest.raises(OSError):
        os.kill(int(grid.trace()[0][2]), 0)


def test_killed_at_any_moment_and_restarted_it_leaves_the_same_files(whole, tmp_path):
    """SIGKILL again and again, the restart while the cells of the last one still save."""
    grid, kills = again(tmp_path, whole, 0.05), 0
    for wait in 0, 0.1, 0.4, 0, 0.6, 0.3:
        process, seen = grid.start("--workers", "2"), len(grid.trace())
        until(lambda: len(grid.trace()) > seen or process.poll() is not None)
        time.sleep(wait)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert grid.run("--workers", "2")[0] == 0 and kills >= 2
    assert ["two", "at", "once"] not in grid.trace() and (len(grid.trace()) > 3 or sys.platform != "linux")
    assert grid.files() == whole.files()


@pytest.mark.parametrize("step", range(8))
def test_killed_while_files_are_exchanged(step, tmp_path, monkeypatch, capsys):
    """At each step of the exchange there are the old results, or the new, or none for a moment; never a part."""
    grid = Grid(tmp_path / "x", "--alpha 3")
    argv = ["run.py", "--grid", str(grid.results / "grid.toml"), "--runs", str(grid.runs)]
    monkeypatch.setattr(sys, "argv", argv)
    run.main()
    grid.rows("--alpha 4")
    count, result = [0], grid.results / "my-toy-set" / "a"

    def killed(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] > step:
                raise SystemExit("killed")
            return function(*args, **kwargs)
        return call

    cell, = run.read_grid(grid.results / "grid.toml", grid.runs)
    by_hand(run.full_command(cell, None))
    with monkeypatch.context() as patch:
        patch.setattr(run.shutil, "copyfile", killed(run.shutil.copyfile))
        patch.setattr(run.shutil, "rmtree", killed(run.shutil.rmtree))
        patch.setattr(Path, "rename", killed(Path.rename))
        patch.setattr(Path, "write_text", killed(Path.write_text))
        with pytest.raises(SystemExit, match="killed"):
            run.publish(cell, run.find_run(cell)[0])
            raise SystemExit("killed")  # after the last step
    assert not result.exists() or {path.name for path in result.iterdir()} == set(run.KEPT)
    run.main()
    assert json.loads((result / "args.json").read_text())["alpha"] == 4
    assert [path.name for path in result.parent.iterdir()] == ["a"] and len(grid.trace()) == 2


def test_a_run_that_the_flags_of_today_cannot_resume_is_begun_anew(tmp_path):
    grid = Grid(tmp_path / "x", "--crash 12")
    assert grid.run()[0] == 1
    grid.rows("")
    (grid.folder / "toy.py").write_text(TOY.replace("    crash: int = 0", "    crash: int = 0\n    beta: float = 1.0"))
    assert grid.run()[0] == 0
    assert [row[1] for row in grid.trace()] == ["0", "0"]


def test_a_real_method_stopped_killed_and_restarted(tmp_path):
    import bc

    grid = Grid(tmp_path / "x", BC)
    place = grid.runs / "hopper-medium-v0" / "a"
    for times, end in enumerate((subprocess.Popen.terminate, subprocess.Popen.kill), 1):
        process, log = grid.start(), place / "log.txt"
        until(lambda: log.exists() and len(re.findall(r"\$ [^$]*updates/s", log.read_text())) == times)
        end(process)
        process.communicate()
    assert grid.run()[0] == 0
    commands = re.findall(r"\$ .*", log.read_text())
    assert ["--resume" in command for command in commands] == [False, True, True]
    assert {path.name for path in place.iterdir() if path.is_file()} == {"lock", "log.txt"}
    assert len([path for path in place.iterdir() if path.is_dir()]) == 1
    whole = bc.main(bc.Args(dataset_id="hopper/medium-v0", num_updates=2000, eval_every=1000, eval_episodes=1,
                            hidden_dim=16, batch_size=16, device="cpu", out_dir=str(tmp_path)))
    result = grid.results / "hopper-medium-v0" / "a"
    assert (result / "eval.csv").read_text() == (whole / "eval.csv").read_text()
    for path in result.iterdir():
        assert path.name in run.KEPT and str(tmp_path) not in path.read_text()


# --- Ray ---
@pytest.mark.ray
def test_ray_worker_killed(whole, tmp_path, monkeypatch):
    """A cluster of two workers; one is killed while it works: its cell goes on elsewhere, nothing is lost."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one to the home directory
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    grid = again(tmp_path, whole, 0.06)
    address = ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False).address_info["gcs_address"]
    try:
        process = grid.start("--ray", address)
        until(lambda: list(grid.runs.glob("*/*/*/checkpoint.pt")))
        label = next(grid.runs.glob("*/*/*/checkpoint.pt")).parents[1].name
        worker, = [row[3] for row in grid.trace() if row[0] == label]
        os.kill(int(worker), signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    finally:
        ray.shutdown()
    assert process.returncode == 0 and "all 3 cells are finished, 3 of them now" in out, err
    mine = [row for row in grid.trace() if row[0] == label]
    assert len(mine) == 2 and int(mine[1][1]) >= 5 and mine[1][3] != worker  # resumed, by another worker
    assert len(grid.trace()) == 4 and grid.files() == whole.files()
