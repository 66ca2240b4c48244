"""Entry points of torch.hub, as in `torch.hub.load("owner/repository", "convnext_tiny", pretrained="in1k")`."""

from convnext_min.weights import (  # noqa: F401
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
)

dependencies = ["torch"]
