"""Create a network by name, with the stem and the initial weights that a recipe asks for.

The blocks, the stages and the downsampling layers stay as in the paper.
"""

from functools import partial
from typing import Any

from torch import nn

from convnext_min import roadmap
from convnext_min.convnext import ConvNeXt, LayerNorm
from convnext_min.isotropic import ConvNeXtIsotropic
from convnext_min.recipes import Recipe
from convnext_min.weights import VARIANTS

FOUR_STAGES = tuple(name for name, build in VARIANTS.items() if build.func is ConvNeXt)
ROAD = "road:<step>"
# Recipe fields that change the model, and the models that accept them.
FIELDS = {
    "depths": FOUR_STAGES,
    "dims": FOUR_STAGES,
    "stem": FOUR_STAGES,
    "layer_scale_init": (*VARIANTS,),
    "head_init_scale": (*VARIANTS,),
    "init": (*VARIANTS, ROAD),
    "width_multiplier": (ROAD,),
}


def _vision_transformer(**options: Any) -> nn.Module:
    from timm.models import VisionTransformer  # slow to import, here and below

    return VisionTransformer(img_size=64, patch_size=8, depth=6, embed_dim=96, num_heads=3, **options)


# Chapter 13: at one resolution and one width throughout, 8x8 vectors of 96 channels for an image of 64x64. Half the
# depth and a quarter of the width of the paper's isotropic ConvNeXt-S and ViT-S, and like these of one size: 0.7M.
ISOTROPIC = {
    "convnext": partial(ConvNeXtIsotropic, depth=9, dim=96, patch_size=8),
    "vit": _vision_transformer,
}
LIBRARIES = {"timm": "drop_path_rate", "torchvision": "stochastic_depth_prob"}  # names of the rate of stochastic depth


def create_model(name: str, recipe: Recipe, num_classes: int) -> nn.Module:
    """Return a new network: one of `VARIANTS`, `road:<step>`, `isotropic:<name>`, `timm:<name>`, `torchvision:<name>`.

    Raises ValueError, listing what is valid, for any other name, and for a recipe that sets a field which the network
    does not have.
    """
    library, _, rest = name.rpartition(":")
    small = library == "isotropic" and rest in ISOTROPIC
    if name not in VARIANTS and library != "road" and library not in LIBRARIES and not small:
        raise ValueError(
            f"unknown model {name!r}; valid: {', '.join(VARIANTS)}, timm:<name>, torchvision:<name>, isotropic:<name> "
            f"with one of the names {', '.join(ISOTROPIC)}, road:<step> with one of the steps "
            f"{', '.join(roadmap.STEPS)}"
        )
    _check_fields(name, ROAD if library == "road" else name, recipe)
    if name in VARIANTS:
        return _create_variant(name, recipe, num_classes)
    if small:
        model = ISOTROPIC[rest](num_classes=num_classes, drop_path_rate=recipe.drop_path)
        for block in model.blocks if rest == "vit" else ():
            block.attn.fused_attn = False  # on a CPU, fused attention takes twice as long in training
        return model
    if library == "road":
        model = roadmap.build(
            rest, num_classes=num_classes, width_multiplier=recipe.width_multiplier, drop_path_rate=recipe.drop_path
        )
        if recipe.init != "pytorch":  # the rule of the road itself
            initialize(model, recipe.init)
        return model
    return _create_from_library(name, recipe, num_classes)


def _check_fields(name: str, kind: str, recipe: Recipe) -> None:
    plain = Recipe()
    for field, models in FIELDS.items():
        if kind not in models and getattr(recipe, field) != getattr(plain, field):
            raise ValueError(
                f"{field} can be set for {', '.join(models)}, not for {name!r}: --set {field}={getattr(plain, field)}"
            )


def _create_variant(name: str, recipe: Recipe, num_classes: int) -> ConvNeXt | ConvNeXtIsotropic:
    sizes = {field: value for field in ("depths", "dims") if (value := getattr(recipe, field)) is not None}
    model = VARIANTS[name](
        num_classes=num_classes,
        drop_path_rate=recipe.drop_path,
        layer_scale_init_value=recipe.layer_scale_init,
        head_init_scale=recipe.head_init_scale,
        **sizes,
    )
    if recipe.stem == "overlapping":
        patchify = model.downsample_layers[0][0]
        model.downsample_layers[0] = overlapping_stem(patchify.in_channels, patchify.out_channels)
        model.downsample_layers[0].apply(model._init_weights)
    if recipe.init != "paper":  # the rule of ConvNeXt itself
        initialize(model, recipe.init)
    return model


def _create_from_library(name: str, recipe: Recipe, num_classes: int) -> nn.Module:
    library, _, rest = name.partition(":")
    if library == "timm":
        from timm import create_model as create
    else:
        from torchvision.models import get_model as create
    try:
        return create(rest, num_classes=num_classes, **{LIBRARIES[library]: recipe.drop_path})
    except TypeError:  # not every network takes a rate
        if recipe.drop_path:
            raise ValueError(f"{name} has no stochastic depth: --set drop_path=0.0") from None
        return create(rest, num_classes=num_classes)
    except RuntimeError as error:  # timm's for an unknown name
        raise ValueError(f"{name} cannot be created: {error}") from None


def overlapping_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Return a stem from (N, in_chans, H, W) to (N, dim, H / 4, W / 4): two 3x3 convolutions with stride 2.

    Overlapping windows see an edge wherever it lies; the paper's 4x4 patches must learn each position separately.
    Vision Transformers, too, train more easily with such a stem (Xiao et al., "Early Convolutions Help Transformers See
    Better", 2021).
    """
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
        LayerNorm(dim),
    )


def initialize(model: nn.Module, init: str) -> None:
    """Draw new initial weights for all convolutions and linear layers except the classifier, `head`.

    `init` is one of `recipes.INITS`. "paper": the released code's truncated normal with standard deviation 0.02.
    "fan_in": a truncated normal with variance 1 / fan-in, which keeps the variance of a signal through a layer of any
    width (LeCun et al., 1998). Both set biases to 0. "pytorch": PyTorch's default, which the authors' code of the road
    uses: uniform with variance 1 / (3 fan-in), biases too.
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
