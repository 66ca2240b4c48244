"""Download a file once: progress, a cache, resumed transfers, time limits and checksums. Needs only Python."""

import contextlib
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import IO

import torch

CHUNK = 1 << 20  # bytes per read
PAUSE = 1.0  # seconds before the second attempt; each later pause is twice as long


def download(
    url: str, sha256: str | None = None, progress: bool = True, timeout: float = 30.0, attempts: int = 3
) -> Path:
    """Download `url` into PyTorch's cache, unless it is there, and return the file's path.

    `sha256` is the file's hexadecimal digest or its first digits. Without it, the digits in a name such as
    `model-983f1562.pth` are taken; there must be 8 to 64 and a letter among them, since digits alone may be a date.
    `timeout` is the number of seconds after which a silent connection is closed. A broken transfer is resumed where
    the server allows it, otherwise restarted; only complete files enter the cache. Addresses that differ in their query
    (after "?") have files of their own. `file://` addresses are read in place. Raises ConnectionError if all attempts
    fail, ValueError for a wrong digest.
    """
    address = urllib.parse.urlsplit(url)
    sha256 = sha256 or _digits_in(address.path)
    if address.scheme == "file":
        path = Path(urllib.request.url2pathname(address.path))
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        _verify(path, sha256, url)
        return path
    folder = cache_folder() / address.netloc.replace(":", "_")
    if address.query:  # often long, and the suffix of the file's name is needed to read it
        folder /= hashlib.sha256(address.query.encode()).hexdigest()[:16]
    path = folder / address.path.lstrip("/")
    if path.is_file() and (sha256 is None or _sha256(path).startswith(sha256)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            _fetch(url, file, progress, timeout, attempts)
        _verify(part, sha256, url)
        part.replace(path)  # at once, so that other processes see the whole file or none
    finally:
        part.unlink(missing_ok=True)
    return path


def cache_folder() -> Path:
    """Return the folder of downloaded weights: `convnext_min` in torch.hub's, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "convnext_min"


def _fetch(url: str, file: IO[bytes], progress: bool, timeout: float, attempts: int) -> None:
    version = None  # the server's name for the bytes received so far
    for attempt in range(attempts):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "convnext_min"})
            if version and file.tell():
                request.add_header("Range", f"bytes={file.tell()}-")
                request.add_header("If-Range", version)
            with urllib.request.urlopen(request, timeout=timeout) as response:
                version = response.headers.get("ETag") or response.headers.get("Last-Modified")
                _receive(response, file, progress, Path(urllib.parse.urlsplit(url).path).name)
            return
        except (OSError, http.client.HTTPException) as error:
            reason = error
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break  # not found or not allowed: another attempt gets the same answer
    raise ConnectionError(f"cannot download {url}: {reason}. Without network, pass the path of a downloaded file")


def _receive(response: http.client.HTTPResponse, file: IO[bytes], progress: bool, name: str) -> None:
    """Append the body of `response` to `file`, or replace the file's contents if the server starts from the first."""
    if response.status != 206:
        file.seek(0)
        file.truncate()
    length = response.headers.get("Content-Length")
    total = file.tell() + int(length) if length else None
    with _bar(progress, name, total, file.tell()) as advance:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            advance(len(chunk))
    if total is not None and file.tell() != total:
        raise ConnectionError(f"the connection closed after {file.tell():,} of {total:,} bytes")


@contextlib.contextmanager
def _bar(progress: bool, name: str, total: int | None, start: int):
    """Yield a function that advances a progress bar by a number of bytes; without tqdm, it does nothing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=not progress) as bar:
        yield bar.update


def _digits_in(path: str) -> str | None:
    """Return the digits of the digest in a file's name, as in `convnext_tiny-983f1562.pth`; None for a date."""
    found = re.search(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.\w+$", path)
    return found[1] if found else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _verify(path: Path, sha256: str | None, url: str) -> None:
    if sha256 and not (actual := _sha256(path)).startswith(sha256):
        raise ValueError(f"{url} has the SHA-256 digest {actual}, expected {sha256}: it is not the right file")
