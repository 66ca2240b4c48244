"""Choose a device and the precision that suits it."""

import psutil
import torch


def choose_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """Return the device `name`, by default the best one; of several GPUs the one with the number `local_rank`.

    Raises ValueError for a device that is unknown to PyTorch or missing on this machine.
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
                f"there is no GPU for local rank {local_rank}: this machine has {torch.cuda.device_count()}; "
                f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
    return device


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, such as "NVIDIA H100 80GB HBM3", or else the type of `device`, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast, or None for float32; "auto" is bfloat16 if the hardware multiplies it natively.

    Raises ValueError for float16 on a CPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"amp=fp16 is for GPUs, and this run is on {device}: use bf16 or fp32")
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # new in PyTorch 2.10
    return torch.bfloat16 if any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


def peak_memory(device: torch.device) -> int:
    """Return the peak of allocated GPU memory in bytes; on a CPU the current memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
