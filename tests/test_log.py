"""The log of a run, and the batch of a step that failed."""

import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, new_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convnext_min.train import RunConfig, train
from convnext_min.train.__main__ import main
from convnext_min.train.log import wandb_id


def run(images, folder, **options):
    return train("convnext_atto", TINY, images, images.subset(slice(13)), folder, **options)


def test_the_images_of_a_step_that_failed_can_be_loaded_and_fail_again(images, tmp_path):
    def poison(trainer):
        if trainer.step == 4:
            trainer.model.head.weight.data[0] = float("inf")

    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at iteration 4, .*; the images are in (.*)"
    ) as error:
        run(images, tmp_path, after_step=poison)
    batch = torch.load(str(error.value).rpartition(" ")[2], weights_only=True)
    again = new_trainer(TINY, images)
    again.model.load_state_dict(batch["weights"])
    with pytest.raises(FloatingPointError):
        again.train_step(batch["x"], batch["y"])


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
    history = run(images, tmp_path / "mine", config=RunConfig(wandb="book"))
    options, *rows, last = calls
    assert (options["project"], options["name"], options["resume"]) == ("book", "mine", "allow")
    assert options["config"]["recipe"]["epochs"] == 3 and last == "finished"
    assert [(step, values["ema_top1"]) for step, values in rows] == [
        (row["step"], row["ema_top1"]) for row in history.rows
    ]


def test_two_folders_of_the_same_name_are_two_runs_of_weights_and_biases(tmp_path):
    one, other = (wandb_id(tmp_path / parent / "first") for parent in "ab")
    assert one != other and one.startswith("first-") and one == wandb_id(tmp_path / "a" / "first")


def test_a_run_resumed_at_the_end_of_an_epoch_keeps_its_row_in_tensorboard(images, tmp_path):
    def stop(trainer):
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path, after_step=stop)
    run(images, tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train_loss")
    assert [event.step for event in events] == [5, 10, 15]


def test_without_its_package_weights_and_biases_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--wandb needs another package: pip install wandb"):
        main(["--wandb", "book", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "run")])
