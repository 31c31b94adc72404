"""Plays the policy of a run in its environment: a GIF for each seed, with the return so far under the picture.

    python benchmark_results/watch.py runs/hopper-medium-v0__iql__0__1795411111111
    python benchmark_results/watch.py RUN_DIR --seeds 0 --steps 400 --every 4 --width 240

Writes RUN_DIR/watch-0.gif, watch-1.gif, ... Without a display MuJoCo renders by EGL; MUJOCO_GL=osmesa is its renderer
in software. A Decision Transformer is asked for the return that its evaluations ask for. Tables cannot be watched.
"""
import argparse
import json
import os
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

if not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import gymnasium as gym
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algorithms"))


def fail(message):
    print(f"watch.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def task_of(folder):
    """The module of a run's method, its Task, and how many steps its policy sees, 0 for an observation alone."""
    try:
        flags = json.loads((folder / "args.json").read_text())
        module = import_module(json.loads((folder / "run.json").read_text())["method"])
        args = module.Args(**{**flags, "device": "cpu", "eval_episodes": 1})
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        fail(f"{folder} is no directory of a finished run: {error}")
    if not hasattr(module, "Task"):
        fail(f"the policy of {module.METHOD} cannot be watched")
    if hasattr(module, "make_task"):
        return module, module.make_task(args), 0
    try:
        name = args.dataset_id if Path(args.dataset_id).exists() else args.dataset_id.split("+")[-1]
        env = gym.make(args.env_id) if args.env_id else module.find(name).recover_environment(eval_env=True)
        task = module.Task(env, env.action_space, len(module.flat(env.reset()[0])), {})
    except Exception as error:
        fail(f"{folder}: no environment, neither of {name} nor by --env-id: {error or type(error).__name__}")
    return module, task, getattr(args, "context", 0)


def import_mujoco():
    """Imports MuJoCo; without a renderer, and with the error returned, where that of MUJOCO_GL is not installed."""
    try:
        find_spec("mujoco") and import_module("mujoco")
    except Exception as error:
        for name in [name for name in sys.modules if name.split(".")[0] in ("mujoco", "OpenGL")]:
            del sys.modules[name]
        asked, os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL"), "disable"
        return f"MUJOCO_GL={asked}: {error}"


def renderer(spec, problem):
    """The environment with pictures; MuJoCo's camera follows where the model has one that does."""
    mujoco = "mujoco" in str(spec.entry_point)
    sys.unraisablehook = lambda error: None  # of Gymnasium's viewer when it goes without having come to a context
    for follow in [] if problem and mujoco else [{"camera_name": "track"}] * mujoco + [{}]:
        try:
            with warnings.catch_warnings(action="ignore"):
                env = gym.make(spec, render_mode="rgb_array", **follow)
                env.reset(seed=0)
                env.render()
            return env
        except Exception as error:
            problem = error
    fail(f"nothing renders {spec.id} here ({problem!r}): install EGL or OSMesa, and say which with MUJOCO_GL")


def acting(policy, k, task, context):
    """A function from an observation (obs_dim,), the return so far and the step to the action of agent k. With a
    context it is a Decision Transformer's, which sees its last steps."""
    window = []  # a step: what of the return is still to come, observation, action, time

    @torch.no_grad()
    def act(obs, earned, t):
        if not context:
            return policy(torch.from_numpy(obs)[None])[k, 0].numpy()
        step = [policy.target - earned, torch.from_numpy(obs), torch.zeros(task.act_dim), torch.tensor(t)]
        window[:] = [*window, step][-context:]
        step[2] = policy(*(torch.stack(x)[None] for x in zip(*window)))[k, 0]
        return step[2].numpy()

    return act


def play(act, k, module, task, env, options):
    """Frames of one episode of seed k, and its return."""
    frames, total = [], 0.0
    obs, _ = env.reset(seed=options.seed)
    for t in range(options.steps):
        if t % options.every == 0:
            picture = Image.fromarray(env.render())
            picture = picture.resize((options.width, round(picture.height * options.width / picture.width)))
            frame = Image.new("RGB", (options.width, picture.height + 18), "white")
            frame.paste(picture)
            line = f"seed {k}   step {t}   return {total:.0f}"
            ImageDraw.Draw(frame).text((6, picture.height + 3), line, fill="black")
            frames.append(frame)
        obs, reward, terminated, truncated, _ = env.step(act(module.flat(obs), total, t))
        total += float(reward)
        if terminated or truncated:
            break
    return frames, total


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--seeds", type=int, nargs="+", help="which agents; default: all")
    parser.add_argument("--steps", type=int, default=1000, help="at most so many")
    parser.add_argument("--every", type=int, default=4, help="steps from one frame to the next")
    parser.add_argument("--width", type=int, default=240, help="of the picture, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the episode")
    options = parser.parse_args(words)
    if min(options.steps, options.every, options.width, options.seed + 1) < 1:
        parser.error("--steps, --every and --width have to be at least 1, --seed at least 0")
    problem = import_mujoco()
    module, task, context = task_of(options.run)
    try:
        policy = torch.export.load(options.run / "policy.pt2").module()
        obs, action = torch.zeros(1, task.obs_dim), torch.zeros(1, 1, task.act_dim)
        past = torch.zeros(1, 1), obs[None], action, torch.zeros(1, 1, dtype=torch.long)
        seeds = range(len(policy(*past) if context else policy(obs)))
    except Exception as error:
        fail(f"{options.run / 'policy.pt2'} cannot be played: {error}")
    if unknown := set(options.seeds or []) - set(seeds):
        fail(f"--seeds {min(unknown)} is not there: the run has {len(seeds)}")
    env = renderer(task.spec, problem)
    fps = env.metadata.get("render_fps", 50) / options.every
    for k in options.seeds or seeds:
        torch.manual_seed(options.seed)
        frames, total = play(acting(policy, k, task, context), k, module, task, env, options)
        path = options.run / f"watch-{k}.gif"
        frames = [frame.quantize(64) for frame in frames]
        try:
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=max(20, round(1000 / fps)), loop=0)
        except OSError as error:
            fail(f"{path} cannot be written: {error}")
        print(f"seed {k}: return {total:.1f}, {path}")


if __name__ == "__main__":
    main()
