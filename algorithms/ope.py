# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""OPE: off-policy evaluation. What would a policy pi have returned, where another, mu, chose the actions?
Importance sampling: Precup, Sutton & Singh, ICML 2000.
Doubly robust: Jiang & Li, ICML 2016. https://arxiv.org/abs/1511.03722

    rho_t = prod_{k <= t} pi(a_k|s_k) / mu(a_k|s_k),  which keeps its value where an episode is over
    IS    = 1/E sum_i rho_T G,  G = sum_t gamma^t r_t    WIS   = sum_i rho_T G / sum_i rho_T
    PDIS  = sum_t gamma^t 1/E sum_i rho_t r_t            WPDIS = sum_t gamma^t sum_i rho_t r_t / sum_i rho_t
    DR    = DM + 1/E sum_i sum_t gamma^t rho_t (r_t + gamma V(s_{t+1}) - Q(s_t, a_t)),  DM = 1/E sum_i V(s_0)
    Q(s, a) <- mean of r + gamma (1 - d) V(s'),  V(s) = sum_a pi(a|s) Q(s, a)
    ESS   = (sum_i rho)^2 / sum_i rho^2,  of rho_T for IS and WIS, else the mean over t of that of rho_t; of DM E

    python algorithms/ope.py --dataset-id FrozenLake-v1 --slip 0.6666667 --num-seeds 100

Each seed has E episodes of its own, drawn by mu in a finite MDP, where the truth is exact, or with replacement
from a recorded set. There pi is --policy with a uniform action now and then, the truth is played, and mu is
infos["action_prob"] of each step or a count (--behaviour clone, which biases all but DM); for the count and Q the
states of a cell are one. What is estimated is the return of the first --horizon steps, as if no reward followed
what is logged. See estimates.csv.
Departs from the paper: WPDIS is the consistent one, CWPDIS; Q is learnt from the same episodes: DR is biased.
Shapes: S seeds, T steps, E episodes, n states, A actions.
"""
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.nn as nn


@dataclass
class Args:
    # --- run ---
    dataset_id: str = "chain"  # the MDP of this file, an environment with a table, a set with discrete actions
    env_id: str = ""  # of a set: environment to play the target in; empty: the one that the set names
    seed: int = 0  # seeds every random stream
    num_seeds: int = 1  # independent sets of episodes side by side
    num_updates: int = 100  # sweeps of Q; as many as --horizon make it the value of so many steps
    eval_every: int = 1_000_000  # updates between two evaluations of the target; one comes at the end
    eval_episodes: int = 10  # episodes of a seed for the truth of a set; of an MDP it is exact; 0: none
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to compute
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- OPE ---
    gamma: float = 0.99  # discount
    horizon: int = 100  # steps after which an episode is cut off
    num_episodes: int = 100  # E, episodes of each seed
    behaviour: Literal["logged", "clone"] = "logged"  # mu: its probabilities, or their estimate by counts
    target_epsilon: float = 0.1  # chance of a uniform action of pi; else the optimal one, or that of --policy
    # --- finite MDP ---
    epsilon: float = 0.5  # chance of a uniform action of mu; else it is the optimal one
    slip: float = 0.0  # chance that a - 1 or a + 1 happens for a; 0.6666667: Gymnasium's slippery FrozenLake
    # --- recorded set ---
    policy: str = ""  # policy.pt2 to evaluate
    agent: int = 0  # its agent
    cells: int = 3  # intervals that quantiles cut each entry of an observation into


# --- estimators: of rho and x (S, [T,] E) one value per seed, (S,), or per seed and step, (S, T) ---
def log_ratios(logged):
    """log rho_t = sum_{k <= t} log pi(a_k|s_k) - log mu(a_k|s_k)"""
    ratio = chosen(logged.pi, logged.a).log() - logged.log_mu
    return ratio.masked_fill(~logged.alive, 0).cumsum(1)  # (S, T, E)


def ordinary(log_rho, x):
    """1/E sum_i rho_i x_i, of positive and negative x apart in logarithms: no rho is too large or too small"""
    total = lambda part: (log_rho + part.clamp(min=0).log()).logsumexp(-1).exp()
    return (total(x) - total(-x)) / x.shape[-1]


def weights(log_rho):
    """rho_i / max_j rho_j, 0 where every rho is"""
    return (log_rho - log_rho.amax(-1, keepdim=True).clamp(min=-1e300)).exp()


def weighted(log_rho, x):
    """sum_i rho_i x_i / sum_i rho_i, 0 where every rho is"""
    w = weights(log_rho)
    return (w * x).sum(-1) / w.sum(-1).clamp(min=1)  # the largest is 1


def sample_size(log_rho):
    """ESS = (sum_i rho_i)^2 / sum_i rho_i^2, 0 where every rho is"""
    w = weights(log_rho)
    return w.sum(-1).square() / w.square().sum(-1).clamp(min=1)


def doubly_robust(log_rho, logged, Q, gamma):
    """1/E sum_i [ V(s_0) + sum_t gamma^t rho_t (r_t + gamma V(s_{t+1}) - Q(s_t, a_t)) ],  V = 0 at the end"""
    q = at(Q, logged.s) * logged.alive.unsqueeze(-1)  # (S, T, E, A)
    v = (logged.pi * q).sum(-1)  # (S, T, E)
    v_next = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)
    error = logged.r + gamma * v_next - chosen(q, logged.a)
    return v[:, 0].mean(-1) + ordinary(log_rho, discount(error, gamma)).sum(-1)


def discount(x, gamma):  # gamma^t x_t
    return gamma ** torch.arange(x.shape[1], device=x.device).double().unsqueeze(-1) * x


# --- update ---
def backup(Q, logged, gamma):
    """mean of r + gamma (1 - d) V(s') over the steps with s and a, 0 without any"""
    v_next = (logged.pi_next * at(Q, logged.s_next)).sum(-1)  # (S, T, E)
    y = logged.r + gamma * (1 - logged.d) * v_next
    return sums(y, logged, Q.shape) / sums(torch.ones_like(y), logged, Q.shape).clamp(min=1)


def clone(logged, shape):
    """log mu(a|s) of the actions taken,  mu(a|s) = N(s, a) / N(s)"""
    count = sums(torch.ones_like(logged.r), logged, shape)  # (S, n, A)
    return chosen(at(count / count.sum(-1, keepdim=True).clamp(min=1), logged.s), logged.a).log()


# --- agent ---
class Agent(nn.Module):
    discrete, least = True, {"agent": 0}

    def __init__(self, args, policy, logged, shape):
        super().__init__()
        self.args, self.policy, self.logged, self.updates_per_call = args, policy, logged, 1
        if args.behaviour == "clone":
            self.logged = logged._replace(log_mu=clone(logged, shape))
        self.Q = nn.Parameter(torch.zeros(shape, dtype=torch.float64, device=args.device), requires_grad=False)

    def update(self):
        Q = backup(self.Q, self.logged, self.args.gamma)  # (S, n, A)
        error = (Q - self.Q).abs().amax((-2, -1))
        self.Q.copy_(Q)
        return {"bellman_error": error}  # (S,)

    def estimates(self):
        """{estimator: value (S,)} and {estimator: effective sample size (S,)}"""
        logged, gamma = self.logged, self.args.gamma
        rho, r = log_ratios(logged), discount(logged.r, gamma)
        last, G = rho[:, -1], r.sum(1)  # (S, E)
        dr, dm = (doubly_robust(x, logged, self.Q, gamma) for x in (rho, rho - torch.inf))  # DM: at rho = 0
        whole = [ordinary(last, G), weighted(last, G)]
        values = [*whole, ordinary(rho, r).sum(-1), weighted(rho, r).sum(-1), dr, dm]
        size, steps = sample_size(last), sample_size(rho).mean(-1)
        sizes = [size, size, steps, steps, steps, torch.full_like(size, G.shape[-1])]
        return [dict(zip(("is", "wis", "pdis", "wpdis", "dr", "dm"), x)) for x in (values, sizes)]


# --- shared: imports ---
import contextlib, copy, functools, json, math, os, pickle, re, signal, subprocess, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import gymnasium as gym, minari, numpy as np, tqdm, tyro

METHOD = Path(__file__).stem
DISCRETE = hasattr(Agent, "discrete")  # whether actions are integers from 0 to act_dim - 1


def fail(message):
    sys.exit(f"{METHOD}: {' '.join(message.split())}")


@contextlib.contextmanager
def attempt(problem):
    try:
        yield
    except Exception as error:
        fail(f"{problem}: {str(error) or type(error).__name__}")


# --- shared: data ---
def load(args):
    """The Task of --dataset-id with its N transitions: obs, next_obs (N, obs_dim), action (N, act_dim) in
    [-1, 1] or (N,), reward, terminated, episode (N,). Steps cut off by a time limit are not terminated."""
    name, env, episodes = args.dataset_id, None, []
    with attempt(f"--dataset-id {name} is no directory, set of datasets/ or the hub, or no match for --env-id"):
        for part in [name] if Path(name).exists() else name.split("+"):
            dataset = find(part)
            for episode in dataset.iterate_episodes():
                obs, action, reward = flat(episode.observations), episode.actions, episode.rewards
                assert len(obs) == len(action) + 1, "episodes need one observation more than actions"
                episodes.append((obs[:-1], obs[1:], reward, episode.terminations, action))
        length = torch.tensor([len(action) for *_, action in episodes])
        assert sum(length) >= args.batch_size, f"{sum(length)} transitions are fewer than --batch-size"
        *floats, action = (torch.tensor(np.concatenate(x)) for x in zip(*episodes))
        env = gym.make(args.env_id) if args.env_id else None
        if args.eval_episodes and dataset.env_spec and not env:
            env = dataset.recover_environment(eval_env=True)
        space = env.action_space if env else dataset.action_space
        data = Task(env, space, floats[0].shape[-1], dataset.storage.metadata)
        data.obs, data.next_obs, data.reward, data.terminated = (x.float() for x in floats)
        data.episode = torch.arange(len(length)).repeat_interleave(length)
        fits = data.obs.ndim == 2 and data.reward.ndim == 1 and action.shape[1:] == space.shape
        assert fits, f"observations have to be vectors, rewards numbers, actions of {space}"
        assert not env or data.obs[0].shape == flat(env.reset()[0]).shape, "the observations differ"
        action = (action - data.shift) / data.scale
        assert not DISCRETE or 0 <= action.min() <= action.max() < data.act_dim, f"its actions leave {space}"
        assert all(x.isfinite().all() for x in (*floats, action)), "there is NaN or inf in it"
        data.action = action.long() if DISCRETE else action.float().clamp(-1, 1)
    return data


def find(name):
    """A Minari dataset: a directory, one that ships with this repository, a local one, one of the hub."""
    for place in Path(name), Path(__file__).resolve().parent.parent / "datasets" / name:
        if (place / "data").is_dir():
            return minari.MinariDataset(place / "data")
    assert re.search(r"\w-v\d+$", name), "an id ends in a version like -v0"
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else a line for each retry
    return minari.load_dataset(name, download=True)


def sample(data, args):
    """B transitions for each seed, drawn with replacement: s, a, r, s_next, d."""
    i = torch.randint(len(data.reward), (args.num_seeds, args.batch_size), device=args.device)
    return data.obs[i], data.action[i], data.reward[i], data.next_obs[i], data.terminated[i]


# --- shared: task ---
REFERENCE = {  # D4RL's returns of a random and an expert policy, d4rl/infos.py
    "HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3), "Walker2d": (1.629008, 4592.3)}


class Task:
    """Where a policy acts: it sees (obs - mean) / std, and the environment gets shift + scale * action."""

    def __init__(self, env, space, obs_dim, metadata):
        assert isinstance(space, gym.spaces.Discrete) == DISCRETE, f"{METHOD} cannot choose actions in {space}"
        if DISCRETE:
            self.act_dim, self.shift, self.scale = int(space.n), torch.tensor(int(space.start)), torch.tensor(1)
        else:
            low, high = torch.tensor(space.low), torch.tensor(space.high)
            self.act_dim, self.shift, self.scale = len(low), (high + low) / 2, (high - low) / 2
        self.obs_dim, self.mean, self.std = obs_dim, torch.zeros(obs_dim), torch.ones(obs_dim)
        own = metadata.get("ref_min_score", math.nan), metadata.get("ref_max_score", math.nan)
        self.spec, self.reference = (env.spec, REFERENCE.get(env.spec.name, own)) if env else (None, own)


def flat(obs):
    """Observations as vectors: the entries of a Dict are joined in the order of their names."""
    if isinstance(obs, dict):
        return np.concatenate([flat(obs[key]) for key in sorted(obs)], -1)
    return np.asarray(obs, np.float32)


@functools.lru_cache(1)
def environments(spec, n):
    return [gym.make(pickle.loads(spec), disable_env_checker=True) for _ in range(n)]


# --- data: episodes ---
class Logged(NamedTuple):
    """E episodes of each seed, padded to T steps."""

    alive: torch.Tensor  # (S, T, E), until an episode is over
    s: torch.Tensor  # (S, T, E)
    a: torch.Tensor
    r: torch.Tensor  # 0 where it is over
    s_next: torch.Tensor
    d: torch.Tensor  # 1 where the task ended, not where time was up
    log_mu: torch.Tensor  # of a
    pi: torch.Tensor  # (S, T, E, A), at s
    pi_next: torch.Tensor  # (S, T, E, A), at s_next


def at(table, s):  # (S, n, A), (S, T, E) -> (S, T, E, A)
    return table[torch.arange(len(table), device=s.device).view(-1, 1, 1), s]


def chosen(x, a):  # (S, T, E, A), (S, T, E) -> (S, T, E)
    return x.gather(-1, a.unsqueeze(-1)).squeeze(-1)


def sums(x, logged, shape):
    """Sums of x (S, T, E) over the steps with the same s and a: (S, n, A)."""
    i = (logged.s * shape[-1] + logged.a).flatten(1)
    return x.new_zeros(shape).flatten(1).scatter_add(1, i, (logged.alive * x).flatten(1)).view(shape)


def draw_seed(*key):
    """A seed for one stream of random numbers, fixed by the integers of its key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# --- data: a finite MDP ---
class Table(NamedTuple):
    """A finite MDP of n states and A actions. Terminal states keep to themselves at no reward."""

    prob: torch.Tensor  # (n, A, n)
    reward: torch.Tensor  # (n, A, n), expected
    square: torch.Tensor  # (n, A, n), expected square of the reward
    terminal: torch.Tensor  # (n,)
    start: torch.Tensor  # (n,)
    horizon: int  # steps after which an episode is cut off


def chain():
    """Seven states in a row, from the middle one on: action 0 leads left, action 1 right. Both ends are terminal; the
    right one gives 1, the left one 0.3. As in Gymnasium: P[s][a] = [(p, s', r, terminated)], the first state."""
    P = {s: [[(1.0, x, (x == 6) + 0.3 * (x == 0), x in (0, 6))] for x in (s - 1, s + 1)] for s in range(1, 6)}
    return {s: P.get(s, [[(1.0, s, 0, True)]] * 2) for s in range(7)}, np.eye(7)[3]


def known(env_id):
    """The same of a Gymnasium environment; FrozenLake as it is without slipping."""
    with attempt(f"--dataset-id {env_id} has no transition table, as chain, FrozenLake-v1, FrozenLake8x8-v1, "
                 "CliffWalking-v1 and other environments with env.unwrapped.P do"):
        env = gym.make(env_id, **({"is_slippery": False} if "FrozenLake" in env_id else {}))
        return env.unwrapped.P, env.unwrapped.initial_state_distrib


class MDP:
    """What a run knows of the MDP: `spec`, its Table; the policies `mu` and `pi` (n, A)."""

    reference = np.nan, np.nan

    def __init__(self, args):
        P, start = chain() if args.dataset_id == "chain" else known(args.dataset_id)
        n, A = len(P), len(P[0])
        prob, gain, square = torch.zeros(3, n, A, n, dtype=torch.float64)
        terminal, start = torch.zeros(n, dtype=torch.bool), torch.as_tensor(start, dtype=torch.float64)
        for s, a in np.ndindex(n, A):
            for p, s_next, r, ended in P[s][a]:
                prob[s, a, s_next] += p
                gain[s, a, s_next] += p * r
                square[s, a, s_next] += p * r**2
                terminal[s_next] |= bool(ended)
        prob, gain, square = ((1 - args.slip) * x + args.slip / 2 * (x.roll(1, 1) + x.roll(-1, 1))
                              for x in (prob, gain, square))
        prob[terminal] = torch.eye(n, dtype=torch.float64)[terminal].unsqueeze(1)
        gain[terminal] = square[terminal] = 0
        reward, square = (x / prob.where(prob > 0, 1) for x in (gain, square))
        self.spec = Table(prob, reward, square, terminal, start, args.horizon)
        Q = torch.zeros(n, A, dtype=torch.float64)
        for _ in range(1000):  # value iteration
            Q = (prob * (reward + args.gamma * Q.amax(-1))).sum(-1)
        optimal = torch.eye(A, dtype=torch.float64)[Q.argmax(-1)]
        self.mu, self.pi = (epsilon / A + (1 - epsilon) * optimal for epsilon in (args.epsilon, args.target_epsilon))

    def evaluate(self, args, update):
        """Return, its deviation, discounted return, length, score (S, 5) of pi, expected over all episodes."""
        row = returns(self.spec, self.pi.unsqueeze(0), args.gamma)[:, 0].tolist()
        return np.array([[*row, np.nan]] * args.num_seeds)

    def truth(self, args, evals):
        return self.evaluate(args, 0)[0, 2]


def drawn(args):
    """The MDP, what is Logged, the number of states, and pi's likeliest actions (n,)."""
    task = MDP(args)
    table, start, rows = task.spec, task.spec.start.expand(args.num_episodes, -1), []
    for k in range(args.num_seeds):
        rng = torch.Generator().manual_seed(draw_seed(args.seed, k))
        pick = lambda p: torch.multinomial(p, 1, generator=rng).squeeze(-1)
        s = pick(start)
        for _ in range(args.horizon):
            a = pick(task.mu[s])
            s_next = pick(table.prob[s, a])
            rows.append((s, a, s_next))
            s = s_next
    s, a, s_next = (torch.stack(x).unflatten(0, (-1, args.horizon)) for x in zip(*rows))  # each (S, T, E)
    logged = Logged(~table.terminal[s], s, a, table.reward[s, a, s_next], s_next, table.terminal[s_next].double(),
                    task.mu[s, a].log(), task.pi[s], task.pi[s_next])
    return task, logged, len(table.start), task.pi.argmax(-1)


def returns(table, pi, gamma):
    """Mean and deviation of the return, discounted return and length of the episodes of policies (S, n, A): (4, S)."""
    P, R, R2 = (torch.einsum("kna,nax->knx", pi, table.prob * x) for x in (1, table.reward, table.square))
    p = table.start.expand(len(P), 1, -1)  # of each state now, with the return so far: to the powers 0, 1, 2
    m, m2, discounted, length = 0 * p, 0 * p, 0, 0
    for t in range(table.horizon):
        discounted = discounted + gamma**t * (p @ R).sum((-2, -1))
        length = length + (p * ~table.terminal).sum((-2, -1))
        p, m, m2 = p @ P, m @ P + p @ R, m2 @ P + 2 * m @ R + p @ R2
    mean = m.sum((-2, -1))
    return torch.stack([mean, (m2.sum((-2, -1)) - mean**2).clamp(min=0).sqrt(), discounted, length])


# --- data: a recorded set ---
@functools.lru_cache(1)
def program(path):
    """A policy.pt2, in this process."""
    return torch.export.load(path).module()


@torch.no_grad()
def target(obs, task, args):
    """pi(.|obs) (N, A), from (N, obs_dim)."""
    a = torch.cat([program(args.policy)(x)[args.agent] for x in obs.split(10_000)]) - task.shift.cpu()
    greedy = torch.nn.functional.one_hot(a, task.act_dim)
    return args.target_epsilon / task.act_dim + (1 - args.target_epsilon) * greedy.double()


def recorded(args):
    """The Task, what is Logged, the number of cells, and pi's file."""
    if not Path(args.policy).is_file():
        fail(f"--policy is no file: '{args.policy}'; one has discrete actions, such as datasets/lunarlander/medium.pt2")
    task, name = load(SimpleNamespace(**vars(args), batch_size=1)), args.dataset_id
    obs = torch.cat([task.obs, task.next_obs])
    with attempt(f"agent {args.agent} of --policy {args.policy} does not act on the observations of {name}"):
        pi = target(obs, task, args)
    N, length = len(task.obs), task.episode.bincount()
    log_mu = torch.zeros(N, dtype=torch.float64)
    if args.behaviour == "logged":
        with attempt(f"--dataset-id {name} lacks the probabilities of its actions, which --behaviour clone estimates"):
            parts = [name] if Path(name).exists() else name.split("+")
            episodes = (episode for part in parts for episode in find(part).iterate_episodes())
            found = [(x.infos or {}).get("action_prob", [])[-len(x.actions):] for x in episodes]  # not the reset's
            log_mu = torch.tensor(np.concatenate(found), dtype=torch.float64).log()
            whole = log_mu.shape == (N,) and log_mu.isfinite().all() and log_mu.max() < 1e-6
            assert whole, "infos['action_prob'] does not hold one of each step"
    cuts = np.quantile(task.obs.numpy(), np.arange(1, args.cells) / args.cells, axis=0)
    cell = np.stack([np.searchsorted(*x) for x in zip(cuts.T, obs.T.numpy())], -1)
    states, cell = np.unique(cell, axis=0, return_inverse=True)
    cell, T = torch.tensor(cell.ravel()), min(args.horizon, int(length.max()))
    rng = [torch.Generator().manual_seed(draw_seed(args.seed, k)) for k in range(args.num_seeds)]
    e = torch.stack([torch.randint(len(length), (1, args.num_episodes), generator=x) for x in rng])  # (S, 1, E)
    t = torch.arange(T).view(-1, 1)
    alive = t < length[e]  # (S, T, E)
    i = torch.where(alive, length.cumsum(0)[e] - length[e] + t, 0)
    logged = Logged(alive, cell[i], task.action[i], alive * task.reward[i].double(), cell[i + N],
                    task.terminated[i].double(), log_mu[i], pi[i], pi[i + N])
    task.evaluate = functools.partial(play, task)
    task.truth = lambda args, evals: np.mean([float(row.split(",")[5]) for row in evals])
    return task, logged, len(states), args.policy


def play(task, args, update):
    """Return, its deviation, discounted return, length, score (S, 5) of episodes of pi, up to --horizon."""
    S, n, A = args.num_seeds, args.eval_episodes, task.act_dim
    envs, rng = environments(pickle.dumps(task.spec), S * n), np.random.default_rng([args.seed, update])
    obs = np.stack([flat(env.reset(seed=int(rng.integers(2**31)))[0]) for env in envs])
    sums, running = np.zeros((3, S * n)), list(range(S * n))
    for t in range(args.horizon):
        cumulative = target(torch.from_numpy(obs), task, args).cumsum(-1).numpy()
        action = (rng.random((S * n, 1)) > cumulative[:, :-1]).sum(-1) + task.shift.item()
        for i in running.copy():
            next_obs, reward, terminated, truncated, _ = envs[i].step(action[i])
            obs[i] = flat(next_obs)
            sums[:, i] += reward, args.gamma**t * reward, 1
            if terminated or truncated:
                running.remove(i)
    total, discounted, length = sums.reshape(3, S, n)
    return np.stack([total.mean(1), total.std(1), discounted.mean(1), length.mean(1), np.full(S, np.nan)], 1)


# --- evaluation: the target ---
class RawPolicy(nn.Module):
    """From states (B,) to pi's likeliest actions (S, B), on the CPU; of a recorded set the file that is given."""

    def __init__(self, policy, S, task):
        super().__init__()
        self.policy, self.S = policy, S

    def forward(self, s):
        return self.policy[s].expand(self.S, -1)


def export(policy, path):
    if isinstance(policy.policy, str):
        return path.write_bytes(Path(policy.policy).read_bytes())
    example, batch = torch.zeros(2, dtype=torch.long), {0: torch.export.Dim("B")}
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=(batch,)), path)


# --- shared: run ---
def parse(argv=None):
    """The flags. With --resume they are those of that run, and few of them may be given anew."""
    args = tyro.cli(Args, args=argv)
    if args.resume:
        with attempt(f"--resume {args.resume} is no use"):
            saved = Args(**json.loads(Path(args.resume, "args.json").read_text()))
            args = tyro.cli(Args, args=argv, default=saved)
            given = {name for name, was in vars(saved).items() if getattr(args, name) != was}
            fixed = given - {"resume", "num_updates", "device", "eval_workers", "track"}
            assert not fixed, f"{', '.join(sorted(fixed))} cannot be given anew"
    return args


def setup(args):
    """Checks numbers and the device, seeds the random streams."""
    least = {"seed": 0, "eval_episodes": 0, **getattr(Agent, "least", {})}
    for name, value in vars(args).items():
        low = least.get(name, 1 if Args.__annotations__[name] in (int, int | None) else 0)
        if type(value) in (int, float) and not low <= value <= (1 if name in ("gamma", "tau") else sys.maxsize):
            fail(f"--{name.replace('_', '-')} cannot be {value}")
    with attempt(f"--device {args.device} is not here"):
        torch.zeros(1, device=args.device)
    torch.manual_seed(args.seed)
    if args.device != "cpu":
        torch.cuda.set_stream(torch.cuda.Stream(args.device))  # on the default one no graph can be recorded
        torch.set_float32_matmul_precision("high")  # TF32


def start_worker():
    """A worker keeps to one core and ends with its parent, however that ends."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


class Run:
    """The directory of a run: its losses and evaluations so far, and checkpoint.pt for --resume."""

    def __init__(self, args, agent, task, total):
        self.args, self.agent, self.task, self.total, self.saved = args, agent, task, total, time.time()
        self.update, self.seconds, self.lost, self.pool, self.jobs, self.stop = 0, 0.0, set(), None, [], False
        self.losses = ["update,seed,name,value"]
        self.evals = ["update,seed,episodes,return_mean,return_std,discounted_return_mean,length_mean,score"]
        self.opts = [x for x in vars(agent).values() if isinstance(x, torch.optim.Optimizer)]
        data = re.sub("[/+]+", "-", getattr(args, "dataset_id", args.env_id))[-80:].strip("-.")
        self.dir = Path(args.resume or f"{args.out_dir}/{data}__{METHOD}__{args.seed}__{time.time_ns()}")
        if (self.dir / "checkpoint.pt").exists():
            self.restore(self.dir / "checkpoint.pt")
        self.write("args.json", json.dumps({**vars(args), "resume": ""}, indent=1))
        if args.track:
            with attempt("--track"):
                import wandb
                wandb.init(project=args.wandb_project_name, id=self.dir.name, resume="allow", config=vars(args))
        self.track = wandb.log if args.track else lambda row: None
        self.listen(self.interrupt)
        self.bar = tqdm.tqdm(desc=METHOD, total=total, initial=self.update, unit=" updates", mininterval=1)

    def listen(self, handler):
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, handler)

    def interrupt(self, number, frame):
        self.stop = True  # the training loop looks at it

    def log(self, losses):
        """Notes the losses {name: (S,)}, for which the host waits for the device; takes in evaluations."""
        self.track({"update": self.update, **{name: loss.mean().item() for name, loss in losses.items()}})
        for k, values in enumerate(zip(*(loss.tolist() for loss in losses.values()))):
            for name, value in zip(losses, values):
                self.losses.append(f"{self.update},{k},{name},{value:.6g}")
                if not math.isfinite(value) and k not in self.lost:
                    self.lost.add(k)
                    self.bar.write(f"seed {k}: {name} is {value} at update {self.update}", sys.stderr)
        if len(self.lost) == self.args.num_seeds:
            fail(f"no seed is finite any more; the last checkpoint is in {self.dir}")
        self.collect()

    def evaluate(self):
        """Hands the policy to a worker, which evaluates it while training goes on."""
        args, task, S, n = self.args, self.task, self.args.num_seeds, self.args.eval_episodes
        if n and task.spec:
            seeds = np.random.SeedSequence([args.seed, self.update]).generate_state(S * n).reshape(S, n)
            self.pool = self.pool or ProcessPoolExecutor(args.eval_workers, get_context("spawn"), start_worker)
            job = pickle.dumps(RawPolicy(self.agent.policy, S, task)), pickle.dumps(task.spec), seeds
            self.listen(signal.SIG_IGN)  # a worker that starts now inherits it: signals are its parent's
            with attempt(f"the evaluation of update {self.update} failed"):
                self.jobs.append((self.update, self.pool.submit(evaluate, *job, args.gamma, task.reference)))
            self.listen(self.interrupt)

    def collect(self, wait=False):
        """Takes in evaluations, in their order: those that are done, or all."""
        n = self.args.eval_episodes
        while self.jobs and (wait or self.jobs[0][1].done()):
            update, job = self.jobs.pop(0)
            with attempt(f"the evaluation of update {update} failed"):
                rows = job.result()
            self.evals += ["%d,%d,%d,%.4f,%.4f,%.4f,%.4f,%.4f" % (update, k, n, *x) for k, x in enumerate(rows)]
            mean = rows.mean(0)
            self.bar.set_postfix_str(f"return {mean[0]:.1f}, score {mean[4]:.1f}".removesuffix(", score nan"))
            self.track({"update": update, "return": mean[0], "score": mean[4]})

    def write(self, name, content, save=lambda text, path: path.write_text(text)):
        """A file gets its name when it is whole."""
        with attempt(f"{self.dir / name} cannot be written"):
            self.dir.mkdir(parents=True, exist_ok=True)
            save(content, self.dir / f"part-{name}")
            (self.dir / f"part-{name}").replace(self.dir / name)

    def save(self):
        """Brings the files up to date. It waits for evaluations first, so that none is in flight."""
        self.collect(wait=True)
        self.seconds, self.saved = self.seconds + time.time() - self.saved, time.time()
        self.write("losses.csv", "\n".join(self.losses) + "\n")
        self.write("eval.csv", ("\n".join(self.evals) + "\n").replace(",nan\n", ",\n"))
        rng = torch.get_rng_state(), torch.cuda.get_rng_state() if self.args.device != "cpu" else None
        state = {"agent": self.agent.state_dict(), "moments": [opt.state_dict()["state"] for opt in self.opts],
                 "rng": rng, "counters": [self.update, self.seconds, self.losses, self.evals]}
        self.write("checkpoint.pt", state, torch.save)

    def restore(self, path):
        with attempt(f"--resume: {path} cannot be used"):
            state = torch.load(path, "cpu", weights_only=True)
            self.agent.load_state_dict(state["agent"])
            for opt, moments in zip(self.opts, state["moments"]):
                opt.load_state_dict({**opt.state_dict(), "state": moments})
            torch.set_rng_state(state["rng"][0])
            if self.args.device != "cpu" and state["rng"][1] is not None:
                torch.cuda.set_rng_state(state["rng"][1])
            self.update, self.seconds, self.losses, self.evals = state["counters"]

    def finish(self):
        """After the last update exports policy.pt2 and notes where it was made; says how a run ended."""
        self.pool = None  # which ends its workers
        self.listen(signal.default_int_handler)
        if self.stop:
            fail(f"stopped at update {self.update}; go on with --resume {self.dir}")
        self.write("policy.pt2", RawPolicy(self.agent.policy, self.args.num_seeds, self.task), export)
        about = {"method": METHOD, "update": self.update, "wall_seconds": self.seconds, "cores": os.cpu_count()}
        about["device"] = torch.cuda.get_device_name() if self.args.device != "cpu" else "cpu"
        about["commit"] = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
        about |= {module.__name__: module.__version__ for module in (torch, np, gym, minari)}
        self.write("run.json", json.dumps(about, indent=1))
        print(f"{METHOD}: {self.bar.postfix or 'done'} after {self.update} updates; files in {self.dir}")
        return self.dir


def train(run, update):
    """The training loop; `update` returns its losses {name: (S,)}."""
    n = run.agent.updates_per_call
    with run.bar:
        while run.update < run.total and not run.stop:
            losses = update()
            run.update += n
            run.bar.update(n)
            last = run.update >= run.total
            if last or run.update % 1000 < n:
                run.log(losses)
            if last or run.update % run.args.eval_every < n:
                run.evaluate()
            if time.time() - run.saved > (120 if run.jobs else 60):  # to save is to wait for evaluations
                run.save()
        run.save()
    return run.finish()


# --- main: estimates ---
class Estimation(Run):
    def evaluate(self):
        """At once and here."""
        if self.args.eval_episodes and self.task.spec:
            job = Future()
            job.set_result(self.task.evaluate(self.args, self.update))
            self.jobs.append((self.update, job))


def main(args):
    """Draws the episodes, sweeps, estimates, saves; returns the run's directory."""
    setup(args)
    for name in "slip", "epsilon", "target_epsilon":
        if getattr(args, name) > 1:
            fail(f"--{name.replace('_', '-')} cannot be {getattr(args, name)}")
    task, logged, n, policy = (drawn if args.dataset_id in ("chain", *gym.registry) else recorded)(args)
    logged = Logged(*(x.to(args.device) for x in logged))
    agent = Agent(args, policy, logged, (args.num_seeds, n, logged.pi.shape[-1]))
    run = Estimation(args, agent, task, args.num_updates)

    def sweep():
        losses, now = agent.update(), run.update + 1
        if now % 1000 == 0 or now == run.total:  # where losses are logged
            losses |= agent.estimates()[0]
        return losses

    train(run, sweep)
    values, sizes = agent.estimates()
    truth = f"{task.truth(args, run.evals[1:]):.8g}" if len(run.evals) > 1 else ""
    rows = [f"{name},{k},{values[name][k]:.8g},{sizes[name][k]:.6g},{truth}" for name, k in
            product(values, range(args.num_seeds))]
    run.write("estimates.csv", "\n".join(["estimator,seed,value,effective_sample_size,truth", *rows, ""]))
    found = ", ".join(f"{name} {x.mean():.4g} ± {x.std(correction=0):.2g}" for name, x in values.items())
    print(f"{METHOD}: mean and deviation over seeds: {found}; truth {truth or 'unknown'}")
    return run.dir


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
