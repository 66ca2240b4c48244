"""Register the variants in timm: after `import convnext_min.timm`, `timm.create_model("convnext_min_tiny")` works.

timm's options work too: `pretrained=True` or a tag as in "convnext_min_tiny.in22k_in1k", `features_only=True` with
`out_indices`, `in_chans`, `num_classes`, `drop_path_rate`.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from convnext_min.backbone import Backbone
from convnext_min.convnext import ConvNeXt
from convnext_min.formats import to_official
from convnext_min.weights import PRETRAINED, VARIANTS, find, unwrap


def _config(name: str, tag: str) -> dict:
    """Return timm's configuration of the weights `tag` of the variant `name`, or of no weights without a tag."""
    size = 384 if tag.endswith("384") else 224
    return {
        "url": find(name, tag) if tag else "",
        "num_classes": 21841 if tag == "in22k" else 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 1.0 if size == 384 else 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
    }


def _timm_name(name: str) -> str:
    return name.replace("convnext_", "convnext_min_")


NAMES = [name for name, build in VARIANTS.items() if build.func is ConvNeXt]
default_cfgs = generate_default_cfgs(  # timm looks for this name
    {
        _timm_name(name) + (f".{tag}" if tag else ""): _config(name, tag)
        for name in NAMES
        for tag in PRETRAINED.get(name, [""])
    }
)


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return build_model_with_cfg(
            Backbone,
            _timm_name(name),
            pretrained,
            pretrained_filter_fn=lambda state, model: to_official(unwrap(state)),
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**VARIANTS[name].keywords, **kwargs},
        )

    create.__name__ = _timm_name(name)
    register_model(create)


for _name in NAMES:
    _register(_name)
