"""Tables and plots of the results, from the raw files and nothing else: REPORT.md, plots/*.png and the README's part.

    python benchmark_results/report.py            # writes them
    python benchmark_results/report.py --check    # status 1 if REPORT.md or the README are not what the raw files give

A cell is a directory DATASET/LABEL/ beside this file with a run's args.json, run.json and eval.csv. Its result is the
last evaluation of every seed, its budget the update of that evaluation; label, budget and seeds name its row.
notes.toml explains cells by hand: "hopper/medium-v0/iql" = "A sentence." stands beside the table. DATASET/data.json
keeps the mean return of the data, for clones that do not have the set; it is written where the set is there and the
file is not.

A cell of up to three seeds shows its runs, one of four their mean and range; from five on there is an interval:
Student's t over seeds. A seed that was lost, whose rows hold nan or are not there, counts no longer.
Aggregates (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264): interquartile mean of all runs, fraction of runs
above tau, and the probability that a run of X beats one of Y on the same dataset, ties half, mean over datasets; with
95 % percentile intervals of a bootstrap that draws seeds within each dataset.

What is compared: a group is the set of (dataset, budget) pairs of some method, two datasets at least; its members are
the methods that have them all, normalised, run to the end, no seed lost, with the same number of seeds, five at least,
on each. Aggregates are made within groups of two members or more: nothing crosses from one budget on a dataset to
another, no row is ranked.
"""
import argparse
import csv
import json
import re
import sys
import textwrap
import tomllib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import h5py
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
NAMES = {  # in the order of rows and colours; other labels follow as they are
    "bc": "BC", "td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL", "sac_offline": "SAC offline", "dt": "DT",
    "mopo": "MOPO", "mopo_h100": "MOPO, h = 100", "bc_diffusion": "Diffusion BC", "dagger": "DAgger",
    "dqn_offline": "DQN offline", "filtered_bc": "Filtered BC, 10 %", "bc_gaussian": "Gaussian BC", "bc_gmm": "GMM BC",
    "awac": "AWAC", "onestep": "One-step", "ddpg_offline": "DDPG offline", "bcq": "BCQ", "fisher_brc": "Fisher-BRC",
    "bcq_discrete": "BCQ (discrete)", "cql_discrete": "CQL (discrete)", "bcq_tabular": "BCQ (tabular)"}
SHORT = "cql", "dt", "mopo", "mopo_h100", "bcq", "fisher_brc"  # what half an hour to three hours of one core give
RAW = "args.json", "run.json", "eval.csv"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ABSENT, RESAMPLES = "–", 10_000
ENOUGH = 5  # seeds for an interval
FLAT, FALL = 1 / 200, 1 / 4  # what is flagged: a deviation over seeds to the mean, a seed's fall from its best
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
                     "legend.frameon": False, "font.size": 9, "legend.fontsize": 8, "savefig.dpi": 150})


def named(label):
    return NAMES.get(label, label)


def fail(message, status=2):
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(status)


# --- statistics: runs are (..., K datasets, S seeds) ---
def t_quantile(df, level=0.95):
    """Half-width of Student's central interval: t = sqrt(df) tan(theta), theta with density cos(theta)^(df - 1)."""
    theta = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(theta) ** (df - 1)
    mass = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return np.sqrt(df) * np.tan(np.interp(level * mass[-1], mass, theta))


def half_width(x):
    """Of the 95 % interval of the mean of x (S,)."""
    return t_quantile(len(x) - 1) * np.std(x, ddof=1) / np.sqrt(len(x))


def iqm(runs):
    """Mean of the n = K S runs without the lowest and the highest floor(n / 4)."""
    x = np.sort(runs.reshape(*runs.shape[:-2], -1))
    cut = x.shape[-1] // 4
    return x[..., cut:x.shape[-1] - cut].mean(-1)


def beats(x, y):
    """P(X > Y) + P(X = Y) / 2 over all pairs of seeds (Mann-Whitney), mean over datasets."""
    x, y = x[..., :, None], y[..., None, :]
    return ((x > y) + (x == y) / 2).mean((-3, -2, -1))


def above(runs, taus):
    """Fraction of the runs above each tau."""
    return np.stack([(runs > tau).mean((-2, -1)) for tau in taus], -1)


def bootstrap(statistic, *runs):
    """The statistic, low, high. RandomState, because its numbers are the same in every version of NumPy."""
    draws, drawn = np.random.RandomState(0), []
    for x in runs:
        i = (draws.random_sample((RESAMPLES, *x.shape)) * x.shape[-1]).astype(int)
        drawn.append(np.take_along_axis(x[None], i, -1))
    return statistic(*runs), *np.percentile(statistic(*drawn), [2.5, 97.5], axis=0)


# --- raw files ---
def load(path, read, *keys):
    """What `read` makes of the text of a file."""
    try:
        found = read(path.read_text())
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"no {missing[0]} in it")
        return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path} cannot be used ({getattr(error, 'strerror', None) or error}): repair it, or take its cell away")


def evaluations(text, S):
    """Of eval.csv: updates (U,), values (U, S), NaN where a seed was lost, whether they are scores, episodes."""
    rows, keys = list(csv.DictReader(text.splitlines())), ("update", "seed", "episodes", "return_mean", "score")
    if not rows or not text.endswith("\n") or any(None in (*row, *row.values()) for row in rows):
        raise ValueError("a line is incomplete or too long" if rows else "no evaluation in it")
    rows = [[row[key] for key in keys] for row in rows]
    if len({(update, seed) for update, seed, *_ in rows}) < len(rows):
        raise ValueError("a seed stands twice in an evaluation")
    table = np.array([[float(x or "inf") for x in row] for row in rows if row[3] != "nan"]).reshape(-1, len(keys)).T
    scored = bool(np.isfinite(table[4]).any())
    if not np.isfinite(table[:4 + scored]).all():
        raise ValueError("a number is missing")
    if (table[1] < 0).any():
        raise ValueError("a seed is below 0")
    updates = np.unique([int(update) for update, *_ in rows])
    values = np.full((len(updates), S), np.nan)
    values[np.searchsorted(updates, table[0]), table[1].astype(int)] = table[3 + scored]
    if not np.isfinite(values[-1]).any():
        raise ValueError("no seed is finite at the end")
    return updates, values, scored, int(rows[-1][2])


class Cell:
    def __init__(self, folder):
        args, about, table = (folder / name for name in RAW)
        args, self.about = load(args, json.loads, "seed"), load(about, json.loads, "method", "wall_seconds")
        self.dataset, self.seeds = args.get("dataset_id") or args.get("env_id", "?"), args.get("num_seeds", 1)
        self.updates, self.values, self.scored, self.episodes = load(table, lambda text: evaluations(text, self.seeds))
        unit = "steps" if "num_steps" in args else "updates"
        self.size, self.planned = int(self.updates[-1]), int(args.get(f"num_{unit}", 0))
        self.about["wall_seconds"] = float(self.about["wall_seconds"])
        self.final, self.curve = self.values[-1][np.isfinite(self.values[-1])], np.nanmean(self.values, 1)
        self.exact = self.about["method"] == "bcq_tabular"  # expectations
        self.whole = self.size >= self.planned and len(self.final) == self.seeds
        self.label, self.budget = folder.name, f"{self.size:,} {unit}"
        self.row = f"{named(self.label)}, {self.budget}, {self.seeds} seed{'s' * (self.seeds > 1)}"
        self.row += ", short" * (self.label in SHORT)
        self.mean, self.best, self.best_at = self.curve[-1], self.curve.max(), self.updates[self.curve.argmax()]

    def text(self, x, width=None):
        """One decimal of a score, three digits of a return."""
        places = 1 if self.scored else int(max(0, 2 - np.floor(np.log10(max(abs(self.mean), 1e-3)))))
        return f"{x:.{places}f}" + (f" ± {width:.{places}f}" if width is not None else "")

    def result(self):
        x = self.final
        if len(x) < 4:
            found = ", ".join(map(self.text, x))
        elif len(x) < ENOUGH:
            found = f"{self.text(self.mean)} ({self.text(x.min())} to {self.text(x.max())})"
        else:
            found = self.text(self.mean, half_width(x))
        return "return " * (not self.scored) + found


def read_all():
    """The cells in the order of the tables: larger budgets first, then NAMES, then datasets."""
    folders = {path.parent for name in RAW for path in (ROOT / "benchmark_results").glob(f"*/[!.]*/{name}")}
    cells, keys = [], set()
    for folder in sorted(folder for folder in folders if folder.parent.name != "lessons"):
        try:
            cells.append(Cell(folder))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            fail(f"{folder} cannot be used ({error}): repair it, or take it away")
    labels = [*NAMES, *sorted({cell.label for cell in cells} - NAMES.keys())]
    for cell in cells:
        cell.key, cell.order = f"{cell.dataset}/{cell.label}", labels.index(cell.label)
        if cell.key in keys:
            fail(f"two directories hold {cell.key}: give each a label of its own")
        keys.add(cell.key)
    return sorted(cells, key=lambda cell: (-cell.size, cell.budget, cell.order, -cell.seeds, cell.dataset))


def beside(dataset):
    """Where the facts of a set are kept."""
    return ROOT / "benchmark_results" / re.sub(r"[^\w.-]+", "-", dataset) / "data.json"


def of_data(dataset):
    """Transitions, episodes, mean return, its score: from data.json beside the cells, else from the set; {} without."""
    folder, kept = ROOT / "datasets" / dataset / "data", beside(dataset)
    if kept.exists():
        return load(kept, json.loads, "return_mean", "score")
    if not (folder / "main_data.hdf5").exists():
        return {}
    with h5py.File(folder / "main_data.hdf5") as file:
        rewards = [episode["rewards"][:] for episode in file.values()]
    mean, known = float(np.mean([np.sum(x) for x in rewards])), json.loads((folder / "metadata.json").read_text())
    low, high = known.get("ref_min_score", np.nan), known.get("ref_max_score", np.nan)
    score = round(100 * (mean - low) / (high - low), 3) if np.isfinite(high - low) else None
    return {"transitions": sum(map(len, rewards)), "episodes": len(rewards), "return_mean": round(mean, 3),
            "score": score}


def groups(cells):
    """{((dataset, budget), ...): {label: runs (K, S)}}, by the rule above."""
    methods, found = {}, {}
    for cell in sorted(cells, key=lambda cell: cell.order):
        if cell.scored and cell.whole and cell.seeds >= ENOUGH:
            methods.setdefault(cell.label, {})[cell.dataset, cell.budget] = cell.final
    keys = {tuple(sorted(own)) for own in methods.values() if len({dataset for dataset, _ in own}) > 1}
    for key in sorted(keys, key=lambda key: (-len(key), key)):
        runs = {label: [own[pair] for pair in key] for label, own in methods.items() if own.keys() >= set(key)}
        found[key] = {label: np.stack(x) for label, x in runs.items() if len(set(map(len, x))) == 1}
    return {key: members for key, members in found.items() if len(members) > 1}


# --- text ---
def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def fill(text):
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def title(key):
    return ", ".join(f"{dataset} ({budget})" for dataset, budget in key)


def flags(cell, cells, mean_of_data):
    """Why a cell is to be read with care."""
    top, last = np.fmax.reduce(cell.values), cell.values[-3:].mean(0)  # NaN of a seed that was lost
    last = np.maximum(last, cell.values[-1])  # a dip that is over is no fall
    if not cell.whole:
        yield f"update {cell.size:,} of {cell.planned:,}, {len(cell.final)} of {cell.seeds} seeds at the end"
    if len(cell.final) > 1 and (deviation := np.std(cell.final, ddof=1)) <= FLAT * abs(cell.mean):
        yield f"the seeds hardly differ (deviation {deviation:.2g})"
    if len(fallen := np.flatnonzero(top - last > FALL * abs(top))):
        k = fallen[np.argmax((top - last)[fallen])]
        yield ("at the end and in the mean of the last three evaluations more than a quarter below the best of "
               f"training: {len(fallen)} of {cell.seeds} seeds (seed {k}: {cell.text(last[k])} after "
               f"{cell.text(top[k])})")
    for bc in cells:
        same = (bc.dataset, bc.budget, bc.scored) == (cell.dataset, cell.budget, cell.scored)
        if bc.about["method"] == "bc" and same and cell.final.max() < bc.final.min():
            yield f"every run below every one of {named(bc.label)} of the same budget ({bc.result()})"
    if cell.final.max() < mean_of_data:
        yield f"every run below the mean of the data ({cell.text(mean_of_data)})"


def scores(cells, data, notes):
    """The table of methods and datasets, with what there is to say about its cells."""
    absent, remarks = dict.fromkeys(data, ABSENT), []
    rows = {"mean of the data": absent.copy()}
    for cell in cells:
        mean, mark = data[cell.dataset][cell.scored], ""
        if np.isfinite(mean):
            rows["mean of the data"][cell.dataset] = "return " * (not cell.scored) + cell.text(mean)
        said = "; ".join(flags(cell, cells, mean))
        if said or cell.key in notes:
            remark = ". ".join(filter(None, (said, str(notes.get(cell.key, "No explanation yet.")))))
            remarks.append(f"{len(remarks) + 1}. {named(cell.label)} on {cell.dataset}, {cell.budget}: {remark}")
            mark = f" <sup>{len(remarks)}</sup>"
        rows.setdefault(cell.row, absent.copy())[cell.dataset] = cell.result() + mark
    episodes = " or ".join(map(str, sorted({cell.episodes for cell in cells if not cell.exact})))
    exact = ", ".join(dict.fromkeys(named(cell.label) for cell in cells if cell.exact))
    about = (
        "Normalised score at the last evaluation, " + ", ".join(filter(None, (
            f"{episodes} episodes per seed" * bool(episodes), f"of {exact} its expectation" * bool(exact))))
        + f": each run up to three seeds, mean and range of four, mean ± half-width of Student's 95 % interval from "
        f"{ENOUGH} on."
        + " Where there is no reference, the cell is a return." * any(not cell.scored for cell in cells)
        + " Short is what half an hour to three hours of one core give." * any(cell.label in SHORT for cell in cells)
        + f" {ABSENT} is absent. The budget is part of a row's name: on a dataset, rows of unequal budgets are not to "
        "be compared.")
    care = ["To be read with care:", "\n".join(remarks)] * bool(remarks)
    return "\n\n".join([fill(about), table(["", *(f"`{dataset}`" for dataset in absent)],
                                           [[name, *row.values()] for name, row in rows.items()]), *care])


def aggregates(found):
    if not found:
        return fill(f"No two methods have equal budgets and {ENOUGH} seeds or more on the same two datasets or more: "
                    "there is nothing to aggregate or to compare, and no plot of it.")
    parts = [fill(
        "Interquartile mean of the normalised scores of all runs, and the probability that a run of the row's method "
        "beats one of the column's on the same dataset (ties half, mean over datasets), with 95 % intervals of a "
        f"bootstrap that draws seeds within each dataset ({RESAMPLES:,} resamples; Agarwal et al. 2021). With few "
        "seeds these are too narrow, since they cannot leave the range of the seeds; one without width says only that no "
        "seeds overlap. Each table holds the methods with these budgets on these datasets, and no others.")]
    for key, runs in found.items():
        rows = []
        for x in runs:
            mean = "{:.1f} [{:.1f}, {:.1f}]".format(*bootstrap(iqm, runs[x]))
            pairs = (["{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(beats, runs[x], runs[y])), ""][x == y] for y in runs)
            rows.append([f"{named(x)}, {runs[x].shape[1]} seeds", mean, *pairs])
        parts += [f"**{title(key)}**", table(["", "IQM", *(f"beats {named(y)}" for y in runs)], rows)]
    return "\n\n".join([*parts, "![Interquartile means; fraction of runs above a score](plots/aggregate.png)"])


def provenance(cells):
    rows, parts, speed = [], ("python", "torch", "numpy", "gymnasium", "mujoco"), "updates_per_second"
    for cell in sorted(cells, key=lambda cell: cell.dataset):
        known = {key: str(value) for key, value in cell.about.items() if value not in (None, "", "cpu")}
        hardware = [known[key] for key in ("gpu", "device", "cpu") if key in known]
        if "threads" in known:
            hardware.append(f"threads: {known['threads']}")
        rows.append([f"`{cell.dataset}`: {cell.row}", cell.text(cell.mean),
                     f"{cell.text(cell.best)} at {cell.best_at:,}", str(cell.episodes),
                     known.get("commit", ABSENT)[:7], ", ".join(hardware),
                     ", ".join(f"{part} {known[part]}" for part in parts if part in known),
                     str(timedelta(seconds=round(cell.about["wall_seconds"]))), known.get(speed, ABSENT)])
    apart = any(cell.about["method"] == "mopo" and "threads" in cell.about for cell in cells)  # as it was at first
    about = ("Best of training is the evaluation with the highest mean over seeds, chosen after the fact; it is in no "
             "other table. Updates per second count an update of all seeds as one, with evaluations beside it."
             + " Where threads are named, MOPO's wall time leaves out the fit of its model." * apart)
    head = "cell", "last", "best of training", "episodes", "commit", "hardware", "versions", "wall time", "updates/s"
    return fill(about) + "\n\n" + table(head, rows)


def texts(cells, data):
    """What REPORT.md and README.md should hold."""
    path, readme = ROOT / "benchmark_results" / "notes.toml", ROOT / "README.md"
    notes = load(path, tomllib.loads) if path.exists() else {}
    if unknown := sorted(notes.keys() - {cell.key for cell in cells}):
        fail(f"{path} explains {unknown[0]}, but there is no such cell")
    plot, result = "![Learning curves: mean and range of the seeds]({}plots/curves.png)", scores(cells, data, notes)
    found = groups(cells)
    report = ["# Results", "`python benchmark_results/report.py` wrote this page from the raw files beside it.",
              "## Last evaluation", result, plot.format(""), "## Aggregates", aggregates(found),
              "## Where each cell comes from", provenance(cells)]
    brief, _, care = result.partition("\n\nTo be read with care:")
    numbers = "The small numbers are notes on cells to be read with care, in REPORT.md. " * bool(care)
    part = [BEGIN, plot.format("benchmark_results/"), brief, fill(numbers +
        "Lines in the plot are means over seeds, bands reach from the lowest seed to the highest. "
        + ("Aggregates, and the" if found else "The") + " commit, hardware, versions and wall time of every cell: "
        "[REPORT.md](benchmark_results/REPORT.md)."), END]
    before, _, rest = (readme.read_text() if readme.exists() else "").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest or END in before + after:
        fail(f"{readme} needs one line {BEGIN} and, after it, one line {END}")
    return {path.with_name("REPORT.md"): "\n\n".join(report) + "\n", readme: before + "\n\n".join(part) + after}


# --- plots ---
def style(order):
    return {"color": plt.colormaps["tab20"](2 * (order % 10) + order // 10 % 2), "ls": "-" if order < 10 else "--"}


def line(axis, x, mean, low, high, order, **more):
    drawn, = axis.plot(x, mean, **style(order), **more)
    axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, lw=0)


def draw_curves(cells, data):
    own = {dataset: [cell for cell in cells if cell.dataset == dataset] for dataset in data}
    rows, height = -(-len(own) // 2), 3.0 + 0.17 * max(map(len, own.values()))
    figure, axes = plt.subplots(rows, 2, figsize=(8.4, height * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(own):]:
        axis.remove()
    for (dataset, inside), axis in zip(own.items(), axes.flat):
        for cell in inside:
            line(axis, cell.updates / 1000, cell.curve, np.fmin.reduce(cell.values, 1), np.fmax.reduce(cell.values, 1),
                 cell.order, marker="." if len(cell.updates) < 30 else "", label=cell.row)
        scored = all(cell.scored for cell in inside)
        if np.isfinite(data[dataset][scored]):
            axis.axhline(data[dataset][scored], color="black", ls=":", lw=1, label="mean of the data")
        axis.set(title=dataset, xlabel="thousand updates", xlim=(0, None))
        axis.set(ylabel="normalised score" if scored else "return", ylim=(min(0, axis.get_ylim()[0]), None))
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17))
    return figure


def draw_aggregates(found, orders):
    height = 3.2 + 0.17 * max(map(len, found.values()))
    figure, axes = plt.subplots(len(found), 2, figsize=(8.4, height * len(found)), layout="constrained", squeeze=False)
    for (key, runs), (left, right) in zip(found.items(), axes):
        every = np.concatenate([x.ravel() for x in runs.values()])
        taus = np.linspace(min(0, every.min()), 1.02 * every.max(), 201)
        for i, (label, x) in enumerate(runs.items()):
            middle, low, high = bootstrap(iqm, x)
            left.plot([low, high], [i, i], lw=6, alpha=0.4, solid_capstyle="butt", color=style(orders[label])["color"])
            left.plot(middle, i, "o", color=style(orders[label])["color"])
            line(right, taus, *bootstrap(lambda x: above(x, taus), x), orders[label], label=named(label))
        left.set_yticks(range(len(runs)), [f"{named(label)}, {runs[label].shape[1]} seeds" for label in runs])
        left.set(ylim=(len(runs) - 0.5, -0.5), xlabel="interquartile mean of the normalised score")
        right.set(ylim=(0, 1.02), xlabel=r"normalised score $\tau$", ylabel=r"fraction of runs above $\tau$")
        right.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17), ncols=2)
        for axis in (left, right):
            axis.set_title("\n".join(textwrap.wrap(title(key), 55)), fontsize=8)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a text is out of date")
    check, plots, cells = parser.parse_args(argv).check, ROOT / "benchmark_results" / "plots", read_all()
    if not cells:
        fail(f"{plots.parent} holds no results")
    data, size = {}, Counter(cell.dataset for cell in cells)
    for dataset in sorted(size, key=lambda x: (-size[x], x)):  # the datasets of most methods first
        facts = of_data(dataset)
        if facts and not check and not beside(dataset).exists():
            beside(dataset).write_text(json.dumps(facts, indent=1) + "\n")
        data[dataset] = np.array([facts.get("return_mean"), facts.get("score")], float).tolist()
    for path, text in texts(cells, data).items():
        if check and not (path.exists() and path.read_text() == text):
            fail(f"{path} is not what the raw files give: run python benchmark_results/report.py", 1)
        if not check:
            path.write_text(text)
    if check:
        return
    plots.mkdir(exist_ok=True)
    draw_curves(cells, data).savefig(plots / "curves.png")
    (plots / "aggregate.png").unlink(missing_ok=True)
    if found := groups(cells):
        draw_aggregates(found, {cell.label: cell.order for cell in cells}).savefig(plots / "aggregate.png")
    print(f"{len(cells)} cells: REPORT.md and plots in {plots.parent}, and {ROOT / 'README.md'}")


if __name__ == "__main__":
    main()
