"""Lessons of the methods that see pictures: what the cameras saw, what was said of it, and the way that was driven.

NAME_runs(data) has the commands, NAME_draw(runs) draws what they log; lessons.py calls both. From policy.pt2 each agent
drives one way, the same for all, and path.csv, which is kept, says where.
"""
import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "algorithms"))
import pilotnet
import trailnet

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LARGE = {"font.size": 12, "axes.titlesize": 12.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.3, "figure.titlesize": 14}
WAY = 12  # seed of the road and the trail that are driven for the plot
COLORS = {"side": "C0", "middle": "C3"}


# --- logs ---
def at_the_end(run, file, key, name=None):
    """The value of each seed at the last update."""
    with open(run / file) as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("name") == name]
    return np.array([float(row[key]) for row in rows if row["update"] == rows[-1]["update"]])


def spread(values, form):
    """Mean and range of the seeds; the value where there is one."""
    several = f" ({np.min(values):{form}} to {np.max(values):{form}})" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{several}"


def counted(score, what):
    """How many seeds and ways the scores are of."""
    seeds = " and ".join(str(len(values)) for values in score.values())
    return f"mean (range) of {seeds} seeds, ten {what} of a minute each"


@torch.no_grad()
def drive(module, policy):
    """Rows (seed, s, metres right of the middle, intervention) of a minute of every agent."""
    world, rows = module.World(), []
    obs, _ = world.reset(seed=WAY)
    for k in range(len(policy(torch.from_numpy(obs)[None]))):
        obs, _ = world.reset(seed=WAY)
        for t in range(module.MINUTE):
            rows.append((k, t * module.DT, world.e, 0))
            obs, _, _, _, info = world.step(policy(torch.from_numpy(obs)[None])[k, 0].numpy())
            if info["intervention"]:
                rows[-1] = *rows[-1][:3], 1
    return rows


def path(module, run):
    """path.csv of a run, (rows, 4), made from its policy where there is none."""
    if not (run / "path.csv").exists():
        *_, file = sorted((ROOT / "runs" / "lessons" / run.parent.name / run.name).glob("*/policy.pt2"))
        rows = drive(module, torch.export.load(file).module())
        lines = ["seed,seconds,right,intervention", *("%d,%.1f,%.3f,%d" % row for row in rows)]
        (run / "path.csv").write_text("\n".join(lines) + "\n")
    return np.loadtxt(run / "path.csv", delimiter=",", skiprows=1)


# --- drawing ---
def show(axis, picture, title, color="black"):
    axis.imshow(picture[0].permute(1, 2, 0).byte().numpy())
    axis.set_title(title, fontsize=11, color=color)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_path(axis, module, runs, names):
    """How far from the middle each agent is; a cross where it was put back."""
    for label, run in runs.items():
        rows = path(module, run)
        for k in np.unique(rows[:, 0]):
            _, seconds, right, put_back = rows[rows[:, 0] == k].T
            gaps = np.where(np.roll(put_back, 1) == 1, np.nan, right)
            axis.plot(seconds, gaps, color=COLORS[label], lw=1.3, alpha=0.85)
            hands = put_back == 1
            axis.plot(seconds[hands], module.LIMIT * np.sign(right[hands]), "x", color=COLORS[label], ms=9, mew=2.5)
    for side in -1, 1:
        axis.axhline(side * module.LIMIT, color="0.3", ls="--", lw=1)
    for (label, text), y in zip(names.items(), (0.99, 0.92)):
        axis.text(0.01, y, text, color=COLORS[label], transform=axis.transAxes, va="top")
    axis.set(xlim=(0, 60), ylim=(-1.7, 1.7), yticks=(-1, -0.5, 0, 0.5, 1), xlabel="seconds",
             ylabel="metres right of the middle")


def frame(module, seed, seconds):
    """A frame of the demonstrations on one way, as tensors of one row."""
    found = module.demonstrate(seed)[round(seconds / module.DT)]
    return [torch.tensor(np.array([x])).float() for x in found]


# --- pilotnet ---
def pilotnet_runs(data):
    return {"side": "pilotnet.py --num-seeds 2 --num-updates 600 --eval-every 600",
            "middle": "pilotnet.py --num-seeds 1 --num-updates 600 --eval-every 600 --no-side-cameras"}


@plt.rc_context(LARGE)
def pilotnet_draw(runs):
    score = {label: at_the_end(run, "eval.csv", "score") for label, run in runs.items()}
    loss = {label: at_the_end(run, "losses.csv", "value", "test_loss") for label, run in runs.items()}
    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 2.4))
    at, e, psi, bend, look, action = frame(pilotnet, WAY, 31)
    for axis, (title, shift, turn) in zip(above.subplots(1, 3), (
            ("left camera", -0.5, 0.0), ("middle camera", 0.0, 0.0), ("right camera, shifted and turned", 0.8, 0.05))):
        a = float(action + pilotnet.recover(shift, turn))
        side = "straight on" if abs(a) < 0.002 else "to the right" if a > 0 else "to the left"
        show(axis, pilotnet.render(at, e + shift, psi + turn, bend, look),
             f"{title}\nlabel: 1/r = {a:+.3f} / m, {side}")
    axis = below.subplots()
    draw_path(axis, pilotnet, runs, {
        "side": f"three cameras, labels that lead back: autonomy {spread(score['side'], '.0f')} %, loss on what the "
                f"driver sees {np.mean(loss['side']):.4f}",
        "middle": f"middle camera alone: autonomy {spread(score['middle'], '.0f')} %, loss on what the driver sees "
                  f"{np.mean(loss['middle']):.4f}"})
    axis.text(0.99, 0.02, "a line for each seed, all on one new road; dashed: the limit, × an intervention\n"
              f"autonomy: {counted(score, 'roads')}", transform=axis.transAxes, ha="right", fontsize=11)
    figure.suptitle("Errors compound where no data shows the way back: side cameras supply it")
    return figure, (
        f"with side cameras, whose labels lead back to the middle of the road within 2 s, PilotNet drives "
        f"{spread(score['side'], '.1f')} % of the time by itself, with the middle camera alone "
        f"{spread(score['middle'], '.1f')} % ({counted(score, 'roads')}); on what the "
        f"driver sees, who stays in the middle, their losses are {np.mean(loss['side']):.4f} and "
        f"{np.mean(loss['middle']):.4f}. The roads are drawn, the driver is a formula")


# --- trailnet ---
NAMES = "turn left", "go straight", "turn right"


def trailnet_runs(data):
    return {"side": "trailnet.py --num-seeds 2 --num-updates 300 --eval-every 300",
            "middle": "trailnet.py --num-seeds 1 --num-updates 20 --eval-every 20 --no-side-cameras"}


@plt.rc_context(LARGE)
def trailnet_draw(runs):
    score = {label: at_the_end(run, "eval.csv", "score") for label, run in runs.items()}
    right = {label: 100 * at_the_end(run, "losses.csv", "value", "accuracy") for label, run in runs.items()}
    figure = plt.figure(figsize=(13, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    at, e, psi, bend, look = frame(trailnet, WAY, 20)
    axes = above.subplots(1, 4)
    for axis, camera, name in zip(axes, (-1, 0, 1), ("left camera", "middle camera", "right camera")):
        picture = trailnet.render(at, e, psi + trailnet.YAW * camera, bend, look)
        show(axis, picture, f"{name}\nlabel: {NAMES[1 - camera]}")
    mirrored, a = trailnet.mirror(picture, torch.tensor([0]), torch.tensor([True]))
    show(axes[3], mirrored, f"right camera, mirrored\nlabel: {NAMES[int(a)]}")
    axis = below.subplots()
    draw_path(axis, trailnet, runs, {
        "side": f"three cameras: {spread(right['side'], '.0f')} % of the pictures of other trails right, autonomy "
                f"{spread(score['side'], '.0f')} %",
        "middle": f"middle camera alone: {spread(right['middle'], '.0f')} % right, autonomy "
                  f"{spread(score['middle'], '.0f')} %"})
    axis.text(0.99, 0.02, "a line for each seed, all on one new trail; dashed: the limit, × put back\n"
              f"autonomy: {counted(score, 'trails')}; 300 and 20 updates", transform=axis.transAxes, ha="right",
              fontsize=11)
    figure.suptitle("Three cameras label a walk by themselves, and P(right) - P(left) then walks it")
    return figure, (
        f"of pictures of other trails {spread(right['side'], '.1f')} % get the right one of three classes, and by "
        f"P(right) - P(left) trails are followed with an autonomy of {spread(score['side'], '.1f')} %; with the middle "
        f"camera alone the only class is to go straight: {spread(right['middle'], '.1f')} % and "
        f"{spread(score['middle'], '.1f')} % ({counted(score, 'trails')}, 300 and 20 updates: one class is learnt at once). They are "
        f"drawn and plainer than a forest, where the paper has 85.2 %")
