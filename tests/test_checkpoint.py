"""Checkpoints survive a full disk, a damaged file and a crash at any time."""

import csv
import errno
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import EVERYTHING_RANDOM, TINY, equal

from convnext_min.train import RunConfig, checkpoint, loop, train
from convnext_min.train.checkpoint import (
    CheckpointManager,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from convnext_min.train.evaluation import Evaluation
from convnext_min.train.predict import load_model
from convnext_min.weights import read_checkpoint


def steps(folder):
    return [load_checkpoint(file)["step"] for file in list_checkpoints(folder / "checkpoint.pt")]


def run(images, folder, recipe=TINY, **options):
    return train("convnext_atto", recipe, images, images.subset(slice(13)), folder, **options)


full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")


# ---- Which checkpoints there are


@pytest.mark.parametrize(("keep", "left"), [(1, [15]), (2, [15, 10]), (4, [15, 10, 5])])
def test_the_newest_checkpoints_stay(images, tmp_path, keep, left):
    run(images, tmp_path, config=RunConfig(keep=keep))
    assert steps(tmp_path) == left


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_checkpoint_is_never_missing(tmp_path, monkeypatch, links):
    path, present = tmp_path / "checkpoint.pt", []
    save_checkpoint({"step": 1}, path, keep=2)
    save_checkpoint({"step": 2}, path, keep=2)
    rename = Path.replace

    def note(self, target):
        rename(self, target)
        present.append(path.exists())

    def refuse(*_):
        raise OSError("no hard links")

    monkeypatch.setattr(Path, "replace", note)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    save_checkpoint({"step": 3}, path, keep=2)
    assert [read_checkpoint(file)["step"] for file in list_checkpoints(path)] == [3, 2]
    assert all(present)


def test_checkpoints_are_written_between_the_ends_of_epochs(images, tmp_path, monkeypatch):
    written = []
    save = save_checkpoint
    monkeypatch.setattr(
        checkpoint,
        "save_checkpoint",
        lambda state, path, *_: (written.append((path.name, state["step"])), save(state, path)),
    )
    run(images, tmp_path, config=RunConfig(save_every="2"))
    assert [step for name, step in written if name == "checkpoint.pt"] == [2, 4, 5, 7, 9, 10, 12, 14, 15]


def test_minutes_between_checkpoints_are_counted_from_the_last():
    def at(step, seconds):
        return SimpleNamespace(step=step, clock=SimpleNamespace(now=seconds))

    manager = CheckpointManager(None, 1, *RunConfig(save_every="15m").interval)
    manager.start(at(0, 100.0))
    assert not manager.is_due(at(70, 999.0)) and manager.is_due(at(71, 1000.0))
    manager.save(at(71, 1003.0))
    assert not manager.is_due(at(90, 1902.0)) and manager.is_due(at(91, 1903.0))


@pytest.mark.parametrize("every", ["often", "0", "-5", "m", "1.5m"])
def test_what_save_every_takes_is_said(every):
    with pytest.raises(
        ValueError, match=f"save_every takes iterations, as in 500, or minutes, as in 15m; got '{every}'"
    ):
        RunConfig(save_every=every)


def test_best_is_the_checkpoint_of_the_highest_accuracy(images, tmp_path, monkeypatch):
    accuracies, weights = iter([0.3, 0.6, 0.5]), []

    def judge(model, batches, amp, flip):
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
        return Evaluation(next(accuracies), 1.0, torch.zeros(13, dtype=torch.long), batches.image_set.labels)

    monkeypatch.setattr(loop, "evaluate", judge)
    run(images, tmp_path, replace(TINY, ema_decay=0.0))
    assert equal(load_model(tmp_path / "best.pt")[0].state_dict(), weights[1])
    assert "optimizer" not in load_checkpoint(tmp_path / "best.pt")


# ---- Damage


def at_step(step, action):
    """Return a hook for `after_step` that calls `action` after this step."""

    def hook(trainer):
        if trainer.step == step:
            action()

    return hook


def crash():
    """Stop without saving, as when the power fails."""
    raise RuntimeError("power failure")


@pytest.mark.parametrize("damage", ["cut off", "missing", "zeros"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(images, tmp_path, capsys, damage):
    whole = run(images, tmp_path / "whole", EVERYTHING_RANDOM)
    with pytest.raises(RuntimeError):
        run(images, tmp_path / "run", EVERYTHING_RANDOM, after_step=at_step(12, crash))
    newest, before = (tmp_path / "run" / name for name in ("checkpoint.pt", "checkpoint.1.pt"))
    contents = newest.read_bytes()
    middle = len(contents) // 2
    if damage == "missing":
        newest.unlink()
    else:
        zeroed = contents[:middle] + bytes(64) + contents[middle + 64 :]
        newest.write_bytes(contents[:3000] if damage == "cut off" else zeroed)
    resumed = run(images, tmp_path / "run", EVERYTHING_RANDOM, resume=True)
    said = f"there is no {newest}" if damage == "missing" else f"{newest} is damaged"
    out = capsys.readouterr().out
    assert said in out and f"resuming from {before}, iteration 5" in out and "continuing at iteration 5" in out
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    assert steps(tmp_path / "run") == [15, 10]
    assert (tmp_path / "run" / "checkpoint.broken").exists() == (damage != "missing")  # it has pushed out no good one
    with open(tmp_path / "run" / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10", "15"]


def test_a_flipped_bit_is_found_or_does_no_harm(images, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(images, tmp_path, replace(TINY, epochs=1))
    contents, right = path.read_bytes(), load_checkpoint(path)
    bits, found = random.Random(0), 0
    for _ in range(60):
        flipped = bytearray(contents)
        flipped[bits.randrange(len(flipped))] ^= 1 << bits.randrange(8)
        path.write_bytes(flipped)
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
            found += 1
        else:
            assert equal(state["weights"], right["weights"]) and equal(state["ema"], right["ema"])
            assert str(state["optimizer"]) == str(right["optimizer"])
    assert found >= 30


def test_weights_without_optimizer_state_cannot_be_resumed(images, tmp_path):
    run(images, tmp_path / "run", replace(TINY, epochs=1))
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run" / "best.pt", tmp_path / "copy" / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt has weights but no optimizer state, as best\.pt.*--finetune"):
        run(images, tmp_path / "copy", replace(TINY, epochs=1), resume=True)


def test_weights_that_are_not_finite_are_not_saved(images, tmp_path):
    def poison(trainer):
        if trainer.step == 10:
            trainer.model.head.weight.data[0] = float("inf")

    recipe = replace(TINY, evaluate_every=0, ema_decay=0.0)
    with pytest.raises(
        FloatingPointError, match="the weights are not finite after iteration 10, so they are not saved"
    ):
        run(images, tmp_path, recipe, after_step=poison)
    assert steps(tmp_path) == [5]


def test_if_all_checkpoints_are_damaged_all_are_named(images, tmp_path):
    for name in ("checkpoint.pt", "checkpoint.1.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged.*; .*checkpoint\.1\.pt is damaged"):
        run(images, tmp_path, resume=True)


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"weights": {}, "step": 1}, path)

    def crash(state, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint({"weights": {}, "step": 2}, path)
    assert read_checkpoint(path)["step"] == 1


def test_a_checkpoint_that_is_cut_off_or_something_else_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"weights": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"{path} is damaged"):
        load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=rf"{path} is not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


# ---- Full disks


def fill(path: Path) -> None:
    """What is written to `path` next meets a full disk."""
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/dev/full")


@full_disk
def test_a_full_disk_does_not_end_a_run_and_the_checkpoint_before_stays(images, tmp_path, capsys):
    history = run(images, tmp_path, after_step=at_step(7, lambda: fill(tmp_path / "checkpoint.partial")))
    error = capsys.readouterr().err
    assert (
        f"at iteration 10 {tmp_path / 'checkpoint.pt'} could not be written: [Errno 28] No space left on device"
        in error
    )
    assert f"the newest checkpoint is still {tmp_path / 'checkpoint.pt'}; training continues" in error
    assert len(history.rows) == 3 and steps(tmp_path) == [15, 5]  # what filled the disk is gone in time for the last


@full_disk
def test_the_last_checkpoint_has_to_be_written(images, tmp_path):
    with pytest.raises(OSError, match=r"could not be written.*No space left.*the newest checkpoint is still"):
        run(images, tmp_path, after_step=at_step(14, lambda: fill(tmp_path / "checkpoint.partial")))
    assert steps(tmp_path) == [10, 5]


@full_disk
def test_a_log_that_cannot_be_written_stays_as_it_was(images, tmp_path, capsys):
    run(images, tmp_path, after_step=at_step(12, lambda: fill(tmp_path / "log.partial")))
    assert "warning: log.csv was not written: [Errno 28]" in capsys.readouterr().err
    with open(tmp_path / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10"]


def test_other_errors_of_writing_keep_their_reason(tmp_path, monkeypatch):
    def fail(state, file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"could not be written.*Input/output error"):
        save_checkpoint({"weights": {}}, tmp_path / "checkpoint.pt")
    assert not list(tmp_path.iterdir())
