"""What a run leaves behind: checkpoints, the log for people and for TensorBoard, a curve, and how to repeat it."""

from __future__ import annotations

import contextlib
import csv
import importlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from convnext_min.train import distributed

if TYPE_CHECKING:
    from convnext_min.train.engine import Run


def save_checkpoint(state: dict[str, Any], path: Path, keep: int = 1) -> None:
    """Write, flush to the disk, rename: whatever happens, `path` is a whole checkpoint, the old one or the new.

    The `keep` newest stay: checkpoint.pt, checkpoint.1.pt, the one before, and so on. Raises OSError, for example if
    the disk is full; then nothing has changed.
    """
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # PyTorch hides it behind a RuntimeError
        raise OSError(f"{path} could not be written: {cause or error}") from error
    copies = [path, *(path.with_suffix(f".{number}{path.suffix}") for number in range(1, keep))]
    for newer, older in reversed(list(pairwise(copies))):
        if newer.exists():
            newer.replace(older)
    partial.replace(path)


def checkpoints(path: Path) -> list[Path]:
    """The checkpoint at `path` and those before it, as far as they are there, the newest first."""
    older = sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"), key=lambda file: (len(file.name), file.name))
    return [file for file in (path, *older) if file.is_file()]


def load_newest(path: Path) -> tuple[dict[str, Any], Path]:
    """The newest of `checkpoints(path)` that can be read, and which it is. Says which others cannot.

    Raises ValueError if there is none.
    """
    problems = []
    for file in checkpoints(path):
        try:
            state = load_checkpoint(file)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems or file != path:
            print("; ".join(problems or [f"there is no {path}"]) + f"; going on from {file}, of step {state['step']:,}")
        return state, file
    raise ValueError("; ".join(problems) or f"there is no checkpoint {path}")


def read(path: Path | str) -> Any:
    """What `torch.save` wrote, on the CPU, as far as it is tensors and plain values.

    Raises FileNotFoundError, or ValueError for a file that is cut off or something else; both name the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, depending on where the file is cut off
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise ValueError(f"{path} is cut off, or no checkpoint of convnext_min.train ({reason})") from error


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is cut off or something else; both name the file.
    """
    state = read(path)
    if not isinstance(state, dict) or not {"weights", "ema", "model", "recipe", "classes"} <= state.keys():
        raise ValueError(f"{path} holds no checkpoint of convnext_min.train")
    return state


class Saver:
    """Writes a run's checkpoints into the folder of `path`, the first process for all; without `path` it does nothing.

    A disk that is full does not end a run before its time: it says so, goes on, and tries again when the next is due.
    """

    def __init__(self, path: Path | None, keep: int = 1, steps: float = math.inf, seconds: float = math.inf):
        self.path, self.keep, self.steps, self.seconds = path, keep, steps, seconds

    def begin(self, run: Run) -> None:
        """Count steps and seconds until the next from here."""
        self.last_step, self.last_seconds, self.saved = run.step, run.now, None

    def due(self, run: Run) -> bool:
        """Whether it is time for one between two epochs' ends. The same in all processes."""
        return run.step - self.last_step >= self.steps or run.now - self.last_seconds >= self.seconds

    def save(self, run: Run, last: bool = False) -> None:
        """Save the run, with the last chance to do so as the `last`. Raises OSError only then."""
        self.last_step, self.last_seconds, self.saved = run.step, run.now, None
        if self.path is None:
            return
        state, failed = run.state(), ""
        if distributed.rank() == 0:
            try:
                save_checkpoint(state, self.path, self.keep)
            except OSError as error:
                failed = str(error)
        failed = distributed.first(failed)
        if failed:
            there = checkpoints(self.path)
            failed += f"; the newest checkpoint stays {there[0]}" if there else "; there is no checkpoint yet"
            if last:
                raise OSError(failed)
            if distributed.rank() == 0:
                print(f"warning: at step {run.step:,} {failed}; training goes on", file=sys.stderr, flush=True)
        else:
            self.saved = run.step

    def save_best(self, run: Run, top1: float) -> None:
        """Save best.pt, the weights without what continuing would take, if `top1` is the highest so far."""
        key = "ema_top1" if run.ema else "top1"
        if self.path is None or any(row[key] is not None and row[key] >= top1 for row in run.rows[:-1]):
            return
        state = {key: value for key, value in run.state().items() if key not in ("optimizer", "scaler")}
        if distributed.rank() == 0:
            with going_on_without("best.pt"):
                save_checkpoint(state, self.path.with_name("best.pt"))


@contextlib.contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """Say that something could not be written, and go on."""
    try:
        yield
    except OSError as error:
        print(f"warning: {what} was not written: {error}; training goes on", file=sys.stderr, flush=True)


class Log:
    """The rows of a run: printed, and beside the checkpoint, if given, as log.csv and as TensorBoard's events.

    With `wandb`, the name of a project, also sent to Weights & Biases, with `config`. Raises ValueError if it is not
    installed.
    """

    def __init__(self, checkpoint: Path | None, step: int, wandb: str = "", config: dict[str, Any] | None = None):
        self.folder = self.events = self.online = None
        if distributed.rank() > 0:
            return
        if checkpoint:
            self.folder = checkpoint.parent
            self.folder.mkdir(parents=True, exist_ok=True)
            self.events = SummaryWriter(str(self.folder), purge_step=step)
        if wandb:
            name = self.folder.name if self.folder else None
            self.online = import_wandb().init(project=wandb, id=name, name=name, resume="allow", config=config)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.events:
            with going_on_without("the last of TensorBoard's events"):
                self.events.close()
        if self.online:
            self.online.finish()

    def write(self, rows: list[dict]) -> None:
        """Record `rows`, of which the last is new."""
        print(line(rows[-1]), flush=True)
        numbers = {key: value for key, value in rows[-1].items() if key not in ("epoch", "step") and value is not None}
        if self.online:
            self.online.log(numbers, step=rows[-1]["step"])
        if self.folder:
            with going_on_without("the log"):
                partial = self.folder / "log.partial"
                with open(partial, "w", newline="") as file:
                    writer = csv.DictWriter(file, rows[-1])
                    writer.writeheader()
                    writer.writerows(rows)
                partial.replace(self.folder / "log.csv")
                for name, value in numbers.items():
                    self.events.add_scalar(name, value, rows[-1]["step"])


def import_wandb() -> Any:
    """The package of Weights & Biases, which nothing else needs. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError("--wandb needs another package: pip install wandb") from None


def save_batch(x: Tensor, y: Tensor, run: Run, folder: Path) -> str:
    """Write the images and labels on which a step failed, and the weights before it, for `torch.load`; say where."""
    path = folder / f"failed-step-{run.step}-process-{distributed.rank()}.pt"
    weights = distributed.gathered(run.model.state_dict())
    try:
        torch.save({"x": x, "y": y, "weights": weights, "step": run.step, "seed": run.seed}, path)
    except (OSError, RuntimeError) as error:
        return f"the images could not be written to {path}: {error.__context__ or error}"
    return f"the images are in {path}"


def line(row: dict[str, Any]) -> str:
    """A row of the log for the reader at the terminal."""
    text = f"epoch {row['epoch']:g}: training loss {row['train_loss']:.3f}"
    if row["val_loss"] is not None:
        text += f", validation loss {row['val_loss']:.3f}"
    for name, label in (("top1", "top-1"), ("ema_top1", "averaged")):
        if row[name] is not None:
            text += f", {label} {row[name]:.1%}"
    speed = f"{row['images_per_second']:.0f} images/s at {row['resolution']} px"
    return f"{text} ({speed}, {row['memory_gb']:.1f} GB, {row['seconds']:.0f} s)"


def training_curve(rows: Sequence[Mapping[str, Any]], fig: Figure | None = None) -> Figure:
    """Return losses and accuracies over the epochs, from the rows of a log, drawn into a figure or its two axes."""
    fig = fig or Figure(figsize=(8, 2.8), layout="constrained")
    left, right = fig.axes or fig.subplots(1, 2)
    for ax, names, unit in (
        (left, {"train_loss": "training", "val_loss": "validation"}, 1),
        (right, {"top1": "weights", "ema_top1": "averaged weights"}, 100),
    ):
        for name, label in names.items():
            points = [(row["epoch"], unit * row[name]) for row in rows if row[name] is not None]
            if points:
                ax.plot(*zip(*points), marker="o", markersize=3, label=label)
        ax.set_xlabel("epoch")
        ax.legend()
        ax.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("cross-entropy")
    right.set_ylabel("validation top-1 (%)")
    right.set_ylim(bottom=0)
    return fig


def most_confused(predictions: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    """The two classes that are taken for each other most often, with the counts, in words."""
    n = len(classes)
    matrix = torch.bincount(n * labels + predictions, minlength=n * n).view(n, n).fill_diagonal_(0)  # (true, answer)
    if not matrix.any():
        return "none, all answers are right"
    a, b = divmod(int((matrix + matrix.T).argmax()), n)
    return (
        f"{classes[a]} taken for {classes[b]} {matrix[a, b]} times, {classes[b]} for {classes[a]} {matrix[b, a]} times"
    )
