"""Figures and tables of training recipes: their differences, their schedules, and what they do to an image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data import Mixup
from torch import Tensor

from convnext_min import convnext, recipes
from convnext_min.book.figures import image_grid
from convnext_min.book.style import BLUE, GREEN, GREY, ORANGE, PURPLE, Table, figure, table
from convnext_min.data import MEAN, STD, disk, seeded
from convnext_min.recipes import Recipe
from convnext_min.train.optim import learning_rate_scales


def differences(named: Mapping[str, Recipe]) -> Table:
    """Return a table of the fields in which recipes differ: a row per field, a column per recipe."""

    def shown(value):
        return f"{value:.3g}" if isinstance(value, float) else f"{value}"

    values = {name: asdict(recipe) for name, recipe in named.items()}
    fields = [field for field in next(iter(values.values())) if len({str(v[field]) for v in values.values()}) > 1]
    return table(("", *named), [(field, *(shown(v[field]) for v in values.values())) for field in fields])


def colours(x: Tensor) -> Tensor:
    """Return normalized images (..., 3, H, W) as colours in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


def image_strip(recipe: Recipe, photo: Image.Image, other: Image.Image, side: int = 96, seed: int = 0) -> Figure:
    """Draw `photo` after each operation of the recipe, in their order, with the operation's name above each picture.

    The flip and the erasing, which the recipe applies at random, are applied here for certain; Mixup and CutMix mix
    the photo with `other`. Normalized values have no colours of their own: they are shown with -2.5 as black and 2.5 as
    white.
    """
    crop, flip, augment, to_tensor, normalize, erase = disk.transform(recipe, True, side).transforms
    flip.p = erase.probability = 1.0
    with seeded(seed):
        images = {"photograph": ImageOps.fit(photo, (side, side)), "random crop": crop(photo)}
        images["flip"] = flip(images["random crop"])
        images["RandAugment"] = augment(images["flip"])
        values = {"normalization": normalize(to_tensor(images["RandAugment"]))}
        values["random erasing"] = erase(values["normalization"].clone())
        pair = torch.stack([values["random erasing"], normalize(to_tensor(crop(other)))])
        for name, alphas in (("Mixup", (recipe.mixup, 0.0)), ("CutMix", (0.0, recipe.cutmix))):
            values[name] = Mixup(*alphas, num_classes=2)(pair.clone(), torch.arange(2))[0][0]
    pictures = {name: to_tensor(image) for name, image in images.items()}
    pictures |= {name: (x / 5 + 0.5).clamp(0, 1) for name, x in values.items()}
    return image_grid(torch.stack(list(pictures.values())), list(pictures))


def evaluation_crops(photo: Image.Image, named: Mapping[str, Recipe]) -> Figure:
    """Draw a photograph, and what a network sees of it in evaluation by each recipe: one scale, half the pixels."""
    pictures = {f"{photo.width}×{photo.height}": np.asarray(photo.reduce(2))}
    for name, recipe in named.items():
        side = recipe.eval_resolution
        seen = colours(disk.transform(recipe, False, side)(photo))[:, ::2, ::2]
        pictures[f"{name}: {side}×{side}"] = seen.permute(1, 2, 0).numpy()
    height, width = np.max([picture.shape[:2] for picture in pictures.values()], 0)
    fig, axes = figure(2.1, len(pictures))
    for ax, (title, picture) in zip(axes, pictures.items()):
        ax.imshow(picture)
        bottom, middle = picture.shape[0] - 0.5, picture.shape[1] / 2 - 0.5
        ax.set(title=title, xlim=(middle - width / 2, middle + width / 2), ylim=(bottom, bottom - height))
        ax.axis("off")
    return fig


def learning_rates(curves: Sequence[tuple[str, Recipe]], fine_tuning: Sequence[tuple[str, Recipe]]) -> Figure:
    """Draw the learning rates of labelled recipes over their epochs: from scratch left, for fine-tuning right."""
    fig, axes = figure(2.8, 2)
    colors = iter((BLUE, GREEN, ORANGE, PURPLE))
    progress = torch.linspace(0, 1, 400).tolist()
    for ax, scale, shown in ((axes[0], 1e3, curves), (axes[1], 1e5, fine_tuning)):
        for label, recipe in shown:
            rates = [scale * recipe.lr_at(p) for p in progress]
            ax.plot([recipe.epochs * p for p in progress], rates, color=next(colors), label=label)
        ax.set(xlabel="epoch", ylabel=f"learning rate (1/{scale:,.0f})", ylim=(0, 1.4 * ax.get_ylim()[1]))
        ax.legend()
    return fig


def layer_decay(names: Sequence[str], decay: float) -> Figure:
    """Draw the factors of layer-wise learning-rate decay: the stem, every block and the classifier of each network."""
    fig, axes = figure(2.8, len(names), sharey=True, width_ratios=range(1, 1 + len(names)))
    for ax, name in zip(axes, names):
        with torch.device("meta"):
            scales = learning_rate_scales(getattr(convnext, name)(), decay)
        blocks = [scale for parameter, scale in scales.items() if parameter.endswith("gamma")]
        bars = [scales["downsample_layers.0.0.weight"], *blocks, scales["head.weight"]]
        ax.bar(range(len(bars)), bars, color=[GREY, *[BLUE] * len(blocks), ORANGE])
        ax.set(title=name, xlabel="stem, blocks, classifier", xticks=[])
    axes[0].set_ylabel("factor of the learning rate")
    return fig


def range_test(
    rates: Sequence[float],
    losses: Sequence[float],
    average: Sequence[float],
    chance: float,
    marks: Mapping[str, float],
) -> Figure:
    """Draw the losses of a learning-rate range test and their running average; `marks` are labelled rates."""
    fig, ax = figure(3.4)
    ax.plot(rates, losses, ".", color=GREY, alpha=0.5, label="each iteration")
    ax.plot(rates, average, color=BLUE, label="running average")
    ax.axhline(chance, color=GREY, linewidth=0.8, linestyle="--", label="guessing")
    for text, rate in marks.items():
        ax.axvline(rate, color=ORANGE, linewidth=1)
        ax.annotate(text, (rate, 1.93), xytext=(3, 0), textcoords="offset points", fontsize=9)
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(1.9, 2.75))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def paper_recipes() -> Table:
    """Return the paper's classification recipes: length, learning rate, image size, and stochastic depth per model."""
    models = [f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")]
    rows = []
    for name, trained in recipes.PER_MODEL.items():
        recipe = recipes.RECIPES[name]
        rates = (f"{trained[model]['drop_path']:g}" if model in trained else "" for model in models)
        length = f"{recipe.epochs} ({round(recipe.warmup * recipe.epochs)})"
        rows.append((name, length, f"{recipe.base_lr:g} / {recipe.batch_size:,}", recipe.resolution, *rates))
    return table(("recipe", "epochs (warm-up)", "rate / batch", "pixels", "T", "S", "B", "L", "XL"), rows)
