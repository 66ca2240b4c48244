"""One step of training, and everything it depends on: what a checkpoint holds and a resumed run starts from.

What step k does follows from the weights, the seed and k alone, so a run that was interrupted and resumed ends, on the
same machine, with the weights of one that was not.
"""

import contextlib
import dataclasses
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from convnext_min import fast
from convnext_min.data import Batches, ImageSet
from convnext_min.layer_decay import learning_rate_scales
from convnext_min.recipes import Recipe

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NOT_DECAYED = ("bias", "gamma", "layer_scale")  # layer scale is `gamma` here and in timm, `layer_scale` in torchvision
WRITING_SECONDS = 5.0  # kept free at the end of a timed run for the checkpoint and the curve


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """The trained parameters in groups: with weight decay, and without it (biases, norms and layer scale).

    What a parameter is decides, not its shape: torchvision stores layer scale as (C, 1, 1). With a `layer_decay` below
    1 there are two such groups for each group of layers; the learning rate of a group is the run's times `lr_scale`.
    """
    scales = learning_rate_scales(model, layer_decay) if layer_decay < 1 else {}
    groups = {}  # scale: parameters with and without decay
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                decayed, free = groups.setdefault(scales.get(name, 1.0), ([], []))
                exempt = name.rpartition(".")[2] in NOT_DECAYED or isinstance(module, NORMS)
                (free if exempt else decayed).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for scale, pair in sorted(groups.items(), reverse=True)  # that of the run's own rate first: it is logged
        for parameters, decay in zip(pair, (weight_decay, 0.0))
    ]


def uses_bf16(amp: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16 under autocast; "auto" does where the hardware multiplies it natively."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()  # before PyTorch 2.10 nothing is known
    return any(able.get(feature, False) for feature in ("avx512_bf16", "amx_bf16", "bf16"))


class Run:
    """A network in training: all that a checkpoint holds, and its place in the schedule."""

    def __init__(
        self, model: nn.Module, name: str, recipe: Recipe, train_set: ImageSet, seed: int, device: str, started: float
    ):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.recipe, self.seed, self.device = recipe, seed, torch.device(device)
        classes = len(train_set.classes)
        self._check_outputs(name, classes)
        groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
        self.optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.lr, betas=recipe.betas)
        if self.device.type == "cpu":
            fast.accelerate(model)
        self.ema = None
        if recipe.ema_decay:
            self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self.mix = self.erase = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
        if recipe.erasing:
            self.erase = RandomErasing(recipe.erasing, mode="pixel", device=device)
        self.bf16 = uses_bf16(recipe.amp, self.device)
        self.batches = Batches(train_set, recipe.batch_size, recipe.resolution, True, seed, recipe.crop_scale)
        self.identity = {  # in every checkpoint of the run
            "model": name,
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "classes": train_set.classes,
            "source": train_set.source,
        }
        self.step = 0  # steps of the optimizer so far
        self.rows: list[dict] = []  # one for each line of the log
        self.sums = {"loss": 0.0, "steps": 0, "seconds": 0.0}  # of the steps since the last row
        self.started, self.earlier = started, 0.0  # start of this process; seconds of those that it continues
        self.window = (0.0, 0.0)  # seconds at which a timed run begins and stops training

    def _check_outputs(self, name: str, classes: int) -> None:
        side = self.recipe.resolution
        with torch.no_grad():
            outputs = tuple(self.model.eval()(torch.zeros(2, 3, side, side, device=self.device)).shape)
        if outputs != (2, classes):
            raise ValueError(f"the data has {classes} classes, but for two images {name} gives a tensor {outputs}")
        self.model.train()

    def __str__(self) -> str:
        faster = ", accelerated by convnext_min.fast" if self.device.type == "cpu" else ""
        return f"on {self.device} in {'bf16' if self.bf16 else 'fp32'}{faster}, seed {self.seed}"

    @property
    def best(self) -> nn.Module:
        """The network with the weights to use: the averaged ones, if the recipe wants them."""
        return self.ema.module if self.ema else self.model

    def _average(self, averages: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        get_ema_multi_avg_fn(self.recipe.ema_decay_at(int(updates)))(averages, weights, updates)

    @property
    def seconds(self) -> float:
        """Wall clock since the start of the process, with those of the processes that it resumes."""
        return self.earlier + time.time() - self.started

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, from 0 to 1: of its minutes, if the recipe gives them, or its steps."""
        if self.recipe.minutes is None:
            return self.step / (self.recipe.epochs * len(self.batches))
        first, last = self.window
        return min(1.0, (self.seconds - first) / (last - first))

    def open_window(self, evaluation: float) -> None:
        """Begin the schedule of a timed run now, and end it `evaluation` seconds, and those for writing, early."""
        first = self.window[0] if self.step else self.seconds
        last = 60 * self.recipe.minutes - evaluation - WRITING_SECONDS
        if first >= last:
            raise ValueError(
                f"minutes={self.recipe.minutes:g} leaves no time to train: the start took {first:.0f} s, and the last "
                f"evaluation and writing take {evaluation + WRITING_SECONDS:.0f} s"
            )
        self.window = (first, last)

    def has_time_for(self, seconds: float) -> bool:
        """Whether there is training left to do after a pause of so many seconds."""
        return self.recipe.minutes is None or self.seconds + seconds < self.window[1]

    def train_step(self, x: Tensor, y: Tensor) -> float:
        """One step on images (B, 3, R, R) and labels (B,): the loss. Raises FloatingPointError if it is not finite."""
        self._seed_step()
        lr = self.recipe.lr_at(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        y, smoothing = y.to(self.device, non_blocking=True), self.recipe.label_smoothing
        if self.mix:
            x, y = self.mix(x, y)  # y: (B, classes), smoothed
            smoothing = 0.0
        if self.erase:
            x = self.erase(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}, at learning rate {lr:.3g}; "
                "a lower base_lr or clip_grad=1.0 may help"
            )
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1
        self.sums["loss"] += value
        self.sums["steps"] += 1
        return value

    def _seed_step(self) -> None:
        """Seed what a step draws from (stochastic depth, mixing, erasing) by its number: nothing to save or restore."""
        seed = int(np.random.SeedSequence((self.seed, self.step)).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def new_row(self) -> dict[str, Any]:
        """A row for the log about the steps since the last one, without evaluation."""
        self.rows.append(
            {
                "epoch": round(self.step / len(self.batches), 2),
                "step": self.step,
                "seconds": round(self.seconds, 1),
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": self.sums["loss"] / self.sums["steps"],
                "val_loss": None,  # of the weights to use
                "top1": None,
                "ema_top1": None,
                "images_per_second": round(self.recipe.batch_size * self.sums["steps"] / self.sums["seconds"], 1),
                "resolution": self.batches.resolution,
            }
        )
        self.sums = dict.fromkeys(self.sums, 0)
        return self.rows[-1]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, and `load` takes."""
        return self.identity | {
            "weights": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "sums": self.sums,
            "seconds": self.seconds,
            "window": self.window,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError, naming what differs, if it is another run's."""
        for key, mine in self.identity.items():
            theirs = state[key]
            if key == "recipe":
                changed = [name for name in mine if mine[name] != theirs.get(name)]
                mine, theirs = ({name: values.get(name) for name in changed} for values in (mine, theirs))
            if mine != theirs:
                raise ValueError(f"the checkpoint is another run's: its {key} is {theirs}, here it is {mine}")
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(state["step"])
        self.step, self.rows, self.sums = state["step"], state["rows"], state["sums"]
        self.earlier, self.window = state["seconds"], state["window"]


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is never left half done; a second one stops at once."""
    requests, previous = [], {}

    def note(number: int, frame: Any) -> None:
        requests.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
