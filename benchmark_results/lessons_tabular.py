"""Lessons in worlds so small that the right answer is known: computed when they are drawn, by lessons.py.

NAME_numbers() computes, NAME_draw() draws and says what came out.
"""
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn as nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "algorithms"))
import bcq_tabular
import iql

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Of each lesson: its place in a lecture, part and then order; its claim; what one would say; what it does not show.
ABOUT = {
    "correction": (
        2.3, "Acting corrects the actions that Q overestimates; offline nobody tries them and the error stays",
        "Online an action that Q overestimates is tried, disappoints, and Q comes down. Offline there is no such"
        " feedback: the max goes on believing what nobody will ever test.",
        "What a network does: in a table an untried action keeps its first guess, a network extrapolates. "
        "Nothing slips here and the guesses are drawn around half of the best return; with low guesses nobody "
        "would be misled."),
    "cql_bound": (
        4.1, "CQL's bound holds for the value of the policy, not for Q of every action",
        "The penalty pushes Q down where the policy goes and up where the data go, so on average under the "
        "policy it lies below the truth. Single actions of the data may well lie above.",
        "How to choose α: the one from which the bound holds in all batches needs the truth. Tables, evaluation "
        "of one fixed policy; no networks, no improvement of the policy."),
    "stitching": (
        5.1,
        "No episode leads from the start to the goal; past a tempting exit only IQL with a large τ joins the "
        "pieces",
        "The beginning of one episode and the end of another make a path that nobody has walked; values can see "
        "it where they meet, returns of whole episodes cannot. But with the mean over the data's actions (τ = "
        "0.5) the good end is outvoted, and the exit looks better.",
        "That a large τ is always right: nothing is random here, so no lucky outcome is taken for a good action."
        " The counts of the episodes and the reward of the exit are chosen so that the methods part."),
    "expectile": (
        5.3, "As τ grows IQL's V climbs from the mean towards the maximum, over the actions of the data only",
        "An expectile weighs what lies above it by τ and what lies below by 1 - τ, so with τ it moves from the "
        "mean to the largest. V gets near the best action tried, and no max asks for one that was not.",
        "How large τ may be on few data: after 1,000 pulls Q is nearly right, and on fewer a large τ also picks the "
        "actions whose Q is too high by chance. No policy is learned here."),
}
LARGE = {"font.size": 12, "axes.titlesize": 12.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.3, "figure.titlesize": 14}


def finish(figure, title, corner, axis, place=(0.99, 0.02), **style):
    """The claim above, what the seeds and bands are in a corner, large numbers at the ticks."""
    figure.suptitle(title)
    axis.text(*place, corner, transform=axis.transAxes, **{"ha": "right", "va": "bottom", "fontsize": 11, **style})
    for each in figure.axes:
        each.tick_params(labelsize=11)


# --- tables in place of networks, for the losses of iql.py ---
class Value(nn.Module):
    def __init__(self, S, n):
        super().__init__()
        self.V = nn.Parameter(torch.zeros(S, n, dtype=torch.float64))

    def forward(self, s):  # (S, B) -> (S, B)
        return self.V.gather(1, s)


class Critic(nn.Module):
    def __init__(self, S, n, A, E=2):
        super().__init__()
        self.Q = nn.Parameter(torch.zeros(S, E, n, A, dtype=torch.float64))

    def forward(self, s, a):  # (S, B), (S, B) -> (S, E, B)
        *_, n, A = self.Q.shape
        return self.Q.flatten(2).gather(2, (s * A + a).unsqueeze(1).expand(-1, self.Q.shape[1], -1))


class Actor(nn.Module):
    """Softmax over the actions that a state has: allowed (n, A)."""

    def __init__(self, S, allowed):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(S, *allowed.shape, dtype=torch.float64))
        self.allowed = allowed

    def probs(self):  # (S, n, A)
        return self.logits.masked_fill(~self.allowed, -torch.inf).softmax(-1).nan_to_num()

    def log_prob(self, s, a):  # (S, B)
        log_probs = self.logits.masked_fill(~self.allowed, -torch.inf).log_softmax(-1)
        return log_probs.flatten(1).gather(1, s * self.allowed.shape[1] + a)


def minimise(loss, module):
    """Brings loss() (S,) to its minimum over a table."""
    opt = torch.optim.LBFGS(module.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=0,
                            line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        total = loss().sum()
        total.backward()
        return total

    opt.step(closure)


# --- expectiles ---
CLOUD_TAUS = 0.1, 0.5, 0.9, 0.99
BANDIT_TAUS = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99
BANDIT_Q, BANDIT_TRIED = (0.0, 2.0, 4.0, 6.0, 9.0), (0.4, 0.3, 0.2, 0.1, 0.0)  # worth of each arm, share of the pulls


def expectile(values, probs, tau):
    """m with tau E[(x - m)+] = (1 - tau) E[(m - x)+], by its fixed point: a mean with weights tau above m."""
    m = np.dot(values, probs)
    for _ in range(200):
        w = probs * np.where(np.array(values) > m, tau, 1 - tau)
        m = np.dot(w, values) / w.sum()
    return m


def cloud_edges(x):
    """Given x, the actions of the cloud are uniform between these two."""
    middle, half = 0.8 * np.sin(2 * x), 0.8 + 0.4 * np.cos(3 * x)
    return middle - half, middle + half


@functools.cache
def expectile_numbers():
    """V of iql.value_loss. Cloud: states x, actions a, Q(x, a) = a, V a network. Bandit: one state, Q and V tables."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.5, 1.5, 4000)
    a = rng.uniform(*cloud_edges(x))
    torch.manual_seed(0)
    S = len(CLOUD_TAUS)
    args = SimpleNamespace(expectile=torch.tensor(CLOUD_TAUS)[:, None], gamma=1.0)  # one tau for each "seed"
    value = iql.Value(S, 1, 64)
    opt = iql.adam(value, 3e-3)
    data = torch.tensor(np.stack([x, a]), dtype=torch.float32)
    for t in range(1500):
        opt.param_groups[0]["lr"].copy_(torch.tensor(3e-3 * (1 - t / 1500)))
        s, q = data[:, torch.randint(len(x), (512,))]
        batch = s[:, None].expand(S, -1, 1), q[:, None].expand(S, -1, 1)
        iql.step(opt, iql.value_loss(value, lambda s, a: a.mT, batch, args))  # Q(s, a) = a
    grid = np.linspace(-1.5, 1.5, 61)
    with torch.no_grad():
        fitted = value(torch.tensor(grid, dtype=torch.float32)[None, :, None].expand(S, -1, 1)).numpy()
    low, high = cloud_edges(grid)
    root = np.sqrt(np.array(CLOUD_TAUS)[:, None])
    share = root / (root + np.sqrt(1 - root**2))  # the expectile of a uniform variable, from its low to its high edge

    seeds, pulls, arms = 10, 1000, len(BANDIT_Q)
    rng = np.random.default_rng(0)
    arm = rng.choice(arms, (seeds, pulls), p=BANDIT_TRIED)
    reward = np.array(BANDIT_Q)[arm] + rng.normal(0, 2, arm.shape)
    arm, reward = (torch.tensor(each).repeat_interleave(len(BANDIT_TAUS), 0) for each in (arm, reward))
    tau = torch.tensor(BANDIT_TAUS, dtype=torch.float64).repeat(seeds)[:, None]
    args = SimpleNamespace(expectile=tau, gamma=1.0)
    value, critic, s = Value(len(tau), 1), Critic(len(tau), 1, arms), torch.zeros_like(arm)
    batch = s, arm, reward, s, torch.ones_like(reward)  # every pull ends its episode
    minimise(lambda: iql.critic_loss(critic, value, batch, args), critic)
    minimise(lambda: iql.value_loss(value, critic, batch, args), value)
    known = [expectile(BANDIT_Q, np.array(BANDIT_TRIED), t) for t in BANDIT_TAUS]
    return SimpleNamespace(x=x, a=a, grid=grid, fitted=fitted, exact=low + share * (high - low),
                           V=value.V.detach().view(seeds, -1).numpy(), known=np.array(known))


@plt.rc_context(LARGE)
def expectile_draw(runs):
    found = expectile_numbers()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.4), layout="constrained")
    _, high = cloud_edges(found.grid)
    left.plot(found.x[:1200], found.a[:1200], ".", color="0.8", markersize=4, zorder=0)
    left.plot(found.grid, high, "--", color="black", lw=1)
    left.annotate("the largest there is", (found.grid[22], high[22]), (-0.75, 1.5), ha="center",
                  arrowprops={"arrowstyle": "-", "lw": 0.8})
    colors = plt.cm.viridis([0.8, 0.6, 0.3, 0.0])
    for tau, V, color in zip(CLOUD_TAUS, found.fitted, colors):
        left.plot(found.grid, V, color=color, lw=2.5)
        left.annotate(f"τ = {tau}", (1.5, V[-1]), (6, 0), textcoords="offset points", va="center", color=color)
    left.set(xlabel="state s", ylabel="action a, which here is also Q(s, a)", xlim=(-1.5, 1.95), ylim=(-2.35, 2.1),
             title="Many states: V(s) climbs through the cloud")
    left.text(0.99, 0.02, "one data set of 4,000 points\none network for each τ", transform=left.transAxes, ha="right",
              fontsize=11)
    x, mean = range(len(BANDIT_TAUS)), BANDIT_TAUS.index(0.5)
    for q, p in zip(BANDIT_Q, BANDIT_TRIED):
        color = "0.35" if p else "C3"
        right.axhline(q, color=color, ls="-" if p else ":", lw=1.2, zorder=0)
        right.text(1.01, q, f"tried in {100 * p:.0f} %" if p else "never tried", color=color, va="center",
                   transform=right.get_yaxis_transform())
    right.plot(x, found.known, color="0.2", lw=1.2)
    right.plot(x, found.V.mean(0), "o", color="C0", markersize=6)
    right.fill_between(x, found.V.min(0), found.V.max(0), color="C0", alpha=0.3, lw=0)
    right.annotate("the mean at τ = 0.5", (mean, found.known[mean]), (mean - 0.2, 4.6), color="C0", ha="center",
                   arrowprops={"arrowstyle": "->", "color": "C0"})
    right.annotate("V at τ = 0.99", (x[-1], found.known[-1]), (x[-1] - 0.6, 7.3), color="C0", ha="right",
                   arrowprops={"arrowstyle": "->", "color": "C0"})
    right.set(xlabel="τ (not to scale)", ylabel="value of an action", ylim=(-0.6, 9.6),
              title="One state: V rises towards the best action tried")
    right.set_xticks(x, BANDIT_TAUS)
    right.grid(False)
    finish(figure, "As τ grows IQL's V climbs from the mean towards the maximum, over the actions of the data only",
           "10 data sets of 1,000 pulls: mean, range\nthin line: the exact expectile", right, (0.01, 0.74), ha="left")
    half, last = found.V[:, mean], found.V[:, -1]
    return figure, (
        f"on a bandit whose tried actions are worth {BANDIT_Q[0]:.0f} to {BANDIT_Q[3]:.0f} and {found.known[mean]:.0f} "
        f"on average IQL's V is {half.mean():.2f} at tau = 0.5 and {last.mean():.2f} at 0.99, where the exact "
        f"expectile is {found.known[-1]:.2f}; the action worth {BANDIT_Q[4]:.0f} that is not in the data plays no part "
        f"(10 data sets of 1,000 noisy pulls, V at 0.99 from {last.min():.2f} to {last.max():.2f})")


# --- stitching ---
GRAPH = {1: (0, 0), 2: (1, 0), 3: (2, 0), 4: (3, -1), 5: (4, -1), 6: (5, -1), 7: (3, 1), 8: (4, 1), 9: (5, 1)}
GOAL = 9
GAIN = {(8, 9): 10, (5, 6): 4}  # besides the cost of each step, 1
LONG, GOOD, SHORT = (1, 2, 3, 4, 5, 6), (3, 7, 8, 9), (1, 5, 6)
EPISODES = 4 * [LONG] + [GOOD] + 3 * [SHORT]
STITCH_TAUS = 0.5, 0.7, 0.9
STITCH = {"cloning": "cloning", "filtered": "cloning of the best half", "conditioned": "conditioned on return 5",
          "0.5": "one-step (τ = 0.5)", "0.7": "IQL, τ = 0.7", "0.9": "IQL, τ = 0.9"}


def steps(episode):
    """(state, next state, reward, return to go) of an episode of the graph."""
    pairs = list(zip(episode, episode[1:]))
    rewards = [GAIN.get(pair, 0) - 1 for pair in pairs]
    return [(*pair, rewards[t], sum(rewards[t:])) for t, pair in enumerate(pairs)]


def counted(rows):
    """Policy (10, 10) with the frequencies of rows (state, next state, ...)."""
    count = np.zeros((10, 10))
    for s, a, *_ in rows:
        count[s, a] += 1
    return count / count.sum(1, keepdims=True).clip(min=1)


def arrives(policy, asked=5.0):
    """Chance to come from s1 to the goal; policy(s, asked) is a distribution over next states."""

    def walk(s, asked):
        if s == GOAL:
            return 1.0
        return sum(p * walk(a, asked - GAIN.get((s, a), 0) + 1) for a, p in enumerate(policy(s, asked)) if p)

    return walk(1, asked)


def stitched(episodes):
    """The chance of each method to reach the goal. Of IQL, which at tau = 0.5 is one-step, the losses are those of
    iql.py with tables: for each tau also Q, V, the policy and the weights of all arrows."""
    rows = [row for episode in episodes for row in steps(episode)]
    s, a, r, _ = (torch.tensor(x)[None].expand(len(STITCH_TAUS), -1) for x in zip(*rows))
    allowed = torch.zeros(10, 10, dtype=torch.bool)
    allowed[s[0], a[0]] = True
    ends = (~allowed.any(-1)).double()
    args = SimpleNamespace(gamma=1.0, beta=3.0, expectile=torch.tensor(STITCH_TAUS, dtype=torch.float64)[:, None])
    value, critic, actor = Value(len(s), 10), Critic(len(s), 10, 10), Actor(len(s), allowed)
    batch = s, a, r, a, ends[a]  # an action is the state that it leads to
    for _ in range(6):  # the longest way has five steps
        minimise(lambda: iql.critic_loss(critic, value, batch, args), critic)
        minimise(lambda: iql.value_loss(value, critic, batch, args), value)
    minimise(lambda: iql.actor_loss(actor, value, critic, batch, args), actor)
    with torch.no_grad():
        Q, V, pi = critic.Q[:, 0].numpy(), value.V.numpy(), actor.probs().numpy()
    best = sorted(episodes, key=lambda episode: -steps(episode)[0][3])[:len(episodes) // 2]

    def conditioned(s, asked):
        """Clones the steps of s whose return to go is nearest to what is asked for."""
        here = [row for row in rows if row[0] == s]
        nearest = min((abs(row[3] - asked) for row in here), default=0)
        return counted([row for row in here if abs(row[3] - asked) == nearest])[s]

    policies = {"cloning": lambda s, _: counted(rows)[s], "conditioned": conditioned,
                "filtered": lambda s, _: counted([row for episode in best for row in steps(episode)])[s],
                **{str(tau): lambda s, _, k=k: pi[k, s] for k, tau in enumerate(STITCH_TAUS)}}
    weight = np.exp(args.beta * (Q - V[..., None])).clip(max=100)
    return SimpleNamespace(Q=Q, V=V, pi=pi, weight=weight, policies=policies,
                           reach={name: arrives(policies[name]) for name in STITCH})


@functools.cache
def stitching_numbers():
    return stitched(EPISODES), stitched([episode for episode in EPISODES if episode != SHORT])


@plt.rc_context(LARGE)
def stitching_draw(runs):
    full, without = stitching_numbers()
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), width_ratios=(1.45, 1), layout="constrained")
    colors = {"0.5": "C1", "0.7": "#7fb3d9", "0.9": "C0"}
    for s, e in sorted({pair for episode in EPISODES for pair in zip(episode, episode[1:])}):
        count = sum((s, e) in zip(episode, episode[1:]) for episode in EPISODES)
        left.annotate("", GRAPH[e], GRAPH[s], arrowprops={
            "arrowstyle": "-|>", "color": "C2" if e in GOOD[1:] else "0.6", "lw": 1 + 0.6 * count, "shrinkA": 17,
            "shrinkB": 17, "mutation_scale": 18, "connectionstyle": f"arc3,rad={0.42 if (s, e) == (1, 5) else 0}"})
    for s, place in GRAPH.items():
        left.scatter(*place, 900, {GOAL: "#d8f0d8", 6: "#f3e3c8"}.get(s, "white"), edgecolors="black", zorder=3)
        left.text(*place, f"$s_{s}$", ha="center", va="center", zorder=4, fontsize=14)
    for x, y, text, color in ((5.3, 1, "goal: 10", "black"), (5.3, -1, "exit: 4", "black"),
                              (-0.72, 0, "start", "black"), (3.25, 1.35, "1 episode, from $s_3$ on", "C2"),
                              (1.1, -0.27, "4 episodes", "0.35"), (1.9, -1.5, "3 episodes", "0.35")):
        left.text(x, y, text, color=color, va="center")
    for s, e, x, y, align in ((3, 7, 2.4, 0.8, "right"), (3, 4, 2.72, -0.32, "left"), (1, 2, 0.5, 0.45, "center"),
                              (1, 5, 1.0, -0.52, "left")):
        for k, tau, label in (2, "0.9", "IQL"), (0, "0.5", "one-step"):
            weight = full.weight[k, s, e]
            left.text(x, y, f"{label} {weight:.{0 if weight > 9.5 else 2}f}", color=colors[tau], ha=align, va="center")
            y -= 0.24
    left.set(xlim=(-0.75, 6.1), ylim=(-2.1, 1.6), xticks=[], yticks=[],
             title="On the arrows out of $s_1$ and $s_3$: weights exp(3 (Q - V)), at most 100")
    left.spines[:].set_visible(False)
    left.grid(False)
    for y, (name, label) in enumerate(reversed(STITCH.items())):
        for up, found, style in (0.19, full, {}), (-0.19, without, {"alpha": 0.35, "hatch": "///", "lw": 0}):
            chance = found.reach[name]
            right.barh(y + up, chance, 0.36, color=colors.get(name, "0.6"), **style)
            what = (" all 8 episodes" if up > 0 else " without the 3 short episodes") * (name == "cloning")
            right.text(chance + 0.02, y + up, f"{100 * chance:.0f} %{what}", va="center", fontsize=11)
    right.set_yticks(range(len(STITCH)), reversed(STITCH.values()))
    right.set(xlabel="chance to come from $s_1$ to the goal", xlim=(0, 1.18),
              title="All but IQL at τ = 0.9 are drawn to the exit")
    right.set_xticks((0, 0.5, 1), ("0 %", "50 %", "100 %"))
    right.grid(False)
    finish(figure,
           "No episode leads from $s_1$ to the goal: past a tempting exit only IQL with a large τ joins the pieces",
           "exact, tables without seeds; each step costs 1", left, (0.02, 0.01), ha="left")
    said = lambda found: ", ".join(f"{label} {100 * found.reach[name]:.0f} %" for name, label in STITCH.items())
    return figure, (
        "no episode leads from s1 to the goal s9, but the beginning of one and the end of another meet in s3; the "
        f"chance to come from s1 to s9: {said(full)}. Without the three episodes that leave s1 for a small reward it "
        f"is: {said(without)}")


# --- the lattice of bcq_tabular.py ---
def lattice(episodes, seeds, slip):
    """Its MDP and batches of uniformly random episodes, one for each seed."""
    args = bcq_tabular.Args(slip=slip, num_episodes=episodes, epsilon=1.0, gamma=1.0, num_seeds=seeds, device="cpu")
    task = bcq_tabular.MDP(args)
    return args, task.spec, bcq_tabular.draw(task, args)


def greedy(Q):
    return torch.eye(Q.shape[-1], dtype=Q.dtype)[Q.argmax(-1)]


LATTICE = [(t, i - t / 2) for t in range(6) for i in range(t + 1)]  # places of its states


# --- CQL's bound ---
CQL_ALPHAS = np.linspace(0, 2, 21)


def evaluated(prob, reward, pi, horizon):
    """Q of pi (S, n, A), a terminal state being worth nothing."""
    Q = torch.zeros_like(pi)
    for _ in range(horizon):
        Q = reward + torch.einsum("...nax,...x->...na", prob, (pi * Q).sum(-1))
    return Q


@functools.cache
def cql_bound_numbers():
    """Of 50 batches: pi, greedy for Q-learning in the batch, its true Q, and its Q by CQL's evaluation, eq. (2) of
    Kumar et al. 2020 at mu = pi: over a table its minimum is Q = r - alpha (pi / beta - 1) + gamma P V with the batch's
    frequencies beta and P. Their theorem 3.2 bounds V, the expectation of Q under pi, from above by the truth."""
    args, table, batch = lattice(30, 50, 0.2)
    learner = bcq_tabular.Agent(args, batch)
    for _ in range(table.horizon):
        learner.update()
    pi = bcq_tabular.greedy(lambda s: learner.policy(s.expand(args.num_seeds, -1)), table)
    true = evaluated(table.prob, (table.prob * table.reward).sum(-1), pi, table.horizon)
    count = batch.count.sum(-1)
    beta = count / count.sum(-1, keepdim=True).clamp(min=1)
    excess = torch.where(batch.mask, pi / beta.where(batch.mask, 1) - 1, 0)
    Q = torch.stack([evaluated(batch.prob, batch.reward - alpha * excess, pi * batch.mask, table.horizon)
                     for alpha in CQL_ALPHAS])  # (alphas, S, n, A)
    error = (Q - true).where(batch.mask, torch.nan)
    start = ((Q - true) * pi)[:, :, 0].sum(-1)  # (alphas, S): V(s0) less the truth
    need = (start[0] / (start[0] - start[-1]) * CQL_ALPHAS[-1]).clamp(min=0)  # alpha where it, being linear, is 0
    return SimpleNamespace(error=error.numpy(), start=start.numpy(), need=need.numpy(), pi=pi.numpy(),
                           mask=batch.mask.numpy(), true=(true * pi)[:, 0].sum(-1).numpy())


@plt.rc_context(LARGE)
def cql_bound_draw(runs):
    found = cql_bound_numbers()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.8), layout="constrained")
    bound, one, too_high = found.need.max(), int(np.argmin(abs(CQL_ALPHAS - 1))), (found.start[0] > 0).sum()
    left.axhline(0, color="black", lw=1)
    left.plot(CQL_ALPHAS, found.start.mean(1), color="C0", lw=2.5)
    left.fill_between(CQL_ALPHAS, found.start.min(1), found.start.max(1), color="C0", alpha=0.2, lw=0)
    left.plot((bound, bound), (-18, 0), color="0.4", ls=":")
    left.text(1.98, 0.25, "promises more than it earns", ha="right", color="C3")
    left.text(1.98, -0.85, "promises less", ha="right", color="C0")
    left.annotate(f"plain evaluation: too high\nin {too_high} of 50 batches", (0, found.start[0].mean()), (0.28, 2.9),
                  va="center", arrowprops={"arrowstyle": "->", "connectionstyle": "arc3,rad=0.2"})
    left.annotate(f"from α = {bound:.2f} on\nbelow in all 50", (bound, -10), (0.65, -12.5), va="center",
                  arrowprops={"arrowstyle": "->"})
    left.set(xlabel="α", ylabel="CQL's value of the policy at the start - its true value", xlim=(0, 2), ylim=(-18, 4.2),
             title="The expected value falls below the truth")
    error, pi, mask = found.error[one, 0], found.pi[0], found.mask[0]
    for s, (x, y) in enumerate(LATTICE[:15]):
        for a in 0, 1:
            end = LATTICE[s + x + 1 + a]
            color = "0.75" if not mask[s, a] else "C3" if error[s, a] > 1e-9 else "C0"
            style = {"lw": 4 if mask[s, a] and pi[s, a] else 1.5, "ls": "-" if mask[s, a] else ":"}
            right.plot((x, end[0]), (y, end[1]), color=color, zorder=1, **style)
            if mask[s, a]:
                right.text(x + 0.5, (y + end[1]) / 2, f"{error[s, a]:+.1f}".replace("-", "−"), color=color, ha="center",
                           va="center", fontsize=11, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    for s, place in enumerate(LATTICE):
        right.scatter(*place, 120, "white", marker="o" if s < 15 else "s", edgecolors="black", zorder=3)
    right.text(-0.1, 0.25, "start", ha="center")
    for y, text, color in ((2.5, "Q above the truth", "C3"), (2.15, "Q below the truth", "C0"),
                           (1.8, "thick: what the policy does", "black"), (1.45, "dotted: not in the batch", "0.5")):
        right.text(-0.25, y, text, color=color)
    above = (found.error[one] > 1e-9).sum((1, 2))
    share = f"{100 * above.sum() / found.mask.sum():.0f} %"
    right.set(xlim=(-0.3, 5.3), ylim=(-2.9, 2.9), xticks=[], yticks=[],
              title=f"At α = 1 Q is still above the truth at {above[0]} of {mask.sum()} actions")
    right.spines[:].set_visible(False)
    right.grid(False)
    finish(figure, "CQL's bound holds for the value of the policy, not for Q of every action",
           "50 batches of 30 random episodes\n(slip 0.2): mean and range", left)
    right.text(0.01, 0.02, f"the first batch, {100 * above[0] / mask.sum():.0f} % above;\non average {share}",
               fontsize=11, transform=right.transAxes)
    return figure, (
        f"in 50 batches of the lattice with slip 0.2 plain evaluation of the batch's greedy policy promises "
        f"{found.start[0].mean():.2f} more than the {found.true.mean():.2f} that it earns, too much in {too_high} of "
        f"them; CQL's evaluation promises less than it earns in every batch from alpha = {bound:.2f} on, while at "
        f"alpha = 1 Q is above the truth in {share} of the state-actions of the data and in some of every batch")


# --- correction ---
@functools.cache
def correction_numbers():
    """Of 50 seeds, offline and online (2, sweeps + 1, S): what the greedy policy promises at the start, what it earns.
    Q-learning in sweeps over the data from a random guess, at which Q stays where there are no data; online an episode
    of the greedy policy joins the data after each sweep."""
    args, table, batch = lattice(8, 50, 0.0)
    rng = torch.Generator().manual_seed(0)
    guess = 5 + 3 * torch.randn(args.num_seeds, *table.reward.shape[:2], generator=rng, dtype=torch.float64)
    found = []
    for online in False, True:
        Q, count, rows = guess, batch.count, []
        for _ in range(41):
            rows.append(torch.stack([Q[:, 0].amax(-1), bcq_tabular.returns(table, greedy(Q), args.gamma)[0]]))
            data = bcq_tabular.Batch(count, table.reward, batch.start)
            tried = data.mask
            data.mask = ~table.terminal[:, None].expand_as(tried)  # the max of Q-learning asks for every action
            Q = Q + 0.5 * tried * (bcq_tabular.backup(Q, data, args) - Q)
            if online:  # nothing slips: an episode goes as is to be expected
                visits, _ = bcq_tabular.visits(table, greedy(Q), tried)
                count = count + visits[..., None, None] * greedy(Q).unsqueeze(-1) * table.prob
        found.append(torch.stack(rows))
    promised, earned = torch.stack(found).numpy().transpose(2, 0, 1, 3)
    return SimpleNamespace(promised=promised, earned=earned)


@plt.rc_context(LARGE)
def correction_draw(runs):
    found = correction_numbers()
    excess = found.promised - found.earned
    over = (excess[:, -1] > 0.01).sum(-1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    for color, x in ("C3", excess[0]), ("C0", excess[1]):
        left.plot(x, color=color, lw=0.7, alpha=0.3)
        left.plot(x.mean(1), color=color, lw=3.5)
    left.axhline(0, color="black", lw=1)
    for y, text, color in ((excess[0, -1].mean(), f"offline: {excess[0, -1].mean():.1f} too much", "C3"),
                           (0, f"online: {abs(excess[1, -1].mean()):.1f}", "C0")):
        left.text(40, y + 0.28, text, ha="right", color=color, fontweight="bold")
    left.set(xlabel="sweeps over the data (online: episodes added)", xlim=(0, 40.5), ylim=(-7.5, 12),
             ylabel="Q promised at the start - return earned",
             title="With new data the error goes away, without it stays")
    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, excess.shape[-1])
    right.plot((0, 17), (0, 17), color="black", lw=1)
    for x, y, color, shift in zip(found.earned, found.promised, ("C3", "C0"), (jitter - 0.3, jitter + 0.3)):
        right.plot(x[-1] + shift, y[-1] + shift, "o", color=color, alpha=0.6, markersize=7)
    right.text(0.3, 15.8, f"offline: earns {found.earned[0, -1].mean():.1f} on average", color="C3", va="top")
    right.text(6.6, 4.6, f"online: earns {found.earned[1, -1].mean():.1f}", color="C0")
    right.text(1.6, 1.0, "promise = return")
    right.set(xlabel="return earned by the greedy policy", ylabel="return promised by Q", xlim=(-0.8, 11),
              ylim=(-0.8, 16.5),
              title=f"Offline {over[0]} of 50 policies promise too much, online {over[1] or 'none'}")
    finish(figure, "Acting corrects the actions that Q overestimates; offline nobody tries them and the error stays",
           "50 seeds, thick: mean; 8 random episodes\nto begin with; first guess Q ~ N(5, 3²)", left)
    right.text(0.99, 0.02, "dots of one place are drawn apart", ha="right", transform=right.transAxes, fontsize=11)
    return figure, (
        f"in the lattice, whose best return is 10, Q-learning begins with random guesses around 5 and 8 random "
        f"episodes; after 40 sweeps the greedy policy promises {excess[0, -1].mean():.1f} more than it earns where the "
        f"data stay as they are, too much in {over[0]} of 50 seeds, and {abs(excess[1, -1].mean()):.1f} more, too much "
        f"in {over[1] or 'none'}, where an episode of it joins the data after each sweep; it earns "
        f"{found.earned[0, -1].mean():.1f} and {found.earned[1, -1].mean():.1f}")
