"""Parameter groups and the optimizer: weight decay by role, layer-wise decay as in the paper's appendix."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torchvision
from helpers import TINY, new_trainer
from timm.optim import muon
from torch import nn

from convnext_min import convnext, recipes
from convnext_min.train import create_model, optim, prepare
from convnext_min.train.optim import group_of, learning_rate_scales, newton_schulz_float32, parameter_groups

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
    names = decayed_names(create_model("convnext_atto", TINY, 10))
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


# ---- Layer-wise decay


def build(name):
    with torch.device("meta"):
        return getattr(convnext, name)(num_classes=10)


# For each depths: the groups of the downsampling layers, of the blocks of each stage, of the classifier.
BY_HAND = {
    (3, 3, 27, 3): ([0, 2, 3, 12], [[1] * 3, [2] * 3, [g for g in range(3, 12) for _ in range(3)], [12] * 3], 13),
    (3, 3, 9, 3): ([0, 2, 3, 6], [[1] * 3, [2] * 3, [3] * 3 + [4] * 3 + [5] * 3, [6] * 3], 7),
    (2, 2, 6, 2): ([0, 2, 3, 5], [[1] * 2, [2] * 2, [3] * 3 + [4] * 3, [5] * 2], 6),
    (2, 2, 8, 2): ([0, 2, 3, 6], [[1] * 2, [2] * 2, [3] * 3 + [4] * 3 + [5] * 2, [6] * 2], 7),
}


@pytest.mark.parametrize("depths", BY_HAND)
def test_three_consecutive_blocks_are_a_group(depths):
    downsamplings, stages, last = BY_HAND[depths]
    assert [group_of(f"downsample_layers.{i}.0.weight", depths) for i in range(4)] == downsamplings
    for i, groups in enumerate(stages):
        assert [group_of(f"stages.{i}.{j}.gamma", depths) for j in range(depths[i])] == groups
    assert {group_of(name, depths) for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")} == {last}


@pytest.mark.parametrize("depths, last", [((3, 3, 27, 3), 13), ((3, 3, 9, 3), 7)])
def test_stages_are_groups_as_in_the_released_segmentation(depths, last):
    assert {group_of(f"downsample_layers.{i}.0.weight", depths, stage_wise=True) for i in range(4)} == {0}
    for i, depth in enumerate(depths):
        assert {group_of(f"stages.{i}.{j}.gamma", depths, stage_wise=True) for j in range(depth)} == {i + 1}
    assert group_of("head.weight", depths, stage_wise=True) == last


@pytest.mark.parametrize("name", [name for name in vars(convnext) if name.startswith("convnext_")])
def test_every_variant_has_a_rate_for_every_parameter(name):
    model = build(name)
    depths = tuple(map(len, model.stages))
    scales = learning_rate_scales(model, 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert len(set(scales.values())) == BY_HAND[depths][2] + 1
    assert scales["head.weight"] == 1.0 and scales["stages.3.0.pwconv1.weight"] == 0.5
    assert scales["downsample_layers.0.0.weight"] == min(scales.values()) == 0.5 ** BY_HAND[depths][2]


def test_groups_for_the_optimizer_have_the_rate_of_their_layers_and_the_decay_of_their_role():
    model = build("convnext_tiny")
    groups = parameter_groups(model, 1e-8, 0.8)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(model.parameters()))
    for name, power, decay in (  # the classifier is group 7
        ("head.weight", 0, 1e-8),
        ("norm.weight", 0, 0.0),
        ("stages.3.2.dwconv.weight", 1, 1e-8),
        ("stages.3.2.gamma", 1, 0.0),
        ("downsample_layers.3.1.weight", 1, 1e-8),
        ("stages.2.8.pwconv2.bias", 2, 0.0),
        ("stages.2.3.pwconv2.weight", 3, 1e-8),
        ("stages.2.2.norm.weight", 4, 0.0),
        ("stages.0.0.dwconv.weight", 6, 1e-8),
        ("downsample_layers.0.0.weight", 7, 1e-8),
        ("downsample_layers.0.1.weight", 7, 0.0),
    ):
        group = of[id(model.get_parameter(name))]
        assert (group["lr_scale"], group["weight_decay"]) == (pytest.approx(0.8**power), decay), name


def test_the_first_group_has_the_rate_of_the_run():
    assert parameter_groups(build("convnext_atto"), 0.05, 0.5)[0]["lr_scale"] == 1.0


def test_without_layer_decay_all_learn_at_the_same_rate():
    assert {group["lr_scale"] for group in parameter_groups(nn.Linear(2, 2), 0.05)} == {1.0}


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="layer_decay needs a convnext_<variant>, got ResNet"):
        parameter_groups(torchvision.models.resnet18(), 0.05, 0.8)


# ---- Optimizers


@pytest.mark.parametrize("able, optimizer", [(True, "muon"), (False, "muon"), (False, "nmuon")])
def test_muon_computes_in_bfloat16_only_where_the_machine_does(able, optimizer, images, monkeypatch):
    """Without instructions for it, a step in bfloat16 takes seconds."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    bfloat16, float32 = Mock(wraps=muon.zeropower_via_newtonschulz), Mock(wraps=newton_schulz_float32)
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", bfloat16)
    monkeypatch.setattr(optim, "newton_schulz_float32", float32)
    run = new_trainer(replace(TINY, optimizer=optimizer, amp="auto"), images)
    assert run.optimizer.defaults["nesterov"] == (optimizer == "nmuon")
    run.train_step(*next(iter(run.batches.epoch(0))))
    assert (bfloat16.called, float32.called) == (able, not able)
    for call in (bfloat16 if able else float32).call_args_list:
        assert call.args[1] == 3 and call.args[2][0] == pytest.approx((8.2373, -23.1577, 16.6806), abs=1e-4)
    assert muon.zeropower_via_newtonschulz is bfloat16  # and not what a step puts in its place


@pytest.mark.parametrize("rows, columns", [(24, 96), (96, 24), (32, 32)])
@pytest.mark.parametrize("preset, steps", [("polar_express", 3), ("quintic", 5)])
@pytest.mark.parametrize("smallest", [0.1, 1e-6, 0.0])
def test_an_update_is_orthogonalized_like_timms(rows, columns, preset, steps, smallest):
    left, right = (torch.linalg.qr(torch.randn(side, 24, dtype=torch.float64))[0] for side in (rows, columns))
    update = 3 * (left * torch.linspace(1, 0, 24).double().clamp(min=smallest)) @ right.mT  # of rank 24 or 23
    coefficients = muon._COEFFICIENTS[preset]
    expected = muon.zeropower_via_newtonschulz(update, steps, coefficients, dtype=torch.float64)
    ours = newton_schulz_float32(update.float(), steps, coefficients, muon.MUON_EPS)
    assert ours.shape == update.shape and ours.dtype == torch.float32
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_the_classic_recipe_is_sgd_with_momentum_and_its_own_decay(images):
    recipe = replace(recipes.get("road-classic"), epochs=1, resolution=32, eval_resolution=32, batch_size=20)
    run, _ = prepare("road:resnet50", recipe, images, images)
    (decayed, free), optimizer = run.optimizer.param_groups, run.optimizer
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0.0)
    before = run.model.stem[0].weight.detach().clone()
    run.train_step(*next(run.batches.epoch(0)))
    assert not torch.equal(run.model.stem[0].weight, before)


def test_the_recipe_of_make_train_takes_its_steps(images):
    sizes = {key: getattr(TINY, key) for key in ("resolution", "eval_resolution", "image_size", "depths", "dims")}
    recipe = replace(recipes.get("imagenette-3min"), minutes=None, epochs=1, batch_size=8, progressive=(), **sizes)
    run = new_trainer(recipe, images)
    before = run.model.stages[0][0].pwconv1.weight.detach().clone()
    for x, y in run.batches.epoch(0):  # the first step of the warm-up has a rate of 0
        run.train_step(x, y)
    assert not torch.equal(run.model.stages[0][0].pwconv1.weight, before)
