"""Depthwise and patchify convolutions and GELU that train faster on a CPU than PyTorch's, with the same parameters.

Each subclasses PyTorch's layer and calls its `forward` where there is nothing to gain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from convnext_min.fast.kernels import able, kernels, matmul_dtype, run


class DepthwiseConv(Function):
    """Compute `F.conv2d` with groups = channels, x (N, C, H, W) and weight (C, 1, K, L), with fast gradients."""

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
    """Return the input's gradient (N, C, H, W): with stride 1 a depthwise convolution with the kernel turned around."""
    chans, (height, width), kernel = shape[1], shape[2:], weight.shape[2:]
    if stride == (1, 1) and padding[0] < kernel[0] and padding[1] < kernel[1]:
        full = [k - 1 - p for k, p in zip(kernel, padding)]
        return F.conv2d(grad, weight.flip(2, 3), padding=full, groups=chans)
    # With a stride, the last rows may not have been used: `output_padding` is their number.
    rest = [(n + 2 * p - k) % s for n, p, k, s in zip((height, width), padding, kernel, stride)]
    return F.conv_transpose2d(grad, weight, None, stride, padding, rest, groups=chans)


def depthwise_weight_grad(x: Tensor, grad: Tensor, shape, stride, padding) -> Tensor:
    """Return the weight's gradient (C, 1, K, L), as a convolution of the input with the output's gradient.

    dw[c, k] = sum over n and o of grad[n, c, o] * x[n, c, o * stride + k - padding] is, for each n and c, a plain
    convolution of one image with one (large) filter; the stride of the forward pass has become a dilation. So the
    batch is one image of N * C channels and the gradient its N * C filters, followed by a sum over n. For stride 1
    kernels.cpp has a loop that needs no copy in another layout.
    """
    (n, c, h, w), (k, across), parts = x.shape, shape[2:], 4
    same = k == across and k in (3, 5, 7, 9, 11) and padding == (k // 2, k // 2) and stride == (1, 1)
    if same and x.dtype == grad.dtype == torch.float32 and kernels(torch.float32):
        x, grad = (part.permute(0, 2, 3, 1).contiguous() for part in (x, grad))
        sums = torch.zeros(parts, k, k, c)
        run(torch.float32, "depthwise_back", k, parts, n, h, w, c, x, grad, sums)
        return sums.sum(0).permute(2, 0, 1).unsqueeze(1)
    image = x.contiguous().view(1, n * c, h, w)  # both in NCHW: a copy if they were channels-last
    filters = grad.contiguous().view(n * c, 1, *grad.shape[2:])
    taps = F.conv2d(image, filters, None, 1, padding, dilation=stride, groups=n * c)  # (1, N * C, >= K, >= L)
    return taps.view(n, c, *taps.shape[2:])[..., :k, :across].sum(0).unsqueeze(1)


class FastDepthwise(nn.Conv2d):
    """Compute a depthwise `nn.Conv2d` in training on a CPU by `DepthwiseConv`, in float32 also under autocast.

    Under bfloat16 autocast PyTorch's depthwise kernels are no faster in the forward pass and slower in the backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            x = x.to(self.weight.dtype, memory_format=torch.channels_last)
            return DepthwiseConv.apply(x, self.weight, self.bias, self.stride, self.padding)


class FastPatchify(nn.Conv2d):
    """Compute a convolution whose patches do not overlap as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = matmul_dtype(x)
        training = torch.is_grad_enabled()
        if not (training and able(dtype, x, self.weight, self.bias)) or x.shape[1] != self.in_channels:
            return super().forward(x)
        down, across = self.kernel_size
        rows, columns = x.shape[2] // down, x.shape[3] // across
        if rows == 0 or columns == 0:
            return super().forward(x)  # raises PyTorch's own error
        x = x[..., : rows * down, : columns * across].to(dtype)  # the rest fills no patch and is left out
        x = x.permute(0, 2, 3, 1).unflatten(1, (rows, down)).unflatten(3, (columns, across)).transpose(2, 3).flatten(3)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


def _is_dense(x: Tensor) -> bool:
    """Return whether the values of `x` fill its memory without gaps, in NCHW or NHWC order."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


class GELUFunction(Function):
    """Compute GELU and keep its derivative for the backward pass instead of its input."""

    @staticmethod
    def forward(ctx, x):
        y, slope = torch.empty_like(x), torch.empty_like(x)
        run(x.dtype, "gelu", x.numel(), x, y, slope)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class FastGELU(nn.GELU):
    """Compute `nn.GELU` in training by `GELUFunction`."""

    def forward(self, x: Tensor) -> Tensor:
        plain = self.approximate != "none" or not torch.is_grad_enabled()
        able_to = not plain and _is_dense(x) and able(x.dtype, x)
        return GELUFunction.apply(x) if able_to else super().forward(x)


def is_patchify(module: nn.Module) -> bool:
    """Return whether `FastPatchify` computes the same as `module`; PyTorch is better at 1x1 convolutions."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride != (1, 1)
        and module.groups == 1
        and module.bias is not None
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
    )


def is_plain_depthwise(module: nn.Module) -> bool:
    """Return whether `FastDepthwise` computes the same as `module`."""
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
    )
