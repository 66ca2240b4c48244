"""Cascade Mask R-CNN (Cai and Vasconcelos, 2019): three box heads, each trained on the boxes of the one before.

The configuration is Swin's, which the paper uses. A box head has four convolutions with BatchNorm and one linear layer.
It predicts a box per class, and is trained with the GIoU loss on decoded boxes. Each stage also has a mask head.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import boxes as box_ops
from torchvision.ops import generalized_box_iou_loss

from convnext_min.dense.features import ConvNeXtFeatures
from convnext_min.dense.mask_rcnn import mask_rcnn

IOUS = (0.5, 0.6, 0.7)  # of each stage: from this IoU with an object on, a box is a positive example
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # 1 / std of the offsets
LOSS_WEIGHTS = (1.0, 0.5, 0.25)  # of the stages
GIOU_WEIGHT = 10.0  # of the box loss, within a stage


class CascadeRoIHeads(nn.Module):
    """Several `RoIHeads` in a row, in place of one: features and proposals to detections or losses.

    In training each stage samples its boxes by its own threshold of the IoU, and passes them on after moving them. In
    eval mode scores and masks are means over the stages, and the boxes are those of the last stage. (The scores are
    means of probabilities; MMDetection averages the logits instead.)
    """

    def __init__(self, stages: list[RoIHeads]):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        losses = {}
        for number, (stage, weight) in enumerate(zip(self.stages, LOSS_WEIGHTS), 1):
            proposals, matches, labels, _ = stage.select_training_samples(proposals, targets)
            logits, offsets = _classify(stage, features, proposals, image_shapes)
            boxes = stage.box_coder.decode(offsets, proposals)  # (R, K, 4), a box per class
            values = _box_losses(logits, boxes, labels, matches, targets)
            values["mask"] = _mask_loss(stage, features, proposals, image_shapes, labels, matches, targets)
            losses |= {f"loss_{name}_{number}": weight * value for name, value in values.items()}
            drawn = [~_contains(target["boxes"], boxes) for target, boxes in zip(targets, proposals)]
            proposals = _refine(logits, boxes, proposals, image_shapes, torch.cat(labels))
            proposals = [boxes[kept] for boxes, kept in zip(proposals, drawn)]  # each stage adds the true boxes itself
            proposals = [boxes[box_ops.remove_small_boxes(boxes, 1e-2)] for boxes in proposals]
        return [], losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores = []
        for stage in self.stages:
            logits, offsets = _classify(stage, features, proposals, image_shapes)
            scores.append(logits.softmax(-1))
            if stage is not self.stages[-1]:
                boxes = stage.box_coder.decode(offsets, proposals)
                proposals = _refine(logits, boxes, proposals, image_shapes)
        mean = torch.stack(scores).mean(0).log()  # its softmax is the mean of the scores
        boxes, scores, labels = stage.postprocess_detections(mean, offsets, proposals, image_shapes)
        pooled = stage.mask_roi_pool(features, boxes, image_shapes)
        masks = [maskrcnn_inference(one.mask_predictor(one.mask_head(pooled)), labels) for one in self.stages]
        return [
            {"boxes": box, "labels": label, "scores": score, "masks": torch.stack(mask).mean(0)}
            for box, label, score, *mask in zip(boxes, labels, scores, *masks)
        ]


def _contains(boxes: Tensor, others: Tensor) -> Tensor:
    """Return for each of the `others` (n, 4) whether it is one of `boxes` (m, 4): (n,), bool."""
    return (others[:, None] == boxes).all(-1).any(1)


def _classify(
    stage: RoIHeads, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Return logits (R, K) and box offsets (R, 4 K) of one stage for all proposals; class 0 is the background."""
    pooled = stage.box_roi_pool(features, proposals, image_shapes)  # (R, C, 7, 7)
    logits, offsets = stage.box_predictor(stage.box_head(pooled))
    return logits.float(), offsets.float()


def _box_losses(
    logits: Tensor, boxes: Tensor, labels: list[Tensor], matches: list[Tensor], targets: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the cross-entropy of all boxes and the GIoU loss of the positive ones, both divided by their number."""
    right = torch.cat([target["boxes"][match[label > 0]] for target, match, label in zip(targets, matches, labels)])
    labels = torch.cat(labels)
    positive = labels > 0
    giou = generalized_box_iou_loss(boxes[positive, labels[positive]], right, reduction="sum")
    return {
        "classifier": nn.functional.cross_entropy(logits, labels),
        "box": GIOU_WEIGHT * giou / len(labels),
    }


def _mask_loss(
    stage: RoIHeads,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
    labels: list[Tensor],
    matches: list[Tensor],
    targets: list[dict[str, Tensor]],
) -> Tensor:
    """Return the mean binary cross-entropy of the masks of the positive boxes."""
    proposals, matches = ([v[label > 0] for v, label in zip(values, labels)] for values in (proposals, matches))
    pooled = stage.mask_roi_pool(features, proposals, image_shapes)  # (P, C, 14, 14)
    masks = stage.mask_predictor(stage.mask_head(pooled)).float()  # (P, K, 28, 28)
    return maskrcnn_loss(masks, proposals, [t["masks"] for t in targets], [t["labels"] for t in targets], matches)


def _refine(
    logits: Tensor,
    boxes: Tensor,
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
    labels: Tensor | None = None,
) -> list[Tensor]:
    """Return the proposals of the next stage: each proposal's decoded box for its class, clipped to the image.

    With `labels`, in training, the class of a positive box is its true class. In all other cases it is the class with
    the highest logit, the background excluded.
    """
    classes = logits[:, 1:].argmax(1) + 1
    if labels is not None:
        classes = torch.where(labels > 0, labels, classes)
    chosen = boxes[torch.arange(len(boxes), device=boxes.device), classes].detach()
    parts = chosen.split([len(boxes) for boxes in proposals])
    return [box_ops.clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes)]


def cascade_mask_rcnn(
    features: ConvNeXtFeatures, num_classes: int, *, channels: int = 256, hidden: int = 1024, **settings
) -> MaskRCNN:
    """Build Cascade Mask R-CNN, with the arguments, inputs and outputs of `mask_rcnn`."""
    model = mask_rcnn(features, num_classes, channels=channels, hidden=hidden, proposals=2000, **settings)
    one = model.roi_heads
    model.roi_heads = CascadeRoIHeads(
        [
            RoIHeads(
                one.box_roi_pool,
                FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], nn.BatchNorm2d),
                FastRCNNPredictor(hidden, num_classes + 1),
                iou,
                iou,
                one.fg_bg_sampler.batch_size_per_image,
                one.fg_bg_sampler.positive_fraction,
                weights,
                one.score_thresh,
                one.nms_thresh,
                one.detections_per_img,
                one.mask_roi_pool,
                MaskRCNNHeads(channels, (channels,) * 4, 1),
                MaskRCNNPredictor(channels, channels, num_classes + 1),
            )
            for iou, weights in zip(IOUS, BOX_WEIGHTS)
        ]
    )
    return model
