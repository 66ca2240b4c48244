"""Map ImageNet-1K's classes to ImageNet-22K's: `python -m convnext_min.data.class_map SOURCE TARGET OUTPUT`.

`--finetune --class-map OUTPUT` then starts from the classifier rows of an ImageNet-22K network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from convnext_min.data.files import class_folders
from convnext_min.environment import printable


def class_map(source: Sequence[str], target: Sequence[str]) -> list[int]:
    """Return, for each class of `target`, its number in `source`; both are WordNet ids such as n01440764.

    The logits of a network trained on ImageNet-22K become logits of ImageNet-1K by logits[:, class_map]. Raises
    ValueError if a class is missing from `source` or appears in it twice.
    """
    numbers = {name: number for number, name in enumerate(source)}
    if len(numbers) < len(source):
        raise ValueError(f"{len(source) - len(numbers)} classes appear twice in the list of {len(source)}")
    if missing := [name for name in target if name not in numbers]:
        raise ValueError(f"{len(missing)} of {len(target)} classes are not in the list of {len(source)}: {missing[:5]}")
    return [numbers[name] for name in target]


def read_classes(path: str) -> list[str]:
    """Return the class folders in a folder, sorted, or the words of a text file."""
    place = Path(path)
    if place.is_dir():
        return list(class_folders(place))
    return place.read_text(encoding="utf-8").split()


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.data.class_map", description=__doc__)
    parser.add_argument(
        "source", help="ImageNet-22K: a folder of class folders, or a file with one WordNet id per line"
    )
    parser.add_argument("target", help="ImageNet-1K, in the same form")
    parser.add_argument("output", help="file to write: the number in SOURCE of each class of TARGET, one per line")
    args = parser.parse_args(argv)
    try:
        numbers = class_map(read_classes(args.source), read_classes(args.target))
        Path(args.output).write_text("".join(f"{number}\n" for number in numbers))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(printable(f"{args.output}: {len(numbers):,} classes"))


if __name__ == "__main__":
    main()
