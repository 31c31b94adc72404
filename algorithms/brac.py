# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""BRAC: Behavior Regularized Offline Reinforcement Learning.
Wu, Tucker & Nachum, 2019. https://arxiv.org/abs/1911.11361

The behaviour policy beta is cloned first and stays as it is; a divergence D(s) of pi from it is subtracted from Q:

    L_beta  = E[ alpha_beta log beta(b|s) - log beta(a|s) ],   b ~ beta(s)
    y       = r + gamma (1 - d) (min_j Q'_j(s', a') - alpha D(s')),   a' ~ pi(s');   without D: BRAC-p, the default
    L_Q     = E[ sum_j (Q_j(s, a) - y)^2 ]
    L_pi    = E[ alpha D(s) - min_j Q_j(s, a_0) ],   a_i ~ pi(s),   b_i ~ beta(s)
    L_alpha = -alpha E[ D(s) - target ],   L_alpha_beta = -alpha_beta E[ log beta(b|s) + H ],   H = -dim(A)
    D       = mean log pi(a_i|s) - mean log beta(a_i|s)   over n draws, which is KL(pi || beta):          kl, the row's
              mean log g(s, a_i) - mean g(s, b_i) + 1,   g = log(1 + exp c), which is at most KL:         kl_dual
              mean k(a_i, a_j) - 2 mean k(a_i, b_j) + mean k(b_i, b_j),   k = exp(-|x - y|_1 / 20):       mmd, squared
    L_c     = E[ -D(s) + 5 max(0, |grad_x c(s, x)| - 1)^2 ],   x at random between a_0 and b_0:           kl_dual

    python algorithms/brac.py --num-seeds 2 --num-updates 10000 --clone-updates 10000 --warmup 2000 --actor-lr 3e-4

Departs from the paper: as its code a warm-up without Q, b_i of beta in kl_dual; unlike it PyTorch's initial weights.
Shapes: S seeds, B batch, E critics, n draws. The S seeds train side by side and never interact.
"""
import copy
import math
from dataclasses import dataclass
from typing import Literal

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
    batch_size: int = 256  # transitions per agent and update
    actor_lr: float = 3e-5  # of Adam, actor; the authors' README 3e-4
    critic_lr: float = 1e-3  # of Adam, critic and c
    alpha_lr: float = 1e-5  # of Adam, alpha; their README 1e-3
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target networks
    hidden_dim: int = 300  # units in each of two hidden layers of Q and c; pi and beta have two thirds
    # --- BRAC ---
    value_penalty: bool = False  # D in y as well: BRAC-v
    divergence: Literal["kl", "kl_dual", "mmd"] = "kl"  # D
    alpha: float = 1.0  # weight of D, at first; their README 0.1
    target_divergence: float | None = None  # alpha climbs while D is above it; without it alpha stays as it is
    num_draws: int = 4  # n, actions of pi and of beta for each s in D
    warmup: int = 20_000  # updates at first in which the actor sees D alone
    clone_updates: int | None = None  # gradient steps of beta; without it num_updates
    clone_lr: float = 5e-4  # of Adam, beta and alpha_beta


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
    """Twin Q(s, a); c(s, a) is one with E = 1."""

    def __init__(self, S, obs_dim, act_dim, d_hidden, E=2):
        super().__init__()
        self.net = mlp((S, E), obs_dim + act_dim, d_hidden, d_hidden, 1)

    def forward(self, s, a):  # (S, B, .) -> (S, E, B)
        return self.net(torch.cat([s, a], -1).unsqueeze(1)).squeeze(-1)


class Actor(nn.Module):
    """Gaussian policy squashed by tanh: pi, or beta."""

    def __init__(self, S, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.net = mlp((S,), obs_dim, d_hidden, d_hidden, 2 * act_dim)

    def forward(self, s):  # mode: (S, B, obs_dim) -> (S, B, act_dim)
        return torch.tanh(self.net(s).chunk(2, -1)[0])

    def sample(self, s):  # -> a (S, B, act_dim), log_prob (S, B)
        mean, log_std = self.normal(s)
        u = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(u), self.density(u, mean, log_std)

    def log_prob(self, s, a):  # of actions from elsewhere, off the bounds, where it would be infinite: (S, B)
        return self.density(torch.atanh(a.clamp(-1 + 1e-3, 1 - 1e-3)), *self.normal(s))

    def normal(self, s):  # mean, log_std before tanh, log_std in [-5, 0]
        mean, log_std = self.net(s).chunk(2, -1)
        return mean, -5 + 2.5 * (torch.tanh(log_std) + 1)

    def density(self, u, mean, log_std):  # log N(u) - log (1 - tanh(u)^2), finite for every u: (S, B)
        log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
        return (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class Multiplier(nn.Module):
    def __init__(self, S, start):
        super().__init__()
        self.value = nn.Parameter(torch.full((S,), start))

    def forward(self):  # (S, 1)
        return self.value.unsqueeze(-1)


# --- divergences: each returns D(s), (S, B) ---
def kl(s, n, actor, behaviour, c):
    """mean log pi(a_i|s) - mean log beta(a_i|s)"""
    s_rep = s.repeat(1, n, 1)  # (S, n B, obs_dim)
    a, log_prob = actor.sample(s_rep)
    return (log_prob - behaviour.log_prob(s_rep, a)).unflatten(1, (n, -1)).mean(1)


def kl_dual(s, n, actor, behaviour, c):
    """mean log g(s, a_i) - mean g(s, b_i) + 1,  g = log(1 + exp c);  at g = pi / beta it is KL(pi || beta)"""
    s_rep = s.repeat(1, n, 1)  # (S, n B, obs_dim)
    g_a, g_b = (F.softplus(c(s_rep, net.sample(s_rep)[0])).squeeze(1) for net in (actor, behaviour))  # (S, n B)
    return ((g_a + 1e-8).log() - g_b + 1).unflatten(1, (n, -1)).mean(1)


def mmd(s, n, actor, behaviour, c):
    """mean k(a_i, a_j) - 2 mean k(a_i, b_j) + mean k(b_i, b_j) over all n^2 pairs,  k(x, y) = exp(-|x - y|_1 / 20)"""
    def mean_k(x, y):  # (S, n, B, act_dim) -> (S, B)
        return (-(x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(-1) / 20).exp().mean((1, 2))
    a, b = (net.sample(s.repeat(1, n, 1))[0].unflatten(1, (n, -1)) for net in (actor, behaviour))
    return mean_k(a, a) - 2 * mean_k(a, b) + mean_k(b, b)


DIVERGENCES = {"kl": kl, "kl_dual": kl_dual, "mmd": mmd}


# --- losses: each returns one value per seed, (S,) ---
def behaviour_loss(behaviour, alpha, batch):
    """L_beta = E[ alpha_beta log beta(b|s) - log beta(a|s) ],  b ~ beta(s); and log beta(b|s) (S, B)"""
    s, a, *_ = batch
    _, log_prob = behaviour.sample(s)
    return (alpha().detach() * log_prob - behaviour.log_prob(s, a)).mean(-1), log_prob.detach()


def critic_loss(critic, critic_target, nets, alpha, batch, args):
    """L_Q = E[ sum_j (Q_j(s, a) - y)^2 ],  y = r + gamma (1 - d) (min_j Q'_j(s', a') - alpha D(s')),  a' ~ pi(s')"""
    s, a, r, s_next, d = batch
    with torch.no_grad():
        v_next = critic_target(s_next, nets[0].sample(s_next)[0]).amin(1)  # (S, E, B) -> (S, B)
        if args.value_penalty:
            v_next = v_next - alpha() * DIVERGENCES[args.divergence](s_next, args.num_draws, *nets)
        y = r + args.gamma * (1 - d) * v_next
    return (critic(s, a) - y.unsqueeze(1)).square().sum(1).mean(-1)


def actor_loss(critic, nets, alpha, count, batch, args):
    """L_pi = E[ alpha D(s) - min_j Q_j(s, a_0) ]; and D(s) (S, B)"""
    s, *_ = batch
    distance = DIVERGENCES[args.divergence](s, args.num_draws, *nets)
    q = critic(s, nets[0].sample(s)[0]).amin(1) * (count >= args.warmup)  # (S, B)
    return (alpha().detach() * distance - q).mean(-1), distance.detach()


def alpha_loss(alpha, excess):
    """L_alpha = -alpha E[ D(s) - target ];  L_alpha_beta = -alpha_beta E[ log beta(b|s) + H ]"""
    return (-alpha() * excess).mean(-1)


def c_loss(nets, s, args):
    """L_c = E[ -D(s) + 5 max(0, |grad_x c(s, x)| - 1)^2 ],  x at random between a_0 and b_0"""
    a, b = (net.sample(s)[0].detach() for net in nets[:2])
    x = (a + torch.rand_like(a[..., :1]) * (b - a)).requires_grad_()
    (grad,) = torch.autograd.grad(nets[2](s, x).sum(), x, create_graph=True)
    slope = (grad.square().sum(-1) + 1e-8).sqrt()  # (S, B)
    return (5 * F.relu(slope - 1).square() - kl_dual(s, args.num_draws, *nets)).mean(-1)


# --- agent ---
def prepare(data, args):
    """Observations and rewards stay as they are."""


class Agent(nn.Module):
    least = {"warmup": 0}

    def __init__(self, args, obs_dim, act_dim, data):
        super().__init__()
        self.args, self.data, self.updates_per_call, S = args, data, 1, args.num_seeds
        self.actor = self.policy = Actor(S, obs_dim, act_dim, max(1, 2 * args.hidden_dim // 3))
        self.behaviour = Actor(S, obs_dim, act_dim, max(1, 2 * args.hidden_dim // 3))
        self.critic = Critic(S, obs_dim, act_dim, args.hidden_dim)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.c = Critic(S, obs_dim, act_dim, args.hidden_dim, 1)
        self.alpha, self.alpha_beta = Multiplier(S, args.alpha), Multiplier(S, 1.0)
        self.actor_opt, self.critic_opt = adam(self.actor, args.actor_lr), adam(self.critic, args.critic_lr)
        self.c_opt, self.alpha_opt = adam(self.c, args.critic_lr), adam(self.alpha, args.alpha_lr)
        self.beta_opt, self.alpha_beta_opt = (adam(x, args.clone_lr) for x in (self.behaviour, self.alpha_beta))
        self.clone_updates = args.num_updates if args.clone_updates is None else args.clone_updates
        self.register_buffer("cloned", torch.zeros(()))  # updates of beta
        self.register_buffer("count", torch.zeros(()))  # updates

    def update(self):
        args, batch, nets = self.args, sample(self.data, self.args), (self.actor, self.behaviour, self.c)
        l_q = critic_loss(self.critic, self.critic_target, nets, self.alpha, batch, args)
        step(self.critic_opt, l_q)
        l_pi, distance = actor_loss(self.critic, nets, self.alpha, self.count, batch, args)
        step(self.actor_opt, l_pi)
        for _ in range(3 if args.divergence == "kl_dual" else 0):
            step(self.c_opt, c_loss(nets, sample(self.data, args)[0], args))
        if args.target_divergence is not None:
            step(self.alpha_opt, alpha_loss(self.alpha, distance - args.target_divergence))
            self.alpha.value.data.clamp_(0, 500)
        self.count += 1
        polyak(self.critic_target, self.critic, args.tau)
        return {"critic_loss": l_q, "actor_loss": l_pi, "divergence": distance.mean(-1), "alpha": self.alpha.value}


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


# --- main: cloning first ---
def clone(agent):
    """An update of beta."""
    batch = sample(agent.data, agent.args)
    l_beta, log_prob = behaviour_loss(agent.behaviour, agent.alpha_beta, batch)
    step(agent.beta_opt, l_beta)
    step(agent.alpha_beta_opt, alpha_loss(agent.alpha_beta, log_prob - batch[1].shape[-1]))
    agent.alpha_beta.value.data.clamp_(0)
    agent.cloned += 1
    return {"behaviour_loss": l_beta}  # (S,)


def main(args):
    """Clones, then trains, evaluates, saves; returns the run's directory."""
    setup(args)
    with torch.device(args.device):
        data = load(args)
        prepare(data, args)
        agent = Agent(args, data.obs_dim, data.act_dim, data)
    phases = functools.partial(clone, agent), agent.update
    if args.device != "cpu":
        phases = [cuda_graph(phase).__next__ for phase in phases]
    run, n = Run(args, agent, data, args.num_updates), agent.clone_updates
    for i in range(int(agent.cloned), 0 if run.update else n):  # a resumed run goes on where it was
        losses = phases[0]()
        if i % 100 == 0:
            run.bar.set_postfix_str(f"cloning: {i} of {n}")
        if i + 1 == n:
            run.log(losses)
        if run.stop:
            break
        if time.time() - run.saved > 60:
            run.save()
    return train(run, phases[1])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
