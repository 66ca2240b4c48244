"""Images for small experiments: Imagenette, folders of images, and an offline sample drawn by code.

A set of images is held in memory as one uint8 tensor (`ImageSet`); `Batches` crops, flips and normalizes it.
"""

from convnext_min.extras import require

require(__name__, "train")

import colorsys
import functools
import math
import os
import socket
import tarfile
import tempfile
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.datasets import Imagenette
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue in [0, 1], and their standard deviations
STD = (0.229, 0.224, 0.225)
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for damaged files

WNIDS = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


@dataclass(frozen=True)
class ImageSet:
    """Labelled square images in memory; `source` says in one line what they are and belongs to every result."""

    images: Tensor  # uint8 (N, 3, S, S)
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]  # readable names; labels index them
    source: str
    skipped: tuple[Path, ...] = ()  # files that could not be decoded

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | Tensor | slice) -> "ImageSet":
        """The images at `indices`, with the same classes."""
        images, labels = self.images[indices], self.labels[indices]
        return replace(self, images=images, labels=labels, source=f"{self.source}, {len(labels):,} of them")


def hold_out(image_set: ImageSet) -> tuple[ImageSet, ImageSet]:
    """A training set without every tenth image of each class, and those: what settings are chosen by, so that the
    validation images stay unseen until the end."""
    held_out = torch.zeros(len(image_set), dtype=torch.bool)
    for label in range(len(image_set.classes)):
        held_out[(image_set.labels == label).nonzero()[::10]] = True
    return image_set.subset(~held_out), image_set.subset(held_out)


def part(image_set: ImageSet, fraction: float) -> ImageSet:
    """`fraction` of the images of each class, at least one, always the same ones; smaller parts are in larger ones."""
    if fraction == 1:
        return image_set
    order = torch.randperm(len(image_set), generator=torch.Generator().manual_seed(0))
    kept = []
    for label in range(len(image_set.classes)):
        of_class = order[image_set.labels[order] == label]
        kept.append(of_class[: max(1, round(fraction * len(of_class)))])
    return image_set.subset(torch.cat(kept).sort().values)


# ---- Where the images come from


def imagenette(split: str, root: Path | str | None = None, size: int = 160) -> ImageSet:
    """Imagenette's "train" (9,469 images) or "val" (3,925), resized and cropped to `size` x `size`.

    Takes the first of: `root`; the folder that IMAGENETTE_DIR names; the cache, ~/.cache/convnext_min; a download
    into the cache. Where there is no network it says so and returns `offline_sample`. A folder holds
    train/<class>/*.JPEG and val/<class>/*.JPEG, and may be other data than Imagenette's. Prints once what is used.

    Raises FileNotFoundError if `root` or IMAGENETTE_DIR names something else, OSError for a download that breaks off,
    ValueError for a wrong `split`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if root is not None:
        folder, origin = _checked(Path(root), "the given path"), "the given path"
    elif os.environ.get("IMAGENETTE_DIR"):
        folder, origin = _checked(Path(os.environ["IMAGENETTE_DIR"]), "IMAGENETTE_DIR"), "IMAGENETTE_DIR"
    else:
        folder, origin = _downloaded("160px" if size <= 160 else "320px"), "the cache"
    if folder is None:
        return offline_sample(split, size)
    _say(f"Data: {folder.name} from {origin}")
    return image_folder(folder / split, size)


def image_folder(root: Path | str, size: int = 160) -> ImageSet:
    """All images of root/<class>/, in the order of their paths: shorter side resized to `size`, centre cropped.

    Any format and mode that PIL reads becomes RGB. A broken file is named in a warning and left out. Raises
    FileNotFoundError for a class without images.
    """
    folders, paths, labels = list_images(root)
    pixels = np.empty((len(paths), size, size, 3), np.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # PIL decodes outside of the interpreter's lock
        decoded = pool.map(functools.partial(decode, size=size), paths)
        broken = []
        for index, image in enumerate(tqdm(decoded, "decoding", len(paths), unit="image", delay=1)):
            if image is None:
                broken.append(index)
            else:
                pixels[index] = image  # NumPy copies at once; PyTorch would take the cores from those that decode
    images = torch.from_numpy(pixels)
    if broken:
        names = ", ".join(str(paths[index]) for index in broken[:5]) + (", ..." if len(broken) > 5 else "")
        warnings.warn(f"skipped {len(broken)} of {len(paths)} files that cannot be decoded: {names}", stacklevel=2)
        whole = torch.ones(len(paths), dtype=torch.bool)
        whole[broken] = False
        images, labels = images[whole], labels[whole]
        _refuse_empty(folders, labels)
    source = f"{folders[0].parents[1].name}/{folders[0].parent.name}: {len(labels):,} images at {size}x{size}"
    classes = tuple(WNIDS.get(folder.name, folder.name) for folder in folders)
    return ImageSet(images.permute(0, 3, 1, 2), labels, classes, source, tuple(paths[index] for index in broken))


def list_images(root: Path | str) -> tuple[list[Path], list[Path], Tensor]:
    """The class folders in `root`, all their image files, and the files' labels, without opening a file.

    Raises FileNotFoundError if `root` has no class folders or a class has no image.
    """
    root = Path(root).expanduser().resolve()
    folders = sorted(folder for folder in root.glob("[!.]*") if folder.is_dir())
    if not folders:
        raise FileNotFoundError(f"{root} holds no class folders; expected {root}/<class>/*.JPEG")
    files = [sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS) for folder in folders]
    labels = torch.repeat_interleave(torch.tensor([len(of_class) for of_class in files]))
    _refuse_empty(folders, labels)
    return folders, [file for of_class in files for file in of_class], labels


def _refuse_empty(folders: list[Path], labels: Tensor) -> None:
    for folder, count in zip(folders, torch.bincount(labels, minlength=len(folders)).tolist()):
        if count == 0:
            raise FileNotFoundError(f"class folder {folder} holds no readable image ({', '.join(IMG_EXTENSIONS)})")


def decode(path: Path, size: int) -> np.ndarray | None:
    """The image at `path` as RGB pixels uint8 (size, size, 3), cropped at the centre; None for a broken file."""
    try:
        with Image.open(path) as image:
            image.draft(None, (size, size))  # JPEG only: decode at the smallest scale that is no smaller than that
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except BROKEN:
        return None
    return np.array(square)


def _checked(root: Path, origin: str) -> Path:
    """The folder in or at `root` that holds train/ and val/, with the same classes in both."""
    root = root.expanduser()
    for folder in (root, *(root / Path(url).stem for url, _ in Imagenette._ARCHIVES.values())):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            only_one = {f.name for f in list_images(folder / "train")[0]} ^ {
                f.name for f in list_images(folder / "val")[0]
            }
            if only_one:
                raise FileNotFoundError(
                    f"train/ and val/ in {folder} must have the same classes; in one only: {only_one}"
                )
            return folder.resolve()
    missing = (
        " and ".join(split for split in ("train/", "val/") if not (root / split).is_dir()) if root.is_dir() else root
    )
    raise FileNotFoundError(
        f"{missing} not found in {origin}, {root}; expected {root}/train/<class>/*.JPEG and {root}/val/<class>/*.JPEG"
    )


@functools.cache  # so that one process never mixes images of Imagenette and drawn ones
def _downloaded(px: str) -> Path | None:
    """The cached folder of Imagenette at "160px" or "320px", downloaded if it is not there; None without network."""
    url = Imagenette._ARCHIVES[px][0]
    cache = Path.home() / ".cache" / "convnext_min"
    folder = cache / Path(url).stem
    if folder.is_dir():
        return folder
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # seconds without an answer
    try:
        try:
            urllib.request.urlopen(url).close()
        except OSError as error:
            _say(
                f"Data: no network ({error}), so an offline sample of drawn images stands in for Imagenette; "
                "set IMAGENETTE_DIR to use the real images"
            )
            return None
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:  # a broken download leaves nothing behind
            try:
                Imagenette(partial, "train", px, download=True)
            except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # cut off, or not what was expected
                raise OSError(
                    f"the download of {url} broke off ({error}); run it again, or set IMAGENETTE_DIR"
                ) from error
            try:
                (Path(partial) / folder.name).rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    finally:
        socket.setdefaulttimeout(timeout)
    return folder


@functools.cache
def _say(line: str) -> None:
    """Print `line`, once in a process."""
    print(line, flush=True)


# ---- Batches


def normalize(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) to float32, with ImageNet's mean and standard deviation brought to 0 and 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


class Batches:
    """Normalized batches (x float32 (B, 3, resolution, resolution), y int64 (B,)) of an `ImageSet`.

    In training: shuffled; a random part of the image, its area drawn from `scale` (fractions of the whole) and its
    aspect ratio from 3/4 to 4/3, resized with antialiasing; flipped left to right half of the time. The last short
    batch is dropped, unless it is the only one. In evaluation: whole images in order, every one.

    Batch k of epoch i depends on `seed`, i and k alone. `resolution` may be set between epochs. Process `rank` of
    `world` gets its part of each batch, an equal one in training: all parts together are the batch of one process.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        resolution: int,
        train: bool,
        seed: int = 0,
        scale: tuple[float, float] = (0.35, 1.0),
        rank: int = 0,
        world: int = 1,
    ):
        if len(image_set) == 0 or batch_size < 1 or resolution < 1:
            raise ValueError(
                "images, batch_size and resolution must be positive; "
                f"got {len(image_set)} images, batch_size={batch_size}, resolution={resolution}"
            )
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two increasing fractions in (0, 1], got {scale}")
        if train and (batch := min(batch_size, len(image_set))) % world:
            raise ValueError(f"a batch of {batch} images cannot be divided among {world} processes")
        self.image_set = image_set
        self.batch_size = batch_size
        self.resolution = resolution
        self.train = train
        self.seed = seed
        self.scale = scale
        self.rank, self.world = rank, world
        self.classes, self.source, self.images = image_set.classes, image_set.source, len(image_set)

    def __len__(self) -> int:
        if self.train:
            return max(1, len(self.image_set) // self.batch_size)
        return math.ceil(len(self.image_set) / self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch `start` on, the same as if those before had been drawn."""
        order = np.arange(len(self.image_set))
        if self.train:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for k in range(start, len(self)):
            indices = torch.from_numpy(order[k * self.batch_size : (k + 1) * self.batch_size])
            n = len(indices)
            part = slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)
            if self.train:
                images = self._augmented(indices, part, np.random.default_rng((self.seed, epoch, 1 + k)))
            else:
                images = _resized(self.image_set.images[indices[part]], self.resolution)
            yield normalize(images), self.image_set.labels[indices[part]]

    def _augmented(self, indices: Tensor, part: slice, rng: np.random.Generator) -> Tensor:
        """A random resized crop of each image, every second flipped: uint8 (B, 3, resolution, resolution).

        What is drawn for the whole batch is the same in every process; each does the work for its own part.
        """
        images = self.image_set.images
        boxes = random_crops(len(indices), images.shape[-1], self.scale, rng)
        flip = torch.from_numpy(rng.random(len(indices)) < 0.5)[part]
        out = images.new_empty(len(flip), 3, self.resolution, self.resolution)
        for i, (index, top, left, height, width) in enumerate(zip(indices[part], *(side[part] for side in boxes))):
            out[i] = _resized(images[index, None, :, top : top + height, left : left + width], self.resolution)[0]
        out[flip] = out[flip].flip(-1)
        return out


def random_crops(n: int, size: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Tops, lefts, heights and widths, in pixels, of `n` random boxes in square images of side `size`.

    The area is uniform in `scale`, the logarithm of the aspect ratio uniform in that part of (3/4, 4/3) with which
    a box of that area fits. (torchvision's RandomResizedCrop draws both again if the box does not fit.)
    """
    area = rng.uniform(*scale, n)
    limit = np.minimum(np.log(4 / 3), np.log(1 / area))
    ratio = np.exp(rng.uniform(-limit, limit))
    heights, widths = (
        np.maximum(1, np.rint(size * side).astype(int)) for side in (np.sqrt(area / ratio), np.sqrt(area * ratio))
    )
    return rng.integers(size - heights, endpoint=True), rng.integers(size - widths, endpoint=True), heights, widths


def _resized(images: Tensor, resolution: int) -> Tensor:
    if len(images) == 0:  # a process without a part of the last batch
        return images.new_empty(0, 3, resolution, resolution)
    return interpolate(images, (resolution, resolution), mode="bilinear", antialias=True)


# ---- The offline sample


def offline_sample(split: str, size: int = 64, number: int | None = None) -> ImageSet:
    """Drawn images of ten classes, five shapes and five textures, the same on every call.

    Place, scale, angle (by 30 degrees), colours, background, clutter and noise are random. `number` is 2,000 for
    "train" and 500 for "val" unless given; fewer are the first of them. Classes take turns, so that every slice is
    balanced.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    number = number or {"train": 2000, "val": 500}[split]
    images = torch.empty(number, size, size, 3, dtype=torch.uint8)
    for index in tqdm(range(number), "drawing", unit="image", delay=2):
        rng = np.random.default_rng((split == "val", index))
        images[index] = torch.from_numpy(_draw(PATTERNS[index % len(PATTERNS)], size, rng))
    labels = torch.arange(number) % len(PATTERNS)
    source = f"offline sample, {split}: {number:,} drawn images at {size}x{size}"
    return ImageSet(images.permute(0, 3, 1, 2), labels, PATTERNS, source)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v, math.sqrt(3) / 2 * np.abs(u) - v / 2) - 0.5


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    turn = np.abs(np.arctan2(v, u) % (math.tau / 5) - math.pi / 5)  # 0 at a notch, pi / 5 at a point
    radius = np.hypot(u, v)
    return 0.834 * (radius * np.cos(turn) - 0.42) - 0.552 * radius * np.sin(turn)  # the line from a notch to a point


def _dots(u: np.ndarray, v: np.ndarray, waves: float) -> np.ndarray:
    cell = 1.5 * math.pi / waves
    return np.hypot(u % cell - cell / 2, v % cell - cell / 2) - 0.33 * cell


# The distance, negative inside, of points (u, v) to the edge of an object of radius 1 around (0, 0). Textures have
# about `waves` / 3 periods across it.
SHAPES = {
    "circle": lambda u, v: np.hypot(u, v) - 0.9,
    "triangle": _triangle,
    "star": _star,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.2,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.75 - np.hypot(u - 0.5, v)),
}
TEXTURES = {
    "stripes": lambda u, v, waves: np.sin(waves * u) / waves,
    "checkerboard": lambda u, v, waves: np.sin(waves * u) * np.sin(waves * v) / waves,
    "dots": _dots,
    "spiral": lambda u, v, waves: np.sin(waves * np.hypot(u, v) + np.arctan2(v, u)) / waves,
    "waves": lambda u, v, waves: np.sin(waves * (v + 0.3 * np.sin(5 * u))) / waves,
}
PATTERNS = (*SHAPES, *TEXTURES)


def _draw(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of a shape or texture, uint8 (size, size, 3)."""
    uniform = rng.uniform
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = axis[None, :], axis[:, None]

    def turned(cx: float, cy: float, most: float = math.pi) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates around (cx, cy), turned by a random angle of at most `most` to either side."""
        cos, sin = math.cos(angle := uniform(-most, most)), math.sin(angle)
        return cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)

    def color(value: float, saturation: tuple[float, float]) -> np.ndarray:
        """A random hue."""
        return np.array(colorsys.hsv_to_rgb(uniform(0, 1), uniform(*saturation), value), np.float32)

    def paint(distance: np.ndarray, ink: np.ndarray) -> None:
        """Put `ink` where `distance`, in half widths of the picture, is negative; one pixel of soft edge."""
        nonlocal picture
        cover = np.clip(0.5 - distance * (size / 2), 0, 1)[..., None]
        picture = picture + cover * (ink - picture)

    # Background: one colour, with a soft pattern of light and shade
    value = uniform(0, 0.4)
    light = sum(uniform(0, 0.08) * np.sin(uniform(1, 6) * turned(0, 0)[0] + uniform(0, math.tau)) for _ in range(3))
    picture = color(0.15 + 0.8 * value, (0.1, 0.7)) * (1 + light[..., None])

    # Clutter: small bars and ellipses
    for _ in range(rng.integers(1, 5)):
        u, v = turned(uniform(-1, 1), uniform(-1, 1))
        a, b = uniform(0.05, 0.2), uniform(0.02, 0.1)
        bar = np.maximum(np.abs(u) - a, np.abs(v) - b)
        ellipse = (np.hypot(u / a, v / b) - 1) * min(a, b)
        paint(bar if uniform(0, 1) < 0.5 else ellipse, color(uniform(0.1, 1), (0.1, 0.8)))

    # The object, lighter than the background
    radius = uniform(0.5, 0.85) if name in SHAPES else uniform(0.7, 0.95)
    u, v = (
        axis / radius for axis in turned(uniform(radius - 1, 1 - radius), uniform(radius - 1, 1 - radius), math.pi / 6)
    )
    if name in SHAPES:
        distance = SHAPES[name](u, v)
    else:  # a patch of the texture, of a form between a disc and a square
        power = uniform(2, 8)
        patch = (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power) - 1
        distance = np.maximum(TEXTURES[name](u, v, uniform(6, 11)), patch)
    ink = color(0.15 + 0.8 * (value + uniform(0.4, 0.6)), (0.2, 0.9))
    paint(distance * radius, ink * (1 + 0.15 * u[..., None]))

    picture = picture + uniform(0, 0.05) * rng.standard_normal(picture.shape, np.float32)
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8)
