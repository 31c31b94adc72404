# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""COMBO: Conservative Offline Model-Based Policy Optimization.
Yu, Kumar, Rafailov, Rajeswaran, Levine & Finn, NeurIPS 2021. https://arxiv.org/abs/2102.08363

E networks N(mu_i, sigma_i^2) over x = [r, s' - s] are fitted; those with the least hold-out error are the elites:
    L_M     = sum_i E[ (mu_i - x)^2 / sigma_i^2 + log sigma_i^2 ] + c |w|^2 / 2 + 0.01 sum log(sigma_max^2/sigma_min^2)

Then SAC learns from batches of which a share f is data, D, the rest from rollouts of h steps, an elite at each step:

    y       = r + gamma (1 - d) min_j Q'_j(s', a'),   a' ~ pi(s')
    L_Q     = sum_j E[ (Q_j(s, a) - y)^2 ] + beta gap_j                                                (4)
    gap_j   = E[ log sum_b exp Q_j(s, b) ] - E_D[ Q_j(s, a) ],   as CQL (4), b of uniform, pi(s) and pi(s')
    L_pi    = E[ alpha log pi(a|s) - min_j Q_j(s, a) ],   a ~ pi(s)                                    (5)
    L_alpha = E[ -alpha (log pi(a|s) + H) ],   H = -dim(A)

    python algorithms/combo.py --num-seeds 2 --num-updates 5000 --eval-every 500 --model-epochs 30

Logs q_start, Q where episodes begin, which lags 1 / (tau (1 - gamma)) updates behind: see eval.csv's discounted return.
Departs from the paper: no code is public; entropy in L_pi, networks, rates, f, beta, h are OfflineRL-Kit's, without
its cosine and sums over 3 b (a lost reshape); the fit has an end; no 1/2: beta is twice the paper's; rollouts by pi.
Shapes: S seeds, E networks or critics, B batch, N transitions. The S seeds train side by side and never interact.
"""
import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:
    # --- run ---
    dataset_id: str = "hopper/medium-v0"  # shipped, local or hub id; a+b mixes two; or a directory
    env_id: str = ""  # environment to evaluate in; empty: the one that the data names
    seed: int = 0  # seeds every random stream; agent k of a run is not the agent of --seed k
    num_seeds: int = 1  # independent agents trained side by side
    num_updates: int = 1_000_000  # critic gradient steps of each agent
    eval_every: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    batch_size: int = 256  # transitions per agent and update, and per network and step of the model's fit
    actor_lr: float = 1e-4  # of Adam, actor and temperature
    critic_lr: float = 3e-4  # of Adam, critic
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target networks
    hidden_dim: int = 256  # units in each of three hidden layers
    # --- COMBO: the model ---
    num_models: int = 7  # networks
    num_elites: int = 5  # of them imagine
    model_hidden_dim: int = 200  # units in each of their four hidden layers
    model_lr: float = 1e-3  # of Adam
    model_epochs: int = 80  # at most; the fit ends after 6 epochs in a row without a better network
    # --- COMBO: the policy ---
    horizon: int = 5  # h, steps of a rollout; OfflineRL-Kit: 1 for Walker2d
    beta: float = 5.0  # weight of the gap; OfflineRL-Kit: 0.5 for medium-replay and HalfCheetah's medium
    num_proposals: int = 10  # actions b of each kind
    rollout_every: int = 1_000  # updates between two rounds of rollouts, of which five at full length are kept
    rollout_batch: int = 50_000  # rollouts of each agent and round
    real_ratio: float = 0.5  # f, of each batch that is data


# --- networks ---
class Linear(nn.Module):
    """`nn.Linear` for many independent networks at once: weight (*lead, d_in, d_out)."""

    def __init__(self, lead, d_in, d_out):
        super().__init__()
        bound = d_in**-0.5  # the bound nn.Linear draws from
        self.weight = nn.Parameter(torch.empty(*lead, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*lead, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):  # (*lead, B, d_in) -> (*lead, B, d_out)
        one = self.weight.shape[-1] == 1  # column, with which a batched product is slow
        return ((x * self.weight.mT).sum(-1, keepdim=True) if one else x @ self.weight) + self.bias


def mlp(lead, *sizes):
    layers = [m for d_in, d_out in zip(sizes, sizes[1:]) for m in (Linear(lead, d_in, d_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """Twin Q(s, a)."""

    def __init__(self, S, obs_dim, act_dim, d_hidden, E=2):
        super().__init__()
        self.net = mlp((S, E), obs_dim + act_dim, d_hidden, d_hidden, d_hidden, 1)

    def forward(self, s, a):  # (S, B, .) -> (S, E, B)
        return self.net(torch.cat([s, a], -1).unsqueeze(1)).squeeze(-1)


class Actor(nn.Module):
    """Gaussian policy squashed by tanh."""

    def __init__(self, S, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.net = mlp((S,), obs_dim, d_hidden, d_hidden, d_hidden, 2 * act_dim)

    def forward(self, s):  # mode: (S, B, obs_dim) -> (S, B, act_dim)
        return torch.tanh(self.net(s).chunk(2, -1)[0])

    def sample(self, s, n=1):  # n per state -> a (S, n B, act_dim), log_prob (S, n B)
        mean, log_std = self.net(s).repeat(1, n, 1).chunk(2, -1)
        log_std = log_std.clamp(-5, 2)
        eps = torch.randn_like(mean)
        u = mean + log_std.exp() * eps
        log_normal = -0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log (1 - tanh(u)^2), finite for every u
        return torch.tanh(u), (log_normal - log_slope).sum(-1)


class Temperature(nn.Module):
    def __init__(self, S):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(S))

    def forward(self):  # (S, 1)
        return self.log_alpha.exp().unsqueeze(-1)


class Dynamics(nn.Module):
    """E networks N(mu, sigma^2) over [r, s' - s]; the bounds of log sigma^2 are learned, and shared by the E."""

    DECAY = 2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4, 1e-4  # of the weights of each layer

    def __init__(self, S, E, obs_dim, act_dim, d_hidden):
        super().__init__()
        sizes = (obs_dim + act_dim, d_hidden, d_hidden, d_hidden, d_hidden, obs_dim + 1)
        self.layers = nn.ModuleList(Linear((S, E), *x) for x in [*zip(sizes, sizes[1:]), sizes[-2:]])  # two heads
        for layer in self.layers:
            std = 0.5 * layer.weight.shape[-2] ** -0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)
        self.max_logvar = nn.Parameter(torch.full((S, 1, 1, sizes[-1]), 0.5))
        self.min_logvar = nn.Parameter(torch.full((S, 1, 1, sizes[-1]), -10.0))
        self.register_buffer("mean", torch.zeros(S, 1, 1, sizes[0]))  # of the inputs
        self.register_buffer("std", torch.ones(S, 1, 1, sizes[0]))

    def forward(self, s_a):  # (S, E or 1, B, obs_dim + act_dim) -> mean, logvar (S, E, B, 1 + obs_dim)
        h, (*trunk, mean, logvar) = (s_a - self.mean) / self.std, self.layers
        for layer in trunk:
            h = F.silu(layer(h))
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar(h))
        return mean(h), self.min_logvar + F.softplus(logvar - self.min_logvar)


# --- losses: each returns one value per seed, (S,) ---
def model_loss(dynamics, s_a, x):
    """sum_i E[ (mu_i - x)^2 / sigma_i^2 + log sigma_i^2 ] + c |w|^2 / 2 + 0.01 sum log(sigma_max^2/sigma_min^2)"""
    mean, logvar = dynamics(s_a)
    nll = ((mean - x).square() * (-logvar).exp() + logvar).mean((-2, -1)).sum(-1)  # (S, E, B, 1 + obs_dim) -> (S,)
    decay = sum(c / 2 * layer.weight.square().sum((-3, -2, -1)) for c, layer in zip(dynamics.DECAY, dynamics.layers))
    return nll + decay + 0.01 * (dynamics.max_logvar - dynamics.min_logvar).sum((-3, -2, -1))


def critic_loss(critic, critic_target, actor, batch, args):
    """L_Q = sum_j E[ (Q_j(s, a) - y)^2 ] + beta gap_j,  y = r + gamma (1 - d) min_j Q'_j(s', a');  gap_j"""
    s, a, r, s_next, d = batch
    n, B, act_dim = args.num_proposals, *a.shape[1:]
    real = int(args.real_ratio * B)  # rows of data, which are the first
    with torch.no_grad():
        a_next, _ = actor.sample(s_next)
        q_next = critic_target(s_next, a_next).amin(1)  # (S, E, B) -> (S, B)
        y = r + args.gamma * (1 - d) * q_next
        (a_1, log_1), (a_2, log_2) = actor.sample(s, n), actor.sample(s_next, n)  # all b are judged at s
        a_all = torch.cat([a, torch.rand_like(a_1) * 2 - 1, a_1, a_2], 1)  # (S, B + 3 n B, act_dim)
        log_mu = torch.cat([torch.full_like(log_1, -act_dim * math.log(2)), log_1, log_2], 1)  # (S, 3 n B)
    q = critic(s.repeat(1, 1 + 3 * n, 1), a_all).unflatten(-1, (-1, B))  # (S, E, 1 + 3 n, B)
    q, q_all = q[:, :, 0], q[:, :, 1:] - log_mu.unflatten(-1, (-1, B)).unsqueeze(1)  # (S, E, B), (S, E, 3 n, B)
    gap = q_all.logsumexp(2).mean(-1) - q[..., :real].mean(-1)  # (S, E): down on all states, up on data only
    return (q - y.unsqueeze(1)).square().sum(1).mean(-1) + args.beta * gap.sum(1), gap.detach()


def actor_loss(actor, critic, alpha, batch):
    """L_pi = E[ alpha log pi(a|s) - min_j Q_j(s, a) ],  a ~ pi(s); and log pi(a|s) (S, B)"""
    s, *_ = batch
    pi, log_prob = actor.sample(s)
    return (alpha().detach() * log_prob - critic(s, pi).amin(1)).mean(-1), log_prob.detach()


def alpha_loss(alpha, log_prob, act_dim):
    """L_alpha = E[ -alpha (log pi(a|s) + H) ],  H = -dim(A)"""
    return (-alpha() * (log_prob - act_dim)).mean(-1)


# --- model ---
def terminated(env, s_next):
    """Whether an episode ends in s_next (*, obs_dim): the rules of Gymnasium's -v5 with their defaults."""
    z, angle = s_next[..., 0], s_next[..., 1]
    if env == "Hopper":
        return ~((z > 0.7) & (angle.abs() < 0.2) & (s_next[..., 1:].abs() < 100).all(-1) & (z < math.inf))
    if env == "Walker2d":
        return ~((z > 0.8) & (z < 2) & (angle.abs() < 1))
    if env == "HalfCheetah":
        return torch.zeros_like(z, dtype=torch.bool)
    fail(f"no rule ends imagined episodes of {env}: --env-id takes Hopper, Walker2d, HalfCheetah; see `terminated`")


def imagine(dynamics, elites, s, a):
    """A step in a random elite: r (S, B), s_next (S, B, obs_dim)."""
    mean, logvar = dynamics(torch.cat([s, a], -1).unsqueeze(1))  # (S, E, B, 1 + obs_dim)
    std = (0.5 * logvar).exp()
    i = elites.gather(1, torch.randint(elites.shape[1], s.shape[:2], device=s.device))  # (S, B)
    mean_i, std_i = (x.take_along_dim(i[:, None, :, None], 1).squeeze(1) for x in (mean, std))  # (S, B, 1 + obs_dim)
    x = mean_i + std_i * torch.randn_like(mean_i)
    return x[..., 0], s + x[..., 1:]


# --- agent ---
def prepare(data, args):
    """Changes nothing; asks whether the environment's termination rule is known, and whether it is that of the data."""
    lost = (data.terminated > 0) & (data.next_obs == data.obs).all(-1)  # as in `fit`
    wrong = terminated(data.spec and data.spec.name, data.next_obs) != (data.terminated > 0)
    if (share := wrong[~lost].float().mean()) > 0.01:
        fail(f"by the rule of {data.spec.id} {share:.0%} of the data end otherwise than they do: see `terminated`")
    if not 1 <= int(args.real_ratio * args.batch_size) < args.batch_size:
        fail(f"--real-ratio {args.real_ratio} of --batch-size {args.batch_size} leaves no data or no rollouts")


class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, data):
        super().__init__()
        self.args, self.data, self.updates_per_call, S, E = args, data, 1, args.num_seeds, args.num_models
        self.actor = self.policy = Actor(S, obs_dim, act_dim, args.hidden_dim)
        self.critic = Critic(S, obs_dim, act_dim, args.hidden_dim)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.alpha, self.dynamics = Temperature(S), Dynamics(S, E, obs_dim, act_dim, args.model_hidden_dim)
        self.dynamics_best = copy.deepcopy(self.dynamics).requires_grad_(False)  # by hold-out error
        self.fitted = nn.Module()
        self.fitted.register_buffer("error", torch.full((S, E), math.inf))  # of dynamics_best
        self.fitted.register_buffer("stale", torch.zeros(S))  # epochs without a better network
        self.fitted.register_buffer("epoch", torch.zeros(()))
        self.replay = Replay(S, 5 * args.rollout_batch * args.horizon, obs_dim, act_dim)
        self.actor_opt, self.critic_opt = adam(self.actor, args.actor_lr), adam(self.critic, args.critic_lr)
        self.alpha_opt, self.dynamics_opt = adam(self.alpha, args.actor_lr), adam(self.dynamics, args.model_lr)
        first = data.episode.diff(prepend=data.episode[:1] - 1).nonzero().flatten()
        self.start = data.obs[first[:: -(-len(first) // 64)]].expand(S, -1, -1)  # where at most 64 episodes begin
        self.real = replace(args, batch_size=int(args.real_ratio * args.batch_size))

    def fit(self):
        """Fits the model, an epoch at a turn, until 6 epochs in a row bring no seed a better network."""
        args, data, fitted = self.args, self.data, self.fitted
        lost = (data.terminated > 0) & (data.next_obs == data.obs).all(-1)  # no s': see datasets/from_d4rl.py
        s_a = torch.cat([data.obs, data.action], -1)[~lost]
        x = torch.cat([data.reward.unsqueeze(-1), data.next_obs - data.obs], -1)[~lost]
        holdout, train, rows = split(len(x), args)
        for model in self.dynamics, self.dynamics_best:
            std, mean = torch.std_mean(s_a[train], 1, correction=0)  # (S, obs_dim + act_dim)
            model.mean.copy_(mean[:, None, None])
            model.std.copy_(torch.where(std < 1e-12, 1, std)[:, None, None])
        while fitted.epoch < args.model_epochs and (fitted.stale <= 5).any():
            for i in rows.gather(-1, torch.rand(rows.shape, device=args.device).argsort(-1)).split(args.batch_size, -1):
                step(self.dynamics_opt, model_loss(self.dynamics, s_a[i], x[i]))  # i (S, E, B)
            self.keep(s_a[holdout].unsqueeze(1), x[holdout].unsqueeze(1))
            yield

    @torch.no_grad()
    def keep(self, s_a, x):
        """Keeps networks whose hold-out error fell by over 1 %; those of a seed that has stopped stay as they are."""
        fitted, running = self.fitted, (self.fitted.stale <= 5).unsqueeze(1)  # (S, 1)
        error = (self.dynamics(s_a)[0] - x).square().mean((-2, -1))  # (S, E)
        better = running & (error < 0.99 * fitted.error)
        fitted.error.copy_(torch.where(better, error, fitted.error))
        fitted.stale.copy_(torch.where(better.any(1), 0, fitted.stale + 1))
        fitted.epoch += 1
        for (name, new), best in zip(self.dynamics.named_parameters(), self.dynamics_best.parameters()):
            where = running if name.endswith("logvar") else better  # the bounds are the last ones
            best.copy_(torch.where(where[..., None, None], new, best))

    def elites(self):  # (S, num_elites)
        return self.fitted.error.argsort(-1)[:, : self.args.num_elites]

    @torch.no_grad()
    def rollout(self):
        """Imagines `rollout_batch` rollouts of each seed; those that have terminated add nothing more."""
        args, data, elites = self.args, self.data, self.elites()
        start = torch.randint(len(data.obs), (args.num_seeds, args.rollout_batch), device=args.device)
        for part in start.split((1_000 if args.device == "cpu" else 50_000) // args.num_seeds + 1, 1):  # for caches
            s, running = data.obs[part], torch.ones_like(part, dtype=torch.bool)
            for _ in range(args.horizon):
                a, _ = self.actor.sample(s)
                r, s_next = imagine(self.dynamics_best, elites, s, a)
                d = terminated(data.spec.name, s_next)
                self.replay.add(running, s, a, r, s_next, d)
                s, running = s_next, running & ~d

    def update(self):
        args = self.args
        imagined = self.replay.sample(args.batch_size - self.real.batch_size)
        batch = [torch.cat(x, 1) for x in zip(sample(self.data, self.real), imagined)]
        l_q, gap = critic_loss(self.critic, self.critic_target, self.actor, batch, args)
        step(self.critic_opt, l_q)
        l_pi, log_prob = actor_loss(self.actor, self.critic, self.alpha, batch)
        step(self.actor_opt, l_pi)
        l_alpha = alpha_loss(self.alpha, log_prob, batch[1].shape[-1])
        step(self.alpha_opt, l_alpha)
        polyak(self.critic_target, self.critic, args.tau)
        with torch.no_grad():
            q_start = self.critic(self.start, self.actor(self.start)).amin(1).mean(-1)
        return {"critic_loss": l_q, "actor_loss": l_pi, "alpha_loss": l_alpha, "q_start": q_start, "gap": gap.mean(1)}


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


# --- shared: optimisation ---
def adam(module, lr):
    """Fused Adam; on CUDA its rate and step count live on the device, where a CUDA graph can change them."""
    lr = torch.tensor(lr, device=next(module.parameters()).device)
    return torch.optim.Adam(module.parameters(), lr=lr, fused=True, capturable=lr.is_cuda)


def step(opt, loss):
    """One step down the loss (S,). Its sum keeps seeds apart, since each weight belongs to one seed."""
    params = opt.param_groups[0]["params"]
    for p, grad in zip(params, torch.autograd.grad(loss.sum(), params)):
        p.grad = grad
    opt.step()


@torch.no_grad()
def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online"""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def cuda_graph(update):
    """Yields what `update` returns: after three calls it is recorded once, and replayed from then on."""
    for _ in range(3):
        yield update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records without running
        losses = update()
    while True:
        graph.replay()  # fills the tensors in `losses` again
        yield losses


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


# --- shared: evaluation ---
class RawPolicy(nn.Module):
    """On the CPU, from raw observations, (B, obs_dim) or (S, B, obs_dim), to actions of the environment."""

    def __init__(self, policy, S, task):
        super().__init__()
        self.policy, self.S = copy.deepcopy(policy).cpu(), S
        for name in ("mean", "std", "shift", "scale"):
            self.register_buffer(name, getattr(task, name).cpu())
        self.eval().requires_grad_(False)

    def forward(self, obs):
        s = (obs - self.mean) / self.std
        return self.shift + self.scale * self.policy(s.expand(self.S, *s.shape[-2:]))


def export(policy, path):
    """`torch.export.load(path).module()` maps obs (B, obs_dim) to actions (S, B, act_dim), or (S, B)."""
    example, batch = torch.zeros(2, len(policy.mean)), {0: torch.export.Dim("B")}
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=(batch,)), path)


@torch.no_grad()
def evaluate(policy, spec, seeds, gamma, reference):
    """Return, its deviation, discounted return, length, score (S, 5) of episodes begun with `seeds` (S, n)."""
    policy, envs, (S, n) = pickle.loads(policy), environments(spec, seeds.size), seeds.shape
    obs = np.stack([flat(env.reset(seed=int(seed))[0]) for env, seed in zip(envs, seeds.flat)])
    finite = torch.stack([p.flatten(1).isfinite().all(1) for p in policy.parameters()]).all(0)  # (S,)
    sums = np.zeros((3, S * n)) + np.where(finite, 0, math.nan).repeat(n)
    running = np.flatnonzero(finite.repeat_interleave(n)).tolist()
    torch.manual_seed(int(seeds[0, 0]))  # for policies that draw
    while running:
        action = policy(torch.from_numpy(obs).view(S, n, -1)).flatten(0, 1).numpy()
        for i in running.copy():
            next_obs, reward, terminated, truncated, _ = envs[i].step(action[i])
            obs[i] = flat(next_obs)
            sums[:, i] += reward, gamma ** sums[2, i] * reward, 1
            if terminated or truncated or sums[2, i] == 10_000:  # an episode has to end
                running.remove(i)
    (total, discounted, length), (low, high) = sums.reshape(3, S, n), reference
    score = 100 * (total.mean(1) - low) / (high - low)
    return np.stack([total.mean(1), total.std(1), discounted.mean(1), length.mean(1), score], 1)


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


# --- data and main: two phases ---
class Replay(nn.Module):
    """The last N imagined steps of each agent: s, s_next (S, N, obs_dim), a (S, N, act_dim), r, d (S, N)."""

    def __init__(self, S, N, obs_dim, act_dim):
        super().__init__()
        for name, size in ("s", [obs_dim]), ("a", [act_dim]), ("r", []), ("s_next", [obs_dim]), ("d", []):
            self.register_buffer(name, torch.zeros(S, N, *size))
        self.register_buffer("count", torch.zeros(S, dtype=torch.long))  # steps that were added

    def add(self, valid, *steps):  # those of (S, B) steps s, a, r, s_next, d that are `valid`
        k, j = valid.nonzero(as_tuple=True)
        i = (self.count.unsqueeze(1) + valid.cumsum(1) - 1)[k, j] % self.r.shape[1]
        for buffer, x in zip(self.buffers(), steps):
            buffer[k, i] = x[k, j].to(buffer.dtype)
        self.count += valid.sum(1)

    def sample(self, B):  # s, a, r, s_next, d, each (S, B, .) or (S, B)
        S, N = self.r.shape
        i = (torch.rand(S, B, dtype=torch.float64, device=self.r.device) * self.count.clamp(max=N).unsqueeze(1)).long()
        k = torch.arange(S, device=i.device).unsqueeze(1)
        return self.s[k, i], self.a[k, i], self.r[k, i], self.s_next[k, i], self.d[k, i]


def split(N, args):
    """Rows of the data for each seed: hold-out (S, H), training (S, n), a resample of it for each network (S, E, n)."""
    H, found = min(N // 5, 1000), []
    for k in range(args.num_seeds):
        rng = torch.Generator().manual_seed(int(np.random.SeedSequence([args.seed, k]).generate_state(1)[0]))
        holdout, train = torch.randperm(N, generator=rng).split([H, N - H])
        found.append((holdout, train, train[torch.randint(N - H, (args.num_models, N - H), generator=rng)]))
    return [torch.stack(x).to(args.device) for x in zip(*found)]


def main(args):
    """Fits the model, then trains, evaluates, saves; returns the run's directory."""
    setup(args)
    with torch.device(args.device):
        data = load(args)
        prepare(data, args)
        agent = Agent(args, data.obs_dim, data.act_dim, data)
    update = agent.update if args.device == "cpu" else cuda_graph(agent.update).__next__
    run = Run(args, agent, data, args.num_updates)
    if not run.update:
        for _ in agent.fit():
            error = agent.fitted.error.gather(1, agent.elites()).mean().item()
            run.bar.set_postfix(epoch=int(agent.fitted.epoch), elites_error=error)
            if run.stop:
                break
        run.bar.write(f"{METHOD}: model fitted, {run.bar.postfix}", sys.stderr)
        run.save()

    def imagine_and_update():
        if run.update % args.rollout_every == 0:
            agent.rollout()
        return update()

    return train(run, imagine_and_update)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
