"""How to train: every choice of a run in one frozen `Recipe`, with the arithmetic that follows from it.

Schedules are functions of `progress`, the fraction of the run that is done, so that they are the same whether a run
lasts a number of epochs or a number of minutes.
"""

import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin

from convnext_min.small import INITS, STEMS

RANGES = (  # fields, what holds for their values, and how to say it
    (("epochs", "minutes", "batch_size", "base_lr", "base_batch"), lambda value: value > 0, "positive"),
    (("clip_grad", "ema_horizon", "width_multiplier"), lambda value: value > 0, "positive"),
    (("image_size", "resolution", "eval_resolution"), lambda value: value >= 32, "at least 32"),
    (
        ("warmup", "label_smoothing", "drop_path", "erasing", "ema_decay"),
        lambda value: 0 <= value < 1,
        "at least 0 and below 1",
    ),
    (
        ("evaluate_every", "min_lr", "weight_decay", "mixup", "cutmix", "layer_scale_init", "head_init_scale"),
        lambda value: value >= 0,
        "0 or more",
    ),
    (
        ("progressive",),
        lambda value: list(value) == sorted(value) and all(0 < until < 1 and side >= 32 for until, side in value),
        "pairs of a growing fraction of the run and a side of at least 32",
    ),
    (("stem",), lambda value: value in STEMS, " or ".join(STEMS)),
    (("init",), lambda value: value in INITS, " or ".join(INITS)),
    (("amp",), lambda value: value in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type that an annotation names; an int is a float."""
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value) if isinstance(value, tuple) else ()
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def _written(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


@dataclass(frozen=True)
class Recipe:
    """Everything that is decided before training, but the model, the data and the seed.

    Raises ValueError, naming the field, for a value of the wrong type or out of range.
    """

    # Length
    epochs: int = 300
    minutes: float | None = None  # if given: wall clock from the start of the process, instead of `epochs`
    evaluate_every: int = 1  # epochs; 0: only at the end

    # Optimizer: any that timm knows
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    batch_size: int = 4096  # images for one step of the optimizer
    base_lr: float = 4e-3  # learning rate for steps of `base_batch` images; in proportion for others
    base_batch: int = 4096
    min_lr: float = 1e-6  # at the end of the cosine
    warmup: float = 20 / 300  # fraction of the run
    weight_decay: float = 0.05  # not on biases, norms and layer scale
    clip_grad: float | None = None  # largest norm of the gradient

    # Regularization
    label_smoothing: float = 0.1
    drop_path: float = 0.0  # stochastic depth: rate of the last block
    mixup: float = 0.0  # alpha of its beta distribution; 0: off
    cutmix: float = 0.0  # the same; where both are on, a batch gets one or the other
    erasing: float = 0.0  # probability of random erasing

    # Averaged weights
    ema_decay: float = 0.9999  # 0: no average
    ema_horizon: float | None = 0.1  # average over no more than this fraction of the steps so far; None: no limit

    # Images
    image_size: int = 160  # the side at which images are kept in memory
    resolution: int = 128  # of the training images after cropping
    progressive: tuple[tuple[float, int], ...] = ()  # ((0.4, 96),): 96 px until 40% of the run, then `resolution`
    eval_resolution: int = 128
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of a random crop, as fractions of the image

    # Model
    stem: str = "patchify"  # "overlapping": see `small`
    init: str = "paper"  # "fan_in": see `small`
    layer_scale_init: float = 1e-6  # 0: no layer scale
    head_init_scale: float = 1.0
    depths: tuple[int, int, int, int] | None = None  # None: those of the named model
    dims: tuple[int, int, int, int] | None = None
    width_multiplier: float = 1.0  # of the models of the road

    amp: str = "auto"  # "bf16": autocast; "fp32": none; "auto": bf16 where the hardware multiplies it faster

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not _fits(value, field.type):
                raise ValueError(f"{field.name} takes {_written(field.type)}, got {value!r}")
            for names, right, needed in RANGES:
                if field.name in names and value is not None and not right(value):
                    raise ValueError(f"{field.name} must be {needed}, got {value!r}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}")

    @property
    def lr(self) -> float:
        """Peak learning rate: `base_lr` scaled in proportion to the batch (Goyal et al., 2017)."""
        return self.base_lr * self.batch_size / self.base_batch

    def lr_at(self, progress: float) -> float:
        """Learning rate at `progress` in [0, 1]: linear from 0 during the warm-up, then half a cosine to `min_lr`."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        fraction = (progress - self.warmup) / (1 - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * fraction)) / 2

    def resolution_at(self, progress: float) -> int:
        """Side of the training images, in pixels, at `progress` in [0, 1]."""
        return next((resolution for until, resolution in self.progressive if progress < until), self.resolution)

    def ema_decay_at(self, updates: int) -> float:
        """Decay of the average after `updates` updates: it covers about 1 / (1 - decay) steps.

        With a horizon h that is 1 + h * updates, up to what `ema_decay` allows: the average never holds more than a
        trace of the initial weights, however short the run is, and needs no knowledge of its length.
        """
        if self.ema_horizon is None:
            return self.ema_decay
        return min(self.ema_decay, 1 - 1 / (1 + self.ema_horizon * updates))


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps until the learning rate is at its peak, in a run of `recipe.epochs`."""
    return round(recipe.warmup * recipe.epochs * steps_per_epoch)


def describe(recipe: Recipe, images: int) -> str:
    """The arithmetic of a run on `images` training images, in one line."""
    steps = max(1, images // recipe.batch_size)
    if recipe.minutes is None:
        length = f"{recipe.epochs} epochs = {recipe.epochs * steps:,} steps"
        warmup = f"{warmup_steps(recipe, steps):,} steps of warm-up"
    else:
        length, warmup = f"{recipe.minutes:g} minutes", f"{recipe.warmup:.1%} of the time for warm-up"
    lr = f"learning rate {recipe.lr:.3g} ({recipe.base_lr:g} for {recipe.base_batch} images)"
    return f"{length} of {recipe.batch_size} images, {steps:,} steps an epoch; {lr}, {warmup}"


RECIPES = {
    # Small data, as plain as it goes: the paper's optimizer, schedule and label smoothing, no mixing of images.
    "imagenette": Recipe(
        epochs=5,
        batch_size=64,
        base_lr=2e-3,
        base_batch=64,
        warmup=0.1,
        crop_scale=(0.35, 1.0),
        progressive=((0.6, 64),),
        resolution=96,
        eval_resolution=96,
    ),
}


def get(name: str, settings: Iterable[str] = ()) -> Recipe:
    """The recipe called `name`, changed by settings written "key=value"; values are Python literals.

    Raises ValueError, listing what is valid, for an unknown name or key, and for a value that does not fit.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; valid: {', '.join(RECIPES)}")
    recipe, types = RECIPES[name], {field.name: field.type for field in fields(Recipe)}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in types:
            raise ValueError(f"cannot set {setting!r}: it takes key=value, with a key out of {', '.join(types)}")
        recipe = replace(recipe, **{key: text if types[key] is str else _literal(text)})
    return recipe


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
