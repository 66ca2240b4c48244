"""Figures and tables of the small runs of the road, next to the paper's numbers: chapters 1 to 7, 9 and 10."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from convnext_min import paper
from convnext_min.book import analysis, results
from convnext_min.book.result_figures import curves
from convnext_min.book.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Table, figure, table
from convnext_min.experiments.trials import LAST_STEPS, SMALL_RECIPE_STEPS
from convnext_min.recipes import RECIPES
from convnext_min.roadmap import PREVIOUS, STEPS

ENDS = {"resnet50": ("ResNet-50", ORANGE), "convnext": ("ConvNeXt", BLUE)}
NETWORKS = {  # of data_and_length
    "resnet50": ("ResNet-50", ORANGE),
    "convnext": ("ConvNeXt, 0.02", BLUE),
    "convnext, fan-in init": ("ConvNeXt, fan-in", PURPLE),
}


def _label(slug: str) -> str:
    """Return the paper's label of a road step, or the slug itself if Table 10 lacks the step."""
    return paper.TABLE10[slug].label if slug in paper.TABLE10 else slug


def by_step(*slugs: str) -> Table:
    """Return our top-1 at steps of the road with its spread, and the change from the step before, ours and the paper's.

    The intervals hold for all steps of the road at once. A step that Table 10 lacks has its slug as its label.
    """
    right = analysis.correct("road")
    changes = analysis.changes(right)
    rows = []
    for slug in slugs or STEPS:
        change = analysis.published_change(slug)
        published = "" if change is None else f"{change:+.2f}"
        rows.append((_label(slug), analysis.top1(right[slug]), changes.get(slug, ""), published))
    seeds = " or ".join(str(count) for count in sorted({len(right[slug]) for slug in slugs or STEPS}))
    return table(("step", f"top-1 (%), {seeds} seeds", "change (95%, all steps)", "paper"), rows)


def gains() -> Figure:
    """Draw top-1 of each step minus ResNet-50's, the paper's and ours on one axis; each of our runs is a dot.

    Error bars: one standard deviation over seeds for the paper; for ours, 95% intervals that hold for all steps at
    once. A step that Table 10 lacks has no bar of the paper.
    """
    right = analysis.correct("road")
    steps = [slug for slug in STEPS if slug in right]
    fig, ax = figure(6.4)
    y = np.arange(len(steps))
    published = {i: paper.TABLE10[slug] for i, slug in enumerate(steps) if slug in paper.TABLE10}
    gains = [row.top1 - published[0].top1 for row in published.values()]
    error = {"ecolor": INK, "error_kw": {"elinewidth": 1.2}}
    label = "paper: ImageNet, 3 seeds ± standard deviation"
    spread = [row.std for row in published.values()]
    ax.barh([i - 0.21 for i in published], gains, xerr=spread, height=0.36, color=ORANGE, label=label, **error)
    first, pooled = right[steps[0]], analysis.scatter(right)
    ours = [analysis.difference(first, right[slug], pooled, len(steps) - 1) for slug in steps]
    errors = [(i.high - i.low) / 2 if slug != steps[0] else 0 for i, slug in zip(ours, steps)]
    label, values = "here: Imagenette, small networks, 95% interval", [i.value for i in ours]
    ax.barh(y + 0.21, values, xerr=errors, height=0.36, color=BLUE, alpha=0.55, label=label, **error)
    for row, slug in zip(y, steps):
        dots = analysis.by_seed(right[slug]) - analysis.by_seed(first).mean()
        ax.plot(dots, np.full(len(dots), row + 0.21), "o", color="white", mec=INK, markersize=3.5, zorder=3)
    ax.set_yticks(y, [_label(slug) for slug in steps])
    ax.set_ylim(len(steps) - 0.4, -0.6)
    ax.set_xlabel("top-1 minus ResNet-50's (points)")
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#eeeeee")
    ax.set_axisbelow(True)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center")
    return fig


def costs() -> Figure:
    """Plot top-1 of the small runs against the median time of a run: per step a dot for the mean, and one per run."""
    right = analysis.correct("road")
    rows = results.rows("road/runs.csv")
    fig, ax = figure(3.4)
    left = {"resnet50": (-8, 4), "inverted": (-8, 8)}  # offsets of names in points: left of their dots
    places = left | {"convnext": (8, -4), "depthwise": (-10, -14), "fewer_norms": (8, 4)}
    for slug in STEPS:
        if slug not in right:
            continue
        minutes = float(np.median([float(row["cpu_seconds"]) for row in rows if row["trial"] == slug])) / 60
        values = analysis.by_seed(right[slug])
        mean = values.mean()
        color = ENDS[slug][1] if slug in ENDS else GREY
        ax.plot(minutes, mean, "o", color=color, markersize=6)
        ax.plot(np.full(len(values), minutes), values, "o-", color=color, alpha=0.6, markersize=3, linewidth=0.8)
        if slug in places:
            side = "right" if slug in left else "left"
            name = ENDS[slug][0] if slug in ENDS else _label(slug)
            ax.annotate(name, (minutes, mean), places[slug], textcoords="offset points", ha=side)
    ax.margins(x=0.12, y=0.12)
    ax.set_xlabel("time of a run (core-minutes)")
    ax.set_ylabel("Imagenette top-1 (%)")
    return fig


def recipe_grid() -> Figure:
    """Plot ResNet-50 and ConvNeXt with the classic and the small-run recipe: a dot per run, lines join the means."""
    right = analysis.recipe_by_architecture()
    fig, ax = figure(3.2)
    names = {"road-classic": "classic recipe\n(SGD, steps)", "road": "small-run recipe\n(AdamW, cosine)"}
    for shift, (slug, (label, color)) in zip((-0.03, 0.03), ENDS.items()):
        cells = [100 * right[f"{slug}, {name}"].mean(1) for name in names]
        ax.plot(
            [shift, 1 + shift], [cell.mean() for cell in cells], color=color, label=label, marker="_", markersize=16
        )
        for i, cell in enumerate(cells):
            ax.plot(np.full(len(cell), i + shift), cell, "o", color=color, alpha=0.6, markersize=5)
    ax.set_xticks([0, 1], names.values())
    ax.set_xlim(-0.5, 1.5)
    ax.set_ylabel("Imagenette top-1 (%)")
    ax.legend()
    return fig


def fraction_curves(fractions: Sequence[tuple[str, float]]) -> Figure:
    """Plot top-1 of each network in data_and_length over the share of the images: (condition, fraction) per point."""
    right = analysis.correct("convnext_init/data_and_length")
    fig, ax = figure(3.2)
    for slug, (label, color) in NETWORKS.items():
        points = [(100 * fraction, 100 * right[f"{slug}, {name}"].mean(1)) for name, fraction in fractions]
        ax.plot([x for x, _ in points], [values.mean() for _, values in points], color=color, label=label)
        for x, values in points:
            ax.plot(np.full(len(values), x), values, "o", color=color, alpha=0.6, markersize=5)
    ax.set_xscale("log")
    ax.set_xticks([100 * fraction for _, fraction in fractions], [f"{100 * fraction:g}%" for _, fraction in fractions])
    ax.minorticks_off()
    ax.set_xlabel("part of the 9,469 training images")
    ax.set_ylabel("Imagenette top-1 (%)")
    ax.legend()
    return fig


# Recipe or architecture

RECIPE_NAMES = {"road-classic": "classic recipe", "road": "small-run recipe"}
SWEPT = {  # steps of the road in the figure of learning rates
    "resnet50": ("ResNet-50", ORANGE, "o"),
    "inverted": ("inverted bottleneck", GREY, "v"),
    "fewer_acts": ("fewer activations", GREEN, "s"),
    "layer_norm": ("BN to LN", PURPLE, "^"),
    "convnext": ("ConvNeXt", BLUE, "D"),
}


def learning_rates() -> Figure:
    """Plot the held-out loss over the peak learning rate (road_lr): a line per network, the road's rate dashed."""
    fig, ax = figure(3.2)
    losses = held_out_losses()
    for step, (label, color, marker) in SWEPT.items():
        if step in losses:
            rates = sorted(losses[step])
            by_rate = [losses[step][rate] for rate in rates]
            ax.plot(rates, by_rate, marker=marker, markersize=5, color=color, label=label)
    ax.axvline(RECIPES["road"].lr, color=GREY, linewidth=0.8, linestyle="--")
    ax.set(xscale="log", xlabel="learning rate for 64 images", ylabel="held-out loss")
    ax.set_xticks(sorted({rate for by_rate in losses.values() for rate in by_rate}))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.margins(x=0.08)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def held_out_losses(experiment: str = "road_lr") -> dict[str, dict[float, float]]:
    """Return the held-out loss of each step of the road at each learning rate of a sweep."""
    losses: dict[str, dict[float, float]] = {}
    for (trial, _), log_rows in curves(experiment).items():
        step, rate = trial.split(", ")
        losses.setdefault(step, {})[float(rate)] = log_rows[-1]["val_loss"]
    return losses


def best_rates(experiment: str = "road_lr") -> dict[str, float]:
    """Return the learning rate with the lowest held-out loss of each step of the road in a sweep of rates."""
    return {step: min(by_rate, key=by_rate.__getitem__) for step, by_rate in held_out_losses(experiment).items()}


def rates_table() -> Table:
    """Return the held-out loss of each step of the road by learning rate (road_lr), and the rate with the lowest."""
    losses, best = held_out_losses(), best_rates()
    rates = sorted({rate for by_rate in losses.values() for rate in by_rate})
    rows = []
    for step in (step for step in STEPS if step in losses):
        found = [losses[step].get(rate) for rate in rates]
        rows.append((_label(step), *("" if loss is None else f"{loss:.3f}" for loss in found), f"{best[step]:g}"))
    return table(("held-out loss at the rate", *(f"{rate:g}" for rate in rates), "best rate"), rows)


def at_own_rates() -> dict[str, analysis.Correct]:
    """Return the correctness of each step of the road at its best rate: of `road`, or of runs at another rate."""
    road = analysis.correct("road")
    other = analysis.correct("gelu_and_lr") | analysis.correct("road_tuned")
    found = {s: road[s] if r == RECIPES["road"].lr else other.get(f"{s}, {r:g}") for s, r in best_rates().items()}
    return {step: right for step, right in found.items() if right is not None}


def changes_at_own_rates() -> Table:
    """Return top-1 of each step at its best rate, and the change at each step there and as on the road, in points.

    The intervals hold for all cells at once. They come from the scatter between seeds, pooled over all networks and
    both columns.
    """
    road, own, rates = analysis.correct("road"), at_own_rates(), best_rates()
    pooled = analysis.scatter(road | {f"{s}, own": r for s, r in own.items() if rates[s] != RECIPES["road"].lr})
    steps = [step for step in PREVIOUS if {step, PREVIOUS[step]} <= own.keys()]
    rows = []
    for step in (step for step in STEPS if step in own):
        changes = ["", ""]
        if step in steps:
            pairs = [(found[PREVIOUS[step]], found[step]) for found in (own, road)]
            changes = [analysis.difference(*pair, pooled, 2 * len(steps)) for pair in pairs]
        published = analysis.published_change(step)
        paper_change = "" if published is None else f"{published:+.2f}"
        at_best = (f"{rates[step]:g}", analysis.top1(own[step]), str(len(own[step])))
        rows.append((_label(step), *at_best, *changes, paper_change))
    header = ("step", "own rate", "top-1 (%)", "seeds", "change (95%, all)", f"{ON_ROAD} (95%, all)", "paper")
    return table(header, rows)


def loss_by_recipe() -> Figure:
    """Plot the training loss of ResNet-50 and ConvNeXt over the epochs, the mean of their seeds: a panel per recipe."""
    logs = curves("recipe_by_architecture") | {
        (f"{end}, road", seed): rows for (end, seed), rows in curves("road").items()
    }
    fig, axes = figure(2.9, 2)
    for ax, (recipe, title) in zip(axes, RECIPE_NAMES.items()):
        for slug, (name, color) in ENDS.items():
            made = [rows for (trial, _), rows in logs.items() if trial == f"{slug}, {recipe}"]
            losses = [[row["train_loss"] for row in rows] for rows in made]  # (seeds, epochs)
            epochs = [row["epoch"] for row in made[0]]
            ax.plot(epochs, np.mean(losses, 0), "o-", markersize=3, color=color, label=name)
        ax.set(title=title, xlabel="epoch", xticks=epochs[::2])
    axes[0].set_ylabel("training loss")
    axes[1].legend()
    return fig


def times_by_recipe() -> Table:
    """Return the median time of a run of ResNet-50 and ConvNeXt with each recipe, in core-minutes."""
    minutes: dict[str, list[float]] = {}
    for row in results.rows("recipe_by_architecture/runs.csv"):
        minutes.setdefault(row["trial"], []).append(float(row["cpu_seconds"]) / 60)
    for row in results.rows("road/runs.csv"):
        minutes.setdefault(f"{row['trial']}, road", []).append(float(row["cpu_seconds"]) / 60)
    rows = [
        (name, *(f"{median(minutes[f'{slug}, {recipe}']):.1f}" for slug in ENDS))
        for recipe, name in RECIPE_NAMES.items()
    ]
    return table(("core-minutes per run", *(name for name, _ in ENDS.values())), rows)


# The last steps of the road, with other initial weights and other learning rates

ON_ROAD, OWN_RATE, BOTH = "as on the road", "own learning rate", "fan-in, at that rate"
VARIANTS = {
    ON_ROAD: (INK, "o"),
    "fan-in": (PURPLE, "s"),
    "truncated normal 0.02": (ORANGE, "^"),
    OWN_RATE: (BLUE, "D"),
    BOTH: (GREEN, "v"),
}
COMPARED = ("resnet50", *LAST_STEPS)


def _variants() -> dict[str, dict[str, analysis.Correct]]:
    """Return the correctness of ResNet-50 and the last steps of the road, by variant (VARIANTS) and step."""
    road = analysis.correct("road")
    at_own_rate = {OWN_RATE: analysis.correct("road_tuned"), BOTH: analysis.correct("road_tuned_fan_in")}
    found: dict[str, dict[str, analysis.Correct]] = {variant: {} for variant in VARIANTS}
    found[ON_ROAD] = {step: road[step] for step in COMPARED}
    for trial, right in analysis.correct("road_init").items():
        step, init = trial.split(", ")
        found[init][step] = right
    for step, rate in best_rates().items():
        for variant, tuned in at_own_rate.items():
            if step in COMPARED and f"{step}, {rate:g}" in tuned:  # not if the road's rate is the best
                found[variant][step] = tuned[f"{step}, {rate:g}"]
    return found


def variants() -> Figure:
    """Plot top-1 of ResNet-50 and the last steps of the road by variant: a dot per run, lines through the means."""
    fig, ax = figure(3.8)
    for (variant, by_step), shift in zip(_variants().items(), (-0.2, -0.1, 0.0, 0.1, 0.2)):
        color, marker = VARIANTS[variant]
        ax.plot([], [], marker, color=color, label=variant)
        for i, step in enumerate(COMPARED):
            values = analysis.by_seed(by_step[step]) if step in by_step else []
            ax.plot(np.full(len(values), i + shift), values, marker, color=color, alpha=0.6, markersize=5)
        line = [(i, analysis.top1(by_step[step]).mean) for i, step in enumerate(COMPARED) if step in by_step and i]
        ax.plot([x + shift for x, _ in line], [y for _, y in line], color=color, linewidth=1.2)
    ax.set_xticks(range(len(COMPARED)), [_label(step).replace(" ", "\n", 1) for step in COMPARED])
    ax.set_ylabel("Imagenette top-1 (%)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def _pooled(found: dict[str, dict[str, analysis.Correct]]) -> analysis.Scatter | None:
    return analysis.scatter({(variant, step): r for variant, by_step in found.items() for step, r in by_step.items()})


def variants_table(*variants: str) -> Table:
    """Return top-1 of ResNet-50 and the last steps as on the road and in some variants, and the change, in points.

    The intervals hold for all rows at once. They come from the scatter between seeds, pooled over all variants.
    """
    found, rates = _variants(), best_rates()
    pairs = [(step, variant) for step in COMPARED for variant in variants if step in found[variant]]
    rows = []
    for step, variant in pairs:
        before, after = found[ON_ROAD][step], found[variant][step]
        name = f"{variant}, {rates[step]:g}" if variant in (OWN_RATE, BOTH) else variant
        change = analysis.difference(before, after, _pooled(found), len(pairs))
        seeds = str(len(after)) if len(after) == len(before) else f"{len(before)}, {len(after)}"
        rows.append((_label(step), analysis.top1(before), name, analysis.top1(after), seeds, change))
    header = ("step", f"{ON_ROAD} (%)", "variant", "top-1 (%)", "seeds", "change (95%, all rows)")
    return table(header, rows)


def last_changes() -> Table:
    """Return the change of top-1 at the last two steps of the road, and at both together: a row for each variant.

    The intervals hold for all cells at once. They come from the scatter between seeds, pooled over all variants.
    """
    found = _variants()
    *_, before, middle, after = COMPARED
    changes = {_label(middle): (before, middle), _label(after): (middle, after), "both steps": (before, after)}
    pooled, number = _pooled(found), len(changes) * len(found)
    rows = [
        (variant, *(analysis.difference(by_step[a], by_step[b], pooled, number) for a, b in changes.values()))
        for variant, by_step in found.items()
    ]
    return table(("points (95%, all at once)", *changes), rows)


# ReLU against GELU


def gelu_by_rate() -> Table:
    """Return top-1 of "kernel 7", with ReLU, and of "ReLU to GELU" by learning rate; one of the rates is the road's.

    The intervals come from the scatter between seeds, pooled over all runs of the table, and hold at once.
    """
    steps = ("kernel7", "gelu")
    road, runs = analysis.correct("road"), analysis.correct("gelu_and_lr")
    runs |= {f"{step}, {RECIPES['road'].lr:g}": road[step] for step in steps}
    pooled = analysis.scatter(runs)
    rates = sorted({float(trial.split(", ")[1]) for trial in runs})
    rows = []
    for rate in rates:
        relu, gelu = (runs[f"{step}, {rate:g}"] for step in steps)
        gain = analysis.difference(relu, gelu, pooled, len(rates))
        rows.append((f"{rate:g}", len(relu), analysis.top1(relu), analysis.top1(gelu), gain))
    return table(("learning rate", "seeds", "ReLU (%)", "GELU (%)", "points (95%, all at once)"), rows)


# The small-data recipe on the road


def small_recipe_table() -> Table:
    """Return top-1 of steps of the road with the small-data recipe, each at its best rate, beside ResNet-50.

    The rates are the best of `small_recipe_lr`. The intervals hold for all rows at once. They come from the scatter
    between seeds, pooled over the steps.
    """
    runs, rates = analysis.correct("small_recipe_by_architecture"), best_rates("small_recipe_lr")
    found = {step: runs[f"{step}, {rates[step]:g}"] for step in SMALL_RECIPE_STEPS}
    pooled, first = analysis.scatter(found), found["resnet50"]
    rows = []
    for step, right in found.items():
        gap = "" if step == "resnet50" else analysis.difference(first, right, pooled, len(found) - 1)
        rows.append((_label(step), f"{rates[step]:g}", analysis.top1(right), len(right), gap))
    return table(("step", "learning rate", "top-1 (%)", "seeds", "minus ResNet-50 (95%, all rows)"), rows)
