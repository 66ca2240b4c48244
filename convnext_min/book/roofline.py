"""The roofline of a machine: how fast its memory and its arithmetic let layers be, and how fast they are."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

from convnext_min.book.style import BLUE, GREEN, GREY, ORANGE, RED, figure


def fastest(call: Callable, *inputs: Tensor, seconds: float) -> float:
    """Return the seconds of the fastest of many calls, repeated for `seconds` after a first one.

    Other work on the machine can only slow a call down, so the fastest is the least disturbed.
    """
    call(*inputs)
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call(*inputs)
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def machine_limits(seconds: float, edge: int) -> tuple[float, float]:
    """Return the highest rates of this machine that we find: MACs per second, and bytes per second read and written.

    MACs are measured on a matrix product with `edge` rows and columns and on a dense 3×3 convolution, of which the
    faster counts; bytes on a copy that is larger than the caches. Each is timed for `seconds`.
    """
    a, b = torch.randn(2, edge, edge)
    chans = edge // 2
    conv, x = nn.Conv2d(chans, chans, 3, padding=1, bias=False), torch.randn(4, chans, 14, 14)
    product = edge**3 / fastest(torch.mm, a, b, seconds=seconds)
    convolution = conv.weight.numel() * 4 * 14**2 / fastest(conv, x, seconds=seconds)
    source, target = torch.randn(2, 32 * edge**2)
    return max(product, convolution), 2 * source.nbytes / fastest(target.copy_, source, seconds=seconds)


class LayerSpeed(NamedTuple):
    """A layer under the roof: its kind, its channels, MACs per byte moved, and MACs per second."""

    name: str
    chans: int
    intensity: float
    speed: float


def draw(layers: Sequence[LayerSpeed], peak: float, bandwidth: float) -> Figure:
    """Draw the speed of layers over their arithmetic intensity, below the roof min(peak, intensity * bandwidth).

    `peak` is in MACs per second, `bandwidth` in bytes per second. The number beside a layer is its channels.
    """
    fig, ax = figure(3.6)
    grid = torch.logspace(-1, 8, 100, base=2)
    ax.plot(grid, torch.clamp(grid * bandwidth, max=peak) / 1e9, color=GREY, label="roof")
    names = dict.fromkeys(layer.name for layer in layers)
    for name, marker, color in zip(names, "o^sD", (ORANGE, GREEN, RED, BLUE)):
        same = [layer for layer in layers if layer.name == name]
        ax.plot(
            [layer.intensity for layer in same],
            [layer.speed / 1e9 for layer in same],
            marker,
            color=color,
            markersize=8,
            label=name,
        )
    for layer in layers:
        point = (layer.intensity, layer.speed / 1e9)
        ax.annotate(layer.chans, point, (0, -14), textcoords="offset points", ha="center", fontsize=9)
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("log", base=2)
        axis.set_major_locator(LogLocator(base=2, numticks=12))
        axis.set_major_formatter("{x:g}")
    ax.set(xlabel="MACs per byte", ylabel="billion MACs per second, forward")
    ax.set_ylim(bottom=0.6 * ax.get_ylim()[0])  # room for the numbers
    ax.legend()
    return fig
