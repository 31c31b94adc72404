"""Updates per second of every method, against a loop as it is usually written and against its matrix products alone.

    python benchmark_results/speed.py                        # everything, on the GPU where there is one
    python benchmark_results/speed.py --methods td3_bc iql --seeds 1 4 --parts updates     # only printed
    python benchmark_results/speed.py --report               # only writes SPEED.md anew, from the CSVs

On a CPU with one thread. Each method and number of seeds has a process of its own, in which what is compared
alternates, round after round; median, lowest and highest round are kept. Its peak of memory is noted after the first
updates, before anything is there that training does not need: of PyTorch's allocator on a GPU, on a CPU of the whole
process.
`floor` replays the matrix products of one update, recorded as they pass, into memory that is already there; the last
layer of a critic, one column, is none.
`control` is TD3+BC with two nn.Linear critics, an optimiser for each network, indices from NumPy, .item() at each step;
its batches come from the host, as the authors' do, those of `control_on_device` from data that is on the device.
Writes benchmark_results/speed/<device>.csv and benchmark_results/SPEED.md when everything was measured, with --out what
was; with MALLOC_MMAP_MAX_=0 in the environment, as run.py has it for its cells, the file is <device>-keeps-memory.csv.
"""
import argparse
import copy
import csv
import importlib
import json
import math
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
sys.path[:0] = [str(ROOT / name) for name in ("algorithms", "datasets", "benchmark_results")]

import from_d4rl
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from run import processor
from torch.utils._python_dispatch import TorchDispatchMode

OUT = ROOT / "benchmark_results" / "speed"
TABLES = {"bcq_tabular", "bear_gridworld", "ope"}  # whose updates are sweeps
PARTS = "updates", "loading", "evaluation", "start"
KEEPS = os.environ.get("MALLOC_MMAP_MAX_") == "0"  # glibc keeps what is freed, see run.py
PRODUCTS = "mm", "bmm", "addmm", "baddbmm"


# --- what is timed ---
def clock(calls, rounds, seconds, device):
    """Seconds per call of each function in turn, `rounds` times: median, least, most."""
    def timed(call, n):
        began = time.perf_counter()
        for _ in range(n):
            call()
        if device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / n

    repeats = {name: max(1, round(seconds / max(timed(call, 3), 1e-6))) for name, call in calls.items()}
    found = [{name: timed(call, repeats[name]) for name, call in calls.items()} for _ in range(rounds)]
    return {name: [f(x[name] for x in found) for f in (median, min, max)] for name in calls}


def make(method, S, device):
    """The module of a method and an agent with its data, as main makes it; a replay holds 10,000 random steps."""
    module = importlib.import_module(method)
    discrete = hasattr(module.Agent, "discrete")
    flags = {"num_seeds": S, "device": device, "eval_episodes": 0}
    if "dataset_id" in module.Args.__annotations__:
        flags["dataset_id"] = "lunarlander/mixed-v0" if discrete else "hopper/medium-v0"
    if method in ("mopo", "combo"):
        flags.update(env_id="Hopper-v5", rollout_batch=400)  # 10,000 imagined steps
    if method in ("pilotnet", "trailnet"):
        flags["num_drives" if method == "pilotnet" else "num_walks"] = 5
    if method == "fqe":
        flags["policy"] = str(ROOT / "datasets" / "hopper" / "medium.pt2")
    args = module.Args(**flags)
    module.setup(args)
    with torch.device(device):
        if hasattr(module, "load"):
            task = data = module.load(args)
            module.prepare(data, args)
        else:
            task = module.make_task(args)
            own = method == "hg_dagger"  # a replay for each agent
            replays = [module.Replay(1 if own else S, 10_000, *(task.obs_dim, task.act_dim)[: 2 - discrete])
                       for _ in range(S if own else 1)]
            for data in replays:
                data.size += 10_000
            data = replays if own else data
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
            product = torch.bmm if x.dim() == 3 else torch.mm
            self.calls.append((product, x.detach().clone(), y.detach().clone(), torch.empty_like(out)))
        return out


@torch.no_grad()
def replay(calls):
    for product, x, y, out in calls:
        product(x, y, out=out)


class Control:
    """TD3+BC as most public files have it, with its data on the host or on the device."""

    def __init__(self, data, device, on_device=False):
        def net(d_in, d_out, *last):
            layers = nn.Linear(d_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, d_out), *last
            return nn.Sequential(*layers).to(device)

        obs_dim, act_dim = data.obs.shape[1], data.action.shape[1]
        nets = net(obs_dim, act_dim, nn.Tanh()), net(obs_dim + act_dim, 1), net(obs_dim + act_dim, 1)
        self.actor, self.q1, self.q2 = nets
        self.targets = [copy.deepcopy(x) for x in nets]
        self.actor_opt, self.q1_opt, self.q2_opt = (torch.optim.Adam(x.parameters(), 3e-4) for x in nets)
        data = data.obs, data.action, data.reward[:, None], data.next_obs, data.terminated[:, None]
        self.data = [x if on_device else x.cpu().numpy() for x in data]
        self.device, self.steps, self.logged = device, 0, {}

    def __call__(self):
        self.steps += 1
        i = np.random.randint(len(self.data[0]), size=256)
        s, a, r, s_next, d = (torch.as_tensor(x[i], device=self.device) for x in self.data)
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
    """The rows of `updates_of`, each method and number of seeds in a process of its own."""
    code = ("import json, sys; sys.path.insert(0, sys.argv[1]); import speed\n"
            "print(json.dumps(speed.updates_of(*json.loads(sys.argv[2]))))")
    for method in options.methods:
        for S in options.seeds:
            for precision in ("fp32", "tf32") if device != "cpu" else ("fp32",):
                asked = json.dumps([method, S, precision, options.rounds, options.seconds, device])
                command = [sys.executable, "-c", code, str(ROOT / "benchmark_results"), asked]
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                yield from json.loads(out.splitlines()[-1])


def updates_of(method, S, precision, rounds, seconds, device):
    """Rows of each mode: updates per second of all S agents together, and the floor's."""
    torch.set_num_threads(1)
    calls, peaks = {}, {}
    for mode in ["eager"] + ["graph"] * (device != "cpu"):
        held = torch.cuda.memory_allocated() / 2**20 if device != "cpu" else 0
        module, agent = make(method, S, device)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        calls[mode] = agent.update if mode == "eager" else module.cuda_graph(agent.update).__next__
        for _ in range(2 if mode == "eager" else 5):
            calls[mode]()
        peaks[mode] = peak_memory(device) - held
    with Record() as record:
        calls["eager"]()
    calls["floor"] = lambda: replay(record.calls)
    if method == "td3_bc" and S == 1:
        for name in "control", "control_on_device":
            control = Control(agent.data, device, name == "control_on_device")
            calls[name] = lambda control=control: (control(), control())  # as many updates as one call of ours
    found, per_call, rows = clock(calls, rounds, seconds, device), agent.updates_per_call, []
    for mode, (usual, least, most) in found.items():
        rate, floor = per_call / usual, per_call / found["floor"][0]
        rows.append({
            "what": "updates", "method": method, "S": S, "mode": mode, "precision": precision, "per_second": rate,
            "seed_updates_per_second": S * rate, "floor_per_second": floor, "of_floor": rate / floor,
            "lowest": per_call / most, "highest": per_call / least, "peak_alone_mib": peaks.get(mode, "")})
    return [row for row in rows if row["mode"] != "floor"]


def peak_memory(device):
    """MiB that were held at most: by tensors on a GPU, else by this process; nothing where that cannot be known."""
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    if sys.platform != "linux":
        return math.nan
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def loading(options, device):
    """Seconds to load a Minari set of 1M transitions in episodes of 1,000, whose file is in the page cache."""
    td3_bc, n, rng = importlib.import_module("td3_bc"), options.transitions, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        obs = rng.standard_normal((n + 1, 11), np.float32)
        made = from_d4rl.write({
            "observations": obs[:-1], "next_observations": obs[1:], "actions": rng.uniform(-1, 1, (n, 3)),
            "rewards": rng.standard_normal(n), "terminals": np.zeros(n), "timeouts": np.arange(1, n + 1) % 1000 == 0},
            Path(folder, "million-v0"))
        args = td3_bc.Args(dataset_id=str(made), eval_episodes=0, device=device)

        def load():
            with torch.device(device):
                td3_bc.load(args)

        seconds, least, most = clock({"loading": load}, options.rounds, 0, device)["loading"]
    yield {"what": "loading", "method": f"Minari set of {n} transitions, in the page cache", "seconds": seconds,
           "lowest": least, "highest": most}


def evaluation(options, device):
    """Environment steps per second: one environment in a loop, our worker with 10 episodes, the physics alone."""
    import mujoco
    import pickle

    td3_bc = importlib.import_module("td3_bc")
    env, steps = gym.make(options.env_id), options.steps
    simulator = env.unwrapped
    task = td3_bc.Task(env, env.action_space, *env.observation_space.shape, {})
    raw = td3_bc.RawPolicy(td3_bc.Actor(1, task.obs_dim, task.act_dim, 256), 1, task)

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
        job = pickle.dumps(raw), pickle.dumps(task.spec), seeds, 0.99, task.reference
        lengths.append(10 * td3_bc.evaluate(*job)[0, 3])

    calls = {"single environment": single, "our worker": worker, "physics alone": physics}
    for name, (usual, least, most) in clock(calls, options.rounds, 0, "cpu").items():
        n = lengths[-1] if name == "our worker" else steps
        yield {"what": "evaluation", "method": f"{options.env_id}, {name}", "per_second": n / usual,
               "lowest": n / most, "highest": n / least}


def start(options, device):
    """Seconds from the command line to the first update, in a process of its own."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import torch, td3_bc\n"
            "args = td3_bc.Args(eval_episodes=0, device=sys.argv[2]); td3_bc.setup(args)\n"
            "with torch.device(args.device):\n    data = td3_bc.load(args); td3_bc.prepare(data, args)\n"
            "    td3_bc.Agent(args, data.obs_dim, data.act_dim, data).update()")
    command = [sys.executable, "-c", code, str(ROOT / "algorithms"), device]
    found = clock({"start": lambda: subprocess.run(command, check=True)}, options.rounds, 0, "cpu")
    seconds, least, most = found["start"]
    yield {"what": "start", "method": "td3_bc, command to first update", "seconds": seconds, "lowest": least,
           "highest": most}


def as_trained(rows):
    """{(method, S): updates per second} of the mode and precision in which a method trains, the last of its rows."""
    return {(row["method"], int(row["S"])): float(row["per_second"]) for row in rows
            if row["what"] == "updates" and not row["mode"].startswith("control")}


def protocol(rows, cores):
    """Extrapolated: 1M updates of td3_bc and 200 evaluations of 10 episodes of 1,000 steps, side by side."""
    rates = {S: rate for (method, S), rate in as_trained(rows).items() if method == "td3_bc"}
    steps = [row["per_second"] for row in rows if row["what"] == "evaluation" and "our worker" in row["method"]]
    for S, rate in rates.items():
        if steps:
            train, evaluate = 1e6 / rate, 200 * S * 10_000 / steps[0]
            workers = max(1, min(4, cores - 1))
            yield {"what": "extrapolated", "method": "td3_bc, 1M updates, 200 evaluations", "S": S,
                   "seconds": max(train, evaluate / workers) if cores > 1 else train + evaluate}


# --- files ---
COLUMNS = ("what", "method", "S", "mode", "precision", "per_second", "seed_updates_per_second", "floor_per_second",
           "of_floor", "peak_mib", "seconds", "lowest", "highest", "peak_alone_mib")  # peak_mib: in old files, of all


def about(device, options):
    git = subprocess.getstatusoutput(f"git -C '{ROOT}' rev-parse HEAD")
    return {"device": torch.cuda.get_device_name() if device != "cpu" else processor(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "gymnasium": gym.__version__,
            "rounds": options.rounds, "seconds": options.seconds, "freed memory": "kept" if KEEPS else "returned",
            "commit": None if git[0] else git[1], "date": time.strftime("%Y-%m-%d")}


def table(rows, head):
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]])


def filled(rows, head):
    """A table without the columns that no row fills."""
    there = [i for i, name in enumerate(head) if not name or any(row[i] for row in rows)]
    return table([[row[i] for i in there] for row in rows], [head[i] for i in there])


def text(rows, facts):
    """The part of SPEED.md for one device."""
    def number(row, key, form):
        return format(float(row[key]), form) if row.get(key) not in (None, "", "nan") else ""

    def spread(row, form):
        return f"{number(row, 'lowest', form)} to {number(row, 'highest', form)}" if row.get("lowest") else ""

    lines = [[row["method"], row["S"], row["mode"], row["precision"], number(row, "per_second", ",.1f"),
              spread(row, ",.1f"), number(row, "seed_updates_per_second", ",.1f"),
              number(row, "floor_per_second", ",.1f"), number(row, "of_floor", ".2f"),
              number(row, "peak_alone_mib", ",.0f")]
             for row in rows if row["what"] == "updates"]
    rest = [[row["what"], row["method"], row["S"], number(row, "per_second", ",.0f"), number(row, "seconds", ",.2f"),
             spread(row, ",.0f" if row["per_second"] else ",.2f")] for row in rows if row["what"] != "updates"]
    return "\n\n".join(filter(None, [
        f"## {facts['device']}" + ", freed memory kept" * (facts.get("freed memory") == "kept"),
        ", ".join(f"{key} {value}" for key, value in facts.items() if key != "device"),
        side_by_side(rows),
        filled(lines, ["method", "S", "mode", "precision", "updates/s", "lowest to highest", "seeds x updates/s",
                       "floor, updates/s", "share of products", "peak MiB"]),
        rest and filled(rest, ["part", "", "S", "per second", "seconds", "lowest to highest"])]))


def side_by_side(rows):
    """What seeds side by side gain, in a sentence or two."""
    rates, said = as_trained(rows), []
    controls = [f", `{row['mode']}` {float(row['per_second']):,.0f}" for row in rows
                if row.get("mode", "").startswith("control") and row["precision"] == "fp32"]
    if {("td3_bc", 1), ("td3_bc", 4)} <= rates.keys():
        said.append(f"Updates of a single agent per second, TD3+BC: {4 * rates['td3_bc', 4]:,.0f} with 4 seeds side by "
                    f"side, {rates['td3_bc', 1]:,.0f} with one after another{''.join(controls)}.")
    most, lost = {method: max(S for name, S in rates if name == method) for method, _ in rates}, []
    for method, S in most.items():
        one, many = rates.get((method, 1), 0), S * rates[method, S]
        lost += [f"{method} ({one:,.1f} with one, {many:,.1f} with {S})"] * (many < 0.9 * one)
    return " ".join(said + [f"Side by side is a loss for {', '.join(lost)}."] * bool(lost))


def report(place=OUT):
    parts = [text(list(csv.DictReader(path.open())), json.loads(path.with_suffix(".json").read_text()))
             for path in sorted(place.glob("*.csv"), key=lambda path: path.stem)]
    head = ("# Speed\n\nMade by `python benchmark_results/speed.py`; medians over rounds in which all that is compared "
            "alternates. An update is one of all S agents. The floor is the time of the same matrix products alone, "
            "backward included, with operands that are in the caches already and without a critic's last column; the "
            "share is what of an update's time that is: a bound for the products that a file has chosen, on this "
            "machine, and not for the method. `control` is TD3+BC as it is usually written, with batches from the host, "
            "`control_on_device` has its data on the device, and a ratio on a GPU is one to that. Peaks of memory are "
            "of a process of its own. Where freed memory is kept, glibc does not hand it back to the system, as in "
            "run.py's cells. Lines marked extrapolated are computed from measured parts.")
    (place.parent / "SPEED.md").write_text("\n\n".join([head, *parts]) + "\n")


def main(words=None):
    methods = sorted({path.stem for path in (ROOT / "algorithms").glob("*.py")} - TABLES)
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
    parser.add_argument("--out", type=Path, help="directory of the CSVs, beside SPEED.md; default: benchmark_results/"
                        "speed when all methods, parts and seeds are measured, else nothing is written")
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
            measure = {"updates": updates, "loading": loading, "evaluation": evaluation, "start": start}[part]
            for row in measure(options, device):
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
