"""Depthwise and patchify convolutions and GELU that train faster on a CPU than PyTorch's, with the same parameters.

Each subclasses PyTorch's layer and calls its `forward` where the fast path has no advantage or does not apply.
`wraps` gives torch.jit.script the source of that `forward` to compile.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from convnext_min import blocks, convnext
from convnext_min.fast.kernels import is_array, is_dense, is_eager, is_ordinary, kernels, matmul_dtype, run

_KINDS = nn.Conv2d, nn.LayerNorm, nn.Linear, nn.GELU
_OURS = convnext.LayerNorm, convnext.DropPath, convnext.Block, blocks.ConvNeXtBlock
_FORWARD = {kind: kind.forward for kind in (*_KINDS, *_OURS)}


def is_original() -> bool:
    """Return whether the classes that the fast path stands in for still have their own `forward`."""
    return all(kind.forward is forward for kind, forward in _FORWARD.items())


class DepthwiseConv(Function):
    """Compute `F.conv2d` with groups = channels, x (N, C, H, W) and weight (C, 1, K, L), with fast gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if needs_pytorch(grad, x, weight):
            rest = [len(weight)], ctx.stride, ctx.padding, (1, 1), False, (0, 0), len(weight), ctx.needs_input_grad[:3]
            return *torch.ops.aten.convolution_backward(grad, x, weight, *rest), None, None
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = depthwise_input_grad(grad, weight, x.shape, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            grad_weight = depthwise_weight_grad(x, grad, weight.shape, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


def needs_pytorch(*tensors: Tensor) -> bool:
    """Return whether a backward pass with these tensors has to be PyTorch's own.

    That is so if it will be differentiated again, if it is transformed (batched gradients), and if the tensors are not
    ordinary ones: saved-tensor hooks can return other values than those that were saved.
    """
    return torch.is_grad_enabled() or not is_eager() or not all(map(is_array, tensors))


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
        sums = x.new_zeros(parts, k, k, c)
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

    @wraps(nn.Conv2d.forward)
    def forward(self, input: Tensor) -> Tensor:
        if not self._is_faster(input):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            x = input.to(self.weight.dtype, memory_format=torch.channels_last)
            return DepthwiseConv.apply(x, self.weight, self.bias, self.stride, self.padding)

    def _is_faster(self, x: Tensor) -> bool:
        return (
            torch.is_grad_enabled()
            and is_ordinary(x, self.weight, *([] if self.bias is None else [self.bias]))
            and (x.ndim == 4 and x.shape[1] == self.in_channels)
            and is_depthwise(self)
            and is_original()
        )


class FastPatchify(nn.Conv2d):
    """Compute a convolution whose patches do not overlap as a matrix product."""

    @wraps(nn.Conv2d.forward)
    def forward(self, input: Tensor) -> Tensor:
        if not self._is_faster(input):
            return super().forward(input)
        down, across = self.kernel_size
        rows, columns = input.shape[2] // down, input.shape[3] // across
        x = input[..., : rows * down, : columns * across].to(matmul_dtype(input))  # the rest fills no patch
        x = x.permute(0, 2, 3, 1).unflatten(1, (rows, down)).unflatten(3, (columns, across)).transpose(2, 3).flatten(3)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)

    def _is_faster(self, x: Tensor) -> bool:
        return (
            torch.is_grad_enabled()
            and is_ordinary(x, self.weight, self.bias)
            and (x.ndim == 4 and x.shape[1] == self.in_channels)
            and (x.shape[2] >= self.kernel_size[0] and x.shape[3] >= self.kernel_size[1])
            and is_patchify(self)
            and is_original()
            and kernels(matmul_dtype(x)) is not None
        )


class GELUFunction(Function):
    """Compute GELU and its gradient, each in one pass over the memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        run(x.dtype, "gelu", x.numel(), x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if needs_pytorch(grad, x) or x.dtype != grad.dtype or not is_dense(x):
            return torch.ops.aten.gelu_backward(grad, x)
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad, grad_x = grad.contiguous(memory_format=layout), torch.empty_like(x)
        run(x.dtype, "gelu_back", x.numel(), x, grad, grad_x)
        return grad_x


class FastGELU(nn.GELU):
    """Compute `nn.GELU` in training by `GELUFunction`."""

    @wraps(nn.GELU.forward)
    def forward(self, input: Tensor) -> Tensor:
        return GELUFunction.apply(input) if self._is_faster(input) else super().forward(input)

    def _is_faster(self, x: Tensor) -> bool:
        return (
            torch.is_grad_enabled()
            and is_ordinary(x)
            and is_dense(x)
            and self.approximate == "none"
            and is_original()
            and kernels(x.dtype) is not None
        )


def is_patchify(conv: nn.Conv2d) -> bool:
    """Return whether `FastPatchify` computes the same as `conv`; PyTorch is better at 1x1 convolutions."""
    return (
        conv.kernel_size == conv.stride != (1, 1)
        and conv.groups == 1
        and conv.bias is not None
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
    )


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Return whether `FastDepthwise` computes the same as `conv`."""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
    )
