"""Figures and tables of the recorded trainings on Imagenette and of the speed measurements (book/results)."""

import re
import shlex
from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from convnext_min import paper
from convnext_min.book import analysis, results
from convnext_min.book.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, Table, figure, table
from convnext_min.measure import count_macs, count_parameters
from convnext_min.train import models

# Training on Imagenette

Row = dict[str, float | None]  # of a run's log; None where nothing was measured
Runs = Sequence[tuple[str, str]]  # label of a run, and its folder in book/results/imagenette


TIMED_RUNS: Runs = (
    ("for small data, first version", "3min-seed-0"),
    ("for small data, first version", "3min-seed-1"),
    ("for small data, first version", "10min-seed-0"),
    ("for small data, first version", "30min-seed-0"),
    ("for small data, first version", "3min-seed-2"),
    ("for small data, first version", "3min-seed-3"),
    ("for small data, first version", "3min-seed-4"),
    ("for small data, first version", "10min-seed-1"),
    ("for small data, first version", "10min-seed-2"),
    ("for small data, first version", "30min-seed-1"),
    ("for small data, first version", "3min-seed-7"),
    ("for small data, second version", "3min-seed-5"),
    ("for small data, second version", "3min-seed-6"),
    ("for small data, second version", "3min-seed-8"),
    ("for small data, second version", "3min-seed-9"),
    ("for small data, second version", "10min-seed-3"),
    ("for small data, second version", "10min-seed-4"),
    ("for small data", "3min-seed-12"),
    ("for small data", "3min-seed-13"),
    ("for small data", "10min-seed-5"),
    ("for small data", "10min-seed-6"),
    ("plain", "plain-3min-seed-0"),
    ("timm", "timm-3min-seed-0"),
    ("timm", "timm-3min-seed-1"),
    ("timm", "timm-3min-seed-2"),
    ("timm", "timm-10min-seed-0"),
    ("timm", "timm-30min-seed-0"),
)
TIMED_PAIRS = (  # runs of the same length on the same processor, which can be compared image by image
    ("plain-3min-seed-0", "3min-seed-0"),
    ("timm-3min-seed-0", "3min-seed-0"),
    ("timm-3min-seed-1", "3min-seed-12"),
    ("timm-3min-seed-2", "3min-seed-5"),
    ("timm-10min-seed-0", "10min-seed-5"),
    ("timm-30min-seed-0", "30min-seed-1"),
    ("3min-seed-7", "3min-seed-5"),
    ("3min-seed-3", "3min-seed-8"),
    ("10min-seed-1", "10min-seed-3"),
    ("3min-seed-8", "3min-seed-12"),
    ("10min-seed-3", "10min-seed-5"),
)
TRIED_RUNS: Runs = (  # changes of the recipes for three and thirty minutes, on the slowest processor
    ("second version", "3min-seed-8"),
    ("second version", "3min-seed-9"),
    ("half the width", "3min-seed-10"),
    ("half the width", "3min-seed-11"),
    ("first version", "30min-seed-1"),
    ("smaller images, larger batches", "30min-seed-2"),
    ("smaller images, larger batches, no mixing", "30min-seed-3"),
    ("larger batches, no mixing", "30min-seed-4"),
    ("no mixing", "30min-seed-5"),
    ("no mixing", "30min-seed-6"),
    ("no mixing, Nesterov momentum", "30min-seed-7"),
    ("no mixing, Nesterov momentum", "30min-seed-8"),
    ("no mixing, Nesterov momentum, three more changes", "30min-seed-9"),
    ("no mixing, Nesterov momentum, three more changes", "30min-seed-10"),
)
TRIED_PAIRS = (
    ("3min-seed-8", "3min-seed-10"),
    ("30min-seed-1", "30min-seed-2"),
    ("30min-seed-1", "30min-seed-3"),
    ("30min-seed-1", "30min-seed-4"),
    ("30min-seed-1", "30min-seed-5"),
    ("30min-seed-3", "30min-seed-5"),
    ("30min-seed-4", "30min-seed-5"),
    ("30min-seed-5", "30min-seed-7"),
    ("30min-seed-7", "30min-seed-9"),
)
HELD_OUT_RUNS: Runs = (  # in imagenette/held_out
    ("second version", "10min"),
    ("half the width", "10min-half-width"),
    ("half the blocks, 1.4 times the width", "10min-half-depth"),
    ("images of 48, 64 and 96 px", "30min"),
    ("images of 64, 96 and 128 px", "30min-larger-images"),
)


def command(run: str) -> str:
    """Return the command that made a run in book/results/imagenette, without its folders."""
    words = results.values(f"imagenette/{run}/summary.json")["command"]
    return re.sub(r" --(output|data) [^ ]+", "", shlex.join(words))


def _numbers(row: Mapping[str, str]) -> Row:
    return {name: float(value) if value else None for name, value in row.items()}


def log(run: str) -> list[Row]:
    """Return the log of a run in book/results/imagenette."""
    return [_numbers(row) for row in results.rows(f"imagenette/{run}/log.csv")]


def predictions(run: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted and the true class (images,) of each validation image of a run."""
    arrays = results.arrays(f"imagenette/{run}/predictions.npz")
    found = arrays["predictions"] if "predictions" in arrays else arrays["answers"]  # the name in earlier runs
    return found.astype(int), arrays["labels"].astype(int)


def log_table(rows: Sequence[Row]) -> Table:
    """Return the epochs of a training log: images, speed, learning rate, losses and accuracies."""
    cells = []
    for row in rows:
        losses = (f"{row[name]:.2f}" for name in ("train_loss", "val_loss"))
        top1 = (f"{row[name]:.1%}" for name in ("top1", "ema_top1"))
        first = (f"{row['epoch']:g}", f"{row['resolution']:.0f}", f"{row['images_per_second']:.0f}", f"{row['lr']:.1e}")
        cells.append((*first, *losses, *top1))
    header = ("epoch", "pixels", "images/s", "learning rate", "training loss", "held-out loss", "top-1", "top-1 (EMA)")
    return table(header, cells)


def curves(experiment: str) -> dict[tuple[str, int], list[Row]]:
    """Return the log of each run of an experiment, by (trial, seed)."""
    logs: dict[tuple[str, int], list[Row]] = {}
    for row in results.rows(f"{experiment}/curves.csv"):
        run = row.pop("trial"), int(row.pop("seed"))
        logs.setdefault(run, []).append(_numbers(row))
    return logs


def _gains(right: Mapping[str, analysis.Correct], base: str, trials: Sequence[str]) -> dict[str, analysis.Interval]:
    """Return the gain of each trial over `base`, with 95% intervals that hold for all of them at once."""
    pooled = analysis.scatter(right)
    return {trial: analysis.difference(right[base], right[trial], pooled, len(trials)) for trial in trials}


def ablation_gains(trials: Sequence[str]) -> Figure:
    """Draw the gain of each trial of small_data_ablation over "plain", sorted: mean, 95% interval, a dot per seed."""
    right = analysis.correct("small_data_ablation")
    gains = _gains(right, "plain", trials)
    order = sorted(trials, key=lambda trial: -gains[trial].value)
    fig, ax = figure(0.8 + 0.27 * len(order))
    for y, trial in enumerate(order):
        value, low, high = gains[trial]
        by_seed = analysis.by_seed(right[trial]) - analysis.by_seed(right["plain"]).mean()
        ax.plot([low, high], [y, y], color=BLUE, alpha=0.3, linewidth=6, solid_capstyle="butt")
        ax.plot(value, y, "|", color=INK, markersize=12, markeredgewidth=1.5)
        ax.plot(by_seed, np.full(len(by_seed), y), "o", color=BLUE, markersize=5)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_xlabel("points above the plain recipe, held-out images")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y", color="#eeeeee")
    ax.set_axisbelow(True)
    return fig


def _relative_times(runs: Sequence[Mapping[str, str]], base: str) -> dict[str, float]:
    """Return each trial's CPU time as a multiple of `base`'s, compared per processor: machines differ in speed."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        seconds.setdefault((run["trial"], run["cpu"]), []).append(float(run["cpu_seconds"]))
    ratios: dict[str, list[float]] = {}
    for (trial, cpu), values in seconds.items():
        if (base, cpu) in seconds:
            ratios.setdefault(trial, []).append(mean(values) / mean(seconds[base, cpu]))
    return {trial: mean(values) for trial, values in ratios.items()}


def ablation_table(trials: Sequence[str], base: str = "plain", experiment: str = "small_data_ablation") -> Table:
    """Return `base` and other trials of an experiment, sorted by their gain over it: top-1, seeds, gain, time.

    The time is CPU time, as a multiple of the time of `base` on the same processor model.
    """
    right = analysis.correct(experiment)
    time = _relative_times(results.rows(f"{experiment}/runs.csv"), base)
    gains = _gains(right, base, trials)
    rows = []
    for trial in [base, *sorted(trials, key=lambda trial: -gains[trial].value)]:
        gain = "" if trial == base else gains[trial]
        rows.append((trial, analysis.top1(right[trial]), len(right[trial]), gain, f"{time[trial]:.2f}"))
    return table(("change", "top-1 (%)", "seeds", f"gain over {base} (points, 95%)", "time"), rows)


def _timed(runs: Runs) -> dict[tuple[str, str, float], list[tuple[dict, list[Row]]]]:
    """Return (summary, log) of each timed run, grouped by (label, processor, minutes)."""
    groups: dict[tuple[str, str, float], list[tuple[dict, list[Row]]]] = {}
    for label, run in runs:
        summary = results.values(f"imagenette/{run}/summary.json")
        key = (label, results.processor(summary), summary["recipe"]["minutes"])
        groups.setdefault(key, []).append((summary, log(run)))
    return groups


def timed_table(runs: Runs) -> Table:
    """Return a row per label, processor and minutes of timed runs: top-1 with its spread, seeds, epochs, iterations.

    Raises ValueError if the runs were evaluated on different numbers of images.
    """
    groups = _timed(runs)
    images = {summary["images"] for made in groups.values() for summary, _ in made}
    if len(images) > 1:
        raise ValueError(f"the runs were evaluated on different numbers of images: {sorted(images)}")
    rows = []
    for (label, cpu, minutes), made in groups.items():
        top1 = 100 * np.array([summary["top1"] for summary, _ in made])
        spread = f"{analysis.NBSP}±{analysis.NBSP}{top1.std(ddof=1):.1f}" if len(top1) > 1 else ""
        epochs, steps = (mean(logged[-1][name] for _, logged in made) for name in ("epoch", "step"))
        accuracy = f"{top1.mean():.1f}{spread}"
        rows.append((label, cpu, f"{minutes:g}", accuracy, len(made), f"{epochs:.1f}", f"{steps:,.0f}"))
    return table(("recipe", "processor", "minutes", "top-1 (%)", "seeds", "epochs", "iterations"), rows)


def _lengths(experiment: str, trial: str) -> tuple[str, str]:
    """Return the mean numbers of epochs and of iterations of a trial's runs."""
    ends = [rows_of_run[-1] for (name, _), rows_of_run in curves(experiment).items() if name == trial]
    epochs, steps = (mean(end[key] for end in ends) for key in ("epoch", "step"))
    return f"{epochs:.1f}", f"{steps:,.0f}"


def few_iterations_table() -> Table:
    """Return the trials of slow_processor: top-1 on held-out images, seeds, epochs and iterations in three minutes."""
    right = analysis.correct("slow_processor")
    rows = [
        (trial, analysis.top1(right[trial]), len(right[trial]), *_lengths("slow_processor", trial))
        for trial in sorted(right, key=lambda trial: analysis.top1(right[trial]).mean)
    ]
    return table(("images and batches", "held-out top-1 (%)", "seeds", "epochs", "iterations"), rows)


def three_minutes_table() -> Table:
    """Return the trials of three_minutes, sorted by their gain over the recipe: top-1, gain, epochs and iterations."""
    right, base = analysis.correct("three_minutes"), "the recipe"
    gains = _gains(right, base, [trial for trial in right if trial != base])
    rows = [
        (trial, analysis.top1(right[trial]), gains.get(trial, ""), *_lengths("three_minutes", trial))
        for trial in [base, *sorted(gains, key=lambda trial: -gains[trial].value)]
    ]
    return table(("change", "held-out top-1 (%)", "gain (points, 95%)", "epochs", "iterations"), rows)


def held_out_table() -> Table:
    """Return the single runs of ten and thirty minutes that were evaluated on held-out images, with their lengths."""
    rows = []
    for label, run in HELD_OUT_RUNS:
        summary, end = results.values(f"imagenette/held_out/{run}/summary.json"), log(f"held_out/{run}")[-1]
        top1, minutes = f"{summary['top1']:.1%}", f"{summary['recipe']['minutes']:g}"
        rows.append((minutes, label, top1, f"{end['epoch']:.1f}", f"{end['step']:,.0f}"))
    return table(("minutes", "network or images", "held-out top-1", "epochs", "iterations"), rows)


def optimizers_table() -> Table:
    """Return changes of the optimizer in runs of ten minutes: top-1 and loss on held-out images, and epochs."""
    end = log("held_out/10min")[-1]
    second = {"change": "second version", "top1": end["ema_top1"], "val_loss": end["val_loss"], "epochs": end["epoch"]}
    rows = [
        (row["change"], f"{row['top1']:.1%}", f"{row['val_loss']:.3f}", f"{row['epochs']:.1f}")
        for row in (second, *results.values("imagenette/tried.json")["optimizers"])
    ]
    return table(("optimizer", "held-out top-1", "held-out loss", "epochs"), rows)


def changes_table() -> Table:
    """Return single changes of the recipe for thirty minutes: epochs, and top-1 and loss on held-out images."""
    rows = [
        (row["change"], f"{row['epochs']:.1f}", f"{row['top1']:.1%}", f"{row['val_loss']:.3f}")
        for row in results.values("imagenette/tried.json")["changes"]
    ]
    return table(("change", "epochs", "held-out top-1", "held-out loss"), rows)


def evaluation_gains() -> Table:
    """Return what larger and mirrored images in evaluation add to top-1, in points: mean, lowest and highest.

    The networks are those of `changes_table`.
    """
    rows = []
    for how, label in (
        ("mirrored", "with the mirror image"),
        ("larger", "larger images"),
        ("larger, mirrored", "larger images, with the mirror image"),
    ):
        gains = [100 * (row[how] - row["top1"]) for row in results.values("imagenette/tried.json")["changes"]]
        rows.append((label, *(f"{value:+.1f}" for value in (mean(gains), min(gains), max(gains)))))
    return table(("evaluation", "mean gain (points)", "lowest", "highest"), rows)


def evaluations_table() -> Table:
    """Return top-1 of trained networks by the resolution of the images, without and with their mirror images."""
    by_run: dict[str, list[dict]] = {}
    for row in results.values("imagenette/tried.json")["evaluations"]:
        by_run.setdefault(row["run"], []).append(row)
    rows = []
    for run, found in by_run.items():
        label = f"{run}; {found[0]['images']:,} images"
        for row in found:
            rows.append((label, str(row["resolution"]), f"{row['top1']:.1%}", f"{row['mirrored']:.1%}"))
            label = ""
    return table(("network", "pixels", "top-1", "with the mirror image"), rows)


def timed_runs(runs: Runs) -> Figure:
    """Plot top-1 of timed runs over their minutes: a dot per run, a line per recipe and processor.

    Each recipe has a colour. The first processor has filled dots and solid lines; the others have open diamonds with
    dashed lines, open squares with dotted lines and open triangles with dash-dotted lines.
    """
    fig, ax = figure(4.6)
    groups = _timed(runs)
    colors = dict(zip(dict.fromkeys(label for label, _, _ in groups), (BLUE, ORANGE, PURPLE, GREEN, RED, GREY, INK)))
    styles = dict(zip(dict.fromkeys(cpu for _, cpu, _ in groups), (("-", "o"), ("--", "D"), (":", "s"), ("-.", "^"))))
    for label, cpu in dict.fromkeys((label, cpu) for label, cpu, _ in groups):
        dashes, marker = styles[cpu]
        made = [same for key, same in groups.items() if key[:2] == (label, cpu)]  # the runs of each length
        points = [[(summary["recipe"]["minutes"], 100 * summary["top1"]) for summary, _ in same] for same in made]
        means = np.array([np.mean(same, 0) for same in points])
        line = {"color": colors[label], "linewidth": 1.2, "linestyle": dashes}
        ax.plot(*means.T, **line)
        face = colors[label] if dashes == "-" else ax.get_facecolor()
        ax.plot(*np.concatenate(points).T, marker, color=colors[label], markerfacecolor=face, markersize=6)
        line |= {"linestyle": dashes if len(means) > 1 else "", "marker": marker, "markerfacecolor": face}
        ax.plot([], [], label=f"{label}; {cpu}", **line)
    ax.set_xscale("log")
    ax.set_xticks([3, 10, 30], ["3", "10", "30"])
    ax.minorticks_off()
    ax.set(xlim=(2.5, 36), xlabel="minutes", ylabel="Imagenette top-1 (%)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def benchmark_table(*names: str) -> Table:
    """Return the results of speed benchmarks (files of book/results/speed): images per second, and our speed-up.

    Each is a median and a range over the rounds; the speed-up is the ratio of two speeds in the same round.
    """
    rows = []
    for name in names:
        outcome = results.values(f"speed/{name}.json")
        what = "{model}, {resolution} px, {batch_size} images".format(**outcome)
        slowest = min(result["images_per_second"]["median"] for result in outcome["results"].values())
        digits = 1 if slowest < 10 else 0
        for contestant, result in outcome["results"].items():
            speed, ratio = result["images_per_second"], result["ratio"]
            speed = f"{speed['median']:.{digits}f} ({speed['low']:.{digits}f}–{speed['high']:.{digits}f})"
            ratio = (
                ""
                if contestant == "convnext_min"
                else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
            )
            rows.append((what, contestant, speed, ratio, result["setting"]))
            what = ""
    return table(("model", "implementation", "images/s", "ours / theirs", "its fastest setting"), rows)


def memory_table(*names: str) -> Table:
    """Return the peak memory of training in results of benchmarks (files of book/results/speed), in MB.

    The setting is the fastest one of the implementation in a benchmark of speed.
    """
    rows = []
    for name in names:
        outcome = results.values(f"speed/{name}.json")
        what = "{model}, {resolution} px, {batch_size} images".format(**outcome)
        for implementation, result in outcome["memory"].items():
            rows.append((what, implementation, f"{result['megabytes']:,}", result["setting"]))
    return table(("model", "implementation", "peak memory of training (MB)", "setting"), rows)


def gpu_table() -> Table:
    """Return the images per second of ConvNeXt on a GPU, and in brackets their ratio to those of the Swin of its size.

    The first column is from the paper's Table 12, the others from book/results/speed/gpu, a setting each.
    """

    def cell(convnext: float, ratio: float) -> str:
        return f"{convnext:,.0f} ({ratio:.2f})"

    measured: dict[str, dict[str, str]] = {}  # size, then setting
    for row in results.rows("speed/gpu/throughput.csv"):
        measured.setdefault(row["size"], {})[row["setting"]] = cell(float(row["convnext"]), float(row["ratio"]))
    settings = tuple(dict.fromkeys(setting for cells in measured.values() for setting in cells))
    rows = []
    for speed in paper.TABLE12:
        cells = measured.get(speed.size if speed.resolution == 224 else f"{speed.size}, {speed.resolution}")
        if cells and speed.swin:
            published = cell(speed.convnext, speed.convnext / speed.swin)
            rows.append((speed.size, speed.resolution, published, *(cells.get(setting, "") for setting in settings)))
    return table(("size", "pixels", "A100, TF32 (paper)", *settings), rows)


def tried_changes() -> Table:
    """Return the changes to `convnext_min.fast` that were tried: milliseconds per iteration before and after."""
    rows = [
        (
            tried["change"],
            tried["network"],
            f"{tried['before']:.0f}",
            f"{tried['after']:.0f}",
            "kept" if tried["kept"] else "left out",
        )
        for tried in results.values("speed/tried.json")["tried"]
    ]
    return table(("change", "network", "before", "after", "outcome"), rows)


def product_speeds() -> Table:
    """Return the speed of the two matrix products of ConvNeXt blocks, in GFLOP/s, by library and by convnext_min."""
    rows = []
    for product in results.values("speed/tried.json")["products"]:
        factors = ((product["rows"], product["inputs"]), (product["inputs"], product["outputs"]))
        name = " by ".join(f"{high:,}{analysis.NBSP}×{analysis.NBSP}{wide:,}" for high, wide in factors)
        rows.append((name, *(str(product[library]) for library in ("MKL", "oneDNN", "ours"))))
    return table(("product", "MKL (GFLOP/s)", "oneDNN (GFLOP/s)", "convnext_min (GFLOP/s)"), rows)


def iteration_profile() -> Table:
    """Return the milliseconds of the parts of an iteration, of all together, and at three times the others' speed."""
    profiles = results.values("speed/tried.json")["parts"]
    rows = {name: [] for name in profiles[0]["milliseconds"]}
    totals, goals = [], []
    for profile in profiles:
        whole = sum(profile["milliseconds"].values())
        for name, milliseconds in profile["milliseconds"].items():
            rows[name].append(f"{milliseconds} ({milliseconds / whole:.0%})")
        outcomes = results.values(profile["contest"])["results"]
        ratios = [outcome["ratio"]["median"] for name, outcome in outcomes.items() if name != "convnext_min"]
        totals.append(whole)
        goals.append(f"{whole * min(ratios) / 3:.0f}")
    rows |= {"all together": totals, "at three times the speed of the fastest other": goals}
    header = (profiles[0]["network"], *(f"{profile['setting']} (ms)" for profile in profiles))
    return table(header, [(name, *cells) for name, cells in rows.items()])


def confusions(labels: np.ndarray, answers: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix: true classes in rows, predictions in columns; `labels` and `answers` are (images,)."""
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (labels, answers), 1)
    fig, ax = figure(4.6)
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=max(1, counts.max()))
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ax.text(column, row, count, ha="center", va="center", color="white" if 2 * count > counts.max() else INK)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(classes)), classes)
    ax.tick_params(length=0)
    ax.set(xlabel="predicted class", ylabel="true class")
    return fig


def trial_curves(trials: Sequence[str], experiment: str = "small_data_ablation") -> Figure:
    """Plot training loss and held-out top-1 of trials (seed 0) over their iterations, with guessing dashed."""
    logs = curves(experiment)
    fig, (left, right) = figure(2.9, 2)
    for trial, color in zip(trials, (BLUE, GREEN, RED)):
        rows = logs[trial, 0]
        iterations = [row["step"] for row in rows]
        left.plot(iterations, [row["train_loss"] for row in rows], "o-", markersize=3, color=color, label=trial)
        right.plot(iterations, [100 * row["top1"] for row in rows], "o-", markersize=3, color=color)
    for ax, guessing in ((left, np.log(10)), (right, 10)):
        ax.axhline(guessing, color=GREY, linewidth=0.8, linestyle="--")
        ax.set_xlabel("iteration")
    left.set_ylabel("training loss")
    right.set(ylabel="held-out top-1 (%)", ylim=(0, None))
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def ema_curves(averages: Mapping[str, str]) -> Figure:
    """Plot held-out top-1 over the epochs: of the last trial's weights, and of the EMA of each labelled trial."""
    logs = curves("small_data_ablation")
    fig, ax = figure(3.0)
    rows = logs[list(averages)[-1], 0]
    epochs = [row["epoch"] for row in rows]
    ax.plot(epochs, [100 * row["top1"] for row in rows], "o-", markersize=4, color=GREY, label="the weights")
    for (trial, label), color in zip(averages.items(), (BLUE, RED)):
        top1 = [100 * row["ema_top1"] for row in logs[trial, 0]]
        ax.plot(epochs, top1, "o-", markersize=4, color=color, label=label)
    ax.set(xlabel="epoch", ylabel="held-out top-1 (%)", ylim=(0, None), xticks=epochs)
    ax.legend()
    return fig


def errors_in_common(wrong: np.ndarray) -> Figure:
    """Draw how many images are wrong in how many runs, from `wrong` (runs, images), and the counts expected by chance.

    By chance: if each run were wrong at random, with its own probability.
    """
    runs, images = wrong.shape
    by_chance = np.ones(1)  # probability of 0, 1, 2 ... wrong predictions
    for error in wrong.mean(1):
        by_chance = np.convolve(by_chance, [1 - error, error])
    fig, ax = figure(2.8)
    counts = np.bincount(wrong.sum(0), minlength=runs + 1)
    ax.bar(range(runs + 1), counts, color=BLUE, alpha=0.8, label="counted")
    ax.plot(range(runs + 1), by_chance * images, "o", color=ORANGE, label="if runs were independent")
    ax.set(xlabel=f"number of runs that are wrong, of {runs}", ylabel="validation images")
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.legend()
    return fig


# Without a pyramid

ISOTROPIC = {"convnext": ("isotropic ConvNeXt", BLUE, "o"), "vit": ("ViT", ORANGE, "D")}


def by_value(experiment: str) -> dict[str, dict[float, analysis.Correct]]:
    """Return the correctness of trials called "<name>, <value>" by name and value, a learning rate or a count."""
    found: dict[str, dict[float, analysis.Correct]] = {}
    for trial, right in analysis.correct(experiment).items():
        name, _, value = trial.rpartition(", ")
        found.setdefault(name, {})[float(value)] = right
    return found


def isotropic_rates() -> Figure:
    """Plot held-out top-1 of the two small isotropic networks over the learning rate: isotropic_lr."""
    fig, ax = figure(2.8)
    rates = set()
    for network, by_rate in by_value("isotropic_lr").items():
        label, color, marker = ISOTROPIC[network]
        lrs = sorted(by_rate)
        rates |= by_rate.keys()
        ax.plot(lrs, [analysis.top1(by_rate[lr]).mean for lr in lrs], color=color, marker=marker, label=label)
    ax.set_xscale("log")
    ax.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    ax.minorticks_off()
    ax.set_xlabel("learning rate for 64 images")
    ax.set_ylabel("held-out top-1 (%)")
    ax.legend()
    return fig


def isotropic_table() -> Table:
    """Show the runs of the two small isotropic networks: size, cost, learning rate, top-1 with its spread, CPU time."""
    rows, runs = [], results.rows("isotropic/runs.csv")
    for network, by_rate in by_value("isotropic").items():
        with torch.device("meta"):
            model = models.ISOTROPIC[network](num_classes=10)
        size = f"{count_parameters(model) / 1e6:.2f}", f"{count_macs(model, 64) / 1e6:.0f}"
        for lr, right in by_rate.items():
            times = [float(run["cpu_seconds"]) / 60 for run in runs if run["trial"] == f"{network}, {lr:g}"]
            cells = analysis.top1(right), len(right), f"{mean(times):.1f}"
            rows.append((ISOTROPIC[network][0], *size, f"{lr:g}", *cells))
    return table(
        ("network", "params (M)", "MMACs at 64 px", "learning rate", "top-1 (%)", "seeds", "core-minutes per run"), rows
    )


# Few images per class

METHODS = {
    "layer-wise decay": (BLUE, "o"),
    "fine-tuning": (GREEN, "s"),
    "linear probe": (PURPLE, "^"),
    "from scratch": (ORANGE, "D"),
}


def few_images_curves() -> Figure:
    """Plot top-1 on three new classes over the images per class: a line through each method's means, a dot per run."""
    fig, ax = figure(3.4)
    found = by_value("few_images")
    counts = sorted({count for by_count in found.values() for count in by_count})
    for method, (color, marker) in METHODS.items():
        by_count = found.get(method, {})
        means = [analysis.top1(by_count[count]).mean for count in sorted(by_count)]
        ax.plot(sorted(by_count), means, color=color, marker=marker, label=method)
        for count, right in by_count.items():
            ax.plot(np.full(len(right), count), analysis.by_seed(right), marker, color=color, alpha=0.4, markersize=4)
    ax.axhline(100 / 3, color=GREY, linewidth=0.8, linestyle="--")
    ax.set_xscale("log")
    ax.set_xticks(counts, [f"{count:g}" for count in counts])
    ax.minorticks_off()
    ax.set_xlabel("training images per class")
    ax.set_ylabel("top-1 on three new classes (%)")
    ax.legend()
    return fig


def few_images_table() -> Table:
    """Show top-1 of each method on three new classes, with its spread, and the value chosen on held-out images."""
    found, runs = by_value("few_images"), results.rows("few_images/runs.csv")
    values = {(run["method"], int(run["images_per_class"])): float(run["value"]) for run in runs}
    counts = sorted({count for by_count in found.values() for count in by_count})
    rows = []
    for method in METHODS:
        by_count = found.get(method, {})
        cells = [
            f"{analysis.top1(by_count[count])} ({values[method, count]:g})" if count in by_count else ""
            for count in counts
        ]
        rows.append((method, *cells))
    return table(("top-1 (%), and rate or L2", *(f"{count:g} per class" for count in counts)), rows)


def few_images_gains(base: str = "fine-tuning") -> Table:
    """Show the difference of each method's top-1 to that of `base`, in points: mean over the seeds, lowest and highest.

    Runs of one seed have the same training images, so they are compared in pairs.
    """
    found = by_value("few_images")
    counts = sorted(found[base])

    def gap(method: str, count: int) -> str:
        if count not in found[method]:
            return ""
        pairs = zip(analysis.by_seed(found[base][count]), analysis.by_seed(found[method][count]))
        gaps = [after - before for before, after in pairs]
        return str(analysis.Interval(mean(gaps), min(gaps), max(gaps)))

    others = [method for method in METHODS if method in found and method != base]
    rows = [(method, *(gap(method, count) for count in counts)) for method in others]
    return table((f"points over {base}", *(f"{count:g} per class" for count in counts)), rows)
