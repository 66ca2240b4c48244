"""The reference against timm, torchvision, its other formulation and what the paper says of it."""

import ast
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from convnext_min import convnext as package
from convnext_min import paper
from convnext_min.blocks import ConvNeXtBlock
from convnext_min.convnext import Block, ConvNeXt, DropPath, LayerNorm, convnext_atto, convnext_tiny
from convnext_min.measure import count_macs, count_parameters

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}


def variant(name, **kwargs):
    return getattr(package, name)(**kwargs)


def randomize(model):
    """Break the symmetries of the initial values (zero biases, unit norms) so that a swapped weight shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", paper.VARIANTS)
def test_variants_have_the_papers_size_and_cost(name):
    published = paper.VARIANTS[name]
    with torch.device("meta"):
        model = variant(name)
    # S is given as 50M in the paper, the others with one decimal.
    assert count_parameters(model) / 1e6 == pytest.approx(
        published.params, abs=0.3 if name == "convnext_small" else 0.06
    )
    assert count_macs(model) / 1e9 == pytest.approx(published.gmacs_224, abs=0.06)
    # B at 384 counts 45.12, which the paper prints as 45.0.
    gmacs_384 = 45.12 if name == "convnext_base" else published.gmacs_384
    assert count_macs(model, 384) / 1e9 == pytest.approx(gmacs_384, abs=0.06)


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny"])
def test_variants_have_timms_size(name):
    with torch.device("meta"):
        ours, theirs = (
            variant(name),
            timm.create_model(name, **({} if name == "convnext_tiny" else {"conv_mlp": False})),
        )
        assert count_parameters(ours) == count_parameters(theirs)


@pytest.mark.parametrize("name", ["convnext_small", "convnext_base", "convnext_large"])
def test_variants_have_torchvisions_size(name):
    with torch.device("meta"):
        assert count_parameters(variant(name)) == count_parameters(getattr(torchvision.models, name)())


def to_timm(key):
    """Our name of a tensor as timm's (timm 1.0)."""
    key = key.replace("downsample_layers.0.", "stem.")
    for i in (1, 2, 3):
        key = key.replace(f"downsample_layers.{i}.", f"stages.{i}.downsample.")
    parts = key.split(".")
    if parts[0] == "stages" and parts[2] != "downsample":
        parts.insert(2, "blocks")
    key = ".".join(parts)
    key = key.replace("dwconv", "conv_dw").replace("pwconv1", "mlp.fc1").replace("pwconv2", "mlp.fc2")
    if key.startswith("head."):
        return key.replace("head.", "head.fc.")
    return key.replace("norm.", "head.norm.") if key.startswith("norm.") else key


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_atto"])
def test_logits_equal_timms(name):
    ours = randomize(variant(name))
    theirs = timm.create_model(name, **({"conv_mlp": False} if name == "convnext_atto" else {})).eval()
    theirs.load_state_dict({to_timm(key): value for key, value in ours.state_dict().items()})
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_small"])
def test_logits_equal_torchvisions(name):
    ours = randomize(variant(name))
    theirs = getattr(torchvision.models, name)().eval()
    # torchvision registers stages and downsampling layers by turns; its layer scale is (C, 1, 1).
    order = [f"downsample_layers.{i // 2}." if i % 2 == 0 else f"stages.{i // 2}." for i in range(8)] + [
        "norm.",
        "head.",
    ]
    state = ours.state_dict()
    ordered = [value for prefix in order for key, value in state.items() if key.startswith(prefix)]
    target = theirs.state_dict()
    assert len(ordered) == len(target)
    theirs.load_state_dict({key: value.reshape(old.shape) for (key, old), value in zip(target.items(), ordered)})
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_keys_are_the_official_releases():
    keys = set(convnext_tiny().state_dict())
    expected = {f"{layer}.{kind}" for layer in ("norm", "head") for kind in ("weight", "bias")}
    expected |= {f"downsample_layers.{i}.{j}.{kind}" for i in range(4) for j in range(2) for kind in ("weight", "bias")}
    for stage, depth in enumerate((3, 3, 9, 3)):
        for block in range(depth):
            expected.add(f"stages.{stage}.{block}.gamma")
            expected |= {
                f"stages.{stage}.{block}.{layer}.{kind}"
                for layer in ("dwconv", "norm", "pwconv1", "pwconv2")
                for kind in ("weight", "bias")
            }
    assert keys == expected


def test_initial_distribution():
    torch.manual_seed(0)  # with PyTorch 2.9, a rare weight lies far outside, which shows in a small layer
    model = convnext_tiny(layer_scale_init_value=1e-6)
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            assert torch.all(value == 1e-6)
        elif name.endswith("bias"):
            assert torch.all(value == 0), name
        elif value.ndim == 1:
            assert torch.all(value == 1), name  # norms
        else:  # truncation at +-2 is 100 standard deviations away: in effect a normal distribution
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(value.mean().item()) < 0.02 * 5 / value.numel() ** 0.5, name


def test_head_init_scale():
    torch.manual_seed(0)
    plain = ConvNeXt(**SMALL)
    torch.manual_seed(0)
    scaled = ConvNeXt(**SMALL, head_init_scale=0.001)
    torch.testing.assert_close(scaled.head.weight, 0.001 * plain.head.weight)
    torch.testing.assert_close(scaled.stages[0][0].dwconv.weight, plain.stages[0][0].dwconv.weight)


def test_the_two_block_formulations_are_one_function():
    linear, conv = Block(16, layer_scale_init_value=0).double(), ConvNeXtBlock(16, 16).double()
    randomize(linear)
    conv.load_state_dict({k: v.reshape(conv.state_dict()[k].shape) for k, v in linear.state_dict().items()})
    x = torch.randn(2, 16, 9, 7, dtype=torch.double)
    torch.testing.assert_close(linear(x), conv.eval()(x))


def test_layer_scale_multiplies_the_branch_alone():
    block = randomize(Block(8, layer_scale_init_value=1.0))
    x = torch.randn(2, 8, 7, 7)
    block.gamma.data.fill_(1.0)
    branch = block(x) - x
    block.gamma.data = torch.arange(8.0)
    torch.testing.assert_close(block(x) - x, torch.arange(8.0)[None, :, None, None] * branch, atol=1e-5, rtol=1e-4)
    assert Block(8, layer_scale_init_value=0).gamma is None


def test_drop_path_is_per_sample_and_rescaled():
    torch.manual_seed(0)
    drop, x = DropPath(0.25).train(), torch.ones(4000, 2, 3, 3)
    y = drop(x)
    per_sample = y.flatten(1)
    assert torch.all(per_sample == per_sample[:, :1]), "a sample is kept or dropped as a whole"
    assert sorted(set(per_sample[:, 0].tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert per_sample[:, 0].count_nonzero() / 4000 == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop.eval()(x), x)
    with pytest.raises(ValueError, match=r"1\.5"):
        DropPath(1.5)


def test_drop_path_rates_grow_linearly_over_all_blocks():
    model = convnext_tiny(drop_path_rate=0.17)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.01 * i for i in range(18)], abs=1e-6)


def test_stochastic_depth_is_off_in_eval_mode():
    torch.manual_seed(0)
    model = ConvNeXt(**SMALL, drop_path_rate=0.9, layer_scale_init_value=1.0)
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_layer_norm_normalizes_each_pixel_over_channels():
    norm, x = LayerNorm(6), torch.randn(2, 6, 5, 4) * 3 + 1
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert not torch.allclose(nn.GroupNorm(1, 6)(x), expected, atol=0.1)


@pytest.mark.parametrize("height, width", [(224, 224), (384, 384), (32, 32), (97, 51)])
def test_sizes(height, width):
    model = ConvNeXt(**SMALL).eval()
    with torch.inference_mode():
        assert model.forward_features(torch.randn(1, 3, height, width)).shape == (1, 32)
        assert model(torch.randn(1, 3, height, width)).shape == (1, 5)


def test_without_classes_the_output_is_the_features():
    model = ConvNeXt(**{**SMALL, "num_classes": 0}).eval()
    assert not [key for key in model.state_dict() if key.startswith("head")]
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), model.forward_features(images))
        assert model(images).shape == (2, 32)


@pytest.mark.compatibility(
    library="PyTorch", way="torch.jit.script", direction="out", what="equal logits", models="small ConvNeXt"
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"layer_scale_init_value": 0}, {"num_classes": 0}], ids=str)
def test_torchscript_computes_the_same(options):
    model = randomize(ConvNeXt(**{**SMALL, **options}, drop_path_rate=0.9))
    scripted, images = torch.jit.script(model), torch.randn(4, 3, 64, 32)
    with torch.inference_mode():
        torch.testing.assert_close(scripted(images), model(images))
        assert not torch.equal(scripted.train()(images), model(images)), "stochastic depth is on in training mode"


@pytest.mark.compatibility(
    library="torchvision",
    way="create_feature_extractor",
    direction="out",
    what="feature maps in training and evaluation mode",
    models="small ConvNeXt",
)
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained")  # stochastic depth: two graphs
def test_torchvision_extracts_the_stages_with_stochastic_depth():
    model = randomize(ConvNeXt(**SMALL, drop_path_rate=0.9))
    stages = create_feature_extractor(model, {f"stages.{i}": f"{i}" for i in range(4)})
    images = torch.randn(4, 3, 64, 32)
    evaluated, trained = stages.eval()(images), stages.train()(images)
    for i, (channels, stride) in enumerate(zip((8, 16, 24, 32), (4, 8, 16, 32))):
        assert evaluated[f"{i}"].shape == trained[f"{i}"].shape == (4, channels, 64 // stride, 32 // stride)
    torch.testing.assert_close(model.norm(evaluated["3"].mean([-2, -1])), model.forward_features(images))
    assert not torch.equal(evaluated["3"], trained["3"])


def test_other_input_channels():
    assert ConvNeXt(**SMALL, in_chans=5)(torch.randn(1, 5, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    "wrong", [{"depths": (1, 1, 1)}, {"dims": (8, 0, 8, 8)}, {"num_classes": -1}, {"in_chans": -1}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConvNeXt(**{**SMALL, **wrong})


def test_every_parameter_gets_a_gradient():
    model = convnext_atto(num_classes=3)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_the_file_stands_alone(tmp_path):
    source = Path(package.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 150
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"torch"}
    namespace = {"__name__": "copied"}
    exec(compile(source.replace("convnext_min", "forbidden"), "convnext.py", "exec"), namespace)
    assert namespace["convnext_atto"](num_classes=2)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
