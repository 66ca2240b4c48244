"""What is installed: dependencies and extras, the files of the package, and one version everywhere."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

import convnext_min
from convnext_min import extras

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "convnext_min"
OPTIONAL = {"IPython", "datasets", "matplotlib_inline", "wandb"}  # used where they are installed, asked for by no extra
DISTRIBUTIONS = {  # where the name differs from the module's
    "PIL": "pillow",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "skimage": "scikit-image",
}
NEEDED = {"data": ["train"], "train": ["train"], "experiments": ["train", "weights"], "dense": ["train", "dense"]}
NEEDED |= {"book": ["train", "book"], "weights.py": ["weights"], "download.py": ["weights"], "timm.py": ["train"]}
NEEDED |= {"book/dense_exercises.py": ["train", "book", "dense"]}  # of two chapters alone
FOLDERS = [folder for folder in NEEDED if (PACKAGE / folder).is_dir()]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    """Return the names of distributions, without version ranges."""
    return {re.split(r"[<>=!~ ]", line)[0] for line in requirements}


def third_party(path: Path) -> set[str]:
    """Return the distributions that a file imports, inside functions too."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    imported -= sys.stdlib_module_names | OPTIONAL | {"convnext_min"}
    return {DISTRIBUTIONS.get(name, name) for name in imported}


def run(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a new process in which no optional dependency can be imported."""
    blocked = [name for modules in extras.MODULES.values() for name in modules]
    block = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    command = [sys.executable, "-W", "ignore", "-c", block + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_requirements_ask_for_every_extra(project):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = [line for line in lines if not line.startswith("#")]
    assert asked == [f"-e .[{','.join(project['optional-dependencies'])}]"]


def test_the_package_alone_needs_torch_alone(project):
    assert names(project["dependencies"]) == {"torch"}


@pytest.mark.parametrize("extra", extras.MODULES)
def test_an_extra_brings_the_modules_that_are_checked(project, extra):
    checked = {DISTRIBUTIONS.get(name, name) for name in extras.MODULES[extra]}
    assert checked <= names(project["optional-dependencies"][extra])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_everything_that_a_module_imports_is_a_dependency(project, path):
    declared = names(project["dependencies"])
    place = path.relative_to(PACKAGE)
    for extra in NEEDED.get(place.as_posix(), NEEDED.get(place.parts[0], ())):
        declared |= names(project["optional-dependencies"][extra])
    assert third_party(path) <= declared


def test_the_package_imports_nothing_but_torch():
    code = "import torch\nbefore = set(sys.modules)\nimport convnext_min\nfrom convnext_min import convnext_tiny\n"
    code += "added = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
    code += "import json; print(json.dumps(sorted(added)))"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) <= {"convnext_min", "torch"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_missing_extra_is_named(folder):
    result = run(f"import convnext_min.{folder}")
    needed = NEEDED[folder]
    line = f"ImportError: convnext_min.{folder} needs the extra '{needed[0]}' (PIL is missing): "
    assert result.stderr.splitlines()[-1] == line + f"pip install 'convnext-min[{','.join(needed)}]'"


def test_a_command_without_its_extra_ends_with_one_line():
    code = "import runpy\nsys.argv = ['train']\nrunpy._run_module_as_main('convnext_min.train')"  # as python -m does it
    result = run(code)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "convnext_min.train needs the extra 'train'" in line and "pip install 'convnext-min[train]'" in line


def test_every_folder_with_code_is_installed():
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    assert {name.replace(".", "/") for name in find_packages(ROOT, include=["convnext_min*"])} == set(map(str, folders))


def test_there_is_one_version():
    version, tag = convnext_min.__version__, f"v{convnext_min.__version__}"
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert config["repository"]["branch"] == tag and str(citation["version"]) == version
    changelog, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "README.md"))
    assert re.search(rf"^## {re.escape(version)} ", changelog, re.MULTILINE)
    badges = re.findall(r"colab\.research\.google\.com/github/[\w./-]+?/blob/([^/]+)/", readme)
    assert set(badges) == {tag}
