import pytest
import torch
from matplotlib.colors import to_rgba
from torch import nn

from convnext_min import paper
from convnext_min.book import figures, style


def test_road_shows_every_step_with_the_papers_and_the_measured_numbers():
    left, right = figures.road().axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == [row.label for row in paper.TABLE10.values()]
    assert list(right.lines[0].get_xdata()) == [row.gmacs for row in paper.TABLE10.values()]
    assert right.patches[0].get_width() == pytest.approx(paper.TABLE10["resnet50"].gmacs, abs=0.005)


def test_curve_leaves_out_what_was_not_measured():
    rows = [
        {"epoch": 1, "train_loss": 2.0, "val_loss": None, "top1": None, "ema_top1": None},
        {"epoch": 2, "train_loss": 1.0, "val_loss": 1.5, "top1": 0.4, "ema_top1": None},
    ]
    left, right = figures.curve(rows).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2.0, 1.0], [1.5]]
    assert [list(line.get_ydata()) for line in right.lines] == [[40.0]]


def test_image_grid_takes_any_number_of_images():
    fig = figures.image_grid(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), [*"abcde"], columns=3)
    assert [ax.get_title() for ax in fig.axes] == [*"abcde", ""]
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 1, 1, 1, 0]


def test_step_table_shows_both_regimes_beside_the_paper():
    rows = figures.step_table("patchify", "depthwise").rows
    assert [row[0] for row in rows] == ["patchify stem", "depthwise conv"] * 2
    assert rows[1][1:] == ("10", "2.350", "2.35", "15.72", "78.28 ± 0.08")
    assert rows[3][3] == "7.23" and rows[3][5] == "80.54"


def test_gain_table_goes_from_each_step_to_the_next():
    rows = figures.gain_table("move_up", "kernel7", "convnext").rows
    assert rows[0] == ("move up depthwise → kernel 7", "+0.65", "0.09", "+0.26")
    assert rows[1] == ("kernel 7 → separate downsampling", "+1.40", "0.09", "+1.30")


def test_speed_table_times_forward_and_training():
    (row,) = figures.speed_table({"tiny": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())}, 16, 2, repeats=2).rows
    assert row[0] == "tiny" and all(cell.count("img/s") == 1 for cell in row[2:])


def test_tables_escape_html_align_text_and_refuse_ragged_rows():
    shown = style.table(("step", "GMACs"), [("a < b", 4.1), ("c", 12)])
    assert "a &lt; b" in shown._repr_html_()
    assert str(shown).splitlines() == ["step   GMACs", "a < b    4.1", "c         12"]
    with pytest.raises(ValueError, match="a row needs 2 cells"):
        style.table(("step", "GMACs"), [("a",)])


def test_a_cube_colours_the_visible_cells_that_are_asked_for():
    ax = style.figure()[1]
    figures.draw_cube(ax, "BatchNorm", lambda image, channel, pixel: channel == 2)
    blue = [patch for patch in ax.patches if patch.get_facecolor() == to_rgba(style.BLUE)]
    assert len(blue) == 6 + 4  # the pixels in front and the images on top
    assert len(ax.patches) == 5 * 6 + 5 * 4 + 6 * 4
