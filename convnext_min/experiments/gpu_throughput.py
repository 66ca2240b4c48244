"""Measure the throughput of ConvNeXt and of the Swin Transformer of its size on a GPU, as in Table 12 of the paper.

`python -m convnext_min.experiments.gpu_throughput --output book/results/speed/gpu` writes throughput.csv, a row per
pair, and environment.json. Both networks of a pair take turns in one process. Swin is timm's.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from tqdm.auto import tqdm

from convnext_min import convnext
from convnext_min.environment import environment, write_json
from convnext_min.experiments.run import write_rows
from convnext_min.measure import throughput

PAIRS = {  # size and resolution: ConvNeXt, Swin, images per forward pass
    "T": ("convnext_tiny", "swin_tiny_patch4_window7_224", 128),
    "S": ("convnext_small", "swin_small_patch4_window7_224", 128),
    "B": ("convnext_base", "swin_base_patch4_window7_224", 128),
    "B, 384": ("convnext_base", "swin_base_patch4_window12_384", 64),
    "L": ("convnext_large", "swin_large_patch4_window7_224", 128),
    "L, 384": ("convnext_large", "swin_large_patch4_window12_384", 64),
}


class Setting(NamedTuple):
    """Number format, "tf32" or "bf16", and whether the networks are compiled; images are channels-last."""

    amp: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.amp}, {'torch.compile' if self.compiled else 'eager'}"


SETTINGS = (Setting("tf32", False), Setting("bf16", False), Setting("bf16", True))


@contextlib.contextmanager
def number_format(amp: str) -> Iterator[None]:
    """Multiply float32 numbers as TF32, and with "bf16" compute in bfloat16, as autocast chooses."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _ChannelsLast(nn.Module):
    def __init__(self, model: nn.Module, compiled: bool):
        super().__init__()
        model = model.cuda().eval().to(memory_format=torch.channels_last)
        self.model = torch.compile(model) if compiled else model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.contiguous(memory_format=torch.channels_last))


def measure(pair: str, setting: Setting, rounds: int = 5) -> dict[str, Any]:
    """Return images per second of both networks of `pair`, a key of PAIRS, and the ratio of ConvNeXt to Swin.

    They run `rounds` times in alternation; values are the median, and for the ratio also the lowest and the highest.
    """
    ours, theirs, batch = PAIRS[pair]
    side = int(theirs[-3:])
    torch._dynamo.reset()
    swin = timm.create_model(theirs)
    networks = [_ChannelsLast(network, setting.compiled) for network in (getattr(convnext, ours)(), swin)]
    speeds: list[tuple[float, ...]] = []
    with number_format(setting.amp):
        for _ in range(rounds):
            speeds.append(tuple(throughput(network, side, batch, repeats=3).median for network in networks))
    ratios = [convnext_speed / swin_speed for convnext_speed, swin_speed in speeds]
    medians = [round(statistics.median(column), 1) for column in zip(*speeds)]
    return {
        "size": pair,
        "setting": str(setting),
        "batch": batch,
        **dict(zip(("convnext", "swin"), medians)),
        "ratio": round(statistics.median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.experiments.gpu_throughput", description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="SIZE")
    parser.add_argument("--output", type=Path, default=Path("results/speed/gpu"))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("error: this measures a GPU, and PyTorch finds none")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for setting in SETTINGS:
        for pair in tqdm(args.pairs, str(setting), disable=None):
            rows.append(measure(pair, setting))
            print("{size:<7} {setting:<20} {convnext:8.1f} {swin:8.1f} img/s, {ratio:.2f}x".format(**rows[-1]))
            write_rows(rows, args.output / "throughput.csv")
            write_json(environment() | {"device": torch.cuda.get_device_name()}, args.output / "environment.json")


if __name__ == "__main__":
    main()
