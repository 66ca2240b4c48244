"""Figures and tables that compare steps of the road: the paper's numbers, costs, speed, curves and images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from statistics import median

import matplotlib.pyplot as plt
import skimage.data
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop, resize

from convnext_min import paper
from convnext_min.book.style import BLUE, GREY, INK, ORANGE, Table, figure, table, use_style
from convnext_min.data import ImageSet
from convnext_min.measure import Throughput, count_macs, count_parameters, layer_costs, road_table, throughput
from convnext_min.roadmap import STEPS, Design, build
from convnext_min.train.log import training_curve


def road(regime: str = "resnet50") -> Figure:
    """Draw the road of a regime, read downwards: the paper's top-1 (%), and GMACs at 224 px, published and measured."""
    rows = road_table(regime)
    published = paper.ROADS[regime]
    fig, (left, right) = figure(5.6, 2, sharey=True, width_ratios=(1.15, 1))
    y = range(len(rows))
    top1 = [row["paper_top1"] for row in rows]
    std = [published[row["slug"]].std or 0.0 for row in rows]
    left.plot(top1, y, color=BLUE, linewidth=1, alpha=0.5)
    left.errorbar(top1, y, xerr=std, fmt="o", color=BLUE, markersize=5, elinewidth=2)
    for i, value in enumerate(top1):
        left.annotate(f"{value:.2f}", (value, i), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)
    left.set_yticks(y, [row["label"] for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(min(top1) - 0.4, max(top1) + 1.0)
    left.set_xlabel("ImageNet top-1 (%), paper")
    right.barh(y, [row["gmacs"] for row in rows], height=0.55, color=ORANGE, alpha=0.75, label="here")
    right.plot([row["paper_gmacs"] for row in rows], y, "|", color=INK, markersize=11, markeredgewidth=2, label="paper")
    right.set_xlabel("GMACs at 224 px")
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="y", color="#eeeeee")
        ax.set_axisbelow(True)
    fig.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return fig


def curve(rows: Sequence[Mapping]) -> Figure:
    """Draw losses and accuracies over the epochs, from the rows of a training log, as `train.train` returns them."""
    return training_curve(rows, figure(2.8, 2)[0])


def image_grid(images: Tensor, titles: Sequence[str] = (), columns: int = 4) -> Figure:
    """Draw `images` (N, 3, H, W), uint8 or floating point in [0, 1], in a grid, with a short title above each."""
    lines = -(-len(images) // columns)
    use_style()
    size = 6.0 / columns
    fig, axes = plt.subplots(lines, columns, figsize=(6.0, lines * (size + 0.25 * bool(titles))), squeeze=False)
    plt.close(fig)
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture in zip(axes.flat, images):
        ax.imshow(picture.permute(1, 2, 0).cpu().numpy())
    for ax, title in zip(axes.flat, titles):
        ax.set_title(title, fontsize=9.5, fontweight="normal")
    return fig


def predictions(image_set: ImageSet, probabilities: Tensor) -> Figure:
    """Draw every image under its predicted class and that probability; if it is wrong, under the true class as well.

    `probabilities` is (N, classes), for the N images of `image_set`.
    """
    titles = []
    for probability, answer, label in zip(*probabilities.max(1), image_set.labels):
        right = "" if answer == label else f"\nnot {image_set.classes[label]}"
        titles.append(f"{image_set.classes[answer]} {probability:.0%}{right}")
    return image_grid(image_set.images, titles, columns=5)


def lines(curves: Mapping[str, tuple[Sequence, Sequence]], xlabel: str, ylabel: str) -> Figure:
    """Plot curves, given as {label: (x, y)}, in one pair of axes with a legend."""
    fig, ax = figure(2.8)
    for label, (x, y) in curves.items():
        ax.plot(x, y, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    ax.legend()
    return fig


def stage_macs(*slugs: str) -> Figure:
    """Draw the GMACs at 224 px in each stage of road steps of the smaller regime, as groups of bars."""
    fig, ax = figure(3.0)
    width = 0.8 / len(slugs)
    for i, (slug, color) in enumerate(zip(slugs, (GREY, BLUE, ORANGE))):
        with torch.device("meta"):
            costs = layer_costs(build(slug), batch_size=1, repeats=1)
        macs = [sum(cost.macs for cost in costs if cost.name.startswith(f"stages.{stage}.")) for stage in range(4)]
        places = [stage + (i - (len(slugs) - 1) / 2) * width for stage in range(4)]
        label = ", ".join(map(str, STEPS[slug].depths))
        bars = ax.bar(places, [m / 1e9 for m in macs], 0.95 * width, color=color, label=label)
        ax.bar_label(bars, fmt="%.2f", fontsize=9)
    ax.set_xticks(range(4), [f"stage {stage + 1}\n{56 // 2**stage}×{56 // 2**stage}" for stage in range(4)])
    ax.set_ylabel("GMACs at 224 px")
    ax.legend(title="blocks")
    return fig


def design_table(name: str, design: Design) -> Table:
    """Show the fields of a design of the road and their values, a function or a class by its name."""
    values = {field.name: getattr(design, field.name) for field in fields(design)}
    called = {field: getattr(value, "func", value) for field, value in values.items()}  # of a partial
    return table(("field", name), [(field, getattr(value, "__name__", value)) for field, value in called.items()])


def rectangles(image: Tensor, seen: Mapping[str, Sequence[tuple[int, int, int, int]]], margin: int = 12) -> Figure:
    """Draw rectangles (top, left, height, width) on `image` (3, H, W), cut `margin` px around them; a panel a title."""
    fig, axes = figure(3.3, len(seen), squeeze=False)
    boxes = [box for group in seen.values() for box in group]
    top, left = min(box[0] for box in boxes) - margin, min(box[1] for box in boxes) - margin
    bottom, right = max(box[0] + box[2] for box in boxes) + margin, max(box[1] + box[3] for box in boxes) + margin
    for ax, (title, group) in zip(axes.flat, seen.items()):
        ax.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
        for (y, x, height, width), color in zip(group, (ORANGE, "white", BLUE)):
            ax.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=2))
        ax.set(title=title, xlabel="pixels", xlim=(left, right), ylim=(bottom, top))
    return fig


def mixing_matrices(matrices: Mapping[str, Tensor], chans: int) -> Figure:
    """Draw the absolute values of matrices (chans * pixels, chans * pixels), divided into tiles by channel."""
    fig, axes = figure(2.5, len(matrices))
    for ax, (name, matrix) in zip(axes, matrices.items()):
        ax.imshow(matrix.abs(), cmap="Blues", vmax=matrix.abs().max())
        ax.set_title(name)
        pixels = len(matrix) // chans
        edges = [i * pixels - 0.5 for i in range(chans + 1)]
        ax.hlines(edges, edges[0], edges[-1], color=GREY, linewidth=0.7)
        ax.vlines(edges, edges[0], edges[-1], color=GREY, linewidth=0.7)
        middles, numbers = [(i + 0.5) * pixels for i in range(chans)], range(1, chans + 1)
        ax.set(xticks=middles, yticks=middles, xticklabels=numbers, yticklabels=numbers, xlabel="input channel")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("output channel")
    return fig


def step_table(*slugs: str) -> Table:
    """Compare the cost of road steps with the paper's in both regimes: GMACs at 224 px, parameters, published top-1."""
    rows = []
    for regime, published in paper.ROADS.items():
        for slug in slugs:
            with torch.device("meta"):
                model = build(slug, regime)
            row = published[slug]
            top1 = f"{row.top1:.2f}" + (f" ± {row.std:.2f}" if row.std else "")
            costs = (f"{count_macs(model) / 1e9:.3f}", f"{row.gmacs:.2f}", f"{count_parameters(model) / 1e6:.2f}", top1)
            rows.append((row.label, {"resnet50": "10", "resnet200": "11"}[regime], *costs))
    return table(("step", "paper's Table", "GMACs here", "GMACs paper", "params (M)", "top-1 paper (%)"), rows)


def gain_table(*slugs: str) -> Table:
    """Show the paper's change of top-1 (points) from each of the road steps to the next, in both regimes.

    "Standard error" belongs to the difference of two means of three seeds, from the standard deviations of Table 10.
    Table 11 gives one number for each step, without a spread.
    """
    rows = []
    for old, new in pairwise(slugs):
        before, after = paper.TABLE10[old], paper.TABLE10[new]
        changes = [published[new].top1 - published[old].top1 for published in paper.ROADS.values()]
        error = math.hypot(before.std, after.std) / 3**0.5
        rows.append((f"{before.label} → {after.label}", f"{changes[0]:+.2f}", f"{error:.2f}", f"{changes[1]:+.2f}"))
    return table(("change of top-1 (points)", "ResNet-50", "standard error", "ResNet-200, one number"), rows)


def kernel_accuracy() -> Figure:
    """Plot the paper's top-1 (%) over the kernel size in both regimes, on axes of equal span (1 point)."""
    slugs = {3: "move_up"} | {size: f"kernel{size}" for size in (5, 7, 9, 11)}
    fig, axes = figure(2.9, 2)
    for ax, (regime, published) in zip(axes, paper.ROADS.items()):
        top1 = [published[slug].top1 for slug in slugs.values()]
        std = [published[slug].std for slug in slugs.values()]
        ax.errorbar(list(slugs), top1, yerr=None if None in std else std, fmt="o-", capsize=4)
        middle = (min(top1) + max(top1)) / 2
        title = {"resnet50": "from ResNet-50", "resnet200": "from ResNet-200"}[regime]
        ax.set(xlabel="kernel size", xticks=list(slugs), ylim=(middle - 0.5, middle + 0.5), title=title)
    axes[0].set_ylabel("ImageNet top-1 (%)")
    return fig


def photos(names: Sequence[str], size: int = 224) -> Tensor:
    """Return free photographs of scikit-image by their names, centre-cropped: uint8 (N, 3, size, size)."""
    images = []
    for name in names:
        pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)
        images.append(resize(center_crop(pixels, min(pixels.shape[1:])), [size, size]))
    return torch.stack(images)


def speed_table(models: Mapping[str, nn.Module], resolution: int = 224, batch_size: int = 8, repeats: int = 3) -> Table:
    """Measure images per second of each model on this machine, forward and in training: median (slowest-fastest).

    Input is (batch_size, 3, resolution, resolution). The models take turns, `repeats` times, so that none is measured
    while the machine is warmer or busier.
    """
    speeds = {(name, training): [] for name in models for training in (False, True)}
    for _ in range(repeats):
        for (name, training), values in speeds.items():
            values.append(throughput(models[name], resolution, batch_size, training, repeats=1).median)
    rows = []
    for name, model in models.items():
        cells = [Throughput(median(s), min(s), max(s)) for s in (speeds[name, False], speeds[name, True])]
        rows.append((name, f"{count_macs(model, resolution) / 1e9:.2f}", *map(str, cells)))
    return table(("model", "GMACs", "forward", "forward + backward"), rows)


def draw_cube(ax: Axes, title: str, coloured: Callable[[int, int, int], bool]) -> None:
    """Draw a batch of features as a block: channels to the right, pixels upwards, images into the page.

    `coloured(image, channel, pixel)` tells which of the 4 images × 5 channels × 6 pixels are blue.
    """
    n, c, hw = 4, 5, 6
    right, up, back = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.35]])

    def cell(corner: Tensor, side: Tensor, other: Tensor, on: bool) -> None:
        corners = torch.stack([corner, corner + side, corner + side + other, corner + other])
        ax.add_patch(Polygon(corners, facecolor=BLUE if on else "white", edgecolor=GREY, linewidth=0.7))

    for channel in range(c):
        for pixel in range(hw):
            cell(channel * right + pixel * up, right, up, coloured(0, channel, pixel))
        for image in range(n):
            cell(channel * right + hw * up + image * back, right, back, coloured(image, channel, hw - 1))
    for pixel in range(hw):
        for image in range(n):
            cell(c * right + pixel * up + image * back, up, back, coloured(image, c - 1, pixel))
    ax.text(c / 2, -0.25, "C", ha="center", va="top")
    ax.text(-0.25, hw / 2, "H·W", ha="right", va="center", rotation=90)
    ax.text(c + 1.4, 0.2, "N", ha="left", va="top")
    ax.set(title=title, aspect="equal", xlim=(-1.2, c + n * 0.5 + 0.2), ylim=(-1.2, hw + n * 0.35 + 0.2))
    ax.axis("off")
