"""Describe a training run by one frozen `Recipe`, and derive its schedules from it.

`python -m convnext_min.recipes show in1k --model convnext_base` prints a recipe and the source of each value;
`train.plan` prints its schedule on given hardware. Schedules are functions of `progress`, the finished fraction of the
run, so they work for a run of some epochs and for one of some minutes.
"""

import argparse
import ast
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, ClassVar, NamedTuple, Union, get_args, get_origin

STEMS = ("patchify", "overlapping")
INITS = ("paper", "fan_in", "pytorch")  # see `train.models`


class Range(NamedTuple):
    """A test for valid values of a field, and its description for error messages."""

    contains: Callable[[Any], bool]
    text: str


def one_of(*values: str) -> Range:
    """Return the range of a field with a few valid values."""
    return Range(lambda value: value in values, " or ".join((", ".join(values[:-1]), values[-1])))


POSITIVE = Range(lambda value: value > 0, "positive")
NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
FRACTION = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
SHARE = Range(lambda value: 0 < value <= 1, "above 0 and at most 1")
SIDE = Range(lambda value: value >= 32, "at least 32")
BETAS = Range(lambda value: all(0 <= beta < 1 for beta in value), "at least 0 and below 1")
AREAS = Range(lambda value: 0 < value[0] <= value[1] <= 1, "two growing fractions above 0 and at most 1")
STAGES = Range(
    lambda value: list(value) == sorted(value) and all(0 < until < 1 and side >= 32 for until, side in value),
    "pairs of a growing fraction of the run and a side of at least 32",
)
RAND_AUGMENT = Range(
    lambda value: value == "" or value.startswith("rand-"),
    "empty or a RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1",
)

TABLES = ("Table 5", "Table 6")  # the sources for training from scratch and for fine-tuning
CODE = ("released code",) * 2
BOOK = ("this package",) * 2


def field(default: Any, valid: Range | None = None, source: tuple[str, str] = BOOK) -> Any:
    """Declare a field of `Recipe`: its default, its valid values, and where the paper's recipes take it from."""
    return dataclasses.field(default=default, metadata={"valid": valid, "source": source})


def _fits(value: Any, kind: Any) -> bool:
    """Return whether `value` has the annotated type; an int counts as a float."""
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
    """All choices made before training, except the model, the data and the seed.

    Raises ValueError, naming the field, for a value of the wrong type or out of range.
    """

    stage_wise: ClassVar[bool] = False  # a field of `dense.recipes.DenseRecipe`

    # Length
    epochs: int = field(300, POSITIVE, TABLES)
    minutes: float | None = field(None, POSITIVE)  # wall clock from the start of the process, instead of `epochs`
    evaluate_every: int = field(1, NOT_NEGATIVE, CODE)  # epochs; 0: only at the end

    # Optimizer: any of timm's
    optimizer: str = field("adamw", source=TABLES)
    betas: tuple[float, float] | None = field((0.9, 0.999), BETAS, TABLES)  # None: the optimizer's defaults
    batch_size: int = field(4096, POSITIVE, TABLES)  # images per optimizer step, over all devices
    base_lr: float = field(4e-3, POSITIVE, TABLES)  # for `base_batch` images; scaled in proportion to the batch
    base_batch: int = field(4096, POSITIVE, TABLES)
    schedule: str = field("cosine", one_of("cosine", "steps"), TABLES)  # "steps": / 10 after each third of the run
    min_lr: float = field(1e-6, NOT_NEGATIVE, CODE)  # at the end of the cosine
    warmup: float = field(20 / 300, FRACTION, TABLES)  # fraction of the run
    weight_decay: float = field(0.05, NOT_NEGATIVE, TABLES)  # not on biases, norms and layer scale
    clip_grad: float | None = field(None, POSITIVE, TABLES)  # largest norm of the gradient
    layer_decay: float = field(1.0, SHARE, TABLES)  # factor on the learning rate per group of blocks: `train.optim`

    # Regularization
    label_smoothing: float = field(0.1, FRACTION, TABLES)
    drop_path: float = field(0.0, FRACTION, TABLES)  # stochastic depth: rate of the last block
    mixup: float = field(0.0, NOT_NEGATIVE, TABLES)  # alpha of the beta distribution; 0: off
    cutmix: float = field(0.0, NOT_NEGATIVE, TABLES)  # the same; with both on, each batch gets one of them
    erasing: float = field(0.0, FRACTION, TABLES)  # probability of random erasing
    rand_augment: str = field("", RAND_AUGMENT, TABLES)  # in timm's notation; "": none

    # Averaged weights
    ema_decay: float = field(0.9999, FRACTION, TABLES)  # 0: no average
    ema_horizon: float | None = field(0.1, POSITIVE, CODE)  # average over at most this fraction of the run so far

    # Images
    loader: str = field("memory", one_of("memory", "disk"))  # "disk": `data.disk` reads files in every epoch
    fraction: float = field(1.0, SHARE)  # loader="memory": of the training images, the same for every seed
    image_size: int = field(160, SIDE)  # loader="memory": side of the stored images
    resolution: int = field(128, SIDE, TABLES)  # of the training images after cropping
    progressive: tuple[tuple[float, int], ...] = field((), STAGES)  # ((0.4, 96),): 96 px until 40% of the run
    eval_resolution: int = field(128, SIDE, ("section 3.1",) * 2)
    eval_crop: float = field(1.0, SHARE, ("appendix A.2",) * 2)  # loader="disk": crop side over image side; 1: whole
    test_flip: bool = field(False)  # evaluation: the mean of the outputs for an image and its mirror image
    crop_scale: tuple[float, float] = field((0.08, 1.0), AREAS, CODE)  # area of a random crop, as image fractions
    exif_orientation: bool = field(True)  # turn images upright; False: as stored, as the released code reads them

    # Model
    stem: str = field("patchify", one_of(*STEMS), ("section 2.2",) * 2)  # "overlapping": see `train.models`
    init: str = field("paper", one_of(*INITS), ("Table 5 has std 0.2, the released code 0.02", "released code"))
    layer_scale_init: float = field(1e-6, NOT_NEGATIVE, ("Table 5", 'Table 6: "pre-trained"'))  # 0: no layer scale
    head_init_scale: float = field(1.0, NOT_NEGATIVE, TABLES)
    depths: tuple[int, int, int, int] | None = field(None, source=("section 3, by the model",) * 2)  # None: the model's
    dims: tuple[int, int, int, int] | None = field(None, source=("section 3, by the model",) * 2)
    width_multiplier: float = field(1.0, POSITIVE)  # of the road's networks

    # "bf16", "fp16": autocast; "fp32": none; "auto": bf16 where the hardware multiplies it faster
    amp: str = field("auto", one_of("auto", "bf16", "fp16", "fp32"))

    def __post_init__(self):
        for one in fields(self):
            value, valid = getattr(self, one.name), one.metadata.get("valid")
            if not _fits(value, one.type):
                raise ValueError(f"{one.name} takes {_written(one.type)}, got {value!r}")
            if valid and value is not None and not valid.contains(value):
                raise ValueError(f"{one.name} must be {valid.text}, got {value!r}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}")
        if self.fraction != 1 and self.loader == "disk":
            raise ValueError(f"fraction={self.fraction:g} selects images in memory: it needs loader=memory")
        if self.rand_augment and self.loader == "memory":
            raise ValueError("rand_augment transforms images as they are read: it needs loader=disk")

    @property
    def lr(self) -> float:
        """Return the peak learning rate: `base_lr` in proportion to the batch (Goyal et al., 2017)."""
        return self.base_lr * self.batch_size / self.base_batch

    def lr_at(self, progress: float) -> float:
        """Return the learning rate at `progress` in [0, 1]: linear warm-up from 0, then half a cosine to `min_lr`.

        With schedule="steps" the rate drops to a tenth after each third instead, as for ResNet (He et al., 2016).
        """
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        if self.schedule == "steps":
            return self.lr * 0.1 ** min(2, int(3 * progress))
        fraction = (progress - self.warmup) / (1 - self.warmup)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * fraction)) / 2

    def resolution_at(self, progress: float) -> int:
        """Return the side of the training images, in pixels, at `progress` in [0, 1]."""
        return next((resolution for until, resolution in self.progressive if progress < until), self.resolution)

    def ema_decay_at(self, updates: int) -> float:
        """Return the decay of the EMA after `updates` updates; it averages about 1 / (1 - decay) optimizer steps.

        A horizon h limits them to 1 + h * updates. So the initial weights vanish from the average of a run of any
        length, which need not be known.
        """
        if self.ema_horizon is None:
            return self.ema_decay
        return min(self.ema_decay, 1 - 1 / (1 + self.ema_horizon * updates))


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps until the learning rate peaks, in a run of `recipe.epochs`."""
    return round(recipe.warmup * recipe.epochs * steps_per_epoch)


def describe(recipe: Recipe, images: int) -> str:
    """Return length, learning rate and warm-up of a run on `images` training images, in two lines."""
    per_epoch = max(1, images // recipe.batch_size)
    if recipe.minutes is None:
        length = f"{recipe.epochs} epochs = {recipe.epochs * per_epoch:,} iterations"
        warmup = f"{warmup_steps(recipe, per_epoch):,} iterations of warm-up"
    else:
        length, warmup = f"{recipe.minutes:g} minutes", f"{recipe.warmup:.1%} of the time for warm-up"
    lr = f"learning rate {recipe.lr:.3g} ({recipe.base_lr:g} for {recipe.base_batch} images)"
    return f"{length} of {recipe.batch_size} images, {per_epoch:,} iterations per epoch\n{lr}, {warmup}"


# The paper's recipes for ImageNet, except the values that depend on the model. Table 5: training from scratch.
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
_SMALL_DATA = replace(
    _IMAGENETTE,
    evaluate_every=0,
    optimizer="nmuon",
    batch_size=128,
    base_lr=1.1e-2,
    stem="overlapping",
    init="fan_in",
    layer_scale_init=0.2,
)
_IMAGENETTE_3MIN = replace(_SMALL_DATA, minutes=3, progressive=((0.6, 48),), resolution=64, eval_resolution=64)
_IMAGENETTE_10MIN = replace(_SMALL_DATA, minutes=10, progressive=((0.4, 48), (0.8, 64)), crop_scale=(0.25, 1.0))
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
    # Small data, plain: the paper's optimizer, schedule and label smoothing, without Mixup and CutMix.
    "imagenette": _IMAGENETTE,
    # Three minutes from the start of the process to the result, with three changes to the network (see `train.models`)
    # and Muon (Jordan et al., 2024) in place of AdamW, chosen by book/results/small_data_ablation, and with Nesterov
    # momentum, chosen by book/results/imagenette/tried.json. Results of this and the next two: book/results/imagenette
    "imagenette-3min": _IMAGENETTE_3MIN,
    # Larger images at the end and smaller crops.
    "imagenette-10min": _IMAGENETTE_10MIN,
    # Long enough for larger images, and for Mixup and CutMix, each on half of the batches; not tuned. Smaller images
    # and larger batches, as in the shorter recipes, were not clearly better on a slow processor.
    "imagenette-30min": replace(
        _IMAGENETTE_10MIN,
        minutes=30,
        batch_size=64,
        base_lr=1.2e-2,
        progressive=((0.25, 64), (0.7, 96)),
        resolution=128,
        eval_resolution=128,
        mixup=0.2,
        cutmix=1.0,
    ),
    # The defaults of timm's training script, for timm:convnext_atto with --no-accelerate: images from the disk, its
    # crops, cosine after a warm-up, label smoothing. The optimizer (AdamW; the script's default is SGD), its
    # learning rate, weight decay and batch size are those of `imagenette`, and colour jitter is off.
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
    # For every step of the road, at a quarter of its width. The paper's optimizer, schedule and label smoothing; no
    # EMA, as on the paper's road. The learning rate was better than half of it, on average over ResNet-50, GELU and
    # ConvNeXt on held-out images (book/results/convnext_init/lr_sweep).
    # Results: book/results/road; the best rate of each step: book/results/road_lr
    "road": _ROAD,
    # The same length with ResNet-50's classic recipe: SGD with momentum, a stepped learning rate, crops and flips.
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
    """Return the stochastic depth of Tiny, Small, Base, Large and XLarge, without models the paper did not train."""
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
    "in1k-ft384": "the last weights of in1k, for convnext_large the best EMA weights",
    "in22k-ft224": "the last weights of in22k",
    "in22k-ft384": "the last weights of in22k",
}


def get(name: str, settings: Iterable[str] = (), model: str | None = None) -> Recipe:
    """Return the recipe called `name` for `model`, changed by settings written "key=value".

    Values are Python literals. A model that the paper does not have can use a recipe of the paper if the settings give
    its `drop_path`. Raises ValueError, listing what is valid, for an unknown name or key, for a model that the paper
    did not train with this recipe, and for a value of the wrong type or out of range.
    """
    if name not in RECIPES:
        raise ValueError(
            f"unknown recipe {name!r}; valid: {', '.join(RECIPES)}. Those of detection and segmentation are shown by "
            "python -m convnext_min.dense.recipes"
        )
    recipe, changes = RECIPES[name], parse_settings(Recipe, settings)
    for values in (_values_of_model(name, model, "drop_path" in changes), changes):
        recipe = replace(recipe, **values)
    return recipe


def complete(kind: type[Recipe], recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe of class `kind` that an earlier version recorded, with defaults for new fields."""
    return dataclasses.asdict(kind()) | recorded


def parse_settings(kind: type[Recipe], settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of settings written "key=value", for a recipe of class `kind`.

    Values are Python literals. Raises ValueError, listing what is valid, for an unknown key.
    """
    types, changes = {field.name: field.type for field in fields(kind)}, {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in types:
            raise ValueError(f"cannot set {setting!r}: expected key=value with one of the keys {', '.join(types)}")
        changes[key] = text if types[key] is str else _literal(text)
    return changes


def _values_of_model(name: str, model: str | None, enough: bool) -> dict[str, Any]:
    """Return the values that depend on `model`; none for a model the paper lacks if the settings are `enough`."""
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


# ---- Sources of the values


def source(name: str, field: str, model: str, changed: bool) -> str:
    """Return the source of the value of `field` in the recipe `name` for `model`; `changed`: the caller set it."""
    if changed:
        return "your setting"
    if name not in PER_MODEL:
        return "this package"
    if "isotropic" in model:
        if field in PER_MODEL[name].get(model, ()):
            return "appendix A"
        if field == "stem":
            return "section 3.3"
    from_scratch, fine_tuning = Recipe.__dataclass_fields__[field].metadata["source"]
    return fine_tuning if "-ft" in name else from_scratch


def show(name: str, model: str, settings: Iterable[str] = ()) -> str:
    """Return all values of a recipe for `model`, one line per field: name, value, source."""
    settings = list(settings)
    recipe, changed = get(name, settings, model), parse_settings(Recipe, settings)
    start = f", starting from {STARTS[name]}" if name in STARTS else ""
    sources = {field.name: source(name, field.name, model, field.name in changed) for field in fields(Recipe)}
    return list_values(f"{name} for {model}{start}", recipe, sources)


def list_values(title: str, recipe: Recipe, sources: dict[str, str]) -> str:
    """Return a title and a line for each field in `sources`: its name, its value in `recipe`, its source."""
    lines = [title]
    for name, where in sources.items():
        value = getattr(recipe, name)
        shown = repr(value) if isinstance(value, (str, tuple)) else f"{value}"
        if name == "warmup":
            shown = f"{value * recipe.epochs:g} epochs" if recipe.minutes is None else f"{value:.0%} of the time"
        lines.append(f"{name:<17} {shown:<28} {where}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.recipes", description=__doc__)
    commands = parser.add_subparsers(required=True)
    shows = commands.add_parser("show", help="print a recipe and the source of each value")
    shows.add_argument("recipe", help=f"one of {', '.join(RECIPES)}")
    shows.add_argument("--model", required=True, help="such as convnext_tiny")
    shows.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the recipe")
    args = parser.parse_args(argv)
    try:
        print(show(args.recipe, args.model, args.set))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
