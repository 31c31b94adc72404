# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""BEAR's grid world: to stay in the support of the data, or close to its distribution? Both exactly.
Kumar, Fu, Tucker & Levine, NeurIPS 2019. https://arxiv.org/abs/1906.00949
The grid: https://bair.berkeley.edu/blog/2019/12/05/bear/

    trap - left - ... - left - S - both - ... - both - G        2 n + 1 cells; G gives 1, the trap nothing
    mu(right|s) = 0.1 in S and beyond it, 0 left of S;  (s, a) in the data: mu(a|s) > 0
    Q(s, a) <- E[r + gamma sum_a' pi(a'|s') Q(s', a')],  (s, a) in the data
    support: pi(s)   = arg max_a Q(s, a),  mu(a|s) >= eps
    kl:      pi(.|s) = arg max_p sum_a p(a) Q(s, a),  KL(p, mu) <= eps
    penalty: pi(.|s) = arg max_p sum_a p(a) Q(s, a) - alpha KL(p, mu)

    python algorithms/bear_gridworld.py --constraint support --tightest 0.5 --loosest 0.001
    python algorithms/bear_gridworld.py --constraint kl --tightest 0.001 --loosest 10
    python algorithms/bear_gridworld.py --constraint penalty --tightest 10 --loosest 0.001

The return in eval.csv is the chance of reaching G within 20 n^2 steps, exactly; the discounted return is the
value of S, which q_start promises. To copy mu is to reach G with a chance of 8 / (9^(n+1) - 1). Where mu is 0 Q
stays at --ood-value, an error that no data correct, and the constraint sees mu with a little --smoothing, as a
fitted density would: on the distribution a tight one copies mu, and one that is loose enough to go right beyond S
goes for that error left of S, and so in circles around S. At n = 5 no alpha and no eps is right in between, at
n = 2 an eps of 1.9 is (0.96); with no error (--ood-value 0) any that is loose reaches G. The error tempts a support
constraint too, if eps is below half of --smoothing. The sweeps of a penalty may go round in circles, which
bellman_error shows.
table.csv: the policies of the agents.
Departs from the paper: no method of it but its argument; MMD, its means for continuous actions, is not needed.
Shapes: S agents, each with an eps or alpha of its own, n states, A actions, B states given to pi. They never
interact.
"""
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:
    # --- run ---
    env_id: Literal["line"] = "line"  # the grid world of this file
    seed: int = 0  # part of the run's name; nothing is drawn
    num_seeds: int = 13  # agents side by side, from the tightest constraint to the loosest in equal ratios
    num_updates: int = 1_000  # sweeps of each agent
    eval_every: int = 500  # updates between two evaluations
    eval_episodes: int = 1  # 0: no evaluation; else one by expectation, whatever the number
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- grid world ---
    distance: int = 5  # n, steps from S to G, and from S to the trap
    right: float = 0.1  # mu(right|s) in S and beyond it
    # --- optimisation ---
    gamma: float = 0.99  # discount
    ood_value: float = 2.0  # Q(s, a) where mu(a|s) is 0
    # --- constraint ---
    constraint: Literal["support", "kl", "penalty"] = "support"  # what keeps pi to mu
    tightest: float = 0.5  # eps or alpha of agent 0
    loosest: float = 0.001  # of the last agent
    smoothing: float = 0.01  # share of a uniform policy in what the constraint takes for mu


# --- policies: of Q (S, n, A), mu (n, A), eps or alpha (S, 1) the probabilities (S, n, A) ---
def support(Q, mu, eps):
    """pi(s) = arg max_a Q(s, a),  mu(a|s) >= eps; the likeliest action is always allowed"""
    allowed = (mu >= eps.unsqueeze(-1)) | (mu == mu.amax(-1, keepdim=True))
    return F.one_hot(Q.masked_fill(~allowed, -torch.inf).argmax(-1), Q.shape[-1]).to(Q.dtype)


def penalty(Q, mu, alpha):
    """pi(a|s) = mu(a|s) exp(Q(s, a) / alpha) / Z(s), where sum_a p(a) Q(s, a) - alpha KL(p, mu) is largest"""
    return (mu.log() + Q / alpha.unsqueeze(-1)).softmax(-1)


def divergence(pi, mu):
    """KL(pi, mu) = sum_a pi(a|s) log(pi(a|s) / mu(a|s))"""
    return (torch.xlogy(pi, pi) - torch.xlogy(pi, mu)).sum(-1)  # (S, n)


def kl(Q, mu, eps):
    """The same at each state's smallest alpha with KL(pi, mu) <= eps, found: by bisection"""
    low = torch.full_like(Q[..., 0], -30)  # log alpha (S, n)
    high = -low
    for _ in range(60):
        middle = (low + high) / 2
        fits = divergence(penalty(Q, mu, middle.exp()), mu) <= eps
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return penalty(Q, mu, high.exp())


class Policy(nn.Module):
    def __init__(self, pi):
        super().__init__()
        self.pi = nn.Parameter(pi, requires_grad=False)  # (S, n, A)

    def forward(self, s):  # (S, B) -> (S, B, A)
        return self.pi.gather(1, s.unsqueeze(-1).expand(-1, -1, self.pi.shape[-1]))


# --- agent ---
class Agent(nn.Module):
    least = {"ood_value": -torch.inf}

    def __init__(self, args, task):
        super().__init__()
        table, self.args, self.updates_per_call, S = task.spec, args, 1, args.num_seeds
        data = task.mu > 0  # (n, A)
        place = torch.linspace(0, 1, S, dtype=torch.float64)
        strength = args.tightest * (args.loosest / args.tightest) ** place
        mu = (1 - args.smoothing) * task.mu + args.smoothing / task.mu.shape[-1]
        Q = args.ood_value * (~data).double().repeat(S, 1, 1)  # (S, n, A)
        for name, x in (("prob", table.prob), ("reward", table.reward), ("data", data), ("mu", mu), ("Q", Q),
                        ("strength", strength.unsqueeze(-1))):
            self.register_buffer(name, x)
        self.choose = {"support": support, "kl": kl, "penalty": penalty}[args.constraint]
        self.policy = Policy(self.choose(Q, mu, self.strength))

    def update(self):
        Q, pi = self.Q, self.policy.pi
        v = (pi * Q).sum(-1)  # (S, n)
        y = (self.prob * (self.reward + self.args.gamma * v.view(len(v), 1, 1, -1))).sum(-1)  # (S, n, A)
        error = self.data * (y - Q)
        Q += error
        pi.copy_(self.choose(Q, self.mu, self.strength))
        q_start = (pi * Q).sum(-1)[:, self.args.distance]
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


# --- data: the grid world ---
class Table(NamedTuple):
    """A finite MDP of n states and A actions. Terminal states keep to themselves at no reward."""

    prob: torch.Tensor  # (n, A, n)
    reward: torch.Tensor  # (n, A, n), expected
    square: torch.Tensor  # (n, A, n), expected square of the reward
    terminal: torch.Tensor  # (n,)
    start: torch.Tensor  # (n,)
    horizon: int  # steps after which an episode is cut off


class Line:
    """What a run knows of the grid world: `spec`, its Table, in which the trap is state 0, S is n and G is 2 n, action
    0 leads left and 1 right; `mu` (2 n + 1, 2), uniform in terminal states; `reference`, for scores of 100 at G."""

    reference = 0.0, 1.0

    def __init__(self, args):
        S, G = args.distance, 2 * args.distance
        states = torch.arange(G + 1)
        eye, terminal = torch.eye(G + 1, dtype=torch.float64), states % G == 0
        prob = torch.stack([eye[(states - 1).clamp(min=0)], eye[(states + 1).clamp(max=G)]], 1)  # (n, A, n)
        prob[terminal] = eye[terminal].unsqueeze(1)
        reward = torch.zeros_like(prob)
        reward[G - 1, 1, G] = 1
        horizon = 20 * S**2  # a random walk is still under way then with a chance of 1e-10
        self.spec = Table(prob, reward, reward, terminal, eye[S], horizon)
        right = args.right * (states >= S).double()
        right[terminal] = 0.5
        self.mu = torch.stack([1 - right, right], -1)


# --- evaluation: exact ---
class RawPolicy(nn.Module):
    """From states (B,) to the probabilities of the actions (S, B, A), on the CPU."""

    def __init__(self, policy, S, task):
        super().__init__()
        self.policy, self.S = copy.deepcopy(policy).cpu(), S

    def forward(self, s):
        return self.policy(s.expand(self.S, -1))


def export(policy, path):
    """`torch.export.load(path).module()` maps states (B,), long, to probabilities (S, B, A)."""
    example, batch = torch.zeros(2, dtype=torch.long), {0: torch.export.Dim("B")}
    torch.export.save(torch.export.export(policy, (example,), dynamic_shapes=(batch,)), path)


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


def evaluate(policy, table, gamma, reference):
    """Return, its deviation, discounted return, length and score (S, 5), expected over all episodes."""
    rows, (low, high) = returns(table, policy(torch.arange(len(table.start))), gamma).T.numpy(), reference
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


# --- main: grid world ---
class ExactRun(Run):
    def evaluate(self):
        """At once and here: an expectation takes a moment."""
        if self.args.eval_episodes:
            policy, job = RawPolicy(self.agent.policy, self.args.num_seeds, self.task), Future()
            job.set_result(evaluate(policy, self.task.spec, self.args.gamma, self.task.reference))
            self.jobs.append((self.update, job))


def picture(task, agent, q_start):
    """table.csv: of each agent its eps or alpha, how it fares, what Q promises, and pi(right|s) in each cell from S."""
    args, policy = agent.args, RawPolicy(agent.policy, agent.args.num_seeds, task)
    rows, n = evaluate(policy, task.spec, args.gamma, task.reference), args.distance
    pi = policy(torch.arange(1, 2 * n))[..., 1].tolist()
    text = ["agent,strength,reaches_g,value,q_start," + ",".join(f"right_{x - n:+d}" for x in range(1, 2 * n))]
    for k, (row, promise, right) in enumerate(zip(rows, q_start, pi)):
        numbers = agent.strength[k], row[0], row[2], promise, *right
        text.append(f"{k}," + ",".join(f"{x:.6g}" for x in map(float, numbers)))
    return "\n".join([*text, ""])


def main(args):
    """Sweeps, evaluates, saves; returns the run's directory."""
    setup(args)
    for name, low, high in ("right", 0, 1), ("smoothing", 0, 1), ("tightest", 1e-12, 1e12), ("loosest", 1e-12, 1e12):
        if not low <= getattr(args, name) <= high:
            fail(f"--{name} cannot be {getattr(args, name)}")
    task = Line(args)
    agent = Agent(args, task).to(args.device)
    run = ExactRun(args, agent, task, args.num_updates)

    def sweep():
        losses, now = agent.update(), run.update + 1
        if now % 1000 == 0 or now == run.total:  # where losses are logged
            run.write("table.csv", picture(task, agent, losses["q_start"]))
        return losses

    return train(run, sweep)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
