"""Devices and precision."""

import pytest
import torch

from convnext_min.train.device import autocast_dtype, choose_device


def test_the_precision_can_be_forced_and_fp16_is_for_gpus():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [autocast_dtype(amp, cpu) for amp in ("bf16", "fp32")] == [torch.bfloat16, None]
    assert autocast_dtype("fp16", gpu) == torch.float16
    with pytest.raises(ValueError, match="amp=fp16 is for GPUs, and this run is on cpu: use bf16 or fp32"):
        autocast_dtype("fp16", cpu)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "device 'gpu' cannot be used here: .*gpu"), ("cuda:99", "device 'cuda:99' cannot be used here")],
)
def test_devices_that_are_not_there_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        choose_device(name)
