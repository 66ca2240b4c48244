"""Train a network: `python -m convnext_min.train --recipe imagenette --model convnext_atto --output runs/first`.

The same command works on a CPU and on a GPU. Ctrl-C saves, and `--resume` goes on as if nothing had happened.
"""

import argparse
import copy
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from convnext_min import convnext, data, recipes, records, roadmap, small
from convnext_min.data import Batches, ImageSet
from convnext_min.engine import Run, stop_requests, uses_bf16
from convnext_min.measure import count_parameters
from convnext_min.recipes import Recipe

VARIANTS = {name: build for name, build in vars(convnext).items() if name.startswith("convnext_")}
CHECKPOINT = "checkpoint.pt"
EVAL_BATCH = 64


def make_model(name: str, recipe: Recipe, num_classes: int) -> nn.Module:
    """The network called `name`: one of `VARIANTS`, `road:<step>`, `timm:<name>` or `torchvision:<name>`.

    Raises ValueError, listing what is valid, for any other name.
    """
    library, _, rest = name.rpartition(":")
    plain = Recipe()
    for key in ("depths", "dims", "stem", "init"):
        if name not in VARIANTS and getattr(recipe, key) != getattr(plain, key):
            raise ValueError(f"{key} can be set for {', '.join(VARIANTS)}, not for {name!r}")
    if name in VARIANTS:
        sizes = {key: value for key in ("depths", "dims") if (value := getattr(recipe, key)) is not None}
        model = VARIANTS[name](
            num_classes=num_classes,
            drop_path_rate=recipe.drop_path,
            layer_scale_init_value=recipe.layer_scale_init,
            head_init_scale=recipe.head_init_scale,
            **sizes,
        )
        return small.adapt(model, recipe.stem, recipe.init)
    if library == "road":
        return roadmap.build(
            rest, num_classes=num_classes, width_multiplier=recipe.width_multiplier, drop_path_rate=recipe.drop_path
        )
    if library == "timm":
        return timm.create_model(rest, num_classes=num_classes, drop_path_rate=recipe.drop_path)
    if library == "torchvision":
        return torchvision.models.get_model(rest, num_classes=num_classes, stochastic_depth_prob=recipe.drop_path)
    raise ValueError(
        f"unknown model {name!r}; valid: {', '.join(VARIANTS)}, timm:<name>, torchvision:<name>, and road:<step> with "
        f"a step out of {', '.join(roadmap.STEPS)}"
    )


class Evaluation(NamedTuple):
    """What a model does on a set of images: fraction of right answers, mean cross-entropy, answers int64 (N,)."""

    top1: float
    loss: float
    predictions: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, amp: str = "auto") -> Evaluation:
    """Run `model` in eval mode over one epoch of `batches`."""
    device = next(model.parameters()).device
    bf16 = uses_bf16(amp, device)
    was_training = model.training
    model.eval()
    loss, predictions, labels = 0.0, [], []
    for x, y in batches.epoch(0):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(x.to(device, memory_format=torch.channels_last, non_blocking=True)).float().cpu()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        predictions.append(logits.argmax(1))
        labels.append(y)
    model.train(was_training)
    predictions, labels = torch.cat(predictions), torch.cat(labels)
    return Evaluation((predictions == labels).double().mean().item(), loss / len(labels), predictions)


def evaluation_seconds(model: nn.Module, batches: Batches, amp: str) -> float:
    """About how long `evaluate` takes, judged by its first batches without the very first, which warms up."""
    few = copy.copy(batches)
    few.image_set = batches.image_set.subset(slice(2 * batches.batch_size))
    evaluate(model, few, amp)
    since = time.perf_counter()
    evaluate(model, few, amp)
    return (time.perf_counter() - since) * len(batches) / len(few)


class History(NamedTuple):
    """What `train` returns: the log, the network with the weights to use (averaged if the recipe says), its answers."""

    rows: list[dict]
    model: nn.Module
    predictions: Tensor  # int64 (N,), for the validation images
    top1: float  # fraction of them that are right


def train(
    model: str | nn.Module,
    recipe: Recipe,
    train_set: ImageSet,
    val_set: ImageSet,
    output: Path | str | None = None,
    seed: int = 0,
    resume: bool = False,
    device: torch.device | str | None = None,
    started: float | None = None,
) -> History:
    """Train `model`, a network or a name for `make_model`, and evaluate it on `val_set` as often as the recipe says.

    Writes log.csv, curve.png, TensorBoard's events, checkpoint.pt and summary.json into the folder `output`, if given.
    With `resume`, continues from the checkpoint there, if there is one. A recipe's minutes count from `started`, in
    seconds as `time.time()` gives them; from now, if not given. Seeds PyTorch's, NumPy's and Python's generators.

    Raises ValueError for classes that do not fit, FileExistsError if `output` holds a run and `resume` is not set,
    FloatingPointError if the loss stops being a number, and KeyboardInterrupt, after saving, when asked to stop.
    """
    started = time.time() if started is None else started
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = checkpoint_in(output, resume)
    if train_set.classes != val_set.classes:
        raise ValueError(f"the classes in training are {train_set.classes}, in validation {val_set.classes}")
    torch.manual_seed(seed)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = make_model(model, recipe, len(train_set.classes))
    run = Run(model, name, recipe, train_set, seed, device, started)
    if checkpoint and checkpoint.exists():
        run.load(records.load_checkpoint(checkpoint))
    val_batches = Batches(val_set, EVAL_BATCH, recipe.eval_resolution, train=False)

    number = count_parameters(model)
    print(f"{name}, {number:,} parameters, {run}")
    print(f"{train_set.source}; {val_set.source}")
    print(
        recipes.describe(recipe, len(train_set)) + (f"; continuing at step {run.step:,}" if run.step else ""),
        flush=True,
    )
    reserve = 0.0
    if recipe.minutes is not None:
        reserve = evaluation_seconds(run.best, val_batches, recipe.amp)
        run.open_window(reserve)

    result = None
    with stop_requests() as requests, records.Log(checkpoint, run.step) as log:
        while run.progress < 1 and not requests:
            train_epoch(run, requests)
            over, (epochs, rest) = run.progress >= 1, divmod(run.step, len(run.batches))
            if rest and not over:
                continue
            row = run.new_row()
            wanted = recipe.evaluate_every and epochs % recipe.evaluate_every == 0
            if over or (wanted and run.has_time_for(2 * reserve)):
                result = evaluate(run.best, val_batches, recipe.amp)
                row |= {"ema_top1" if run.ema else "top1": result.top1, "val_loss": result.loss}
                if run.ema and not (over and recipe.minutes):
                    row["top1"] = evaluate(run.model, val_batches, recipe.amp).top1
            row["seconds"] = round(run.seconds, 1)
            log.write(run.rows)
            if checkpoint:
                records.save_checkpoint(run.state(), checkpoint)
    if run.progress < 1:
        if checkpoint:
            records.save_checkpoint(run.state(), checkpoint)
        raise KeyboardInterrupt(f"stopped after step {run.step:,}" + (f", saved in {checkpoint}" if checkpoint else ""))
    result = result or evaluate(run.best, val_batches, recipe.amp)

    weights = "averaged" if run.ema else "last"
    print(
        f"\nRight on {result.top1:.1%} of {len(val_set):,} validation images, with the {weights} weights, "
        f"after {run.seconds:.0f} s"
    )
    print("Most confused:", records.most_confused(result.predictions, val_set.labels, val_set.classes), flush=True)
    if checkpoint:
        summary = run.identity | {"validation": val_set.source, "images": len(val_set), "top1": result.top1}
        summary |= {"parameters": number, "steps": run.step, "seconds": round(run.seconds, 1)}
        records.write_json(summary | records.environment(), checkpoint.parent / "summary.json")
        records.draw_curve(run.rows, checkpoint.parent / "curve.png")
        print(f"In {checkpoint.parent}: {CHECKPOINT}, log.csv, curve.png, summary.json, and events for TensorBoard")
    return History(run.rows, run.best.eval(), result.predictions, result.top1)


def train_epoch(run: Run, requests: list[int]) -> None:
    """Train to the end of the epoch, or until the run is over, the resolution changes or there is a request to stop."""
    epoch, start = divmod(run.step, len(run.batches))
    resolution = run.batches.resolution = run.recipe.resolution_at(run.progress)
    since = time.perf_counter()
    batches = run.batches.epoch(epoch, start)
    with tqdm(batches, f"epoch {epoch + 1}", len(run.batches), False, initial=start, disable=None) as bar:
        for x, y in bar:
            bar.set_postfix(loss=run.train_step(x, y), px=resolution, refresh=False)
            if requests or run.progress >= 1 or run.recipe.resolution_at(run.progress) != resolution:
                break
    run.sums["seconds"] += time.perf_counter() - since


def checkpoint_in(output: Path | str | None, resume: bool) -> Path | None:
    """The checkpoint's path in the folder `output`. Raises FileExistsError if it is there and not to be resumed."""
    if output is None:
        return None
    path = Path(output) / CHECKPOINT
    if path.exists() and not resume:
        raise FileExistsError(f"{output} holds a run: continue it with --resume, or choose another --output")
    return path


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m convnext_min.train", description=__doc__)
    parser.add_argument("--recipe", default="imagenette", help=f"one of {', '.join(recipes.RECIPES)}")
    parser.add_argument(
        "--model", default="convnext_atto", help="convnext_<variant>, road:<step>, timm:<name>, torchvision:<name>"
    )
    parser.add_argument("--data", help="folder with train/<class>/ and val/<class>/; without it Imagenette")
    parser.add_argument(
        "--holdout", action="store_true", help="validate on every tenth training image, to choose settings by"
    )
    parser.add_argument("--output", help="folder for what the run leaves; without it a new one in runs/")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", help="how long to train")
    length.add_argument("--minutes", help="the same as wall clock from the start of the process to the last evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    parser.add_argument("--device", help="cpu or cuda; without it a GPU if there is one")
    args = parser.parse_args(argv)
    if args.resume and not args.output:
        parser.error("--resume needs the --output of the run")
    output = args.output or f"runs/{args.recipe}-{args.model.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.epochs:
        args.set += [f"epochs={args.epochs}", "minutes=None"]
    if args.minutes:
        args.set += [f"minutes={args.minutes}"]
    try:
        recipe = recipes.get(args.recipe, args.set)
        checkpoint_in(output, args.resume)
        make_model(args.model, recipe, 1)  # what is wrong shows now, not after the images are read
        train_set = data.imagenette("train", args.data, recipe.image_size)
        if args.holdout:
            train_set, val_set = data.hold_out(train_set)
        else:
            val_set = data.imagenette("val", args.data, recipe.image_size)
        started = psutil.Process().create_time()
        train(args.model, recipe, train_set, val_set, output, args.seed, args.resume, args.device, started)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        again = shlex.join(a for a in argv if a != "--resume") + ("" if args.output else f" --output {output}")
        print(f"\n{stop or 'stopped before the first step'}\nTo go on: python -m convnext_min.train {again} --resume")
        sys.exit(130)


if __name__ == "__main__":
    main()
