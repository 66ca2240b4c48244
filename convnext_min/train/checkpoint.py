"""Write checkpoints so that a crash at any moment leaves a complete one, and read them without running code in them."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convnext_min.environment import atomic_write
from convnext_min.train import distributed
from convnext_min.weights import read_checkpoint

if TYPE_CHECKING:
    from convnext_min.train.trainer import Trainer

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"


def save_checkpoint(state: dict[str, Any], path: Path, keep: int = 1) -> None:
    """Write a checkpoint; at any moment `path` is a complete file, the old one or the new one.

    The `keep` newest remain: checkpoint.pt, checkpoint.1.pt before it, and so on. Raises OSError, for example if the
    disk is full; all files are then unchanged.
    """
    complete = path.with_suffix(".new")
    try:
        with atomic_write(complete, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # PyTorch hides it behind a RuntimeError
        raise OSError(f"{path} could not be written: {cause or error}") from error
    copies = [path, *(path.with_suffix(f".{number}{path.suffix}") for number in range(1, keep))]
    for newer, older in reversed(list(pairwise(copies))):
        if newer == path and path.exists():
            _copy(path, older)  # so that `path` is never missing
        elif newer.exists():
            newer.replace(older)
    complete.replace(path)


def _copy(path: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, copy)


def list_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint at `path` and the ones before it, as far as they exist, the newest first."""
    older = sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"), key=lambda file: (len(file.name), file.name))
    return [file for file in (path, *older) if file.is_file()]


def load_newest(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the contents and the path of the newest of `list_checkpoints(path)` that can be read.

    Prints which others cannot. Raises ValueError if there is none.
    """
    problems = []
    for file in list_checkpoints(path):
        try:
            state = load_checkpoint(file)
            _check_resumable(state, file)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems or file != path:
            found = "; ".join(problems or [f"there is no {path}"])
            distributed.print_once(f"{found}; resuming from {file}, iteration {state['step']:,}")
        return state, file
    raise ValueError("; ".join(problems) or f"there is no checkpoint {path}")


def _check_resumable(state: dict[str, Any], path: Path) -> None:
    if "optimizer" not in state:
        raise ValueError(
            f"{path} has weights but no optimizer state, as {BEST} does, so it cannot be resumed: start a new run from "
            f"it with --finetune {path}"
        )


def is_run(contents: Any) -> bool:
    """Return True if the contents of a file are a checkpoint of a run, complete or without the state to resume it."""
    return isinstance(contents, dict) and {"weights", "ema", "model", "recipe", "classes"} <= contents.keys()


def is_finite(state: dict[str, Any]) -> bool:
    """Return True if all weights and EMA weights of a checkpoint are finite."""
    return all(bool(value.isfinite().all()) for key in ("weights", "ema") for value in (state[key] or {}).values())


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Return the contents of a checkpoint, on the CPU.

    Raises FileNotFoundError, or ValueError for a file that is damaged or of another kind; both name the file.
    """
    state = read_checkpoint(path)
    if not is_run(state):
        raise ValueError(f"{path} is not a checkpoint of convnext_min.train")
    return state


class CheckpointManager:
    """Write a run's checkpoints to `path`, and the best weights beside it, on rank 0; without `path` do nothing.

    A checkpoint is due after `steps` optimizer steps or `seconds`, and at the end of each epoch. A full disk does not
    end a run early: a warning is printed, and the next checkpoint is tried when it is due.
    """

    def __init__(self, path: Path | None, keep: int = 1, steps: float = math.inf, seconds: float = math.inf):
        self.path, self.keep, self.steps, self.seconds = path, keep, steps, seconds

    def start(self, trainer: Trainer) -> None:
        """Count steps and seconds until the next checkpoint from now on."""
        self.last_step, self.last_seconds, self.saved_step = trainer.step, trainer.clock.now, None

    def is_due(self, trainer: Trainer) -> bool:
        """Return True if a checkpoint is due between the ends of epochs; the same in all processes."""
        steps, seconds = trainer.step - self.last_step, trainer.clock.now - self.last_seconds
        return steps >= self.steps or seconds >= self.seconds

    def save(self, trainer: Trainer, last: bool = False) -> None:
        """Write a checkpoint. A failed write is only a warning unless `last` is true; then it raises OSError.

        Raises FloatingPointError, and keeps the checkpoints before, if a weight is not finite.
        """
        self.start(trainer)
        if self.path is None:
            return
        state, failure = trainer.state_dict(), ""
        if not distributed.broadcast_object(is_finite(state)):
            raise FloatingPointError(
                f"the weights are not finite after iteration {trainer.step}, so they are not saved; a lower base_lr or "
                "clip_grad=1.0 may help"
            )
        if distributed.rank() == 0:
            try:
                save_checkpoint(state, self.path, self.keep)
            except OSError as error:
                failure = str(error)
        failure = distributed.broadcast_object(failure)
        if not failure:
            self.saved_step = trainer.step
            return
        existing = list_checkpoints(self.path)
        failure += f"; the newest checkpoint is still {existing[0]}" if existing else "; there is no checkpoint yet"
        if last:
            raise OSError(failure)
        if distributed.rank() == 0:
            print(f"warning: at iteration {trainer.step:,} {failure}; training continues", file=sys.stderr, flush=True)

    def save_best(self, trainer: Trainer, key: str) -> None:
        """Write best.pt, the weights without the state needed to resume, if the last row has the highest `key`."""
        *earlier, row = trainer.history
        if self.path is None or any(old[key] is not None and old[key] >= row[key] for old in earlier):
            return
        state = {key: value for key, value in trainer.state_dict().items() if key not in ("optimizer", "scaler")}
        if distributed.rank() == 0:
            with warn_on_failure(BEST):
                save_checkpoint(state, self.path.with_name(BEST))


@contextlib.contextmanager
def warn_on_failure(name: str) -> Iterator[None]:
    """Turn an OSError while writing the file `name` into a warning."""
    try:
        yield
    except OSError as error:
        print(f"warning: {name} was not written: {error}; training continues", file=sys.stderr, flush=True)
