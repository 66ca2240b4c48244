"""Figures and tables of the chapters on detection and segmentation."""

import math
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Patch, Rectangle
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_segmentation_masks

from convnext_min import paper
from convnext_min.book import analysis, results
from convnext_min.book.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, Table, figure, table, use_style
from convnext_min.dense import flops
from convnext_min.dense.datasets import DenseDataset
from convnext_min.dense.predict import palette
from convnext_min.dense.upernet import IGNORED

LEVEL_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE)  # of P2..P6
VERDICTS = {"found": BLUE, "missed": ORANGE, "double": GREEN, "false": RED, "merged": PURPLE}
NO_CLASS = "#d9d9d9"
HYPHEN = "\N{NON-BREAKING HYPHEN}"  # keeps a name on one line of a narrow table

Map = tuple[str, Tensor]  # a name and one level (C, H, W)
Arrow = tuple[tuple[int, int], tuple[int, int]]  # from (row, column) to (row, column)


def _grid(lines: int, columns: int, height: float, **options) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with axes without ticks or frames."""
    use_style()
    fig, axes = plt.subplots(lines, columns, figsize=(6.0, height), squeeze=False, **options)
    plt.close(fig)
    for ax in axes.flat:
        ax.axis("off")
    return fig, axes.tolist()


def _show(ax: Axes, image: Tensor, title: str = "") -> None:
    """Show an image (3, H, W), uint8 or in 0..1, its brightest pixels white: micrographs are dark."""
    pixels = image.float()
    pixels = (pixels / pixels.quantile(0.999).clamp(min=1e-6)).clamp(max=1)
    ax.imshow(pixels.permute(1, 2, 0).numpy())
    ax.set_title(title, fontsize=9.5, fontweight="normal")


def _frame(ax: Axes, box: Tensor, color: str, **style) -> None:
    """Draw the edges of a box x0, y0, x1, y1 in pixels."""
    x0, y0, x1, y1 = (value - 0.5 for value in box.tolist())  # pixel i is drawn from i - 0.5 to i + 0.5
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, **{"linewidth": 1.3} | style))


def _legend(fig: Figure, names: Sequence[str], colours: Sequence[str], columns: int) -> None:
    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(names, colours)]
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=1.2, columnspacing=1.2)


# ---- Data


def objects(dataset: DenseDataset, number: int = 4) -> Figure:
    """Draw the first images of `dataset`, and below each its objects: a colour per mask, and the boxes."""
    fig, (above, below) = _grid(2, number, 3.4)
    for i in range(number):
        image, target = dataset[i]
        image, masks = image.as_subclass(Tensor), target["masks"].as_subclass(Tensor).bool()
        _show(above[i], image, f"{len(masks)} objects")
        colours = (palette(7) * (1 + len(masks) // 7))[: len(masks)]
        below[i].imshow(draw_segmentation_masks(torch.zeros_like(image), masks, 0.8, colours).permute(1, 2, 0).numpy())
        for box, colour in zip(target["boxes"], colours):
            _frame(below[i], box, colour, linewidth=0.7)
    return fig


def scenes(dataset: DenseDataset, number: int = 3, photos: bool = True) -> Figure:
    """Draw the label maps of the first images of `dataset`, below the images if `photos`; no class is grey."""
    number = min(number, len(dataset))
    fig, lines = _grid(1 + photos, number, 3.9 if photos else 2.3)
    for i in range(number):
        image, target = dataset[i]
        if photos:
            _show(lines[0][i], image.as_subclass(Tensor))
        lines[-1][i].imshow(coloured(target["labels"].as_subclass(Tensor), len(dataset.classes)))
    _legend(fig, [*dataset.classes, "no class"], [*palette(len(dataset.classes)), NO_CLASS], 6)
    return fig


def coloured(labels: Tensor, classes: int):
    """Return a label map (H, W) as colours (H, W, 3), uint8."""
    colours = [*palette(classes), NO_CLASS]
    lookup = torch.tensor([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours], dtype=torch.uint8)
    return lookup[torch.where(labels == IGNORED, classes, labels)].numpy()


# ---- Levels of a network


def component(level: Tensor) -> Tensor:
    """Return the first principal component over the positions of a level: (C, H, W) to (H, W) in 0..1."""
    vectors = level.detach().float().flatten(1).T  # (H W, C)
    vectors = vectors - vectors.mean(0)
    direction = torch.linalg.svd(vectors, full_matrices=False).Vh[0]
    values = (vectors @ (direction * direction[direction.abs().argmax()].sign())).view(level.shape[1:])
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-3 * level.abs().max().item())  # a constant level stays constant


def maps(rows: Sequence[Sequence[Map | None]], arrows: Sequence[Arrow] = ()) -> Figure:
    """Draw a grid of levels (C, H, W) by their first principal component, with names and shapes, and arrows between.

    A level of three channels is drawn as an image; None leaves a place empty.
    """
    columns = len(rows[0])
    size = 6.0 / columns
    fig, axes = _grid(len(rows), columns, len(rows) * (size + 0.42))
    for line, levels in zip(axes, rows):
        for ax, level in zip(line, levels):
            if level is None:
                continue
            name, value = level
            if len(value) == 3:
                _show(ax, value)
            else:
                ax.imshow(component(value).numpy(), vmin=0, vmax=1)
            ax.set_title(f"{name}\n{'×'.join(map(str, value.shape))}", fontsize=8, fontweight="normal")
    sides = {
        (0, 1): ((1.02, 0.5), (-0.02, 0.5)),
        (0, -1): ((-0.02, 0.5), (1.02, 0.5)),
        (1, 0): ((0.5, -0.03), (0.5, 1.42)),
    }
    for (i, j), (k, m) in arrows:
        start, end = sides[k - i, m - j]
        places = {"xyA": start, "axesA": axes[i][j], "xyB": end, "axesB": axes[k][m]}
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        fig.add_artist(ConnectionPatch(coordsA="axes fraction", coordsB="axes fraction", **places, **style))
    return fig


# ---- Detection


def anchors(
    image: Tensor,
    by_level: Sequence[Tensor],
    centre: tuple[float, float],
    matched: Sequence[Tensor],
    sides: Sequence[float],
) -> Figure:
    """Draw anchors (A, 4) of each level on an image: those at one place, and those `matched` with an object.

    `sides` are those of the levels' square anchors, in pixels.
    """
    fig, ((left, right),) = _grid(1, 2, 3.7)
    _show(left, image, f"{sum(map(len, by_level))} anchors at one place")
    shift = torch.tensor([*centre, *centre])
    for boxes, colour in zip(by_level, LEVEL_COLOURS):
        for box in boxes:
            _frame(left, box + shift, colour)
    _show(right, image, f"{sum(map(len, matched))} anchors that match an object")
    for boxes, colour in zip(matched, LEVEL_COLOURS):
        for box in boxes:
            _frame(right, box, colour, linewidth=0.8)
    for ax in (left, right):
        ax.set(xlim=(-0.5, image.shape[2] - 0.5), ylim=(image.shape[1] - 0.5, -0.5))
    _legend(fig, [f"P{i}, side {side:.0f}" for i, side in enumerate(sides, 2)], LEVEL_COLOURS, 5)
    return fig


def roi_align(image: Tensor, level: Tensor, box: Tensor, stride: int, size: int = 7, samples: int = 2) -> Figure:
    """Draw how RoIAlign reads a box (4,), in pixels of `image`, from a level (C, H, W) of this stride."""
    fig, ((left, right),) = _grid(1, 2, 3.3)
    _show(left, image, f"image {'×'.join(map(str, image.shape))}")
    _frame(left, box, RED, linewidth=2)
    x0, y0, x1, y1 = (box / stride).tolist()
    right.imshow(component(level).numpy(), alpha=0.85, vmin=0, vmax=1)
    right.set(xlim=(x0 - 3, x1 + 3), ylim=(y1 + 3, y0 - 3))
    channels, shape = len(level), "×".join(map(str, level.shape))
    right.set_title(f"level {shape}, read as {channels}×{size}×{size}", fontsize=9.5, fontweight="normal")
    for i in range(size + 1):
        x, y = x0 + (x1 - x0) * i / size, y0 + (y1 - y0) * i / size
        right.plot([x, x], [y0, y1], color=RED, linewidth=0.9)
        right.plot([x0, x1], [y, y], color=RED, linewidth=0.9)
    steps = (torch.arange(size * samples) + 0.5) / (size * samples)
    grid_y, grid_x = torch.meshgrid(y0 + (y1 - y0) * steps, x0 + (x1 - x0) * steps, indexing="ij")
    right.plot(grid_x.flatten(), grid_y.flatten(), ".", color="white", markersize=3)
    return fig


def cascade_diagram(rois: int, channels: int, hidden: int, classes: int) -> Figure:
    """Draw the three stages of the cascade with the shapes of what goes through: boxes, features, scores."""
    fig, ((ax,),) = _grid(1, 1, 3.6)
    ax.set(xlim=(0, 6), ylim=(3.5, 0))
    columns = (  # centre, width, text, colour
        (1.55, 1.3, f"RoIAlign\n{rois}×{channels}×7×7", "#cfe3f2"),
        (3.2, 1.5, f"4 conv, 1 linear\n{rois}×{hidden}", "#f8e3b8"),
        (4.95, 1.5, f"scores {rois}×{classes + 1}\nboxes {rois}×4", "#cdebdd"),
    )
    for stage, iou in enumerate((0.5, 0.6, 0.7)):
        y = 0.55 + 1.1 * stage
        ax.text(0.08, y, f"stage {stage + 1}\nIoU ≥ {iou}", va="center", fontsize=9, fontweight="bold")
        for x, width, text, colour in columns:
            ax.add_patch(Rectangle((x - width / 2, y - 0.26), width, 0.52, facecolor=colour, edgecolor=INK))
            ax.text(x, y, text, ha="center", va="center", fontsize=9)
        _arrow(ax, (2.2, y), (2.45, y))
        _arrow(ax, (3.95, y), (4.2, y))
        if stage < 2:
            ax.plot([4.95, 4.95, 1.55], [y + 0.26, y + 0.55, y + 0.55], color=INK, linewidth=1.2)
            _arrow(ax, (1.55, y + 0.55), (1.55, y + 0.84))
            ax.text(3.2, y + 0.48, "the refined boxes", ha="center", fontsize=8.5, color="#555555")
    _arrow(ax, (1.55, 0.0), (1.55, 0.29))
    ax.text(1.65, 0.13, f"proposals {rois}×4", va="center", fontsize=8.5, color="#555555")
    return fig


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def cascade(image: Tensor, truth: Tensor, boxes: Sequence[Tensor], ious: Sequence[Tensor]) -> Figure:
    """Draw one object's box (4,) at each stage beside its true one, and the IoU of all boxes after each stage.

    `boxes` and `ious` start with the proposals; `ious` has for each box its largest IoU with an object, (R,).
    """
    fig, (left, right) = figure(3.0, 2, width_ratios=(1, 1.35))
    names = ["proposals", *(f"stage {i}" for i in range(1, len(boxes)))]
    colours = (GREY, ORANGE, BLUE, RED)
    _show(left, image)
    left.axis("off")
    margin = 0.6 * (truth[2:] - truth[:2]).max()
    left.set(xlim=(truth[0] - margin, truth[2] + margin), ylim=(truth[3] + margin, truth[1] - margin))
    _frame(left, truth, "white", linewidth=2.2, linestyle=":")
    edges = torch.linspace(0, 1, 21)
    widths = (4.5, 3.2, 2.1, 1.0)  # so that lines that coincide stay visible
    for name, box, values, colour, width in zip(names, boxes, ious, colours, widths):
        _frame(left, box, colour, linewidth=width)
        share = torch.stack([(values >= edge).float().mean() for edge in edges])
        right.plot(edges, 100 * share, color=colour, linewidth=width, label=name)
    right.set(xlabel="IoU threshold", ylabel="boxes that reach it (%)", xlim=(0, 1), ylim=(0, None))
    right.legend()
    return fig


def outline(ax: Axes, mask: Tensor, colour: str) -> None:
    """Draw the edge of a mask (H, W) as a line; at the border of the image, too."""
    height, width = mask.shape
    padded = F.pad(mask.float(), (1, 1, 1, 1)).numpy()
    x, y = np.arange(-1, width + 1).clip(-0.5, width - 0.5), np.arange(-1, height + 1).clip(-0.5, height - 0.5)
    ax.contour(x, y, padded, [0.5], colors=[colour], linewidths=1.1).set_rasterized(True)


def mistakes(examples: Sequence[tuple[Tensor, Tensor, Sequence[str]]]) -> Figure:
    """Draw images (3, H, W) with the outlines of masks (n, H, W) in the colours of their verdicts (see `VERDICTS`)."""
    lines = -(-len(examples) // 2)
    fig, axes = _grid(lines, 2, 3.25 * lines + 0.3)
    fig.set_dpi(200)  # of the outlines, which as vectors would take hundreds of kilobytes
    for ax, (image, masks, verdicts) in zip((ax for line in axes for ax in line), examples):
        bright = image.float().quantile(0.999).clamp(min=1e-6)
        ax.imshow((image / bright).clamp(max=1).permute(1, 2, 0).numpy())
        lines = [(verdict, mask) for verdict, mask in zip(verdicts, masks) if mask.any()]
        for verdict, mask in sorted(lines, key=lambda line: line[0] == "found"):  # those on top
            outline(ax, mask, VERDICTS[verdict])
        counts = [f"{verdicts.count(verdict)}\xa0{verdict}" for verdict in VERDICTS if verdict in verdicts]
        ax.set_title(textwrap.fill(", ".join(counts), 34), fontsize=9, fontweight="normal")
    handles = [Line2D([], [], color=colour, label=name) for name, colour in VERDICTS.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


# ---- Segmentation


def predictions(
    examples: Sequence[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str], photos: bool = True
) -> Figure:
    """Draw a row per example: its labels, the predicted labels, and the wrong pixels in black.

    With `photos`, the row starts with the image (3, H, W), which also lies faintly below the wrong pixels.
    """
    titles = ["image"] * photos + ["labels", "prediction"]
    fig, axes = _grid(len(examples), len(titles) + 1, (1.3 if photos else 1.65) * len(examples) + 0.9)
    for line, (image, labels, found) in zip(axes, examples):
        if photos:
            _show(line[0], image)
        line[-3].imshow(coloured(labels, len(classes)))
        line[-2].imshow(coloured(found, len(classes)))
        wrong = (found != labels) & (labels != IGNORED)
        gray = image.float().mean(0) / image.max() if photos else torch.ones(labels.shape)
        shown = (0.6 + 0.4 * gray)[..., None].repeat(1, 1, 3)
        shown[wrong] = 0.0
        line[-1].imshow(shown.clamp(0, 1).numpy())
        share = wrong.sum() / (labels != IGNORED).sum()
        line[-1].set_title(f"{share:.0%} wrong", fontsize=9.5, fontweight="normal")
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=9.5, fontweight="normal")
    _legend(fig, [*classes, "no class"], [*palette(len(classes)), NO_CLASS], 6)
    return fig


def class_ious(by_network: dict[str, Tensor], classes: Sequence[str], shares: Tensor) -> Figure:
    """Plot the IoU (K,) of every class in percent for each network; `shares` (K,) of the pixels order the classes."""
    fig, ax = figure(0.9 + 0.34 * len(classes))
    order = shares.argsort(descending=True).tolist()
    height = 0.8 / len(by_network)
    for i, (name, ious) in enumerate(by_network.items()):
        y = [row + (i - (len(by_network) - 1) / 2) * height for row in range(len(order))]
        ax.barh(y, [100 * ious[k].item() for k in order], height, label=name)
    ax.set_yticks(range(len(order)), [f"{classes[k]} ({shares[k]:.1%})" for k in order])
    ax.invert_yaxis()
    ax.set_xlabel("IoU (%); in brackets the share of the pixels")
    ax.legend(loc="lower right")
    return fig


# ---- The paper's tables, and recorded runs


VARIANTS = {  # backbones of the paper's tables that we have
    "ResNet-50": "resnet50",
    "ConvNeXt-T": "tiny",
    "ConvNeXt-S": "small",
    "ConvNeXt-B": "base",
    "ConvNeXt-L": "large",
    "ConvNeXt-XL": "xlarge",
}


def _counted(head: str, backbone: str, size: tuple[int, int]) -> tuple[str, str]:
    """Return our GMACs and millions of parameters for a row of the paper, or dashes for a backbone that we lack."""
    if backbone not in VARIANTS:
        return "–", "–"
    parts, params = flops.cost(head, VARIANTS[backbone], *size)
    return f"{sum(parts.values()) / 1e9:.1f}", f"{params / 1e6:.1f}"


def detection_table() -> Table:
    """Return Table 3, and GMACs counted here for the rows with a ConvNeXt or ResNet-50."""
    groups = (
        ("Mask R-CNN", "mask_rcnn", paper.TABLE3_MASK_RCNN),
        ("Cascade", "cascade_mask_rcnn", paper.TABLE3_CASCADE),
        ("Cascade, 22K", "cascade_mask_rcnn", paper.TABLE3_CASCADE_22K),
    )
    rows = [
        (
            row.backbone.replace("-", HYPHEN),
            label,
            *(f"{value:.1f}" for value in (*row.box, *row.mask)),
            f"{row.fps:.1f}",
            row.gflops,
            _counted(head, row.backbone, (1280, 800))[0],
        )
        for label, head, part in groups
        for row in part
    ]
    metrics = [f"{kind} {metric}" for kind in ("box", "mask") for metric in ("AP", "50", "75")]
    return table(("backbone", "detector", *metrics, "FPS", "GFLOPs", "counted"), rows)


def segmentation_table() -> Table:
    """Return Tables 4 and 7, and GMACs and parameters counted here for the rows with a ConvNeXt."""
    rows = []
    for label, part in (("1K", paper.TABLE4), ("22K", paper.TABLE4_22K)):
        for row in part:
            size = (2048, 512) if row.crop == 512 else (2560, 640)
            gmacs, params = _counted("upernet", row.backbone, size)
            single = f"{row.miou_single_scale:.1f}" if row.miou_single_scale else "–"
            scores = row.crop, f"{row.miou:.1f}", single
            rows.append((row.backbone.replace("-", HYPHEN), label, *scores, row.gflops, gmacs, row.params, params))
    scores = "crop", "mIoU", "single-scale"
    return table(("backbone", "trained on", *scores, "GFLOPs", "counted (G)", "params (M)", "counted (M)"), rows)


NAMES = {  # in the names of trials
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
    "upernet": "UperNet",
    "fcn": "plain head",
    "convnext_atto": "ConvNeXt",
    "road:resnet50": "ResNet-50",
}


def _runs(task: str) -> dict[str, list[dict[str, str]]]:
    """Return the runs recorded for `task` by trial; a trial is named "head, backbone, start"."""
    runs: dict[str, list[dict[str, str]]] = {}
    for run in results.rows(f"dense/{task}/runs.csv"):
        runs.setdefault(run["trial"], []).append(run)
    return runs


def recorded(task: str, metrics: dict[str, str]) -> Table:
    """Return the means of `metrics`, by name, over the runs recorded for `task`, and every run's first metric.

    The row with the highest mean of the first metric comes first.
    """
    main, rows = next(iter(metrics)), []
    by_score = sorted(_runs(task).items(), key=lambda item: -np.mean([float(run[main]) for run in item[1]]))
    for trial, own in by_score:
        values = {metric: sorted(float(run[metric]) for run in own) for metric in metrics}
        means = [f"{sum(column) / len(column):.1f}" for column in values.values()]
        each = ", ".join(f"{value:.1f}" for value in values[main])
        names = (NAMES.get(word, word) for word in trial.split(", "))
        rows.append((*names, each, *means, f"{int(own[0]['steps']):,}"))
    first, *others = metrics.values()
    return table(("head", "backbone", "start", f"{first} of each run", f"mean {first}", *others, "iterations"), rows)


def clear_difference(task: str, metric: str) -> float:
    """Return from how many points on two rows of `recorded` differ clearly: by more than other seeds would bring.

    It is half of a 95% interval for the difference of two means, for all pairs of rows at once, with the scatter
    between seeds pooled over all rows (see `analysis.difference`).
    """
    runs = {trial: np.array([[float(run[metric]) / 100] for run in own]) for trial, own in sorted(_runs(task).items())}
    fewest = min(runs.values(), key=len)
    return analysis.difference(fewest, fewest, analysis.scatter(runs), math.comb(len(runs), 2)).high
