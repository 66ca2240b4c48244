"""Log a run: a line per row at the terminal, log.csv, TensorBoard, Weights & Biases, and the training curve."""

from __future__ import annotations

import csv
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convnext_min.environment import atomic_write
from convnext_min.train import distributed
from convnext_min.train.checkpoint import warn_on_failure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convnext_min.train.trainer import Trainer

METRICS = {  # columns that are fractions, and their names at the terminal
    "top1": "top-1",
    "ema_top1": "top-1 (EMA)",
    "mask_ap": "mask AP",
    "box_ap": "box AP",
    "miou": "mIoU",
}


class Log:
    """Write the rows of a run, on rank 0: print them, and write log.csv and TensorBoard's events into `folder`, if any.

    A resumed run continues after the optimizer step `step`. With `wandb`, the name of a project, rows also go to
    Weights & Biases, with `config`. Raises ValueError if its package is not installed.
    """

    def __init__(self, folder: Path | None, step: int, wandb: str = "", config: dict[str, Any] | None = None):
        self.folder = self.events = self.online = None
        if distributed.rank() > 0:
            return
        if folder:
            self.folder = folder
            self.folder.mkdir(parents=True, exist_ok=True)
            from torch.utils.tensorboard import SummaryWriter  # here and below: half a second of imports

            self.events = SummaryWriter(str(folder), purge_step=step + 1)  # keeps the row of `step`
        if wandb:
            run = {"name": folder.name, "id": wandb_id(folder)} if folder else {}
            self.online = import_wandb().init(project=wandb, resume="allow", config=config, **run)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.events:
            with warn_on_failure("the end of TensorBoard's events"):
                self.events.close()
        if self.online:
            self.online.finish()

    def write(self, rows: list[dict]) -> None:
        """Write `rows`, of which the last is new."""
        distributed.print_once(format_row(rows[-1]))
        numbers = {key: value for key, value in rows[-1].items() if key not in ("epoch", "step") and value is not None}
        if self.online:
            self.online.log(numbers, step=rows[-1]["step"])
        if self.folder:
            with warn_on_failure("log.csv"):
                with atomic_write(self.folder / "log.csv", newline="") as file:
                    writer = csv.DictWriter(file, rows[-1])
                    writer.writeheader()
                    writer.writerows(rows)
                for name, value in numbers.items():
                    self.events.add_scalar(name, value, rows[-1]["step"])


def import_wandb() -> Any:
    """Import Weights & Biases, an optional package. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError("--wandb needs another package: pip install wandb") from None


def wandb_id(folder: Path) -> str:
    """Return an identifier of the run in `folder`, the same when it is resumed, and different for other folders."""
    return f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


def save_failed_batch(x: Tensor, y: Tensor, trainer: Trainer, folder: Path) -> str:
    """Write the batch of a failed step and the weights before it, for `torch.load`; return a line with the path."""
    path = folder / f"failed-step-{trainer.step}-process-{distributed.rank()}.pt"
    weights = distributed.full_state_dict(trainer.model)
    try:
        torch.save({"x": x, "y": y, "weights": weights, "step": trainer.step, "seed": trainer.seed}, path)
    except (OSError, RuntimeError) as error:
        return f"the images could not be written to {path}: {error.__context__ or error}"
    return f"the images are in {path}"


def format_row(row: dict[str, Any]) -> str:
    """Return a row of the log as a line for the terminal."""
    text = f"epoch {row['epoch']:g}: training loss {row['train_loss']:.3f}"
    if row.get("val_loss") is not None:
        text += f", validation loss {row['val_loss']:.3f}"
    for name, label in METRICS.items():
        if row.get(name) is not None:
            text += f", {label} {row[name]:.1%}"
    speed = f"{row['images_per_second']:.0f} images/s at {row['resolution']} px"
    return f"{text} ({speed}, {row['memory_gb']:.1f} GB, {row['seconds']:.0f} s)"


def training_curve(rows: Sequence[Mapping[str, Any]], fig: Figure | None = None) -> Figure:
    """Return losses and accuracies over the epochs, from the rows of a log, drawn into a figure or its two axes."""
    from matplotlib.figure import Figure

    fig = fig or Figure(figsize=(8, 2.8), layout="constrained")
    left, right = fig.axes or fig.subplots(1, 2)
    for ax, names, unit in (
        (left, {"train_loss": "training", "val_loss": "validation"}, 1),
        (right, {"top1": "last weights", "ema_top1": "EMA weights"}, 100),
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
