"""Tables and plots of the results, from the raw files and nothing else: REPORT.md, plots/*.png and the README's part.

    python benchmark_results/report.py            # writes them
    python benchmark_results/report.py --check    # status 1 if REPORT.md or the README are not what the raw files give
    python benchmark_results/report.py --html     # report.html too: all in one file, with curves to switch on and off

A cell is a directory DATASET/LABEL/ beside this file with a run's args.json, run.json and eval.csv. Its result is the
last evaluation of every seed, its budget the update of that evaluation. A seed that was lost, whose rows hold nan or
are not there, counts no longer. DATASET/data.json keeps the mean return of the data, for clones that do not have the
set; it is written where the set is there and the file is not. notes.toml explains cells by hand, outside.toml holds
what public implementations reach on the same files.

The README has a table for each set of datasets that some method has, with all methods that have them all, of the budget
that most cells of a dataset have and of any that FEW have. Other budgets stand in a list, a method alone on its task in
a sentence. So no place is empty, and a new cell finds its own.

Aggregates (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264) are made within groups: the methods that have a set
of two (dataset, budget) pairs or more, normalised, run to the end, no seed lost, with the same number of seeds, five
at least, on each. They are the interquartile mean of all runs, and the probability that a run of X beats one of Y on
the same dataset, ties half, mean over datasets; with 95 % percentile intervals of a bootstrap that draws seeds within
each dataset. Nothing crosses from one budget on a dataset to another, no row is ranked.
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
NAMES = {  # in the order of rows; other labels follow as they are
    "bc": "BC", "bc_gaussian": "Gaussian BC", "bc_categorical": "Categorical BC", "bc_gmm": "GMM BC",
    "bc_vae": "VAE BC", "bc_diffusion": "Diffusion BC", "filtered_bc": "Filtered BC, 10 %", "bail": "BAIL",
    "rvs": "RvS", "dt": "DT", "sac_offline": "SAC offline", "ddpg_offline": "DDPG offline", "bcq": "BCQ",
    "bear": "BEAR", "brac": "BRAC", "td3_bc": "TD3+BC", "cql": "CQL", "fisher_brc": "Fisher-BRC",
    "algaedice": "AlgaeDICE", "iql": "IQL", "onestep": "One-step", "awr": "AWR", "marwil": "MARWIL", "awac": "AWAC",
    "mopo": "MOPO", "mopo_h100": "MOPO, h = 100", "combo": "COMBO", "dqn_offline": "DQN offline",
    "bcq_discrete": "BCQ (discrete)", "cql_discrete": "CQL (discrete)", "bcq_tabular": "BCQ (tabular)",
    "dagger": "DAgger", "hg_dagger": "HG-DAgger", "pilotnet": "PilotNet", "trailnet": "TrailNet", "ddpg": "DDPG",
    "td3": "TD3", "sac": "SAC", "dqn": "DQN", "fqe": "FQE (the policy it judges)", "ope": "OPE (the policy it judges)",
    "bear_gridworld_support": "BEAR's grid, support, tight to loose",
    "bear_gridworld_kl": "BEAR's grid, KL, tight to loose",
    "bear_gridworld_penalty": "BEAR's grid, penalty, tight to loose"}
ASIDE = "fqe", "ope", "bear_gridworld"  # in no table of methods: another's policy, or agents that are no seeds
EXACT = "bcq_tabular", "bear_gridworld", "ope"  # whose evaluations are expectations
LINES = {  # of curves.png: five a panel at most; the other curves stand on their dataset's page in REPORT.md
    "hopper/medium-v0": ("bc", "td3_bc", "iql", "cql", "sac_offline"),
    "hopper/medium-replay-v1": ("bc", "td3_bc", "iql", "filtered_bc", "sac_offline"),
    "halfcheetah/medium-v0": ("bc", "td3_bc", "iql"),
    "lunarlander/mixed-v0": ("dqn_offline", "bcq_discrete", "cql_discrete")}
WIDE, FEW = 6, 3  # columns of methods, beyond which they become rows; cells that make a table of their budget
RAW = "args.json", "run.json", "eval.csv"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ABSENT, RESAMPLES = "–", 10_000  # absent: what an older run.json did not note
ENOUGH = 5  # seeds for an interval
FLAT, FALL = 1 / 200, 1 / 4  # what is flagged: a deviation over seeds to the mean, a seed's fall from its best
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
                     "legend.frameon": False, "font.size": 9, "legend.fontsize": 8})
DPI = 100  # of the plots


def named(label):
    known = label.removesuffix("_1m")  # gpu.toml's
    return NAMES.get(known, known) + ", 1M" * (known != label)


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
        self.unit = unit = "steps" if "num_steps" in args else "updates"
        self.size, self.planned = int(self.updates[-1]), int(args.get(f"num_{unit}", 0))
        self.about["wall_seconds"] = float(self.about["wall_seconds"])
        self.final, self.curve = self.values[-1][np.isfinite(self.values[-1])], np.nanmean(self.values, 1)
        self.range = np.fmin.reduce(self.values, 1), np.fmax.reduce(self.values, 1)
        self.exact, self.alike = self.about["method"] in EXACT, self.about["method"] != "bear_gridworld"
        self.whole = self.size >= self.planned and len(self.final) == self.seeds
        self.label, self.budget = folder.name, f"{self.size:,} {unit}"
        self.name = named(self.label)
        self.row = f"{self.name}, {self.budget}, {self.seeds} seed{'s' * (self.seeds > 1)}"
        self.mean, self.best, self.best_at = self.curve[-1], self.curve.max(), self.updates[self.curve.argmax()]

    def text(self, x, width=None):
        """One decimal of a score, three digits of a return."""
        places = 1 if self.scored else int(max(0, 2 - np.floor(np.log10(max(abs(self.mean), 1e-3)))))
        numbers = [x] if width is None else [x, width]
        return "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}".join(f"{number:.{places}f}" for number in numbers)

    def score(self):
        """Mean ± standard deviation over seeds, with n - 1."""
        deviation = np.std(self.final, ddof=1) if len(self.final) > 1 and self.alike else None
        return "return " * (not self.scored) + self.text(self.mean, deviation)

    def runs(self):
        """Each run, or from ENOUGH on the interval of their mean."""
        if len(self.final) < ENOUGH or not self.alike:
            return ", ".join(map(self.text, self.final))
        return f"{self.text(self.mean, half_width(self.final))} (95 %)"


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


def slug(dataset):
    return re.sub(r"[^\w.-]+", "-", dataset)


def beside(dataset):
    """Where the facts of a set are kept."""
    return ROOT / "benchmark_results" / slug(dataset) / "data.json"


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
            yield f"every run below every one of {bc.name} of the same budget ({bc.runs()})"
    if cell.final.max() < mean_of_data:
        yield f"every run below the mean of the data ({cell.text(mean_of_data)})"


def remarks(cells, data, notes):
    """{key of a cell: why it is to be read with care}."""
    found = {}
    for cell in cells:
        said = "; ".join(flags(cell, cells, data[cell.dataset][cell.scored]))
        if said or cell.key in notes:
            found[cell.key] = ". ".join(filter(None, (said, str(notes.get(cell.key, "No explanation yet.")))))
    return found


def mean_of_data(cell, data):
    mean = data[cell.dataset][cell.scored]
    return "return " * (not cell.scored) + cell.text(mean) if np.isfinite(mean) else None


def equal_budgets(cells, data):
    """Tables of equal budgets as text, the cells of other budgets, and those that are alone on their task."""
    sizes, own, texts, others, alone, shown, position = {}, {}, [], [], [], [], [*data].index
    for cell in cells:
        sizes.setdefault((cell.dataset, cell.unit), Counter())[cell.size] += 1
    for cell in sorted(cells, key=lambda cell: (cell.order, position(cell.dataset))):
        count = sizes[cell.dataset, cell.unit]
        if count[cell.size] >= FEW or cell.size == max(count, key=lambda size: (count[size], size)):
            own.setdefault((cell.size, cell.budget), {}).setdefault(cell.label, {})[cell.dataset] = cell
        else:
            others.append(cell)
    keys = {(tuple(sorted(found, key=position)), budget)
            for budget, methods in own.items() for found in methods.values()}
    for key, budget in sorted(keys, key=lambda x: (-len(x[0]), [*map(position, x[0])], -x[1][0])):
        members = [[found[x] for x in key] for found in own[budget].values() if found.keys() >= set(key)]
        inside = sum(members, [])
        if len(members) == 1:
            alone += inside
            continue
        shown += inside
        lines = [["", *(f"`{dataset}`" for dataset in key)]]
        means = ["mean of the data", *(mean_of_data(cell, data) for cell in members[0])]
        lines += [means] * (None not in means)
        lines += [[found[0].name, *(cell.score() for cell in found)] for found in members]
        if len(members) <= WIDE:
            lines = [*zip(*lines)]
        where = f"{len(key)} datasets" if len(key) > 1 else f"{len(members)} methods"
        numbers = sorted({cell.seeds for cell in inside})
        seeds = " or ".join(map(str, numbers)) + " seed" + "s" * (numbers[-1] > 1)
        texts += [f"**{where}, {budget[1]}, {seeds}**", table(lines[0], lines[1:])]
    return texts, others, [cell for cell in alone if cell not in shown]


def sources(text):
    """Of outside.toml: name, updates, {cell: runs as scores}, where they come from."""
    for source in tomllib.loads(text)["source"]:
        low, high = source.get("reference", (0, 100))  # of returns
        runs = {key: 100 * (np.array(x, float) - low) / (high - low) for key, x in source["runs"].items()}
        command = f"`{source['command']}`" if source["command"] else "command line not kept"
        yield source["name"], source["updates"], runs, (
            f"{source['name']}: {source['url']}, {source['version']}, {command}. {source['about']}")


def outside(cells):
    """Of public implementations on the same files: the end beside ours, every evaluation, where they come from."""
    path, ends, full, origins = ROOT / "benchmark_results" / "outside.toml", [], [], []
    for name, updates, runs, origin in load(path, lambda text: [*sources(text)]) if path.exists() else []:
        span = f"{updates[0]:,} to {updates[-1]:,}"
        known = {cell.key: cell for cell in cells if cell.size == updates[-1]}
        for key, theirs in runs.items():
            if cell := known.get(key):
                place = f"`{cell.dataset}`", cell.name
                last = ", ".join(map(cell.text, theirs[:, -1]))
                ends.append([*place, cell.score(), f"{last} ({name})", f"{cell.mean - theirs[:, -1].mean():+.1f}"])
                ours = cell.curve[np.isin(cell.updates, updates)]
                for by, x in [*((name, x) for x in theirs), (f"here, mean of {cell.seeds} seeds", ours)]:
                    full.append([*place, by, span, ", ".join(map(cell.text, x))])
        origins.append(origin)
    return ends, full, fill(" ".join(origins))


def hours(cells):
    """[(default budget, hours of each method)]: from the rates in the README's table of methods, else from a cell."""
    rates, rows = {}, {}
    for cell in cells:
        if cell.label == cell.about["method"] and not cell.exact:
            rates[cell.label] = cell.seeds * cell.size / cell.about["wall_seconds"], ", from a cell's wall time"
    measured = r"^\| \[`(\w+)\.py`\].*\| ([\d.]+), [\d.]+ \|$"
    for method, rate in re.findall(measured, (ROOT / "README.md").read_text(), re.M):
        rates[method] = float(rate), ""
    order = [*NAMES].index
    for method in sorted(rates, key=lambda x: (order(x) if x in NAMES else len(NAMES), x)):
        path = ROOT / "algorithms" / f"{method}.py"
        if budget := path.exists() and re.search(r"^    num_(\w+): int = ([\d_]{4,})", path.read_text(), re.M):
            time, name = int(budget[2]) / rates[method][0] / 3600, re.split(", | \\(the", named(method))[0]
            rows.setdefault(f"{int(budget[2]):,} {budget[1]}{rates[method][1]}", []).append(f"{name} {time:.2g}")
    return [[budget, ", ".join(found)] for budget, found in rows.items()]


def brief(cells, data, notes):
    """The README's part."""
    methods = [cell for cell in cells if cell.about["method"] not in ASIDE]
    episodes = " or ".join(map(str, sorted({cell.episodes for cell in cells if not cell.exact})))
    parts, others, alone = equal_budgets(methods, data)
    parts.insert(0, fill(
        "Normalised score at the last evaluation, " + f"{episodes} episodes per seed: " * bool(episodes)
        + "mean ± standard deviation over seeds." + " Without a reference it is a return." * any(
            not cell.scored for cell in cells) + " A table has all methods that have its budget on all its datasets."))
    if panels(cells):
        parts.append("![Learning curves: mean and range of the seeds](benchmark_results/plots/curves.png)")
    if others:
        parts += ["**Other budgets**, not to be compared with the tables above or with each other", table(
            ["", "method", "budget", "seeds", "score"],
            [[f"`{cell.dataset}`", cell.name, cell.budget, str(cell.seeds), cell.score()] for cell in others])]
    if alone:
        said = [f"{cell.row}, on `{cell.dataset}` {cell.score()}" + " (exact)" * cell.exact for cell in alone]
        parts.append(fill(f"Alone on a task: {'; '.join(said)}."))
    if notes:
        parts.append(fill(" ".join(notes.values())))
    ends, _, origins = outside(cells)
    if ends:
        parts += ["**Public implementations**, unmodified, on the same files and budgets; difference = ours - theirs",
                  table(["", "method", "here", "there, each run", "difference"], ends), origins]
    if times := hours(cells):
        parts += [fill(
            "**Hours of a default run**, one seed on one core: computed, not run. They are the default budget over the "
            "updates per second in the table of methods below, so without evaluations, steps of environments or MOPO's "
            "model. Where no rate has been measured, it is the wall time of a cell, scaled to the default budget and "
            "divided by its seeds: evaluations and other runs beside it make that rather too long."),
            table(["default run", "hours"], times)]
    return parts + [fill(
        "[REPORT.md](benchmark_results/REPORT.md) has each run, every curve, what is to be read with care, the best of "
        "training, and the commit, hardware, versions and wall time of every cell. `python benchmark_results/report.py "
        "--html` puts all of it and the lessons into one file, report.html, where a click on a legend switches a line "
        "on or off (it needs `pip install \"altair[save]\"`).")]


def pages(cells, data, why):
    """A section for each dataset: every run, every curve, what is to be read with care."""
    parts = []
    for dataset in data:
        inside = [cell for cell in cells if cell.dataset == dataset]
        cared = [cell for cell in inside if cell.key in why]
        mark = {cell.key: f" <sup>{i}</sup>" for i, cell in enumerate(cared, 1)}
        head = "", "budget", "seeds", "mean ± deviation", f"runs; from {ENOUGH} on their mean's interval"
        rows = [[cell.name + mark.get(cell.key, ""), cell.budget, str(cell.seeds), cell.score(), cell.runs()]
                for cell in inside]
        mean = mean_of_data(inside[0], data)
        parts += [f"## {dataset}", *[f"Mean of the data: {mean}."] * bool(mean), table(head, rows)]
        if not all(cell.exact for cell in inside):
            parts.append(f"![Learning curves on {dataset}: mean and range of the seeds](plots/{slug(dataset)}.png)")
        parts += ["\n".join(f"{i}. {cell.name}, {cell.budget}: {why[cell.key]}"
                            for i, cell in enumerate(cared, 1))] * bool(cared)
    return parts


def aggregates(found):
    if not found:
        return fill(f"No two methods have equal budgets and {ENOUGH} seeds or more on the same two datasets or more: "
                    "there is nothing to aggregate or to compare.")
    parts = [fill(
        "Interquartile mean of the normalised scores of all runs, and the probability that a run of the row's method "
        "beats one of the column's on the same dataset (ties half, mean over datasets), with 95 % intervals of a "
        f"bootstrap that draws seeds within each dataset ({RESAMPLES:,} resamples; Agarwal et al. 2021). With few "
        "seeds these are too narrow, since they cannot leave the range of the seeds; one without width says only that "
        "no seeds overlap. Each table holds the methods with these budgets on these datasets, and no others.")]
    for key, runs in found.items():
        rows = []
        for x in runs:
            mean = "{:.1f} [{:.1f}, {:.1f}]".format(*bootstrap(iqm, runs[x]))
            pairs = (["{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(beats, runs[x], runs[y])), ""][x == y] for y in runs)
            rows.append([f"{named(x)}, {runs[x].shape[1]} seeds", mean, *pairs])
        title = ", ".join(f"{dataset} ({budget})" for dataset, budget in key)
        parts += [f"**{title}**", table(["", "IQM", *(f"beats {named(y)}" for y in runs)], rows)]
    return "\n\n".join(parts)


def best(cells):
    about = ("The evaluation with the highest mean over seeds, chosen after the fact: for comparison with tables that "
             "report it. It is in no other table.")
    return [fill(about), table(["", "method", "last", "best of training", "at"], [
        [f"`{cell.dataset}`", cell.row, cell.text(cell.mean), cell.text(cell.best), f"{cell.best_at:,}"]
        for cell in sorted(cells, key=lambda cell: cell.dataset)])]


def provenance(cells):
    rows, parts, speed = [], ("python", "torch", "numpy", "gymnasium", "mujoco"), "updates_per_second"
    for cell in sorted(cells, key=lambda cell: cell.dataset):
        known = {key: str(value) for key, value in cell.about.items() if value not in (None, "", "cpu")}
        hardware = [known[key] for key in ("gpu", "device", "cpu") if key in known]
        if "threads" in known:
            hardware.append(f"threads: {known['threads']}")
        rows.append([f"`{cell.dataset}`: {cell.row}", str(cell.episodes),
                     known.get("commit", ABSENT)[:7], ", ".join(hardware),
                     ", ".join(f"{part} {known[part]}" for part in parts if part in known),
                     str(timedelta(seconds=round(cell.about["wall_seconds"]))), known.get(speed, ABSENT)])
    apart = any(cell.about["method"] == "mopo" and "threads" in cell.about for cell in cells)  # as it was at first
    about = ("Updates per second count an update of all seeds as one, with evaluations beside it."
             + " Where threads are named, MOPO's wall time leaves out the fit of its model." * apart)
    head = "cell", "episodes", "commit", "hardware", "versions", "wall time", "updates/s"
    return fill(about) + "\n\n" + table(head, rows)


def texts(cells, data):
    """What REPORT.md and README.md should hold."""
    path, readme = ROOT / "benchmark_results" / "notes.toml", ROOT / "README.md"
    notes = load(path, tomllib.loads) if path.exists() else {}
    short = notes.pop("readme", {})
    if unknown := sorted((notes.keys() | short.keys()) - {cell.key for cell in cells}):
        fail(f"{path} explains {unknown[0]}, but there is no such cell")
    before, _, rest = (readme.read_text() if readme.exists() else "").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest or END in before + after:
        fail(f"{readme} needs one line {BEGIN} and, after it, one line {END}")
    _, full, origins = outside(cells)
    report = ["# Results, run by run", fill(
        "`python benchmark_results/report.py` wrote this page from the raw files beside it. Scores are of the last "
        "evaluation, ± is the standard deviation over seeds, small numbers lead to what is to be read with care. In "
        "the plots a line is the mean over seeds, its band reaches from the lowest to the highest, the dotted line is "
        "the mean of the data. Only rows of equal budgets are to be compared."),
        *pages(cells, data, remarks(cells, data, notes)), "## Best of training", *best(cells), "## Aggregates",
        aggregates(groups([cell for cell in cells if cell.about["method"] not in ASIDE]))]
    if full:
        head = "", "method", "by", "updates", "evaluations"
        report += ["## Public implementations", table(head, full), origins]
    report += ["## Where each cell comes from", provenance(cells)]
    part = [BEGIN, *brief(cells, data, short), END]
    return {path.with_name("REPORT.md"): "\n\n".join(report) + "\n", readme: before + "\n\n".join(part) + after}


# --- plots ---
def draw_panel(axis, inside, data, colors):
    for cell, color in zip(inside, colors):
        axis.plot(cell.updates / 1000, cell.curve, color=color, marker="." if len(cell.updates) < 30 else "",
                  label=cell.name)
        axis.fill_between(cell.updates / 1000, *cell.range, color=color, alpha=0.15, lw=0)
    if np.isfinite(mean := data[cell.dataset][cell.scored]):
        axis.axhline(mean, color="black", ls=":", lw=1, label="mean of the data")
    axis.set(xlabel=f"thousand {cell.unit}", xlim=(0, None))


def panels(cells):
    """{dataset: cells of curves.png}."""
    own = {dataset: [cell for x in labels for cell in cells if cell.key == f"{dataset}/{x}"]
           for dataset, labels in LINES.items()}
    return {dataset: inside for dataset, inside in own.items() if inside}


def canvas(count, columns, width, height):
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained",
                                squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def draw_curves(cells, data):
    own, labels = panels(cells), [*dict.fromkeys(sum(LINES.values(), ()))]
    figure, axes = canvas(len(own), 2, 4.2, 3.3)
    for axis, (dataset, inside) in zip(axes, own.items()):
        draw_panel(axis, inside, data, [f"C{labels.index(cell.label)}" for cell in inside])
        axis.set(title=dataset, ylabel="normalised score" if inside[0].scored else "return",
                 ylim=(min(0, axis.get_ylim()[0]), None))
    keys = {name: key for axis in axes for key, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=5)
    return figure


def draw_page(inside, data):
    """Every curve of a dataset: four a panel, BC's in grey beside them."""
    bc = [cell for cell in inside if cell.label == "bc"]
    rest = sorted((cell for cell in inside if cell not in bc and not cell.exact), key=lambda cell: cell.order)
    chunks = [rest[i:i + 4] + bc for i in range(0, len(rest), 4)] or [bc]
    figure, axes = canvas(len(chunks), min(3, len(chunks)), 3 if len(chunks) > 1 else 4.6, 3.1)
    for axis, chunk in zip(axes, chunks):
        draw_panel(axis, chunk, data, ["gray" if cell in bc else f"C{i}" for i, cell in enumerate(chunk)])
        axis.set_ylabel("normalised score" if chunk[0].scored else "return")
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, handlelength=1.2, columnspacing=1)
    low, high = zip(*(axis.get_ylim() for axis in axes))
    for axis in axes:
        axis.set_ylim(min(0, *low), max(high))
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a text is out of date")
    parser.add_argument("--html", action="store_true", help="write report.html as well")
    args, plots, cells = parser.parse_args(argv), ROOT / "benchmark_results" / "plots", read_all()
    check = args.check
    if not cells:
        fail(f"{plots.parent} holds no results")
    data, curves, size = {}, {}, Counter(cell.dataset for cell in cells)
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
    if panels(cells):
        draw_curves(cells, data).savefig(plots / "curves.png", dpi=DPI)
    for dataset in data:
        inside = [cell for cell in cells if cell.dataset == dataset]
        if not all(cell.exact for cell in inside):
            draw_page(inside, data).savefig(plots / f"{slug(dataset)}.png", dpi=DPI)
            curves[slug(dataset)] = inside, data[dataset][inside[0].scored], LINES.get(dataset, ())
    plt.close("all")
    if args.html:
        try:
            import report_html
        except ImportError as error:
            fail(f"--html needs {error.name}: pip install 'altair[save]' markdown-it-py")
        report_html.write(ROOT, curves)
    print(f"{len(cells)} cells: REPORT.md and plots in {plots.parent}, and {ROOT / 'README.md'}")


if __name__ == "__main__":
    main()
