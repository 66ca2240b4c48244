"""A labelled set of images in memory, its subsets, and the interface through which a trainer reads any data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Data(Protocol):
    """Interface of the trainer to the batches of a data set; `Batches` and `disk.Loader` are two implementations."""

    classes: tuple[str, ...]  # readable names; labels index them
    source: str  # one line that describes the images
    images: int  # number of images
    batch_size: int  # images per batch of all processes together
    resolution: int  # of the batches, in pixels; may be set between epochs
    erases: bool  # True if random erasing is already applied to the images

    def __len__(self) -> int:
        """Return the number of batches per epoch."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x float32 (B, 3, R, R), y int64 (B,)) of this process, from batch `start` of the epoch on."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled square images in memory; `source` describes them in one line, which is part of every result."""

    images: Tensor  # uint8 (N, 3, S, S)
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]  # readable names; labels index them
    source: str
    skipped: tuple[Path, ...] = ()  # files that could not be decoded

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | Tensor | slice) -> "ImageSet":
        """Return the images at `indices`, with the same classes."""
        images, labels = self.images[indices], self.labels[indices]
        return replace(self, images=images, labels=labels, source=f"{self.source}, {len(labels):,} of them")


def hold_out(image_set: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return (training set, held-out set); the held-out set is every tenth image of each class.

    Settings are chosen on the held-out images, so that the validation images stay unseen until the end.
    """
    held_out = torch.zeros(len(image_set), dtype=torch.bool)
    for label in range(len(image_set.classes)):
        held_out[(image_set.labels == label).nonzero()[::10]] = True
    return image_set.subset(~held_out), image_set.subset(held_out)


def subsample(image_set: ImageSet, fraction: float) -> ImageSet:
    """Return `fraction` of the images of each class, at least one image per class.

    The choice is the same on every call, and a smaller subsample is contained in a larger one.
    """
    if fraction == 1:
        return image_set
    order = torch.randperm(len(image_set), generator=torch.Generator().manual_seed(0))
    kept = []
    for label in range(len(image_set.classes)):
        of_class = order[image_set.labels[order] == label]
        kept.append(of_class[: max(1, round(fraction * len(of_class)))])
    return image_set.subset(torch.cat(kept).sort().values)


def select_classes(image_set: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Return the images of `classes`, labelled by their place in `classes`.

    Raises ValueError for a class that `image_set` does not have.
    """
    if unknown := set(classes) - set(image_set.classes):
        raise ValueError(f"no class {', '.join(sorted(unknown))}; there are {', '.join(image_set.classes)}")
    place = torch.tensor([classes.index(name) if name in classes else -1 for name in image_set.classes])
    labels = place[image_set.labels]
    chosen = image_set.subset(labels >= 0)
    return replace(chosen, labels=labels[labels >= 0], classes=tuple(classes))
