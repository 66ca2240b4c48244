"""Train a network: `python -m convnext_min.train --recipe imagenette --model convnext_atto --output runs/first`.

The same command works on a CPU and on a GPU. What happens at step k follows from the weights, the seed and k alone,
so a run that was interrupted and resumed ends, on the same machine, with the weights of one that was not.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import random
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import timm
import torch
import torchvision
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from convnext_min import convnext, data, recipes, roadmap
from convnext_min.data import Batches, ImageSet
from convnext_min.measure import count_parameters
from convnext_min.recipes import Recipe
from convnext_min.records import (
    Log,
    draw_curve,
    environment,
    load_checkpoint,
    most_confused,
    save_checkpoint,
    write_json,
)

VARIANTS = {name: build for name, build in vars(convnext).items() if name.startswith("convnext_")}
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NOT_DECAYED = ("bias", "gamma", "layer_scale")  # the last two are the names of layer scale here and in torchvision
CHECKPOINT = "checkpoint.pt"
EVAL_BATCH = 64
WRITING_SECONDS = 5.0  # kept free at the end of a timed run for the checkpoint and the curve


# ---- The parts of a run


def make_model(name: str, recipe: Recipe, num_classes: int) -> nn.Module:
    """The network called `name`: one of `VARIANTS`, `road:<step>`, `timm:<name>` or `torchvision:<name>`.

    Raises ValueError, listing what is valid, for any other name.
    """
    library, _, rest = name.rpartition(":")
    if name not in VARIANTS and (recipe.depths or recipe.dims):
        raise ValueError(f"depths and dims can be set for {', '.join(VARIANTS)}, not for {name!r}")
    if name in VARIANTS:
        sizes = {key: value for key in ("depths", "dims") if (value := getattr(recipe, key)) is not None}
        return VARIANTS[name](
            num_classes=num_classes,
            drop_path_rate=recipe.drop_path,
            layer_scale_init_value=recipe.layer_scale_init,
            head_init_scale=recipe.head_init_scale,
            **sizes,
        )
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trained parameters in two groups: with weight decay, and without it (biases, norms and layer scale).

    What a parameter is decides, not its shape: torchvision stores layer scale as (C, 1, 1).
    """
    decayed, free = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                exempt = name in NOT_DECAYED or isinstance(module, NORMS)
                (free if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def uses_bf16(amp: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16 under autocast; "auto" does where the hardware multiplies it natively."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()  # before PyTorch 2.10 nothing is known
    return any(able.get(feature, False) for feature in ("avx512_bf16", "amx_bf16", "bf16"))


class Evaluation(NamedTuple):
    """What a model does on a set of images: fraction of right answers, mean cross-entropy, answers int64 (N,)."""

    top1: float
    loss: float
    predictions: Tensor


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, amp: str = "auto") -> Evaluation:
    """Run `model` in eval mode over one epoch of `batches`."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, predictions, labels = 0.0, [], []
    for x, y in batches.epoch(0):
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(amp, device)):
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


# ---- A run


class Run:
    """A network in training: all that a checkpoint holds, and its place in the schedule."""

    def __init__(
        self, model: nn.Module, name: str, recipe: Recipe, train_set: ImageSet, seed: int, device: str, started: float
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.recipe, self.seed, self.device = recipe, seed, torch.device(device)
        classes = len(train_set.classes)
        with torch.no_grad():
            outputs = self.model.eval()(torch.zeros(2, 3, recipe.resolution, recipe.resolution, device=device)).shape
        if outputs != (2, classes):
            raise ValueError(
                f"the data has {classes} classes, but two images give {name} an output of {tuple(outputs)}"
            )
        self.model.train()
        groups = parameter_groups(model, recipe.weight_decay)
        self.optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.lr, betas=recipe.betas)
        self.ema = None
        if recipe.ema_decay:
            self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self.mix = self.erase = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
        if recipe.erasing:
            self.erase = RandomErasing(recipe.erasing, mode="pixel", device=device)
        self.bf16 = uses_bf16(recipe.amp, self.device)
        self.batches = Batches(train_set, recipe.batch_size, recipe.resolution, True, seed, recipe.crop_scale)
        self.identity = {  # in every checkpoint of the run
            "model": name,
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "classes": train_set.classes,
            "source": train_set.source,
        }
        self.step = 0  # steps of the optimizer so far
        self.rows: list[dict] = []  # one for each line of the log
        self.sums = {"loss": 0.0, "steps": 0, "seconds": 0.0}  # of the steps since the last row
        self.started, self.earlier = started, 0.0  # start of this process; seconds of those that it continues
        self.window = (0.0, 0.0)  # seconds at which a timed run begins and stops training

    @property
    def best(self) -> nn.Module:
        """The network with the weights to use: the averaged ones, if the recipe wants them."""
        return self.ema.module if self.ema else self.model

    def _average(self, averages: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        get_ema_multi_avg_fn(self.recipe.ema_decay_at(int(updates)))(averages, weights, updates)

    @property
    def seconds(self) -> float:
        """Wall clock since the start of the process, with those of the processes that it resumes."""
        return self.earlier + time.time() - self.started

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, from 0 to 1: of its minutes, if the recipe gives them, or its steps."""
        if self.recipe.minutes is None:
            return self.step / (self.recipe.epochs * len(self.batches))
        first, last = self.window
        return min(1.0, (self.seconds - first) / (last - first))

    def open_window(self, evaluation: float) -> None:
        """Begin the schedule of a timed run now, and end it `evaluation` seconds, and those for writing, early."""
        first = self.window[0] if self.step else self.seconds
        last = 60 * self.recipe.minutes - evaluation - WRITING_SECONDS
        if first >= last:
            raise ValueError(
                f"minutes={self.recipe.minutes:g} leaves no time to train: the start took {first:.0f} s, and the last "
                f"evaluation and writing take {evaluation + WRITING_SECONDS:.0f} s"
            )
        self.window = (first, last)

    def train_step(self, x: Tensor, y: Tensor) -> float:
        """One step on images (B, 3, R, R) and labels (B,): the loss. Raises FloatingPointError if it is not finite."""
        self._seed_step()
        lr = self.recipe.lr_at(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        y, smoothing = y.to(self.device, non_blocking=True), self.recipe.label_smoothing
        if self.mix:
            x, y = self.mix(x, y)  # y: (B, classes), smoothed
            smoothing = 0.0
        if self.erase:
            x = self.erase(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}, at learning rate {lr:.3g}; "
                "a lower base_lr or clip_grad=1.0 may help"
            )
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1
        self.sums["loss"] += value
        self.sums["steps"] += 1
        return value

    def _seed_step(self) -> None:
        """Seed what a step draws from (stochastic depth, mixing, erasing) by its number: nothing to save or restore."""
        seed = int(np.random.SeedSequence((self.seed, self.step)).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def new_row(self) -> dict[str, Any]:
        """A row for the log about the steps since the last one, without evaluation."""
        self.rows.append(
            {
                "epoch": round(self.step / len(self.batches), 2),
                "step": self.step,
                "seconds": round(self.seconds, 1),
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": self.sums["loss"] / self.sums["steps"],
                "val_loss": None,  # of the weights to use
                "top1": None,
                "ema_top1": None,
                "images_per_second": round(self.recipe.batch_size * self.sums["steps"] / self.sums["seconds"], 1),
                "resolution": self.batches.resolution,
            }
        )
        self.sums = dict.fromkeys(self.sums, 0)
        return self.rows[-1]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, and `load` takes."""
        return self.identity | {
            "weights": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "sums": self.sums,
            "seconds": self.seconds,
            "window": self.window,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError, naming what differs, if it is another run's."""
        for key, mine in self.identity.items():
            theirs = state[key]
            if key == "recipe":
                changed = [name for name in mine if mine[name] != theirs.get(name)]
                mine, theirs = ({name: values.get(name) for name in changed} for values in (mine, theirs))
            if mine != theirs:
                raise ValueError(f"the checkpoint is another run's: its {key} is {theirs}, here it is {mine}")
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["step"])
        self.step, self.rows, self.sums = state["step"], state["rows"], state["sums"]
        self.earlier, self.window = state["seconds"], state["window"]


class History(NamedTuple):
    """What `train` returns: the log, the network with the weights to use (averaged if the recipe says), its answers."""

    rows: list[dict]
    model: nn.Module
    predictions: Tensor  # int64 (N,), for the validation images
    top1: float  # fraction of them that are right


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is never left half done; a second one stops at once."""
    requests, previous = [], {}

    def note(number: int, frame: Any) -> None:
        requests.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
    checkpoint = None if output is None else Path(output) / CHECKPOINT
    if checkpoint and checkpoint.exists() and not resume:
        raise FileExistsError(f"{output} holds a run: continue it with --resume, or choose another --output")
    if train_set.classes != val_set.classes:
        raise ValueError(f"the classes in training are {train_set.classes}, in validation {val_set.classes}")
    torch.manual_seed(seed)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = make_model(model, recipe, len(train_set.classes))
    run = Run(model, name, recipe, train_set, seed, device, started)
    if checkpoint and checkpoint.exists():
        run.load(load_checkpoint(checkpoint))
    if checkpoint:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        log = Log(checkpoint.parent, run.step)
    val_batches = Batches(val_set, EVAL_BATCH, recipe.eval_resolution, train=False)

    print(
        f"{name}: {count_parameters(model):,} parameters, on {device} in {'bf16' if run.bf16 else 'fp32'}, seed {seed}"
    )
    print(f"{train_set.source}; {val_set.source}")
    print(
        recipes.describe(recipe, len(train_set)),
        f"; resumed at step {run.step:,}" if run.step else "",
        sep="",
        flush=True,
    )
    timed = recipe.minutes is not None
    if timed:
        seconds = evaluation_seconds(run.best, val_batches, recipe.amp)
        run.open_window(seconds)

    result = None
    with stop_requests() as requests:
        while run.progress < 1 and not requests:
            epoch, start = divmod(run.step, len(run.batches))
            resolution = run.batches.resolution = recipe.resolution_at(run.progress)
            batches, since = run.batches.epoch(epoch, start), time.perf_counter()
            with tqdm(batches, f"epoch {epoch + 1}", len(run.batches), False, initial=start, disable=None) as bar:
                for x, y in bar:
                    bar.set_postfix(loss=run.train_step(x, y), px=resolution, refresh=False)
                    if requests or run.progress >= 1 or recipe.resolution_at(run.progress) != resolution:
                        break
            run.sums["seconds"] += time.perf_counter() - since
            over, whole_epoch = run.progress >= 1, run.step % len(run.batches) == 0
            if not over and not whole_epoch:
                continue
            row = run.new_row()
            wanted = recipe.evaluate_every and (epoch + 1) % recipe.evaluate_every == 0
            if over or (wanted and not (timed and run.seconds + 2 * seconds > run.window[1])):
                result = evaluate(run.best, val_batches, recipe.amp)
                row |= {"ema_top1" if run.ema else "top1": result.top1, "val_loss": result.loss}
                if run.ema and not (over and timed):
                    row["top1"] = evaluate(run.model, val_batches, recipe.amp).top1
            row["seconds"] = round(run.seconds, 1)
            print(line(row), flush=True)
            if checkpoint:
                log.write(run.rows)
                save_checkpoint(run.state(), checkpoint)
    if run.progress < 1:
        if checkpoint:
            save_checkpoint(run.state(), checkpoint)
        raise KeyboardInterrupt(f"stopped after step {run.step:,}" + (f", saved in {checkpoint}" if checkpoint else ""))
    result = result or evaluate(run.best, val_batches, recipe.amp)

    weights = "the averaged weights" if run.ema else "the last weights"
    print(f"\n{result.top1:.1%} of {len(val_set):,} validation images right, with {weights}, after {run.seconds:.0f} s")
    print("Most confused:", most_confused(result.predictions, val_set.labels, val_set.classes), flush=True)
    if checkpoint:
        summary = run.identity | {"top1": result.top1, "images": len(val_set), "validation": val_set.source}
        summary |= {"parameters": count_parameters(model), "steps": run.step, "seconds": round(run.seconds, 1)}
        write_json(summary | environment(), checkpoint.parent / "summary.json")
        draw_curve(run.rows, checkpoint.parent / "curve.png")
        print(f"In {checkpoint.parent}: {CHECKPOINT}, log.csv, curve.png, summary.json, and events for TensorBoard")
    return History(run.rows, run.best.eval(), result.predictions, result.top1)


def line(row: dict[str, Any]) -> str:
    """A row of the log for the reader at the terminal."""
    text = f"epoch {row['epoch']:g}: training loss {row['train_loss']:.3f}"
    if row["val_loss"] is not None:
        text += f", validation loss {row['val_loss']:.3f}"
    for name, label in (("top1", "top-1"), ("ema_top1", "averaged")):
        if row[name] is not None:
            text += f", {label} {row[name]:.1%}"
    return f"{text} ({row['images_per_second']:.0f} images/s at {row['resolution']} px, {row['seconds']:.0f} s)"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m convnext_min.train", description=__doc__)
    parser.add_argument("--recipe", default="imagenette", help=f"one of {', '.join(recipes.RECIPES)}")
    parser.add_argument(
        "--model", default="convnext_atto", help="convnext_<variant>, road:<step>, timm:<name>, torchvision:<name>"
    )
    parser.add_argument("--data", help="folder with train/<class>/ and val/<class>/; without it Imagenette")
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
        make_model(args.model, recipe, 1)
        train_set, val_set = (data.imagenette(split, args.data, recipe.image_size) for split in ("train", "val"))
        started = psutil.Process().create_time()
        train(args.model, recipe, train_set, val_set, output, args.seed, args.resume, args.device, started)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        again = shlex.join(a for a in argv if a != "--resume") + ("" if args.output else f" --output {output}")
        print(f"\n{stop}\nTo go on: python -m convnext_min.train {again} --resume")
        sys.exit(130)


if __name__ == "__main__":
    main()
