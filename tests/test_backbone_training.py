"""The command that trains the small backbone: its classes, its weights in half precision, its card and summary."""

import json

import pytest
import torch

from convnext_min import load, read_labels
from convnext_min.data import synthetic_images
from convnext_min.experiments import backbone, few_images
from convnext_min.train.models import create_model
from convnext_min.train.pretrained import Start, load_start
from convnext_min.weights import read_checkpoint, read_preprocessing

SMALL = ("progressive=()", "resolution=32", "eval_resolution=32", "batch_size=14", "stem=patchify")
SIZES = {
    "convnext_atto": (*SMALL, "depths=(1,1,1,1)", "dims=(8,8,8,8)"),
    "road:resnet50": (*SMALL, "layer_scale_init=1e-6", "width_multiplier=0.0625"),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(backbone, "SETTINGS", SIZES)
    monkeypatch.setattr(backbone.data, "imagenette", lambda split, root, size: synthetic_images(split, 32, 40))


@pytest.mark.parametrize("name", SIZES)
def test_a_backbone_of_seven_classes_is_written_with_its_card(small, tmp_path, name):
    backbone.main(["--model", name, "--epochs", "2", "--output", str(tmp_path)])
    folder = tmp_path / name.replace(":", "-")
    summary, card = json.loads((folder / "summary.json").read_text()), (folder / "README.md").read_text()
    assert len(summary["classes"]) == 7 and len(summary["new_classes"]) == 3 and summary["epochs"] == 2
    assert summary["train"] == summary["images"] == 28 and f"{summary['top1']:.2f}% of 28 validation images" in card
    weights = read_checkpoint(folder)
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    if name == "convnext_atto":
        assert load(folder).head.out_features == 7 and read_labels(folder) == summary["classes"]
        assert read_preprocessing(folder) == (32, 1.0)
    else:
        recipe = backbone.recipes.get(backbone.RECIPE, SIZES[name], name)
        assert "kept" in load_start(create_model(name, recipe, 7), Start(folder), None)


def test_minutes_and_epochs_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        backbone.main(["--minutes", "1", "--epochs", "1"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("command", [backbone, few_images])
def test_a_folder_that_is_not_there_is_named_in_a_line(command, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*nowhere not found in the given path"):
        command.main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path)])
