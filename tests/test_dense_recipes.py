"""The recipes for detection and segmentation: schedules, values per model, and what cannot be set."""

import pytest

from convnext_min.dense import recipes


def test_the_3x_schedule_drops_after_27_and_33_of_36_epochs():
    recipe = recipes.get("coco", "mask_rcnn", "convnext_tiny")
    assert recipe.epochs == 36 and recipe.lr == 1e-4
    lrs = [recipe.lr_at(epoch / 36) for epoch in (0.01, 26.9, 27, 32.9, 33)]
    assert lrs == pytest.approx([1e-4 * 0.01 * 7330 / 500, 1e-4, 1e-5, 1e-5, 1e-6])


def test_ade20k_decays_linearly_over_160000_iterations():
    recipe = recipes.get("ade20k", "upernet", "convnext_xlarge")
    iterations = recipe.epochs * (20_210 // recipe.batch_size)
    assert iterations == pytest.approx(160_000, rel=0.003)
    assert recipe.lr == 8e-5 and recipe.lr_at(0.5) == pytest.approx(4e-5) and recipe.lr_at(1) == 0


@pytest.mark.parametrize("key", recipes.PER_MODEL)
def test_values_per_model_are_in_the_ranges_of_the_paper(key):
    recipe = recipes.get(*key)
    if key[0] == "coco":
        assert recipe.base_lr in (1e-4, 2e-4) and recipe.layer_decay in (0.7, 0.8, 0.9, 0.95)
        assert 0.3 <= recipe.drop_path <= 0.8
    else:
        assert recipe.base_lr in (8e-5, 1e-4) and recipe.layer_decay in (0.8, 0.9)
        assert recipe.drop_path in (0.3, 0.4, 0.5)


@pytest.mark.parametrize("variant, crop", [("base", 512), ("large", 640), ("xlarge", 640)])
def test_the_largest_backbones_are_trained_on_ade20k_with_larger_crops(variant, crop):
    recipe = recipes.get("ade20k", "upernet", f"convnext_{variant}")
    assert recipe.crop == recipe.min_size[-1] == crop  # the last size is the one in evaluation
    assert (min(recipe.min_size), max(recipe.min_size)) == (crop // 2, 2 * crop)


def test_a_backbone_from_imagenet_22k_has_its_own_configuration():
    coco = recipes.get("coco", "cascade_mask_rcnn", "convnext_base", (), "in22k")
    assert (coco.base_lr, coco.drop_path, coco.layer_decay) == (1e-4, 0.6, 0.8)
    ade20k = recipes.get("ade20k", "upernet", "convnext_base", ["epochs=2"], "in22k")
    assert (ade20k.crop, ade20k.min_size[-1], ade20k.epochs) == (640, 640, 2)
    large = "coco", "cascade_mask_rcnn", "convnext_large"
    assert recipes.get(*large, (), "in22k") == recipes.get(*large)  # the only one there is


def test_settings_change_a_recipe_and_those_of_classifiers_are_refused():
    recipe = recipes.get("nuclei", "mask_rcnn", "convnext_atto", ["epochs=3", "min_size=(64, 96)"])
    assert (recipe.epochs, recipe.min_size) == (3, (64, 96))
    with pytest.raises(ValueError, match="mixup is for classification"):
        recipes.get("nuclei", "mask_rcnn", "convnext_atto", ["mixup=0.2"])
    with pytest.raises(ValueError, match=r"expected key=value with one of the keys .*anchor_scale"):
        recipes.get("nuclei", "mask_rcnn", "convnext_atto", ["anchors=2"])
