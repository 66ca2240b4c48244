import argparse
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from convnext_min import recipes, weights
from convnext_min.convnext import ConvNeXt
from convnext_min.data import disk, synthetic_images
from convnext_min.formats import convert
from convnext_min.recipes import Recipe
from convnext_min.train import create_model, predict, train
from convnext_min.train.checkpoint import load_checkpoint

RECIPE = Recipe(
    epochs=8,
    batch_size=10,
    base_lr=4e-3,
    base_batch=10,
    resolution=32,
    eval_resolution=32,
    image_size=48,
    test_flip=True,
    layer_scale_init=1.0,
    depths=(1, 1, 1, 1),
    dims=(8, 8, 16, 16),
    amp="fp32",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's checkpoint, its validation images as files, and what the run answered for them."""
    folder = tmp_path_factory.mktemp("run")
    images = synthetic_images("train", 48, 20)
    history = train("convnext_atto", RECIPE, images, images, folder)
    files = []
    for i, pixels in enumerate(images.images):
        files.append(str(folder / f"{i}.png"))
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(files[-1])
    return str(folder / "checkpoint.pt"), files, [images.classes[label] for label in history.predictions]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        predict.main(list(arguments))
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_the_first_class_is_what_the_run_answered_in_its_last_evaluation(trained, capsys):
    checkpoint, files, answers = trained
    code, out, _ = run(capsys, "--checkpoint", checkpoint, "--top", "2", *files)
    assert code == 0
    lines = out.splitlines()
    assert lines[::3] == files
    assert [re.sub(r"^ +[\d.]+%  ", "", line) for line in lines[1::3]] == answers
    assert len(set(answers)) > 1  # or the line above would say little


def test_probabilities_of_all_classes_add_up_and_fall(trained, capsys):
    checkpoint, files, _ = trained
    _, out, _ = run(capsys, "--checkpoint", checkpoint, "--top", "99", files[0])
    percents = [float(line.split("%")[0]) for line in out.splitlines()[1:]]
    assert len(percents) == 10 and percents == sorted(percents, reverse=True)
    assert sum(percents) == pytest.approx(100, abs=0.5)


def test_averaged_weights_are_used_where_there_are_any(trained):
    model, recipe, classes = predict.load_model(trained[0])
    state = load_checkpoint(trained[0])
    assert not model.training and recipe == RECIPE and classes == state["classes"]
    assert torch.equal(model.head.weight, state["ema"]["head.weight"])
    assert not torch.equal(model.head.weight, state["weights"]["head.weight"])


def test_bad_images_are_named_and_the_others_answered(trained, tmp_path, capsys):
    checkpoint, files, answers = trained
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a picture")
    code, out, err = run(capsys, "--checkpoint", checkpoint, str(broken), files[3], str(tmp_path / "none.png"))
    assert code == 1
    assert err == f"error: {broken} cannot be read as an image\nerror: {tmp_path / 'none.png'} is not a file\n"
    assert out.startswith(files[3]) and answers[3] in out


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_is_prepared_as_the_recipe_that_reads_from_the_disk_evaluates(trained, flip):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    recipe = replace(recipes.get("in1k", model="convnext_tiny"), test_flip=flip)
    given = predict.predict_file(model, Path(trained[1][0]), recipe)
    with Image.open(trained[1][0]) as image:
        x = disk.transform(recipe, False, recipe.eval_resolution)(image)
    both = model(torch.stack([x, x.flip(-1)]))
    assert x.shape == (3, 224, 224) and torch.allclose(given, both[: 1 + flip].mean(0).softmax(0))


def test_a_bad_checkpoint_is_named(trained, tmp_path, capsys):
    cut = tmp_path / "cut.pt"
    with open(trained[0], "rb") as file:
        cut.write_bytes(file.read(3000))
    empty = tmp_path / "weights.pt"
    torch.save({"weights": {}}, empty)
    wrong = ((cut, "is damaged"), (tmp_path / "none.pt", "there is no checkpoint"), (empty, "no weights"))
    for path, reason in wrong:
        code, _, _ = run(capsys, "--checkpoint", str(path), trained[1][0])
        assert code.startswith("error: ") and str(path) in code and reason in code


def test_a_network_without_a_name_cannot_be_rebuilt(tmp_path):
    images = synthetic_images("train", 32, 10)
    model = create_model("convnext_atto", RECIPE, 10)
    train(model, replace(RECIPE, epochs=1, batch_size=10), images, images, tmp_path)
    with pytest.raises(ValueError, match=r"the network in .*checkpoint.pt cannot be created: .*'ConvNeXt'"):
        predict.load_model(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("loader", ["memory", "disk"])
def test_a_photograph_is_turned_upright_unless_the_recipe_says_otherwise(trained, tmp_path, loader):
    checkpoint, files, _ = trained
    model = predict.load_model(checkpoint)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.open(files[0]).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for on in (True, False):
        recipe = replace(RECIPE, loader=loader, exif_orientation=on)
        upright, turned = (
            predict.predict_file(model, Path(path), recipe) for path in (files[0], tmp_path / "turned.png")
        )
        assert upright.equal(turned) == on


@pytest.mark.parametrize("library", ["official", "timm", "torchvision"])
def test_a_file_of_weights_alone_predicts_numbers_of_classes(trained, tmp_path, capsys, library):
    network = ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), layer_scale_init_value=1.0).eval()
    torch.save({"state_dict": convert(network.state_dict(), library), "args": argparse.Namespace()}, tmp_path / "w.pth")
    code, out, _ = run(capsys, "--checkpoint", str(tmp_path / "w.pth"), "--top", "1", trained[1][0])
    recipe = recipes.get("in1k", model="convnext_tiny")
    right = predict.predict_file(network, Path(trained[1][0]), recipe).argmax().item()
    assert code == 0 and out.splitlines()[1].endswith(f"%  {right}")


@pytest.fixture
def hugging_face(tmp_path):
    """A folder in Hugging Face's layout for images of 96 pixels with their borders, and its network."""
    network = ConvNeXt(num_classes=2, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), layer_scale_init_value=1.0).eval()
    return weights.save_pretrained(network, tmp_path / "model", ["cat", "dog"], 96, crop=0.95), network


@pytest.mark.parametrize("resolution", [96, 64])
def test_a_folder_of_hugging_face_gives_names_resolution_and_crop(trained, hugging_face, capsys, resolution):
    folder, network = hugging_face
    more = () if resolution == 96 else ("--resolution", str(resolution))
    code, out, _ = run(capsys, "--checkpoint", str(folder), *more, trained[1][0])
    recipe = replace(recipes.get("in1k", model="convnext_tiny"), eval_resolution=resolution, eval_crop=0.95)
    answer = predict.predict_file(network, Path(trained[1][0]), recipe)
    assert code == 0 and [line.split() for line in out.splitlines()[1:]] == [
        [f"{answer[i]:.1%}", ("cat", "dog")[i]] for i in answer.argsort(descending=True)
    ]


@pytest.mark.parametrize(
    ("source", "prepared"),
    [
        ("https://host/convnext_tiny_1k_224_ema.pth", (224, 0.875)),
        ("https://host/convnext_base_1k_384.pth", (384, 1.0)),
        (Path("convnext_xlarge_22k_1k_384_ema.pth"), (384, 1.0)),
    ],
)
def test_images_for_the_released_weights_have_the_size_in_the_files_name(source, prepared):
    recipe, classes = predict.describe_weights(source, 3)
    assert (recipe.eval_resolution, recipe.eval_crop) == prepared and classes == ("0", "1", "2")


def test_a_folder_whose_names_do_not_fit_the_classifier_has_numbers(hugging_face):
    folder, _ = hugging_face
    assert predict.describe_weights(folder, 3)[1] == ("0", "1", "2")
    (folder / "config.json").write_text("{}")
    assert predict.describe_weights(folder, 2)[1] == ("0", "1")


@pytest.mark.parametrize("loader", ["memory", "disk"])
def test_images_go_to_the_networks_device(trained, loader):
    model = ConvNeXt(num_classes=2, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)).to("meta")
    assert predict.predict_file(model, Path(trained[1][0]), replace(RECIPE, loader=loader)).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "gpu"), "error: device 'gpu' cannot be used here"),
        (("--resolution", "0"), "error: eval_resolution must be"),
    ],
)
def test_options_that_cannot_be_are_named(trained, capsys, options, message):
    code, _, _ = run(capsys, "--checkpoint", trained[0], *options, trained[1][0])
    assert code.startswith(message)


def test_weights_without_a_classifier_are_refused(trained, tmp_path, capsys):
    torch.save(ConvNeXt(num_classes=0, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)).state_dict(), tmp_path / "w.pth")
    code, _, _ = run(capsys, "--checkpoint", str(tmp_path / "w.pth"), trained[1][0])
    assert code == f"error: {tmp_path / 'w.pth'} has no classifier"


def test_class_names_that_the_terminal_cannot_show_are_escaped(trained, tmp_path, monkeypatch):
    state = load_checkpoint(trained[0])
    names = tuple(f"猫{i}" for i in range(10))
    torch.save(state | {"classes": names}, tmp_path / "cats.pt")
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as stop:
        predict.main(["--checkpoint", str(tmp_path / "cats.pt"), trained[1][0]])
    output.flush()
    assert stop.value.code == 0 and output.buffer.getvalue().count(rb"\u732b") == 3
