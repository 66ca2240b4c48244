"""Calculate the schedule of a recipe on given hardware and data: `python -m convnext_min.train.plan --recipe in1k ...`.

A recipe's batch size is the effective one: the images per optimizer step, over all processes and gradient accumulation
steps. Each process takes its share of a batch in micro-batches that fit into its memory.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace

import torch

from convnext_min import fast, measure, recipes
from convnext_min.recipes import Recipe
from convnext_min.train.device import autocast_dtype, choose_device
from convnext_min.train.distributed import print_once
from convnext_min.train.models import create_model

IMAGES = {"in1k": 1_281_167, "in22k": 14_197_122, "imagenette": 9_469}  # in training; fine-tuning is on ImageNet-1K
HIGH_LR = 4.0  # multiple of the rule's learning rate that is known to fail
OLD_SHARE = 0.01  # share of the initial weights in the final EMA that is too large


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. `recipe.batch_size` is possible on the hardware: the recipe's own, or the nearest to it."""

    recipe: Recipe
    images: int  # of the training set
    processes: int
    micro_batch: int  # images per process and forward pass
    accumulation: int  # micro-batches per optimizer step and process
    images_per_second: float | None  # of one process
    warnings: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.images // self.recipe.batch_size)

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return recipes.warmup_steps(self.recipe, self.steps_per_epoch)

    @property
    def ema_half_life(self) -> float | None:
        """Return the EMA half-life at the end of the run, in epochs; None without EMA."""
        decay = self.recipe.ema_decay_at(self.steps)
        return math.log(0.5) / math.log(decay) / self.steps_per_epoch if decay else None

    @property
    def hours(self) -> float | None:
        """Return the hours of training, without evaluation; None if the speed is unknown."""
        if self.images_per_second is None:
            return None
        return self.steps * self.recipe.batch_size / (self.images_per_second * self.processes) / 3600

    def __str__(self) -> str:
        parts = (
            _count(self.processes, "process", "es"),
            f"{self.micro_batch:,} images",
            _count(self.accumulation, "gradient accumulation step"),
        )
        lines = [f"effective batch size {self.recipe.batch_size:,} = {' × '.join(parts)}"]
        lines += [recipes.describe(self.recipe, self.images)]
        if self.recipe.minutes is None:
            if half_life := self.ema_half_life:
                shown = f"{half_life:,.0f}" if half_life >= 10 else f"{half_life:.2g}"
                lines += [f"EMA half-life: {shown} epochs"]
            if self.hours is not None:
                speed = f"{self.images_per_second:,.0f} images per second and process"
                lines += [f"{self.hours:,.1f} hours at {speed}, without evaluation"]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def plan(
    recipe: Recipe,
    images: int,
    processes: int = 1,
    micro_batch: int | None = None,
    images_per_second: float | None = None,
    rule: Recipe | None = None,
    stride: int = 32,
) -> Plan:
    """Return the plan of `recipe` on `images` training images, with warnings about settings that are known to fail.

    `micro_batch` is the number of images per process and forward pass, by default the process's whole share of a batch.
    If the micro-batches cannot make up the recipe's batch size, the nearest possible one is planned, and the learning
    rate changes in proportion. `rule` is a recipe with a learning rate that works, for comparison. `stride` is the
    image's side over that of the last feature map, 16 in an isotropic network. Raises ValueError for numbers that are
    not positive.
    """
    if micro_batch is None:
        micro_batch = max(1, recipe.batch_size // max(1, processes))
    for name, value in (("images", images), ("processes", processes), ("images per micro-batch", micro_batch)):
        if value < 1:
            raise ValueError(f"the number of {name} must be positive, got {value}")
    if images_per_second is not None and images_per_second <= 0:
        raise ValueError(f"the images per second must be positive, got {images_per_second:g}")
    accumulation = max(1, round(recipe.batch_size / (processes * micro_batch)))
    batch = processes * micro_batch * accumulation
    planned = Plan(
        replace(recipe, batch_size=batch), images, processes, micro_batch, accumulation, images_per_second, ()
    )
    return replace(planned, warnings=tuple(_warnings(planned, recipe, rule, stride)))


def _warnings(planned: Plan, asked: Recipe, rule: Recipe | None, stride: int) -> list[str]:
    recipe, found = planned.recipe, []
    if recipe.batch_size != asked.batch_size:
        found.append(
            f"{_count(planned.processes, 'process', 'es')} with micro-batches of {planned.micro_batch} images cannot "
            f"make up an effective batch size of {asked.batch_size}; the nearest is {recipe.batch_size}, with learning "
            f"rate {recipe.lr:.3g} instead of {asked.lr:.3g}: --set batch_size={recipe.batch_size}"
        )
    if recipe.batch_size > planned.images:
        found.append(
            f"a batch of {recipe.batch_size:,} images is larger than the training set of {planned.images:,}: "
            f"--set batch_size={2 ** int(math.log2(max(2, planned.images // 10)))} or less"
        )
    if rule and recipe.lr > HIGH_LR * (right := replace(rule, batch_size=recipe.batch_size).lr):
        found.append(
            f"the learning rate {recipe.lr:.3g} is {recipe.lr / right:.0f} times that of the rule, {right:.3g} for "
            f"{recipe.batch_size} images: --set base_lr={rule.base_lr:g} base_batch={rule.base_batch}"
        )
    if recipe.minutes is None and recipe.ema_horizon is None and recipe.ema_decay:
        old = recipe.ema_decay**planned.steps
        if old > OLD_SHARE:
            found.append(
                f"EMA decay {recipe.ema_decay} is too slow for {planned.steps:,} iterations: {old:.0%} of the EMA "
                "would still be initial weights. Use --set ema_horizon=0.1, or ema_decay=0.0 to disable it"
            )
    side = recipe.resolution // stride  # the smaller images of `progressive` are a short run's choice
    if side < 2:
        found.append(
            f"at {recipe.resolution} pixels the last feature map is {side}×{side}, and its kernels "
            f"see mostly padding: --set resolution={2 * stride} or more, even if the images are smaller"
        )
    return found


def measure_speed(model: str, recipe: Recipe, micro_batch: int) -> float:
    """Return the images per second of `model` in training on this machine, without data loading and the optimizer."""
    device = choose_device()
    network = create_model(model, recipe, 1000).to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        fast.accelerate(network)
    dtype = autocast_dtype(recipe.amp, device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return measure.throughput(network, recipe.resolution, micro_batch, training=True).median


def from_arguments(args: argparse.Namespace) -> Plan:
    """Return the plan that the command line asks for."""
    settings = args.set + ([f"epochs={args.epochs}", "minutes=None"] if args.epochs else [])
    recipe = recipes.get(args.recipe, settings, args.model)
    speed = args.images_per_second
    if args.measure:
        if args.gpus < 1:
            raise ValueError(f"the number of processes must be positive, got {args.gpus}")
        speed = measure_speed(args.model, recipe, args.micro_batch or max(1, recipe.batch_size // args.gpus))
    images = args.images
    if images is None:
        images = IMAGES.get(args.recipe, IMAGES["in1k" if args.recipe in recipes.PER_MODEL else "imagenette"])
    stride = 16 if "isotropic" in args.model else 32
    return plan(recipe, images, args.gpus, args.micro_batch, speed, recipes.RECIPES[args.recipe], stride)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.train.plan", description=__doc__)
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(recipes.RECIPES)}")
    parser.add_argument("--model", required=True, help="such as convnext_tiny")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--gpus", type=int, default=1, help="total number of GPUs over all nodes (1)")
    parser.add_argument(
        "--micro-batch", type=int, help="images per GPU and forward pass (default: its whole share of the batch)"
    )
    parser.add_argument("--images", type=int, help="size of the training set (default: the recipe's)")
    parser.add_argument("--epochs", help="number of epochs (default: the recipe's)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--images-per-second", type=float, help="training speed of one GPU")
    speed.add_argument("--measure", action="store_true", help="measure that speed on this machine now")
    try:
        print_once(from_arguments(parser.parse_args(argv)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
