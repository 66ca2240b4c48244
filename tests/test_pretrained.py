"""Where fine-tuning starts: whose weights, and what becomes of the classifier."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, equal
from safetensors.torch import save_file

from convnext_min.convnext import ConvNeXt
from convnext_min.data import ImageSet
from convnext_min.formats import convert
from convnext_min.train import train
from convnext_min.train.pretrained import Start, load_start

SIZES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run: its folder, its last and its averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    train("convnext_atto", replace(TINY, epochs=1), images, images.subset(slice(13)), folder)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return folder / "checkpoint.pt", state["weights"], state["ema"], images.classes


def model(classes):
    torch.manual_seed(7)
    return ConvNeXt(num_classes=classes, head_init_scale=0.001, **SIZES)


def body(weights):
    return {key: value for key, value in weights.items() if not key.startswith("head")}


def test_the_same_classes_keep_their_classifier_and_the_last_weights_are_taken_unless_asked(run):
    path, last, averaged, classes = run
    network = model(10)
    assert load_start(network, Start(path), classes) == f"weights from {path}; its classifier is kept"
    assert equal(network.state_dict(), last) and not equal(last, averaged)
    assert "EMA weights" in load_start(network, Start(path, averaged=True), classes)
    assert equal(network.state_dict(), averaged)


@pytest.mark.parametrize("classes", [("a", "b", "c"), tuple("abcdefghij")], ids=["fewer", "others"])
def test_other_classes_get_the_classifier_that_the_recipe_builds(run, classes):
    path, last, _, _ = run
    network = model(len(classes))
    new = network.head.weight.clone()
    assert f"the classifier is new, for {len(classes)} classes" in load_start(network, Start(path), classes)
    assert equal(body(network.state_dict()), body(last)) and torch.equal(network.head.weight, new)
    assert new.std().item() == pytest.approx(0.001 * 0.02, rel=0.3)


def prefixed(weights, prefix):
    return {f"{prefix}{key}": value for key, value in weights.items()}


# How training scripts save weights, and the options that find them.
FORMATS = {
    "plain": (lambda weights: weights, {}),
    "official": (lambda weights: {"model": weights}, {}),
    "official with arguments": (
        lambda weights: {"model": weights, "args": argparse.Namespace(lr=1), "best": Path()},
        {},
    ),
    "lightning": (lambda weights: {"state_dict": prefixed(weights, "model."), "epoch": 3}, {}),
    "distributed": (lambda weights: {"state_dict": prefixed(weights, "module.")}, {}),
    "compiled": (lambda weights: {"model": prefixed(weights, "_orig_mod.")}, {}),
    "official EMA": (lambda weights: {"model": {}, "model_ema": weights}, {"averaged": True}),
    "EMA of swa_utils": (
        lambda weights: {"ema": prefixed(weights, "module.") | {"n_averaged": torch.tensor(3)}},
        {"averaged": True},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_read_as_training_scripts_save_them(tmp_path, name):
    wrap, options = FORMATS[name]
    weights = ConvNeXt(num_classes=21, **SIZES).state_dict()
    torch.save(wrap(weights), tmp_path / "weights.pth")
    network = model(4)
    message = load_start(network, Start(tmp_path / "weights.pth", **options), tuple("abcd"))
    assert equal(body(network.state_dict()), body(weights)) and "the classifier is new, for 4 classes" in message


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    weights = ConvNeXt(num_classes=4, **SIZES).state_dict()
    torch.save({"model": weights, "hook": Evil()}, tmp_path / "weights.pth")
    network = model(4)
    load_start(network, Start(tmp_path / "weights.pth"), tuple("abcd"))
    assert equal(network.state_dict(), weights)


def test_averaged_weights_that_are_not_there_are_named(tmp_path):
    torch.save({"model": ConvNeXt(num_classes=21, **SIZES).state_dict()}, tmp_path / "convnext_22k.pth")
    with pytest.raises(ValueError, match=r"convnext_22k\.pth holds no EMA weights: .* under ema, model_ema"):
        load_start(model(4), Start(tmp_path / "convnext_22k.pth", averaged=True), tuple("abcd"))


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_weights_of_other_libraries_are_read(tmp_path, library):
    release = ConvNeXt(num_classes=3, **SIZES).state_dict()
    save_file(convert(release, library), tmp_path / "theirs.safetensors")
    network = model(3)
    message = load_start(network, Start(tmp_path / "theirs.safetensors"), tuple("abc"))
    assert equal(network.state_dict(), release) and message.endswith("its classifier is kept")


HEADLESS = {
    "official": lambda weights: weights,
    "timm": lambda weights: convert(weights, "timm"),
    "transformers": lambda weights: prefixless(convert(weights, "transformers"), "convnext."),  # ConvNextModel's keys
}


def prefixless(weights, prefix):
    return {key.removeprefix(prefix): value for key, value in weights.items()}


@pytest.mark.parametrize("library", HEADLESS)
def test_weights_without_a_classifier_get_a_new_one(tmp_path, library):
    weights = ConvNeXt(num_classes=0, **SIZES).state_dict()
    path = tmp_path / "features.safetensors"
    save_file(HEADLESS[library](weights), path)
    network = model(3)
    new = network.head.weight.clone()
    assert load_start(network, Start(path), tuple("abc")).endswith("the classifier is new, for 3 classes")
    assert equal(body(network.state_dict()), weights) and torch.equal(network.head.weight, new)
    (tmp_path / "map.txt").write_text("0\n0\n0\n")
    with pytest.raises(ValueError, match=r"features\.safetensors: there is no classifier whose rows .*map\.txt could"):
        load_start(network, Start(path, class_map=tmp_path / "map.txt"), tuple("abc"))


def test_a_network_without_a_linear_layer_is_refused(run):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(ValueError, match="Sequential cannot be fine-tuned: its classifier should be a linear layer"):
        load_start(network, Start(run[0]), run[3])


def test_a_class_map_picks_rows_of_the_old_classifier(tmp_path):
    release = ConvNeXt(num_classes=21, **SIZES).state_dict()
    release["head.bias"] = torch.arange(21.0)
    torch.save({"model": release}, tmp_path / "22k.pth")
    (tmp_path / "map.txt").write_text("20\n3\n3\n")
    network = model(3)
    load_start(network, Start(tmp_path / "22k.pth", class_map=tmp_path / "map.txt"), tuple("abc"))
    assert network.head.bias.tolist() == [20, 3, 3]
    assert torch.equal(network.head.weight, release["head.weight"][[20, 3, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there is no class map .*map\.txt"),
        ("1\n2\n", r"map\.txt has 2 lines, but there are 3 classes"),
        ("1\n21\n2\n", r"line 2 of .*map\.txt is '21'; expected a class of the checkpoint, 0 to 20"),
        ("1\n2\ntench\n", r"line 3 of .*map\.txt is 'tench'"),
    ],
)
def test_what_is_wrong_with_a_class_map_is_named(tmp_path, text, message):
    torch.save({"model": ConvNeXt(num_classes=21, **SIZES).state_dict()}, tmp_path / "22k.pth")
    if text:
        (tmp_path / "map.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_start(model(3), Start(tmp_path / "22k.pth", class_map=tmp_path / "map.txt"), tuple("abc"))


def test_weights_of_another_model_are_refused_by_name(run, tmp_path):
    path, last, _, classes = run
    other = ConvNeXt(num_classes=10, depths=(1, 2, 1, 1), dims=(8, 8, 16, 24))
    with pytest.raises(ValueError, match=r"missing keys stages\.1\.1\.gamma.*, \.\.\.; shape mismatch downsample"):
        load_start(other, Start(path), classes)
    torch.save({"weights": last | {"extra.weight": torch.ones(1)}, "classes": classes}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"more\.pt: the weights do not fit: unexpected keys extra\.weight"):
        load_start(model(10), Start(tmp_path / "more.pt"), classes)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds no weights: a checkpoint holds a dictionary, this one list"):
        load_start(model(10), Start(tmp_path / "list.pt"), classes)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_start(model(10), Start(tmp_path / "none.pt"), classes)


def test_a_run_starts_there_once_and_resumes_its_own_weights(run, images, tmp_path, capsys):
    path, last, _, _ = run
    few = ImageSet(images.images[:16], images.labels[:16] % 2, ("a", "b"), "two classes")
    arguments = ("convnext_atto", replace(TINY, epochs=1, base_lr=1e-9, layer_decay=0.7), few, few, tmp_path)
    history = train(*arguments, start=Start(path))
    torch.testing.assert_close(body(history.model.state_dict()), body(last), rtol=0, atol=1e-6)
    assert "the classifier is new, for 2 classes" in capsys.readouterr().out
    train(*arguments, start=Start(path), resume=True)
    assert "the classifier is new" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"its start is .*, here it is None"):
        train(*arguments, resume=True)
