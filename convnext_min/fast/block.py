"""A ConvNeXt block as one autograd function: two matrix products, and single passes over the memory around them."""

from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules import module as modules

from convnext_min import blocks, convnext
from convnext_min.fast.kernels import PARTS, has_products, is_eager, is_ordinary, kernels, matmul_dtype, pack, run
from convnext_min.fast.layers import (
    FastDepthwise,
    FastGELU,
    depthwise_input_grad,
    depthwise_weight_grad,
    is_depthwise,
    is_original,
    needs_pytorch,
)

WIDEST_SUM = 96  # channels up to which the gradients of both weights stay in the cache while rows are added to them
SUMS = 16  # parts of these gradients


class BlockFunction(Function):
    """Compute a ConvNeXt block, x (N, C, H, W) in float32 to the same shape, with matrix products in `dtype`.

    Call `forward` with None as `ctx` to keep nothing for the backward pass. `x` is channels-last. `keep` (N, 1, 1, 1)
    is the factor by which stochastic depth multiplies each image's branch. The weights of the two linear layers are
    (4C, C) and (C, 4C); `gamma` is (C,). A row below is one pixel of one image. LayerNorm's weight and bias, `scale`
    and `shift`, are folded into the first linear layer: W (scale * x + shift) + b = (W scale) x + (W shift + b).
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, dtype, eps, x, kernel, kernel_bias, scale, shift, weight1, bias1, weight2, bias2, gamma, keep):
        conv = F.conv2d(x, kernel, kernel_bias, padding=kernel.shape[2] // 2, groups=len(kernel))
        conv = conv.contiguous(memory_format=torch.channels_last)
        folded1, cast2, folded_bias = (weight1 * scale).to(dtype), weight2.to(dtype), weight1 @ shift + bias1
        compute = _in_blocks if has_products(dtype) else _in_passes
        y, kept = compute(x, conv, eps, folded1, folded_bias, cast2, bias2, gamma, keep, ctx is not None)
        if ctx is not None:
            inputs = x, kernel, kernel_bias, scale, shift, weight1, bias1, weight2, bias2, gamma, keep
            casts = () if dtype == torch.float32 else (folded1, cast2)  # in float32 the weights are enough
            saved = *inputs, *kept, *casts
            ctx.save_for_backward(*saved)
            ctx.dtype, ctx.eps, ctx.kinds = dtype, eps, _kinds(saved)
        return y

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        if needs_pytorch(grad, *saved) or _kinds(saved) != ctx.kinds:
            return None, None, *_pytorch_gradients(ctx, grad, saved[:11])
        x = saved[0].contiguous(memory_format=torch.channels_last)
        rest = [tensor.contiguous() for tensor in saved[1:]]  # saved-tensor hooks may have changed the layout
        kernel, _, scale, shift, weight1, _, weight2, bias2, gamma, keep = rest[:10]
        normed, stds, slope, hidden, branch, *casts = rest[10:]
        folded1, cast2 = casts or (weight1 * scale, weight2)
        dtype, padding = ctx.dtype, (kernel.shape[2] // 2, kernel.shape[2] // 2)
        grad = grad.contiguous(memory_format=torch.channels_last)
        compute = _back_in_blocks if has_products(dtype) else _back_in_passes
        d_conv, sums, d_folded1, d_bias1, d_weight2 = compute(
            grad, normed, stds, slope, hidden, branch, folded1, cast2, bias2, gamma, keep
        )
        d_x = depthwise_input_grad(d_conv, kernel, x.shape, (1, 1), padding).add_(grad)
        d_kernel = depthwise_weight_grad(x, d_conv, kernel.shape, (1, 1), padding)
        d_bias2, d_gamma, d_kernel_bias = sums.sum(1)
        d_bias1 = d_bias1.sum(0)
        d_scale, d_shift = (d_folded1 * weight1).sum(0), d_bias1 @ weight1
        d_weight1 = torch.addr(d_folded1 * scale, d_bias1, shift)
        linear = d_weight1, d_bias1, d_weight2.float(), d_bias2
        return None, None, d_x, d_kernel, d_kernel_bias, d_scale, d_shift, *linear, d_gamma, None


def _in_passes(x, conv, eps, weight1, bias1, weight2, bias2, gamma, keep, training):
    """Return the block's output and what the backward pass needs: the part after the depthwise convolution `conv`."""
    n, c, h, w = x.shape
    rows, dtype = n * h * w, weight1.dtype
    normed, stds = x.new_empty(rows, c, dtype=dtype), x.new_empty(rows)
    run(dtype, "normalize", rows, c, eps, conv, normed, stds)
    slope = hidden = normed @ weight1.t()
    if training:
        hidden = torch.empty_like(slope)
        run(dtype, "bias_gelu", rows, 4 * c, slope, bias1, hidden)  # `slope` becomes GELU's derivative
    else:
        run(dtype, "bias_gelu_in_place", rows, 4 * c, hidden, bias1)
    branch = hidden @ weight2.t()
    y = torch.empty_like(x)
    run(dtype, "scale_add", 0, rows, c, h * w, x, branch, bias2, gamma, keep, y)
    return y, (normed, stds, slope, hidden, branch)


def _in_blocks(x, conv, eps, weight1, bias1, weight2, bias2, gamma, keep, training):
    """Return the same as `_in_passes`, computed a few rows at a time, which stay in the cache."""
    n, c, h, w = x.shape
    rows, sizes = n * h * w, [(c,), (), (4 * c,), (4 * c,), (c,)]
    y, kept = torch.empty_like(x), [x.new_empty(rows, *size) if training else None for size in sizes]
    weights = pack(weight1.t()), bias1, pack(weight2.t()), bias2, gamma
    run(x.dtype, "pointwise", _parts(rows), rows, c, h * w, eps, x, conv, *weights, keep, y, *kept)
    return y, kept


def _back_in_passes(grad, normed, stds, slope, hidden, branch, weight1, weight2, bias2, gamma, keep):
    """Return the gradients of `conv`, sums for biases and gamma, and the gradients of weight1, bias1 and weight2."""
    n, c, h, w = grad.shape
    rows, dtype = n * h * w, weight1.dtype
    d_branch, sums, d_bias1 = torch.empty_like(branch), grad.new_zeros(3, PARTS, c), grad.new_zeros(PARTS, 4 * c)
    run(dtype, "scale_add_back", PARTS, 0, rows, c, h * w, grad, branch, bias2, gamma, keep, d_branch, *sums[:2])
    d_hidden = d_branch @ weight2
    run(dtype, "bias_gelu_back", PARTS, rows, 4 * c, d_hidden, slope, d_bias1)  # in place
    d_normed, d_conv = d_hidden @ weight1, torch.empty_like(grad)
    run(dtype, "normalize_back", PARTS, rows, c, d_normed, normed, stds, d_conv, sums[2])
    return d_conv, sums, (d_hidden.t() @ normed).float(), d_bias1, d_branch.t() @ hidden


def _back_in_blocks(grad, normed, stds, slope, hidden, branch, weight1, weight2, bias2, gamma, keep):
    """Return the same as `_back_in_passes`, computed a few rows at a time, which stay in the cache.

    In a narrow block the same rows are also added to the gradients of the weights; the wide gradient is then not kept.
    """
    n, c, h, w = grad.shape
    rows, parts, d_conv = n * h * w, _parts(n * h * w), torch.empty_like(grad)
    d_branch = d_hidden = d_weights = None
    if c % 4 == 0 and c <= WIDEST_SUM:
        parts = min(parts, SUMS)
        d_weights = grad.new_zeros(parts, 2, c, 4 * c)
    else:
        d_branch, d_hidden = torch.empty_like(branch), torch.empty_like(slope)
    sums, d_bias1 = grad.new_zeros(3, parts, c), grad.new_zeros(parts, 4 * c)
    saved = normed, stds, slope, hidden, branch, pack(weight1), pack(weight2), bias2, gamma, keep
    gradients = d_branch, d_hidden, d_weights, d_conv, *sums, d_bias1
    run(grad.dtype, "pointwise_back", parts, rows, c, h * w, grad, *saved, *gradients)
    if d_weights is None:
        d_weight1, d_weight2 = d_hidden.t() @ normed, d_branch.t() @ hidden
    else:
        d_weight2, transposed = d_weights.sum(0)
        d_weight1 = transposed.t()
    return d_conv, sums, d_weight1, d_bias1, d_weight2


def _parts(rows: int) -> int:
    """Return into how many parts to divide `rows`: at most `PARTS`, and few enough that a part is worth its weights."""
    return min(PARTS, 1 << (max(1, rows // 24).bit_length() - 1))


def _kinds(tensors) -> list[tuple]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def _pytorch_gradients(ctx, grad: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return the gradients of `BlockFunction`'s tensors through PyTorch's operations: slower, but differentiable."""
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=ctx.dtype == torch.bfloat16):
        inputs = [tensor.view_as(tensor) for tensor in inputs]  # separate, should two of them be one parameter
        x, kernel, kernel_bias, scale, shift, weight1, bias1, weight2, bias2, gamma, keep = inputs
        conv = F.conv2d(x, kernel, kernel_bias, padding=kernel.shape[2] // 2, groups=len(kernel))
        normed = F.layer_norm(conv.permute(0, 2, 3, 1), scale.shape, scale, shift, ctx.eps)
        branch = gamma * F.linear(F.gelu(F.linear(normed, weight1, bias1)), weight2, bias2)
        y = x + keep * branch.permute(0, 3, 1, 2)
    needed = [tensor for tensor, needs in zip(inputs, ctx.needs_input_grad[2:]) if needs]
    gradients = iter(torch.autograd.grad(y, needed, grad, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if needs else None for needs in ctx.needs_input_grad[2:]]


class _Fast:
    """Compute a block by `BlockFunction` where the result is the same, otherwise by the plain block's `forward`."""

    kinds: tuple[type, ...]  # classes that dwconv, norm, pwconv1, act, pwconv2 and drop_path must have
    pointwise: tuple[int, ...]  # shape of the kernels of the 1x1 convolutions, () for linear layers

    def _fused(self, x: Tensor) -> Tensor:
        dtype = matmul_dtype(x)
        keep = self.drop_path(x.new_ones(len(x), 1, 1, 1, dtype=torch.float32))
        x = x.to(torch.float32, memory_format=torch.channels_last)
        weights = [weight.contiguous() for weight in self._weights()]
        weights[4], weights[6] = weights[4].flatten(1), weights[6].flatten(1)  # a 1x1 convolution's has four axes
        gamma = weights[8:] or [x.new_ones(x.shape[1])]
        compute = BlockFunction.apply if torch.is_grad_enabled() else partial(BlockFunction.forward, None)
        return compute(dtype, self.norm.eps, x, *weights[:8], *gamma, keep)

    def _can_fuse(self, x: Tensor) -> bool:
        """Return whether the block has the layers and shapes that kernels.cpp assumes, without hooks on them."""
        if not (is_eager() and is_original() and not has_global_hooks()):
            return False
        if not all(map(is_untouched, self._layers(), self.kinds)) or self.act.approximate != "none":
            return False
        weights = self._weights()
        known = is_ordinary(x, *weights) and x.ndim == 4 and self._has_known_shapes(x.shape[1], weights)
        return known and kernels(matmul_dtype(x)) is not None

    def _layers(self) -> tuple[nn.Module, ...]:
        return self.dwconv, self.norm, self.pwconv1, self.act, self.pwconv2, self.drop_path

    def _weights(self) -> list[Tensor | None]:
        layers, gamma = (self.dwconv, self.norm, self.pwconv1, self.pwconv2), getattr(self, "gamma", None)
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)] + [gamma] * (gamma is not None)

    def _has_known_shapes(self, c: int, weights: list[Tensor]) -> bool:
        conv, size, one = self.dwconv, self.dwconv.kernel_size[0], self.pointwise
        centred = conv.kernel_size == (size, size) and conv.padding == (size // 2, size // 2) and size % 2 == 1
        shapes = (c, 1, size, size), (c,), (c,), (c,), (4 * c, c, *one), (4 * c,), (c, 4 * c, *one), (c,), (c,)
        return (
            (is_depthwise(conv) and centred and conv.stride == (1, 1))
            and all(tuple(weight.shape) == shape for weight, shape in zip(weights, shapes))
            and all(is_pointwise(layer) for layer in (self.pwconv1, self.pwconv2))
        )


class FastBlock(_Fast, convnext.Block):
    """Compute `convnext.Block` as one operation."""

    kinds = (FastDepthwise, nn.LayerNorm, nn.Linear, FastGELU, nn.Linear, convnext.DropPath)
    pointwise = ()

    @wraps(convnext.Block.forward)
    def forward(self, x: Tensor) -> Tensor:
        if not self._can_fuse(x):
            return super().forward(x)
        return self._fused(x)


class FastRoadBlock(_Fast, blocks.ConvNeXtBlock):
    """Compute `blocks.ConvNeXtBlock`, the same block with 1x1 convolutions for the linear layers, as one operation."""

    kinds = (FastDepthwise, convnext.LayerNorm, nn.Conv2d, FastGELU, nn.Conv2d, convnext.DropPath)
    pointwise = (1, 1)

    @wraps(blocks.ConvNeXtBlock.forward)
    def forward(self, x: Tensor) -> Tensor:
        if not self._can_fuse(x):
            return super().forward(x)
        return self._fused(x)


def has_global_hooks() -> bool:
    """Return whether a hook is registered for all modules at once. PyTorch 2.7 has no function for it."""
    forward, backward = ("forward_pre_hooks", "forward_hooks"), ("backward_pre_hooks", "backward_hooks")
    return any(getattr(modules, f"_global_{name}") for name in (*forward, *backward))


def is_untouched(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `part` behaves as its class `kind`: no hooks, no `forward` of its own."""
    if type(part) is not kind or "forward" in vars(part) or part._compiled_call_impl is not None:
        return False
    return not any((part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks))


def is_pointwise(layer: nn.Linear | nn.Conv2d) -> bool:
    """Return whether `layer` is a linear layer or a convolution that treats every pixel as one."""
    return isinstance(layer, nn.Linear) or (
        layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    )
