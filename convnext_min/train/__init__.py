"""Train a network: `python -m convnext_min.train --recipe imagenette --model convnext_atto --output runs/first`.

The same command works on a CPU, on a GPU and, with `torchrun --nproc-per-node 8` instead of `python`, on several.
Ctrl-C and SIGTERM save, and `--resume` goes on as if nothing had happened.
"""

from convnext_min.extras import require

require(__name__, "train")

import argparse
import dataclasses
import itertools
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from convnext_min import convnext, data, recipes, roadmap
from convnext_min.data import Batches, ImageSet, disk
from convnext_min.environment import environment, write_json
from convnext_min.measure import count_parameters
from convnext_min.recipes import Recipe
from convnext_min.train import distributed, records, small
from convnext_min.train.engine import Run, Setup, autocast_dtype, images_at_a_time, peak_memory, stop_requests
from convnext_min.train.plan import plan
from convnext_min.train.pretrained import Start, load_start

VARIANTS = {name: build for name, build in vars(convnext).items() if name.startswith("convnext_")}
# What a recipe says of the network itself, and whose networks have it: `VARIANTS` or the road's.
OF_THE_NETWORK = dict.fromkeys(("depths", "dims", "stem", "layer_scale_init", "head_init_scale"), ("ours",))
OF_THE_NETWORK |= {"init": ("ours", "road"), "width_multiplier": ("road",)}
# How a library makes a network, and what it calls the rate of stochastic depth.
LIBRARIES = {
    "timm": (timm.create_model, "drop_path_rate"),
    "torchvision": (torchvision.models.get_model, "stochastic_depth_prob"),
}
CHECKPOINT = "checkpoint.pt"
PREDICTIONS = "predictions.npz"  # the class given to each validation image, and the right one
EVAL_BATCH = 64  # images of a process


def make_model(name: str, recipe: Recipe, num_classes: int) -> nn.Module:
    """The network called `name`: one of `VARIANTS`, `road:<step>`, `timm:<name>` or `torchvision:<name>`.

    Raises ValueError, listing what is valid, for any other name, and for a recipe that sets what the network has not.
    """
    library, _, rest = name.rpartition(":")
    plain = Recipe()
    for key, owners in OF_THE_NETWORK.items():
        owner = "ours" if name in VARIANTS else library
        if owner not in owners and getattr(recipe, key) != getattr(plain, key):
            whose = " and ".join({"ours": ", ".join(VARIANTS), "road": "road:<step>"}[owner] for owner in owners)
            raise ValueError(f"{key} can be set for {whose}, not for {name!r}: --set {key}={getattr(plain, key)}")
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
        model = roadmap.build(
            rest, num_classes=num_classes, width_multiplier=recipe.width_multiplier, drop_path_rate=recipe.drop_path
        )
        if recipe.init != "pytorch":  # which is the road's own
            small.initialize(model, recipe.init)
        return model
    if library in LIBRARIES:
        create, rate = LIBRARIES[library]
        try:
            return create(rest, num_classes=num_classes, **{rate: recipe.drop_path})
        except TypeError:  # not all networks have it
            if recipe.drop_path:
                raise ValueError(f"{name} has no stochastic depth: --set drop_path=0.0") from None
            return create(rest, num_classes=num_classes)
        except RuntimeError as error:  # timm's for an unknown name
            raise ValueError(f"{name} cannot be made: {error}") from None
    raise ValueError(
        f"unknown model {name!r}; valid: {', '.join(VARIANTS)}, timm:<name>, torchvision:<name>, and road:<step> with "
        f"a step out of {', '.join(roadmap.STEPS)}"
    )


class Evaluation(NamedTuple):
    """What a model does on a set of images: fraction of right answers, mean cross-entropy, answers and truth (N,)."""

    top1: float
    loss: float
    predictions: Tensor  # int64, in the order of the images
    labels: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, amp: str = "auto", limit: int | None = None) -> Evaluation:
    """Run `model` in eval mode over one epoch of `batches`, or the first `limit` of them.

    Of several processes each answers for its part of each batch, and all return the same: every image counts once.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(amp, device)
    was_training = model.training
    model.eval()
    loss, answers = 0.0, []
    for x, y in itertools.islice(batches.epoch(0), limit):
        if len(y) == 0:  # the last batch had none for this process, but a network that is split needs every process
            x = x.new_zeros(1, *x.shape[1:])
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(x.to(device, memory_format=torch.channels_last, non_blocking=True))
        logits = logits.float().cpu()[: len(y)]
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        answers.append(torch.stack([logits.argmax(1), y]))  # (2, B)
    model.train(was_training)
    parts = itertools.chain.from_iterable(zip(*distributed.gather(answers)))
    predictions, labels = torch.cat(list(parts), 1)
    loss = distributed.total(loss)[0] / len(labels)
    return Evaluation((predictions == labels).double().mean().item(), loss, predictions, labels)


def evaluation_seconds(model: nn.Module, batches: Batches, amp: str) -> float:
    """About how long `evaluate` takes, judged by its first batches after as many that warm up: files that several
    processes read come in bursts, so that two or three batches say little."""
    few = min(8, len(batches))
    evaluate(model, batches, amp, few)  # warms up
    ends = [time.perf_counter()]
    for count in (1, few):
        evaluate(model, batches, amp, count)
        ends.append(time.perf_counter())
    first, several = (end - start for start, end in itertools.pairwise(ends))
    each = max(0.0, several - first) / max(1, few - 1)  # without what comes once: processes that read start
    return distributed.first(first + each * (len(batches) - 1))


class History(NamedTuple):
    """What `train` returns: the log, the network with the weights to use (averaged if the recipe says), its answers."""

    rows: list[dict]
    model: nn.Module
    predictions: Tensor  # int64 (N,), for the validation images
    top1: float  # fraction of them that are right


class Stopped(KeyboardInterrupt):
    """A run was asked to stop; `code` is what the process then exits with: 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, message: str, terminated: bool):
        super().__init__(message)
        self.code = 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def prepare(
    model: str | nn.Module,
    recipe: Recipe,
    train_set: ImageSet | Batches,
    val_set: ImageSet | Batches,
    seed: int = 0,
    device: torch.device | str | None = None,
    started: float | None = None,
    setup: Setup | None = None,
    start: Start | None = None,
    rule: Recipe | None = None,
    checkpoint: Path | None = None,
) -> tuple[Run, Batches]:
    """The run that `train` would do, at its first step or where `checkpoint` is, and the batches of `val_set`."""
    device = distributed.choose_device(device) if isinstance(device, str | None) else device
    place = {"rank": distributed.rank(), "world_size": distributed.world()}
    if isinstance(train_set, ImageSet):
        train_set = Batches(train_set, recipe.batch_size, recipe.resolution, True, seed, recipe.crop_scale, **place)
    if isinstance(val_set, ImageSet):
        val_set = Batches(val_set, EVAL_BATCH * place["world_size"], recipe.eval_resolution, train=False, **place)
    if train_set.classes != val_set.classes:
        raise ValueError(f"the classes in training are {train_set.classes}, in validation {val_set.classes}")
    torch.manual_seed(seed)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = make_model(model, recipe, len(train_set.classes))
    resumes = checkpoint and records.checkpoints(checkpoint)
    if start and not resumes:
        print(load_start(model, start, train_set.classes))
    run = Run(model, name, recipe, train_set, seed, device, time.time() if started is None else started, setup)
    run.identity["start"] = start and str(start.path)
    if resumes:
        state, found = records.load_newest(checkpoint)
        run.load(state)
    if len(set(distributed.gather(run.step))) > 1:
        raise ValueError(f"the processes do not find the same checkpoint: {checkpoint.parent} must be a shared folder")
    if resumes and found != checkpoint and checkpoint.exists() and distributed.rank() == 0:
        checkpoint.replace(checkpoint.with_suffix(".broken"))  # else the next checkpoint would push out a good one
    print(f"{name}, {count_parameters(run.model):,} parameters, {run}")
    print(f"{train_set.source}; {val_set.source}")
    planned = plan(recipe, train_set.images, distributed.world(), run.micro_batch, rule=rule)
    print(planned, *[f"continuing at step {run.step:,}"] * (run.step > 0), sep="\n", flush=True)
    return run, val_set


def train(
    model: str | nn.Module,
    recipe: Recipe,
    train_set: ImageSet | Batches,
    val_set: ImageSet | Batches,
    output: Path | str | None = None,
    seed: int = 0,
    resume: bool = False,
    device: torch.device | str | None = None,
    started: float | None = None,
    setup: Setup | None = None,
    start: Start | None = None,
    rule: Recipe | None = None,
) -> History:
    """Train `model`, a network or a name for `make_model`, and evaluate it on `val_set` as often as the recipe says.

    Writes log.csv, curve.png, TensorBoard's events, checkpoint.pt and those before it, best.pt, predictions.npz and
    summary.json into the folder `output`, if given. The images are an `ImageSet` or anything that gives batches as
    `Batches` does. With `start`, the weights of a checkpoint are the initial ones. With `resume`, continues from the
    newest whole checkpoint in `output`, if there is one. A recipe's minutes count from `started`, in seconds as
    `time.time()` gives them; from now, if not given. What is known to fail is warned of, such as a learning rate far
    above that of `rule`, a recipe that works. Seeds PyTorch's, NumPy's and Python's generators.

    Raises ValueError for classes that do not fit, FileExistsError if `output` holds a run and `resume` is not set,
    FloatingPointError if the loss stops being a number, and Stopped, after saving, when asked to stop.
    """
    checkpoint = checkpoint_in(output, resume)
    setup = setup or Setup()
    saver = records.Saver(checkpoint, setup.keep, *setup.interval)
    run, val_batches = prepare(model, recipe, train_set, val_set, seed, device, started, setup, start, rule, checkpoint)
    saver.begin(run)
    reserve = 0.0
    if recipe.minutes is not None:
        reserve = evaluation_seconds(run.best, val_batches, recipe.amp)
        run.open_window(reserve)

    result = None
    with stop_requests() as requests, records.Log(checkpoint, run.step, setup.wandb, run.identity) as log:
        while run.progress < 1 and not run.stopped:
            result = None  # what is evaluated is the end of this epoch, or nothing
            train_epoch(run, requests, saver)
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
                saver.save_best(run, result.top1)
            row["seconds"] = round(run.seconds, 1)
            log.write(run.rows)
            saver.save(run, last=over)
            run.agree()
    if run.progress < 1:
        if run.step != saver.saved:
            saver.save(run, last=True)
        told = f"stopped after step {run.step:,}" + (f", saved in {checkpoint}" if checkpoint else "")
        raise Stopped(told, any(distributed.gather(signal.SIGTERM in requests)))
    result = result or evaluate(run.best, val_batches, recipe.amp)

    weights = "averaged" if run.ema else "last"
    print(
        f"\nRight on {result.top1:.1%} of {len(result.labels):,} validation images, with the {weights} weights, "
        f"after {run.seconds:.0f} s"
    )
    confused = records.most_confused(result.predictions, result.labels, val_batches.classes)
    print("Most confused:", confused, flush=True)
    if checkpoint and distributed.rank() == 0:
        summary = run.identity | {"validation": val_batches.source, "images": len(result.labels), "top1": result.top1}
        summary |= {"parameters": count_parameters(run.model), "steps": run.step, "seconds": round(run.seconds, 1)}
        summary |= {"cpu_seconds": round(run.cpu_seconds, 1)}
        given = {"answers": result.predictions.numpy(), "labels": result.labels.numpy()}
        np.savez_compressed(checkpoint.parent / PREDICTIONS, **{k: v.astype(np.uint16) for k, v in given.items()})
        summary |= {"processes": distributed.world(), "images_at_a_time": run.micro_batch}
        write_json(summary | environment(), checkpoint.parent / "summary.json")
        records.training_curve(run.rows).savefig(checkpoint.parent / "curve.png", dpi=150)
        files = f"{CHECKPOINT}, log.csv, curve.png, summary.json, {PREDICTIONS}"
        print(f"In {checkpoint.parent}: {files}, and events for TensorBoard")
    return History(run.rows, run.best.eval(), result.predictions, result.top1)


def train_epoch(run: Run, requests: list[int], saver: records.Saver) -> None:
    """Train to the end of the epoch, or until the run is over, the resolution changes or there is a request to stop."""
    epoch, start = divmod(run.step, len(run.batches))
    resolution = run.batches.resolution = run.recipe.resolution_at(run.progress)
    since = time.perf_counter()
    quiet = None if distributed.rank() == 0 else True
    batches = run.batches.epoch(epoch, start)
    with tqdm(batches, f"epoch {epoch + 1}", len(run.batches), False, initial=start, disable=quiet) as bar:
        for x, y in bar:
            try:
                loss = run.train_step(x, y)
            except FloatingPointError as error:
                where = f"; {records.save_batch(x, y, run, saver.path.parent)}" if saver.path else ""
                raise FloatingPointError(f"{error}{where}") from None
            bar.set_postfix(loss=loss, px=resolution, refresh=False)
            run.agree(bool(requests))
            if run.stopped or run.progress >= 1 or run.recipe.resolution_at(run.progress) != resolution:
                break
            if run.step % len(run.batches) and saver.due(run):  # at its end an epoch is saved with its row
                since, earlier = time.perf_counter(), since
                run.sums["seconds"] += since - earlier
                saver.save(run)
    run.sums["seconds"] += time.perf_counter() - since


def dry_run(run: Run, val_batches: Batches, output: Path | str) -> None:
    """Do each thing that a run does once, beside the folder `output`, say how long it took, and leave nothing."""
    times, since = {}, time.perf_counter()

    def took(what: str) -> None:
        nonlocal since
        times[what], since = time.perf_counter() - since, time.perf_counter()

    x, y = next(run.batches.epoch(0))
    took("a batch")
    run.train_step(x, y)
    took("a step")
    parent = next(folder for folder in Path(output).absolute().parents if folder.is_dir())
    folder = Path(distributed.first(tempfile.mkdtemp(dir=parent) if distributed.rank() == 0 else ""))
    try:
        records.Saver(folder / CHECKPOINT).save(run, last=True)
        took("saving")
        run.load(records.load_checkpoint(folder / CHECKPOINT))
        took("loading")
    finally:
        distributed.gather(None)  # all have read it
        shutil.rmtree(folder, ignore_errors=True)
    evaluate(run.best, val_batches, run.recipe.amp, limit=1)
    took("evaluating a batch")
    seconds = ", ".join(f"{what} {value:.1f} s" for what, value in times.items())
    print(f"OK: {seconds}; {peak_memory(run.device) / 1e9:.1f} GB")


def checkpoint_in(output: Path | str | None, resume: bool) -> Path | None:
    """The checkpoint's path in the folder `output`. Raises FileExistsError if it is there and not to be resumed."""
    if output is None:
        return None
    path = Path(output) / CHECKPOINT
    if records.checkpoints(path) and not resume:
        raise FileExistsError(f"{output} holds a run: continue it with --resume, or choose another --output")
    return path


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line's options. Exits, saying what is wrong, if they contradict each other."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.train", description=__doc__)
    what = parser.add_argument_group("what")
    what.add_argument("--recipe", default="imagenette", help=f"one of {', '.join(recipes.RECIPES)}")
    what.add_argument(
        "--model", default="convnext_atto", help="convnext_<variant>, road:<step>, timm:<name>, torchvision:<name>"
    )
    length = what.add_mutually_exclusive_group()
    length.add_argument("--epochs", help="how long to train")
    length.add_argument("--minutes", help="the same as wall clock from the start of the process to the last evaluation")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the recipe")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data", help="folder with train/<class>/ and val/<class>/, wds/<folder of tars>, hfds/<name>; or Imagenette"
    )
    images.add_argument("--workers", type=int, metavar="N", help="of each process, to read images for recipes that do")
    images.add_argument(
        "--holdout", action="store_true", help="validate on every tenth training image, to choose settings by"
    )
    first = parser.add_argument_group("where to start")
    first.add_argument("--resume", action="store_true", help="continue the run in --output, if there is one")
    first.add_argument("--finetune", metavar="FILE", help="checkpoint of a run or of the official release: its weights")
    first.add_argument("--finetune-ema", action="store_true", help="take its averaged weights instead")
    first.add_argument(
        "--class-map", metavar="FILE", help="its classifier, with the rows whose numbers are in the file"
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--device", help="cpu or cuda; without it a GPU if there is one")
    machine.add_argument("--per-device-batch", type=int, metavar="N", help="images of a process at a time, for memory")
    machine.add_argument("--checkpoint-activations", action="store_true", help="less memory for a third more time")
    machine.add_argument("--fsdp", action="store_true", help="split the network over the processes of torchrun")
    machine.add_argument("--no-accelerate", dest="accelerate", action="store_false", help="PyTorch's own step on a CPU")
    machine.add_argument("--compile", action="store_true", help="torch.compile: minutes to start, then faster on a GPU")
    left = parser.add_argument_group("what it leaves")
    left.add_argument("--output", help="folder for it; without it a new one in runs/")
    left.add_argument("--save-every", default="", metavar="N", help="500: steps, 15m: minutes; always after an epoch")
    left.add_argument("--keep", type=int, default=2, metavar="N", help="how many of the newest checkpoints (2)")
    left.add_argument("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases as well")
    left.add_argument(
        "--dry-run", action="store_true", help="try a step, a checkpoint and an evaluation, leave nothing"
    )
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, got {args.seed}")
    if args.resume and not args.output:
        parser.error("--resume needs the --output of the run")
    if (args.finetune_ema or args.class_map) and not args.finetune:
        parser.error("--finetune-ema and --class-map need the checkpoint: --finetune FILE")
    if args.epochs:
        args.set += [f"epochs={args.epochs}", "minutes=None"]
    if args.minutes:
        args.set += [f"minutes={args.minutes}"]
    return args


def read_images(args: argparse.Namespace, recipe: Recipe) -> tuple[ImageSet | Batches, ImageSet | Batches]:
    """The images to train on and to validate with, in memory or read from the disk as the recipe says."""
    if recipe.loader == "disk":
        if args.data is None:
            raise ValueError(
                f"the recipe {args.recipe} reads its images from the disk: say where they are, with --data"
            )
        place = (args.seed, distributed.rank(), distributed.world(), args.workers)
        train_set, val_set = (
            disk.loader(args.data, split, recipe, split == "train", *place, holdout=args.holdout)
            for split in ("train", "val")
        )
        return train_set, val_set
    train_set = data.imagenette("train", args.data, recipe.image_size, recipe.exif_orientation, args.holdout)
    if args.holdout:
        train_set, val_set = data.hold_out(train_set)
    else:
        val_set = data.imagenette("val", args.data, recipe.image_size, recipe.exif_orientation)
    return data.subsample(train_set, recipe.fraction), val_set


def run_from(args: argparse.Namespace, device: torch.device) -> None:
    """Do what the command line says."""
    recipe = recipes.get(args.recipe, args.set, args.model)
    checkpoint_in(args.output, args.resume)
    options = {
        "seed": args.seed,
        "device": device,
        "started": psutil.Process().create_time(),
        "setup": Setup(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Setup)}),
        "start": Start(args.finetune, args.finetune_ema, args.class_map) if args.finetune else None,
        "rule": recipes.RECIPES[args.recipe],
    }
    make_model(args.model, recipe, 1)  # what is wrong shows now, not after the images are read
    images_at_a_time(recipe, options["setup"])
    autocast_dtype(recipe.amp, device)
    if args.wandb:
        records.import_wandb()
    for path in filter(None, (args.finetune, args.class_map)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no {path}")
    train_set, val_set = read_images(args, recipe)
    if args.dry_run:
        dry_run(*prepare(args.model, recipe, train_set, val_set, **options), args.output)
    else:
        train(args.model, recipe, train_set, val_set, args.output, resume=args.resume, **options)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = read_arguments(argv)
    named = args.output
    try:
        with distributed.processes(args.device) as device:
            name = f"runs/{args.recipe}-{args.model.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
            args.output = named or distributed.first(name)
            run_from(args, device)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error{_process()}: {error}")
    except KeyboardInterrupt as stop:
        if not _process():
            launcher = "torchrun ... " if distributed.world() > 1 else "python "
            again = shlex.join(a for a in argv if a != "--resume") + ("" if named else f" --output {args.output}")
            print(f"\n{stop or 'stopped before the first step'}")
            print(f"To go on: {launcher}-m convnext_min.train {again} --resume")
        sys.exit(getattr(stop, "code", 130))


def _process() -> str:
    """Which process this is, unless it is the first."""
    return f" in process {distributed.rank()}" if distributed.rank() else ""
