"""Checkpoints of four libraries in and out: equal logits, recognized keys, and errors that name what would fit."""

import json
import logging
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import torchvision
from image_folders import picture
from test_convnext import randomize
from timm.models import adapt_input_conv
from torch import nn
from transformers import AutoImageProcessor, ConvNextConfig, ConvNextForImageClassification, ConvNextModel, pipeline

from convnext_min import convnext, formats, isotropic, weights
from convnext_min.convnext import ConvNeXt
from convnext_min.data import disk
from convnext_min.recipes import Recipe
from convnext_min.train import create_model

SIZES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
SMALL = {**SIZES, "num_classes": 5}


@pytest.fixture
def small():
    return randomize(ConvNeXt(**SMALL))


def transformers_model(depths, dims, num_classes=1000):
    config = ConvNextConfig(depths=list(depths), hidden_sizes=list(dims), num_labels=num_classes, layer_norm_eps=1e-6)
    return ConvNextForImageClassification(config)


def logits(model, images):
    with torch.inference_mode():
        outputs = model.eval()(images)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


THEIRS = {
    "timm": lambda name: timm.create_model(name),
    "torchvision": lambda name: getattr(torchvision.models, name)(),
    "transformers": lambda name: transformers_model(**getattr(convnext, name).keywords),
    "official": lambda name: getattr(convnext, name)(),
}


@pytest.fixture(scope="module")
def variants():
    """Return models of the paper's sizes by name, with the same images for all and their logits."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    models = {name: randomize(empty(getattr(convnext, name))) for name in ("convnext_tiny", "convnext_small")}
    return {name: (model, images, logits(model, images)) for name, model in models.items()}


def empty(build, *arguments):
    """Build a model without drawing initial weights: all are 0."""
    with torch.device("meta"):
        model = build(*arguments)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


@pytest.mark.compatibility(
    library="{library}", way="state dict", direction="in and out", what="equal logits, 1e-5", models="{name}"
)
@pytest.mark.parametrize("library", THEIRS)
@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_small"])
def test_round_trip_with_equal_logits(name, library, variants):
    ours, images, expected = variants[name]
    theirs = empty(THEIRS[library], name)
    theirs.load_state_dict(weights.convert(ours.state_dict(), library))
    torch.testing.assert_close(logits(theirs, images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert formats.recognize(theirs.state_dict()) == library
    back = weights.load(theirs.state_dict())
    assert torch.equal(logits(back, images), expected)


@pytest.mark.compatibility(
    library="timm",
    way="state dict",
    direction="in and out",
    what="1x1 convolutions for linear layers",
    models="convnext_atto",
)
def test_timms_small_models_have_convolutions_in_place_of_linear_layers():
    images = torch.randn(2, 3, 64, 64)
    theirs = randomize(timm.create_model("convnext_atto"))
    ours = weights.create("convnext_atto", theirs.state_dict())
    expected = logits(theirs, images)
    torch.testing.assert_close(logits(ours, images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    theirs.load_state_dict(weights.convert(ours.state_dict(), "timm", conv_mlp=True))


@pytest.mark.compatibility(
    library="transformers",
    way="state dict",
    direction="in",
    what="features without a classifier",
    models="ConvNextModel",
)
def test_transformers_model_without_classifier_gives_features():
    theirs = randomize(ConvNextModel(transformers_model(**SIZES).config))
    ours = weights.load(theirs.state_dict())
    images = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs(images).pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.compatibility(
    library="all four", way="state dict", direction="in and out", what="no layer scale", models="small ConvNeXt"
)
def test_models_without_layer_scale_are_read_and_written():
    plain = randomize(ConvNeXt(**SMALL, layer_scale_init_value=0))
    for library in formats.FORMATS:
        loaded = weights.load(weights.convert(plain.state_dict(), library))
        assert loaded.stages[0][0].gamma is None
        assert equal(loaded.state_dict(), plain.state_dict())


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# ---- Files


@pytest.mark.compatibility(
    library="training scripts",
    way="torch.save file",
    direction="in",
    what="{id}",
    models="small ConvNeXt",
)
@pytest.mark.parametrize(
    ("wrap", "averaged"),
    [
        (lambda state: state, False),
        (lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3}, False),
        (lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}}, False),
        (lambda state: {"weights": state, "ema": None, "classes": ["a", "b"]}, False),
        (lambda state: {"weights": {"other": torch.ones(1)}, "ema": state}, True),
        (lambda state: {"model": {"other": torch.ones(1)}, "model_ema": state}, True),
        (lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()}, False),
    ],
    ids=[
        "weights alone",
        "under 'model'",
        "under 'state_dict', with the prefix 'model.'",
        "under 'weights'",
        "averaged, under 'ema'",
        "averaged, under 'model_ema'",
        "prefixes of wrappers",
    ],
)
def test_files_of_training_scripts(small, tmp_path, wrap, averaged):
    torch.save(wrap(small.state_dict()), tmp_path / "file.pth")
    assert equal(weights.read_state_dict(tmp_path / "file.pth", averaged), small.state_dict())
    assert equal(weights.load(tmp_path / "file.pth", averaged).state_dict(), small.state_dict())


@pytest.mark.compatibility(
    library="torch.optim.swa_utils",
    way="torch.save file",
    direction="in",
    what="averaged weights",
    models="small ConvNeXt",
)
def test_weights_averaged_by_pytorch(small, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(small)
    torch.save(averaged.state_dict(), tmp_path / "file.pth")
    assert equal(weights.load(tmp_path / "file.pth").state_dict(), small.state_dict())


@pytest.mark.compatibility(
    library="all four", way="state dict", direction="in", what="half-precision weights", models="small ConvNeXt"
)
def test_half_precision_weights_are_loaded_into_the_models_precision(small):
    half = {key: value.half() for key, value in small.state_dict().items()}
    for library in formats.FORMATS:
        model = weights.load(weights.convert(half, library))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        torch.testing.assert_close(model.state_dict(), {key: value.float() for key, value in half.items()})


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": [1]}, r"no weights under weights, model, .*; it has model"),
        ([1], "holds a dictionary, this one list"),
        ({}, "has no weights"),
        ({"model": Evil()}, "no weights under weights, model, "),
    ],
    ids=["no tensors", "list", "empty", "code"],
)
def test_files_without_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path / "file.pth")


def test_files_that_cannot_be_read(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "file.pth")
    whole = (tmp_path / "file.pth").read_bytes()
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            weights.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.pth"):
        weights.load(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"no averaged weights under ema, model_ema.*it has downsample_layers"):
        weights.load(tmp_path / "file.pth", averaged=True)


def test_safetensors_is_named_where_it_is_missing(small, tmp_path, monkeypatch):
    (tmp_path / "file.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"^file\.safetensors needs the extra 'weights' .*convnext-min\[weights\]'$"):
        weights.load(tmp_path / "file.safetensors")
    with pytest.raises(ImportError, match=r"^save_pretrained needs the extra 'weights'"):
        weights.save_pretrained(small, tmp_path)


# ---- Hugging Face's layout


@pytest.mark.compatibility(
    library="transformers",
    way="folder: config.json, model.safetensors",
    direction="in and out",
    what="equal logits, 1e-5, labels",
    models="small ConvNeXt",
)
def test_a_folder_in_hugging_faces_layout(small, tmp_path):
    labels = ["ant", "bee", "cat", "dog", "emu"]
    folder = weights.save_pretrained(small, tmp_path / "model", labels)
    assert equal(weights.load(folder).state_dict(), small.state_dict())
    theirs = ConvNextForImageClassification.from_pretrained(folder)
    assert theirs.config.id2label[4] == "emu" and theirs.config.label2id["bee"] == 1
    assert weights.read_labels(folder) == labels
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(logits(theirs, images), logits(small, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("resolution", "crop"), [(70, 0.875), (76, 0.95), (384, 1.0)])
def test_transformers_prepares_images_as_the_folder_says(small, tmp_path, resolution, crop):
    folder = weights.save_pretrained(small, tmp_path, list("abcde"), resolution, crop)
    assert weights.read_preprocessing(folder) == (resolution, crop)
    image = picture(0, (150, 120))  # borders of whole pixels: others are rounded differently
    recipe = Recipe(loader="disk", eval_crop=crop)
    expected = disk.transform(recipe, False, resolution)(image)[None]
    given = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given, expected, rtol=0, atol=0.05)
    answers = pipeline("image-classification", str(folder), device="cpu")(image)
    assert answers[0]["label"] == "abcde"[logits(small, expected).argmax()]


def test_an_older_folder_of_hugging_face(small, tmp_path):
    torch.save(weights.convert(small.state_dict(), "transformers"), tmp_path / "pytorch_model.bin")
    assert equal(weights.load(tmp_path).state_dict(), small.state_dict())
    (tmp_path / "preprocessor_config.json").write_text('{"crop_pct": 0.9, "size": 224}')
    assert weights.read_preprocessing(tmp_path) == (224, 0.9)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 224, "width": 224}}')
    with pytest.raises(ValueError, match=r"has the size .*224.*, expected a shortest_edge"):
        weights.read_preprocessing(tmp_path)


def test_what_cannot_be_written_in_hugging_faces_layout(small, tmp_path):
    with pytest.raises(ValueError, match="there are 2 labels for 5 classes"):
        weights.save_pretrained(small, tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match="no classifier"):
        weights.save_pretrained(ConvNeXt(**SIZES, num_classes=0), tmp_path)
    with pytest.raises(ValueError, match="transformers has no isotropic ConvNeXt"):
        weights.save_pretrained(isotropic.ConvNeXtIsotropic(depth=1, dim=8), tmp_path)


def test_no_layer_scale_is_written_into_the_configuration(tmp_path):
    weights.save_pretrained(ConvNeXt(**SMALL, layer_scale_init_value=0), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_scale_init_value"] == 0
    ConvNextForImageClassification.from_pretrained(tmp_path)


# ---- What differs from the weights


@pytest.mark.compatibility(
    library="all four",
    way="state dict",
    direction="in",
    what="another number of classes, or none",
    models="small ConvNeXt",
)
@pytest.mark.parametrize("library", formats.FORMATS)
def test_another_number_of_classes_starts_a_new_classifier_and_says_so(small, library, caplog):
    state = weights.convert(small.state_dict(), library)
    body = {key: value for key, value in small.state_dict().items() if not key.startswith("head")}
    model = weights.load(state, num_classes=3)
    assert caplog.messages == ["the classifier is new: 3 classes, the weights have 5"]
    assert model.head.weight.shape == (3, 32) and model.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert equal({key: value for key, value in model.state_dict().items() if not key.startswith("head")}, body)
    caplog.clear()
    assert equal(weights.load(state, num_classes=0).state_dict(), body) and caplog.messages == []
    weights.load(weights.convert(body, library), num_classes=3)
    assert caplog.messages == ["the classifier is new: 3 classes, the weights have none"]


@pytest.mark.compatibility(
    library="all four", way="state dict", direction="in", what="1, 2, 4 and 7 input channels", models="small ConvNeXt"
)
@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_the_stem_is_adapted_to_other_input_channels_as_timm_does(small, in_chans, caplog):
    expected = adapt_input_conv(in_chans, small.downsample_layers[0][0].weight)
    for library in formats.FORMATS:
        model = weights.load(weights.convert(small.state_dict(), library), in_chans=in_chans)
        torch.testing.assert_close(model.downsample_layers[0][0].weight, expected)
    assert caplog.messages == [f"the stem is adapted from 3 to {in_chans} input channels"] * 4


def test_a_grey_image_gives_the_same_as_its_three_equal_channels(small):
    grey = torch.randn(2, 1, 32, 32)
    ours = weights.load(small.state_dict(), in_chans=1)
    torch.testing.assert_close(logits(ours, grey), logits(small, grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_messages_are_seen_without_any_setting():
    script = (
        "from convnext_min import convnext, weights\n"
        "state = convnext.ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).state_dict()\n"
        "weights.load(state, num_classes=2)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "the classifier is new: 2 classes, the weights have 5" in done.stderr


def test_a_model_keeps_its_weights_if_others_do_not_fit(small):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    other = ConvNeXt(**{**SMALL, "dims": (8, 16, 24, 40)}).state_dict()
    with pytest.raises(
        ValueError, match=r"shape mismatch downsample_layers\.3\.1\.weight \(40, 24, 2, 2\) instead of \(32"
    ):
        weights.load_pretrained(small, other)
    assert equal(small.state_dict(), before)


MISFITS = {
    "longer": (
        lambda: convnext.convnext_small().state_dict(),
        r"unexpected keys stages\.2\.9\.gamma.*, \.\.\.\. They are of convnext_small, the model is convnext_tiny$",
    ),
    "wider": (
        lambda: convnext.ConvNeXt(dims=(8, 16, 32, 64)).state_dict(),
        r"They are of ConvNeXt\(depths=\(3, 3, 9, 3\), dims=\(8, 16, 32, 64\)\), the model is convnext_tiny$",
    ),
    "isotropic": (
        lambda: isotropic.convnext_isotropic_small().state_dict(),
        r"unexpected keys stem\.weight.* They are of convnext_isotropic_small",
    ),
    "V2": (lambda: timm.create_model("convnextv2_atto").state_dict(), "ConvNeXt V2"),
    "ResNet": (
        lambda: torchvision.models.resnet18().state_dict(),
        r"not the weights of a ConvNeXt: the first keys are conv1\.weight, bn1\.weight, bn1\.bias, \.\.\.; expected",
    ),
    "MobileNet": (lambda: torchvision.models.mobilenet_v2().state_dict(), r"the first keys are features\.0\.0\.weight"),
    "norm first": (
        lambda: timm.create_model("convnext_tiny_hnf").state_dict(),
        r"missing keys norm\.weight, norm\.bias; unexpected keys norm_pre\.weight",
    ),
}


@pytest.mark.parametrize("which", MISFITS)
def test_weights_that_do_not_fit_are_named_with_what_would(which):
    make, message = MISFITS[which]
    with torch.device("meta"):
        state = make()
    with pytest.raises(ValueError, match=message):
        weights.create("convnext_tiny", state)


def test_weights_with_layer_scale_do_not_fit_a_model_without(small):
    plain = ConvNeXt(**SMALL, layer_scale_init_value=0)
    with pytest.raises(ValueError, match=r"unexpected keys stages.*without layer scale \(layer_scale_init_value=0\)$"):
        weights.load_pretrained(plain, small.state_dict())


def test_the_stem_of_a_small_data_recipe_is_named(small):
    recipe = Recipe(stem="overlapping", **SIZES)
    state = create_model("convnext_atto", recipe, 5).state_dict()
    for load in (weights.load, lambda state: weights.load_pretrained(small, state)):
        with pytest.raises(ValueError, match=r"overlapping convolutions.*train\.predict\.load_model\(checkpoint\)"):
            load(state)


# ---- The official release


def test_the_released_weights_are_listed():
    assert weights.list_pretrained("*_xlarge") == [
        ("convnext_xlarge", tag) for tag in ("in22k", "in22k_in1k", "in22k_in1k_384")
    ]
    released = weights.list_pretrained()
    assert len(released) == 24 and {name for name, _ in released} <= weights.VARIANTS.keys()
    assert weights.find("convnext_tiny", True) == weights.find("convnext_tiny", "in1k")
    assert weights.find("convnext_xlarge", "in22k_in1k_384") == (
        "https://dl.fbaipublicfiles.com/convnext/convnext_xlarge_22k_1k_384_ema.pth"
    )


def test_timm_names_the_same_addresses():
    theirs = {timm.get_pretrained_cfg(name).url for name in timm.list_models("convnext_*", pretrained=True)}
    theirs = {url for url in theirs if url.startswith(weights.OFFICIAL_URL)}
    ours = {weights.find(name, tag) for name, tag in weights.list_pretrained() if "isotropic" not in name}
    assert theirs <= ours


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("convnext_tiny", "in2k", r"no weights 'in2k' of convnext_tiny: released are in1k, in22k, in22k_in1k"),
        ("convnext_xlarge", True, r"no weights 'in1k' of convnext_xlarge: released are in22k"),
        ("convnext_atto", True, r"no weights 'in1k' of convnext_atto: none were released"),
        ("convnext_big", None, "unknown model 'convnext_big'; valid: convnext_atto, .*, convnext_isotropic_large"),
    ],
)
def test_unknown_names_and_tags(name, tag, message):
    with pytest.raises(ValueError, match=message):
        weights.create(name, tag)


@pytest.mark.compatibility(
    library="official", way="address of the release", direction="in", what="pretrained=tag", models="convnext_tiny"
)
def test_a_tag_downloads_the_official_file(tmp_path, monkeypatch, caplog):
    model = empty(partial(convnext.convnext_tiny, num_classes=21841))
    model.norm.weight.data.fill_(0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "convnext_tiny_22k_224.pth")
    monkeypatch.setattr(weights, "OFFICIAL_URL", f"{tmp_path.as_uri()}/")
    loaded = weights.convnext_tiny(pretrained="in22k", drop_path_rate=0.1)
    assert equal(loaded.state_dict(), model.state_dict())
    assert loaded.stages[3][2].drop_path.rate == pytest.approx(0.1)
    target = convnext.convnext_tiny(num_classes=2)
    weights.load_pretrained(target, "in22k")
    assert caplog.messages == ["the classifier is new: 2 classes, the weights have 21841"]
    assert torch.equal(target.norm.weight, model.norm.weight)


def test_new_weights_are_convnexts_own():
    torch.manual_seed(0)
    plain = convnext.convnext_atto(num_classes=2)
    torch.manual_seed(0)
    assert equal(weights.convnext_atto(num_classes=2).state_dict(), plain.state_dict())
    assert isinstance(weights.convnext_isotropic_small(num_classes=2), isotropic.ConvNeXtIsotropic)


def test_the_package_exports_the_variants_with_pretrained_weights(small):
    import convnext_min

    assert convnext_min.convnext_tiny is weights.convnext_tiny
    with torch.device("meta"):
        assert isinstance(convnext_min.convnext_tiny(num_classes=2), ConvNeXt)
    assert isinstance(convnext_min.load(small.state_dict()), nn.Module)
    assert logging.getLogger("convnext_min.weights") is weights.logger
