"""A ConvNeXt block as one autograd function: two matrix products, and single passes over the memory around them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from convnext_min import blocks, convnext
from convnext_min.fast.kernels import PARTS, able, matmul_dtype, run
from convnext_min.fast.layers import FastDepthwise, FastGELU, depthwise_input_grad, depthwise_weight_grad


class BlockFunction(Function):
    """Compute a ConvNeXt block, x (N, C, H, W) in float32 to the same shape, with matrix products in `dtype`.

    Call `forward` with None as `ctx` to keep nothing for the backward pass. `keep` (N, 1, 1, 1) is the factor by which
    stochastic depth multiplies each image's branch. The weights of the two linear layers are (4C, C) and (C, 4C);
    `gamma` is (C,). A row below is one pixel of one image. LayerNorm's weight and bias, `scale` and `shift`, are
    folded into the first linear layer: W (scale * x + shift) + b = (W scale) x + (W shift + b).
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


PARTS_OF_BLOCK = (FastDepthwise, nn.LayerNorm, convnext.LayerNorm, nn.Linear, nn.Conv2d, FastGELU)


class _Fast:
    """Compute a block by `BlockFunction` where that gives the same, elsewhere by the next class's `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = matmul_dtype(x)
        if not self._can_fuse(x, dtype):
            return super().forward(x)
        keep = self.drop_path(torch.ones(len(x), 1, 1, 1))
        compute = BlockFunction.apply if torch.is_grad_enabled() else partial(BlockFunction.forward, None)
        return compute(dtype, self.norm.eps, x.float(), *self._weights(), keep)

    def _can_fuse(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Return whether the block has the layers and shapes that kernels.cpp assumes, and none of them has a hook."""
        conv, parts = self.dwconv, (self.dwconv, self.norm, self.pwconv1, self.act, self.pwconv2)
        if type(conv) is not FastDepthwise or any(type(part) not in PARTS_OF_BLOCK for part in parts):
            return False
        if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts):
            return False
        size, c = conv.kernel_size[0], x.shape[1]
        centred = conv.kernel_size == (size, size) and conv.padding == (size // 2, size // 2) and size % 2
        if not centred or conv.stride != (1, 1) or self.act.approximate != "none":
            return False
        if not able(
            dtype, x, *[tensor for part in parts if part is not self.act for tensor in (part.weight, part.bias)]
        ):
            return False
        shapes = [(c, 1, size, size), (c,), (c,), (c,), (4 * c, c), (4 * c,), (c, 4 * c), (c,), (c,)]
        return [tuple(weight.shape) for weight in self._weights()] == shapes

    def _weights(self) -> list[Tensor]:
        """Return the weights in the order of `BlockFunction.forward`, those of 1x1 convolutions as matrices."""
        conv, norm, linear1, linear2 = self.dwconv, self.norm, self.pwconv1, self.pwconv2
        gamma = getattr(self, "gamma", None)
        gamma = torch.ones_like(linear2.bias) if gamma is None else gamma
        matrices = linear1.weight.flatten(1), linear1.bias, linear2.weight.flatten(1), linear2.bias
        return [conv.weight, conv.bias, norm.weight, norm.bias, *matrices, gamma]


class FastBlock(_Fast, convnext.Block):
    """`convnext.Block` as one operation."""


class FastRoadBlock(_Fast, blocks.ConvNeXtBlock):
    """`blocks.ConvNeXtBlock` as one operation: the same block with 1x1 convolutions for the linear layers."""
