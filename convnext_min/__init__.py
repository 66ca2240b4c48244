"""convnext_min: ConvNeXt from scratch, and every step of the road from ResNet-50 to it.

The variants here take `pretrained=`, as in `convnext_tiny(pretrained="in1k")`; `convnext_min.convnext` is the file
that stands alone.
"""

from convnext_min.convnext import Block, ConvNeXt
from convnext_min.isotropic import ConvNeXtIsotropic
from convnext_min.roadmap import STEPS, Design, build
from convnext_min.weights import (
    convert,
    convnext_atto,
    convnext_base,
    convnext_femto,
    convnext_isotropic_base,
    convnext_isotropic_large,
    convnext_isotropic_small,
    convnext_large,
    convnext_nano,
    convnext_pico,
    convnext_small,
    convnext_tiny,
    convnext_xlarge,
    list_pretrained,
    load,
    load_pretrained,
    read_labels,
    save_pretrained,
)

__version__ = "0.2.0"

__all__ = [
    "STEPS",
    "Block",
    "ConvNeXt",
    "ConvNeXtIsotropic",
    "Design",
    "build",
    "convert",
    "convnext_atto",
    "convnext_base",
    "convnext_femto",
    "convnext_isotropic_base",
    "convnext_isotropic_large",
    "convnext_isotropic_small",
    "convnext_large",
    "convnext_nano",
    "convnext_pico",
    "convnext_small",
    "convnext_tiny",
    "convnext_xlarge",
    "list_pretrained",
    "load",
    "load_pretrained",
    "read_labels",
    "save_pretrained",
]
