from dataclasses import asdict, replace
from math import prod

import pytest

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
        "10 epochs = 730 steps of 128 images",
        "73 steps an epoch",
        "rate 0.004 (0.002 for 64",
        "36 steps of warm",
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
        ("betas=(0.9,)", r"betas takes tuple\[float, float\], got \(0.9,\)"),
        ("progressive=(0.5,64)", r"progressive takes tuple\[tuple\[float, int\], ...\], got \(0.5, 64\)"),
        ("progressive=((0.7,96),(0.4,64))", "progressive must be pairs of a growing fraction"),
        ("resolution=16", "resolution must be at least 32, got 16"),
        ("drop_path=1.0", "drop_path must be at least 0 and below 1, got 1.0"),
        ("base_lr=-1.0", "base_lr must be positive, got -1.0"),
        ("amp=fp8", "amp must be auto, bf16 or fp32, got 'fp8'"),
        ("momentum=0.9", "cannot set 'momentum=0.9'.*key out of epochs, minutes"),
        ("epochs", "cannot set 'epochs'.*key=value"),
    ],
)
def test_wrong_settings_say_what_is_right(setting, message):
    with pytest.raises(ValueError, match=message):
        recipes.get("imagenette", [setting])


def test_mixing_needs_an_even_batch():
    with pytest.raises(ValueError, match="batch_size must be even"):
        Recipe(mixup=0.8, batch_size=33)


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown recipe 'imagenet'; valid: imagenette"):
        recipes.get("imagenet")


def test_every_recipe_survives_a_checkpoint():
    for recipe in recipes.RECIPES.values():
        assert Recipe(**asdict(recipe)) == recipe
