"""Training on a CPU in a fraction of the time: the same parameters, state dict and function, other arithmetic.

    model = accelerate(convnext_atto())  # in place; `restore(model)` undoes it

PyTorch computes the weight gradient of a depthwise convolution several times more slowly than its forward pass, and
most of the rest of a step, beside the matrix products, is memory traffic: each operation between them reads and writes
the whole activation. `accelerate` gives depthwise convolutions and GELU another backward pass, in any model, and
computes a ConvNeXt block as one operation, whose parts are single passes over the memory (fast.cpp).
"""

import ctypes
import platform
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from convnext_min import blocks, convnext
from convnext_min.fast.kernels import PARTS, able, autocast_dtype, run
from convnext_min.fast.layers import (
    FastDepthwise,
    FastGELU,
    FastPatchify,
    depthwise_input_grad,
    depthwise_weight_grad,
    is_patchify,
    is_plain_depthwise,
)


class BlockFunction(Function):
    """A ConvNeXt block, x (N, C, H, W) in float32 to the same, with matrix products in `dtype`: its passes by hand.

    `forward` with None for `ctx` computes it without what the way back needs. `keep` (N, 1) is what stochastic depth
    multiplies each image's branch by. The weights of the two linear layers are
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
        run(dtype, "normalize", rows, c, eps, conv, normed, stds)
        folded1, cast2 = (weight1 * scale).to(dtype), weight2.to(dtype)
        hidden, folded_bias = normed @ folded1.t(), weight1 @ shift + bias1
        if ctx is None:
            run(dtype, "bias_gelu_in_place", rows, 4 * c, hidden, folded_bias)
        else:
            slope, hidden = hidden, torch.empty_like(hidden)
            run(dtype, "bias_gelu", rows, 4 * c, slope, folded_bias, hidden)  # `slope` becomes GELU's derivative
        branch = hidden @ cast2.t()
        y = torch.empty_like(x)
        run(dtype, "scale_add", rows, c, h * w, x, branch, bias2, gamma, keep, y)
        if ctx is not None:
            kept = x, normed, stds, slope, hidden, branch, kernel, scale, shift, weight1, folded1, cast2, bias2
            ctx.save_for_backward(*kept, gamma, keep)
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
        run(dtype, "scale_add_back", PARTS, rows, c, h * w, grad, branch, bias2, gamma, keep, d_branch, *sums[:2])
        d_weight2 = d_branch.t() @ hidden
        d_hidden = d_branch @ cast2
        run(dtype, "bias_gelu_back", PARTS, rows, 4 * c, d_hidden, slope, d_bias1)  # in place
        d_folded1 = (d_hidden.t() @ normed).float()
        d_normed, d_conv = d_hidden @ folded1, torch.empty_like(x)
        run(dtype, "normalize_back", PARTS, rows, c, d_normed, normed, stds, d_conv, sums[2])
        d_x = depthwise_input_grad(d_conv, kernel, x.shape, (1, 1), padding).add_(grad)
        d_kernel = depthwise_weight_grad(x, d_conv, kernel.shape, (1, 1), padding)
        d_bias2, d_gamma, d_kernel_bias = sums.sum(1)
        d_bias1 = d_bias1.sum(0)
        d_scale, d_shift = (d_folded1 * weight1).sum(0), d_bias1 @ weight1
        d_weight1 = torch.addr(d_folded1 * scale, d_bias1, shift)
        linear = d_weight1, d_bias1, d_weight2.float(), d_bias2
        return None, None, d_x, d_kernel, d_kernel_bias, d_scale, d_shift, *linear, d_gamma, None


class _Fast:
    """A block computed by `BlockFunction` where that can compute it; elsewhere by the class that comes next.

    It cannot where somebody listens to a part of the block, or has put another layer in the place of one.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype, parts = autocast_dtype(x), (self.dwconv, self.norm, self.pwconv1, self.act, self.pwconv2)
        known = type(self.dwconv) is FastDepthwise and all(type(part) in PARTS_OF_BLOCK for part in parts)
        known = known and self.act.approximate == "none"
        if not known or any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts):
            return super().forward(x)
        weights = [tensor for part in parts if part is not self.act for tensor in (part.weight, part.bias)]
        size = self.dwconv.kernel_size[0]
        centred = self.dwconv.kernel_size == (size, size) and self.dwconv.padding == (size // 2, size // 2) and size % 2
        if not (centred and self.dwconv.stride == (1, 1) and able(dtype, x, *weights)):
            return super().forward(x)
        gamma = getattr(self, "gamma", None)
        gamma = torch.ones_like(weights[-1]) if gamma is None else gamma
        weights[4], weights[6] = weights[4].flatten(1), weights[6].flatten(1)  # a 1x1 convolution's has four axes
        c = x.shape[1]  # what fast.cpp takes for granted
        sizes = [(c, 1, size, size), (c,), (c,), (c,), (4 * c, c), (4 * c,), (c, 4 * c), (c,), (c,)]
        if [tuple(weight.shape) for weight in (*weights, gamma)] != sizes:
            return super().forward(x)
        keep = self.drop_path(torch.ones(len(x), 1))
        compute = BlockFunction.apply if torch.is_grad_enabled() else partial(BlockFunction.forward, None)
        return compute(dtype, self.norm.eps, x.float(), *weights, gamma, keep)


class FastBlock(_Fast, convnext.Block):
    """`Block` as one operation."""


class FastRoadBlock(_Fast, blocks.ConvNeXtBlock):
    """The block at the end of the road, whose linear layers are 1x1 convolutions."""


# What a class becomes; two kinds of `nn.Conv2d` become something too, under conditions.
REPLACED = {
    convnext.Block: FastBlock,
    blocks.ConvNeXtBlock: FastRoadBlock,
    nn.GELU: FastGELU,
}
PARTS_OF_BLOCK = (FastDepthwise, nn.LayerNorm, convnext.LayerNorm, nn.Linear, nn.Conv2d, FastGELU)


def accelerate(model: nn.Module) -> nn.Module:
    """Make `model` train faster on a CPU, in place, and return it: parameters, state dict and function stay.

    Every plain depthwise and patchify convolution and every GELU is replaced, in any model: those here,
    timm's, torchvision's; of ours also the ConvNeXt blocks. Only the class of the modules changes, so hooks,
    optimizers, copies and pickles go on working. Without gradients (inference) only the blocks are computed otherwise.
    On another device than the CPU, in float64, under torch.compile and without a C++ compiler all is as it was.
    """
    keep_freed_memory()
    for module in model.modules():
        if is_plain_depthwise(module):
            module.__class__ = FastDepthwise
        elif is_patchify(module):
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
