# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
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
import math
from dataclasses import dataclass

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
    num_updates: int = 100_000  # gradient steps of each agent
    eval_every: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
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
    # The authors' code, in 100 episodes each: Hopper 3600, 1800; HalfCheetah 12000, 6000; Walker2d 5000, 2500.
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
    if not (args.return_scale > 0 and args.dropout < 1):
        fail("--return-scale has to be above 0, --dropout below 1")
    if args.sweep and not (args.eval_episodes and data.spec):
        fail("--sweep acts: it needs an environment, and --eval-episodes above 0")
    data.mean, data.std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-6
    data.obs = (data.obs - data.mean) / data.std
    length = data.episode.bincount()
    end, total = length.cumsum(0) - 1, data.reward.double().cumsum(0)  # (episodes,), (N,)
    data.last = end[data.episode]
    data.timestep = torch.arange(len(total)) - (end - length + 1)[data.episode]
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


class Agent(nn.Module):
    least = {"target_return": -math.inf}  # of a flag that may be below 0

    def __init__(self, args, obs_dim, act_dim, data):
        super().__init__()
        self.args, self.data, self.updates_per_call = args, data, 1
        T_max = int(data.timestep.max()) + 1  # steps beyond the data's longest episode share its last embedding
        self.actor = self.policy = Actor(args.num_seeds, obs_dim, act_dim, T_max, args)
        self.register_buffer("updates", torch.zeros(()))  # made so far
        lr = torch.tensor(args.learning_rate)  # as in `adam`
        self.actor_opt = torch.optim.AdamW(self.actor.parameters(), lr=lr, weight_decay=args.weight_decay, fused=True,
                                           capturable=lr.is_cuda)

    def update(self):
        args = self.args
        self.updates += 1
        self.actor_opt.param_groups[0]["lr"].copy_(args.learning_rate * (self.updates / args.warmup).clamp(max=1))
        l_pi = actor_loss(self.actor, windows(self.data, args))
        clipped_step(self.actor_opt, l_pi, args.max_norm)
        return {"actor_loss": l_pi}  # (S,)


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


# --- evaluation: returns to go ---
class RawPolicy(nn.Module):
    """From the last T <= K steps, rtg (B, T), raw obs (B, T, obs_dim), action (B, T, act_dim) and timestep (B, T), or
    (S, B, T, .), to environment actions (S, B, act_dim), on the CPU. The last of the actions given is not looked at."""

    def __init__(self, policy, S, task):
        super().__init__()
        self.policy, self.S = copy.deepcopy(policy).cpu(), S
        for name in ("mean", "std", "shift", "scale", "target"):
            self.register_buffer(name, getattr(task, name).cpu())
        self.eval().requires_grad_(False)

    def forward(self, rtg, obs, action, timestep):
        steps = rtg, (obs - self.mean) / self.std, (action - self.shift) / self.scale, timestep
        pi = self.policy(*(x.expand(self.S, *x.shape[-dim:]) for x, dim in zip(steps, (2, 3, 3, 2))))
        return self.shift + self.scale * pi[:, :, -1]


def export(policy, path):
    """`torch.export.load(path).module()` is the RawPolicy; B and T are free."""
    O, A, B, T = len(policy.mean), len(policy.shift), torch.export.Dim("B"), torch.export.Dim("T")
    example = torch.zeros(2, 3), torch.zeros(2, 3, O), torch.zeros(2, 3, A), torch.zeros(2, 3, dtype=torch.long)
    torch.export.save(torch.export.export(policy, example, dynamic_shapes=({0: B, 1: T},) * 4), path)


@torch.no_grad()
def evaluate(policy, spec, seeds, gamma, reference):
    """Return, its deviation, discounted return, length, score (S, 5) of episodes begun with `seeds` (S, n), in which
    an agent is asked at first for policy.target, then for what of it is still to come."""
    policy, envs, (S, n) = pickle.loads(policy), environments(spec, seeds.size), seeds.shape
    obs = np.stack([flat(env.reset(seed=int(seed))[0]) for env, seed in zip(envs, seeds.flat)])
    finite = torch.stack([p.flatten(1).isfinite().all(1) for p in policy.parameters()]).all(0)  # (S,)
    sums = np.zeros((3, S * n)) + np.where(finite, 0, math.nan).repeat(n)
    running = np.flatnonzero(finite.repeat_interleave(n)).tolist()
    window = []  # a step: rtg, obs, action, timestep, each (S n, .)
    while running:
        rtg, t, action = policy.target.numpy() - sums[0], np.nan_to_num(sums[2]), np.zeros((S * n, len(policy.shift)))
        step = [rtg.astype(np.float32), obs.copy(), action.astype(np.float32), t.astype(np.int64)]
        window = [*window, step][-policy.policy.context :]
        steps = (torch.from_numpy(np.stack(x, 1)).unflatten(0, (S, n)) for x in zip(*window))  # (S, n, T, .)
        action = step[2] = policy(*steps).flatten(0, 1).numpy()
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


# --- main: a sweep of targets ---
def sweep(args, run, agent, data):
    """targets.csv: what the agents achieve when asked for 0, 25, ... 150 % of the way from the data's worst return to
    its best."""
    rows, (worst, best) = ["target,seed,episodes,return_mean,return_std"], data.returns.aminmax()
    S, n, spec = args.num_seeds, args.eval_episodes, pickle.dumps(data.spec)
    seeds, target = np.random.SeedSequence([args.seed, run.total]).generate_state(S * n).reshape(S, n), data.target
    for part in tqdm.tqdm(range(7), desc="sweep", unit=" targets"):
        data.target = worst + part / 4 * (best - worst)
        found = evaluate(pickle.dumps(RawPolicy(agent.policy, S, data)), spec, seeds, args.gamma, data.reference)
        rows += ["%.4f,%d,%d,%.4f,%.4f" % (data.target, k, n, *row[:2]) for k, row in enumerate(found)]
    data.target = target
    run.write("targets.csv", "\n".join([*rows, ""]))


def main(args):
    """Trains, evaluates, saves; returns the run's directory."""
    setup(args)
    with torch.device(args.device):
        data = load(args)
        prepare(data, args)
        agent = Agent(args, data.obs_dim, data.act_dim, data)
    update = agent.update if args.device == "cpu" else cuda_graph(agent.update).__next__
    run = Run(args, agent, data, args.num_updates)

    def update_and_sweep():
        losses = update()
        if args.sweep and run.update + 1 == run.total:
            sweep(args, run, agent, data)
        return losses

    return train(run, update_and_sweep)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
