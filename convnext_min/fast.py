"""Training on a CPU in a fraction of the time: the same parameters, state dict and function, other arithmetic.

    model = accelerate(convnext_atto())  # in place; `restore(model)` undoes it

PyTorch computes the weight gradient of a depthwise convolution several times more slowly than its forward pass.
`accelerate` gives the model's depthwise convolutions another backward pass that does not.
"""

import ctypes
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DepthwiseConv(torch.autograd.Function):
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
    n, c = x.shape[:2]
    image = x.contiguous().view(1, n * c, *x.shape[2:])  # both in NCHW: a copy if they were channels-last
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


def _is_plain_depthwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
    )


def accelerate(model: nn.Module) -> nn.Module:
    """Make `model` train faster on a CPU, in place, and return it: parameters, state dict and function stay.

    Every plain depthwise convolution is replaced, in any model: those here, timm's, torchvision's. Only the class of
    the modules changes, so hooks, optimizers, copies and pickles go on working. On another device than the CPU the
    modules compute what they did before.
    """
    keep_freed_memory()
    for module in model.modules():
        if _is_plain_depthwise(module):
            module.__class__ = FastDepthwise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place."""
    for module in model.modules():
        if type(module) is FastDepthwise:
            module.__class__ = nn.Conv2d
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
