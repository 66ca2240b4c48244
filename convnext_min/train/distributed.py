"""Train in several processes: `torchrun --nproc-per-node 8 -m convnext_min.train ...`, one process per GPU or CPU core.

Every process holds the whole network (`wrap_ddp`) or, to save memory, a shard of every layer (`apply_fsdp`), and works
on its share of every batch. In a single process these functions return their arguments unchanged.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convnext_min.environment import printable
from convnext_min.train.device import choose_device


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """Join the other processes that torchrun or Slurm started, if any, and yield this process's device.

    GPUs communicate over NCCL, CPUs over Gloo.
    """
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    yield chosen
    dist.destroy_process_group()  # not after an error, when others may still wait in it: torchrun ends them


def print_once(*values: Any) -> None:
    """Print on rank 0 only, without delay; characters that the terminal cannot encode as escapes."""
    if rank() == 0:
        print(printable(" ".join(map(str, values))), flush=True)


# ---- Communication


def all_reduce_sum(*values: float) -> list[float]:
    """Return each of `values` summed over all processes."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def broadcast_object(value: Any) -> Any:
    """Broadcast rank 0's `value` to all processes and return it."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return the `value` of every process, in the order of ranks."""
    if world_size() == 1:
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's buffers to all processes, on CPUs; on GPUs SyncBatchNorm keeps its statistics equal.

    DistributedDataParallel broadcasts before the next forward pass, too late for the EMA and for evaluation.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            if buffer.device.type == "cpu":
                dist.broadcast(buffer, 0)


# ---- Layout of the network


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the residual blocks of a network from any library, recognized by the names of their classes.

    Raises ValueError if there are none.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith(("Block", "Bottleneck"))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no residual blocks to checkpoint or to shard")
    return found


def checkpoint_activations(model: nn.Module) -> None:
    """Store only the input of each block, and recompute its activations in the backward pass (Chen et al., 2016).

    Works in place. Gradients and running statistics stay the same, also of blocks that draw random numbers; a step
    takes about a third longer.
    """
    for block in blocks(model):
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a checkpointed block's forward pass and of its recomputation."""
    return nullcontext(), _without_statistics(block)


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a block's BatchNorms as they are."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the share of the new statistics
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Return `model` wrapped so that `backward` averages its gradients over the processes."""
    if world_size() == 1:
        return model
    # A gradient whose strides differ from its weight's in dimensions of size 1 is copied; that needs no warning.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def apply_fsdp(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard the parameters of each block over the processes, in place; a block is gathered while it computes.

    Raises ValueError in a single process.
    """
    if world_size() == 1:
        raise ValueError("--fsdp shards the network over processes: start several, with torchrun --nproc-per-node N")
    from torch.distributed.fsdp import fully_shard  # slow to import

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for module in [*blocks(model), model]:  # free the gathered weights after each forward pass, in evaluation too
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


@contextlib.contextmanager
def no_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Skip the gradient all-reduce while `enabled` is true (gradient accumulation)."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(not enabled)
        yield
    elif enabled and hasattr(model, "no_sync"):  # DDP
        with model.no_sync():
            yield
    else:
        yield


# ---- State of the network and its optimizer


def full_state_dict(model: nn.Module, rank0_only: bool = False) -> dict[str, Tensor]:
    """Return the weights of `model` with every tensor whole; with `rank0_only` on the CPU, and empty on other ranks.

    All processes must call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=rank0_only))


def full_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state by names of parameters, whole and on the CPU; empty on ranks other than 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def load_full_state_dict(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole tensors into `model`, in place; of a sharded model each process takes its shards.

    Raises ValueError if tensors of the model are missing, which PyTorch would leave as they are.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if missing := [key for key in model.state_dict() if key not in weights]:
        raise ValueError(f"the checkpoint is of another network: it has no {', '.join(missing[:3])}")
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def load_full_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the result of `full_optimizer_state_dict`, in place."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
