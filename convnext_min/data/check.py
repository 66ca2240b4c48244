"""Check a folder of images before hours are spent on it: `python -m convnext_min.data.check DIR`."""

import argparse
import os
import sys
from pathlib import Path

from timm.data import ImageNetInfo
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from convnext_min.data.disk import CHUNK, Folder, decode
from convnext_min.data.files import DECODE_ERRORS

IMAGENET_1K = {"train": 1_281_167, "val": 50_000}  # images


class DecodeCheck(Dataset):
    """The problem of each image of a folder, or None."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> str | None:
        try:
            decode(self.folder, index)
        except DECODE_ERRORS as error:
            return f"{self.folder.name(index)}: {str(error) or type(error).__name__}"
        return None


def check(root: Path | str, workers: int = 2, quick: bool = False) -> list[str]:
    """Return the problems of a folder with train/<class>/ and val/<class>/, one line each.

    Both splits must have the same classes. If these are ImageNet-1K's, the numbers of classes and images must be those
    of ImageNet-1K. Unless `quick`, `workers` processes decode every image.
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
            for problems in DataLoader(DecodeCheck(folder), batch_size=CHUNK, num_workers=workers, collate_fn=list):
                found += filter(None, problems)
                bar.update(len(problems))
    return found


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
        print(problem)
    if problems:
        sys.exit(f"{len(problems)} problems in {args.folder}")
    print(f"{args.folder} is complete" + (", as far as counting tells" if args.quick else " and can be read"))


if __name__ == "__main__":
    main()
