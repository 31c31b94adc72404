"""Lessons of cloning: demonstrations of two kinds, and an expert who sees more than the learner. Run by lessons.py.

NAME_runs() makes the data and names the commands, NAME_log() drives what they trained, NAME_draw() draws that.
"""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "datasets"))

import from_d4rl
import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LARGE = {"font.size": 12, "axes.titlesize": 12, "figure.titlesize": 14, "xtick.labelsize": 11, "ytick.labelsize": 11,
         "axes.spines.top": False, "axes.spines.right": False}


def write(folder, episodes):
    """Episodes [(observations (T, .), actions (T, .))] as a set; nothing but these two is used."""
    obs, actions = (np.concatenate(x) for x in zip(*episodes))
    timeouts = np.zeros(len(obs), bool)
    timeouts[np.cumsum([len(action) for _, action in episodes]) - 1] = True
    if not folder.exists():
        from_d4rl.write({"observations": obs, "actions": actions, "rewards": np.zeros(len(obs)), "timeouts": timeouts,
                         "terminals": np.zeros(len(obs)), "next_observations": np.roll(obs, -1, 0)}, folder)
    return folder


# --- two modes ---
FORK_RADIUS = 1.1  # of the obstacle around (0, 0); one step of the car is x' = x + a
HEADS = {"bc": "squared error", "bc_gaussian": "one Gaussian, its mean", "bc_gmm": "mixture of 5 Gaussians",
         "bc_categorical": "21 bins, one after the other", "bc_vae": "VAE", "bc_diffusion": "diffusion, 20 steps"}


def fork_demonstrations(episodes=500):
    """Drives along x that pass the obstacle on the left or on the right with equal probability: lists of (x, a)."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(episodes):
        x, side, episode = np.array([rng.uniform(-4.4, -3.6), rng.normal(0, 0.1)]), rng.choice([-1, 1]), []
        while x[0] < 4:
            lane = 1.6 * side * (-2.6 < x[0] < 1.2)
            a = np.array([0.8, np.clip(0.9 * (lane - x[1]), -0.95, 0.95)]) + rng.normal(0, 0.04, 2)
            episode.append((x, a.clip(-1, 1)))
            x = x + episode[-1][1]
        rows.append(episode)
    return rows


def multimodal_runs(data):
    folder = write(data / "fork-v0", [tuple(map(np.array, zip(*episode))) for episode in fork_demonstrations()])
    shape = (f"--dataset-id {folder} --eval-episodes 0 --num-seeds 3 --num-updates 5000 --hidden-dim 64 "
             "--learning-rate 1e-3")
    more = {"bc_diffusion": " --diffusion-steps 20", "bc_vae": " --batch-size 256"}
    return {head: f"{head}.py {shape}{more.get(head, '')}" for head in HEADS}


def fork_trajectories(run, drives=20):
    """Rows (seed, drive, step, x, y) of the run's policy, `drives` for each seed; kept in trajectories.csv."""
    path = run / "trajectories.csv"
    if not path.exists():
        policy, rows = torch.export.load(run / "policy.pt2").module(), []
        torch.manual_seed(0)
        S = len(policy(torch.zeros(1, 2)))
        start = torch.stack([-4.4 + 0.8 * torch.rand(drives), 0.1 * torch.randn(drives)], -1)
        x = start.expand(S, drives, 2)  # every seed begins at the same places
        for t in range(12):
            rows += [(k, i, t, *x[k, i].tolist()) for k, i in np.ndindex(S, drives)]
            a = torch.stack([policy(x[k])[k] for k in range(S)])
            x = x + a.clamp(-1, 1)
        lines = ["%d,%d,%d,%.3f,%.3f" % row for row in rows if row[3] < 4.5]
        path.write_text("\n".join(["seed,drive,step,x,y", *lines, ""]))
    return np.genfromtxt(path, delimiter=",", names=True)


def multimodal_log(label, run):
    fork_trajectories(run)


@plt.rc_context(LARGE)
def multimodal_draw(runs):
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 5.9), sharex=True, sharey=True, layout="constrained")
    crashed, left = {}, {}
    for axis, (head, name) in zip(axes.flat, HEADS.items()):
        axis.add_patch(plt.Circle((0, 0), FORK_RADIUS, color="0.75"))
        for episode in fork_demonstrations(60):
            axis.plot(*np.array([x for x, _ in episode]).T, color="0.85", linewidth=0.7, zorder=0)
        rows, hits, sides = fork_trajectories(runs[head]), [], []
        for k, i in sorted(set(zip(rows["seed"], rows["drive"]))):
            x, y = (rows[name][(rows["seed"] == k) & (rows["drive"] == i)] for name in "xy")
            along = np.linspace(0, len(x) - 1, 50 * len(x))  # between the steps as well
            inside = np.hypot(*(np.interp(along, range(len(x)), z) for z in (x, y))) < FORK_RADIUS
            hit, end = inside.any(), int(along[inside.argmax()]) + 2 if inside.any() else len(x)
            axis.plot(x[:end], y[:end], color="C3" if hit else "C0", linewidth=1, alpha=0.7)
            hits.append(hit)
            sides += [] if hit else [y[np.abs(x).argmin()] > 0]
        crashed[head], left[head] = f"{sum(hits)} of {len(hits)}", f"{sum(sides)} : {len(sides) - sum(sides)}"
        axis.set_title(f"{name}: {crashed[head]} crash", color="C3" if np.mean(hits) > 0.5 else "black")
        if sides:
            axis.text(-4.5, -2.25, f"left : right = {left[head]}", fontsize=11)
        axis.set(xlim=(-4.6, 4.3), ylim=(-2.4, 2.4), aspect="equal", xticks=[], yticks=[])
    axes[0, 0].text(0.3, 0.5, "obstacle", ha="center", va="center", fontsize=11)
    axes[0, 0].annotate("", (-1.9, -1.6), (-4.3, -1.6), arrowprops={"arrowstyle": "->"})
    axes[0, 0].text(-4.3, -2.1, "direction of travel", fontsize=11)
    figure.suptitle("Squared error averages left and right and hits the obstacle; "
                    "expressive distributions choose a side")
    figure.supxlabel("grey: demonstrations, half to each side.   red: a drive that crashes, blue: one that does not; "
                     "3 seeds, 20 drives each, the same starts", fontsize=11)
    return figure, (f"500 demonstrations pass an obstacle on the left or on the right. Of the clones' drives "
                    f"crash, by squared error (bc.py): {crashed['bc']}; by the mean of one Gaussian (bc_gaussian.py): "
                    f"{crashed['bc_gaussian']}; by a draw from a mixture of Gaussians (bc_gmm.py): "
                    f"{crashed['bc_gmm']}, from bins (bc_categorical.py): {crashed['bc_categorical']}, from a VAE "
                    f"(bc_vae.py): {crashed['bc_vae']}, by diffusion in 20 steps (bc_diffusion.py): "
                    f"{crashed['bc_diffusion']}. All have hidden layers of 64 and 5,000 updates; nothing was tuned, so "
                    "the order among the last four says little")


# --- what the learner cannot see ---
LINE_SPEED, LINE_STEPS = 0.1, 150  # x' = x + 0.1 (a + 1) / 2 of a car that comes from -2 to a stop line at 0
SEES = {"position": [0], "position, past action": [0, 2], "position, light": [0, 1],
        "position, light, past action": [0, 1, 2]}


def line_drives(act, x, green):
    """Drives at once: positions (.., n), the step at which each light turns green (n,). Returns what was seen, (x,
    light, past action), (T, .., n, 3), actions (T, .., n), and who went over the line on red (.., n)."""
    seen, actions, past, red = [], [], np.ones_like(x), np.zeros(x.shape, bool)
    for t in range(LINE_STEPS):
        light = np.broadcast_to(np.where(t >= green, 1.0, -1.0), x.shape)
        seen.append(np.stack([x, light, past], -1))
        actions.append(act(seen[-1]).clip(-1, 1))
        past, before = actions[-1], x
        x = x + LINE_SPEED * (1 + past) / 2
        red = red | (before <= 0) & (x > 0) & (light < 0)
    return np.array(seen), np.array(actions), red


def line_starts(n, rng):
    return -2 + rng.uniform(0, LINE_SPEED, n), rng.integers(0, 60, n)


def line_demonstrations(n, seed):
    """[(seen (T, 3), actions (T, 1))] of an expert that halts here or there before a red light, up to x = 0.5."""
    rng = np.random.default_rng(seed)
    starts, halt = line_starts(n, rng), -rng.uniform(0.1, 0.6, n)

    def expert(seen):
        x, light, _ = np.moveaxis(seen, -1, 0)
        return np.where((light < 0) & (halt <= x) & (x <= 0), -1, 1) + rng.normal(0, 0.03, n)

    seen, actions, red = line_drives(expert, *starts)
    assert not red.any()
    until = (seen[..., 0] < 0.5).sum(0)
    return [(seen[:T, i], actions[:T, i, None]) for i, T in enumerate(until)]


def observability_runs(data):
    episodes = line_demonstrations(50, 0)
    folders = {name: write(data / f"line-{''.join(map(str, columns))}-v0", [(s[:, columns], a) for s, a in episodes])
               for name, columns in SEES.items()}
    return {name: f"bc.py --dataset-id {folder} --eval-episodes 0 --num-seeds 5 --num-updates 3000 --hidden-dim 64 "
                  "--learning-rate 1e-3" for name, folder in folders.items()}


def observability_log(label, run, n=200):
    """Of each seed: squared error on 50 new demonstrations; shares of n drives over the line on red, on green but more
    than 15 steps after a car at full speed could have been (the expert needs 7), and in time; kept in drives.csv."""
    policy, columns = torch.export.load(run / "policy.pt2").module(), SEES[label]
    S = len(policy(torch.zeros(1, len(columns))))
    seen, actions = (torch.tensor(np.concatenate(x), dtype=torch.float32) for x in zip(*line_demonstrations(50, 1)))
    error = (policy(seen[:, columns]) - actions).square().mean((1, 2))

    def act(seen):  # (S, n, 3) -> (S, n)
        s = torch.tensor(seen[..., columns], dtype=torch.float32)
        return torch.stack([policy(s[k])[k, :, 0] for k in range(S)]).numpy()

    x, green = line_starts(n, np.random.default_rng(2))
    seen, _, red = line_drives(act, np.tile(x, (S, 1)), green)
    late = (seen[..., 0] <= 0).sum(0) - np.maximum(green, np.ceil(-x / LINE_SPEED)) > 15
    shares = np.stack([red, late & ~red, ~late & ~red]).mean(-1).T  # (S, 3)
    lines = [f"{k},{error[k]:.5f},{a:.3f},{b:.3f},{c:.3f}" for k, (a, b, c) in enumerate(shares)]
    (run / "drives.csv").write_text("\n".join(["seed,error,red,late,success", *lines, ""]))


@plt.rc_context(LARGE)
def observability_draw(runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.4), sharey=True, width_ratios=(1, 1.3),
                                         layout="constrained")
    kinds = {"success": ("C0", "crosses on green"), "late": ("C1", "on green, but late"),
             "red": ("C3", "runs the red light")}
    found = {name: np.genfromtxt(run / "drives.csv", delimiter=",", names=True) for name, run in runs.items()}
    for i, rows in enumerate(found.values()):
        left.barh(i, rows["error"].mean(), color="0.7", height=0.6)
        left.plot(rows["error"], np.full(len(rows), i), "k.", markersize=5)
        left.text(rows["error"].max() + 0.01, i, f"{rows['error'].mean():.2f}", va="center")
        begin = 0
        for kind, (color, name) in kinds.items():
            share = 100 * rows[kind].mean()
            right.barh(i, share, left=begin, color=color, alpha=0.6, height=0.6, label=name if i == 0 else None)
            if share:
                right.text(begin + share / 2, i, f"{share:.0f}", ha="center", va="center")
            begin += share
        right.plot(100 * rows["success"], np.full(len(rows), i + 0.38), "k.", markersize=5)
    left.set(yticks=range(len(runs)), yticklabels=list(runs), xlabel="squared error on new demonstrations",
             ylabel="what the learner sees", xlim=(0, 0.55))
    left.invert_yaxis()
    right.set(xlabel="drives [%]", xlim=(0, 100))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)
    figure.suptitle("The past action lowers the error as the light does, but only the light makes the clone drive")
    left.text(0.99, 0.03, "5 seeds (dots; right: of crosses on green)\n50 demonstrations, 200 drives a seed",
              ha="right", transform=left.transAxes, fontsize=11)
    error, success, late, red = ([rows[key].mean() for rows in found.values()] for key in ("error", *kinds))
    return figure, (
        f"An expert halts before a red light and goes on at green. A clone (bc.py) that sees the position alone "
        f"crosses on green in {success[0]:.0%} of its drives and runs the red light in {red[0]:.0%}. Given the past "
        f"action too, its squared error on new demonstrations falls from {error[0]:.2f} to {error[1]:.2f}, as low as "
        f"with the light ({error[2]:.2f}), but it drives worse: {success[1]:.0%} on green in time, {late[1]:.0%} late: "
        f"it goes on standing, {red[1]:.0%} on red; the seeds differ much. With the light it crosses on green in "
        f"{success[2]:.0%}, and in {success[3]:.0%} with the light and the past action: here the light is plain to see "
        "and the past action does no harm. Late is more than 15 steps after a car at full speed could have crossed")
