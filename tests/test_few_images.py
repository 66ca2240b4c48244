"""The comparison on few images: draws, the linear probe, and tables that are made once, from choice to result."""

import csv
from dataclasses import replace

import pytest
import torch
from helpers import TINY

from convnext_min import data, weights
from convnext_min.experiments import few_images
from convnext_min.experiments.few_images import best_values, draw, linear_probe, recipe_for
from convnext_min.train import create_model


def test_a_draw_is_balanced_and_contains_smaller_ones(images):
    few, more, other = draw(images, 1, 0), draw(images, 3, 0), draw(images, 3, 1)
    assert more.labels.bincount().tolist() == [3] * 10 and few.labels.tolist() == list(range(10))
    kept = {image.numpy().tobytes() for image in more.images}
    assert {image.numpy().tobytes() for image in few.images} < kept
    assert {image.numpy().tobytes() for image in other.images} != kept


@pytest.mark.parametrize("images, batch, epochs", [(15, 15, 120), (60, 32, 120), (300, 32, 14)])
def test_a_run_has_its_iterations_for_any_number_of_images(images, batch, epochs):
    recipe = recipe_for("fine-tuning", images, 3e-4)
    assert (recipe.batch_size, recipe.epochs, recipe.lr) == (batch, epochs, 3e-4)


def test_the_linear_probe_is_at_the_minimum_of_its_loss():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    head = linear_probe(x, y, 3, l2=0.1)
    loss = torch.nn.functional.cross_entropy(head(x), y) + 0.05 * head.weight.square().sum()
    slopes = torch.autograd.grad(loss, head.parameters())
    assert max(slope.abs().max() for slope in slopes) < 1e-3
    assert linear_probe(x, y, 3, l2=10.0).weight.abs().max() < head.weight.abs().max()


def test_the_best_value_has_the_highest_accuracy_of_its_method():
    rows = [("probe", "0.1", "50.0"), ("probe", "0.2", "60.0"), ("probe", "0.3", "9.0"), ("other", "0.1", "70.0")]
    assert best_values([dict(zip(("method", "value", "top1"), row)) for row in rows]) == {"probe": 0.2, "other": 0.1}


def test_values_are_chosen_on_held_out_images_and_results_are_made_once(tmp_path, monkeypatch):
    drawn = {split: data.synthetic_images(split, 32, number) for split, number in (("train", 200), ("val", 30))}
    monkeypatch.setattr(data, "imagenette", lambda split, root: drawn[split])
    sizes = {name: getattr(TINY, name) for name in ("depths", "dims", "layer_scale_init", "resolution", "amp")}
    methods = {
        name: method._replace(values=method.values[:2], recipe=method.recipe and replace(method.recipe, **sizes))
        for name, method in few_images.METHODS.items()
    }
    for name, value in {
        "METHODS": methods,
        "COUNTS": (2, 4),
        "CHOSEN_AT": 2,
        "ITERATIONS": 2,
        "BATCH": 4,
        "PIXELS": 32,
    }.items():
        monkeypatch.setattr(few_images, name, value)
    backbone = weights.save_pretrained(create_model("convnext_atto", TINY, 7), tmp_path / "backbone")
    options = ["--backbone", str(backbone), "--output", str(tmp_path), "--seeds", "2"]
    few_images.main(options)

    def rows(name):
        with open(tmp_path / name / "runs.csv", newline="") as file:
            return list(csv.DictReader(file))

    tried, made = rows("few_images_lr"), rows("few_images")
    assert {row["images"] for row in tried} == {"6"} and {row["images"] for row in made} == {"9"}
    assert len(tried) == 4 * 2
    best = best_values(tried)
    assert {(row["trial"], row["seed"]) for row in made} == {
        (f"{method}, {count}", str(seed)) for method in methods for count in (2, 4) for seed in range(2)
    }
    assert all(float(row["value"]) == best[row["method"]] for row in made)
    monkeypatch.setattr(few_images, "measure", None)  # would be called for a run that is not there
    few_images.main(options)
    assert rows("few_images") == made
