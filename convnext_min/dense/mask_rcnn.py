"""Mask R-CNN (He et al., 2017) from torchvision's parts, with the settings of the paper's MMDetection (Table 3).

Details that stay torchvision's: the box losses are smooth L1 (beta 1/9), not L1; RoIAlign reads 2x2 points per bin
without `aligned`, not an adaptive number of points; the best anchor of an object matches it at any IoU, not from 0.3;
anchors lie at the size of the image over that of the level, rounded down, which can be less than the level's stride;
and PyTorch's initial weights in the heads' last layers.
"""

from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from convnext_min.dense.features import ConvNeXtFeatures, with_fpn

STRIDES = (4, 8, 16, 32, 64)  # of P2..P6
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class Float32RPNHead(RPNHead):
    """torchvision's head of the proposals with float32 outputs, also under autocast: boxes are decoded from them."""

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([level.float() for level in values] for values in super().forward(levels))


def mask_rcnn(
    features: ConvNeXtFeatures,
    num_classes: int,
    *,
    channels: int = 256,
    hidden: int = 1024,
    anchor_scale: float = 8.0,
    proposals: int = 1000,
    rois: int = 512,
    detections: int = 100,
    min_size: tuple[int, ...] = (800,),
    max_size: int = 1333,
) -> MaskRCNN:
    """Build Mask R-CNN for `num_classes` classes of objects, labelled from 1; 0 is the background.

    The model takes a list of images (3, H, W) in 0..1 and, in training, a list of targets with boxes (n, 4), labels
    (n,) and masks (n, H, W), and returns a dict of losses; in eval mode a list of dicts with boxes, labels, scores
    and masks (n, 1, H, W) in 0..1. It normalizes the images and scales their shorter side to one of `min_size`, the
    last one in eval mode, with the longer side at most `max_size`.

    The pyramid and the convolutions of the heads have `channels` channels, the box head's linear layers `hidden`.
    Anchors on the level of stride s have an area of (`anchor_scale` s)^2. In training the heads get `proposals` boxes
    per image and sample `rois` of them; in eval mode at most `detections` objects per image are kept.
    """
    model = MaskRCNN(
        with_fpn(features, channels),
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((round(anchor_scale * stride),) for stride in STRIDES), (ASPECT_RATIOS,) * len(STRIDES)
        ),
        rpn_head=Float32RPNHead(channels, len(ASPECT_RATIOS)),
        rpn_post_nms_top_n_train=proposals,
        box_head=TwoMLPHead(channels * 7 * 7, hidden),
        box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
        box_batch_size_per_image=rois,
        box_detections_per_img=detections,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
    )
    model.num_classes = num_classes
    return model
