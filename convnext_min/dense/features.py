"""A classification network as a backbone: its stages as levels of strides 4, 8, 16 and 32, and a pyramid on them."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from convnext_min.convnext import ConvNeXt, LayerNorm
from convnext_min.roadmap import RoadNet


class ConvNeXtFeatures(nn.Module):
    """The backbone of detection and segmentation: images (N, 3, H, W) to {"0": C2, "1": C3, "2": C4, "3": C5}.

    Level i has shape (N, channels[i], H / 2**(i + 2), W / 2**(i + 2)). `network` is a `ConvNeXt` or a step of the
    road, with any weights; its final norm and classifier are removed, in place. As in the released code each level
    of a ConvNeXt ends with a LayerNorm of its own, because no block does; the steps with BatchNorm, such as
    ResNet-50, get none.
    """

    def __init__(self, network: ConvNeXt | RoadNet):
        super().__init__()
        self.network = network
        network.norm = network.head = nn.Identity()
        with torch.no_grad():
            training = network.training
            levels = self._levels(torch.zeros(1, 3, 32, 32, device=next(network.parameters()).device), network.eval())
            network.train(training)
        self.channels = [level.shape[1] for level in levels]
        normalized = any(isinstance(module, nn.LayerNorm) for module in network.modules())
        self.norms = nn.ModuleList(LayerNorm(dim) if normalized else nn.Identity() for dim in self.channels)

    @staticmethod
    def _levels(x: Tensor, network: ConvNeXt | RoadNet) -> list[Tensor]:
        levels = []
        if isinstance(network, RoadNet):
            x = network.stem(x)
        for i, stage in enumerate(network.stages):
            if isinstance(network, ConvNeXt):
                x = network.downsample_layers[i](x)
            x = stage(x)
            levels.append(x)
        return levels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = self._levels(x, self.network)
        return OrderedDict((str(i), norm(level)) for i, (norm, level) in enumerate(zip(self.norms, levels)))


def with_fpn(features: ConvNeXtFeatures, out_channels: int = 256) -> nn.Sequential:
    """Return the backbone with a feature pyramid (Lin et al., 2017): images to P2..P5, named "0".."3", and P6, "pool".

    Every level has `out_channels` channels; P6, of stride 64, is every second position of P5.
    """
    fpn = Pyramid(features.channels, out_channels, LastLevelMaxPool())
    backbone = nn.Sequential(OrderedDict(features=features, fpn=fpn))
    backbone.out_channels = out_channels  # torchvision's detectors read it
    return backbone


class Pyramid(FeaturePyramidNetwork):
    """torchvision's feature pyramid with float32 outputs, also under autocast.

    torchvision's detectors give anchors, proposals and boxes the number format of the features, and a coordinate of
    1,203 pixels is 1,200 in bfloat16.
    """

    def forward(self, levels: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, level.float()) for name, level in super().forward(levels).items())
