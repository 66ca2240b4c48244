"""Describe the environment of a result (command, commit, versions, machine), and write its files safely."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Return the provenance of a result besides its recipe: command, commit, versions and machine."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git; not in its repository
        ask = partial(subprocess.run, check=True, capture_output=True, text=True)
        ask([*git, "ls-files", "--error-unmatch", Path(__file__).name])  # not a repository that this is installed in
        commit = ask([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.strip()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    launcher, arguments = ["python"], sys.orig_argv[1:]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this as python -u -m ...
        launcher, arguments = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]], arguments[1:]
    return {
        "command": [*launcher, *arguments],
        "commit": commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: installed for name in ("torchvision", "timm") if (installed := _version(name))},
        },
        "machine": {
            "system": platform.platform(),
            "cpu": capabilities.get("cpu_name") or platform.processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def printable(text: str) -> str:
    """Return `text` with characters that standard output cannot encode written as backslash escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def data_cache() -> Path:
    """Return the folder of downloaded data sets, made if necessary: convnext_min in XDG_CACHE_HOME or ~/.cache.

    Raises OSError if there is no place for it.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "convnext_min").absolute()
    except RuntimeError as error:  # neither HOME nor an entry in the password file
        raise OSError("there is no home folder to keep a download in") from error
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", **options: Any) -> Iterator[IO]:
    """Open a file that replaces `path` once it is complete and on the disk; until then `path` stays as it was.

    Raises OSError, for example if the disk is full; `path` is then unchanged.
    """
    partial_path = path.with_suffix(".partial")
    try:
        with open(partial_path, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial_path.unlink(missing_ok=True)
        raise
    partial_path.replace(path)


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write `values` as readable JSON."""
    with atomic_write(path, encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
