"""Names of ConvNeXt's tensors in four libraries: recognize them and convert between them.

The four are the official release, whose names are also `ConvNeXt`'s, timm, torchvision and Hugging Face transformers.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

State = dict[str, Tensor]


class Names(NamedTuple):
    """A library's names of ConvNeXt's layers.

    In a name, {i} is the stage, {b} the block, and {j} is 0 for a norm and 1 for a convolution; {even} is 2 i, {odd} is
    2 i + 1.
    """

    stem: tuple[str, str]  # convolution, norm
    downsample: str
    block: str
    layers: tuple[str, str, str, str]  # dwconv, norm, pwconv1, pwconv2
    gamma: str
    norm: str
    head: str


FORMATS = {
    "official": Names(
        stem=("downsample_layers.0.0", "downsample_layers.0.1"),
        downsample="downsample_layers.{i}.{j}",
        block="stages.{i}.{b}",
        layers=("dwconv", "norm", "pwconv1", "pwconv2"),
        gamma="gamma",
        norm="norm",
        head="head",
    ),
    "timm": Names(
        stem=("stem.0", "stem.1"),
        downsample="stages.{i}.downsample.{j}",
        block="stages.{i}.blocks.{b}",
        layers=("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
        gamma="gamma",
        norm="head.norm",
        head="head.fc",
    ),
    "torchvision": Names(  # stages and downsampling layers are numbered together
        stem=("features.0.0", "features.0.1"),
        downsample="features.{even}.{j}",
        block="features.{odd}.{b}",
        layers=("block.0", "block.2", "block.3", "block.5"),
        gamma="layer_scale",
        norm="classifier.0",
        head="classifier.2",
    ),
    "transformers": Names(
        stem=("convnext.embeddings.patch_embeddings", "convnext.embeddings.layernorm"),
        downsample="convnext.encoder.stages.{i}.downsampling_layer.{j}",
        block="convnext.encoder.stages.{i}.layers.{b}",
        layers=("dwconv", "layernorm", "pwconv1", "pwconv2"),
        gamma="layer_scale_parameter",
        norm="convnext.layernorm",
        head="classifier",
    ),
}
OFFICIAL = FORMATS["official"]


def tensor_names(names: Names, depths: tuple[int, ...]) -> list[str]:
    """Return the names of all tensors of a ConvNeXt, in the same order for each library."""
    places = [(i, b) for i, depth in enumerate(depths) for b in range(depth)]
    blocks = [names.block.format(i=i, odd=2 * i + 1, b=b) for i, b in places]
    layers = [*names.stem, names.norm, names.head]
    layers += [names.downsample.format(i=i, even=2 * i, j=j) for i in (1, 2, 3) for j in (0, 1)]
    layers += [f"{block}.{layer}" for block in blocks for layer in names.layers]
    tensors = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return tensors + [f"{block}.{names.gamma}" for block in blocks]


def recognize(state: Mapping[str, Tensor]) -> str:
    """Return the library whose keys `state` has: one of `FORMATS`, or "isotropic" for an isotropic model.

    Raises ValueError, naming the first keys, if they are of no ConvNeXt.
    """
    if any(".grn." in key for key in state):
        raise ValueError(
            "these are the weights of ConvNeXt V2 (they have global response normalization), which is another model"
        )
    for library, names in FORMATS.items():
        block = names.block.format(i=0, odd=1, b=0)
        if f"{names.stem[0]}.weight" in state and f"{block}.{names.layers[0]}.weight" in state:
            return library
    if "stem.weight" in state and "blocks.0.dwconv.weight" in state:
        return "isotropic"
    raise ValueError(
        f"these are not the weights of a ConvNeXt: the first keys are {first_names(state)}; expected the keys of "
        "the official release (downsample_layers.0.0.weight and stages.0.0.dwconv.weight; isotropic: stem.weight and "
        "blocks.0.dwconv.weight), timm (stem.0.weight), torchvision (features.0.0.weight) or transformers "
        "(convnext.embeddings.patch_embeddings.weight)"
    )


def to_official(state: Mapping[str, Tensor]) -> State:
    """Return a state dict of any of the four libraries with the keys and shapes of `ConvNeXt`.

    Keys that are no ConvNeXt's keep their names. Raises ValueError if `recognize` does.
    """
    if "embeddings.patch_embeddings.weight" in state:  # transformers' model without a classifier
        state = {f"convnext.{key}": value for key, value in state.items()}
    library = recognize(state)
    if library == "isotropic":
        return dict(state)
    names = FORMATS[library]
    depths = count_blocks(state, names)
    ours = dict(zip(tensor_names(names, depths), tensor_names(OFFICIAL, depths)))
    official = {ours.get(key, key): value for key, value in state.items()}
    for key, value in official.items():
        if key.endswith(".gamma"):
            official[key] = value.flatten()  # torchvision: (C, 1, 1)
        elif ".pwconv" in key and value.ndim == 4:
            official[key] = value.flatten(1)  # timm's small models: 1x1 convolutions
    return official


def convert(state: Mapping[str, Tensor], library: str, conv_mlp: bool = False) -> State:
    """Return a state dict of any of the four libraries with the keys and shapes of `library`, one of `FORMATS`.

    `conv_mlp` is timm's option: its atto, femto, pico and nano have 1x1 convolutions in place of linear layers.
    Raises ValueError for an unknown library and for isotropic models, which only the official release has.
    """
    if library not in FORMATS:
        raise ValueError(f"unknown library {library!r}; valid: {', '.join(FORMATS)}")
    official = to_official(state)
    if "stem.weight" in official:
        if library == "official":
            return official
        raise ValueError(f"{library} has no isotropic ConvNeXt; their keys are those of the official release")
    depths = count_blocks(official, OFFICIAL)
    theirs = dict(zip(tensor_names(OFFICIAL, depths), tensor_names(FORMATS[library], depths)))
    converted = {}
    for key, value in official.items():
        if library == "torchvision" and key.endswith(".gamma"):
            value = value[:, None, None]
        if conv_mlp and ".pwconv" in key and key.endswith(".weight"):
            value = value[:, :, None, None]
        converted[theirs.get(key, key)] = value
    return converted


def key_differences(state: State, expected: State) -> str:
    """Return the first keys in which `state` differs from a model's state dict `expected`, or "" if none does."""
    differences = {
        "missing keys": [key for key in expected if key not in state],
        "unexpected keys": [key for key in state if key not in expected],
        "shape mismatch": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    }
    return "; ".join(f"{kind} {first_names(keys)}" for kind, keys in differences.items() if keys)


def first_names(names: Iterable, count: int = 3) -> str:
    """Return the first of several names, as in "a, b, c, ..."."""
    names = list(names)
    return ", ".join(map(str, names[:count])) + ", ..." * (len(names) > count)


def count_blocks(state: Mapping[str, Tensor], names: Names) -> tuple[int, ...]:
    """Return the number of blocks of each stage."""
    key = f"{names.block}.{names.layers[0]}.weight"
    return tuple(
        next(b for b in itertools.count() if key.format(i=i, odd=2 * i + 1, b=b) not in state) for i in range(4)
    )
