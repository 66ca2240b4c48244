"""Measure how much memory a function takes at its peak, as the operating system counts it."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil


def added_memory(function: Callable[..., Any], *arguments: Any) -> int:
    """Return the bytes that `function(*arguments)` adds to the resident memory of a fresh process, at the peak.

    This is what decides whether a computation fits: live tensors, freed ones that the allocator has not returned to the
    system, and the buffers of all libraries. Python and everything that the module of `function` imports are in memory
    before, and do not count. A process is used once, because memory that an earlier call has freed would be reused
    without being counted.

    `function` has to be a function of an importable module. Raises BrokenProcessPool if the process is killed, for
    example for lack of memory.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_added_here, function, arguments).result()


def _added_here(function: Callable[..., Any], arguments: tuple) -> int:
    before = psutil.Process().memory_info().rss
    function(*arguments)
    return peak_resident_memory() - before


def peak_resident_memory() -> int:
    """Return the largest resident memory that this process has had so far, in bytes."""
    if sys.platform == "linux":  # its ru_maxrss starts at the memory of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
