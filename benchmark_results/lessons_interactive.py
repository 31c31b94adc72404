"""Lessons of learners that an expert corrects, drawn by lessons.py from the runs of NAME_runs()."""
import csv

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LARGE = {"font.size": 12, "axes.titlesize": 12.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.3, "figure.titlesize": 14}
ROUNDS, STEPS, CLONED = 12, 1000, (1000, 4000)  # of HG-DAgger; labels of BC


def interventions_runs(data):
    """One small network each, and as many updates in all."""
    student = "--num-seeds 5 --hidden-dim 32 --learning-rate 1e-3 --eval-episodes 3 --num-updates 6000"
    gated = f"hg_dagger.py {student} --ensemble 1 --steps-per-round"
    runs = {"hg_dagger": f"{gated} {STEPS} --rounds {ROUNDS} --eval-every 1000",
            "dagger": f"dagger.py {student} --steps-per-round 1000 --rounds 4 --eval-every 1500"}
    return runs | {f"bc {n}": f"{gated} {n} --rounds 1 --eval-every 6000" for n in CLONED}


def table(run, file, key, name=None):
    """(updates, seeds) of a column, for losses.csv of the rows of one name; and the updates."""
    with open(run / file) as f:
        rows = [row for row in csv.DictReader(f) if name in (None, row.get("name"))]
    updates = sorted({int(row["update"]) for row in rows})
    return np.array([[float(row[key]) for row in rows if int(row["update"]) == u] for u in updates]), updates


@plt.rc_context(LARGE)
def interventions_draw(runs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.4), layout="constrained", width_ratios=(1.35, 1))
    returns = {label: table(run, "eval.csv", "return_mean")[0] for label, run in runs.items()}  # (evaluations, seeds)
    labels, updates = table(runs["hg_dagger"], "losses.csv", "value", "labels")  # where the policies were evaluated
    curves = (("HG-DAgger", labels.mean(1), returns["hg_dagger"], "C2", -1, (8, 6), "left"),
              ("DAgger", 1000 * np.arange(1, 5), returns["dagger"], "C0", 2, (-8, 10), "right"),
              ("BC", CLONED, np.concatenate([returns[f"bc {n}"] for n in CLONED]), "C3", -1, (8, 0), "left"))
    for name, x, y, color, at, offset, side in curves:
        left.plot(x, y.mean(1), "o--" if name == "BC" else "o-", color=color, lw=2.5)
        left.fill_between(x, y.min(1), y.max(1), color=color, alpha=0.13, lw=0)
        left.annotate(name, (x[at], y[at].mean()), offset, textcoords="offset points", ha=side, color=color)
    left.axhline(EXPERT, color="black", ls=":", lw=1)
    left.text(60, EXPERT + 30, "expert")
    left.set(xlabel="labels by the expert, per agent", ylabel="return of the agent alone", xlim=(0, 5700),
             ylim=(0, 3600))
    left.text(0.02, 0.86, "Hopper, 5 seeds: mean and range;\none small network each, 6,000 updates in all\n"
              "(BC: for each of its points)", va="top", transform=left.transAxes, fontsize=11)
    per = STEPS * ROUNDS // len(updates)  # steps between two evaluations; the first thousand are the expert's own
    gained = np.diff(labels, axis=0, prepend=STEPS)
    gained[1:] *= 100 / per
    gained[0] *= 100 / (per - STEPS)
    x = per / 1000 * (np.arange(len(updates)) + 1)
    right.plot(x, gained.mean(1), "o-", color="C2", lw=2.5)
    right.fill_between(x, gained.min(1), gained.max(1), color="C2", alpha=0.13, lw=0)
    right.annotate("HG-DAgger", (x[-2], gained[-2].mean()), (0, 16), textcoords="offset points", color="C2")
    right.plot((1, 4), (100, 100), "o-", color="C0", lw=2.5)
    right.annotate("DAgger", (4, 100), (8, 0), textcoords="offset points", va="center", color="C0")
    right.set(xlabel="steps of each agent so far (thousands)", ylabel="share of the steps that the expert labels [%]",
              ylim=(0, 108), xlim=(0, 12.6))
    right.text(0.99, 0.86, "not shown: what watching costs. The gate\ncompares with the expert at every step;\n"
               "a person sees some mistakes late", transform=right.transAxes, ha="right", va="top", fontsize=11)
    for axis in left, right:
        axis.tick_params(labelsize=11)
    left.set_title("Returns at equal labels: 5 seeds do not separate them", fontsize=12)
    right.set_title(f"From {gained[0].mean():.0f} % of the steps to {gained[-1].mean():.0f} %", fontsize=12)
    figure.suptitle("An expert who takes over instead of labelling every step is needed less and less")
    end = {label: y[-1].mean() for label, y in returns.items()}
    early = [np.interp(n, labels.mean(1), returns["hg_dagger"].mean(1)) for n in (2000, 4000)]
    return figure, (
        f"Hopper, 5 small networks with 6,000 updates each: DAgger returns {returns['dagger'][1].mean():.0f} after "
        f"2,000 labels and {end['dagger']:.0f} after 4,000, HG-DAgger about {early[0]:.0f} and {early[1]:.0f}, and "
        f"{end['hg_dagger']:.0f} after its {labels[-1].mean():,.0f}; BC with 4,000 returns {end['bc 4000']:.0f} "
        f"(expert {EXPERT}). The expert has control in {gained[0].mean():.0f} % of the steps of round 2 and in "
        f"{gained[-1].mean():.0f} % of the last two rounds. The ranges of all three overlap. That "
        "HG-DAgger is better than DAgger label for label is not shown: at equal labels it has had fewer updates, with "
        "fewer than 3,500 it is no better than BC, and it walks "
        f"{STEPS * ROUNDS:,} steps where DAgger walks 4,000. Nor is what people do: the expert is a network, the gate "
        "compares with its action at every step, so that watching is free and no mistake is seen late. One "
        "environment, whose expert acts alike from every start; an ensemble of one, so doubt plays no part")


EXPERT = 3155  # return of datasets/hopper/expert.pt2
