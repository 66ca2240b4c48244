"""Read images from the disk while a network trains: ImageNet, and everything else that does not fit into memory.

An augmented image depends on the seed, the epoch and the image's number alone. So there is no loader state to save, and
a resumed run, or a run with another number of workers or processes, sees the same images.
"""

import io
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm.auto import tqdm

from convnext_min.data.batches import check_split, split_batch
from convnext_min.data.files import DECODE_ERRORS, read_image
from convnext_min.data.seeding import seeded
from convnext_min.data.shards import Shards
from convnext_min.data.sources import Folder, HuggingFace, Source, Subset
from convnext_min.environment import printable
from convnext_min.recipes import Recipe

CHUNK = 32  # images per message from a worker, so that a large batch need not fit into every worker
TRIES = 100  # unreadable images in a row after which the disk must be at fault


def open_source(source: Path | str, split: str) -> Source:
    """Return the images of `split`, "train" or "val", of a data set.

    `source` is a folder with train/<class>/ and val/<class>/, wds/<folder> for tar shards, or hfds/<name> for a Hugging
    Face dataset. Raises FileNotFoundError or ValueError, naming it.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    kind, _, rest = str(source).partition("/")
    if kind == "wds":
        return Shards(rest, split)
    if kind == "hfds":
        return HuggingFace(rest, split)
    return Folder(Path(source) / split)


# ---- From files to batches


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep `bits` bits per channel; at full strength timm asks for 0 bits (black), which Pillow now refuses."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def transform(recipe: Recipe, train: bool, resolution: int) -> Callable[[Image.Image], Tensor]:
    """Return the function from an image to a normalized tensor (3, resolution, resolution), built by timm.

    In training: a random resized crop, a flip with probability 1/2, RandAugment, random erasing with noise. In
    evaluation: the centre crop; with eval_crop=1 the whole image, squeezed into a square. The released code does the
    same.
    """
    from timm.data import create_transform  # slow to import

    if train:
        made = create_transform(
            resolution,
            is_training=True,
            scale=recipe.crop_scale,
            color_jitter=None,
            auto_augment=recipe.rand_augment or None,
            interpolation="bicubic",
            re_prob=recipe.erasing,
            re_mode="pixel",
        )
        for step in made.transforms:
            for operation in getattr(step, "ops", ()):  # of RandAugment
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        return made
    crop_mode = "squash" if recipe.eval_crop == 1 else "center"
    made = create_transform(resolution, crop_pct=recipe.eval_crop, crop_mode=crop_mode, interpolation="bicubic")
    if crop_mode == "center":
        made.transforms.insert(0, _shorten)
    return made


def _shorten(image: Image.Image) -> Image.Image:
    """Cut the ends off an image that is more than ten times as long as wide, which would be huge after resizing."""
    limit = 10 * min(image.size)
    if max(image.size) <= limit:
        return image
    width, height = (min(side, limit) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class ChunkDataset(Dataset):
    """Decoded and transformed images, in chunks of the given numbers, as a worker process produces them.

    An item is (x float32 (n, 3, R, R), labels, names of the images that could not be read).
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor],
        train: bool,
        seed: int,
        epoch: int,
        exif_orientation: bool = True,
    ):
        self.source, self.transform, self.train, self.key = source, transform, train, (seed, epoch)
        self.exif_orientation = exif_orientation

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        images, labels, damaged = [], [], []
        for index in map(int, indices):
            if (found := self._read(index, damaged)) is not None:
                with seeded(*self.key, index):
                    images.append(self.transform(found[0]))
                labels.append(found[1])
        x = torch.stack(images) if images else torch.empty(0)
        if get_worker_info():  # here rather than in the queue's thread, whose errors would be lost
            x.share_memory_()
        return x, labels, damaged

    def _read(self, index: int, damaged: list[str]) -> tuple[Image.Image, int] | None:
        """Return image `index`. If it cannot be read: in training a random other image, in evaluation None."""
        others = np.random.default_rng((*self.key, index))
        for _ in range(TRIES if self.train else 1):
            try:
                content, label = self.source.read(index)
                return read_image(io.BytesIO(content), self.exif_orientation), label
            except DECODE_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
                damaged.append(self.source.name(index))
                index = int(others.integers(len(self.source)))
        if self.train:
            raise OSError(f"{TRIES} images in a row cannot be read, the last one is {damaged[-1]} ({reason})")
        return None


def start_worker(number: int) -> None:
    """Put a worker process into its own process group, and silence a harmless warning."""
    # Ctrl-C and Slurm signal a whole process group. The main process then finishes its iteration and saves, for which
    # it needs its workers. So the workers get a group of their own; the main process ends them.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    # A batch system signals every process of a job, once. A second signal comes from the main process at its end.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if hasattr(signal, "SIGUSR1"):  # announces the end of a job's time
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    warnings.filterwarnings("ignore", "Corrupt EXIF", UserWarning)  # frequent in ImageNet, and harmless here


def _read_chunks(chunks: DataLoader) -> Iterator[Any]:
    """Yield the chunks. Raises OSError, with the remedy, if workers run out of shared memory; an error ends them."""
    try:
        yield from chunks
    except Exception as error:
        error.__traceback__ = None  # its frames would keep the workers alive, and the process waiting for them
        if not isinstance(error, RuntimeError) or "shared memory" not in str(error):
            raise error
        raise OSError(
            "worker processes pass images through shared memory, and /dev/shm is full: give the container more, as in "
            "docker run --shm-size=16g, or read without workers: --workers 0"
        ) from error


def _prefetch(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield from `batches` while a background thread prepares the next batch."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


class Loader:
    """Batches in the form of `data.Batches`, read from the disk by worker processes; built by `loader`.

    `batch_size` and `len()` count the images of all processes; each process yields its own share of every batch. Images
    that cannot be read are replaced by others in training and left out of evaluation. Each is named once, and listed in
    `skipped`. `resolution` may be set between epochs. Raises ValueError for a rank that does not exist and for a
    training batch that is larger than the data or cannot be shared equally.
    """

    erases = True  # the transform applies random erasing image by image

    def __init__(
        self,
        dataset: Source,
        description: str,
        recipe: Recipe,
        train: bool,
        seed: int,
        rank: int,
        world_size: int,
        workers: int,
        batch_size: int,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be at least 0 and below the number of processes, got {rank} of {world_size}")
        if train:
            check_split(batch_size, world_size)
        if train and batch_size > len(dataset):
            raise ValueError(f"batch_size={batch_size} is larger than the data set of {len(dataset)} images")
        self.dataset, self.source, self.classes, self.images = dataset, description, dataset.classes, len(dataset)
        self.recipe, self.train, self.seed, self.batch_size = recipe, train, seed, batch_size
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.resolution = recipe.resolution if train else recipe.eval_resolution
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return self.images // self.batch_size if self.train else -(-self.images // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share (x float32 (n, 3, R, R), y int64 (n,)) of each batch of an epoch, from `start` on.

        In training n is batch_size / world_size. In evaluation the shares of all processes hold each image once, except
        the unreadable ones. These shares differ in size and may be empty, so that all processes count the same batches.
        """
        order = np.arange(self.images)
        if self.train:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        shares = []
        for k in range(start, len(self)):
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            share = batch[split_batch(len(batch), self.rank, self.world_size)]
            shares.append([share[i : i + CHUNK] for i in range(0, len(share), CHUNK)])
        to_tensor = transform(self.recipe, self.train, self.resolution)
        chunks = DataLoader(
            ChunkDataset(self.dataset, to_tensor, self.train, self.seed, epoch, self.recipe.exif_orientation),
            batch_size=None,  # an item is a whole chunk
            sampler=[chunk for share in shares for chunk in share],
            num_workers=self.workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # not the global one, from which the trainer draws
        )
        batches = self._join(_read_chunks(chunks), [len(share) for share in shares])
        return _prefetch(batches) if self.workers else batches

    def _join(self, chunks: Iterator[tuple[Tensor, list[int], list[str]]], counts: list[int]) -> Iterator[Any]:
        """Yield batches, joined from the given counts of chunks."""
        for count in counts:
            images, labels = [torch.empty(0, 3, self.resolution, self.resolution)], []
            for x, y, damaged in itertools.islice(chunks, count):
                images += [x] if len(x) else []
                labels += y
                self._report(damaged)
            x, y = torch.cat(images), torch.tensor(labels, dtype=torch.int64)
            yield (x.pin_memory(), y.pin_memory()) if torch.cuda.is_available() else (x, y)

    def _report(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.skipped:
                self.skipped.append(name)
                outcome = "another takes its place" if self.train else "left out"
                tqdm.write(printable(f"unreadable image {len(self.skipped)}, {outcome}: {name}"))


def loader(
    source: Path | str,
    split: str,
    recipe: Recipe,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    batch_size: int | None = None,
    holdout: bool = False,
) -> Loader:
    """Return the batches of `split` of a source (see `open_source`) for process `rank` of `world_size`.

    With `holdout`, "val" is every tenth training image and "train" the others: to choose settings on, and for
    ImageNet-22K, which has no validation images.

    `batch_size` counts the images of all processes together; by default it is the recipe's in training and 64 per
    process in evaluation. `workers` are the reading processes of this process; by default the CPU cores divided by the
    processes on this machine, at most 16.

    Raises FileNotFoundError for a missing source, ValueError for a batch that does not fit the processes or the data.
    """
    images = open_source(source, "train" if holdout else split)
    if images.note and rank == 0:
        tqdm.write(printable(images.note))
    place = Path(source).name if isinstance(images, Folder) else source
    if holdout:
        numbers = np.arange(len(images))
        images = Subset(images, numbers[(numbers % 10 == 0) == (split == "val")])
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    part = f"{split}, held out of train" if holdout else split
    description = f"{place}/{part}: {len(images):,} images read from the disk"
    batch_size = batch_size or (recipe.batch_size if train else 64 * world_size)
    return Loader(images, description, recipe, train, seed, rank, world_size, workers, batch_size)
