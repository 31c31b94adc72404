# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""HG-DAgger: Interactive Imitation Learning with Human Experts.
Kelly, Sidrane, Driggs-Campbell & Kochenderfer, ICRA 2019. https://arxiv.org/abs/1810.02890

    for i = 1 .. rounds, from D = {}:
        pi_i = g pi* + (1 - g) pi acts: g = 1 while the expert pi* has control; in round 1 always, for D_BC
        D    <- D + {(s, pi*(s))},   the states s with g = 1 only
        L_pi = E_D[ (pi(s) - pi*(s))^2 ]
    tau = mean of the last quarter of doubts |diag C(s)| at takeovers, C the covariance (1/E) of pi's members

    python algorithms/hg_dagger.py --num-seeds 3 --num-updates 20000

Departs from the paper: each round goes on from the weights of the last one, with a fixed number of Adam steps on all of
D, on observations normalised by D; the gate is a rule (see --threshold) or a person (--gate); a round is a fixed number
of steps and begins with a reset.
With --rounds 1 --steps-per-round 20000 it is behaviour cloning, all of it on the expert's way.
Shapes: S seeds, B batch, N labels. Each seed has environments and data of its own and they never interact.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn


@dataclass
class Args:
    # --- run ---
    env_id: str = "Hopper-v5"  # Gymnasium environment with continuous actions
    seed: int = 0  # seeds every random stream; agent k of a run is not the agent of --seed k
    num_seeds: int = 1  # independent agents trained side by side
    num_updates: int = 100_000  # gradient steps of each agent, over all rounds: a multiple of them, rounded up
    eval_every: int = 5_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    batch_size: int = 256  # labels per agent and update
    learning_rate: float = 3e-4  # of Adam
    gamma: float = 0.99  # of the discounted return in eval.csv
    hidden_dim: int = 256  # units in each of two hidden layers
    # --- DAgger ---
    expert: str = "datasets/hopper/expert.pt2"  # pi*: policy.pt2 of a run, of which agent 0 is taken
    rounds: int = 20  # times that the agent acts, is labelled and learns
    steps_per_round: int = 1_000  # of each agent and round; fewer than an episode has never show its end
    gate: Literal["discrepancy", "keyboard"] = "discrepancy"  # who takes over: the expert or a person
    threshold: float = 0.5  # the expert takes over, g = 1, where |pi*(s) - pi(s)| is more; actions in [-1, 1]
    hold: int = 10  # it hands back, g = 0, at the hold-th step in a row where it is not, or without a key
    ensemble: int = 5  # E: members, whose mean is pi; each has L_pi, first weights and batches of its own
    horizon: int | None = None  # steps of an episode, in training and evaluation; default: the environment's


# --- networks ---
class Linear(nn.Module):
    """`nn.Linear` for many independent networks at once: weight (*lead, d_in, d_out)."""

    def __init__(self, lead, d_in, d_out):
        super().__init__()
        bound = d_in**-0.5  # the bound nn.Linear draws from
        self.weight = nn.Parameter(torch.empty(*lead, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*lead, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):  # (*lead, B, d_in) -> (*lead, B, d_out)
        return x @ self.weight + self.bias


def mlp(lead, *sizes):
    layers = [m for d_in, d_out in zip(sizes, sizes[1:]) for m in (Linear(lead, d_in, d_out), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    def __init__(self, S, E, obs_dim, act_dim, d_hidden):
        super().__init__()
        self.net = mlp((S, E), obs_dim, d_hidden, d_hidden, act_dim)
        self.register_buffer("mean", torch.zeros(S, 1, obs_dim))
        self.register_buffer("std", torch.ones(S, 1, obs_dim))

    def members(self, s):  # (S, 1 or E, B, obs_dim) -> (S, E, B, act_dim)
        return torch.tanh(self.net((s - self.mean.unsqueeze(1)) / self.std.unsqueeze(1)))

    def forward(self, s):  # (S, B, obs_dim) -> (S, B, act_dim)
        return self.members(s.unsqueeze(1)).mean(1)


# --- losses: each returns one value per seed, (S,) ---
def actor_loss(actor, batch):
    """L_pi = E[ (pi(s) - a)^2 ]"""
    s, a, *_ = batch
    return (actor.members(s) - a).square().mean((-3, -2, -1))


# --- data: aggregation ---
class Replay(nn.Module):
    """D of one agent: obs (1, N, obs_dim) where the expert had control, its action there (1, N, act_dim)."""

    def __init__(self, S, N, obs_dim, act_dim):
        super().__init__()
        self.register_buffer("obs", torch.zeros(S, N, obs_dim), persistent=False)
        self.register_buffer("action", torch.zeros(S, N, act_dim), persistent=False)
        self.register_buffer("size", torch.tensor(0), persistent=False)

    def get_extra_state(self):  # the labels made so far
        return {name: x[:, : self.size].clone() if x.dim() else x.clone() for name, x in self.named_buffers()}

    def set_extra_state(self, state):
        for name, x in self.named_buffers():
            (x[:, : state["size"]] if x.dim() else x).copy_(state[name])

    def add(self, obs, action):  # (S, .)
        i = int(self.size)
        self.obs[:, i], self.action[:, i] = obs, action
        self.size += 1

    def sample(self, B):  # s, a, each (S, B, .)
        S, _, _ = self.obs.shape
        i = (torch.rand(S, B, dtype=torch.float64, device=self.size.device) * self.size).long()
        k = torch.arange(S, device=i.device).unsqueeze(1)
        return self.obs[k, i], self.action[k, i]


# --- acting ---
def load_expert(args, task):
    """pi* of --expert, from raw observations (B, obs_dim) to actions (B, act_dim) in [-1, 1], on the CPU."""
    shape, shift, scale = (2, task.act_dim), task.shift.cpu(), task.scale.cpu()
    places = Path(args.expert), Path(__file__).resolve().parents[1] / args.expert
    path = next((x for x in places if x.is_file()), None)
    if path is None:
        fail(f"--expert {args.expert} is no file: name the policy.pt2 of a run, for example of sac.py")
    with attempt(f"--expert {path} is no policy for {args.env_id}"):
        policy = torch.export.load(path).module()
        found = policy(torch.zeros(2, task.obs_dim))[0].shape
        assert found == shape, f"its actions have {found[-1]} dimensions, not {task.act_dim}"
    return lambda obs: ((policy(obs)[0] - shift) / scale).clamp(-1, 1)


@torch.no_grad()
def collect(args, task, expert, actor, replay, i):
    """Round i: each agent acts in its environment, the expert where g. Returns (k, doubt) of each takeover."""
    S, hold, shift, scale = args.num_seeds, args.hold if i > 1 else math.inf, task.shift.cpu(), task.scale.cpu()
    envs = [gym.make(task.spec, disable_env_checker=True) for _ in range(S)]
    obs, over, episode = np.zeros((S, task.obs_dim), np.float32), np.ones(S, bool), np.zeros(S, int)
    calm, takeovers = torch.full((S,), args.hold), []  # calm: steps in a row without a wish to take over
    for _ in range(args.steps_per_round):
        for k in np.flatnonzero(over):
            seed = draw_seed(args.seed, 0, k, episode[k], i)
            obs[k], episode[k] = flat(envs[k].reset(seed=seed)[0]), episode[k] + 1
        s = torch.from_numpy(obs)  # (S, obs_dim)
        label = expert(s)  # (S, act_dim), whoever acts
        pi = actor(s.to(args.device).unsqueeze(1)).squeeze(1).cpu()
        wanted = (label - pi).norm(dim=-1) > args.threshold * (args.gate == "discrepancy")  # not NaN
        taken, calm = wanted & (calm >= hold), torch.where(wanted, 0, calm + 1)
        action = torch.where((calm < hold).unsqueeze(1), label.nan_to_num(), pi)
        doubt = actor.members(s.to(args.device)[:, None, None]).var(1, correction=0).norm(dim=-1)  # |diag C|
        takeovers += [(k, doubt[k].item()) for k in taken.nonzero().flatten().tolist()]
        for k, raw in enumerate((shift + scale * action).nan_to_num().numpy()):
            if calm[k] < hold:
                replay[k].add(s[k], action[k])
            next_obs, _, terminated, truncated, _ = envs[k].step(raw)
            obs[k], over[k] = flat(next_obs), terminated or truncated
    return takeovers


# --- agent ---
def prepare(actor, replay):
    """After each round: each agent's observations to mean 0 and deviation 1 over its D."""
    for k, obs in enumerate(own.obs[0, : own.size] for own in replay):
        actor.mean[k], actor.std[k] = obs.mean(0), obs.std(0, correction=0) + 1e-3


class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, data):
        super().__init__()
        self.args, self.data, self.updates_per_call = args, data, 1
        self.actor = self.policy = Actor(args.num_seeds, args.ensemble, obs_dim, act_dim, args.hidden_dim)
        self.actor_opt = adam(self.actor, args.learning_rate)

    def update(self):
        s_and_a = zip(*(own.sample(self.args.ensemble * self.args.batch_size) for own in self.data))
        l_pi = actor_loss(self.actor, [torch.cat(x).unflatten(1, (self.args.ensemble, -1)) for x in s_and_a])
        step(self.actor_opt, l_pi)
        return {"actor_loss": l_pi, "labels": torch.stack([own.size for own in self.data]).float()}  # each (S,)


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


# --- main: interactive ---
def load_person(args, task):
    """pi* as an action (1, act_dim) while arrow keys are down, else NaN; and the task with a window."""
    with attempt("--gate keyboard needs --num-seeds 1, a screen and an environment that opens a pygame window"):
        import pygame
        pygame.display.init()
        assert args.num_seeds == 1 and pygame.display.get_driver() != "offscreen", "one of them is not here"
        task = copy.deepcopy(task)
        task.spec.kwargs["render_mode"] = "human"
        gym.make(task.spec).reset()
        assert pygame.display.get_surface(), f"{args.env_id} opens none"
    down = dict.fromkeys((pygame.K_UP, pygame.K_DOWN, pygame.K_RIGHT, pygame.K_LEFT), False)
    steer = torch.eye(task.act_dim)[[0, 0, -1, -1]] * torch.tensor([1.0, -1.0, 1.0, -1.0]).unsqueeze(1)

    def person(obs):
        down.update((x.key, x.type == pygame.KEYDOWN) for x in pygame.event.get() if getattr(x, "key", 0) in down)
        held = torch.tensor([[*down.values()]]).float()  # (1, 4)
        return torch.where(held.any(), (held @ steer).clamp(-1, 1), torch.nan)

    return person, task


def main(args):
    """Acts, is labelled and clones, round by round, evaluates, saves; returns the run's directory."""
    setup(args)
    if args.resume and json.loads(Path(args.resume, "args.json").read_text())["num_updates"] != args.num_updates:
        fail("--num-updates says how long a round is: it cannot be given anew")
    per_round = -(-args.num_updates // args.rounds)
    with torch.device(args.device):
        task = make_task(args)
        task.spec.max_episode_steps = args.horizon or task.spec.max_episode_steps
        shape = 1, args.rounds * args.steps_per_round, task.obs_dim, task.act_dim
        replay = nn.ModuleList(Replay(*shape) for _ in range(args.num_seeds))
        agent = Agent(args, task.obs_dim, task.act_dim, replay)
    expert, shown = load_person(args, task) if args.gate == "keyboard" else (load_expert(args, task), task)
    update = agent.update if args.device == "cpu" else cuda_graph(agent.update).__next__
    run = Run(args, agent, task, per_round * args.rounds)

    def collect_and_clone():
        if run.update % per_round == 0:
            for k, doubt in collect(args, shown, expert, agent.actor, replay, run.update // per_round + 1):
                run.losses.append(f"{run.update},{k},doubt,{doubt:.6g}")
                I = [float(row.split(",")[3]) for row in run.losses if f",{k},doubt," in row]
                run.losses.append(f"{run.update},{k},tau,{np.mean(I[3 * len(I) // 4 :]):.6g}")
            prepare(agent.actor, replay)
        return update()

    return train(run, collect_and_clone)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
