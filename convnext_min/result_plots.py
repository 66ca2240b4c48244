"""Figures and tables of the committed experiments (book/results), beside the paper's where it has the same."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from convnext_min import analysis, paper, results
from convnext_min.analysis import BEFORE
from convnext_min.measure import count_macs
from convnext_min.plots import BLUE, GREY, INK, ORANGE, Table, figure, table
from convnext_min.recipes import RECIPES
from convnext_min.roadmap import STEPS, build

ENDS = {"resnet50": ("ResNet-50", ORANGE), "convnext": ("ConvNeXt", BLUE)}


def road_results(*slugs: str) -> Table:
    """Our small runs of road steps: top-1 with its spread, and the change that each brought, ours and the paper's."""
    right = analysis.right_answers("road")
    rows = []
    for slug in slugs or STEPS:
        mean, std = analysis.top1(right[slug])
        ours, published = "", ""
        if slug in BEFORE:
            before = BEFORE[slug]
            ours = str(analysis.difference(right[before], right[slug]))
            published = f"{paper.TABLE10[slug].top1 - paper.TABLE10[before].top1:+.2f}"
        rows.append((paper.TABLE10[slug].label, f"{mean:.1f} ± {std:.1f}", len(right[slug]), ours, published))
    return table(("step", "top-1 here (%)", "seeds", "change here (points, 95%)", "change in the paper"), rows)


def road_gains() -> Figure:
    """The road as the paper draws it: bars for what each step is above ResNet-50, the paper's and ours."""
    right = analysis.right_answers("road")
    steps = [slug for slug in STEPS if slug in right]
    fig, (left, here) = figure(5.6, 2, sharey=True)
    y = np.arange(len(steps))
    published = [paper.TABLE10[slug] for slug in steps]
    gains = [row.top1 - published[0].top1 for row in published]
    left.barh(y, gains, xerr=[row.std for row in published], height=0.6, color=ORANGE, ecolor=INK)
    left.set_xlabel("points above ResNet-50, ImageNet")
    left.set_title("paper")
    ours = [analysis.difference(right[steps[0]], right[slug]) for slug in steps]
    value = np.array([interval.value for interval in ours])
    errors = np.array([[i.value - i.low for i in ours], [i.high - i.value for i in ours]])
    here.barh(y, value, xerr=errors, height=0.6, color=BLUE, ecolor=INK)
    here.set_xlabel("points above ResNet-50, Imagenette")
    here.set_title("small runs")
    left.set_yticks(y, [row.label for row in published])
    left.set_ylim(len(steps) - 0.4, -0.6)
    for ax in (left, here):
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="y", color="#eeeeee")
        ax.set_axisbelow(True)
    return fig


def road_costs() -> Figure:
    """Top-1 of the small runs against MACs, parameters and measured time, a point a step and a line along the road."""
    right = analysis.right_answers("road")
    steps = [slug for slug in STEPS if slug in right]
    recipe = RECIPES["road"]
    rows = results.rows("road/runs.csv")
    costs = {"MACs (millions)": [], "parameters (millions)": [], "time (core-minutes)": []}
    for slug in steps:
        with torch.device("meta"):
            model = build(slug, num_classes=10, width_multiplier=recipe.width_multiplier)
        costs["MACs (millions)"].append(count_macs(model, recipe.resolution) / 1e6)
        costs["parameters (millions)"].append(sum(p.numel() for p in model.parameters()) / 1e6)
        times = [float(row["cpu_seconds"]) for row in rows if row["trial"] == slug]
        costs["time (core-minutes)"].append(float(np.median(times)) / 60)
    top1 = [analysis.top1(right[slug]) for slug in steps]
    fig, axes = figure(3.0, 3, sharey=True)
    for ax, (name, values) in zip(axes, costs.items()):
        mean, std = zip(*top1)
        ax.plot(values, mean, color=BLUE, linewidth=1, alpha=0.4)
        ax.errorbar(values, mean, yerr=std, fmt="o", color=BLUE, markersize=4, elinewidth=1.2)
        for slug, (label, color) in ENDS.items():
            i = steps.index(slug)
            ax.plot(values[i], mean[i], "o", color=color, markersize=8, zorder=3, label=label)
        ax.set_xlabel(name)
        ax.set_xlim(left=0)
    axes[0].set_ylabel("Imagenette top-1 (%)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def recipe_grid() -> Figure:
    """ResNet-50 and ConvNeXt under the classic and the modern recipe: a point a run, a line through the means."""
    right = analysis.right_answers("grid")
    fig, ax = figure(3.2)
    names = {"road-classic": "classic recipe\n(SGD, steps)", "road": "modern recipe\n(AdamW, cosine)"}
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
    """Both ends of the road over the part of the images, each condition of `when` given with its fraction."""
    right = analysis.right_answers("when")
    fig, ax = figure(3.2)
    for slug, (label, color) in ENDS.items():
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
