"""Keep compiled libraries in the user's cache, in a folder that nobody else can write to.

A library is code: it is loaded from the cache only if its digest is right and the folder and all folders above it
belong to the user or to root. In any other case, and on Windows, nothing is kept. Deleting the folder is always safe.
"""

import hashlib
import os
import platform
import shutil
import stat
import tempfile
from pathlib import Path

KEPT = 8  # libraries in the cache, the newest


def find(key: str) -> Path | None:
    """Return the library that was kept under `key`, or None if there is none or it is damaged."""
    folder = private_folder()
    for path in sorted(folder.glob(f"{key}-*.so")) if folder else []:
        if path.stem.removeprefix(f"{key}-") == _digest(path.read_bytes()):
            return path
    return None


def keep(library: Path, key: str) -> None:
    """Copy `library` into the cache under `key` and delete the oldest; do nothing if that is not possible."""
    folder = private_folder()
    if folder is None:
        return
    path = folder / f"{key}-{_digest(library.read_bytes())}.so"
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            copy = shutil.copy(library, place)
            os.replace(copy, path)  # at once, so that other processes see the whole file or none
        for old in sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError:
        return  # a full or read-only disk, or another process that deletes the same file


def private_folder() -> Path | None:
    """Return the cache's folder, made if necessary, or None if others could write to it or there is no home."""
    if not hasattr(os, "geteuid"):
        return None
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache, "convnext_min-kernels").absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        return folder if _only_the_user_writes(folder) else None
    except (OSError, RuntimeError):  # RuntimeError: neither HOME nor an entry in the password file
        return None


def _only_the_user_writes(folder: Path) -> bool:
    """Return whether `folder` is the user's and nobody else but root can replace it or its contents."""
    if folder.stat().st_uid != os.geteuid() or folder.stat().st_mode & 0o077:
        return False
    for parent in folder.parents:
        state = parent.stat()
        shared = state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX  # in sticky folders one deletes one's own
        if state.st_uid not in (0, os.geteuid()) or shared:
            return False
    return True


def machine() -> str:
    """Return a description of the processor and the system's libraries, which decide if native code can run."""
    try:
        processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        names = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")
        processor = [line for line in processor if line.startswith(names)]
    except OSError:
        processor = [platform.node(), platform.processor()]
    return "\n".join([platform.machine(), *platform.libc_ver(), *processor])


def key(*parts: str | bytes) -> str:
    """Return a cache key for `parts` on this machine."""
    texts = [part.encode() if isinstance(part, str) else part for part in (machine(), *parts)]
    return _digest(b"\0".join(texts))[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
