"""Recipes, networks and images that several test modules use."""

import ast
import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from convnext_min.data import Batches, synthetic_images
from convnext_min.recipes import Recipe
from convnext_min.train import RunConfig, Trainer, create_model

TINY = Recipe(
    epochs=3,
    batch_size=8,
    base_lr=4e-3,
    base_batch=8,
    warmup=0.2,
    resolution=32,
    eval_resolution=32,
    image_size=32,
    layer_scale_init=1.0,
    depths=(1, 1, 1, 1),
    dims=(8, 8, 16, 16),
    amp="fp32",
)
EVERYTHING_RANDOM = replace(TINY, drop_path=0.3, mixup=0.8, cutmix=1.0, erasing=0.5, clip_grad=1.0)
SMALL = "dims=(8,8,16,16) depths=(1,1,1,1) image_size=32 resolution=32 eval_resolution=32 batch_size=8 drop_path=0.1"


def equal(a, b):
    """Return True if two state dicts are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def new_trainer(recipe, images, seed=0, name="convnext_atto", config=None):
    """Return a trainer on the CPU at its first step."""
    torch.manual_seed(seed)
    model = create_model(name, recipe, len(images.classes))
    batches = Batches(images, recipe.batch_size, recipe.resolution, True, seed, recipe.crop_scale)
    return Trainer(model, name, recipe, batches, seed, torch.device("cpu"), config or RunConfig(started=0.0))


def folder_of_images(root: Path) -> Path:
    """Write 96 training and 16 validation images of two classes into folders below `root`, and return it."""
    for split, number in (("train", 96), ("val", 16)):
        sample = synthetic_images(split, 32, number)
        for i, (pixels, label) in enumerate(zip(sample.images, sample.labels)):
            folder = root / split / f"class{label % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


def command(*arguments):
    """Return a command that trains a tiny network: the Python to start, then its arguments."""
    settings = ["dims=(8,8,16,16)", "depths=(1,1,1,1)", "image_size=32", "resolution=32", "eval_resolution=32"]
    settings += ["batch_size=4", "drop_path=0.2"]
    return [sys.executable, "-m", "convnext_min.train", *arguments, "--set", *settings]


def options(folder, output, *more):
    """Return the options of a run on the images in `folder`."""
    return ["--data", str(folder), "--output", str(output), "--device", "cpu", *more, "--set", *SMALL.split()]


def run_cell(source: str, namespace: dict[str, Any]) -> tuple[str, Any]:
    """Execute the source of a notebook's cell in `namespace`; return its printed text and its value."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "<cell>", "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace) if last else None
    return printed.getvalue(), value
