import pytest
import torch
from matplotlib.patches import Polygon
from torch import nn

from convnext_min.book import pictures
from convnext_min.book.style import ORANGE, RED


def test_an_output_reads_what_its_layer_connects_it_to():
    read = pictures.read_by(nn.Conv2d(4, 4, 3, padding=1, groups=2), 4, 5, channel=3, row=0, column=2)
    assert read.sum((1, 2)).tolist() == [0, 0, 6, 6]  # two channels; two of three rows are inside
    assert read[2].nonzero().min(0).values.tolist() == [0, 1]


def test_each_convolution_marks_as_many_cubes_as_it_has_weights():
    fig = pictures.draw_convolutions()
    marked = {}
    for ax in fig.axes:
        colors = [patch.get_facecolor() for patch in ax.patches if isinstance(patch, Polygon)]
        counts = [colors.count(Polygon([(0, 0)], facecolor=color).get_facecolor()) for color in (ORANGE, RED)]
        marked[ax.get_title().split()[0]] = counts
    assert marked == {"dense": [36, 1], "grouped": [18, 1], "depthwise": [9, 1], "pointwise": [4, 1]}


def test_attention_sees_a_window_and_the_convolution_the_pixels_around():
    attention, convolution = [ax.collections[0].get_array().reshape(14, 14) for ax in pictures.draw_reach().axes]
    assert (attention[:7, :7] > 0).all() and (attention[7:, 7:] > 0).all() and (attention > 0).sum() == 98
    first, second = convolution[0:7, 2:9], convolution[7:14, 5:12]
    assert (first == second).all() and (first > 0).all() and (convolution > 0).sum() == 98
    assert (attention[:7, :7] != attention[7:, 7:]).any()


@pytest.mark.parametrize("shift, parts", [(0, 4), (2, 9)])
def test_parts_are_the_pixels_that_a_mask_leaves_together(shift, parts):
    numbers = pictures.regions(8, 4, shift)
    assert numbers.unique().tolist() == list(range(parts))
    rows = (torch.arange(8) - shift).div(4, rounding_mode="floor")
    together = (rows[:, None] == rows)[:, None, :, None] & (rows[:, None] == rows)[None, :, None, :]
    assert torch.equal(numbers[:, :, None, None] == numbers, together)


def test_thick_lines_are_the_borders_of_the_windows():
    figure = pictures.draw_shift(size=6, window=3, shift=1)
    vertical = [sorted({line.get_xdata()[0] for line in ax.lines}) for ax in figure.axes]
    assert vertical == [[0, 3, 6], [0, 1, 4, 6], [0, 3, 6]]


def test_weights_are_drawn_over_the_image_of_their_query():
    weights = torch.rand(12, 12)
    fig = pictures.draw_attention(torch.rand(3, 4, 3), weights, queries=((1, 2),))
    assert (fig.axes[1].images[0].get_array() == weights[6].view(3, 4).numpy()).all()
