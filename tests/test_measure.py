"""The counters against arithmetic done by hand."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from convnext_min import build, measure, paper
from convnext_min.convnext import convnext_atto


def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8 * 3 * 9 * (S / 2)^2 MACs
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 7, padding=3, groups=8),  # 8 * 49 * (S / 2)^2
        nn.Flatten(),
        nn.LazyLinear(5),
    )


@pytest.mark.parametrize("resolution", [8, 16])
def test_macs_and_parameters_by_hand(resolution):
    model = tiny()
    model(torch.zeros(1, 3, resolution, resolution))
    pixels = (resolution // 2) ** 2
    assert measure.count_macs(model, resolution) == pixels * (8 * 27 + 8 * 49) + 8 * pixels * 5
    assert measure.count_parameters(model) == 8 * 27 + 16 + 8 * 50 + 8 * pixels * 5 + 5


def test_counting_leaves_the_model_alone():
    model = convnext_atto(num_classes=2).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measure.count_macs(model, 64)
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_activation_memory_by_hand():
    # autograd keeps a ReLU's output and a linear layer's input: here both 4 x 10 floats, and the image's 4 x 12.
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 1))
    assert measure.activation_memory(model, resolution=2, batch_size=4) == 4 * (4 * 12 + 4 * 10)


def test_measuring_activations_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # the convolution keeps the image, the norm the convolution's output and its mean and variance
    assert measure.activation_memory(model, 4, batch_size=2) == 4 * (2 * 3 * 16 + 2 * 8 * 16 + 8 + 8)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_layer_costs_split_what_the_counter_counts():
    model = build("depthwise", num_classes=10, width_multiplier=0.25).train()
    costs = measure.layer_costs(model, 64, batch_size=2, repeats=1)
    assert sum(cost.macs for cost in costs) == measure.count_macs(model, 64)
    names = [cost.name for cost in costs]
    assert names[0] == "stem.0" and names[-1] == "head" and "stages.0.0.shortcut.1" in names
    assert all(cost.seconds > 0 for cost in costs if isinstance(cost.layer, (nn.Conv2d, nn.BatchNorm2d)))
    assert model.training and not any(layer._forward_hooks for layer in model.modules())


def test_layer_costs_add_up_a_layer_that_is_used_twice():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    (cost,) = measure.layer_costs(nn.Sequential(conv, conv), 4, batch_size=5, repeats=2)
    assert cost.macs == 2 * 3 * 3 * 16


def test_throughput_counts_images(monkeypatch):
    ticks = itertools.count()  # a second passes each time the clock is read
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    result = measure.throughput(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), 4, batch_size=3, training=True, repeats=3
    )
    assert result == (3.0, 3.0, 3.0)


def test_throughput_waits_for_the_accelerator_that_the_model_is_on(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: waits.append(device))
    for kind, number in (("cpu", 3), ("xpu", 0)):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=kind: torch.device(kind))
        measure.throughput(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), 4, batch_size=1, repeats=2)
        assert waits == [torch.device("cpu")] * number
        waits.clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["resnet50"], "error: unknown model 'resnet50'; valid: convnext_atto"), ([], "2")],
)
def test_a_command_without_a_known_network_says_what_is_valid(arguments, message, capsys):
    with pytest.raises(SystemExit, match=message):
        measure.main(arguments)
    assert arguments or "give the name of a model, such as convnext_tiny, or --road" in capsys.readouterr().err


def test_a_network_on_the_command_line(capsys):
    measure.main(["convnext_tiny"])
    assert capsys.readouterr().out == "convnext_tiny: 28,589,128 parameters, 4.456 GMACs for one 224x224 image\n"


def test_road_table_on_the_command_line(capsys):
    measure.main(["--road"])
    out = capsys.readouterr().out
    first, second = out.split("resnet200 regime")
    rows = {line.split()[0]: line.split() for line in first.splitlines() if "." in line}
    assert list(rows) == list(paper.TABLE10)
    assert rows["layer_norm"][-5:] == ["4.146", "4.46", "-0.31", "25.84", "81.47"]
    assert "15.355" in second and "83.60" in second
