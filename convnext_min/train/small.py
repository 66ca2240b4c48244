"""What a recipe can change in ConvNeXt to train it from scratch on small data: the stem and the initial weights.

Both leave the blocks, the stages and the downsampling layers as the paper has them.
"""

from torch import nn

from convnext_min.convnext import ConvNeXt, LayerNorm


def overlapping_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Images (N, in_chans, H, W) to (N, dim, H / 4, W / 4), by two 3x3 convolutions of stride 2 instead of one 4x4.

    Windows that overlap see an edge wherever it lies; patches have to learn each of its places for itself. Vision
    Transformers, too, train more easily behind such a stem (Xiao et al., "Early Convolutions Help Transformers See
    Better", 2021).
    """
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
        LayerNorm(dim),
    )


def initialize(model: nn.Module, init: str) -> None:
    """Draw the initial weights of all convolutions and linear layers below the classifier, `head`, by a rule of INITS.

    "paper" is the released code's truncated normal with a standard deviation of 0.02. "fan_in" is a truncated normal
    with variance 1 / fan-in, which keeps the size of a signal through a layer, whatever its width (LeCun et al., 1998).
    Both set biases to 0. "pytorch" is PyTorch's default, as in the authors' code of the road: uniform with variance
    1 / (3 fan-in), biases too.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != "head":
            if init == "pytorch":
                module.reset_parameters()
                continue
            std = 0.02 if init == "paper" else module.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def adapt(model: ConvNeXt, stem: str, init: str) -> ConvNeXt:
    """Give a new `model` the stem, out of STEMS, and the initial weights, out of INITS; returns it."""
    patchify = model.downsample_layers[0][0]
    if stem == "overlapping":
        model.downsample_layers[0] = overlapping_stem(patchify.in_channels, patchify.out_channels)
        model.downsample_layers[0].apply(model._init_weights)
    if init != "paper":
        initialize(model, init)
    return model
