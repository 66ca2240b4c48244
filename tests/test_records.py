"""What a run writes survives a full disk, a cut-off file and a crash at any time."""

import csv
import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import EVERYTHING_RANDOM, TINY, equal, new_run

from convnext_min import environment, train
from convnext_min.data import synthetic_images
from convnext_min.train import records
from convnext_min.train.engine import Run, Setup
from convnext_min.train.predict import load_model


@pytest.fixture(scope="module")
def images():
    return synthetic_images("train", 32, 40)


def steps(folder):
    return [records.load_checkpoint(file)["step"] for file in records.checkpoints(folder / "checkpoint.pt")]


def run(images, folder, recipe=TINY, **options):
    return train.train("convnext_atto", recipe, images, images.subset(slice(13)), folder, device="cpu", **options)


full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")


# ---- Which checkpoints there are


@pytest.mark.parametrize(("keep", "left"), [(1, [15]), (2, [15, 10]), (4, [15, 10, 5])])
def test_the_newest_checkpoints_stay(images, tmp_path, keep, left):
    run(images, tmp_path, setup=Setup(keep=keep))
    assert steps(tmp_path) == left


def test_checkpoints_are_written_between_the_ends_of_epochs(images, tmp_path, monkeypatch):
    written = []
    save = records.save_checkpoint
    monkeypatch.setattr(
        records,
        "save_checkpoint",
        lambda state, path, *_: (written.append((path.name, state["step"])), save(state, path)),
    )
    run(images, tmp_path, setup=Setup(save_every="2"))
    assert [step for name, step in written if name == "checkpoint.pt"] == [2, 4, 5, 7, 9, 10, 12, 14, 15]


def test_minutes_between_checkpoints_are_counted_from_the_last():
    saver = records.Saver(None, 1, *Setup(save_every="15m").interval)
    saver.begin(SimpleNamespace(step=0, now=100.0))
    assert not saver.due(SimpleNamespace(step=70, now=999.0)) and saver.due(SimpleNamespace(step=71, now=1000.0))
    saver.save(SimpleNamespace(step=71, now=1003.0))
    assert not saver.due(SimpleNamespace(step=90, now=1902.0)) and saver.due(SimpleNamespace(step=91, now=1903.0))


@pytest.mark.parametrize("every", ["often", "0", "-5", "m", "1.5m"])
def test_what_save_every_takes_is_said(every):
    with pytest.raises(ValueError, match=f"save_every takes steps, as in 500, or minutes, as in 15m; got '{every}'"):
        Setup(save_every=every)


def test_best_is_the_checkpoint_of_the_highest_accuracy(images, tmp_path, monkeypatch):
    accuracies, weights = iter([0.3, 0.6, 0.5]), []

    def judge(model, batches, amp):
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
        return train.Evaluation(next(accuracies), 1.0, torch.zeros(13, dtype=torch.long), batches.image_set.labels)

    monkeypatch.setattr(train, "evaluate", judge)
    run(images, tmp_path, replace(TINY, ema_decay=0.0))
    assert equal(load_model(tmp_path / "best.pt")[0].state_dict(), weights[1])
    assert "optimizer" not in records.load_checkpoint(tmp_path / "best.pt")


# ---- Damage


def stop_after(monkeypatch, step):
    """Stop without saving, as when the power fails."""
    plain_step = Run.train_step

    def crash(self, x, y):
        if self.step == step:
            raise RuntimeError("power failure")
        return plain_step(self, x, y)

    monkeypatch.setattr(Run, "train_step", crash)


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(images, tmp_path, monkeypatch, capsys, damage):
    whole = run(images, tmp_path / "whole", EVERYTHING_RANDOM)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_after(patch, 12)
        run(images, tmp_path / "run", EVERYTHING_RANDOM)
    newest, before = (tmp_path / "run" / name for name in ("checkpoint.pt", "checkpoint.1.pt"))
    newest.write_bytes(newest.read_bytes()[:3000]) if damage == "cut off" else newest.unlink()
    resumed = run(images, tmp_path / "run", EVERYTHING_RANDOM, resume=True)
    said = f"{newest} is cut off" if damage == "cut off" else f"there is no {newest}"
    out = capsys.readouterr().out
    assert said in out and f"going on from {before}, of step 5" in out and "continuing at step 5" in out
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    assert steps(tmp_path / "run") == [15, 10]
    assert (tmp_path / "run" / "checkpoint.broken").exists() == (damage == "cut off")  # it has pushed out no good one
    with open(tmp_path / "run" / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10", "15"]


def test_if_all_checkpoints_are_damaged_all_are_named(images, tmp_path):
    for name in ("checkpoint.pt", "checkpoint.1.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is cut off.*; .*checkpoint\.1\.pt is cut off"):
        run(images, tmp_path, resume=True)


def fill(path: Path) -> None:
    """What is written to `path` next meets a full disk."""
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/dev/full")


@full_disk
def test_a_full_disk_does_not_end_a_run_and_the_checkpoint_before_stays(images, tmp_path, monkeypatch, capsys):
    plain_step = Run.train_step

    def step(self, x, y):
        if self.step == 7:
            fill(tmp_path / "checkpoint.partial")
        return plain_step(self, x, y)

    monkeypatch.setattr(Run, "train_step", step)
    history = run(images, tmp_path)
    error = capsys.readouterr().err
    assert f"at step 10 {tmp_path / 'checkpoint.pt'} could not be written: [Errno 28] No space left on device" in error
    assert f"the newest checkpoint stays {tmp_path / 'checkpoint.pt'}; training goes on" in error
    assert len(history.rows) == 3 and steps(tmp_path) == [15, 5]  # what filled the disk is gone in time for the last


@full_disk
def test_the_last_checkpoint_has_to_be_written(images, tmp_path, monkeypatch):
    plain_step = Run.train_step

    def step(self, x, y):
        if self.step == 14:
            fill(tmp_path / "checkpoint.partial")
        return plain_step(self, x, y)

    monkeypatch.setattr(Run, "train_step", step)
    with pytest.raises(OSError, match=r"could not be written.*No space left.*the newest checkpoint stays"):
        run(images, tmp_path)
    assert steps(tmp_path) == [10, 5]


@full_disk
def test_a_log_that_cannot_be_written_stays_as_it_was(images, tmp_path, monkeypatch, capsys):
    plain_step = Run.train_step

    def step(self, x, y):
        if self.step == 12:
            fill(tmp_path / "log.partial")
        return plain_step(self, x, y)

    monkeypatch.setattr(Run, "train_step", step)
    run(images, tmp_path)
    assert "warning: the log was not written: [Errno 28]" in capsys.readouterr().err
    with open(tmp_path / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10"]


def test_other_errors_of_writing_keep_their_reason(tmp_path, monkeypatch):
    def fail(state, file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"could not be written.*Input/output error"):
        records.save_checkpoint({"weights": {}}, tmp_path / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


def test_the_images_of_a_step_that_failed_can_be_loaded_and_fail_again(images, tmp_path, monkeypatch):
    plain_step = Run.train_step

    def poisoned(self, x, y):
        if self.step == 4:
            self.model.head.weight.data[0] = float("inf")
        return plain_step(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", poisoned)
        with pytest.raises(FloatingPointError, match=r"the loss is nan at step 4, .*; the images are in (.*)") as error:
            run(images, tmp_path)
    batch = torch.load(str(error.value).rpartition(" ")[2], weights_only=True)
    again = new_run(TINY, images)
    again.model.load_state_dict(batch["weights"])
    with pytest.raises(FloatingPointError):
        again.train_step(batch["x"], batch["y"])


# ---- Weights & Biases


def test_weights_and_biases_gets_the_rows_and_the_recipe(images, tmp_path, monkeypatch):
    calls = []

    class Online:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Online()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    history = run(images, tmp_path / "mine", setup=Setup(wandb="book"))
    options, *rows, last = calls
    assert (options["project"], options["id"], options["resume"]) == ("book", "mine", "allow")
    assert options["config"]["recipe"]["epochs"] == 3 and last == "finished"
    assert [(step, values["ema_top1"]) for step, values in rows] == [
        (row["step"], row["ema_top1"]) for row in history.rows
    ]


def test_without_its_package_weights_and_biases_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--wandb needs another package: pip install wandb"):
        train.main(["--wandb", "book", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "run")])


def test_the_command_of_a_result_names_what_started_it(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "convnext_min.train", "--epochs", "1"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = environment.environment()["command"]
    assert command == ["torchrun", "--nproc-per-node", "2", "-m", "convnext_min.train", "--epochs", "1"]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert environment.environment()["command"][:2] == ["python", "-u"]


def test_a_result_names_the_commit_of_this_repository_and_of_no_other(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    installed = tmp_path / "site-packages" / "convnext_min" / "records.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "not ours"]
    subprocess.run(["git", "-C", tmp_path, *options], check=True)
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert environment.environment()["commit"] is None
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    assert len(environment.environment()["commit"].removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.environment()["commit"] is None  # there is no git
