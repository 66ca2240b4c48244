"""The optional dependencies: the modules of each extra in pyproject.toml, and one clear error without them."""

from importlib.util import find_spec

MODULES = {
    "weights": ("safetensors",),
    "train": ("PIL", "matplotlib", "numpy", "psutil", "tensorboard", "timm", "torchvision", "tqdm"),
    "dense": ("pycocotools", "segmentation_models_pytorch", "torchmetrics"),
    "book": ("scipy",),
}


def require(package: str, *extras: str) -> None:
    """Raise ImportError, with the command that installs them, if modules of `extras` are missing for `package`."""
    missing = {extra: [name for name in MODULES[extra] if find_spec(name) is None] for extra in extras}
    for extra, names in missing.items():
        if names:
            command = f"pip install 'convnext-min[{','.join(extras)}]'"
            raise ImportError(f"{package} needs the extra '{extra}' ({names[0]} is missing): {command}", name=package)
