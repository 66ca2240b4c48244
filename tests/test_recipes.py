import inspect
from dataclasses import asdict, replace
from math import prod

import pytest
from timm.data import Mixup

from convnext_min import recipes
from convnext_min.recipes import Recipe


def test_learning_rate_is_linear_then_a_half_cosine():
    recipe = Recipe(base_lr=2e-3, base_batch=64, batch_size=64, warmup=0.2, min_lr=1e-4)
    assert recipe.lr_at(0.0) == 0.0
    assert recipe.lr_at(0.05) == pytest.approx(0.5e-3)
    assert recipe.lr_at(0.2) == pytest.approx(2e-3)
    assert recipe.lr_at(0.4) == pytest.approx(1e-4 + 1.9e-3 * (1 + 2**-0.5) / 2)  # a quarter of the cosine: 45 degrees
    assert recipe.lr_at(0.6) == pytest.approx((2e-3 + 1e-4) / 2)
    assert recipe.lr_at(1.0) == pytest.approx(1e-4)


def test_steps_divide_the_learning_rate_by_ten_after_each_third():
    recipe = Recipe(base_lr=0.1, base_batch=256, batch_size=256, schedule="steps", warmup=0.1)
    rates = [recipe.lr_at(progress) for progress in (0.05, 0.1, 0.33, 0.34, 0.66, 0.67, 1.0)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_learning_rate_without_warm_up_starts_at_its_peak():
    assert Recipe(warmup=0.0, base_lr=1e-3, base_batch=256, batch_size=256).lr_at(0.0) == 1e-3


def test_learning_rate_is_in_proportion_to_the_batch():
    assert Recipe(base_lr=4e-3, base_batch=4096, batch_size=1024).lr == pytest.approx(1e-3)


def test_warm_up_of_the_paper_is_20_epochs():
    assert recipes.warmup_steps(Recipe(epochs=300, warmup=20 / 300), steps_per_epoch=312) == 20 * 312


def test_resolution_grows_at_the_fractions_given():
    recipe = Recipe(progressive=((0.4, 64), (0.7, 96)), resolution=128)
    assert [recipe.resolution_at(p) for p in (0.0, 0.39, 0.4, 0.69, 0.7, 1.0)] == [64, 64, 96, 96, 128, 128]


def test_average_covers_a_fraction_of_the_steps_so_far():
    recipe = Recipe(ema_decay=0.9999, ema_horizon=0.1)
    assert recipe.ema_decay_at(10) == pytest.approx(1 - 1 / 2)
    assert recipe.ema_decay_at(90) == pytest.approx(1 - 1 / 10)
    assert recipe.ema_decay_at(10**6) == 0.9999
    assert replace(recipe, ema_horizon=None).ema_decay_at(1) == 0.9999


def test_initial_weights_vanish_from_a_short_average_but_not_from_a_constant_one():
    left = {horizon: Recipe(ema_horizon=horizon) for horizon in (0.1, None)}
    left = {h: prod(recipe.ema_decay_at(step) for step in range(1, 2701)) for h, recipe in left.items()}
    assert left[0.1] < 1e-20
    assert left[None] == pytest.approx(0.763, abs=1e-3)


def test_description_does_the_arithmetic():
    text = recipes.describe(recipes.get("imagenette", ["epochs=10", "batch_size=128", "warmup=0.05"]), 9469)
    for part in (
        "10 epochs = 730 iterations of 128 images",
        "73 iterations per epoch",
        "rate 0.004 (0.002 for 64",
        "36 iterations of warm",
    ):
        assert part in text
    assert "3 minutes of 64 images" in recipes.describe(recipes.get("imagenette", ["minutes=3"]), 9469)


def test_settings_have_the_type_of_their_field():
    recipe = recipes.get(
        "imagenette", ["base_lr=1", "optimizer=sgd", "minutes=2.5", "progressive=((0.5,64),)", "dims=(8,16,32,64)"]
    )
    assert (recipe.base_lr, recipe.optimizer, recipe.minutes) == (1, "sgd", 2.5)
    assert (recipe.progressive, recipe.dims) == (((0.5, 64),), (8, 16, 32, 64))
    assert recipes.get("imagenette", ["clip_grad=1.0", "clip_grad=None"]) == recipes.get("imagenette")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs=five", "epochs takes int, got 'five'"),
        ("epochs=2.5", "epochs takes int, got 2.5"),
        ("epochs=True", "epochs takes int, got True"),
        ("base_lr=fast", "base_lr takes float, got 'fast'"),
        ("minutes=soon", r"minutes takes float \| None, got 'soon'"),
        ("betas=(0.9,)", r"betas takes tuple\[float, float\] \| None, got \(0.9,\)"),
        ("progressive=(0.5,64)", r"progressive takes tuple\[tuple\[float, int\], ...\], got \(0.5, 64\)"),
        ("progressive=((0.7,96),(0.4,64))", "progressive must be pairs of a growing fraction"),
        ("resolution=16", "resolution must be at least 32, got 16"),
        ("drop_path=1.0", "drop_path must be at least 0 and below 1, got 1.0"),
        ("base_lr=-1.0", "base_lr must be positive, got -1.0"),
        ("clip_grad=0.0", "clip_grad must be positive, got 0.0"),
        ("eval_crop=0.0", "eval_crop must be above 0 and at most 1, got 0.0"),
        ("betas=(0.9,1.0)", r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
        ("crop_scale=(0.5,0.2)", r"crop_scale must be two growing fractions above 0 and at most 1, got"),
        ("stem=resnet", "stem must be patchify or overlapping, got 'resnet'"),
        ("init=ones", "init must be paper, fan_in or pytorch, got 'ones'"),
        ("amp=fp8", "amp must be auto, bf16, fp16 or fp32, got 'fp8'"),
        ("momentum=0.9", "cannot set 'momentum=0.9'.*one of the keys epochs, minutes"),
        ("epochs", "cannot set 'epochs'.*key=value"),
    ],
)
def test_wrong_settings_say_what_is_right(setting, message):
    with pytest.raises(ValueError, match=message):
        recipes.get("imagenette", [setting])


def test_mixing_needs_an_even_batch():
    with pytest.raises(ValueError, match="batch_size must be even"):
        Recipe(mixup=0.8, batch_size=33)


def test_a_part_of_the_images_is_taken_in_memory_only():
    with pytest.raises(ValueError, match=r"fraction=0\.1 .* needs loader=memory"):
        Recipe(fraction=0.1, loader="disk")


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown recipe 'imagenet'; valid: imagenette, .*convnext_min\.dense\.recipes"
    ):
        recipes.get("imagenet")


def test_every_recipe_survives_a_checkpoint():
    for recipe in recipes.RECIPES.values():
        assert Recipe(**asdict(recipe)) == recipe


# ---- The paper's tables, read across: the values here are typed from them, model by model

SIZES = [f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")]
ISOTROPIC = [f"convnext_isotropic_{size}" for size in ("small", "base", "large")]
EVERYWHERE = {
    "optimizer": "adamw",
    "betas": (0.9, 0.999),
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.25,
    "label_smoothing": 0.1,
    "min_lr": 1e-6,
    "clip_grad": None,
    "crop_scale": (0.08, 1.0),
    "loader": "disk",
    "stem": "patchify",
    "init": "paper",
    "ema_horizon": None,
}
TABLE5 = EVERYWHERE | {
    "base_lr": 4e-3,
    "base_batch": 4096,
    "batch_size": 4096,
    "weight_decay": 0.05,
    "mixup": 0.8,
    "cutmix": 1.0,
    "layer_scale_init": 1e-6,
    "layer_decay": 1.0,
    "head_init_scale": 1.0,
    "resolution": 224,
    "eval_resolution": 224,
    "eval_crop": 0.875,
}
TABLE6 = EVERYWHERE | {
    "base_lr": 5e-5,
    "base_batch": 512,
    "batch_size": 512,
    "epochs": 30,
    "warmup": 0.0,
    "weight_decay": 1e-8,
    "mixup": 0.0,
    "cutmix": 0.0,
    "layer_scale_init": 1e-6,
    "head_init_scale": 0.001,
}
AT_224 = {"resolution": 224, "eval_resolution": 224, "eval_crop": 0.875}
AT_384 = {"resolution": 384, "eval_resolution": 384, "eval_crop": 1.0}
COLUMNS = {  # recipe: its values, its models, their stochastic depths
    "in1k": (TABLE5 | {"epochs": 300, "ema_decay": 0.9999}, SIZES[:4] + ISOTROPIC, (0.1, 0.4, 0.5, 0.5, 0.1, 0.2, 0.5)),
    "in22k": (TABLE5 | {"epochs": 90, "ema_decay": 0.0}, SIZES, (0.0, 0.0, 0.1, 0.1, 0.2)),
    "in1k-ft384": (TABLE6 | AT_384 | {"layer_decay": 0.7, "ema_decay": 0.0}, SIZES[2:4], (0.8, 0.95)),
    "in22k-ft224": (TABLE6 | AT_224 | {"layer_decay": 0.8}, SIZES, (0.0, 0.1, 0.2, 0.3, 0.4)),
    "in22k-ft384": (TABLE6 | AT_384 | {"layer_decay": 0.8}, SIZES, (0.0, 0.1, 0.2, 0.3, 0.4)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_value_is_the_papers(name):
    values, models, rates = COLUMNS[name]
    assert list(recipes.PER_MODEL[name]) == models
    for model, rate in zip(models, rates):
        recipe, expected = recipes.get(name, model=model), values | {"drop_path": rate}
        if model in ISOTROPIC[:2]:
            expected = expected | {"layer_scale_init": 0.0}
        if "-ft" in name and values["layer_decay"] == 0.8:
            expected = expected | {"ema_decay": 0.9999 if model == "convnext_xlarge" else 0.0}
        assert {key: getattr(recipe, key) for key in expected} == expected


def test_warm_up_in_epochs():
    epochs = {"in1k": 20, "in22k": 5, "in1k-ft384": 0, "in22k-ft224": 0, "in22k-ft384": 0}
    for name, models in recipes.PER_MODEL.items():
        for model in models:
            recipe = recipes.get(name, model=model)
            expected = 50 if model in ISOTROPIC else epochs[name]
            assert recipes.warmup_steps(recipe, steps_per_epoch=312) == expected * 312


def test_the_schedule_of_the_paper():
    recipe = recipes.get("in1k", model="convnext_tiny")
    assert recipe.lr_at(10 / 300) == pytest.approx(2e-3)
    assert recipe.lr_at(20 / 300) == pytest.approx(4e-3)
    assert recipe.lr_at(160 / 300) == pytest.approx((4e-3 + 1e-6) / 2)  # in the middle of the 280 epochs of cosine
    assert recipe.lr_at(1.0) == pytest.approx(1e-6)
    fine = recipes.get("in22k-ft224", model="convnext_tiny")
    assert fine.lr_at(0.0) == 5e-5 and fine.lr_at(0.5) == pytest.approx((5e-5 + 1e-6) / 2)


def test_timm_mixes_every_batch_with_either_of_the_two_as_the_paper_does():
    defaults = {name: p.default for name, p in inspect.signature(Mixup.__init__).parameters.items()}
    assert (defaults["prob"], defaults["switch_prob"], defaults["mode"]) == (1.0, 0.5, "batch")


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("in1k-ft384", "convnext_tiny", "no in1k-ft384 for convnext_tiny; it has it for convnext_base, convnext_large"),
        ("in1k-ft384", "convnext_tiny", "for convnext_tiny it has in1k, in22k, in22k-ft224, in22k-ft384"),
        ("in1k", "convnext_xlarge", "for convnext_xlarge it has in22k, in22k-ft224"),
        ("in22k", "convnext_isotropic_base", "for convnext_isotropic_base it has in1k"),
        ("in1k", "convnext_atto", "give the stochastic depth: --set drop_path=0.1"),
        ("in1k", None, "the values of in1k depend on the model; give one of convnext_tiny, convnext_small"),
    ],
)
def test_what_the_paper_does_not_have_is_refused_with_what_it_has(name, model, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(name, model=model)


def test_another_model_takes_a_recipe_of_the_paper_with_a_stochastic_depth_of_its_own():
    recipe = recipes.get("in1k", ["drop_path=0.05"], "convnext_atto")
    assert recipe == replace(recipes.get("in1k", model="convnext_tiny"), drop_path=0.05)


def test_settings_come_after_the_values_of_the_model():
    assert recipes.get("in1k", ["drop_path=0.3"], "convnext_base").drop_path == 0.3
    assert recipes.get("in1k", model="timm:convnext_base") == recipes.get("in1k", model="convnext_base")


def test_rand_augment_needs_images_that_are_read_one_by_one():
    with pytest.raises(ValueError, match="it needs loader=disk"):
        recipes.get("imagenette", ["rand_augment=rand-m9-mstd0.5-inc1"])
    assert recipes.get("imagenette", ["rand_augment=rand-m9-mstd0.5-inc1", "loader=disk"]).rand_augment
    with pytest.raises(ValueError, match="rand_augment must be empty or a RandAugment"):
        recipes.get("in1k", ["rand_augment=augmix"], "convnext_tiny")


def shown(name, model, *settings):
    lines = recipes.show(name, model, settings).splitlines()
    return lines[0], {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:]}


def test_a_recipe_is_shown_with_the_source_of_each_value():
    title, lines = shown("in1k", "convnext_base", "epochs=100")
    assert title == "in1k for convnext_base, starting from new weights"
    assert list(lines) == list(asdict(Recipe()))
    for field, value, source in (
        ("drop_path", "0.5", "Table 5"),
        ("epochs", "100", "your setting"),
        ("eval_crop", "0.875", "appendix A.2"),
        ("layer_decay", "1.0", "Table 5"),
        ("head_init_scale", "1.0", "Table 5"),
        ("clip_grad", "None", "Table 5"),
        ("min_lr", "1e-06", "released code"),
        ("eval_resolution", "224", "section 3.1"),
        ("amp", "'auto'", "this package"),
    ):
        assert lines[field].startswith(value) and lines[field].endswith(source)
    title, lines = shown("in1k-ft384", "convnext_large")
    assert (
        "best EMA weights" in title
        and lines["layer_decay"].startswith("0.7 ")
        and lines["layer_decay"].endswith("Table 6")
    )
    assert lines["layer_scale_init"].endswith('Table 6: "pre-trained"') and lines["clip_grad"].endswith("Table 6")
    lines = shown("in1k", "convnext_isotropic_small")[1]
    assert lines["stem"].endswith("section 3.3")
    assert lines["warmup"].startswith("50 epochs") and lines["warmup"].endswith("appendix A")
    assert lines["cutmix"].endswith("Table 5")


def test_the_command_line_shows_and_refuses(capsys):
    recipes.main(["show", "in22k-ft384", "--model", "convnext_xlarge"])
    assert "384" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: the paper has no in22k for convnext_isotropic_small"):
        recipes.main(["show", "in22k", "--model", "convnext_isotropic_small"])
