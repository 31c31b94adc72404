# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19", "matplotlib>=3.9", "pytest>=8.3"]
# ///
"""MOPO: Model-based Offline Policy Optimization.
Yu, Thomas, Yu, Ermon, Zou, Levine, Finn & Ma, NeurIPS 2020. https://arxiv.org/abs/2005.13239

E networks N(mu_i, sigma_i^2) over x = [r, s' - s] are fitted; those with the least hold-out error are the elites:

    L_M     = sum_i E[ (mu_i - x)^2 / sigma_i^2 + log sigma_i^2 ] + c |w|^2 / 2 + 0.01 sum log(sigma_max^2/sigma_min^2)

Then SAC learns from the data and from rollouts of h steps, which begin in the data and draw an elite at each step:

    r~      = r - lambda u,   u = max_i |sigma_i(s, a)|   over all E, for imagined rewards only
    y       = r~ + gamma (1 - d) (min_j Q'_j(s', a') - alpha log pi(a'|s')),   a' ~ pi(s')
    L_Q     = E[ sum_j (Q_j(s, a) - y)^2 ]
    L_pi    = E[ alpha log pi(a|s) - min_j Q_j(s, a) ],   a ~ pi(s)
    L_alpha = E[ -alpha (log pi(a|s) + H) ]

    python algorithms/mopo.py --num-seeds 2 --num-updates 30000 --eval-every 2000 --model-epochs 40

Logs q_start, the critic's value where episodes begin, and at each evaluation model_return, what the policy's mode earns
in the model from there on, without penalty: compare them with eval.csv. The seconds in run.json do not count the fit.
Departs from the paper: as the authors' code does, without spectral normalisation (their issue 3), u from sigma and not
from sigma^2, H = -3 in every task. Unlike there the fit has an end, --model-epochs; SAC's layers start as PyTorch's do.
Shapes: S seeds, E networks or critics, B batch, N transitions. The S seeds train side by side and never interact.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:
    # --- run ---
    dataset_id: str = "hopper/medium-v0"  # shipped or Minari id, a+b mixture, directory or D4RL .hdf5 file
    env_id: str = ""  # environment to evaluate in; empty: the one that the data names
    seed: int = 0  # seeds every random stream; agent k of a run is not the agent of --seed k
    num_seeds: int = 1  # independent agents trained side by side
    num_updates: int = 1_000_000  # critic gradient steps of each agent; the authors: HalfCheetah and Walker2d 3,000,000
    eval_every: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on; 0: in line
    device: str = "auto"  # cuda, cpu, or auto: cuda where there is one
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    batch_size: int = 256  # transitions per agent and update, and per network and step of the model's fit
    actor_lr: float = 3e-4  # of Adam, actor and temperature
    critic_lr: float = 3e-4  # of Adam, critic
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target networks
    hidden_dim: int = 256  # units in each of two hidden layers
    # --- MOPO: the model ---
    num_models: int = 7  # networks
    num_elites: int = 5  # of them imagine
    model_hidden_dim: int = 200  # units in each of their four hidden layers
    model_lr: float = 1e-3  # of Adam
    model_epochs: int = 80  # at most; the fit ends after 6 epochs in a row without a better network
    # --- MOPO: the policy; horizon, penalty of the authors (D4RL v0), of OfflineRL-Kit (v2, actor 1e-4, H = -dim A) ---
    #              random  medium  medium-replay  medium-expert    v2: medium  medium-replay  medium-expert
    # Hopper       5 1     5 5     5 1            5 1                  5 5     5 2.5          5 5
    # HalfCheetah  5 0.5   1 1     5 1            5 5                  5 0.5   5 0.5          5 2.5
    # Walker2d     1 1     5 5     1 1            1 2                  5 0.5   1 2.5          1 2.5
    horizon: int = 5  # h, steps of a rollout
    penalty: float = 5.0  # lambda, weight of the model's deviation
    rollout_every: int = 1_000  # updates between two rounds of rollouts, of which five at full length are kept
    rollout_batch: int = 50_000  # rollouts of each agent and round
    real_ratio: float = 0.05  # of each batch that is data
    target_entropy: float = -3.0  # H


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
        self.net = mlp((S, E), obs_dim + act_dim, d_hidden, d_hidden, 1)

    def forward(self, s, a):  # (S, B, .) -> (S, E, B)
        return self.net(torch.cat([s, a], -1).unsqueeze(1)).squeeze(-1)


class Actor(nn.Module):
    """Gaussian policy squashed by tanh."""

    def __init__(self, S, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.net = mlp((S,), obs_dim, d_hidden, d_hidden, 2 * act_dim)

    def forward(self, s):  # mode: (S, B, obs_dim) -> (S, B, act_dim)
        return torch.tanh(self.net(s).chunk(2, -1)[0])

    def sample(self, s):  # -> a (S, B, act_dim), log_prob (S, B)
        mean, log_std = self.net(s).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
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


def critic_loss(critic, critic_target, actor, alpha, batch, args):
    """L_Q = E[ sum_j (Q_j(s, a) - y)^2 ],  y = r~ + gamma (1 - d) (min_j Q'_j(s', a') - alpha log pi(a'|s'))"""
    s, a, r, s_next, d = batch
    with torch.no_grad():
        a_next, log_prob = actor.sample(s_next)
        q_next = critic_target(s_next, a_next).amin(1)  # (S, E, B) -> (S, B)
        y = r + args.gamma * (1 - d) * (q_next - alpha() * log_prob)
    return (critic(s, a) - y.unsqueeze(1)).square().sum(1).mean(-1)


def actor_loss(actor, critic, alpha, batch):
    """L_pi = E[ alpha log pi(a|s) - min_j Q_j(s, a) ],  a ~ pi(s); and log pi(a|s) (S, B)"""
    s, *_ = batch
    pi, log_prob = actor.sample(s)
    return (alpha().detach() * log_prob - critic(s, pi).amin(1)).mean(-1), log_prob.detach()


def alpha_loss(alpha, log_prob, args):
    """L_alpha = E[ -alpha (log pi(a|s) + H) ]"""
    return (-alpha() * (log_prob + args.target_entropy)).mean(-1)


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
    fail(f"nothing says where an imagined episode of {env or 'an environment without a name'} ends: write its rule "
         f"into the function `terminated` of {METHOD}.py, or give Hopper, Walker2d or HalfCheetah by --env-id, as is "
         "needed with --eval-episodes 0")


def imagine(dynamics, elites, s, a, rng=None):
    """A step in a random elite: r (S, B), s_next (S, B, obs_dim), u = max_i |sigma_i(s, a)| over all networks."""
    mean, logvar = dynamics(torch.cat([s, a], -1).unsqueeze(1))  # (S, E, B, 1 + obs_dim)
    std = (0.5 * logvar).exp()
    i = elites.gather(1, torch.randint(elites.shape[1], s.shape[:2], generator=rng, device=s.device))  # (S, B)
    mean_i, std_i = (x.take_along_dim(i[:, None, :, None], 1).squeeze(1) for x in (mean, std))  # (S, B, 1 + obs_dim)
    x = mean_i + std_i * torch.randn(mean_i.shape, generator=rng, device=s.device)
    return x[..., 0], s + x[..., 1:], std.norm(dim=-1).amax(1)


# --- agent ---
def prepare(data, args):
    """Changes nothing; asks whether the environment's termination rule is known, and whether it is that of the data."""
    lost = (data.terminated > 0) & (data.next_obs == data.obs.roll(-1, 0)).all(-1)  # as in `fit`
    wrong = terminated(data.spec and data.spec.name, data.next_obs) != (data.terminated > 0)
    if (share := wrong[~lost].float().mean()) > 0.01:
        fail(f"by the rule of {data.spec.id} {share:.0%} of the data end otherwise than they do: see `terminated`")
    if args.real_ratio and not int(args.real_ratio * args.batch_size):
        fail(f"--real-ratio {args.real_ratio} of --batch-size {args.batch_size} is not one transition")
    if args.num_elites > args.num_models:
        fail(f"--num-elites {args.num_elites} of --num-models {args.num_models} cannot be")


class Agent:
    def __init__(self, args, obs_dim, act_dim, data):
        self.args, self.data, S, E = args, data, args.num_seeds, args.num_models
        self.actor = Actor(S, obs_dim, act_dim, args.hidden_dim).to(args.device)
        self.critic = Critic(S, obs_dim, act_dim, args.hidden_dim).to(args.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.alpha = Temperature(S).to(args.device)
        self.dynamics = Dynamics(S, E, obs_dim, act_dim, args.model_hidden_dim).to(args.device)
        self.dynamics_best = copy.deepcopy(self.dynamics).requires_grad_(False)  # by hold-out error
        self.fitted = nn.Module()
        self.fitted.register_buffer("error", torch.full((S, E), math.inf, device=args.device))  # of dynamics_best
        self.fitted.register_buffer("stale", torch.zeros(S, device=args.device))  # epochs without a better network
        self.fitted.register_buffer("epoch", torch.zeros((), device=args.device))
        self.replay = Replay(S, 5 * args.rollout_batch * args.horizon, obs_dim, act_dim).to(args.device)
        self.actor_opt, self.critic_opt = adam(self.actor, args.actor_lr), adam(self.critic, args.critic_lr)
        self.alpha_opt, self.dynamics_opt = adam(self.alpha, args.actor_lr), adam(self.dynamics, args.model_lr)
        self.policy, self.updates_per_call = self.actor, 1
        self.modules = {"actor": self.actor, "critic": self.critic, "critic_target": self.critic_target,
                        "alpha": self.alpha, "dynamics": self.dynamics, "dynamics_best": self.dynamics_best,
                        "fitted": self.fitted, "replay": self.replay}
        self.optimizers = {"actor": self.actor_opt, "critic": self.critic_opt, "alpha": self.alpha_opt,
                           "dynamics": self.dynamics_opt}
        first = data.episode.diff(prepend=data.episode[:1] - 1).nonzero().flatten()
        self.start = data.obs[first[:: -(-len(first) // 64)]].expand(S, -1, -1)  # where at most 64 episodes begin
        self.real = replace(args, batch_size=int(args.real_ratio * args.batch_size))

    def fit(self):
        """Fits the model, an epoch at a turn, until 6 epochs in a row bring no seed a better network."""
        args, data, fitted = self.args, self.data, self.fitted
        lost = (data.terminated > 0) & (data.next_obs == data.obs.roll(-1, 0)).all(-1)  # s' that D4RL files lack
        s_a = torch.cat([data.obs, data.action], -1)[~lost]
        x = torch.cat([data.reward.unsqueeze(-1), data.next_obs - data.obs], -1)[~lost]
        holdout, train, rows = split(len(x), args)
        for model in self.dynamics, self.dynamics_best:
            std, mean = torch.std_mean(s_a[train], 1, correction=0)  # (S, obs_dim + act_dim)
            model.mean.copy_(mean[:, None, None])
            model.std.copy_(torch.where(std < 1e-12, 1, std)[:, None, None])
        while fitted.epoch < args.model_epochs and (fitted.stale <= 5).any():
            order = torch.rand(rows.shape, device=args.device).argsort(-1)
            for i in rows.gather(-1, order).split(args.batch_size, -1):  # (S, E, B)
                step(self.dynamics_opt, model_loss(self.dynamics, s_a[i], x[i]))
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
        size = 1_000 if args.device == "cpu" else 50_000  # rows that the caches of a CPU hold
        for part in start.split(size // args.num_seeds + 1, 1):
            s, running = data.obs[part], torch.ones_like(part, dtype=torch.bool)
            for _ in range(args.horizon):
                a, _ = self.actor.sample(s)
                r, s_next, u = imagine(self.dynamics_best, elites, s, a)
                d = terminated(data.spec.name, s_next)
                self.replay.add(running, s, a, r - args.penalty * u, s_next, d)
                s, running = s_next, running & ~d

    def update(self):
        args = self.args
        imagined = self.replay.sample(args.batch_size - self.real.batch_size)
        batch = [torch.cat(x, 1) for x in zip(sample(self.data, self.real), imagined)]
        l_q = critic_loss(self.critic, self.critic_target, self.actor, self.alpha, batch, args)
        step(self.critic_opt, l_q)
        l_pi, log_prob = actor_loss(self.actor, self.critic, self.alpha, batch)
        step(self.actor_opt, l_pi)
        l_alpha = alpha_loss(self.alpha, log_prob, args)
        step(self.alpha_opt, l_alpha)
        polyak(self.critic_target, self.critic, args.tau)
        with torch.no_grad():
            q_start = self.critic(self.start, self.actor(self.start)).amin(1).mean(-1)
        return {"critic_loss": l_q, "actor_loss": l_pi, "alpha_loss": l_alpha, "q_start": q_start}  # each (S,)


# --- shared: imports ---
import functools, io, json, multiprocessing, os, pickle, platform, re, signal, subprocess, sys, threading, time
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gymnasium as gym, h5py, huggingface_hub, minari, numpy as np, tyro
from tqdm import tqdm


# --- shared: optimisation ---
def adam(module, lr):
    """Fused Adam; on CUDA its rate and step count live on the device, where a CUDA graph can change them."""
    lr = torch.tensor(lr, device=next(module.parameters()).device)
    return torch.optim.Adam(module.parameters(), lr=lr, fused=True, capturable=lr.is_cuda)


def step(opt, loss):
    """One step down the loss (S,). The gradient of its sum keeps seeds apart: each weight belongs to one seed."""
    params = opt.param_groups[0]["params"]
    for p, grad in zip(params, torch.autograd.grad(loss.sum(), params)):
        p.grad = grad
    opt.step()


@torch.no_grad()
def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online"""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def cuda_graph(agent):
    """`agent.update`; on CUDA three calls warm up and the fourth becomes the graph that is replayed from then on."""
    if agent.args.device == "cpu":
        return agent.update
    stream = torch.cuda.Stream()  # warm-up before a capture belongs on a side stream
    torch.cuda.synchronize()
    torch.cuda.set_stream(stream)

    def calls():
        for _ in range(3):
            yield agent.update()
        update, graph, rng = agent.update, torch.cuda.CUDAGraph(), torch.cuda.get_rng_state()
        try:
            with torch.cuda.graph(graph):  # records and does not run: the agent stays as it is
                losses = agent.update()
            update = lambda: graph.replay() or losses
        except Exception as error:
            tqdm.write(f"no CUDA graph, going on without: {error}", sys.stderr)
            torch.cuda.set_stream(stream)
            torch.cuda.set_rng_state(rng)
        while True:
            yield update()

    return calls().__next__


# --- shared: data ---
def load(args):
    """The Task of --dataset-id with its N transitions: obs, next_obs (N, obs_dim), action (N, act_dim) in [-1, 1] or
    (N,) in [0, A), reward, terminated, episode (N,). Truncated steps stay, with their next_obs, not terminated."""
    name, sets, episodes, discrete = args.dataset_id, [], [], hasattr(Agent, "discrete")
    try:
        for part in [name] if Path(name).exists() else name.split("+"):
            sets.append(None if part.endswith(".hdf5") else find(part))
            for i, episode in enumerate(read_d4rl(part) if sets[-1] is None else read_minari(sets[-1])):
                obs, next_obs, action, reward, terminated = map(np.asarray, episode)
                found = [x.ndim for x in (obs, reward, terminated, action)], action.dtype.kind in "iu"
                if found != ([2, 1, 1, 2 - discrete], discrete):
                    fail(f"{part} does not hold vectors of observations, {KIND[discrete]} actions, numbers as rewards")
                if len({len(x) for x in (obs, next_obs, action, reward, terminated)}) > 1:
                    fail(f"{part}: episode {i} needs one observation more than its {len(action)} actions")
                if not all(np.isfinite(x).all() for x in (obs, next_obs, action, reward)):
                    fail(f"{part}: episode {i} holds NaN or inf")
                if len(obs):
                    episodes.append([x.astype(np.float32) for x in (obs, next_obs, action, reward, terminated)])
        lengths = torch.tensor([len(obs) for obs, *_ in episodes], dtype=torch.long)
        if lengths.sum() < args.batch_size:
            fail(f"{name} holds {lengths.sum()} transitions, fewer than --batch-size {args.batch_size}")
        obs, next_obs, action, reward, terminated = (
            torch.from_numpy(np.concatenate(x)).to(args.device) for x in zip(*episodes))
    except Exception as error:
        fail(f"{part} cannot be read: {error or type(error).__name__}")
    act_dim = int(action.max()) + 1 if discrete else action.shape[1]
    data = Task(args, next((x for x in sets if x is not None), None), obs.shape[1], act_dim)
    action = (action - data.shift) / data.scale
    low, high = (0, data.act_dim - 1) if discrete else (-1, 1)
    if (discrete or None in sets and data.spec is None) and not low <= action.min() <= action.max() <= high:
        fail(f"{name} has actions outside [{low}, {high}]: name its environment with --env-id")
    data.obs, data.next_obs, data.reward, data.terminated = obs, next_obs, reward, terminated
    data.action = action.clamp(low, high).to(torch.long if discrete else torch.float32)
    data.episode = torch.arange(len(lengths)).repeat_interleave(lengths).to(args.device)
    return data


def find(name):
    """A Minari dataset by its directory or its id: one that ships, a local one, else one from the hub."""
    shipped = Path(__file__).resolve().parent.parent / "datasets"
    local = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    found = [place for place in (Path(name), shipped / name, local / name) if (place / "data").is_dir()]
    try:
        if not found and (Path(name).exists() or not re.search(r"\w-v\d+$", name)):
            raise ValueError("a directory needs a folder data/, an id a version like -v0")
        if not found:
            huggingface_hub.logging.set_verbosity_error()  # not a line for each retry
            minari.download_dataset(name)
        return minari.MinariDataset((found or [local / name])[0] / "data")
    except Exception as error:
        ships = ", ".join(sorted(str(x.parent.relative_to(shipped)) for x in shipped.glob("**/data"))) or "nothing"
        fail(f"no dataset {name!r} ({error}); {ships} ships here, local sets are looked for in {local}, "
             "`minari list remote` lists the hub, and a directory or a D4RL .hdf5 file will do as well")


def read_minari(dataset):
    """Per episode: obs, next_obs, action, reward, terminated."""
    for episode in dataset.iterate_episodes():
        obs = flat(episode.observations, dataset.observation_space)
        yield obs[:-1], obs[1:], episode.actions, episode.rewards, episode.terminations


def read_d4rl(path):
    """The same of a D4RL file; a timed-out episode loses its last step if there are no next_observations."""
    with h5py.File(path) as file:
        obs, action, reward, terminated, timeout = (
            file[key][()] for key in ("observations", "actions", "rewards", "terminals", "timeouts"))
        whole = "next_observations" in file
        next_obs = file["next_observations"][()] if whole else np.roll(obs, -1, 0)
    ends = np.unique([*np.flatnonzero(terminated.astype(bool) | timeout.astype(bool)) + 1, len(obs)])
    for i, j in zip([0, *ends], ends):
        steps = slice(i, j if whole or terminated[j - 1] else j - 1)
        yield obs[steps], next_obs[steps], action[steps], reward[steps], terminated[steps]


def sample(data, args):
    """B transitions for each seed, drawn with replacement: s, a, r, s_next, d."""
    i = torch.randint(len(data.reward), (args.num_seeds, args.batch_size), device=args.device)
    return data.obs[i], data.action[i], data.reward[i], data.next_obs[i], data.terminated[i]


# --- shared: task ---
REFERENCE = {  # D4RL's returns of a random and an expert policy, d4rl/infos.py
    "HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3), "Walker2d": (1.629008, 4592.3)}
KIND = "bounded continuous", "discrete"  # actions; the second if Agent has an attribute of that name


class Task:
    """Where a policy acts: environment `spec` or None, `obs_dim`, action bounds `shift` +- `scale` (act_dim,), `shift`
    the first of act_dim discrete ones, `reference` returns (random, expert) or NaN, `mean`, `std` (obs_dim,) of obs."""

    def __init__(self, args, dataset=None, obs_dim=None, act_dim=None):
        self.spec, self.obs_space, reference, discrete = None, None, (np.nan, np.nan), hasattr(Agent, "discrete")
        space = gym.spaces.Discrete(act_dim or 1) if discrete else gym.spaces.Box(-1, 1, (act_dim or 1,))
        if dataset is not None:
            self.obs_space, space, known = dataset.observation_space, dataset.action_space, dataset.storage.metadata
            reference = known.get("ref_min_score", np.nan), known.get("ref_max_score", np.nan)
        try:
            if args.env_id or args.eval_episodes and dataset is not None and dataset.env_spec:
                env = gym.make(args.env_id) if args.env_id else dataset.recover_environment(eval_env=True)
                self.spec, self.obs_space, space = env.spec, self.obs_space or env.observation_space, env.action_space
                self.spec.max_episode_steps = env.spec.max_episode_steps or 1000  # an episode has to end
                shape = flat(env.reset(seed=0)[0], self.obs_space).shape
                if len(shape) != 1 or obs_dim not in (None, *shape):
                    raise ValueError(f"its observations have shape {shape}, the data's ({obs_dim or 'any'},)")
                (obs_dim,) = shape
            if obs_dim is None:
                raise ValueError("no --env-id")
        except Exception as error:
            fail(f"no environment to act in ({error}): install it, name another with --env-id, or --eval-episodes 0")
        if discrete and isinstance(space, gym.spaces.Discrete):
            self.act_dim, bounds = int(space.n), (int(space.start), 1)
        elif (not discrete and isinstance(space, gym.spaces.Box) and space.is_bounded() and len(space.shape) == 1
                and act_dim in (None, *space.shape)):
            self.act_dim, bounds = len(space.low), ((space.high + space.low) / 2, (space.high - space.low) / 2)
        else:
            fail(f"{METHOD} needs {KIND[discrete]} actions that fit the data, not {space}")
        dtype, self.obs_dim = torch.long if discrete else torch.float32, obs_dim
        self.shift, self.scale = (torch.tensor(x, dtype=dtype, device=args.device) for x in bounds)
        self.mean, self.std = torch.zeros(obs_dim, device=args.device), torch.ones(obs_dim, device=args.device)
        self.reference = REFERENCE.get(self.spec and self.spec.name, reference)


def flat(obs, space):
    """Observations as vectors (..., obs_dim): of a Dict the entries that the data has, in the order of their keys."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flat(obs[key], space[key]) for key in sorted(space)], -1)
    return np.asarray(obs, np.float32)


def draw_seed(*key):
    """A seed for one stream of random numbers, fixed by the integers of its key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# --- shared: evaluation ---
class RawPolicy(nn.Module):
    """From raw observations, (B, obs_dim) or (S, B, obs_dim), to environment actions (S, B, act_dim), on the CPU."""

    def __init__(self, policy, S, task):
        super().__init__()
        self.policy, self.S = deepcopy(policy).cpu(), S
        for name in ("mean", "std", "shift", "scale"):
            self.register_buffer(name, getattr(task, name).cpu())
        self.eval().requires_grad_(False)

    def forward(self, obs):
        s = (obs - self.mean) / self.std
        return self.shift + self.scale * self.policy(s.expand(self.S, *s.shape[-2:]))


def export(policy):
    """RawPolicy as a .pt2 file: `torch.export.load(path).module()` maps obs (B, obs_dim) to actions (S, B, act_dim)."""
    buffer, example, batch = io.BytesIO(), torch.zeros(2, len(policy.mean)), {0: torch.export.Dim("B")}
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=(batch,)), buffer)
    return buffer.getvalue()


@functools.lru_cache(1)
def environments(spec, n):
    return [gym.make(pickle.loads(spec), disable_env_checker=True) for _ in range(n)]


@torch.no_grad()
def evaluate(policy, spec, obs_space, update, seeds, alive, gamma, reference):
    """Rows of eval.csv for the agents `alive`: each acts in the n episodes that begin with its seeds (S, n)."""
    policy, (S, n), (low, high) = pickle.loads(policy), seeds.shape, reference
    envs, running, sums = environments(spec, S * n), np.repeat(alive, n), np.zeros((3, S * n))
    obs = np.stack([flat(env.reset(seed=int(seed))[0], obs_space) for env, seed in zip(envs, seeds.flat)])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seeds[0, 0]))
        while running.any():
            action = policy(torch.from_numpy(obs).view(S, n, -1)).flatten(0, 1).numpy()
            for i in np.flatnonzero(running):
                next_obs, reward, terminated, truncated, _ = envs[i].step(action[i])
                obs[i], running[i] = flat(next_obs, obs_space), not (terminated or truncated)
                sums[:, i] += reward, gamma ** sums[2, i] * reward, 1
    total, discounted, length = sums.reshape(3, S, n)
    mean, std = total.mean(1), total.std(1)
    rows = np.stack([mean, std, discounted.mean(1), length.mean(1), 100 * (mean - low) / (high - low)], 1).tolist()
    return [[update, k, n, *row] for k, row in enumerate(rows) if alive[k]]


def start_worker():
    """A worker keeps to one core and ends with its parent, however that ends."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


# --- shared: run ---
METHOD = Path(__file__).stem


def fail(message, status=2):
    """One sentence on standard error, then the end."""
    sys.stderr.write(f"{METHOD}: {' '.join(message.split())}\n")
    raise SystemExit(status)


def check(args):
    """Args with what --resume and --device stand for filled in; impossible ones end the run."""
    args, saved = replace(args), {}
    try:
        saved = json.loads(Path(args.resume, "args.json").read_text()) if args.resume else {}
    except (OSError, ValueError) as error:
        fail(f"--resume {args.resume} is no directory of a run: {error}")
    if saved and saved.keys() != vars(args).keys():
        fail(f"--resume {args.resume} holds a run of another method than {METHOD}")
    typed = {word.split("=")[0].lstrip("-").replace("-", "_") for word in sys.argv[1:]}
    for name, was in saved.items():
        if getattr(args, name) == getattr(Args, name) and name not in typed:
            setattr(args, name, was)
        free = ["resume", "device", "eval_workers", "track"] + ["num_updates"] * (not hasattr(Agent, "schedule"))
        if getattr(args, name) != was and name not in free:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} cannot replace the {was} of {args.resume}")
    for name, value in vars(args).items():
        least = name not in ("seed", "eval_episodes", "eval_workers")
        fraction = re.fullmatch("gamma|tau|expectile|dropout|threshold|real_ratio|slip|beta_decay|.*epsilon", name)
        top = 1 if fraction else 1e9 * bool(value is not None and re.fullmatch("alpha|beta|cql_.*|penalty", name))
        if (type(value) is int and type(getattr(Args, name)) is not float and not least <= value < 2**63
                or top and not 0 <= value <= top or name.endswith(("_lr", "_rate")) and not value > 0):
            fail(f"--{name.replace('_', '-')} cannot be {value}")
    cuda = torch.cuda.is_available()
    args.device = ("cuda" if cuda else "cpu") if args.device == "auto" else args.device
    if args.device not in ["cpu"] + ["cuda"] * cuda + [f"cuda:{i}" for i in range(torch.cuda.device_count())]:
        fail(f"--device {args.device} is not here: it can be {'cuda, ' * cuda}cpu or auto")
    if args.device != "cpu":
        torch.cuda.set_device(torch.device(args.device).index or 0)
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(args.seed)
    return args


class Run:
    """The directory of a run: `log` follows each call of update, `finish` the last."""

    KEPT = "update", "logged", "seconds", "alive", "evals", "losses", "pending"  # in the checkpoint

    def __init__(self, args, agent, task, total):
        self.args, self.agent, self.task, per_call = args, agent, task, agent.updates_per_call
        self.total, self.every, self.log_every = (-(-n // per_call) * per_call for n in (total, args.eval_every, 1000))
        self.update = self.logged = self.signal = self.seconds = 0
        self.alive, self.evals, self.losses, self.pending, self.jobs = [True] * args.num_seeds, {}, [], {}, {}
        name = re.sub("[/+]+", "-", getattr(args, "dataset_id", args.env_id))[-80:].strip("-.")
        self.dir = Path(args.resume or Path(args.out_dir) / f"{name}__{METHOD}__{args.seed}__{time.time_ns() // 10**6}")
        if (self.dir / "checkpoint.pt").exists():
            self.restore()
        self.good, self.saved = [(x, x.clone()) for x in self.tensors()], self.update
        self.began = time.time() - self.seconds
        if args.track:
            import wandb
            try:
                name = self.dir.resolve().name
                wandb.init(project=args.wandb_project_name, id=name, config=vars(args), resume="allow")
                wandb.define_metric("*", step_metric="update")
            except Exception as error:
                fail(f"--track: {error}")
        self.write("args.json", json.dumps({**vars(args), "resume": ""}, indent=1))
        self.track = wandb.log if args.track else lambda row: None
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(args.eval_workers, spawn, start_worker) if args.eval_workers else None
        self.others = set(multiprocessing.active_children())
        self.handlers = {n: signal.signal(n, self.interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=self.total, initial=self.update, desc=METHOD, unit=" updates",
                        mininterval=0.2 if sys.stderr.isatty() else 20)
        if args.eval_episodes and not task.spec:
            tqdm.write(f"{METHOD}: the data names no environment, so nothing is evaluated without --env-id", sys.stderr)
        for update in self.pending:
            self.submit(update)

    def interrupt(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def log(self, losses):
        """Counts a call of update; now and then looks at its losses {name: (S,)}, evaluates and saves."""
        self.update += self.agent.updates_per_call
        self.bar.update(self.agent.updates_per_call)
        point = self.update % self.every == 0 or self.update >= self.total
        if point or self.signal or self.update % self.log_every == 0:
            self.seconds = time.time() - self.began
            self.examine({name: loss.tolist() for name, loss in losses.items()})
            if point and self.args.eval_episodes and self.task.spec and any(self.alive):
                policy = RawPolicy(self.agent.policy, self.args.num_seeds, self.task)
                self.pending[self.update] = list(self.alive), policy.state_dict()
                self.submit(self.update)
            self.collect()
        if point or self.signal or not any(self.alive):
            self.save()

    def tensors(self):
        """The agent's weights and moments, which have a seed dimension."""
        found = [v for opt in self.agent.optimizers.values() for state in opt.state.values() for v in state.values()]
        found += [p.data for module in self.agent.modules.values() for p in module.parameters()]
        return [x for x in found if x.dim() and len(x) == self.args.num_seeds]

    def examine(self, losses):
        """Notes the losses; a seed that is not finite is named and left out, and its last saved state is kept."""
        finite = torch.stack([x.reshape(len(x), -1).isfinite().all(1) for x in self.tensors()]).all(0).tolist()
        for k in np.flatnonzero(self.alive):
            bad = [f"{name} is {x[k]}" for name, x in losses.items() if not np.isfinite(x[k])]
            if bad or not finite[k]:
                self.alive[k] = False
                tqdm.write(f"seed {k}: {(bad or ['a weight is not finite'])[0]} between updates {self.logged} and "
                           f"{self.update}; it is left out, its state of update {self.saved} is kept", sys.stderr)
            else:
                self.losses += [f"{self.update},{k},{name},{x[k]:.6g}" for name, x in losses.items()]
        self.track({"update": self.update, **{f"losses/{name}": np.mean(x) for name, x in losses.items()}})
        self.logged = self.update

    def submit(self, update):
        """Hands an evaluation to a worker, or does it here."""
        args, task, (alive, weights) = self.args, self.task, self.pending[update]
        policy, shape = RawPolicy(self.agent.policy, args.num_seeds, task), (args.num_seeds, args.eval_episodes)
        policy.load_state_dict(weights)
        seeds = np.reshape([draw_seed(args.seed, update, *i) for i in np.ndindex(shape)], shape)
        job = (evaluate, pickle.dumps(policy), pickle.dumps(task.spec), task.obs_space,
               update, seeds, alive, args.gamma, task.reference)
        handlers = {n: signal.signal(n, signal.SIG_IGN) for n in self.handlers}  # a worker inherits it
        try:
            self.jobs[update] = self.pool.submit(*job) if self.pool else functools.partial(*job)
        except BrokenExecutor as error:
            self.jobs[update] = Future()
            self.jobs[update].set_exception(error)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def collect(self):
        """Takes in the evaluations that are done."""
        for update in [update for update, job in self.jobs.items() if not self.pool or job.done()]:
            job = self.jobs.pop(update)
            try:
                self.evals[update] = job.result() if self.pool else job()
            except Exception as error:
                self.save()
                self.close(f"the evaluation of update {update} failed ({error!r}); go on with --resume {self.dir}", 1)
            del self.pending[update]
            self.bar.set_postfix_str(self.summary())
            mean = np.mean(self.evals[update], 0)
            self.track({"update": update, "eval/return": mean[3], "eval/score": mean[7]})

    def summary(self):
        """The last evaluation: mean and deviation over seeds, of a single seed over its episodes."""
        rows, (low, high) = np.array(self.evals[max(self.evals)]), self.task.reference
        spread = rows[:, 3].std() if len(rows) > 1 else rows[0, 4]
        score = f", normalised score {rows[:, 7].mean():.1f} ± {100 * spread / (high - low):.1f}" if high > low else ""
        return f"return {rows[:, 3].mean():.1f} ± {spread:.1f}{score}"

    def write(self, name, content):
        """A file of the directory is there whole or, after a failure, as it was before."""
        part = self.dir / (name + ".part")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content if isinstance(content, bytes) else content.encode())
            part.replace(self.dir / name)
        except OSError as error:
            os.path.exists(part) and part.unlink()
            end = self.close if hasattr(self, "bar") else fail
            end(f"{self.dir / name} cannot be written ({error}); what was there before is kept", 2)

    def save(self):
        """Brings all files up to date, seeds that are left out as they were last saved; ends the run if it has to."""
        for x, good in self.good:
            for k in np.flatnonzero(np.invert(self.alive)):
                x[k] = good[k]
        self.good, self.saved = [(x, x.clone()) for x in self.tensors()], self.update
        rows = ["%d,%d,%d,%.4f,%.4f,%.4f,%.4f,%.4f" % tuple(row) for u in sorted(self.evals) for row in self.evals[u]]
        head = "update,seed,episodes,return_mean,return_std,discounted_return_mean,length_mean,score"
        self.write("eval.csv", "\n".join([head, *rows, ""]).replace("nan", ""))
        self.write("losses.csv", "\n".join(["update,seed,name,value", *self.losses, ""]))
        git = subprocess.getstatusoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
        cpu = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
        used = {x: sys.modules[x] for x in ("torch", "numpy", "gymnasium", "minari", "mujoco") if x in sys.modules}
        self.write("run.json", json.dumps({
            "method": METHOD, "commit": None if git[0] else git[1], "python": platform.python_version(),
            **{name: module.__version__ for name, module in used.items()},
            "gpu": torch.cuda.get_device_name() if self.args.device != "cpu" else None,
            "cpu": f"{os.cpu_count()} x {(cpu or [platform.machine()])[0]}", "threads": torch.get_num_threads(),
            "update": self.update, "wall_seconds": round(self.seconds, 2),
            "updates_per_second": round(self.update / self.seconds, 2)}, indent=1))
        buffer = io.BytesIO()
        torch.save({
            "method": METHOD, "args": vars(self.args), **{name: getattr(self, name) for name in self.KEPT},
            "modules": {name: module.state_dict() for name, module in self.agent.modules.items()},
            "optimizers": {name: opt.state_dict() for name, opt in self.agent.optimizers.items()},
            "rng": [torch.get_rng_state(), torch.cuda.get_rng_state() if self.args.device != "cpu" else None],
            "stats": {name: getattr(self.task, name) for name in ("mean", "std", "shift", "scale")}}, buffer)
        self.write("checkpoint.pt", buffer.getvalue())
        if self.signal:
            self.close(f"stopped at update {self.update}; go on with --resume {self.dir}", 128 + self.signal)
        if not any(self.alive):
            self.close(f"no seed is finite any more; the last good state is in {self.dir}", 1)

    def restore(self):
        """Takes up checkpoint.pt, in which evaluations that were in flight are `pending` and run again."""
        try:
            state = torch.load(self.dir / "checkpoint.pt", map_location=self.args.device, weights_only=True)
            if state["method"] != METHOD:
                raise ValueError(f"it is of {state['method']}")
            for kind, parts in ("modules", self.agent.modules), ("optimizers", self.agent.optimizers):
                for name, part in parts.items():
                    part.load_state_dict(state[kind][name])
            for opt in self.agent.optimizers.values():
                opt.param_groups[0]["capturable"] = self.args.device != "cpu"
            torch.set_rng_state(state["rng"][0].cpu())
            if self.args.device != "cpu" and state["rng"][1] is not None:
                torch.cuda.set_rng_state(state["rng"][1].cpu())
            for name in self.KEPT:
                setattr(self, name, state[name])
        except Exception as error:
            fail(f"--resume: {self.dir / 'checkpoint.pt'} cannot be used: {str(error).split('. ')[0]}")

    def finish(self):
        """Waits for the last evaluations, saves, exports policy.pt2."""
        while self.jobs and not self.signal:
            self.collect()
            time.sleep(0.02)
        self.save()
        self.write("policy.pt2", export(RawPolicy(self.agent.policy, self.args.num_seeds, self.task)))
        self.close(f"{self.summary() if self.evals else 'done'} after {self.update} updates; files in {self.dir}")
        return self.dir

    def close(self, message, status=0):
        """Ends the workers and says what there is to say; a status other than 0 ends the process."""
        self.bar.close()
        for worker in set(multiprocessing.active_children()) - self.others if status else []:
            worker.kill()
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        print(f"{METHOD}: {message}", file=sys.stderr if status else sys.stdout, flush=True)
        if status:
            raise SystemExit(status)


# --- data: imagined steps ---
class Replay(nn.Module):
    """The last N imagined steps of each agent: s, s_next (S, N, obs_dim), a (S, N, act_dim), r, d (S, N)."""

    def __init__(self, S, N, obs_dim, act_dim):
        super().__init__()
        for name, size in ("s", [obs_dim]), ("a", [act_dim]), ("r", []), ("s_next", [obs_dim]), ("d", []):
            self.register_buffer(name, torch.zeros(S, N, *size))
        self.register_buffer("count", torch.zeros(S, dtype=torch.long))  # steps that were added

    def state_dict(self, **_):  # the steps made so far
        n = self.count.max()
        return {name: x[:, :n].clone() if x.dim() > 1 else x.clone() for name, x in self.named_buffers()}

    def load_state_dict(self, state):
        for name, x in self.named_buffers():
            (x[:, : state["s"].shape[1]] if x.dim() > 1 else x).copy_(state[name])

    def add(self, valid, *steps):
        """Adds those of (S, B) steps s, a, r, s_next, d that are `valid`."""
        k, j = valid.nonzero(as_tuple=True)
        i = (self.count.unsqueeze(1) + valid.cumsum(1) - 1)[k, j] % self.r.shape[1]
        for buffer, x in zip(self.buffers(), steps):
            buffer[k, i] = x[k, j].to(buffer.dtype)
        self.count += valid.sum(1)

    def sample(self, B):  # s, a, r, s_next, d, each (S, B, .) or (S, B)
        S, N = self.r.shape
        size = self.count.clamp(max=N).unsqueeze(1)
        i = (torch.rand(S, B, dtype=torch.float64, device=size.device) * size).long()
        k = torch.arange(S, device=i.device).unsqueeze(1)
        return self.s[k, i], self.a[k, i], self.r[k, i], self.s_next[k, i], self.d[k, i]


def split(N, args):
    """Rows of the data for each seed: hold-out (S, H), training (S, n), a resample of it for each network (S, E, n)."""
    H, found = min(N // 5, 1000), []
    for k in range(args.num_seeds):
        rng = torch.Generator().manual_seed(draw_seed(args.seed, k))
        holdout, train = torch.randperm(N, generator=rng).split([H, N - H])
        found.append((holdout, train, train[torch.randint(N - H, (args.num_models, N - H), generator=rng)]))
    return [torch.stack(x).to(args.device) for x in zip(*found)]


# --- main: two phases ---
@torch.no_grad()
def model_return(agent, seed):
    """What the policy's mode earns in the model from where at most 64 episodes begin, without penalty (S,). They end as
    in the environment, or where the model leaves the finite numbers."""
    task, elites, rng = agent.data.spec, agent.elites(), torch.Generator(agent.args.device).manual_seed(seed)
    s = agent.start
    running = torch.ones_like(s[..., 0], dtype=torch.bool)
    total = torch.zeros_like(s[..., 0], dtype=torch.float64)
    for _ in range(task.max_episode_steps):
        r, s, _ = imagine(agent.dynamics_best, elites, s, agent.actor(s), rng)
        running &= (r + s.sum(-1)).isfinite()
        total += torch.where(running, r, 0)
        running &= ~terminated(task.name, s)
        if not running.any():
            break
    return total.mean(-1)


def main(args):
    """Fits the model, then trains, evaluates, saves; returns the run's directory."""
    args = check(args)
    data = load(args)
    prepare(data, args)
    agent = Agent(args, data.obs_dim, data.act_dim, data)
    run = Run(args, agent, data, args.num_updates)
    if not run.update:
        fit(run, agent)
    update = cuda_graph(agent)
    while run.update < run.total:
        if run.update % args.rollout_every == 0:
            agent.rollout()
        losses, now = update(), run.update + 1
        if now % run.every == 0 or now == run.total:
            losses = {**losses, "model_return": model_return(agent, draw_seed(args.seed, now))}
        run.log(losses)
    return run.finish()


def fit(run, agent):
    """Fits the model and saves it; after a signal saves as far as the fit has come, which ends the run."""
    began, fitted = time.time(), agent.fitted
    for _ in agent.fit():
        run.bar.set_postfix_str(f"model: epoch {fitted.epoch:.0f}, hold-out error {fitted.error.mean():.3g}")
        if run.signal:
            break
    errors = ", ".join(f"{x:.3g}" for x in fitted.error.gather(1, agent.elites()).mean(1).tolist())
    tqdm.write(f"{METHOD}: {fitted.epoch:.0f} epochs of the model in {time.time() - began:.0f} s, "
               f"hold-out error of each seed's elites {errors}", sys.stderr)
    run.began += time.time() - began  # the seconds in run.json are the policy's
    run.seconds = time.time() - run.began
    run.examine({})
    run.save()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(tyro.cli(Args))
