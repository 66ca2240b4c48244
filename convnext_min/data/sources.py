"""Sources of encoded images that a loader reads by number: folders and Hugging Face datasets; see also `shards`."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convnext_min.data.files import find_images
from convnext_min.data.imagenette import WNIDS


class Source(Protocol):
    """Encoded images with labels, addressed by number."""

    classes: tuple[str, ...]  # readable names; labels index them
    note: str  # one line that counts the files left out, or an empty string

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""

    def name(self, index: int) -> str:
        """Return the place of an image, for messages."""


class StringArray:
    """Millions of strings in two arrays, which worker processes share; a list would be copied into each of them."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self.letters = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.letters[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes())


class Folder:
    """All images below root/<class>/, in the order of their paths, as `files.find_images` finds them.

    Raises FileNotFoundError for a missing folder, no class folders or, unless `allow_empty`, a class without images.
    """

    def __init__(self, root: Path | str, allow_empty: bool = False):
        files = find_images(root, allow_empty)
        self.root, self.folders, self.empty, self.note = files.root, files.folders, files.empty, files.note()
        self.classes = tuple(WNIDS.get(folder, folder) for folder in files.folders)
        self.labels, self.paths = files.labels, StringArray(files.paths)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.paths[index])

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        return Path(self.name(index)).read_bytes(), int(self.labels[index])


VALIDATION = ("validation", "valid", "val", "test")  # names of the split for validation, the preferred one first


class HuggingFace:
    """A dataset of the Hugging Face hub, or a folder in its format: `name`, or name:column for a certain label column.

    As "val", the first split of `VALIDATION` is taken; `note` reports it if that is the test split.

    Raises ValueError if the package `datasets` is missing, and for a dataset without such a split, without one column
    of images and one of class labels, or with images that have no label.
    """

    def __init__(self, name: str, split: str):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"hfds/{name} needs the package datasets: pip install datasets") from error
        self.dataset, column = re.fullmatch(r"(.*?)(?::(\w+))?", name).groups()
        tables = datasets.load_dataset(self.dataset)  # all splits, since these are downloaded together anyway
        names = VALIDATION if split == "val" else (split,)
        found = next((candidate for candidate in names if candidate in tables), None)
        if found is None:
            advice = "; --holdout keeps every tenth training image for validation" if split == "val" else ""
            raise ValueError(f"hfds/{name} has no split {split!r}, its splits are {', '.join(tables)}{advice}")
        self.note = f"hfds/{name} has no validation split: its test split is used" if found == "test" else ""
        table = tables[found]
        self.image = _one_column(name, table.features, datasets.Image, "images")
        self.label = _one_column(name, table.features, datasets.ClassLabel, "class labels", column)
        self.classes = tuple(table.features[self.label].names)
        self.table = table.cast_column(self.image, datasets.Image(decode=False))
        labels = table.select_columns(self.label)[:][self.label]
        self.labels = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
        if len(bad := np.flatnonzero(self.labels < 0)):
            raise ValueError(
                f"hfds/{name}: {len(bad):,} of {len(table):,} images of {split!r} have no label, "
                f"such as number {bad[0]}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the dataset and the number of an image."""
        return f"{self.dataset} {index}"

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        image = self.table[index][self.image]
        return image["bytes"] or Path(image["path"]).read_bytes(), int(self.labels[index])


def _one_column(name: str, features: dict[str, Any], kind: type, described: str, chosen: str | None = None) -> str:
    """Return the column of a kind, the only one or the chosen one. Otherwise raises ValueError, listing all columns."""
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if chosen in found or (chosen is None and len(found) == 1):
        return chosen or found[0]
    columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
    advice = f"; choose one, as in hfds/{name.removesuffix(f':{chosen}')}:{found[0]}" if len(found) > 1 else ""
    wanted = f"no column {chosen!r}" if chosen else f"{len(found)} columns"
    raise ValueError(f"hfds/{name} has {wanted} of {described}, and one is needed; its columns are {columns}{advice}")


class Subset:
    """The images of a source with the given numbers."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices, self.classes, self.note = source, indices, source.classes, source.note

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the place of an image."""
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label."""
        return self.source.read(int(self.indices[index]))
