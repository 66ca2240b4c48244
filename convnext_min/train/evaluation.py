"""Evaluate a network on a data set, in one or several processes."""

import itertools
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convnext_min.data import Batches, Data
from convnext_min.train import distributed
from convnext_min.train.device import autocast_dtype


class Evaluation(NamedTuple):
    """Results on a set of images: top-1 accuracy (a fraction), mean cross-entropy, predictions and labels (N,)."""

    top1: float
    loss: float
    predictions: Tensor  # int64, in the order of the images
    labels: Tensor


def logits_of(model: nn.Module, x: Tensor, flip: bool) -> Tensor:
    """Return the logits (B, classes) of images (B, 3, H, W); with `flip`, the mean with those of the mirror images."""
    logits = model(x)
    return (logits + model(x.flip(-1))) / 2 if flip else logits


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Data, amp: str = "auto", limit: int | None = None, flip: bool = False
) -> Evaluation:
    """Evaluate `model` in eval mode on one epoch of `batches`, or the first `limit` of them.

    Several processes each evaluate their share of every batch, and all return the same result, in which each image
    counts once. `flip` is explained at `logits_of`. Raises FloatingPointError, in all processes, if an output is not
    finite.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(amp, device)
    was_training = model.training
    model.eval()
    loss, not_finite, outputs = 0.0, 0, []
    for x, y in itertools.islice(batches.epoch(0), limit):
        if len(y) == 0:  # no share of the last batch for this process, but FSDP needs every process
            x = x.new_zeros(1, *x.shape[1:])
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = logits_of(model, x.to(device, memory_format=torch.channels_last, non_blocking=True), flip)
        logits = logits.float().cpu()[: len(y)]  # (B, classes)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        not_finite += int((~logits.isfinite()).any(1).sum())
        outputs.append(torch.stack([logits.argmax(1), y]))  # (2, B)
    model.train(was_training)
    parts = itertools.chain.from_iterable(zip(*distributed.all_gather_object(outputs)))
    predictions, labels = torch.cat(list(parts), 1)
    loss, not_finite = distributed.all_reduce_sum(loss, not_finite)
    if not_finite or not math.isfinite(loss):
        raise FloatingPointError(
            f"the network's outputs are not finite for {not_finite:.0f} of {len(labels)} images, so there is no "
            "accuracy to report; a lower base_lr or clip_grad=1.0 may help"
        )
    return Evaluation((predictions == labels).double().mean().item(), loss / len(labels), predictions, labels)


def evaluation_seconds(model: nn.Module, batches: Data, amp: str, flip: bool = False) -> float:
    """Estimate the duration of `evaluate` from a few batches after a warm-up.

    Worker processes deliver images in bursts, so they take more batches than images in memory.
    """
    few = min(3 if isinstance(batches, Batches) else 8, len(batches))
    evaluate(model, batches, amp, few, flip)  # warm-up
    ends = [time.perf_counter()]
    for count in (1, few):
        evaluate(model, batches, amp, count, flip)
        ends.append(time.perf_counter())
    first, several = (end - start for start, end in itertools.pairwise(ends))
    per_batch = max(0.0, several - first) / max(1, few - 1)  # without the start of the worker processes
    return distributed.broadcast_object(first + per_batch * (len(batches) - 1))


def most_confused(predictions: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    """Return the two classes that are confused most often, with the counts in both directions, the larger one first."""
    n = len(classes)
    matrix = torch.bincount(n * labels + predictions, minlength=n * n).view(n, n).fill_diagonal_(0)  # (true, predicted)
    if not matrix.any():
        return "none, all predictions are correct"
    a, b = divmod(int((matrix + matrix.T).argmax()), n)
    if matrix[b, a] > matrix[a, b]:
        a, b = b, a
    return f"{classes[a]} → {classes[b]} {matrix[a, b]}×, {classes[b]} → {classes[a]} {matrix[b, a]}×"
