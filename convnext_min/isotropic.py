"""Isotropic ConvNeXt (section 3.3 of the paper): one resolution and one width throughout, as in a ViT.

A patchify stem is followed by `depth` ConvNeXt blocks of `dim` channels; there is no downsampling.
State-dict keys and initial weights follow the official release.
"""

from functools import partial

import torch
from torch import Tensor, nn

from convnext_min.convnext import Block, ConvNeXt


class ConvNeXtIsotropic(nn.Module):
    """Isotropic ConvNeXt: images (N, in_chans, H, W), H and W at least `patch_size`, to logits (N, num_classes).

    `depth` and `dim` are the number of blocks and their channels; the other arguments are as in `ConvNeXt`. Layer
    scale is off by default, as in the paper for S and B (appendix A.1). Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depth: int = 18,
        dim: int = 384,
        patch_size: int = 16,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        head_init_scale: float = 1.0,
    ):
        super().__init__()
        if min(depth, dim, patch_size, in_chans, num_classes + 1) < 1:
            raise ValueError(
                "depth, dim, patch_size and in_chans must be at least 1, num_classes at least 0; got "
                f"depth={depth}, dim={dim}, patch_size={patch_size}, in_chans={in_chans}, num_classes={num_classes}"
            )
        self.stem = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*[Block(dim, rate, layer_scale_init_value) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

        self.apply(ConvNeXt._init_weights)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(head_init_scale)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the pooled and normalized features (N, dim) of images (N, in_chans, H, W)."""
        x = self.stem(x)  # (N, dim, H / patch_size, W / patch_size)
        x = self.blocks(x)
        return self.norm(x.mean([-2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


convnext_isotropic_small = partial(ConvNeXtIsotropic, depth=18, dim=384)
convnext_isotropic_base = partial(ConvNeXtIsotropic, depth=18, dim=768)
convnext_isotropic_large = partial(ConvNeXtIsotropic, depth=36, dim=1024)
