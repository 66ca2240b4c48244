"""convnext_min: ConvNeXt from scratch, and every step of the road from ResNet-50 to it."""

from convnext_min.convnext import (
    Block,
    ConvNeXt,
    convnext_atto,
    convnext_base,
    convnext_femto,
    convnext_large,
    convnext_nano,
    convnext_pico,
    convnext_small,
    convnext_tiny,
    convnext_xlarge,
)
from convnext_min.roadmap import STEPS, Design, build

__version__ = "0.2.0"

__all__ = [
    "STEPS",
    "Block",
    "ConvNeXt",
    "Design",
    "build",
    "convnext_atto",
    "convnext_base",
    "convnext_femto",
    "convnext_large",
    "convnext_nano",
    "convnext_pico",
    "convnext_small",
    "convnext_tiny",
    "convnext_xlarge",
]
