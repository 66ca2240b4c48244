"""Diagrams of the whole: all blocks of the road side by side, and ConvNeXt from the image to the logits."""

import copy
from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Rectangle
from torch import nn

from convnext_min.book.diagrams import (
    EDGES,
    FILLS,
    MARKS,
    MEANINGS,
    Diagram,
    Op,
    Pen,
    Shape,
    changed_edges,
    labels_of,
    road_block,
    swin_diagram,
    trace,
)
from convnext_min.book.style import INK, use_style
from convnext_min.convnext import ConvNeXt
from convnext_min.measure import count_macs, count_parameters

# The steps of the road that change the block, with a title that fits a narrow column.
BLOCKS = {
    "resnet50": "ResNet-50",
    "depthwise": "depthwise",
    "width": "width 96",
    "inverted": "inverted",
    "move_up": "moved up",
    "kernel7": "kernel 7×7",
    "gelu": "GELU",
    "fewer_acts": "fewer acts",
    "fewer_norms": "fewer norms",
    "layer_norm": "LayerNorm:\nConvNeXt",
}
FONT = 11  # readable on a phone, where a figure of 6 inches is about 350 pixels wide
COLUMNS, PITCH = 4, 1.5  # of the blocks; inches


def draw_road_blocks() -> Figure:
    """Draw the first stage's block of every step of the road that changes it, and Swin-T's, in rows of four.

    Read like a text. A box is labelled with its kernel and its output channels. Edges mark what changes from block to
    block, as in `diagrams.draw_steps`.
    """
    road = {title: trace(*road_block(slug)) for slug, title in BLOCKS.items()}
    edges = changed_edges([labels_of(diagram) for diagram in road.values()])
    swin = swin_diagram()
    columns = [*zip(road.items(), edges), (("for comparison:\nSwin-T", swin), ["same"] * len(labels_of(swin)))]
    use_style()
    fig = plt.figure(figsize=(COLUMNS * PITCH, 1.0), layout="none")
    plt.close(fig)
    ax = fig.add_axes((0, 0, 1, 1))
    top = 0.0
    for start in range(0, len(columns), COLUMNS):
        bottoms = [
            _compact(ax, (i + 0.5) * PITCH, top, title, diagram, marks)
            for i, ((title, diagram), marks) in enumerate(columns[start : start + COLUMNS])
        ]
        if start + COLUMNS < len(columns):
            top = max(bottoms) + 0.15
    handles = [Patch(facecolor=fill, edgecolor=INK, label=MEANINGS[kind]) for kind, fill in list(FILLS.items())[:5]]
    handles += [Patch(facecolor="white", label=meaning, **EDGES[edge]) for edge, meaning in MARKS.items()]
    place = {"bbox_to_anchor": ((COLUMNS - 1) * PITCH - 0.02, top + 0.5), "bbox_transform": ax.transData}
    ax.legend(handles=handles, loc="upper left", fontsize=FONT - 0.5, handlelength=1.2, borderaxespad=0, **place)
    height = max(bottoms) + 0.1
    ax.set(xlim=(0, COLUMNS * PITCH), ylim=(height, 0))
    ax.axis("off")
    fig.set_size_inches(COLUMNS * PITCH, height)
    return fig


def _compact(ax: Axes, x: float, y: float, title: str, diagram: Diagram, edges: Sequence[str]) -> float:
    """Draw a block without shapes at its arrows, its title at height `y`; return the height it has reached."""
    center, left = x + 0.1, x - 0.64
    ax.text(x, y + 0.24, title, fontsize=FONT, fontweight="bold", color=INK, ha="center", va="center")
    y, remaining = y + 0.5, iter(edges)
    for part in diagram:
        start = y
        y = _column(ax, center, y + 0.1, part.branch, remaining)
        if part.shortcut is not None:
            y += 0.14
            ax.plot((center, left, left, center - 0.08), (start, start, y, y), color=INK, linewidth=1.0)
            ax.plot((center, center), (start - 0.05, y + 0.1), color=INK, linewidth=1.0, zorder=0)
            ax.add_patch(Circle((center, y), 0.08, facecolor="white", edgecolor=INK, linewidth=1.0, zorder=3))
            ax.plot((center - 0.05, center + 0.05), (y, y), color=INK, linewidth=1.0, zorder=4)
            ax.plot((center, center), (y - 0.05, y + 0.05), color=INK, linewidth=1.0, zorder=4)
            y += 0.08
        if part.after:
            y = _column(ax, center, y + 0.05, part.after, remaining)
    return y + 0.1


def _column(ax: Axes, x: float, y: float, ops: Sequence[Op], edges: Iterator[str]) -> float:
    """Draw boxes one below the other from height `y`; return the height of the end of the last."""
    for op in ops:
        thin, wide = op.kind in ("norm", "act"), max(op.before[0], op.after[0]) > 200
        height, half = (0.2, 0.5 if wide else 0.34) if thin else (0.27, 0.62 if wide else 0.46)
        edge = next(edges)
        zorder = 2 + (edge != "same")
        box = Rectangle((x - half, y), 2 * half, height, facecolor=FILLS[op.kind], zorder=zorder, **EDGES[edge])
        ax.add_patch(box)
        font = FONT - 1.5 if thin else FONT
        ax.text(x, y + height / 2, _short(op), fontsize=font, color=INK, ha="center", va="center_baseline", zorder=5)
        y += height + 0.04
    return y - 0.04


def _short(op: Op) -> str:
    """Return the label of a box with its output channels only: "1×1 → 64", "d7×7", "attention"."""
    kernel = op.label.partition(",")[0]
    if kernel.startswith("attention"):
        return "attention"
    return f"{kernel} → {op.after[0]}" if "→" in op.label else kernel


def network_parts(model: ConvNeXt, resolution: int = 224) -> list[tuple[str, Shape, int, int]]:
    """Return stem, stages, downsampling layers and head of a ConvNeXt: name, (C, H, W) after it, MACs, parameters."""
    model = copy.deepcopy(model).to("meta").eval()
    x = torch.empty(1, 3, resolution, resolution, device="meta")
    parts = []
    for i, (downsample, stage) in enumerate(zip(model.downsample_layers, model.stages), start=1):
        name = f"downsampling {i - 1}" if i > 1 else "stem"
        for label, layer in ((name, downsample), (f"stage {i}: {len(stage)} blocks", stage)):
            macs = count_macs(layer, x.shape[-1], x.shape[1])
            x = layer(x)
            parts.append((label, tuple(x.shape[1:]), macs, count_parameters(layer)))
    chans = x.shape[1]
    head = count_parameters(model.norm) + count_parameters(model.head)
    classes = model.head.out_features if isinstance(model.head, nn.Linear) else chans
    parts.append(("mean, LN, linear", (classes, 1, 1), count_macs(model, resolution) - sum(p[2] for p in parts), head))
    return parts


def draw_convnext(model: ConvNeXt, resolution: int = 224) -> Figure:
    """Draw a whole ConvNeXt: its parts with the shapes between them and their costs, and some of them in detail.

    The details are the stem, a block of the first stage, and the downsampling layer after it. The model may be on the
    meta device.
    """
    parts = network_parts(model, resolution)
    use_style()
    fig = plt.figure(figsize=(6.0, 1.0), layout="none")
    plt.close(fig)
    ax = fig.add_axes((0, 0, 1, 1))
    _, (chans, size, _), *_ = parts[0]
    layers = {
        "stem": (model.downsample_layers[0], (3, resolution, resolution)),
        "block (stage 1)": (model.stages[0][0], (chans, size, size)),
        "downsampling 1": (model.downsample_layers[1], (chans, size, size)),
    }
    # A trace runs on the CPU; the values of the weights do not matter.
    details = {
        title: trace(copy.deepcopy(layer).to_empty(device="cpu"), shape) for title, (layer, shape) in layers.items()
    }
    left = _network(ax, 1.45, parts, (3, resolution, resolution))
    pen = Pen(ax, 2.5, details.values())
    pen.font, right = FONT + 1, 0.0
    for title, diagram in details.items():
        right = pen.draw(4.5, title, diagram, ["same"] * len(labels_of(diagram)), top=right) + 0.25
    height = max(left, right) + 0.1
    ax.set(xlim=(0, 6), ylim=(height, 0))
    ax.axis("off")
    fig.set_size_inches(6.0, height)
    return fig


def _network(ax: Axes, x: float, parts: Sequence[tuple[str, Shape, int, int]], image: Shape) -> float:
    """Draw the parts of a network one below the other; return the height that is reached."""
    ax.text(x, 0.15, "ConvNeXt", fontsize=FONT, fontweight="bold", color=INK, ha="center", va="center")
    y, shape = 0.3, image
    for name, after, macs, params in parts:
        y = _shape(ax, x, y, shape)
        fill = FILLS["other"] if "stage" in name else FILLS["norm"]
        ax.add_patch(Rectangle((x - 1.35, y), 2.7, 0.52, facecolor=fill, edgecolor=INK, linewidth=0.8))
        ax.text(x, y + 0.16, name, fontsize=FONT, color=INK, ha="center", va="center", fontweight="bold")
        costs = f"{macs / 1e9:.3f} GMACs, {params / 1e6:.3f} M params"
        ax.text(x, y + 0.37, costs, fontsize=FONT - 0.5, color=INK, ha="center", va="center")
        y, shape = y + 0.52, after
    return _shape(ax, x, y, shape)


def _shape(ax: Axes, x: float, y: float, shape: Shape) -> float:
    """Draw an arrow down from (x, y) with a shape beside it; return the height of its end."""
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x, y + 0.34), (x, y), arrowprops=arrow)
    text = "×".join(map(str, shape)) if shape[1] > 1 else f"{shape[0]} logits"
    ax.text(x + 0.1, y + 0.15, text, fontsize=FONT, color="#555555", ha="left", va="center")
    return y + 0.34
