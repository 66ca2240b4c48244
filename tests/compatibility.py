"""The table of what works with what: rows that tests declare with the marker `compatibility`, kept if they pass.

`python -m pytest tests --write-compatibility` writes the table that book/using.md shows.
"""

import csv
import io
from importlib.metadata import version
from pathlib import Path

import pytest

from convnext_min.environment import environment, write_json

FOLDER = Path(__file__).parents[1] / "book" / "results" / "compatibility"
COLUMNS = ("with", "by way of", "direction", "what", "models", "test")
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "safetensors", "onnx", "onnxruntime")


def pytest_addoption(parser):
    parser.addoption("--write-compatibility", action="store_true", help=f"write {FOLDER.name}/compatibility.csv")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "compatibility(library, way, direction, what, models): the rows of the table in book/using.md that the test "
        "proves; {name} stands for the parameter `name` of the test, {id} for its id",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("compatibility", row) for row in rows(item)]


def rows(item: pytest.Item) -> list[list[str]]:
    """Return the rows that a test declares, one for each of its markers."""
    call = getattr(item, "callspec", None)
    values = {**call.params, "id": call.id} if call else {}
    declared = [[mark.kwargs[key] for key in ("library", "way", "direction", "what", "models")] for mark in marks(item)]
    return [[*(text.format(**values) for text in row), item.path.stem] for row in declared]


def marks(item: pytest.Item) -> list[pytest.Mark]:
    return list(item.iter_markers("compatibility"))[::-1]  # as written, from top to bottom


def table(declared: list[list[str]]) -> str:
    """Return the rows as CSV, sorted, with the models of equal rows together."""
    models: dict[tuple, list[str]] = {}
    for *place, names, test in declared:
        found = models.setdefault((*place, test), [])
        found += [name for name in names.split(", ") if name not in found]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*place, ", ".join(sorted(names)), test] for (*place, test), names in sorted(models.items()))
    return text.getvalue()


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--write-compatibility") or hasattr(config, "workerinput"):  # pytest-xdist's processes
        return
    passed = [
        row
        for report in terminalreporter.stats.get("passed", ())
        if report.when == "call"
        for name, row in report.user_properties
        if name == "compatibility"
    ]
    record = environment()  # before the table changes the working tree
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "compatibility.csv").write_text(table(passed), encoding="utf-8")
    record["versions"] |= {name: version(name) for name in LIBRARIES}
    write_json(record, FOLDER / "environment.json")
    terminalreporter.write_line(f"{len(passed)} proofs written to {FOLDER / 'compatibility.csv'}")
