"""Learning curves of finished runs, one line per method: mean over seeds, band from the lowest seed to the highest.

    python benchmark_results/curves.py benchmark_results/hopper-medium-replay-v0 --reference 7.5 "mean of the data"
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="holds one run directory per method; the picture goes here as curves.png")
parser.add_argument("--reference", nargs=2, action="append", default=[], metavar=("SCORE", "LABEL"), help="a dotted line")
args = parser.parse_args()

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for path in sorted(args.folder.glob("*/eval.csv")):
    about, rows = json.loads((path.parent / "run.json").read_text()), np.genfromtxt(path, delimiter=",", names=True)
    updates = np.unique(rows["update"])
    score = np.stack([rows["score"][rows["update"] == u] for u in updates])  # (evaluations, seeds)
    label = f"{about['method']}, {score.shape[1]} seeds: {score[-1].mean():.1f} at the end"
    (line,) = axes.plot(updates, score.mean(1), label=label)
    axes.fill_between(updates, score.min(1), score.max(1), color=line.get_color(), alpha=0.2, linewidth=0)
for score, label in args.reference:
    axes.axhline(float(score), color="black", linestyle=":", linewidth=1)
    axes.annotate(label, (0, float(score)), (4, 3), textcoords="offset points", fontsize=8)
axes.set(xlabel="updates", ylabel="normalised score (D4RL)", title=args.folder.name, ylim=(0, None), xlim=(0, None))
figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(args.folder / "curves.png", dpi=150)
