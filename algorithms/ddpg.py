# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""DDPG: Continuous Control with Deep Reinforcement Learning.
Lillicrap et al., ICLR 2016. https://arxiv.org/abs/1509.02971  Online; with --record DIR it also records datasets.

    L_Q  = E[ (Q(s, a) - y)^2 ],   y = r + gamma (1 - d) Q'(s', pi'(s'))    (4), (5)
    L_pi = -E[ Q(s, pi(s)) ]                                                (6)

    python algorithms/ddpg.py --env-id Hopper-v5 --num-seeds 3 --num-steps 300000

The datasets are BCQ's, https://arxiv.org/abs/1812.02900: there `final` had --exploration-noise 0.5, its expert 0.1,
both 1M steps, as had `imitation`. Concurrent learning, a second agent beside the collector, is not here: see Recorder.
Departs from the paper: Gaussian noise, not Ornstein-Uhlenbeck's; 25,000 uniform steps first; replay keeps all; no batch
normalisation; 256 units (400 and 300), a in Q's first layer, last layers not drawn small; as in BCQ's code rate 1e-3
(actor 1e-4), batches of 100 (64), tau 0.005 (0.001), no weight decay (1e-2).
Shapes: S seeds, B batch, N steps. Each seed acts in an environment of its own and they never interact.
"""
import copy
import tempfile
import unittest.mock
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
from minari.data_collector import EpisodeBuffer


@dataclass
class Args:
    # --- run ---
    env_id: str = "Hopper-v5"  # Gymnasium environment with continuous actions
    seed: int = 0  # seeds every random stream; agent k of a run is not the agent of --seed k
    num_seeds: int = 1  # independent agents trained side by side
    num_steps: int = 1_000_000  # environment steps of each agent, all of which are kept
    eval_every: int = 5_000  # steps between two evaluations
    eval_episodes: int = 10  # episodes per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    batch_size: int = 100  # transitions per agent and update
    learning_rate: float = 1e-3  # of Adam, actor and critic
    gamma: float = 0.99  # discount
    tau: float = 0.005  # step of the target networks
    hidden_dim: int = 256  # units in each of two hidden layers
    # --- DDPG ---
    learning_starts: int = 25_000  # uniform random steps before the first update
    exploration_noise: float = 0.1  # deviation of the noise on actions
    # --- recording ---
    record: str = ""  # write datasets of agent 0 into this directory
    record_steps: int = 100_000  # transitions in each of imitation and imperfect


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
    def __init__(self, S, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.net = mlp((S,), obs_dim + act_dim, d_hidden, d_hidden, 1)

    def forward(self, s, a):  # (S, B, .) -> (S, B)
        return self.net(torch.cat([s, a], -1)).squeeze(-1)


class Actor(nn.Module):
    def __init__(self, S, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.net = mlp((S,), obs_dim, d_hidden, d_hidden, act_dim)

    def forward(self, s):  # (S, B, obs_dim) -> (S, B, act_dim)
        return torch.tanh(self.net(s))

    def sample(self, s, noise):  # clip(pi(s) + eps, -1, 1), eps ~ N(0, noise^2): (S, B, act_dim)
        pi = self(s)
        return (pi + noise * torch.randn_like(pi)).clamp(-1, 1)


# --- losses: each returns one value per seed, (S,) ---
def critic_loss(critic, critic_target, actor_target, batch, args):
    """L_Q = E[ (Q(s, a) - y)^2 ],  y = r + gamma (1 - d) Q'(s', pi'(s'))"""
    s, a, r, s_next, d = batch
    with torch.no_grad():
        y = r + args.gamma * (1 - d) * critic_target(s_next, actor_target(s_next))  # (S, B)
    return (critic(s, a) - y).square().mean(-1)


def actor_loss(actor, critic, s):
    """L_pi = -E[ Q(s, pi(s)) ]"""
    pi = actor(s)
    return -critic(s, pi).mean(-1)


# --- data: replay ---
class Replay(nn.Module):
    """All N steps of each agent, obs and next_obs (S, N, obs_dim), action (S, N, act_dim), the others (S, N)."""

    def __init__(self, S, N, obs_dim, act_dim):
        super().__init__()
        for name in ("obs", "next_obs", "action", "reward", "terminated", "truncated"):
            size = {"obs": (obs_dim,), "next_obs": (obs_dim,), "action": (act_dim,)}.get(name, ())
            self.register_buffer(name, torch.zeros(S, N, *size), persistent=False)
        self.register_buffer("size", torch.tensor(0), persistent=False)

    def get_extra_state(self):  # the steps made so far
        return {name: x[:, : self.size].clone() if x.dim() else x.clone() for name, x in self.named_buffers()}

    def set_extra_state(self, state):
        for name, x in self.named_buffers():
            (x[:, : state["size"]] if x.dim() else x).copy_(state[name])

    def sample(self, B):  # s, a, r, s_next, d, each (S, B, .) or (S, B)
        i = (torch.rand(len(self.reward), B, dtype=torch.float64, device=self.size.device) * self.size).long()
        k = torch.arange(len(i), device=i.device).unsqueeze(1)
        return self.obs[k, i], self.action[k, i], self.reward[k, i], self.next_obs[k, i], self.terminated[k, i]


# --- agent ---
class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, data):
        super().__init__()
        self.args, self.data, self.updates_per_call, S = args, data, 1, args.num_seeds
        self.actor = self.policy = Actor(S, obs_dim, act_dim, args.hidden_dim)
        self.critic = Critic(S, obs_dim, act_dim, args.hidden_dim)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt, self.critic_opt = adam(self.actor, args.learning_rate), adam(self.critic, args.learning_rate)

    def update(self):
        args = self.args
        batch = self.data.sample(args.batch_size)
        l_q = critic_loss(self.critic, self.critic_target, self.actor_target, batch, args)
        step(self.critic_opt, l_q)
        l_pi = actor_loss(self.actor, self.critic, batch[0])
        step(self.actor_opt, l_pi)
        polyak(self.critic_target, self.critic, args.tau)
        polyak(self.actor_target, self.actor, args.tau)
        return {"critic_loss": l_q, "actor_loss": l_pi}  # each (S,)


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


# --- shared: environment ---
def make_task(args):
    """The Task of --env-id."""
    with attempt(f"--env-id {args.env_id} is no use"):
        env = gym.make(args.env_id)
        shape = flat(env.reset()[0]).shape
        assert len(shape) == 1, f"observations have to be vectors, not of shape {shape}"
        task = Task(env, env.action_space, *shape, {})
        assert task.shift.isfinite().all(), "actions need bounds"
    return task


def draw_seed(*key):
    """A seed for one stream of random numbers, fixed by the integers of its key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# --- acting ---
class Collector:
    """Steps one environment per agent into the replay; what it needs to go on after a resume is all in there."""

    def __init__(self, args, task, agent, replay):
        self.args, self.task, self.agent, self.replay = args, task, agent, replay
        self.envs = [gym.make(task.spec, disable_env_checker=True) for _ in range(args.num_seeds)]
        self.obs, self.episode = np.zeros((args.num_seeds, task.obs_dim), np.float32), [-1] * args.num_seeds
        for k, env in enumerate(self.envs):
            ends = (replay.terminated + replay.truncated)[k, : replay.size].nonzero().flatten().tolist()
            self.episode[k] = len(ends) - 1
            self.reset(k)
            for action in self.raw(replay.action[k, ends[-1] + 1 if ends else 0 : replay.size]):  # of the open episode
                self.obs[k] = flat(env.step(action)[0])

    def raw(self, action):
        return (self.task.shift + self.task.scale * action).nan_to_num().cpu().numpy()

    def reset(self, k):
        self.episode[k] += 1
        self.obs[k] = flat(self.envs[k].reset(seed=draw_seed(self.args.seed, 0, k, self.episode[k]))[0])

    @torch.no_grad()
    def step(self):
        args, replay, i = self.args, self.replay, int(self.replay.size)
        obs = torch.from_numpy(self.obs).to(args.device)
        action = torch.rand_like(replay.action[:, 0]) * 2 - 1
        if i >= args.learning_starts:
            action = self.agent.actor.sample(obs.unsqueeze(1), args.exploration_noise).squeeze(1)
        replay.obs[:, i], replay.action[:, i] = obs, action
        reward, terminated, truncated = np.zeros((3, len(self.envs)), np.float32)
        for k, (env, raw) in enumerate(zip(self.envs, self.raw(action))):
            obs, reward[k], terminated[k], truncated[k], _ = env.step(raw)
            self.obs[k] = flat(obs)
        seen = (replay.next_obs, self.obs), (replay.reward, reward), (replay.terminated, terminated)
        for x, value in (*seen, (replay.truncated, truncated)):
            x[:, i] = torch.from_numpy(value).to(args.device)
        replay.size += 1
        for k in np.flatnonzero(terminated + truncated):
            self.reset(k)


# --- recording ---
class Recorder:
    """BCQ's batches, when training ends: `final`, all that agent 0 saw; `imitation`, its last policy; `imperfect`, that
    policy with noise 0.3, and a uniform action with probability 0.3. It is exported as expert.pt2. The steps of `final`
    stand in the order in which they were made: its first n are what a concurrent learner has after n steps."""

    def __init__(self, args, task, agent):
        self.args, self.task, self.agent = args, task, agent
        self.root = Path(args.record).resolve() / re.sub(r"\W+", "-", task.spec.name.lower())
        with attempt(f"--record {args.record} is no use"):
            assert args.resume or not list(self.root.glob("*-v0")), f"{self.root} holds datasets already"
            self.root.mkdir(parents=True, exist_ok=True)

    def record(self, run):
        """Writes the sets; those of a run before its resume stay."""
        if 0 in run.lost:
            fail("agent 0 is not finite: nothing is recorded")
        actor = self.actor()
        export(RawPolicy(actor, 1, self.task), self.root / "expert.pt2")
        self.write("final", self.replayed, self.agent.data)
        self.write("imitation", self.rollouts, 1, actor, 0.0, 0.0)
        self.write("imperfect", self.rollouts, 2, actor, 0.3, 0.3)

    def actor(self):
        """Agent 0's actor alone, on the CPU."""
        actor = copy.deepcopy(self.agent.actor).cpu()
        for p in actor.parameters():
            p.data = p.data[:1]
        return actor

    def replayed(self, seen):
        """Agent 0's training episodes; the one that is still open is cut, which counts as a truncation."""
        replay = {name: x[0, : seen.size].cpu().clone() for name, x in seen.named_buffers() if x.dim()}
        replay["truncated"][-1] = 1 - replay["terminated"][-1]
        stops = (replay["terminated"] + replay["truncated"]).nonzero().flatten() + 1
        raw, episodes = self.task.shift.cpu() + self.task.scale.cpu() * replay["action"], []
        for i, j in zip([0, *stops.tolist()], stops.tolist()):
            obs = torch.cat([replay["obs"][i:j], replay["next_obs"][j - 1 : j]])
            rest = (raw[i:j], replay["reward"][i:j], replay["terminated"][i:j] > 0, replay["truncated"][i:j] > 0)
            seed = draw_seed(self.args.seed, 0, 0, len(episodes))
            episodes.append(EpisodeBuffer(len(episodes), seed, None, *(x.numpy() for x in (obs, *rest))))
        return episodes

    def rollouts(self, number, actor, uniform, noise):
        """--record-steps of an actor with noise, and uniform actions with probability `uniform`."""
        args, task, episodes, steps = self.args, self.task, [], 0
        env, shift, scale = gym.make(task.spec, disable_env_checker=True), task.shift.cpu(), task.scale.cpu()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(draw_seed(args.seed, number))
            while steps < args.record_steps:
                seed, rows, ended = draw_seed(args.seed, 0, 0, len(episodes), number), [], False
                obs = [flat(env.reset(seed=seed)[0])]
                while not ended and steps < args.record_steps:
                    action = torch.rand(len(scale)) * 2 - 1
                    if torch.rand(()) >= uniform:
                        action = actor.sample(torch.from_numpy(obs[-1]).view(1, 1, -1), noise).view(-1)
                    raw = (shift + scale * action).numpy()
                    next_obs, reward, terminated, truncated, _ = env.step(raw)
                    ended, steps = terminated or truncated, steps + 1
                    obs.append(flat(next_obs))
                    rows.append((raw, reward, terminated, truncated))
                action, reward, terminated, truncated = map(np.array, zip(*rows))
                truncated[-1] |= not ended
                episodes.append(EpisodeBuffer(
                    len(episodes), seed, None, np.stack(obs), action, reward, terminated, truncated))
        return episodes

    def write(self, kind, make, *arguments):
        """A Minari set <name>/<kind>-v0 under --record, of the episodes that `make` gives."""
        name, task = f"{self.root.name}/{kind}-v0", self.task
        if (self.root / f"{kind}-v0").exists():
            return
        tqdm.tqdm.write(f"recording {name}", sys.stderr)
        episodes = make(*arguments)
        flags = [f"--{key.replace('_', '-')} {value}" for key, value in vars(self.args).items()
                 if value != getattr(Args, key) and key not in ("device", "eval_workers", "out_dir", "resume", "track")]
        low, high = (None if math.isnan(x) else x for x in task.reference)
        with (tempfile.TemporaryDirectory(dir=self.root.parent) as part, warnings.catch_warnings(action="ignore"),
              unittest.mock.patch.dict(os.environ, MINARI_DATASETS_PATH=part)):
            minari.create_dataset_from_buffers(
                name, episodes, env=task.spec, algorithm_name="DDPG", ref_min_score=low, ref_max_score=high,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32),
                description=f"{kind} as for BCQ: python algorithms/ddpg.py {' '.join(flags)}")
            Path(part, name).replace(self.root / f"{kind}-v0")


# --- main: online ---
def main(args):
    """Acts, trains, evaluates, saves; returns the run's directory."""
    setup(args)
    with torch.device(args.device):
        task = make_task(args)
        replay = Replay(args.num_seeds, args.num_steps, task.obs_dim, task.act_dim)
        agent = Agent(args, task.obs_dim, task.act_dim, replay)
    update = agent.update if args.device == "cpu" else cuda_graph(agent.update).__next__
    record = Recorder(args, task, agent).record if args.record else lambda run: None
    run = Run(args, agent, task, args.num_steps)
    collector = Collector(args, task, agent, replay)

    def act_and_update():
        collector.step()
        return update() if replay.size > args.learning_starts else {}

    train(run, act_and_update)
    record(run)
    return run.dir


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
