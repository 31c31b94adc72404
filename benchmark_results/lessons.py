"""The lessons of the methods, drawn from logged runs.

    python benchmark_results/lessons.py sac_offline           # draws from the logs that are there, runs what is missing
    python benchmark_results/lessons.py sac_offline --fresh   # runs everything again
    python benchmark_results/lessons.py --list                # what there is, with its commands

A lesson is a set of commands of the method files and a drawing of what they log. Their directories grow in runs/lessons/,
where an interrupted one is taken up again; the small files go to benchmark_results/lessons/NAME/, the plot beside them.
"""
import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import matplotlib
import minari
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "benchmark_results" / "lessons"
WORK = ROOT / "runs" / "lessons"
KEPT = "*.json", "*.csv"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
                     "legend.frameon": False, "font.size": 9, "savefig.dpi": 150})


# --- reading logs ---
def rows(path):
    with open(path) as file:
        return [{k: v if k == "name" else float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]


def evals(run):
    """The rows of eval.csv as dicts of floats."""
    return rows(run / "eval.csv")


def losses(run, name):
    """The rows of losses.csv with this name."""
    return [row for row in rows(run / "losses.csv") if row["name"] == name]


def curve(axis, table, key, scale=1, **style):
    """Mean over seeds against updates, with the range of the seeds as a band."""
    x = sorted({row["update"] for row in table})
    y = [[scale * row[key] for row in table if row["update"] == u] for u in x]
    line, = axis.plot(x, [np.mean(v) for v in y], **style)
    axis.fill_between(x, [np.min(v) for v in y], [np.max(v) for v in y], color=line.get_color(), alpha=0.2, lw=0)


def last(table, key):
    """Mean over seeds at the last update."""
    end = max(row["update"] for row in table)
    return float(np.mean([row[key] for row in table if row["update"] == end]))


def returns(dataset_id):
    """Undiscounted returns of the episodes of a shipped set."""
    data = minari.MinariDataset(ROOT / "datasets" / dataset_id / "data")
    return np.array([episode.rewards.sum() for episode in data.iterate_episodes()])


def first_steps(dataset_id, n, path):
    """The first n transitions of a shipped set as a D4RL file."""
    data = minari.MinariDataset(ROOT / "datasets" / dataset_id / "data")
    keys = "observations", "actions", "rewards", "terminals", "timeouts", "next_observations"
    parts = [(e.observations[:-1], e.actions, e.rewards, e.terminations, e.truncations, e.observations[1:])
             for e in data.iterate_episodes()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in zip(keys, zip(*parts)):
            file[key] = np.concatenate(values)[:n]
    return path


# --- Q against the return that it should predict ---
def sac_offline_runs(data):
    small = first_steps("hopper/medium-v0", 10_000, data / "hopper-medium-10000.hdf5")
    return {"100000": "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --num-updates 50000",
            "10000": f"sac_offline.py --dataset-id {small} --env-id Hopper-v5 --num-seeds 3 --num-updates 50000"}


def q_and_returns(runs, titles):
    figure, axes = plt.subplots(2, len(runs), figsize=(4.2 * len(runs), 5), sharex="col", sharey="row", squeeze=False)
    for (label, run), (above, below) in zip(runs.items(), axes.T):
        curve(above, losses(run, "q_start"), "value", label="$Q(s_0, \\pi(s_0))$: what the critic expects", color="C3")
        curve(above, evals(run), "discounted_return_mean", label="discounted return of the same policy", color="C0")
        above.set(yscale="symlog", title=titles[label])
        curve(below, evals(run), "return_mean", color="C0", label="return")
        below.axhline(returns("hopper/medium-v0").mean(), color="0.4", ls="--", label="mean of the data")
        below.set(xlabel="updates", ylim=(0, None))
    axes[0, 0].set_ylabel("discounted value (symmetric log)")
    axes[1, 0].set_ylabel("return of an episode")
    axes[0, -1].legend()
    axes[1, -1].legend()
    return figure


def sac_offline_draw(runs):
    figure = q_and_returns(runs, {label: f"{int(label):,} transitions of Hopper medium" for label in runs})
    return figure, "; ".join(
        f"with {int(label):,} transitions the critic expects {last(losses(run, 'q_start'), 'value'):.3g} and the policy gets "
        f"{last(evals(run), 'discounted_return_mean'):.0f} (undiscounted {last(evals(run), 'return_mean'):.0f})"
        for label, run in runs.items())


def cql_runs(data):
    return {"sac": "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --num-updates 50000",
            "cql": "cql.py --dataset-id hopper/medium-v0 --num-seeds 2 --num-updates 8000 --eval-every 1000"}


def cql_draw(runs):
    figure = q_and_returns(runs, {"sac": "SAC offline", "cql": "CQL, the same data"})
    q, g = last(losses(runs["cql"], "q_start"), "value"), last(evals(runs["cql"]), "discounted_return_mean")
    return figure, f"CQL's critic expects {q:.0f}, {'below' if q < g else 'above'} the {g:.0f} that its policy gets"


# --- the runner ---
NAMES = sorted(name[:-5] for name in globals() if name.endswith("_draw"))


def run(name, label, command, fresh):
    """Runs one command, or takes it up where it stopped; keeps its small files; returns their directory."""
    kept, work = LESSONS / name / label, WORK / name / label
    if fresh:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    if (kept / "eval.csv").exists():
        return kept
    script, *flags = shlex.split(command)
    begun = sorted(work.glob("*/checkpoint.pt"))
    if begun:
        flags = ["--resume", str(begun[-1].parent)]
    print(f"{name}: {label}: {command}", flush=True)
    if not sorted(work.glob("*/policy.pt2")):
        command = [sys.executable, str(ROOT / "algorithms" / script), *flags]
        subprocess.run(command + ([] if begun else ["--out-dir", str(work)]), check=True, cwd=ROOT)
    (done,) = sorted(work.glob("*/policy.pt2"))
    kept.mkdir(parents=True)
    for pattern in KEPT:
        for path in done.parent.glob(pattern):
            text = path.read_text().replace(str(work), "runs").replace(str(ROOT) + os.sep, "")
            (kept / path.name).write_text(text)
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="one or more of " + ", ".join(NAMES))
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--list", action="store_true", help="print the commands")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no lesson {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    for name in args.names or NAMES * args.list or parser.error("name a lesson, or --list"):
        commands = globals()[f"{name}_runs"](WORK / "data")
        if args.list:
            print(*(f"{name}: {label}: python algorithms/{command}" for label, command in commands.items()), sep="\n")
            continue
        figure, message = globals()[f"{name}_draw"](
            {label: run(name, label, command, args.fresh) for label, command in commands.items()})
        figure.savefig(LESSONS / f"{name}.png", bbox_inches="tight")
        print(f"{name}: {message}; {LESSONS / name}.png")


if __name__ == "__main__":
    main()
