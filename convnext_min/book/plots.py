"""The house style of the book's figures, the road as one figure, and the diagrams of blocks.

Figures are 6 inches wide on white, so that their text is readable in a column of 700 pixels and on a phone, and are
SVG in notebooks. A diagram is drawn from the module itself: `trace` follows its forward pass with torch.fx, so that
a picture cannot say what the code does not.
"""

import html
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from statistics import median

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Polygon
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from convnext_min import paper
from convnext_min.convnext import DropPath, LayerNorm
from convnext_min.measure import Throughput, count_macs, count_parameters, road_table, throughput
from convnext_min.roadmap import REGIMES, build
from convnext_min.train.records import training_curve

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#7a7a7a"
INK = "#262626"

# What a box of a diagram does: mix pixels, mix channels, both at once, normalize, bend.
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

# The edge of a box: as in the diagram to the left, not there, or missing from the diagram to the right.
EDGES = {
    "same": {"edgecolor": INK, "linewidth": 0.8},
    "new": {"edgecolor": RED, "linewidth": 2.2},
    "gone": {"edgecolor": RED, "linewidth": 1.8, "linestyle": (0, (3, 2))},
}
MARKS = {"new": "changed", "gone": "goes next"}


def use_style() -> None:
    """Set the house style for matplotlib; in a notebook, also make its figures SVG."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.0, 3.4),
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.family": "DejaVu Sans",
            "font.size": 10.5,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.labelsize": 10.5,
            "axes.labelcolor": INK,
            "axes.edgecolor": GREY,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, RED, GREY]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "lines.linewidth": 2.0,
            "image.interpolation": "none",
            "image.cmap": "cividis",
            "svg.hashsalt": "convnext",
        }
    )
    if "ipykernel" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def figure(height: float = 3.4, columns: int = 1, **subplots) -> tuple[Figure, Axes]:
    """A figure of the book's width and `height` inches, with `columns` axes side by side: (figure, axes)."""
    use_style()
    fig, axes = plt.subplots(1, columns, figsize=(6.0, height), **subplots)
    plt.close(fig)  # a notebook shows the figure once, as the value of the cell
    return fig, axes


# Figures of results


def road(regime: str = "resnet50") -> Figure:
    """The road as one figure, read downwards: the paper's top-1, and GMACs at 224 px, the paper's and measured."""
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
    right.barh(y, [row["gmacs"] for row in rows], height=0.55, color=ORANGE, alpha=0.75, label="measured")
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
    """Losses and accuracies over the epochs, from the log of a run: the rows that `train.train` returns."""
    return training_curve(rows, figure(2.8, 2)[0])


def image_grid(images: Tensor, titles: Sequence[str] = (), columns: int = 4) -> Figure:
    """Pictures in a grid: `images` (N, 3, H, W), uint8 or floating point in [0, 1], with a short title each."""
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


# Tables


@dataclass(frozen=True)
class Table:
    """Rows under a header, shown as an HTML table in a notebook and as aligned text elsewhere."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = (self.header, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = [[f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:]))] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in aligned)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells, tag):
            sides = ("left", *["right"] * (len(cells) - 1))
            return "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for cell, side in zip(cells, sides)
            )

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead><tr>{line(self.header, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def table(header: Sequence[str], rows: Sequence[Sequence]) -> Table:
    """A table to end a cell with; raises ValueError for a row that does not have one cell for each heading."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row needs {len(header)} cells for {list(header)}, got {len(row)}: {row}")
    return Table(tuple(header), tuple(tuple(str(cell) for cell in row) for row in rows))


def step_table(*slugs: str) -> Table:
    """Cost of road steps beside the paper's: both regimes, GMACs at 224 px, parameters, published top-1."""
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
    """The paper's change of top-1 from each of the road steps to the next, in points, in both regimes.

    Table 10 gives standard deviations over three seeds: beside a change stands that of a difference of two such runs.
    """
    rows = []
    for old, new in pairwise(slugs):
        before, after = paper.TABLE10[old], paper.TABLE10[new]
        changes = [published[new].top1 - published[old].top1 for published in paper.ROADS.values()]
        spread = math.hypot(before.std, after.std)
        rows.append((f"{before.label} → {after.label}", f"{changes[0]:+.2f}", f"{spread:.2f}", f"{changes[1]:+.2f}"))
    return table(("change of top-1 (points)", "ResNet-50", "spread of a difference", "ResNet-200, one run"), rows)


def speed_table(models: Mapping[str, nn.Module], resolution: int = 224, batch_size: int = 8, repeats: int = 3) -> Table:
    """Images a second of each model on this machine, forward and in a training step: median (slowest-fastest).

    The models take turns, `repeats` times, so that none is measured while the machine is warmer or busier.
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


# Diagrams of blocks


@dataclass(frozen=True)
class Op:
    """A box of a diagram: its text, what it does (a key of FILLS) and the (C, H, W) before and after it."""

    label: str
    kind: str
    before: tuple[int, int, int]
    after: tuple[int, int, int]


@dataclass(frozen=True)
class Residual:
    """A branch of boxes, the boxes on its shortcut (None where nothing is added), and the boxes after the sum."""

    branch: tuple[Op, ...]
    shortcut: tuple[Op, ...] | None = None
    after: tuple[Op, ...] = ()


Diagram = tuple[Residual, ...]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (LayerNorm, DropPath)) or super().is_leaf_module(module, name)


def _op(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> Op | None:
    """The box of one layer, or None for what a diagram leaves out; raises TypeError for a layer it cannot draw."""
    if isinstance(module, (nn.Identity, DropPath)):
        return None
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        size = module.kernel_size if isinstance(module, nn.Conv2d) else (1, 1)
        stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        label = f"{size[0]}×{size[1]}, {before[0]}→{after[0]}"
        if groups == before[0] == after[0]:
            label = f"d{size[0]}×{size[1]}, {after[0]}"
        elif groups > 1:
            label += f"\n{groups} groups"
        label += f"\nstride {stride}" * (stride > 1)
        kind = "channel" if size == (1, 1) else "spatial" if groups == before[0] else "both"
        return Op(label, kind, before, after)
    names = {nn.BatchNorm2d: "BN", nn.LayerNorm: "LN", nn.ReLU: "ReLU", nn.GELU: "GELU"}
    for kind, classes in {"norm": (nn.BatchNorm2d, nn.LayerNorm), "act": (nn.ReLU, nn.GELU)}.items():
        for base in classes:
            if isinstance(module, base):
                return Op(names[base], kind, before, after)
    if isinstance(module, nn.MaxPool2d):
        return Op(f"max {module.kernel_size}×{module.kernel_size}\nstride {module.stride}", "other", before, after)
    raise TypeError(f"no box for a {type(module).__name__}")


def trace(module: nn.Module, shape: tuple[int, int, int]) -> Diagram:
    """The diagram of a module that maps (C, H, W) to (C', H', W') with at most one residual addition.

    Follows the forward pass, so that a layer used twice appears twice. Raises TypeError for an operation without a
    box, ValueError for more than one addition.
    """
    root = nn.Sequential(module)  # so that a single layer is traced as a layer, too
    graph = fx.GraphModule(root, _Tracer().trace(root))
    ShapeProp(graph).propagate(torch.zeros(1, *shape))
    layers = dict(graph.named_modules())
    paths = {}  # node -> the boxes between it and the module's input, or the sum
    sums = []  # the paths of the two terms
    channels_last = {}  # node -> whether its tensor is (N, H, W, C)

    def chw(node: fx.Node) -> tuple[int, int, int]:
        _, a, b, c = node.meta["tensor_meta"].shape
        return (c, a, b) if channels_last[node] else (a, b, c)

    for node in graph.graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "placeholder":
            paths[node], channels_last[node] = (), False
            continue
        *others, source = (arg for arg in node.all_input_nodes if arg.op != "get_attr")
        channels_last[node] = node.args[1:] == (0, 2, 3, 1) if node.target == "permute" else channels_last[source]
        if node.op == "output":
            tail = paths[source]
        elif node.target is operator.add and others:
            sums.append([paths[term] for term in node.args])
            paths[node] = ()
        elif node.op == "call_module":
            op = _op(layers[node.target], chw(source), chw(node))
            paths[node] = (*paths[source], op) if op else paths[source]
        elif node.target is operator.mul:
            paths[node] = (*paths[source], Op("× γ", "other", chw(source), chw(node)))
        elif node.target == "permute":
            paths[node] = paths[source]
        else:
            raise TypeError(f"no box for {node.target}")
    if len(sums) > 1:
        raise ValueError(f"a diagram has at most one addition, {type(module).__name__} has {len(sums)}")
    if not sums:
        return (Residual(tail),)
    shortcut, branch = sums[0]
    shared = sum(a is b for a, b in zip(shortcut, branch))  # the boxes in front of the split
    split = Residual(branch[shared:], shortcut[shared:], tail)
    return (Residual(branch[:shared]), split) if shared else (split,)


def road_block(
    slug: str, stage: int = 0, first: bool = False, regime: str = "resnet50"
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The block of a road step in `stage` (0 to 3) and the (C, H, W) it gets at 224 px.

    `first` chooses the stage's first block, which may downsample, else the one that repeats. Where downsampling is
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


def swin_diagram(chans: int = 96, size: int = 56, window: int = 7) -> Diagram:
    """Swin's block (Liu et al., 2021; the paper's Figure 4): window attention, then an MLP, each with its shortcut."""

    def op(label: str, kind: str, before: int, after: int) -> Op:
        return Op(label, kind, (before, size, size), (after, size, size))

    attention = (
        op("LN", "norm", chans, chans),
        op(f"1×1, {chans}→{3 * chans}", "channel", chans, 3 * chans),
        op(f"attention {window}×{window}", "spatial", 3 * chans, chans),
        op(f"1×1, {chans}→{chans}", "channel", chans, chans),
    )
    mlp = (
        op("LN", "norm", chans, chans),
        op(f"1×1, {chans}→{4 * chans}", "channel", chans, 4 * chans),
        op("GELU", "act", 4 * chans, 4 * chans),
        op(f"1×1, {4 * chans}→{chans}", "channel", 4 * chans, chans),
    )
    return (Residual(attention, ()), Residual(mlp, ()))


def draw_steps(*slugs: str, stage: int = 0, first: bool = False, regime: str = "resnet50") -> Figure:
    """The blocks of road steps side by side (see `road_block`); what the step to the left has not gets a red edge."""
    diagrams = {paper.ROADS[regime][slug].label: trace(*road_block(slug, stage, first, regime)) for slug in slugs}
    return _draw(diagrams, mark=True)


def draw_blocks(blocks: Mapping[str, tuple[nn.Module, tuple[int, int, int]] | Diagram]) -> Figure:
    """Diagrams side by side under their titles, each given as (module, its input's (C, H, W)) or as a Diagram.

    A box is as wide as its channels (on a logarithmic scale), a trapezoid where they change; the shape of one image,
    channels × height × width, stands at each arrow; d before a kernel means depthwise.
    """
    return _draw({title: b if isinstance(b[0], Residual) else trace(*b) for title, b in blocks.items()}, mark=False)


def _draw(diagrams: Mapping[str, Diagram], mark: bool) -> Figure:
    boxes = {title: [op for part in diagram for op in _boxes(part)] for title, diagram in diagrams.items()}
    ops = [op for diagram in boxes.values() for op in diagram]
    chans = [shape[0] for op in ops for shape in (op.before, op.after)]
    use_style()
    fig = plt.figure(figsize=(6.0, 1.0), layout="none")
    plt.close(fig)
    ax = fig.add_axes((0, 0, 1, 1))
    pitch = 6.0 / max(len(diagrams), 2)
    lanes = 2 if any(part.shortcut for diagram in diagrams.values() for part in diagram) else 1
    pen = _Pen(ax, pitch, chans, lanes)
    labels = [[op.label for op in diagram] for diagram in boxes.values()]
    edges = [["same"] * len(column) for column in labels]
    for i in range(1, len(labels) if mark else 0):
        edges[i] = ["new" if new else "same" for new in _changed(labels[i - 1], labels[i])]
        if len(labels[i]) < len(labels[i - 1]):
            gone = _changed(labels[i], labels[i - 1])
            edges[i - 1] = ["gone" if out else edge for out, edge in zip(gone, edges[i - 1])]
    bottom = 0.0
    for i, (title, diagram) in enumerate(diagrams.items()):
        center = (i + 0.5) * pitch if len(diagrams) > 1 else 3.0
        bottom = max(bottom, pen.draw(center, title, diagram, edges[i]))
    kinds = [kind for kind in FILLS if any(op.kind == kind for op in ops)]
    handles = [Patch(facecolor=FILLS[kind], edgecolor=INK, linewidth=0.8, label=MEANINGS[kind]) for kind in kinds]
    used = {edge for column in edges for edge in column}
    handles += [Patch(facecolor="white", label=meaning, **EDGES[e]) for e, meaning in MARKS.items() if e in used]
    columns = 3 if len(handles) > 4 else len(handles)
    height = bottom + 0.1 + 0.22 * -(-len(handles) // columns)
    ax.legend(
        handles=handles, loc="lower center", ncols=columns, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2
    )
    ax.set(xlim=(0, 6), ylim=(height, 0))
    ax.axis("off")
    fig.set_size_inches(6.0, height)
    return fig


def _changed(before: Sequence[str], after: Sequence[str]) -> list[bool]:
    """For each box of `after` whether `before` lacks it: place by place, or aligned, whichever finds fewer."""
    aligned = [True] * len(after)
    for match in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        aligned[match.b : match.b + match.size] = [False] * match.size
    if len(before) != len(after):
        return aligned
    return min(aligned, [a != b for a, b in zip(before, after)], key=sum)


def _boxes(part: Residual) -> tuple[Op, ...]:
    return part.branch + (part.shortcut or ()) + part.after


class _Pen:
    """Draws diagrams on axes whose unit is an inch, y downwards; every method returns the y it has reached."""

    def __init__(self, ax: Axes, pitch: float, chans: Sequence[int], lanes: int):
        self.ax, self.lanes = ax, lanes
        self.least, self.most = min(chans), max(chans)
        self.pitch = min(pitch, 2.6) if lanes == 1 else pitch
        self.font = 9 if lanes == 2 else 10 if pitch >= 2 else 7.5

    def half(self, chans: int) -> float:
        """Half the width of a box with this many channels."""
        share = math.log(chans / self.least) / math.log(self.most / self.least) if self.most > self.least else 1.0
        return self.pitch * (0.22 + 0.11 * share if self.lanes == 1 else 0.17 + 0.06 * share)

    def text(self, x: float, y: float, text: str, **style) -> None:
        self.ax.text(x, y, text, **{"fontsize": self.font, "color": INK, "va": "center", "ha": "center"} | style)

    def line(self, *points: tuple[float, float], head: bool = False) -> None:
        *_, before, last = points
        self.ax.plot(*zip(*points), color=INK, linewidth=1.2, solid_capstyle="butt", zorder=2)
        if head:
            style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
            self.ax.annotate("", last, before, arrowprops=style)

    def arrow(self, x: float, y: float, shape: tuple[int, int, int]) -> float:
        self.line((x, y), (x, y + 0.34), head=True)
        self.text(x + 0.07, y + 0.14, "×".join(map(str, shape)), ha="left", fontsize=self.font - 1.5, color="#555555")
        return y + 0.34

    @staticmethod
    def height(op: Op) -> float:
        return 0.23 if op.kind in ("norm", "act") else 0.29 + 0.17 * op.label.count("\n")

    def box(self, x: float, y: float, op: Op, edge: str) -> float:
        height = self.height(op)
        top, bottom = self.half(op.before[0]), self.half(op.after[0])
        corners = [(x - top, y), (x + top, y), (x + bottom, y + height), (x - bottom, y + height)]
        self.ax.add_patch(Polygon(corners, facecolor=FILLS[op.kind], zorder=3 + (edge != "same"), **EDGES[edge]))
        self.text(x, y + height / 2, op.label, fontsize=self.font - (op.kind in ("norm", "act")), zorder=5)
        return y + height

    def chain(self, x: float, y: float, ops: Sequence[Op], edges: Sequence[str]) -> float:
        """Boxes one below the other, an arrow with the shape before each that is neither norm nor activation."""
        for i, (op, edge) in enumerate(zip(ops, edges)):
            if i == 0 or op.kind not in ("norm", "act"):
                y = self.arrow(x, y, op.before)
            y = self.box(x, y, op, edge)
        return y

    def draw(self, center: float, title: str, diagram: Diagram, edges: Sequence[str]) -> float:
        residual = any(part.shortcut is not None for part in diagram)
        x = center + self.pitch * (0.24 if self.lanes == 2 else 0.06 if residual else 0.0)
        side = center - self.pitch * (0.25 if self.lanes == 2 else 0.36)
        self.text(center, 0.15, title, fontweight="bold")
        y, edges = 0.3, list(edges)

        def take(ops: Sequence[Op]) -> list[str]:
            return [edges.pop(0) for _ in ops]

        for part in diagram:
            start = y + 0.06
            y = self.chain(x, y, part.branch, take(part.branch))
            after = (part.branch or part.shortcut)[-1].after
            if part.shortcut is not None:
                y = self.arrow(x, y, after) + 0.09
                self.line((x, start), (side, start), (side, y), (x - 0.09, y), head=True)
                top = (start + y - sum(map(self.height, part.shortcut))) / 2
                for op, edge in zip(part.shortcut, take(part.shortcut)):
                    top = self.box(side, top, op, edge)
                self.ax.add_patch(Circle((x, y), 0.09, facecolor="white", edgecolor=INK, linewidth=1.2))
                self.line((x - 0.05, y), (x + 0.05, y))
                self.line((x, y - 0.05), (x, y + 0.05))
                y += 0.09
            for op, edge in zip(part.after, take(part.after)):
                self.line((x, y), (x, y + 0.1))
                y = self.box(x, y + 0.1, op, edge)
        return self.arrow(x, y, (part.after or part.branch)[-1].after)
