"""Pretrained weights: read the checkpoints of four libraries, convert between them, download the official ones::

    model = convnext_tiny(pretrained="in22k_in1k")  # the official release
    model = load("pytorch_model.bin")  # a ConvNeXt of any of the four libraries; its sizes come from the file
    theirs.load_state_dict(convert(model.state_dict(), "timm"))

The four are the official release, timm, torchvision and Hugging Face transformers; a checkpoint is recognized from its
keys. Only PyTorch is needed, and safetensors for files of that format. No code in a checkpoint is ever run.
"""

import fnmatch
import itertools
import json
import logging
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnext_min import convnext, isotropic
from convnext_min.convnext import ConvNeXt
from convnext_min.download import download
from convnext_min.extras import require
from convnext_min.formats import OFFICIAL, State, convert, count_blocks, first_names, key_differences, to_official
from convnext_min.isotropic import ConvNeXtIsotropic

logger = logging.getLogger(__name__)

# ---- The official release

OFFICIAL_URL = "https://dl.fbaipublicfiles.com/convnext/"
PRETRAINED = {  # files by model and tag: the training data, then the resolution if it is not 224
    "convnext_tiny": {
        "in1k": "convnext_tiny_1k_224_ema.pth",
        "in22k": "convnext_tiny_22k_224.pth",
        "in22k_in1k": "convnext_tiny_22k_1k_224.pth",
        "in22k_in1k_384": "convnext_tiny_22k_1k_384.pth",
    },
    "convnext_small": {
        "in1k": "convnext_small_1k_224_ema.pth",
        "in22k": "convnext_small_22k_224.pth",
        "in22k_in1k": "convnext_small_22k_1k_224.pth",
        "in22k_in1k_384": "convnext_small_22k_1k_384.pth",
    },
    "convnext_base": {
        "in1k": "convnext_base_1k_224_ema.pth",
        "in1k_384": "convnext_base_1k_384.pth",
        "in22k": "convnext_base_22k_224.pth",
        "in22k_in1k": "convnext_base_22k_1k_224.pth",
        "in22k_in1k_384": "convnext_base_22k_1k_384.pth",
    },
    "convnext_large": {
        "in1k": "convnext_large_1k_224_ema.pth",
        "in1k_384": "convnext_large_1k_384.pth",
        "in22k": "convnext_large_22k_224.pth",
        "in22k_in1k": "convnext_large_22k_1k_224.pth",
        "in22k_in1k_384": "convnext_large_22k_1k_384.pth",
    },
    "convnext_xlarge": {
        "in22k": "convnext_xlarge_22k_224.pth",
        "in22k_in1k": "convnext_xlarge_22k_1k_224_ema.pth",
        "in22k_in1k_384": "convnext_xlarge_22k_1k_384_ema.pth",
    },
    "convnext_isotropic_small": {"in1k": "convnext_iso_small_1k_224_ema.pth"},
    "convnext_isotropic_base": {"in1k": "convnext_iso_base_1k_224_ema.pth"},
    "convnext_isotropic_large": {"in1k": "convnext_iso_large_1k_224_ema.pth"},
}
VARIANTS = {
    name: build
    for module in (convnext, isotropic)
    for name, build in vars(module).items()
    if isinstance(build, partial)
}


def list_pretrained(pattern: str = "*") -> list[tuple[str, str]]:
    """Return (model, tag) of the official weights whose model matches `pattern`, such as `"*tiny"`."""
    return [(model, tag) for model, tags in PRETRAINED.items() for tag in tags if fnmatch.fnmatch(model, pattern)]


# ---- Reading


CONTAINERS = ("weights", "model", "state_dict", "model_state_dict", "module")  # keys that hold the weights
AVERAGED = ("ema", "model_ema", "state_dict_ema", "model_state_dict_ema")  # the averaged weights beside them
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # DataParallel, torch.compile, Lightning, dense models


def read_state_dict(
    source: Path | str | Mapping, averaged: bool = False, sha256: str | None = None, progress: bool = True
) -> State:
    """Return the weights in a file, at a URL, in a Hugging Face folder or in a loaded checkpoint; see `unwrap`.

    `sha256` and `progress` are passed to `download`. Raises as `read_source` and `unwrap` do.
    """
    return unwrap(source if isinstance(source, Mapping) else read_source(source, sha256, progress), averaged)


def read_source(source: Path | str, sha256: str | None = None, progress: bool = True) -> Any:
    """Return the contents of a checkpoint in a file, at a URL or in a Hugging Face folder, by `read_checkpoint`.

    `sha256` and `progress` are passed to `download`. Raises as `read_checkpoint` and `download` do; what was downloaded
    and cannot be read is deleted from the cache.
    """
    if "://" not in str(source):
        return read_checkpoint(source)
    path = download(str(source), sha256, progress)
    try:
        return read_checkpoint(path)
    except ValueError:
        if not str(source).startswith("file:"):
            path.unlink()  # a page with an error message, for example: download again next time
        raise


class Ignored:
    """Stand in for an object in a checkpoint that is neither a tensor nor a plain value, as an argparse.Namespace."""

    def __new__(cls, *arguments: Any, **options: Any) -> "Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: Path | str) -> Any:
    """Return the contents of a `.safetensors` or `torch.save` file, on the CPU, without running code that is in it.

    Of a folder, Hugging Face's `model.safetensors` or `pytorch_model.bin` is read. Objects that are neither tensors nor
    plain values become `Ignored`. Raises FileNotFoundError; ValueError for a file that is damaged or of another kind;
    ImportError for a `.safetensors` file if safetensors is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path /= "model.safetensors" if (path / "model.safetensors").is_file() else "pytorch_model.bin"
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        require(path.name, "weights")
        from safetensors.torch import load_file as read
    else:
        read = _read_torch
    try:
        return read(path)
    except Exception as error:  # of many kinds, depending on where the file is cut off
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged, or not a file of weights alone ({reason})") from error


def _read_torch(path: Path) -> Any:
    """Return the contents of a `torch.save` file. PyTorch does not compare the checksums in it, so this does."""
    ignored = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # since PyTorch 2.6
            ignored = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not ignored:
        return torch.load(path, map_location="cpu", weights_only=True)
    with torch.serialization.safe_globals([(Ignored, name) for name in ignored]):
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrap(checkpoint: Any, averaged: bool = False) -> State:
    """Return the state dict in a checkpoint of a training script, without the prefixes of wrappers.

    The weights may lie under one of `CONTAINERS`, or be the checkpoint itself; `averaged` asks for those under one of
    `AVERAGED`. A prefix of `PREFIXES` that all keys have is removed. Raises ValueError if there are no such weights.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint holds a dictionary, this one {type(checkpoint).__name__}")
    keys = AVERAGED if averaged else CONTAINERS
    state = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), Mapping)), None)
    if state is None and averaged:
        raise ValueError(
            f"the checkpoint has no averaged weights under {', '.join(keys)}; it has {first_names(checkpoint)}"
        )
    state = dict(checkpoint if state is None else state)
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel counts its updates
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"the checkpoint has no weights under {', '.join(CONTAINERS)}; it has {first_names(checkpoint)}"
        )
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


# ---- Loading


def create(name: str, pretrained: Any = None, averaged: bool = False, **options) -> nn.Module:
    """Build the model called `name`, one of `VARIANTS`, with new or pretrained weights.

    `pretrained` is a tag of `list_pretrained`, True for "in1k", a file, a URL or a state dict; `averaged` asks for the
    averaged weights in a checkpoint. `options` are the model's. With `pretrained`, the number of classes and whether
    there is layer scale follow the weights unless `options` give them. Raises ValueError for an unknown name or tag,
    and as `read_state_dict` and `load_weights` do.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; valid: {', '.join(VARIANTS)}")
    if pretrained is None or pretrained is False:
        return VARIANTS[name](**options)
    state = to_official(read_state_dict(find(name, pretrained), averaged))
    model = VARIANTS[name](**{**_settings(state), **options})
    _report(load_weights(model, state))
    return model


def load(source: Any, averaged: bool = False, **options) -> nn.Module:
    """Build the network whose weights are in a file, at a URL, in a Hugging Face folder or in a state dict.

    The sizes come from the weights; `options` are added, such as `num_classes=10` or `drop_path_rate=0.1`. A file at a
    URL is checked against the start of its SHA-256 digest if its name ends in one, as in `model-983f1562.pth`; digits
    without a letter, such as a date, are not taken for a digest. Raises as `read_state_dict` and `load_weights` do.
    """
    state = to_official(read_state_dict(source, averaged))
    sizes = infer_sizes(state)
    model = (ConvNeXtIsotropic if "depth" in sizes else ConvNeXt)(**{**sizes, **_settings(state), **options})
    _report(load_weights(model, state))
    return model


def load_pretrained(model: nn.Module, source: Any, averaged: bool = False) -> None:
    """Load the weights that `source` names, as in `create`, into a `ConvNeXt` or `ConvNeXtIsotropic`, in place."""
    name = variant_name(infer_sizes(model.state_dict()))
    _report(load_weights(model, to_official(read_state_dict(find(name, source), averaged))))


def find(name: str, pretrained: Any) -> Any:
    """Return the address of the official weights of the model `name` if `pretrained` is a tag, else `pretrained`."""
    tags = PRETRAINED.get(name, {})
    tag = "in1k" if pretrained is True else pretrained
    if isinstance(tag, str) and tag in tags:
        return OFFICIAL_URL + tags[tag]
    if pretrained is True or (isinstance(tag, str) and "://" not in tag and not Path(tag).exists()):
        released = f"released are {', '.join(tags)}" if tags else "none were released"
        raise ValueError(f"there are no weights {tag!r} of {name}: {released}; an existing file or a URL is valid too")
    return pretrained


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load `state`, with official keys, into `model` in place; return one line per tensor that had to be adapted.

    With another number of classes, or no classifier in `state`, the classifier stays as it was built; with another
    number of input channels the stem is adapted by `adapt_stem`. Raises ValueError, naming the first keys and the
    model that would fit, for all other differences; `model` is then unchanged.
    """
    mine, state, notes = model.state_dict(), dict(state), []
    if "downsample_layers.0.2.weight" in state.keys() - mine.keys():
        raise ValueError(
            "the weights have a stem of overlapping convolutions, which a recipe for small data builds; "
            "convnext_min.train.predict.load_model(checkpoint) builds their network"
        )
    stem = "stem.weight" if "stem.weight" in mine else "downsample_layers.0.0.weight"
    if stem in state and stem in mine and state[stem].shape[1] != mine[stem].shape[1]:
        notes.append(f"the stem is adapted from {state[stem].shape[1]} to {mine[stem].shape[1]} input channels")
        state[stem] = adapt_stem(state[stem], mine[stem].shape[1])
    old, new = (len(weights["head.weight"]) if "head.weight" in weights else 0 for weights in (state, mine))
    if old != new:
        if new:
            notes.append(f"the classifier is new: {new} classes, the weights have {old or 'none'}")
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state |= {key: value for key, value in mine.items() if key.startswith("head.")}
    _compare(mine, state)
    model.load_state_dict(state)
    return notes


def adapt_stem(weight: Tensor, in_chans: int) -> Tensor:
    """Return the stem's convolution (C, in_chans, k, k) for another number of input channels, as timm does.

    For one channel the weights are summed, so that a grey image gives what its three equal channels gave. Otherwise the
    channels repeat (RGBR for four), multiplied by old / new so that the response keeps its size.
    """
    old = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans) % old] * (old / in_chans)


def infer_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the depths and dims of a state dict with official keys; of an isotropic model, depth, dim and patch_size.

    The patch size is left out if it is the released models', 16.
    """
    if "stem.weight" in state:
        depth = next(b for b in itertools.count() if f"blocks.{b}.dwconv.weight" not in state)
        dim, *_, patch_size = state["stem.weight"].shape
        return {"depth": depth, "dim": dim} | ({} if patch_size == 16 else {"patch_size": patch_size})
    dims = [len(state[key]) for i in range(4) if (key := f"stages.{i}.0.dwconv.weight") in state]
    return {"depths": count_blocks(state, OFFICIAL), "dims": tuple(dims)}


def variant_name(sizes: dict[str, Any]) -> str:
    """Return the name of the model with these sizes, or the call that builds it if it has none."""
    for name, build in VARIANTS.items():
        if build.keywords == sizes:
            return name
    kind = "ConvNeXtIsotropic" if "depth" in sizes else "ConvNeXt"
    return f"{kind}({', '.join(f'{key}={value}' for key, value in sizes.items())})"


def _settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of a model, besides its sizes, that follow from a state dict with official keys."""
    settings = {"num_classes": len(state["head.weight"]) if "head.weight" in state else 0}
    if not any(key.endswith(".gamma") for key in state):
        settings["layer_scale_init_value"] = 0.0
    elif "stem.weight" in state:  # isotropic models have none by default
        settings["layer_scale_init_value"] = 1e-6
    return settings


def _compare(mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the weights `state` do not fit a model with the state dict `mine`."""
    if found := key_differences(state, mine):
        sizes = [f"{variant_name(infer_sizes(weights))}{_without_gamma(weights)}" for weights in (state, mine)]
        raise ValueError(f"the weights do not fit: {found}. They are of {sizes[0]}, the model is {sizes[1]}")


def _without_gamma(state: Mapping[str, Tensor]) -> str:
    return "" if any(key.endswith(".gamma") for key in state) else " without layer scale (layer_scale_init_value=0)"


def _report(notes: list[str]) -> None:
    for note in notes:
        logger.warning(note)


# ---- Hugging Face's layout


PREPROCESSOR = "preprocessor_config.json"


def save_pretrained(
    model: ConvNeXt,
    folder: Path | str,
    labels: list[str] | None = None,
    resolution: int = 224,
    crop: float = 0.875,
) -> Path:
    """Write a folder as transformers does: its configuration, weights and image preprocessing; return its path.

    `load(folder)` reads it, and so do `ConvNextForImageClassification.from_pretrained` and
    `pipeline("image-classification", folder)` of transformers. `labels` are the names of the classes. Images are
    prepared for `resolution` pixels: below 384, the shorter side is resized to resolution / crop and the centre is cut
    out; from 384 on, the whole image is squeezed into a square, as in the released code. Raises ValueError for a model
    without classifier or an isotropic one, which transformers does not have, and for a wrong number of labels;
    ImportError without safetensors.
    """
    state = {key: value.contiguous() for key, value in convert(model.state_dict(), "transformers").items()}
    if "classifier.weight" not in state:
        raise ValueError("the model has no classifier; build it with num_classes of at least 1")
    classes = len(state["classifier.weight"])
    labels = labels or [f"LABEL_{i}" for i in range(classes)]
    if len(labels) != classes:
        raise ValueError(f"there are {len(labels)} labels for {classes} classes")
    require("save_pretrained", "weights")
    from safetensors.torch import save_file

    sizes = infer_sizes(model.state_dict())
    config = {
        "architectures": ["ConvNextForImageClassification"],
        "model_type": "convnext",
        "depths": list(sizes["depths"]),
        "hidden_sizes": list(sizes["dims"]),
        "num_channels": state["convnext.embeddings.patch_embeddings.weight"].shape[1],
        "layer_norm_eps": 1e-6,  # of the last norm; transformers' own default is 1e-12
        "layer_scale_init_value": 0.0 if _without_gamma(model.state_dict()) else 1e-6,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    preprocessor = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": resolution},
        "crop_pct": crop,
        "resample": 3,  # bicubic
        "image_mean": [0.485, 0.456, 0.406],  # of ImageNet
        "image_std": [0.229, 0.224, 0.225],
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("config.json", config), (PREPROCESSOR, preprocessor)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_labels(folder: Path | str) -> list[str]:
    """Return the names of the classes, in the order of the logits, from `config.json` in a Hugging Face folder."""
    names = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["id2label"]
    return [names[str(i)] for i in range(len(names))]


def read_preprocessing(folder: Path | str) -> tuple[int, float]:
    """Return the resolution and the crop of images, as in `save_pretrained`, of a Hugging Face folder.

    The crop is 1 from 384 pixels on. Raises FileNotFoundError for a folder that does not describe its preprocessing,
    ValueError if the preprocessing is no ConvNeXt's.
    """
    values = json.loads((Path(folder) / PREPROCESSOR).read_text(encoding="utf-8"))
    size = values.get("size")
    resolution = size.get("shortest_edge") if isinstance(size, dict) else size  # older folders: a number
    if resolution is None:
        raise ValueError(f"{Path(folder) / PREPROCESSOR} has the size {size}, expected a shortest_edge")
    return resolution, values.get("crop_pct", 0.875) if resolution < 384 else 1.0


# ---- The variants, with the arguments of `create`


def convnext_atto(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-Atto, of timm: 3.7M parameters, 0.55 GMACs at 224x224."""
    return create("convnext_atto", pretrained, **options)


def convnext_femto(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-Femto, of timm: 5.2M parameters, 0.78 GMACs at 224x224."""
    return create("convnext_femto", pretrained, **options)


def convnext_pico(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-Pico, of timm: 9.0M parameters, 1.37 GMACs at 224x224."""
    return create("convnext_pico", pretrained, **options)


def convnext_nano(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-Nano, of timm: 15.6M parameters, 2.45 GMACs at 224x224."""
    return create("convnext_nano", pretrained, **options)


def convnext_tiny(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-T: 28.6M parameters, 4.46 GMACs at 224x224."""
    return create("convnext_tiny", pretrained, **options)


def convnext_small(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-S: 50.2M parameters, 8.68 GMACs at 224x224."""
    return create("convnext_small", pretrained, **options)


def convnext_base(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-B: 88.6M parameters, 15.4 GMACs at 224x224."""
    return create("convnext_base", pretrained, **options)


def convnext_large(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-L: 197.8M parameters, 34.4 GMACs at 224x224."""
    return create("convnext_large", pretrained, **options)


def convnext_xlarge(pretrained: Any = None, **options) -> ConvNeXt:
    """Build ConvNeXt-XL: 350.2M parameters, 60.9 GMACs at 224x224."""
    return create("convnext_xlarge", pretrained, **options)


def convnext_isotropic_small(pretrained: Any = None, **options) -> ConvNeXtIsotropic:
    """Build isotropic ConvNeXt-S: 22.3M parameters, 4.3 GMACs at 224x224."""
    return create("convnext_isotropic_small", pretrained, **options)


def convnext_isotropic_base(pretrained: Any = None, **options) -> ConvNeXtIsotropic:
    """Build isotropic ConvNeXt-B: 87.1M parameters, 16.9 GMACs at 224x224."""
    return create("convnext_isotropic_base", pretrained, **options)


def convnext_isotropic_large(pretrained: Any = None, **options) -> ConvNeXtIsotropic:
    """Build isotropic ConvNeXt-L: 305.9M parameters, 59.7 GMACs at 224x224."""
    return create("convnext_isotropic_large", pretrained, **options)
