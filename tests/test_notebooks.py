"""What every committed notebook keeps to; that it runs is nbmake's to show."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOCAL_PATH = re.compile(r"(?<![\w.:/-])(?:/(?:home|root|tmp|usr|opt|var|mnt|work|content|Users)/|[A-Z]:\\)")

SETUP = """\
# @title Setup
import sys

if "google.colab" in sys.modules:
    repository = "{url}"
    %pip install -q "convnext-min[train,dense] @ git+{{repository}}@{branch}"

"""
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}


def chapters() -> list[str]:
    """The notebooks of the table of contents, in its order."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    files = [chapter["file"] for part in parts for chapter in part["chapters"]]
    return [file for file in files if file.startswith("notebooks/")]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


@pytest.fixture
def code(notebook) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def load(name: str):
    """Import a program of the folder book."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(output: nbformat.NotebookNode) -> str:
    """All text of an output, pictures left out."""
    if output.output_type == "stream":
        return output.text
    return "\n".join(str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))


def test_the_book_has_all_notebooks_in_order():
    numbered = [name for name in chapters() if name[len("notebooks/")].isdigit()]
    assert numbered == sorted(numbered)
    assert sorted(chapters()) == [f"notebooks/{path.stem}" for path in NOTEBOOKS] != []


def test_the_readme_lists_all_notebooks_in_order():
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^\|.*\]\((notebooks/\w+)\.ipynb\)", readme, re.MULTILINE) == chapters()


def test_a_chapter_begins_with_its_question_and_one_folded_setup_cell(notebook, code):
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert code[0].source.startswith(SETUP.format(url=repository["url"], branch=repository["branch"]))
    assert 'print("Budget:", budget_name())' in code[0].source.splitlines()
    assert "hide-cell" in code[0].metadata.tags and FOLDED.items() <= code[0].metadata.items()


def test_a_solution_is_folded_and_shows_nothing(code):
    for cell in code:
        if "solution" in cell.metadata.get("tags", ()):
            assert cell.outputs == [], "run `make notebooks`"
            assert "hide-cell" in cell.metadata.tags and FOLDED.items() <= cell.metadata.items()


def test_lines_of_code_fit_the_page(code):
    long = [line for cell in code for line in cell.source.splitlines() if len(line) > 80]
    assert long == [], "longer than 80 characters"


def test_the_line_under_the_title_is_current(request, notebook):
    head = load("head")
    found = head.HEAD.search(notebook.cells[0].source)
    assert found and notebook.cells[0].source.split("\n\n")[1] == found[0], "run `make heads`"
    assert abs(int(found["minutes"]) - head.minutes(notebook)) <= 5, "run `make heads`"
    assert head.head(request.node.callspec.id, notebook, found["needs"]).split(" · ")[1:] == found[0].split(" · ")[1:]


def test_minutes_to_read_count_prose_and_unfolded_code():
    head = load("head")
    prose, code = {"cell_type": "markdown", "source": ["word " * 2000], "metadata": {}}, {"cell_type": "code"}
    shown, hidden = {**code, "metadata": {}}, {**code, "metadata": {"tags": ["hide-cell"]}}
    assert head.minutes({"cells": [prose]}) == 10
    assert head.minutes({"cells": [prose, {**shown, "source": ["x\n"] * 150}]}) == 20
    assert head.minutes({"cells": [prose, {**hidden, "source": ["x\n"] * 150}]}) == 10


def test_the_line_under_the_title_is_written_and_renewed(tmp_path):
    head = load("head")
    path = tmp_path / "new.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# New\n\nA question?")]), path)
    with pytest.raises(ValueError, match=r"new\.ipynb has no line under its title yet: give --needs"):
        head.write_head(path)
    head.write_head(path, "nothing")
    once = path.read_text()
    head.write_head(path)
    title, line, question = nbformat.read(path, 4).cells[0].source.split("\n\n")
    assert (title, question) == ("# New", "A question?") and path.read_text() == once
    assert line.startswith("5 minutes to read · needs nothing · [![Open in Colab](../book/figures/colab.svg)](https://")
    assert line.endswith("/notebooks/new.ipynb)")


def test_the_whole_notebook_was_run_in_order(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"


def test_outputs_are_those_of_the_quick_budget(code):
    assert text_of(code[0].outputs[0]).startswith("Budget: quick\n"), "run `make notebooks`"
    assert any(cell.outputs for cell in code[1:])


def test_outputs_hold_no_errors_warnings_or_local_paths(code):
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", f"{output.text}\nis written to stderr by\n{cell.source}"
            assert not LOCAL_PATH.search(text_of(output)), f"a path of this machine in the output of\n{cell.source}"


def test_outputs_hold_no_progress_bars(code):
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if "widget-view" in str(list(output.get("data", {})))]


def test_pictures_have_alt_text(code):
    for cell in code:
        if any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert alt.strip(), f'the cell needs metadata {{"mystnb": {{"image": {{"alt": ...}}}}}}:\n{cell.source}'


def test_nothing_of_this_machine_is_kept(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any("execution" in cell.metadata for cell in notebook.cells), "run `make notebooks`"
    assert not notebook.metadata.get("widgets"), "widgets need the network to be shown"


def test_the_quickstart_learned_the_drawn_images_in_two_minutes():
    quickstart = nbformat.read(ROOT / "notebooks" / "00_quickstart.ipynb", as_version=4)
    outputs = [output for cell in quickstart.cells for output in cell.get("outputs", ())]
    printed = "".join(map(text_of, outputs))
    top1, seconds = re.search(r"Top-1 ([\d.]+)% on 500 validation images .*, (\d+) s", printed).groups()
    assert float(top1) > 90 and int(seconds) < 120


def test_results_are_shown_anew_without_measuring_anything_again(tmp_path):
    execute = load("execute")
    sources = (
        "%pip install nothing\nprint('first')",
        "def double(x):\n    return 2 * x\n\n\n1 / 0  # not again",
        "double(21)",
    )
    cells = [nbformat.v4.new_code_cell(source, execution_count=i + 1) for i, source in enumerate(sources)]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="3.2 s\n")]
    cells[2].metadata["tags"] = ["results"]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    execute.execute_results(path)
    first, measured, shown = nbformat.read(path, as_version=4).cells
    assert [text_of(output) for output in shown.outputs] == ["42"] and shown.outputs[0].execution_count == 3
    assert [text_of(output) for output in measured.outputs] == ["3.2 s\n"] and not first.outputs
    assert [cell.source for cell in (first, measured, shown)] == list(sources)


def test_a_run_keeps_no_output_of_a_solution(tmp_path):
    execute = load("execute")
    cells = [nbformat.v4.new_code_cell("21", metadata={"tags": tags}) for tags in ([], ["solution"])]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    execute.execute(path)
    shown, solution = nbformat.read(path, as_version=4).cells
    assert [text_of(output) for output in shown.outputs] == ["21"] and solution.outputs == []


def test_a_run_keeps_no_progress_bar(tmp_path):
    path = tmp_path / "bar.ipynb"
    source = "from IPython.display import display\ndisplay({%r: {}, 'text/plain': '0%%'}, raw=True)\nprint('done')"
    cell = nbformat.v4.new_code_cell(source % "application/vnd.jupyter.widget-view+json")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    load("execute").execute(path)
    assert [output.text for output in nbformat.read(path, as_version=4).cells[0].outputs] == ["done\n"]
