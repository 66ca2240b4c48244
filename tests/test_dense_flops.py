"""The second verified ladder: what the paper's detectors and segmentation networks cost, row by row."""

import pytest
import torch
from torch import nn

from convnext_min.convnext import LayerNorm
from convnext_min.dense import flops

COUNTED = {  # GMACs in convolutions and linear layers alone
    ("mask_rcnn", "tiny", 1280): 261.9,
    ("cascade_mask_rcnn", "resnet50", 1280): 737.6,
    ("cascade_mask_rcnn", "tiny", 1280): 740.2,
    ("cascade_mask_rcnn", "small", 1280): 826.4,
    ("cascade_mask_rcnn", "base", 1280): 963.6,
    ("cascade_mask_rcnn", "large", 1280): 1353.4,
    ("cascade_mask_rcnn", "xlarge", 1280): 1897.4,
    ("upernet", "tiny", 2048): 938.5,
    ("upernet", "small", 2048): 1026.8,
    ("upernet", "base", 2048): 1169.3,
    ("upernet", "base", 2560): 1827.1,
    ("upernet", "large", 2560): 2457.4,
    ("upernet", "xlarge", 2560): 3334.3,
}


@pytest.mark.parametrize("row", flops.TABLES, ids=lambda row: f"{row.head}-{row.variant}-{row.size[0]}")
def test_cost_of_each_row_of_the_paper(row):
    parts, params = flops.cost(row.head, row.variant, *row.size)
    assert round(sum(parts.values()) / 1e9) == row.gmacs
    del parts[flops.EXTRAS]
    assert sum(parts.values()) / 1e9 == pytest.approx(COUNTED[row.head, row.variant, row.size[0]], abs=0.1)
    if row.params is not None:
        assert round(params / 1e6) == row.params


def test_parts_of_mask_rcnn():
    parts, _ = flops.cost("mask_rcnn", "tiny", 1280, 800)
    gmacs = {name: round(value / 1e9, 1) for name, value in parts.items()}
    layers = {"backbone": 90.9, "pyramid": 53.1, "proposals": 50.6, "boxes": 14.3, "masks": 53.0}
    assert gmacs == layers | {flops.EXTRAS: 0.1}


@pytest.mark.parametrize(
    ("layer", "operations"),
    [
        (nn.BatchNorm2d(8), 2),
        (nn.ReLU(), 1),
        (nn.ReLU(inplace=True), 1),
        (nn.MaxPool2d(2), 1),
        (nn.AdaptiveAvgPool2d(2), 1),
        (nn.AdaptiveAvgPool2d(1), 1),
        (LayerNorm(8), 0),
        (nn.GELU(), 0),
    ],
    ids=lambda value: str(value).partition("(")[0],
)
def test_operations_per_value_beside_convolutions(layer, operations):
    x = torch.empty(1, 8, 10, 10, device="meta")
    assert flops.macs(layer.to("meta").eval(), x, extras=True) == operations * x.numel()
    assert flops.macs(layer, x) == 0


def test_the_command_prints_every_row_beside_the_papers(capsys, monkeypatch):
    monkeypatch.setattr(flops, "TABLES", flops.TABLES[:1])
    flops.main([])
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:5] == ["mask_rcnn", "tiny", "1280x800", "262.0", "262"]
