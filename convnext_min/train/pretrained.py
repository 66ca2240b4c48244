"""Initial weights for fine-tuning, from an earlier run or an official release, with a classifier for new classes.

The paper fine-tunes the last weights and not the EMA, except for ConvNeXt-L from ImageNet-1K, where it takes the best
EMA (appendix A.2). It multiplies the new classifier's initial weights by `head_init_scale` = 0.001 (Table 6), so that
the classifier does not disturb the other layers at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convnext_min.convnext import ConvNeXt
from convnext_min.formats import key_differences, to_official
from convnext_min.isotropic import ConvNeXtIsotropic
from convnext_min.train.checkpoint import is_run
from convnext_min.weights import load_weights, read_source, unwrap


class Start(NamedTuple):
    """A checkpoint with initial weights."""

    path: Path | str  # a file, a folder in Hugging Face's layout, or a URL
    averaged: bool = False  # its EMA weights
    class_map: Path | str | None = None  # file with one line per new class: the index of that class in the checkpoint


def load_start(model: nn.Module, start: Start, classes: tuple[str, ...]) -> str:
    """Load the weights of `start` into `model`, in place, and return a line about them and the classifier.

    The weights of a ConvNeXt may have the keys of the official release, timm, torchvision or transformers, and are
    loaded by `weights.load_weights`; other networks need their own keys. The classifier is the network's last linear
    layer. It is loaded if the checkpoint has the same number of classes and, as far as it names them, the same names.
    With a class map it gets the mapped rows of the checkpoint's classifier. Otherwise it stays as it was built. Raises
    FileNotFoundError for a missing file, and ValueError, naming the first keys that differ, for weights that do not
    fit, and for a network without a linear layer.
    """
    weights, old_classes = read_weights(start.path, start.averaged)
    is_convnext = isinstance(model, (ConvNeXt, ConvNeXtIsotropic))
    expected, keys = model.state_dict(), classifier_keys(model)
    try:
        if is_convnext:
            weights = to_official(weights)
        shapes = [weights[key].shape if key in weights else None for key in keys]
        message = "its classifier is kept"
        if start.class_map:
            if None in shapes:
                raise ValueError(f"there is no classifier whose rows {start.class_map} could choose")
            rows = read_class_map(start.class_map, len(classes), len(weights[keys[0]]))
            weights |= {key: weights[key][rows] for key in keys}
            message = f"the rows of its classifier are chosen by {start.class_map}"
        elif old_classes not in (None, classes) or shapes != [expected[key].shape for key in keys]:
            weights |= {key: expected[key] for key in keys}
            message = f"the classifier is new, for {len(classes)} classes"
        notes = load_weights(model, weights) if is_convnext else load_exactly(model, weights)
    except ValueError as error:
        raise ValueError(f"{start.path}: {error}") from None
    return "; ".join([f"{'EMA ' * start.averaged}weights from {start.path}", *notes, message])


def classifier_keys(model: nn.Module) -> list[str]:
    """Return the names of the weight and the bias of the network's last linear layer. Raises ValueError without one."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} cannot be fine-tuned: its classifier should be a linear layer, and it has none"
        )
    return [f"{layers[-1]}.{kind}" for kind, _ in model.get_submodule(layers[-1]).named_parameters()]


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load `weights` into `model` and return no notes. Raises ValueError, naming the first keys that differ."""
    if found := key_differences(weights, model.state_dict()):
        raise ValueError(f"the weights do not fit: {found}")
    model.load_state_dict(weights)
    return []


def read_weights(path: Path | str, averaged: bool = False) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Return the weights in a checkpoint, unwrapped by `weights.unwrap`, and its classes if it names them.

    Raises FileNotFoundError, and ValueError if it has no weights, or no `averaged` (EMA) weights if they are asked for.
    """
    checkpoint = read_source(path)
    try:
        weights = unwrap(checkpoint, averaged)
    except ValueError as error:
        raise ValueError(f"{path} holds no {'EMA ' * averaged}weights: {error}") from None
    return weights, tuple(checkpoint["classes"]) if is_run(checkpoint) else None


def read_class_map(path: Path | str, new: int, old: int) -> Tensor:
    """Return the class indices in a file with one per line, int64 (new,), each from 0 to `old` - 1.

    Raises FileNotFoundError, and ValueError naming the wrong line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no class map {path}")
    lines = Path(path).read_text(encoding="utf-8").split()
    for number, line in enumerate(lines, 1):
        if not line.isdecimal() or int(line) >= old:
            raise ValueError(f"line {number} of {path} is {line!r}; expected a class of the checkpoint, 0 to {old - 1}")
    if len(lines) != new:
        raise ValueError(f"{path} has {len(lines)} lines, but there are {new} classes")
    return torch.tensor([int(line) for line in lines])
