"""ConvNeXt in one file that needs nothing but PyTorch: copy it.

"A ConvNet for the 2020s", Liu et al., CVPR 2022, https://arxiv.org/abs/2201.03545.
State-dict keys and initial weights follow the official release.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """Normalize the channels of each pixel of (N, C, H, W); `nn.LayerNorm` does so for (N, H, W, C)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, zero whole samples of (N, C, H, W) with probability `rate`.

    The other samples are divided by `1 - rate`, which keeps the expected value. In eval mode this is the identity.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)  # one draw per sample
        return x * mask.div_(keep)


class Block(nn.Module):
    """ConvNeXt block (Figure 4): depthwise 7x7, LayerNorm, Linear to 4C, GELU, Linear to C, shortcut.

    Input and output are (N, C, H, W). Layer scale multiplies the branch by a learned `gamma` per channel, which
    starts from `layer_scale_init_value`; 0 builds the block without it (`gamma` is None).
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)  # a 1x1 convolution, written for channels-last data
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        x = self.norm(x)
        x = self.pwconv1(x)  # (N, H, W, 4C)
        x = self.act(x)
        x = self.pwconv2(x)  # (N, H, W, C)
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)  # (N, C, H, W)
        return shortcut + self.drop_path(x)


class ConvNeXt(nn.Module):
    """ConvNeXt: images (N, in_chans, H, W), H and W at least 32, to logits (N, num_classes).

    `depths` and `dims` are the blocks and channels of the four stages. `drop_path_rate` is the rate of the last
    block; the rates grow linearly from 0 at the first. `head_init_scale` multiplies the initial classifier (0.001 in
    the paper's fine-tuning, Table 6). `num_classes=0` leaves the classifier out: the output is the features
    (N, dims[-1]). Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
    ):
        super().__init__()
        if len(depths) != 4 or len(dims) != 4 or min(*depths, *dims, in_chans, num_classes + 1) < 1:
            raise ValueError(
                "depths and dims must be four positive numbers each, in_chans at least 1, num_classes at least 0; "
                f"got depths={depths}, dims={dims}, in_chans={in_chans}, num_classes={num_classes}"
            )
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), LayerNorm(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for dim, next_dim in pairwise(dims):
            downsample = nn.Sequential(LayerNorm(dim), nn.Conv2d(dim, next_dim, kernel_size=2, stride=2))
            self.downsample_layers.append(downsample)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(dim, next(rates), layer_scale_init_value) for _ in range(depth)])
            for dim, depth in zip(dims, depths)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

        self.apply(self._init_weights)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(head_init_scale)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the pooled and normalized features (N, dims[-1]) of images (N, in_chans, H, W)."""
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))  # (N, dims[i], H / 4 / 2**i, W / 4 / 2**i)
        return self.norm(x.mean([-2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


# The paper's five (section 3), after timm's four smaller ones.
convnext_atto = partial(ConvNeXt, depths=(2, 2, 6, 2), dims=(40, 80, 160, 320))
convnext_femto = partial(ConvNeXt, depths=(2, 2, 6, 2), dims=(48, 96, 192, 384))
convnext_pico = partial(ConvNeXt, depths=(2, 2, 6, 2), dims=(64, 128, 256, 512))
convnext_nano = partial(ConvNeXt, depths=(2, 2, 8, 2), dims=(80, 160, 320, 640))
convnext_tiny = partial(ConvNeXt, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
convnext_small = partial(ConvNeXt, depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
convnext_base = partial(ConvNeXt, depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
convnext_large = partial(ConvNeXt, depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))
convnext_xlarge = partial(ConvNeXt, depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048))
