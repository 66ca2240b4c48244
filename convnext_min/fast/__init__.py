"""Train on a CPU in a fraction of the time, with the same parameters, state dict and function.

    model = accelerate(convnext_atto())  # in place; `restore(model)` undoes it

PyTorch computes the weight gradient of a depthwise convolution several times more slowly than its forward pass, and
most of the rest of a training step, except the matrix products, is memory traffic: each operation between them reads
and writes the whole activation. `accelerate` gives depthwise convolutions and GELU another backward pass, in any model,
and computes a ConvNeXt block as one operation, whose parts are single passes over the memory. In float32 on a
processor with AVX2 and no AVX-512 it also has matrix products of its own. What follows the depthwise convolution is
then computed a few pixels at a time, so that the wide layer is still in the cache when it is read.

`block` and `layers` hold the faster modules; `kernels` compiles and calls kernels.cpp.
"""

import ctypes
import platform

from torch import nn

from convnext_min import blocks, convnext
from convnext_min.fast.block import BlockFunction, FastBlock, FastRoadBlock
from convnext_min.fast.layers import FastDepthwise, FastGELU, FastPatchify, is_depthwise, is_patchify

__all__ = ["BlockFunction", "FastBlock", "FastDepthwise", "FastGELU", "FastPatchify", "FastRoadBlock"]
__all__ += ["accelerate", "restore"]

# The classes that are always replaced; two kinds of `nn.Conv2d` are replaced under conditions.
REPLACED = {convnext.Block: FastBlock, blocks.ConvNeXtBlock: FastRoadBlock, nn.GELU: FastGELU}


def accelerate(model: nn.Module) -> nn.Module:
    """Make `model` train faster on a CPU, in place, and return it; parameters, state dict and function stay.

    Replace every plain depthwise and patchify convolution and every GELU, in any model (ours, timm's, torchvision's),
    and the ConvNeXt blocks of this package. Only the class of the modules changes, so hooks, optimizers, copies and
    pickles go on working. Without gradients (inference) only the blocks are computed differently.

    The faster computation is used for float32 weights on a CPU, without autocast or under bfloat16 autocast. Everything
    else is left to PyTorch's own operations, as in the plain model: tracing, exporting and compiling, the transforms of
    torch.func, second derivatives, subclasses of Tensor, layers with hooks or another `forward`, other devices and
    number formats, and machines without a C++ compiler. Outputs can be channels-last in memory.
    """
    keep_freed_memory()
    for module in model.modules():
        if type(module) is nn.Conv2d and is_depthwise(module):
            module.__class__ = FastDepthwise
        elif type(module) is nn.Conv2d and is_patchify(module):
            module.__class__ = FastPatchify
        elif type(module) in REPLACED:
            module.__class__ = REPLACED[type(module)]
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place, and return `model`."""
    before = {fast: plain for plain, fast in REPLACED.items()} | {FastDepthwise: nn.Conv2d, FastPatchify: nn.Conv2d}
    for module in model.modules():
        module.__class__ = before.get(type(module), type(module))
    return model


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, because a training step asks for the same buffers again and again.

    By default every buffer above 128 KiB goes back to the system when freed, and in the next step each of its pages
    has to be mapped and zeroed again: a good part of the step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)  # the largest value glibc takes
        libc.mallopt(m_trim_threshold, 1 << 30)
