import io

import pytest
import torch
from matplotlib.patches import Polygon
from torch import nn

from convnext_min import Block, paper
from convnext_min.book import plots
from convnext_min.book.plots import Op, Residual
from convnext_min.measure import count_macs
from convnext_min.roadmap import STEPS, build


def labels(diagram):
    return [[op.label for op in ops] for part in diagram for ops in (part.branch, part.shortcut or (), part.after)]


def test_trace_reads_the_bottleneck_from_its_forward_pass():
    diagram = plots.trace(*plots.road_block("resnet50"))
    branch = ["1×1, 256→64", "BN", "ReLU", "3×3, 64→64", "BN", "ReLU", "1×1, 64→256", "BN"]
    assert labels(diagram) == [branch, [], ["ReLU"]]
    assert [op.kind for op in diagram[0].branch[::3]] == ["channel", "both", "channel"]


def test_trace_shows_stride_projection_and_shapes():
    (part,) = plots.trace(*plots.road_block("width", stage=1, first=True))
    assert [op.label for op in part.shortcut] == ["1×1, 384→768\nstride 2", "BN"]
    assert part.branch[3] == Op("d3×3, 192\nstride 2", "spatial", (192, 56, 56), (192, 28, 28))
    assert part.branch[-1].after == part.shortcut[-1].after == (768, 28, 28)


def test_trace_sees_channels_last_layers_as_what_they_are():
    (part,) = plots.trace(Block(96), (96, 56, 56))
    assert [op.label for op in part.branch] == ["d7×7, 96", "LN", "1×1, 96→384", "GELU", "1×1, 384→96", "× γ"]
    assert {op.after[1:] for op in part.branch} == {(56, 56)}
    assert part.branch[2].after == (384, 56, 56)


def test_downsampling_in_front_of_the_block_is_not_inside_its_shortcut():
    front, block = plots.trace(*plots.road_block("convnext", stage=1, first=True))
    assert [op.label for op in front.branch] == ["LN", "2×2, 96→192\nstride 2"] and front.shortcut is None
    assert block.shortcut == () and block.branch[0].label == "d7×7, 192"


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)


def test_trace_refuses_what_it_cannot_draw():
    with pytest.raises(TypeError, match="Softmax"):
        plots.trace(nn.Softmax(1), (3, 4, 4))
    with pytest.raises(TypeError, match="no box for flatten"):
        plots.trace(Flat(), (3, 4, 4))
    with pytest.raises(ValueError, match="at most one addition, Sequential has 2"):
        plots.trace(nn.Sequential(Block(8), Block(8)), (8, 4, 4))


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
                block, (chans, size, _) = plots.road_block(slug, stage, first)
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
    fig = plots.draw_steps(old, new)
    marked = [patch for patch in fig.axes[0].patches if isinstance(patch, Polygon) and patch.get_linewidth() > 1]
    assert sum(patch.get_linestyle() == "solid" for patch in marked) == changed
    assert sum(patch.get_linestyle() != "solid" for patch in marked) == gone


def test_every_step_can_be_drawn_and_saved_the_same_way_twice():
    for slug in STEPS:
        plots.draw_steps(slug, stage=1, first=True)
    blocks = {
        "ResNet-50": plots.road_block("resnet50"),
        "Swin-T": plots.swin_diagram(),
        "stem": (build("patchify").stem, (3, 8, 8)),
    }
    images = []
    for _ in range(2):
        file = io.StringIO()
        plots.draw_blocks(blocks).savefig(file, format="svg", metadata={"Date": None})
        images.append(file.getvalue())
    assert images[0] == images[1]


def test_swin_diagram_costs_what_the_block_costs():
    """Its 1x1 convolutions are the 12 * C^2 of a Transformer block: 4 for attention, 8 for the MLP."""
    ops = [op for part in plots.swin_diagram(96, 56) for op in part.branch if op.kind == "channel"]
    assert sum(op.before[0] * op.after[0] for op in ops) == 12 * 96**2
    assert all(isinstance(part, Residual) and part.shortcut == () for part in plots.swin_diagram())


def test_road_shows_every_step_with_the_papers_and_the_measured_numbers():
    left, right = plots.road().axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == [row.label for row in paper.TABLE10.values()]
    assert list(right.lines[0].get_xdata()) == [row.gmacs for row in paper.TABLE10.values()]
    assert right.patches[0].get_width() == pytest.approx(paper.TABLE10["resnet50"].gmacs, abs=0.005)


def test_curve_leaves_out_what_was_not_measured():
    rows = [
        {"epoch": 1, "train_loss": 2.0, "val_loss": None, "top1": None, "ema_top1": None},
        {"epoch": 2, "train_loss": 1.0, "val_loss": 1.5, "top1": 0.4, "ema_top1": None},
    ]
    left, right = plots.curve(rows).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2.0, 1.0], [1.5]]
    assert [list(line.get_ydata()) for line in right.lines] == [[40.0]]


def test_image_grid_takes_any_number_of_images():
    fig = plots.image_grid(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), [*"abcde"], columns=3)
    assert [ax.get_title() for ax in fig.axes] == [*"abcde", ""]
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 1, 0]


def test_tables_escape_html_align_text_and_refuse_ragged_rows():
    table = plots.table(("step", "GMACs"), [("a < b", 4.1), ("c", 12)])
    assert "a &lt; b" in table._repr_html_()
    assert str(table).splitlines() == ["step   GMACs", "a < b    4.1", "c         12"]
    with pytest.raises(ValueError, match="a row needs 2 cells"):
        plots.table(("step", "GMACs"), [("a",)])


def test_step_table_shows_both_regimes_beside_the_paper():
    rows = plots.step_table("patchify", "depthwise").rows
    assert [row[0] for row in rows] == ["patchify stem", "depthwise conv"] * 2
    assert rows[1][1:] == ("10", "2.350", "2.35", "15.72", "78.28 ± 0.08")
    assert rows[3][3] == "7.23" and rows[3][5] == "80.54"


def test_gain_table_goes_from_each_step_to_the_next():
    rows = plots.gain_table("move_up", "kernel7", "convnext").rows
    assert rows[0] == ("move up depthwise → kernel 7", "+0.65", "0.16", "+0.26")
    assert rows[1] == ("kernel 7 → separate downsampling", "+1.40", "0.15", "+1.30")


def test_speed_table_times_forward_and_training():
    (row,) = plots.speed_table({"tiny": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())}, 16, 2, repeats=2).rows
    assert row[0] == "tiny" and all(cell.count("img/s") == 1 for cell in row[2:])
