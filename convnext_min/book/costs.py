"""Tables and figures of what layers cost: MACs and weights, time, and the tensors that training keeps."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from convnext_min.book.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, Table, figure, table
from convnext_min.fast import accelerate
from convnext_min.measure import count_macs, layer_costs
from convnext_min.roadmap import STEPS, build

CONVOLUTIONS = {"1×1": BLUE, "shortcut 1×1": GREEN, "depthwise": RED}  # of the stages, with their colours
REST = "stem, classifier"
KINDS = {  # all of them, in the order of a bar
    "1×1": BLUE,
    "dense 3×3": ORANGE,
    "depthwise": RED,
    "shortcut 1×1": GREEN,
    "norm": PURPLE,
    "activation": "#f0e442",
    REST: GREY,
}


class Cost(NamedTuple):
    """MACs of one image, number of weights, and seconds of a batch."""

    macs: int
    weights: int
    seconds: float


def _kind(name: str, layer: nn.Module) -> str:
    """Return the kind of a layer, given its name in a RoadNet."""
    if not name.startswith("stages."):
        return REST
    if isinstance(layer, nn.Conv2d):
        if "shortcut" in name:
            return "shortcut 1×1"
        if layer.kernel_size == (1, 1):
            return "1×1"
        return "depthwise" if layer.groups == layer.in_channels else "dense 3×3"
    return "norm" if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm)) else "activation"


def costs_by_kind(model: nn.Module, **measured) -> dict[tuple[int | None, str], Cost]:
    """Sum the costs of the layers of a RoadNet by (stage, kind); the stage of stem and classifier is None.

    `measured` are the arguments of `measure.layer_costs`. On the meta device the seconds mean nothing.
    """
    sums: dict[tuple[int | None, str], Cost] = {}
    for name, layer, macs, seconds in layer_costs(model, **measured):
        kind = _kind(name, layer)
        key = None if kind == REST else int(name.split(".")[1]), kind
        weights = sum(parameter.numel() for parameter in layer.parameters())
        sums[key] = Cost(*map(sum, zip(sums.get(key, (0, 0, 0.0)), (macs, weights, seconds))))
    return sums


def _counted(slug: str) -> dict[tuple[int | None, str], Cost]:
    with torch.device("meta"):
        return costs_by_kind(build(slug), repeats=1)


def compare_by_kind(before: str, after: str) -> Table:
    """Compare the MACs of one 224 px image and the weights of two road steps, by kind of layer."""
    costs = [_counted(slug) for slug in (before, after)]

    def millions(kind: str, unit: str) -> list[float]:
        return [sum(getattr(cost, unit) for (_, of), cost in c.items() if kind in (of, "all")) / 1e6 for c in costs]

    rows = []
    for kind in (*CONVOLUTIONS, "norm", REST, "all"):
        (old, new), (old_weights, new_weights) = millions(kind, "macs"), millions(kind, "weights")
        macs = f"{old:,.0f} → {new:,.0f} ({new - old:+,.0f})" if old else "not counted"
        weights = f"{old_weights:.2f} → {new_weights:.2f} ({new_weights - old_weights:+.2f})"
        rows.append((kind, macs, weights))
    return table((f"layers, {before} → {after}", "MACs (millions)", "weights (millions)"), rows)


def draw_by_kind(before: str, after: str) -> Figure:
    """Draw the MACs of two road steps as stacked bars, by stage and kind of convolution: `after` is hatched."""
    fig, ax = figure(3.4)
    for offset, slug, hatch in ((-0.2, before, None), (0.2, after, "//")):
        costs, bottom = _counted(slug), [0.0] * 4
        for kind, color in CONVOLUTIONS.items():
            values = [costs[stage, kind].macs / 1e9 if (stage, kind) in costs else 0.0 for stage in range(4)]
            places = [stage + offset for stage in range(4)]
            ax.bar(places, values, 0.36, bottom, color=color, hatch=hatch, edgecolor="white", linewidth=0)
            bottom = [a + b for a, b in zip(bottom, values)]
    ax.set_xticks(range(4), [f"stage {stage + 1}" for stage in range(4)])
    ax.set_ylabel("GMACs at 224 px")
    handles = [Patch(color=color, label=kind) for kind, color in CONVOLUTIONS.items()]
    bars = {"facecolor": GREY, "edgecolor": "white", "linewidth": 0}
    handles += [Patch(label=f"before: {before}", **bars), Patch(label=f"after: {after}", hatch="//", **bars)]
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    return fig


def time_by_kind(models: Mapping[str, nn.Module], **speed) -> Table:
    """Time the forward passes of two RoadNets by kind of layer; `speed` are arguments of `measure.layer_costs`."""
    costs = [costs_by_kind(model, **speed) for model in models.values()]
    rows = []
    for kind in (*CONVOLUTIONS, "norm", "activation"):
        seconds = [sum(cost.seconds for (_, of), cost in sums.items() if of == kind) for sums in costs]
        ms = [1e3 * value / speed["batch_size"] for value in seconds]
        rows.append((kind, *(f"{value:.1f}" for value in ms), f"{ms[1] - ms[0]:+.1f}"))
    return table(("layers of the stages, forward", *(f"{name} (ms per image)" for name in models), "change"), rows)


def total(costs: Mapping[tuple[int | None, str], Cost], *kinds: str) -> Cost:
    """Sum the costs of all stages, of the given kinds or, without kinds, of all."""
    chosen = [cost for (_, kind), cost in costs.items() if kind in (kinds or KINDS)]
    return Cost(*map(sum, zip(Cost(0, 0, 0.0), *chosen)))


def draw_macs_and_time(networks: Mapping[str, Mapping], resolution: int, batch_size: int) -> Figure:
    """Draw one bar per network, stacked by kind of layer: MACs at `resolution` px, and forward time per image.

    `networks` are {title: costs_by_kind(model, ...)}. The share of depthwise convolutions stands at the end of the bar:
    in MACs it is too thin to see.
    """
    fig, axes = figure(3.2, 2, sharey=True)
    for ax, field, unit in zip(axes, ("macs", "seconds"), (1e-9, 1e3 / batch_size)):
        left = [0.0] * len(networks)
        for kind, color in KINDS.items():
            values = [unit * getattr(total(costs, kind), field) for costs in networks.values()]
            ax.barh(list(networks), values, left=left, height=0.6, color=color, label=kind)
            left = [a + b for a, b in zip(left, values)]
        for y, costs in enumerate(networks.values()):
            if share := getattr(total(costs, "depthwise"), field) / getattr(total(costs), field):
                place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
                ax.annotate(f"depthwise\n{share:.1%}", (left[y], y), **place)
        ax.set_xlim(0, 1.35 * max(left))
    axes[0].set_xlabel(f"GMACs at {resolution} px")
    axes[1].set_xlabel("forward, ms per image")
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def kept_tensors(block: nn.Module, chans: int, size: int) -> Counter[int]:
    """Count the tensors that autograd keeps for one (chans, size, size) input of a block, by their channels.

    The input itself is left out: it is the output of the block before, which keeps it.
    """
    x = torch.zeros(1, chans, size, size, requires_grad=True) * 1
    known = {tensor.data_ptr() for tensor in (x, *block.parameters(), *block.buffers())}
    found = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.data_ptr() not in known:
            found[tensor.data_ptr()] = tensor.shape[1]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x)  # keeps what it saved alive while it is counted
    del out
    return Counter(found.values())


def milliseconds(layer: nn.Module, x: Tensor, repeats: int, training: bool = False) -> float:
    """Time a forward pass per image of x, with `training` a forward and a backward pass: median of `repeats`."""
    x = x.clone().requires_grad_(training)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            out = layer(x)
        if training:
            out.backward(out.detach())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:]) / len(x)  # the first is a warm-up


def time_layers(layers: Mapping[str, nn.Module], size: int, repeats: int) -> Table:
    """Time the forward pass of convolutions and BatchNorms, each by itself on feature maps of size x size."""
    rows = []
    for name, layer in layers.items():
        chans = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.num_features
        macs = count_macs(layer, size, chans)
        ms = milliseconds(layer.train(), torch.randn(4, chans, size, size), repeats)
        rows.append((name, f"{macs / 1e6:.1f}", f"{ms:.2f}", f"{macs / ms / 1e6:.0f}" if macs else "–"))
    return table((f"layer, at {size}×{size}", "MACs (millions)", "ms per image", "GMACs per second"), rows)


def depthwise_costs(kernel_sizes: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Measure all depthwise convolutions of the step "kernel 7", by kernel size: GMACs, and ms per image of 224 px.

    One convolution per stage is timed and multiplied by the stage's blocks: the forward pass, PyTorch's backward pass,
    and the backward pass of `convnext_min.fast`.
    """
    design = STEPS["kernel7"]
    costs: dict[str, list[float]] = {"MACs": [], "forward": [], "backward": [], "fast backward": []}
    for kernel_size in kernel_sizes:
        total = dict.fromkeys(costs, 0.0)
        for stage, depth in enumerate(design.depths):
            chans, size = design.width * 2**stage, 56 // 2**stage
            dwconv = nn.Conv2d(chans, chans, kernel_size, padding=kernel_size // 2, groups=chans, bias=False)
            x = torch.randn(4, chans, size, size)
            forward, both = milliseconds(dwconv, x, repeats), milliseconds(dwconv, x, repeats, training=True)
            fast = milliseconds(accelerate(dwconv), x, repeats, training=True)
            total["MACs"] += depth * count_macs(dwconv, size, chans) / 1e9
            total["forward"] += depth * forward
            total["backward"] += depth * (both - forward)
            total["fast backward"] += depth * (fast - forward)
        for name, value in total.items():
            costs[name].append(value)
    return costs


def draw_depthwise(kernel_sizes: Sequence[int], costs: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the result of `depthwise_costs` over the kernel size: MACs, and times on a logarithmic axis."""
    fig, (left, right) = figure(3.2, 2)
    left.plot(kernel_sizes, costs["MACs"], "o-", color=INK)
    left.set(xlabel="kernel size", ylabel="GMACs", ylim=(0, None), title="counted", xticks=kernel_sizes)
    lines = {"forward": ("o-", BLUE), "backward": ("s-", ORANGE), "fast backward": ("^-", GREEN)}
    for name, (line, color) in lines.items():
        right.plot(kernel_sizes, costs[name], line, color=color, label=name)
    right.set(xlabel="kernel size", ylabel="ms per image", yscale="log", title="timed", xticks=kernel_sizes)
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return fig


def stage_shapes(model: nn.Module, stages: Sequence[nn.Module], channels_last: bool = False) -> list[tuple[int, ...]]:
    """Return (C, H, W) after each of `stages` of `model` for one image of 224 px.

    `channels_last` is for stages whose output is (N, H, W, C).
    """
    shapes = []

    def note(stage: nn.Module, args: tuple, out: Tensor) -> None:
        shapes.append(tuple((out.permute(0, 3, 1, 2) if channels_last else out).shape[1:]))

    hooks = [stage.register_forward_hook(note) for stage in stages]
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    return shapes
