"""Notebooks show nothing raw in any Markdown reader, their links lead somewhere, and the book makes more of them."""

import importlib
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from markdown_it import MarkdownIt
from pybtex.database import Entry, Person

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))
SITE = yaml.safe_load((ROOT / "_config.yml").read_text())["html"]["baseurl"]
MARKDOWN = MarkdownIt("commonmark").enable("table")

RAW = {
    "a role": re.compile(r"\{[\w:+-]+\}`"),
    "an attribute": re.compile(r"\{[#.%][^}]*\}"),
    "a directive or a label": re.compile(r"^(:::|```\{|\+\+\+|\([\w-]+\)=)", re.MULTILINE),
    "a reference without an address": re.compile(r"\]\[|\[[^\]]*\]\("),
    "an emphasis that does not end": re.compile(r"(?<!\w)\*\*?\w"),
}
YEAR = re.compile(r"\b(?:19|20)\d\d[a-z]?\b")


def extension(name: str):
    """Import a module of book/_ext."""
    if str(ROOT / "book" / "_ext") not in sys.path:
        sys.path.append(str(ROOT / "book" / "_ext"))
    return importlib.import_module(name)


def prose(path: Path) -> list[str]:
    """The texts of a notebook's Markdown cells, or of a page."""
    if path.suffix == ".md":
        return [path.read_text(encoding="utf-8")]
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]


def shown(source: str) -> str:
    """The text that a plain Markdown reader shows outside of code and mathematics; code is reduced to backticks."""
    without_math = re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", "", source, flags=re.DOTALL)
    lines = []
    for token in MARKDOWN.parse(without_math):
        if token.type == "inline":
            kinds = {"text": lambda t: t.content, "code_inline": lambda t: "``", "softbreak": lambda t: "\n"}
            lines.append("".join(kinds.get(t.type, lambda t: "")(t) for t in token.children))
        elif token.type == "fence":
            lines.append(f"```{token.info}")
    return "\n".join(lines)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_a_fence_ends_on_a_line_of_its_own(path):
    assert re.findall(r"^.*\S +```$", path.read_text(encoding="utf-8"), re.MULTILINE) == []


def links(source: str) -> list[tuple[str, str]]:
    """Address and text of every link and image."""
    found, opened = [], []
    for token in MARKDOWN.parse(source):
        for child in token.children or ():
            if child.type == "link_open":
                opened = [child.attrs["href"], ""]
            elif child.type == "link_close":
                found.append((unquote(opened[0]), opened[1]))
                opened = []
            elif child.type == "image":
                found.append((unquote(child.attrs["src"]), child.content))
            elif opened:
                opened[1] += " " if child.type == "softbreak" else child.content
    return found


def glossary() -> set[str]:
    """The anchors of the glossary's entries."""
    lines = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8").splitlines()
    terms = [line for line in lines if line and not line.startswith((" ", "#", ":"))]
    return {"term-" + re.sub(r"[^\w.]+", "-", term) for term in terms}


def figures(path: Path) -> set[str]:
    """The names of the figures of a notebook."""
    cells = [cell.metadata.get("mystnb", {}) for cell in nbformat.read(path, 4).cells]
    return {cell["figure"]["name"] for cell in cells if "name" in cell.get("figure", {})}


def problem(address: str, notebook: Path) -> str | None:
    """What is wrong with a link of a notebook, if anything."""
    if address.startswith(SITE):
        page, _, anchor = address.removeprefix(SITE).partition("#")
        stem = ROOT / (page.removesuffix(".html") or "book/index")
        if not any(stem.with_suffix(suffix).is_file() for suffix in (".md", ".ipynb")):
            return "no such page"
        return "no such entry" if anchor.startswith("term-") and anchor not in glossary() else None
    if re.match(r"[a-z]+:", address):
        return None
    file, _, anchor = address.partition("#")
    target = notebook.parent / file if file else notebook
    if not target.is_file():
        return "no such file"
    return "no such figure" if anchor and anchor not in figures(target) else None


def test_no_two_figures_have_the_same_name():
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells]
    names = [cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in cells]
    assert {name for name, times in Counter(filter(None, names)).items() if times > 1} == set()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_plain_reader_shows_nothing_raw(notebook):
    found = [(kind, match[0], source[:60]) for source in prose(notebook) for kind, pattern in RAW.items()
             for match in pattern.finditer(shown(source))]  # fmt: skip
    assert found == []


@pytest.mark.parametrize(
    "kind, source",
    [
        ("a role", "See {cite:p}`he2016resnet`."),
        ("an attribute", "A word{#anchor}."),
        ("a directive or a label", "(here)=\n# Title"),
        ("a directive or a label", "```{note}\ntext\n```"),
        ("a reference without an address", "See [the text][here]."),
        ("an emphasis that does not end", "*Figure: a caption"),
    ],
)
def test_what_is_raw_is_found(kind, source):
    assert RAW[kind].search(shown(source))
    fine = "The *same* in `{cite}` and $a_{b}^*$, **bold**, [a link](https://a.org): {1, 2}, 3 * 4, x[0]."
    assert not RAW[kind].search(shown(fine))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(notebook):
    found = [(address, problem(address, notebook)) for source in prose(notebook) for address, _ in links(source)]
    assert [(address, what) for address, what in found if what] == []


def test_a_wrong_link_is_found():
    chapter = ROOT / "notebooks" / "04_inverted_bottleneck.ipynb"
    wrong = {
        f"{SITE}book/nowhere.html": "no such page",
        f"{SITE}book/glossary.html#term-nothing": "no such entry",
        "99_nowhere.ipynb": "no such file",
        "#fig-nothing": "no such figure",
        "01_resnet50_and_the_recipe.ipynb#fig-lost": "no such figure",
    }
    assert {address: problem(address, chapter) for address in wrong} == wrong
    assert "term-batch-normalization" in glossary() and "fig-lost" in figures(chapter)


@pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=lambda path: path.stem)
def test_a_citation_is_the_label_of_the_paper_it_links(path):
    labels = extension("bibliography").labels_by_address(ROOT / "book" / "references.bib")
    wrong = []
    for address, text in [link for source in prose(path) for link in links(source)]:
        if YEAR.search(text) and (address in labels or "et al." in text):
            label = labels.get(address, "not in book/references.bib")
            if text not in (label, re.sub(r", (\w+)$", r" (\1)", label)):
                wrong.append((text, label))
    assert wrong == []


def test_every_entry_of_the_bibliography_is_cited():
    cited = {address for path in NOTEBOOKS + PAGES for source in prose(path) for address, _ in links(source)}
    assert set(extension("bibliography").labels_by_address(ROOT / "book" / "references.bib")) - cited == set()


def test_labels_tell_papers_of_the_same_authors_and_year_apart():
    def entry(title, *authors):
        return Entry("misc", {"title": title, "year": "2016"}, {"author": [Person(author) for author in authors]})

    one, two = entry("B", "He, Kaiming", "Sun, Jian"), entry("C", "He, Kaiming", "Sun, Jian")
    three, group = entry("A", *["Doll{\\'a}r, Piotr"] * 3), entry("D", "{Some Group}")
    found = extension("bibliography").labels([one, two, three, group])
    assert found == ["He and Sun, 2016a", "He and Sun, 2016b", "Dollár et al., 2016", "Some Group, 2016"]


def notebook_of(*cells: tuple[str, str]) -> dict:
    return {"cells": [{"cell_type": kind, "metadata": {}, "source": [source]} for kind, source in cells]}


def test_a_caption_moves_to_the_figure_before_it():
    notebook = notebook_of(("code", "fig"), ("markdown", "*Figure: Top-1,\nby _step_.*"), ("markdown", "Text."))
    notebook["cells"][0]["metadata"] = {"mystnb": {"figure": {"name": "fig-a"}}}
    code, text = extension("plain_markdown").attach_captions(notebook)["cells"]
    assert code["metadata"]["mystnb"]["figure"] == {"name": "fig-a", "caption": "Top-1,\nby _step_."}
    assert text["source"] == ["Text."]


@pytest.mark.parametrize("cells", [
    [("markdown", "Text."), ("markdown", "*Figure: After text.*")],
    [("code", "fig"), ("markdown", "*Figure: Two\n\nparagraphs.*")],
    [("code", "fig"), ("markdown", "*Figure: No end.")],
])  # fmt: skip
def test_a_caption_without_a_figure_is_an_error(cells):
    with pytest.raises(ValueError, match=r"a caption is one paragraph, \*Figure: \.\.\.\*, after a code cell"):
        extension("plain_markdown").attach_captions(notebook_of(*cells))


def test_a_figure_has_a_name_of_its_own():
    names = [name for path in NOTEBOOKS for name in figures(path)]
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_captions_stand_in_cells_of_their_own(notebook):
    """In the metadata of a cell, no reader but the book shows them."""
    cells = nbformat.read(notebook, 4).cells
    assert not any("caption" in cell.metadata.get("mystnb", {}).get("figure", {}) for cell in cells)
    for cell, caption in pairwise(cells):
        if "name" in cell.metadata.get("mystnb", {}).get("figure", {}):
            assert caption.source.startswith("*Figure:"), f"{cell.metadata.mystnb.figure.name} has no caption"
    extension("plain_markdown").attach_captions(notebook_of(*((cell.cell_type, cell.source) for cell in cells)))
