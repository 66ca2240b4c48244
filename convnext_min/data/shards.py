"""Images in tar files, as WebDataset writes them."""

import contextlib
import functools
import itertools
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from convnext_min.data.files import IMAGE_FORMATS, readable_formats
from convnext_min.data.sources import StringArray

SPLIT_WORDS = {"train": "train(ing)?", "val": "val(id(ation)?)?"}  # in the names of tar files
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # first bytes of gzip, bzip2, xz, zstd


class Shards:
    """The samples in tar files of WebDataset's format: <key>.jpg, or another image format, beside <key>.cls, its label.

    The tar files are those in root/train or root/val, or those in `root` with "train" or "val" as a word in their
    names. Each is scanned once; then images are read by their offsets, in any order. (timm's reader streams the tars
    instead: the order then depends on the workers, and an evaluation by several processes can repeat or miss images.)
    The class names are the lines of root/classes.txt. Without that file they are the numbers from 0 to the highest
    label in the tar files of both splits.

    Raises FileNotFoundError if there is no tar file or no image. Raises ValueError, naming tar file and key, for a
    missing, invalid or repeated label, a repeated image, and a truncated or compressed tar file.
    """

    def __init__(self, root: Path | str, split: str):
        self.root = Path(root).expanduser().resolve()
        self.tars = find_tars(self.root, split)
        tars = tqdm(self.tars, f"{split} shards", unit="tar", delay=2, disable=None)
        scanned = [scan_tar(tar, os.stat(tar).st_mtime_ns) for tar in tars]
        self.keys = StringArray(itertools.chain.from_iterable(tar.keys for tar in scanned))
        if not len(self.keys):
            raise FileNotFoundError(f"no images in the {len(self.tars)} tar files of {split!r} in {self.root}")
        numbers = np.repeat(np.arange(len(scanned)), [len(tar.keys) for tar in scanned])
        self.places = np.column_stack([numbers, np.concatenate([tar.places for tar in scanned])])
        self.labels = np.concatenate([tar.labels for tar in scanned])
        self.classes = self._read_classes(split)
        if (self.labels >= len(self.classes)).any():
            wrong = int((self.labels >= len(self.classes)).argmax())
            raise ValueError(
                f"{self.name(wrong)} has the label {self.labels[wrong]}, but {self.root}/classes.txt has "
                f"{len(self.classes)} classes, numbered from 0"
            )
        left_out = sum((tar.left_out for tar in scanned), Counter())
        kinds = ", ".join(f"{count:,} {kind} images" for kind, count in sorted(left_out.items()))
        self.note = (
            f"left out of the {split} shards in {self.root}: {kinds}, which Pillow cannot decode" if kinds else ""
        )

    def _read_classes(self, split: str) -> tuple[str, ...]:
        names = self.root / "classes.txt"
        if names.exists():
            return tuple(filter(None, names.read_text(encoding="utf-8").split("\n")))
        highest = self.labels.max()
        with contextlib.suppress(FileNotFoundError):
            for tar in find_tars(self.root, {"train": "val", "val": "train"}[split]):
                highest = max(highest, scan_tar(tar, os.stat(tar).st_mtime_ns).labels.max(initial=0))
        return tuple(map(str, range(highest + 1)))

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


def find_tars(root: Path, split: str) -> tuple[str, ...]:
    """Return the sorted paths of a split's tar files, by their folder or by a word in their names.

    Raises FileNotFoundError if there is none, ValueError for a name with the words of both splits.
    """
    words = {name: re.compile(rf"(?<![a-z]){word}(?![a-z])") for name, word in SPLIT_WORDS.items()}
    tars = sorted((root / split).glob("*.tar"))
    if not tars:
        named = {
            name: [tar for tar in sorted(root.glob("*.tar")) if word.search(tar.name.lower())]
            for name, word in words.items()
        }
        if both := set(named["train"]) & set(named["val"]):
            raise ValueError(f"{min(both)} has the words of both splits in its name: rename it")
        tars = named[split]
    if not tars:
        packed = sorted([*root.glob("*.tar.*"), *root.glob("*.tgz"), *(root / split).glob("*.tar.*")])
        advice = f"; {packed[0].name} is compressed: unpack it to a plain tar file" if packed else ""
        raise FileNotFoundError(
            f"no tar files of {split!r}: expected {root}/{split}/*.tar or {root}/*.tar with the word {split!r} in the "
            f"name, such as {split}-0000.tar{advice}"
        )
    return tuple(map(str, tars))


class ScannedTar(NamedTuple):
    """The images in a tar file."""

    keys: StringArray
    places: np.ndarray  # int64 (N, 2): offset and size in bytes
    labels: np.ndarray  # int64 (N,)
    left_out: Counter[str]  # extensions of images that Pillow cannot decode: how many


@functools.cache  # both splits look for the highest label
def scan_tar(path: str, changed: int) -> ScannedTar:
    """Return the images of a tar file that was last modified at `changed`; raises ValueError as `Shards` does."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(COMPRESSED):
        raise ValueError(
            f"{path} is compressed, so images cannot be read by their offsets: unpack it to a plain tar file"
        )
    readable, images, labels, left_out = readable_formats(), {}, {}, Counter()
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, f".{kind.lower()}"
                if suffix not in readable and suffix != ".cls":
                    left_out[suffix] += suffix in IMAGE_FORMATS
                    continue
                if not member.isreg():
                    raise ValueError(f"{path}: {member.name} is a folder or a link, not a file")
                if key in (labels if suffix == ".cls" else images):
                    raise ValueError(f"{path}: there are two {'labels' if suffix == '.cls' else 'images'} of {key}")
                if suffix == ".cls":
                    labels[key] = _parse_label(file.extractfile(member).read(), f"{path}: {member.name}")
                else:
                    images[key] = (member.offset_data, member.size)
            file.fileobj.seek(file.offset)
            if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is cut off, or no tar file ({error}): fetch it again") from error
    if missing := images.keys() - labels.keys():
        raise ValueError(f"{path} has {len(missing)} images without a .cls file, such as {min(missing)}")
    places = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2)
    return ScannedTar(StringArray(images), places, np.array([labels[key] for key in images], np.int64), +left_out)


def _parse_label(content: bytes, name: str) -> int:
    """Return the label in a .cls file. Raises ValueError, naming the file, unless it is a number from 0 on."""
    text = content.decode("utf-8", "replace").strip()
    if not re.fullmatch(r"\+?[0-9]{1,9}", text):
        raise ValueError(f"{name} must hold a class number of 0 or more, got {text[:40]!r}")
    return int(text)
