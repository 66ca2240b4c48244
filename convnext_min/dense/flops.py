"""Cost of detection and segmentation networks, next to Tables 3, 4 and 7: `python -m convnext_min.dense.flops`.

The paper's "FLOPs" are multiply-accumulates, counted here as for the road: convolutions and linear layers, on
PyTorch's meta device. Detectors are counted with 1000 boxes per box head and 100 per mask head, the largest numbers in
evaluation. The counters of MMDetection and MMSegmentation add 2 operations per value of a BatchNorm and 1 per value of
a ReLU or a pooling layer, but none for ConvNeXt's LayerNorm and GELU. So does the last part, and with it every sum
rounds to the paper's figure.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_min import convnext
from convnext_min.dense.cascade import cascade_mask_rcnn
from convnext_min.dense.features import ConvNeXtFeatures
from convnext_min.dense.mask_rcnn import mask_rcnn
from convnext_min.dense.upernet import upernet
from convnext_min.measure import count_parameters
from convnext_min.roadmap import STEPS, build

PROPOSALS, DETECTIONS = 1000, 100  # boxes per box head and per mask head
COCO_CLASSES, ADE20K_CLASSES = 80, 150


class Published(NamedTuple):
    """A row of Table 3 or 4 for a network of this package: GMACs for an image (width, height), million parameters."""

    head: str
    variant: str
    size: tuple[int, int]
    gmacs: float
    params: float | None  # only in Table 4


TABLES = (
    Published("mask_rcnn", "tiny", (1280, 800), 262, None),
    Published("cascade_mask_rcnn", "resnet50", (1280, 800), 739, None),
    Published("cascade_mask_rcnn", "tiny", (1280, 800), 741, None),
    Published("cascade_mask_rcnn", "small", (1280, 800), 827, None),
    Published("cascade_mask_rcnn", "base", (1280, 800), 964, None),
    Published("cascade_mask_rcnn", "large", (1280, 800), 1354, None),
    Published("cascade_mask_rcnn", "xlarge", (1280, 800), 1898, None),
    Published("upernet", "tiny", (2048, 512), 939, 60),
    Published("upernet", "small", (2048, 512), 1027, 82),
    Published("upernet", "base", (2048, 512), 1170, 122),
    Published("upernet", "base", (2560, 640), 1828, 122),
    Published("upernet", "large", (2560, 640), 2458, 235),
    Published("upernet", "xlarge", (2560, 640), 3335, 391),
)


def _per_value(operations: int) -> Callable[..., int]:
    """Return a formula for `FlopCounterMode`, which counts 2 for a multiply-accumulate."""

    def formula(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * operations * math.prod(shape)

    return formula


ATEN = torch.ops.aten
EXTRA_OPERATIONS = {
    ATEN._native_batch_norm_legit_no_training: _per_value(2),
    ATEN.relu: _per_value(1),
    ATEN.relu_: _per_value(1),
    ATEN.max_pool2d_with_indices: _per_value(1),
    ATEN._adaptive_avg_pool2d: _per_value(1),
    ATEN.mean: _per_value(1),  # adaptive average pooling to one position
}
EXTRAS = "BatchNorm, ReLU and pooling"


def macs(function: Callable, *inputs: object, extras: bool = False) -> int:
    """Return the multiply-accumulates of `function(*inputs)` in convolutions and matrix products.

    With `extras`, operations of BatchNorm, ReLU and pooling are added.
    """
    counter = FlopCounterMode(display=False, custom_mapping=EXTRA_OPERATIONS if extras else None)
    with torch.no_grad(), counter:
        function(*inputs)
    return counter.get_total_flops() // 2


def _by_part(calls: dict[str, list[tuple]]) -> dict[str, int]:
    """Return the multiply-accumulates of each part, the sum over its calls (function, input), and `EXTRAS`."""
    parts, everything = (
        {name: sum(macs(*call, extras=extras) for call in own) for name, own in calls.items()}
        for extras in (False, True)
    )
    return parts | {EXTRAS: sum(everything.values()) - sum(parts.values())}


def detector_macs(model: nn.Module, width: int, height: int) -> dict[str, int]:
    """Return the multiply-accumulates of each part of a detector for one image, with a fixed number of boxes."""
    body, fpn = model.backbone
    image = torch.empty(1, 3, height, width, device="meta")
    levels = body(image)
    pyramid = list(fpn(levels).values())
    channels = model.backbone.out_channels
    boxes, masks = (torch.empty(n, channels, s, s, device="meta") for n, s in ((PROPOSALS, 7), (DETECTIONS, 14)))
    stages = getattr(model.roi_heads, "stages", [model.roi_heads])  # a cascade has several
    return _by_part(
        {
            "backbone": [(body, image)],
            "pyramid": [(fpn, levels)],
            "proposals": [(model.rpn.head, pyramid)],
            "boxes": [(nn.Sequential(one.box_head, one.box_predictor), boxes) for one in stages],
            "masks": [(nn.Sequential(one.mask_head, one.mask_predictor), masks) for one in stages],
        }
    )


def remove_background(model: nn.Module) -> None:
    """Remove, in place, the box and the mask of the background: torchvision's heads have them, MMDetection's do not."""
    for stage in getattr(model.roi_heads, "stages", [model.roi_heads]):
        boxes, masks = stage.box_predictor.bbox_pred, stage.mask_predictor.mask_fcn_logits
        stage.box_predictor.bbox_pred = nn.Linear(boxes.in_features, boxes.out_features - 4)
        stage.mask_predictor.mask_fcn_logits = nn.Conv2d(masks.in_channels, masks.out_channels - 1, 1)


def segmenter_macs(model: nn.Module, width: int, height: int) -> dict[str, int]:
    """Return the multiply-accumulates of each part of a segmentation network for one image, in evaluation."""
    image = torch.empty(1, 3, height, width, device="meta")
    levels = list(model.features(image).values())
    return _by_part({"backbone": [(model.features, image)], "decoder": [(model.head, levels)]})


def cost(head: str, variant: str, width: int, height: int) -> tuple[dict[str, int], int]:
    """Return the multiply-accumulates of each part of a network of the paper, with `EXTRAS`, and its parameters.

    `variant` is a size of ConvNeXt, as in convnext_<variant>, or a step of the road.
    """
    with torch.device("meta"):
        features = ConvNeXtFeatures(build(variant) if variant in STEPS else vars(convnext)[f"convnext_{variant}"]())
        if head == "upernet":
            model = upernet(features, ADE20K_CLASSES).eval()
            return segmenter_macs(model, width, height), count_parameters(model)
        detector = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade_mask_rcnn}[head]
        model = detector(features, COCO_CLASSES).eval()
        remove_background(model)
        return detector_macs(model, width, height), count_parameters(model)


def main(argv: list[str] | None = None) -> None:
    """Print the cost of the paper's networks, part by part, next to the paper's numbers."""
    argparse.ArgumentParser(prog="python -m convnext_min.dense.flops", description=__doc__).parse_args(argv)
    print(f"{'network':<26} {'image':>9} {'GMACs':>7} {'paper':>6} {'params M':>9} {'paper':>6}  parts")
    for row in TABLES:
        parts, params = cost(row.head, row.variant, *row.size)
        gmacs = sum(parts.values()) / 1e9
        shown = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items())
        print(
            f"{row.head + ' ' + row.variant:<26} {row.size[0]:>4}x{row.size[1]:<4} {gmacs:>7.1f} {row.gmacs:>6} "
            f"{params / 1e6:>9.1f} {row.params or '':>6}  {shown}"
        )


if __name__ == "__main__":
    main()
