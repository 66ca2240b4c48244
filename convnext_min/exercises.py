"""The checks behind the book's exercises, and `same`, which holds what a chapter wrote to what the package does.

A check gets the reader's answer, raises an AssertionError that says what is wrong with it, and prints one line when
it is right. `attempt` runs a check in a notebook without stopping it.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from convnext_min.measure import count_macs, count_parameters


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
