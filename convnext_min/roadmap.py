"""The road from ResNet to ConvNeXt as data: each `Design` is an earlier one with a field or two replaced.

`STEPS` are the rows of the paper's Table 10 and, at the larger size, of Table 11. `build` makes the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from convnext_min import blocks
from convnext_min.blocks import BatchNorm, Layer, ReLU
from convnext_min.convnext import LayerNorm


def resnet_stem(in_chans: int, width: int) -> nn.Sequential:
    """Return ResNet's stem: a 7x7 convolution and 3x3 max pooling, both with stride 2, to (N, width, H / 4, W / 4)."""
    conv = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
    return nn.Sequential(conv, BatchNorm(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))


def patchify_stem(in_chans: int, width: int) -> nn.Sequential:
    """Return the patchify stem: one 4x4 convolution with stride 4, to (N, width, H / 4, W / 4)."""
    return nn.Sequential(nn.Conv2d(in_chans, width, 4, 4))


@dataclass(frozen=True)
class Design:
    """The choices that distinguish the networks on the road; stage i has `depths[i]` blocks of width `width * 2**i`."""

    depths: tuple[int, int, int, int]
    width: int
    stem: Layer
    block: type[nn.Module]
    kernel_size: int
    act: Layer
    norm: Layer
    separate_downsampling: bool


RESNET50 = Design(
    depths=(3, 4, 6, 3),
    width=64,
    stem=resnet_stem,
    block=blocks.Bottleneck,
    kernel_size=3,
    act=ReLU,
    norm=BatchNorm,
    separate_downsampling=False,
)
RESNET200 = replace(RESNET50, depths=(3, 24, 36, 3))


def _road(start: Design, stage_ratio: Mapping, wide: int) -> Mapping[str, Design]:
    steps = {"resnet50": start}
    steps["stage_ratio"] = replace(start, **stage_ratio)
    steps["patchify"] = replace(steps["stage_ratio"], stem=patchify_stem)
    steps["depthwise"] = replace(steps["patchify"], block=blocks.DepthwiseBottleneck)
    steps["width"] = replace(steps["depthwise"], width=wide)
    steps["inverted"] = replace(steps["width"], block=blocks.InvertedBottleneck)
    steps["move_up"] = replace(steps["inverted"], block=blocks.MovedUpBlock)
    steps["kernel5"] = replace(steps["move_up"], kernel_size=5)
    steps["kernel7"] = replace(steps["move_up"], kernel_size=7)
    steps["kernel9"] = replace(steps["move_up"], kernel_size=9)
    steps["kernel11"] = replace(steps["move_up"], kernel_size=11)
    steps["gelu"] = replace(steps["kernel7"], act=nn.GELU)
    steps["fewer_acts"] = replace(steps["gelu"], block=blocks.FewerActivationsBlock)
    steps["fewer_norms"] = replace(steps["fewer_acts"], block=blocks.FewerNormsBlock)
    steps["layer_norm"] = replace(steps["fewer_norms"], norm=LayerNorm)
    steps["convnext"] = replace(steps["layer_norm"], block=blocks.ConvNeXtBlock, separate_downsampling=True)
    return MappingProxyType(steps)


# The larger regime widens at the stage-ratio step already (64 to 84), to keep ResNet-200's cost (Table 11).
REGIMES = MappingProxyType(
    {
        "resnet50": _road(RESNET50, {"depths": (3, 3, 9, 3)}, wide=96),
        "resnet200": _road(RESNET200, {"depths": (3, 3, 27, 3), "width": 84}, wide=128),
    }
)
STEPS = REGIMES["resnet50"]
# The step that each step is compared with: the one before it, except that GELU continues from kernel size 7.
PREVIOUS = MappingProxyType(dict(zip(list(STEPS)[1:], STEPS)) | {"gelu": "kernel7"})


class RoadNet(nn.Module):
    """The network of a `Design`: images (N, 3, H, W), H and W at least 32, to logits (N, num_classes).

    `drop_path_rate` is the stochastic-depth rate of the last block; the rates grow linearly from 0. One rule of
    initial weights holds at every step, the authors' own: convolutions keep PyTorch's default, uniform with a standard
    deviation of 1 / sqrt(3 fan-in), and the classifier is a truncated normal of 0.02.
    """

    def __init__(self, design: Design, num_classes: int = 1000, drop_path_rate: float = 0.0):
        super().__init__()
        separate, norm = design.separate_downsampling, design.norm
        widths = [design.width * 2**i for i in range(4)]
        rates = iter(torch.linspace(0, drop_path_rate, sum(design.depths), device="cpu").tolist())
        chans = widths[0]
        self.stem = design.stem(3, chans)
        if separate:
            self.stem.append(norm(chans))
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(design.depths, widths)):
            stage = nn.Sequential()
            stride = 1 if i == 0 else 2
            if separate and stride == 2:
                stage.append(nn.Sequential(norm(chans), nn.Conv2d(chans, width, 2, 2)))
                chans, stride = width, 1
            for _ in range(depth):
                block = design.block(
                    chans,
                    width,
                    stride,
                    kernel_size=design.kernel_size,
                    act=design.act,
                    norm=norm,
                    drop_path=next(rates),
                )
                stage.append(block)
                chans, stride = width * design.block.expansion, 1
            self.stages.append(stage)
        self.norm = nn.LayerNorm(chans, eps=1e-6) if separate else nn.Identity()
        self.head = nn.Linear(chans, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the pooled features (N, C) of images (N, 3, H, W)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.mean([-2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def build(
    slug: str,
    regime: str = "resnet50",
    num_classes: int = 1000,
    width_multiplier: float = 1.0,
    drop_path_rate: float = 0.0,
) -> RoadNet:
    """Build the network at step `slug` of the road (Table 10 for regime "resnet50", Table 11 for "resnet200").

    `width_multiplier` scales the width, rounded to a multiple of 4, for small experiments. Raises ValueError,
    listing what is valid, for an unknown slug or regime and for sizes that leave no channel or class.
    """
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}; valid: {', '.join(REGIMES)}")
    if slug not in REGIMES[regime]:
        raise ValueError(f"unknown step {slug!r}; valid, in order: {', '.join(REGIMES[regime])}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    design = REGIMES[regime][slug]
    if width_multiplier != 1.0:
        width = 4 * round(design.width * width_multiplier / 4)
        if width < 4:
            least = 2.01 / design.width
            raise ValueError(
                f"width_multiplier must leave at least 4 channels (>= {least:.3f} here), got {width_multiplier}"
            )
        design = replace(design, width=width)
    return RoadNet(design, num_classes, drop_path_rate)
