"""Check the exercises of the chapters on detection and segmentation, as `exercises` does for the others."""

import torch
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms

from convnext_min.book.exercises import expect, solved
from convnext_min.convnext import ConvNeXt
from convnext_min.dense.features import ConvNeXtFeatures
from convnext_min.dense.upernet import UPerHead
from convnext_min.measure import count_parameters

# 14 Object detection


def _boxes(generator: torch.Generator, number: int) -> torch.Tensor:
    """Return random boxes (number, 4) with sides of at least 5 pixels."""
    corners = 60 * torch.rand(number, 2, generator=generator)
    return torch.cat([corners, corners + 5 + 30 * torch.rand(number, 2, generator=generator)], 1)


def check_decode(answer) -> None:
    """Check exercise 14.1: boxes from anchors and offsets, against torchvision's coder."""
    generator = torch.Generator().manual_seed(0)
    boxes, offsets = _boxes(generator, 6), torch.randn(6, 4, generator=generator)
    right = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(offsets, boxes)
    expect(answer(boxes, torch.zeros(6, 4)), boxes, "decode(boxes, zeros)", 1e-5)
    expect(answer(boxes, offsets), right, "decode(boxes, offsets)", 1e-5)
    solved("offsets of zero leave a box where it is")


def check_nms(answer) -> None:
    """Check exercise 14.2: non-maximum suppression, against torchvision's."""
    generator = torch.Generator().manual_seed(1)
    for number, threshold in ((1, 0.5), (30, 0.3), (30, 0.7), (60, 0.5)):
        boxes, scores = _boxes(generator, number), torch.rand(number, generator=generator)
        kept, asked = answer(boxes, scores, threshold), f"nms of {number} boxes at {threshold}"
        right = nms(boxes, scores, threshold).tolist()
        expect(None if kept is None else [int(i) for i in kept], right, asked, reveal=False)
    solved("the best box first, and none that overlaps a better one")


def check_average_precision(answer) -> None:
    """Check exercise 14.3: average precision of detections, best score first, against COCO's evaluation."""
    for correct, objects in (  # recalls that are no hundredths: whether one is reached is then no matter of rounding
        ((True,), 1),
        ((False, True), 1),
        ((True, False, True, True), 7),
        ((False, False), 3),
        ((True, True, False, True, False, False, True), 6),
    ):
        asked = f"average_precision({list(correct)}, {objects})"
        expect(answer(list(correct), objects), _coco_ap(correct, objects), asked, 1e-6, reveal=False)
    solved("the mean, over 101 recalls, of the largest precision at that recall or a higher one")


def _coco_ap(correct: tuple[bool, ...], objects: int) -> float:
    """Return COCO's AP at IoU 0.5 for detections that hit an object each, or none."""
    places = iter(range(objects))
    hits = [next(places) if right else objects + i for i, right in enumerate(correct)]

    from torchmetrics.detection import MeanAveragePrecision  # in the extra "dense", unlike the rest

    def squares(places):
        return torch.tensor([[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in places])

    metric = MeanAveragePrecision(iou_thresholds=[0.5], backend="pycocotools")
    scores = torch.linspace(0.9, 0.1, len(correct))
    metric.update(
        [{"boxes": squares(hits), "scores": scores, "labels": torch.ones(len(hits), dtype=torch.int64)}],
        [{"boxes": squares(range(objects)), "labels": torch.ones(objects, dtype=torch.int64)}],
    )
    return metric.compute()["map"].item()


# 15 Semantic segmentation


def check_mean_iou(answer) -> None:
    """Check exercise 15.1: mean IoU from a confusion matrix with true classes in rows."""
    for matrix, right in (
        ([[3, 1], [2, 4]], (3 / 6 + 4 / 7) / 2),
        ([[5, 0, 0], [0, 0, 0], [1, 0, 2]], (5 / 6 + 2 / 3) / 2),  # the class in the middle does not occur
        ([[5, 0, 2], [0, 0, 0], [1, 1, 2]], (5 / 8 + 0 / 1 + 2 / 6) / 3),  # but it is predicted here
    ):
        got = answer(torch.tensor(matrix))
        expect(None if got is None else float(got), right, f"mean_iou({matrix})", 1e-6, reveal=False)
    solved("a class that neither occurs nor is predicted does not count")


def check_pool_to_grid(answer) -> None:
    """Check exercise 15.2: adaptive average pooling of one channel, against PyTorch's."""
    for height, width, bins in ((6, 6, 3), (7, 7, 3), (8, 10, 6), (5, 8, 1)):
        x = torch.arange(float(height * width)).view(height, width) ** 1.5
        right = F.adaptive_avg_pool2d(x[None], bins)[0]
        expect(answer(x, bins), right, f"pool_to_grid of {height}×{width} to {bins}×{bins}", 1e-5)
    solved("fields overlap where the side is not a multiple of n")


def check_upernet_parameters(answer) -> None:
    """Check exercise 15.3: parameters of UperNet's head by arithmetic."""
    for dims, channels, classes in (
        ((8, 16, 32, 64), 16, 3),
        ((40, 80, 160, 320), 96, 11),
        ((96, 192, 384, 768), 512, 150),
    ):
        with torch.device("meta"):
            features = ConvNeXtFeatures(ConvNeXt(depths=(1, 1, 1, 1), dims=dims))
            right = count_parameters(UPerHead(features, classes, channels))
        expect(answer(dims, channels, classes), right, f"parameters of {dims}, {channels}, {classes}", reveal=False)
    solved("most of them in two 3×3 convolutions")
