"""One optimizer step, and the state that a checkpoint holds.

Step k depends on the weights, the seed and k alone. So an interrupted and resumed run ends, on the same machine, with
exactly the weights of an uninterrupted one. The same steps in several processes, or with gradient accumulation, differ
by rounding and in the random numbers of stochastic depth, mixing and erasing.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from convnext_min import fast
from convnext_min.data import Data, seed_all
from convnext_min.recipes import Recipe, complete
from convnext_min.train import distributed
from convnext_min.train.clock import Clock
from convnext_min.train.device import autocast_dtype, peak_memory
from convnext_min.train.optim import BATCH_NORMS, create_optimizer, step_context


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The machine settings and the output of a run. A run may be resumed with another configuration.

    Raises ValueError for values that are not valid.
    """

    device: str | torch.device | None = None  # None: a GPU if there is one
    started: float | None = None  # seconds as in time.time(), from which a recipe's minutes count; None: now
    micro_batch: int | None = None  # images per process and forward pass; None: the process's whole share of a batch
    compile: bool = False
    accelerate: bool = True  # on a CPU, without `compile`: see `convnext_min.fast`
    checkpoint_activations: bool = False
    fsdp: bool = False  # shard the network over the processes instead of a copy in each
    save_every: str = ""  # between the ends of epochs: "500" optimizer steps, "15m" minutes
    keep: int = 2  # number of the newest checkpoints to keep
    wandb: str = ""  # project of Weights & Biases

    def __post_init__(self):
        number = self.save_every.removesuffix("m")
        if self.save_every and not (number.isdecimal() and int(number)):
            raise ValueError(f"save_every takes iterations, as in 500, or minutes, as in 15m; got {self.save_every!r}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")

    @property
    def interval(self) -> tuple[float, float]:
        """Return the optimizer steps and seconds between two checkpoints within an epoch."""
        if not self.save_every:
            return math.inf, math.inf
        number, minutes = int(self.save_every.removesuffix("m")), self.save_every.endswith("m")
        return (math.inf, 60 * number) if minutes else (number, math.inf)

    def accelerates(self, device: torch.device) -> bool:
        """Return whether `convnext_min.fast` computes the layers of a run on `device`."""
        return self.accelerate and device.type == "cpu" and not self.compile


def micro_batch_size(recipe: Recipe, config: RunConfig) -> int:
    """Return the images per process and forward pass. Raises ValueError if they do not divide the batch."""
    batch, world_size = recipe.batch_size, distributed.world_size()
    size = batch // world_size if config.micro_batch is None else config.micro_batch
    if size < 1 or batch % (size * world_size):
        per = f"{size} images" + (f" in each of {world_size} processes" if world_size > 1 else "")
        raise ValueError(f"a batch of {batch} images cannot be divided into micro-batches of {per}")
    if (recipe.mixup or recipe.cutmix) and size % 2:
        raise ValueError(f"mixup and cutmix need an even micro-batch, got {size} images")
    return size


class Meter:
    """Sum up the loss, the optimizer steps and the seconds since the last row of the log."""

    def __init__(self):
        self.loss, self.steps, self.seconds = 0.0, 0, 0.0

    def update(self, loss: float) -> None:
        """Count an optimizer step with this loss."""
        self.loss += loss
        self.steps += 1


class Trainer:
    """A network in training, with everything that a checkpoint holds.

    `model` has the weights, `parallel_model` communicates gradients, and `compiled_model` computes; without several
    processes and `compile` all three are the same. Raises ValueError for settings or data that do not fit each other.
    """

    metrics = ("val_loss", "top1", "ema_top1")  # columns of the log that an evaluation fills

    def __init__(
        self,
        model: nn.Module,
        name: str,
        recipe: Recipe,
        batches: Data,
        seed: int,
        device: torch.device,
        config: RunConfig,
    ):
        self.clock = Clock(recipe, len(batches), time.time() if config.started is None else config.started)
        self.recipe, self.batches, self.seed, self.device, self.config = recipe, batches, seed, device, config
        self.dtype = autocast_dtype(recipe.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        if config.fsdp and self.scaler.is_enabled():
            raise ValueError("--fsdp is not tested with amp=fp16: use bf16")
        self.micro_batch = micro_batch_size(recipe, config)
        # FSDP shards contiguous weights; images are channels-last all the same.
        model = model.to(device, memory_format=torch.preserve_format if config.fsdp else torch.channels_last)
        if device.type == "cuda" and distributed.world_size() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # for GPUs only
        self.model = model
        self._check_outputs(name)
        self.accelerated = config.accelerates(device)
        if self.accelerated:
            fast.accelerate(model)
        self.ema = None
        if recipe.ema_decay:
            self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self.parallel_model = self._distribute()
        self.compiled_model = torch.compile(self.parallel_model) if config.compile else self.parallel_model
        self.optimizer = create_optimizer(model, recipe)
        self.mix, self.erase = self._mixing(), None
        if recipe.erasing and not batches.erases:
            from timm.data.random_erasing import RandomErasing  # slow to import, here and below

            self.erase = RandomErasing(recipe.erasing, mode="pixel", device=device)
        self.identity = {  # must be equal when a run is resumed
            "model": name,
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "classes": batches.classes,
            "source": batches.source,
        }
        self.meter = Meter()
        self.step = 0  # optimizer steps so far
        self.lr = self.loss = 0.0  # of the last step
        self.history: list[dict] = []  # the rows of the log

    def _check_outputs(self, name: str) -> None:
        side, classes = self.recipe.resolution, len(self.batches.classes)
        try:
            with torch.no_grad():
                outputs = tuple(self.model.eval()(torch.zeros(2, 3, side, side, device=self.device)).shape)
        except (AssertionError, RuntimeError) as error:  # a network for another image size, for example
            raise ValueError(f"{name} cannot process images of {side}x{side} pixels: {error}") from error
        if outputs != (2, classes):
            raise ValueError(f"the data has {classes} classes, but for two images {name} returns a tensor {outputs}")
        self.model.train()

    def _average(self, averages: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        get_ema_multi_avg_fn(self.recipe.ema_decay_at(int(updates)))(averages, weights, updates)

    def _distribute(self) -> nn.Module:
        """Return the network for the forward pass: with DDP a wrapper, with FSDP the same network, now sharded."""
        if self.config.fsdp:
            distributed.apply_fsdp(self.model, self.device)
            if self.ema:
                distributed.apply_fsdp(self.ema.module, self.device)
        if self.config.checkpoint_activations:
            distributed.checkpoint_activations(self.model)
        return self.model if self.config.fsdp else distributed.wrap_ddp(self.model)

    def _mixing(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        recipe, images, classes = self.recipe, self.batches.images, len(self.batches.classes)
        if not (recipe.mixup or recipe.cutmix):
            return None
        if min(recipe.batch_size, images) % 2:
            raise ValueError(f"mixup and cutmix need an even batch, and there are only {images} images")
        from timm.data import Mixup

        return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)

    def __str__(self) -> str:
        batch, size, world_size = self.recipe.batch_size, self.micro_batch, distributed.world_size()
        accumulation = batch // (size * world_size)
        norms = {type(module) for module in self.model.modules() if isinstance(module, BATCH_NORMS)}
        normed = size * world_size if norms == {nn.SyncBatchNorm} else size
        return ", ".join(
            [f"on {self.device} in {str(self.dtype or torch.float32).removeprefix('torch.')}"]
            + [f"{world_size} processes"] * (world_size > 1)
            + [f"{accumulation} gradient accumulation steps of {size} images"] * (accumulation > 1)
            + [f"BatchNorm over {normed} images"] * (bool(norms) and normed < batch)
            + ["accelerated by convnext_min.fast"] * self.accelerated
            + [f"seed {self.seed}"]
        )

    @property
    def eval_model(self) -> nn.Module:
        """Return the network to evaluate: with the EMA weights if the recipe has an EMA, else with the last weights."""
        return self.ema.module if self.ema else self.model

    @property
    def main_metric(self) -> str:
        """Return the column of the log whose highest value decides which weights best.pt has."""
        return "ema_top1" if self.ema else "top1"

    @property
    def progress(self) -> float:
        """Return the completed fraction of the run, from 0 to 1."""
        return self.clock.progress(self.step)

    def train_step(self, x: Tensor, y: Tensor) -> float:
        """Take an optimizer step on this process's share of a batch, images (B, 3, R, R) and labels (B,).

        Returns the mean loss of the whole batch. Raises FloatingPointError, in all processes and before the weights
        change, if it is not finite.
        """
        self.lr = self.recipe.lr_at(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        self.loss = self._backward(x, y)
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"the loss is {self.loss} at iteration {self.step}, at learning rate {self.lr:.3g}; "
                "a lower base_lr or clip_grad=1.0 may help"
            )
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        with step_context(self.optimizer, self.dtype):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        distributed.broadcast_buffers(self.model)
        if self.ema:
            self.ema.update_parameters(self.model)
        self.step += 1
        if self.step == 1:
            self.clock.first_iteration = round(self.clock.seconds, 1)
        self.meter.update(self.loss)
        return self.loss

    def _backward(self, x: Tensor, y: Tensor) -> float:
        """Add up the gradients of the micro-batches, and return the mean loss over all processes."""
        parts = [(x[i : i + self.micro_batch], y[i : i + self.micro_batch]) for i in range(0, len(y), self.micro_batch)]
        total = torch.zeros((), device=self.device)
        for i, (images, labels) in enumerate(parts):
            seed_all(self.seed, self.step, distributed.rank(), i)  # so there is no generator state to save
            with distributed.no_sync(self.parallel_model, i + 1 < len(parts)):
                loss = self._loss(images, labels) * (len(labels) / len(y))
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return distributed.all_reduce_sum(total.item())[0] / distributed.world_size()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy on `x`, erased and mixed by the recipe."""
        x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        y, smoothing = y.to(self.device, non_blocking=True), self.recipe.label_smoothing
        if self.erase:
            x = self.erase(x)
        if self.mix:
            x, y = self.mix(x, y)  # y: (B, classes), smoothed
            smoothing = 0.0
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.compiled_model(x)  # (B, classes)
        return F.cross_entropy(logits.float(), y, label_smoothing=smoothing)

    def new_row(self) -> dict[str, Any]:
        """Append a row about the iterations since the last row to the history, without evaluation, and return it."""
        meter, self.meter = self.meter, Meter()
        self.history.append(
            {
                "epoch": round(self.step / len(self.batches), 2),
                "step": self.step,
                "seconds": round(self.clock.seconds, 1),
                "lr": self.lr,
                "train_loss": meter.loss / meter.steps,
                **dict.fromkeys(self.metrics),
                "images_per_second": round(self.recipe.batch_size * meter.steps / meter.seconds, 1),
                "resolution": self.batches.resolution,
                "memory_gb": round(peak_memory(self.device) / 1e9, 2),
            }
        )
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the contents of a checkpoint. All processes must call it; the weights are empty except on rank 0."""
        return self.identity | {
            "weights": distributed.full_state_dict(self.model, rank0_only=True),
            "ema": distributed.full_state_dict(self.ema.module, rank0_only=True) if self.ema else None,
            "optimizer": distributed.full_optimizer_state_dict(self.model, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "history": self.history,
            "meter": vars(self.meter),
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError, naming the difference, if it belongs to another run."""
        for key, mine in self.identity.items():
            theirs = state.get(key)
            if key == "recipe":
                theirs = complete(type(self.recipe), theirs)
                changed = [name for name in mine if mine[name] != theirs.get(name)]
                mine, theirs = ({name: values.get(name) for name in changed} for values in (mine, theirs))
            if mine != theirs:
                raise ValueError(f"the checkpoint belongs to another run: its {key} is {theirs}, here it is {mine}")
        distributed.load_full_state_dict(self.model, state["weights"])
        with step_context(self.optimizer, self.dtype):  # an empty optimizer is first initialized by a step
            distributed.load_full_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            distributed.load_full_state_dict(self.ema.module, state["ema"])
            self.ema.n_averaged.fill_(state["step"])
        self.step, self.history = state["step"], state["history"]
        vars(self.meter).update(state["meter"])
        self.clock.load_state_dict(state["clock"])
