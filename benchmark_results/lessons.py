"""The lessons of the methods, drawn from logged runs, or computed on the spot where a table is enough.

    python benchmark_results/lessons.py sac_offline           # draws from the logs that are there, runs what is missing
    python benchmark_results/lessons.py sac_offline --fresh   # runs everything again
    python benchmark_results/lessons.py --list                # what there is, with its commands

A lesson is a set of commands of the method files and a drawing of what they log. Their directories grow in
runs/lessons/, where an interrupted one is taken up again; the small files go to benchmark_results/lessons/NAME/, plot
and text beside. Some of lessons_*.py have no commands.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmark_results"), str(ROOT / "datasets")]

import from_d4rl
import matplotlib
import minari
import numpy as np
import torch
from lessons_cloning import (multimodal_draw, multimodal_log, multimodal_runs, observability_draw, observability_log,
                             observability_runs)
from lessons_evaluation import bear_gridworld_draw, importance_draw
from lessons_interactive import interventions_draw, interventions_runs
from lessons_offline import extrapolation_draw, extrapolation_log, extrapolation_runs
from lessons_pixels import pilotnet_draw, pilotnet_runs, trailnet_draw, trailnet_runs
from lessons_tabular import correction_draw, cql_bound_draw, expectile_draw, stitching_draw
from lessons_weights import awr_draw, envelope_draw, envelope_log, envelope_runs
from run import about

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    """The rows of losses.csv with this name, `value` a float."""
    return [row for row in rows(run / "losses.csv") if row["name"] == name]


def curve(axis, table, key, scale=1, **style):
    """Mean over seeds against updates, with the range of the seeds as a band."""
    x = sorted({row["update"] for row in table})
    y = [[scale * row[key] for row in table if row["update"] == u] for u in x]
    line, = axis.plot(x, [np.mean(v) for v in y], **style)
    axis.fill_between(x, [np.min(v) for v in y], [np.max(v) for v in y], color=line.get_color(), alpha=0.2, lw=0)


def last(table, key, end=None):
    """Mean over seeds at update `end`, by default the last one."""
    end = end or max(row["update"] for row in table)
    return float(np.mean([row[key] for row in table if row["update"] == end]))


def returns(dataset_id):
    """Undiscounted returns of the episodes of a shipped set."""
    data = minari.MinariDataset(ROOT / "datasets" / dataset_id / "data")
    return np.array([episode.rewards.sum() for episode in data.iterate_episodes()])


def part_of(dataset_id, steps, folder):
    """A slice of the transitions of a shipped set as a set of its own."""
    keys = "observations", "actions", "rewards", "terminals", "timeouts", "next_observations"
    parts = [(e.observations[:-1], e.actions, e.rewards, e.terminations, e.truncations, e.observations[1:])
             for e in minari.MinariDataset(ROOT / "datasets" / dataset_id / "data").iterate_episodes()]
    if not folder.exists():
        from_d4rl.write({key: np.concatenate(values)[steps] for key, values in zip(keys, zip(*parts))}, folder)
    return folder


# --- Q against the return that it should predict ---
def sac_offline_runs(data):
    small = part_of("hopper/medium-v0", slice(10_000), data / "hopper-medium-10000-v0")
    return {"100000": "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --num-updates 50000",
            "10000": f"sac_offline.py --dataset-id {small} --env-id Hopper-v5 --num-seeds 3 --num-updates 50000"}


def q_and_returns(runs, titles):
    figure, axes = plt.subplots(2, len(runs), figsize=(8.4, 5.4), sharex=True, sharey="row", layout="constrained")
    for (label, run), (above, below) in zip(runs.items(), axes.T):
        curve(above, losses(run, "q_start"), "value", label="$Q(s_0, \\pi(s_0))$: what the critic expects", color="C3")
        curve(above, evals(run), "discounted_return_mean", label="discounted return of the same policy", color="C0")
        above.set(yscale="symlog", title=titles[label])
        curve(below, evals(run), "return_mean", color="C2", label="return of an episode")
        below.axhline(returns("hopper/medium-v0").mean(), color="0.4", ls="--", label="its mean in the data")
        below.set(xlabel="updates", xlim=(0, None))
    axes[0, 0].set_ylabel("discounted (symmetric log)")
    axes[1, 0].set(ylabel="not discounted", ylim=(-20, None))
    handles, labels = map(sum, zip(*(axis.get_legend_handles_labels() for axis in axes[:, 0])), ([], []))
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def sac_offline_draw(runs):
    figure = q_and_returns(runs, {label: f"{int(label):,} transitions of Hopper medium" for label in runs})
    end = min(max(row["update"] for row in evals(run)) for run in runs.values())
    return figure, f"Hopper medium, after {end:,.0f} updates: " + "; ".join(
        f"with {int(label):,} transitions the critic expects {last(losses(run, 'q_start'), 'value', end):.3g} and the "
        f"policy gets {last(evals(run), 'discounted_return_mean', end):.0f}" for label, run in runs.items())


def cql_runs(data):
    return {"sac": "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --num-updates 50000",
            "cql": "cql.py --dataset-id hopper/medium-v0 --num-seeds 2 --num-updates 12000 --eval-every 1000"}


def cql_draw(runs):
    figure = q_and_returns(runs, {"sac": "SAC offline", "cql": "CQL, the same data"})
    end, expected = evals(runs["cql"])[-1]["update"], {x: losses(runs[x], "q_start") for x in runs}
    q, g = last(expected["cql"], "value"), last(evals(runs["cql"]), "discounted_return_mean")
    naive = last(expected["sac"], "value", end)
    side = "below" if q < g else "above"
    return figure, (f"Hopper medium: after {end:,.0f} updates CQL's critic expects {q:.0f}, {side} the {g:.0f} that its "
                    f"policy gets; SAC's expects {naive:,.0f} by then, and never gets more than 5")


# --- a batch on a finite MDP ---
BCQ_SLIPS = {"lattice": ("0", "0.2"), "FrozenLake-v1": ("0", "0.6666667")}  # the last: Gymnasium's slippery lake
BCQ_EPISODES = 2, 4, 8, 16, 32


def bcq_tabular_runs(data):
    more = {"lattice": "--epsilon 1 --gamma 1", "FrozenLake-v1": "--epsilon 0.5 --gamma 0.99"}
    return {f"{env} {slip} {n}": f"bcq_tabular.py --env-id {env} --slip {slip} --num-episodes {n} {more[env]} --seed 4 "
                                 "--num-seeds 50 --num-updates 1000 --eval-every 1000 --device cpu"
            for env, slips in BCQ_SLIPS.items() for slip in slips for n in BCQ_EPISODES}


def bcq_tabular_draw(runs):
    """Needs table.csv of the four runs with 8 episodes, 2 KB each, beside eval.csv and losses.csv: seed 0's counts and
    policy."""
    orange, blue, red, pink, grey = "darkorange", "tab:blue", "tab:red", "#ffd0cc", "0.7"
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), width_ratios=(1, 1, 0.8), layout="constrained")

    def table(run):  # state, action -> its row
        rows = [line.split(",") for line in (run / "table.csv").read_text().split()]
        return {(int(s), int(a)): dict(zip(rows[0][2:], map(float, x))) for s, a, *x in rows[1:]}

    def last(run, name):  # of each seed
        return np.array([row["value"] for row in losses(run, name) if row["update"] == 1000])

    def look(rows):  # of a state: known, visits, style
        known, visits = any(row["count"] for row in rows), rows[0]["visits"]
        kind = ("white", "black", "") if known else (pink, red, "") if visits else ("0.95", grey, "///")
        return known, visits, dict(zip(("facecolor", "edgecolor", "hatch"), kind))

    def arrow(ax, start, end, **style):
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **style})

    def count(ax, x, y, row, **style):
        if row["count"]:
            ax.text(x, y, f"{row['count']:.0f}", color=orange, fontsize=10, fontweight="bold", ha="center", va="center",
                    zorder=5, **style)

    def lattice(ax, run, slips):
        rows, ends = table(run), (8, 0, 4, 2, 6, 10)  # its rewards
        place = [(t, i - t / 2) for t in range(6) for i in range(t + 1)]
        for (x, y), reward in zip(place[15:], ends):
            ax.scatter(x, y, 70, "white", marker="s", edgecolors="black", zorder=3)
            ax.text(x + 0.14, y, reward, va="center", fontsize=12)
        for s, (x, y) in enumerate(place[:15]):
            known, visits, style = look([rows[s, 0], rows[s, 1]])
            ax.add_patch(plt.matplotlib.patches.Ellipse((x, y), 0.42, 0.56, zorder=3, linewidth=1.3, **style))
            if visits:
                ax.text(x, y, f"{100 * visits:.{0 if visits > 0.01 else 1}f}", ha="center", va="center", fontsize=9,
                        zorder=4, color=style["edgecolor"], fontweight="normal" if known else "bold")
            for a in 0, 1:
                end, row = s + int(x) + 1 + a, rows[s, a]
                dx, dy = place[end][0] - x, place[end][1] - y
                inside = (x + 0.22 * dx, y + 0.22 * dy), (x + 0.78 * dx, y + 0.78 * dy)
                if known and row["greedy"]:
                    arrow(ax, *inside, color=blue, linewidth=3 if visits else 1, mutation_scale=14 if visits else 9)
                else:
                    ax.plot((x, x + dx), (y, y + dy), "-" if row["count"] else ":", zorder=1, linewidth=1.5,
                            color=orange if row["count"] else grey)
                    if slips and known and visits and end < 15 and not rows[end, 0]["count"] + rows[end, 1]["count"]:
                        arrow(ax, *inside, color=red, linestyle="--", linewidth=1.5, mutation_scale=12)
                count(ax, x + 0.5 * dx, y + 0.5 * dy, row, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        ax.set(xlim=(-0.3, 5.5), ylim=(-2.9, 2.9))

    def lake(ax, run, slips):
        rows, moves = table(run), ((-1, 0), (0, 1), (1, 0), (0, -1))
        for s, letter in enumerate("SFFFFHFHFFFHHFFG"):
            x, y = s % 4, s // 4
            known, visits, style = look([rows[s, a] for a in range(4)])
            if letter in "HG":
                style = {"facecolor": "0.35" if letter == "H" else "#d8f0d8", "edgecolor": "black"}
            ax.add_patch(plt.Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, linewidth=1.3, **style))
            if letter != "F":
                ax.text(x - 0.44, y - 0.43, {"S": "start", "H": "hole", "G": "goal, 1"}[letter], fontsize=8, va="top",
                        color="white" if letter == "H" else "black")
            if letter not in "HG" and visits:
                ax.text(x + 0.46, y + 0.45, f"{visits:.2g}", ha="right", fontsize=8, color=style["edgecolor"],
                        fontweight="normal" if known else "bold")
            for (dx, dy), row in zip(moves, (rows[s, a] for a in range(4))):
                count(ax, x + 0.35 * dx, y + 0.35 * dy, row)
                if known and row["greedy"]:
                    arrow(ax, (x - 0.2 * dx, y - 0.2 * dy), (x + 0.24 * dx, y + 0.24 * dy), color=blue,
                          linewidth=3 if visits else 1, mutation_scale=14 if visits else 9)
        ax.set(xlim=(-0.52, 3.52), ylim=(3.52, -0.52), aspect="equal")

    carried, promise, earned = {}, {}, {}  # means over the 50 batches of 8 episodes
    for (env, slips), line, draw in zip(BCQ_SLIPS.items(), axes, (lattice, lake)):
        for slip, ax, colour in zip(slips, line, ("black", red)):
            name = {"0": "deterministic", "0.2": "slip 0.2"}.get(slip, "slip 2/3")
            drawn = runs[f"{env} {slip} 8"]
            draw(ax, drawn, slip != "0")
            ax.set_title(f"{env}, {name}: {100 * last(drawn, 'carried')[0]:.0f} % of episodes\n"
                         "reach states without data")
            ax.set_xticks([]), ax.set_yticks([])
            ax.spines[:].set_visible(False)
            found = [100 * last(runs[f"{env} {slip} {n}"], "carried") for n in BCQ_EPISODES]
            line[2].errorbar(BCQ_EPISODES, [x.mean() for x in found], [x.std() / len(x)**0.5 for x in found],
                             marker="o", color=colour, capsize=3, label=name)
            carried[env, slip], promise[env, slip] = found[2].mean(), last(drawn, "q_start").mean()
            earned[env, slip] = np.mean([row["discounted_return_mean"] for row in evals(drawn)])
        line[2].set(xscale="log", xticks=BCQ_EPISODES, xticklabels=BCQ_EPISODES, xlabel="episodes in the batch",
                    ylabel="episodes that reach\nstates without data [%]", title="50 batches, mean ± standard error")
        line[2].minorticks_off()
        line[2].legend()
    Line, Patch = plt.Line2D, plt.matplotlib.patches.Patch
    figure.legend(loc="outside lower center", ncols=4, frameon=False, handles=[
        Line([], [], color=orange, label="action in the batch, with its count"),
        Line([], [], color=grey, linestyle=":", label="action not in the batch: masked"),
        Line([], [], color=blue, linewidth=3, label="greedy policy (thin: where it never comes)"),
        Line([], [], color=red, linestyle="--", label="slip out of the data"),
        Patch(facecolor="white", edgecolor="black", label="state with data"),
        Patch(facecolor="0.95", edgecolor=grey, hatch="///", label="state without data, never reached"),
        Patch(facecolor=pink, edgecolor=red, label="state without data, reached"),
        Line([], [], linestyle="", label="in states: % of episodes (lake: steps)")])
    (d, c), (e, f) = ([(env, slip) for slip in slips] for env, slips in BCQ_SLIPS.items())
    said = lambda x: f"{earned[x]:.3g} of {promise[x]:.3g}"
    return figure, (
        f"With 8 episodes in the batch the policy is carried into states without data in {carried[d]:.0f} % of its "
        f"episodes in the deterministic lattice, {carried[c]:.0f} % at slip 0.2, {carried[e]:.0f} % in the "
        f"deterministic FrozenLake and {carried[f]:.0f} % in the slippery one; of the return that Q promises at the "
        f"start it earns {said(d)}, {said(c)}, {said(e)} and {said(f)} (means over 50 batches).")


# --- what is asked for and what is achieved ---
def dt_runs(data):
    return {"both": "dt.py --dataset-id hopper/medium-replay-v0+hopper/medium-v0 --num-seeds 2 --num-updates 8000 "
                    "--warmup 500 --eval-every 5000 --sweep"}


def dt_draw(runs):
    (run,) = runs.values()
    sets = json.loads((run / "args.json").read_text())["dataset_id"].split("+")
    data = np.concatenate([returns(name) for name in sets])
    rows = np.genfromtxt(run / "targets.csv", delimiter=",", names=True)
    asked = np.unique(rows["target"])
    achieved, spread = (np.stack([rows[name][rows["target"] == x] for x in asked])  # (targets, seeds)
                        for name in ("return_mean", "return_std"))
    figure, (top, axes) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(1, 4), layout="constrained")
    top.hist(data, bins=np.linspace(data.min(), asked[-1], 60), color="grey")
    top.set(yscale="log", ylabel="episodes")
    top.set_title("Data: " + " and ".join(sets), fontsize=10)
    axes.plot(asked[[0, -1]], asked[[0, -1]], color="black", linestyle="--", linewidth=1, label="as asked for")
    axes.axhline(data.max(), color="tab:green", linestyle=":", label=f"best episode of the data, {data.max():.0f}")
    axes.axhline(data.mean(), color="tab:red", linestyle=":", label=f"mean of the data, {data.mean():.0f}")
    for k, (mean, std) in enumerate(zip(achieved.T, spread.T)):
        axes.errorbar(asked, mean, std, marker="o", capsize=3, label=f"Decision Transformer, seed {k}")
    axes.axvspan(data.max(), 1.02 * asked[-1], color="grey", alpha=0.15, linewidth=0)
    axes.annotate("no episode of the data\nreturned so much", (data.max(), 0), (4, 4), textcoords="offset points",
                  fontsize=8)
    axes.set(xlabel="return asked for at the first step", ylabel="return achieved (mean ± deviation over episodes)")
    axes.set(ylim=(0, 1.1 * max(data.max(), (achieved + spread).max())), xlim=(-50, 1.02 * asked[-1]))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    brought = "; ".join(f"{x:.0f} brings {y:.0f}" for x, y in zip(asked, achieved.mean(1)))
    return figure, (f"Hopper: asked for a return of {brought}; the data's episodes return {data.mean():.0f} on average "
                    f"and {data.max():.0f} at best.")


# --- a threshold between Q-learning and cloning, and discrete methods on the same data ---
BCQ_THRESHOLDS = "0", "0.1", "0.3", "0.5", "1"
LANDER_SETS = {"mixed": "the shipped set", "half": "its half-trained episodes alone"}


def lander_sets(data):
    """Flags for the shipped set and for its half-trained episodes, the later half of its 80,000 steps."""
    half = part_of("lunarlander/mixed-v0", slice(40_000, None), data / "lunarlander-half-v0")
    return {"mixed": "--dataset-id lunarlander/mixed-v0 --num-seeds 3",
            "half": f"--dataset-id {half} --env-id LunarLander-v3 --num-seeds 3"}


def lander_lines(axis):
    """Returns of the shipped set: its steps are half random, then half by the half-trained policy."""
    shipped = minari.MinariDataset(ROOT / "datasets" / "lunarlander" / "mixed-v0" / "data")
    lengths, found = np.array([(len(e.rewards), e.rewards.sum()) for e in shipped.iterate_episodes()]).T
    later = lengths.cumsum() > shipped.total_steps / 2
    for value, label, style in ((found[~later].mean(), "random episodes, mean", ":"),
                                (found[later].mean(), "half-trained episodes, mean", "--"),
                                (found.max(), "best episode", "-.")):
        axis.axhline(value, color="0.4", ls=style, lw=1, label=label)


def lately(table, key, n=2):
    """Of each seed, the mean of the last n rows."""
    seeds = sorted({row["seed"] for row in table})
    return [np.mean([row[key] for row in table if row["seed"] == k][-n:]) for k in seeds]


def bcq_discrete_runs(data):
    return {f"{part} {t}": f"bcq_discrete.py --threshold {t} {flags} --num-updates 20000"
            for part, flags in lander_sets(data).items() for t in BCQ_THRESHOLDS}


def bcq_discrete_draw(runs):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    found = {}
    lander_lines(axes[0])
    for color, (part, title) in zip(("C0", "C1"), LANDER_SETS.items()):
        x, some = range(len(BCQ_THRESHOLDS)), [runs[f"{part} {t}"] for t in BCQ_THRESHOLDS]
        found[part] = [lately(evals(run), "return_mean") for run in some]
        q = [lately(losses(run, "q_start"), "value") for run in some]
        g = [lately(evals(run), "discounted_return_mean") for run in some]
        for axis, y, style, label in (
                (axes[0], found[part], "-", title), (axes[1], q, "-", f"{title}: $Q(s_0, \\pi(s_0))$"),
                (axes[1], g, "--", "its policy's discounted return")):
            axis.plot(x, [np.mean(v) for v in y], color=color, ls=style, label=label)
            axis.plot(x, y, ".", color=color)
    axes[0].set(ylabel="return, mean of the last 2 evaluations")
    axes[1].set(ylabel="discounted value")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.set(xlabel="threshold: 0 is Q-learning, 1 is cloning", xticks=range(5), xticklabels=BCQ_THRESHOLDS)
    end = last(evals(runs["mixed 0"]), "update")
    return figure, f"LunarLander, return against threshold after {end:,.0f} updates: " + "; ".join(
        f"{title}: " + ", ".join(f"{np.mean(v):.0f} at {t}" for t, v in zip(BCQ_THRESHOLDS, found[part]))
        for part, title in LANDER_SETS.items())


LANDER_METHODS = {
    "dqn": ("DQN offline", "dqn_offline.py"), "bcq": ("BCQ, threshold 0.3", "bcq_discrete.py"),
    "cql": ("CQL", "cql_discrete.py"), "cloning": ("cloning (BCQ, threshold 1)", "bcq_discrete.py --threshold 1")}


def cql_discrete_runs(data):
    return {f"{part} {label}": f"{command} {flags} --num-updates 50000"
            for part, flags in lander_sets(data).items() for label, (_, command) in LANDER_METHODS.items()}


def cql_discrete_draw(runs):
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey="row", layout="constrained")
    for (part, title), (above, below) in zip(LANDER_SETS.items(), axes.T):
        lander_lines(above)
        for i, (label, (name, _)) in enumerate(LANDER_METHODS.items()):
            run = runs[f"{part} {label}"]
            curve(above, evals(run), "return_mean", color=f"C{i}", label=name)
            if label != "cloning":  # which does not ask its critic
                curve(below, losses(run, "q_start"), "value", color=f"C{i}", label=f"{name}: $Q(s_0, \\pi(s_0))$")
                curve(below, evals(run), "discounted_return_mean", color=f"C{i}", ls="--", label="discounted return")
        above.set(title=title, ylim=(-800, 310))
        below.set(xlabel="updates", ylim=(-250, 250))
    axes[0, 0].set_ylabel("return of an episode")
    axes[1, 0].set_ylabel("discounted value")
    for i, place in (0, "outside upper center"), (1, "outside lower center"):
        figure.legend(*axes[i, 0].get_legend_handles_labels(), loc=place, ncols=4, fontsize=8)
    said = []
    for part, title in LANDER_SETS.items():
        found = {name: np.mean(lately(evals(runs[f"{part} {label}"]), "return_mean"))
                 for label, (name, _) in LANDER_METHODS.items()}
        said.append(f"{title}, {last(evals(runs[f'{part} dqn']), 'update'):,.0f} updates: "
                    + ", ".join(f"{name} {x:.0f}" for name, x in found.items()))
    return figure, "LunarLander, mean return of the last 2 evaluations: " + "; ".join(said)


# --- a policy that pleases its model ---
def mopo_runs(data):
    return {str(value): "mopo.py --num-seeds 2 --num-updates 40000 --eval-every 1000 --model-epochs 30 --horizon 100 "
                        f"--rollout-batch 2500 --penalty {value}" for value in (0, 5)}


def mopo_draw(runs):
    figure, axes = plt.subplots(1, len(runs), figsize=(4.7 * len(runs), 3.7), sharex=True, sharey=True, layout="constrained")
    said = {"0": "without the penalty the critic promises\nmore than the policy gets", "5": "with it the policy gets\n"
            "more than the critic promises"}
    half = max(row["update"] for row in evals(runs["0"])) / 2
    late = lambda table, key: np.mean([row[key] for row in table if row["update"] > half])
    found = []
    for (label, run), axis in zip(runs.items(), axes):
        curve(axis, losses(run, "q_start"), "value", label="promised: $Q(s_0, \\pi(s_0))$", color="C3")
        curve(axis, evals(run), "discounted_return_mean", label="earned: discounted return", color="C0")
        axis.set(title=f"$\\lambda$ = {label}: {said[label]}", xlabel="updates of the policy")
        found.append((late(losses(run, "q_start"), "value"), late(evals(run), "discounted_return_mean")))
    axes[0].set(ylabel="discounted value at the start")
    axes[0].legend()
    axes[-1].text(0.99, 0.02, "2 seeds, mean and range; rollouts of 100 steps,\nnot the authors' 5", ha="right", va="bottom",
                  transform=axes[-1].transAxes, fontsize=7)
    return figure, f"Hopper medium, means after {half:,.0f} updates: " + "; ".join(
        f"with penalty {label} the critic promises {q:.0f} and the policies earn {g:.0f}, discounted"
        for label, (q, g) in zip(runs, found))


# --- labels where the learner goes ---
DAGGER_HORIZONS, DAGGER_LABELS = (100, 200, 400, 800), (1000, 2000, 4000, 10000)


def dagger_runs(data):
    student = "--num-seeds 10 --hidden-dim 32 --learning-rate 1e-3 --eval-episodes 5"  # small, so that it errs
    runs = {"dagger": f"dagger.py {student} --rounds 10 --steps-per-round 1000 --num-updates 10000 --eval-every 1000"}
    for n in DAGGER_LABELS:
        runs[f"bc {n}"] = f"dagger.py {student} --rounds 1 --steps-per-round {n} --num-updates 10000 --eval-every 10000"
    return runs


def hopper_walks(file, episodes=20, every=25):
    """A CSV of each agent of a policy in `episodes` episodes of Hopper: at every 25th step the mean return so far, the
    share of episodes that go on, and the distance (largest component) from the expert's action on the way there."""
    import gymnasium

    expert, policy = (torch.export.load(x).module() for x in (ROOT / "datasets" / "hopper" / "expert.pt2", file))
    S, lines = len(policy(torch.zeros(1, 11))), ["seed,step,return,alive,distance"]
    envs = [gymnasium.make("Hopper-v5") for _ in range(S * episodes)]
    obs = np.stack([env.reset(seed=i % episodes)[0] for i, env in enumerate(envs)])
    total, alive, apart, steps = np.zeros(len(envs)), np.ones(len(envs), bool), np.zeros(len(envs)), np.zeros(len(envs))
    for t in range(1, 1001):
        s = torch.tensor(obs, dtype=torch.float32)
        with torch.no_grad():  # every agent in its own episodes
            action = torch.cat([x[k * episodes : (k + 1) * episodes] for k, x in enumerate(policy(s))])
            apart += alive * (action - expert(s)[0]).abs().amax(-1).numpy()
        steps += alive
        for i in np.flatnonzero(alive):
            obs[i], reward, terminated, _, _ = envs[i].step(action[i].numpy())
            total[i], alive[i] = total[i] + reward, not terminated
        if t % every == 0:
            for k, (r, go, d, n) in enumerate(zip(*(x.reshape(S, -1) for x in (total, alive, apart, steps)))):
                distance = f"{d.sum() / n.sum():.4f}" if n.any() else ""
                lines.append(f"{k},{t},{r.mean():.2f},{go.mean():.3f},{distance}")
            apart[:], steps[:] = 0, 0
    return "\n".join([*lines, ""])


def dagger_log(label, run):
    """What the drawing needs of the policies."""
    if label in ("dagger", "bc 10000"):
        (run / "walks.csv").write_text(hopper_walks(run / "policy.pt2"))
    if label == "dagger":
        (run / "expert.csv").write_text(hopper_walks(ROOT / "datasets" / "hopper" / "expert.pt2"))


def dagger_draw(runs):
    def table(lines, key, by):  # (points, seeds)
        return np.array([[row[key] for row in lines if row[by] == x] for x in sorted({row[by] for row in lines})])

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.5), layout="constrained")
    expert = table(rows(runs["dagger"] / "expert.csv"), "return", "step")  # (40, 1)
    learning = table(evals(runs["dagger"]), "return_mean", "update")
    cloned = np.array([table(evals(runs[f"bc {n}"]), "return_mean", "update")[-1] for n in DAGGER_LABELS])
    bar = dict(fmt="o-", markersize=4, capsize=2)
    for x, y, color, name in ((1000 * np.arange(1, 11), learning, "C0", "DAgger, 1,000 updates a round"),
                              (DAGGER_LABELS, cloned, "C3", "BC, 10,000 updates each")):
        axes[0].errorbar(x, y.mean(1), y.std(1) / y.shape[1] ** 0.5, color=color, label=name, **bar)
    axes[0].axhline(expert[-1, 0], color="black", linestyle=":", linewidth=1, label="expert")
    axes[0].set(xlabel="expert labels of each agent", ylabel="return of the agent alone", ylim=(0, None))
    axes[0].legend(fontsize=8, loc="lower right")
    rng, slopes, costs, step = np.random.default_rng(0), {}, {}, 25 * np.arange(1, 41)
    at = np.searchsorted(step, DAGGER_HORIZONS)
    fit = lambda x: np.polyfit(np.log(DAGGER_HORIZONS[1:]), np.log(np.maximum(x[1:], 1)), 1)[0]
    for label, name, color in ("bc 10000", "BC", "C3"), ("dagger", "DAgger", "C0"):
        lines = rows(runs[label] / "walks.csv")
        cost = (expert - table(lines, "return", "step"))[at]
        S = cost.shape[1]
        drawn = [fit(cost[:, rng.integers(S, size=S)].mean(1)) for _ in range(1000)]  # bootstrap over seeds
        costs[name], slopes[name] = cost.mean(1), f"{fit(cost.mean(1)):.1f} ± {np.std(drawn):.1f}"
        axes[1].errorbar(DAGGER_HORIZONS, cost.mean(1), cost.std(1) / S**0.5, color=color,
                         label=f"{name}: slope {slopes[name]} from 200 on", **bar)
        fallen = 1 - table(lines, "alive", "step")[-1].mean()
        distance = np.nanmean(table(lines, "distance", "step"), 1)
        axes[2].plot(step, distance, color=color, label=f"{name}: {fallen:.0%} of its episodes end in a fall")
    for power, style in (1, "--"), (2, ":"):
        axes[1].plot((200, 800), costs["BC"][1] * np.array((1, 4**power)), style, color="0.5", linewidth=1,
                     label="as H" if power == 1 else "as H²")
    axes[1].set(xscale="log", yscale="log", xlabel="horizon H (steps)", ylabel="return below the expert's")
    axes[1].set_ylim(0.2, 50_000)
    axes[1].set_xticks(DAGGER_HORIZONS, DAGGER_HORIZONS)
    axes[1].minorticks_off()
    axes[1].legend(fontsize=8, loc="upper left")
    axes[2].set(xlabel="step of an episode", ylabel="distance from the expert's action", xlim=(0, 1000), ylim=(0, None))
    axes[2].legend(fontsize=8)
    return figure, (
        f"with 10,000 labels DAgger returns {learning[-1].mean():.0f} and BC {cloned[-1].mean():.0f} (expert "
        f"{expert[-1, 0]:.0f}); at 800 steps they are {costs['DAgger'][-1]:.0f} and {costs['BC'][-1]:.0f} below it, which "
        f"from 200 steps on grows as H to the power {slopes['DAgger']} and {slopes['BC']}, 10 seeds. The bounds say 1 and "
        "2, but 1 only where a mistake can be made good, and a fall in Hopper costs all the rest; what stays flat is how "
        "far DAgger acts from the expert, while BC leaves it in 100 steps")


# --- the runner ---
NAMES = sorted(name[:-5] for name in globals() if name.endswith("_draw"))


def commands_of(name):
    """The commands of a lesson by their labels; none where it is computed."""
    return globals().get(f"{name}_runs", lambda data: {})(WORK / "data")


def run(name, label, command, fresh):
    """Runs one command, or takes it up where it stopped; keeps its small files; returns their directory."""
    folder = re.sub(r"[^\w.-]+", "-", label)
    kept, work = LESSONS / name / folder, WORK / name / folder
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
    command = [sys.executable, str(ROOT / "algorithms" / script), *flags]
    subprocess.run(command + ([] if begun else ["--out-dir", str(work)]), check=True, cwd=ROOT)
    *_, done = sorted(work.glob("*/run.json"))
    globals().get(f"{name}_log", lambda *_: None)(label, done.parent)
    part = kept.with_name(f".{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for pattern in KEPT:
        for path in done.parent.glob(pattern):
            text = about(done.parent) if path == done else path.read_text()
            text = re.sub('"out_dir": .*', '"out_dir": "runs",', text)
            (part / path.name).write_text(text.replace(str(ROOT) + os.sep, ""))
    shutil.rmtree(kept, ignore_errors=True)
    part.replace(kept)  # whole or not there
    return kept


def write_page():
    """README.md beside the plots: each with its sentence."""
    parts = ["# Lessons", "What each method is there to show, from the committed logs of real runs. "
             "`python benchmark_results/lessons.py NAME` draws a plot anew, with `--fresh` after running its commands "
             "again, which `--list` prints. Some have no commands: lessons_*.py compute them each time, in seconds."]
    for name in NAMES:
        if (LESSONS / name / "message.txt").exists():
            parts += [f"## {name}", f"![{name}]({name}.png)", (LESSONS / name / "message.txt").read_text().strip()]
    (LESSONS / "README.md").write_text("\n\n".join(parts) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="one or more of " + ", ".join(NAMES))
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--list", action="store_true", help="print the commands")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no lesson {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    for name in args.names or NAMES * args.list or parser.error("name a lesson, or --list"):
        commands = commands_of(name)
        if args.list:
            lines = [f"{name}: {label}: python algorithms/{command}" for label, command in commands.items()]
            print(*lines or [f"{name}: computed in {globals()[f'{name}_draw'].__module__}.py"], sep="\n")
            continue
        figure, message = globals()[f"{name}_draw"](
            {label: run(name, label, command, args.fresh) for label, command in commands.items()})
        (LESSONS / name).mkdir(parents=True, exist_ok=True)
        figure.savefig(LESSONS / f"{name}.png", bbox_inches="tight")
        (LESSONS / name / "message.txt").write_text(message[0].upper() + message[1:].rstrip(".") + ".\n")
        print(f"{name}: {message}; {LESSONS / name}.png")
    if not args.list:
        write_page()


if __name__ == "__main__":
    main()
