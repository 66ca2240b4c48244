"""Figures and tables of training recipes: gains, differences, schedules, what they do to images and blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data import Mixup
from torch import Tensor, nn

from convnext_min import convnext, paper, recipes
from convnext_min.book.figures import image_grid
from convnext_min.book.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Table, figure, table
from convnext_min.convnext import DropPath
from convnext_min.data import MEAN, STD, disk, seeded
from convnext_min.recipes import Recipe
from convnext_min.train.optim import learning_rate_scales


def differences(named: Mapping[str, Recipe]) -> Table:
    """Return a table of the fields in which recipes differ: a row per field, a column per recipe."""

    def shown(value):
        return f"{value:.3g}" if isinstance(value, float) else f"{value}"

    values = {name: asdict(recipe) for name, recipe in named.items()}
    fields = [field for field in next(iter(values.values())) if len({str(v[field]) for v in values.values()}) > 1]
    return table(("field", *named), [(field, *(shown(v[field]) for v in values.values())) for field in fields])


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


def recipe_gain() -> Figure:
    """Draw the paper's top-1 of ResNet-50 with both recipes and of the end of the road, and the gains between them."""
    start, end = paper.TABLE10["resnet50"], paper.TABLE10["convnext"]
    names = ("ResNet-50,\nclassic recipe", "ResNet-50,\npaper's recipe", "end of the road,\npaper's recipe")
    top1 = (paper.CLASSIC_TOP1["resnet50"], start.top1, end.top1)
    fig, ax = figure(2.3)
    changes = (("recipe", ORANGE), ("architecture", BLUE))
    for y, (what, color) in enumerate(changes):
        gain = top1[y + 1] - top1[y]
        ax.annotate("", (top1[y + 1], y + 0.5), (top1[y], y + 0.5), arrowprops={"arrowstyle": "->", "color": color})
        ax.text(top1[y] - 0.12, y + 0.5, f"{what}: {gain:+.2f}", color=INK, ha="right", va="center", fontsize=9.5)
        ax.plot([top1[y + 1]] * 2, [y + 0.5, y + 1], color=GREY, linewidth=0.8, linestyle=":")
    ax.plot(top1, range(3), "o", color=INK, markersize=7)
    for y, value in enumerate(top1):
        ax.annotate(f"{value:.2f}", (value, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9.5)
    ax.set_yticks(range(3), names)
    ax.set(ylim=(2.4, -0.4), xlim=(74.2, 83.2), xlabel="ImageNet top-1 (%), paper")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return fig


def residual_losses(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Plot the training loss over the iterations for each stack, as a running mean of ten, and the loss of guessing.

    Names contain "plain" (orange) or "residual" (blue) and begin with the number of convolutions: 8 (dotted) or more.
    """
    fig, ax = figure(3.2)
    for name, values in losses.items():
        window = min(10, len(values))
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        line = {"color": BLUE if "residual" in name else ORANGE, "linestyle": ":" if name.startswith("8 ") else "-"}
        ax.plot(np.arange(len(smooth)) + window, smooth, label=name, **line)
    guessing = np.log(10)  # ten classes, all equally probable
    ax.axhline(guessing, color=GREY, linewidth=1)
    ax.annotate("guessing", (len(values), guessing), (0, 4), textcoords="offset points", ha="right", fontsize=9)
    ax.set(xlabel="iteration, 64 images each", ylabel="training loss")
    ax.legend()
    return fig


def label_titles(labels: Tensor, names: Sequence[str]) -> list[str]:
    """Return one title per row of `labels` (N, classes): the classes with a positive share, with their percentages."""
    shares = [[(share, name) for share, name in zip(label, names) if share > 0] for label in labels.tolist()]
    return ["\n".join(f"{share:.0%} {name}" for share, name in pairs) for pairs in shares]


@torch.no_grad()
def dropped_blocks(model: nn.Module, images: Tensor) -> Figure:
    """Draw which blocks stochastic depth leaves out for which of the `images` (N, 3, H, W) in a training pass."""
    dropped = []  # one (N,) per block
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, out: dropped.append((out == 0).flatten(1).all(1)))
        for layer in model.modules()
        if isinstance(layer, DropPath)
    ]
    model.train()(images)
    for hook in hooks:
        hook.remove()
    grid = torch.stack(dropped)  # (blocks, N)
    fig, ax = figure(2.8)
    ax.imshow(grid.numpy(), cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    ticks = range(0, len(grid), 5)
    ax.set_yticks(ticks, [tick + 1 for tick in ticks])
    ax.set(xlabel="image of the batch", ylabel="block")
    ax.set_title(f"{grid.sum().item()} of {grid.numel()} left out", fontweight="normal")
    return fig
