"""One run in several processes: `torchrun --nproc-per-node 8 -m convnext_min.train ...`, each with its GPU or CPU core.

Every process holds the whole network (`copies`) or, to save memory, a part of every layer (`shard`), and works on its
part of every batch. In a single process the functions here return what they are given.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def choose_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """The device called `name`, or the best there is; of several GPUs the one with the number `local_rank`.

    Raises ValueError for a device that PyTorch does not know or that is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
    if device.type == "cuda" and device.index is None:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start torchrun with --nproc-per-node of that number"
            )
        device = torch.device("cuda", local_rank)
    return device


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, if it did, and give this one's device.

    They exchange tensors over NCCL between GPUs and over Gloo between CPUs. Only the first process goes on printing.
    """
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield chosen
    dist.destroy_process_group()  # not after an error, when the others may still wait in it: torchrun ends them


# ---- What the processes tell each other


def total(*values: float) -> list[float]:
    """Each of `values`, summed over the processes."""
    if world() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def first(value: Any) -> Any:
    """What the first process calls `value`."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order."""
    if world() == 1:
        return [value]
    box = [None] * world()
    dist.all_gather_object(box, value)
    return box


def share_buffers(model: nn.Module) -> None:
    """Give every process on a CPU the buffers of the first: on GPUs SyncBatchNorm keeps its statistics equal.

    DistributedDataParallel does so before a step, which is too late for averages and evaluations between steps.
    """
    if world() > 1:
        for buffer in model.buffers():
            if buffer.device.type == "cpu":
                dist.broadcast(buffer, 0)


# ---- How the network is laid out


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network, of this package or another, told by the names of their classes.

    Raises ValueError if there are none.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith(("Block", "Bottleneck"))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no residual blocks to checkpoint or to shard")
    return found


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only what goes into each block and compute its inside again on the way back (Chen et al., 2016), in place.

    The gradients stay the same, also of blocks that draw random numbers; a step takes about a third longer.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def copies(model: nn.Module) -> nn.Module:
    """`model` with gradients that are averaged over the processes during `backward`."""
    if world() == 1:
        return model
    # A gradient laid out like its weight in all but dimensions of size 1 is copied, which is not worth a warning.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Split the parameters of each block over the processes, in place; a block is put together while it computes.

    Raises ValueError in a single process and before PyTorch 2.6.
    """
    if world() == 1:
        raise ValueError("--fsdp splits the network over processes: start several, with torchrun --nproc-per-node N")
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise ValueError(f"--fsdp needs PyTorch 2.6 or newer, this is {torch.__version__}") from None
    mesh = dist.init_device_mesh(device.type, (world(),))
    for module in [*blocks(model), model]:  # split again after each forward pass: evaluation has no other
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


@contextlib.contextmanager
def gradients_stay(network: nn.Module, stay: bool) -> Iterator[None]:
    """Where `stay` is set, the gradients of a part of a batch are summed here and not sent to the other processes."""
    if hasattr(network, "set_requires_gradient_sync"):  # sharded
        network.set_requires_gradient_sync(not stay)
        yield
    elif stay and hasattr(network, "no_sync"):  # copies
        with network.no_sync():
            yield
    else:
        yield


def gathered(state: Any) -> Any:
    """A state dict with each tensor whole: those of a sharded network on the CPU, others as they are."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    return state.full_tensor().cpu() if _is_sharded(state) else state


def scattered(state: Any, like: Any) -> Any:
    """A whole tensor, split as the tensor `like` is; the opposite of `gathered`."""
    if not _is_sharded(like) or not isinstance(state, Tensor) or state.shape != like.shape:
        return state
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(state.to(like.device), like.device_mesh, like.placements)


def _is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")
