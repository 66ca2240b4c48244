"""`accelerate` changes how the gradients are computed, and nothing else."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

from convnext_min import fast
from convnext_min.convnext import convnext_atto
from convnext_min.roadmap import build


def gradients(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


def assert_same(got, right, tolerance=1e-5):
    for a, b in zip(got, right, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 6, 14, 14), (3, 5, 13, 9), (2, 4, 12, 15)])
def test_gradients_equal_autograds(kernel, stride, shape):
    torch.manual_seed(0)
    chans = shape[1]
    conv = nn.Conv2d(chans, chans, kernel, stride, kernel // 2, groups=chans)
    x = torch.randn(shape)
    right = gradients(conv, x)
    assert_same(gradients(fast.accelerate(conv), x), right)


@pytest.mark.parametrize(
    "make",
    [
        lambda: convnext_atto(num_classes=3, layer_scale_init_value=1.0),
        lambda: timm.create_model("convnext_atto", num_classes=3),
        lambda: torchvision.models.mobilenet_v2(num_classes=3),
    ],
    ids=["ours", "timm", "mobilenet"],
)
def test_models_of_any_library_compute_what_they_did(make):
    torch.manual_seed(0)
    model = make().eval()
    x, before = torch.randn(2, 3, 64, 64), {key: value.clone() for key, value in model.state_dict().items()}
    right = gradients(model, x)
    assert fast.accelerate(model) is model
    assert any(isinstance(module, fast.FastDepthwise) for module in model.modules())
    assert_same(gradients(model, x), right, tolerance=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(before) == list(model.state_dict())


def test_restore_brings_every_class_back():
    for model in (convnext_atto(num_classes=3), build("convnext", width_multiplier=0.1), build("kernel5")):
        kinds = [type(module) for module in model.modules()]
        fast.accelerate(model)
        changed = {type(m) for m, kind in zip(model.modules(), kinds) if type(m) is not kind}
        assert changed and all(kind.__module__ == "convnext_min.fast" for kind in changed)
        assert [type(module) for module in fast.restore(model).modules()] == kinds


def test_copies_and_pickles_work():
    model = fast.accelerate(convnext_atto(num_classes=3)).eval()
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_under_autocast_the_gradients_stay_close():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    x = torch.randn(2, 8, 16, 16)
    right = gradients(conv, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(fast.accelerate(conv), x)
    assert_same([part.float() for part in got], right, tolerance=0.02)
