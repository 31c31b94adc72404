"""Lessons about the distance of a policy from that of the data: computed when they are drawn, by lessons.py.

NAME_numbers() computes, NAME_draw() draws and says what came out.
"""
import functools
from types import SimpleNamespace

import numpy as np
import torch
from lessons_tabular import LARGE, finish, plt  # which makes the method files known

import bear_gridworld
import ope

# --- BEAR's grid world ---
SIZES = 2, 5, 10  # steps from S to G
ALPHAS = np.geomspace(10, 0.001, 33)  # from tight to generous
DRAWN = {"tight": 0, "in between": 12, "generous": 28}  # places in ALPHAS


def solved(**flags):
    """Chance of reaching G (S,) and the policies (S, n, A) of agents after 400 sweeps."""
    args = bear_gridworld.Args(device="cpu", **flags)
    task = bear_gridworld.Line(args)
    agent = bear_gridworld.Agent(args, task)
    for _ in range(400):
        agent.update()
    pi = agent.policy.pi.data
    return bear_gridworld.returns(task.spec, pi, args.gamma)[0].numpy(), pi.numpy(), task.mu.numpy()


@functools.cache
def bear_gridworld_numbers():
    """Under the penalty, with and without an error of Q where there are no data, and under the support constraint: the
    chance of reaching G by size; the policies in the world of 5 steps."""
    weights = {"constraint": "penalty", "num_seeds": len(ALPHAS), "tightest": ALPHAS[0], "loosest": ALPHAS[-1]}
    found = {n: solved(distance=n, **weights) for n in SIZES}
    right = solved(distance=5, ood_value=0.0, **weights)[0]
    support = {n: solved(distance=n, constraint="support", tightest=0.05, num_seeds=1) for n in SIZES}
    return SimpleNamespace(reach={n: x[0] for n, x in found.items()}, support={n: x[0][0] for n, x in support.items()},
                           right=right, pi=found[5][1], supported=support[5][1][0], mu=found[5][2])


def chance(x):
    """A probability as one says it."""
    if x > 0.001:
        return f"{100 * x:.3g} %"
    if x < 1e-99:
        return "below $10^{-99}$"
    power = int(np.floor(np.log10(x)))
    return f"${x / 10.0**power:.1f} \\cdot 10^{{{power}}}$"


@plt.rc_context(LARGE)
def bear_gridworld_draw(runs):
    found = bear_gridworld_numbers()
    figure, (left, right) = plt.subplots(1, 2, figsize=(14.5, 6), width_ratios=(1, 1.15), layout="constrained")
    for n, color in zip(SIZES, ("#7fb3d9", "C0", "#123f6d")):
        left.plot(ALPHAS, found.reach[n], color=color, lw=2.5)
        left.text(9.3, found.reach[n][0] * 3.5, f"G {n} steps away", color=color)
    left.plot(ALPHAS, found.right, color="C0", ls=":", lw=2)
    left.text(0.075, 0.07, "dotted: 5 steps away, if Q\nwere right about the actions\nthat the data lack",
              color="C0", va="top")
    left.axhline(1, color="C2", lw=3)
    left.text(0.1, 2, "support constraint $π_β$ ≥ 0.05, all three sizes: 1", color="C2", ha="center", va="bottom")
    most = [found.reach[n].max() for n in SIZES]
    left.set(xscale="log", yscale="log", xlim=(10, 0.001), ylim=(1e-14, 60),
             ylabel="probability of reaching G, n steps away, in 20 n$^2$ steps",
             xlabel="weight α of the penalty on KL(π, $π_β$): from tight to generous",
             title=f"A penalty reaches G in {100 * max(most):.0f} % of the episodes at most")
    rows = [("the data", found.mu, None),
            *((f"penalty {name}: α = {ALPHAS[k]:.2g}", found.pi[k], found.reach[5][k]) for name, k in DRAWN.items()),
            ("support constraint: $π_β$ ≥ 0.05", found.supported, found.support[5])]
    for y, (label, pi, reach) in zip(range(len(rows), 0, -1), rows):
        for x in range(11):
            right.add_patch(plt.Rectangle((x - 5.5, y - 0.3), 1, 0.6, edgecolor="0.7",
                                          facecolor={0: "#e0e0e0", 5: "#fdeaea", 10: "#d8f0d8"}.get(x, "white")))
            for step, p in zip((-1, 1), pi[x]):
                if 0 < x < 10 and p > 0.02:
                    color = "0.35" if step < 0 else "C1" if x < 5 else "C2"
                    right.annotate("", (x - 5 + step * (0.1 + 0.36 * p), y), (x - 5, y), arrowprops={
                        "arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7 + 9 * p, "lw": 1 + 2 * p,
                        "color": color})
        right.text(-5.5, y + 0.33, label, va="bottom")
        right.text(5.5, y + 0.33, "" if reach is None else f"reaches G: {chance(reach)}", va="bottom", ha="right")
        for x, name in ((-5, "trap"), (5, "G"), *([(0, "S")] if y == len(rows) else [])):
            right.text(x, y + (0.45 if x == 0 else 0), name, ha="center", va="center")
    right.text(-5.5, 0.5, "length: probability of the step;", va="top", color="0.35")
    right.text(5.5, 0.5, "orange: right, which the data lack there", va="top", ha="right", color="C1")
    right.set(xlim=(-5.6, 5.6), ylim=(0.1, 5.7), xticks=[], yticks=[], title="Learned policies, G 5 steps away")
    right.spines[:].set_visible(False)
    right.grid(False)
    finish(figure, "Where Q errs about actions that the data lack, distribution matching fails at every weight; a "
           "support constraint reaches G for sure",
           "exact, no seeds. Where\nthe data lack an action,\nQ says 2 (G gives 1)", left,
           (0.02, 0.02), ha="left")
    return figure, (
        f"the best weight of a KL penalty, of {len(ALPHAS)} from 10 to 0.001, reaches G within 20 n² steps with a "
        "chance of "
        f"{most[0]:.2g}, {most[1]:.1g} and {most[2]:.1g} where it is {SIZES[0]}, {SIZES[1]} and {SIZES[2]} steps away, "
        f"as the data do with {8 / (9**3 - 1):.2g}, {8 / (9**6 - 1):.1g} and {8 / (9**11 - 1):.1g}; a support constraint always does. "
        "A generous penalty goes left in S, for an action that the data lack left of it and of which Q promises 2; "
        "it circles around S, for longer than any horizon that counts. Were Q right about it, the generous one would reach "
        "G as well")


# --- importance sampling ---
CELLS, GOOD, SETS, EPISODES = 7, 0.9, 200, 100  # cells of the corridor; pi(right); data sets of so many episodes
DISTANT = 0.85, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2  # mu(right) at a horizon of STEPS
STEPS, HORIZONS, NEAR = 16, (1, 2, 4, 8, 16, 32, 64), 0.7  # horizons at mu(right) = NEAR
FOUR = {"is": ("IS", "C3"), "pdis": ("per-decision", "C1"), "wis": ("weighted", "C0"),
        "wpdis": ("weighted per-decision", "C2")}


def corridor():
    """Left and right from the middle of seven cells; at the ends one stays. s' is worth s' / 6; it goes on for ever."""
    states = torch.arange(CELLS)
    eye = torch.eye(CELLS, dtype=torch.float64)
    prob = torch.stack([eye[(states - 1).clamp(min=0)], eye[(states + 1).clamp(max=CELLS - 1)]], 1)  # (n, A, n)
    return prob, (states / (CELLS - 1)).double().expand_as(prob), eye[CELLS // 2]


def policy(right):
    return torch.tensor([1 - right, right], dtype=torch.float64).expand(CELLS, 2)


def kl(right):
    """KL(pi, mu) of a step."""
    return GOOD * np.log(GOOD / right) + (1 - GOOD) * np.log((1 - GOOD) / (1 - right))


def drawn(right, steps, rng):
    """What is Logged of SETS times EPISODES episodes of mu."""
    prob, reward, start = corridor()
    a = (torch.rand(SETS, steps, EPISODES, generator=rng) < right).long()
    s = [torch.full((SETS, EPISODES), CELLS // 2)]
    for t in range(steps):
        s.append((s[-1] + 2 * a[:, t] - 1).clamp(0, CELLS - 1))
    s = torch.stack(s, 1)  # (S, T + 1, E)
    pi, log_mu = policy(GOOD)[0].expand(*a.shape, 2), policy(right)[0].log()[a]
    gain = s[:, 1:].double() / (CELLS - 1)
    return ope.Logged(torch.ones_like(a, dtype=torch.bool), s[:, :-1], a, gain, s[:, 1:], 0 * gain, log_mu, pi, pi)


def exactly(right, steps):
    """The return of pi, and the standard deviation of IS and PDIS of EPISODES episodes: their second moments follow
    from the moments of rho^2, which goes on as if the policy were pi^2 / mu."""
    prob, reward, start = corridor()
    pi, mu = policy(GOOD), policy(right)
    P, K = (torch.einsum("na,nax->nx", x, prob) for x in (pi, pi.square() / mu))
    gain = reward[:, 0]  # of s' alone
    v = [torch.zeros(CELLS, dtype=torch.float64)]  # of pi with 0, 1, ... steps to go
    for _ in range(steps):
        v.append(P @ (gain[0] + v[-1]))
    p, m, m2, second = start, 0 * start, 0 * start, 0  # sums of rho^2, rho^2 G, rho^2 G^2 by state
    for t in range(steps):
        second += p @ K @ (gain[0].square() + 2 * gain[0] * v[steps - t - 1])
        p, m, m2 = p @ K, (m @ K) + gain[0] * (p @ K), (m2 @ K) + 2 * gain[0] * (m @ K) + gain[0].square() * (p @ K)
    truth = start @ v[-1]
    return float(truth), {"is": float((m2.sum() - truth**2) / EPISODES) ** 0.5,
                          "pdis": float((second - truth**2) / EPISODES) ** 0.5}


@functools.cache
def importance_numbers():
    """By distance and by horizon: the truth; of each estimator the error (root of the mean square over data sets),
    exactly for IS and PDIS, in units of the truth; the effective sample size of rho_T and its mean over steps."""
    rng, found = torch.Generator().manual_seed(0), {}
    for axis, places in ("distance", [(x, STEPS) for x in DISTANT]), ("horizon", [(NEAR, T) for T in HORIZONS]):
        rows = []
        for right, steps in places:
            truth, exact = exactly(right, steps)
            agent = SimpleNamespace(args=SimpleNamespace(gamma=1.0), logged=drawn(right, steps, rng),
                                    Q=torch.zeros(SETS, CELLS, 2, dtype=torch.float64))
            values, sizes = ope.Agent.estimates(agent)
            sampled = {name: float((values[name] - truth).square().mean()) ** 0.5 for name in FOUR}
            rows.append({"truth": truth, "sampled": {k: x / truth for k, x in sampled.items()},
                         "error": {k: x / truth for k, x in (sampled | exact).items()},
                         "whole": float(sizes["is"].mean()), "step": float(sizes["pdis"].mean())})
        found[axis] = rows
    return SimpleNamespace(**found, kl=np.array([kl(x) for x in DISTANT]))


@plt.rc_context(LARGE)
def importance_draw(runs):
    found = importance_numbers()
    figure, axes = plt.subplots(1, 2, figsize=(14.5, 6.2), sharey=True, layout="constrained")
    for axis, x, rows in zip(axes, (found.kl, HORIZONS), (found.distance, found.horizon)):
        for name, (label, color) in FOUR.items():
            y = [row["error"][name] for row in rows]
            axis.plot(x, y, color=color, lw=2.5, marker="o")
            axis.text(x[-1] * 1.1, y[-1], label, color=color, va="center")
        for part, label, color in ("step", "size, mean over steps", "0.65"), ("whole", "size, whole episodes", "0.35"):
            y = [row[part] / EPISODES for row in rows]
            axis.plot(x, y, color=color, lw=2, ls="--", marker="s", markersize=5)
            if axis is axes[0]:
                axis.text(x[-1] * 1.1, y[-1] * (1.3 if part == "step" else 0.8), label, color=color, va="center")
        axis.axhline(1, color="black", lw=1.5)
        axis.set(xscale="log", yscale="log", ylim=(1e-3, 2e4))
    left, right = axes
    left.text(0.0095, 1.25, "an error as large as the truth", va="bottom")
    left.set(xlabel=f"distance of the policies: KL(π, $π_β$) of a step, {STEPS} steps", xlim=(0.009, 9),
             ylabel="error of the estimate / truth\ndashed: effective sample size / 100")
    left.set_xticks((0.01, 0.1, 1), ("0.01", "0.1", "1"))
    right.set(xlabel=f"horizon in steps, KL(π, $π_β$) = {kl(NEAR):.2f}", xlim=(0.9, 700))
    right.set_xticks(HORIZONS, HORIZONS)
    right.minorticks_off()
    ends = found.distance[-1], found.horizon[-1]
    left.set_title(f"At KL = {found.kl[-1]:.1f}: {ends[0]['whole']:.0f} of {EPISODES} episodes count")
    right.set_title(f"After {HORIZONS[-1]} steps: {ends[1]['whole']:.0f} of {EPISODES} episodes count")
    finish(figure, "The further the policies are apart and the longer the episodes, the fewer of them count and the "
           "wider importance sampling spreads", f"IS, per-decision: exact. Weighted: root mean square,\n{SETS} data sets "
           f"of {EPISODES} episodes in a corridor of {CELLS} cells", left, (0.02, 0.98), ha="left", va="top")
    said = []
    for where, row in ((f"at KL = {found.kl[0]:.2g} and {STEPS} steps", found.distance[0]),
                       (f"at KL = {found.kl[-1]:.2g}", ends[0]),
                       (f"at KL = {kl(NEAR):.2g} and {HORIZONS[-1]} steps", ends[1])):
        errors = ", ".join(f"{FOUR[name][0]} {row['error'][name]:.2g}" for name in FOUR)
        said.append(f"{where} {errors}, with an effective sample size of {row['whole']:.1f} of {EPISODES} "
                    f"({row['step']:.0f} on average over the steps)")
    hidden = ends[0]["sampled"]["is"]
    return figure, (
        f"in a corridor of {CELLS} cells the error of an estimate of {EPISODES} episodes is, in units of the truth, "
        f"{'; '.join(said)}. What weighs spreads less and is biased. Of data sets alone the error of IS cannot "
        f"be seen: at KL = {found.kl[-1]:.2g} that of {SETS} is {hidden:.2g}, since none holds the rare episodes that "
        "make up its mean")
