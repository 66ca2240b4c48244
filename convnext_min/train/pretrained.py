"""Where fine-tuning starts: the weights of an earlier run or an official release, with a classifier for new classes.

The paper fine-tunes the final weights, not their average (Table 6), and starts the new classifier at almost nothing,
`head_init_scale` = 0.001, so that it does not disturb the others at once.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convnext_min.train import records


class Start(NamedTuple):
    """A checkpoint to take weights from."""

    path: Path | str
    averaged: bool = False  # the averaged weights
    class_map: Path | str | None = None  # file with a line for each new class: the number of the old one that it was


def load_start(model: nn.Module, start: Start, classes: tuple[str, ...]) -> str:
    """Give `model`, in place, the weights that `start` names, and say in a line what was done.

    The last linear layer of the network is its classifier. If the checkpoint has as many classes, and no others by
    name, its classifier is kept. With a class map the new one gets the rows of the old one that the map names. Else it
    stays as it was built. Raises FileNotFoundError for a missing file, ValueError, naming them, for weights that do
    not fit.
    """
    weights, old_classes = read_weights(start.path, start.averaged)
    mine = model.state_dict()
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    in_head = [key for key in mine if key in (f"{head}.weight", f"{head}.bias") and key in weights]
    other_head = any(weights[key].shape != mine[key].shape for key in in_head) or old_classes not in (None, classes)
    told = "its classifier is kept"
    if start.class_map:
        rows = read_class_map(start.class_map, len(classes), len(weights[in_head[0]]) if in_head else 0)
        weights |= {key: weights[key][rows] for key in in_head}
        told = f"its classifier's rows are taken as {start.class_map} says"
    elif other_head:
        weights |= {key: mine[key] for key in in_head}
        told = f"the classifier is new, for {len(classes)} classes"
    wrong = {
        "lacks": [key for key in mine if key not in weights],
        "has besides": [key for key in weights if key not in mine],
        "has in another shape": [key for key in mine if key in weights and weights[key].shape != mine[key].shape],
    }
    if any(wrong.values()):
        parts = (f"{what} {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"the weights in {start.path} are not of this model: the file {'; it '.join(parts)}")
    model.load_state_dict(weights)
    return f"weights{', averaged,' * start.averaged} from {start.path}; {told}"


def read_weights(path: Path | str, averaged: bool = False) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The weights in a checkpoint of `train`, or under "model" in one of the official code; classes, if it has them.

    Raises ValueError if it holds none, or no `averaged` ones though they are asked for.
    """
    state = records.read(path)
    ours = isinstance(state, dict) and "weights" in state
    key = ("ema" if averaged else "weights") if ours else ("model_ema" if averaged else "model")
    weights = state.get(key) if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        kind = "averaged weights" if averaged else "weights"
        raise ValueError(f"{path} holds no {kind}: nothing under {key!r}")
    return dict(weights), tuple(state["classes"]) if "classes" in state else None


def read_class_map(path: Path | str, new: int, old: int) -> Tensor:
    """The numbers, int64 (new,), in a file with one in each line, each from 0 to `old` - 1.

    Raises FileNotFoundError, and ValueError naming the line that is wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no class map {path}")
    lines = Path(path).read_text().split()
    for number, line in enumerate(lines, 1):
        if not line.isdecimal() or int(line) >= old:
            raise ValueError(f"line {number} of {path} is {line!r}; right is a class of the checkpoint, 0 to {old - 1}")
    if len(lines) != new:
        raise ValueError(f"{path} has {len(lines)} lines, but there are {new} classes")
    return torch.tensor([int(line) for line in lines])
