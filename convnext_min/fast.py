"""Training on a CPU in a fraction of the time: the same parameters, state dict and function, other arithmetic.

    model = accelerate(convnext_atto())  # in place; `restore(model)` undoes it

PyTorch computes the weight gradient of a depthwise convolution several times more slowly than its forward pass, and
most of the rest of a step, beside the matrix products, is memory traffic: each operation between them reads and writes
the whole activation. `accelerate` gives depthwise convolutions another backward pass, in any model, and computes a
ConvNeXt block as one operation, whose parts are single passes over the memory (fast.cpp) where a C++ compiler is there.
"""

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from convnext_min import blocks, convnext

TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}  # of the matrix products: their names in fast.cpp
PARTS = 32  # of a sum over rows: see fast.cpp
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of fast.cpp for matrix products in `dtype`, compiled in a second or two; None, and a warning once,
    without a C++ compiler. CXX names the compiler, "c++" if it is not set.

    Each process compiles for itself, so that processes cannot disturb each other, nor machines that share a home.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(__file__).with_suffix(".cpp"), Path(folder, "fast.so")
        try:
            command = [os.environ.get("CXX", "c++"), *FLAGS, f"-DT={TYPES[dtype]}", source, "-o", library]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            warnings.warn(f"training will be slower: fast.cpp was not compiled ({reason})", stacklevel=2)
            return None


def _run(dtype: torch.dtype, name: str, *values: Tensor | int | float) -> None:
    def convert(value):
        if isinstance(value, Tensor):
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)

    getattr(kernels(dtype), name)(*map(convert, values))


class BlockFunction(Function):
    """A ConvNeXt block, x (N, C, H, W) in float32 to the same, with matrix products in `dtype`: its passes by hand.

    `keep` (N, 1) is what stochastic depth multiplies each image's branch by. The weights of the two linear layers are
    (4C, C) and (C, 4C); `gamma` is (C,). Rows below are the pixels of all images. LayerNorm's weight and bias, `scale`
    and `shift`, are folded into the first linear layer: W (scale * x + shift) + b = (W scale) x + (W shift + b).
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, dtype, eps, x, kernel, kernel_bias, scale, shift, weight1, bias1, weight2, bias2, gamma, keep):
        n, c, h, w = x.shape
        rows = n * h * w
        x = x.contiguous(memory_format=torch.channels_last)
        conv = F.conv2d(x, kernel, kernel_bias, padding=kernel.shape[2] // 2, groups=c)
        conv = conv.contiguous(memory_format=torch.channels_last)
        normed, stds = torch.empty(rows, c, dtype=dtype), torch.empty(rows)
        _run(dtype, "normalize", rows, c, eps, conv, normed, stds)
        folded1, cast2 = (weight1 * scale).to(dtype), weight2.to(dtype)
        slope = normed @ folded1.t()  # what `bias_gelu` takes; it leaves GELU's derivative there
        hidden = torch.empty_like(slope)
        _run(dtype, "bias_gelu", rows, 4 * c, slope, weight1 @ shift + bias1, hidden)
        branch = hidden @ cast2.t()
        y = torch.empty_like(x)
        _run(dtype, "scale_add", rows, c, h * w, x, branch, bias2, gamma, keep, y)
        ctx.save_for_backward(
            x, normed, stds, slope, hidden, branch, kernel, scale, shift, weight1, folded1, cast2, bias2, gamma, keep
        )
        return y

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):
        x, normed, stds, slope, hidden, branch, kernel, scale, shift, weight1, folded1, cast2, bias2, gamma, keep = (
            ctx.saved_tensors
        )
        n, c, h, w = x.shape
        rows, dtype, padding = n * h * w, branch.dtype, (kernel.shape[2] // 2, kernel.shape[2] // 2)
        grad = grad.contiguous(memory_format=torch.channels_last)
        d_branch, sums, d_bias1 = torch.empty_like(branch), torch.zeros(3, PARTS, c), torch.zeros(PARTS, 4 * c)
        _run(dtype, "scale_add_back", PARTS, rows, c, h * w, grad, branch, bias2, gamma, keep, d_branch, *sums[:2])
        d_weight2 = d_branch.t() @ hidden
        d_hidden = d_branch @ cast2
        _run(dtype, "bias_gelu_back", PARTS, rows, 4 * c, d_hidden, slope, d_bias1)  # in place
        d_folded1 = (d_hidden.t() @ normed).float()
        d_normed, d_conv = d_hidden @ folded1, torch.empty_like(x)
        _run(dtype, "normalize_back", PARTS, rows, c, d_normed, normed, stds, d_conv, sums[2])
        d_x = depthwise_input_grad(d_conv, kernel, x.shape, (1, 1), padding).add_(grad)
        d_kernel = depthwise_weight_grad(x, d_conv, kernel.shape, (1, 1), padding)
        d_bias2, d_gamma, d_kernel_bias = sums.sum(1)
        d_bias1 = d_bias1.sum(0)
        d_scale, d_shift = (d_folded1 * weight1).sum(0), d_bias1 @ weight1
        d_weight1 = torch.addr(d_folded1 * scale, d_bias1, shift)
        linear = d_weight1, d_bias1, d_weight2.float(), d_bias2
        return None, None, d_x, d_kernel, d_kernel_bias, d_scale, d_shift, *linear, d_gamma, None


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
    batch is one image of N * C channels and the gradient its N * C filters, and what is left is a sum over n. With
    stride 1 there is a loop in fast.cpp, which needs no copy in another layout.
    """
    (n, c, h, w), (k, across), parts = x.shape, shape[2:], 4
    same = k == across and k in (3, 5, 7, 9, 11) and padding == (k // 2, k // 2) and stride == (1, 1)
    if same and x.dtype == grad.dtype == torch.float32 and kernels(torch.float32):
        x, grad = (part.permute(0, 2, 3, 1).contiguous() for part in (x, grad))
        sums = torch.zeros(parts, k, k, c)
        _run(torch.float32, "depthwise_back", k, parts, n, h, w, c, x, grad, sums)
        return sums.sum(0).permute(2, 0, 1).unsqueeze(1)
    image = x.contiguous().view(1, n * c, h, w)  # both in NCHW: a copy if they were channels-last
    filters = grad.contiguous().view(n * c, 1, *grad.shape[2:])
    taps = F.conv2d(image, filters, None, 1, padding, dilation=stride, groups=n * c)  # (1, N * C, >= K, >= L)
    return taps.view(n, c, *taps.shape[2:])[..., :k, :across].sum(0).unsqueeze(1)


class FastDepthwise(nn.Conv2d):
    """A depthwise `nn.Conv2d` that trains through `DepthwiseConv` on a CPU, in float32 also under autocast.

    Under bfloat16 autocast PyTorch's depthwise kernels gain nothing on the way forward and lose on the way back.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            x = x.to(self.weight.dtype, memory_format=torch.channels_last)
            return DepthwiseConv.apply(x, self.weight, self.bias, self.stride, self.padding)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What matrix products under `x` compute in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _able(dtype: torch.dtype, x: Tensor, *weights: Tensor) -> bool:
    """Whether fast.cpp can and should compute: in training, with plain tensors of known types, nothing traced."""
    return (
        torch.is_grad_enabled()
        and all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in (x, *weights))
        and all(t.dtype == torch.float32 for t in weights)
        and dtype in TYPES
        and x.dtype in TYPES
        and x.ndim == 4
        and not torch.compiler.is_compiling()
        and kernels(dtype) is not None
    )


class _Fast:
    """A block computed by `BlockFunction` where that can compute it; elsewhere by the class that comes next.

    It cannot where somebody listens to a part of the block, or has put another layer in the place of one.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype, parts = _autocast_dtype(x), (self.dwconv, self.norm, self.pwconv1, self.act, self.pwconv2)
        known = all(type(part) in PARTS_OF_BLOCK for part in parts) and self.act.approximate == "none"
        if not known or any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts):
            return super().forward(x)
        weights = [tensor for part in parts if part is not self.act for tensor in (part.weight, part.bias)]
        size = self.dwconv.kernel_size[0]
        centred = self.dwconv.kernel_size == (size, size) and self.dwconv.padding == (size // 2, size // 2) and size % 2
        if not (centred and self.dwconv.stride == (1, 1) and _able(dtype, x, *weights)):
            return super().forward(x)
        gamma = getattr(self, "gamma", None)
        gamma = torch.ones_like(weights[-1]) if gamma is None else gamma
        keep = self.drop_path(torch.ones(len(x), 1))
        weights[4], weights[6] = weights[4].flatten(1), weights[6].flatten(1)  # a 1x1 convolution's has four axes
        return BlockFunction.apply(dtype, self.norm.eps, x.float(), *weights, gamma, keep)


class FastBlock(_Fast, convnext.Block):
    """`Block` as one operation."""


class FastRoadBlock(_Fast, blocks.ConvNeXtBlock):
    """The block at the end of the road, whose linear layers are 1x1 convolutions."""


class FastPatchify(nn.Conv2d):
    """A convolution whose patches do not overlap, as the matrix product that it is."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = _autocast_dtype(x)
        if not _able(dtype, x, self.weight, self.bias) or x.shape[1] != self.in_channels:
            return super().forward(x)
        down, across = self.kernel_size
        rows, columns = x.shape[2] // down, x.shape[3] // across
        if rows == 0 or columns == 0:
            return super().forward(x)  # which says what is wrong
        x = x[..., : rows * down, : columns * across].to(dtype)  # what does not fill a patch is left out, as always
        x = x.permute(0, 2, 3, 1).unflatten(1, (rows, down)).unflatten(3, (columns, across)).transpose(2, 3).flatten(3)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


def _is_patchify(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride
        and module.groups == 1
        and module.bias is not None
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
    )


def _is_plain_depthwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
    )


PARTS_OF_BLOCK = (FastDepthwise, nn.LayerNorm, convnext.LayerNorm, nn.Linear, nn.Conv2d, nn.GELU)
# What each class becomes; two kinds of `nn.Conv2d` have conditions of their own.
REPLACED = {convnext.Block: FastBlock, blocks.ConvNeXtBlock: FastRoadBlock}


def accelerate(model: nn.Module) -> nn.Module:
    """Make `model` train faster on a CPU, in place, and return it: parameters, state dict and function stay.

    Every plain depthwise convolution and patchify convolution is replaced, in any model: those here, timm's,
    torchvision's; of ours also the blocks. Only the class of the modules changes, so hooks, optimizers,
    copies and pickles go on working. Without gradients (inference), on another device than the CPU, in float64, under
    torch.compile and without a C++ compiler the modules compute what they did before.
    """
    keep_freed_memory()
    for module in model.modules():
        if _is_plain_depthwise(module):
            module.__class__ = FastDepthwise
        elif _is_patchify(module):
            module.__class__ = FastPatchify
        elif type(module) in REPLACED:
            module.__class__ = REPLACED[type(module)]
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place."""
    before = {fast: plain for plain, fast in REPLACED.items()} | {FastDepthwise: nn.Conv2d, FastPatchify: nn.Conv2d}
    for module in model.modules():
        module.__class__ = before.get(type(module), type(module))
    return model


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, since a training step asks for the same buffers again and again.

    By default every buffer above 128 KiB goes back to the system when freed, and the next step pays for having
    each of its pages mapped and zeroed again: a good part of the step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)  # the largest value glibc takes
        libc.mallopt(m_trim_threshold, 1 << 30)
