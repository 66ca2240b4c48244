"""The checks behind the book's exercises, and `same`, which holds what a chapter wrote to what the package does.

A check gets the reader's answer, raises an AssertionError that says what is wrong with it, and prints one line when
it is right. `attempt` runs a check in a notebook without stopping it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from convnext_min import blocks
from convnext_min.measure import count_macs, count_parameters
from convnext_min.recipes import Recipe
from convnext_min.roadmap import STEPS, RoadNet, build


def same(mine: nn.Module, reference: nn.Module, input_shape: tuple[int, int, int, int] = (2, 3, 64, 64)) -> None:
    """Assert that two modules compute the same function of a Tensor of shape `input_shape` (N, C, H, W), H = W.

    Works on copies: parameters and buffers of `reference` go into `mine` in their order, whatever they are called, so
    both must define their layers in the same order. What starts as a constant (norms, biases, layer scale, running
    statistics) is drawn at random first: otherwise a layer scale of 1e-6 would hide whatever its branch computes.
    Outputs are compared in training and in evaluation mode, then the multiply-accumulates. Raises AssertionError
    naming the first tensor whose shape differs, or the largest difference of the outputs.
    """
    if not isinstance(mine, nn.Module):
        raise AssertionError(f"a module is compared, got {type(mine).__name__}")
    mine, reference = copy.deepcopy(mine), copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = list(mine.state_dict().items()), list(reference.state_dict().items())
    for (name, value), (right_name, right) in zip(ours, theirs):
        if value.shape != right.shape:
            raise AssertionError(f"{name} has shape {tuple(value.shape)}; {right_name} has {tuple(right.shape)}")
        if right.is_floating_point() and (right == right.flatten()[0]).all():
            right.copy_(torch.empty(right.shape).uniform_(0.5, 1.5, generator=generator))
        value.copy_(right)
    if len(ours) != len(theirs):
        longer, which = (
            (ours, "missing from the reference") if len(ours) > len(theirs) else (theirs, "missing from yours")
        )
        name, value = longer[min(len(ours), len(theirs))]
        raise AssertionError(f"{name} of shape {tuple(value.shape)} is {which}")
    x = torch.randn(input_shape, generator=generator)
    worst = 0.0
    for training in (True, False):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            got = mine.train(training)(x.clone())
            torch.manual_seed(0)
            right = reference.train(training)(x.clone())
        if got.shape != right.shape:
            raise AssertionError(f"the output has shape {tuple(got.shape)}; it should be {tuple(right.shape)}")
        difference = (got - right).abs().max().item()
        if not difference <= 1e-4 * right.abs().max().item():
            mode = "training" if training else "evaluation"
            raise AssertionError(f"in {mode} mode the outputs differ by up to {difference:.3g}")
        worst = max(worst, difference)
    _, chans, size, _ = input_shape
    macs, right_macs = count_macs(mine, size, chans), count_macs(reference, size, chans)
    if macs != right_macs:
        raise AssertionError(f"{macs:,} multiply-accumulates; the reference needs {right_macs:,}")
    print(f"same: {count_parameters(mine):,} parameters, {macs:,} MACs, outputs differ by at most {worst:.1e}")


def attempt(check: Callable[..., None], *answers) -> None:
    """Run an exercise's check and print what it says, without raising: the notebook runs on."""
    try:
        check(*answers)
    except Exception as error:
        print(f"not solved yet: {error or type(error).__name__}")


def expect(value, right, what: str, tolerance: float = 0.0, reveal: bool = True) -> None:
    """Assert that `value` equals `right`: numbers and tensors within the relative `tolerance`, all else exactly.

    `what` names the value in the message; `reveal=False` keeps the right value out of it.
    """
    if value is None:
        raise AssertionError(f"{what}: no answer yet")
    if isinstance(right, Tensor):
        if not isinstance(value, Tensor) or value.shape != right.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise AssertionError(f"{what}: got {got}, should be a tensor of shape {tuple(right.shape)}")
        difference = (value - right).abs().max().item()
        if not difference <= tolerance * right.abs().max().item():
            raise AssertionError(f"{what}: differs by up to {difference:.3g}")
    else:
        number = isinstance(right, float) and isinstance(value, (int, float))
        if not (math.isclose(value, right, rel_tol=tolerance) if number else value == right):
            raise AssertionError(f"{what}: got {value}, " + (f"should be {right}" if reveal else "which is not right"))


def solved(message: str) -> None:
    """Print the line that ends every exercise's check."""
    print(f"correct: {message}")


# 01 ResNet-50 and the recipe


def check_bottleneck_macs(answer) -> None:
    """Exercise 1.1: MACs of a bottleneck, held to PyTorch's counter."""
    for width, size in ((64, 56), (80, 20), (512, 7)):
        right = count_macs(blocks.Bottleneck(4 * width, width), size, 4 * width)
        expect(answer(width, size), right, f"bottleneck_macs({width}, {size})", reveal=False)
    solved("17 multiplications for each pair of inner channels and each pixel")


def check_projection_share(answer) -> None:
    """Exercise 1.2: the fraction of ResNet-50's MACs in its four projection shortcuts at 224 px."""
    with torch.device("meta"):
        model = build("resnet50")
    convs = [stage[0].shortcut[0] for stage in model.stages]
    macs = sum(conv.in_channels * conv.out_channels * (56 // 2**i) ** 2 for i, conv in enumerate(convs))
    expect(answer, macs / count_macs(model), "projection_share()", 1e-3, reveal=False)
    solved(f"{answer:.1%} of the MACs only bring inputs to the shape of outputs")


def check_learning_rate(answer) -> None:
    """Exercise 1.3: linear warm-up and half a cosine, held to the trainer's schedule."""
    paper = {"epochs": 300, "warmup": 20, "peak": 4e-3, "end": 1e-6}
    for setting in (paper, {"epochs": 90, "warmup": 5, "peak": 1e-3, "end": 1e-5}):
        epochs, peak = setting["epochs"], setting["peak"]
        recipe = Recipe(epochs, warmup=setting["warmup"] / epochs, base_lr=peak, min_lr=setting["end"])
        for epoch in (0, 2.5, setting["warmup"], 40, epochs // 2, epochs):
            right = recipe.lr_at(epoch / epochs)
            expect(answer(epoch, **setting), right, f"learning_rate({epoch}, **{setting})", 1e-6)
    solved("the trainer's schedule")


def check_drop_path_rates(answer) -> None:
    """Exercise 1.4: stochastic depth grows over all blocks, held to the rates of a built network."""
    for depths, rate in (((3, 3, 9, 3), 0.1), ((2, 2, 6, 2), 0.4)):
        built = RoadNet(replace(STEPS["resnet50"], depths=depths, width=4), drop_path_rate=rate)
        rates = answer(depths, rate)
        expect([len(stage) for stage in rates], list(depths), f"blocks in the stages of depths {depths}")
        for i, (stage, right) in enumerate(zip(rates, built.stages)):
            right = torch.tensor([block.drop_path.rate for block in right])
            expect(torch.tensor(stage), right, f"rates of stage {i + 1}, depths {depths}", 1e-4)
    solved("from 0 at the first block of the network to the full rate at its last")


# 02 Macro design


def check_network_macs(answer) -> None:
    """Exercise 2.1: MACs of a ResNet of any depths from measured parts, held to PyTorch's counter."""
    for depths in ((3, 4, 6, 3), (3, 3, 9, 3), (2, 2, 2, 2), (1, 8, 5, 1)):
        with torch.device("meta"):
            right = count_macs(RoadNet(replace(STEPS["resnet50"], depths=depths)))
        expect(answer(depths), right, f"network_macs({depths})", reveal=False)
    solved("every further block costs the same, in whatever stage it is")


def check_patchify_linear(answer) -> None:
    """Exercise 2.2: the patchify stem without a convolution."""
    generator = torch.Generator().manual_seed(0)
    images, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 16, 24), (5, 3, 4, 4), (5,)))
    right = nn.functional.conv2d(images, weight, bias, stride=4)
    expect(answer(images, weight, bias), right, "patchify_linear(images, weight, bias)", 1e-4)
    solved("patches do not overlap, so cutting and one matrix product are enough")


def check_shift_error(answer) -> None:
    """Exercise 2.3: how much of a stem's output changes, beyond moving, when the image moves."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    for slug in ("resnet50", "patchify"):
        stem = build(slug, width_multiplier=0.25).stem.eval()
        for shift in (1, 2, 4):
            with torch.no_grad():
                before, after = stem(images).roll(shift // 4, -1), stem(images.roll(shift, -1))
            right = ((after - before).abs().mean() / before.abs().mean()).item()
            value = answer(stem, images, shift)
            if not isinstance(value, (int, float)) or not math.isclose(value, right, rel_tol=1e-3, abs_tol=1e-6):
                raise AssertionError(f"shift_error of the {slug} stem at {shift} px: got {value}, which is not right")
    solved("a patchify stem follows a shift exactly if it is a whole patch, and only then")
