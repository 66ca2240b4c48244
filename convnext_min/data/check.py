"""Check a folder of images before hours are spent on it: `python -m convnext_min.data.check DIR`."""

import argparse
import hashlib
import io
import os
import sys
from collections import defaultdict
from pathlib import Path

from timm.data import ImageNetInfo
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from convnext_min.data.disk import CHUNK
from convnext_min.data.files import DECODE_ERRORS, read_image
from convnext_min.data.sources import Folder
from convnext_min.environment import printable

IMAGENET_1K = {"train": 1_281_167, "val": 50_000}  # images


class DecodeCheck(Dataset):
    """The problem of each image of a folder, or None, and a hash of its file."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[str | None, bytes]:
        content = b""
        try:
            content, _ = self.folder.read(index)
            read_image(io.BytesIO(content))
            problem = None
        except DECODE_ERRORS as error:
            problem = f"{self.folder.name(index)}: {str(error) or type(error).__name__}"
        return problem, hashlib.blake2b(content, digest_size=16).digest()


def check(root: Path | str, workers: int = 2, quick: bool = False) -> list[str]:
    """Return the problems of a folder with train/<class>/ and val/<class>/, one line each.

    Both splits must have the same classes, each with images. If these are ImageNet-1K's, no class and no
    image of it may be missing. Files that a loader leaves out are counted. Unless `quick`, `workers` processes
    decode every image, and copies are counted: images that appear twice, and training images in val/.
    """
    problems, folders = [], {}
    for split in ("train", "val"):
        try:
            folders[split] = Folder(Path(root) / split, allow_empty=True)
        except FileNotFoundError as error:
            problems.append(str(error))
    for split, folder in folders.items():
        if folder.empty:
            problems.append(f"{split}/ has {len(folder.empty)} classes without images: {_examples(folder.empty)}")
        problems += filter(None, [folder.note])
    problems += _compare_classes(folders)
    if not quick:
        contents = defaultdict(list)  # hash: [(split, image number)]
        for split, folder in folders.items():
            problems += _decode_all(split, folder, workers, contents)
        problems += _find_copies(folders, [same for same in contents.values() if len(same) > 1])
    return problems


def _compare_classes(folders: dict[str, Folder]) -> list[str]:
    """Return the differences between the classes of both splits, and between them and ImageNet-1K."""
    problems, classes = [], {split: set(folder.folders) for split, folder in folders.items()}
    for split, other in (("train", "val"), ("val", "train")):
        if len(folders) == 2 and (only := sorted(classes[split] - classes[other])):
            problems.append(f"{len(only)} classes are in {split}/ and not in {other}/: {_examples(only)}")
    wnids = set(ImageNetInfo("imagenet-1k").label_names())
    for split, folder in folders.items():
        if len(wnids & classes[split]) > len(wnids) / 2:
            if missing := sorted(wnids - classes[split]):
                problems.append(f"{split}/ lacks {len(missing)} classes of ImageNet-1K: {_examples(missing)}")
            if len(folder) != IMAGENET_1K[split]:
                problems.append(f"{split}/ has {len(folder):,} images; ImageNet-1K has {IMAGENET_1K[split]:,}")
    return problems


def _decode_all(split: str, folder: Folder, workers: int, contents: dict[bytes, list[tuple[str, int]]]) -> list[str]:
    """Decode all images of a folder, add their hashes to `contents`, and return the problems."""
    problems, index = [], 0
    with tqdm(desc=f"reading {split}", total=len(folder), unit="image", disable=None) as bar:
        for chunk in DataLoader(DecodeCheck(folder), batch_size=CHUNK, num_workers=workers, collate_fn=list):
            for problem, digest in chunk:
                if problem:
                    problems.append(problem)
                else:
                    contents[digest].append((split, index))
                index += 1
            bar.update(len(chunk))
    return problems


def _find_copies(folders: dict[str, Folder], copies: list[list[tuple[str, int]]]) -> list[str]:
    """Return one line per kind of copies, given groups of images with the same content."""
    found = defaultdict(list)
    for same in copies:
        splits = {split for split, _ in same}
        labels = {folders[split].folders[folders[split].labels[index]] for split, index in same}
        where = "both in train/ and in val/" if len(splits) == 2 else f"more than once in {splits.pop()}/"
        found[where + (", in different classes" if len(labels) > 1 else "")].append(same)
    lines = []
    for kind, groups in sorted(found.items()):
        names = (folders[split].name(index) for split, index in groups[0][:2])
        lines.append(f"{len(groups)} images are {kind}, such as {' = '.join(names)}")
    return lines


def _examples(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.data.check", description=__doc__)
    parser.add_argument("folder", help="contains train/<class>/ and val/<class>/")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode images (all cores)")
    parser.add_argument("--quick", action="store_true", help="count files without opening them")
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error(f"--workers must be 0 or more, got {args.workers}")
    problems = check(args.folder, args.workers, args.quick)
    for problem in problems:
        print(printable(problem))
    if problems:
        sys.exit(printable(f"{len(problems)} problems in {args.folder}"))
    print(
        printable(
            f"{args.folder} is complete" + (" (files were counted, not decoded)" if args.quick else " and can be read")
        )
    )


if __name__ == "__main__":
    main()
