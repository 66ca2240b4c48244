"""Semantic segmentation: UperNet (Xiao et al., 2018) as the paper uses it (Tables 4 and 7), and a plain head.

UperNet's decoder is that of segmentation-models-pytorch, which takes the feature maps of any backbone. It has the same
layers as the decoder of MMSegmentation, which the paper used.
"""

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from convnext_min.dense.features import ConvNeXtFeatures

IGNORED = 255  # label of pixels that belong to no class
AUXILIARY_WEIGHT = 0.4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UPerDecoder(UPerNetDecoder):
    """C2..C5 to (N, channels, H / 4, W / 4): pyramid pooling on C5, a feature pyramid, all levels fused."""

    def __init__(self, features: ConvNeXtFeatures, channels: int):
        super().__init__([0, 0, *features.channels], decoder_channels=channels)
        self.feature_norms = nn.ModuleList(nn.Identity() for _ in features.channels)  # the backbone has them
        initialize_decoder(self)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return super().forward([None, None, *levels])  # it counts levels from stride 1


class Segmenter(nn.Module):
    """A segmentation network: a list of images (3, H, W) in 0..1 to a list of logits (classes, H, W).

    Images may differ in size; they are normalized, and padded to a common multiple of 32. In training it takes a list
    of targets with "labels" (H, W), int64, and returns a dict of losses, to which pixels labelled `IGNORED` do not
    contribute. `head` maps the levels C2..C5 to logits of any height and width. With `auxiliary`, the loss of an FCN
    head on C4 is added in training.
    """

    def __init__(self, features: ConvNeXtFeatures, head: nn.Module, num_classes: int, auxiliary: bool = False):
        super().__init__()
        self.features, self.head, self.num_classes = features, head, num_classes
        self.auxiliary = FCN(features, num_classes, level=2) if auxiliary else None
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> list[Tensor] | dict[str, Tensor]:
        height, width = (-(-max(image.shape[i] for image in images) // 32) * 32 for i in (1, 2))
        x = torch.stack([_pad((image - self.mean) / self.std, height, width, 0.0) for image in images])
        levels = list(self.features(x).values())
        logits = self._upsample(self.head(levels), x)
        if not self.training:
            return [scores[:, : image.shape[1], : image.shape[2]] for scores, image in zip(logits, images)]
        labels = torch.stack([_pad(target["labels"], height, width, IGNORED) for target in targets])
        losses = {"loss_segmentation": _cross_entropy(logits, labels)}
        if self.auxiliary:
            logits = self._upsample(self.auxiliary(levels), x)
            losses["loss_auxiliary"] = AUXILIARY_WEIGHT * _cross_entropy(logits, labels)
        return losses

    @staticmethod
    def _upsample(logits: Tensor, x: Tensor) -> Tensor:
        return F.interpolate(logits.float(), x.shape[-2:], mode="bilinear", align_corners=False)


def _pad(x: Tensor, height: int, width: int, value: float) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, 0 for ignored pixels, averaged over all pixels as in MMSegmentation."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()


class FCN(nn.Module):
    """The plain head (Long et al., 2015): a 3x3 convolution and a classifier on one level, C5 by default."""

    def __init__(self, features: ConvNeXtFeatures, num_classes: int, level: int = 3, channels: int = 256):
        super().__init__()
        self.level = level
        self.conv = nn.Conv2d(features.channels[level], channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        x = F.relu(self.norm(self.conv(levels[self.level])))
        return self.classifier(self.dropout(x))


class UPerHead(nn.Sequential):
    """The decoder, dropout and a classifier of each position: C2..C5 to logits (N, classes, H / 4, W / 4)."""

    def __init__(self, features: ConvNeXtFeatures, num_classes: int, channels: int = 512):
        super().__init__(UPerDecoder(features, channels), nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))


def upernet(features: ConvNeXtFeatures, num_classes: int, *, channels: int = 512, auxiliary: bool = True) -> Segmenter:
    """Build UperNet; `channels` is the width of its decoder."""
    return Segmenter(features, UPerHead(features, num_classes, channels), num_classes, auxiliary)


def fcn(features: ConvNeXtFeatures, num_classes: int) -> Segmenter:
    """Build the plain head on C5, to compare with."""
    features.norms[:3].requires_grad_(False)  # of levels without a loss: several processes wait for every gradient
    return Segmenter(features, FCN(features, num_classes), num_classes)
