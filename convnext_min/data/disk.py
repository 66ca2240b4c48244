"""ImageNet, and whatever is too large for memory: images read from the disk as they are needed, by worker processes.

What a training image looks like depends on the seed, the epoch and its number alone. A run that is resumed, has other
workers or is spread over other processes sees the same images.

`python -m convnext_min.data.disk check DIR` looks through a folder of images before hours are spent on it.
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from convnext_min.data import BROKEN, WNIDS
from convnext_min.recipes import Recipe

IMAGENET_1K = {"train": 1_281_167, "val": 50_000}  # images
CHUNK = 32  # images that a worker hands over at a time: large batches need not fit into every worker
TRIES = 100  # images in a row that cannot be read before it is not the images' fault


# ---- Where the images come from: each source has `classes`, `len()`, `read(i)`, the file's bytes and label, `name(i)`


class Names:
    """Millions of strings in two arrays, which worker processes share; a list would be copied into each of them."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.letters = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.letters[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes())


class Folder:
    """All images below root/<class>/, in the order of their paths. Raises FileNotFoundError where there are none."""

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
        self.labels, self.paths = np.array(labels), Names(paths)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def read(self, index: int) -> tuple[bytes, int]:
        return Path(self.name(index)).read_bytes(), int(self.labels[index])


class Shards:
    """The samples in tar files as WebDataset writes them: <key>.jpg (.jpeg, .png, .webp) beside <key>.cls, its label.

    The tars are all in root/train or root/val, or those in `root` whose names contain "train" or "val". Each is looked
    through once; then images are read from their places, in any order. (timm's reader streams them: what comes next
    then depends on the workers, and an evaluation by several processes can repeat or miss images.) Classes have the
    names in root/classes.txt, one a line, if there is such a file, otherwise numbers. Raises FileNotFoundError if there
    is no tar or no image, ValueError for an image without label and for a tar that is cut off.
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
        self.keys, self.labels, self.places = Names(keys), np.array(labels), np.array(places, dtype=np.int64)
        names = self.root / "classes.txt"
        self.classes = tuple(names.read_text().split("\n") if names.exists() else map(str, range(max(labels) + 1)))
        self.classes = tuple(filter(None, self.classes))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.tars[self.places[index, 0]]}: {self.keys[index]}"

    def read(self, index: int) -> tuple[bytes, int]:
        tar, offset, size = self.places[index].tolist()
        with open(self.tars[tar], "rb") as file:
            file.seek(offset)
            return file.read(size), int(self.labels[index])


class HuggingFace:
    """A dataset of the Hugging Face hub, or a folder in its format. Raises ValueError if `datasets` is missing."""

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
        return f"{self.dataset} {index}"

    def read(self, index: int) -> tuple[bytes, int]:
        file, label = self.reader[index]
        with file:
            return file.read(), label


class Part:
    """The images of a source with the given numbers."""

    def __init__(self, source: Folder | Shards | HuggingFace, indices: np.ndarray):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        return self.source.read(int(self.indices[index]))


Source = Folder | Shards | HuggingFace | Part


def open_source(source: Path | str, split: str) -> Source:
    """The images of `split`, "train" or "val": of a folder with train/<class>/ and val/<class>/, of tar shards
    (wds/<folder>) or of a Hugging Face dataset (hfds/<name>). Raises FileNotFoundError or ValueError, naming it."""
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
    """The image with so many bits of each channel. At its largest strength timm keeps none, which gives a black image;
    newer versions of Pillow refuse to."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def transform(recipe: Recipe, train: bool, resolution: int) -> Callable[[Image.Image], Tensor]:
    """From an image to a normalized tensor (3, resolution, resolution), by timm, as the released code does.

    In training: a random part of the image, flipped half of the time, RandAugment, random erasing with noise. In
    evaluation: the central crop of the image; with eval_crop=1 the whole of it, squeezed into a square.
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


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, what Python's, NumPy's and PyTorch's generators draw follows from `key`; then they go on as before."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def decode(source: Source, index: int) -> tuple[Image.Image, int]:
    """Image `index` of a source in RGB, and its label. Raises one of BROKEN if it cannot be read."""
    content, label = source.read(index)
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB"), label


class Samples(Dataset):
    """What the workers do: from numbers of images to x (n, 3, R, R), labels and the names of those that are broken."""

    def __init__(self, source: Source, transform: Callable[[Image.Image], Tensor], train: bool, seed: int, epoch: int):
        self.source, self.transform, self.train, self.key = source, transform, train, (seed, epoch)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[str]]:
        images, labels, broken = [], [], []
        for index in map(int, indices):
            if (found := self._readable(index, broken)) is not None:
                with seeded(*self.key, index):
                    images.append(self.transform(found[0]))
                labels.append(found[1])
        return torch.stack(images) if images else torch.empty(0), labels, broken

    def _readable(self, index: int, broken: list[str]) -> tuple[Image.Image, int] | None:
        """Image `index`; if it is broken, in training another that its number decides, in evaluation None."""
        others = np.random.default_rng((*self.key, index))
        for _ in range(TRIES if self.train else 1):
            try:
                return decode(self.source, index)
            except BROKEN:
                broken.append(self.source.name(index))
                index = int(others.integers(len(self.source)))
        if self.train:
            raise OSError(f"{TRIES} images in a row cannot be read, the last of them {broken[-1]}")
        return None


def _begin_worker(number: int) -> None:
    # Ctrl-C, and Slurm, signal a whole process group. The process in charge then finishes its step and saves, for which
    # it needs its workers, so they get a group of their own; it ends them itself.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    warnings.filterwarnings("ignore", "Corrupt EXIF", UserWarning)  # of no use here, and frequent in ImageNet


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same, the next one made ready in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


class Loader:
    """Batches like those of `data.Batches`, read from the disk; `loader` makes one.

    `batch_size` counts the images of all processes, and so does `len()`: each yields its own part of every batch. In
    training, images that cannot be read are replaced by others, in evaluation left out. Each is named once, and kept in
    `skipped`. `resolution` may be set between epochs.
    """

    erases = True  # random erasing is done here, image by image

    def __init__(
        self,
        source: Source,
        description: str,
        recipe: Recipe,
        train: bool,
        seed: int,
        rank: int,
        world: int,
        workers: int,
        batch_size: int,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank must be at least 0 and below the number of processes, got {rank} of {world}")
        if train and batch_size % world:
            raise ValueError(f"{world} processes cannot share a batch of {batch_size}: set batch_size to a multiple")
        if train and batch_size > len(source):
            raise ValueError(f"a batch of {batch_size} is more than the {len(source)} images: set batch_size to less")
        self._source, self.source, self.classes, self.images = source, description, source.classes, len(source)
        self.recipe, self.train, self.seed, self.batch_size = recipe, train, seed, batch_size
        self.rank, self.world, self.workers = rank, world, workers
        self.resolution = recipe.resolution if train else recipe.eval_resolution
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return self.images // self.batch_size if self.train else -(-self.images // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batches of an epoch, from batch `start` on: x float32 (n, 3, R, R), y int64 (n,).

        In training n is batch_size / world. In evaluation all parts together are every image once, but for those that
        cannot be read; they differ in size, and may be empty, so that all processes count the same batches.
        """
        order = np.arange(self.images)
        if self.train:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        parts = []
        for k in range(start, len(self)):
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            n = len(batch)
            part = batch[n * self.rank // self.world : n * (self.rank + 1) // self.world]
            parts.append([part[i : i + CHUNK] for i in range(0, len(part), CHUNK)])
        samples = Samples(
            self._source, transform(self.recipe, self.train, self.resolution), self.train, self.seed, epoch
        )
        chunks = DataLoader(
            samples,
            batch_size=None,  # `samples` takes a list of numbers
            sampler=[chunk for part in parts for chunk in part],
            num_workers=self.workers,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # not the global one, from which the training step draws
        )
        batches = self._joined(iter(chunks), [len(part) for part in parts])
        return _ahead(batches) if self.workers else batches

    def _joined(self, chunks: Iterator[tuple[Tensor, list[int], list[str]]], counts: list[int]) -> Iterator[Any]:
        for count in counts:
            images, labels = [torch.empty(0, 3, self.resolution, self.resolution)], []
            for x, y, broken in itertools.islice(chunks, count):
                images += [x] if len(x) else []
                labels += y
                self._report(broken)
            x, y = torch.cat(images), torch.tensor(labels, dtype=torch.int64)
            yield (x.pin_memory(), y.pin_memory()) if torch.cuda.is_available() else (x, y)

    def _report(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.skipped:
                self.skipped.append(name)
                fate = "another takes its place" if self.train else "left out"
                tqdm.write(f"image {len(self.skipped)} that cannot be read, {fate}: {name}")


def loader(
    source: Path | str,
    split: str,
    recipe: Recipe,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    batch_size: int | None = None,
    holdout: bool = False,
) -> Loader:
    """Batches of `split` of a source (see `open_source`) for process `rank` of `world`.

    With `holdout`, "val" is every tenth of the training images and "train" the others: to choose settings by, and for
    ImageNet-22K, which has no validation images.

    `batch_size`, of all processes together, is the recipe's in training and 64 for each process in evaluation, if not
    given; `workers` of this process are the CPU cores divided by the processes on this machine, at most 16. Raises
    FileNotFoundError for a source that is not there, ValueError for a batch that does not fit processes or data.
    """
    images = open_source(source, "train" if holdout else split)
    place = Path(source).name if isinstance(images, Folder) else source
    if holdout:
        numbers = np.arange(len(images))
        images = Part(images, numbers[(numbers % 10 == 0) == (split == "val")])
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    part = f"{split}, held out of train" if holdout else split
    description = f"{place}/{part}: {len(images):,} images read from the disk"
    batch_size = batch_size or (recipe.batch_size if train else 64 * world)
    return Loader(images, description, recipe, train, seed, rank, world, workers, batch_size)


# ---- Before the hours are spent


class Problems(Dataset):
    """What is wrong with each image of a folder, or None."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> str | None:
        try:
            decode(self.folder, index)
        except BROKEN as error:
            return f"{self.folder.name(index)}: {str(error) or type(error).__name__}"
        return None


def check(root: Path | str, workers: int = 2, quick: bool = False) -> list[str]:
    """What is wrong with the folder `root` of images in train/<class>/ and val/<class>/, a line each.

    That the classes of both are the same; if they are ImageNet-1K's, that there are as many classes and images as it
    has; and, unless `quick`, that every image can be read, by that many `workers`.
    """
    found, folders = [], {}
    for split in ("train", "val"):
        try:
            folders[split] = Folder(Path(root) / split)
        except FileNotFoundError as error:
            found.append(str(error))
    classes = {split: set(folder.folders) for split, folder in folders.items()}
    for split, other in (("train", "val"), ("val", "train")):
        if len(folders) == 2 and (only := sorted(classes[split] - classes[other])):
            found.append(f"{len(only)} classes are in {split}/ and not in {other}/: {', '.join(only[:5])}")
    wnids = set(ImageNetInfo("imagenet-1k").label_names())
    for split, folder in folders.items():
        if len(wnids & classes[split]) > len(wnids) / 2:
            if missing := sorted(wnids - classes[split]):
                found.append(f"{split}/ lacks {len(missing)} classes of ImageNet-1K: {', '.join(missing[:5])}")
            if len(folder) != IMAGENET_1K[split]:
                found.append(f"{split}/ has {len(folder):,} images; ImageNet-1K has {IMAGENET_1K[split]:,}")
    for split, folder in folders.items() if not quick else ():
        with tqdm(desc=f"reading {split}", total=len(folder), unit="image", disable=None) as bar:
            for problems in DataLoader(Problems(folder), batch_size=CHUNK, num_workers=workers, collate_fn=list):
                found += filter(None, problems)
                bar.update(len(problems))
    return found


def class_map(source: Sequence[str], target: Sequence[str]) -> list[int]:
    """For each class of `target` its number in `source`, both lists of WordNet ids such as n01440764.

    With it a network that knows the classes of ImageNet-22K answers with those of ImageNet-1K: logits[:, class_map].
    Raises ValueError if a class is missing from `source` or is there twice.
    """
    numbers = {name: number for number, name in enumerate(source)}
    if len(numbers) < len(source):
        raise ValueError(f"{len(source) - len(numbers)} classes are twice in the list of {len(source)}")
    if missing := [name for name in target if name not in numbers]:
        raise ValueError(f"{len(missing)} of {len(target)} classes are not in the list of {len(source)}: {missing[:5]}")
    return [numbers[name] for name in target]


def _class_list(path: str) -> list[str]:
    """The class folders in a folder, in order, or the lines of a text file."""
    place = Path(path)
    if place.is_dir():
        return sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    return place.read_text().split()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.data.disk", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="look through a folder with train/<class>/ and val/<class>/")
    checks.add_argument("folder")
    checks.add_argument("--workers", type=int, default=os.cpu_count())
    checks.add_argument("--quick", action="store_true", help="count, without opening the images")
    maps = commands.add_parser("class-map", help="write the number of each class of TARGET in SOURCE, a line each")
    maps.add_argument("source", help="a folder of class folders, or a file with a WordNet id a line: ImageNet-22K's")
    maps.add_argument("target", help="the same: ImageNet-1K's")
    maps.add_argument("output")
    args = parser.parse_args(argv)
    if args.command == "check" and args.workers < 0:
        parser.error(f"--workers must be 0 or more, got {args.workers}")
    try:
        if args.command == "class-map":
            numbers = class_map(_class_list(args.source), _class_list(args.target))
            Path(args.output).write_text("".join(f"{number}\n" for number in numbers))
            print(f"{args.output}: {len(numbers):,} classes")
            return
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    problems = check(args.folder, args.workers, args.quick)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(f"{len(problems)} problems in {args.folder}")
    print(f"{args.folder} is complete" + (", as far as counting tells" if args.quick else " and can be read"))


if __name__ == "__main__":
    main()
