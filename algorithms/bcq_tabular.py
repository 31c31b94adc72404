# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""BCQ on a finite MDP: Off-Policy Deep Reinforcement Learning without Exploration, its section 4.
Fujimoto, Meger & Precup, ICML 2019. https://arxiv.org/abs/1812.02900

    M_B: p(s'|s, a) = N(s, a, s') / N(s, a),  counted in the batch B
    y       = r + gamma max_{a': (s', a') in B} Q(s', a'),  0 instead of the max where B holds no action
    Q(s, a) <- (1 - alpha) Q(s, a) + alpha E[y],  (s, a) in B,  E over M_B
    pi(s)   = arg max_{a: (s, a) in B} Q(s, a)

    python algorithms/bcq_tabular.py --env-id FrozenLake-v1 --slip 0.6666667 --num-episodes 30 --num-seeds 100

If the MDP is deterministic and B coherent (every s' of B is terminal or begins a transition of B, which the end of an
episode that is cut at the horizon may break), Q is the true value of pi: logged as q_start, compare it with the
discounted return in eval.csv. If chance plays a part, it may carry pi to states where B holds nothing: logged as
carried, the share of episodes in which it does. Both it and eval.csv, for episodes up to the horizon, are exact.
policy.pt2 maps states (B,) of dtype long to actions (S, B). table.csv: states and actions of seed 0.
Departs from the paper: an update is a sweep over all (s, a) in B, in expectation: at alpha = 1 value iteration in M_B,
to whose fixed point the paper's Q-learning converges. r is the expectation of the table for (s, a, s'), not the mean of
those seen in B. Where B holds no action, pi takes action 0.
Shapes: S seeds, n states, A actions, B states given to pi. Each seed has a batch of its own and they never interact.
"""
from concurrent.futures import Future
from dataclasses import dataclass, replace
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
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
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
class Agent(nn.Module):
    def __init__(self, args, batch):
        super().__init__()
        self.args, self.batch, self.updates_per_call = args, batch, 1
        self.policy = Policy(batch.mask)

    @torch.no_grad()
    def update(self):
        Q, mask = self.policy.Q, self.batch.mask
        error = mask * (backup(Q, self.batch, self.args) - Q)
        Q += self.args.learning_rate * error
        q_start = (self.batch.start * value(Q, mask)).sum(-1)
        return {"bellman_error": error.abs().amax((-2, -1)), "q_start": q_start}  # each (S,)


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
    with attempt(f"--env-id {env_id} has no transition table, as lattice, FrozenLake-v1, FrozenLake8x8-v1, "
                 "CliffWalking-v1 and other environments with env.unwrapped.P do"):
        env = gym.make(env_id, **({"is_slippery": False} if "FrozenLake" in env_id else {}))
        return env.unwrapped.P, env.unwrapped.initial_state_distrib, env.spec.max_episode_steps or 1000


class MDP:
    """What a run knows of the MDP: `spec`, its Table; `behaviour` (n, A), the policy that makes the data; `reference`,
    the returns of a uniform policy and of one that is optimal for the discounted return."""

    mean = shift = torch.tensor(0)  # states and actions are indices
    std = scale = torch.tensor(1)

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
        self.policy, self.S = copy.deepcopy(policy).cpu(), S

    def forward(self, s):
        return self.policy(s.expand(self.S, -1))


def export(policy, path):
    """`torch.export.load(path).module()` maps states (B,), long, to actions (S, B)."""
    example, batch = torch.zeros(2, dtype=torch.long), {0: torch.export.Dim("B")}
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=(batch,)), path)


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


def evaluate(policy, table, gamma, reference):
    """Return, its deviation, discounted return, length and score (S, 5), expected over all episodes."""
    rows, (low, high) = returns(table, greedy(policy, table), gamma).T.numpy(), reference
    return np.concatenate([rows, 100 * (rows[:, :1] - low) / (high - low)], 1)


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


# --- main: tabular ---
class ExactRun(Run):
    def evaluate(self):
        """At once and here: an expectation takes a moment."""
        if self.args.eval_episodes:
            policy, job = RawPolicy(self.agent.policy, self.args.num_seeds, self.task), Future()
            job.set_result(evaluate(policy, self.task.spec, self.args.gamma, self.task.reference))
            self.jobs.append((self.update, job))


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
    setup(args)
    task = MDP(args)
    agent = Agent(args, draw(task, args)).to(args.device)
    run = ExactRun(args, agent, task, args.num_updates)

    def sweep():
        losses, now = agent.update(), run.update + 1
        if now % 1000 == 0 or now == run.total:  # where losses are logged
            losses["carried"] = follow(task, agent)[1]
            run.write("table.csv", picture(task, agent))
        return losses

    return train(run, sweep)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
