"""Groups of layers and their learning rates, against what the paper's appendix describes, worked out here by hand."""

import pytest
import torch
import torchvision
from torch import nn

from convnext_min import convnext
from convnext_min.train import engine
from convnext_min.train.layer_decay import group_of, learning_rate_scales


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
    groups = engine.parameter_groups(model, 1e-8, 0.8)
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
    assert engine.parameter_groups(build("convnext_atto"), 0.05, 0.5)[0]["lr_scale"] == 1.0


def test_without_layer_decay_all_learn_at_the_same_rate():
    assert {group["lr_scale"] for group in engine.parameter_groups(nn.Linear(2, 2), 0.05)} == {1.0}


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="layer_decay needs a convnext_<variant>, got ResNet"):
        engine.parameter_groups(torchvision.models.resnet18(), 0.05, 0.8)
