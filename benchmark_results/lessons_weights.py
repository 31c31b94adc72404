"""Lessons about what is cloned more and what less: awr, computed when it is drawn, and envelope, from a run of bail.py."""
import csv
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "algorithms"))
import awr
import bail
from lessons_tabular import LARGE, finish

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Of each lesson: its place in a lecture, part and then order; its claim; what one would say; what it does not show.
ABOUT = {
    "awr": (
        5.2, "Monte-Carlo advantages judge the episode, TD advantages the action",
        "A Monte-Carlo return mixes what the action did with all that came after it, so the good deed of a "
        "careless demonstrator is punished for his later ones. TD asks for the value of the next state and judges the step "
        "alone.",
        "What TD costs: in this chain V of the next state is exact and every action leads there, so it has no bias; a "
        "fitted V has some."),
    "envelope": (
        6.1, "BAIL clones the steps whose return comes near the best that their state has seen",
        "Filtered cloning without whole episodes: fit an upper envelope V over the returns and keep the quarter of the "
        "steps nearest to it. A good stretch of a bad episode can stay.",
        "That the clone is better for it: no policy is evaluated here. One seed, one set, of which nearly all "
        "episodes contribute."),
}

# --- awr ---
STEPS, EPISODES, SEEDS = 10, 200, 10
RIGHT = {"careful": 0.9, "careless": 0.2}  # how often each of two demonstrators acts right
LAMBDAS = 0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0


@functools.cache
def awr_numbers():
    """A chain of STEPS states; a right action brings 1, a wrong one 0, and both lead on. Half of the episodes are of
    each demonstrator. V is the mean of R for each state, to convergence; R, A and w are those of awr.py.
    advantage (lambdas, SEEDS, EPISODES, STEPS), right (SEEDS, EPISODES, STEPS), policy (lambdas, SEEDS, STEPS)."""
    rng = np.random.default_rng(0)
    chance = np.repeat(list(RIGHT.values()), EPISODES // 2)[:, None]
    right = rng.random((SEEDS, EPISODES, STEPS)) < chance
    advantage, policy = np.zeros((len(LAMBDAS), *right.shape)), np.zeros((len(LAMBDAS), SEEDS, STEPS))
    last = torch.zeros(EPISODES, STEPS).index_fill(1, torch.tensor(STEPS - 1), 1).flatten()
    for i, lam in enumerate(LAMBDAS):
        args = SimpleNamespace(gamma=1.0, td_lambda=lam, beta=1.0)
        for k in range(SEEDS):
            data = SimpleNamespace(reward=torch.tensor(right[k]).float().flatten(), last=last, terminated=last, longest=STEPS)
            v = torch.zeros(STEPS)
            for _ in range(STEPS + 1):  # at lambda = 0 a state a turn is right, from the end
                v_next = torch.cat([v[1:], v[:1]]).repeat(EPISODES)
                ret = awr.td_lambda(v_next[None], data, args)
                v = ret.view(EPISODES, STEPS).mean(0)
            adv = ret - v.repeat(EPISODES)
            w = awr.weights(adv, args).view(EPISODES, STEPS).numpy()
            advantage[i, k] = adv.view(EPISODES, STEPS).numpy()
            policy[i, k] = (w * right[k]).sum(0) / w.sum(0)
    return SimpleNamespace(advantage=advantage, right=right, policy=policy)


@plt.rc_context(LARGE)
def awr_draw(runs):
    found, half = awr_numbers(), EPISODES // 2
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    rng, at_step = np.random.default_rng(0), STEPS // 2
    for x, (i, name) in enumerate([(LAMBDAS.index(1.0), "Monte-Carlo\n(λ = 1)"), (LAMBDAS.index(0.0), "TD\n(λ = 0)")]):
        adv, ok = found.advantage[i, 0, :, at_step], found.right[0, :, at_step]
        for who, rows in ("careful", slice(half)), ("careless", slice(half, None)):
            for good in True, False:
                y = adv[rows][ok[rows] == good]
                at = 3 * x + 1.2 * (who == "careless") + rng.uniform(-0.35, 0.35, len(y))
                left.plot(at, y, "o" if good else "x", color="C0" if good else "C3", alpha=0.6, markersize=6)
            left.text(3 * x + 1.2 * (who == "careless"), -3.6, who, ha="center", va="top")
        left.text(3 * x + 0.6, 4.4, name, ha="center", va="top", fontweight="bold")
    left.axhline(0, color="black", lw=1)
    left.text(2.1, 2.3, "right action", color="C0", ha="center")
    left.text(2.1, 1.75, "wrong action", color="C3", ha="center")
    left.set(ylabel=f"advantage of the action in state {at_step + 1} of {STEPS}", xticks=[], ylim=(-4.3, 4.6),
             xlim=(-0.6, 4.8), xlabel="whose episode it is", title="The same state, good and bad episodes")
    left.grid(False)
    earned = found.policy.sum(-1)  # (lambdas, SEEDS)
    right.plot(LAMBDAS, earned.mean(1), "o-", color="C0", lw=2.5)
    right.fill_between(LAMBDAS, earned.min(1), earned.max(1), color="C0", alpha=0.25, lw=0)
    for y, text in ((STEPS, "always right"), (STEPS * RIGHT["careful"], "the careful demonstrator"),
                    (found.right.sum(-1).mean(), "cloning of all")):
        right.axhline(y, color="0.4", ls="--", lw=1)
        right.text(0.0, y + 0.06, text, color="0.3", va="bottom")
    right.text(1.0, earned[-1].mean() - 0.45, "Monte-Carlo", ha="right", color="C0")
    right.text(0.02, earned[0].mean() - 0.35, "TD", color="C0")
    right.set(xlabel="λ", ylabel="return of the weighted clone", ylim=(5, 10.5), title="What the clone earns")
    finish(figure, "Monte-Carlo advantages judge the episode, TD advantages the action",
           f"{SEEDS} data sets of {EPISODES} episodes, half of\neach demonstrator: mean, range", right, (0.02, 0.3), ha="left")
    ways = found.advantage > 0, found.right
    agree = [(ways[0][i] == ways[1]).mean() for i in (-1, 0)]
    return figure, (
        f"in a chain of {STEPS} states whose episodes come from a careful and a careless demonstrator the sign of the "
        f"Monte-Carlo advantage says in {100 * agree[0]:.0f} % of the steps whether the action was right, that of the "
        f"TD advantage in {100 * agree[1]:.0f} %; AWR's weights on them make clones that earn {earned[-1].mean():.2f} and "
        f"{earned[0].mean():.2f}, where cloning earns {found.right.sum(-1).mean():.2f} and the careful demonstrator "
        f"{STEPS * RIGHT['careful']:.0f} ({SEEDS} data sets of {EPISODES} episodes)")


# --- envelope ---
def envelope_runs(data):
    return {"medium": "bail.py --dataset-id hopper/medium-v0 --num-updates 1000 --envelope-epochs 200 --eval-episodes 0"}


def envelope_log(label, folder):
    """envelope.csv: of every tenth step its episode, time, return G, envelope V and whether it is cloned."""
    args = bail.Args(**{**json.loads((folder / "args.json").read_text()), "device": "cpu"})
    data = bail.load(args)
    bail.prepare(data, args)
    agent = bail.Agent(args, data.obs_dim, data.act_dim, data)
    agent.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    with torch.no_grad():
        V = torch.cat([agent.envelope_best(s) for s in data.obs.split(10_000)], -1)[0]
    first = torch.cat([torch.zeros(1, dtype=torch.long), data.episode.bincount().cumsum(0)[:-1]])
    t = torch.arange(len(V)) - first[data.episode]
    chosen = torch.zeros(len(V), dtype=torch.bool).index_fill(0, agent.selected[0], True)
    with open(folder / "envelope.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["episode", "t", "return", "envelope", "cloned"])
        for i in range(0, len(V), 10):
            writer.writerow([int(data.episode[i]), int(t[i]), f"{data.ret[i]:.2f}", f"{V[i]:.2f}", int(chosen[i])])


@plt.rc_context(LARGE)
def envelope_draw(runs):
    with open(runs["medium"] / "envelope.csv") as file:
        table = np.array([[float(x) for x in row] for row in list(csv.reader(file))[1:]])
    episode, t, G, V, cloned = table.T
    cloned = cloned > 0
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    left.plot(t[~cloned], G[~cloned], ".", color="0.75", markersize=4)
    left.plot(t[cloned], G[cloned], ".", color="C0", markersize=4)
    steps = np.arange(0, 1000, 25)
    near = [V[(t >= s) & (t < s + 25)] for s in steps]
    left.plot(steps + 12.5, [np.mean(v) for v in near], color="black", lw=2.5)
    left.text(995, 244, "thick: mean of the envelope V(s)", ha="right")
    left.text(20, 12, "cloned", color="C0", fontweight="bold")
    left.text(20, 2, "left out", color="0.5", fontweight="bold")
    left.set(xlabel="time in the episode", ylabel="discounted return from there on, G", xlim=(0, 1000), ylim=(0, 255),
             title="Returns against time")
    share = np.array([cloned[episode == e].mean() for e in np.unique(episode)])
    order = np.argsort([G[episode == e][0] for e in np.unique(episode)])
    ratio = G / V.clip(1e-6)
    right.hist(ratio[~cloned], np.arange(0, 1.35, 0.025), color="0.75")
    right.hist(ratio[cloned], np.arange(0, 1.35, 0.025), color="C0")
    right.axvline(1, color="black", lw=1)
    right.text(1.01, right.get_ylim()[1] * 0.97, "the envelope", va="top")
    right.set(xlabel="G / V(s)", ylabel="steps (every tenth)", xlim=(0, 1.3), title="The quarter nearest to it is cloned")
    above = (G > V).mean()
    finish(figure, "BAIL clones the steps whose return comes near the best that their state has seen",
           "Hopper medium, one seed, 200 epochs", right, (0.02, 0.85), ha="left")
    whole = (share > 0.5).mean()
    return figure, (
        f"on Hopper medium {100 * above:.0f} % of the returns lie above the envelope; cloned are the "
        f"{100 * cloned.mean():.0f} % of the steps with G / V of at least {ratio[cloned].min():.2f}, from "
        f"{len(np.unique(episode[cloned]))} of {len(share)} episodes, of {100 * whole:.0f} % of which more than half; one "
        f"seed, every tenth step")
