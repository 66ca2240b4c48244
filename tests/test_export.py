"""torch.compile, torch.export and ONNX: the same logits and maps, with dynamic batch and image size."""

import numpy as np
import onnxruntime
import pytest
import torch
from test_convnext import randomize
from torch import nn

from convnext_min.backbone import Backbone
from convnext_min.convnext import ConvNeXt
from convnext_min.isotropic import ConvNeXtIsotropic

SIZES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


class LogitsAndMaps(nn.Module):
    """A classifier that also returns its four feature maps."""

    def __init__(self):
        super().__init__()
        self.model = Backbone(**SIZES, num_classes=5)

    def forward(self, x):
        last, maps = self.model.forward_intermediates(x)
        return [self.model.forward_head(last), *maps]


MODELS = {
    "small ConvNeXt": LogitsAndMaps,
    "small isotropic": lambda: ConvNeXtIsotropic(depth=2, dim=16, num_classes=5),
}
# A program of torch.export takes images whose last map is at least 2x2: 64 pixels, or 32 for isotropic models.
SHAPES = [(2, 3, 64, 96), (1, 3, 224, 224), (3, 3, 65, 97)]
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


def outputs(model, images):
    with torch.no_grad():
        result = model(images)
    return result if isinstance(result, list) else [result]


@pytest.mark.compatibility(
    library="PyTorch",
    way="torch.compile",
    direction="out",
    what="one graph, equal logits",
    models="{which}",
)
@pytest.mark.parametrize("which", MODELS)
def test_torch_compile_has_one_graph_and_computes_the_same(which):
    model = randomize(MODELS[which]())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(outputs(compiled, images), outputs(model, images), rtol=1e-4, atol=1e-4)


def test_torch_compile_trains_with_stochastic_depth():
    model = ConvNeXt(**SIZES, num_classes=5, drop_path_rate=0.5).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.compatibility(
    library="PyTorch",
    way="torch.export",
    direction="out",
    what="dynamic batch and size",
    models="{which}",
)
@pytest.mark.parametrize("which", MODELS)
def test_torch_export_with_dynamic_batch_and_size(which):
    model = randomize(MODELS[which]())
    program = torch.export.export(model, (torch.randn(2, 3, 96, 64),), dynamic_shapes=(DYNAMIC,))
    for shape in SHAPES:
        images = torch.randn(shape)
        torch.testing.assert_close(outputs(program.module(), images), outputs(model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.compatibility(
    library="ONNX",
    way="onnxruntime",
    direction="out",
    what="equal to 1e-4, dynamic batch and size",
    models="{which}",
)
@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
@pytest.mark.parametrize("which", MODELS)
def test_onnxruntime_computes_the_same_with_dynamic_batch_and_size(which, tmp_path):
    model = randomize(MODELS[which]())
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.randn(2, 3, 96, 64),), path, dynamo=True, input_names=["images"], dynamic_shapes=(DYNAMIC,)
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        images = torch.randn(shape)
        for computed, expected in zip(session.run(None, {"images": images.numpy()}), outputs(model, images)):
            scale = expected.abs().max().item()
            np.testing.assert_allclose(computed, expected.numpy(), rtol=1e-4, atol=1e-4 * scale)
