"""One step of training, and everything it depends on: what a checkpoint holds and a resumed run starts from.

What step k does follows from the weights, the seed and k alone, so a run that was interrupted and resumed ends, on the
same machine, with the weights of one that was not. The same steps in several processes, or on a batch in several parts,
differ by rounding, and by what stochastic depth, mixing and erasing draw.
"""

import contextlib
import dataclasses
import functools
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2, muon
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from convnext_min import fast
from convnext_min.data import Batches
from convnext_min.recipes import Recipe, complete
from convnext_min.train import distributed
from convnext_min.train.layer_decay import learning_rate_scales

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS)
NOT_DECAYED = ("bias", "gamma", "layer_scale")  # layer scale is `gamma` here and in timm, `layer_scale` in torchvision
WRITING_SECONDS = 5.0  # kept free at the end of a timed run for the checkpoint and the curve
ONE_REQUEST = 2.0  # seconds within which signals are one request: Ctrl-C reaches a process also through torchrun


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a run uses its machines, and what it leaves there. A run may be continued with another setup."""

    per_device_batch: int | None = None  # images of a process at a time; None: all that it gets of a batch
    compile: bool = False
    accelerate: bool = True  # on a CPU, without `compile`: see `fast`
    checkpoint_activations: bool = False
    fsdp: bool = False  # the network split over the processes, instead of a copy in each
    save_every: str = ""  # besides the end of each epoch: "500" steps, "15m" minutes
    keep: int = 2  # checkpoints, the newest and those before it
    wandb: str = ""  # project of Weights & Biases

    def __post_init__(self):
        number = self.save_every.removesuffix("m")
        if self.save_every and not (number.isdecimal() and int(number)):
            raise ValueError(f"save_every takes steps, as in 500, or minutes, as in 15m; got {self.save_every!r}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")

    @property
    def interval(self) -> tuple[float, float]:
        """Steps and seconds between two checkpoints within an epoch."""
        if not self.save_every:
            return math.inf, math.inf
        number, minutes = int(self.save_every.removesuffix("m")), self.save_every.endswith("m")
        return (math.inf, 60 * number) if minutes else (number, math.inf)


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


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """What to compute in under autocast, None for float32; "auto" is bfloat16 where hardware multiplies it natively.

    Raises ValueError for float16 on a CPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"amp=fp16 is for GPUs, and this runs on {device}: take bf16 or fp32")
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # nothing before PyTorch 2.10
    return torch.bfloat16 if any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


@contextlib.contextmanager
def muon_in(dtype: torch.dtype) -> Iterator[None]:
    """Let timm's Muon orthogonalize in `dtype`.

    It does so in bfloat16, and with that a step of convnext_atto's weights takes PyTorch six seconds on a CPU that
    lacks instructions for it, forty times as long as in float32.
    """
    plain = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = functools.partial(plain, dtype=dtype)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = plain


def images_at_a_time(recipe: Recipe, setup: Setup) -> int:
    """How many images a process takes at a time. Raises ValueError if such parts do not make up the batch."""
    batch, world = recipe.batch_size, distributed.world()
    size = batch // world if setup.per_device_batch is None else setup.per_device_batch
    if size < 1 or batch % (size * world):
        per = f"{size} images" + (f" in each of {world} processes" if world > 1 else "")
        raise ValueError(f"a batch of {batch} images cannot be made up of parts of {per}")
    if (recipe.mixup or recipe.cutmix) and size % 2:
        raise ValueError(f"mixup and cutmix need an even number of images at a time in a process, got {size}")
    return size


class Run:
    """A network in training: all that a checkpoint holds, and its place in the schedule."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        recipe: Recipe,
        batches: Batches,
        seed: int,
        device: torch.device | str,
        started: float,
        setup: Setup | None = None,
    ):
        self.device, self.setup = torch.device(device), setup or Setup()
        self.recipe, self.batches, self.seed = recipe, batches, seed
        self.dtype = autocast_dtype(recipe.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        if self.setup.fsdp and self.scaler.is_enabled():
            raise ValueError("--fsdp is not tested with amp=fp16: take bf16")
        self.micro_batch = images_at_a_time(recipe, self.setup)
        classes = len(batches.classes)
        # Shards are cut from contiguous weights; images are channels-last all the same.
        model = model.to(self.device, memory_format=torch.preserve_format if self.setup.fsdp else torch.channels_last)
        if self.device.type == "cuda" and distributed.world() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # it exists for GPUs only
        self.model = model
        self._check_outputs(name, classes)
        self.accelerated = self.setup.accelerate and self.device.type == "cpu" and not self.setup.compile
        if self.accelerated:
            fast.accelerate(model)
        self.ema = None
        if recipe.ema_decay:
            self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self.network = self._laid_out()
        self.forward = torch.compile(self.network) if self.setup.compile else self.network
        groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
        options = {"betas": recipe.betas} if recipe.betas else {}
        self.optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.lr, **options)
        self.mix = self.erase = None
        if recipe.mixup or recipe.cutmix:
            if min(recipe.batch_size, batches.images) % 2:
                raise ValueError(f"mixup and cutmix need an even batch, and there are only {batches.images} images")
            self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
        if recipe.erasing and not getattr(batches, "erases", False):
            self.erase = RandomErasing(recipe.erasing, mode="pixel", device=self.device)
        self.identity = {  # in every checkpoint of the run
            "model": name,
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "classes": batches.classes,
            "source": batches.source,
        }
        self.step = 0  # steps of the optimizer so far
        self.lr = 0.0  # of the last one
        self.rows: list[dict] = []  # one for each line of the log
        self.sums = {"loss": 0.0, "steps": 0, "seconds": 0.0}  # of the steps since the last row
        self.started, self.earlier = started, 0.0  # start of this process; seconds of those that it continues
        self.earlier_cpu = 0.0
        self.window = (0.0, 0.0)  # seconds at which a timed run begins and stops training
        self.stopped = False
        self.agree()

    def _laid_out(self) -> nn.Module:
        """The network as this machine computes it: the same parameters, here or split over the processes."""
        if self.setup.fsdp:
            distributed.shard(self.model, self.device)
            if self.ema:
                distributed.shard(self.ema.module, self.device)
        if self.setup.checkpoint_activations:
            distributed.checkpoint_activations(self.model)
        return self.model if self.setup.fsdp else distributed.copies(self.model)

    def _check_outputs(self, name: str, classes: int) -> None:
        side = self.recipe.resolution
        try:
            with torch.no_grad():
                outputs = tuple(self.model.eval()(torch.zeros(2, 3, side, side, device=self.device)).shape)
        except (AssertionError, RuntimeError) as error:  # one for another size of image, say
            raise ValueError(f"{name} does not take images of {side}x{side} pixels: {error}") from error
        if outputs != (2, classes):
            raise ValueError(f"the data has {classes} classes, but for two images {name} gives a tensor {outputs}")
        self.model.train()

    def __str__(self) -> str:
        batch, size, world = self.recipe.batch_size, self.micro_batch, distributed.world()
        parts = batch // (size * world)
        norms = {type(module) for module in self.model.modules() if isinstance(module, BATCH_NORMS)}
        normed = size * world if norms == {nn.SyncBatchNorm} else size
        return ", ".join(
            [f"on {self.device} in {str(self.dtype or torch.float32).removeprefix('torch.')}"]
            + [f"{world} processes"] * (world > 1)
            + [f"a batch in {parts} parts of {size}"] * (parts > 1)
            + [f"BatchNorm over {normed} images"] * (bool(norms) and normed < batch)
            + ["accelerated by convnext_min.fast"] * self.accelerated
            + [f"seed {self.seed}"]
        )

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
    def cpu_seconds(self) -> float:
        """Time of the processor, over all its cores, in this process and those that it resumes."""
        times = psutil.Process().cpu_times()
        return self.earlier_cpu + times.user + times.system

    def agree(self, stop: bool = False) -> None:
        """Take the clock of the first process, `now`, and whether any has to stop: what comes next depends on both."""
        first = distributed.rank() == 0
        self.now, stops = distributed.total(self.seconds if first else 0.0, stop)
        self.stopped = self.stopped or stops > 0

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, from 0 to 1: of its minutes, if the recipe gives them, or its steps."""
        if self.recipe.minutes is None:
            return self.step / (self.recipe.epochs * len(self.batches))
        first, last = self.window
        if last <= first:  # not open yet, as in a dry run
            return 0.0
        return min(1.0, (self.now - first) / (last - first))

    def open_window(self, evaluation: float) -> None:
        """Begin the schedule of a timed run now, and end it `evaluation` seconds, and those for writing, early."""
        self.agree()
        first = self.window[0] if self.step else self.now
        last = 60 * self.recipe.minutes - evaluation - WRITING_SECONDS
        if first >= last:
            raise ValueError(
                f"minutes={self.recipe.minutes:g} leaves no time to train: the start took {first:.0f} s, and the last "
                f"evaluation and writing take {evaluation + WRITING_SECONDS:.0f} s"
            )
        self.window = (first, last)

    def has_time_for(self, seconds: float) -> bool:
        """Whether there is training left to do after a pause of so many seconds."""
        return self.recipe.minutes is None or self.now + seconds < self.window[1]

    def train_step(self, x: Tensor, y: Tensor) -> float:
        """One step on images (B, 3, R, R) and labels (B,), this process's part of the batch: the loss of all of it.

        Raises FloatingPointError, in all processes and before the weights change, if the loss is not finite.
        """
        self.lr = self.recipe.lr_at(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        parts = list(zip(x.split(self.micro_batch), y.split(self.micro_batch)))
        value = torch.zeros((), device=self.device)
        for i, (images, labels) in enumerate(parts):
            self._seed_step(i)
            with distributed.gradients_stay(self.network, i + 1 < len(parts)):
                loss = self._loss(images, labels) * (len(labels) / len(y))
                self.scaler.scale(loss).backward()
            value += loss.detach()
        value = distributed.total(value.item())[0] / distributed.world()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}, at learning rate {self.lr:.3g}; "
                "a lower base_lr or clip_grad=1.0 may help"
            )
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        with muon_in(autocast_dtype("auto", self.device) or torch.float32):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        distributed.share_buffers(self.model)
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1
        self.sums["loss"] += value
        self.sums["steps"] += 1
        return value

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of the network on `x`, erased and mixed as the recipe says."""
        x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        y, smoothing = y.to(self.device, non_blocking=True), self.recipe.label_smoothing
        if self.erase:
            x = self.erase(x)
        if self.mix:
            x, y = self.mix(x, y)  # y: (B, classes), smoothed
            smoothing = 0.0
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.forward(x)
        return F.cross_entropy(logits.float(), y, label_smoothing=smoothing)

    def _seed_step(self, part: int) -> None:
        """Seed what a step draws from (stochastic depth, mixing, erasing) by its number: nothing to save or restore."""
        numbers = (self.seed, self.step, distributed.rank(), part)
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
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
                "lr": self.lr,
                "train_loss": self.sums["loss"] / self.sums["steps"],
                "val_loss": None,  # of the weights to use
                "top1": None,
                "ema_top1": None,
                "images_per_second": round(self.recipe.batch_size * self.sums["steps"] / self.sums["seconds"], 1),
                "resolution": self.batches.resolution,
                "memory_gb": round(peak_memory(self.device) / 1e9, 2),
            }
        )
        self.sums = dict.fromkeys(self.sums, 0)
        return self.rows[-1]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, and `load` takes. All processes have to ask for it."""
        return self.identity | {
            "weights": distributed.gathered(self.model.state_dict()),
            "ema": distributed.gathered(self.ema.module.state_dict()) if self.ema else None,
            "optimizer": distributed.gathered(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "sums": self.sums,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "window": self.window,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError, naming what differs, if it is another run's."""
        for key, mine in self.identity.items():
            theirs = state.get(key)
            if key == "recipe":
                theirs = complete(theirs)
                changed = [name for name in mine if mine[name] != theirs.get(name)]
                mine, theirs = ({name: values.get(name) for name in changed} for values in (mine, theirs))
            if mine != theirs:
                raise ValueError(f"the checkpoint is another run's: its {key} is {theirs}, here it is {mine}")
        _load_weights(self.model, state["weights"])
        optimizer, parameters = state["optimizer"], [p for g in self.optimizer.param_groups for p in g["params"]]
        for number, values in optimizer["state"].items():
            for name, value in values.items():
                values[name] = distributed.scattered(value, parameters[number])
        self.optimizer.load_state_dict(optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            _load_weights(self.ema.module, state["ema"])
            self.ema.n_averaged.fill_(state["step"])
        self.step, self.rows, self.sums = state["step"], state["rows"], state["sums"]
        self.earlier, self.window = state["seconds"], state["window"]
        self.earlier_cpu = state["cpu_seconds"]
        self.agree()


def _load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    mine = model.state_dict()
    model.load_state_dict({name: distributed.scattered(value, mine.get(name)) for name, value in weights.items()})


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch has held of a GPU at a time; on a CPU what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is never left half done; another one later stops at once."""
    requests, previous, times = [], {}, []

    def note(number: int, frame: Any) -> None:
        requests.append(number)
        times.append(time.time())
        if times[-1] - times[0] > ONE_REQUEST:
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
