"""The committed figures are those that the code draws now."""

import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "book" / "figures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("figures")
    module.draw(folder)
    return folder


def words(path: Path) -> list[str]:
    """Every text of an SVG by matplotlib, in order: labels, ticks and values."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


def test_every_committed_figure_is_drawn_by_the_script(drawn):
    committed = {path.name for path in FOLDER.glob("*.svg")} - {"colab.svg"}  # the badge at the head of a chapter
    assert committed == {path.name for path in drawn.iterdir()}


def test_committed_figures_say_what_the_code_says(drawn):
    for path in drawn.iterdir():
        assert words(path) == words(FOLDER / path.name) != [], f"{path.name} is out of date: run `make figures`"
