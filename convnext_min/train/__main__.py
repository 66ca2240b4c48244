"""Train a network: `python -m convnext_min.train --recipe imagenette --model convnext_atto --output runs/first`.

The same command works on a CPU, on a GPU and, with `torchrun --nproc-per-node 8` instead of `python`, on several.
Ctrl-C and SIGTERM save a checkpoint, and `--resume` continues as if there had been no stop. `--evaluate WEIGHTS` trains
nothing and prints the accuracy of trained weights, of a run or of the official release.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from convnext_min import data, fast, recipes, weights
from convnext_min.data import Batches, Data, ImageSet, disk
from convnext_min.fast.kernels import compile_ahead
from convnext_min.formats import first_names
from convnext_min.recipes import Recipe
from convnext_min.train import distributed
from convnext_min.train.command import add_machine_arguments, add_output_arguments, run_command, run_config
from convnext_min.train.device import autocast_dtype
from convnext_min.train.evaluation import Evaluation, evaluate
from convnext_min.train.log import import_wandb
from convnext_min.train.loop import EVAL_BATCH, checkpoint_in, dry_run, prepare, train
from convnext_min.train.models import create_model
from convnext_min.train.plan import plan
from convnext_min.train.predict import at_resolution, load_model
from convnext_min.train.pretrained import Start
from convnext_min.train.trainer import micro_batch_size


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the command line's options. Exits with a message if they contradict each other."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.train", description=__doc__)
    _add_run_arguments(parser)
    machine = add_machine_arguments(parser)
    machine.add_argument("--fsdp", action="store_true", help="shard the network over the processes of torchrun")
    machine.add_argument("--compile", action="store_true", help="torch.compile: minutes to start, then faster on a GPU")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, got {args.seed}")
    if args.resume and not args.output:
        parser.error("--resume needs the --output of the run")
    if (args.finetune_ema or args.class_map) and not args.finetune:
        parser.error("--finetune-ema and --class-map need the checkpoint: --finetune WEIGHTS")
    if args.resolution is not None and not args.evaluate:
        parser.error("--resolution is for --evaluate; to train at another one: --set resolution=N eval_resolution=N")
    if args.epochs:
        args.set += [f"epochs={args.epochs}", "minutes=None"]
    if args.minutes:
        args.set += [f"minutes={args.minutes}"]
    return args


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--recipe", default="imagenette", help=f"one of {', '.join(recipes.RECIPES)}")
    run.add_argument(
        "--model", default="convnext_atto", help="convnext_<variant>, road:<step>, timm:<name>, torchvision:<name>"
    )
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", help="train for this many epochs")
    length.add_argument("--minutes", help="train for this many minutes of wall clock instead")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the recipe")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data", help="folder with train/<class>/ and val/<class>/, wds/<folder of tars>, hfds/<name>; or Imagenette"
    )
    images.add_argument(
        "--workers", type=int, metavar="N", help="data-loading processes per GPU, for recipes that read from disk"
    )
    images.add_argument(
        "--holdout", action="store_true", help="evaluate on every tenth training image, to choose settings"
    )
    first = parser.add_argument_group("initial weights")
    first.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    first.add_argument(
        "--finetune", metavar="WEIGHTS", help="start from a run's checkpoint, a file, a folder, a URL or a tag (in22k)"
    )
    first.add_argument("--finetune-ema", action="store_true", help="start from the checkpoint's EMA weights instead")
    first.add_argument("--class-map", metavar="FILE", help="file of source-class indices for the new classifier's rows")
    evaluation = parser.add_argument_group("evaluation without training")
    evaluation.add_argument(
        "--evaluate", metavar="WEIGHTS", help="a run's checkpoint, a file, a folder, a URL, or a tag of --model (in1k)"
    )
    evaluation.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="image size in pixels (default: the weights'); from 384 on uncropped",
    )
    add_output_arguments(parser)


def read_images(args: argparse.Namespace, recipe: Recipe) -> tuple[ImageSet | Data, ImageSet | Data]:
    """Return the images for training and for validation, in memory or read from the disk, by the recipe's loader."""
    if recipe.loader == "disk":
        return open_disk(args, recipe, "train"), open_disk(args, recipe, "val")
    train_set = data.imagenette("train", args.data, recipe.image_size, recipe.exif_orientation, args.holdout)
    if args.holdout:
        train_set, val_set = data.hold_out(train_set)
    else:
        val_set = data.imagenette("val", args.data, recipe.image_size, recipe.exif_orientation)
    return data.subsample(train_set, recipe.fraction), val_set


def open_disk(args: argparse.Namespace, recipe: Recipe, split: str) -> disk.Loader:
    """Return this process's share of the images of `split`, read from the disk."""
    if args.data is None:
        raise ValueError(f"recipes such as {args.recipe} read images from the disk: give their folder with --data")
    share = (args.seed, distributed.rank(), distributed.world_size(), args.workers)
    return disk.loader(args.data, split, recipe, split == "train", *share, holdout=args.holdout)


def evaluate_weights(args: argparse.Namespace, device: torch.device) -> Evaluation:
    """Evaluate trained weights on the validation images, prepared as `load_model` finds; print and return the result.

    Raises ValueError for settings or images that do not fit the weights.
    """
    model, recipe, classes = load_model(weights.find(args.model, args.evaluate))
    recipe = replace(recipe, **recipes.parse_settings(Recipe, args.set))
    if args.resolution is not None:
        recipe = at_resolution(recipe, args.resolution)
    batches = validation_batches(args, recipe)
    check_classes(classes, batches.classes)
    model.to(device, memory_format=torch.channels_last)
    if device.type == "cpu" and args.accelerate:
        fast.accelerate(model)
    started = time.perf_counter()
    result = evaluate(model, batches, recipe.amp, flip=recipe.test_flip)
    images, seconds = len(result.labels), time.perf_counter() - started
    crop = f"crop {recipe.eval_crop:g}, " if recipe.loader == "disk" else ""
    flip = "with mirror images, " if recipe.test_flip else ""
    distributed.print_once(
        f"{args.evaluate}: top-1 {result.top1:.2%}, loss {result.loss:.4f}; {images:,} images of {batches.source}, at "
        f"{recipe.eval_resolution} px, {crop}{flip}{images / seconds:.1f} images per second"
    )
    return result


def validation_batches(args: argparse.Namespace, recipe: Recipe) -> Data:
    """Return this process's share of the batches of validation images, without the training images if possible."""
    if recipe.loader == "disk":
        return open_disk(args, recipe, "val")
    if args.holdout:
        _, val_set = read_images(args, recipe)
    else:
        val_set = data.imagenette("val", args.data, recipe.image_size, recipe.exif_orientation)
    rank, world_size = distributed.rank(), distributed.world_size()
    share = {"rank": rank, "world_size": world_size}
    return Batches(val_set, EVAL_BATCH * world_size, recipe.eval_resolution, train=False, **share)


def check_classes(classes: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Raise ValueError if the classes `found` in the images cannot be the classes of the weights, in their order.

    Libraries have different names for the same classes of ImageNet, so other names alone are only printed.
    """
    if len(classes) != len(found):
        raise ValueError(f"the weights are for {len(classes):,} classes, the images have {len(found):,}")
    if classes != found:
        distributed.print_once(f"classes in the weights: {first_names(classes)}; in the images: {first_names(found)}")
    known = set(found)
    for index, (mine, theirs) in enumerate(zip(classes, found)):
        if mine != theirs and mine in known:
            raise ValueError(
                f"the classes are in another order: number {index} is {mine} in the weights, here {theirs}"
            )


def run_from(args: argparse.Namespace, device: torch.device) -> None:
    """Train, or evaluate weights, as the command line asks."""
    if args.evaluate:
        evaluate_weights(args, device)
        return
    recipe = recipes.get(args.recipe, args.set, args.model)
    checkpoint_in(args.output, args.resume)
    config = run_config(args, device)
    # Show errors now, not after the images are read; on "meta" without drawing weights, which other libraries may need.
    with torch.device("cpu" if ":" in args.model else "meta"):
        create_model(args.model, recipe, 1)
    micro_batch = micro_batch_size(recipe, config)
    dtype = autocast_dtype(recipe.amp, device) or torch.float32
    if args.wandb:
        import_wandb()
    start = None
    if args.finetune:
        start = Start(weights.find(args.model, args.finetune), args.finetune_ema, args.class_map)
    if args.class_map and not Path(args.class_map).is_file():
        raise FileNotFoundError(f"there is no {args.class_map}")
    if config.accelerates(device):  # while the images are read
        compile_ahead(dtype)
        compile_ahead(torch.float32)  # the gradient of depthwise convolutions is always in float32
    train_set, val_set = read_images(args, recipe)
    images = len(train_set) if isinstance(train_set, ImageSet) else train_set.images
    rule = recipes.RECIPES[args.recipe]
    distributed.print_once(plan(recipe, images, distributed.world_size(), micro_batch, rule=rule))
    run = (args.model, recipe, train_set, val_set)
    if args.dry_run:
        trainer, val_batches = prepare(*run, args.seed, config, start)
        dry_run(
            trainer, lambda: evaluate(trainer.eval_model, val_batches, recipe.amp, 1, recipe.test_flip), args.output
        )
    else:
        train(*run, args.output, args.seed, args.resume, config, start)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = read_arguments(argv)
    run_command("convnext_min.train", f"{args.recipe}-{args.model}", args, argv, run_from)


if __name__ == "__main__":
    main()
