"""The lesson on actions outside the data: extrapolation, from runs of sac_offline.py and beside them in a table."""
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
import bcq_tabular
import sac_offline
from lessons_tabular import LARGE, evaluated, finish, greedy, lattice

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UPDATES, SWEEPS = (500, 1000, 2000, 4000, 8000), 25


def extrapolation_runs(data):
    return {str(n): "sac_offline.py --dataset-id hopper/medium-v0 --num-seeds 3 --eval-episodes 10 --eval-every 100000 "
                    f"--num-updates {n}" for n in UPDATES}  # of one seed: each is the beginning of the next


@torch.no_grad()
def extrapolation_log(label, folder):
    """actions.csv: at 5,000 states s' of the data how far pi(s') is from the action taken there, and min_i Q of both."""
    args = sac_offline.Args(**{**json.loads((folder / "args.json").read_text()), "device": "cpu"})
    data = sac_offline.load(args)
    agent = sac_offline.Agent(args, data.obs_dim, data.act_dim, data)
    agent.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
    follows = (data.episode[1:] == data.episode[:-1]).nonzero().flatten() + 1
    i = follows[torch.randperm(len(follows), generator=torch.Generator().manual_seed(0))[:5000]]
    s, a = (x[i].expand(args.num_seeds, -1, -1) for x in (data.obs, data.action))
    pi = agent.actor(s)
    other = a[:, torch.randperm(len(i), generator=torch.Generator().manual_seed(1))]  # the data's action elsewhere
    rows = zip((pi - a).norm(dim=-1).mean(-1), (other - a).norm(dim=-1).mean(-1),
               agent.critic(s, pi).amin(1).mean(-1), agent.critic(s, a).amin(1).mean(-1))
    with open(folder / "actions.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "distance", "distance_of_any", "q_pi", "q_data"])
        writer.writerows([k, *(f"{x:.4g}" for x in row)] for k, row in enumerate(rows))


@functools.cache
def extrapolation_numbers():
    """The lattice without slip, 50 batches of 8 random episodes, Q-learning in sweeps from guesses ~ N(5, 3^2), which
    stay where the data lack the action. (SWEEPS + 1, seeds): the mean error of Q, against the true Q of the greedy policy,
    at the data's actions, once with the maximum over all actions and once over those of the data, as BCQ takes it; and at
    the actions outside the data that the maximum picks."""
    args, table, batch = lattice(8, 50, 0.0)
    reward = (table.prob * table.reward).sum(-1)  # (n, A)
    rng = torch.Generator().manual_seed(0)
    guess = 5 + 3 * torch.randn(args.num_seeds, *reward.shape, generator=rng, dtype=torch.float64)
    tried, alive = batch.mask, ~table.terminal[:, None].expand_as(batch.mask)
    found, picked = [], []
    for mask in alive, tried:
        Q, rows = torch.where(alive, guess, 0), []
        data = bcq_tabular.Batch(batch.count, table.reward, batch.start)
        data.mask = mask
        for _ in range(SWEEPS + 1):
            pi = greedy(Q.masked_fill(~mask, -torch.inf))
            error = Q - evaluated(table.prob, reward, pi, table.horizon)
            rows.append((error * tried).sum((1, 2)) / tried.sum((1, 2)))
            if mask is alive:
                seen = tried.any(-1)  # (S, n) states of the data
                top = (pi > 0) & ~tried & seen.unsqueeze(-1)
                picked.append((error * top).sum((1, 2)) / top.sum((1, 2)).clamp(min=1))
            Q = Q + 0.5 * tried * (bcq_tabular.backup(Q, data, args) - Q)
        found.append(torch.stack(rows))
    return SimpleNamespace(all=found[0].numpy(), data=found[1].numpy(), picked=torch.stack(picked).numpy())


@plt.rc_context(LARGE)
def extrapolation_draw(runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    logs = {}
    for n in UPDATES:
        with open(runs[str(n)] / "actions.csv") as file:
            rows = list(csv.DictReader(file))
        with open(runs[str(n)] / "eval.csv") as file:
            earned = [float(row["discounted_return_mean"]) for row in csv.DictReader(file)]
        logs[n] = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} | {"earned": np.array(earned)}
    distance = np.array([logs[n]["distance"].mean() for n in UPDATES])
    apart = logs[UPDATES[-1]]["distance_of_any"].mean()
    for name, color, text, place in (("q_pi", "C3", "promised: Q(s', π(s'))", (1.25, 300)),
                                     ("earned", "C0", "earned", (1.7, 5.5))):
        y = np.array([logs[n][name] for n in UPDATES])  # (updates, seeds)
        left.plot(distance, y.mean(1), "o-", color=color, lw=2.5)
        left.fill_between(distance, y.min(1), y.max(1), color=color, alpha=0.2, lw=0)
        left.text(*place, text, color=color)
        if name == "q_pi":
            for n, x, mean in zip(UPDATES, distance, y.mean(1)):
                left.annotate(f"{n:,}" + " updates" * (n == UPDATES[0]), (x, mean), (0, -18), textcoords="offset points",
                              ha="left" if n == UPDATES[0] else "center", fontsize=11)
    left.axvline(apart, color="0.4", ls="--", lw=1)
    left.text(apart + 0.02, 1.3, "as far as two of\nthe data's actions", color="0.3")
    left.set(yscale="log", ylim=(1, 3000), xlabel="distance of π(s'), the bootstrapped action, from the data's action",
             ylabel="discounted value", title="SAC offline: as π(s') leaves the data, promise and return part")
    found = extrapolation_numbers()
    for y, color, text, up in ((found.picked, "C3", "actions outside the data that the maximum picks", 0.2),
                               (found.all, "C1", "the data's own actions", 0.08),
                               (found.data, "C2", "these, if the maximum is over the data's actions", 0.25)):
        right.plot(y.mean(1), color=color, lw=2.5)
        right.text(SWEEPS, y[12:].mean() + up, text, color=color, ha="right")
    right.axhline(0, color="black", lw=1)
    right.set(xlabel="sweeps", ylabel="Q - true Q of the greedy policy", title="In a table: the truth is known", ylim=(-0.1, 3))
    finish(figure, "Q errs at actions that the data lack, and bootstrapping passes the error on to those that they hold",
           "50 batches of 8 random episodes: mean", right, (0.99, 0.93))
    left.text(0.2, 0.9, "Hopper medium, 3 seeds:\nmean, range", transform=left.transAxes, fontsize=11)
    first, end = logs[UPDATES[0]], logs[UPDATES[-1]]
    return figure, (
        f"on Hopper medium the action that SAC offline bootstraps from is {first['distance'].mean():.2f} away from the data's "
        f"after {UPDATES[0]} updates and {end['distance'].mean():.2f} after {UPDATES[-1]:,} (two of the data's actions are "
        f"{apart:.2f} apart); Q is then {end['q_pi'].mean():.0f} there and {end['q_data'].mean():.0f} at the data's own, and "
        f"the policy earns {end['earned'].mean():.0f}. In the lattice Q is "
        f"{found.picked[-1].mean():.1f} too high at the actions outside the data that the maximum picks and "
        f"{found.all[-1].mean():.1f} at the data's own; {abs(found.data[-1].mean()):.1f} where the maximum is over the data's")
