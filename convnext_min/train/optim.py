"""Parameter groups for the optimizer: weight decay, and layer-wise decay of the learning rate.

Layer-wise decay is for fine-tuning: the closer a layer is to the image, the lower its learning rate. The first layers
detect edges and textures, which suit any task; the last ones depend on the classes of the old task (appendix A of the
paper; Clark et al., "ELECTRA", 2020; Bao et al., "BEiT", 2021).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convnext_min.convnext import ConvNeXt
from convnext_min.recipes import Recipe

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS)
NO_DECAY = ("bias", "gamma", "layer_scale")  # layer scale is `gamma` here and in timm, `layer_scale` in torchvision
BLOCKS_PER_GROUP = 3
MUON = {"ns_steps": 3, "ns_coefficients": "polar_express"}  # coefficients for few steps: Amsel et al., arXiv 2505.16932


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, stage_wise: bool = False
) -> list[dict]:
    """Return the trainable parameters in two groups: with weight decay, and without it (biases, norms, layer scale).

    The role of a parameter decides, not its shape: torchvision stores layer scale as (C, 1, 1). With a `layer_decay`
    below 1 there are two such groups per group of layers; a group's learning rate is the run's times `lr_scale`.
    `stage_wise` is explained at `group_of`.
    """
    scales = learning_rate_scales(model, layer_decay, stage_wise) if layer_decay < 1 else {}
    groups = {}  # scale: parameters with decay, parameters without
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                decay, no_decay = groups.setdefault(scales.get(name, 1.0), ([], []))
                exempt = name.rpartition(".")[2] in NO_DECAY or isinstance(module, NORMS)
                (no_decay if exempt else decay).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for scale, pair in sorted(groups.items(), reverse=True)  # scale 1 first: its learning rate is logged
        for parameters, decay in zip(pair, (weight_decay, 0.0))
    ]


def group_of(name: str, depths: tuple[int, ...], stage_wise: bool = False) -> int:
    """Return the number of the layer group of the parameter `name` in a ConvNeXt with these depths; the stem's is 0.

    A group is three consecutive blocks of a stage, with the downsampling layer before them; the final norm and the
    classifier are the last group. With depths (3, 3, 27, 3) these are the 12 groups of the released code between stem
    and classifier. The same rule holds for all depths; the released code refuses all except these.

    With `stage_wise`, stage s (from 0) is group s + 1, and all downsampling layers share the stem's group. The number
    of the last group stays, so all stages are farther from it. The released segmentation models are trained this way.
    """
    first = [1]  # the first group of each stage, and the classifier's
    for depth in depths:
        first.append(first[-1] + -(-depth // BLOCKS_PER_GROUP))
    part, *place = name.split(".")
    if stage_wise and part in ("downsample_layers", "stages"):
        return 0 if part == "downsample_layers" else int(place[0]) + 1
    if part == "downsample_layers":
        stage = int(place[0])
        return first[stage] if stage else 0
    if part == "stages":
        return first[int(place[0])] + int(place[1]) // BLOCKS_PER_GROUP
    return first[-1]  # norm, head


def learning_rate_scales(model: nn.Module, decay: float, stage_wise: bool = False) -> dict[str, float]:
    """Return the factor of each parameter's learning rate: `decay` to the power of the distance to the last group.

    `model` is a `ConvNeXt` or has one as its backbone; parameters outside of it are in the last group. Raises
    ValueError for other networks.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ConvNeXt)]
    if not found:
        raise ValueError(f"layer_decay needs a convnext_<variant>, got {type(model).__name__}: --set layer_decay=1.0")
    prefix, network = found[0]
    depths = tuple(len(stage) for stage in network.stages)
    last = group_of("head", depths)
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for name, _ in network.named_parameters():
        scales[f"{prefix}.{name}" if prefix else name] = decay ** (last - group_of(name, depths, stage_wise))
    return scales


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, built by timm, for the trainable parameters of `model`."""
    from timm.optim import create_optimizer_v2  # slow to import, here and below

    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay, recipe.stage_wise)
    options = {"betas": recipe.betas} if recipe.betas else {}
    options |= MUON if recipe.optimizer in ("muon", "nmuon") else {}
    return create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.lr, **options)


def newton_schulz_float32(
    matrix: Tensor,
    steps: int,
    coefficients: Sequence[tuple[float, float, float]],
    eps: float,
    safety_factor: float = 1.0,
    **_: Any,
) -> Tensor:
    """Orthogonalize an update (m, n) like timm's `zeropower_via_newtonschulz`, in float32.

    A step replaces X by Z X with Z = a + b G + c G^2 and G = X X^T, so the result is the product of all Z, times the
    first X. The next G is Z G Z. Only two products involve X, all others the shorter side alone: for the linear layers
    of a block, (4 C, C), that is fewer operations.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().mT if tall else matrix.float()
    x = x / (safety_factor * x.norm()).clamp(min=eps)
    gram, z, product = x @ x.mT, None, None
    for a, b, c in coefficients[:steps]:
        if z is not None:
            gram = z @ gram @ z
        z = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        z.diagonal().add_(a)
        product = z if product is None else z @ product
    x = product @ x
    return x.mT if tall else x


@contextlib.contextmanager
def muon_in_float32() -> Iterator[None]:
    """Let timm's Muon orthogonalize by `newton_schulz_float32`; timm has no argument for it.

    Its own function computes in bfloat16. On a CPU without bfloat16 instructions PyTorch then needs seconds for a step.
    """
    from timm.optim import muon

    plain = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = newton_schulz_float32
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = plain


def step_context(optimizer: torch.optim.Optimizer, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return the context for `optimizer.step()` in a run with autocast to `dtype`: Muon in bfloat16 or in float32."""
    from timm.optim import muon

    if isinstance(optimizer, muon.Muon) and dtype != torch.bfloat16:
        return muon_in_float32()
    return contextlib.nullcontext()
