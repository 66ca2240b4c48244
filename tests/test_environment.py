"""Results name the command, the commit and the versions that made them."""

import subprocess
import sys
from pathlib import Path

from convnext_min import environment


def test_the_command_of_a_result_names_what_started_it(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "convnext_min.train", "--epochs", "1"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = environment.environment()["command"]
    assert command == ["torchrun", "--nproc-per-node", "2", "-m", "convnext_min.train", "--epochs", "1"]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert environment.environment()["command"][:2] == ["python", "-u"]


def test_a_result_names_the_commit_of_this_repository_and_of_no_other(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    installed = tmp_path / "site-packages" / "convnext_min" / "records.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "not ours"]
    subprocess.run(["git", "-C", tmp_path, *options], check=True)
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert environment.environment()["commit"] is None
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    assert len(environment.environment()["commit"].removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.environment()["commit"] is None  # there is no git


def test_data_is_kept_in_the_users_cache_wherever_that_is(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for variable, folder in (("", tmp_path / "home" / ".cache"), (str(tmp_path / "cache"), tmp_path / "cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
        assert environment.data_cache() == folder / "convnext_min" and (folder / "convnext_min").is_dir()
