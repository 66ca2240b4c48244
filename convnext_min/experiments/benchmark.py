"""Measure training and inference speed, and the memory of training, against other implementations of ConvNeXt.

All run in turn in one process, each in its fastest setting of number format, memory layout and torch.compile:
`python -m convnext_min.experiments.benchmark official timm torchvision --mode train`. Then each trains in a process of
its own, for the peak of its memory.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig
from tqdm.auto import tqdm

from convnext_min import convnext, fast
from convnext_min.environment import environment, write_json
from convnext_min.experiments.memory import added_memory
from convnext_min.train.device import autocast_dtype

CLASSES = 1000


def _torchvision(name: str) -> nn.Module:
    """Build torchvision's ConvNeXt with the depths and widths of our `name`; torchvision lacks the small variants."""
    ours = getattr(convnext, name)(num_classes=1)
    dims, depths = [stage[0].dwconv.in_channels for stage in ours.stages], [len(stage) for stage in ours.stages]
    settings = [CNBlockConfig(dim, to, depth) for dim, to, depth in zip(dims, [*dims[1:], None], depths)]
    return torchvision.models.ConvNeXt(settings, num_classes=CLASSES)


IMPLEMENTATIONS: dict[str, Callable[[str], nn.Module]] = {
    "convnext_min": lambda name: fast.accelerate(getattr(convnext, name)(num_classes=CLASSES)),
    "official": lambda name: getattr(convnext, name)(num_classes=CLASSES),  # the official formulation of the block
    "timm": lambda name: timm.create_model(name, num_classes=CLASSES),
    "torchvision": _torchvision,
}


class Setting(NamedTuple):
    """The setting of a benchmark: number format, memory layout, and eager or compiled."""

    amp: str
    layout: str
    how: str

    def __str__(self) -> str:
        return ", ".join(self)


SETTINGS = [
    Setting(*choice)
    for choice in itertools.product(("fp32", "bf16"), ("NCHW", "channels-last"), ("eager", "torch.compile"))
]


def native_settings() -> list[Setting]:
    """Return SETTINGS, without bfloat16 on a CPU that lacks bfloat16 instructions: one step takes minutes there."""
    bf16 = autocast_dtype("auto", torch.device("cpu")) is not None
    return [setting for setting in SETTINGS if bf16 or setting.amp == "fp32"]


class Shape(NamedTuple):
    """The workload: a variant of ConvNeXt, image side in pixels, images per step, and "train" or "infer"."""

    model: str = "convnext_atto"
    resolution: int = 128
    batch_size: int = 32
    mode: str = "train"


class Workload:
    """One implementation in one setting, with random images to run it on."""

    def __init__(self, name: str, setting: Setting, shape: Shape):
        torch.manual_seed(0)
        training = shape.mode == "train"
        layout = torch.channels_last if setting.layout == "channels-last" else torch.contiguous_format
        self.model = IMPLEMENTATIONS[name](shape.model).to(memory_format=layout).train(training)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True) if training else None
        self.images = torch.randn(shape.batch_size, 3, shape.resolution, shape.resolution).to(memory_format=layout)
        self.labels = torch.arange(shape.batch_size) % CLASSES
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting.amp == "bf16")
        torch._dynamo.reset()
        self.forward = torch.compile(self.model) if setting.how == "torch.compile" else self.model

    def step(self) -> None:
        """Run the forward pass and, in training, the backward pass and one AdamW step."""
        if self.optimizer is None:
            with torch.inference_mode(), self.autocast:
                self.forward(self.images)
            return
        with self.autocast:
            logits = self.forward(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def speed(self, seconds: float) -> float:
        """Return images per second over all steps that start within `seconds`."""
        steps, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            self.step()
            steps += 1
        return steps * len(self.images) / spent


def best_setting(
    name: str, settings: Sequence[Setting], shape: Shape, seconds: float, bar: tqdm
) -> tuple[Workload, dict[str, float]]:
    """Return the fastest workload of an implementation, and the images per second of each setting."""
    speeds: dict[str, float] = {}
    for setting in settings:
        workload = Workload(name, setting, shape)
        workload.step()  # compiles and allocates
        workload.step()
        speed = workload.speed(seconds)
        if speed > max(speeds.values(), default=0.0):
            best = workload
        speeds[str(setting)] = round(speed, 1)
        bar.update()
    return best, speeds


def benchmark(
    baselines: Sequence[str],
    model: str = "convnext_atto",
    resolution: int = 128,
    batch_size: int = 32,
    mode: str = "train",
    rounds: int = 9,
    seconds: float = 3.0,
    settings: Sequence[Setting] | None = None,
) -> dict[str, Any]:
    """Measure images per second of `convnext_min` and of `baselines`, keys of IMPLEMENTATIONS, on the CPU.

    Each implementation first runs in all `settings`, by default `native_settings()`, for `seconds` each, and keeps its
    fastest. Then all take turns for `seconds`, `rounds` times, with the same allocator settings
    (`fast.keep_freed_memory`), threads and images. Returns the contents of a results file. Raises ValueError, listing
    what is valid, for an unknown baseline, model or mode, and for sizes that are too small.
    """
    shape = Shape(model, resolution, batch_size, mode)
    _check(baselines, shape, rounds)
    fast.keep_freed_memory()
    names = ["convnext_min", *(name for name in baselines if name != "convnext_min")]
    settings = native_settings() if settings is None else settings
    with tqdm(total=len(names) * len(settings), desc="choosing settings", disable=None) as bar:
        best = {name: best_setting(name, settings, shape, seconds, bar) for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(rounds), "rounds", disable=None):
        for name, (workload, _) in best.items():
            workload.step()
            speeds[name].append(workload.speed(seconds))
    results = {
        name: {
            "images_per_second": _spread(speeds[name]),
            "ratio": _spread([ours / theirs for ours, theirs in zip(speeds["convnext_min"], speeds[name])]),
            "setting": max(trials, key=trials.__getitem__),
            "trials": trials,
        }
        for name, (_, trials) in best.items()
    }
    return shape._asdict() | {"rounds": rounds, "seconds": seconds, "results": results} | environment()


def _check(baselines: Sequence[str], shape: Shape, rounds: int) -> None:
    models = [name for name in vars(convnext) if name.startswith("convnext_")]
    for value, valid in (
        (shape.model, models),
        (shape.mode, ("train", "infer")),
        *((name, IMPLEMENTATIONS) for name in baselines),
    ):
        if value not in valid:
            raise ValueError(f"unknown {value!r}; valid: {', '.join(valid)}")
    if shape.resolution < 32 or shape.batch_size < 1 or rounds < 1:
        raise ValueError(
            "resolution must be at least 32, batch size and rounds at least 1, "
            f"got {shape.resolution}, {shape.batch_size} and {rounds}"
        )


def train(name: str, setting: Setting, shape: Shape, iterations: int = 3) -> None:
    """Build an implementation and train it for some iterations; the second is the first that has AdamW's state."""
    workload = Workload(name, setting, shape)
    for _ in range(iterations):
        workload.step()


def memory(contest: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Measure the peak memory of training of the implementations `names` in `contest`, the contents of a results file.

    Each trains for a few iterations in the setting, and at the sizes, that it has there. Its memory is what these add
    to a fresh process that has imported all implementations: weights, gradients, AdamW's state, images, activations,
    and the buffers of libraries. Only `convnext_min` changes the allocator's settings (`fast.keep_freed_memory`).
    Returns the contents of a results file: under "memory", the setting and the megabytes of each implementation. Raises
    ValueError for a contest without training or without one of `names`.
    """
    if contest["mode"] != "train":
        raise ValueError(f"memory is measured in training, and the contest's mode is {contest['mode']!r}")
    for name in names:
        if name not in contest["results"]:
            raise ValueError(f"the contest has no {name!r}; it has {', '.join(contest['results'])}")
    shape = Shape(*(contest[field] for field in Shape._fields))
    measured: dict[str, Any] = {}
    for name in tqdm(names, "memory", disable=None):
        setting = contest["results"][name]["setting"]
        added = added_memory(train, name, Setting(*setting.split(", ")), shape)
        measured[name] = {"setting": setting, "megabytes": round(added / 1e6)}
    return shape._asdict() | {"memory": measured} | environment()


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def report(outcome: Mapping[str, Any]) -> str:
    """Return the outcome of `benchmark` as text, one line per implementation."""
    lines = ["{model}, {resolution} px, batch {batch_size}, {mode}: median (lowest-highest)".format(**outcome)]
    for name, result in outcome["results"].items():
        speed, ratio = result["images_per_second"], result["ratio"]
        lines.append(
            f"{name:<13} {speed['median']:7.1f} img/s ({speed['low']:.1f}-{speed['high']:.1f})  "
            f"ours is {ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})  [{result['setting']}]"
        )
    return "\n".join(lines)


def memory_report(outcome: Mapping[str, Any]) -> str:
    """Return the peak memory of training as text, one line per implementation."""
    lines = ["{model}, {resolution} px, batch {batch_size}: peak memory of training".format(**outcome)]
    for name, result in outcome["memory"].items():
        lines.append(f"{name:<13} {result['megabytes']:5} MB  [{result['setting']}]")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.experiments.benchmark", description=__doc__)
    parser.add_argument("baselines", nargs="+", metavar="BASELINE", help="official, timm or torchvision")
    parser.add_argument("--model", default="convnext_atto", help="a variant of ConvNeXt")
    parser.add_argument("--resolution", type=int, default=128, help="image side in pixels (128)")
    parser.add_argument("--batch", type=int, default=32, help="images per iteration (32)")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", type=Path, metavar="JSON", help="only memory, in the settings of this result")
    parser.add_argument("--output", type=Path, default=Path("results/speed"), help="folder for the results as JSON")
    args = parser.parse_args(argv)
    try:
        if args.memory_of:
            outcome = memory(json.loads(args.memory_of.read_text()), args.baselines)
        else:
            outcome = benchmark(args.baselines, args.model, args.resolution, args.batch, args.mode, args.rounds)
            print(report(outcome))
            if args.mode == "train":
                outcome |= memory(outcome, list(outcome["results"]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if "memory" in outcome:
        print(memory_report(outcome))
    args.output.mkdir(parents=True, exist_ok=True)
    kind = "memory" if args.memory_of else args.mode
    path = args.output / "{}-{model}-{resolution}px-batch{batch_size}.json".format(kind, **outcome)
    write_json(outcome, path)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
