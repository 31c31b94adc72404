"""The lessons of the methods, drawn from logged runs, or computed on the spot where a table is enough.

    python benchmark_results/lessons.py sac_offline           # draws from the logs that are there, runs what is missing
    python benchmark_results/lessons.py sac_offline --fresh   # runs everything again
    python benchmark_results/lessons.py --list                # what there is, with its commands

A lesson is a set of commands of the method files and a drawing of what they log. Their directories grow in
runs/lessons/, where an interrupted one is taken up again; the small files go to benchmark_results/lessons/NAME/, plot
and text beside. Some of lessons_*.py have no commands.
"""
import argparse
import copy
import csv
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmark_results", "datasets", "algorithms")]

import cql
import from_d4rl
import lessons_tabular
import lessons_weights
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
from lessons_regimes import bcq_draw, bcq_log, bcq_runs
from lessons_tabular import LARGE, correction_draw, cql_bound_draw, expectile_draw, finish, stitching_draw
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


def lately(table, key, n=2):
    """Of each seed, the mean of the last n rows."""
    seeds = sorted({row["seed"] for row in table})
    return [np.mean([row[key] for row in table if row["seed"] == k][-n:]) for k in seeds]


@functools.cache
def returns(dataset_id, gamma=1.0):
    """Returns of the episodes of a shipped set."""
    data = minari.MinariDataset(ROOT / "datasets" / dataset_id / "data")
    return np.array([(e.rewards * gamma ** np.arange(len(e.rewards))).sum() for e in data.iterate_episodes()])


def claim(name):
    return ABOUT[name][1]


def thousands(axis):
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def part_of(dataset_id, steps, folder):
    """A slice of the transitions of a shipped set as a set of its own."""
    if folder.exists():
        return folder
    keys = "observations", "actions", "rewards", "terminals", "timeouts", "next_observations"
    parts = [(e.observations[:-1], e.actions, e.rewards, e.terminations, e.truncations, e.observations[1:])
             for e in minari.MinariDataset(ROOT / "datasets" / dataset_id / "data").iterate_episodes()]
    from_d4rl.write({key: np.concatenate(values)[steps] for key, values in zip(keys, zip(*parts))}, folder)
    return folder


# --- Q against the return that it should predict ---
def sac_offline_runs(data):
    small = part_of("hopper/medium-v0", slice(10_000), data / "hopper-medium-10000-v0")
    return {"100000": "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --num-updates 50000",
            "early": "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --num-updates 3000 --eval-every 250",
            "10000": f"sac_offline.py --dataset-id {small} --env-id Hopper-v5 --num-seeds 3 --num-updates 50000"}


@plt.rc_context(LARGE)
def sac_offline_draw(runs):
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.4), sharex=True, sharey=True, layout="constrained")
    known, early = returns("hopper/medium-v0", 0.99).mean(), evals(runs["early"])
    for label, axis in zip(("100000", "10000"), axes):
        run = runs[label]
        curve(axis, losses(run, "q_start"), "value", color="C3", lw=2.5)
        curve(axis, early * (label == "100000") + evals(run), "discounted_return_mean", color="C0", lw=2.5)
        axis.axhline(known, color="0.4", ls="--")
        axis.set(xscale="log", yscale="log", xlabel="updates (log)", title=f"n = {int(label):,} transitions",
                 xlim=(220, 60_000), ylim=(0.4, 1e9))
        axis.set_xticks((300, 1000, 3000, 10_000, 30_000))
        axis.minorticks_off()
        thousands(axis)
        axis.text(9_000, 1e6, "promised: Q(s$_0$, π(s$_0$))", color="C3", ha="right")
        length = last(evals(run), "length_mean")
        axis.text(50_000, 0.6, f"earned: falls after {length:.0f} steps", color="C0", ha="right")
        axis.text(250, known * 1.3, f"earned by the policy of the data: {known:.0f}", color="0.3")
    axes[0].set_ylabel("discounted value at the start (log)")
    finish(figure, claim("sac_offline"), "3 seeds: mean, range; Hopper medium", axes[0], (0.02, 0.97), ha="left",
           va="top")
    axes[1].text(0.02, 0.97, "first evaluation after 5,000 updates", transform=axes[1].transAxes, va="top", fontsize=11)
    said = []
    for label in "100000", "10000":
        q, g = last(losses(runs[label], "q_start"), "value"), last(evals(runs[label]), "discounted_return_mean")
        said.append(f"with {int(label):,} transitions the critic promises {q:.3g} and the policy earns {g:.0f}")
    way = ", ".join(f"{last(early, 'discounted_return_mean', at):.0f} after {at:,}" for at in (500, 1000, 3000))
    return figure, (
        f"Hopper medium, after {evals(run)[-1]['update']:,.0f} updates: {'; '.join(said)}; the policy that made the "
        f"data earns {known:.0f}. On the way with 100,000 transitions it earns {way} updates")


def cql_runs(data):
    return {"sac": "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --num-updates 50000",
            "cql": "cql.py --dataset-id hopper/medium-v0 --num-seeds 2 --num-updates 12000 --eval-every 1000"}


def sarsa(S=2, num_updates=12_000):
    """CSV of Q by SARSA where episodes begin, y = r + gamma min_i Q'_i(s', a') with the data's a', in CQL's critic with
    its batch, rate and tau. It has no policy and no penalty: what it falls short of the truth by is lag."""
    args = cql.Args()
    episodes = list(minari.MinariDataset(ROOT / "datasets" / "hopper" / "medium-v0" / "data").iterate_episodes())
    keep = [len(e.actions) - (not e.terminations[-1]) for e in episodes]  # a cut-off episode's last step has no a'
    parts = zip(*((e.observations[:n], e.actions[:n], e.rewards[:n], e.observations[1 : n + 1], e.terminations[:n],
                   np.concatenate([e.actions, e.actions[-1:]])[1 : n + 1]) for e, n in zip(episodes, keep)))
    data = [torch.tensor(np.concatenate(part), dtype=torch.float32) for part in parts]
    s_0, a_0 = (torch.tensor(np.stack(x), dtype=torch.float32).expand(S, -1, -1)
                for x in zip(*((e.observations[0], e.actions[0]) for e in episodes)))
    torch.manual_seed(0)
    critic = cql.Critic(S, s_0.shape[-1], a_0.shape[-1], args.hidden_dim)
    target, opt, lines = copy.deepcopy(critic), cql.adam(critic, args.critic_lr), ["update,seed,value"]
    for t in range(1, num_updates + 1):
        i = torch.randint(len(data[0]), (S, args.batch_size))
        s, a, r, s_next, d, a_next = (x[i] for x in data)
        with torch.no_grad():
            y = r + args.gamma * (1 - d) * target(s_next, a_next).amin(1)  # (S, B)
        cql.step(opt, (critic(s, a) - y.unsqueeze(1)).square().sum(1).mean(-1))
        cql.polyak(target, critic, args.tau)
        if t % 1000 == 0:
            with torch.no_grad():
                lines += [f"{t},{k},{q:.4f}" for k, q in enumerate(critic(s_0, a_0).amin(1).mean(-1))]
    return "\n".join([*lines, ""])


def cql_log(label, run):
    """The control beside it: minutes."""
    if label == "cql":
        (run / "sarsa.csv").write_text(sarsa())


@plt.rc_context(LARGE)
def cql_draw(runs):
    expected, earned = {x: losses(runs[x], "q_start") for x in runs}, evals(runs["cql"])
    control, known = rows(runs["cql"] / "sarsa.csv"), returns("hopper/medium-v0", 0.99).mean()
    end = earned[-1]["update"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    for label, name, color in ("sac", "SAC offline", "C1"), ("cql", "CQL", "C3"):
        curve(left, [row for row in expected[label] if row["update"] <= end], "value", color=color, lw=2.5)
        q = last(expected[label], "value", end)
        left.text(end, q * 1.6, f"{name} {q:,.0f}", color=color, ha="right", va="bottom")
    left.set(yscale="log", ylabel="Q(s$_0$, π(s$_0$)), promised (log)", ylim=(1, 3e4),
             title="The same data: SAC's Q runs away, CQL's does not")
    curve(right, earned, "discounted_return_mean", color="C0", lw=2.5)
    curve(right, control, "value", color="0.35", lw=2.5)
    curve(right, expected["cql"], "value", color="C3", lw=2.5)
    right.axhline(known, color="0.35", ls="--", lw=1.2)
    q, lagged, g = (last(table, key, end) for table, key in ((expected["cql"], "value"), (control, "value"),
                                                             (earned, "discounted_return_mean")))
    for x, low, high, color in (1.04, lagged, known, "0.35"), (1.15, q, g, "C3"):
        right.annotate("", (x * end, low), (x * end, high), arrowprops={"arrowstyle": "<->", "color": color})
        right.text((x + 0.01) * end, (low + high) / 2, f"{high - low:.0f}", color=color, va="center")
    right.text(200, known + 4, f"truth for SARSA: {known:.0f}", color="0.35")
    right.text(0.36 * end, 214, f"CQL's policy earns {g:.0f}", color="C0")
    right.text(0.99 * end, lagged + 9, f"SARSA on the data: {lagged:.0f}", color="0.35", ha="right")
    right.text(end, -16, f"CQL promises {q:.0f}", color="C3", ha="right")
    right.set(ylabel="discounted value at the start", ylim=(-25, 230),
              title="SARSA, which has no penalty, is far below its truth as well")
    for axis, right_end in (left, 1.02), (right, 1.26):
        axis.set(xlabel="updates", xlim=(0, right_end * end))
        axis.set_xticks(range(0, int(end) + 1, 3000))
        thousands(axis)
    finish(figure, claim("cql"), "mean and range of 3 seeds (SARSA, CQL 2)\nSARSA: CQL's critic and τ, a' of the data",
           left, (0.01, 0.98), ha="left", va="top")
    return figure, (
        f"Hopper medium, after {end:,.0f} updates: CQL's critic promises {q:.0f}, its policy earns {g:.0f}; SAC's "
        f"critic promises {last(expected['sac'], 'value', end):,.0f} by then. SARSA on the data's actions, with the "
        f"same critic and target, stands at {lagged:.0f} of the {known:.0f} that these actions earn: lag alone makes "
        f"{known - lagged:.0f}, CQL's distance is {g - q:.0f}")


# --- a batch on a finite MDP ---
BCQ_SLIPS = {"lattice": ("0", "0.2"), "FrozenLake-v1": ("0", "0.6666667")}  # the last: Gymnasium's slippery lake
BCQ_EPISODES = 2, 4, 8, 16, 32


def bcq_tabular_runs(data):
    more = {"lattice": "--epsilon 1 --gamma 1", "FrozenLake-v1": "--epsilon 0.5 --gamma 0.99"}
    return {f"{env} {slip} {n}": f"bcq_tabular.py --env-id {env} --slip {slip} --num-episodes {n} {more[env]} --seed 4 "
                                 "--num-seeds 50 --num-updates 1000 --eval-every 1000 --device cpu"
            for env, slips in BCQ_SLIPS.items() for slip in slips for n in BCQ_EPISODES}


@plt.rc_context(LARGE | {"axes.grid": False})
def bcq_tabular_draw(runs):
    """Needs table.csv, seed 0's counts and policy, of the two lattices with 8 episodes, beside losses.csv."""
    orange, blue, red, pink, grey, pale = "darkorange", "tab:blue", "tab:red", "#ffd0cc", "0.65", "0.95"
    places = [(t, i - t / 2) for t in range(6) for i in range(t + 1)]
    carried = {key: [row["value"] for row in losses(run, "carried") if row["update"] == 1000]
               for key, run in runs.items()}
    figure, axes = plt.subplots(1, 2, figsize=(14, 6.6), layout="constrained")

    def table(run):  # state, action -> its row
        head, *lines = [line.split(",") for line in (run / "table.csv").read_text().split()]
        return {(int(s), int(a)): dict(zip(head[2:], map(float, x))) for s, a, *x in lines}

    def seen(row, s):
        return row[s, 0]["count"] + row[s, 1]["count"]

    def arrow(axis, start, end, **style):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **style})

    for axis, slip, title in zip(axes, ("0", "0.2"), ("deterministic", "stochastic, slip 0.2")):
        row, share = table(runs[f"lattice {slip} 8"]), carried[f"lattice {slip} 8"]
        for (x, y), reward in zip(places[15:], (8, 0, 4, 2, 6, 10)):
            axis.scatter(x, y, 90, "white", marker="s", edgecolors="black", zorder=3)
            axis.text(x + 0.14, y, reward, va="center", fontsize=13)
        for s, (x, y) in enumerate(places[:15]):
            known, visits = seen(row, s), row[s, 0]["visits"]
            face, edge, hatch = ("white", "black", "") if known else (pink, red, "") if visits else (pale, grey, "///")
            axis.add_patch(matplotlib.patches.Ellipse((x, y), 0.46, 0.56, zorder=3, lw=1.3, facecolor=face,
                                                      edgecolor=edge, hatch=hatch))
            if visits:
                axis.text(x, y, f"{100 * visits:.{0 if visits > 0.01 else 1}f}", ha="center", va="center", fontsize=11,
                          zorder=4, color=edge)
            for a in 0, 1:
                end, count = s + x + 1 + a, row[s, a]["count"]
                dx, dy = places[end][0] - x, places[end][1] - y
                inside = (x + 0.24 * dx, y + 0.24 * dy), (x + 0.77 * dx, y + 0.77 * dy)
                if known and row[s, a]["greedy"]:
                    arrow(axis, *inside, color=blue, lw=3.5 if visits else 1, mutation_scale=16 if visits else 10)
                else:
                    axis.plot((x, x + dx), (y, y + dy), "-" if count else ":", zorder=1, lw=1.5,
                              color=orange if count else grey)
                    if slip != "0" and known and visits and end < 15 and not seen(row, end):
                        arrow(axis, *inside, color=red, ls="--", lw=2, mutation_scale=15)
                if count:
                    axis.text(x + 0.5 * dx, y + 0.5 * dy, f"{count:.0f}", color=orange, fontweight="bold", ha="center",
                              va="center", zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.set(xlim=(-0.3, 5.5), ylim=(-2.9, 2.9), xticks=[], yticks=[],
                 title=f"{title}: {100 * share[0]:.0f} % of its episodes leave the data")
        axis.spines[:].set_visible(False)
        axis.text(-0.28, -2.85, "one batch of 8 random episodes\n50 such batches: "
                  + (f"mean {100 * np.mean(share):.0f} %, median {100 * np.median(share):.0f} %"
                     if max(share) else "0 % in each"))
    Line, Patch = plt.Line2D, matplotlib.patches.Patch
    axes[0].text(-0.28, 2.5, "start on the left, reward on the right\nin states: % of the policy's episodes")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, handles=[
        Line([], [], color=orange, label="action in the data, with its count"),
        Line([], [], color=grey, ls=":", label="action not in the data: not allowed"),
        Line([], [], color=blue, lw=3.5, label="greedy policy (thin: never there)"),
        Line([], [], color=red, ls="--", lw=2, label="chance takes it out of the data"),
        Patch(facecolor=pink, edgecolor=red, label="unknown state, reached"),
        Patch(facecolor=pale, edgecolor=grey, hatch="///", label="unknown state, never reached")])
    figure.suptitle(claim("bcq_tabular"))
    some, many, lake = BCQ_EPISODES[0], BCQ_EPISODES[-1], f"FrozenLake-v1 {BCQ_SLIPS['FrozenLake-v1'][1]} 8"
    mean, median = ({key: f"{100 * f(share):.0f} %" for key, share in carried.items()} for f in (np.mean, np.median))
    never = max(max(share) for key, share in carried.items() if key.split()[1] == "0")
    return figure, (
        f"with chance (slip 0.2) BCQ's policy of 8 episodes on the lattice is carried into states without data in "
        f"{mean['lattice 0.2 8']} of its episodes (mean over 50 batches; median {median['lattice 0.2 8']}), of {some} "
        f"episodes in {mean[f'lattice 0.2 {some}']}, of {many} in {mean[f'lattice 0.2 {many}']}; on the slippery "
        f"FrozenLake (not drawn) of 8 episodes in {mean[lake]} (median {median[lake]}). Without chance it is "
        f"{'sometimes' if never else 'never'} carried there, in both worlds and for every number of episodes")


# --- what is asked for and what is achieved ---
def dt_runs(data):
    return {"both": "dt.py --dataset-id hopper/medium-replay-v0+hopper/medium-v0 --num-seeds 2 --num-updates 8000 "
                    "--warmup 500 --eval-every 5000 --sweep"}


@plt.rc_context(LARGE)
def dt_draw(runs):
    (run,) = runs.values()
    sets = json.loads((run / "args.json").read_text())["dataset_id"].split("+")
    data = np.concatenate([returns(name) for name in sets])
    table = np.genfromtxt(run / "targets.csv", delimiter=",", names=True)
    asked = np.unique(table["target"])[1:]  # the first is the data's worst
    achieved, spread = (np.stack([table[name][table["target"] == x] for x in asked])  # (targets, seeds)
                        for name in ("return_mean", "return_std"))
    figure, (top, axis) = plt.subplots(2, 1, figsize=(9, 9), sharex=True, height_ratios=(1, 4.6), layout="constrained")
    end = 1.03 * asked[-1]
    top.hist(data, bins=np.linspace(data.min(), asked[-1], 60), color="0.6")
    top.set(yscale="log", ylabel="episodes (log)", title=f"returns of the {len(data)} episodes of the data")
    axis.plot((0, end), (0, end), color="black", ls="--", lw=1)
    axis.text(1240, 1330, "as asked for", rotation=45, rotation_mode="anchor", transform_rotates_text=True)
    axis.axhline(data.max(), color="C2", ls=":", lw=2)
    axis.text(30, data.max() + 30, f"best episode in the data, {data.max():.0f}", color="C2", fontsize=11)
    axis.axhline(data.mean(), color="0.4", ls=":", lw=2)
    axis.text(end - 30, data.mean() + 30, f"mean of the data, {data.mean():.0f}", color="0.4", ha="right")
    for k, (mean, std) in enumerate(zip(achieved.T, spread.T)):
        axis.errorbar(asked, mean, std, marker="o", capsize=4, lw=2, color=("C0", "C1")[k])
        axis.annotate(f"seed {k}", (asked[1], mean[1]), (14, -10), textcoords="offset points", color=("C0", "C1")[k])
    for each in top, axis:
        each.axvspan(data.max(), end, color="grey", alpha=0.15, lw=0)
    axis.text(data.max() + 40, 60, "no episode of the data\nreturned so much")
    axis.set(xlabel="target return $R_0$ asked for at the first step", ylabel="return achieved", xlim=(0, end),
             ylim=(0, 2600))
    finish(figure, claim("dt"), "2 seeds, 10 episodes each:\nmean ± deviation over episodes", axis, (0.99, 0.3))
    brought = "; ".join(f"{x:.0f} brings " + " and ".join(f"{y:.0f}" for y in line) for x, line in zip(asked, achieved))
    return figure, (f"Hopper, two seeds: asked for a return of {brought}; the data's episodes return "
                    f"{data.mean():.0f} on average and {data.max():.0f} at best")


# --- a threshold between Q-learning and cloning, and discrete methods on the same data ---
BCQ_THRESHOLDS = "0", "0.1", "0.3", "0.5", "1"
LANDER_SETS = {"mixed": "mixed data", "half": "narrow data"}  # the shipped set, its half-trained half alone


def lander_sets(data):
    """Flags for the shipped set and for its half-trained episodes, the later half of its 80,000 steps."""
    half = part_of("lunarlander/mixed-v0", slice(40_000, None), data / "lunarlander-half-v0")
    return {"mixed": "--dataset-id lunarlander/mixed-v0 --num-seeds 3",
            "half": f"--dataset-id {half} --env-id LunarLander-v3 --num-seeds 3"}


@functools.cache
def lander_means():
    """Mean return of the random episodes and of the half-trained ones of the shipped set."""
    shipped = minari.MinariDataset(ROOT / "datasets" / "lunarlander" / "mixed-v0" / "data")
    lengths, found = np.array([(len(e.rewards), e.rewards.sum()) for e in shipped.iterate_episodes()]).T
    later = lengths.cumsum() > shipped.total_steps / 2
    return found[~later].mean(), found[later].mean()


def bcq_discrete_runs(data):
    return {f"{part} {t}": f"bcq_discrete.py --threshold {t} {flags} --num-updates 20000"
            for part, flags in lander_sets(data).items() for t in BCQ_THRESHOLDS}


@plt.rc_context(LARGE)
def bcq_discrete_draw(runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    found, x = {}, np.arange(len(BCQ_THRESHOLDS))
    for color, (part, title), (at, y) in zip(("C4", "C1"), LANDER_SETS.items(), ((3.4, -150), (0.15, -225))):
        found[part] = np.array([lately(evals(runs[f"{part} {t}"]), "return_mean") for t in BCQ_THRESHOLDS])
        left.plot(x, found[part].mean(1), color=color, lw=2.5)
        left.plot(x, found[part], "o", color=color, markersize=6, alpha=0.7)
        left.text(at, y, title, color=color, ha="right" if at > 1 else "left")
    _, half = lander_means()
    left.axhline(half, color="0.4", ls="--", lw=1.2)
    left.text(-0.1, half + 7, f"half-trained policy, {half:.0f}", color="0.35")
    left.set(ylabel="return of an episode", ylim=(-345, 200), title="Each extreme fails on one of the two sets")
    some = [runs[f"half {t}"] for t in BCQ_THRESHOLDS]
    q = np.array([lately(losses(run, "q_start"), "value") for run in some])
    g = np.array([lately(evals(run), "discounted_return_mean") for run in some])
    right.fill_between(x, q.mean(1), g.mean(1), color="0.9", lw=0)
    for y, color, text, place in ((q, "C3", "promised: Q(s$_0$, π(s$_0$))", (0.25, 105)),
                                  (g, "C0", "earned: discounted return", (0.75, -60))):
        right.plot(x, y.mean(1), color=color, lw=2.5)
        right.plot(x, y, "o", color=color, markersize=6, alpha=0.7)
        right.text(*place, text, color=color)
    right.set(ylabel="discounted value at the start",
              title="Narrow data: the smaller ε, the more the critic promises\nbeyond what its policy earns")
    for axis in left, right:
        axis.set(xlabel="threshold ε (not to scale): 0 is Q-learning, 1 is cloning")
        axis.set_xticks(x, BCQ_THRESHOLDS)
    finish(figure, claim("bcq_discrete"), "LunarLander, 20,000 updates; dots: 3 seeds,\nmean of the last 2 evaluations",
           left, (0.5, 0.01), ha="center")
    said = {part: "; ".join(f"{', '.join(f'{y:.0f}' for y in line)} at {t}" for t, line in zip(BCQ_THRESHOLDS, lines))
            for part, lines in found.items()}
    return figure, (
        "LunarLander, returns of the three seeds after 20,000 updates by threshold: on mixed data (half random, half "
        f"of a half-trained policy) {said['mixed']}; on narrow data (the half-trained policy alone) {said['half']}")


LANDER_METHODS = {"dqn": ("DQN", "C3", "dqn_offline.py"), "bcq": ("BCQ", "C0", "bcq_discrete.py"),
                  "cql": ("CQL", "C2", "cql_discrete.py"),
                  "cloning": ("cloning", "0.4", "bcq_discrete.py --threshold 1")}


def cql_discrete_runs(data):
    flags = lander_sets(data)["half"]
    return {f"half {label}": f"{command} {flags} --num-updates 50000"
            for label, (*_, command) in LANDER_METHODS.items()}


@plt.rc_context(LARGE)
def cql_discrete_draw(runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    found, (_, half) = {}, lander_means()
    left.plot((0, 50_000), (half, half), color="black", ls="--", lw=1.2)
    left.text(51_000, half - 12, f"the data, {half:.0f}", va="center")
    for at, (label, (name, color, _)) in enumerate(LANDER_METHODS.items()):
        run = runs[f"half {label}"]
        q, g = (lately(table, key) for table, key in ((losses(run, "q_start"), "value"),
                                                      (evals(run), "discounted_return_mean")))
        found[name] = lately(evals(run), "return_mean"), q, g
        curve(left, evals(run), "return_mean", color=color, lw=2.5)
        up = 12 * (label in ("cql", "cloning"))  # apart from its neighbour
        left.text(51_000, last(evals(run), "return_mean") + up, name, color=color, va="center")
        if label != "cloning":  # which does not ask its critic
            right.plot(np.full(len(q), at - 0.12), q, "o", color="C3", markersize=8, alpha=0.7)
            right.plot(np.full(len(g), at + 0.12), g, "o", color="C0", markersize=8, alpha=0.7)
            right.text(at - 0.12, max(q) + 25, f"promised\n{np.mean(q):.0f}", color="C3", ha="center", va="bottom")
            right.text(at + 0.12, min(g) - 25, f"earned\n{np.mean(g):.0f}", color="C0", ha="center", va="top")
            right.plot((at, at), (np.mean(q), np.mean(g)), color="0.8", lw=8, zorder=0, solid_capstyle="butt")
    left.set(xlabel="updates", ylabel="return of an episode", xlim=(0, 61_000), ylim=(-800, 310),
             title="DQN fails where BCQ and CQL beat the policy of the data")
    left.set_xticks(range(0, 50_001, 10_000))
    thousands(left)
    right.set(ylabel="discounted value at the start", xlim=(-0.6, 2.6), ylim=(-560, 380),
              title="In DQN promise and return part, in BCQ and CQL hardly")
    right.set_xticks(range(3), ["DQN", "BCQ, ε = 0.3", "CQL, α = 1"])
    right.grid(axis="x", visible=False)
    finish(figure, claim("cql_discrete"), "LunarLander, narrow data; 3 seeds: mean, range", left, (0.01, 0.02),
           ha="left")
    right.text(0.99, 0.02, "dots: 3 seeds, mean of the last 2 logs", transform=right.transAxes, ha="right", fontsize=11)
    return figure, (
        f"LunarLander, episodes of a half-trained policy alone, which return {half:.0f} on average; after 50,000 "
        "updates the three seeds return "
        + "; ".join(f"{name} {', '.join(f'{y:.0f}' for y in r)}" for name, (r, _, _) in found.items())
        + "; promised and earned, discounted: " + "; ".join(
            f"{name} {np.mean(q):.0f} and {np.mean(g):.0f}" for name, (_, q, g) in found.items() if name != "cloning"))


# --- a policy that pleases its model ---
def mopo_runs(data):
    return {str(value): "mopo.py --num-seeds 2 --num-updates 40000 --eval-every 1000 --model-epochs 30 --horizon 100 "
                        f"--rollout-batch 2500 --penalty {value}" for value in (0, 5)}


@plt.rc_context(LARGE)
def mopo_draw(runs):
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.4), sharex=True, sharey=True, layout="constrained")
    half, found = max(row["update"] for row in evals(runs["0"])) / 2, []
    late = lambda table, key: np.mean([row[key] for row in table if row["update"] > half])
    said = {"0": "without penalty (λ = 0) it promises too much", "5": "with penalty (λ = 5) it promises too little"}
    for (label, run), axis, heights in zip(runs.items(), axes, ((190, 62), (92, 212))):
        q, g = losses(run, "q_start"), evals(run)
        found.append((late(q, "value"), late(g, "discounted_return_mean")))
        curve(axis, q, "value", color="C3", lw=2.5)
        curve(axis, g, "discounted_return_mean", color="C0", lw=2.5)
        for y, what, value, color in zip(heights, ("promised", "earned"), found[-1], ("C3", "C0")):
            axis.text(1.05 * half, y, f"{what}: {value:.0f}", color=color)
        axis.axvspan(half, 2.03 * half, color="0.95", lw=0, zorder=0)
        axis.set(title=said[label], xlabel="updates of the policy", xlim=(0, 2.03 * half), ylim=(-5, 230),
                 xticks=np.arange(0, 2 * half + 1, half / 2))
        thousands(axis)
    axes[0].set_ylabel("discounted value at the start")
    finish(figure, claim("mopo"), "2 seeds: mean, range; numbers: mean of the grey half\n"
           "rollouts of 100 steps, not the authors' 5", axes[1])
    return figure, f"Hopper medium, means after {half:,.0f} updates: " + "; ".join(
        f"with penalty {label} the critic promises {q:.0f} and the policies earn {g:.0f}, discounted"
        for label, (q, g) in zip(runs, found))


# --- labels where the learner goes ---
LANE_HORIZONS = 12, 25, 50, 100, 200, 400
LANE_BENDS, LANE_VERGE = 1000, 10  # kinds of bend on the lane, steps from the lane to the fence on either side


@functools.cache
def lane(on_policy, labels=7000, length=100, seeds=100):
    """Mistakes of learned tables in H steps, (seeds, max H + 1), and in a step on the lane, (seeds,): both expected.

    A lane world. On the lane each step brings one of many bends at random; the wrong one of three actions puts the
    learner on the verge beside it. There it has to steer back: right is one step nearer, wrong one step further.
    A table knows the states that it has labels of and guesses in the others. BC's labels are of `length` steps of the
    expert at a time, DAgger's of as many steps of the table itself, the first of the expert.
    """
    rng, W, k = np.random.default_rng(0), LANE_VERGE, np.arange(seeds)
    bends, verge = np.zeros((seeds, LANE_BENDS), bool), np.zeros((seeds, 2 * W + 1), bool)  # labelled
    for episode in range(labels // length):
        x, knew_bends, knew_verge = np.zeros(seeds, int), bends.copy(), verge.copy()
        for bend in rng.integers(LANE_BENDS, size=(length, seeds)):
            bends[k, bend] |= x == 0
            verge[k, x + W] |= x != 0
            right = np.where(x == 0, knew_bends[k, bend], knew_verge[k, x + W]) | (rng.random(seeds) < 1 / 3)
            if not (on_policy and episode):
                right[:] = True
            away = np.where(x == 0, rng.choice((-1, 1), seeds), np.sign(x))
            x = np.where(right, x - np.sign(x), x + away).clip(-W, W)
    wrong = np.where(verge, 0, 2 / 3)  # chance of a mistake by place, (seeds, 2 W + 1)
    wrong[:, W] = 2 / 3 * (1 - bends.mean(1))
    at, total = np.zeros_like(wrong), [np.zeros(seeds)]
    at[:, W] = 1
    for _ in range(max(LANE_HORIZONS)):
        total.append(total[-1] + (at * wrong).sum(1))
        stay, slip = at * (1 - wrong), at * wrong
        at = np.zeros_like(at)
        at[:, W] += stay[:, W]
        at[:, 1 : W + 1] += stay[:, :W]  # one step nearer
        at[:, W:-1] += stay[:, W + 1 :]
        at[:, : W - 1] += slip[:, 1:W]  # one step further
        at[:, W + 2 :] += slip[:, W + 1 : -1]
        at[:, [0, -1]] += slip[:, [0, -1]]  # at the fence
        at[:, [W - 1, W + 1]] += slip[:, [W]] / 2
    return np.stack(total, 1), wrong[:, W]


def dagger_runs(data):
    student = "--num-seeds 10 --hidden-dim 32 --learning-rate 1e-3 --eval-episodes 5"  # small, so that it errs
    rounds = {"dagger": "--rounds 10 --steps-per-round 1000 --num-updates 10000 --eval-every 1000",
              "bc 10000": "--rounds 1 --steps-per-round 10000 --num-updates 10000 --eval-every 10000"}
    return {label: f"dagger.py {student} {flags}" for label, flags in rounds.items()}


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
    (run / "walks.csv").write_text(hopper_walks(run / "policy.pt2"))
    if label == "dagger":
        (run / "expert.csv").write_text(hopper_walks(ROOT / "datasets" / "hopper" / "expert.pt2"))


@plt.rc_context(LARGE)
def dagger_draw(runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    H, slopes, error, costs, up, returned = np.array(LANE_HORIZONS), {}, {}, {}, {}, {}
    step = 25 * np.arange(1, 41)
    for name, label, color in ("BC", "bc 10000", "C3"), ("DAgger", "dagger", "C0"):
        total, wrong = lane(name == "DAgger")
        mean, se = total.mean(0)[H], total.std(0)[H] / len(total)**0.5
        costs[name], error[name] = mean[-1], wrong.mean()
        slopes[name] = np.polyfit(np.log(H), np.log(mean), 1)[0]
        left.errorbar(H, mean, 2 * se, fmt="o", color=color, capsize=3, zorder=3)
        left.plot(H, error[name] * H ** (2 if name == "BC" else 1), color=color, ls="--", lw=1.2)
        table = rows(runs[label] / "walks.csv")
        alive = np.array([[row["alive"] for row in table if row["step"] == t] for t in step])  # (40, seeds)
        returned[name] = np.mean([row["return"] for row in table if row["step"] == step[-1]])
        right.plot(step, alive.mean(1), color=color, lw=3)
        right.plot(step, alive, color=color, lw=0.7, alpha=0.35)
        up[name] = alive[-1].mean()
        right.text(1010, up[name], f"{name}\n{100 * up[name]:.0f} %", color=color, va="center")
    left.text(150, 34, f"BC: bound H²ε, ε = {100 * error['BC']:.2f} %", color="C3", ha="right", va="center")
    left.text(400, 0.045, f"DAgger: bound Hε, ε = {100 * error['DAgger']:.2f} %", color="C0", ha="right", va="center")
    left.text(0.02, 0.98, f"dots, slope {slopes['BC']:.1f} and {slopes['DAgger']:.1f}: tables learned from\n"
              "7,000 labels, 100 seeds: mean ± 2 s.e.", transform=left.transAxes, va="top", fontsize=11)
    left.set(xscale="log", yscale="log", xlabel="horizon H", ylabel="mistakes in H steps, ℓ(π)", ylim=(0.008, 900),
             title="Lane world: a mistake can be made good by who knows how")
    left.set_xticks(H, H)
    left.minorticks_off()
    right.set(xlabel="step of an episode", ylabel="share of the episodes that are still up", xlim=(0, 1150),
              ylim=(0, 1.03), title="Hopper, 10,000 labels each: BC falls, DAgger goes on")
    right.set_xticks(range(0, 1001, 200))
    finish(figure, claim("dagger"), "10 seeds, 20 episodes each; thick: mean\nboth: 10,000 updates of a small network",
           right, (0.02, 0.02), ha="left", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2})
    expert = np.mean([row["return"] for row in rows(runs["dagger"] / "expert.csv") if row["step"] == step[-1]])
    return figure, (
        f"in a lane world the mistakes of BC's tables grow as H to the power {slopes['BC']:.1f}, those of DAgger's as "
        f"H to the power {slopes['DAgger']:.1f}: {costs['BC']:.1f} and {costs['DAgger']:.1f} in {H[-1]} steps, though "
        f"BC errs in {100 * error['BC']:.2f} and DAgger in {100 * error['DAgger']:.2f} % of the steps on the lane "
        f"(7,000 labels each, 100 seeds). In Hopper, with 10,000 labels each, {100 * up['BC']:.0f} % of BC's episodes "
        f"and {100 * up['DAgger']:.0f} % of DAgger's are still up after 1,000 steps; they return {returned['BC']:.0f} "
        f"and {returned['DAgger']:.0f}, the expert {expert:.0f}")


# --- the page ---
PARTS = {1: "Behaviour cloning", 2: "Challenges of offline RL", 3: "Policy constraint", 4: "Conservative methods",
         5: "Implicit policy constraint", 6: "Variants of behaviour cloning"}
# Of each lesson: its place in a lecture, part and then order; its claim; what one would say; what it does not show.
# A module of lessons has an ABOUT of its own, which is joined to this one.
ABOUT = {
    "dagger": (
        1.1, "Cloning's mistakes compound, nearly as H²; labels where the learner goes bring that down to H",
        "A clone meets states that the expert never led it to, has no label there and goes further astray, so a "
        "mistake costs the rest of the episode: H times ε times H. DAgger asks the expert exactly there, so a "
        "mistake costs itself and no more, provided that it can be made good.",
        "H and H² come from the lane world, which is made so that they can: whoever has no label on its verge "
        "hardly finds back. A fall in Hopper cannot be made good, so there the picture shows how many mistakes "
        "end an episode, not a power of H; the network is small on purpose, so that it errs, and the expert is a"
        " program that answers always."),
    "interventions": (
        1.2, "An expert who takes over instead of labelling every step is needed less and less",
        "In human-gated DAgger the expert watches and takes the wheel when it goes wrong; only these stretches become "
        "labels. As the learner gets better the expert has less and less to do.",
        "That it learns more from each label than DAgger does: the ranges of five seeds overlap. Nor what watching "
        "costs: the gate compares with a network at every step, where a person sees some mistakes late."),
    "multimodal": (
        1.3, "Squared error averages left and right and hits the obstacle; expressive distributions choose a side",
        "With the squared loss a clone learns the mean of what the experts did, and between left and right that is "
        "straight on. A class of distributions that can hold both modes picks one of them.",
        "Which of the expressive classes is best: nothing was tuned, and the road has two modes and two dimensions."),
    "observability": (
        1.4, "The past action lowers the error as the light does, but only the light makes the clone drive",
        "A clone that lacks what the expert saw cannot imitate him, however well it fits. The past action betrays what "
        "he saw, so the error falls, but the clone then copies its own past instead of looking.",
        "That more inputs always hurt or help: with the light in plain sight the past action does no harm here. One "
        "made-up crossing, small networks."),
    "pilotnet": (
        1.5, "Errors compound where no data shows the way back: side cameras supply it",
        "A good driver never shows how to get back to the middle. Cameras that look from beside it, with labels that "
        "lead back, supply such data without anybody driving badly.",
        "Driving: the roads are drawn, the driver is a formula. The two losses are of different data, "
        "and two seeds are few."),
    "trailnet": (
        1.6, "Three cameras label a walk by themselves, and P(right) - P(left) then walks it",
        "Someone walks a trail with three cameras, and each picture's label is where its camera points. A classifier "
        "of the three is enough to follow a trail.",
        "A forest: the trails are drawn and plainer than one, and two seeds are few."),
    "sac_offline": (
        2.1, "Off-policy learning on a fixed set: Q diverges, the return falls, ten times the data do not help",
        "Can we just use off-policy methods on a static dataset? No: with more training the critic promises a hundred "
        "million and the policy falls over sooner, and ten times the data do not help, so overfitting is not the main "
        "reason.",
        "What happens on other data: both sets are narrow, of one policy; on hopper/medium-replay-v0 Q does not "
        "diverge. With 10,000 transitions the first evaluation comes after 5,000 updates, when all has happened."),
    "extrapolation": (
        2.15, "Q errs at actions that the data lack, and bootstrapping passes the error on to those that they hold",
        "No label ever says what Q is at an action that the data lack, and the max asks exactly there. The target "
        "takes the error over, so in the end Q is wrong at the data's own actions as well.",
        "Where the error comes from in a network: the spread is computed in tables, whose untried actions keep their "
        "first guess. On the left Q is a mean over states of the data, the return one from the start."),
    "importance": (
        2.2, "The further the policies are apart and the longer the episodes, the wider importance sampling spreads",
        "Weights π/π_β make the data look as if π had made them, in expectation. Each step multiplies them, so soon a "
        "few of a hundred episodes carry all the weight, and the estimate is worth what these few happen to say.",
        "What it does where π_β is not known and has to be estimated, and in large state spaces: this is a corridor of "
        "seven cells with both policies known."),
    "bcq_tabular": (
        3.1, "BCQ stays in the data where the world is deterministic; chance sweeps it into the unknown",
        "Allow only actions that are in the data: without chance each of them leads to a state that is in the "
        "data as well, and what Q promises is what comes. With chance an allowed action can end where nothing "
        "was ever seen, and there is no plan for that.",
        "How much it costs: that depends on the world. On the slippery FrozenLake the mean over batches is made "
        "by a few of them, half have none. The batch drawn is one of 50, with a share near their mean."),
    "bcq_discrete": (
        3.2,
        "Q-learning (ε = 0) fails on narrow data, cloning (ε = 1) on mixed data, a threshold between on "
        "neither",
        "The threshold ε says how likely an action has to be, next to the likeliest, before the max may take it."
        " At 0 the max believes what the critic makes up, at 1 there is nothing left to improve; in between is "
        "room.",
        "Which ε between is best, and that one beats the better extreme: with three seeds they overlap. No "
        "policy lands reliably."),
    "bear_gridworld": (
        3.3,
        "Where Q errs about unseen actions every weight of a KL penalty fails, a support constraint reaches the goal",
        "Where the data mostly go the wrong way a policy that has to match them goes the wrong way as well, and with "
        "the leash loosened it believes what Q makes up. It is enough to ask that an action is in the data at all.",
        "BEAR itself: the support is a threshold on the known π_β, no MMD and no networks. The error of Q outside the "
        "data is set by hand; were Q right there, a generous penalty would do as well. A policy that "
        "circles around S gets to G some day, for a discounted value of nearly nothing."),
    "bcq": (
        3.15, "On batches that DDPG made itself DDPG and SAC earn far less than clones of the same data",
        "Take four batches, from all that a learner ever saw to the steps of its last policy. Not even the learner that "
        "made the batch can use it again, because nobody corrects what its critic makes up.",
        "That BCQ is better than cloning: 3,000 updates are too few for its critic. On hopper/medium-v0 it stood at scores "
        "of 15 and 20 after 5,000 updates and at 66 and 73 after 10,000. `concurrent` is the whole replay of a DDPG with "
        "less noise, not a learner beside it, and DDPG had 200,000 steps, a fifth of the paper's. BC swings so much in `final` "
        "that its range meets theirs, and SAC climbs in `concurrent`."),
    "cql": (
        4.2, "CQL's Q does not run away; that it is still below the return is mostly its target's lag",
        "On the data on which SAC's critic explodes CQL's stays small and its policy hops. But beware of reading"
        " the lower bound off this gap: a critic that starts at 0 needs several 1/(τ(1 - γ)) = 20,000 updates to"
        " climb, and SARSA, which has no reason to be conservative, stays below its truth by three quarters of that "
        "distance.",
        "A lower bound: after 12,000 updates no critic here has arrived, and two seeds are few. `cql_bound` "
        "computes the bound where Q is exact."),
    "cql_discrete": (
        4.3, "On narrow data plain DQN fails, where CQL and BCQ do better than the policy that made the data",
        "Take away the random half of the data and DQN, with nothing against actions that it never saw, falls "
        "far below them. A penalty in the critic or a threshold on the actions is enough to do better than the "
        "data.",
        "A lower bound: CQL's Q is somewhat above the return here, α = 1 being small. On the mixed set, half of "
        "which is random, three seeds overlap and no order can be claimed."),
    "mopo": (
        4.4, "Without its penalty MOPO's critic promises more than the policy earns, with it less",
        "A policy learned in a model finds where the model is wrong in its favour. Deduct the model's own uncertainty "
        "from the reward, r - λu(s, a), so that the value in the model is a lower bound of what is earned.",
        "That the penalty alone does it: of the 66 that the critic promises too little at the end the lag of its"
        " target makes about 26, and two seeds are few. Rollouts have 100 steps; with the authors' 5 the policy "
        "fails in the updates that a CPU affords."),
    "dt": (
        6.2, "Asked for more a Decision Transformer returns more, up to about the data's best episode",
        "All of the data is imitated, good and bad, each action together with the return that followed. To act "
        "well one asks for a high return, and gets at most what some episode has shown.",
        "That the return asked for is met: the two seeds differ by up to 900 and neither follows the diagonal. "
        "They have 8,000 of 100,000 updates."),
} | lessons_tabular.ABOUT | lessons_weights.ABOUT


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
    """README.md beside the plots, in the order of a lecture."""
    parts = ["# Lessons", "What a lecture on behaviour cloning and offline RL claims, in pictures of logged runs of "
             "these files or, where a table is enough, computed on the spot. Under each picture: what one would say, "
             "what came out, what it does not show. The command draws it anew from the logs that are committed here; "
             "with `--fresh` it runs the method files again first, `--list` prints how."]
    heading = None
    for name in sorted(set(NAMES) & set(ABOUT), key=lambda name: ABOUT[name][0]):
        if not (LESSONS / name / "message.txt").exists():
            continue
        place, claim, said, limits = ABOUT[name]
        if heading != (heading := int(place)):
            parts.append(f"## {PARTS[heading]}")
        kept = [json.loads(path.read_text())["method"] for path in sorted((LESSONS / name).glob("*/run.json"))]
        how = "from runs of " + ", ".join(f"`{x}.py`" for x in sorted(set(kept))) if kept else "computed, no runs"
        numbers = (LESSONS / name / "message.txt").read_text().strip()
        parts += [f"### {claim}", f"![{name}]({name}.png)", said, f"**Numbers.** {numbers}",
                  f"**Not shown.** {limits}",
                  f"`python benchmark_results/lessons.py {name}` ({how})"]
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
        plt.close(figure)
        (LESSONS / name / "message.txt").write_text(message[0].upper() + message[1:].rstrip(".") + ".\n")
        print(f"{name}: {message}; {LESSONS / name}.png")
    if not args.list:
        write_page()


if __name__ == "__main__":
    main()
