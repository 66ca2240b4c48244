"""Small folders of images for the tests of data sets."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from convnext_min.data.sources import Folder

WNIDS = ("n01440764", "n02102040")


def picture(number, size=(60, 48)):
    """Return a smooth random image; `number` is its seed."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def write_images(root: Path) -> None:
    """Write 20 images into root/train/<class>/ and 11 into root/val/<class>/."""
    for split, counts in (("train", (12, 8)), ("val", (6, 5))):
        for wnid, count in zip(WNIDS, counts):
            (root / split / wnid).mkdir(parents=True)
            for i in range(count):
                picture((len(split), count, i)).save(root / split / wnid / f"{i}.png")


def write_shards(image_root, target, number):
    """Write tar files as WebDataset does, with the images in turn in each."""
    for split in ("train", "val"):
        folder = Folder(image_root / split)
        for tar in range(number):
            with tarfile.open(target / f"made-{split}-{tar:04d}.tar", "w") as file:
                for index in range(tar, len(folder), number):
                    content, label = folder.read(index)
                    for kind, part in (("png", content), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"a/{index:05d}.{kind}")
                        member.size = len(part)
                        file.addfile(member, io.BytesIO(part))
