"""The isotropic models against the official formulation, and the paper's cost and size (Table 2)."""

import pytest
import torch
from test_convnext import randomize
from torch.nn import functional as F

from convnext_min import isotropic, recipes, weights
from convnext_min.convnext import DropPath
from convnext_min.isotropic import ConvNeXtIsotropic
from convnext_min.measure import count_macs, count_parameters
from convnext_min.train import train

SMALL = {"depth": 3, "dim": 16, "num_classes": 5}
# million parameters and GMACs of Table 2
PUBLISHED = {"small": (22, 4.3), "base": (87, 16.9), "large": (306, 59.7)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_size_and_cost_are_the_papers(size):
    with torch.device("meta"):
        model = getattr(isotropic, f"convnext_isotropic_{size}")()
    parameters, gmacs = PUBLISHED[size]
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, abs=0.5)
    assert count_macs(model) / 1e9 == pytest.approx(gmacs, abs=0.06)


def official(state, images):
    """The official formulation, written out as functions of a state dict with the released keys."""
    x = F.conv2d(images, state["stem.weight"], state["stem.bias"], stride=16)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for b in range(depth):
        block = {key.removeprefix(f"blocks.{b}."): v for key, v in state.items() if key.startswith(f"blocks.{b}.")}
        y = F.conv2d(x, block["dwconv.weight"], block["dwconv.bias"], padding=3, groups=x.shape[1]).movedim(1, -1)
        y = F.layer_norm(y, y.shape[-1:], block["norm.weight"], block["norm.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, block["pwconv1.weight"], block["pwconv1.bias"])), block["pwconv2.weight"])
        y = y + block["pwconv2.bias"]
        x = x + (y * block["gamma"] if "gamma" in block else y).movedim(-1, 1)
    x = x.mean([-2, -1])
    x = F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    return F.linear(x, state["head.weight"], state["head.bias"])


@pytest.mark.compatibility(
    library="official",
    way="state dict",
    direction="in and out",
    what="isotropic models, equal logits, 1e-5",
    models="small isotropic",
)
@pytest.mark.parametrize("layer_scale", [0.0, 1e-6])
def test_keys_and_function_are_the_official_ones(layer_scale):
    model = randomize(ConvNeXtIsotropic(**SMALL, layer_scale_init_value=layer_scale))
    images = torch.randn(2, 3, 48, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), official(model.state_dict(), images), rtol=1e-5, atol=1e-5)
    layers = ["dwconv", "norm", "pwconv1", "pwconv2"]
    expected = {f"blocks.{b}.{layer}.{kind}" for b in range(3) for layer in layers for kind in ("weight", "bias")}
    expected |= {f"{layer}.{kind}" for layer in ("stem", "norm", "head") for kind in ("weight", "bias")}
    expected |= {f"blocks.{b}.gamma" for b in range(3) if layer_scale}
    assert model.state_dict().keys() == expected


def test_initial_weights_rates_and_head_scale():
    torch.manual_seed(0)
    model = isotropic.convnext_isotropic_small(num_classes=100, drop_path_rate=0.17, head_init_scale=0.001)
    assert [m.rate for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([0.01 * i for i in range(18)])
    assert model.stem.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.05)
    assert not model.stem.bias.any() and model.blocks[0].gamma is None


@pytest.mark.compatibility(
    library="official",
    way="torch.save file",
    direction="in and out",
    what="isotropic models, with and without layer scale",
    models="small isotropic",
)
def test_released_weights_load_with_and_without_layer_scale(tmp_path):
    for layer_scale in (0.0, 1e-6):
        model = randomize(ConvNeXtIsotropic(**SMALL, layer_scale_init_value=layer_scale))
        torch.save({"model": model.state_dict()}, tmp_path / "iso.pth")
        loaded = weights.load(tmp_path / "iso.pth").eval()
        images = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            assert torch.equal(loaded(images), model(images))
    assert weights.convert(model.state_dict(), "official").keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="timm has no isotropic ConvNeXt"):
        weights.convert(model.state_dict(), "timm")
    one = weights.load(tmp_path / "iso.pth", in_chans=1, num_classes=0).eval()
    grey = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(one(grey), model.forward_features(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_the_patch_size_is_read_from_the_weights():
    model = randomize(ConvNeXtIsotropic(**SMALL, patch_size=8))
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(weights.load(model.state_dict())(images), model(images))
    with pytest.raises(ValueError, match=r"They are of .*patch_size=8\) .*, the model is .*depth=3, dim=16\)"):
        weights.load_weights(ConvNeXtIsotropic(**SMALL), model.state_dict())


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"patch_size": 0}, {"dim": -1}, {"num_classes": -1}, {"in_chans": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        ConvNeXtIsotropic(**{**SMALL, **wrong})


def test_the_papers_recipe_trains_an_isotropic_model(images):
    settings = ["epochs=1", "batch_size=8", "base_batch=8", "resolution=32", "eval_resolution=32", "image_size=32"]
    recipe = recipes.get("in1k", settings, "convnext_isotropic_small")
    few = images.subset(slice(8))
    history = train("convnext_isotropic_small", recipe, few, few)
    assert isinstance(history.model, ConvNeXtIsotropic) and history.model.blocks[0].gamma is None
