"""How to train: every choice of a run in one frozen `Recipe`, with the arithmetic that follows from it.

`python -m convnext_min.recipes show in1k --model convnext_base` prints a recipe and where each value comes from;
`train.plan` says what it means on given hardware. Schedules are functions of `progress`, the fraction of the run that
is done, so that they are the same whether a run lasts a number of epochs or a number of minutes.
"""

import argparse
import ast
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin

STEMS = ("patchify", "overlapping")
INITS = ("paper", "fan_in", "pytorch")  # see `train.small`

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
    (("schedule",), lambda value: value in ("cosine", "steps"), "cosine or steps"),
    (("fraction",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("crop_scale",), lambda value: 0 < value[0] <= value[1] <= 1, "two growing fractions above 0 and at most 1"),
    (("betas",), lambda value: all(0 <= beta < 1 for beta in value), "at least 0 and below 1"),
    (("stem",), lambda value: value in STEMS, " or ".join(STEMS)),
    (("init",), lambda value: value in INITS, " or ".join(INITS)),
    (("layer_decay", "eval_crop"), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (
        ("rand_augment",),
        lambda value: value == "" or value.startswith("rand-"),
        "empty or a RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1",
    ),
    (("loader",), lambda value: value in ("memory", "disk"), "memory or disk"),
    (("amp",), lambda value: value in ("auto", "bf16", "fp16", "fp32"), "auto, bf16, fp16 or fp32"),
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
    betas: tuple[float, float] | None = (0.9, 0.999)  # None: the optimizer's own
    batch_size: int = 4096  # images for one step of the optimizer
    base_lr: float = 4e-3  # learning rate for steps of `base_batch` images; in proportion for others
    base_batch: int = 4096
    schedule: str = "cosine"  # "steps": a tenth of the rate after each third of the run
    min_lr: float = 1e-6  # at the end of the cosine
    warmup: float = 20 / 300  # fraction of the run
    weight_decay: float = 0.05  # not on biases, norms and layer scale
    clip_grad: float | None = None  # largest norm of the gradient
    layer_decay: float = 1.0  # learning rate of a group of blocks over that of the next: see `layer_decay`

    # Regularization
    label_smoothing: float = 0.1
    drop_path: float = 0.0  # stochastic depth: rate of the last block
    mixup: float = 0.0  # alpha of its beta distribution; 0: off
    cutmix: float = 0.0  # the same; where both are on, a batch gets one or the other
    erasing: float = 0.0  # probability of random erasing
    rand_augment: str = ""  # operations on the image as it is read, as timm writes them; "": none

    # Averaged weights
    ema_decay: float = 0.9999  # 0: no average
    ema_horizon: float | None = 0.1  # average over no more than this fraction of the steps so far; None: no limit

    # Images
    loader: str = "memory"  # "memory": all images in memory, see `data`; "disk": read for each epoch, see `imagenet`
    fraction: float = 1.0  # loader="memory": of the training images, the same for every seed
    image_size: int = 160  # the side at which images are kept in memory
    resolution: int = 128  # of the training images after cropping
    progressive: tuple[tuple[float, int], ...] = ()  # ((0.4, 96),): 96 px until 40% of the run, then `resolution`
    eval_resolution: int = 128
    eval_crop: float = 1.0  # loader="disk": side of the central crop over the resized image's; 1: the whole, squeezed
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of a random crop, as fractions of the image

    # Model
    stem: str = "patchify"  # "overlapping": see `small`
    init: str = "paper"  # "fan_in", "pytorch": see `small`
    layer_scale_init: float = 1e-6  # 0: no layer scale
    head_init_scale: float = 1.0
    depths: tuple[int, int, int, int] | None = None  # None: those of the named model
    dims: tuple[int, int, int, int] | None = None
    width_multiplier: float = 1.0  # of the models of the road

    amp: str = "auto"  # "bf16", "fp16": autocast; "fp32": none; "auto": bf16 where the hardware multiplies it faster

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
        if self.fraction != 1 and self.loader == "disk":
            raise ValueError(f"fraction={self.fraction:g} takes a part of the images in memory: it needs loader=memory")
        if self.rand_augment and self.loader == "memory":
            raise ValueError("rand_augment works on images as they are read: it needs loader=disk")

    @property
    def lr(self) -> float:
        """Peak learning rate: `base_lr` scaled in proportion to the batch (Goyal et al., 2017)."""
        return self.base_lr * self.batch_size / self.base_batch

    def lr_at(self, progress: float) -> float:
        """Learning rate at `progress` in [0, 1]: linear from 0 during the warm-up, then half a cosine to `min_lr`.

        With schedule="steps" three steps instead of the cosine, as ResNets were trained (He et al., 2016).
        """
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        if self.schedule == "steps":
            return self.lr * 0.1 ** min(2, int(3 * progress))
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


# The paper's recipes for ImageNet, without what depends on the model. Table 5: training from scratch.
_AUGMENTATION = {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "label_smoothing": 0.1}
_IN1K = Recipe(
    epochs=300,
    optimizer="adamw",
    betas=(0.9, 0.999),
    batch_size=4096,
    base_lr=4e-3,
    base_batch=4096,
    min_lr=1e-6,
    warmup=20 / 300,
    weight_decay=0.05,
    mixup=0.8,
    cutmix=1.0,
    ema_decay=0.9999,
    ema_horizon=None,
    loader="disk",
    resolution=224,
    eval_resolution=224,
    eval_crop=0.875,
    crop_scale=(0.08, 1.0),
    layer_scale_init=1e-6,
    **_AUGMENTATION,
)
_FINE_TUNING = replace(  # Table 6
    _IN1K,
    epochs=30,
    batch_size=512,
    base_lr=5e-5,
    base_batch=512,
    warmup=0.0,
    weight_decay=1e-8,
    mixup=0.0,
    cutmix=0.0,
    ema_decay=0.0,
    head_init_scale=0.001,
)
_AT_384 = {"resolution": 384, "eval_resolution": 384, "eval_crop": 1.0}

_IMAGENETTE = Recipe(
    epochs=5,
    batch_size=64,
    base_lr=2e-3,
    base_batch=64,
    warmup=0.1,
    crop_scale=(0.35, 1.0),
    progressive=((0.6, 64),),
    resolution=96,
    eval_resolution=96,
)
_IMAGENETTE_3MIN = replace(
    _IMAGENETTE,
    minutes=3,
    evaluate_every=0,
    optimizer="muon",
    base_lr=1.6e-2,
    stem="overlapping",
    init="fan_in",
    layer_scale_init=0.2,
)
_IMAGENETTE_10MIN = replace(
    _IMAGENETTE_3MIN,
    minutes=10,
    base_lr=1.2e-2,
    crop_scale=(0.25, 1.0),
    progressive=((0.3, 64), (0.8, 96)),
    resolution=128,
    eval_resolution=128,
)
_ROAD = Recipe(
    epochs=9,
    evaluate_every=0,
    batch_size=64,
    base_lr=4e-3,
    base_batch=64,
    warmup=0.1,
    ema_decay=0.0,
    resolution=96,
    eval_resolution=96,
    crop_scale=(0.35, 1.0),
    init="pytorch",
    width_multiplier=0.25,
)

RECIPES = {
    # Small data, as plain as it goes: the paper's optimizer, schedule and label smoothing, no mixing of images.
    "imagenette": _IMAGENETTE,
    # The same for three minutes from the start of the process to the result, with three changes to the network (see
    # `small`) and Muon (Jordan et al., 2024) in place of AdamW, chosen by book/results/small_data_ablation. What they
    # reached on all 3,925 validation images, on two cores, the Xeon's with AMX (book/results/imagenette); an epoch is
    # 147 steps of 64 images:
    # 3min-seed-0: 78.1% after 176 s and 1,111 steps, Intel Xeon
    # 3min-seed-1: 77.8% after 175 s and 1,080 steps, Intel Xeon
    # 3min-seed-2: 72.2% after 174 s and 605 steps, AMD EPYC
    # 3min-seed-3: 54.5% after 175 s and 239 steps, AMD EPYC, AVX2
    # 3min-seed-4: 54.3% after 174 s and 211 steps, AMD EPYC, AVX2
    "imagenette-3min": _IMAGENETTE_3MIN,
    # Larger images at the end and smaller crops, by judgement:
    # 10min-seed-0: 85.1% after 595 s and 2,862 steps, Intel Xeon
    # 10min-seed-1: 74.0% after 593 s and 686 steps, AMD EPYC, AVX2
    # 10min-seed-2: 74.6% after 592 s and 722 steps, AMD EPYC, AVX2
    "imagenette-10min": _IMAGENETTE_10MIN,
    # Seen often enough for half of the batches to be mixed by CutMix, the others by Mixup:
    # 30min-seed-0: 89.2% after 1795 s and 9,795 steps, Intel Xeon
    # 30min-seed-1: 83.1% after 1794 s and 2,209 steps, AMD EPYC, AVX2
    "imagenette-30min": replace(
        _IMAGENETTE_10MIN, minutes=30, progressive=((0.25, 64), (0.7, 96)), mixup=0.2, cutmix=1.0
    ),
    # What timm's training script does unless told otherwise, for timm:convnext_atto with --no-accelerate: images from
    # the disk, its crops, cosine after a warm-up, label smoothing; but AdamW, its rate, weight decay and the batch are
    # those of `imagenette` (the script's SGD is not for ConvNeXt), and colour jitter is off.
    "timm": replace(
        _IMAGENETTE,
        minutes=3,
        evaluate_every=0,
        progressive=(),
        resolution=128,
        eval_resolution=128,
        eval_crop=0.95,
        crop_scale=(0.08, 1.0),
        ema_decay=0.0,
        loader="disk",
    ),
    # For every step of the road, at a quarter of its width: two cores train all sixteen, with one seed, in less than an
    # hour (book/results/road). Of the two learning rates tried on held-out images
    # (book/results/convnext_init/lr_sweep) for ResNet-50, GELU and ConvNeXt alike it is the better one on average;
    # ConvNeXt alone would take half of it. The paper's optimizer, schedule and label smoothing; no averaged weights,
    # as along its road. Too short for CutMix to pay.
    "road": _ROAD,
    # The same length for ResNet-50's own recipe: momentum, three steps of the learning rate, crops and flips.
    "road-classic": replace(
        _ROAD,
        optimizer="sgd",
        betas=None,
        schedule="steps",
        base_lr=0.1,
        base_batch=256,
        warmup=0.0,
        weight_decay=1e-4,
        label_smoothing=0.0,
    ),
    "in1k": _IN1K,
    "in22k": replace(_IN1K, epochs=90, warmup=5 / 90, ema_decay=0.0),
    "in1k-ft384": replace(_FINE_TUNING, layer_decay=0.7, **_AT_384),
    "in22k-ft224": replace(_FINE_TUNING, layer_decay=0.8),
    "in22k-ft384": replace(_FINE_TUNING, layer_decay=0.8, **_AT_384),
}


def _rates(*rates: float | None) -> dict[str, dict[str, Any]]:
    """The stochastic depth of Tiny, Small, Base, Large and XLarge; None for what the paper did not train."""
    names = (f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge"))
    return {name: {"drop_path": rate} for name, rate in zip(names, rates, strict=True) if rate is not None}


_FROM_22K = _rates(0.0, 0.1, 0.2, 0.3, 0.4)
_FROM_22K["convnext_xlarge"] |= {"ema_decay": 0.9999}
PER_MODEL = {  # recipe, model: the values that the model changes
    "in1k": _rates(0.1, 0.4, 0.5, 0.5, None)
    | {
        "convnext_isotropic_small": {"drop_path": 0.1, "warmup": 50 / 300, "layer_scale_init": 0.0},
        "convnext_isotropic_base": {"drop_path": 0.2, "warmup": 50 / 300, "layer_scale_init": 0.0},
        "convnext_isotropic_large": {"drop_path": 0.5, "warmup": 50 / 300},
    },
    "in22k": _rates(0.0, 0.0, 0.1, 0.1, 0.2),
    "in1k-ft384": _rates(None, None, 0.8, 0.95, None),
    "in22k-ft224": _FROM_22K,
    "in22k-ft384": _FROM_22K,
}
STARTS = {  # the weights that a recipe starts from
    "in1k": "new weights",
    "in22k": "new weights",
    "in1k-ft384": "the weights of in1k: the last ones, but for convnext_large the averaged ones",
    "in22k-ft224": "the last weights of in22k",
    "in22k-ft384": "the last weights of in22k",
}


def get(name: str, settings: Iterable[str] = (), model: str | None = None) -> Recipe:
    """The recipe called `name`, for `model` if its values depend on it, changed by settings written "key=value".

    Values are Python literals. A model that the paper does not have takes a recipe of the paper if the settings give
    its `drop_path`. Raises ValueError, listing what is valid, for an unknown name or key, for a model that the paper
    did not train so, and for a value that does not fit.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; valid: {', '.join(RECIPES)}")
    recipe, changes = RECIPES[name], parse_settings(Recipe, settings)
    for values in (_values_of_model(name, model, "drop_path" in changes), changes):
        recipe = replace(recipe, **values)
    return recipe


def parse_settings(kind: type[Recipe], settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of settings written "key=value", for a recipe of class `kind`.

    Values are Python literals. Raises ValueError, listing what is valid, for an unknown key.
    """
    types, changes = {field.name: field.type for field in fields(kind)}, {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in types:
            raise ValueError(f"cannot set {setting!r}: it takes key=value, with a key out of {', '.join(types)}")
        changes[key] = text if types[key] is str else _literal(text)
    return changes


def _values_of_model(name: str, model: str | None, enough: bool) -> dict[str, Any]:
    """What `model` changes in the recipe; nothing if the paper does not have it and the settings are `enough`."""
    if name not in PER_MODEL:
        return {}
    models = PER_MODEL[name]
    known = (model or "").rpartition(":")[2]  # timm:convnext_tiny is the same network
    if known in models:
        return models[known]
    if enough:
        return {}
    others = [other for other, trained in PER_MODEL.items() if known in trained]
    raise ValueError(
        f"the paper has no {name} for {model}; it has it for {', '.join(models)}"
        + (f", and for {model} it has {', '.join(others)}" if others else "")
        + ". To use it all the same, give the stochastic depth: --set drop_path=0.1"
        if model
        else f"the values of {name} depend on the model; give one of {', '.join(models)}"
    )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ---- Where the values come from

_IN_TABLES = (  # what both of the paper's tables list
    *(
        "optimizer",
        "betas",
        "batch_size",
        "base_lr",
        "base_batch",
        "epochs",
        "warmup",
        "weight_decay",
        "label_smoothing",
    ),
    *(
        "schedule",
        "drop_path",
        "mixup",
        "cutmix",
        "erasing",
        "rand_augment",
        "ema_decay",
        "layer_scale_init",
        "resolution",
    ),
)
_IN_CODE = ("min_lr", "clip_grad", "ema_horizon", "eval_resolution", "eval_crop", "crop_scale", "evaluate_every")


def source(name: str, field: str, model: str, changed: bool) -> str:
    """Where the value of `field` in the recipe `name` for `model` is written; `changed`: it is not the recipe's own."""
    if changed:
        return "your setting"
    if name not in PER_MODEL:
        return "this package"
    table = "Table 6" if "-ft" in name else "Table 5"
    if "isotropic" in model and field in PER_MODEL[name].get(model, ()):
        return "appendix A"
    if field in _IN_TABLES or (field in ("layer_decay", "head_init_scale") and table == "Table 6"):
        return table
    if field == "init":
        return f"{table} has std 0.2, the released code 0.02" if table == "Table 5" else "released code"
    if field in ("stem", "depths", "dims"):
        return "section 2" if field == "stem" else "section 3, by the model"
    return "released code" if field in (*_IN_CODE, "layer_decay", "head_init_scale") else "this package"


def show(name: str, model: str, settings: Iterable[str] = ()) -> str:
    """All values of a recipe for `model`, a line each: field, value, where it comes from."""
    settings = list(settings)
    recipe, changed = get(name, settings, model), {setting.partition("=")[0] for setting in settings}
    start = f", starting from {STARTS[name]}" if name in STARTS else ""
    lines = [f"{name} for {model}{start}"]
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        shown = repr(value) if isinstance(value, (str, tuple)) else f"{value}"
        if field.name == "warmup":
            shown = f"{value * recipe.epochs:g} epochs" if recipe.minutes is None else f"{value:.0%} of the time"
        lines.append(f"{field.name:<17} {shown:<28} {source(name, field.name, model, field.name in changed)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.recipes", description=__doc__)
    commands = parser.add_subparsers(required=True)
    shows = commands.add_parser("show", help="print a recipe, each value with its source")
    shows.add_argument("recipe", help=f"one of {', '.join(RECIPES)}")
    shows.add_argument("--model", required=True, help="such as convnext_tiny")
    shows.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change it")
    args = parser.parse_args(argv)
    try:
        print(show(args.recipe, args.model, args.set))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
