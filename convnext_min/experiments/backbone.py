"""Train a small backbone on seven of Imagenette's ten classes, and keep its weights with a model card.

`python -m convnext_min.experiments.backbone --output book/results/backbone` trains `convnext_atto` for 30 minutes and
writes a folder "convnext_atto" in Hugging Face's layout, in half precision, which `convnext_min.load` reads. The last
three classes stay unseen: chapter 12 fine-tunes on them. Interrupted runs are resumed.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from convnext_min import data, recipes, weights
from convnext_min.convnext import ConvNeXt
from convnext_min.data import Batches, ImageSet
from convnext_min.environment import environment, write_json
from convnext_min.recipes import Recipe
from convnext_min.train.evaluation import evaluate
from convnext_min.train.loop import History, train
from convnext_min.train.trainer import RunConfig

NEW = 3  # classes that the backbone does not see
RECIPE = "imagenette-30min"
# What differs from the recipe: the stem of the paper, so that every library can load the weights, and no Nesterov
# momentum, which the recipe got after these weights were made.
SETTINGS = {
    "convnext_atto": ("stem=patchify", "optimizer=muon"),
    # 2% fewer parameters and 10% more MACs than convnext_atto; the road has no layer scale
    "road:resnet50": ("stem=patchify", "optimizer=muon", "layer_scale_init=1e-6", "width_multiplier=0.375"),
}

CARD = """---
library_name: convnext_min
tags: [image-classification, convnext]
datasets: [imagenette]
metrics: [accuracy]
---

# {name}, trained on seven classes of Imagenette

A small backbone for the chapters on fine-tuning, detection and segmentation of the ConvNeXt book. It has seen {train:,}
images of {seen}. The other three classes of Imagenette, {new}, were kept for fine-tuning.

| | |
|---|---|
| parameters | {parameters:,}, stored in half precision |
| top-1 of these weights | {top1:.2f}% of {images:,} validation images of the seven classes, one run |
| resolution in evaluation | {resolution} x {resolution} pixels |
| recipe | `{recipe}` with {settings}: {epochs} epochs in {minutes:.0f} minutes |
| machine | {cpu}, {cores} cores{gpus} |
| versions | {versions} |
| commit | `{commit}` |
| command | `{command}` |

Seven classes of everyday things are far too few for general features: take ImageNet's weights for real work.

**Data.** Imagenette is a subset of ImageNet, chosen by fast.ai. ImageNet's images belong to their photographers and are
offered for research and education that is not commercial; use the weights in the same way.
"""


def split_classes(image_set: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Split the images by class: those that the backbone sees, and the last three classes, which it does not see."""
    return tuple(
        data.select_classes(image_set, classes) for classes in (image_set.classes[:-NEW], image_set.classes[-NEW:])
    )


def half_precision(model: nn.Module) -> nn.Module:
    """Round the weights of `model` to float16, in place, and return it; its type stays."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    return model


def save(model: nn.Module, folder: Path, classes: tuple[str, ...], resolution: int) -> None:
    """Write the weights in float16: a ConvNeXt in Hugging Face's layout, a step of the road with its own keys."""
    model = model.half()
    if isinstance(model, ConvNeXt):
        weights.save_pretrained(model, folder, list(classes), resolution, crop=1.0)
    else:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")


def write_card(name: str, recipe: Recipe, history: History, sets: tuple[ImageSet, ImageSet, ImageSet], folder: Path):
    """Evaluate the rounded weights; write README.md and summary.json, which has the same values and the recipe."""
    train_set, val_set, new_set = sets
    batches = Batches(val_set, 64, recipe.eval_resolution, train=False)
    result = evaluate(half_precision(history.model).float(), batches)
    facts = {
        "name": name,
        "classes": train_set.classes,
        "new_classes": new_set.classes,
        "train": len(train_set),
        "images": len(val_set),
        "top1": 100 * result.top1,  # percent
        "parameters": sum(p.numel() for p in history.model.parameters()),
        "epochs": len(history.rows),
        "settings": SETTINGS[name],
        "recipe": recipe.__dict__,
        **environment(),
    }
    write_json(facts, folder / "summary.json")
    machine, versions = facts["machine"], facts["versions"]
    card = CARD.format(
        **facts
        | {
            "seen": ", ".join(train_set.classes),
            "new": ", ".join(new_set.classes),
            "resolution": recipe.eval_resolution,
            "recipe": RECIPE,
            "settings": ", ".join(f"`{setting}`" for setting in SETTINGS[name]),
            "minutes": history.rows[-1]["seconds"] / 60,
            "cpu": machine["cpu"],
            "cores": machine["cores"],
            "gpus": "".join(f", {gpu}" for gpu in machine["gpus"][:1]),
            "versions": ", ".join(f"{library} {number}" for library, number in versions.items()),
            "command": " ".join(facts["command"]),
        }
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def train_backbone(args: argparse.Namespace) -> None:
    """Train the backbone that the command line asks for, and write its folder."""
    changes = SETTINGS[args.model]
    if args.minutes:
        changes = (*changes, f"minutes={args.minutes}")
    elif args.epochs:
        changes = (*changes, f"epochs={args.epochs}", "minutes=None")
    recipe = recipes.get(RECIPE, changes, args.model)
    (train_set, _), (val_set, new_set) = (
        split_classes(data.imagenette(split, args.data, recipe.image_size)) for split in ("train", "val")
    )
    folder = args.output / args.model.replace(":", "-")
    run = folder / "run"
    history = train(args.model, recipe, train_set, val_set, run, args.seed, resume=True, config=RunConfig())
    write_card(args.model, recipe, history, (train_set, val_set, new_set), folder)
    save(history.model, folder, train_set.classes, recipe.eval_resolution)
    shutil.copy(run / "log.csv", folder / "log.csv")
    print(f"Wrote {folder}; {run} has the checkpoints and can be deleted")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.experiments.backbone", description=__doc__)
    parser.add_argument("--model", default="convnext_atto", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train for this many minutes instead of 30")
    length.add_argument("--epochs", type=int, help="train for this many epochs, however long they take")
    parser.add_argument("--data", help="folder of Imagenette")
    parser.add_argument("--output", type=Path, default=Path("results/backbone"))
    args = parser.parse_args(argv)
    try:
        train_backbone(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
