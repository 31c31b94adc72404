# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""BCQ: Off-Policy Deep Reinforcement Learning without Exploration.
Fujimoto, Meger & Precup, ICML 2019. https://arxiv.org/abs/1812.02900

    L_VAE = E[ |D(s, z) - a|^2 / dim(A) ] + KL(N(mu, sigma^2) || N(0, I)) / (2 dim(z)),   z ~ N(mu, sigma^2) = E(s, a)
    a_i   = clip(b_i + Phi tanh(xi(s, b_i)), -1, 1),   b_i = D(s, clip(z_i, -0.5, 0.5)),   z_i ~ N(0, I)
    y     = r + gamma (1 - d) max_i [ lambda min_j Q'_j(s', a'_i) + (1 - lambda) max_j Q'_j(s', a'_i) ],   i = 1 .. 10
    L_Q   = E[ sum_j (Q_j(s, a) - y)^2 ]
    L_xi  = -E[ Q_1(s, a_1) ]
    pi(s) = argmax_{a_i} Q_1(s, a_i),   i = 1 .. 100

    python algorithms/bcq.py --dataset-id hopper/medium-v0 --num-seeds 2 --num-updates 10000

a'_i is of the targets Q', xi'. The policy draws: evaluation seeds it, policy.pt2 draws anew at every call.
Departs from the paper: as in the authors' code KL counts a quarter of what algorithm 1 has, and 100 draws act, not n;
their widths and rates.
Shapes: S seeds, B batch, E critics, n draws, N transitions. The S seeds train side by side and never interact.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn


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
    batch_size: int = 100  # transitions per agent and update
    learning_rate: float = 1e-3  # of Adam, for all networks
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target networks
    hidden_dim: int = 400  # units in the first hidden layer of Q and xi; the second has three quarters of it
    # --- BCQ ---
    vae_dim: int = 750  # units in each of two hidden layers of encoder and decoder
    phi: float = 0.05  # Phi, bound of the perturbation
    lam: float = 0.75  # lambda, weight of the least Q in the target
    num_draws: int = 10  # n, actions for each s' in the target
    num_draws_acting: int = 100  # actions of which the policy takes the best


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
        self.net = mlp((S, E), obs_dim + act_dim, d_hidden, max(1, 3 * d_hidden // 4), 1)

    def forward(self, s, a):  # (S, B, .) -> (S, E, B)
        return self.net(torch.cat([s, a], -1).unsqueeze(1)).squeeze(-1)

    def first(self, s, a):  # Q_1 alone, with the first of all weights: (S, B)
        return torch.func.functional_call(self, {k: w[:, :1] for k, w in self.named_parameters()}, (s, a)).squeeze(1)


class Perturbation(nn.Module):
    """b + Phi tanh(xi(s, b)), in the box."""

    def __init__(self, S, obs_dim, act_dim, d_hidden, phi):
        super().__init__()
        self.net, self.phi = mlp((S,), obs_dim + act_dim, d_hidden, max(1, 3 * d_hidden // 4), act_dim), phi

    def forward(self, s, b):  # (S, B, .) -> (S, B, act_dim)
        return (b + self.phi * torch.tanh(self.net(torch.cat([s, b], -1)))).clamp(-1, 1)


class VAE(nn.Module):
    """The model of the data's actions: encoder E(s, a), decoder D(s, z)."""

    def __init__(self, S, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.d_z = 2 * act_dim
        self.encoder = mlp((S,), obs_dim + act_dim, d_hidden, d_hidden, 2 * self.d_z)
        self.decoder = mlp((S,), obs_dim + self.d_z, d_hidden, d_hidden, act_dim)

    def encode(self, s, a):  # -> mu, log sigma (S, B, d_z)
        mean, log_std = self.encoder(torch.cat([s, a], -1)).chunk(2, -1)
        return mean, log_std.clamp(-4, 15)

    def decode(self, s, z):  # (S, B, .) -> (S, B, act_dim)
        return torch.tanh(self.decoder(torch.cat([s, z], -1)))

    def sample(self, s):  # b ~ D(s, z), z in [-0.5, 0.5]: (S, B, obs_dim) -> (S, B, act_dim)
        z = torch.randn_like(s[..., :1].repeat(1, 1, self.d_z)).clamp(-0.5, 0.5)
        return self.decode(s, z)


class Policy(nn.Module):
    """pi(s) = argmax_{a_i} Q_1(s, a_i)"""

    def __init__(self, vae, xi, critic, n):
        super().__init__()
        self.vae, self.xi, self.critic, self.n = vae, xi, critic, n

    def forward(self, s):  # (S, B, obs_dim) -> (S, B, act_dim)
        s_rep = s.repeat(1, self.n, 1)  # (S, n B, obs_dim)
        a = self.xi(s_rep, self.vae.sample(s_rep)).view(len(s), self.n, *s.shape[1:2], -1)  # (S, n, B, act_dim)
        best = self.critic.first(s_rep, a.flatten(1, 2)).view(a.shape[:3]).argmax(1)  # (S, B)
        return a.gather(1, best[:, None, :, None].expand(-1, -1, -1, a.shape[-1])).squeeze(1)


# --- losses: each returns one value per seed, (S,) ---
def vae_loss(vae, batch):
    """L_VAE = E[ |D(s, z) - a|^2 / dim(A) ] + KL(N(mu, sigma^2) || N(0, I)) / (2 dim(z)),  z ~ N(mu, sigma^2)"""
    s, a, *_ = batch
    mean, log_std = vae.encode(s, a)
    z = mean + log_std.exp() * torch.randn_like(mean)
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)  # (S, B, d_z)
    return (vae.decode(s, z) - a).square().mean((-2, -1)) + 0.5 * kl.mean((-2, -1))


def critic_loss(critic, critic_target, xi_target, vae, batch, args):
    """L_Q = E[ sum_j (Q_j(s, a) - y)^2 ],  y = r + gamma (1 - d) max_i [lambda min_j Q'_j + (1 - lambda) max_j Q'_j]"""
    s, a, r, s_next, d = batch
    with torch.no_grad():
        s_rep = s_next.repeat(1, args.num_draws, 1)  # (S, n B, obs_dim)
        q = critic_target(s_rep, xi_target(s_rep, vae.sample(s_rep)))  # (S, E, n B)
        soft = args.lam * q.amin(1) + (1 - args.lam) * q.amax(1)  # (S, n B)
        y = r + args.gamma * (1 - d) * soft.unflatten(-1, (args.num_draws, -1)).amax(1)  # (S, B)
    return (critic(s, a) - y.unsqueeze(1)).square().sum(1).mean(-1)


def xi_loss(xi, critic, vae, batch):
    """L_xi = -E[ Q_1(s, a_1) ]"""
    s, *_ = batch
    with torch.no_grad():
        b = vae.sample(s)
    return -critic.first(s, xi(s, b)).mean(-1)


# --- agent ---
def prepare(data, args):
    """Observations and rewards stay as they are."""
    if args.lam > 1:
        fail(f"--lam cannot be {args.lam}: it is a share")


class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, data):
        super().__init__()
        self.args, self.data, self.updates_per_call, S = args, data, 1, args.num_seeds
        self.vae = VAE(S, obs_dim, act_dim, args.vae_dim)
        self.xi = Perturbation(S, obs_dim, act_dim, args.hidden_dim, args.phi)
        self.critic = Critic(S, obs_dim, act_dim, args.hidden_dim)
        self.xi_target = copy.deepcopy(self.xi).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.policy = Policy(self.vae, self.xi, self.critic, args.num_draws_acting)
        self.vae_opt, self.xi_opt = adam(self.vae, args.learning_rate), adam(self.xi, args.learning_rate)
        self.critic_opt = adam(self.critic, args.learning_rate)

    def update(self):
        args, batch = self.args, sample(self.data, self.args)
        l_vae = vae_loss(self.vae, batch)
        step(self.vae_opt, l_vae)
        l_q = critic_loss(self.critic, self.critic_target, self.xi_target, self.vae, batch, args)
        step(self.critic_opt, l_q)
        l_xi = xi_loss(self.xi, self.critic, self.vae, batch)
        step(self.xi_opt, l_xi)
        polyak(self.critic_target, self.critic, args.tau)
        polyak(self.xi_target, self.xi, args.tau)
        return {"vae_loss": l_vae, "critic_loss": l_q, "xi_loss": l_xi}  # each (S,)


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


# --- shared: main ---
def main(args):
    """Trains, evaluates, saves; returns the run's directory."""
    setup(args)
    with torch.device(args.device):  # where tensors are made
        data = load(args)
        prepare(data, args)
        agent = Agent(args, data.obs_dim, data.act_dim, data)
    update = agent.update if args.device == "cpu" else cuda_graph(agent.update).__next__
    return train(Run(args, agent, data, args.num_updates), update)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
