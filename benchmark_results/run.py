"""Runs a grid of methods and datasets: a cell is one command line and one process, with all its seeds side by side.

    python benchmark_results/run.py --dry-run              # what is left to run, and why
    python benchmark_results/run.py --workers 4            # four cells at a time
    python benchmark_results/run.py --only medium-v0/iql   # rows whose dataset/label holds this text
    python benchmark_results/run.py --devices 0,1,2,3      # four cells at a time, each on a GPU of its own
    python benchmark_results/run.py --shard 2/8            # the second of eight parts, for array jobs
    python benchmark_results/run.py --ray HOST:PORT        # on a Ray cluster: pip install -r requirements-ray.txt

The rows stand in grid.toml: `command`, and a `label` where it is not the name of the file. A command is run as it is,
with --out-dir or --resume appended. Its run and log.txt grow in runs/grid/DATASET/LABEL/; the small files of a finished
run go to DATASET/LABEL/ beside the table, run.json with the processor's model, Python's version and updates per second.
A cell whose small files are there, with an args.json that is what the command asks for, is finished; any other is
resumed or begun, and replaces older results when it is done.

Kill it at any moment and start it again: the result is the same set of files. Ctrl-C and SIGTERM let the cells save
and leave; a second one kills them. If this process dies first, they save (Linux) or go on (elsewhere), and a lock
that they inherit makes the next start wait for them. A failed cell does not stop the others; the status is then 1.

A cell trains with one thread; its evaluation, mostly one process at a time, comes on top. Two variables keep glibc
from handing large blocks back after every update (MEMORY), which costs CQL with several seeds most of its time on a
CPU. On a Ray cluster a cell takes one GPU if there is any, else one CPU, and is resumed on another worker if its own
dies: the repository has to be at the same path on every node, in a file system that they share and that can lock files.
"""
import argparse, ast, fcntl, json, os, platform, queue, re, shlex, shutil, signal, socket, subprocess, sys, time
import tomllib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
KEPT = "args.json", "run.json", "eval.csv"
FREE = "out_dir", "resume", "device", "eval_workers", "track", "wandb_project_name"  # flags that shape no result
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}  # glibc keeps what an update frees
# Becomes the command that follows it, to which Linux then sends SIGTERM when its parent dies.
GUARD = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
STOP = []  # the signals that have arrived


class Cell(NamedTuple):
    name: str  # dataset/label
    words: list  # of the command line
    typed: dict  # its flags
    default: dict  # all flags of its method
    results: Path  # where the small files go
    work: Path  # where its runs grow, with lock and log.txt


def fail(message, status=2):
    sys.stderr.write(f"run.py: {message}\n")
    raise SystemExit(status)


# --- the table ---
def flags(words, default):
    """{name: text} of the flags of a command line; "True" for one without a value, --no-NAME is NAME "False"."""
    found = {}
    for word, after in zip(words, [*words[1:], "--"]):
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if word.startswith("--no-") and name[3:] in default:
            found[name[3:]] = "False"
        elif word.startswith("--"):
            found[name] = value if equals else "True" if after.startswith("--") else after
    return found


def defaults(script):
    """{name: value} of a method's Args, read without importing it; of a file that cannot be read the cell will tell."""
    def value(node):  # or, of one that depends on the machine, its text
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ast.unparse(node)

    try:
        tree = ast.parse((ROOT / script).read_text())
    except (OSError, SyntaxError):
        return {}
    fields = [x for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args" for x in node.body]
    return {x.target.id: value(x.value) for x in fields if isinstance(x, ast.AnnAssign)}


def read_grid(path, runs):
    """The cells of a table."""
    cells = {}
    try:
        for row in tomllib.loads(path.read_text())["cell"]:
            words = shlex.split(row["command"])
            default = defaults(words[1])
            typed = flags(words, default)
            asked = {"env_id": "", **default, **typed}
            name = re.sub("[/+]+", "-", asked.get("dataset_id", asked["env_id"]))[-80:].strip("-.")  # as Run names it
            name += "/" + row.get("label", Path(words[1]).stem)
            if words[0] != "python" or row.keys() - {"command", "label"} or not re.fullmatch(r"[^/]+/\w[\w.-]*", name):
                raise ValueError(f"{row} is not a command, python FILE --dataset-id ID, and perhaps a label")
            if name in cells:
                raise ValueError(f"two rows are {name}: give one a label")
            cells[name] = Cell(name, words, typed, default, path.parent / name, runs / name)
    except Exception as error:
        fail(f"{path} is no table of [[cell]] rows: {error!r}")
    return list(cells.values())


# --- what is there ---
def same(value, asked):
    try:
        return float(value) == float(asked)
    except (TypeError, ValueError):
        return str(value) == str(asked)


def differs(cell, has):
    """Why a run with these flags and this method is not what the command asks for; empty if it is."""
    for name, asked in {"method": Path(cell.words[1]).stem, **cell.default, **cell.typed}.items():
        known = name in has or name in cell.typed  # else it is newer than the run, which had its default
        if known and name not in FREE and not same(has.get(name), asked):
            return f"results of {name} {has.get(name)}, not {asked}"
    return ""


def lacks(cell):
    """Why the results of a cell are not there as its command asks for them; empty if they are."""
    if not all((cell.results / name).exists() for name in KEPT):
        return "no results yet"
    try:
        has, about = (json.loads((cell.results / name).read_text()) for name in KEPT[:2])
        return differs(cell, {**has, "method": about["method"]})
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"damaged results ({error!r})"


def find_run(cell):
    """The directory of a run to copy from or to resume, else None; and whether it is done."""
    runs = {path.parent: json.loads(path.with_name("args.json").read_text())
            for path in sorted(cell.work.glob("*__*__*__*/checkpoint.pt"))}  # DATASET__METHOD__SEED__TIME
    runs = {run: has for run, has in runs.items() if not differs(cell, {**has, "method": run.name.split("__")[-3]})}
    done = [run for run in runs if (run / "run.json").exists()]  # which is written last
    begun = [run for run, has in runs.items() if has.keys() == cell.default.keys()]  # else the file has changed since
    return (done or begun or [None])[-1], bool(done)


def full_command(cell, run):
    """The words to run in ROOT: the command as it stands, or the resumption of a run."""
    if run:
        return [*cell.words[:2], "--resume", os.path.relpath(run, ROOT)]
    return [*cell.words, "--out-dir", os.path.relpath(cell.work, ROOT)]


# --- one cell ---
def tidy(cell):
    """Clears two places beside the results, for the next ones and for those that they replace."""
    places = [cell.results.with_name(f".{cell.results.name}.{end}") for end in ("new", "old")]
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
    return places


def processor():
    """Its model, as Linux has it."""
    told = Path("/proc/cpuinfo")
    return (re.findall("model name.*: (.*)", told.read_text() if told.exists() else "") or [platform.machine()])[0]


def about(run):
    """The text of run.json, with what the files of the methods leave to others."""
    known = json.loads((run / "run.json").read_text())
    return json.dumps({**known, "cpu": f"{os.cpu_count()} x {processor()}", "python": platform.python_version(),
                       "updates_per_second": round(known["update"] / known["wall_seconds"], 2)}, indent=1)


def publish(cell, run):
    """The small files of a finished run become the results, whole or not at all."""
    new, old = tidy(cell)
    new.mkdir(parents=True)
    shutil.copyfile(run / "eval.csv", new / "eval.csv")
    (new / "run.json").write_text(about(run))
    args = json.loads((run / "args.json").read_text())
    (new / "args.json").write_text(json.dumps({**args, "out_dir": "runs"}, indent=1))
    if cell.results.exists():
        cell.results.rename(old)
    new.rename(cell.results)
    tidy(cell)


def end_of(process):
    """Its exit status. The first signal asks it to save and leave, the second kills it."""
    told = 0
    while process.poll() is None:
        try:
            time.sleep(0.1)
        except KeyboardInterrupt:  # from ray.cancel
            STOP.append(signal.SIGINT)
        if len(STOP) > told:
            told += 1
            process.send_signal(signal.SIGTERM if told == 1 else signal.SIGKILL)
    return process.returncode


def run_cell(cell, env={}):
    """Brings a cell to its end, in a thread or on a Ray worker; returns what went wrong, if anything did."""
    cell.work.mkdir(parents=True, exist_ok=True)
    with open(cell.work / "lock", "w") as lock, open(cell.work / "log.txt", "a+", errors="replace") as log:
        while not STOP:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # another runner has it, or a cell whose runner was killed
                time.sleep(0.2)
        if STOP or not lacks(cell):  # another runner has finished it
            return
        run, done = find_run(cell)
        if not done:
            for path in cell.work.iterdir():
                if path.is_dir() and not (path / "checkpoint.pt").exists():
                    shutil.rmtree(path)  # nothing to resume in it
            words = full_command(cell, run)
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            start, guard = log.tell(), [sys.executable, "-c", GUARD] * (sys.platform == "linux")
            status = end_of(subprocess.Popen(
                [*guard, sys.executable, *words[1:]], cwd=ROOT, env={**MEMORY, **os.environ, **THREADS, **env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[lock.fileno()], start_new_session=True))  # Ctrl-C is passed on by end_of alone
            run, done = find_run(cell)
            if status or not done:
                log.seek(start)
                said = [line for line in log.read().splitlines() if line.strip()] or ["it said nothing"]
                return f"{f'status {status}' if status >= 0 else signal.Signals(-status).name}: {said[-1].strip()}"
        publish(cell, run)


# --- all cells ---
def local(args):
    """How to hand in a cell, to threads that wait for one process each, and how to withdraw them."""
    slots, devices = queue.Queue(), args.devices or [None]
    for i in range(args.workers or len(devices)):
        slots.put(devices[i % len(devices)])

    def job(cell):
        device = slots.get()
        try:
            return None if STOP else run_cell(cell, {"CUDA_VISIBLE_DEVICES": device} if device else {})
        finally:
            slots.put(device)

    pool = ThreadPoolExecutor(slots.qsize())
    return lambda cell: pool.submit(job, cell), lambda: None


def on_ray(args):
    """The same on a Ray cluster."""
    try:
        import ray
        if args.ray not in ("auto", "local"):  # Ray itself would try for many minutes
            host, port = args.ray.rsplit(":", 1)
            socket.create_connection((host, int(port)), 10).close()
        ray.init(args.ray, log_to_driver=False, logging_level="ERROR")
    except ImportError:
        fail("--ray needs Ray: pip install -r requirements-ray.txt")
    except Exception as error:
        fail(f"--ray {args.ray} is no HOST:PORT of a cluster, auto or local: {' '.join(str(error).split())}")
    gpus, refs = int("GPU" in ray.cluster_resources()), []
    task = ray.remote(num_cpus=1 - gpus, num_gpus=gpus, max_retries=3)(run_cell)
    return (lambda cell: refs.append(task.remote(cell)) or refs[-1].future(),
            lambda: [ray.cancel(ref, force=len(STOP) > 1) for ref in refs])


def run_all(args, cells, total):
    """Runs the cells; returns {name: error} of those that failed."""
    failed, told = {}, 0
    hand_in, withdraw = on_ray(args) if args.ray else local(args)
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, frame: STOP.append(number))
    futures = {hand_in(cell): cell for cell in cells}
    with tqdm(total=total, initial=total - len(cells), desc="grid", unit="cell", smoothing=0) as bar:
        while futures:
            for future in wait(futures, 0.5, FIRST_COMPLETED).done:
                cell, error = futures.pop(future), future.exception() or future.result()
                if error and not STOP:
                    said = str(error).strip().splitlines() or [repr(error)]
                    failed[cell.name] = f"{said[-1]} ({cell.work / 'log.txt'})"
                    bar.set_postfix(failed=len(failed))
                bar.update(not STOP)
            if len(STOP) > told:
                told = len(STOP)
                withdraw()
            if sys.stderr.isatty():
                bar.refresh()  # its clock
    return failed


def main():
    parser, path = argparse.ArgumentParser(description=__doc__), lambda text: Path(text).resolve()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--only", action="append", metavar="TEXT", help="rows with it in dataset/label; repeatable")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th row from the I-th on: 1/N to N/N")
    parser.add_argument("--workers", type=int, metavar="N", help="cells at a time (default: one, or one per device)")
    parser.add_argument("--devices", type=lambda x: x.split(","), metavar="I,J", help="GPUs, dealt out to the workers")
    parser.add_argument("--ray", metavar="ADDRESS", help="HOST:PORT of a Ray cluster; auto; local: one of its own")
    parser.add_argument("--grid", type=path, default=path(__file__).with_name("grid.toml"), help="the table")
    parser.add_argument("--runs", type=path, default=ROOT / "runs" / "grid", help="where runs grow")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1 or args.ray and (args.workers or args.devices):
        parser.error("--workers has to be at least 1, and a Ray cluster has workers and devices of its own")
    part, parts = map(int, re.fullmatch(r"\d+/\d+", args.shard) and args.shard.split("/") or (0, 0))
    if not 1 <= part <= parts:
        parser.error(f"--shard {args.shard} is none of 1/N to N/N")
    cells = [cell for cell in read_grid(args.grid, args.runs) if any(text in cell.name for text in args.only or [""])]
    cells, left = (cells or parser.error(f"no row of {args.grid} is called so: {args.only}"))[part - 1::parts], []
    for cell in cells:
        why, (run, done) = lacks(cell), find_run(cell)
        left += [cell] * bool(why)
        if args.dry_run:
            print(f"# {cell.name}: {why or 'finished'}{', but its run is done' if why and done else ''}")
            if why and not done:
                print(shlex.join(full_command(cell, run)))
        elif not why:
            tidy(cell)  # after a kill while files were exchanged
        elif cell.results.exists():
            print(f"{cell.name}: {why}; it is run anew", flush=True)
    failed = run_all(args, left, len(cells)) if left and not args.dry_run else {}
    for name, error in failed.items():
        sys.stderr.write(f"{name}: {error}\n")
    if STOP:
        fail("stopped; start again to go on", 128 + STOP[0])
    if failed:
        fail(f"{len(failed)} of {len(cells)} cells failed; start again to try them once more", 1)
    if not args.dry_run:
        print(f"all {len(cells)} cells are finished, {len(left)} of them now; the results are in {args.grid.parent}")


if __name__ == "__main__":
    main()
