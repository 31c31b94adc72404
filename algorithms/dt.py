# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19", "matplotlib>=3.9", "pytest>=8.3"]
# ///
"""DT: Decision Transformer: Reinforcement Learning via Sequence Modeling.
Chen, Lu, Rajeswaran, Lee, Grover, Laskin, Abbeel, Srinivas & Mordatch, NeurIPS 2021. https://arxiv.org/abs/2106.01345

    tokens  R_1, s_1, a_1, R_2, s_2, a_2, ...,   R_t = sum_{k >= t} r_k   (the return to go, `rtg`)
    L_pi  = E[ (pi(R_i, s_i, a_i, ..., R_t, s_t) - a_t)^2 ],   i >= t - K + 1
    acting: R_1 = the return asked for,   R_{t+1} = R_t - r_t

    python algorithms/dt.py --dataset-id hopper/medium-v0 --num-seeds 2 --num-updates 5000 --warmup 500 --sweep

Departs from the paper: the return asked for is by default the data's best, not a constant of the environment. Windows
are padded at their end, not their start: position is the timestep's alone, and causality hides what comes after. The
timestep's table is as long as the data's longest episode; later steps share its last entry. An episode that is cut off
counts with the return that it has.
Shapes: S seeds, B batch, T steps of a window, at most K (`context`), L tokens, H heads, d `hidden_dim`, N transitions.
The S seeds train side by side and never interact.
"""
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
    num_updates: int = 100_000  # gradient steps of each agent
    eval_every: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on; 0: in line
    device: str = "auto"  # cuda, cpu, or auto: cuda where there is one
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    batch_size: int = 64  # windows per agent and update
    learning_rate: float = 1e-4  # of AdamW, after the warm-up
    warmup: int = 10_000  # updates in which the rate rises from 0
    weight_decay: float = 1e-4  # of all weights
    max_norm: float = 0.25  # bound on the norm of an agent's gradient
    gamma: float = 0.99  # of the discounted return in eval.csv; returns to go are not discounted
    hidden_dim: int = 128  # d, width of a token
    # --- DT ---
    context: int = 20  # K, steps that the policy looks back on, the current one among them
    num_layers: int = 3  # transformer blocks
    num_heads: int = 1  # of attention; divides hidden_dim
    dropout: float = 0.1  # of embeddings, attention weights and residual branches
    return_scale: float = 1000.0  # returns to go are divided by it
    target_return: float | None = None  # asked for in evaluations; none: the data's best
    # The paper's: Hopper 3600 and 1800, HalfCheetah 12000 and 6000, Walker2d 5000 and 2500.
    sweep: bool = False  # at the end, also ask for 7 returns from the data's worst to beyond its best: targets.csv


# --- networks ---
class Linear(nn.Module):
    """`nn.Linear` for many independent networks at once: weight (S, d_in, d_out)."""

    def __init__(self, S, d_in, d_out):
        super().__init__()
        bound = d_in**-0.5  # the bound nn.Linear draws from
        self.weight = nn.Parameter(torch.empty(S, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(S, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):  # (S, B, L, d_in) -> (S, B, L, d_out)
        return (x.flatten(1, 2) @ self.weight + self.bias).unflatten(1, x.shape[1:3])


class LayerNorm(nn.Module):
    """`nn.LayerNorm` likewise."""

    def __init__(self, S, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(S, 1, 1, d))
        self.bias = nn.Parameter(torch.zeros(S, 1, 1, d))

    def forward(self, x):  # (S, B, L, d)
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class Block(nn.Module):
    """GPT-2's: x + attention(norm(x)), then x + mlp(norm(x)), of which the tokens `rows` are asked for."""

    def __init__(self, S, args):
        super().__init__()
        d, self.H, self.dropout = args.hidden_dim, args.num_heads, args.dropout
        self.norm_1, self.norm_2 = LayerNorm(S, d), LayerNorm(S, d)
        self.query, self.key_value, self.out = Linear(S, d, d), Linear(S, d, 2 * d), Linear(S, d, d)
        self.mlp = nn.Sequential(Linear(S, d, 4 * d), nn.ReLU(), Linear(S, 4 * d, d))
        for layer in self.query, self.key_value, self.out, self.mlp[0], self.mlp[2]:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.drop = nn.Dropout(args.dropout)

    def forward(self, x, rows, mask):  # (S, B, L, d), mask (rows, L) -> (S, B, rows, d)
        h, x = self.norm_1(x), x[:, :, rows]
        qkv = self.query(h[:, :, rows]), *self.key_value(h).chunk(2, -1)
        q, k, v = (y.flatten(0, 1).unflatten(-1, (self.H, -1)).transpose(1, 2) for y in qkv)  # (S B, H, L, d / H)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout * self.training)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2).view_as(x)))
        return x + self.drop(self.mlp(self.norm_2(x)))


class Actor(nn.Module):
    """pi(R_i, s_i, a_i, ..., R_t, s_t): a transformer over the tokens, read at those of the states."""

    def __init__(self, S, obs_dim, act_dim, T_max, args):
        super().__init__()
        d, self.context, self.return_scale = args.hidden_dim, args.context, args.return_scale
        self.time = nn.Parameter(torch.randn(S, T_max, d))  # one embedding for each timestep, as nn.Embedding draws it
        self.embed_rtg, self.embed_s, self.embed_a = (Linear(S, n, d) for n in (1, obs_dim, act_dim))
        self.norm_in, self.norm_out = LayerNorm(S, d), LayerNorm(S, d)
        self.drop = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(S, args) for _ in range(args.num_layers))
        self.head = Linear(S, d, act_dim)

    def forward(self, rtg, s, a, t):  # (S, B, T), (S, B, T, obs_dim), (S, B, T, act_dim), (S, B, T) -> like a
        S, T_max, _ = self.time.shape
        time = self.time[torch.arange(S, device=t.device).view(S, 1, 1), t.clamp(max=T_max - 1)]  # (S, B, T, d)
        tokens = self.embed_rtg(rtg.unsqueeze(-1) / self.return_scale), self.embed_s(s), self.embed_a(a)
        x = torch.stack([token + time for token in tokens], 3).flatten(2, 3)  # (S, B, L, d), L = 3 T
        x, L = self.drop(self.norm_in(x)), x.shape[2]
        mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()  # itself and what came before
        for i, block in enumerate(self.blocks):
            rows = slice(1, None, 3) if i + 1 == len(self.blocks) else slice(None)  # the others are not read any more
            x = block(x, rows, mask[rows])
        return torch.tanh(self.head(self.norm_out(x)))


# --- losses: each returns one value per seed, (S,) ---
def actor_loss(actor, batch):
    """L_pi = E[ (pi(R_i, s_i, a_i, ..., R_t, s_t) - a_t)^2 ], over the steps that are `valid`"""
    rtg, s, a, t, valid = batch
    error = (actor(rtg, s, a, t) - a).square().mean(-1)  # (S, B, K)
    return (valid * error).sum((-2, -1)) / valid.sum((-2, -1))


# --- data: trajectories ---
def prepare(data, args):
    """Observations to mean 0 and deviation 1; of each step the return to go, timestep and last row of its episode."""
    if args.hidden_dim % args.num_heads:
        fail(f"--num-heads {args.num_heads} does not divide --hidden-dim {args.hidden_dim}")
    if not (args.return_scale > 0 and args.max_norm > 0 and args.weight_decay >= 0):
        fail("--return-scale and --max-norm have to be above 0, --weight-decay not below it")
    if args.dropout == 1 or args.target_return is not None and not abs(args.target_return) < 1e9:
        fail(f"--dropout {args.dropout} with --target-return {args.target_return} cannot be")
    if args.sweep and not (args.eval_episodes and data.spec):
        fail("--sweep acts: it needs an environment, and --eval-episodes above 0")
    data.mean, data.std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-6
    data.obs = (data.obs - data.mean) / data.std
    length = data.episode.bincount()
    end, total = length.cumsum(0) - 1, data.reward.double().cumsum(0)  # (episodes,), (N,)
    data.last = end[data.episode]
    data.timestep = torch.arange(len(total), device=args.device) - (end - length + 1)[data.episode]
    data.rtg = (total[data.last] - total + data.reward).float()  # r_t is in it
    data.returns = data.rtg[data.timestep == 0]  # (episodes,)
    data.target = data.returns.max() if args.target_return is None else torch.tensor(args.target_return)


def windows(data, args):
    """B windows for each seed, which begin at any step alike and end with their episode: rtg, s, a, t, valid."""
    i = torch.randint(len(data.rtg), (args.num_seeds, args.batch_size, 1), device=args.device)
    last, i = data.last[i], i + torch.arange(args.context, device=args.device)  # (S, B, 1), (S, B, K)
    valid, i = (i <= last).float(), i.minimum(last)
    return data.rtg[i], data.obs[i], data.action[i], data.timestep[i], valid


# --- agent ---
def clipped_step(opt, loss, max_norm):
    """`step`, with the gradient of each seed cut to a norm of at most max_norm."""
    params = opt.param_groups[0]["params"]
    grads = torch.autograd.grad(loss.sum(), params)
    norm = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)  # (S,)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for p, grad in zip(params, grads):
        p.grad = grad * factor.view(-1, *[1] * (grad.dim() - 1))
    opt.step()


class Agent:
    def __init__(self, args, obs_dim, act_dim, data):
        self.args, self.data = args, data
        T_max = int(data.timestep.max()) + 1  # steps beyond the data's longest episode share its last embedding
        self.actor = Actor(args.num_seeds, obs_dim, act_dim, T_max, args).to(args.device)
        self.clock = nn.Module()
        self.clock.register_buffer("t", torch.zeros((), device=args.device))  # updates made
        lr = torch.tensor(args.learning_rate, device=args.device)  # as in `adam`
        self.actor_opt = torch.optim.AdamW(self.actor.parameters(), lr=lr, weight_decay=args.weight_decay, fused=True,
                                           capturable=lr.is_cuda)
        self.policy, self.updates_per_call = self.actor, 1
        self.modules, self.optimizers = {"actor": self.actor, "clock": self.clock}, {"actor": self.actor_opt}

    def update(self):
        args = self.args
        self.clock.t += 1
        self.actor_opt.param_groups[0]["lr"].copy_(args.learning_rate * (self.clock.t / args.warmup).clamp(max=1))
        l_pi = actor_loss(self.actor, windows(self.data, args))
        clipped_step(self.actor_opt, l_pi, args.max_norm)
        return {"actor_loss": l_pi}  # (S,)


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


# --- evaluation: returns to go ---
class RawPolicy(nn.Module):
    """From the last T <= K steps, rtg (B, T), raw obs (B, T, obs_dim), action (B, T, act_dim) and timestep (B, T), or
    (S, B, T, .), to environment actions (S, B, act_dim), on the CPU. The last of the actions given is not looked at."""

    def __init__(self, policy, S, task):
        super().__init__()
        self.policy, self.S = deepcopy(policy).cpu(), S
        for name in ("mean", "std", "shift", "scale", "target"):
            self.register_buffer(name, getattr(task, name).cpu())
        self.eval().requires_grad_(False)

    def forward(self, rtg, obs, action, timestep):
        steps = rtg, (obs - self.mean) / self.std, (action - self.shift) / self.scale, timestep
        pi = self.policy(*(x.expand(self.S, *x.shape[-dim:]) for x, dim in zip(steps, (2, 3, 3, 2))))
        return self.shift + self.scale * pi[:, :, -1]


def export(policy):
    """RawPolicy as a .pt2 file, which `torch.export.load(path).module()` reads; B and T are free."""
    O, A, B, T = len(policy.mean), len(policy.shift), torch.export.Dim("B"), torch.export.Dim("T")
    example = torch.zeros(2, 3), torch.zeros(2, 3, O), torch.zeros(2, 3, A), torch.zeros(2, 3, dtype=torch.long)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(policy, example, dynamic_shapes=({0: B, 1: T},) * 4), buffer)
    return buffer.getvalue()


@functools.lru_cache(1)
def environments(spec, n):
    return [gym.make(pickle.loads(spec), disable_env_checker=True) for _ in range(n)]


@torch.no_grad()
def evaluate(policy, spec, obs_space, update, seeds, alive, gamma, reference):
    """Rows of eval.csv for the agents `alive`: each acts in the n episodes that begin with its seeds (S, n), asked at
    first for policy.target, then for what of it is still to come."""
    policy, (S, n), (low, high) = pickle.loads(policy), seeds.shape, reference
    envs, running, sums = environments(spec, S * n), np.repeat(alive, n), np.zeros((3, S * n))
    obs = np.stack([flat(env.reset(seed=int(seed))[0], obs_space) for env, seed in zip(envs, seeds.flat)])
    window = []  # a step: rtg, obs, action, timestep, each (S n, .)
    while running.any():
        rtg, action = policy.target.numpy() - sums[0], np.zeros((S * n, len(policy.shift)))
        step = [rtg.astype(np.float32), obs.copy(), action.astype(np.float32), sums[2].astype(np.int64)]
        window = [*window, step][-policy.policy.context :]
        steps = (torch.from_numpy(np.stack(x, 1)).unflatten(0, (S, n)) for x in zip(*window))  # (S, n, T, .)
        action = step[2] = policy(*steps).flatten(0, 1).numpy()
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


# --- main: a sweep of targets ---
def sweep(args, run, agent, data):
    """targets.csv: what the agents achieve when asked for 0, 25, ... 150 % of the way from the data's worst return to
    its best."""
    rows, (worst, best) = ["target,seed,episodes,return_mean,return_std"], data.returns.aminmax()
    shape = args.num_seeds, args.eval_episodes
    seeds = np.reshape([draw_seed(args.seed, run.update, *i) for i in np.ndindex(shape)], shape)
    for part in tqdm(range(7), desc="sweep", unit=" targets"):
        data.target = worst + part / 4 * (best - worst)
        policy = pickle.dumps(RawPolicy(agent.policy, args.num_seeds, data))
        for row in evaluate(policy, pickle.dumps(data.spec), data.obs_space, run.update, seeds, run.alive, args.gamma,
                            data.reference):
            rows.append("%.4f,%d,%d,%.4f,%.4f" % (data.target, *row[1:5]))
    run.write("targets.csv", "\n".join([*rows, ""]))


def main(args):
    """Trains, evaluates, saves; returns the run's directory."""
    args = check(args)
    data = load(args)
    prepare(data, args)
    agent = Agent(args, data.obs_dim, data.act_dim, data)
    run, update = Run(args, agent, data, args.num_updates), cuda_graph(agent)
    while run.update < run.total:
        run.log(update())
    run.finish()
    if args.sweep:
        sweep(args, run, agent, data)
    return run.dir


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(tyro.cli(Args))
