"""Find the image files of a data set and decode them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files


def list_images(root: Path | str) -> tuple[list[Path], list[Path], Tensor]:
    """Return the class folders in `root`, all their image files, and the files' labels, without opening a file.

    Raises FileNotFoundError if `root` has no class folders or a class has no image.
    """
    root = Path(root).expanduser().resolve()
    folders = sorted(folder for folder in root.glob("[!.]*") if folder.is_dir())
    if not folders:
        raise FileNotFoundError(f"{root} holds no class folders; expected {root}/<class>/*.JPEG")
    files = [sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS) for folder in folders]
    labels = torch.repeat_interleave(torch.tensor([len(of_class) for of_class in files]))
    refuse_empty(folders, labels)
    return folders, [file for of_class in files for file in of_class], labels


def refuse_empty(folders: list[Path], labels: Tensor) -> None:
    """Raise FileNotFoundError for the first of `folders` that has no label."""
    for folder, count in zip(folders, torch.bincount(labels, minlength=len(folders)).tolist()):
        if count == 0:
            raise FileNotFoundError(f"class folder {folder} holds no readable image ({', '.join(IMG_EXTENSIONS)})")


def decode(path: Path, size: int) -> np.ndarray | None:
    """Return the image at `path`, resized and centre-cropped, as RGB uint8 (size, size, 3); None for a damaged file."""
    try:
        with Image.open(path) as image:
            image.draft(None, (size, size))  # JPEG only: decode at the smallest scale that is no smaller than that
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except DECODE_ERRORS:
        return None
    return np.array(square)
