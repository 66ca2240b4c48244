"""Shuffled, augmented and normalized batches of an `ImageSet`."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from convnext_min.data.images import ImageSet

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue values in [0, 1]
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 images (N, 3, H, W) to float32, minus ImageNet's mean and divided by its standard deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


def check_split(batch: int, world_size: int) -> None:
    """Raise ValueError unless `world_size` processes can take equal shares of a batch."""
    if batch % world_size:
        raise ValueError(
            f"a batch of {batch} images cannot be divided among {world_size} processes: "
            f"set batch_size to a multiple of {world_size}"
        )


def split_batch(batch: int, rank: int, world_size: int) -> slice:
    """Return the slice of a batch that process `rank` takes; the slices of all processes cover the batch once."""
    return slice(batch * rank // world_size, batch * (rank + 1) // world_size)


class Batches:
    """Yield normalized batches (x float32 (B, 3, resolution, resolution), y int64 (B,)) of an `ImageSet`.

    In training, images are shuffled. Each is cropped at random (area from `scale`, as fractions of the image; aspect
    ratio from 3/4 to 4/3), resized with antialiasing, and flipped left to right with probability 1/2. The last batch is
    dropped if it is short, unless it is the only one. In evaluation, all images come whole and in order.

    Batch k of epoch i depends on `seed`, i and k alone, so there is no state to save. Process `rank` of `world_size`
    gets its share of each batch; together the shares equal the batch of a single process. `resolution` may be set
    between epochs. Raises ValueError for an empty set, a size below 1, or a training batch that cannot be shared
    equally.
    """

    erases = False  # random erasing is left to the trainer

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        resolution: int,
        train: bool,
        seed: int = 0,
        scale: tuple[float, float] = (0.35, 1.0),
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(image_set) == 0 or batch_size < 1 or resolution < 1:
            raise ValueError(
                "images, batch_size and resolution must be positive; "
                f"got {len(image_set)} images, batch_size={batch_size}, resolution={resolution}"
            )
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two increasing fractions in (0, 1], got {scale}")
        if train:
            check_split(min(batch_size, len(image_set)), world_size)
        self.image_set = image_set
        self.batch_size = batch_size
        self.resolution = resolution
        self.train = train
        self.seed = seed
        self.scale = scale
        self.rank, self.world_size = rank, world_size
        self.classes, self.source, self.images = image_set.classes, image_set.source, len(image_set)

    def __len__(self) -> int:
        if self.train:
            return max(1, len(self.image_set) // self.batch_size)
        return math.ceil(len(self.image_set) / self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from batch `start` on, the same ones as in a whole epoch."""
        order = np.arange(len(self.image_set))
        if self.train:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for k in range(start, len(self)):
            indices = torch.from_numpy(order[k * self.batch_size : (k + 1) * self.batch_size])
            share = split_batch(len(indices), self.rank, self.world_size)
            if self.train:
                images = self._augment(indices, share, np.random.default_rng((self.seed, epoch, 1 + k)))
            else:
                images = _resize(self.image_set.images[indices[share]], self.resolution)
            yield normalize(images), self.image_set.labels[indices[share]]

    def _augment(self, indices: Tensor, share: slice, rng: np.random.Generator) -> Tensor:
        """Return a random resized crop of each image of the share, half of them flipped: uint8 (B, 3, R, R).

        The random numbers are drawn for the whole batch in every process, which then works on its own share.
        """
        images = self.image_set.images
        boxes = random_crops(len(indices), images.shape[-1], self.scale, rng)
        flip = torch.from_numpy(rng.random(len(indices)) < 0.5)[share]
        out = images.new_empty(len(flip), 3, self.resolution, self.resolution)
        for i, (index, top, left, height, width) in enumerate(zip(indices[share], *(side[share] for side in boxes))):
            out[i] = _resize(images[index, None, :, top : top + height, left : left + width], self.resolution)[0]
        out[flip] = out[flip].flip(-1)
        return out


def random_crops(n: int, size: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw the tops, lefts, heights and widths, in pixels, of `n` random boxes in square images of side `size`.

    The area is uniform in `scale`. The logarithm of the aspect ratio is uniform in the part of (3/4, 4/3) in which a
    box of that area fits into the image. (torchvision's RandomResizedCrop draws both again if the box does not fit.)
    """
    area = rng.uniform(*scale, n)
    limit = np.minimum(np.log(4 / 3), np.log(1 / area))
    ratio = np.exp(rng.uniform(-limit, limit))
    heights, widths = (
        np.maximum(1, np.rint(size * side).astype(int)) for side in (np.sqrt(area / ratio), np.sqrt(area * ratio))
    )
    return rng.integers(size - heights, endpoint=True), rng.integers(size - widths, endpoint=True), heights, widths


def _resize(images: Tensor, resolution: int) -> Tensor:
    if len(images) == 0:  # a process without a share of the last batch
        return images.new_empty(0, 3, resolution, resolution)
    return interpolate(images, (resolution, resolution), mode="bilinear", antialias=True)
