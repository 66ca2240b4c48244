"""Tables and figures of the paper's results show each of its rows once, with the right numbers beside each other."""

from convnext_min import paper
from convnext_min.book import paper_results


def test_table_1_is_whole_and_has_the_throughput_of_table_12():
    rows = paper_results.imagenet_results().rows
    assert len(rows) == len(paper.TABLE1) + len(paper.TABLE1_22K)
    assert ("ConvNeXt-T", "1K", "224", "29", "4.5", "774.7", "1,943.5", "82.1") in rows
    assert ("Swin-L", "22K", "384", "197", "103.9", "46.0", "157.9", "87.3") in rows
    assert ("R-101x3", "22K", "384", "388", "204.6", "", "", "84.4") in rows
    speeds = {row[6] for row in rows if row[6]}
    assert speeds == {f"{value:,.1f}" for row in paper.TABLE12 for value in (row.swin, row.convnext) if value}
    assert {row[0] for row in paper_results.imagenet_results("ConvNeXt-T", "Swin-T").rows} == {"ConvNeXt-T", "Swin-T"}


def test_the_trade_off_has_a_point_per_model():
    for ax, part in zip(paper_results.imagenet_trade_off().axes, (paper.TABLE1, paper.TABLE1_22K)):
        points = sorted(tuple(point) for line in ax.lines for point in line.get_xydata())
        assert points == sorted((row.gmacs, row.top1) for row in part)


def test_table_2_has_our_counts_of_the_isotropic_networks():
    rows = {row[0]: row[1:] for row in paper_results.isotropic_results().rows}
    assert rows["ViT-S"] == ("22", "4.6", "978.5", "4.9", "79.8")
    assert rows["ConvNeXt-B (iso.)"] == ("87 (87.1)", "16.9 (16.90)", "320.1", "7.7", "82.0")
