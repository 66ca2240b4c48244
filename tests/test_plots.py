import time

import pytest
import torch
from matplotlib.colors import to_rgba
from torch import nn

from convnext_min import STEPS, build, paper
from convnext_min.book import figures, recipe_figures, roofline, style
from convnext_min.data import synthetic_images


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


def test_predictions_name_the_true_class_only_where_they_are_wrong():
    sample = synthetic_images("val", 2, 16)
    right, wrong = sample.labels[0].item(), (sample.labels[1].item() + 1) % 10
    probabilities = torch.full((2, 10), 0.05)
    probabilities[0, right], probabilities[1, wrong] = 0.55, 0.5
    first, second, *_ = (ax.get_title() for ax in figures.predictions(sample, probabilities).axes)
    assert first == f"{sample.classes[right]} 55%"
    assert second == f"{sample.classes[wrong]} 50%\nnot {sample.classes[sample.labels[1]]}"


def test_stage_macs_are_those_of_the_blocks_of_each_stage():
    ax = figures.stage_macs("resnet50", "stage_ratio").axes[0]
    heights = torch.tensor([bar.get_height() for bar in ax.patches], dtype=torch.float32).view(2, 4)
    block = 0.218  # GMACs of a block, in any stage
    torch.testing.assert_close(heights[1] - heights[0], torch.tensor([0, -block, 3 * block, 0]), atol=2e-3, rtol=0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["3, 4, 6, 3", "3, 3, 9, 3"]


def test_rectangles_are_drawn_in_pixels_and_stay_in_the_picture():
    image = figures.photos(("chelsea",), 32)[0]
    (ax,) = figures.rectangles(image, {"stem": [(8, 12, 4, 6)]}, margin=2).axes
    (box,) = ax.patches
    assert (box.get_y(), box.get_x(), box.get_height(), box.get_width()) == (8, 12, 4, 6)
    assert ax.get_xlim() == (10, 20) and ax.get_ylim() == (14, 6)


def test_titles_of_mixed_labels_leave_out_classes_without_a_share():
    labels = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    assert recipe_figures.label_titles(labels, ("cat", "dog")) == ["100% cat", "25% cat\n75% dog"]


def test_dropped_blocks_are_counted_as_often_as_the_rate_says():
    model = build("resnet50", width_multiplier=1 / 16, drop_path_rate=0.5)
    torch.manual_seed(0)
    ax = recipe_figures.dropped_blocks(model, torch.randn(64, 3, 32, 32)).axes[0]
    grid = ax.images[0].get_array()
    assert grid.shape == (16, 64) and not grid[0].any()  # the first block has rate 0
    assert 0.4 < grid[-1].mean() < 0.6 and ax.get_title() == f"{grid.sum()} of 1024 left out"


def test_the_roof_is_the_smaller_of_memory_and_arithmetic():
    layers = [roofline.LayerSpeed("1×1", 64, 10.0, 5e9)]
    roof, point = roofline.draw(layers, peak=8e9, bandwidth=2e9).axes[0].lines
    for intensity, speed in zip(*roof.get_data()):
        assert speed == pytest.approx(min(2 * intensity, 8), rel=1e-5)
    assert (point.get_xdata(), point.get_ydata()) == ([10.0], [5.0])


def test_the_fastest_call_is_the_shortest_one():
    durations = iter([0.0, 0.02, 0.001])

    def call():
        time.sleep(next(durations, 0.02))

    assert 0.001 <= roofline.fastest(call, seconds=0.05) < 0.02


def test_the_limits_of_the_machine_are_rates():
    peak, bandwidth = roofline.machine_limits(0.001, 64)
    assert 1e7 < peak < 1e15 and 1e7 < bandwidth < 1e15


def test_the_gains_of_recipe_and_architecture_are_differences_of_the_papers_rows():
    ax = recipe_figures.recipe_gain().axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert {"recipe: +2.69", "architecture: +3.15", "76.13", "78.82", "81.97"} <= {*texts}
    assert len(ax.get_yticks()) == 3


def test_the_fields_of_a_design_are_named():
    rows = dict(figures.design_table("ResNet-50", STEPS["resnet50"]).rows)
    assert rows["depths"] == "(3, 4, 6, 3)" and rows["act"] == "ReLU" and rows["block"] == "Bottleneck"


def test_losses_are_running_means_of_ten_beside_the_loss_of_guessing():
    ax = recipe_figures.residual_losses({"8 convolutions, plain": [1.0] * 5 + [2.0] * 15}).axes[0]
    curve, guessing = ax.lines
    assert (curve.get_xdata()[0], curve.get_ydata()[0], curve.get_ydata()[-1]) == pytest.approx((10, 1.5, 2.0))
    assert guessing.get_ydata()[0] == pytest.approx(2.303, abs=1e-3) and curve.get_linestyle() == ":"
