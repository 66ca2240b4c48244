import pytest
import torch
from torch import nn

from convnext_min.blocks import DepthwiseBottleneck, InvertedBottleneck
from convnext_min.book import costs, figures
from convnext_min.measure import count_macs, count_parameters
from convnext_min.roadmap import build


@pytest.mark.parametrize("slug", ["width", "inverted"])
def test_costs_by_kind_sum_to_those_of_the_network(slug):
    with torch.device("meta"):
        model = build(slug)
        sums = costs.costs_by_kind(model, repeats=1)
    assert sum(cost.macs for cost in sums.values()) == count_macs(model)
    assert sum(cost.weights for cost in sums.values()) == count_parameters(model)
    for stage in range(4):
        assert sums[stage, "depthwise"].macs < 0.05 * sums[stage, "1×1"].macs


def test_the_inverted_bottleneck_saves_its_macs_in_the_shortcuts():
    rows = {row[0]: row[1:] for row in costs.compare_by_kind("width", "inverted").rows}
    assert rows["1×1"][0] == "4,422 → 4,509 (+87)"
    assert rows["shortcut 1×1"][0] == "809 → 43 (-766)"
    assert rows["all"] == ("5,268 → 4,644 (-624)", "33.76 → 25.85 (-7.91)")


def test_bars_of_both_steps_reach_the_macs_of_their_stages():
    (ax,) = costs.draw_by_kind("width", "inverted").axes
    tops = {}
    for bar in ax.patches:
        place = bar.get_x() + bar.get_width() / 2
        tops[round(place, 1)] = max(tops.get(round(place, 1), 0.0), bar.get_y() + bar.get_height())
    assert set(tops) == {stage + offset for stage in range(4) for offset in (-0.2, 0.2)}
    assert tops[1.2] < tops[0.8]  # the second stage has lost most of its shortcut


def test_kept_tensors_are_counted_by_their_channels():
    assert costs.kept_tensors(DepthwiseBottleneck(32, 8), 32, 8) == {8: 4, 32: 2}
    assert costs.kept_tensors(InvertedBottleneck(8, 8), 8, 8) == {32: 4, 8: 2}


def test_milliseconds_take_gradients_only_in_training():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    assert costs.milliseconds(layer, torch.randn(2, 4, 8, 8), repeats=1) > 0
    assert layer.weight.grad is None
    assert costs.milliseconds(layer, torch.randn(2, 4, 8, 8), repeats=1, training=True) > 0
    assert layer.weight.grad is not None


def test_macs_of_depthwise_convolutions_grow_with_the_square_of_the_kernel():
    measured = costs.depthwise_costs((3, 5), repeats=1)
    small, large = measured["MACs"]
    assert large / small == pytest.approx(25 / 9)
    assert 1e9 * small == pytest.approx(9 * 96 * 56**2 * (3 + 3 / 2 + 9 / 4 + 3 / 8))  # 3, 3, 9, 3 blocks
    left, right = costs.draw_depthwise((3, 5), measured).axes
    assert [line.get_label() for line in right.lines] == ["forward", "backward", "fast backward"]
    assert list(left.lines[0].get_ydata()) == measured["MACs"]


def test_timed_layers_have_their_macs_and_a_norm_has_none():
    table = costs.time_layers({"conv": nn.Conv2d(8, 16, 1), "norm": nn.BatchNorm2d(8)}, size=10, repeats=1)
    assert [row[:2] for row in table.rows] == [("conv", "0.0"), ("norm", "0.0")]
    assert table.rows[0][3] != "–" == table.rows[1][3]


def test_the_shapes_of_stages_put_channels_first():
    class Swapped(nn.Module):
        def forward(self, x):
            return x[:, :, ::2].permute(0, 2, 3, 1)

    stage = Swapped()
    assert costs.stage_shapes(stage, [stage], channels_last=True) == [(3, 112, 224)]
    assert costs.stage_shapes(stage, [stage]) == [(112, 224, 3)]


def test_both_panels_of_accuracy_over_kernel_size_have_the_same_span():
    axes = figures.kernel_accuracy().axes
    spans = [high - low for low, high in (ax.get_ylim() for ax in axes)]
    assert spans == pytest.approx([1.0, 1.0])
    assert [len(ax.containers[0].lines[2]) for ax in axes] == [1, 0]  # error bars in the smaller regime only


def test_photos_are_square_and_in_the_order_of_their_names():
    photos = figures.photos(("chelsea", "rocket"), size=32)
    assert photos.shape == (2, 3, 32, 32) and photos.dtype == torch.uint8
    assert (figures.photos(("rocket",), size=32)[0] == photos[1]).all()


def test_a_bar_per_network_with_the_share_of_depthwise_convolutions():
    measured = {slug: costs.costs_by_kind(build(slug), resolution=32, batch_size=1) for slug in ("patchify", "width")}
    macs, seconds = costs.draw_macs_and_time(measured, 32, 1).axes
    dense, wide = measured.values()
    assert costs.total(dense, "depthwise").macs == 0 < costs.total(dense, "dense 3×3").macs
    share = costs.total(wide, "depthwise").macs / count_macs(build("width"), 32)
    assert [text.get_text() for text in macs.texts] == [f"depthwise\n{share:.1%}"]
    drawn = 1e9 * sum(bar.get_width() for bar in macs.patches)
    assert drawn == pytest.approx(sum(costs.total(c).macs for c in measured.values()))
    assert len(seconds.texts) == 1
