"""Access to the committed results: files of book/results, in a checkout or, for an installed package, on GitHub."""

import csv
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from convnext_min import __version__
from convnext_min.download import download

FOLDER = Path(__file__).parents[2] / "book" / "results"
ADDRESS = f"https://raw.githubusercontent.com/convnext-book/convnext-book/v{__version__}/book/results"

BACKBONE = "backbone/convnext_atto"


def backbone() -> Path:
    """Return the folder of the small backbone: the one in a checkout, or a copy that is downloaded once.

    `convnext_min.load` reads it, and `convnext_min.read_labels` the names of its classes. Raises ConnectionError if it
    has to be downloaded and cannot be.
    """
    if FOLDER.is_dir():
        return FOLDER / BACKBONE
    files = [download(f"{ADDRESS}/{BACKBONE}/{name}") for name in ("config.json", "summary.json", "model.safetensors")]
    return files[0].parent


def content(name: str) -> bytes:
    """Return the bytes of a file, such as "imagenette/3min-seed-0/log.csv".

    Raises FileNotFoundError in a checkout that lacks it, OSError if it must be fetched and that fails.
    """
    if FOLDER.is_dir():
        return (FOLDER / name).read_bytes()
    with urllib.request.urlopen(f"{ADDRESS}/{name}", timeout=30) as answer:
        return answer.read()


def text(name: str) -> str:
    """Return the contents of a text file."""
    return content(name).decode()


def rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    return list(csv.DictReader(io.StringIO(text(name), newline="")))


def values(name: str) -> dict[str, Any]:
    """Return the contents of a JSON file."""
    return json.loads(text(name))


def arrays(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file, by their names."""
    with np.load(io.BytesIO(content(name))) as file:
        return dict(file)


def processor(summary: dict[str, Any]) -> str:
    """Return the processor of a run, with PyTorch's CPU capability (vector instructions) if the run recorded it."""
    machine = summary["machine"]
    return ", ".join(machine[key] for key in ("cpu", "capability") if key in machine)
