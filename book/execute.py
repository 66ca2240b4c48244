"""Runs notebooks and keeps what they print, at the budget of the committed outputs: `make notebooks`."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ |= {
    "CONVNEXT_MIN_BUDGET": "quick",
    "TQDM_DISABLE": "1",  # a page shows no progress
    "PYTHONWARNINGS": "ignore:IProgress",  # nor that tqdm lacks widgets
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> None:
    """Run the notebook at `path` in its folder and write it back with its outputs; raises if a cell does."""
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", record_timing=False, coalesce_streams=True, resources=place
    ).execute()
    notebook.metadata = METADATA
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"Running {name}", flush=True)
        execute(Path(name))
