"""Find objects or classes in your own images: `python -m convnext_min.dense.predict --checkpoint FILE image.jpg ...`.

Each image is written again with the predictions drawn into it: masks, boxes and scores, or a colour per class. A large
image is drawn at twice the size at which the network was tested.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from colorsys import hls_to_rgb
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL.ImageColor import getrgb
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm.auto import tqdm

from convnext_min.dense.datasets import Target, read_image
from convnext_min.dense.evaluation import predict
from convnext_min.dense.models import create_dense_model
from convnext_min.dense.recipes import DenseRecipe
from convnext_min.dense.upernet import Segmenter
from convnext_min.environment import printable
from convnext_min.train.checkpoint import load_checkpoint
from convnext_min.train.device import choose_device

COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")  # Okabe and Ito's


def load_model(checkpoint: Path | str, settings: Mapping[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a run's checkpoint, in eval mode, and the checkpoint with its recipe as `DenseRecipe`.

    `settings` replace fields of the recipe, for example the sizes in a test, before the network is built. Raises
    FileNotFoundError, or ValueError for a file that is no checkpoint of `convnext_min.dense.train` or does not fit.
    """
    state = load_checkpoint(checkpoint)
    try:
        state["recipe"] = DenseRecipe(**state["recipe"] | (settings or {}))
        model = create_dense_model(state["model"], state["recipe"], len(state["classes"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of convnext_min.dense.train: {error}") from error
    try:
        model.load_state_dict(state["ema"] or state["weights"])
    except RuntimeError as error:
        raise ValueError(f"the weights of {checkpoint} do not fit its recipe with {settings}: {error}") from error
    return model.eval(), state


def palette(number: int) -> list[str]:
    """Return `number` different colours, as #rrggbb: `COLORS`, darker ones, then hues in three lightnesses."""
    colors = list(COLORS)
    for color in COLORS:
        colors.append("#{:02x}{:02x}{:02x}".format(*(int(0.6 * channel) for channel in getrgb(color))))
    more = max(0, number - len(colors))
    for i in range(more):
        hue, lightness = i // 3 / math.ceil(more / 3), (0.35, 0.55, 0.75)[i % 3]
        colors.append("#{:02x}{:02x}{:02x}".format(*(round(255 * x) for x in hls_to_rgb(hue, lightness, 0.8))))
    return colors[:number]


def draw(image: Tensor, found: Target, classes: tuple[str, ...], threshold: float = 0.5) -> Tensor:
    """Return an image uint8 (3, H, W) with its predictions drawn in; objects need a score of at least `threshold`."""
    if "boxes" not in found:
        masks = found["labels"] == torch.arange(len(classes), device=found["labels"].device)[:, None, None]
        return draw_segmentation_masks(image, masks, alpha=0.6, colors=palette(len(classes)))
    found = {key: value[found["scores"] >= threshold] for key, value in found.items()}
    if not len(found["boxes"]):
        return image.clone()
    colors = palette(len(COLORS)) * (1 + len(found["boxes"]) // len(COLORS))
    names = [f"{classes[label - 1]} {score:.0%}" for label, score in zip(found["labels"], found["scores"])]
    drawn = draw_segmentation_masks(image, found["masks"], alpha=0.5, colors=colors)
    return draw_bounding_boxes(drawn, found["boxes"], names if len(classes) > 1 else None, colors=colors)


def describe(found: Target, classes: tuple[str, ...], threshold: float = 0.5) -> str:
    """Describe a prediction in words: the number of objects per class, or the share of the image per class."""
    if "boxes" in found:
        labels = found["labels"][found["scores"] >= threshold] - 1
        counts = Counter(classes[label] for label in labels.tolist())
        return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
    shares = torch.bincount(found["labels"].flatten(), minlength=len(classes)) / found["labels"].numel()
    return ", ".join(f"{shares[i]:.0%} {classes[i]}" for i in shares.argsort(descending=True) if shares[i] >= 0.005)


def shrink(image: Tensor, side: int) -> Tensor:
    """Return an image (3, H, W) whose shorter side has at most `side` pixels: masks take memory for every pixel."""
    height, width = image.shape[1:]
    factor = min(1.0, side / min(height, width))
    return resize(image, [round(height * factor), round(width * factor)]) if factor < 1 else image


def _names(folder: Path, stem: str) -> Iterator[Path]:
    """Yield names for the drawing of an image: <stem>.png, then <stem>-2.png and so on."""
    yield folder / f"{stem}.png"
    yield from (folder / f"{stem}-{number}.png" for number in count(2))


def main(argv: list[str] | None = None) -> None:
    """Draw into each image; name images that cannot be read, and then exit with code 1."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.dense.predict", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint.pt of a run")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score of an object that is shown (0.5)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--output", default="predictions", help="folder for the drawings (predictions)")
    parser.add_argument("images", nargs="+", help="image files")
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
        model, state = load_model(args.checkpoint)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    model.to(device)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    failures, classes = 0, state["classes"]
    taken = {Path(path).resolve() for path in args.images}  # neither an image nor another drawing is overwritten
    for path in tqdm(args.images, unit="image", disable=None):
        try:
            image = read_image(path, upright=True).as_subclass(Tensor)
        except ValueError as error:
            failures += 1
            tqdm.write(printable(f"error: {error}"), file=sys.stderr)
            continue
        image = shrink(image, 2 * state["recipe"].min_size[-1])
        found = predict(model, image.to(device).float() / 255, state["recipe"])
        found = {key: value.cpu() for key, value in found.items()}
        drawing = next(name for name in _names(Path(args.output), Path(path).stem) if name.resolve() not in taken)
        taken.add(drawing.resolve())
        to_pil_image(draw(image, found, classes, args.threshold)).save(drawing)
        tqdm.write(printable(f"{path}: {describe(found, classes, args.threshold)}; drawn in {drawing}"))
    if isinstance(model, Segmenter):
        colours = ", ".join(f"{name} {color}" for name, color in zip(classes, palette(len(classes))))
        print(printable(f"Colours: {colours}"))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
