"""Classify images: `python -m convnext_min.train.predict --checkpoint runs/first/checkpoint.pt image.jpg ...`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnext_min import data
from convnext_min.data import Batches, ImageSet, disk
from convnext_min.data.files import read_image
from convnext_min.recipes import Recipe
from convnext_min.train.checkpoint import load_checkpoint
from convnext_min.train.models import create_model


def load_model(checkpoint: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a run's checkpoint, in eval mode and with the EMA weights if any, and the checkpoint.

    Raises FileNotFoundError, or ValueError for a file of another kind or a network that was not created by name.
    """
    state = load_checkpoint(checkpoint)
    try:
        model = create_model(state["model"], Recipe(**state["recipe"]), len(state["classes"]))
    except (TypeError, ValueError) as error:  # a class from a notebook; a recipe of another version
        raise ValueError(f"the network in {checkpoint} cannot be created: {error}") from error
    model.load_state_dict(state["ema"] or state["weights"])
    return model.eval(), state


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, resolution: int) -> Tensor:
    """Return probabilities (N, classes) for uint8 images (N, 3, S, S), prepared as in the evaluation of `train`."""
    image_set = ImageSet(images, torch.zeros(len(images), dtype=torch.int64), (), "")
    batches = Batches(image_set, batch_size=64, resolution=resolution, train=False)
    return torch.cat([model(x).softmax(1) for x, _ in batches.epoch()])


@torch.no_grad()
def predict_file(model: nn.Module, path: Path, recipe: Recipe) -> Tensor | None:
    """Return probabilities (classes,) for an image file, prepared as in evaluation, or None if it cannot be read."""
    if recipe.loader == "disk":
        try:
            image = read_image(path, recipe.exif_orientation)
        except data.DECODE_ERRORS:
            return None
        x = disk.transform(recipe, False, recipe.eval_resolution)(image)
        return model(x[None]).softmax(1)[0]
    pixels = data.decode(path, recipe.image_size, recipe.exif_orientation)  # (S, S, 3)
    if pixels is None:
        return None
    return predict(model, torch.from_numpy(pixels).permute(2, 0, 1)[None], recipe.eval_resolution)[0]


def main(argv: list[str] | None = None) -> None:
    """Print the likeliest classes of each image; name images that cannot be read, and then exit with code 1."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.train.predict", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of a run")
    parser.add_argument("--top", type=int, default=3, help="number of classes to print per image")
    parser.add_argument("images", nargs="+", help="image files")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top must be 1 or more, got {args.top}")
    try:
        model, state = load_model(args.checkpoint)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    recipe, failures = Recipe(**state["recipe"]), 0
    for path in args.images:
        probabilities = predict_file(model, Path(path), recipe)
        if probabilities is None:
            failures += 1
            reason = "cannot be read as an image" if Path(path).is_file() else "is not a file"
            print(f"error: {path} {reason}", file=sys.stderr)
            continue
        print(path)
        for probability, label in zip(*probabilities.topk(min(args.top, len(probabilities)))):
            print(f"  {probability:6.1%}  {state['classes'][label]}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
