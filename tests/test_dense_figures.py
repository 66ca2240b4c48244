"""Figures and tables of the chapters on detection and segmentation show what they are given."""

from collections import Counter

import matplotlib.pyplot as plt
import pytest
import torch

from convnext_min import paper
from convnext_min.book import dense_figures, results
from convnext_min.dense import datasets, flops
from convnext_min.dense.upernet import IGNORED

MADE_UP = {"backbone": 10**9, flops.EXTRAS: 10**8}, 2 * 10**6


@pytest.fixture
def counted(monkeypatch):
    """Counts that are made up, for speed; returns the calls."""
    calls = []
    monkeypatch.setattr(flops, "cost", lambda *network: calls.append(network) or MADE_UP)
    return calls


def test_table_3_is_whole_and_counts_the_networks_that_we_have(counted):
    rows = dense_figures.detection_table().rows
    published = (*paper.TABLE3_MASK_RCNN, *paper.TABLE3_CASCADE, *paper.TABLE3_CASCADE_22K)
    assert [row[0].replace("‑", "-") for row in rows] == [row.backbone for row in published]
    assert [row[0].replace("‑", "-") for row in rows if row[-1] == "–"] == [
        row.backbone for row in published if row.backbone.startswith(("Swin", "X101"))
    ]
    scores = ("46.2", "67.9", "50.8", "41.7", "65.0", "44.9")
    assert rows[1] == ("ConvNeXt‑T", "Mask R-CNN", *scores, "25.6", "262", "1.1")
    assert ("cascade_mask_rcnn", "resnet50", 1280, 800) in counted and len(counted) == 8


def test_tables_4_and_7_are_whole(counted):
    rows = dense_figures.segmentation_table().rows
    assert [row[0].replace("‑", "-") for row in rows] == [row.backbone for row in (*paper.TABLE4, *paper.TABLE4_22K)]
    assert rows[1] == ("ConvNeXt‑T", "1K", "512", "46.7", "46.0", "939", "1.1", "60", "2.0")
    assert rows[0][4] == "–" and ("upernet", "xlarge", 2560, 640) in counted


RECORDED = """trial,miou,pixels,steps
"upernet, road:resnet50, from scratch",54.0,80.0,1200
"fcn, convnext_atto, pretrained",30.0,71.0,900
"upernet, road:resnet50, from scratch",50.0,81.0,1200
"fcn, convnext_atto, pretrained",31.0,70.0,900
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Four recorded runs of a task that is called "made"."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    folder = tmp_path / "dense" / "made"
    folder.mkdir(parents=True)
    (folder / "runs.csv").write_text(RECORDED)


def test_recorded_runs_are_shown_by_their_means_and_one_by_one(runs):
    assert dense_figures.recorded("made", {"miou": "mIoU", "pixels": "pixels"}).rows == (
        ("UperNet", "ResNet-50", "from scratch", "50.0, 54.0", "52.0", "80.5", "1,200"),
        ("plain head", "ConvNeXt", "pretrained", "30.0, 31.0", "30.5", "70.5", "900"),
    )


def test_a_clear_difference_is_larger_than_the_scatter_of_all_rows_explains(runs):
    pooled = ((2 * 2**2 + 2 * 0.5**2) / 2) ** 0.5  # two degrees of freedom
    assert dense_figures.clear_difference("made", "miou") == pytest.approx(
        4.303 * pooled * (1 / 2 + 1 / 2) ** 0.5, 1e-3
    )


def test_a_level_is_drawn_by_what_varies_most_and_a_constant_one_is_constant():
    level = torch.zeros(5, 4, 6)
    level[2, :, 3:] = 7.0  # one channel differs between the halves
    level += 1e-3 * torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    halves = dense_figures.component(level)
    assert halves[:, :3].std() < 0.01 and halves[:, 3:].std() < 0.01
    assert abs(halves[:, 3:].mean() - halves[:, :3].mean()) > 0.9
    assert dense_figures.component(torch.ones(5, 1, 1).expand(5, 4, 6) + 1e-7).std() < 1e-3


def test_maps_have_names_and_shapes_and_as_many_arrows_as_asked():
    image, level = torch.rand(3, 8, 8), torch.randn(6, 4, 4)
    fig = dense_figures.maps([[("image", image), ("C2", level)], [None, ("P2", level)]], [((0, 0), (0, 1))])
    assert [ax.get_title() for ax in fig.axes] == ["image\n3×8×8", "C2\n6×4×4", "", "P2\n6×4×4"]
    assert len(fig.artists) == 1


def test_anchors_have_their_shapes():
    by_level = [torch.tensor([[-4.0, -4.0, 4.0, 4.0]] * 3) * 2**i for i in range(5)]
    matched = [torch.rand(n, 4) for n in (4, 2, 1, 0, 0)]
    fig = dense_figures.anchors(torch.rand(3, 64, 64), by_level, (32.0, 32.0), matched, (8, 16, 32, 64, 128))
    assert [ax.get_title() for ax in fig.axes] == ["15 anchors at one place", "7 anchors that match an object"]
    used = [Counter(patch.get_edgecolor() for patch in ax.patches) for ax in fig.axes]
    assert list(used[0].values()) == [3] * 5 and list(used[1].values()) == [4, 2, 1]
    assert list(used[1]) == list(used[0])[:3]  # the colours of their levels


@pytest.mark.parametrize("left", [3, 0])
def test_an_outline_goes_once_around_a_mask_also_at_the_border(left):
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[2:8, left:8] = True
    fig, ax = plt.subplots()
    dense_figures.outline(ax, mask, "#ff0000")
    ((path,),) = [lines.get_paths() for lines in ax.collections]
    assert (path.vertices[0] == path.vertices[-1]).all()
    low, high = path.vertices.min(0), path.vertices.max(0)
    assert low == pytest.approx([left - 0.5, 1.5], abs=0.3) and high == pytest.approx([7.5, 7.5], abs=0.3)
    plt.close(fig)


def test_titles_count_the_verdicts():
    masks = torch.zeros(3, 6, 6, dtype=torch.bool)
    fig = dense_figures.mistakes([(torch.rand(3, 6, 6), masks, ["found", "missed", "found"])])
    assert fig.axes[0].get_title() == "2\xa0found, 1\xa0missed"


def test_pixels_without_a_class_are_grey_and_do_not_count_as_wrong():
    labels = torch.tensor([[0, 1], [IGNORED, 1]])
    colours = dense_figures.coloured(labels, 2)
    assert colours[1, 0].tolist() == [0xD9] * 3 and (colours[0, 1] == colours[1, 1]).all()
    found = torch.tensor([[0, 0], [0, 1]])
    fig = dense_figures.predictions([(torch.rand(3, 2, 2), labels, found)], ("a", "b"))
    assert fig.axes[3].get_title() == "33% wrong"
    fig = dense_figures.predictions([(torch.rand(3, 2, 2), labels, found)], ("a", "b"), photos=False)
    assert [ax.get_title() for ax in fig.axes] == ["labels", "prediction", "33% wrong"]
    assert len({tuple(pixel) for pixel in fig.axes[2].images[0].get_array().reshape(-1, 3)}) == 2  # grey, and orange


def test_drawings_of_data_sets_take_few_images():
    drawn = datasets.shapes("val", instances=False, number=1)
    assert [len(dense_figures.scenes(drawn, photos=photos).axes) for photos in (True, False)] == [2, 1]
    fig = dense_figures.objects(datasets.shapes("val", number=2), 2)
    assert all(ax.get_title().endswith("objects") for ax in fig.axes[:2])
