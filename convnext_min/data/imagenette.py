"""Imagenette, or any folder of images, decoded into memory."""

import functools
import os
import socket
import tarfile
import tempfile
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from convnext_min.data import decoded
from convnext_min.data.files import class_folders, decode, find_images
from convnext_min.data.images import ImageSet
from convnext_min.data.synthetic import synthetic_images
from convnext_min.environment import data_cache, printable

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
ARCHIVES = {  # shorter side of the images: (address, MD5)
    160: ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    320: ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
}
EXTRACTED = ("imagenette2-160", "imagenette2-320", "imagenette2")  # folders in the archives that fast.ai offers


def imagenette(
    split: str,
    root: Path | str | None = None,
    size: int = 160,
    exif_orientation: bool = True,
    holdout: bool = False,
) -> ImageSet:
    """Return Imagenette's "train" (9,469 images) or "val" (3,925) split, resized and cropped to `size` x `size`.

    The images come from the first of these places: the folder `root`; the folder in the variable IMAGENETTE_DIR; the
    cache, ~/.cache/convnext_min; a download into the cache. Without network, `synthetic_images` are returned, and a
    line is printed. A folder has train/<class>/*.JPEG and val/<class>/*.JPEG, and may contain data other than
    Imagenette; with `holdout` it needs no val/. Images are turned upright by their EXIF orientation unless
    `exif_orientation` is false. The place is printed once.

    Raises FileNotFoundError if `root` or IMAGENETTE_DIR is not such a folder, OSError if a download breaks off,
    ValueError for an unknown `split` or a source that only `disk.loader` reads.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if str(root).startswith(("wds/", "hfds/")):
        raise ValueError(f"{root} is read from the disk, not into memory: choose a recipe with loader=disk")
    splits = ("train",) if holdout and split == "train" else ("train", "val")
    if root is not None:
        folder, origin = _find_splits(Path(root), "the given path", splits), "the given path"
    elif os.environ.get("IMAGENETTE_DIR"):
        folder, origin = _find_splits(Path(os.environ["IMAGENETTE_DIR"]), "IMAGENETTE_DIR", splits), "IMAGENETTE_DIR"
    else:
        folder, origin = _download(160 if size <= 160 else 320), "the cache"
    if folder is None:
        return synthetic_images(split, size)
    _print_once(f"Data: {folder.name} from {origin}")
    return image_folder(folder / split, size, exif_orientation)


def image_folder(root: Path | str, size: int = 160, exif_orientation: bool = True) -> ImageSet:
    """Decode all images in root/<class>/ (see `files.find_images`), in the order of their paths, to RGB.

    Each is turned upright by its EXIF orientation unless `exif_orientation` is false; then the shorter side is
    resized to `size` and the centre is cropped. A damaged file is left out and named in a warning; one line counts
    the files that are no images. Raises FileNotFoundError for a class without images.
    """
    files = find_images(root)
    if files.left_out:
        _print_once(files.note())
    paths, labels = [files.root / path for path in files.paths], torch.from_numpy(files.labels)
    pixels, damaged = _pixels(paths, size, exif_orientation)
    images = torch.from_numpy(pixels)
    if damaged:
        names = ", ".join(str(paths[index]) for index in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        warnings.warn(f"skipped {len(damaged)} of {len(paths)} files that cannot be decoded: {names}", stacklevel=2)
        whole = torch.ones(len(paths), dtype=torch.bool)
        whole[damaged] = False
        images, labels = images[whole], labels[whole]
        if missing := set(range(len(files.folders))) - set(labels.tolist()):
            raise FileNotFoundError(f"class folder {files.root / files.folders[min(missing)]} holds no readable image")
    source = f"{files.root.parent.name}/{files.root.name}: {len(labels):,} images at {size}x{size}"
    classes = tuple(WNIDS.get(folder, folder) for folder in files.folders)
    return ImageSet(images.permute(0, 3, 1, 2), labels, classes, source, tuple(paths[index] for index in damaged))


def _pixels(paths: list[Path], size: int, exif_orientation: bool) -> tuple[np.ndarray, list[int]]:
    """Return the images, uint8 (N, size, size, 3), from the cache or decoded, and the numbers of the damaged files."""
    shape = (len(paths), size, size, 3)
    cached = len(paths) >= decoded.SMALLEST
    key = decoded.cache_key(paths, size, exif_orientation) if cached else ""
    if cached and (kept := decoded.find(key, shape)) is not None:
        return kept, []
    pixels, damaged = np.empty(shape, np.uint8), []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow decodes without the interpreter's lock
        images = pool.map(functools.partial(decode, size=size, exif_orientation=exif_orientation), paths)
        for index, image in enumerate(tqdm(images, "decoding", len(paths), unit="image", delay=1)):
            if image is None:
                damaged.append(index)
            else:
                pixels[index] = image  # NumPy copies in one thread; PyTorch would take cores from the decoding threads
    if cached and not damaged and (line := decoded.keep(key, pixels)):
        _print_once(line)
    return pixels, damaged


def _find_splits(root: Path, origin: str, splits: tuple[str, ...]) -> Path:
    """Return `root`, or the extracted archive in it, if it holds a folder per split, with the same classes in each."""
    root = root.expanduser()
    for folder in (root, *(root / name for name in EXTRACTED)):
        if all((folder / split).is_dir() for split in splits):
            train, other = (set(class_folders(folder / split)) for split in (splits[0], splits[-1]))
            if only_one := train ^ other:
                raise FileNotFoundError(
                    f"train/ and val/ in {folder} must have the same classes; in one only: {only_one}"
                )
            return folder.resolve()
    missing = " and ".join(f"{split}/" for split in splits if not (root / split).is_dir()) if root.is_dir() else root
    expected = " and ".join(f"{root}/{split}/<class>/*.JPEG" for split in splits)
    raise FileNotFoundError(f"{missing} not found in {origin}, {root}; expected {expected}")


@functools.cache  # so that one process never mixes images of Imagenette and drawn ones
def _download(size: int) -> Path | None:
    """Return the cached folder of Imagenette at 160 or 320 pixels, after a download if needed; None without network."""
    url, md5 = ARCHIVES[size]
    try:
        cache = data_cache()
    except OSError as error:
        _print_once(
            f"Data: {error}, so synthetic images drawn by code replace Imagenette; "
            "set IMAGENETTE_DIR to use the real images"
        )
        return None
    folder = cache / Path(url).stem
    if folder.is_dir():
        return folder
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # seconds without an answer
    try:
        try:
            urllib.request.urlopen(url).close()
        except OSError as error:
            _print_once(
                f"Data: no network ({error}), so synthetic images drawn by code replace Imagenette; "
                "set IMAGENETTE_DIR to use the real images"
            )
            return None
        from torchvision.datasets.utils import download_and_extract_archive  # slow to import

        with tempfile.TemporaryDirectory(dir=cache) as partial:  # an interrupted download leaves nothing behind
            try:
                download_and_extract_archive(url, partial, md5=md5)
            except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # cut off, or not the archive
                raise OSError(
                    f"the download of {url} broke off ({error}); run it again, or set IMAGENETTE_DIR"
                ) from error
            try:
                (Path(partial) / folder.name).rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    finally:
        socket.setdefaulttimeout(timeout)
    return folder


@functools.cache
def _print_once(line: str) -> None:
    """Print `line` once; of several processes that torchrun started, only the first prints."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(printable(line), flush=True)
