"""Keep decoded images in the user's cache, so that later runs start without decoding them again.

A set of images is one array in ~/.cache/convnext_min/decoded, memory-mapped by every process that reads it. Its name is
a digest of the files' contents and of what decoding depends on. Deleting the folder is always safe.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from convnext_min.environment import data_cache

SMALLEST = 1000  # images; fewer are decoded in a second
TASK = 500  # files that each of two threads reads at a time: one by one, most of the time would go to switching threads
LIMIT = 4 * 2**30  # bytes in the cache; the arrays that were not used for longest are deleted
VERSION = "1"  # of what `files.decode` does: another number makes all earlier arrays useless


def cache_key(paths: Sequence[Path], size: int, exif_orientation: bool) -> str:
    """Return the digest of the files' contents, in this order, the settings and the decoder's version."""
    parts = [paths[i : i + TASK] for i in range(0, len(paths), TASK)]
    with ThreadPoolExecutor(2) as pool:
        contents = list(chain.from_iterable(pool.map(_digests, parts)))
    decoder = (VERSION, PIL.__version__, features.version("jpg"), size, exif_orientation)
    return hashlib.sha256(repr(decoder).encode() + b"".join(contents)).hexdigest()[:32]


def _digests(paths: Sequence[Path]) -> list[bytes]:
    return [_digest(path) for path in paths]


def _digest(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:  # decoding will leave it out and name it
        return b""


def find(key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the uint8 array kept under `key`, or None if there is none of this shape; changes to it are not kept."""
    try:
        path = _folder() / f"{key}.npy"
        pixels = np.load(path, mmap_mode="c")
        os.utime(path)  # used last
    except (OSError, ValueError, EOFError):  # no cache, no such file, or one that is damaged
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def keep(key: str, pixels: np.ndarray) -> str:
    """Write `pixels` into the cache under `key`; return a line about it, empty if there is no room or no cache."""
    try:
        folder = _folder()
        if pixels.nbytes > LIMIT // 2 or shutil.disk_usage(folder).free < 3 * pixels.nbytes:
            return ""
        with tempfile.TemporaryDirectory(dir=folder) as place:
            partial = Path(place, "pixels.npy")
            np.save(partial, pixels)
            os.replace(partial, folder / f"{key}.npy")  # at once, so that other processes see the whole file or none
        _delete_oldest(folder)
    except OSError:  # a read-only disk, or another process that deletes the same file
        return ""
    return (
        f"Data: decoded images are kept for later runs in {folder} ({pixels.nbytes / 1e9:.1f} GB; all together at most "
        f"{LIMIT / 1e9:.1f} GB); delete the folder to free the space"
    )


def _delete_oldest(folder: Path) -> None:
    """Delete the arrays that were not used for longest until the others are within `LIMIT`."""
    total = 0
    for path in sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_mtime, reverse=True):
        total += path.stat().st_size
        if total > LIMIT:
            path.unlink()


def _folder() -> Path:
    """Return the folder of the cache, made if necessary. Raises OSError if there is no place for it."""
    folder = data_cache() / "decoded"
    folder.mkdir(exist_ok=True)
    return folder
