"""What a run leaves behind: checkpoints, the log for people and for TensorBoard, a curve, and how to repeat it."""

import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write, flush to the disk, rename: whatever happens, `path` is a whole checkpoint, the old one or the new."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is cut off or something else; both name the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, depending on where the file is cut off
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise ValueError(f"{path} is cut off, or no checkpoint of convnext_min.train ({reason})") from error
    if not isinstance(state, dict) or "weights" not in state:
        raise ValueError(f"{path} holds no checkpoint of convnext_min.train")
    return state


class Log:
    """The rows of a run: printed, and beside the checkpoint, if given, as log.csv and as TensorBoard's events."""

    def __init__(self, checkpoint: Path | None, step: int):
        self.folder = self.events = None
        if checkpoint:
            self.folder = checkpoint.parent
            self.folder.mkdir(parents=True, exist_ok=True)
            self.events = SummaryWriter(str(self.folder), purge_step=step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        if self.events:
            self.events.close()

    def write(self, rows: list[dict]) -> None:
        """Record `rows`, of which the last is new."""
        print(line(rows[-1]), flush=True)
        if self.folder:
            with open(self.folder / "log.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, rows[-1])
                writer.writeheader()
                writer.writerows(rows)
            for name, value in rows[-1].items():
                if name not in ("epoch", "step") and value is not None:
                    self.events.add_scalar(name, value, rows[-1]["step"])


def line(row: dict[str, Any]) -> str:
    """A row of the log for the reader at the terminal."""
    text = f"epoch {row['epoch']:g}: training loss {row['train_loss']:.3f}"
    if row["val_loss"] is not None:
        text += f", validation loss {row['val_loss']:.3f}"
    for name, label in (("top1", "top-1"), ("ema_top1", "averaged")):
        if row[name] is not None:
            text += f", {label} {row[name]:.1%}"
    return f"{text} ({row['images_per_second']:.0f} images/s at {row['resolution']} px, {row['seconds']:.0f} s)"


def draw_curve(rows: list[dict], path: Path) -> None:
    """Draw losses and accuracies over the epochs."""
    import matplotlib.pyplot as plt  # takes seconds, and only here

    from convnext_min import plots

    plots.use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    for axes, names, unit in (
        (left, {"train_loss": "training", "val_loss": "validation"}, 1),
        (right, {"top1": "weights", "ema_top1": "averaged weights"}, 100),
    ):
        for name, label in names.items():
            points = [(row["epoch"], unit * row[name]) for row in rows if row[name] is not None]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=3, label=label)
        axes.set_xlabel("epoch")
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("cross-entropy")
    right.set_ylabel("validation top-1 (%)")
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def most_confused(predictions: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    """The two classes that are taken for each other most often, with the counts, in words."""
    n = len(classes)
    matrix = torch.bincount(n * labels + predictions, minlength=n * n).view(n, n).fill_diagonal_(0)  # (true, answer)
    a, b = divmod(int((matrix + matrix.T).argmax()), n)
    return (
        f"{classes[a]} taken for {classes[b]} {matrix[a, b]} times, {classes[b]} for {classes[a]} {matrix[b, a]} times"
    )


def environment() -> dict[str, Any]:
    """What a result depends on besides the recipe: command, commit, versions and machine."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "command": ["python", *sys.orig_argv[1:]],
        "commit": found.stdout.strip() or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "machine": {
            "system": platform.platform(),
            "cpu": capabilities.get("cpu_name") or platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write `values` as readable JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")
