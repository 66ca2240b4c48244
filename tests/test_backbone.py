"""ConvNeXt as a backbone: feature maps in timm's conventions, precision, layout, checkpointing, timm, torch.hub."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
from test_convnext import randomize
from torch import nn

import convnext_min.timm  # noqa: F401 (registers the models)
from convnext_min import weights
from convnext_min.backbone import Backbone, backbone
from convnext_min.convnext import ConvNeXt
from convnext_min.isotropic import ConvNeXtIsotropic

ROOT = Path(__file__).parents[1]
SIZES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small():
    return randomize(Backbone(**SIZES, num_classes=5))


def test_keys_weights_and_logits_are_convnexts(small):
    plain = ConvNeXt(**SIZES, num_classes=5).eval()
    plain.load_state_dict(small.state_dict())
    with torch.inference_mode():
        assert torch.equal(small(IMAGES), plain(IMAGES))
        pooled = small.forward_head(small.forward_features(IMAGES), pre_logits=True)
        assert torch.equal(pooled, plain.forward_features(IMAGES))


def test_four_maps_with_their_strides_and_channels(small):
    with torch.inference_mode():
        last, maps = small.forward_intermediates(IMAGES)
        assert torch.equal(last, maps[3]) and torch.equal(last, small.forward_features(IMAGES))
    for info, found, stage in zip(small.feature_info, maps, small.stages):
        stride = info["reduction"]
        assert found.shape == (2, info["num_chs"], 64 // stride, 96 // stride)
        assert small.get_submodule(info["module"]) is stage
    assert [info["reduction"] for info in small.feature_info] == [4, 8, 16, 32]


@pytest.mark.compatibility(
    library="timm",
    way="forward_intermediates",
    direction="in and out",
    what="equal feature maps, 1e-4",
    models="convnext_nano",
)
def test_maps_equal_timms():
    theirs = randomize(timm.create_model("convnext_nano", conv_mlp=False))
    ours = backbone("convnext_nano", theirs.state_dict()).eval()
    for indices in (None, 2, [0, 2], [-1], [1, -1]):
        with torch.inference_mode():
            maps = ours.forward_intermediates(IMAGES, indices, intermediates_only=True)
            expected = theirs.forward_intermediates(IMAGES, indices, intermediates_only=True)
        assert len(maps) == len(expected)
        for one, other in zip(maps, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_stages_after_the_last_wanted_are_not_computed(small):
    small.stages[3] = nn.Identity()  # which cannot be iterated over
    last, maps = small.forward_intermediates(IMAGES, [0, 1], stop_early=True)
    assert len(maps) == 2 and torch.equal(last, maps[1])


@pytest.mark.parametrize("indices", [0, 5, [], [4], [0, -5]])
def test_impossible_stages_are_refused(small, indices):
    with pytest.raises(ValueError, match=r"there are four stages, 0 to 3 or -4 to -1; got"):
        small.forward_intermediates(IMAGES, indices)


def test_other_layouts_and_norms_are_refused(small):
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        small.forward_intermediates(IMAGES, output_fmt="NLC")
    with pytest.raises(ValueError, match="norm=True"):
        small.forward_intermediates(IMAGES, norm=True)


def test_the_classifier_can_be_replaced(small):
    small.half().reset_classifier(7)
    assert small.get_classifier().weight.shape == (7, 32) and small.num_classes == 7
    assert small.head.weight.dtype == torch.half and not small.head.bias.any()
    small.reset_classifier(0)
    assert isinstance(small.head, nn.Identity) and small.num_classes == 0


def test_backbones_have_no_classifier_and_take_pretrained_weights(small, caplog):
    assert backbone("convnext_atto").num_classes == 0
    state = weights.create("convnext_atto", num_classes=3).state_dict()
    assert caplog.messages == []
    model = backbone("convnext_atto", state, in_chans=4)
    assert torch.equal(model.norm.weight, state["norm.weight"])
    assert caplog.messages == ["the stem is adapted from 3 to 4 input channels"]
    with pytest.raises(ValueError, match=r"no backbone 'convnext_isotropic_small'; valid: convnext_atto, .*xlarge$"):
        backbone("convnext_isotropic_small")


# ---- Precision, layout, memory


@pytest.mark.compatibility(
    library="PyTorch",
    way="bfloat16 and float16",
    direction="",
    what="by autocast, and all of it",
    models="small ConvNeXt",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(small, dtype):
    with torch.inference_mode():
        expected = small(IMAGES)
        with torch.autocast("cpu", dtype=dtype):
            mixed = small(IMAGES)
        pure = small.to(dtype)(IMAGES.to(dtype))
    assert pure.dtype == dtype
    scale = expected.abs().max()
    for logits in (mixed, pure):
        assert (logits.float() - expected).abs().max() < 0.05 * scale


@pytest.mark.compatibility(library="PyTorch", way="channels-last", direction="", what="equal logits", models="{which}")
@pytest.mark.parametrize("which", ["small ConvNeXt", "small isotropic"])
def test_channels_last_computes_the_same_and_stays_channels_last(which):
    model = randomize(Backbone(**SIZES) if which == "small ConvNeXt" else ConvNeXtIsotropic(depth=2, dim=16))
    with torch.inference_mode():
        expected = model(IMAGES)
        model.to(memory_format=torch.channels_last)
        images = IMAGES.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        if isinstance(model, Backbone):
            for found in model.forward_intermediates(images, intermediates_only=True):
                assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.compatibility(
    library="PyTorch",
    way="activation checkpointing",
    direction="",
    what="equal gradients, less memory",
    models="small ConvNeXt",
)
def test_activation_checkpointing_saves_memory_and_keeps_gradients():
    model = randomize(Backbone(**SIZES, num_classes=5, drop_path_rate=0.5)).train()

    def gradients():
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        model.zero_grad()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(IMAGES).square().sum()
        loss.backward()
        return kept, [parameter.grad.clone() for parameter in model.parameters()]

    whole, expected = gradients()
    model.set_grad_checkpointing(True)
    less, computed = gradients()
    torch.testing.assert_close(computed, expected)
    assert less < whole / 2
    model.set_grad_checkpointing(False)
    assert gradients()[0] == whole


# ---- timm


@pytest.mark.compatibility(
    library="timm",
    way="create_model",
    direction="out",
    what="classes, input channels, stochastic depth",
    models="convnext_min_atto",
)
def test_timm_creates_our_models():
    model = timm.create_model("convnext_min_atto", num_classes=3, in_chans=1, drop_path_rate=0.1)
    assert isinstance(model, Backbone) and model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    assert model.stages[3][1].drop_path.rate == pytest.approx(0.1)
    assert len(timm.list_models("convnext_min_*")) == 9
    assert timm.create_model("convnext_min_atto", num_classes=0)(IMAGES).shape == (2, 320)


@pytest.mark.compatibility(
    library="timm", way="create_model", direction="out", what="features_only, out_indices", models="convnext_min_atto"
)
def test_timm_gives_feature_maps():
    model = timm.create_model("convnext_min_atto", features_only=True, out_indices=(1, 3))
    assert model.feature_info.channels() == [80, 320] and model.feature_info.reduction() == [8, 32]
    assert [tuple(found.shape) for found in model(IMAGES)] == [(2, 80, 8, 12), (2, 320, 2, 3)]


@pytest.mark.compatibility(
    library="timm", way="create_model", direction="out", what="pretrained=True", models="convnext_min_tiny"
)
def test_timm_loads_the_official_weights(tmp_path):
    state = randomize(weights.create("convnext_tiny")).state_dict()
    torch.save({"model": state}, tmp_path / "convnext_tiny_1k_224_ema.pth")
    overlay = {"file": str(tmp_path / "convnext_tiny_1k_224_ema.pth")}
    model = timm.create_model("convnext_min_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    adapted = timm.create_model(
        "convnext_min_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=2, in_chans=1
    )
    torch.testing.assert_close(
        adapted.downsample_layers[0][0].weight, state["downsample_layers.0.0.weight"].sum(1, keepdim=True)
    )
    assert adapted.num_classes == 2


def test_timm_has_our_tags_with_their_addresses_and_preprocessing():
    names = timm.list_pretrained("convnext_min_*")
    ours = [(name, tag) for name, tag in weights.list_pretrained() if "isotropic" not in name]
    assert sorted(names) == sorted(f"{name.replace('convnext_', 'convnext_min_')}.{tag}" for name, tag in ours)
    config = timm.get_pretrained_cfg("convnext_min_base.in22k_in1k_384")
    assert config.url == weights.find("convnext_base", "in22k_in1k_384")
    assert config.input_size == (3, 384, 384) and config.crop_pct == 1.0
    assert timm.get_pretrained_cfg("convnext_min_tiny").tag == "in1k"
    assert timm.get_pretrained_cfg("convnext_min_tiny.in22k").num_classes == 21841


# ---- torch.hub


@pytest.mark.compatibility(
    library="torch.hub", way="hubconf.py", direction="out", what="load from a local copy", models="convnext_atto"
)
def test_torch_hub_from_a_local_copy():
    entries = runpy.run_path(str(ROOT / "hubconf.py"))
    assert {name for name in entries if name.startswith("convnext_")} == weights.VARIANTS.keys()
    assert "28.6M parameters" in entries["convnext_tiny"].__doc__
    state = weights.create("convnext_atto", num_classes=3).state_dict()
    model = torch.hub.load(ROOT, "convnext_atto", source="local", pretrained=state)
    assert type(model).__name__ == "ConvNeXt" and torch.equal(model.head.weight, state["head.weight"])
