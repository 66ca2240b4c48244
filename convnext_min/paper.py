"""The paper's own numbers (arXiv:2201.03545v2), to print beside ours.

Top-1 in percent on ImageNet-1K; its "FLOPs" are multiply-accumulates, in units of 1e9 at 224x224.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One row of Table 10 or 11: `top1` is a mean over three seeds where `std` is given (Table 10)."""

    label: str
    top1: float
    std: float | None
    gmacs: float


TABLE10 = {
    "resnet50": Row("ResNet-50", 78.82, 0.07, 4.09),
    "stage_ratio": Row("stage ratio", 79.36, 0.07, 4.53),
    "patchify": Row("patchify stem", 79.51, 0.18, 4.42),
    "depthwise": Row("depthwise conv", 78.28, 0.08, 2.35),
    "width": Row("width 64 to 96", 80.50, 0.02, 5.27),
    "inverted": Row("inverted bottleneck", 80.64, 0.03, 4.64),
    "move_up": Row("move up depthwise", 79.92, 0.08, 4.07),
    "kernel5": Row("kernel 5", 80.35, 0.08, 4.10),
    "kernel7": Row("kernel 7", 80.57, 0.14, 4.15),
    "kernel9": Row("kernel 9", 80.57, 0.06, 4.21),
    "kernel11": Row("kernel 11", 80.47, 0.11, 4.29),
    "gelu": Row("ReLU to GELU", 80.62, 0.14, 4.15),
    "fewer_acts": Row("fewer activations", 81.27, 0.06, 4.15),
    "fewer_norms": Row("fewer norms", 81.41, 0.09, 4.15),
    "layer_norm": Row("BN to LN", 81.47, 0.09, 4.46),
    "convnext": Row("separate downsampling", 81.97, 0.06, 4.49),
}

TABLE11 = {
    "resnet50": Row("ResNet-200", 81.14, None, 15.01),
    "stage_ratio": Row("stage ratio, width 64 to 84", 81.33, None, 14.52),
    "patchify": Row("patchify stem", 81.59, None, 14.38),
    "depthwise": Row("depthwise conv", 80.54, None, 7.23),
    "width": Row("width 84 to 128", 81.85, None, 16.76),
    "inverted": Row("inverted bottleneck", 82.64, None, 15.68),
    "move_up": Row("move up depthwise", 82.04, None, 14.63),
    "kernel5": Row("kernel 5", 82.32, None, 14.70),
    "kernel7": Row("kernel 7", 82.30, None, 14.81),
    "kernel9": Row("kernel 9", 82.27, None, 14.95),
    "kernel11": Row("kernel 11", 82.18, None, 15.13),
    "gelu": Row("ReLU to GELU", 82.19, None, 14.81),
    "fewer_acts": Row("fewer activations", 82.71, None, 14.81),
    "fewer_norms": Row("fewer norms", 83.17, None, 14.81),
    "layer_norm": Row("BN to LN", 83.35, None, 14.81),
    "convnext": Row("separate downsampling", 83.60, None, 15.35),
}

ROADS = {"resnet50": TABLE10, "resnet200": TABLE11}

# The first rows of the two tables: the same networks under PyTorch's classic 90-epoch recipe.
CLASSIC_TOP1 = {"resnet50": 76.13, "resnet200": 78.20}


class Variant(NamedTuple):
    """Tables 1 and 9: parameters in millions, GMACs at 224 and 384, top-1 from ImageNet-1K alone at 224."""

    params: float
    gmacs_224: float
    gmacs_384: float
    top1: float | None


VARIANTS = {
    "convnext_tiny": Variant(28.6, 4.5, 13.1, 82.1),
    "convnext_small": Variant(50.0, 8.7, 25.5, 83.1),
    "convnext_base": Variant(88.6, 15.4, 45.0, 83.8),
    "convnext_large": Variant(197.8, 34.4, 101.0, 84.3),
    "convnext_xlarge": Variant(350.2, 60.9, 179.0, None),
}
