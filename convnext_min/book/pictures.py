"""Pictures of what an output value is made of: convolutions as cubes, windows of attention, weights over an image."""

from collections.abc import Collection, Sequence
from itertools import product

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from torch import Tensor, nn

from convnext_min.book.style import INK, ORANGE, RED, use_style

FONT = 11.5  # readable on a phone, where a figure of 6 inches is about 350 pixels wide
PALE = "#eef2f5"
PASTELS = ("#f6cf83", "#9cc9e6", "#a9d9c3", "#e8c3d8", "#e6e6e6", "#f3b79b", "#c9bfe6", "#d7dd9a", "#bfd7d9")


def read_by(layer: nn.Module, chans: int, size: int, channel: int, row: int, column: int) -> Tensor:
    """Return which inputs (chans, size, size) the output value (channel, row, column) of a layer depends on: bool."""
    x = torch.rand(1, chans, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer(x)[0, channel, row, column].backward()
    return x.grad[0] != 0


# Convolutions as cubes


def draw_convolutions(chans: int = 4, size: int = 5) -> Figure:
    """Draw which input values one output value of a dense, grouped, depthwise and pointwise convolution reads.

    Each slab is a channel of size x size pixels. The values are found by gradients of real layers.
    """
    layers = {
        "dense 3×3": nn.Conv2d(chans, chans, 3, padding=1),
        "grouped 3×3, 2 groups": nn.Conv2d(chans, chans, 3, padding=1, groups=2),
        "depthwise 3×3": nn.Conv2d(chans, chans, 3, padding=1, groups=chans),
        "pointwise 1×1": nn.Conv2d(chans, chans, 1),
    }
    use_style()
    fig, axes = plt.subplots(2, 2, figsize=(6.0, 5.6))
    plt.close(fig)
    middle = size // 2
    for ax, (title, layer) in zip(axes.flat, layers.items()):
        read = read_by(layer, chans, size, 1, middle, middle)
        written = torch.zeros_like(read)
        written[1, middle, middle] = True
        width = _stack(ax, 0.0, read, ORANGE)
        _stack(ax, 1.35 * width, written, RED)
        ax.annotate("", (0.8 * width, 0.0), (0.55 * width, 0.0), arrowprops={"arrowstyle": "-|>", "color": INK})
        ax.set_title(title, fontsize=FONT)
        values, weights = int(read.sum()), layer.weight[0].numel()
        if values != weights:
            raise AssertionError(f"{title}: the output reads {values} values with {weights} weights")
        ax.set_xlabel(f"1 output from {values} inputs", fontsize=FONT)
        ax.set(aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return fig


def _stack(ax: Axes, x: float, marked: Tensor, color: str) -> float:
    """Draw channels (C, H, W) as slabs of cubes around (x, 0), the `marked` ones in `color`; return the width."""
    chans, rows, columns = marked.shape
    distance = 0.36 * (rows + columns)
    for k in range(chans):
        _slab(ax, x, distance * ((chans - 1) / 2 - k), marked[k], color)
    return 0.87 * (rows + columns)


def _slab(ax: Axes, x: float, y: float, marked: Tensor, color: str) -> None:
    rows, columns = marked.shape
    thickness = 0.45

    def corner(i: float, j: float, depth: float = 0.0) -> tuple[float, float]:
        return x + 0.87 * (j - i + (rows - columns) / 2), y + 0.3 * ((rows + columns) / 2 - i - j) - depth

    def face(*corners: tuple[float, float], fill: str) -> None:
        ax.add_patch(Polygon(corners, facecolor=fill, edgecolor=INK, linewidth=0.5, joinstyle="round"))

    def ribbon(*edge: tuple[float, float], fill: str) -> None:
        (a, b), (c, d) = edge
        face(corner(a, b), corner(c, d), corner(c, d, thickness), corner(a, b, thickness), fill=fill)

    face(corner(0, 0), corner(0, columns), corner(rows, columns), corner(rows, 0), fill=PALE)
    for i, j in product(range(rows), range(columns)):
        if marked[i, j]:
            face(corner(i, j), corner(i, j + 1), corner(i + 1, j + 1), corner(i + 1, j), fill=color)
    ribbon((rows, 0), (rows, columns), fill="#cfd6db")
    ribbon((0, columns), (rows, columns), fill="#b9c1c7")
    gap = (float("nan"), float("nan"))
    lines = [p for i in range(1, rows) for p in (corner(i, 0), corner(i, columns), corner(i, columns, thickness), gap)]
    lines += [p for j in range(1, columns) for p in (corner(0, j), corner(rows, j), corner(rows, j, thickness), gap)]
    ax.plot(*zip(*lines), color=INK, linewidth=0.4)


# Windows


def draw_reach(window: int = 7) -> Figure:
    """Draw the pixels that two outputs of window attention and of a depthwise convolution see, darker for more weight.

    The weights are invented: attention has different ones for each output, the convolution one kernel for all.
    """
    size, outputs = 2 * window, ((3, 5), (10, 8))
    generator = torch.Generator().manual_seed(3)
    use_style()
    fig, axes = plt.subplots(1, 2, figsize=(6.0, 4.2))
    plt.close(fig)
    kernel = _blurred(generator, window)
    seen = {"Window attention": torch.zeros(size, size), f"{window}×{window} depthwise conv": torch.zeros(size, size)}
    attention, convolution = seen.values()
    for row, column in outputs:
        top, left = row // window * window, column // window * window
        attention[top : top + window, left : left + window] = _blurred(generator, window)
        top, left = row - window // 2, column - window // 2
        convolution[top : top + window, left : left + window] = kernel
    texts = (
        ("the pixels of its window", "weights from the image", "one set for each head"),
        ("the pixels around it", "weights learned and fixed", "one kernel for each channel"),
    )
    for ax, (title, weights), lines in zip(axes, seen.items(), texts):
        ax.pcolormesh(weights, cmap="Blues", vmax=1.25, edgecolor="#c9d1d6", linewidth=0.5)
        for row, column in outputs:
            ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=RED, linewidth=2.5, zorder=4))
        _grid_axes(ax, size, title)
        ax.set_xlabel("\n".join(lines), fontsize=FONT, linespacing=1.5, labelpad=8)
    for edge in range(0, size + 1, window):
        axes[0].plot((edge, edge), (0, size), color=INK, linewidth=2)
        axes[0].plot((0, size), (edge, edge), color=INK, linewidth=2)
    return fig


def _blurred(generator: torch.Generator, window: int) -> Tensor:
    """Return weights (window, window) from 0.15 to 1 that change from place to place, but not wildly."""
    noise = torch.rand(1, 1, window + 2, window + 2, generator=generator)
    smooth = nn.functional.avg_pool2d(noise, 3, 1)[0, 0]
    return 0.15 + 0.85 * (smooth - smooth.min()) / (smooth.max() - smooth.min())


def regions(size: int, window: int, shift: int) -> Tensor:
    """Return for each pixel (size, size) the number of the shifted window that it lies in, row by row."""
    index = (torch.arange(size) - shift).div(window, rounding_mode="floor")
    _, index = index.unique(return_inverse=True)
    return index[:, None] * (int(index.max()) + 1) + index


def draw_shift(size: int = 8, window: int = 4, shift: int = 2) -> Figure:
    """Draw windows, windows that are shifted, and the shifted ones after the roll that makes them whole again.

    The windows have numbers. The parts that the shift makes have letters and colours, the same before and after the
    roll.
    """
    parts, letters = regions(size, window, shift), "ABCDEFGHI"
    whole, cut = range(0, size + 1, window), (0, *range(shift, size, window), size)
    panels = (
        ("windows", regions(size, window, 0), "1234", (PALE,), whole),
        (f"shifted by {shift}", parts, letters, PASTELS, cut),
        ("rolled", parts.roll((-shift, -shift), (0, 1)), letters, PASTELS, whole),
    )
    use_style()
    fig, axes = plt.subplots(1, 3, figsize=(6.0, 2.5))
    plt.close(fig)
    for ax, (title, numbers, names, fills, borders) in zip(axes, panels):
        for row, column in product(range(size), repeat=2):
            color = fills[int(numbers[row, column]) % len(fills)]
            ax.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
        for number in numbers.unique().tolist():
            rows, columns = (numbers == number).nonzero().T
            center = columns.double().mean() + 0.5, rows.double().mean() + 0.5
            ax.text(*center, names[number], fontsize=FONT, ha="center", va="center")
        for border in borders:
            ax.plot((border, border), (0, size), color=INK, linewidth=2)
            ax.plot((0, size), (border, border), color=INK, linewidth=2)
        _grid_axes(ax, size, title)
    return fig


def _grid_axes(ax: Axes, size: int, title: str) -> None:
    ax.set_title(title, fontsize=FONT)
    ax.set(aspect="equal", xlim=(-0.1, size + 0.1), ylim=(size + 0.1, -0.1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# Weights of attention over an image


def draw_attention(image: Tensor, weights: Tensor, queries: Collection[Sequence[int]]) -> Figure:
    """Draw an image (H, W, 3) with a mark at each of `queries` (row, column), and beside it the weights of each query.

    `weights` (H * W, H * W) has a row per query pixel. Darker is more.
    """
    height, width, _ = image.shape
    use_style()
    fig, axes = plt.subplots(1, 1 + len(queries), figsize=(6.0, 2.4))
    plt.close(fig)
    axes[0].imshow(image.numpy())
    axes[0].set_title("image", fontsize=FONT)
    for number, (ax, (row, column)) in enumerate(zip(axes[1:], queries), start=1):
        ax.imshow(weights[row * width + column].view(height, width).numpy(), cmap="Blues", vmin=0)
        ax.set_title(f"weights of query {number}", fontsize=FONT)
        for panel in (axes[0], ax):
            badge = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": INK}
            panel.text(column, row, number, fontsize=9, ha="center", va="center", color=INK, bbox=badge)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return fig
