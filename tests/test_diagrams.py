import io

import pytest
import torch
from matplotlib.patches import Polygon
from torch import nn

from convnext_min import Block
from convnext_min.book import diagrams
from convnext_min.book.diagrams import Op, Residual
from convnext_min.measure import count_macs
from convnext_min.roadmap import STEPS, build


def labels(diagram):
    return [[op.label for op in ops] for part in diagram for ops in (part.branch, part.shortcut or (), part.after)]


def test_trace_reads_the_bottleneck_from_its_forward_pass():
    diagram = diagrams.trace(*diagrams.road_block("resnet50"))
    branch = ["1×1, 256→64", "BN", "ReLU", "3×3, 64→64", "BN", "ReLU", "1×1, 64→256", "BN"]
    assert labels(diagram) == [branch, [], ["ReLU"]]
    assert [op.kind for op in diagram[0].branch[::3]] == ["channel", "both", "channel"]


def test_trace_shows_stride_projection_and_shapes():
    (part,) = diagrams.trace(*diagrams.road_block("width", stage=1, first=True))
    assert [op.label for op in part.shortcut] == ["1×1, 384→768\nstride 2", "BN"]
    assert part.branch[3] == Op("d3×3, 192\nstride 2", "spatial", (192, 56, 56), (192, 28, 28))
    assert part.branch[-1].after == part.shortcut[-1].after == (768, 28, 28)


def test_trace_sees_channels_last_layers_as_what_they_are():
    (part,) = diagrams.trace(Block(96), (96, 56, 56))
    assert [op.label for op in part.branch] == ["d7×7, 96", "LN", "1×1, 96→384", "GELU", "1×1, 384→96", "× γ"]
    assert {op.after[1:] for op in part.branch} == {(56, 56)}
    assert part.branch[2].after == (384, 56, 56)


def test_downsampling_in_front_of_the_block_is_not_inside_its_shortcut():
    front, block = diagrams.trace(*diagrams.road_block("convnext", stage=1, first=True))
    assert [op.label for op in front.branch] == ["LN", "2×2, 96→192\nstride 2"] and front.shortcut is None
    assert block.shortcut == () and block.branch[0].label == "d7×7, 192"


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)


def test_trace_refuses_what_it_cannot_draw():
    with pytest.raises(TypeError, match="Softmax"):
        diagrams.trace(nn.Softmax(1), (3, 4, 4))
    with pytest.raises(TypeError, match="no box for flatten"):
        diagrams.trace(Flat(), (3, 4, 4))
    with pytest.raises(ValueError, match="at most one addition, Sequential has 2"):
        diagrams.trace(nn.Sequential(Block(8), Block(8)), (8, 4, 4))


@pytest.mark.parametrize("slug", ["stage_ratio", "move_up", "layer_norm", "convnext"])
def test_road_block_is_the_block_of_the_built_network(slug):
    block_class = STEPS[slug].block
    with torch.device("meta"):
        stages = build(slug).stages
    for stage in range(4):
        blocks = [layer for layer in stages[stage] if isinstance(layer, block_class)]
        opening = nn.Sequential(*stages[stage][0], blocks[0]) if len(blocks) < len(stages[stage]) else blocks[0]
        for first, built in ((True, opening), (False, blocks[1])):
            with torch.device("meta"):
                block, (chans, size, _) = diagrams.road_block(slug, stage, first)
            assert [v.shape for v in block.state_dict().values()] == [v.shape for v in built.state_dict().values()]
            assert count_macs(block, size, chans) == count_macs(built, size, chans)


@pytest.mark.parametrize(
    "old, new, changed, gone",
    [
        ("patchify", "depthwise", 1, 0),
        ("kernel5", "kernel7", 1, 0),
        ("width", "inverted", 3, 0),
        ("inverted", "move_up", 2, 0),
        ("kernel7", "gelu", 3, 0),
        ("gelu", "fewer_acts", 0, 2),
        ("fewer_acts", "fewer_norms", 0, 2),
        ("fewer_norms", "layer_norm", 1, 0),
        ("layer_norm", "convnext", 0, 0),
    ],
)
def test_exactly_the_boxes_that_differ_are_marked(old, new, changed, gone):
    fig = diagrams.draw_steps(old, new)
    marked = [patch for patch in fig.axes[0].patches if isinstance(patch, Polygon) and patch.get_linewidth() > 1]
    assert sum(patch.get_linestyle() == "solid" for patch in marked) == changed
    assert sum(patch.get_linestyle() != "solid" for patch in marked) == gone


def test_every_step_can_be_drawn_and_saved_the_same_way_twice():
    for slug in STEPS:
        diagrams.draw_steps(slug, stage=1, first=True)
    blocks = {
        "ResNet-50": diagrams.road_block("resnet50"),
        "Swin-T": diagrams.swin_diagram(),
        "stem": (build("patchify").stem, (3, 8, 8)),
    }
    images = []
    for _ in range(2):
        file = io.StringIO()
        diagrams.draw_blocks(blocks).savefig(file, format="svg", metadata={"Date": None})
        images.append(file.getvalue())
    assert images[0] == images[1]


@pytest.mark.parametrize("diagram, dim", [(diagrams.swin_diagram(), 96), (diagrams.vit_diagram(), 384)])
def test_diagrams_of_transformer_blocks_cost_what_the_blocks_cost(diagram, dim):
    """The 1x1 convolutions are the 12 * C^2 of a Transformer block: 4 for attention, 8 for the MLP."""
    ops = [op for part in diagram for op in part.branch if op.kind == "channel"]
    assert sum(op.before[0] * op.after[0] for op in ops) == 12 * dim**2
    assert all(isinstance(part, Residual) and part.shortcut == () for part in diagram)
