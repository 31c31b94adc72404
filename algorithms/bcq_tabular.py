# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19", "matplotlib>=3.9", "pytest>=8.3"]
# ///
"""BCQ on a finite MDP: Off-Policy Deep Reinforcement Learning without Exploration, its section 4.
Fujimoto, Meger & Precup, ICML 2019. https://arxiv.org/abs/1812.02900

    M_B: p(s'|s, a) = N(s, a, s') / N(s, a),  counted in the batch B
    y       = r + gamma max_{a': (s', a') in B} Q(s', a'),  0 instead of the max where B holds no action
    Q(s, a) <- (1 - alpha) Q(s, a) + alpha E[y],  (s, a) in B,  E over M_B
    pi(s)   = arg max_{a: (s, a) in B} Q(s, a)

    python algorithms/bcq_tabular.py --env-id FrozenLake-v1 --slip 0.6666667 --num-episodes 30 --num-seeds 100

If the MDP is deterministic and the batch holds whole episodes, Q is the true value of pi; logged as q_start, compare
it with the discounted return in eval.csv. If chance plays a part, it may carry pi to states where B holds nothing;
logged as carried, the share of episodes in which it does. Both it and eval.csv are exact, from the transition table.
policy.pt2 maps states (B,) of dtype long to actions (S, B). table.csv: states and actions of seed 0.
Departs from the paper: an update is a sweep over all (s, a) in B, in expectation: at alpha = 1 value iteration in M_B,
to whose fixed point the paper's Q-learning converges. Where B holds no action, pi takes action 0.
Shapes: S seeds, n states, A actions, B states given to pi. Each seed has a batch of its own and they never interact.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn


@dataclass
class Args:
    # --- run ---
    env_id: str = "lattice"  # the MDP of this file, or an environment with a transition table, FrozenLake without slip
    seed: int = 0  # seeds every random stream; agent k of a run is not the agent of --seed k
    num_seeds: int = 1  # independent agents trained side by side
    num_updates: int = 1_000  # sweeps of each agent
    eval_every: int = 100  # updates between two evaluations
    eval_episodes: int = 1  # 0: no evaluation; else one by expectation, whatever the number
    eval_workers: int = 0  # at most so many processes evaluate while training goes on; 0: in line
    device: str = "auto"  # cuda, cpu, or auto: cuda where there is one
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    learning_rate: float = 1.0  # alpha, step of a sweep; 1: value iteration
    gamma: float = 0.99  # discount
    # --- data ---
    slip: float = 0.0  # chance that action a - 1 or a + 1 happens for a; 0.6666667: Gymnasium's slippery FrozenLake
    num_episodes: int = 10  # episodes in the batch of each agent
    epsilon: float = 0.5  # chance of a uniform action in them; else it is an optimal one


# --- batch and policy ---
class Batch(nn.Module):
    """M_B of the counts N (S, n, A, n), the expected rewards (n, A, n) of these and the first states (S, n)."""

    def __init__(self, count, reward, start):
        super().__init__()
        total = count.sum(-1)  # (S, n, A)
        self.register_buffer("count", count)
        self.register_buffer("start", start / start.sum(-1, keepdim=True))
        self.register_buffer("prob", count / total.clamp(min=1).unsqueeze(-1))
        self.register_buffer("reward", (self.prob * reward).sum(-1))  # (S, n, A)
        self.register_buffer("mask", total > 0)  # (s, a) in B


class Policy(nn.Module):
    """pi(s) = arg max_{a: (s, a) in B} Q(s, a)"""

    def __init__(self, mask):
        super().__init__()
        self.Q = nn.Parameter(torch.zeros_like(mask, dtype=torch.float64), requires_grad=False)  # (S, n, A)
        self.register_buffer("mask", mask.clone())

    def forward(self, s):  # (S, B) -> (S, B)
        pi = self.Q.masked_fill(~self.mask, -torch.inf).argmax(-1)  # (S, n), 0 where all are masked
        return pi.gather(1, s)


# --- update ---
def value(Q, mask):
    """v(s) = max_{a: (s, a) in B} Q(s, a), 0 where B holds no action: terminal states and those without data"""
    return Q.masked_fill(~mask, -torch.inf).amax(-1).masked_fill(~mask.any(-1), 0)  # (S, n, A) -> (S, n)


def backup(Q, batch, args):
    """E[y] = E[r + gamma v(s')]"""
    v = value(Q, batch.mask)
    return batch.reward + args.gamma * torch.einsum("knax,kx->kna", batch.prob, v)  # (S, n, A)


# --- agent ---
class Agent:
    def __init__(self, args, batch):
        self.args, self.batch = args, batch
        self.policy, self.updates_per_call = Policy(batch.mask), 1
        self.modules, self.optimizers = {"policy": self.policy, "batch": batch}, {}

    @torch.no_grad()
    def update(self):
        Q, mask = self.policy.Q, self.batch.mask
        error = mask * (backup(Q, self.batch, self.args) - Q)
        Q += self.args.learning_rate * error
        q_start = (self.batch.start * value(Q, mask)).sum(-1)
        return {"bellman_error": error.abs().amax((-2, -1)), "q_start": q_start}  # each (S,)


# --- shared: imports ---
import functools, io, json, multiprocessing, os, pickle, platform, re, signal, subprocess, sys, threading, time
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gymnasium as gym, h5py, huggingface_hub, minari, numpy as np, tyro
from tqdm import tqdm


# --- data: a finite MDP ---
ENDS = 8, 0, 4, 2, 6, 10  # rewards in the lattice's last column, from its bottom to its top


class Table(NamedTuple):
    """A finite MDP of n states and A actions. Terminal states keep to themselves at no reward."""

    prob: torch.Tensor  # (n, A, n)
    reward: torch.Tensor  # (n, A, n), expected
    square: torch.Tensor  # (n, A, n), expected square of the reward
    terminal: torch.Tensor  # (n,)
    start: torch.Tensor  # (n,)
    horizon: int  # steps after which an episode is cut off


def lattice():
    """Columns of 1, 2, ..., 6 states from left to right, numbered upwards: action 0 leads down, action 1 up. As in
    Gymnasium: P[s][a] = [(p, s', r, terminated)], the distribution of the first state, the horizon."""
    P, T = {}, len(ENDS) - 1
    for t in range(T):
        for i in range(t + 1):
            s, last = len(P), t == T - 1
            P[s] = [[(1.0, s + t + 1 + a, ENDS[i + a] if last else 0, last)] for a in (0, 1)]
    for s in range(len(P), len(P) + len(ENDS)):
        P[s] = [[(1.0, s, 0, True)]] * 2
    return P, np.eye(len(P))[0], T


def known(env_id):
    """The same of a Gymnasium environment; FrozenLake as it is without slipping."""
    try:
        env = gym.make(env_id, **({"is_slippery": False} if "FrozenLake" in env_id else {}))
        return env.unwrapped.P, env.unwrapped.initial_state_distrib, env.spec.max_episode_steps or 1000
    except Exception as error:
        fail(f"--env-id {env_id} has no transition table ({error}): it can be lattice, FrozenLake-v1, "
             "FrozenLake8x8-v1, CliffWalking-v1 or any other environment with env.unwrapped.P")


class MDP:
    """What a run knows of the MDP: `spec`, its Table; `behaviour` (n, A), the policy that makes the data; `reference`,
    the returns of a uniform policy and of one that is optimal for the discounted return."""

    mean = shift = torch.tensor(0)  # states and actions are indices
    std = scale = torch.tensor(1)
    obs_space = None

    def __init__(self, args):
        for name in "slip", "epsilon", "learning_rate":
            if not 0 <= getattr(args, name) <= 1:
                fail(f"--{name.replace('_', '-')} cannot be {getattr(args, name)}")
        P, start, horizon = lattice() if args.env_id == "lattice" else known(args.env_id)
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
        self.spec = Table(prob, reward, square, terminal, start, horizon)
        solver = Agent(replace(args, learning_rate=1.0), Batch(prob[None], reward, start[None]))
        for _ in range(horizon):
            solver.update()
        optimal = torch.eye(A, dtype=torch.float64)[solver.policy(torch.arange(n)[None])[0]]
        uniform = torch.full_like(optimal, 1 / A)
        self.behaviour = args.epsilon * uniform + (1 - args.epsilon) * optimal
        low, high = returns(self.spec, torch.stack([uniform, optimal]), args.gamma)[0].tolist()
        self.reference = (low, high) if high - low > 1e-6 else (np.nan, np.nan)


def draw(task, args):
    """The Batch: of each seed --num-episodes of the behaviour, from a random stream of its own."""
    table, E = task.spec, args.num_episodes
    count, start = torch.zeros(args.num_seeds, *table.prob.shape, dtype=torch.float64), []
    for k in range(args.num_seeds):
        rng = torch.Generator().manual_seed(draw_seed(args.seed, k))
        pick = lambda p: torch.multinomial(p, 1, generator=rng).squeeze(-1)
        s = pick(table.start.expand(E, -1))
        start.append(s.bincount(minlength=len(table.start)).double())
        for _ in range(table.horizon):
            s = s[~table.terminal[s]]
            if not len(s):
                break
            a = pick(task.behaviour[s])
            s_next = pick(table.prob[s, a])
            count[k].index_put_((s, a, s_next), torch.ones(len(s), dtype=torch.float64), accumulate=True)
            s = s_next
    return Batch(count, table.reward, torch.stack(start)).to(args.device)


def draw_seed(*key):
    """A seed for one stream of random numbers, fixed by the integers of its key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# --- evaluation: exact ---
class RawPolicy(nn.Module):
    """From states (B,) to actions (S, B), on the CPU."""

    def __init__(self, policy, S, task):
        super().__init__()
        self.policy, self.S = deepcopy(policy).cpu(), S

    def forward(self, s):
        return self.policy(s.expand(self.S, -1))


def export(policy):
    """RawPolicy as a .pt2 file: `torch.export.load(path).module()` maps states (B,), long, to actions (S, B)."""
    buffer, example, batch = io.BytesIO(), torch.zeros(2, dtype=torch.long), {0: torch.export.Dim("B")}
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=(batch,)), buffer)
    return buffer.getvalue()


def greedy(policy, table):
    """The RawPolicy as probabilities (S, n, A)."""
    return torch.eye(table.prob.shape[1], dtype=torch.float64)[policy(torch.arange(len(table.start)))]


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


def visits(table, pi, mask):
    """Expected visits of each state in an episode (S, n); share of episodes that come to where B is empty (S,)."""
    P = torch.einsum("kna,nax->knx", pi, table.prob)
    empty = ~(mask.any(-1) | table.terminal).unsqueeze(1)  # (S, 1, n)
    p = q = table.start.expand(len(P), 1, -1)  # of each state now; without having come to an empty one
    found, carried = 0, 0
    for _ in range(table.horizon):
        found, carried, q = found + p, carried + (q * empty).sum((-2, -1)), q * ~empty
        p, q = p @ P, q @ P
    return found.squeeze(1) * ~table.terminal, carried


def evaluate(policy, spec, obs_space, update, seeds, alive, gamma, reference):
    """Rows of eval.csv for the agents `alive`: expectations over all episodes."""
    policy, table, (low, high) = pickle.loads(policy), pickle.loads(spec), reference
    rows = returns(table, greedy(policy, table), gamma).T.tolist()
    return [[update, k, seeds.shape[1], *row, 100 * (row[0] - low) / (high - low)]
            for k, row in enumerate(rows) if alive[k]]


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


# --- main: tabular ---
def follow(task, agent):
    """`visits` of the agent's policy."""
    policy = RawPolicy(agent.policy, agent.args.num_seeds, task)
    return visits(task.spec, greedy(policy, task.spec), agent.batch.mask.cpu())


def picture(task, agent):
    """table.csv: of each state and action of seed 0 the count, Q, whether pi takes it, and the state's visits."""
    count, Q, (found, _) = agent.batch.count[0].sum(-1), agent.policy.Q[0], follow(task, agent)
    pi = agent.policy(torch.arange(len(Q), device=Q.device).expand(agent.args.num_seeds, -1))[0]
    rows = [f"{s},{a},{count[s, a]:.0f},{Q[s, a]:.6f},{pi[s] == a:d},{found[0, s]:.6f}" for s, a in np.ndindex(Q.shape)]
    return "\n".join(["state,action,count,q,greedy,visits", *rows, ""])


def main(args):
    """Draws the data, sweeps, evaluates, saves; returns the run's directory."""
    args = check(args)
    task = MDP(args)
    agent = Agent(args, draw(task, args))
    run = Run(args, agent, task, args.num_updates)
    while run.update < run.total:
        losses, update = agent.update(), run.update + 1
        if update % run.every == 0 or update >= run.total:  # when the run looks at them
            losses["carried"] = follow(task, agent)[1]
        run.log(losses)
    run.write("table.csv", picture(task, agent))
    return run.finish()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(tyro.cli(Args))
