"""ConvNeXt as a backbone: the feature maps of its four stages, in timm's conventions::

    model = backbone("convnext_tiny", pretrained="in22k", in_chans=1)
    maps = model.forward_intermediates(images, intermediates_only=True)  # strides 4, 8, 16, 32

Only PyTorch is needed.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convnext_min.convnext import ConvNeXt
from convnext_min.weights import VARIANTS, find, load_pretrained


class Backbone(ConvNeXt):
    """A `ConvNeXt` with timm's interface, and with the arguments and state-dict keys of `ConvNeXt`.

    `feature_info` has the channels (`num_chs`) and the stride (`reduction`) of each stage. As in timm,
    `forward_features` returns the last map and `forward_head` pools it. After `set_grad_checkpointing(True)`, training
    keeps only the input of each block and computes its other activations again in the backward pass.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        dims = [stage[0].dwconv.in_channels for stage in self.stages]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.num_classes = getattr(self.head, "out_features", 0)
        self.grad_checkpointing = False

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last map and a list of the maps of the stages `indices`; with `intermediates_only`, only the list.

        The map of stage i has shape (N, dims[i], H / 4 / 2**i, W / 4 / 2**i), rounded down at each stage. `indices` is
        a list of stage numbers (negative ones count from the end) or a number n for the last n stages; None takes all
        four. With `stop_early` later stages are not computed, and the last map is the last one computed. Raises
        ValueError for other indices, for a layout other than NCHW, and for `norm`: ConvNeXt normalizes after pooling.
        """
        if norm or str(output_fmt).rpartition(".")[2] != "NCHW":
            raise ValueError(f"the maps are NCHW without a norm; got norm={norm}, output_fmt={output_fmt!r}")
        take, maps = self._stage_numbers(indices), []
        for i in range(max(take) + 1 if stop_early else 4):
            x = self._stage(x, i)
            if i in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map of the last stage, (N, dims[3], H / 32, W / 32)."""
        for i in range(4):
            x = self._stage(x, i)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of the last map, or with `pre_logits` its pooled and normalized features (N, dims[3])."""
        x = self.norm(x.mean([-2, -1]))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing on or off."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier, or `nn.Identity` if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one for `num_classes` classes, or by the identity for 0."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.to(self.norm.weight).apply(self._init_weights)

    def _stage(self, x: Tensor, i: int) -> Tensor:
        x = self.downsample_layers[i](x)
        for block in self.stages[i]:
            recompute = self.grad_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    @staticmethod
    def _stage_numbers(indices: int | Sequence[int] | None) -> list[int]:
        """Return the stage numbers, 0 to 3, that `indices` selects."""
        chosen = range(4) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if not chosen or not all(-4 <= i < 4 for i in chosen):
            raise ValueError(f"there are four stages, 0 to 3 or -4 to -1; got {indices!r}")
        return [i % 4 for i in chosen]


def backbone(name: str, pretrained: Any = None, num_classes: int = 0, **options) -> Backbone:
    """Build the variant called `name`, such as "convnext_tiny", as a `Backbone`, by default without a classifier.

    `pretrained` is a tag of `weights.list_pretrained`, a file, a URL or a state dict; `options` are further
    arguments of `ConvNeXt`. Raises ValueError for a name without four stages, and as `weights.load_pretrained` does.
    """
    names = [variant for variant, build in VARIANTS.items() if build.func is ConvNeXt]
    if name not in names:
        raise ValueError(f"no backbone {name!r}; valid: {', '.join(names)}")
    model = Backbone(num_classes=num_classes, **{**VARIANTS[name].keywords, **options})
    if pretrained:
        load_pretrained(model, find(name, pretrained))
    return model
