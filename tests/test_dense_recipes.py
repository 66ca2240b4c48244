"""The recipes for detection and segmentation: schedules, values per model, and what cannot be set."""

from dataclasses import fields

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


def shown(*arguments) -> tuple[str, dict[str, str]]:
    """The title, and the value and source of each field."""
    title, *lines = recipes.show(*arguments).splitlines()
    return title, {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def test_every_field_has_a_source():
    names = {field.name for field in fields(recipes.DenseRecipe)}
    assert names == recipes.SOURCES.keys() | set(recipes.FOR_CLASSIFIERS)
    assert not recipes.SOURCES.keys() & set(recipes.FOR_CLASSIFIERS)
    assert all(any(pair) for pair in recipes.SOURCES.values())
    for task, heads in recipes.HEADS_OF.items():
        for head in heads:
            lines = shown(task, head, "convnext_tiny")[1]
            assert lines.keys() == {name for name, pair in recipes.SOURCES.items() if pair["rcnn" not in head]}


@pytest.mark.parametrize("values", [recipes.PER_MODEL, recipes.FROM_22K], ids=["per model", "from 22k"])
def test_the_values_of_a_model_are_shown_with_their_source(values):
    sources = {"crop": "Table 4", "min_size": recipes.BEIT, "max_size": recipes.BEIT}
    for key, changes in values.items():
        lines = shown(*key, (), "in22k" if values is recipes.FROM_22K else None)[1]
        for name, value in changes.items():
            assert lines[name].startswith(f"{value} ") and lines[name].endswith(sources.get(name, recipes.SWEEP))


def test_sources_follow_the_task_the_network_and_the_settings():
    title, coco = shown("coco", "mask_rcnn", "convnext_base", ["epochs=12"], "in22k")
    assert title == "coco for mask_rcnn:convnext_base, starting from in22k"
    assert coco["epochs"].startswith("12 ") and coco["epochs"].endswith("your setting")
    assert coco["base_lr"].endswith("this package")  # no such network was released
    assert coco["optimizer"].endswith("section 4") and coco["rois"].endswith("released configuration")
    _, ade20k = shown("ade20k", "upernet", "convnext_tiny")
    assert ade20k["warmup"].startswith("1.19063 epochs") and ade20k["warmup"].endswith("1,500 of 160,000 iterations")
    _, nuclei = shown("nuclei", "mask_rcnn", "road:resnet50")
    assert all(line.endswith("this package") for line in nuclei.values())


def test_the_command_line_shows_and_refuses(capsys):
    options = ["--head", "upernet", "--backbone", "convnext_tiny"]
    recipes.main(["show", "camvid", *options, "--set", "crop=96"])
    said = capsys.readouterr().out
    assert said.startswith("camvid for upernet:convnext_tiny, starting from new weights\n") and "your setting" in said
    with pytest.raises(SystemExit, match="error: upernet is not for coco; valid: mask_rcnn, cascade_mask_rcnn"):
        recipes.main(["show", "coco", *options])


@pytest.mark.parametrize(("task", "heads"), recipes.HEADS_OF.items())
def test_a_step_of_the_road_takes_no_settings_that_only_a_convnext_has(task, heads):
    for head in heads:
        recipe = recipes.get(task, head, "road:resnet50")
        assert (recipe.layer_decay, recipe.stage_wise, recipe.init) == (1.0, False, "pytorch")


def test_mask_rcnn_without_a_released_configuration_takes_that_of_the_cascade():
    mine, theirs = (recipes.get("coco", head, "convnext_base") for head in ("mask_rcnn", "cascade_mask_rcnn"))
    assert (mine.drop_path, mine.layer_decay, mine.lr) == (theirs.drop_path, theirs.layer_decay, theirs.lr)
    assert recipes.get("coco", "mask_rcnn", "convnext_tiny").layer_decay == 0.95
