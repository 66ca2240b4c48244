"""Speed against other implementations: all in one process, by turns, each with the settings that suit it best.

`python -m convnext_min.experiments.benchmark official timm torchvision --mode train` is its command line.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
from convnext_min.train.engine import autocast_dtype

CLASSES = 1000


def _torchvision(name: str) -> nn.Module:
    """torchvision's ConvNeXt in the sizes of our `name`, of which it may not know the name."""
    ours = getattr(convnext, name)(num_classes=1)
    dims, depths = [stage[0].dwconv.in_channels for stage in ours.stages], [len(stage) for stage in ours.stages]
    settings = [CNBlockConfig(dim, to, depth) for dim, to, depth in zip(dims, [*dims[1:], None], depths)]
    return torchvision.models.ConvNeXt(settings, num_classes=CLASSES)


CONTESTANTS: dict[str, Callable[[str], nn.Module]] = {
    "convnext_min": lambda name: fast.accelerate(getattr(convnext, name)(num_classes=CLASSES)),
    "official": lambda name: getattr(convnext, name)(num_classes=CLASSES),  # the same formulation as the release's
    "timm": lambda name: timm.create_model(name, num_classes=CLASSES),
    "torchvision": _torchvision,
}


class Setting(NamedTuple):
    """How a model is run: number format, memory layout, and whether through torch.compile."""

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
    """SETTINGS, without bfloat16 where the CPU has no instructions for it: a step in it would take minutes there."""
    bf16 = autocast_dtype("auto", torch.device("cpu")) is not None
    return [setting for setting in SETTINGS if bf16 or setting.amp == "fp32"]


class Contestant:
    """One model, ready to run one step after another on the same random images."""

    def __init__(self, name: str, model: str, setting: Setting, resolution: int, batch_size: int, mode: str):
        torch.manual_seed(0)
        layout = torch.channels_last if setting.layout == "channels-last" else torch.contiguous_format
        self.model = CONTESTANTS[name](model).to(memory_format=layout).train(mode == "train")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True) if mode == "train" else None
        self.images = torch.randn(batch_size, 3, resolution, resolution).to(memory_format=layout)
        self.labels = torch.arange(batch_size) % CLASSES
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting.amp == "bf16")
        torch._dynamo.reset()
        self.run = torch.compile(self.model) if setting.how == "torch.compile" else self.model

    def step(self) -> None:
        """Forward; in training also backward and a step of AdamW."""
        if self.optimizer is None:
            with torch.inference_mode(), self.autocast:
                self.run(self.images)
            return
        with self.autocast:
            logits = self.run(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def speed(self, seconds: float) -> float:
        """Images a second, over as many steps as begin within `seconds`."""
        steps, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            self.step()
            steps += 1
        return steps * len(self.images) / spent


def contest(
    rivals: Sequence[str],
    model: str = "convnext_atto",
    resolution: int = 128,
    batch_size: int = 32,
    mode: str = "train",
    rounds: int = 9,
    seconds: float = 3.0,
    settings: Sequence[Setting] | None = None,
) -> dict[str, Any]:
    """Speed in images a second of `convnext_min` and `rivals`, out of CONTESTANTS, on the CPU.

    Each is tried with all `settings`, by default `native_settings()`, and the fastest goes through. Then `rounds`
    rounds: each in turn for `seconds`. All have the same allocator settings (`fast.keep_freed_memory`), threads and
    images. Returns what belongs into a results file. Raises ValueError, listing what is valid, for an unknown rival,
    model or mode, and for numbers that are too small.
    """
    models = [name for name in vars(convnext) if name.startswith("convnext_")]
    for value, valid in ((model, models), (mode, ("train", "infer")), *((rival, CONTESTANTS) for rival in rivals)):
        if value not in valid:
            raise ValueError(f"unknown {value!r}; valid: {', '.join(valid)}")
    if resolution < 32 or batch_size < 1 or rounds < 1:
        raise ValueError(f"it takes 32 px, an image and a round at least, got {resolution}, {batch_size}, {rounds}")
    fast.keep_freed_memory()
    names = ["convnext_min", *(rival for rival in rivals if rival != "convnext_min")]
    trials: dict[str, dict[str, float]] = {name: {} for name in names}
    finalists = {}
    settings = native_settings() if settings is None else settings
    for name, setting in tqdm(list(itertools.product(names, settings)), "choosing settings", disable=None):
        contestant = Contestant(name, model, setting, resolution, batch_size, mode)
        contestant.step()  # compiles, and allocates
        contestant.step()
        speed = contestant.speed(seconds)
        if speed > max(trials[name].values(), default=0.0):
            finalists[name] = contestant
        trials[name][str(setting)] = round(speed, 1)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(rounds), "rounds", disable=None):
        for name in names:
            finalists[name].step()
            speeds[name].append(finalists[name].speed(seconds))
    results = {
        name: {
            "images_per_second": _spread(speeds[name]),
            "ratio": _spread([ours / theirs for ours, theirs in zip(speeds["convnext_min"], speeds[name])]),
            "setting": max(trials[name], key=trials[name].__getitem__),
            "trials": trials[name],
        }
        for name in names
    }
    sizes = {"model": model, "resolution": resolution, "batch_size": batch_size, "mode": mode}
    return sizes | {"rounds": rounds, "seconds": seconds, "results": results} | environment()


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def report(outcome: dict[str, Any]) -> str:
    """The outcome of `contest` as text: a line a contestant."""
    lines = ["{model}, {resolution} px, batch {batch_size}, {mode}: median (lowest-highest)".format(**outcome)]
    for name, result in outcome["results"].items():
        speed, ratio = result["images_per_second"], result["ratio"]
        lines.append(
            f"{name:<13} {speed['median']:7.1f} img/s ({speed['low']:.1f}-{speed['high']:.1f})  "
            f"ours is {ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})  [{result['setting']}]"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m convnext_min.experiments.benchmark", description=__doc__)
    parser.add_argument("baselines", nargs="+", metavar="BASELINE", help="official, timm or torchvision")
    parser.add_argument("--model", default="convnext_atto", help="a variant of ConvNeXt")
    parser.add_argument("--resolution", type=int, default=128, help="in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--mode", choices=("train", "infer"), default="train")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("results/speed"), help="folder for the results as JSON")
    args = parser.parse_args(argv)
    try:
        outcome = contest(args.baselines, args.model, args.resolution, args.batch, args.mode, args.rounds)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(report(outcome))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.mode}-{args.model}-{args.resolution}px-batch{args.batch}.json"
    write_json(outcome, path)
    print(f"In {path}")


if __name__ == "__main__":
    main()
