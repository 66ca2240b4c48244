"""Batches of images with annotations: random sizes, crops and flips, drawn anew in each epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from convnext_min.data import seeded
from convnext_min.data.batches import check_split, split_batch
from convnext_min.data.disk import start_worker
from convnext_min.dense.datasets import DenseDataset, Target
from convnext_min.dense.recipes import DenseRecipe
from convnext_min.dense.upernet import IGNORED

DETR_SIZES, DETR_CROP = (400, 500, 600), (384, 600)  # shorter sides before the crop; range of its sides


class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's random brightness, contrast, saturation and hue, without its permutation of the colour channels."""

    def make_params(self, flat_inputs: list) -> dict:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def augment_instances(image: Tensor, target: Target, recipe: DenseRecipe) -> tuple[Tensor, Target]:
    """Flip an image at random, and with `resize_and_crop` crop half of the images, as in DETR.

    Objects without area after the crop are left out. The model resizes the image.
    """
    flips = [v2.RandomHorizontalFlip()] + [v2.RandomVerticalFlip()] * recipe.vertical_flip
    image, target = v2.Compose(flips)(image, target)
    if recipe.resize_and_crop and torch.rand(()) < 0.5:
        image, target = v2.RandomShortestSize(DETR_SIZES, recipe.max_size)(image, target)
        image, target = random_crop(image, target)
    image, target = plain(image, target)
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    kept = (sides >= 1).all(1) & target["masks"].bool().flatten(1).any(1)
    return image, {key: value[kept] for key, value in target.items()}


def random_crop(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Crop to a random rectangle with sides from `DETR_CROP`, or the image's where that is smaller."""
    sizes = [int(torch.randint(min(DETR_CROP[0], side), min(DETR_CROP[1], side) + 1, ())) for side in image.shape[-2:]]
    corner = [int(torch.randint(0, side - size + 1, ())) for side, size in zip(image.shape[-2:], sizes)]
    spatial = (tv_tensors.BoundingBoxes, tv_tensors.Mask)
    cropped = {
        key: v2.functional.crop(value, *corner, *sizes) if isinstance(value, spatial) else value
        for key, value in target.items()
    }
    return v2.functional.crop(image, *corner, *sizes), cropped


def augment_semantic(image: Tensor, target: Target, recipe: DenseRecipe) -> tuple[Tensor, Target]:
    """Resize at random, crop a square, flip and change the colours, as MMSegmentation does for ADE20K.

    An image smaller than the crop is padded with black, and the loss ignores the padding. With the recipe's
    `photometric` "torchvision", the hue changes half as much, and the colour channels of some images are permuted.
    (MMSegmentation also rejects crops that are mostly of one class, and adds to the brightness where this multiplies.)
    """
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    as_torchvision = recipe.photometric == "torchvision"
    transform = v2.Compose(
        [
            v2.RandomShortestSize(recipe.min_size[:-1] or recipe.min_size, recipe.max_size),
            v2.RandomCrop(recipe.crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort() if as_torchvision else PhotometricDistort(hue=(-0.1, 0.1)),
        ]
    )
    return plain(*transform(image, target))


def plain(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Convert an image and a target from `DenseDataset` to a network's input: float32 in 0..1, and plain tensors."""
    return image.as_subclass(Tensor).float() / 255, {key: value.as_subclass(Tensor) for key, value in target.items()}


class _Epoch(Dataset):
    """The augmented images of one epoch; an image's augmentation depends only on seed, epoch and its number."""

    def __init__(self, dataset: DenseDataset, recipe: DenseRecipe, seed: int, epoch: int):
        self.dataset, self.recipe, self.key = dataset, recipe, (seed, epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        augment = augment_instances if self.dataset.instances else augment_semantic
        with seeded(*self.key, index):
            return augment(*self.dataset[index], self.recipe)


def collate(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Return the images and the targets of a batch as lists: they may differ in size."""
    images, targets = zip(*items)
    return list(images), list(targets)


class DenseBatches:
    """Training batches for the trainer: (list of images (3, H, W) in 0..1, list of targets), shuffled in each epoch.

    Batch k of epoch i depends only on `seed`, i and k; process `rank` of `world_size` gets its share of it. A last
    batch that is not full is dropped. `workers` processes read the images.
    """

    erases = True  # nothing is left for the trainer to erase

    def __init__(
        self,
        dataset: DenseDataset,
        recipe: DenseRecipe,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ):
        if len(dataset) < recipe.batch_size:
            raise ValueError(f"batch_size={recipe.batch_size} is larger than the data set ({dataset.source})")
        check_split(recipe.batch_size, world_size)
        self.dataset, self.recipe, self.seed, self.workers = dataset, recipe, seed, workers
        self.share = split_batch(recipe.batch_size, rank, world_size)
        self.classes, self.source, self.images = dataset.classes, dataset.source, len(dataset)
        self.batch_size, self.resolution = recipe.batch_size, recipe.min_size[-1]

    def __len__(self) -> int:
        return self.images // self.batch_size

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[list[Tensor], list[Target]]]:
        """Yield the batches of one epoch from batch `start` on, the same as if the earlier ones had been drawn."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        batches = [order[k * self.batch_size : (k + 1) * self.batch_size][self.share] for k in range(start, len(self))]
        images = _Epoch(self.dataset, self.recipe, self.seed, epoch)
        yield from DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # not the global one, from which the trainer draws
        )
