"""`make address` and `make version` reach every place that has the address or the version, and nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
OWNER, NAME = "Someone", "their.fork"  # apart, so that rewriting does not touch this file


def git(*arguments: str, folder: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the tracked files without the recorded results, with a git repository of its own."""
    for name in git("ls-files", "-z").split("\0"):
        if (ROOT / name).is_file() and not name.startswith("book/results/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    git("init", "-q", folder=tmp_path)
    git("add", "-A", folder=tmp_path)
    return tmp_path


def address(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "book/address.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in git("ls-files", "-z", folder=folder).split("\0") if name}


def holding(folder: Path, text: str) -> set[str]:
    return {name for name, content in contents(folder).items() if text.encode() in content}


def test_an_address_is_rewritten_everywhere_and_back(copy):
    before, config = contents(copy), yaml.safe_load((copy / "_config.yml").read_text())
    url, site = config["repository"]["url"], config["html"]["baseurl"].removeprefix("https://").rstrip("/")
    repository = url.removeprefix("https://github.com/")
    old = holding(copy, repository) | holding(copy, site)
    assert len(old) > 15 and {"README.md", "CITATION.cff", "pyproject.toml", "convnext_min/book/results.py"} <= old
    assert address(copy, "--url", f"https://github.com/{OWNER}/{NAME}").returncode == 0
    assert holding(copy, repository) == holding(copy, site) == set()
    assert holding(copy, f"{OWNER}/{NAME}") | holding(copy, f"{OWNER.lower()}.github.io/{NAME}") == old
    config = yaml.safe_load((copy / "_config.yml").read_text())
    assert config["repository"]["url"] == f"https://github.com/{OWNER}/{NAME}"
    assert config["html"]["baseurl"] == config["sphinx"]["config"]["ogp_site_url"]
    assert config["html"]["baseurl"] == f"https://{OWNER.lower()}.github.io/{NAME}/"
    assert all(json.loads(path.read_text()) for path in (copy / "notebooks").glob("*.ipynb"))
    assert address(copy, "--url", url).returncode == 0
    assert contents(copy) == before


def test_a_version_is_rewritten_everywhere(copy):
    before = contents(copy)
    tag = yaml.safe_load((copy / "_config.yml").read_text())["repository"]["branch"]
    assert address(copy, "--version", "9.8.7").returncode == 0
    assert holding(copy, tag) <= {"CHANGELOG.md"}
    for name in ("convnext_min/__init__.py", "CITATION.cff", "_config.yml", "notebooks/00_quickstart.ipynb"):
        assert "9.8.7" in (copy / name).read_text(encoding="utf-8"), name
    assert address(copy, "--version", tag.removeprefix("v")).returncode == 0
    assert contents(copy) == before


@pytest.mark.parametrize("arguments", [("--url", "https://example.org/book"), ("--version", "next")])
def test_a_wrong_address_or_version_changes_nothing(copy, arguments):
    before, result = contents(copy), address(copy, *arguments)
    assert result.returncode == 2 and f"'{arguments[1]}' is not like " in result.stderr
    assert contents(copy) == before
