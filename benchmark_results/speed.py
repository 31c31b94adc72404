"""Updates per second of every method, against a loop as it is usually written and against its matrix products alone.

    python benchmark_results/speed.py                        # everything, on the GPU where there is one
    python benchmark_results/speed.py --methods td3_bc iql --seeds 1 4 --parts updates     # only printed
    python benchmark_results/speed.py --report               # only writes SPEED.md anew, from the CSVs

One process and, on a CPU, one thread. What is compared alternates, round after round, and the medians are kept.
`floor` replays the matrix products of one update, recorded as they pass, into memory that is already there; the last
layer of a critic, one column, is none.
`control` is TD3+BC with two nn.Linear critics, an optimiser for each network, indices from NumPy, .item() at each step.
Writes benchmark_results/speed/<device>.csv and benchmark_results/SPEED.md when everything was measured, with --out what
was; with MALLOC_MMAP_MAX_=0 in the environment, as run.py has it for its cells, the file is <device>-keeps-memory.csv.
"""
import argparse
import contextlib
import copy
import csv
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algorithms"))

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

OUT = ROOT / "benchmark_results" / "speed"
PARTS = "updates", "loading", "evaluation", "start"
KEEPS = os.environ.get("MALLOC_MMAP_MAX_") == "0"  # glibc keeps what is freed, see run.py
PRODUCTS = "mm", "bmm", "addmm", "baddbmm"


# --- what is timed ---
def clock(calls, rounds, seconds, device):
    """Seconds per call of each function in turn, `rounds` times; the medians."""
    def timed(call, n):
        began = time.perf_counter()
        for _ in range(n):
            call()
        if device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / n

    repeats = {name: max(1, round(seconds / max(timed(call, 3), 1e-6))) for name, call in calls.items()}
    found = [{name: timed(call, repeats[name]) for name, call in calls.items()} for _ in range(rounds)]
    return {name: median(x[name] for x in found) for name in calls}


def make(method, S, device):
    """The module of a method and an agent with its data, as main makes it; a replay holds 10,000 random steps."""
    module = importlib.import_module(method)
    discrete = hasattr(module.Agent, "discrete")
    flags = {"num_seeds": S, "device": device, "eval_episodes": 0}
    if hasattr(module, "load"):
        flags["dataset_id"] = "lunarlander/mixed-v0" if discrete else "hopper/medium-v0"
    if method == "mopo":
        flags.update(env_id="Hopper-v5", rollout_batch=400)  # 10,000 imagined steps
    args = module.check(module.Args(**flags))
    if hasattr(module, "load"):
        data = module.load(args)
        module.prepare(data, args)
        return module, module.Agent(args, data.obs_dim, data.act_dim, data)
    task = module.Task(args)
    data = module.Replay(S, 10_000, *(task.obs_dim, task.act_dim)[: 2 - discrete]).to(device)
    data.size += 10_000
    return module, module.Agent(args, task.obs_dim, task.act_dim, data)


class Record(TorchDispatchMode):
    """Keeps the operands of every matrix product, with their strides."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        out = function(*args, **(kwargs or {}))
        if name in PRODUCTS:
            x, y = args[-2:]
            self.calls.append((torch.bmm if x.dim() == 3 else torch.mm, x.detach().clone(), y.detach().clone(), torch.empty_like(out)))
        return out


@torch.no_grad()
def replay(calls):
    for product, x, y, out in calls:
        product(x, y, out=out)


class Control:
    """TD3+BC as most public files have it."""

    def __init__(self, data, device):
        def net(d_in, d_out, *last):
            layers = nn.Linear(d_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, d_out), *last
            return nn.Sequential(*layers).to(device)

        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        self.actor, self.q1, self.q2 = net(obs_dim, act_dim, nn.Tanh()), net(obs_dim + act_dim, 1), net(obs_dim + act_dim, 1)
        self.targets = [copy.deepcopy(x) for x in (self.actor, self.q1, self.q2)]
        self.actor_opt, self.q1_opt, self.q2_opt = (torch.optim.Adam(x.parameters(), 3e-4) for x in (self.actor, self.q1, self.q2))
        self.data = [x.cpu().numpy() for x in (data.obs, data.action, data.reward[:, None], data.next_obs, data.terminated[:, None])]
        self.device, self.steps, self.logged = device, 0, {}

    def __call__(self):
        self.steps += 1
        i = np.random.randint(len(self.data[0]), size=256)
        s, a, r, s_next, d = (torch.tensor(x[i], device=self.device) for x in self.data)
        actor_target, q1_target, q2_target = self.targets
        with torch.no_grad():
            noise = (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5)
            x = torch.cat([s_next, (actor_target(s_next) + noise).clamp(-1, 1)], 1)
            y = r + 0.99 * (1 - d) * torch.min(q1_target(x), q2_target(x))
        x = torch.cat([s, a], 1)
        q1_loss, q2_loss = F.mse_loss(self.q1(x), y), F.mse_loss(self.q2(x), y)
        self.q1_opt.zero_grad()
        self.q2_opt.zero_grad()
        (q1_loss + q2_loss).backward()
        self.q1_opt.step()
        self.q2_opt.step()
        self.logged["critic_loss"] = (q1_loss + q2_loss).item()
        if self.steps % 2 == 0:
            pi = self.actor(s)
            q = self.q1(torch.cat([s, pi], 1))
            loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
            self.actor_opt.zero_grad()
            loss.backward()
            self.actor_opt.step()
            self.logged["actor_loss"] = loss.item()
            for target, online in zip(self.targets, (self.actor, self.q1, self.q2)):
                for p, q in zip(target.parameters(), online.parameters()):
                    p.data.copy_(0.005 * q.data + 0.995 * p.data)


# --- parts ---
def updates(options, device):
    """Rows of (method, S, mode, precision): updates per second of all S agents together, and the floor's."""
    for method in options.methods:
        for S in options.seeds:
            for precision in ("fp32", "tf32") if device != "cpu" else ("fp32",):
                yield from updates_of(method, S, precision, options, device)


def updates_of(method, S, precision, options, device):
    module, agent = make(method, S, device)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    per_call = agent.updates_per_call
    forget_peak()
    agent.update()
    with Record() as record:
        agent.update()
    calls = {"eager": agent.update, "floor": lambda: replay(record.calls)}
    if device != "cpu":
        graphed = make(method, S, device)[1]
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        calls["graph"] = module.cuda_graph(graphed)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(5):
            calls["graph"]()
    if method == "td3_bc" and S == 1 and precision == "fp32":
        control = Control(agent.data, device)
        calls["control"] = lambda: (control(), control())  # as many updates as one call of ours
    found = clock(calls, options.rounds, options.seconds, device)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else peak_memory()
    for mode in [name for name in ("eager", "graph", "control") if name in found]:
        rate, floor = per_call / found[mode], per_call / found["floor"]
        yield {"what": "updates", "method": method, "S": S, "mode": mode, "precision": precision, "per_second": rate,
               "seed_updates_per_second": S * rate, "floor_per_second": floor, "of_floor": rate / floor, "peak_mib": memory}


def forget_peak():
    """Starts the measurement of peak_memory, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory():
    """MiB that this process has held at most since then; NaN where it cannot be known, or where memory is kept."""
    if sys.platform != "linux" or KEEPS:
        return float("nan")
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def loading(options, device):
    """Seconds to load a D4RL file of 1M transitions in episodes of 1,000."""
    td3_bc, n = importlib.import_module("td3_bc"), options.transitions
    with tempfile.TemporaryDirectory() as folder:
        path, rng = Path(folder, "million.hdf5"), np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            file["observations"] = rng.standard_normal((n, 11), np.float32)
            file["actions"] = rng.uniform(-1, 1, (n, 3)).astype(np.float32)
            file["rewards"], file["terminals"] = rng.standard_normal(n, np.float32), np.zeros(n, bool)
            file["timeouts"] = np.arange(1, n + 1) % 1000 == 0
        args = td3_bc.check(td3_bc.Args(dataset_id=str(path), eval_episodes=0, device=device))
        found = clock({"loading": lambda: td3_bc.load(args)}, options.rounds, 0, device)
    yield {"what": "loading", "method": f"{n} transitions", "seconds": found["loading"]}


def evaluation(options, device):
    """Environment steps per second: one environment in a loop, our worker with 10 episodes, the physics alone."""
    import mujoco
    import pickle

    td3_bc = importlib.import_module("td3_bc")
    args = td3_bc.check(td3_bc.Args(env_id=options.env_id, eval_episodes=10, device="cpu"))
    task = td3_bc.Task(args)
    raw = td3_bc.RawPolicy(td3_bc.Actor(1, task.obs_dim, task.act_dim, 256), 1, task)
    env, steps = gym.make(options.env_id), options.steps
    simulator = env.unwrapped

    def single():
        obs, _ = env.reset(seed=0)
        with torch.no_grad():
            for _ in range(steps):
                action = raw(torch.from_numpy(obs[None].astype(np.float32)))[0, 0].numpy()
                obs, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    obs, _ = env.reset()

    def physics():
        env.reset(seed=0)
        for _ in range(steps):
            mujoco.mj_step(simulator.model, simulator.data, simulator.frame_skip)

    seeds, lengths = np.arange(10).reshape(1, 10), []

    def worker():
        job = pickle.dumps(raw), pickle.dumps(task.spec), task.obs_space, 0, seeds, [True], 0.99, task.reference
        lengths.append(10 * td3_bc.evaluate(*job)[0][6])

    found = clock({"single environment": single, "our worker": worker, "physics alone": physics}, options.rounds, 0, "cpu")
    for name, seconds in found.items():
        yield {"what": "evaluation", "method": f"{options.env_id}, {name}",
               "per_second": (lengths[-1] if name == "our worker" else steps) / seconds}


def start(options, device):
    """Seconds from the command line to the first update, in a process of its own."""
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import td3_bc\n"
            "args = td3_bc.check(td3_bc.Args(eval_episodes=0, device=sys.argv[2])); data = td3_bc.load(args)\n"
            "td3_bc.prepare(data, args); td3_bc.Agent(args, data.obs_dim, data.act_dim, data).update()")
    command = [sys.executable, "-c", code, str(ROOT / "algorithms"), device]
    found = clock({"start": lambda: subprocess.run(command, check=True)}, options.rounds, 0, "cpu")
    yield {"what": "start", "method": "td3_bc, command to first update", "seconds": found["start"]}


def protocol(rows, cores):
    """Extrapolated: 1M updates of td3_bc and 200 evaluations of 10 episodes of 1,000 steps, side by side."""
    rates = {row["S"]: row["per_second"] for row in rows if row.get("method") == "td3_bc" and row["mode"] != "control"}
    steps = [row["per_second"] for row in rows if row["what"] == "evaluation" and "our worker" in row["method"]]
    for S, rate in rates.items():
        if steps:
            train, evaluate = 1e6 / rate, 200 * S * 10_000 / steps[0]
            workers = max(1, min(4, cores - 1))
            yield {"what": "extrapolated", "method": "td3_bc, 1M updates, 200 evaluations", "S": S,
                   "seconds": max(train, evaluate / workers) if cores > 1 else train + evaluate}


# --- files ---
COLUMNS = ("what", "method", "S", "mode", "precision", "per_second", "seed_updates_per_second", "floor_per_second",
           "of_floor", "peak_mib", "seconds")


def about(device, options):
    cpu = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    git = subprocess.getstatusoutput(f"git -C '{ROOT}' rev-parse HEAD")
    return {"device": torch.cuda.get_device_name() if device != "cpu" else (cpu or [platform.machine()])[0],
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "gymnasium": gym.__version__,
            "rounds": options.rounds, "seconds": options.seconds, "freed memory": "kept" if KEEPS else "returned",
            "commit": None if git[0] else git[1], "date": time.strftime("%Y-%m-%d")}


def table(rows, head):
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]])


def text(name, rows, facts):
    """The part of SPEED.md for one device."""
    number = lambda row, key, form: format(float(row[key]), form) if row.get(key) else ""
    lines = [[row["method"], row["S"], row["mode"], row["precision"], number(row, "per_second", ",.1f"),
              number(row, "seed_updates_per_second", ",.1f"), number(row, "floor_per_second", ",.1f"),
              number(row, "of_floor", ".2f"), number(row, "peak_mib", ",.0f").replace("nan", "")]
             for row in rows if row["what"] == "updates"]
    rest = [[row["what"], row["method"], row["S"], number(row, "per_second", ",.0f"), number(row, "seconds", ",.2f")]
            for row in rows if row["what"] != "updates"]
    return "\n\n".join([
        f"## {facts['device']}" + ", freed memory kept" * (facts.get("freed memory") == "kept"),
        ", ".join(f"{key} {value}" for key, value in facts.items() if key != "device"),
        table(lines, ["method", "S", "mode", "precision", "updates/s", "seeds x updates/s", "floor, updates/s", "of the floor",
                      "peak MiB"]),
        *[table(rest, ["part", "", "S", "per second", "seconds"])] * bool(rest)])


def report(place=OUT):
    parts = [text(path.stem, list(csv.DictReader(path.open())), json.loads(path.with_suffix(".json").read_text()))
             for path in sorted(place.glob("*.csv"), key=lambda path: path.stem)]
    head = ("# Speed\n\nMade by `python benchmark_results/speed.py`; medians over rounds in which all that is compared "
            "alternates. An update is one of all S agents. The floor is the time of the same matrix products alone; "
            "`control` is TD3+BC as it is usually written. Lines marked extrapolated are computed from measured parts.")
    (place.parent / "SPEED.md").write_text("\n\n".join([head, *parts]) + "\n")


def main(words=None):
    methods = sorted({path.stem for path in (ROOT / "algorithms").glob("*.py")} - {"bcq_tabular"})  # sweeps of a table
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, help="files in algorithms/")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1 2 4 8 16, with CUDA also 32 and 64")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement in a round")
    parser.add_argument("--env-id", default="HalfCheetah-v5", help="environment of the evaluation part")
    parser.add_argument("--steps", type=int, default=5000, help="environment steps of each measurement")
    parser.add_argument("--transitions", type=int, default=1_000_000, help="size of the file that is loaded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="directory of the CSVs, beside SPEED.md; default: benchmark_results/speed "
                        "when all methods, parts and seeds are measured, else nothing is written")
    parser.add_argument("--report", action="store_true", help="only write SPEED.md")
    options = parser.parse_args(words)
    if min(options.rounds, options.steps, options.transitions) < 1:
        parser.error("--rounds, --steps and --transitions have to be at least 1")
    device, whole = options.device, not options.seeds and options.methods == methods and options.parts == list(PARTS)
    place = options.out or (OUT if whole or options.report else None)
    options.seeds = options.seeds or [1, 2, 4, 8, 16] + [32, 64] * (device != "cpu")
    if not options.report:
        torch.set_num_threads(1)
        rows = []
        for part in options.parts:
            for row in {"updates": updates, "loading": loading, "evaluation": evaluation, "start": start}[part](options, device):
                rows.append(row)
                print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
        rows += protocol(rows, os.cpu_count())
        if not place:
            return
        place.mkdir(parents=True, exist_ok=True)
        facts = about(device, options)
        name = re.sub(r"\W+", "-", facts["device"].lower()).strip("-") + "-keeps-memory" * KEEPS
        with open(place / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        (place / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    report(place)


if __name__ == "__main__":
    main()
