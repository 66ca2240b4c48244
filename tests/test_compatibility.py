"""The table of compatibility is what the tests declare that are in the repository now."""

import json
import re
from pathlib import Path

import pytest
from compatibility import FOLDER, rows, table

TESTS = Path(__file__).parent


def test_the_table_is_current(request):
    config, session = request.config, request.session
    declaring = {path.stem for path in TESTS.glob("test_*.py") if "pytest.mark.compatibility(" in path.read_text()}
    declaring.discard(Path(__file__).stem)
    collected = {item.path.stem for item in session.items}
    if not declaring <= collected or config.option.keyword or any("::" in argument for argument in config.args):
        pytest.skip(f"needs all tests of {', '.join(sorted(declaring))}")
    expected = table([row for item in session.items for row in rows(item)])
    written = (FOLDER / "compatibility.csv").read_text(encoding="utf-8")
    assert written == expected, "python -m pytest tests --write-compatibility writes it anew"


def test_the_record_names_command_commit_and_versions():
    record = json.loads((FOLDER / "environment.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", record["commit"]), "commit first, so that the record names what ran"
    assert "--write-compatibility" in record["command"]
    assert {"torch", "timm", "torchvision", "transformers", "onnxruntime"} <= record["versions"].keys()


def test_models_of_equal_rows_come_together():
    one = ["timm", "file", "in", "logits", "convnext_tiny", "test_a"]
    two = ["timm", "file", "in", "logits", "convnext_small", "test_a"]
    assert table([one, two, one]).splitlines()[1:] == ['timm,file,in,logits,"convnext_small, convnext_tiny",test_a']
