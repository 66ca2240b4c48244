"""Measure the cost of a network: multiply-accumulates, parameters, activation memory, throughput.

`python -m convnext_min.measure convnext_tiny` prints the parameters and multiply-accumulates of a network, and `--road`
prints the whole road next to the paper's Tables 10 and 11.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from convnext_min import paper, weights
from convnext_min.roadmap import REGIMES, build


def count_macs(model: nn.Module, resolution: int = 224, in_chans: int = 3) -> int:
    """Return the multiply-accumulates of convolutions and matrix products for one image of resolution x resolution.

    The paper calls them FLOPs. Norms, activations and pooling are not counted. Nothing is computed: PyTorch's counter
    (2 FLOPs per MAC) follows the shapes on the meta device.
    """
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    image = torch.empty(1, in_chans, resolution, resolution, device="meta")
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model.eval(), state, (image,))
    model.train(training)
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """Return the number of learned values; running statistics are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def activation_memory(model: nn.Module, resolution: int = 224, batch_size: int = 1) -> int:
    """Return the bytes of activations that autograd keeps for the backward pass, parameters excluded.

    The forward pass updates copies of the running statistics, so `model` stays as it is.
    """
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *buffers.values())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        images = torch.zeros(batch_size, 3, resolution, resolution, device=device)
        loss = functional_call(model, buffers, (images,)).sum()
    del loss
    return sum(kept.values())


class LayerCost(NamedTuple):
    """The cost of one layer in a forward pass: its name in the model, MACs per image, seconds per batch."""

    name: str
    layer: nn.Module
    macs: int
    seconds: float


def layer_costs(
    model: nn.Module, resolution: int = 224, batch_size: int = 8, in_chans: int = 3, repeats: int = 3
) -> list[LayerCost]:
    """Return MACs and seconds of every layer without sublayers, in the model's order, in evaluation mode on a CPU.

    The seconds are the fastest of `repeats` passes after a warm-up pass. Operations between layers, such as the
    addition of a shortcut, are not included. On the meta device only the MACs are meaningful.
    """
    layers = {layer: name for name, layer in model.named_modules() if not list(layer.children())}
    macs, passes, started = Counter(), [], {}
    counter = FlopCounterMode(display=False)  # on during the first pass only: it takes time

    def start(layer, inputs):
        started[layer] = time.perf_counter(), counter.get_total_flops()

    def stop(layer, inputs, output):
        since, flops = started[layer]
        passes[-1][layer] += time.perf_counter() - since
        macs[layer] += (counter.get_total_flops() - flops) // 2

    hooks = [
        hook for layer in layers for hook in (layer.register_forward_pre_hook(start), layer.register_forward_hook(stop))
    ]
    images = torch.randn(batch_size, in_chans, resolution, resolution, device=next(model.parameters()).device)
    training = model.training
    model.eval()
    with torch.no_grad():
        for i in range(1 + repeats):
            passes.append(Counter())
            with counter if i == 0 else contextlib.nullcontext():
                model(images)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return [
        LayerCost(name, layer, macs[layer] // batch_size, min(one[layer] for one in passes[1:]))
        for layer, name in layers.items()
    ]


class Throughput(NamedTuple):
    """Images per second over several timings: median, slowest and fastest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} img/s ({self.low:.1f}-{self.high:.1f})"


def throughput(
    model: nn.Module, resolution: int = 224, batch_size: int = 8, training: bool = False, repeats: int = 5
) -> Throughput:
    """Return images per second of the forward pass, with `training` of forward and backward, on the model's device.

    After a warm-up pass, `repeats` passes are timed separately. With `training`, running statistics are updated and all
    gradients of `model` are cleared.
    """
    device = next(model.parameters()).device
    accelerator = torch.accelerator.current_accelerator()  # None if PyTorch was built without
    images = torch.randn(batch_size, 3, resolution, resolution, device=device)
    was_training = model.training
    model.train(training)

    def step() -> None:
        if training:
            model(images).float().logsumexp(-1).sum().backward()
            model.zero_grad()
        else:
            with torch.inference_mode():
                model(images)
        if accelerator is not None and device.type == accelerator.type:
            torch.accelerator.synchronize(device)

    step()
    speeds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        speeds.append(batch_size / (time.perf_counter() - start))
    model.train(was_training)
    return Throughput(statistics.median(speeds), min(speeds), max(speeds))


@functools.cache
def road_table(regime: str = "resnet50") -> list[dict]:
    """Return a row per step: slug, label, our GMACs, the paper's, their difference, parameters, the paper's top-1."""
    rows = []
    for slug, published in paper.ROADS[regime].items():
        with torch.device("meta"):
            model = build(slug, regime)
        gmacs = count_macs(model) / 1e9
        rows.append(
            {
                "slug": slug,
                "label": published.label,
                "gmacs": gmacs,
                "paper_gmacs": published.gmacs,
                "difference": round(gmacs, 2) - published.gmacs,
                "params": count_parameters(model),
                "paper_top1": published.top1,
            }
        )
    return rows


def print_road(regime: str) -> None:
    """Print `road_table` as text."""
    print(f"\n{regime} regime, one 224x224 image, convolutions and linear layers")
    print(f"{'step':<12} {'':<28} {'GMACs':>7} {'paper':>6} {'diff':>6} {'params M':>9} {'paper top-1':>12}")
    for row in road_table(regime):
        print(
            f"{row['slug']:<12} {row['label']:<28} {row['gmacs']:>7.3f} {row['paper_gmacs']:>6.2f} "
            f"{row['difference']:>+6.2f} {row['params'] / 1e6:>9.2f} {row['paper_top1']:>12.2f}"
        )


def print_costs(name: str) -> None:
    """Print the parameters and the multiply-accumulates of one of `weights.VARIANTS`."""
    try:
        with torch.device("meta"):
            model = weights.create(name)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{name}: {count_parameters(model):,} parameters, {count_macs(model) / 1e9:.3f} GMACs for one 224x224 image")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.measure", description=__doc__)
    parser.add_argument("model", nargs="?", help="convnext_<variant> or convnext_isotropic_<variant>")
    parser.add_argument("--road", action="store_true", help="print the cost of each step in both regimes")
    args = parser.parse_args(argv)
    if not (args.model or args.road):
        parser.error("give the name of a model, such as convnext_tiny, or --road")
    if args.model:
        print_costs(args.model)
    for regime in REGIMES if args.road else ():
        print_road(regime)


if __name__ == "__main__":
    main()
