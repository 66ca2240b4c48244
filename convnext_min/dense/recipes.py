"""Recipes for detection and segmentation: the paper's settings for COCO and ADE20K, and small ones for two CPU cores.

The paper gives ranges (appendix A.3); the values per model are those of the released configurations, as are the
schedules: "3x" is 36 epochs of COCO, and 160,000 iterations of 16 images are 127 epochs of ADE20K. For ADE20K they
test in two ways. The recipe has the one of Table 4: whole images in several sizes, each also mirrored. Table 7 tests
one size with a sliding window as large as the crops of training: "test_scales=(1.0,)", "test_flip=False", "window=512".

`python -m convnext_min.dense.recipes show coco --head mask_rcnn --backbone convnext_tiny` prints a recipe and the
source of each value.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from convnext_min.recipes import POSITIVE, SIDE, Range, Recipe, field, list_values, one_of, parse_settings

HEADS = ("mask_rcnn", "cascade_mask_rcnn", "upernet", "fcn")  # two for detection, two for segmentation
HEADS_OF = {"coco": HEADS[:2], "ade20k": HEADS[2:], "nuclei": HEADS[:2], "camvid": HEADS[2:], "shapes": HEADS}

SIDES = Range(lambda value: len(value) > 0 and min(value) >= 32, "one or more sides of at least 32")
SCALES = Range(lambda value: len(value) > 0 and min(value) > 0, "one or more positive factors")
WINDOW = Range(lambda value: value == 0 or value >= 32, "0 or at least 32")
FOR_CLASSIFIERS = (  # fields of `Recipe` without a meaning here
    *("label_smoothing", "mixup", "cutmix", "erasing", "rand_augment", "loader", "fraction", "image_size"),
    *("resolution", "progressive", "eval_resolution", "eval_crop", "crop_scale"),
    *("exif_orientation", "head_init_scale", "schedule", "min_lr"),
)


@dataclass(frozen=True)
class DenseRecipe(Recipe):
    """A `Recipe` with the settings of detection and segmentation; settings for classifiers alone cannot be changed."""

    label_smoothing: float = 0.0

    stage_wise: bool = False  # the groups of `layer_decay` are whole stages: `train.optim`

    # Learning rate after the warm-up
    milestones: tuple[float, ...] = ()  # fractions of the run; it drops to a tenth after each. (): linear to 0

    # Images
    # Shorter side: the last in evaluation; one of these in training, in segmentation without the last if there are more
    min_size: tuple[int, ...] = field((800,), SIDES)
    max_size: int = field(1333, SIDE)  # limit of the longer side; images above it are scaled down
    resize_and_crop: bool = False  # detection: half of the images are cropped first, as in DETR
    vertical_flip: bool = False  # detection: besides the horizontal one
    crop: int = field(512, SIDE)  # segmentation: side of a random crop
    photometric: str = field("mmseg", one_of("mmseg", "torchvision"))  # segmentation: whose random colours
    test_scales: tuple[float, ...] = field((1.0,), SCALES)  # segmentation: predictions at these sizes are averaged
    window: int = field(0, WINDOW)  # segmentation: side of a sliding window in evaluation; 0: whole images

    # Heads
    channels: int = field(256, POSITIVE)  # of the pyramid and the convolutions of the heads; of UperNet's decoder
    hidden: int = field(1024, POSITIVE)  # of a box head's linear layers
    anchor_scale: float = field(8.0, POSITIVE)  # side of an anchor over the stride of its level
    rois: int = field(512, POSITIVE)  # boxes sampled per image in training
    detections: int = field(100, POSITIVE)  # kept per image

    def __post_init__(self):
        super().__post_init__()
        defaults = {one.name: one.default for one in fields(self)}
        for name in FOR_CLASSIFIERS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is for classification; here it stays {defaults[name]!r}")

    def lr_at(self, progress: float) -> float:
        """Return the learning rate at `progress` in [0, 1]: linear from 0 in the warm-up, then steps or linear to 0."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        if self.milestones:
            return self.lr * 0.1 ** sum(progress >= milestone for milestone in self.milestones)
        return self.lr * (1 - progress)

    def resolution_at(self, progress: float) -> int:
        """Return the shorter side in evaluation, the same at any `progress`."""
        return self.min_size[-1]


_PAPER = DenseRecipe(  # what the released configurations share
    optimizer="adamw",
    betas=(0.9, 0.999),
    batch_size=16,
    base_batch=16,
    weight_decay=0.05,
    ema_decay=0.0,
    layer_scale_init=1.0,
)
_COCO = replace(
    _PAPER,
    epochs=36,
    warmup=500 / (36 * 7330),  # 500 iterations
    milestones=(27 / 36, 33 / 36),
    base_lr=2e-4,
    min_size=tuple(range(480, 801, 32)),
    max_size=1333,
    resize_and_crop=True,
)
_ADE20K = replace(
    _PAPER,
    epochs=127,
    evaluate_every=13,  # 16,000 iterations
    warmup=1500 / 160_000,
    base_lr=1e-4,
    layer_decay=0.9,
    stage_wise=True,
    min_size=(*range(256, 1025, 32), 512),  # 0.5 to 2 times 512
    max_size=4096,
    crop=512,
    channels=512,
    test_scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
    test_flip=True,
)
# The learning rates for nuclei and CamVid are rough. Four were tried, 2.5e-4 to 2e-3 for Mask R-CNN and 5e-4 to 4e-3
# for UperNet: one run of a minute each, from the pretrained convnext_atto, on four fifths of the training images,
# evaluated on the others. The second highest is used; the highest was better by at most 3 points.
_SMALL = replace(_PAPER, batch_size=4, base_batch=4, base_lr=5e-4, warmup=0.05, drop_path=0.1)
RECIPES = {
    "coco": _COCO,
    "ade20k": _ADE20K,
    "nuclei": replace(
        _SMALL,
        epochs=10,
        min_size=(224, 256, 288, 256),
        max_size=512,
        vertical_flip=True,
        channels=64,
        hidden=256,
        anchor_scale=2.0,
        rois=128,
        base_lr=1e-3,
    ),
    "camvid": replace(
        _SMALL,
        epochs=20,
        batch_size=8,
        base_batch=8,
        min_size=(135, 180, 225, 270, 180),
        crop=160,
        photometric="torchvision",
        channels=96,
        base_lr=2e-3,
    ),
    "shapes": replace(
        _SMALL, epochs=10, min_size=(96,), max_size=96, crop=96, channels=64, hidden=256, anchor_scale=4.0, rois=64
    ),
}


def _values(layer_decay: float, base_lr: float, drop_path: float) -> dict[str, Any]:
    return {"layer_decay": layer_decay, "base_lr": base_lr, "drop_path": drop_path}


CROP_640 = {"crop": 640, "min_size": (*range(320, 1281, 32), 640), "max_size": 5120}  # 0.5 to 2 times 640
PER_MODEL = {  # task, head, backbone: values of the released configurations, within the ranges of appendix A.3
    ("coco", "mask_rcnn", "convnext_tiny"): _values(0.95, 1e-4, 0.4),
    ("coco", "cascade_mask_rcnn", "convnext_tiny"): _values(0.7, 2e-4, 0.4),
    ("coco", "cascade_mask_rcnn", "convnext_small"): _values(0.7, 2e-4, 0.6),
    ("coco", "cascade_mask_rcnn", "convnext_base"): _values(0.8, 2e-4, 0.7),
    ("coco", "cascade_mask_rcnn", "convnext_large"): _values(0.7, 1e-4, 0.7),
    ("coco", "cascade_mask_rcnn", "convnext_xlarge"): _values(0.7, 1e-4, 0.8),
    ("ade20k", "upernet", "convnext_tiny"): _values(0.9, 1e-4, 0.4),
    ("ade20k", "upernet", "convnext_small"): _values(0.9, 1e-4, 0.3),
    ("ade20k", "upernet", "convnext_base"): _values(0.9, 1e-4, 0.4),
    ("ade20k", "upernet", "convnext_large"): _values(0.9, 1e-4, 0.4) | CROP_640,
    ("ade20k", "upernet", "convnext_xlarge"): _values(0.9, 8e-5, 0.4) | CROP_640,
}
FROM_22K = {  # where two released configurations exist: what differs if the backbone was pretrained on ImageNet-22K
    ("coco", "cascade_mask_rcnn", "convnext_base"): _values(0.8, 1e-4, 0.6),
    ("ade20k", "upernet", "convnext_base"): CROP_640,
}


def get(
    task: str, head: str, backbone: str, settings: Iterable[str] = (), pretrained: str | None = None
) -> DenseRecipe:
    """Return the recipe of `task` for a head and a backbone, changed by settings written "key=value".

    `pretrained` is passed to `create_dense_model`; for "in22k" the values of `FROM_22K` hold. Where no configuration
    for Mask R-CNN was released, it takes the values of the cascade on the same backbone.
    """
    of_cascade = PER_MODEL.get((task, "cascade_mask_rcnn", backbone), {}) if head == "mask_rcnn" else {}
    recipe = replace(RECIPES[task], **PER_MODEL.get((task, head, backbone), of_cascade))
    if pretrained == "in22k":
        recipe = replace(recipe, **FROM_22K.get((task, head, backbone), {}))
    if backbone.startswith("road:"):  # the road has its own initial weights, no layer scale and no layer-wise decay
        plain = {"layer_decay": 1.0, "stage_wise": False, "layer_scale_init": Recipe.layer_scale_init}
        recipe = replace(recipe, init="pytorch", **plain)
    return replace(recipe, **parse_settings(DenseRecipe, settings))


# ---- Sources of the values

SECTION_4, RELEASED, BOOK = "section 4", "released configuration", "this package"
SWIN, BEIT = "Swin's configuration", "BEiT's configuration"  # the released ones extend them (appendix A.3)
SWEEP = "appendix A.3's ranges, released configuration"
SOURCES = {  # field: where the recipes for COCO and ADE20K take it from; None: for the other kind of head
    "epochs": (f"{SECTION_4}: 3x schedule", f"{SECTION_4}: 160,000 iterations"),
    "minutes": (BOOK, BOOK),
    "evaluate_every": (SWIN, BEIT),
    "optimizer": (SECTION_4, RELEASED),
    "betas": (RELEASED, RELEASED),
    "batch_size": (SWIN, SECTION_4),
    "base_lr": (SWEEP, SWEEP),
    "base_batch": (SWIN, SECTION_4),
    "warmup": (f"{SWIN}: 500 of 263,880 iterations", f"{RELEASED}: 1,500 of 160,000 iterations"),
    "milestones": (RELEASED, RELEASED),
    "weight_decay": (RELEASED, RELEASED),
    "clip_grad": (RELEASED, RELEASED),
    "layer_decay": (SWEEP, SWEEP),
    "stage_wise": (RELEASED, RELEASED),
    "drop_path": (SWEEP, SWEEP),
    "ema_decay": (RELEASED, RELEASED),
    "ema_horizon": (BOOK, BOOK),
    "min_size": (RELEASED, BEIT),
    "max_size": (RELEASED, BEIT),
    "resize_and_crop": (RELEASED, None),
    "vertical_flip": (RELEASED, None),
    "crop": (None, "Table 4"),
    "photometric": (None, BEIT),
    "test_scales": (None, "Table 4: multi-scale, MMSegmentation"),
    "test_flip": (None, "Table 4: multi-scale, MMSegmentation"),
    "window": (None, RELEASED),
    "channels": (RELEASED, RELEASED),
    "hidden": (RELEASED, None),
    "anchor_scale": (RELEASED, None),
    "rois": (RELEASED, None),
    "detections": (RELEASED, None),
    "stem": ("section 2.2", "section 2.2"),
    "init": ("released code", "released code"),
    "layer_scale_init": (RELEASED, RELEASED),
    "depths": ("section 3, by the model", "section 3, by the model"),
    "dims": ("section 3, by the model", "section 3, by the model"),
    "width_multiplier": (BOOK, BOOK),
    "amp": (BOOK, BOOK),
}
OF_NETWORK = ("base_lr", "layer_decay", "drop_path", "init", "layer_scale_init")  # networks without a release: ours


def source(task: str, head: str, backbone: str, field: str) -> str | None:
    """Return the source of the value of `field` in a recipe, or None if the head does not use it."""
    found = SOURCES[field][head in HEADS[2:]]
    own = task not in ("coco", "ade20k") or (field in OF_NETWORK and (task, head, backbone) not in PER_MODEL)
    return BOOK if found and own else found


def show(task: str, head: str, backbone: str, settings: Iterable[str] = (), pretrained: str | None = None) -> str:
    """Return the values of a recipe that its head uses, one line per field: name, value, source.

    The arguments are those of `get`. Raises ValueError for a head that does not fit the task.
    """
    if head not in HEADS_OF[task]:
        raise ValueError(f"{head} is not for {task}; valid: {', '.join(HEADS_OF[task])}")
    settings = list(settings)
    recipe, changed = get(task, head, backbone, settings, pretrained), parse_settings(DenseRecipe, settings)
    found = {field: source(task, head, backbone, field) for field in SOURCES}
    sources = {field: "your setting" if field in changed else where for field, where in found.items() if where}
    return list_values(f"{task} for {head}:{backbone}, starting from {pretrained or 'new weights'}", recipe, sources)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.dense.recipes", description=__doc__)
    commands = parser.add_subparsers(required=True)
    shows = commands.add_parser("show", help="print a recipe and the source of each value")
    shows.add_argument("task", choices=HEADS_OF)
    shows.add_argument("--head", required=True, choices=HEADS)
    shows.add_argument("--backbone", required=True, help="such as convnext_tiny")
    shows.add_argument("--pretrained", metavar="WEIGHTS", help="the backbone's: in22k has settings of its own")
    shows.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the recipe")
    args = parser.parse_args(argv)
    try:
        print(show(args.task, args.head, args.backbone, args.set, args.pretrained))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
