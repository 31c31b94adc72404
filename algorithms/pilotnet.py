# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy>=2.0", "gymnasium[mujoco,box2d]>=1.2.3", "minari[hdf5,hf]>=0.5.4",
#   "tyro>=0.9.20", "tqdm>=4.66", "wandb>=0.19"]
# ///
"""PilotNet: End to End Learning for Self-Driving Cars.
Bojarski et al., 2016. https://arxiv.org/abs/1604.07316

    L_pi     = E[ (pi(s) - a)^2 ],  s what a camera sees, a = 1/r of the turn to make, right positive
    a        = a_driver + recover(shift, turn),  s seen from `shift` m right of him and turned right by `turn`
    recover  = -6 shift / L^2 - 4 turn / L:  the cubic that is back on his way, and along it, in the L m of 2 s
    autonomy = 100 (1 - 6 s * interventions / elapsed time),  the score in eval.csv

    python algorithms/pilotnet.py --num-seeds 2 --num-updates 2000

With --no-side-cameras the network sees what the driver saw and no more. test_loss is L_pi on other roads, where
the driver himself looks, and says little of how it drives: who stays in the middle is not shown the way back.
Departs from the paper: roads are drawn, on a plane, and a formula drives, who wanders little; left to itself
the car pulls to a side a bit. A shifted and turned view is drawn as such, where the paper warps the picture of
the nearest camera. Not given there and chosen here: the form of recover, the place of the cameras, how far
views are shifted and turned (the paper: twice a person's deviation), ReLU, Adam, how often bends are drawn.
Its figure has 1164 neurons after the last convolution, its sizes give 1152. The loss is in units of 0.1 / m.
Shapes: S seeds, B batch, N frames, J stations of the road ahead, R rows below the horizon, H x W pixels.
"""
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:
    # --- run ---
    env_id: str = "Road-v0"  # the roads of this file
    seed: int = 0  # seeds every random stream; agent k of a run is not the agent of --seed k
    num_seeds: int = 1  # independent agents trained side by side
    num_updates: int = 2_000  # gradient steps of each agent
    eval_every: int = 500  # updates between two evaluations
    eval_episodes: int = 10  # roads of a minute each, per agent and evaluation; 0: no evaluation
    eval_workers: int = 4  # at most so many processes evaluate while training goes on
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    out_dir: str = "runs"  # the run's directory is made in here
    resume: str = ""  # directory of an interrupted run to go on with, with its flags
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "offline-rl"  # its project
    # --- optimisation ---
    batch_size: int = 16  # pictures per agent and update
    learning_rate: float = 5e-4  # of Adam
    gamma: float = 0.99  # of the discounted return in eval.csv
    # --- PilotNet ---
    num_drives: int = 100  # roads driven for a minute each; 5 more are the test
    side_cameras: bool = True  # cameras left and right, and views shifted and turned from theirs
    shift: float = 0.4  # metres, deviation of the place of these views from their camera
    turn: float = 0.03  # radians, deviation of their direction


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


class Conv(nn.Module):
    """`nn.Conv2d` for S independent networks at once, as S groups."""

    def __init__(self, S, c_in, c_out, size, stride=1):
        super().__init__()
        bound = (c_in * size**2) ** -0.5  # the bound nn.Conv2d draws from
        self.weight = nn.Parameter(torch.empty(S, c_out, c_in, size, size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(S, c_out).uniform_(-bound, bound))
        self.stride = stride

    def forward(self, x):  # (B, S c_in, h, w) -> (B, S c_out, h', w')
        return F.conv2d(x, self.weight.flatten(0, 1), self.bias.flatten(), self.stride, groups=len(self.bias))


class Actor(nn.Module):
    """Figure 4: normalised YUV, five convolutions, four layers that are fully connected."""

    def __init__(self, S):
        super().__init__()
        self.register_buffer("yuv", torch.tensor(
            [[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]]))  # from red, green, blue
        shapes = (3, 24, 5, 2), (24, 36, 5, 2), (36, 48, 5, 2), (48, 64, 3), (64, 64, 3)
        self.convs = nn.Sequential(*(m for shape in shapes for m in (Conv(S, *shape), nn.ReLU())))
        sizes = 1152, 100, 50, 10, 1
        layers = [m for d_in, d_out in zip(sizes, sizes[1:]) for m in (Linear((S,), d_in, d_out), nn.ReLU())]
        self.full = nn.Sequential(*layers[:-1])

    def forward(self, s):  # (S, B, 3 H W) -> (S, B, 1)
        S, planes = len(s), s.unflatten(-1, (3, H * W)) / 127.5 - 1
        yuv = torch.einsum("yc,sbcp->bsyp", self.yuv, planes)  # Y from -1 to 1; no constant in U and V
        h = yuv.flatten(1, 2).unflatten(-1, (H, W))  # (B, S 3, H, W)
        h = self.convs(h.contiguous(memory_format=torch.channels_last)).flatten(1)  # from (B, S 64, 1, 18)
        return self.full(h.unflatten(1, (S, -1)).transpose(0, 1))


# --- losses: each returns one value per seed, (S,) ---
def actor_loss(actor, batch):
    """L_pi = E[ (pi(s) - a)^2 ]"""
    s, a = batch
    return (actor(s) - a).square().mean((-2, -1))


# --- world: a plane with a road; x is ahead, y, turns and 1/r are positive to the right ---
H, W = 66, 200  # pixels
ACROSS, ALONG, HORIZON, HEIGHT = 173.0, 173.0, 8, 1.5  # focal lengths, pixels; row of the horizon; metres
SPEED, DT, MINUTE, LIMIT = 10.0, 0.1, 600, 1.0  # m/s; s from picture to picture; pictures; m from the middle
STATION, J = 2.0, 32  # the road ahead is known at J stations, so many metres apart
HALF, LINE = 2.0, (1.7, 1.9)  # metres from the middle: edge of the road, white line
WANDER, PULL, STEER = 0.05, 0.003, 0.1  # m, by who shows the way; 1/m, to a side, by itself; 1/m, at the most
BEND, WAVES = 0.03, (80.0, 300.0)  # sharpest 1/r of a road, 1/m; metres from bend to bend
COLOURS = (150, 190, 230), (80, 130, 60), (90, 90, 95), (235, 235, 235)  # sky, ground, road, line


def cover(d, low, high, width):
    """Share of the stretch of this width around d that lies between low and high."""
    return ((d + width / 2).clamp(max=high) - (d - width / 2).clamp(min=low)).clamp(min=0) / width


def render(at, e, psi, bend, look):
    """Pictures (B, 3, H, W), 0 to 255. The camera has come `at` m along a way, is e m right of its middle and
    looks psi to the right of where it leads, (B,). From there 1/r is bend (B, J), colours look (B, 4, 3)."""
    v, u = (torch.arange(n, device=e.device) + 0.5 for n in (H - HORIZON, W))
    x = HEIGHT * ALONG / v  # (R,) metres ahead
    y = x.unsqueeze(-1) * (u - W / 2) / ACROSS  # (R, W) metres to the right
    theta = STATION * (bend.cumsum(-1) - bend / 2) - psi.unsqueeze(-1)  # (B, J) where it leads
    theta = theta.clamp(-1.4, 1.4)  # away from the camera
    ahead, right = (F.pad((STATION * f(theta)).cumsum(-1), (1, 0)) for f in (torch.cos, torch.sin))
    ahead, right = ahead - (e * psi.sin()).unsqueeze(-1), right - (e * psi.cos()).unsqueeze(-1)  # (B, J + 1)
    j = torch.searchsorted(ahead, x.expand(len(e), -1).contiguous()).sub(1).clamp(0, J - 1)  # (B, R)
    beyond, theta = x - ahead.gather(1, j), theta.gather(1, j)
    middle, on = right.gather(1, j) + beyond * theta.tan(), j * STATION + beyond / theta.cos()  # (B, R)
    d = ((y - middle.unsqueeze(-1)) * theta.cos().unsqueeze(-1)).abs()  # (B, R, W) from the middle
    width = (x / ACROSS * theta.cos() + x**2 / (HEIGHT * ALONG) * theta.sin().abs()).unsqueeze(-1)  # of a pixel
    sky, ground, road, line = look.unsqueeze(-1).unsqueeze(-1).unbind(1)  # each (B, 3, 1, 1)
    picture = torch.lerp(ground, road, cover(d, -HALF, HALF, width).unsqueeze(1))
    picture = torch.lerp(picture, line, cover(d, *LINE, width).unsqueeze(1))
    rough = (2.1 * (at.unsqueeze(-1) + on)).sin().unsqueeze(-1) * (1.7 * d).cos() / (1 + x / 8).unsqueeze(-1)
    picture = picture * (1 + 0.15 * rough).unsqueeze(1)
    return torch.cat([sky.expand(-1, -1, HORIZON, W), picture.clamp(max=255)], -2)


class World(gym.Env):
    """A way for each seed. Reward: the seconds on it, less 6 for an intervention, which puts back on it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / DT)}
    observation_space = gym.spaces.Box(0, 255, (3 * H * W,))
    action_space = gym.spaces.Box(-STEER, STEER, (1,))  # 1/r

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.waves, self.phase = self.np_random.uniform(*WAVES, 3), self.np_random.uniform(0, 2 * np.pi, 3)
        light = self.np_random.uniform(0.7, 1.05) * self.np_random.uniform(0.85, 1.15, (4, 3))
        self.pull = self.np_random.uniform(-PULL, PULL)
        self.look, self.at, self.e, self.psi = (light * COLOURS).clip(max=255), 0.0, 0.0, 0.0
        return self.see(), {}

    def bend(self, at):
        """1/r of the way at `at` m (n,), of which much is nearly straight."""
        mean = np.sin(2 * np.pi * np.expand_dims(at, -1) / self.waves + self.phase).mean(-1)
        return BEND * np.clip(4 * mean**3, -1, 1)

    def frame(self):
        """What a picture is drawn from: at, e, psi, bend (J,), look (4, 3)."""
        return self.at, self.e, self.psi, self.bend(self.at + STATION * (np.arange(J) + 0.5)), self.look

    def see(self):
        frame = (torch.tensor(np.array([x]), device="cpu").float() for x in self.frame())
        return render(*frame).flatten().numpy()

    def render(self):
        return self.see().reshape(3, H, W).transpose(1, 2, 0).astype(np.uint8)

    def move(self, action):
        """DT seconds along a turn of 1/r = action; whether that ended so far off that the car was put back."""
        bend = self.bend(self.at + SPEED * DT / 2)
        for _ in range(5):
            along = SPEED * np.cos(self.psi) / (1 - self.e * bend)
            self.psi += DT / 5 * (SPEED * action - along * bend)
            self.at, self.e = self.at + DT / 5 * along, self.e + DT / 5 * SPEED * np.sin(self.psi)
        off = abs(self.e) > LIMIT
        self.e, self.psi = (0.0, 0.0) if off else (self.e, self.psi)
        return off

    def step(self, action):
        off = self.move(float(np.clip(action[0], -STEER, STEER)) + self.pull)
        return self.see(), DT - 6.0 * off, False, False, {"intervention": off}


gym.register("Road-v0", World, max_episode_steps=MINUTE)


# --- demonstrations ---
def recover(shift, turn):
    """y''(0) of the cubic with y(0) = shift, y'(0) = turn, y(L) = y'(L) = 0"""
    L = 2 * SPEED
    return -6 * shift / L**2 - 4 * turn / L


def demonstrate(seed):
    """A minute on one way: frames and the 1/r that was driven, by one who keeps to a line that wanders."""
    world, frames, line = World(), [], 0.0
    world.reset(seed=seed)
    for _ in range(MINUTE):
        line += -DT / 3 * line + WANDER * (2 * DT / 3) ** 0.5 * world.np_random.normal()
        frame = world.frame()
        action = frame[3][0] + recover(world.e - line, world.psi)
        frames.append((*frame, action))
        world.move(action)
    return frames


def load(args):
    """The Task of --env-id, with frames to learn from and for a test: at, e, psi (N,), bend (N, J), look
    (N, 4, 3), 1/r (N,). The score of a minute is its autonomy."""
    data = make_task(args)
    if data.obs_dim != 3 * H * W:
        fail(f"--env-id {args.env_id} does not show pictures of {H} x {W} pixels in three colours")
    data.reference = 0.0, DT * MINUTE
    for part, n in enumerate((args.num_drives, 5)):
        seen = [demonstrate(draw_seed(args.seed, part, i)) for i in range(n)]
        columns = zip(*(frame for frames in seen for frame in frames))
        data.parts = *getattr(data, "parts", ()), [torch.tensor(np.array(x)).float() for x in columns]
    return data


def prepare(data, args):
    """Of three draws of a frame two are from the sharper half of what was driven."""
    order = data.parts[0][-1].abs().argsort()
    data.index = torch.cat([order, order[len(order) // 2 :]])


def views(data, args):
    """B pictures s (S, B, 3 H W) for each seed, and where to steer there, a (S, B, 1), in units of 0.1 / m."""
    size = args.num_seeds, args.batch_size
    i = data.index[torch.randint(len(data.index), size, device=args.device)].flatten()
    at, e, psi, bend, look, action = (x[i] for x in data.parts[0])
    camera = torch.randint(-1, 2, size, device=args.device).flatten()  # left, middle, right
    shift = 0.5 * camera + args.shift * torch.randn(size, device=args.device).flatten()
    turn = args.turn * torch.randn(size, device=args.device).flatten()
    if not args.side_cameras:
        shift, turn = 0 * shift, 0 * turn
    s = render(at, e + shift, psi + turn, bend, look).flatten(1)
    a = (action + recover(shift, turn)) / data.scale
    return s.unflatten(0, size), a.view(*size, 1)


# --- agent ---
class Agent(nn.Module):
    def __init__(self, args, obs_dim, act_dim, data):
        super().__init__()
        self.args, self.data, self.updates_per_call = args, data, 1
        self.actor = self.policy = Actor(args.num_seeds)
        self.actor_opt = adam(self.actor, args.learning_rate)

    def update(self):
        l_pi = actor_loss(self.actor, views(self.data, self.args))
        step(self.actor_opt, l_pi)
        return {"actor_loss": l_pi}  # each (S,)

    @torch.no_grad()
    def test(self):
        """On roads of the test, what the driver saw."""
        *frame, action = (x[::20] for x in self.data.parts[1])
        s = render(*frame).flatten(1).expand(self.args.num_seeds, -1, -1)
        return {"test_loss": actor_loss(self.actor, (s, (action / self.data.scale).unsqueeze(-1)))}


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


# --- main: with a test ---
def main(args):
    """Trains, tests, evaluates, saves; returns the run's directory."""
    setup(args)
    with torch.device(args.device):  # where tensors are made
        data = load(args)
        prepare(data, args)
        agent = Agent(args, data.obs_dim, data.act_dim, data)
    update = agent.update if args.device == "cpu" else cuda_graph(agent.update).__next__
    run = Run(args, agent, data, args.num_updates)

    def update_and_test():
        losses, now = update(), run.update + 1
        logged = now % 1000 == 0 or now >= run.total
        return {**losses, **agent.test()} if logged else losses

    return train(run, update_and_test)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    main(parse())
