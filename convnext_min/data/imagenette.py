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
from torchvision.datasets.utils import download_and_extract_archive
from tqdm.auto import tqdm

from convnext_min.data.files import decode, list_images, refuse_empty
from convnext_min.data.images import ImageSet
from convnext_min.data.synthetic import synthetic_images

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


def imagenette(split: str, root: Path | str | None = None, size: int = 160) -> ImageSet:
    """Return Imagenette's "train" (9,469 images) or "val" (3,925) split, resized and cropped to `size` x `size`.

    The images come from the first of these places: the folder `root`; the folder in the variable IMAGENETTE_DIR; the
    cache, ~/.cache/convnext_min; a download into the cache. Without network, a line says so and `synthetic_images` are
    returned. A folder holds train/<class>/*.JPEG and val/<class>/*.JPEG, and may contain data other than Imagenette.
    The place is printed once.

    Raises FileNotFoundError if `root` or IMAGENETTE_DIR is not such a folder, OSError if a download breaks off,
    ValueError for an unknown `split`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if root is not None:
        folder, origin = _find_splits(Path(root), "the given path"), "the given path"
    elif os.environ.get("IMAGENETTE_DIR"):
        folder, origin = _find_splits(Path(os.environ["IMAGENETTE_DIR"]), "IMAGENETTE_DIR"), "IMAGENETTE_DIR"
    else:
        folder, origin = _download(160 if size <= 160 else 320), "the cache"
    if folder is None:
        return synthetic_images(split, size)
    _print_once(f"Data: {folder.name} from {origin}")
    return image_folder(folder / split, size)


def image_folder(root: Path | str, size: int = 160) -> ImageSet:
    """Decode all images in root/<class>/, in the order of their paths, to RGB.

    The shorter side is resized to `size` and the centre is cropped. A damaged file is left out and named in a warning.
    Raises FileNotFoundError for a class without images.
    """
    folders, paths, labels = list_images(root)
    pixels = np.empty((len(paths), size, size, 3), np.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow decodes without the interpreter's lock
        decoded = pool.map(functools.partial(decode, size=size), paths)
        damaged = []
        for index, image in enumerate(tqdm(decoded, "decoding", len(paths), unit="image", delay=1)):
            if image is None:
                damaged.append(index)
            else:
                pixels[index] = image  # NumPy copies in one thread; PyTorch would take cores from the decoding threads
    images = torch.from_numpy(pixels)
    if damaged:
        names = ", ".join(str(paths[index]) for index in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        warnings.warn(f"skipped {len(damaged)} of {len(paths)} files that cannot be decoded: {names}", stacklevel=2)
        whole = torch.ones(len(paths), dtype=torch.bool)
        whole[damaged] = False
        images, labels = images[whole], labels[whole]
        refuse_empty(folders, labels)
    source = f"{folders[0].parents[1].name}/{folders[0].parent.name}: {len(labels):,} images at {size}x{size}"
    classes = tuple(WNIDS.get(folder.name, folder.name) for folder in folders)
    return ImageSet(images.permute(0, 3, 1, 2), labels, classes, source, tuple(paths[index] for index in damaged))


def _find_splits(root: Path, origin: str) -> Path:
    """Return `root`, or the extracted archive in it, if it holds train/ and val/ with the same classes."""
    root = root.expanduser()
    for folder in (root, *(root / name for name in EXTRACTED)):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            train, val = ({f.name for f in list_images(folder / split)[0]} for split in ("train", "val"))
            if only_one := train ^ val:
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
def _download(size: int) -> Path | None:
    """Return the cached folder of Imagenette at 160 or 320 pixels, after a download if needed; None without network."""
    url, md5 = ARCHIVES[size]
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
            _print_once(
                f"Data: no network ({error}), so synthetic images drawn by code replace Imagenette; "
                "set IMAGENETTE_DIR to use the real images"
            )
            return None
        cache.mkdir(parents=True, exist_ok=True)
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
    """Print `line`, once per process."""
    print(line, flush=True)
