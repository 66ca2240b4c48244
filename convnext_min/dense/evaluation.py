"""Metrics of detection and segmentation: COCO's average precision, and the mean IoU of the classes."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.detection import MeanAveragePrecision
from torchvision.transforms.v2.functional import resize
from tqdm.auto import tqdm

from convnext_min.data.disk import start_worker
from convnext_min.dense.batches import collate, plain
from convnext_min.dense.datasets import DenseDataset, Target
from convnext_min.dense.recipes import DenseRecipe
from convnext_min.dense.upernet import IGNORED, Segmenter
from convnext_min.train import distributed


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, recipe: DenseRecipe) -> Target:
    """Return the predictions of a network in eval mode for an image (3, H, W) in 0..1, in the image's own pixels.

    A detector gives boxes (n, 4), labels (n,), scores (n,) and masks bool (n, H, W). A segmentation network gives
    labels (H, W), the classes with the highest mean probability over the recipe's `test_scales` and, with `test_flip`,
    over the image and its mirror image.
    """
    if not isinstance(model, Segmenter):
        (found,) = model([image])
        return found | {"masks": found["masks"][:, 0] > 0.5}
    height, width = image.shape[1:]
    total = 0.0
    for scale in recipe.test_scales:
        factor = scale * min(recipe.min_size[-1] / min(height, width), recipe.max_size / max(height, width))
        sized = resize(image, [max(1, round(height * factor)), max(1, round(width * factor))], antialias=True)
        for flip in (False, True)[: 1 + recipe.test_flip]:
            logits = segment(model, sized.flip(-1) if flip else sized, recipe.window)
            logits = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)  # (1, K, H, W)
            total = total + (logits.flip(-1) if flip else logits).softmax(1)
    return {"labels": total[0].argmax(0)}


def segment(model: nn.Module, image: Tensor, window: int = 0) -> Tensor:
    """Return the logits (classes, H, W) of a segmentation network for an image (3, H, W).

    With `window`, the network sees squares of that side, or as much of the image as there is. They lie a step of two
    thirds of their side apart, the last ones at the edges, and where they overlap, their logits are averaged.
    """
    height, width = image.shape[1:]
    window = window or max(height, width)
    total = count = None
    for y in starts(height, window):
        for x in starts(width, window):
            part = (..., slice(y, y + window), slice(x, x + window))
            (logits,) = model([image[part]])
            if total is None:
                total, count = logits.new_zeros(len(logits), height, width), logits.new_zeros(height, width)
            total[part] += logits
            count[part] += 1
    return total / count


def starts(length: int, window: int) -> list[int]:
    """Return where windows begin along a side of `length` pixels, so that they cover it."""
    last = max(length - window, 0)
    return [*range(0, last, window * 2 // 3), last]


class Scores:
    """The metrics of a data set: call `update` for each image, then `compute`, which also sums over processes."""

    def __init__(self, dataset: DenseDataset):
        self.instances, self.classes = dataset.instances, dataset.classes
        if self.instances:
            kinds = ("bbox", "segm")
            self.metric = MeanAveragePrecision(iou_type=kinds, backend="pycocotools", sync_on_compute=False)
        else:
            number = max(2, len(self.classes))  # torchmetrics refuses one class
            self.metric = MulticlassConfusionMatrix(number, ignore_index=IGNORED)

    def update(self, found: Target, target: Target) -> None:
        """Count one image, given its predictions (see `predict`) and its target."""
        found, target = ({key: value.cpu() for key, value in values.items()} for values in (found, target))
        if self.instances:
            self.metric.update([found], [target | {"masks": target["masks"].bool()}])
        else:
            self.metric.update(found["labels"][None], target["labels"][None])

    def compute(self) -> dict[str, float]:
        """Return the values in 0..1: means over the classes.

        Average precision leaves out a class without objects, mIoU one that neither occurs nor is predicted.
        """
        if self.instances:  # torchmetrics gathers image by image: processes with fewer images would hang
            for name, mine in self.metric.metric_state.items():
                setattr(self.metric, name, list(chain.from_iterable(distributed.all_gather_object(mine))))
        values = self.metric.compute()
        if self.instances:
            names = {"mask_ap": "segm_map", "mask_ap50": "segm_map_50", "box_ap": "bbox_map", "box_ap50": "bbox_map_50"}
            return {name: max(0.0, values[key].item()) for name, key in names.items()}
        both, either = values.diag(), values.sum(0) + values.sum(1) - values.diag()
        return {"miou": (both / either)[either > 0].mean().item()}


def evaluate(
    model: nn.Module, dataset: DenseDataset, recipe: DenseRecipe, workers: int = 0, limit: int | None = None
) -> dict[str, float]:
    """Return the scores of `model` on the first `limit` images of `dataset`, or all; each process takes its share."""
    device, was_training, scores = next(model.parameters()).device, model.training, Scores(dataset)
    model.eval()
    mine = range(distributed.rank(), min(limit or len(dataset), len(dataset)), distributed.world_size())
    loader = DataLoader(Subset(dataset, mine), num_workers=workers, collate_fn=collate, worker_init_fn=start_worker)
    silent = distributed.rank() > 0
    for (image,), (target,) in tqdm(loader, "evaluating", leave=False, delay=2, disable=silent or None):
        image, target = plain(image, target)
        scores.update(predict(model, image.to(device), recipe), target)
    model.train(was_training)
    return scores.compute()
