"""Whole runs: stopped and resumed, of some minutes, and what they leave."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import EVERYTHING_RANDOM, TINY, equal
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from convnext_min.data import Batches, ImageSet
from convnext_min.recipes import Recipe
from convnext_min.train import RunConfig, clock, create_model, distributed, loop, train
from convnext_min.train.checkpoint import load_checkpoint


class NotedBatches(Batches):
    """Batches that note the sizes and labels that were taken from them."""

    def epoch(self, epoch=0, start=0):
        for x, y in super().epoch(epoch, start):
            self.seen.append((x.shape[-1], y.tolist()))
            yield x, y


def test_resolution_changes_within_an_epoch_without_losing_or_repeating_a_batch(images):
    seen = {}
    for progressive in ((), ((0.2, 32), (0.5, 40))):
        batches = NotedBatches(images, TINY.batch_size, 48, train=True)
        batches.seen = seen[progressive] = []
        train("convnext_atto", replace(TINY, progressive=progressive, resolution=48), batches, images)
    sizes = [size for size, _ in seen[((0.2, 32), (0.5, 40))]]
    assert sizes == [32] * 3 + [40] * 5 + [48] * 7  # of 15 steps; the changes at 20% and 50% fall inside epochs
    assert [labels for _, labels in seen[()]] == [labels for _, labels in seen[((0.2, 32), (0.5, 40))]]


# ---- Runs that are stopped


@pytest.mark.parametrize("number", loop.STOP_CODES)
@pytest.mark.parametrize("stop_at", [5, 8])  # at the end of an epoch, and within one
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(images, tmp_path, number, stop_at):
    arguments = ("convnext_atto", EVERYTHING_RANDOM, images, images.subset(slice(16)))
    whole = train(*arguments, tmp_path / "whole", seed=3)

    def request(trainer):
        if trainer.step == stop_at:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match=f"stopped after iteration {stop_at}, saved in"):
        train(*arguments, tmp_path / "parts", seed=3, after_step=request)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    torch.rand(7)  # whatever else draws random numbers does not matter
    parts = train(*arguments, tmp_path / "parts", seed=3, resume=True)

    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert equal(one["weights"], two["weights"]) and equal(one["ema"], two["ema"])
    moments = one["optimizer"]["state"], two["optimizer"]["state"]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) == len(list(whole.model.parameters()))
    for a, b in zip(*(state.values() for state in moments)):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) and torch.equal(a["step"], b["step"])
    assert len(whole.rows) == 3
    for a, b in zip(whole.rows, parts.rows):
        for measured in ("seconds", "images_per_second", "memory_gb"):
            a.pop(measured), b.pop(measured)
        assert a == b
    assert torch.equal(whole.predictions, parts.predictions)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "lamb"])
def test_runs_with_other_optimizers_resume_bit_for_bit(images, tmp_path, optimizer):
    def request(trainer):
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)

    run = ("convnext_atto", replace(TINY, epochs=1, optimizer=optimizer, betas=None), images, images)
    whole = train(*run)
    with pytest.raises(KeyboardInterrupt):
        train(*run, tmp_path, after_step=request)
    assert equal(train(*run, tmp_path, resume=True).model.state_dict(), whole.model.state_dict())


def test_a_checkpoint_of_a_smaller_network_is_refused(images, tmp_path):
    def network(*layers):
        return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(), *layers, nn.Linear(8 * 16, 10))

    recipe = replace(TINY, epochs=1)
    train(network(nn.Identity()), recipe, images, images, tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint is of another network: it has no 2\.weight, 2\.bias"):
        train(network(nn.LayerNorm(8 * 16)), recipe, images, images, tmp_path, resume=True)


def test_another_seed_gives_other_weights(images):
    one, two = (train("convnext_atto", replace(TINY, epochs=1), images, images, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.model.head.weight, two.model.head.weight)


def test_a_run_is_neither_overwritten_nor_continued_as_another(images, tmp_path):
    once = replace(TINY, epochs=1)
    train("convnext_atto", once, images, images, tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a run: continue it with --resume"):
        train("convnext_atto", once, images, images, tmp_path)
    with pytest.raises(ValueError, match="its seed is 0, here it is 1"):
        train("convnext_atto", once, images, images, tmp_path, seed=1, resume=True)
    with pytest.raises(ValueError, match=r"its recipe is \{'epochs': 1\}, here it is \{'epochs': 2\}"):
        train("convnext_atto", replace(TINY, epochs=2), images, images, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"its source is .*train: 40.*, here it is .* 30 of them"):
        train("convnext_atto", once, images.subset(slice(30)), images, tmp_path, resume=True)


def test_resuming_a_finished_run_only_reports(images, tmp_path, capsys):
    first = train("convnext_atto", TINY, images, images, tmp_path)
    again = train("convnext_atto", TINY, images, images, tmp_path, resume=True)
    assert again.top1 == first.top1 and len(again.rows) == 3
    assert "continuing at iteration 15" in capsys.readouterr().out


def test_only_a_later_second_request_stops_without_saving(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(time=lambda: now.seconds))
    with pytest.raises(KeyboardInterrupt), loop.stop_requests() as requests:
        signal.raise_signal(signal.SIGINT)
        now.seconds = 1.0
        signal.raise_signal(signal.SIGINT)  # torchrun passes on what the terminal sent to all
        assert len(requests) == 2
        now.seconds = 3.0
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still going on")


# ---- Runs of a number of minutes


class FakeTime:
    """A clock whose seconds pass only in training steps, one in each."""

    seconds = 0.0

    def time(self):
        return self.seconds

    def tick(self, trainer):
        self.seconds += 1


@pytest.fixture
def fake_time(monkeypatch):
    now = FakeTime()
    monkeypatch.setattr(clock, "time", now)
    monkeypatch.setattr(loop, "evaluation_seconds", lambda *_: 4.0)
    return now


TIMED = {"config": RunConfig(started=0.0)}


def test_a_timed_run_fits_its_schedule_between_start_and_evaluation(images, fake_time):
    fake_time.seconds = 10.0  # until the first step
    history = train("convnext_atto", replace(TINY, minutes=0.5), images, images, after_step=fake_time.tick, **TIMED)
    steps = 30 - 10 - 4 - clock.WRITING_SECONDS
    assert history.rows[-1]["step"] == steps
    assert history.rows[-1]["lr"] == TINY.lr_at((steps - 1) / steps)
    assert history.rows[0]["lr"] == TINY.lr_at(4 / steps)  # after the 5 steps of the first epoch
    assert history.rows[-1]["top1"] is None and history.rows[-1]["ema_top1"] == history.top1


def test_a_timed_run_that_ends_while_it_writes_reports_the_weights_it_has(images, fake_time, monkeypatch):
    judged, plain_write, plain_evaluate = [], loop.Log.write, loop.evaluate

    def slow_write(self, rows):
        plain_write(self, rows)
        fake_time.seconds += 10 * (len(rows) == 3)

    def judge(model, *arguments, **options):
        judged.append(model.head.weight.clone())
        return plain_evaluate(model, *arguments, **options)

    monkeypatch.setattr(loop.Log, "write", slow_write)
    monkeypatch.setattr(loop, "evaluate", judge)
    history = train("convnext_atto", replace(TINY, minutes=0.5), images, images, after_step=fake_time.tick, **TIMED)
    assert [row["ema_top1"] is None for row in history.rows] == [False, False, True]  # no time for it at step 15
    assert torch.equal(judged[-1], history.model.head.weight)


def test_a_timed_run_that_is_resumed_counts_the_time_before(images, fake_time, tmp_path):
    recipe = replace(TINY, minutes=0.5)

    def stop(trainer):
        fake_time.tick(trainer)
        if trainer.step == 7:
            signal.raise_signal(signal.SIGINT)

    run = ("convnext_atto", recipe, images, images, tmp_path)
    fake_time.seconds = 3.0  # until the first iteration
    with pytest.raises(KeyboardInterrupt):
        train(*run, after_step=stop, **TIMED)
    fake_time.seconds = 100.0
    history = train(*run, resume=True, config=RunConfig(started=98.0), after_step=fake_time.tick)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds_to_first_iteration"] == 3.0  # of the first process
    assert history.rows[-1]["step"] == 30 - 4 - clock.WRITING_SECONDS - 3 - 2  # the processes took 3 s and 2 s to start
    assert history.rows[-1]["seconds"] == 26 - clock.WRITING_SECONDS


def test_a_timed_run_without_time_to_train_says_what_takes_it(images, fake_time):
    fake_time.seconds = 5.0
    with pytest.raises(ValueError, match=r"minutes=0.1 leaves no time to train: the start took 5 s, .* take 9 s"):
        train("convnext_atto", replace(TINY, minutes=0.1), images, images, **TIMED)


# ---- What goes in and comes out


def test_a_run_leaves_its_log_its_curve_and_what_it_takes_to_repeat_it(images, tmp_path, capsys):
    history = train("convnext_atto", replace(TINY, evaluate_every=2), images, images, tmp_path, seed=5)
    assert {path.name.partition(".tfevents")[0] for path in tmp_path.iterdir()} == {
        "best.pt",
        "checkpoint.1.pt",
        "checkpoint.pt",
        "curve.png",
        "events.out",
        "log.csv",
        "summary.json",
        "predictions.npz",
    }
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1.0", "2.0", "3.0"]
    assert [bool(row["top1"]) for row in rows] == [False, True, True]  # every second epoch and at the end
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("ema_top1")
    assert [(event.step, event.value) for event in events] == [
        (row["step"], pytest.approx(row["ema_top1"])) for row in history.rows[1:]
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["top1"], summary["seed"], summary["steps"], summary["images"]) == (history.top1, 5, 15, 40)
    assert Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in summary["recipe"].items()})
    assert summary["versions"]["torch"] == torch.__version__ and "synthetic images, train: 40" in summary["source"]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size[0] > picture.size[1] > 100
    printed = capsys.readouterr().out
    assert f"Top-1 {history.top1:.1%} on 40 validation images (EMA weights), " in printed
    assert "Most confused: " in printed


def test_a_run_whose_last_step_blows_up_has_no_result(images, tmp_path):
    recipe = replace(TINY, epochs=1, batch_size=40, base_lr=1e30, warmup=0.0)  # one step
    with pytest.raises(FloatingPointError, match="outputs are not finite for 40 of 40 images"):
        train("convnext_atto", recipe, images, images, tmp_path)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "summary.json").exists()


def test_a_network_for_one_size_of_image_says_so(images):
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 cannot process images of 32x32 pixels: .*224"):
        train("timm:vit_tiny_patch16_224", Recipe(resolution=32, batch_size=8), images, images)


def test_mixing_needs_images_in_pairs(images):
    odd = ImageSet(images.images[:39], images.labels[:39], images.classes, "39 images")
    with pytest.raises(ValueError, match="mixup and cutmix need an even batch, and there are only 39 images"):
        train("convnext_atto", replace(TINY, batch_size=64, mixup=0.8), odd, images)


def test_classes_must_fit(images):
    other = ImageSet(images.images, images.labels, tuple("abcdefghij"), "other")
    with pytest.raises(ValueError, match=r"the classes in training are \('circle'.*in validation \('a'"):
        train("convnext_atto", TINY, images, other)
    with pytest.raises(
        ValueError, match=r"the data has 10 classes, but for two images ConvNeXt returns a tensor \(2, 7\)"
    ):
        train(create_model("convnext_atto", TINY, 7), TINY, images, images)


def test_a_network_of_ones_own_is_trained_in_place(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(), nn.Linear(8 * 16, 10))
    before = model[0].weight.clone()
    history = train(model, replace(TINY, ema_decay=0.0), images, images)
    assert history.model is model and not torch.equal(before, model[0].weight)
    assert history.rows[-1]["ema_top1"] is None and history.rows[-1]["top1"] == history.top1


def test_processes_that_find_different_checkpoints_are_told_to_share_the_folder(monkeypatch):
    trainer, checkpoint = SimpleNamespace(step=3), Path("runs/checkpoint.pt")
    monkeypatch.setattr(distributed, "all_gather_object", lambda step: [step, 3])
    loop.check_same_step(trainer, checkpoint)
    monkeypatch.setattr(distributed, "all_gather_object", lambda step: [step, 0])
    with pytest.raises(ValueError, match="runs must be a shared folder"):
        loop.check_same_step(trainer, checkpoint)
