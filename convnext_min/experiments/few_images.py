"""Train on three classes that the small backbone has not seen, with few images per class.

`python -m convnext_min.experiments.few_images --output book/results` compares a linear probe, fine-tuning with and
without layer-wise decay, and training from scratch, at 5, 20 and 100 images per class. It writes two folders like those
of `convnext_min.experiments.run`: "few_images_lr" with the runs that choose the learning rates, on held-out training
images at 20 images per class, and "few_images" with the results on the validation images. Runs that a folder has are
not repeated.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from convnext_min import data, recipes, weights
from convnext_min.convnext import ConvNeXt
from convnext_min.data import Batches, ImageSet
from convnext_min.environment import environment
from convnext_min.experiments.backbone import split_classes
from convnext_min.experiments.run import Result, Results, Row
from convnext_min.measure import count_parameters
from convnext_min.recipes import Recipe
from convnext_min.train import train
from convnext_min.train.pretrained import Start

COUNTS = (5, 20, 100)  # images per class
CHOSEN_AT = 20  # images per class in the runs that choose the learning rates
MODEL = "convnext_atto"
ITERATIONS = 120  # optimizer steps of a run, for any number of images
BATCH = 32
PIXELS = 96

PLAIN = replace(recipes.get("imagenette"), progressive=(), ema_decay=0.0, evaluate_every=0)
# Weight decay, warm-up and the classifier's initial weights are those of Table 6, for few iterations and small images.
FINE_TUNING = replace(PLAIN, weight_decay=1e-8, warmup=0.0, head_init_scale=0.001)
# The network and the initial weights with which the backbone's own training began, which suit small data.
SCRATCH = replace(PLAIN, init="fan_in", layer_scale_init=0.2)


class Method(NamedTuple):
    """A way to train: the values to choose from, and the recipe; None for the linear probe, which has none.

    The values are learning rates, for the linear probe strengths of its L2 penalty.
    """

    values: tuple[float, ...]
    recipe: Recipe | None


METHODS = {
    "linear probe": Method((1e-3, 1e-2, 1e-1), None),
    "fine-tuning": Method((1e-4, 3e-4, 1e-3), FINE_TUNING),
    "layer-wise decay": Method((3e-4, 1e-3, 3e-3), replace(FINE_TUNING, layer_decay=0.8)),
    "from scratch": Method((1e-3, 2e-3, 4e-3), SCRATCH),
}


class Run(NamedTuple):
    """One run: a name of METHODS, images per class, one of the method's values, and the seed of images and training."""

    method: str
    count: int
    value: float
    seed: int


def draw(image_set: ImageSet, count: int, seed: int) -> ImageSet:
    """Return `count` random images of each class; a larger draw with the same seed contains a smaller one."""
    order = torch.randperm(len(image_set), generator=torch.Generator().manual_seed(seed))
    labels = image_set.labels[order]
    return image_set.subset(torch.cat([order[labels == y][:count] for y in range(len(image_set.classes))]))


def recipe_for(method: str, images: int, lr: float) -> Recipe:
    """Return the method's recipe for `images` images: `ITERATIONS` optimizer steps or a few more, in whole epochs."""
    batch = min(BATCH, images)
    epochs = -(-ITERATIONS // (images // batch))
    return replace(METHODS[method].recipe, epochs=epochs, batch_size=batch, base_batch=batch, base_lr=lr)


@torch.no_grad()
def features(model: ConvNeXt, image_set: ImageSet) -> Tensor:
    """Return the pooled features (N, C) of the images, each seen whole."""
    return torch.cat([model.forward_features(x) for x, _ in Batches(image_set, 64, PIXELS, train=False).epoch()])


def linear_probe(x: Tensor, y: Tensor, classes: int, l2: float) -> nn.Linear:
    """Fit a linear classifier to features x (N, C) and labels y (N,), with `l2` / 2 times its squared weights added."""
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(x), y) + l2 / 2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def run_one(run: Run, train_set: ImageSet, val_set: ImageSet, backbone: Path) -> tuple[Tensor, Row]:
    """Train on a draw from `train_set`; return the predictions (N,) for `val_set`, and steps, parameters and recipe."""
    few = draw(train_set, run.count, run.seed)
    if run.method == "linear probe":
        model = weights.load(backbone).eval()
        head = linear_probe(features(model, few), few.labels, len(few.classes), run.value)
        with torch.inference_mode():
            predictions = head(features(model, val_set)).argmax(1)
        return predictions, {"steps": "", "parameters": count_parameters(head), "recipe": ""}
    recipe = recipe_for(run.method, len(few), run.value)
    start = None if run.method == "from scratch" else Start(backbone)
    history = train(MODEL, recipe, few, val_set, seed=run.seed, start=start)
    facts = {"steps": history.rows[-1]["step"], "parameters": count_parameters(history.model)}
    return history.predictions, facts | {"recipe": json.dumps(recipe.__dict__)}


def measure(trial: str, run: Run, train_set: ImageSet, val_set: ImageSet, backbone: Path) -> Result:
    """Return the result of one run, with its time."""
    since, cpu = time.perf_counter(), time.process_time()
    predictions, facts = run_one(run, train_set, val_set, backbone)
    now = environment()
    row = {
        "trial": trial,
        "seed": run.seed,
        "top1": round(100 * (predictions == val_set.labels).double().mean().item(), 3),
        "images": len(val_set),
        "method": run.method,
        "images_per_class": run.count,
        "value": run.value,
        "seconds": round(time.perf_counter() - since, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **facts,
        "data": train_set.source,
        "commit": now["commit"],
        "torch": now["versions"]["torch"],
        "cpu": now["machine"]["cpu"],
        "threads": now["machine"]["threads"],
    }
    return Result(row, predictions.numpy(), val_set.labels.numpy(), [])


def make(name: str, output: Path, runs: dict[str, list[Run]], *images_and_backbone) -> list[Row]:
    """Make the runs, by trial, that `output`/`name` lacks, and return all of its rows."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    results = Results.read(folder)
    commands = results.commands()
    done = {(row["trial"], int(row["seed"])) for row in results.rows}
    jobs = [(trial, run) for trial, of_trial in runs.items() for run in of_trial if (trial, run.seed) not in done]
    jobs.sort(key=lambda job: job[1].seed)  # first all trials with one seed
    for trial, run in tqdm(jobs, name, unit="run"):
        results.add(measure(trial, run, *images_and_backbone))
        results.write(name, commands)
    return results.rows


def best_values(rows: list[Row]) -> dict[str, float]:
    """Return the value with the highest top-1 of each method; of equal ones the first."""
    best = {}
    for row in rows:
        if row["method"] not in best or float(row["top1"]) > float(best[row["method"]]["top1"]):
            best[row["method"]] = row
    return {method: float(row["value"]) for method, row in best.items()}


def compare(output: Path, seeds: int, root: str | None, backbone: Path) -> list[Row]:
    """Choose each method's value on held-out images, then make the runs with `seeds` seeds, and return their rows."""
    (_, train_set), (_, val_set) = (split_classes(data.imagenette(split, root)) for split in ("train", "val"))
    tried = {
        f"{method}, {value:g}": [Run(method, CHOSEN_AT, value, 0)]
        for method, (values, _) in METHODS.items()
        for value in values
    }
    best = best_values(make("few_images_lr", output, tried, *data.hold_out(train_set), backbone))
    chosen = {
        f"{method}, {count}": [Run(method, count, best[method], seed) for seed in range(seeds)]
        for count in COUNTS
        for method in METHODS
    }
    return make("few_images", output, chosen, train_set, val_set, backbone)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.experiments.few_images", description=__doc__)
    parser.add_argument("--backbone", type=Path, default=Path("book/results/backbone") / MODEL)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", help="folder of Imagenette")
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    try:
        compare(args.output, args.seeds, args.data, args.backbone)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")


if __name__ == "__main__":
    main()
