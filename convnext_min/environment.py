"""What a result depends on besides its recipe: command, commit, versions and machine."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its recipe: command, commit, versions and machine."""
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


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write `values` as readable JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")
