"""Layer-wise learning-rate decay: in fine-tuning, the nearer a layer is to the image, the less it learns.

The first layers know edges and textures, which suit any task; the last ones know the classes of the old one
(appendix A of the paper; the method is that of Clark et al., "ELECTRA", 2020, and Bao et al., "BEiT", 2021).
"""

from torch import nn

from convnext_min.convnext import ConvNeXt

BLOCKS_OF_A_GROUP = 3


def group_of(name: str, depths: tuple[int, ...]) -> int:
    """The group of the parameter `name` in a ConvNeXt with these depths: 0 is the stem's.

    Every three consecutive blocks of a stage are one group, with the downsampling layer before them; the final norm
    and the classifier are the last. With depths (3, 3, 27, 3) that makes the 12 groups of the released code between
    stem and classifier; the rule is the same for all depths, where the released code refuses all but these.
    """
    first = [1]  # the group in which each stage begins, and that of the classifier
    for depth in depths:
        first.append(first[-1] + -(-depth // BLOCKS_OF_A_GROUP))
    part, *place = name.split(".")
    if part == "downsample_layers":
        stage = int(place[0])
        return first[stage] if stage else 0
    if part == "stages":
        return first[int(place[0])] + int(place[1]) // BLOCKS_OF_A_GROUP
    return first[-1]  # norm, head


def learning_rate_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """What to multiply the learning rate of each parameter with: 1 in the last group, `decay` to the power of the
    distance to it in the others. Raises ValueError for a network other than `ConvNeXt`."""
    if not isinstance(model, ConvNeXt):
        raise ValueError(f"layer_decay needs a convnext_<variant>, got {type(model).__name__}: --set layer_decay=1.0")
    depths = tuple(len(stage) for stage in model.stages)
    last = group_of("head", depths)
    return {name: decay ** (last - group_of(name, depths)) for name, _ in model.named_parameters()}
