"""The command `python -m convnext_min.train`."""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import command, folder_of_images, options
from safetensors.torch import save_file

from convnext_min import recipes, weights
from convnext_min.convnext import ConvNeXt
from convnext_min.data import disk
from convnext_min.train import create_model, evaluate, loop
from convnext_min.train.__main__ import check_classes, main, read_arguments, read_images
from convnext_min.train.checkpoint import load_checkpoint


def test_control_c_saves_and_says_how_to_go_on(tmp_path):
    """That the weights are those of an uninterrupted run is tested above, for the same signal in this process."""
    folder_of_images(tmp_path / "data")
    popen = {"cwd": Path(__file__).parents[1], "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    arguments = ("--data", str(tmp_path / "data"), "--epochs", "6", "--output", str(tmp_path / "run"))
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True, **popen) as process:
        for line in process.stdout:
            if line.startswith("epoch 2:"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    stopped = int(re.search(r"stopped after iteration (\d+), saved in", rest)[1])
    assert 48 <= stopped < 144  # 24 steps an epoch
    again = re.search(r"To continue: python (.*)", rest)[1]
    go_on = [sys.executable, *shlex.split(again)]
    assert f"continuing at iteration {stopped}" in subprocess.check_output(go_on, text=True, **popen)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 144


def test_a_command_that_stops_at_once_does_not_wait_for_slow_imports():
    slow = "timm torchvision torch._dynamo torch.distributed.fsdp torch.utils.tensorboard matplotlib"
    code = f"""
import sys
import convnext_min.train.__main__
print(*set("{slow}".split()) & set(sys.modules))
"""
    assert not subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[1]).strip()


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
        main(arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_a_used_folder_before_it_reads_images(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(SystemExit, match="holds a run"):
        main(["--output", str(tmp_path), "--data", "nowhere"])


def test_a_dry_run_tries_everything_and_leaves_nothing(folder, tmp_path, capsys):
    main(options(folder, tmp_path / "runs" / "new", "--dry-run", "--micro-batch", "4"))
    out = capsys.readouterr().out
    assert "2 gradient accumulation steps of 4 images" in out
    assert re.search(r"OK: batch .* s, iteration .* s, save .* s, load .* s, evaluation of a batch .* s; .* GB", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "device"), [("convnext_atto", "meta"), ("timm:convnext_atto", "cpu")])
def test_a_network_is_checked_without_weights_before_images_are_read(model, device, tmp_path, monkeypatch):
    made, main_module = [], sys.modules["convnext_min.train.__main__"]
    monkeypatch.setattr(main_module, "create_model", lambda *args: made.append(create_model(*args)))
    with pytest.raises(SystemExit, match="nowhere not found"):
        main(["--model", model, "--data", "nowhere", "--output", str(tmp_path / "new")])
    assert {parameter.device.type for parameter in made[0].parameters()} == {device}


def test_kernels_are_compiled_while_images_are_read(folder, tmp_path, monkeypatch):
    calls, main_module = [], sys.modules["convnext_min.train.__main__"]
    monkeypatch.setattr(main_module, "compile_ahead", lambda dtype: calls.append(dtype))
    monkeypatch.setattr(main_module, "read_images", lambda *args: calls.append("images") or read_images(*args))
    main(options(folder, tmp_path / "new", "--dry-run", "--set", "amp=bf16"))
    assert calls == [torch.bfloat16, torch.float32, "images"]
    main(options(folder, tmp_path / "new", "--dry-run", "--no-accelerate"))
    assert calls[3:] == ["images"]


def test_a_dry_run_of_some_minutes_has_no_window(folder, tmp_path, capsys):
    main(options(folder, tmp_path / "new", "--dry-run", "--minutes", "3"))
    assert "OK: batch" in capsys.readouterr().out


def test_a_recipe_of_the_paper_reads_its_images_from_the_disk(folder, tmp_path, capsys):
    more = ("--recipe", "in1k", "--epochs", "1", "--workers", "0")
    main(options(folder, tmp_path / "run", *more))
    assert "read from the disk" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["images"] == 16 and summary["recipe"]["rand_augment"]
    assert 0 < summary["seconds_to_first_iteration"] <= summary["seconds"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device", "gpu"), "error: device 'gpu' cannot be used here"),
        (("--micro-batch", "3"), "error: a batch of 8 images cannot be divided into micro-batches of 3 images"),
        (("--micro-batch", "0"), "error: a batch of 8 images cannot be divided into micro-batches of 0 images"),
        (("--finetune", "none.pt"), "error: there are no weights 'none.pt' of convnext_atto: none were released"),
        (("--finetune", "x://a", "--class-map", "none.txt"), "error: there is no none.txt"),
        (("--fsdp",), "error: --fsdp shards the network over processes: start several, with torchrun"),
        (("--save-every", "often"), "error: save_every takes iterations"),
        (("--keep", "0"), "error: keep must be at least 1, got 0"),
        (("--set", "amp=fp16"), "error: amp=fp16 is for GPUs, and this run is on cpu"),
        (
            ("--set", "loader=disk", "--workers", "0", "--set", "batch_size=1000"),
            "error: batch_size=1000 is larger than",
        ),
    ],
)
def test_what_does_not_work_is_said_in_a_line(folder, tmp_path, more, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([*options(folder, tmp_path / "run"), *more])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("kind", ["folder", "address", "tag"])
def test_fine_tuning_starts_from_a_folder_an_address_or_a_tag(folder, tmp_path, monkeypatch, capsys, kind):
    network = ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    path = weights.save_pretrained(network, tmp_path / "weights") / "model.safetensors"
    monkeypatch.setattr(weights, "OFFICIAL_URL", f"{path.parent.as_uri()}/")
    monkeypatch.setitem(weights.PRETRAINED, "convnext_atto", {"in22k": path.name})
    start, found = {
        "folder": (str(path.parent), str(path.parent)),
        "address": (path.as_uri(), path.as_uri()),
        "tag": ("in22k", path.as_uri()),
    }[kind]
    main(options(folder, tmp_path / "run", "--dry-run", "--finetune", start))
    assert f"weights from {found}; the classifier is new, for 2 classes" in capsys.readouterr().out


def evaluated(capsys, *arguments):
    """Evaluate weights, and return the top-1 in percent, the loss, and the rest of the line."""
    main([*arguments, "--workers", "0", "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    top1, loss, rest = re.search(r": top-1 ([\d.]+)%, loss ([\d.]+); (.*)", line).groups()
    return float(top1), float(loss), rest


@pytest.mark.parametrize("loader", ["memory", "disk"])
def test_weights_of_a_run_are_evaluated_as_in_the_run(folder, tmp_path, capsys, loader):
    main(options(folder, tmp_path / "run", "--epochs", "1", "--workers", "0", "--set", f"loader={loader}", "amp=fp32"))
    with open(tmp_path / "run" / "log.csv") as file:
        row = list(csv.DictReader(file))[-1]
    files = list(tmp_path.rglob("*"))
    top1, loss, rest = evaluated(capsys, "--evaluate", str(tmp_path / "run" / "checkpoint.pt"), "--data", str(folder))
    assert top1 == pytest.approx(100 * float(row["ema_top1"]), abs=0.01)
    assert loss == pytest.approx(float(row["val_loss"]), abs=1e-3)
    assert rest.startswith("16 images of ") and " at 32 px, " in rest and rest.endswith(" images per second")
    assert list(tmp_path.rglob("*")) == files, "an evaluation writes nothing"


@pytest.mark.parametrize(
    ("more", "prepared"),
    [
        ((), (48, 0.9)),
        (("--resolution", "64"), (64, 0.9)),
        (("--resolution", "384"), (384, 1.0)),
        (("--set", "eval_crop=0.8"), (48, 0.8)),
        (("--set", "test_flip=True"), (48, 0.9)),
    ],
)
def test_released_weights_are_evaluated_at_their_resolution_or_the_given_one(
    folder, tmp_path, monkeypatch, capsys, more, prepared
):
    network = ConvNeXt(num_classes=2, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), layer_scale_init_value=1.0).eval()
    path = weights.save_pretrained(network, tmp_path, None, 48, crop=0.9)
    asked = ("--evaluate", str(path), "--data", str(folder), "--set", "amp=fp32", *more)
    top1, loss, rest = evaluated(capsys, *asked)
    recipe = replace(recipes.get("in1k", model="convnext_tiny"), eval_resolution=prepared[0], eval_crop=prepared[1])
    flip = "test_flip=True" in more
    expected = evaluate(network, disk.loader(folder, "val", recipe, False, workers=0), "fp32", flip=flip)
    assert (top1, loss) == pytest.approx((100 * expected.top1, expected.loss), abs=1e-2)
    assert f"at {prepared[0]} px, crop {prepared[1]:g}, " in rest and ("with mirror images, " in rest) == flip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate", "in2k"], "error: there are no weights 'in2k' of convnext_tiny: released are in1k, in22k"),
        (["--evaluate", "three.safetensors"], "error: recipes such as imagenette read images from the disk: give"),
        (
            ["--evaluate", "three.safetensors", "--data", "data"],
            "error: the weights are for 3 classes, the images have 2",
        ),
        (["--resolution", "384"], "2"),
    ],
)
def test_weights_that_cannot_be_evaluated_are_refused(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(folder)
    network = ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    save_file(network.state_dict(), "three.safetensors")
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["--model", "convnext_tiny", "--workers", "0", *arguments])
    if message == "2":
        assert "--resolution is for --evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "found", "right"),
    [
        (("cat", "dog"), ("cat", "dog"), True),
        (("0", "1"), ("cat", "dog"), True),
        (("dog", "cat"), ("cat", "dog"), False),
        (tuple("0123456789A"), tuple("0123456789A"), True),
        (("0", "1", "2"), ("0", "1", "10"), True),
        (("0", "1", "2", "3"), ("0", "1", "10", "2"), False),  # folders in the order of their names
    ],
)
def test_classes_in_another_order_than_the_weights_are_noticed(classes, found, right, capsys):
    with contextlib.nullcontext() if right else pytest.raises(ValueError, match="the classes are in another order"):
        check_classes(classes, found)
    assert ("classes in the weights: " in capsys.readouterr().out) == (classes != found)


def test_sigterm_exits_with_a_code_for_the_cluster(folder, tmp_path, monkeypatch, capsys):
    save = loop.CheckpointManager.save

    def save_and_ask(self, trainer, last=False):
        save(self, trainer, last)
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.CheckpointManager, "save", save_and_ask)
    with pytest.raises(SystemExit) as code:
        main(options(folder, tmp_path / "run", "--save-every", "2"))
    assert code.value.code == 143 and "stopped after iteration 3, saved in" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="not on Windows")
@pytest.mark.parametrize(("more", "code"), [((), 75), ((signal.SIGTERM,), 143)], ids=["time is up", "cancelled, too"])
def test_only_the_end_of_a_jobs_time_asks_to_start_it_again(folder, tmp_path, monkeypatch, more, code):
    save = loop.CheckpointManager.save

    def save_and_ask(self, trainer, last=False):
        save(self, trainer, last)
        if trainer.step == 2:
            for number in (signal.SIGUSR1, *more):
                signal.raise_signal(number)

    monkeypatch.setattr(loop.CheckpointManager, "save", save_and_ask)
    with pytest.raises(SystemExit) as stop:
        main(options(folder, tmp_path / "run", "--save-every", "2"))
    assert stop.value.code == code and load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_an_output_that_cannot_show_the_class_names_does_not_lose_the_result(tmp_path, monkeypatch):
    folder_of_images(tmp_path / "data")
    for path in tmp_path.glob("data/*/class0"):
        path.rename(path.with_name("猫"))
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    main(options(tmp_path / "data", tmp_path / "run", "--epochs", "1"))
    output.flush()
    assert (tmp_path / "run" / "summary.json").exists() and b"Most confused" in output.buffer.getvalue()


def test_a_run_on_held_out_images_needs_no_validation_images(tmp_path):
    shutil.rmtree(folder_of_images(tmp_path / "data") / "val")
    for number, more in enumerate(((), ("--recipe", "in1k", "--workers", "0"))):
        output = tmp_path / str(number)
        main(options(tmp_path / "data", output, "--holdout", "--epochs", "1", *more))
        assert json.loads((output / "summary.json").read_text())["images"] == 10


def test_a_run_begins_with_its_plan_and_warns_of_a_rate_far_above_the_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path / "data")
    rates = ["--set", "base_batch=1", "batch_size=8", "evaluate_every=0"]
    main(command("--data", "data", "--epochs", "1", "--device", "cpu", "--micro-batch", "4")[3:] + rates)
    out = capsys.readouterr().out
    assert "effective batch size 8 = 1 process × 4 images × 2 gradient accumulation steps" in out
    assert "warning: the learning rate 0.016 is 64 times that of the rule, 0.00025 for 8 images" in out


@pytest.mark.parametrize(("how", "sizes"), [("memory", (17, 3)), ("disk", (18, 2))])
def test_training_with_held_out_images_needs_no_val_folder(image_root, tmp_path, how, sizes):
    (tmp_path / "train").symlink_to(image_root / "train")
    arguments = ["--recipe", "imagenette", "--model", "convnext_atto", "--data", str(tmp_path), "--workers", "0"]
    settings = [f"loader={how}", "batch_size=4", "image_size=32"]
    recipe = recipes.get("imagenette", settings)
    held_out = read_images(read_arguments([*arguments, "--holdout", "--set", *settings]), recipe)
    assert tuple(part.images if how == "disk" else len(part) for part in held_out) == sizes
    with pytest.raises(FileNotFoundError, match="val"):
        read_images(read_arguments([*arguments, "--set", *settings]), recipe)
