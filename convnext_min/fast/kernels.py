"""Compile the loops of kernels.cpp when they are first needed, and call them with tensors.

Addresses of memory are only taken from ordinary CPU tensors (`is_array`), and only while PyTorch computes at once
(`is_eager`). Everything else (tracing, fake tensors, subclasses, transforms of torch.func) goes through PyTorch's own
operations, so that it behaves as in the plain model.
"""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from convnext_min.fast import cache

TYPES = {torch.float32: ["-DT=float", "-DFLOAT"], torch.bfloat16: ["-DT=bf16"]}  # of the matrix products
SOURCE = Path(__file__).with_name("kernels.cpp")
LANES = 8  # floats in a register of AVX2
PARTS = 32  # partial sums over rows: see kernels.cpp
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
# Tried in this order. Apple's clang has no OpenMP, and older ones no -march=native; the loops then run in one thread.
TARGETS = (
    ["-fopenmp", "-march=native"],
    ["-fopenmp-simd", "-march=native"],
    ["-fopenmp-simd", "-mcpu=native"],
    [],
)


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the functions of kernels.cpp for matrix products in `dtype`, compiled by CXX or "c++", or from the cache.

    Compiling takes a second or two, once per version, compiler and machine where `cache` can keep the library. Without
    a C++ compiler or a temporary folder warn once and return None.
    """
    try:
        return compile_ahead(dtype).result()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"training will be slower: kernels.cpp was not compiled ({reason})", stacklevel=2)
        return None


@functools.cache
def compile_ahead(dtype: torch.dtype) -> Future[ctypes.CDLL]:
    """Start to find or compile the functions in a thread; `kernels` waits for it and reports its errors.

    Python waits for the thread before it exits, so that no compiler and no temporary files are left behind.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(_find_or_build, dtype)
    pool.shutdown(wait=False)
    return future


def _find_or_build(dtype: torch.dtype) -> ctypes.CDLL:
    key = _key(dtype)
    return _load(cache.find(key)) or _build(dtype, key)


def _key(dtype: torch.dtype) -> str:
    """Return the cache key of kernels.cpp compiled by this compiler on this machine."""
    command = [*compiler(), *FLAGS, *chain(*TARGETS), *TYPES[dtype]]
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(f"there is no compiler {command[0]!r}; set CXX to one")
    state = os.stat(program)
    return cache.key(SOURCE.read_bytes(), *command, program, f"{state.st_size} {state.st_mtime_ns}")


def _load(library: Path | None) -> ctypes.CDLL | None:
    """Return the library's functions, or None without a library or if it cannot be loaded."""
    try:
        return library and ctypes.CDLL(str(library))
    except OSError:
        return None


def _build(dtype: torch.dtype, key: str) -> ctypes.CDLL:
    """Compile kernels.cpp with the first of `TARGETS` that this compiler takes, load it and keep it in the cache.

    Raise OSError or CalledProcessError, of the first target, if none works.
    """
    errors = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows cannot delete loaded libraries
        library = Path(folder, "kernels.so")
        for target in TARGETS:
            command = [*compiler(), *FLAGS, *target, *TYPES[dtype], str(SOURCE), "-o", str(library)]
            try:
                # In its own session, or Ctrl-C would end the compiler as if it refused the target.
                options = {"stdin": subprocess.DEVNULL, "errors": "replace", "start_new_session": True}
                subprocess.run(command, check=True, capture_output=True, text=True, **options)
                loaded = ctypes.CDLL(str(library))
            except (OSError, subprocess.CalledProcessError) as error:
                errors.append(error)
            else:
                cache.keep(library, key)
                return loaded
    raise errors[0]


def compiler() -> list[str]:
    """Return the command that CXX names, with its arguments or wrapper, or "c++" if CXX is empty or not set."""
    name = os.environ.get("CXX", "")
    return [name] if shutil.which(name) else shlex.split(name) or ["c++"]


def has_products(dtype: torch.dtype) -> bool:
    """Return whether kernels.cpp has matrix products in `dtype`: in float32 for processors with AVX2 and no AVX-512."""
    return hasattr(kernels(dtype), "pointwise")


def pack(matrix: Tensor) -> Tensor:
    """Return the values of `matrix` (K, N), which can be a transpose, in the order in which `times` reads them."""
    k, n = matrix.shape
    packed = matrix.new_empty(-(-n // LANES) * LANES * k)
    base = matrix if matrix.is_contiguous() else matrix.t()
    run(torch.float32, "pack", k, n, *matrix.stride(), base, packed)
    return packed


def run(dtype: torch.dtype, name: str, *values: Tensor | int | float | None) -> None:
    """Call the function `name` of kernels.cpp with tensors, as pointers to their memory, and integers and floats.

    Raise ValueError for a tensor that is not an array without gaps.
    """
    threads = ctypes.c_int(torch.get_num_threads())
    getattr(kernels(dtype), name)(threads, *map(_argument, values))


def _argument(value: Tensor | int | float | None):
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, float):
        return ctypes.c_float(value)
    if not isinstance(value, Tensor):
        return ctypes.c_int64(value)
    if not (is_array(value) and is_dense(value)):
        raise ValueError(f"kernels.cpp needs a contiguous CPU tensor, got {type(value).__name__} {tuple(value.shape)}")
    return ctypes.c_void_p(value.data_ptr())


def is_eager() -> bool:
    """Return whether operations run at once, and nothing traces, intercepts or transforms them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()  # make_fx, fake tensors, FLOP counters
        or torch._C._len_torch_function_stack()  # torch.set_default_device
        or torch._C._are_functorch_transforms_active()  # vmap, grad, jvp
        or forward_ad._current_level >= 0
    )


def is_array(tensor: Tensor | None) -> bool:
    """Return whether `tensor` is an ordinary CPU tensor, whose values lie in memory according to its strides."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and torch._C._has_storage(tensor)  # neither sparse nor batched
        and tensor.dtype in TYPES
        and not (tensor.is_nested or tensor.is_neg() or tensor._is_zerotensor())
    )


def is_dense(x: Tensor) -> bool:
    """Return whether the values of `x` fill its memory without gaps, in NCHW or NHWC order."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which matrix products of `x` are computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def is_ordinary(x: Tensor, *weights: Tensor | None) -> bool:
    """Return whether a layer of float32 `weights` is applied to `x` eagerly, in float32 or under bfloat16 autocast."""
    return (
        is_eager()
        and all(map(is_array, (x, *weights)))
        and all(weight.dtype == torch.float32 for weight in weights)
        and (x.dtype == torch.float32 or torch.is_autocast_enabled("cpu"))
        and matmul_dtype(x) in TYPES
        and x.numel() > 0
    )
