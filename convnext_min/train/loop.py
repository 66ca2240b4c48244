"""The training loop: prepare a run, train it epoch by epoch, and write its results."""

import contextlib
import functools
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from convnext_min.data import Batches, Data, ImageSet
from convnext_min.environment import atomic_write, environment, write_json
from convnext_min.measure import count_parameters
from convnext_min.recipes import Recipe
from convnext_min.train import distributed
from convnext_min.train.checkpoint import CHECKPOINT, CheckpointManager, list_checkpoints, load_checkpoint, load_newest
from convnext_min.train.device import choose_device, device_name, peak_memory
from convnext_min.train.distributed import print_once
from convnext_min.train.evaluation import Evaluation, evaluate, evaluation_seconds, most_confused
from convnext_min.train.log import Log, save_failed_batch, training_curve
from convnext_min.train.models import create_model
from convnext_min.train.pretrained import Start, load_start
from convnext_min.train.trainer import RunConfig, Trainer

PREDICTIONS = "predictions.npz"  # the predicted and the true class of each validation image
EVAL_BATCH = 64  # images per process
ONE_REQUEST = 2.0  # seconds within which signals are one request: Ctrl-C reaches a process through torchrun as well

# Signals that ask a run to save and stop, and the exit codes after them; of several signals, the first in this list
# decides. SIGUSR1 means that a job's time is up: the exit code asks to start the job again (EX_TEMPFAIL).
STOP_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    STOP_CODES[signal.SIGUSR1] = 75

AfterStep = Callable[[Trainer], Any]
Validate = Callable[[dict[str, Any]], Any]  # evaluates, writes metrics into a row of the log, and returns the result


class History(NamedTuple):
    """Result of `train`: the rows of the log, the network (with EMA weights if there are any) and its predictions."""

    rows: list[dict]
    model: nn.Module
    predictions: Tensor  # int64 (N,), of the validation images
    top1: float  # a fraction


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by a signal; `code` is the exit code of the process, one of `STOP_CODES`."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def train(
    model: str | nn.Module,
    recipe: Recipe,
    train_set: ImageSet | Data,
    val_set: ImageSet | Data,
    output: Path | str | None = None,
    seed: int = 0,
    resume: bool = False,
    config: RunConfig | None = None,
    start: Start | None = None,
    after_step: AfterStep | None = None,
) -> History:
    """Train `model`, a network or a name for `create_model`, and evaluate it on `val_set` at the recipe's intervals.

    Writes log.csv, curve.png, TensorBoard's events, checkpoint.pt and the ones before it, best.pt, predictions.npz and
    summary.json into the folder `output`, if given. The images are an `ImageSet` or other `Data`. `start` names a
    checkpoint with the initial weights. With `resume`, the run continues from the newest complete checkpoint in
    `output`, if there is one. `after_step(trainer)` is called after each optimizer step. Seeds the generators of
    PyTorch, NumPy and Python.

    Raises ValueError for classes that differ, FileExistsError if `output` has a run and `resume` is not set,
    FloatingPointError if a loss or the outputs are not finite, and Stopped, after saving, on a request to stop.
    """
    checkpoint = checkpoint_in(output, resume)
    trainer, val_batches = prepare(model, recipe, train_set, val_set, seed, config, start, checkpoint)
    manager = CheckpointManager(checkpoint, trainer.config.keep, *trainer.config.interval)
    manager.start(trainer)
    eval_seconds = start_schedule(
        trainer, lambda: evaluation_seconds(trainer.eval_model, val_batches, recipe.amp, recipe.test_flip)
    )
    validate = functools.partial(validate_classifier, trainer, val_batches)
    result = run_epochs(trainer, manager, validate, eval_seconds, after_step)
    result = result or evaluate(trainer.eval_model, val_batches, recipe.amp, flip=recipe.test_flip)
    report(trainer, result, val_batches.classes)
    if checkpoint and distributed.rank() == 0:
        write_summary(trainer, result, val_batches.source, checkpoint.parent)
    return History(trainer.history, trainer.eval_model.eval(), result.predictions, result.top1)


# ---- Before the first step


def checkpoint_in(output: Path | str | None, resume: bool) -> Path | None:
    """Return the checkpoint's path in `output`. Raises FileExistsError if it exists and `resume` is not set."""
    if output is None:
        return None
    path = Path(output) / CHECKPOINT
    if list_checkpoints(path) and not resume:
        raise FileExistsError(f"{output} holds a run: continue it with --resume, or choose another --output")
    return path


def prepare(
    model: str | nn.Module,
    recipe: Recipe,
    train_set: ImageSet | Data,
    val_set: ImageSet | Data,
    seed: int = 0,
    config: RunConfig | None = None,
    start: Start | None = None,
    checkpoint: Path | None = None,
) -> tuple[Trainer, Data]:
    """Return the trainer, restored from `checkpoint` if that file exists, and the batches of `val_set`."""
    config = config or RunConfig()
    device = config.device if isinstance(config.device, torch.device) else choose_device(config.device)
    train_batches, val_batches = as_batches(train_set, val_set, recipe, seed)
    torch.manual_seed(seed)
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = create_model(model, recipe, len(train_batches.classes))
    resumes = bool(checkpoint and list_checkpoints(checkpoint))
    if start and not resumes:
        print_once(load_start(model, start, train_batches.classes))
    trainer = Trainer(model, name, recipe, train_batches, seed, device, config)
    trainer.identity["start"] = start and str(start.path)
    if resumes:
        load_resumed(trainer, checkpoint)
    check_same_step(trainer, checkpoint)
    print_once(f"{name}, {count_parameters(trainer.model):,} parameters, {trainer}")
    print_once(f"{train_batches.source}; {val_batches.source}")
    if trainer.step:
        print_once(f"continuing at iteration {trainer.step:,}")
    return trainer, val_batches


def as_batches(train_set: ImageSet | Data, val_set: ImageSet | Data, recipe: Recipe, seed: int) -> tuple[Data, Data]:
    """Return this process's share of the batches of both sets. Raises ValueError if their classes differ."""
    rank, world_size = distributed.rank(), distributed.world_size()
    share = {"rank": rank, "world_size": world_size}
    if isinstance(train_set, ImageSet):
        train_set = Batches(train_set, recipe.batch_size, recipe.resolution, True, seed, recipe.crop_scale, **share)
    if isinstance(val_set, ImageSet):
        val_set = Batches(val_set, EVAL_BATCH * world_size, recipe.eval_resolution, train=False, **share)
    if train_set.classes != val_set.classes:
        raise ValueError(f"the classes in training are {train_set.classes}, in validation {val_set.classes}")
    return train_set, val_set


def load_resumed(trainer: Trainer, checkpoint: Path) -> None:
    """Continue from the newest complete checkpoint; a damaged newest one is renamed to checkpoint.broken."""
    state, found = load_newest(checkpoint)
    trainer.load_state_dict(state)
    distributed.all_gather_object(None)  # all processes have read it
    if found != checkpoint and checkpoint.exists() and distributed.rank() == 0:
        checkpoint.replace(checkpoint.with_suffix(".broken"))  # else the next rotation would delete a good one


def check_same_step(trainer: Trainer, checkpoint: Path | None) -> None:
    """Raise ValueError if the processes found different checkpoints, or some of them none."""
    if len(set(distributed.all_gather_object(trainer.step))) > 1:
        raise ValueError(f"the processes find different checkpoints: {checkpoint.parent} must be a shared folder")


def start_schedule(trainer: Trainer, time_evaluation: Callable[[], float]) -> float:
    """Start the clock of a timed run, and return the seconds that an evaluation takes; 0 for a run in epochs."""
    if trainer.recipe.minutes is None:
        return 0.0
    seconds = time_evaluation()
    trainer.clock.open_window(seconds, resumed=trainer.step > 0)
    return seconds


# ---- The epochs


def run_epochs(
    trainer: Trainer,
    manager: CheckpointManager,
    validate: Validate,
    eval_seconds: float,
    after_step: AfterStep | None = None,
) -> Any:
    """Train to the end of the run, and return what `validate` returned there; None if the run was complete before.

    Raises Stopped, after saving, on a request to stop.
    """
    result = None
    folder = manager.path and manager.path.parent
    with stop_requests() as requests, Log(folder, trainer.step, trainer.config.wandb, trainer.identity) as log:
        while trainer.progress < 1 and not trainer.clock.stopped:
            train_epoch(trainer, requests, manager, after_step)
            if trainer.progress >= 1 or trainer.step % len(trainer.batches) == 0:
                result = end_of_epoch(trainer, validate, manager, log, eval_seconds)
    if trainer.progress < 1:
        stop(trainer, manager, requests)
    return result


def train_epoch(
    trainer: Trainer, requests: list[int], manager: CheckpointManager, after_step: AfterStep | None
) -> None:
    """Train until the epoch or the run ends, the resolution changes, or there is a request to stop."""
    epoch, start = divmod(trainer.step, len(trainer.batches))
    resolution = trainer.batches.resolution = trainer.recipe.resolution_at(trainer.progress)
    since = time.perf_counter()
    batches = trainer.batches.epoch(epoch, start)
    silent = distributed.rank() > 0
    with tqdm(batches, f"epoch {epoch + 1}", len(trainer.batches), False, initial=start, disable=silent or None) as bar:
        for x, y in bar:
            try:
                loss = trainer.train_step(x, y)
            except FloatingPointError as error:
                saved = f"; {save_failed_batch(x, y, trainer, manager.path.parent)}" if manager.path else ""
                raise FloatingPointError(f"{error}{saved}") from None
            if after_step:
                after_step(trainer)
            bar.set_postfix(loss=loss, px=resolution, refresh=False)
            trainer.clock.sync(bool(requests))
            progress = trainer.progress
            if trainer.clock.stopped or progress >= 1 or trainer.recipe.resolution_at(progress) != resolution:
                break
            if trainer.step % len(trainer.batches) and manager.is_due(trainer):  # `end_of_epoch` saves at the end
                since, earlier = time.perf_counter(), since
                trainer.meter.seconds += since - earlier
                manager.save(trainer)
    trainer.meter.seconds += time.perf_counter() - since


def end_of_epoch(
    trainer: Trainer, validate: Validate, manager: CheckpointManager, log: Log, eval_seconds: float
) -> Any:
    """Evaluate if it is time to, log a row and save; return the result of the evaluation, if any."""
    result, over, every = None, trainer.progress >= 1, trainer.recipe.evaluate_every
    row = trainer.new_row()
    due = every and (trainer.step // len(trainer.batches)) % every == 0
    if over or (due and trainer.clock.has_time_for(2 * eval_seconds)):
        result = validate(row)
        manager.save_best(trainer, trainer.main_metric)
    row["seconds"] = round(trainer.clock.seconds, 1)
    log.write(trainer.history)
    manager.save(trainer, last=over)
    trainer.clock.sync()
    return result


def validate_classifier(trainer: Trainer, val_batches: Data, row: dict[str, Any]) -> Evaluation:
    """Evaluate, write the metrics into `row`, and return the evaluation.

    With an EMA the weights without it are evaluated too, except at the end of a timed run, where time is up.
    """
    recipe, over = trainer.recipe, trainer.progress >= 1
    result = evaluate(trainer.eval_model, val_batches, recipe.amp, flip=recipe.test_flip)
    row |= {trainer.main_metric: result.top1, "val_loss": result.loss}
    if trainer.ema and not (over and recipe.minutes):
        row["top1"] = evaluate(trainer.model, val_batches, recipe.amp, flip=recipe.test_flip).top1
    return result


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect signals of `STOP_CODES` in a list, so that no iteration is interrupted.

    A second signal stops the process at once, unless it follows within `ONE_REQUEST` seconds of the first.
    """
    requests, previous, times = [], {}, []

    def note(number: int, frame: Any) -> None:
        requests.append(number)
        times.append(time.time())
        if times[-1] - times[0] > ONE_REQUEST:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
        for number in STOP_CODES:
            previous[number] = signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop(trainer: Trainer, manager: CheckpointManager, requests: list[int]) -> None:
    """Save, and raise Stopped."""
    if trainer.step != manager.saved_step:
        manager.save(trainer, last=True)
    message = f"stopped after iteration {trainer.step:,}" + (f", saved in {manager.path}" if manager.path else "")
    received = set().union(*distributed.all_gather_object(requests))
    raise Stopped(message, next(code for number, code in STOP_CODES.items() if number in received))


# ---- The result


def report(trainer: Trainer, result: Evaluation, classes: tuple[str, ...]) -> None:
    """Print the accuracy and the two classes that are confused most often."""
    weights = "EMA" if trainer.ema else "last"
    print_once(
        f"\nTop-1 {result.top1:.1%} on {len(result.labels):,} validation images ({weights} weights), "
        f"{trainer.clock.seconds:.0f} s"
    )
    print_once("Most confused:", most_confused(result.predictions, result.labels, classes))


def write_summary(trainer: Trainer, result: Evaluation, validation: str, folder: Path) -> None:
    """Write summary.json, predictions.npz and curve.png; the last checkpoint and the log exist already."""
    arrays = {"predictions": result.predictions.numpy(), "labels": result.labels.numpy()}
    with atomic_write(folder / PREDICTIONS, "wb") as file:
        np.savez_compressed(file, **{name: values.astype(np.uint16) for name, values in arrays.items()})
    scores = {"top1": result.top1}  # a fraction
    write_json(summarize(trainer, validation, len(result.labels), scores), folder / "summary.json")
    training_curve(trainer.history).savefig(folder / "curve.png", dpi=150)
    print_once(f"Wrote {folder}: {CHECKPOINT}, log.csv, curve.png, summary.json, {PREDICTIONS}, TensorBoard's events")


def summarize(trainer: Trainer, validation: str, images: int, scores: dict[str, float]) -> dict[str, Any]:
    """Return the contents of summary.json: the run, its `scores` on the validation images, its cost, the machine.

    Both `seconds` and `seconds_to_first_iteration`, which includes that iteration, count from the start of the process.
    """
    return {
        **trainer.identity,
        "validation": validation,
        "images": images,
        **scores,
        "parameters": count_parameters(trainer.model),
        "steps": trainer.step,
        "seconds": round(trainer.clock.seconds, 1),
        "seconds_to_first_iteration": trainer.clock.first_iteration,
        "cpu_seconds": round(trainer.clock.cpu_seconds, 1),
        "device": device_name(trainer.device),
        "processes": distributed.world_size(),
        "micro_batch": trainer.micro_batch,
        **environment(),
    }


# ---- A trial


def dry_run(trainer: Trainer, evaluate_one: Callable[[], Any], output: Path | str) -> None:
    """Time one batch, iteration, save, load and evaluation in a temporary folder next to `output`; leave no files."""
    times, since = {}, time.perf_counter()

    def note(name: str) -> None:
        nonlocal since
        times[name], since = time.perf_counter() - since, time.perf_counter()

    x, y = next(trainer.batches.epoch(0))
    note("batch")
    trainer.train_step(x, y)
    note("iteration")
    parent = next(folder for folder in Path(output).absolute().parents if folder.is_dir())
    folder = Path(distributed.broadcast_object(tempfile.mkdtemp(dir=parent) if distributed.rank() == 0 else ""))
    try:
        CheckpointManager(folder / CHECKPOINT).save(trainer, last=True)
        note("save")
        trainer.load_state_dict(load_checkpoint(folder / CHECKPOINT))
        note("load")
    finally:
        distributed.all_gather_object(None)  # all processes have read it
        shutil.rmtree(folder, ignore_errors=True)
    evaluate_one()
    note("evaluation of a batch")
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in times.items())
    print_once(f"OK: {seconds}; {peak_memory(trainer.device) / 1e9:.1f} GB")
