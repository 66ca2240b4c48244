"""The arithmetic of a run against numbers worked out by hand, and the warnings."""

import math
from dataclasses import replace

import pytest

from convnext_min import recipes
from convnext_min.train.plan import main as plan_main
from convnext_min.train.plan import plan

IN1K = recipes.get("in1k", model="convnext_tiny")
IMAGES = 1_281_167


def test_the_papers_run_on_eight_gpus():
    made = plan(IN1K, IMAGES, processes=8, micro_batch=128, images_per_second=800, rule=IN1K)
    assert (made.accumulation, made.recipe) == (4, IN1K)  # 8 x 128 x 4 = 4096
    assert made.steps_per_epoch == 312  # 1,281,167 / 4096 = 312.8, and the rest is dropped
    assert (made.warmup_steps, made.steps) == (20 * 312, 300 * 312)
    assert made.ema_half_life == pytest.approx(6931.1 / 312, rel=1e-4)  # 0.9999^6931.1 = 1/2
    assert made.hours == pytest.approx(300 * 312 * 4096 / 6400 / 3600)
    assert made.warnings == ()
    text = str(made)
    for part in (
        "effective batch size 4,096 = 8 processes × 128 images × 4 gradient accumulation steps",
        "93,600 iterations",
    ):
        assert part in text
    assert "6,240 iterations of warm-up" in text and "EMA half-life: 22 epochs" in text and "16.6 hours" in text


def test_more_processes_accumulate_less_and_change_nothing_else():
    one, many = plan(IN1K, IMAGES, 1, 64), plan(IN1K, IMAGES, 64, 64)
    assert (one.accumulation, many.accumulation) == (64, 1)
    assert one.recipe == many.recipe == IN1K and one.steps == many.steps
    assert one.hours is None and "hours" not in str(one)


def test_without_a_size_for_a_process_it_takes_its_share_at_once():
    made = plan(replace(IN1K, batch_size=64), 1000, 2)
    assert (made.micro_batch, made.accumulation) == (32, 1)


def test_a_batch_that_cannot_be_made_is_replaced_and_the_rate_with_it():
    made = plan(IN1K, IMAGES, processes=3, micro_batch=100)
    assert made.recipe.batch_size == 3 * 100 * 14  # 4096 / 300 = 13.7
    assert made.recipe.lr == pytest.approx(4e-3 * 4200 / 4096)
    (warning,) = made.warnings
    assert "nearest is 4200" in warning and "0.0041 instead of 0.004" in warning


def test_an_average_over_a_part_of_the_run_has_the_half_life_of_its_end():
    recipe = replace(IN1K, batch_size=64, base_batch=64, base_lr=1e-3, epochs=10, ema_horizon=0.1)
    made = plan(recipe, 6400)  # 1000 steps: decay 1 - 1 / 101 at the end
    assert made.ema_half_life == pytest.approx(math.log(2) / math.log(101 / 100) / 100)
    assert made.warnings == ()
    assert plan(replace(recipe, ema_decay=0.0), 6400).ema_half_life is None


def test_a_run_of_minutes_has_no_steps_to_plan():
    text = str(plan(recipes.get("imagenette", ["minutes=3"]), 9469, images_per_second=100))
    assert "3 minutes" in text and "hours" not in text and "half-life" not in text


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        ({"base_batch": 256}, IMAGES, "learning rate 0.064 is 16 times that of the rule, 0.004 for 4096"),
        ({"batch_size": 512}, 300, r"512 images is larger than the training set of 300: --set batch_size=16 or less"),
        ({"epochs": 3}, 409_600, "EMA decay 0.9999 is too slow for 300 iterations: 97% of the EMA"),  # 0.9999^300
        ({"resolution": 32}, IMAGES, r"at 32 pixels the last feature map is 1×1.*resolution=64 or more"),
    ],
)
def test_what_is_known_to_fail_is_said(changes, images, message):
    with pytest.raises(AssertionError, match=message):
        warnings = plan(replace(IN1K, **changes), images, rule=IN1K).warnings
        assert not warnings, "\n".join(warnings)


@pytest.mark.parametrize(
    ("changes", "images", "stride"),
    [
        ({"batch_size": 1024}, IMAGES, 32),  # by the rule a quarter of the rate
        ({"base_lr": 8e-3}, IMAGES, 32),  # twice the rate may work
        ({"epochs": 3, "ema_decay": 0.0}, IMAGES, 32),
        ({"resolution": 64}, IMAGES, 32),
        ({"progressive": ((0.5, 48),)}, IMAGES, 32),  # as in the recipes of a few minutes
        ({"resolution": 32}, IMAGES, 16),
        ({"batch_size": 4096}, 40_960_000, 32),
    ],
)
def test_what_is_sound_is_not_warned_of(changes, images, stride):
    assert plan(replace(IN1K, **changes), images, rule=IN1K, stride=stride).warnings == ()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 1, 1), "images must be"), ((9, 0, 1), "processes must"), ((9, 1, 0), "per micro-batch must")],
)
def test_numbers_must_be_positive(numbers, message):
    with pytest.raises(ValueError, match=message):
        plan(IN1K, *numbers)


def test_the_command_line_plans_and_measures(capsys):
    plan_main(["--recipe", "in1k", "--model", "convnext_tiny", "--gpus", "8", "--micro-batch", "128"])
    assert "effective batch size 4,096 = 8 processes × 128 images × 4 gradient" in capsys.readouterr().out
    small = ["depths=(1,1,1,1)", "dims=(8,8,8,8)", "resolution=64", "batch_size=4"]
    plan_main(["--recipe", "imagenette", "--model", "convnext_atto", "--measure", "--set", *small])
    assert "images per second and process" in capsys.readouterr().out
    plan_main(["--recipe", "road", "--model", "road:convnext"])
    assert "147 iterations per epoch" in capsys.readouterr().out
    for more, message in (
        (["--images-per-second", "0"], "error: the images per second must be positive, got 0"),
        (["--gpus", "0", "--measure"], "error: the number of processes must be positive, got 0"),
        (["--images", "0"], "error: the number of images must be positive, got 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            plan_main(["--recipe", "in1k", "--model", "convnext_tiny", *more])
    with pytest.raises(SystemExit, match="error: the paper has no in1k for convnext_xlarge"):
        plan_main(["--recipe", "in1k", "--model", "convnext_xlarge"])
