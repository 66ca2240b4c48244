"""Figures and tables of recipes show the recipes' own values."""

import numpy as np
import pytest
from PIL import Image

from convnext_min import recipes
from convnext_min.book import recipe_figures

IN1K = recipes.get("in1k", model="convnext_tiny")


def photo(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    values = np.random.default_rng(seed).integers(60, 200, (size[1] // 10, size[0] // 10, 3), np.uint8)
    return Image.fromarray(values).resize(size)


def test_differences_are_the_fields_that_differ():
    slower = recipes.get("imagenette", ["base_lr=1e-3", "epochs=7"])
    table = recipe_figures.differences({"plain": recipes.get("imagenette"), "slower": slower})
    assert table.header == ("field", "plain", "slower")
    assert table.rows == (("epochs", "5", "7"), ("base_lr", "0.002", "0.001"))


def test_a_strip_shows_each_operation_on_the_picture_before_it():
    fig = recipe_figures.image_strip(IN1K, photo(0), photo(1), side=32)
    shown = {ax.get_title(): np.asarray(ax.images[0].get_array()) for ax in fig.axes}
    names = "photograph, random crop, flip, RandAugment, normalization, random erasing, Mixup, CutMix"
    assert ", ".join(shown) == names
    np.testing.assert_array_equal(shown["flip"], shown["random crop"][:, ::-1])
    changed = (shown["random erasing"] != shown["normalization"]).any(-1).mean()
    assert 0.01 < changed < 0.5  # a rectangle
    assert (shown["CutMix"] == shown["random erasing"]).all(-1).any()  # a part is kept, a part replaced
    assert not (shown["CutMix"] == shown["random erasing"]).all()
    again = recipe_figures.image_strip(IN1K, photo(0), photo(1), side=32)
    np.testing.assert_array_equal(np.asarray(again.axes[7].images[0].get_array()), shown["CutMix"])


def test_pictures_in_evaluation_have_one_scale_and_one_base_line():
    fig = recipe_figures.evaluation_crops(photo(0, (400, 300)), {"a": IN1K})
    assert [np.ptp(ax.get_ylim()) for ax in fig.axes] == [150, 150]
    assert [ax.images[0].get_array().shape[:2] for ax in fig.axes] == [(150, 200), (112, 112)]


def test_learning_rates_are_in_the_unit_of_the_label():
    tuned = recipes.get("in22k-ft224", model="convnext_tiny")
    left, right = recipe_figures.learning_rates([("scratch", IN1K)], [("tuned", tuned)]).axes
    assert max(left.lines[0].get_ydata()) == pytest.approx(4, rel=1e-3)
    assert right.lines[0].get_ydata()[0] == pytest.approx(5) and right.get_ylabel() == "learning rate (1/100,000)"


def test_layer_decay_has_a_bar_for_stem_blocks_and_classifier():
    tiny, base = recipe_figures.layer_decay(["convnext_tiny", "convnext_base"], 0.8).axes
    bars = [bar.get_height() for bar in tiny.patches]
    assert len(bars) == 1 + 18 + 1 and bars[0] == pytest.approx(0.8**7) and bars[-1] == 1
    assert len(base.patches) == 1 + 36 + 1


def test_the_papers_recipes_leave_out_what_was_not_trained():
    rows = {row[0]: row[1:] for row in recipe_figures.paper_recipes().rows}
    assert rows["in1k"] == ("300 (20)", "0.004 / 4,096", "224", "0.1", "0.4", "0.5", "0.5", "")
    assert rows["in1k-ft384"][3:] == ("", "", "0.8", "0.95", "")
