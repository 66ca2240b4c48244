"""Find the image files of a data set and decode them. All loaders use these functions, so they see the same images."""

import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, features

IMAGE_FORMATS = (
    *(".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe"),
    *(".jpeg", ".jpf", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif"),
    *(".tiff", ".webp"),
)
OPTIONAL_CODECS = {"avif": (".avif", ".avifs"), "webp": (".webp",), "jpg_2000": (".j2k", ".jp2", ".jpf", ".jpx")}
DECODE_ERRORS = (  # what Pillow and its decoders raise for damaged files
    *(OSError, ValueError, SyntaxError, RuntimeError, LookupError, TypeError, EOFError, struct.error),
    Image.DecompressionBombError,
)
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---- Find


def readable_formats() -> tuple[str, ...]:
    """Return the extensions out of IMAGE_FORMATS that the installed Pillow can decode, with its registered plugins."""
    registered = Image.registered_extensions()
    known = [suffix for suffix in IMAGE_FORMATS if registered.get(suffix) in Image.OPEN]
    for codec, suffixes in OPTIONAL_CODECS.items():
        if any(suffix in known for suffix in suffixes) and not features.check(codec):
            known = [suffix for suffix in known if suffix not in suffixes]
    return tuple(known)


@dataclass(frozen=True)
class ImageFiles:
    """The image files in root/<class>/, sorted by class and path, and a count of the files that are left out."""

    root: Path
    folders: tuple[str, ...]  # names of the class folders
    paths: list[str]  # relative to root
    labels: np.ndarray  # int64 (N,): numbers of the class folders
    left_out: Counter[str]  # reason, such as "hidden folder" or ".heic file (...)": how many

    @property
    def empty(self) -> list[str]:
        """Return the class folders without images."""
        counts = np.bincount(self.labels, minlength=len(self.folders))
        return [folder for folder, count in zip(self.folders, counts) if count == 0]

    def note(self) -> str:
        """Return one line that names what is left out, or an empty string."""
        kinds = [f"{count:,} {_plural(kind, count)}" for kind, count in sorted(self.left_out.items())]
        return f"left out of {self.root}: {', '.join(kinds)}" if kinds else ""


def find_images(root: Path | str, allow_empty: bool = False) -> ImageFiles:
    """Return the image files below the class folders of `root`, without opening any.

    Linked files and folders are followed, except a link to a folder that contains it, which would not end. Hidden files
    and folders, such as .ipynb_checkpoints, are skipped. Files in formats that Pillow cannot decode and images outside
    of class folders are left out and counted.

    Raises FileNotFoundError for a missing folder, a folder without class folders and, unless `allow_empty`, a class
    without images.
    """
    root = Path(root).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} not found; expected images in {root}/<class>/")
    readable, left_out = readable_formats(), Counter()
    folders, paths, labels = class_folders(root), [], []
    loose = sum(entry.is_file() and _suffix(entry.name) in IMAGE_FORMATS for entry in os.scandir(root))
    if not folders:
        advice = f" but {loose:,} images: move each into the folder of its class" if loose else ""
        raise FileNotFoundError(f"{root} holds no class folders{advice}; expected {root}/<class>/*.JPEG")
    if loose:
        left_out["image outside of the class folders"] = loose
    for label, folder in enumerate(folders):
        found = _walk(root / folder, folder, (root,), readable, left_out)
        paths += found
        labels += [label] * len(found)
    files = ImageFiles(root, folders, paths, np.array(labels, dtype=np.int64), left_out)
    if files.empty and not allow_empty:
        note = f"; {files.note()}" if left_out else ""
        raise FileNotFoundError(
            f"class folder {root / files.empty[0]} holds no readable image ({', '.join(readable)}){note}"
        )
    return files


def class_folders(root: Path | str) -> tuple[str, ...]:
    """Return the sorted names of the folders in `root` that are not hidden: one per class."""
    return tuple(sorted(entry.name for entry in os.scandir(root) if _is_folder(entry) and entry.name[0] != "."))


def _walk(
    folder: Path, relative: str, parents: tuple[Path, ...], readable: tuple[str, ...], left_out: Counter[str]
) -> list[str]:
    """Return the relative paths of the images below `folder`, sorted by their parts; count the others in `left_out`."""
    parents = (*parents, Path(folder).resolve())
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, suffix = f"{relative}{os.sep}{entry.name}", _suffix(entry.name)
        if entry.name in (".DS_Store", "Thumbs.db", "desktop.ini"):  # a file browser's own
            continue
        if _is_folder(entry):
            if entry.name.startswith("."):
                left_out["hidden folder"] += 1
            elif entry.is_symlink() and _contains(Path(entry.path).resolve(), parents):
                left_out["link to a folder that contains it"] += 1
            else:
                found += _walk(Path(entry.path), path, parents, readable, left_out)
        elif reason := _reason_to_leave_out(entry, suffix, readable):
            left_out[reason] += 1
        else:
            found.append(path)
    return found


def _reason_to_leave_out(entry: os.DirEntry, suffix: str, readable: tuple[str, ...]) -> str:
    """Return why a file is not among the images, or an empty string for an image."""
    if entry.name.startswith("."):
        return "hidden file"
    if suffix not in IMAGE_FORMATS:
        return f"{suffix} file (no image)" if suffix else "file without extension"
    if suffix not in readable:
        return f"{suffix} file (no decoder in the installed Pillow)"
    return "" if entry.is_file() else "broken link or special file"


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # entry.is_dir fails for circular links


def _contains(folder: Path, parents: tuple[Path, ...]) -> bool:
    return any(parent.is_relative_to(folder) for parent in parents)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _plural(kind: str, count: int) -> str:
    noun = next(noun for noun in ("file", "folder", "image", "link") if noun in kind.split())
    return kind if count == 1 else kind.replace(noun, f"{noun}s", 1)


# ---- Decode


def read_image(file: Path | str | IO[bytes], exif_orientation: bool = True, size: int = 0) -> Image.Image:
    """Return an image in RGB, turned upright by its EXIF orientation unless `exif_orientation` is false.

    Of an animation, the first frame is returned. With `size`, a JPEG may be decoded at a smaller scale, no side below
    `size` pixels. Raises one of DECODE_ERRORS for a file that cannot be decoded.
    """
    with Image.open(file) as image:
        if size:
            image.draft(None, (size, size))
        image.load()
        rgb = _to_rgb(image)
        turn = TRANSPOSE.get(_orientation(image)) if exif_orientation else None
    return rgb if turn is None else rgb.transpose(turn)


def decode(path: Path | str, size: int, exif_orientation: bool = True) -> np.ndarray | None:
    """Return the image at `path`, resized and centre-cropped, as RGB uint8 (size, size, 3); None for a damaged file."""
    try:
        image = read_image(path, exif_orientation, size)
        return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    except DECODE_ERRORS:
        return None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) without or with damaged EXIF data, and for TIFF, which Pillow turns."""
    if image.format == "TIFF":
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # of many kinds; damaged EXIF data is no reason to lose the image
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB. Wide grey values are scaled to 8 bits, where Pillow would clip them."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale grey values (H, W), of 16 or 32 bits or floats, to uint8.

    Black is 0, or the smallest value if that is negative. White is the end of the smallest of the usual ranges, 1 (for
    floats) and 8, 12 and 16 bits, that holds the largest value; beyond these, and for negative values, the largest.
    """
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = min(0.0, values.min()), values.max()
    if low == 0:
        high = next((white for white in (1, 255, 4095, 65535) if high <= white), high)
    return np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)
