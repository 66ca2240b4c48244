"""Diagrams of blocks, drawn from the module itself.

`trace` follows a module's forward pass with torch.fx, so that a diagram cannot show anything that the code does not do.
`draw_steps` and `draw_blocks` put several diagrams side by side.
"""

import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Polygon
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from convnext_min import paper
from convnext_min.book.style import INK, RED, use_style
from convnext_min.convnext import DropPath, LayerNorm
from convnext_min.roadmap import REGIMES

Shape = tuple[int, int, int]  # (C, H, W)

# The kinds of boxes: the colour of each, and its name in the legend.
FILLS = {
    "spatial": "#f6cf83",
    "channel": "#9cc9e6",
    "both": "#a9d9c3",
    "norm": "#e6e6e6",
    "act": "#e8c3d8",
    "other": "#ffffff",
}
MEANINGS = {
    "spatial": "mixes pixels",
    "channel": "mixes channels",
    "both": "mixes both",
    "norm": "norm",
    "act": "activation",
    "other": "other",
}

# The edge of a box: unchanged, not in the diagram to the left, or missing from the diagram to the right.
EDGES = {
    "same": {"edgecolor": INK, "linewidth": 0.8},
    "new": {"edgecolor": RED, "linewidth": 2.2},
    "gone": {"edgecolor": RED, "linewidth": 1.8, "linestyle": (0, (3, 2))},
}
MARKS = {"new": "changed", "gone": "goes next"}


@dataclass(frozen=True)
class Op:
    """One box: its text, its kind (a key of FILLS), and the (C, H, W) before and after it."""

    label: str
    kind: str
    before: Shape
    after: Shape


@dataclass(frozen=True)
class Residual:
    """A branch of boxes, the boxes on its shortcut (None where nothing is added), and the boxes after the sum."""

    branch: tuple[Op, ...]
    shortcut: tuple[Op, ...] | None = None
    after: tuple[Op, ...] = ()

    @property
    def boxes(self) -> tuple[Op, ...]:
        return self.branch + (self.shortcut or ()) + self.after


Diagram = tuple[Residual, ...]


# From a module to a diagram


def trace(module: nn.Module, shape: Shape) -> Diagram:
    """Return the diagram of a module that maps (C, H, W) to (C', H', W') with at most one residual addition.

    A layer that is used twice appears twice. Raises TypeError for an operation without a box, ValueError for more than
    one addition.
    """
    root = nn.Sequential(module)  # so that a single layer is traced as a layer, too
    graph = fx.GraphModule(root, _Tracer().trace(root))
    ShapeProp(graph).propagate(torch.zeros(1, *shape))
    sums, tail = _paths(graph)
    if len(sums) > 1:
        raise ValueError(f"a diagram has at most one addition, {type(module).__name__} has {len(sums)}")
    if not sums:
        return (Residual(tail),)
    shortcut, branch = sums[0]
    shared = sum(a is b for a, b in zip(shortcut, branch))  # the boxes in front of the split
    split = Residual(branch[shared:], shortcut[shared:], tail)
    return (Residual(branch[:shared]), split) if shared else (split,)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (LayerNorm, DropPath)) or super().is_leaf_module(module, name)


def _paths(graph: fx.GraphModule) -> tuple[list[list[tuple[Op, ...]]], tuple[Op, ...]]:
    """Return the boxes on both terms of each sum, and the boxes from the last sum, or the input, to the output."""
    layers = dict(graph.named_modules())
    channels_last = _channels_last(graph)
    sums, paths = [], {}  # node -> the boxes between it and the last sum before it

    def chw(node: fx.Node) -> Shape:
        _, a, b, c = node.meta["tensor_meta"].shape
        return (c, a, b) if node in channels_last else (a, b, c)

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            paths[node] = ()
        elif node.op == "output":
            return sums, paths[_sources(node)[-1]]
        elif node.target is operator.add and len(_sources(node)) > 1:
            sums.append([paths[term] for term in node.args])
            paths[node] = ()
        elif node.op == "call_module":
            source = _sources(node)[-1]
            op = _op(layers[node.target], chw(source), chw(node))
            paths[node] = (*paths[source], op) if op else paths[source]
        elif node.target is operator.mul:
            source = _sources(node)[-1]
            paths[node] = (*paths[source], Op("× γ", "other", chw(source), chw(node)))
        elif node.target == "permute":
            paths[node] = paths[_sources(node)[-1]]
        elif node.op != "get_attr":
            raise TypeError(f"no box for {node.target}")


def _channels_last(graph: fx.GraphModule) -> set[fx.Node]:
    """Return the tensors of shape (N, H, W, C): all between a permutation and its inverse."""
    found = set()
    for node in graph.graph.nodes:
        if node.target == "permute":
            found |= {node} if node.args[1:] == (0, 2, 3, 1) else set()
        elif _sources(node) and _sources(node)[-1] in found:
            found.add(node)
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that `node` computes with, without parameters."""
    return [arg for arg in node.all_input_nodes if arg.op != "get_attr"]


def _op(module: nn.Module, before: Shape, after: Shape) -> Op | None:
    """Return the box of one layer, or None for a layer that diagrams leave out. Raises TypeError for other layers."""
    if isinstance(module, (nn.Identity, DropPath)):
        return None
    if isinstance(module, nn.Linear):
        return _convolution((1, 1), 1, 1, before, after)
    if isinstance(module, nn.Conv2d):
        return _convolution(module.kernel_size, module.stride[0], module.groups, before, after)
    for base, label, kind in (
        (nn.BatchNorm2d, "BN", "norm"),
        (nn.LayerNorm, "LN", "norm"),
        (nn.ReLU, "ReLU", "act"),
        (nn.GELU, "GELU", "act"),
    ):
        if isinstance(module, base):
            return Op(label, kind, before, after)
    if isinstance(module, nn.MaxPool2d):
        return Op(f"max {module.kernel_size}×{module.kernel_size}\nstride {module.stride}", "other", before, after)
    raise TypeError(f"no box for a {type(module).__name__}")


def _convolution(size: tuple[int, int], stride: int, groups: int, before: Shape, after: Shape) -> Op:
    label = f"{size[0]}×{size[1]}, {before[0]}→{after[0]}"
    if groups == before[0] == after[0]:
        label = f"d{size[0]}×{size[1]}, {after[0]}"
    elif groups > 1:
        label += f"\n{groups} groups"
    if stride > 1:
        label += f"\nstride {stride}"
    kind = "channel" if size == (1, 1) else "spatial" if groups == before[0] else "both"
    return Op(label, kind, before, after)


def road_block(slug: str, stage: int = 0, first: bool = False, regime: str = "resnet50") -> tuple[nn.Module, Shape]:
    """Return the block of a road step in `stage` (0 to 3), and the (C, H, W) of its input at 224 px.

    `first` chooses the stage's first block, which may downsample, else the block that repeats. Where downsampling is
    separate the first block comes with the downsampling layer in front.
    """
    design = REGIMES[regime][slug]
    width, expansion, size = design.width * 2**stage, design.block.expansion, 56 // 2**stage
    options = {"kernel_size": design.kernel_size, "act": design.act, "norm": design.norm}
    if not first:
        return design.block(width * expansion, width, **options), (width * expansion, size, size)
    if stage == 0:
        return design.block(width, width, **options), (width, size, size)
    shape = (width // 2 * expansion, 2 * size, 2 * size)
    if design.separate_downsampling:
        downsample = (design.norm(width // 2), nn.Conv2d(width // 2, width, 2, 2))
        return nn.Sequential(*downsample, design.block(width, width, **options)), shape
    return design.block(shape[0], width, 2, **options), shape


def swin_diagram() -> Diagram:
    """Return the diagram of Swin-T's block in the first stage (Liu et al., 2021; the paper's Figure 4).

    Window attention and an MLP, each with a norm in front and a shortcut, on 96 channels of 56×56.
    """
    return _transformer_block("attention 7×7", 96, 56)


def vit_diagram() -> Diagram:
    """Return the diagram of ViT-S's block (Dosovitskiy et al., 2021): attention over all 14×14 vectors, and an MLP.

    It has 384 channels. The class token, a vector more, is left out.
    """
    return _transformer_block("attention 14×14", 384, 14)


def _transformer_block(attention: str, dim: int, size: int) -> Diagram:
    """Return a block of attention and an MLP on `dim` channels of `size`×`size`; `attention` is its box's label."""

    def op(label: str, kind: str, before: int, after: int) -> Op:
        return Op(label, kind, (before, size, size), (after, size, size))

    def linear(before: int, after: int) -> Op:
        return op(f"1×1, {before}→{after}", "channel", before, after)

    norm = op("LN", "norm", dim, dim)
    mixing = (norm, linear(dim, 3 * dim), op(attention, "spatial", 3 * dim, dim), linear(dim, dim))
    mlp = (norm, linear(dim, 4 * dim), op("GELU", "act", 4 * dim, 4 * dim), linear(4 * dim, dim))
    return (Residual(mixing, ()), Residual(mlp, ()))


# From diagrams to a figure


def draw_steps(*slugs: str, stage: int = 0, first: bool = False, regime: str = "resnet50") -> Figure:
    """Draw the blocks of road steps side by side (see `road_block`).

    Boxes that the step to the left lacks have a red edge, boxes that the step to the right lacks a dashed one.
    """
    diagrams = {paper.ROADS[regime][slug].label: trace(*road_block(slug, stage, first, regime)) for slug in slugs}
    return _draw(diagrams, changed_edges([labels_of(diagram) for diagram in diagrams.values()]))


def draw_blocks(blocks: Mapping[str, tuple[nn.Module, Shape] | Diagram]) -> Figure:
    """Draw diagrams side by side under their titles, each given as (module, its input's (C, H, W)) or as a Diagram.

    A box is as wide as its channels (on a logarithmic scale), a trapezoid where they change. The shape of one image,
    channels × height × width, is beside each arrow. A d before a kernel means depthwise.
    """
    diagrams = {title: b if isinstance(b[0], Residual) else trace(*b) for title, b in blocks.items()}
    return _draw(diagrams, [["same"] * len(labels_of(diagram)) for diagram in diagrams.values()])


def labels_of(diagram: Diagram) -> list[str]:
    return [op.label for part in diagram for op in part.boxes]


def changed_edges(columns: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the edge (a key of EDGES) of every box, given the labels of the boxes of each diagram."""
    edges = [["same"] * len(column) for column in columns]
    for i in range(1, len(columns)):
        before, after = columns[i - 1], columns[i]
        edges[i] = ["new" if changed else "same" for changed in _changed(before, after)]
        if len(after) < len(before):
            gone = _changed(after, before)
            edges[i - 1] = ["gone" if out else edge for out, edge in zip(gone, edges[i - 1])]
    return edges


def _changed(before: Sequence[str], after: Sequence[str]) -> list[bool]:
    """Return for each box of `after` whether `before` lacks it: place by place, or aligned, whichever finds fewer."""
    aligned = [True] * len(after)
    for match in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        aligned[match.b : match.b + match.size] = [False] * match.size
    if len(before) != len(after):
        return aligned
    return min(aligned, [a != b for a, b in zip(before, after)], key=sum)


def _draw(diagrams: Mapping[str, Diagram], edges: Sequence[Sequence[str]]) -> Figure:
    use_style()
    fig = plt.figure(figsize=(6.0, 1.0), layout="none")
    plt.close(fig)
    ax = fig.add_axes((0, 0, 1, 1))
    pitch = 6.0 / max(len(diagrams), 2)
    pen = Pen(ax, pitch, diagrams.values())
    bottom = 0.0
    for i, (title, diagram) in enumerate(diagrams.items()):
        center = (i + 0.5) * pitch if len(diagrams) > 1 else 3.0
        bottom = max(bottom, pen.draw(center, title, diagram, edges[i]))
    lines = _legend(ax, diagrams.values(), {edge for column in edges for edge in column})
    height = bottom + 0.1 + 0.22 * lines
    ax.set(xlim=(0, 6), ylim=(height, 0))
    ax.axis("off")
    fig.set_size_inches(6.0, height)
    return fig


def _legend(ax: Axes, diagrams: Collection[Diagram], edges: set[str]) -> int:
    """Explain the colours and edges that occur, at the bottom of `ax`; return the number of lines."""
    found = {op.kind for diagram in diagrams for part in diagram for op in part.boxes}
    kinds = [kind for kind in FILLS if kind in found]
    handles = [Patch(facecolor=FILLS[kind], edgecolor=INK, linewidth=0.8, label=MEANINGS[kind]) for kind in kinds]
    handles += [Patch(facecolor="white", label=meaning, **EDGES[e]) for e, meaning in MARKS.items() if e in edges]
    columns = 3 if len(handles) > 4 else len(handles)
    ax.legend(
        handles=handles, loc="lower center", ncols=columns, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2
    )
    return math.ceil(len(handles) / columns)


class Pen:
    """Draws diagrams on axes whose unit is an inch, y downwards. Methods return the y they have reached."""

    def __init__(self, ax: Axes, pitch: float, diagrams: Collection[Diagram]):
        parts = [part for diagram in diagrams for part in diagram]
        chans = [shape[0] for part in parts for op in part.boxes for shape in (op.before, op.after)]
        self.ax, self.lanes = ax, 2 if any(part.shortcut for part in parts) else 1
        self.least, self.most = min(chans), max(chans)
        self.pitch = min(pitch, 2.6) if self.lanes == 1 else pitch
        self.font = 9 if self.lanes == 2 else 11.5 if pitch >= 3 else 10 if pitch >= 2 else 7.5

    def draw(self, center: float, title: str, diagram: Diagram, edges: Sequence[str], top: float = 0.0) -> float:
        residual = any(part.shortcut is not None for part in diagram)
        x = center + self.pitch * (0.24 if self.lanes == 2 else 0.06 if residual else 0.0)
        side = center - self.pitch * (0.25 if self.lanes == 2 else 0.36)
        self.text(center, top + 0.15, title, fontweight="bold")
        y, remaining = top + 0.3, iter(edges)
        for part in diagram:
            start = y + 0.06
            y = self.chain(x, y, part.branch, remaining)
            if part.shortcut is not None:
                y = self.arrow(x, y, (part.branch or part.shortcut)[-1].after) + 0.09
                self.shortcut(x, side, start, y, part.shortcut, remaining)
                y += 0.09
            for op in part.after:
                self.line((x, y), (x, y + 0.1))
                y = self.box(x, y + 0.1, op, next(remaining))
        return self.arrow(x, y, (part.after or part.branch)[-1].after)

    def chain(self, x: float, y: float, ops: Sequence[Op], edges: Iterator[str]) -> float:
        """Draw boxes one below the other, an arrow with the shape before each that is neither norm nor activation."""
        for i, op in enumerate(ops):
            if i == 0 or op.kind not in ("norm", "act"):
                y = self.arrow(x, y, op.before)
            y = self.box(x, y, op, next(edges))
        return y

    def shortcut(self, x: float, side: float, top: float, y: float, ops: Sequence[Op], edges: Iterator[str]) -> None:
        """Draw the path at `side` from height `top` to the sum at (x, y), its boxes, and the sum."""
        self.line((x, top), (side, top), (side, y), (x - 0.09, y), head=True)
        top = (top + y - sum(map(self.height, ops))) / 2
        for op in ops:
            top = self.box(side, top, op, next(edges))
        self.ax.add_patch(Circle((x, y), 0.09, facecolor="white", edgecolor=INK, linewidth=1.2))
        self.line((x - 0.05, y), (x + 0.05, y))
        self.line((x, y - 0.05), (x, y + 0.05))

    def box(self, x: float, y: float, op: Op, edge: str) -> float:
        height = self.height(op)
        top, bottom = self.half(op.before[0]), self.half(op.after[0])
        corners = [(x - top, y), (x + top, y), (x + bottom, y + height), (x - bottom, y + height)]
        self.ax.add_patch(Polygon(corners, facecolor=FILLS[op.kind], zorder=3 + (edge != "same"), **EDGES[edge]))
        self.text(x, y + height / 2, op.label, fontsize=self.font - (op.kind in ("norm", "act")), zorder=5)
        return y + height

    def arrow(self, x: float, y: float, shape: Shape) -> float:
        self.line((x, y), (x, y + 0.34), head=True)
        self.text(x + 0.07, y + 0.14, "×".join(map(str, shape)), ha="left", fontsize=self.font - 1.5, color="#555555")
        return y + 0.34

    def line(self, *points: tuple[float, float], head: bool = False) -> None:
        *_, before, last = points
        self.ax.plot(*zip(*points), color=INK, linewidth=1.2, solid_capstyle="butt", zorder=2)
        if head:
            style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
            self.ax.annotate("", last, before, arrowprops=style)

    def text(self, x: float, y: float, text: str, **style) -> None:
        self.ax.text(x, y, text, **{"fontsize": self.font, "color": INK, "va": "center", "ha": "center"} | style)

    def half(self, chans: int) -> float:
        """Return half the width of a box with this many channels."""
        share = math.log(chans / self.least) / math.log(self.most / self.least) if self.most > self.least else 1.0
        return self.pitch * (0.22 + 0.11 * share if self.lanes == 1 else 0.17 + 0.06 * share)

    @staticmethod
    def height(op: Op) -> float:
        return 0.23 if op.kind in ("norm", "act") else 0.29 + 0.17 * op.label.count("\n")
