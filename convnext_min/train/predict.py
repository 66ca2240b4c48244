"""Classify images: `python -m convnext_min.train.predict --checkpoint runs/first/checkpoint.pt image.jpg ...`."""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from convnext_min import data, recipes
from convnext_min.data import Batches, ImageSet, disk
from convnext_min.data.files import read_image
from convnext_min.environment import printable
from convnext_min.recipes import Recipe, complete
from convnext_min.train.checkpoint import is_run
from convnext_min.train.device import choose_device
from convnext_min.train.evaluation import logits_of
from convnext_min.train.models import create_model
from convnext_min.weights import load, read_labels, read_preprocessing, read_source


def load_model(checkpoint: Path | str) -> tuple[nn.Module, Recipe, tuple[str, ...]]:
    """Return the network of a checkpoint in eval mode, the recipe to prepare images by, and the names of the classes.

    A run's checkpoint has them all, and its EMA weights are taken if there are any. Other weights, in a file, at a URL
    or in a folder, must be a ConvNeXt's in the formats of `convnext_min.load`; see `describe_weights`. Raises
    FileNotFoundError, or ValueError for a damaged file, another network, or one that was not created by name.
    """
    contents = read_source(checkpoint)
    if not is_run(contents):
        try:
            model = load(contents)
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from None
        classes = model.head.out_features if isinstance(model.head, nn.Linear) else 0
        return model.eval(), *describe_weights(checkpoint, classes)
    try:
        recipe = Recipe(**complete(Recipe, contents["recipe"]))
        model = create_model(contents["model"], recipe, len(contents["classes"]))
    except (TypeError, ValueError) as error:  # a class from a notebook; a recipe of another version
        raise ValueError(f"the network in {checkpoint} cannot be created: {error}") from error
    model.load_state_dict(contents["ema"] or contents["weights"])
    return model.eval(), recipe, tuple(contents["classes"])


def describe_weights(source: Path | str, classes: int) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe to prepare images by and the names of the classes for ConvNeXt weights that are no run's.

    A folder in Hugging Face's layout describes both. Without its files, images are prepared as in the released code, at
    224 pixels, or 384 if the name ends in _384 as those of the released files do; the classes are numbers.
    """
    recipe = recipes.get("in1k", model="convnext_tiny")
    try:
        resolution, crop = read_preprocessing(source)
        recipe = replace(recipe, eval_resolution=resolution, eval_crop=crop)
    except OSError:
        recipe = at_resolution(recipe, 384 if re.search(r"_384(_ema)?$", Path(str(source)).stem) else 224)
    try:
        names = tuple(read_labels(source))
    except (OSError, KeyError):  # no folder, or a network without class names
        names = ()
    return recipe, names if len(names) == classes else tuple(map(str, range(classes)))


def at_resolution(recipe: Recipe, resolution: int) -> Recipe:
    """Return `recipe` with another image size in evaluation; from 384 pixels on without a crop, as in the release."""
    return replace(recipe, eval_resolution=resolution, eval_crop=1.0 if resolution >= 384 else recipe.eval_crop)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, resolution: int, flip: bool = False) -> Tensor:
    """Return probabilities (N, classes) for uint8 images (N, 3, S, S), prepared as in the evaluation of `train`.

    `flip` is explained at `evaluation.logits_of`.
    """
    image_set = ImageSet(images, torch.zeros(len(images), dtype=torch.int64), (), "")
    batches = Batches(image_set, batch_size=64, resolution=resolution, train=False)
    return torch.cat([logits_of(model, x.to(_device(model)), flip).softmax(1) for x, _ in batches.epoch()])


@torch.no_grad()
def predict_file(model: nn.Module, path: Path, recipe: Recipe) -> Tensor | None:
    """Return probabilities (classes,) for an image file, prepared as in evaluation, or None if it cannot be read."""
    if recipe.loader == "disk":
        try:
            image = read_image(path, recipe.exif_orientation)
        except data.DECODE_ERRORS:
            return None
        x = disk.transform(recipe, False, recipe.eval_resolution)(image)
        return logits_of(model, x[None].to(_device(model)), recipe.test_flip).softmax(1)[0]
    pixels = data.decode(path, recipe.image_size, recipe.exif_orientation)  # (S, S, 3)
    if pixels is None:
        return None
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return predict(model, images, recipe.eval_resolution, recipe.test_flip)[0]


def main(argv: list[str] | None = None) -> None:
    """Print the likeliest classes of each image; name images that cannot be read, and then exit with code 1."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.train.predict", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run's checkpoint.pt, or ConvNeXt weights: file, folder, URL"
    )
    parser.add_argument("--top", type=int, default=3, help="number of classes to print per image")
    parser.add_argument("--resolution", type=int, metavar="N", help="image size in pixels (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("images", nargs="+", help="image files")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top must be 1 or more, got {args.top}")
    try:
        device = choose_device(args.device)
        model, recipe, classes = load_model(args.checkpoint)
        if not classes:
            raise ValueError(f"{args.checkpoint} has no classifier")
        if args.resolution is not None:
            recipe = at_resolution(recipe, args.resolution)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    model.to(device)
    failures = 0
    for path in args.images:
        probabilities = predict_file(model, Path(path), recipe)
        if probabilities is None:
            failures += 1
            reason = "cannot be read as an image" if Path(path).is_file() else "is not a file"
            print(f"error: {path} {reason}", file=sys.stderr)
            continue
        print(printable(path))
        for probability, label in zip(*probabilities.topk(min(args.top, len(probabilities)))):
            print(printable(f"  {probability:6.1%}  {classes[label]}"))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
