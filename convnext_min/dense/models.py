"""Networks by name: a head on a backbone."""

from torch import nn

from convnext_min.dense.cascade import cascade_mask_rcnn
from convnext_min.dense.features import ConvNeXtFeatures
from convnext_min.dense.mask_rcnn import mask_rcnn
from convnext_min.dense.recipes import HEADS, DenseRecipe
from convnext_min.dense.upernet import fcn, upernet
from convnext_min.train.models import create_model
from convnext_min.train.pretrained import Start, load_start
from convnext_min.weights import find

DETECTORS = {"mask_rcnn": mask_rcnn, "cascade_mask_rcnn": cascade_mask_rcnn}
BACKBONES = ("convnext_", "road:")


def create_dense_model(name: str, recipe: DenseRecipe, num_classes: int, pretrained: str | None = None) -> nn.Module:
    """Return the network called `name`, "<head>:<backbone>", such as "upernet:convnext_tiny" or "fcn:road:resnet50".

    The head is one of `HEADS`, the backbone convnext_<variant> or road:<step>. `pretrained` names the backbone's
    weights: a run's checkpoint, a folder in Hugging Face's layout, a URL, or, for a ConvNeXt, a tag of the official
    release such as in22k. Raises ValueError for other names and for weights that are missing or do not fit.
    """
    head, _, backbone = name.partition(":")
    if head not in HEADS or not backbone.startswith(BACKBONES):
        raise ValueError(
            f"unknown network {name!r}; expected <head>:<backbone> with one of the heads {', '.join(HEADS)} and a "
            "backbone convnext_<variant> or road:<step>"
        )
    network = create_model(backbone, recipe, 1)  # its classifier is removed
    if pretrained:
        load_start(network, Start(find(backbone, pretrained)), ())
    features = ConvNeXtFeatures(network)
    if head == "fcn":
        return fcn(features, num_classes)
    if head == "upernet":
        return upernet(features, num_classes, channels=recipe.channels)
    return DETECTORS[head](
        features,
        num_classes,
        channels=recipe.channels,
        hidden=recipe.hidden,
        anchor_scale=recipe.anchor_scale,
        rois=recipe.rois,
        detections=recipe.detections,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
    )
