"""A release is refused from an unfinished tree, and its checksums are those of its files."""

import hashlib
import importlib.util
import subprocess
from pathlib import Path

import pytest

import convnext_min

ROOT = Path(__file__).parents[1]


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The module book/release.py for a repository of its own with a package of version 1.2.3."""
    spec = importlib.util.spec_from_file_location("release", ROOT / "book" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.version() == convnext_min.__version__
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DIST", tmp_path / "dist")
    (tmp_path / "dist").mkdir()
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-01-31)\n")
    for arguments in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return module


def test_a_clean_tree_with_a_dated_entry_may_be_released(release):
    release.check("1.2.3")


def test_an_uncommitted_change_is_refused(release):
    (release.ROOT / "new.txt").touch()
    with pytest.raises(SystemExit, match=r"1 files are not committed, the first is new\.txt"):
        release.check("1.2.3")


def test_a_version_without_a_dated_entry_is_refused(release):
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md has no entry.*## 1\.2\.4 \("):
        release.check("1.2.4")


def test_weights_have_the_names_of_their_networks(release):
    for name in ("atto", "femto"):
        (release.ROOT / "weights" / name).mkdir(parents=True)
        (release.ROOT / "weights" / name / "model.safetensors").write_text(name)
    release.git("add", "weights")
    release.copy_weights()
    assert {path.name: path.read_text() for path in release.DIST.iterdir()} == {
        "atto.safetensors": "atto",
        "femto.safetensors": "femto",
    }


def test_checksums_are_in_the_format_of_sha256sum(release):
    (release.DIST / "wheel").write_bytes(b"content")
    release.write_checksums([release.DIST / "wheel"])
    assert (release.DIST / "SHA256SUMS").read_text() == f"{hashlib.sha256(b'content').hexdigest()}  wheel\n"
