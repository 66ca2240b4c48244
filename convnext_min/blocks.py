"""The residual blocks of the road, in the paper's order; each differs from the one before in one thing.

Every block maps (N, in_chans, H, W) to (N, out_chans, H / stride, W / stride), where `width` is the
design's width of the stage, `out_chans = width * Block.expansion`, and all take the same arguments, so that
two neighbours differ only where the architecture does. As in the authors' own code of the road, the convolutions
of a block have biases with LayerNorm and none with BatchNorm, and the projection shortcut never has one.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from convnext_min.convnext import DropPath, LayerNorm

Layer = Callable[..., nn.Module]
BatchNorm = nn.BatchNorm2d
ReLU = partial(nn.ReLU, inplace=True)


def projection(in_chans: int, out_chans: int, stride: int, norm: Layer) -> nn.Module:
    """Return the shortcut: a strided 1x1 convolution and a norm where the shape changes, else the identity."""
    if stride == 1 and in_chans == out_chans:
        return nn.Identity()
    conv = nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)
    return nn.Sequential(conv, norm(out_chans))


class Bottleneck(nn.Module):
    """ResNet's bottleneck (He et al., 2016), with the stride on the 3x3 convolution as in torchvision."""

    expansion = 4

    def __init__(self, in_chans, width, stride=1, *, kernel_size=3, act=ReLU, norm=BatchNorm, drop_path=0.0):
        super().__init__()
        out_chans = width * self.expansion
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size, stride, kernel_size // 2, bias=False)
        self.norm2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_chans, 1, bias=False)
        self.norm3 = norm(out_chans)
        self.shortcut = projection(in_chans, out_chans, stride, norm)
        self.act = act()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        x = self.norm3(self.conv3(x))
        return self.act(shortcut + self.drop_path(x))


class DepthwiseBottleneck(nn.Module):
    """ResNeXt's block with as many groups as channels: the spatial convolution is depthwise (section 2.3)."""

    expansion = 4

    def __init__(self, in_chans, width, stride=1, *, kernel_size=3, act=ReLU, norm=BatchNorm, drop_path=0.0):
        super().__init__()
        out_chans = width * self.expansion
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size, stride, kernel_size // 2, groups=width, bias=False)
        self.norm2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_chans, 1, bias=False)
        self.norm3 = norm(out_chans)
        self.shortcut = projection(in_chans, out_chans, stride, norm)
        self.act = act()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        x = self.norm3(self.conv3(x))
        return self.act(shortcut + self.drop_path(x))


class InvertedBottleneck(nn.Module):
    """MobileNetV2's and the Transformer MLP's shape: narrow outside, four times as wide inside (section 2.4)."""

    expansion = 1

    def __init__(self, in_chans, width, stride=1, *, kernel_size=3, act=ReLU, norm=BatchNorm, drop_path=0.0):
        super().__init__()
        hidden = 4 * width
        self.conv1 = nn.Conv2d(in_chans, hidden, 1, bias=False)
        self.norm1 = norm(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, kernel_size, stride, kernel_size // 2, groups=hidden, bias=False)
        self.norm2 = norm(hidden)
        self.conv3 = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm3 = norm(width)
        self.shortcut = projection(in_chans, width, stride, norm)
        self.act = act()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act(self.norm1(self.conv1(x)))
        x = self.act(self.norm2(self.conv2(x)))
        x = self.norm3(self.conv3(x))
        return self.act(shortcut + self.drop_path(x))


class MovedUpBlock(nn.Module):
    """The depthwise convolution comes first, on the narrow part, as attention precedes the MLP (section 2.5)."""

    expansion = 1

    def __init__(self, in_chans, width, stride=1, *, kernel_size=3, act=ReLU, norm=BatchNorm, drop_path=0.0):
        super().__init__()
        padding = kernel_size // 2
        self.dwconv = nn.Conv2d(in_chans, in_chans, kernel_size, stride, padding, groups=in_chans, bias=False)
        self.norm1 = norm(in_chans)
        self.pwconv1 = nn.Conv2d(in_chans, 4 * width, 1, bias=False)
        self.norm2 = norm(4 * width)
        self.pwconv2 = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm3 = norm(width)
        self.shortcut = projection(in_chans, width, stride, norm)
        self.act = act()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act(self.norm1(self.dwconv(x)))
        x = self.act(self.norm2(self.pwconv1(x)))
        x = self.norm3(self.pwconv2(x))
        return self.act(shortcut + self.drop_path(x))


class FewerActivationsBlock(nn.Module):
    """One activation, between the two 1x1 convolutions, as in a Transformer's MLP (section 2.6)."""

    expansion = 1

    def __init__(self, in_chans, width, stride=1, *, kernel_size=7, act=nn.GELU, norm=BatchNorm, drop_path=0.0):
        super().__init__()
        padding = kernel_size // 2
        self.dwconv = nn.Conv2d(in_chans, in_chans, kernel_size, stride, padding, groups=in_chans, bias=False)
        self.norm1 = norm(in_chans)
        self.pwconv1 = nn.Conv2d(in_chans, 4 * width, 1, bias=False)
        self.norm2 = norm(4 * width)
        self.pwconv2 = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm3 = norm(width)
        self.shortcut = projection(in_chans, width, stride, norm)
        self.act = act()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.norm1(self.dwconv(x))
        x = self.act(self.norm2(self.pwconv1(x)))
        x = self.norm3(self.pwconv2(x))
        return shortcut + self.drop_path(x)


class FewerNormsBlock(nn.Module):
    """One norm, between the depthwise and the first 1x1 convolution (section 2.6)."""

    expansion = 1

    def __init__(self, in_chans, width, stride=1, *, kernel_size=7, act=nn.GELU, norm=BatchNorm, drop_path=0.0):
        super().__init__()
        padding, bias = kernel_size // 2, norm is not BatchNorm
        self.dwconv = nn.Conv2d(in_chans, in_chans, kernel_size, stride, padding, groups=in_chans, bias=bias)
        self.norm = norm(in_chans)
        self.pwconv1 = nn.Conv2d(in_chans, 4 * width, 1, bias=bias)
        self.act = act()
        self.pwconv2 = nn.Conv2d(4 * width, width, 1, bias=bias)
        self.shortcut = projection(in_chans, width, stride, norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.norm(self.dwconv(x))
        x = self.pwconv2(self.act(self.pwconv1(x)))
        return shortcut + self.drop_path(x)


class ConvNeXtBlock(nn.Module):
    """No downsampling in the block, so no stride and no projection: the shortcut is the identity (section 2.6).

    This is `convnext.Block` in the official code's other formulation, with 1x1 convolutions on (N, C, H, W) and
    without layer scale, which the authors' code of the road leaves off at every step.
    """

    expansion = 1

    def __init__(self, in_chans, width, stride=1, *, kernel_size=7, act=nn.GELU, norm=LayerNorm, drop_path=0.0):
        super().__init__()
        if in_chans != width or stride != 1:
            raise ValueError(
                f"a ConvNeXt block keeps its shape; got in_chans={in_chans}, width={width}, stride={stride}"
            )
        self.dwconv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = norm(width)
        self.pwconv1 = nn.Conv2d(width, 4 * width, 1)
        self.act = act()
        self.pwconv2 = nn.Conv2d(4 * width, width, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.dwconv(x))
        x = self.pwconv2(self.act(self.pwconv1(x)))
        return shortcut + self.drop_path(x)
