"""The small backbone that the repository ships: size, card, labels, and the accuracy that its card states."""

import json
import os
import re

import pytest
import torch

from convnext_min import data, read_labels, weights
from convnext_min.book import results
from convnext_min.data import Batches
from convnext_min.experiments.backbone import split_classes
from convnext_min.measure import count_parameters
from convnext_min.train.evaluation import evaluate

FOLDER = results.backbone()
SUMMARY = json.loads((FOLDER / "summary.json").read_text(encoding="utf-8"))


def test_the_weights_are_small_and_in_half_precision():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 8e6
    assert {value.dtype for value in weights.read_checkpoint(path).values()} == {torch.float16}
    assert count_parameters(weights.load(FOLDER)) == SUMMARY["parameters"]


def test_the_labels_are_the_seven_classes_it_has_seen():
    assert read_labels(FOLDER) == SUMMARY["classes"] == list(data.WNIDS.values())[:7]
    assert SUMMARY["new_classes"] == list(data.WNIDS.values())[7:]


def test_the_card_and_the_record_are_complete():
    record = (results.FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{SUMMARY['top1']:.2f}% of their {SUMMARY['images']:,} validation images" in record
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{SUMMARY['top1']:.2f}% of {SUMMARY['images']:,} validation images" in card
    for fact in (SUMMARY["commit"], SUMMARY["machine"]["cpu"], " ".join(SUMMARY["command"]), *SUMMARY["new_classes"]):
        assert fact in card
    assert re.search(r"\*\*Data\.\*\* Imagenette is a subset of ImageNet", card) and "not commercial" in card


@pytest.mark.skipif(not os.environ.get("IMAGENETTE_DIR"), reason="needs the images of Imagenette: IMAGENETTE_DIR")
def test_the_weights_have_the_accuracy_of_the_card():
    recipe = SUMMARY["recipe"]
    val_set, _ = split_classes(data.imagenette("val", size=recipe["image_size"]))
    assert len(val_set) == SUMMARY["images"]
    found = evaluate(weights.load(FOLDER), Batches(val_set, 64, recipe["eval_resolution"], train=False))
    assert 100 * found.top1 == pytest.approx(SUMMARY["top1"], abs=0.3)  # bfloat16 on another processor rounds otherwise
