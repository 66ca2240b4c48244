"""Networks by name, with the stem and the initial weights of a recipe."""

import re
from dataclasses import replace

import pytest
import torch
from helpers import TINY
from torch import nn

from convnext_min import recipes
from convnext_min.measure import count_macs, count_parameters
from convnext_min.recipes import INITS, Recipe
from convnext_min.train import create_model


@pytest.mark.parametrize("name", ["road:convnext", "timm:convnext_atto", "torchvision:convnext_tiny"])
def test_models_of_the_road_and_of_other_libraries_have_names(name):
    assert create_model(name, Recipe(drop_path=0.1), 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_model_gets_what_the_recipe_says():
    model = create_model("convnext_femto", replace(TINY, drop_path=0.2, head_init_scale=0.0), 3)
    assert [len(stage) for stage in model.stages] == [1, 1, 1, 1] and model.stages[3][0].pwconv1.in_features == 16
    assert model.stages[3][0].drop_path.rate == pytest.approx(0.2) and model.stages[0][0].gamma[0] == 1.0
    assert not model.head.weight.any()


@pytest.mark.parametrize(("size", "drop_path"), [("small", 0.1), ("base", 0.2), ("large", 0.5)])
def test_the_papers_recipe_builds_its_isotropic_models(size, drop_path):
    name = f"convnext_isotropic_{size}"
    with torch.device("meta"):
        model = create_model(name, recipes.get("in1k", model=name), 1000)
    assert model.blocks[-1].drop_path.rate == pytest.approx(drop_path)
    assert (model.blocks[0].gamma is None) == (size != "large")  # appendix A.1: the large one has layer scale


def test_the_two_small_isotropic_networks_are_of_one_size():
    networks = [create_model(f"isotropic:{name}", Recipe(drop_path=0.1), 10) for name in ("convnext", "vit")]
    assert all(network(torch.zeros(2, 3, 64, 64)).shape == (2, 10) for network in networks)
    convnext, vit = map(count_parameters, networks)
    assert convnext == pytest.approx(vit, rel=0.06)
    convnext, vit = (count_macs(network, 64) for network in networks)
    assert 0.9 * vit < convnext < vit  # in Table 2, too, the ConvNeXt takes fewer
    with pytest.raises(ValueError, match=r"unknown model 'isotropic:swin'.*with one of the names convnext, vit,"):
        create_model("isotropic:swin", Recipe(), 10)


def test_an_isotropic_model_has_no_stages_to_set():
    for field, value in (("depths", (1, 1, 1, 1)), ("dims", (8, 8, 8, 8)), ("stem", "overlapping")):
        with pytest.raises(ValueError, match=f"{field} can be set for convnext_atto.*, not for 'convnext_isotropic_"):
            create_model("convnext_isotropic_small", Recipe(**{field: value}), 10)


def test_a_name_is_checked_before_the_fields():
    with pytest.raises(ValueError, match="unknown model 'convnext_isotropic_tiny'; valid: convnext_atto"):
        create_model("convnext_isotropic_tiny", Recipe(depths=(1, 1, 1, 1)), 10)


def test_wrong_models_say_what_is_right():
    plain = Recipe()
    with pytest.raises(ValueError, match=r"unknown model 'convnext'; valid: convnext_atto,.*road:<step>.*depthwise"):
        create_model("convnext", plain, 10)
    with pytest.raises(ValueError, match="unknown step 'kernel13'; valid"):
        create_model("road:kernel13", plain, 10)
    with pytest.raises(ValueError, match=r"depths can be set for convnext_atto.*not for 'road:gelu'"):
        create_model("road:gelu", TINY, 10)
    for name, changes, message in (
        ("timm:convnext_atto", {"layer_scale_init": 0.2}, "for 'timm:convnext_atto': --set layer_scale_init=1e-06"),
        ("convnext_atto", {"width_multiplier": 0.25}, "width_multiplier can be set for road:<step>, not for"),
        ("timm:convnext_atta", {}, "timm:convnext_atta cannot be created: Unknown model"),
        ("torchvision:vgg11", {"drop_path": 0.1}, "torchvision:vgg11 has no stochastic depth: --set drop_path=0.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            create_model(name, replace(plain, **changes), 10)
    assert create_model("torchvision:squeezenet1_1", plain, 10)(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def built(**settings):
    torch.manual_seed(0)
    return create_model("convnext_atto", Recipe(**settings), 10)


def test_overlapping_stem_has_the_patchify_stems_shape_and_leaves_the_rest_alone():
    plain, changed = built(), built(stem="overlapping")
    image = torch.randn(2, 3, 96, 64)
    assert changed.downsample_layers[0](image).shape == plain.downsample_layers[0](image).shape == (2, 40, 24, 16)
    rest = {k: v for k, v in plain.state_dict().items() if not k.startswith("downsample_layers.0")}
    assert all(torch.equal(changed.state_dict()[k], v) for k, v in rest.items())


def test_a_pixel_on_a_patch_border_reaches_both_neighbours_in_the_overlapping_stem_only():
    for stem, reached in (("patchify", 1), ("overlapping", 2)):
        image = torch.zeros(1, 3, 32, 32, requires_grad=True)
        out = built(stem=stem).downsample_layers[0][:-1](image)  # without the norm
        touched = 0
        for column in (3, 4):
            (grad,) = torch.autograd.grad(out[0, :, 4, column].sum(), image, retain_graph=True)
            touched += bool(grad[0, :, 16, 15].any())  # row 16 and column 15: the last pixel of patch (4, 3)
        assert touched == reached


def test_fan_in_init_keeps_the_size_of_the_signal_where_the_papers_shrinks_it():
    x = torch.randn(8, 40, 16, 16)
    sizes = {}
    for init in INITS:
        torch.manual_seed(1)
        block = built(init=init).stages[0][0]
        sizes[init] = block.dwconv(x)[:, :, 3:-3, 3:-3].std().item()
    assert sizes["fan_in"] == pytest.approx(1.0, abs=0.1)
    assert sizes["paper"] == pytest.approx(0.02 * 7, abs=0.02)
    assert sizes["pytorch"] == pytest.approx(3**-0.5, abs=0.1)


def test_fan_in_init_leaves_the_classifier_to_the_recipe():
    head = built(init="fan_in", head_init_scale=0.001).head
    assert head.weight.std().item() == pytest.approx(0.02 * 0.001, rel=0.1)


@pytest.mark.parametrize("key", ["stem", "init"])
def test_unknown_values_and_other_models_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} must be p.* or .*, got 'conv'"):
        Recipe(**{key: "conv"})
    with pytest.raises(ValueError, match=f"{key} can be set for convnext_atto.*not for 'timm:resnet18'"):
        create_model("timm:resnet18", Recipe(**{key: {"stem": "overlapping", "init": "fan_in"}[key]}), 10)


def test_the_road_takes_fan_in_init_too():
    torch.manual_seed(0)
    model = create_model("road:fewer_norms", Recipe(init="fan_in", width_multiplier=0.25), 10)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1), name
    with pytest.raises(ValueError, match=r"stem can be set for convnext_atto.*not for 'road:gelu'"):
        create_model("road:gelu", Recipe(stem="overlapping"), 10)
