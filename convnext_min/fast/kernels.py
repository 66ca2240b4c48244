"""Compile the loops of kernels.cpp when they are first needed, and call them with tensors."""

import ctypes
import functools
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}  # types of the matrix products: their names in kernels.cpp
PARTS = 32  # partial sums over rows: see kernels.cpp
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the functions of kernels.cpp for matrix products in `dtype`, compiled in a second or two by CXX or "c++".

    Without a C++ compiler warn once and return None. Each process compiles for itself, so that neither processes nor
    machines that share a home disturb each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(__file__).with_name("kernels.cpp"), Path(folder, "fast.so")
        try:
            command = [os.environ.get("CXX", "c++"), *FLAGS, f"-DT={TYPES[dtype]}", source, "-o", library]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            warnings.warn(f"training will be slower: kernels.cpp was not compiled ({reason})", stacklevel=2)
            return None


def run(dtype: torch.dtype, name: str, *values: Tensor | int | float) -> None:
    """Call the function `name` of kernels.cpp with contiguous tensors, as pointers, and with integers and floats."""

    def convert(value):
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)

    getattr(kernels(dtype), name)(*map(convert, values))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which matrix products of `x` are computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def able(dtype: torch.dtype, x: Tensor, *weights: Tensor) -> bool:
    """Return whether kernels.cpp can compute: plain tensors of known types on a CPU, and nothing is traced."""
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in (x, *weights))
        and all(t.dtype == torch.float32 for t in weights)
        and dtype in TYPES
        and x.dtype in TYPES
        and x.ndim == 4
        and not torch.compiler.is_compiling()
        and kernels(dtype) is not None
    )
