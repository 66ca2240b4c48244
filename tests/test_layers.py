"""The imports of the package go one way: from a layer to itself and to the layers before it, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "convnext_min"
LAYERS = [  # convnext_min is the package's own __init__
    ["extras", "paper", "convnext", "recipes"],
    ["blocks", "roadmap", "isotropic", "download", "formats", "weights", "backbone", "timm", "convnext_min"],
    ["environment", "measure", "data", "fast"],
    ["train"],
    ["dense", "experiments"],
    ["book"],
]
RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
ROOT = PACKAGE.parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports at its top, inside functions and for annotations."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {member if member in MODULES else node.module for member in members}
    return found & MODULES.keys()


def part(module: str) -> str:
    """Return the file or folder at the top of the package that a module belongs to."""
    return module.partition(".")[2].partition(".")[0] or module


GRAPH = {module: imports(path) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_from_later_layers_to_earlier_ones(module):
    assert part(module) in RANKS, f"give {part(module)} a place in LAYERS, in book/architecture.md and CONTRIBUTING.md"
    against = [name for name in GRAPH[module] if RANKS[part(name)] > RANKS[part(module)]]
    assert not against, f"{module} imports {', '.join(against)}, which belong to a later layer"


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_no_folders_import_each_other_in_a_circle():
    folders = {}
    for module, imported in GRAPH.items():
        folders.setdefault(part(module), set()).update({part(name) for name in imported} - {part(module)})
    TopologicalSorter(folders).prepare()
