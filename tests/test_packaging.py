"""pyproject.toml, requirements.txt and the imports of the package say the same."""

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ROOT = Path(__file__).parents[1]
IN_NOTEBOOKS = {"matplotlib_inline"}  # imported only inside a notebook, which brings it along
DISTRIBUTIONS = {"PIL": "pillow"}  # where the name differs from the module's


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_hold_every_dependency_with_the_same_range(project):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    extras = project["optional-dependencies"]
    assert sorted(required) == sorted([*project["dependencies"], *extras["dense"], *extras["book"], *extras["test"]])


def test_everything_the_package_imports_is_a_dependency(project):
    imported = set()
    for path in (ROOT / "convnext_min").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    others = imported - sys.stdlib_module_names - IN_NOTEBOOKS - {"convnext_min"}
    needed = project["dependencies"] + project["optional-dependencies"]["dense"]
    declared = {re.split(r"[<>=!~ ]", line)[0].replace("-", "_") for line in needed}
    assert {DISTRIBUTIONS.get(name, name) for name in others} <= declared
