import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import muon
from torch import nn

from convnext_min import recipes, train
from convnext_min.data import Batches, ImageSet, synthetic_images
from convnext_min.fast import FastDepthwise
from convnext_min.recipes import Recipe
from convnext_min.train import engine, records
from convnext_min.train.engine import Run, Setup, parameter_groups

TINY = Recipe(
    epochs=3,
    batch_size=8,
    base_lr=4e-3,
    base_batch=8,
    warmup=0.2,
    resolution=32,
    eval_resolution=32,
    image_size=32,
    layer_scale_init=1.0,
    depths=(1, 1, 1, 1),
    dims=(8, 8, 16, 16),
    amp="fp32",
)
EVERYTHING_RANDOM = replace(TINY, drop_path=0.3, mixup=0.8, cutmix=1.0, erasing=0.5, clip_grad=1.0)


@pytest.fixture(scope="module")
def images():
    return synthetic_images("train", 32, 40)


def new_run(recipe, images, seed=0, name="convnext_atto", setup=None):
    torch.manual_seed(seed)
    model = train.make_model(name, recipe, len(images.classes))
    batches = Batches(images, recipe.batch_size, recipe.resolution, True, seed, recipe.crop_scale)
    return Run(model, name, recipe, batches, seed, "cpu", 0.0, setup)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- Which parameters decay


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


def decayed_names(model):
    decayed, free = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(map(id, decayed["params"] + free["params"])) == sorted(names)  # each once
    return {names[id(parameter)] for parameter in decayed["params"]}


def test_weights_of_convolutions_and_linear_layers_decay_and_nothing_else():
    names = decayed_names(train.make_model("convnext_atto", TINY, 10))
    blocks = {f"stages.{i}.0.{layer}.weight" for i in range(4) for layer in ("dwconv", "pwconv1", "pwconv2")}
    assert names == blocks | {f"downsample_layers.{i}.{int(i > 0)}.weight" for i in range(4)} | {"head.weight"}


def test_layer_scale_of_torchvision_does_not_decay_though_it_has_three_dimensions():
    model = torchvision.models.convnext_tiny()
    scales = {name for name, parameter in model.named_parameters() if name.endswith("layer_scale")}
    assert model.get_parameter(next(iter(scales))).ndim == 3
    assert not scales & decayed_names(model)


def test_a_weight_of_one_dimension_decays_unless_it_is_a_norms():
    model = nn.Sequential(Scale(), nn.LayerNorm(8), nn.Linear(8, 2), nn.BatchNorm1d(2), nn.GroupNorm(1, 2))
    assert decayed_names(model) == {"0.weight", "2.weight"}


def test_frozen_parameters_are_left_out():
    model = nn.Linear(4, 2)
    model.weight.requires_grad_(False)
    decayed, free = parameter_groups(model, 0.05)
    assert not decayed["params"] and len(free["params"]) == 1


# ---- A step


def test_the_learning_rate_of_a_step_is_the_schedules(images):
    run = new_run(TINY, images)  # 5 steps an epoch, 15 in all
    rates = []
    for epoch in range(3):
        for x, y in run.batches.epoch(epoch):
            run.train_step(x, y)
            rates.append({group["lr"] for group in run.optimizer.param_groups})
    assert rates == [{TINY.lr_at(k / 15)} for k in range(15)]
    assert run.progress == 1.0


def test_averaged_weights_follow_their_recursion(images):
    run = new_run(replace(TINY, ema_horizon=0.5), images)
    weight, mean = run.model.head.weight, None
    for updates, (x, y) in enumerate(run.batches.epoch(0)):
        run.train_step(x, y)
        now = weight.detach().double()
        decay = 1 - 1 / (1 + 0.5 * updates)
        mean = now.clone() if mean is None else decay * mean + (1 - decay) * now
    torch.testing.assert_close(run.best.head.weight.double(), mean, rtol=1e-5, atol=1e-7)
    assert not torch.equal(run.best.head.weight, weight)


def test_averages_hold_the_running_statistics_of_batch_norm(images):
    of_road = {"depths": None, "dims": None, "layer_scale_init": Recipe.layer_scale_init, "width_multiplier": 0.125}
    recipe = replace(TINY, **of_road)
    run = new_run(recipe, images, name="road:fewer_norms")
    for x, y in run.batches.epoch(0):
        run.train_step(x, y)
    norm = run.best.stages[0][0].norm
    assert norm.running_mean.abs().max() > 0
    assert int(norm.num_batches_tracked) <= 5


def test_on_a_cpu_depthwise_convolutions_are_accelerated(images):
    run = new_run(TINY, images)
    assert isinstance(run.model.stages[0][0].dwconv, FastDepthwise)
    assert "accelerated" in str(run)
    plain = new_run(TINY, images, setup=Setup(accelerate=False))
    assert type(plain.model.stages[0][0].dwconv) is nn.Conv2d
    assert "accelerated" not in str(plain)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(images):
    run = new_run(TINY, images)
    x, y = next(run.batches.epoch(0))
    run.train_step(x, y)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1, at learning rate"):
        run.train_step(x * float("nan"), y)
    assert equal(before, run.model.state_dict())


def test_gradients_are_clipped_only_if_asked(images):
    x, y = next(new_run(TINY, images).batches.epoch(0))
    norms = {}
    for clip in (None, 1e-3):
        run = new_run(replace(TINY, clip_grad=clip), images)

        def note(optimizer, args, kwargs, clip=clip):
            grads = [parameter.grad.flatten() for group in optimizer.param_groups for parameter in group["params"]]
            norms[clip] = torch.cat(grads).norm().item()

        run.optimizer.register_step_pre_hook(note)
        run.train_step(x, y)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3) and norms[None] > 0.1


def test_overfits_twenty_images(images):
    few = images.subset(slice(20))
    recipe = replace(TINY, epochs=100, batch_size=20, base_batch=20, dims=(16, 16, 32, 32), label_smoothing=0.0)
    run = new_run(replace(recipe, crop_scale=(0.8, 1.0)), few)
    first = last = None
    for epoch in range(100):
        for x, y in run.batches.epoch(epoch):
            last = run.train_step(x, y)
            first = first or last
    assert first > 2.0 and last < 0.2
    assert train.evaluate(run.model, Batches(few, 7, 32, train=False)).top1 == 1.0


def test_resolution_changes_within_an_epoch_without_losing_or_repeating_a_batch(images, monkeypatch):
    seen = {}
    plain_step = Run.train_step

    def note(self, x, y):
        seen.setdefault(self.recipe.progressive, []).append((x.shape[-1], y.tolist()))
        return plain_step(self, x, y)

    monkeypatch.setattr(Run, "train_step", note)
    for progressive in ((), ((0.2, 32), (0.5, 40))):
        train.train("convnext_atto", replace(TINY, progressive=progressive, resolution=48), images, images)
    sizes = [size for size, _ in seen[((0.2, 32), (0.5, 40))]]
    assert sizes == [32] * 3 + [40] * 5 + [48] * 7  # of 15 steps; the changes at 20% and 50% fall inside epochs
    assert [labels for _, labels in seen[()]] == [labels for _, labels in seen[((0.2, 32), (0.5, 40))]]


# ---- Evaluation


def test_evaluation_counts_every_image_once_and_restores_the_mode(images):
    model = train.make_model("convnext_atto", TINY, 10)
    few = images.subset(slice(25))
    result = train.evaluate(model, Batches(few, 8, 32, train=False), amp="fp32")
    assert model.training
    with torch.no_grad():
        logits = torch.cat([model.eval()(x) for x, _ in Batches(few, 25, 32, train=False).epoch()])
    assert torch.equal(result.predictions, logits.argmax(1))
    assert result.top1 == (result.predictions == few.labels).sum().item() / 25
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, few.labels).item(), rel=1e-5)


def test_nothing_is_confused_where_all_answers_are_right():
    labels = torch.tensor([0, 1, 2])
    assert records.most_confused(labels, labels, ("tench", "horn", "pump")) == "none, all answers are right"


def test_most_confused_counts_both_directions():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    predictions = torch.tensor([0, 1, 1, 0, 1, 0, 0, 2])
    text = records.most_confused(predictions, labels, ("tench", "horn", "pump"))
    assert text == "tench taken for horn 2 times, horn for tench 1 times"


# ---- Runs that are stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_at", [5, 8])  # at the end of an epoch, and within one
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(images, tmp_path, monkeypatch, number, stop_at):
    arguments = ("convnext_atto", EVERYTHING_RANDOM, images, images.subset(slice(16)))
    whole = train.train(*arguments, tmp_path / "whole", seed=3)
    plain_step = Run.train_step

    def stopping_step(self, x, y):
        loss = plain_step(self, x, y)
        if self.step == stop_at:
            signal.raise_signal(number)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", stopping_step)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop_at}, saved in"):
            train.train(*arguments, tmp_path / "parts", seed=3)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    torch.rand(7)  # whatever else draws random numbers does not matter
    parts = train.train(*arguments, tmp_path / "parts", seed=3, resume=True)

    one, two = (records.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert equal(one["weights"], two["weights"]) and equal(one["ema"], two["ema"])
    for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    assert len(whole.rows) == 3
    for a, b in zip(whole.rows, parts.rows):
        for measured in ("seconds", "images_per_second", "memory_gb"):
            a.pop(measured), b.pop(measured)
        assert a == b
    assert torch.equal(whole.predictions, parts.predictions)


def test_another_seed_gives_other_weights(images):
    one, two = (train.train("convnext_atto", replace(TINY, epochs=1), images, images, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.model.head.weight, two.model.head.weight)


def folder_of_images(root: Path) -> Path:
    for split, number in (("train", 96), ("val", 16)):
        sample = synthetic_images(split, 32, number)
        for i, (pixels, label) in enumerate(zip(sample.images, sample.labels)):
            folder = root / split / f"class{label % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


def command(*arguments):
    settings = ["dims=(8,8,16,16)", "depths=(1,1,1,1)", "image_size=32", "resolution=32", "eval_resolution=32"]
    settings += ["batch_size=4", "drop_path=0.2"]
    return [sys.executable, "-m", "convnext_min.train", *arguments, "--set", *settings]


def test_control_c_saves_and_says_how_to_go_on(tmp_path):
    """That the weights are those of an uninterrupted run is tested above, for the same signal in this process."""
    folder_of_images(tmp_path / "data")
    options = {"cwd": Path(__file__).parents[1], "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    arguments = ("--data", str(tmp_path / "data"), "--epochs", "6", "--output", str(tmp_path / "run"))
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True, **options) as process:
        for line in process.stdout:
            if line.startswith("epoch 2:"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    stopped = int(re.search(r"stopped after step (\d+), saved in", rest)[1])
    assert 48 <= stopped < 144  # 24 steps an epoch
    again = re.search(r"To go on: python (.*)", rest)[1]
    go_on = [sys.executable, *shlex.split(again)]
    assert f"continuing at step {stopped}" in subprocess.check_output(go_on, text=True, **options)
    assert records.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 144


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    records.save_checkpoint({"weights": {}, "step": 1}, path)

    def crash(state, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space left"):
        records.save_checkpoint({"weights": {}, "step": 2}, path)
    assert records.read(path)["step"] == 1


def test_a_checkpoint_that_is_cut_off_or_something_else_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    records.save_checkpoint({"weights": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"{path} is cut off"):
        records.load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=rf"{path} holds no checkpoint"):
        records.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        records.load_checkpoint(tmp_path / "none.pt")


def test_a_run_is_neither_overwritten_nor_continued_as_another(images, tmp_path):
    once = replace(TINY, epochs=1)
    train.train("convnext_atto", once, images, images, tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a run: continue it with --resume"):
        train.train("convnext_atto", once, images, images, tmp_path)
    with pytest.raises(ValueError, match="its seed is 0, here it is 1"):
        train.train("convnext_atto", once, images, images, tmp_path, seed=1, resume=True)
    with pytest.raises(ValueError, match=r"its recipe is \{'epochs': 1\}, here it is \{'epochs': 2\}"):
        train.train("convnext_atto", replace(TINY, epochs=2), images, images, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"its source is .* 40 drawn.*, here it is .* 30 of them"):
        train.train("convnext_atto", once, images.subset(slice(30)), images, tmp_path, resume=True)


def test_resuming_a_finished_run_only_reports(images, tmp_path, capsys):
    first = train.train("convnext_atto", TINY, images, images, tmp_path)
    again = train.train("convnext_atto", TINY, images, images, tmp_path, resume=True)
    assert again.top1 == first.top1 and len(again.rows) == 3
    assert "continuing at step 15" in capsys.readouterr().out


# ---- Runs of a number of minutes


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only in training steps, one in each."""
    now = SimpleNamespace(seconds=0.0)
    plain_step = Run.train_step

    def step(self, x, y):
        loss = plain_step(self, x, y)
        now.seconds += 1
        return loss

    monkeypatch.setattr(Run, "train_step", step)
    monkeypatch.setattr(engine, "time", SimpleNamespace(time=lambda: now.seconds))
    monkeypatch.setattr(train, "evaluation_seconds", lambda *_: 4.0)
    return now


def test_a_timed_run_fits_its_schedule_between_start_and_evaluation(images, clock):
    clock.seconds = 10.0  # until the first step
    history = train.train("convnext_atto", replace(TINY, minutes=0.5), images, images, started=0.0)
    steps = 30 - 10 - 4 - engine.WRITING_SECONDS
    assert history.rows[-1]["step"] == steps
    assert history.rows[-1]["lr"] == TINY.lr_at((steps - 1) / steps)
    assert history.rows[0]["lr"] == TINY.lr_at(4 / steps)  # after the 5 steps of the first epoch
    assert history.rows[-1]["top1"] is None and history.rows[-1]["ema_top1"] == history.top1


def test_a_timed_run_that_ends_while_it_writes_reports_the_weights_it_has(images, clock, monkeypatch):
    judged, plain_write, plain_evaluate = [], records.Log.write, train.evaluate

    def slow_write(self, rows):
        plain_write(self, rows)
        clock.seconds += 10 * (len(rows) == 3)

    def judge(model, *arguments):
        judged.append(model.head.weight.clone())
        return plain_evaluate(model, *arguments)

    monkeypatch.setattr(records.Log, "write", slow_write)
    monkeypatch.setattr(train, "evaluate", judge)
    history = train.train("convnext_atto", replace(TINY, minutes=0.5), images, images, started=0.0)
    assert [row["ema_top1"] is None for row in history.rows] == [False, False, True]  # no time for it at step 15
    assert torch.equal(judged[-1], history.model.head.weight)


def test_a_timed_run_that_is_resumed_counts_the_time_before(images, clock, tmp_path, monkeypatch):
    recipe = replace(TINY, minutes=0.5)

    def stop(self, x, y, step=Run.train_step):
        loss = step(self, x, y)
        if self.step == 7:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train("convnext_atto", recipe, images, images, tmp_path, started=0.0)
    clock.seconds = 100.0
    history = train.train("convnext_atto", recipe, images, images, tmp_path, started=98.0, resume=True)
    assert history.rows[-1]["step"] == 30 - 4 - engine.WRITING_SECONDS - 2  # the new process took 2 s to start
    assert history.rows[-1]["seconds"] == 26 - engine.WRITING_SECONDS


def test_a_timed_run_without_time_to_train_says_what_takes_it(images, clock):
    clock.seconds = 5.0
    with pytest.raises(ValueError, match=r"minutes=0.1 leaves no time to train: the start took 5 s, .* take 9 s"):
        train.train("convnext_atto", replace(TINY, minutes=0.1), images, images, started=0.0)


# ---- What goes in and comes out


def test_a_run_leaves_its_log_its_curve_and_what_it_takes_to_repeat_it(images, tmp_path, capsys):
    history = train.train("convnext_atto", replace(TINY, evaluate_every=2), images, images, tmp_path, seed=5)
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
    assert summary["versions"]["torch"] == torch.__version__ and "40 drawn images" in summary["source"]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size[0] > picture.size[1] > 100
    printed = capsys.readouterr().out
    assert f"Right on {history.top1:.1%} of 40 validation images" in printed and "Most confused: " in printed


@pytest.mark.parametrize("name", ["road:convnext", "timm:convnext_atto", "torchvision:convnext_tiny"])
def test_models_of_the_road_and_of_other_libraries_have_names(name):
    assert train.make_model(name, Recipe(drop_path=0.1), 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_model_gets_what_the_recipe_says():
    model = train.make_model("convnext_femto", replace(TINY, drop_path=0.2, head_init_scale=0.0), 3)
    assert [len(stage) for stage in model.stages] == [1, 1, 1, 1] and model.stages[3][0].pwconv1.in_features == 16
    assert model.stages[3][0].drop_path.rate == pytest.approx(0.2) and model.stages[0][0].gamma[0] == 1.0
    assert not model.head.weight.any()


def test_wrong_models_say_what_is_right():
    plain = Recipe()
    with pytest.raises(ValueError, match=r"unknown model 'convnext'; valid: convnext_atto,.*road:<step>.*depthwise"):
        train.make_model("convnext", plain, 10)
    with pytest.raises(ValueError, match="unknown step 'kernel13'; valid"):
        train.make_model("road:kernel13", plain, 10)
    with pytest.raises(ValueError, match=r"depths can be set for convnext_atto.*not for 'road:gelu'"):
        train.make_model("road:gelu", TINY, 10)
    for name, changes, message in (
        ("timm:convnext_atto", {"layer_scale_init": 0.2}, "for 'timm:convnext_atto': --set layer_scale_init=1e-06"),
        ("convnext_atto", {"width_multiplier": 0.25}, "width_multiplier can be set for road:<step>, not for"),
        ("timm:convnext_atta", {}, "timm:convnext_atta cannot be made: Unknown model"),
        ("torchvision:vgg11", {"drop_path": 0.1}, "torchvision:vgg11 has no stochastic depth: --set drop_path=0.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            train.make_model(name, replace(plain, **changes), 10)
    assert train.make_model("torchvision:squeezenet1_1", plain, 10)(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_the_recipe_of_make_train_takes_its_steps(images):
    sizes = {key: getattr(TINY, key) for key in ("resolution", "eval_resolution", "image_size", "depths", "dims")}
    recipe = replace(recipes.get("imagenette-3min"), minutes=None, epochs=1, batch_size=8, progressive=(), **sizes)
    run = new_run(recipe, images)
    before = run.model.stages[0][0].pwconv1.weight.detach().clone()
    for x, y in run.batches.epoch(0):  # the first step of the warm-up has a rate of 0
        run.train_step(x, y)
    assert not torch.equal(run.model.stages[0][0].pwconv1.weight, before)


def test_a_network_for_one_size_of_image_says_so(images):
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not take images of 32x32 pixels: .*224"):
        train.train("timm:vit_tiny_patch16_224", Recipe(resolution=32, batch_size=8), images, images)


def test_mixing_needs_images_in_pairs(images):
    odd = ImageSet(images.images[:39], images.labels[:39], images.classes, "39 images")
    with pytest.raises(ValueError, match="mixup and cutmix need an even batch, and there are only 39 images"):
        train.train("convnext_atto", replace(TINY, batch_size=64, mixup=0.8), odd, images)


def test_classes_must_fit(images):
    other = ImageSet(images.images, images.labels, tuple("abcdefghij"), "other")
    with pytest.raises(ValueError, match=r"the classes in training are \('circle'.*in validation \('a'"):
        train.train("convnext_atto", TINY, images, other)
    with pytest.raises(
        ValueError, match=r"the data has 10 classes, but for two images ConvNeXt gives a tensor \(2, 7\)"
    ):
        train.train(train.make_model("convnext_atto", TINY, 7), TINY, images, images)


def test_a_network_of_ones_own_is_trained_in_place(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(), nn.Linear(8 * 16, 10))
    before = model[0].weight.clone()
    history = train.train(model, replace(TINY, ema_decay=0.0), images, images)
    assert history.model is model and not torch.equal(before, model[0].weight)
    assert history.rows[-1]["ema_top1"] is None and history.rows[-1]["top1"] == history.top1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "imagenet"], "error: unknown recipe 'imagenet'; valid: imagenette"),
        (["--model", "resnet50"], "error: unknown model 'resnet50'; valid: convnext_atto"),
        (["--data", "nowhere"], "error: nowhere not found in the given path"),
        (["--epochs", "many"], "error: epochs takes int, got 'many'"),
        (["--set", "lr=1"], "error: cannot set 'lr=1'"),
        (["--set", "crop_scale=(0.9,0.1)"], "error: crop_scale must be two growing fractions above 0 and at most 1"),
        (["--set", "betas=(0.9,2.0)"], "error: betas must be at least 0 and below 1, got (0.9, 2.0)"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_a_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)):
        train.main(arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_a_used_folder_before_it_reads_images(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(SystemExit, match="holds a run"):
        train.main(["--output", str(tmp_path), "--data", "nowhere"])


def test_the_precision_can_be_forced_and_fp16_is_for_gpus():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [engine.autocast_dtype(amp, cpu) for amp in ("bf16", "fp32")] == [torch.bfloat16, None]
    assert engine.autocast_dtype("fp16", gpu) == torch.float16
    with pytest.raises(ValueError, match="amp=fp16 is for GPUs, and this runs on cpu: take bf16 or fp32"):
        engine.autocast_dtype("fp16", cpu)


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_computes_in_bfloat16_only_where_the_machine_does(able, dtype, images, monkeypatch):
    """Without instructions for it, a step in bfloat16 takes seconds."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    spy = Mock(wraps=muon.zeropower_via_newtonschulz)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", spy)
    run = new_run(replace(TINY, optimizer="muon"), images)
    run.train_step(*next(iter(run.batches.epoch(0))))
    assert {call.kwargs["dtype"] for call in spy.call_args_list} == {dtype}
    assert muon.zeropower_via_newtonschulz is spy  # and not what a step puts in its place


# ---- The machine


def test_the_scaler_of_fp16_leaves_the_steps_and_is_part_of_the_checkpoint(images):
    plain, scaled = new_run(replace(TINY, clip_grad=0.5), images), new_run(replace(TINY, clip_grad=0.5), images)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)  # fp16 itself needs a GPU
    for x, y in plain.batches.epoch(0):
        assert scaled.train_step(x, y) == pytest.approx(plain.train_step(x, y), rel=1e-5)
    torch.testing.assert_close(dict(scaled.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-4, atol=1e-5)
    other = new_run(replace(TINY, clip_grad=0.5), images)
    other.scaler = torch.amp.GradScaler("cpu")
    other.load(scaled.state())
    assert other.scaler.get_scale() == 4096.0  # doubled twice in five steps


def test_compiling_changes_neither_the_result_nor_the_names_of_the_weights(images, monkeypatch):
    compiled = []
    plain_compile = torch.compile  # "eager" traces and wraps, without generating code
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or plain_compile(net, backend="eager"))
    setup = engine.Setup(compile=True)
    run, plain = new_run(TINY, images, setup=setup), new_run(TINY, images)
    assert (
        compiled == [run.model] and type(run.model.stages[0][0].dwconv) is nn.Conv2d
    )  # the compiler gets plain layers
    for x, y in plain.batches.epoch(0):
        run.train_step(x, y), plain.train_step(x, y)
    torch.testing.assert_close(dict(run.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-4, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradients_where_blocks_draw(images):
    setup = engine.Setup(checkpoint_activations=True)
    run, plain = new_run(EVERYTHING_RANDOM, images, setup=setup), new_run(EVERYTHING_RANDOM, images)
    kept = []
    for each in (run, plain):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            for x, y in each.batches.epoch(0):
                each.train_step(x, y)
        kept.append("end")
    assert equal(run.model.state_dict(), plain.model.state_dict())
    first, second = kept[: kept.index("end")], kept[kept.index("end") + 1 : -1]
    assert sum(first) < sum(second) / 2


def test_random_erasing_is_left_to_a_loader_that_does_it(images):
    recipe = replace(TINY, erasing=0.5)
    assert new_run(recipe, images).erase is not None
    batches = Batches(images, 8, 32, True)
    batches.erases = True
    assert Run(train.make_model("convnext_atto", recipe, 10), "", recipe, batches, 0, "cpu", 0.0).erase is None


# ---- The whole command


SMALL = "dims=(8,8,16,16) depths=(1,1,1,1) image_size=32 resolution=32 eval_resolution=32 batch_size=8 drop_path=0.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("data"))


def arguments(folder, output, *more):
    return ["--data", str(folder), "--output", str(output), "--device", "cpu", *more, "--set", *SMALL.split()]


def test_a_dry_run_tries_everything_and_leaves_nothing(folder, tmp_path, capsys):
    train.main(arguments(folder, tmp_path / "runs" / "new", "--dry-run", "--per-device-batch", "4"))
    out = capsys.readouterr().out
    assert "a batch in 2 parts of 4" in out
    assert re.search(r"OK: a batch .* s, a step .* s, saving .* s, loading .* s, evaluating a batch .* s; .* GB", out)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_some_minutes_has_no_window(folder, tmp_path, capsys):
    train.main(arguments(folder, tmp_path / "new", "--dry-run", "--minutes", "3"))
    assert "OK: a batch" in capsys.readouterr().out


def test_the_time_of_an_evaluation_has_what_comes_once_in_it_once(monkeypatch):
    now = SimpleNamespace(seconds=0.0)

    def evaluate(model, batches, amp, limit):
        now.seconds += 5.0 + 0.25 * limit  # processes that read images start, then a batch takes its time

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    for number in (1, 2, 40):
        assert train.evaluation_seconds(None, range(number), "fp32") == pytest.approx(5.0 + 0.25 * number)


def test_a_recipe_of_the_paper_reads_its_images_from_the_disk(folder, tmp_path, capsys):
    more = ("--recipe", "in1k", "--epochs", "1", "--workers", "0")
    train.main(arguments(folder, tmp_path / "run", *more))
    assert "read from the disk" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["images"] == 16 and summary["recipe"]["rand_augment"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device", "gpu"), "error: device 'gpu' cannot be used here"),
        (("--per-device-batch", "3"), "error: a batch of 8 images cannot be made up of parts of 3 images"),
        (("--per-device-batch", "0"), "error: a batch of 8 images cannot be made up of parts of 0 images"),
        (("--finetune", "none.pt"), "error: there is no none.pt"),
        (("--fsdp",), "error: --fsdp splits the network over processes: start several, with torchrun"),
        (("--save-every", "often"), "error: save_every takes steps"),
        (("--keep", "0"), "error: keep must be at least 1, got 0"),
        (("--set", "amp=fp16"), "error: amp=fp16 is for GPUs, and this runs on cpu"),
        (("--set", "loader=disk", "--workers", "0", "--set", "batch_size=1000"), "error: a batch of 1000 is more than"),
    ],
)
def test_what_does_not_work_is_said_in_a_line(folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        train.main([*arguments(folder, tmp_path / "run"), *more])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_sigterm_exits_with_a_code_for_the_cluster(folder, tmp_path, monkeypatch, capsys):
    plain_step = Run.train_step

    def asked(self, x, y):
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain_step(self, x, y)

    monkeypatch.setattr(Run, "train_step", asked)
    with pytest.raises(SystemExit) as code:
        train.main(arguments(folder, tmp_path / "run"))
    assert code.value.code == 143 and "stopped after step 3, saved in" in capsys.readouterr().out


def test_only_a_later_second_request_stops_without_saving(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(engine, "time", SimpleNamespace(time=lambda: now.seconds))
    with pytest.raises(KeyboardInterrupt), engine.stop_requests() as requests:
        signal.raise_signal(signal.SIGINT)
        now.seconds = 1.0
        signal.raise_signal(signal.SIGINT)  # torchrun passes on what the terminal sent to all
        assert len(requests) == 2
        now.seconds = 3.0
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still going on")


def test_the_classic_recipe_is_sgd_with_momentum_and_its_own_decay(images):
    recipe = replace(recipes.get("road-classic"), epochs=1, resolution=32, eval_resolution=32, batch_size=20)
    run, _ = train.prepare("road:resnet50", recipe, images, images)
    (decayed, free), optimizer = run.optimizer.param_groups, run.optimizer
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0.0)
    before = run.model.stem[0].weight.detach().clone()
    run.train_step(*next(run.batches.epoch(0)))
    assert not torch.equal(run.model.stem[0].weight, before)


def test_a_run_begins_with_its_plan_and_warns_of_a_rate_far_above_the_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path / "data")
    rates = ["--set", "base_batch=1", "batch_size=8", "evaluate_every=0"]
    train.main(command("--data", "data", "--epochs", "1", "--device", "cpu", "--per-device-batch", "4")[3:] + rates)
    out = capsys.readouterr().out
    assert "1 process with 4 images at a time, 2 times accumulated: 8 images a step" in out
    assert "warning: the learning rate 0.016 is 64 times that of the rule, 0.00025 for 8 images" in out
