"""Prose stays true when somebody runs the notebooks again on another machine."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
# The paper's own GPUs, V100 and A100 (Tables 1 and 12), are not in it.
MACHINE = re.compile(
    r"\b(Xeon|EPYC|Ryzen|Threadripper|Opteron|Graviton|Core i[3579]|Apple M\d|M[1-4] (?:Pro|Max|Ultra)|"
    r"AMX|AVX2|AVX-?512|H100|L40S?|H200|RTX ?\d+|GTX ?\d+)\b"
)
RANKED_HERE = re.compile(r"\bon this (?:page|machine)\b(?:(?!\n\n)[^.])*\b(?:fast|slow)(?:er|est)\b", re.IGNORECASE)
ALLOWED = {
    ("README.md", "Xeon"): "names the processors of recorded results, which a table lists",
    ("README.md", "EPYC"): "as above",
    ("README.md", "AMX"): "as above",
    ("README.md", "AVX2"): "as above",
    ("book/glossary.md", "AMX"): "a definition",
}


def prose() -> dict[str, str]:
    """Return the Markdown of each notebook and page, without tables and code."""
    texts = {}
    for path in sorted([ROOT / "README.md", *ROOT.glob("book/*.md"), *ROOT.glob("notebooks/*.ipynb")]):
        if path.suffix == ".ipynb":
            cells = nbformat.read(path, 4).cells
            text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        else:
            text = path.read_text()
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        texts[path.relative_to(ROOT).as_posix()] = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    return texts


def test_prose_names_machines_only_where_a_recorded_result_or_a_definition_needs_them():
    named = {(name, machine) for name, text in prose().items() for machine in MACHINE.findall(text)}
    assert named - set(ALLOWED) == set(), "print the machine instead: results.processor"
    assert set(ALLOWED) - named == set(), "no longer needed: remove them from ALLOWED"


def test_prose_does_not_rank_speeds_of_this_machine():
    assert {name: found for name, text in prose().items() if (found := RANKED_HERE.findall(text))} == {}


def test_machine_names_are_found():
    assert MACHINE.findall("On the Xeon, with AMX, or an EPYC with AVX2.") == ["Xeon", "AMX", "EPYC", "AVX2"]
    assert RANKED_HERE.search("On this page ConvNeXt is faster.")
