"""Evaluation: every image counts once, and what cannot be a result is an error."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY
from torch import nn

from convnext_min.data import Batches
from convnext_min.train import create_model, evaluate, evaluation
from convnext_min.train.evaluation import most_confused
from convnext_min.train.predict import predict


def test_evaluation_counts_every_image_once_and_restores_the_mode(images):
    model = create_model("convnext_atto", TINY, 10)
    few = images.subset(slice(25))
    result = evaluate(model, Batches(few, 8, 32, train=False), amp="fp32")
    assert model.training
    with torch.no_grad():
        logits = torch.cat([model.eval()(x) for x, _ in Batches(few, 25, 32, train=False).epoch()])
    assert torch.equal(result.predictions, logits.argmax(1))
    assert result.top1 == (result.predictions == few.labels).sum().item() / 25
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, few.labels).item(), rel=1e-5)


def test_an_image_and_its_mirror_image_have_one_answer_with_flip(images):
    model = create_model("convnext_atto", TINY, 10).eval()
    few = images.subset(slice(12))
    mirrored = replace(few, images=few.images.flip(-1))
    first, second = (evaluate(model, Batches(each, 8, 32, False), "fp32", flip=True) for each in (few, mirrored))
    with torch.no_grad():
        x, _ = next(iter(Batches(few, 12, 32, train=False).epoch()))
        logits = (model(x) + model(x.flip(-1))) / 2
    for result in (first, second):
        assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, few.labels).item(), rel=1e-5)
    assert first.loss != pytest.approx(evaluate(model, Batches(few, 8, 32, False), "fp32").loss, rel=1e-5)
    probabilities = predict(model, mirrored.images, 32, flip=True)
    assert torch.allclose(probabilities, logits.softmax(1), atol=1e-6)


def test_nothing_is_confused_where_all_answers_are_right():
    labels = torch.tensor([0, 1, 2])
    assert most_confused(labels, labels, ("tench", "horn", "pump")) == "none, all predictions are correct"


def test_most_confused_counts_both_directions():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    predictions = torch.tensor([0, 1, 1, 0, 1, 0, 0, 2])
    text = most_confused(predictions, labels, ("tench", "horn", "pump"))
    assert text == "tench → horn 2×, horn → tench 1×"


def test_the_time_of_an_evaluation_has_what_comes_once_in_it_once(monkeypatch):
    now = SimpleNamespace(seconds=0.0)

    def evaluate(model, batches, amp, limit, flip):
        now.seconds += 5.0 + 0.25 * limit  # processes that read images start, then a batch takes its time

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    for number in (1, 2, 40):
        assert evaluation.evaluation_seconds(None, range(number), "fp32") == pytest.approx(5.0 + 0.25 * number)
