"""Training on a CPU in half the time: the same parameters, state dict and function, other arithmetic.

    model = accelerate(convnext_atto())  # in place; `restore(model)` undoes it

PyTorch computes the weight gradient of a depthwise convolution many times more slowly than its forward pass, and most
of what is left of a step, beside the matrix products, is memory traffic: each operation between them reads and writes
the whole activation. `accelerate` gives depthwise convolutions another backward pass, in any model, and computes what
is between the matrix products of a `Block` in single passes (fast.cpp), where there is a C++ compiler to build them.
"""

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from convnext_min.convnext import Block, ConvNeXt, LayerNorm

PARTS = 32  # of a sum over rows: see fast.cpp


@functools.cache
def kernels(dtype: torch.dtype = torch.float32) -> ctypes.CDLL | None:
    """The functions of fast.cpp for matrix products in `dtype`, compiled in a second or two; None without a compiler."""
    name = {torch.float32: "float", torch.bfloat16: "bf16"}[dtype]
    flags = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fast.so")
        command = [os.environ.get("CXX", "c++"), *flags, f"-DT={name}", Path(__file__).with_suffix(".cpp"), "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            return None


def _run(name: str, dtype: torch.dtype, *values: Tensor | int | float) -> None:
    def convert(value):
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)

    getattr(kernels(dtype), name)(*map(convert, values))


class NormFunction(Function):
    """LayerNorm over the last axis of x (..., C), float32, giving `dtype`."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        x, chans = x.contiguous(), x.shape[-1]
        y, stats = torch.empty_like(x, dtype=dtype), x.new_empty(x.numel() // chans, 2)
        _run("layer_norm", dtype, len(stats), chans, eps, x, weight, bias, y, stats)
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, stats = ctx.saved_tensors
        grad, grad_x, sums = grad.contiguous(), torch.empty_like(x), x.new_zeros(2, PARTS, len(weight))
        _run("layer_norm_back", grad.dtype, len(stats), len(weight), PARTS, grad, x, weight, stats, grad_x, *sums)
        return grad_x, *sums.sum(1), None, None


class BiasGelu(Function):
    """GELU(x + bias) for x (..., C), which is overwritten."""

    @staticmethod
    def forward(ctx, x, bias):
        y = torch.empty_like(x)
        _run("bias_gelu", x.dtype, x.numel() // len(bias), len(bias), x, bias, y)
        ctx.save_for_backward(x)  # now the derivative
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        chans = slope.shape[-1]
        grad, sums = grad.contiguous(), torch.zeros(PARTS, chans)
        _run("bias_gelu_back", grad.dtype, grad.numel() // chans, chans, PARTS, grad, slope, sums)
        return grad, sums.sum(0)


class ScaleAdd(Function):
    """shortcut + keep * gamma * (x + bias) for shortcut and x (N, H, W, C) and keep, stochastic depth's, (N, 1, 1, 1)."""

    @staticmethod
    def forward(ctx, shortcut, x, bias, gamma, keep):
        shortcut = shortcut.contiguous()
        y, pixels = torch.empty_like(shortcut), x.shape[1] * x.shape[2]
        _run("scale_add", x.dtype, len(x) * pixels, len(bias), pixels, shortcut, x, bias, gamma, keep, y)
        ctx.save_for_backward(x, bias, gamma, keep)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias, gamma, keep = ctx.saved_tensors
        grad, grad_x, sums = grad.contiguous(), torch.empty_like(x), torch.zeros(2, PARTS, len(bias))
        pixels = x.shape[1] * x.shape[2]
        sizes = len(x) * pixels, len(bias), PARTS, pixels
        _run("scale_add_back", x.dtype, *sizes, grad, x, bias, gamma, keep, grad_x, *sums)
        return grad, grad_x, *sums.sum(1), None


class DepthwiseConv(Function):
    """`F.conv2d` with groups = channels, x (N, C, H, W) and weight (C, 1, K, L), and fast gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = depthwise_input_grad(grad, weight, x.shape, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            grad_weight = depthwise_weight_grad(x, grad, weight.shape, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


def depthwise_input_grad(grad: Tensor, weight: Tensor, shape, stride, padding) -> Tensor:
    """The gradient of the input, (N, C, H, W): with stride 1 a depthwise convolution with the kernel turned around."""
    chans, (height, width), kernel = shape[1], shape[2:], weight.shape[2:]
    if stride == (1, 1) and padding[0] < kernel[0] and padding[1] < kernel[1]:
        full = [k - 1 - p for k, p in zip(kernel, padding)]
        return F.conv2d(grad, weight.flip(2, 3), padding=full, groups=chans)
    # With a stride, rows at the end may have been passed over: `output_padding` says how many.
    rest = [(n + 2 * p - k) % s for n, p, k, s in zip((height, width), padding, kernel, stride)]
    return F.conv_transpose2d(grad, weight, None, stride, padding, rest, groups=chans)


def depthwise_weight_grad(x: Tensor, grad: Tensor, shape, stride, padding) -> Tensor:
    """The gradient of the weight, (C, 1, K, L), as a convolution of the input with the output's gradient.

    dw[c, k] = sum over n and o of grad[n, c, o] * x[n, c, o * stride + k - padding] is, for each n and c, a plain
    convolution of one image with one (large) filter; the stride of the forward pass has become a dilation. So the
    batch is one image of N * C channels and the gradient its N * C filters, and what is left is a sum over n.
    """
    n, c, h, w = x.shape
    k, parts = shape[2], 4
    if kernels() and k in (3, 5, 7, 9, 11) and shape[3] == k and padding == (k // 2, k // 2) and stride[0] == stride[1]:
        x, grad = x.permute(0, 2, 3, 1).contiguous(), grad.permute(0, 2, 3, 1).contiguous()
        sums = x.new_zeros(parts, k, k, c)
        _run("weight_grad", torch.float32, k, parts, n, h, w, c, stride[0], x, grad, sums)
        return sums.sum(0).permute(2, 0, 1).unsqueeze(1)
    image = x.contiguous().view(1, n * c, h, w)  # both in NCHW: a copy if they were channels-last
    filters = grad.contiguous().view(n * c, 1, *grad.shape[2:])
    taps = F.conv2d(image, filters, None, 1, padding, dilation=stride, groups=n * c)  # (1, N * C, >= K, >= L)
    return taps.view(n, c, *taps.shape[2:])[..., : shape[2], : shape[3]].sum(0).unsqueeze(1)


class FastDepthwise(nn.Conv2d):
    """A depthwise `nn.Conv2d` that trains through `DepthwiseConv` on a CPU, in float32 also under autocast.

    Under bfloat16 autocast PyTorch's depthwise kernels gain nothing on the way forward and lose on the way back.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            x = x.to(self.weight.dtype, memory_format=torch.channels_last)
            return DepthwiseConv.apply(x, self.weight, self.bias, self.stride, self.padding)


class FastBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if x.device.type != "cpu":
            return super().forward(x)
        shortcut = x = x.float()
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = NormFunction.apply(x, self.norm.weight, self.norm.bias, self.norm.eps, dtype)
        x = BiasGelu.apply(F.linear(x, self.pwconv1.weight), self.pwconv1.bias)
        x = F.linear(x, self.pwconv2.weight)
        keep = self.drop_path(shortcut.new_ones(len(x), 1, 1, 1))
        gamma = torch.ones_like(self.pwconv2.bias) if self.gamma is None else self.gamma
        return ScaleAdd.apply(shortcut.permute(0, 2, 3, 1), x, self.pwconv2.bias, gamma, keep).permute(0, 3, 1, 2)


class FastLayerNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = NormFunction.apply(x.float().permute(0, 2, 3, 1), self.weight, self.bias, self.eps, torch.float32)
        return y.permute(0, 3, 1, 2)


class FastPatchify(nn.Conv2d):
    """A convolution whose patches do not overlap, as the matrix product that it is."""

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (n, c, h, w) = self.kernel_size, x.shape
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x = x.permute(0, 2, 3, 1).unflatten(1, (h // k, k)).unflatten(3, (w // k, k)).transpose(2, 3)
        x = x.to(dtype).reshape(n, h // k, w // k, k * k * c)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x, weight, self.bias).permute(0, 3, 1, 2)


def _is_plain_depthwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
    )


def accelerate(model: nn.Module, parts="dbnp") -> nn.Module:
    _keep_freed_memory()
    for module in model.modules():
        if _is_plain_depthwise(module) and 'd' in parts:
            module.__class__ = FastDepthwise
        elif type(module) is Block and 'b' in parts:
            module.__class__ = FastBlock
        elif type(module) is LayerNorm and 'n' in parts:
            module.__class__ = FastLayerNorm
        elif type(module) is nn.Conv2d and module.groups == 1 and module.kernel_size == module.stride and 'p' in parts:
            module.__class__ = FastPatchify
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place."""
    for module in model.modules():
        if type(module) is FastDepthwise:
            module.__class__ = nn.Conv2d
    return model


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, since a training step asks for the same buffers again and again.

    By default every buffer above 128 KiB goes back to the system when freed, and the next step pays for having
    each of its pages mapped and zeroed again: a good part of the step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)  # the largest value glibc takes
        libc.mallopt(m_trim_threshold, 1 << 30)
