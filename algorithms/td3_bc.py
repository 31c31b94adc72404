# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19", "matplotlib>=3.9", "pytest>=8.3"]
# ///
"""TD3+BC: A Minimalist Approach to Offline Reinforcement Learning.
Fujimoto & Gu, NeurIPS 2021. https://arxiv.org/abs/2106.06860

    y    = r + gamma (1 - d) min_i Q'_i(s', a'),   a' = clip(pi'(s') + clip(eps, -c, c), -1, 1)
    L_Q  = E[ sum_i (Q_i(s, a) - y)^2 ]
    L_pi = E[ -lambda Q_1(s, pi(s)) + (pi(s) - a)^2 ],   lambda = alpha / E|Q_1(s, pi(s))|

    python algorithms/td3_bc.py --dataset-id hopper/medium-replay-v0 --num-seeds 3 --num-updates 50000

Departs from the paper: nothing.
Shapes: S seeds, B batch, E critics, N transitions. The S seeds train side by side and never interact.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn


@dataclass
class Args:
    # --- run ---
    dataset_id: str = "hopper/medium-v0"  # shipped or Minari id, a+b mixture, directory or D4RL .hdf5 file
    env_id: str = ""  # environment to evaluate in; empty: the one that the data names
    seed: int = 0  # seeds every random stream; agent k of a run is not the agent of --seed k
    num_seeds: int = 1  # independent agents trained side by side
    num_updates: int = 1_000_000  # critic gradient steps of each agent
    eval_every: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on; 0: in line
    device: str = "auto"  # cuda, cpu, or auto: cuda where there is one
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    batch_size: int = 256  # transitions per agent and update
    learning_rate: float = 3e-4  # of Adam, actor and critic
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target networks
    hidden_dim: int = 256  # units in each of two hidden layers
    # --- TD3+BC ---
    alpha: float = 2.5  # weight of Q against cloning
    policy_noise: float = 0.2  # deviation of the noise on target actions
    noise_clip: float = 0.5  # c, its bound
    policy_freq: int = 2  # critic steps per actor step


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
    def __init__(self, S, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.net = mlp((S,), obs_dim, d_hidden, d_hidden, act_dim)

    def forward(self, s):  # (S, B, obs_dim) -> (S, B, act_dim)
        return torch.tanh(self.net(s))


# --- losses: each returns one value per seed, (S,) ---
def critic_loss(critic, critic_target, actor_target, batch, args):
    """L_Q = E[ sum_i (Q_i(s, a) - y)^2 ],  y = r + gamma (1 - d) min_i Q'_i(s', a')"""
    s, a, r, s_next, d = batch
    with torch.no_grad():
        eps = (args.policy_noise * torch.randn_like(a)).clamp(-args.noise_clip, args.noise_clip)
        a_next = (actor_target(s_next) + eps).clamp(-1, 1)
        y = r + args.gamma * (1 - d) * critic_target(s_next, a_next).amin(1)  # (S, B)
    return (critic(s, a) - y.unsqueeze(1)).square().sum(1).mean(-1)


def actor_loss(actor, critic, batch, args):
    """L_pi = E[ -lambda Q_1(s, pi(s)) + (pi(s) - a)^2 ],  lambda = alpha / E|Q_1(s, pi(s))|"""
    s, a, *_ = batch
    pi = actor(s)
    q = torch.func.functional_call(critic, {k: w[:, :1] for k, w in critic.named_parameters()}, (s, pi))[:, 0]  # Q_1
    lam = args.alpha / q.abs().mean(-1).detach()  # (S,)
    return -lam * q.mean(-1) + (pi - a).square().mean((-2, -1))


# --- agent ---
def prepare(data, args):
    """Section 4 of the paper: observations to mean 0 and deviation 1 over the dataset."""
    data.mean, data.std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3
    data.obs, data.next_obs = (data.obs - data.mean) / data.std, (data.next_obs - data.mean) / data.std


class Agent:
    def __init__(self, args, obs_dim, act_dim, data):
        self.args, self.data = args, data
        self.actor = Actor(args.num_seeds, obs_dim, act_dim, args.hidden_dim).to(args.device)
        self.critic = Critic(args.num_seeds, obs_dim, act_dim, args.hidden_dim).to(args.device)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = adam(self.actor, args.learning_rate)
        self.critic_opt = adam(self.critic, args.learning_rate)
        self.policy, self.updates_per_call = self.actor, args.policy_freq
        self.modules = {"actor": self.actor, "critic": self.critic,
                        "actor_target": self.actor_target, "critic_target": self.critic_target}
        self.optimizers = {"actor": self.actor_opt, "critic": self.critic_opt}

    def update(self):
        args = self.args
        for _ in range(args.policy_freq):
            batch = sample(self.data, args)
            l_q = critic_loss(self.critic, self.critic_target, self.actor_target, batch, args)
            step(self.critic_opt, l_q)
        l_pi = actor_loss(self.actor, self.critic, batch, args)
        step(self.actor_opt, l_pi)
        polyak(self.critic_target, self.critic, args.tau)
        polyak(self.actor_target, self.actor, args.tau)
        return {"critic_loss": l_q, "actor_loss": l_pi}  # each (S,)


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


# --- shared: main ---
def main(args):
    """Trains, evaluates, saves; returns the run's directory."""
    args = check(args)
    data = load(args)
    prepare(data, args)
    agent = Agent(args, data.obs_dim, data.act_dim, data)
    run, update = Run(args, agent, data, args.num_updates), cuda_graph(agent)
    while run.update < run.total:
        run.log(update())
    return run.finish()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(tyro.cli(Args))
