"""Train a detector or a segmentation network: `python -m convnext_min.dense.train --task nuclei --head mask_rcnn`.

A run works as for classification: `torchrun` starts several processes, Ctrl-C and SIGTERM save and stop, and `--resume`
continues. The output folder gets log.csv, checkpoint.pt, best.pt and summary.json. `--evaluate CHECKPOINT` trains
nothing and prints the scores of a finished run, for example with other settings of the tests.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnext_min.dense import recipes
from convnext_min.dense.batches import DenseBatches
from convnext_min.dense.datasets import DATASETS, DenseDataset, Target, check, list_problems, shapes
from convnext_min.dense.evaluation import evaluate
from convnext_min.dense.models import DETECTORS, create_dense_model
from convnext_min.dense.predict import load_model
from convnext_min.dense.recipes import HEADS, DenseRecipe
from convnext_min.environment import write_json
from convnext_min.measure import count_parameters
from convnext_min.recipes import parse_settings
from convnext_min.train import distributed
from convnext_min.train.checkpoint import CheckpointManager, list_checkpoints
from convnext_min.train.command import add_machine_arguments, add_output_arguments, run_command, run_config
from convnext_min.train.device import choose_device
from convnext_min.train.distributed import print_once
from convnext_min.train.loop import (
    check_same_step,
    checkpoint_in,
    dry_run,
    load_resumed,
    run_epochs,
    start_schedule,
    summarize,
)
from convnext_min.train.trainer import RunConfig, Trainer
from convnext_min.weights import find

CHECKED_IMAGES = 200  # of each split, before a run; `convnext_min.dense.datasets` checks all


class DenseTrainer(Trainer):
    """A detector or a segmentation network in training; a batch is a list of images and a list of targets."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        instances = self.batches.dataset.instances
        self.metrics = ("mask_ap", "mask_ap50", "box_ap", "box_ap50") if instances else ("miou",)

    @property
    def main_metric(self) -> str:
        return self.metrics[0]

    def _check_outputs(self, name: str) -> None:
        self.model.train()
        together = distributed.world_size() if self.device.type == "cuda" else 1  # see `nn.SyncBatchNorm` in `Trainer`
        if name.startswith("upernet") and self.micro_batch * together == 1:
            raise ValueError("upernet has a BatchNorm on one position of each image, so it needs two images at a time")

    def _loss(self, x: list[Tensor], y: list[Target]) -> Tensor:
        """Return the sum of the losses that the network gives in training."""
        x = [image.to(self.device, non_blocking=True) for image in x]
        y = [{key: value.to(self.device, non_blocking=True) for key, value in target.items()} for target in y]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return sum(self.compiled_model(x, y).values())


def prepare(
    name: str,
    recipe: DenseRecipe,
    train_set: DenseDataset,
    seed: int = 0,
    config: RunConfig | None = None,
    pretrained: str | None = None,
    checkpoint: Path | None = None,
    workers: int = 0,
) -> DenseTrainer:
    """Return the trainer of the network `name`, restored from `checkpoint` if that file exists."""
    config = config or RunConfig()
    device = config.device if isinstance(config.device, torch.device) else choose_device(config.device)
    resumes = bool(checkpoint and list_checkpoints(checkpoint))
    torch.manual_seed(seed)
    model = create_dense_model(name, recipe, len(train_set.classes), None if resumes else pretrained)
    batches = DenseBatches(train_set, recipe, seed, distributed.rank(), distributed.world_size(), workers)
    trainer = DenseTrainer(model, name, recipe, batches, seed, device, config)
    trainer.identity["start"] = pretrained
    if resumes:
        load_resumed(trainer, checkpoint)
    check_same_step(trainer, checkpoint)
    print_once(f"{name}, {count_parameters(trainer.model):,} parameters, {trainer}")
    print_once(train_set.source + (f"; continuing at iteration {trainer.step:,}" if trainer.step else ""))
    return trainer


def train(
    name: str,
    recipe: DenseRecipe,
    train_set: DenseDataset,
    val_set: DenseDataset,
    output: Path | str | None = None,
    seed: int = 0,
    resume: bool = False,
    config: RunConfig | None = None,
    pretrained: str | None = None,
    workers: int = 0,
) -> tuple[nn.Module, dict[str, float]]:
    """Train the network `name`, "<head>:<backbone>", and return it with its scores on `val_set`.

    Writes log.csv, TensorBoard's events, checkpoint.pt and the ones before it, best.pt and summary.json into the folder
    `output`, if given. `pretrained` is passed to `create_dense_model`; the other arguments are those of `train.train`.
    """
    checkpoint = checkpoint_in(output, resume)
    trainer = prepare(name, recipe, train_set, seed, config, pretrained, checkpoint, workers)
    manager = CheckpointManager(checkpoint, trainer.config.keep, *trainer.config.interval)
    manager.start(trainer)

    def validate(row: dict[str, Any]) -> dict[str, float]:
        scores = evaluate(trainer.eval_model, val_set, recipe, workers)
        row |= scores
        return scores

    seconds = start_schedule(trainer, lambda: evaluation_seconds(trainer, val_set, workers))
    scores = run_epochs(trainer, manager, validate, seconds)
    scores = scores or evaluate(trainer.eval_model, val_set, recipe, workers)
    print_scores(val_set, scores)
    if checkpoint and distributed.rank() == 0:
        folder = checkpoint.parent
        write_json(summarize(trainer, val_set.source, len(val_set), scores), folder / "summary.json")
        print_once(f"Wrote {folder}: checkpoint.pt, best.pt, log.csv, summary.json, TensorBoard's events")
    return trainer.eval_model.eval(), scores


def evaluation_seconds(trainer: DenseTrainer, val_set: DenseDataset, workers: int) -> float:
    """Return the seconds that an evaluation takes, estimated from a few images; the same in all processes."""
    few, started = min(len(val_set), 4 * distributed.world_size()), time.perf_counter()
    evaluate(trainer.eval_model, val_set, trainer.recipe, workers, few)
    return distributed.broadcast_object((time.perf_counter() - started) * len(val_set) / few)


def read_data(task: str, head: str, root: str | None) -> tuple[DenseDataset, DenseDataset]:
    """Return the images to train on and to validate with.

    Raises ValueError for a head that does not fit them, and if the two have different classes.
    """
    read = DATASETS[task]
    if task == "shapes":
        train_set, val_set = (shapes(split, instances=head in DETECTORS) for split in ("train", "val"))
    else:
        train_set, val_set = (read(split, root) for split in ("train", "val"))
    if train_set.instances != (head in DETECTORS):
        kind = "objects" if train_set.instances else "classes of pixels"
        raise ValueError(f"{task} has {kind}: {head} is not for them")
    if train_set.classes != val_set.classes:  # the same number would mean another class
        names = ", ".join(sorted(set(train_set.classes) ^ set(val_set.classes))) or "their order"
        raise ValueError(
            f"{train_set.source} and {val_set.source} must list the same classes, even those without objects; they "
            f"differ in {names}"
        )
    return train_set, val_set


def check_data(*datasets: DenseDataset) -> None:
    """Read some images of each data set before a long run. Raises ValueError, naming the files, if any is broken.

    Annotations that were left out are printed.
    """
    for dataset in datasets:
        if dataset.problems:
            print_once(list_problems(f"{dataset.source}: {len(dataset.problems):,} left out", dataset.problems))
        if broken := check(dataset, CHECKED_IMAGES):
            raise ValueError(list_problems(f"{dataset.source}: {len(broken):,} broken", broken))


def evaluate_checkpoint(
    checkpoint: str, task: str, data: str | None, settings: Iterable[str], device: torch.device, workers: int = 0
) -> None:
    """Print the scores of a run's checkpoint, tested as its recipe says after the changes by `settings`.

    Raises FileNotFoundError, or ValueError for settings or images that do not fit the checkpoint.
    """
    model, state = load_model(checkpoint, parse_settings(DenseRecipe, settings))
    recipe = state["recipe"]
    _, val_set = read_data(task, state["model"].partition(":")[0], data)
    if tuple(state["classes"]) != tuple(val_set.classes):
        classes = ", ".join(state["classes"][:3])
        raise ValueError(f"{checkpoint} is for {len(state['classes'])} other classes than {task}: {classes}, ...")
    print_scores(val_set, evaluate(model.to(device), val_set, recipe, workers))


def print_scores(val_set: DenseDataset, scores: dict[str, float]) -> None:
    """Print the data set and its scores, in percent."""
    print_once(f"\n{val_set.source}: " + ", ".join(f"{key} {value:.1%}" for key, value in scores.items()))


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the command line's options. Exits with a message if they contradict each other."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.dense.train", description=__doc__)
    run = parser.add_argument_group("the run")
    run.add_argument("--task", required=True, choices=DATASETS, help="the images, and the recipe for them")
    run.add_argument("--head", choices=HEADS, help="the detector or segmentation head")
    run.add_argument("--backbone", default="convnext_atto", help="convnext_<variant> or road:<step>")
    run.add_argument("--pretrained", metavar="WEIGHTS", help="the backbone's: a checkpoint, or a tag such as in22k")
    run.add_argument("--data", help="the folder of the images")
    run.add_argument("--workers", type=int, default=0, metavar="N", help="data-loading processes per GPU")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", help="train for this many epochs")
    length.add_argument("--minutes", help="train for this many minutes of wall clock instead")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the recipe")
    run.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    run.add_argument(
        "--evaluate", metavar="CHECKPOINT", help="only print the scores of a checkpoint, trained like this"
    )
    add_output_arguments(parser)
    add_machine_arguments(parser)
    args = parser.parse_args(argv)
    if not (args.head or args.evaluate):
        parser.error(f"--head is needed: {', '.join(HEADS)}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, got {args.seed}")
    if args.resume and not args.output:
        parser.error("--resume needs the --output of the run")
    args.set += [f"epochs={args.epochs}", "minutes=None"] * bool(args.epochs)
    args.set += [f"minutes={args.minutes}"] * bool(args.minutes)
    return args


def run_from(args: argparse.Namespace, device: torch.device) -> None:
    """Train, or evaluate a checkpoint, as the command line asks."""
    if args.evaluate:
        evaluate_checkpoint(args.evaluate, args.task, args.data, args.set, device, args.workers)
        return
    recipe = recipes.get(args.task, args.head, args.backbone, args.set, args.pretrained)
    checkpoint_in(args.output, args.resume)
    config = run_config(args, device)
    name = f"{args.head}:{args.backbone}"
    with torch.device("meta"):
        create_dense_model(name, recipe, 1)  # show errors now, not after the images are checked
    if args.pretrained:
        find(args.backbone, args.pretrained)
    train_set, val_set = read_data(args.task, args.head, args.data)
    check_data(train_set, val_set)
    if args.dry_run:
        trainer = prepare(name, recipe, train_set, args.seed, config, args.pretrained, workers=args.workers)
        dry_run(trainer, lambda: evaluate(trainer.eval_model, val_set, recipe, limit=1), args.output)
    else:
        run = (name, recipe, train_set, val_set, args.output, args.seed, args.resume, config)
        train(*run, args.pretrained, args.workers)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = read_arguments(argv)
    name = f"{args.task}-{args.head}-{args.backbone}"
    run_command("convnext_min.dense.train", name, args, argv, run_from)


if __name__ == "__main__":
    main()
