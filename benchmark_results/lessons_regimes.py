"""The lesson on BCQ's four batches, drawn by lessons.py from the runs of bcq_runs()."""
import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
import minari
from lessons_tabular import LARGE, finish

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DATA = "runs/lessons/data"  # from the root of the repository, where the commands run
REGIMES = {  # the directory of the set, and what is in it
    "final": ("ddpg-noisy/hopper/final-v0", "final: all that DDPG saw,\nnoise 0.5"),
    "concurrent": ("ddpg/hopper/final-v0", "concurrent: all that DDPG saw,\nnoise 0.1"),
    "imitation": ("ddpg/hopper/imitation-v0", "imitation: its last policy,\nno noise"),
    "imperfect": ("ddpg/hopper/imperfect-v0", "imperfect: that policy, noise 0.3,\n30 % of actions uniform")}
LEARNERS = {"bcq": ("BCQ", "C2"), "bc_vae": ("VAE", "C4"), "bc": ("BC", "C0"), "ddpg_offline": ("DDPG", "C3"),
            "sac_offline": ("SAC", "C1")}


def bcq_runs(data):
    """DDPG twice, which records the batches, then every learner on each of them."""
    collect = "ddpg.py --num-steps 200000 --eval-every 10000 --record-steps 50000 --record"
    learn = "--num-seeds 2 --num-updates 3000 --eval-every 300"
    return {"expert": f"{collect} {DATA}/ddpg", "noisy": f"{collect} {DATA}/ddpg-noisy --exploration-noise 0.5"} | {
        f"{regime} {method}": f"{method}.py --dataset-id {DATA}/{folder} {learn}"
        for regime, (folder, _) in REGIMES.items() for method in LEARNERS}


def bcq_log(label, folder):
    """data.csv: the returns of the episodes of the batch."""
    args = json.loads((folder / "args.json").read_text())
    if "dataset_id" in args:
        episodes = minari.MinariDataset(ROOT / args["dataset_id"] / "data").iterate_episodes()
        returns = [episode.rewards.sum() for episode in episodes]
        (folder / "data.csv").write_text(f"episodes,return_mean\n{len(returns)},{np.mean(returns):.2f}\n")


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@plt.rc_context(LARGE)
def bcq_draw(runs):
    figure, axes = plt.subplots(1, 4, figsize=(16, 5), sharex=True, sharey=True, layout="constrained")
    end, behaviour = {}, {}
    for (regime, (_, text)), axis in zip(REGIMES.items(), axes):
        for method, (name, color) in LEARNERS.items():
            rows = table(runs[f"{regime} {method}"] / "eval.csv")
            updates = sorted({int(row["update"]) for row in rows})
            y = np.array([[float(row["return_mean"]) for row in rows if int(row["update"]) == u] for u in updates])
            axis.plot(updates, y.mean(1), color=color, lw=2.5, label=name)
            axis.fill_between(updates, y.min(1), y.max(1), color=color, alpha=0.2, lw=0)
            end[regime, method] = y[-3:].mean()
        behaviour[regime] = float(table(runs[f"{regime} bcq"] / "data.csv")[0]["return_mean"])
        axis.axhline(behaviour[regime], color="black", ls="--", lw=1.5)
        axis.set(title=text, xlabel="updates")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes[0].set(ylabel="return", ylim=(0, None), xlim=(0, 3100))
    axes[3].annotate("mean of the batch", (60, behaviour["imperfect"]), (0, 5), textcoords="offset points", fontsize=11)
    axes[0].legend(loc="upper left", fontsize=11)
    finish(figure, TITLE, "Hopper, 2 seeds:\nmean, range", axes[3], (0.03, 0.48), ha="left")
    parts = [f"{regime} (batch {behaviour[regime]:.0f}): " + ", ".join(
        f"{name} {end[regime, method]:.0f}" for method, (name, _) in LEARNERS.items()) for regime in REGIMES]
    made = {label: [float(row["return_mean"]) for row in table(runs[label] / "eval.csv")][-3:]
            for label in ("expert", "noisy")}
    return figure, (
        "returns on Hopper, of two seeds over the last three evaluations: " + "; ".join(parts) + ". DDPG, which made "
        f"them, returned {np.mean(made['expert']):.0f} (noise 0.1) and {np.mean(made['noisy']):.0f} (0.5) at the end")


TITLE = "On batches that DDPG made itself DDPG and SAC earn far less than clones of the same data"
