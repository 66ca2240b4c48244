"""Read images from the disk while a network trains: ImageNet, and everything else that does not fit into memory.

An augmented image depends on the seed, the epoch and the image's number alone. So there is no loader state to save, and
a resumed run, or a run with another number of workers or processes, sees the same images.
"""

import io
import itertools
import os
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from convnext_min.data.batches import check_split, split_batch
from convnext_min.data.files import DECODE_ERRORS
from convnext_min.data.imagenette import WNIDS
from convnext_min.data.seeding import seeded
from convnext_min.recipes import Recipe

CHUNK = 32  # images per message from a worker, so that a large batch need not fit into every worker
TRIES = 100  # unreadable images in a row after which the disk must be at fault


# ---- Sources of images


class Source(Protocol):
    """Encoded images with labels, addressed by number."""

    classes: tuple[str, ...]  # readable names; labels index them

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""

    def name(self, index: int) -> str:
        """Return the place of an image, for messages."""


class StringArray:
    """Millions of strings in two arrays, which worker processes share; a list would be copied into each of them."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self.letters = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.letters[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes())


class Folder:
    """All images below root/<class>/, in the order of their paths.

    Raises FileNotFoundError for a missing folder, no class folders, or a class without images.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root).expanduser().resolve()
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} not found; expected images in {self.root}/<class>/")
        folders = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != ".")
        if not folders:
            loose = sum(name.lower().endswith(IMG_EXTENSIONS) for name in os.listdir(self.root))
            raise FileNotFoundError(
                f"{self.root} holds no class folders"
                + (f" but {loose:,} images: move each into the folder of its class" if loose else "")
            )
        paths, labels = [], []
        for label, folder in enumerate(folders):
            found = sorted(
                os.path.join(os.path.relpath(place, self.root), file)
                for place, _, files in os.walk(self.root / folder, followlinks=True)
                for file in files
                if file.lower().endswith(IMG_EXTENSIONS)
            )
            if not found:
                raise FileNotFoundError(f"class folder {self.root / folder} holds no image")
            paths += found
            labels += [label] * len(found)
        self.folders = tuple(folders)
        self.classes = tuple(WNIDS.get(folder, folder) for folder in folders)
        self.labels, self.paths = np.array(labels), StringArray(paths)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.paths[index])

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        return Path(self.name(index)).read_bytes(), int(self.labels[index])


class Shards:
    """The samples in tar files of WebDataset's format: <key>.jpg (.jpeg, .png, .webp) beside <key>.cls, its label.

    The tar files are those in root/train or root/val, or those in `root` with "train" or "val" in their names. Each is
    scanned once; then images are read by their offsets, in any order. (timm's reader streams the tars instead: the
    order then depends on the workers, and an evaluation by several processes can repeat or miss images.) The class
    names are the lines of root/classes.txt if that file exists, otherwise numbers.

    Raises FileNotFoundError if there is no tar file or no image, ValueError for an image without a label and for a
    truncated tar file.
    """

    def __init__(self, root: Path | str, split: str):
        self.root = Path(root).expanduser().resolve()
        tars = sorted((self.root / split).glob("*.tar")) or sorted(self.root.glob(f"*{split}*.tar"))
        if not tars:
            raise FileNotFoundError(f"no tar files of {split!r}: expected {self.root}/*{split}*.tar or {split}/*.tar")
        self.tars = tuple(map(str, tars))
        keys, places, labels = [], [], []
        for number, tar in enumerate(tqdm(self.tars, f"{split} shards", unit="tar", delay=2, disable=None)):
            images, classes = {}, {}
            try:
                with tarfile.open(tar, "r:") as file:
                    for member in file:
                        folder, _, base = member.name.rpartition("/")
                        stem, _, kind = base.partition(".")
                        key = f"{folder}/{stem}" if folder else stem
                        if f".{kind.lower()}" in IMG_EXTENSIONS:
                            images[key] = (number, member.offset_data, member.size)
                        elif kind == "cls":
                            classes[key] = int(file.extractfile(member).read())
            except tarfile.TarError as error:
                raise ValueError(f"{tar} is cut off, or no tar file ({error}): fetch it again") from error
            if missing := images.keys() - classes.keys():
                raise ValueError(f"{tar} has {len(missing)} images without a .cls file, such as {min(missing)}")
            keys += images
            places += images.values()
            labels += [classes[key] for key in images]
        if not keys:
            raise FileNotFoundError(f"no images in the {len(tars)} tar files of {split!r} in {self.root}")
        self.keys, self.labels, self.places = StringArray(keys), np.array(labels), np.array(places, dtype=np.int64)
        names = self.root / "classes.txt"
        self.classes = tuple(names.read_text().split("\n") if names.exists() else map(str, range(max(labels) + 1)))
        self.classes = tuple(filter(None, self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the tar file and the key of an image."""
        return f"{self.tars[self.places[index, 0]]}: {self.keys[index]}"

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        tar, offset, size = self.places[index].tolist()
        with open(self.tars[tar], "rb") as file:
            file.seek(offset)
            return file.read(size), int(self.labels[index])


class HuggingFace:
    """A dataset of the Hugging Face hub, or a folder in its format.

    Raises ValueError if the package `datasets` is missing.
    """

    def __init__(self, dataset: str, split: str):
        try:
            split = {"val": "validation"}.get(split, split)
            self.reader = create_dataset(f"hfds/{dataset}", root=None, split=split).reader
        except ImportError as error:
            raise ValueError(f"hfds/{dataset} needs the package datasets: pip install datasets") from error
        self.dataset, self.classes = dataset, tuple(self.reader.class_to_idx)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """Return the dataset and the number of an image."""
        return f"{self.dataset} {index}"

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        file, label = self.reader[index]
        with file:
            return file.read(), label


class Subset:
    """The images of a source with the given numbers."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the place of an image."""
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        return self.source.read(int(self.indices[index]))


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
    return create_transform(resolution, crop_pct=recipe.eval_crop, crop_mode=crop_mode, interpolation="bicubic")


def decode(source: Source, index: int) -> tuple[Image.Image, int]:
    """Return image `index` of a source in RGB, and its label. Raises one of DECODE_ERRORS if it cannot be read."""
    content, label = source.read(index)
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB"), label


class ChunkDataset(Dataset):
    """The work of a worker: decode and transform the images with the given numbers.

    An item is (x float32 (n, 3, R, R), labels, names of the images that could not be read).
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], train: bool, seed: int, epoch: int):
        self.source, self.transform, self.train, self.key = source, transform, train, (seed, epoch)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        images, labels, damaged = [], [], []
        for index in map(int, indices):
            if (found := self._read(index, damaged)) is not None:
                with seeded(*self.key, index):
                    images.append(self.transform(found[0]))
                labels.append(found[1])
        return torch.stack(images) if images else torch.empty(0), labels, damaged

    def _read(self, index: int, damaged: list[str]) -> tuple[Image.Image, int] | None:
        """Return image `index`. If it cannot be read: in training a random other image, in evaluation None."""
        others = np.random.default_rng((*self.key, index))
        for _ in range(TRIES if self.train else 1):
            try:
                return decode(self.source, index)
            except DECODE_ERRORS:
                damaged.append(self.source.name(index))
                index = int(others.integers(len(self.source)))
        if self.train:
            raise OSError(f"{TRIES} images in a row cannot be read, the last one is {damaged[-1]}")
        return None


def _start_worker(number: int) -> None:
    # Ctrl-C and Slurm signal a whole process group. The main process then finishes its iteration and saves, for which
    # it needs its workers. So the workers get a group of their own; the main process ends them.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    warnings.filterwarnings("ignore", "Corrupt EXIF", UserWarning)  # frequent in ImageNet, and harmless here


def _prefetch(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the same batches, while a thread prepares the next one."""
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
            raise ValueError(f"a batch of {batch_size} is more than the {len(dataset)} images: set batch_size to less")
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
            ChunkDataset(self.dataset, to_tensor, self.train, self.seed, epoch),
            batch_size=None,  # an item is a whole chunk
            sampler=[chunk for share in shares for chunk in share],
            num_workers=self.workers,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # not the global one, from which the trainer draws
        )
        batches = self._join(iter(chunks), [len(share) for share in shares])
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
                tqdm.write(f"unreadable image {len(self.skipped)}, {outcome}: {name}")


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
