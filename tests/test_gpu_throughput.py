"""The comparison of ConvNeXt and Swin on a GPU: what it reports, and that it needs one."""

import pytest
import torch
from torch import nn

from convnext_min.experiments import gpu_throughput
from convnext_min.measure import Throughput


def test_speeds_are_divided_within_a_round(monkeypatch):
    rounds = iter([(90.0, 60.0), (120.0, 100.0), (110.0, 100.0)])  # the machine becomes faster
    speeds = iter([speed for pair in rounds for speed in pair])
    shapes = []

    def throughput(network, side, batch, repeats):
        shapes.append((side, batch))
        return Throughput(next(speeds), 0.0, 0.0)

    monkeypatch.setattr(gpu_throughput, "throughput", throughput)
    monkeypatch.setattr(gpu_throughput, "_ChannelsLast", lambda network, compiled: network)
    monkeypatch.setattr(gpu_throughput.convnext, "convnext_base", nn.Identity)
    monkeypatch.setattr(gpu_throughput.timm, "create_model", lambda name: nn.Identity())
    row = gpu_throughput.measure("B, 384", gpu_throughput.Setting("tf32", False), rounds=3)
    assert (row["convnext"], row["swin"]) == (110.0, 100.0)
    assert (row["ratio"], row["low"], row["high"]) == (1.2, 1.1, 1.5)  # not 1.1, the ratio of the medians
    assert set(shapes) == {(384, 64)}


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: this measures a GPU"):
        gpu_throughput.main(["--output", str(tmp_path / "gpu")])
    assert not (tmp_path / "gpu").exists()
