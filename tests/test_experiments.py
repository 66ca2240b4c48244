import contextlib
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from convnext_min import data, recipes
from convnext_min.dense import recipes as dense_recipes
from convnext_min.dense.train import main as dense_main
from convnext_min.experiments import run, trials
from convnext_min.experiments.run import Result
from convnext_min.experiments.trials import DenseTrial, Trial
from convnext_min.train.__main__ import main

TINY = ("epochs=1", "batch_size=4", "base_batch=4", "image_size=32", "resolution=32", "progressive=()")
TINY += ("eval_resolution=32", "depths=(1,1,1,1)", "dims=(8,8,8,8)", "evaluate_every=0")


@pytest.fixture
def root(tmp_path):
    """Drawn images as a folder of files."""
    for split, number in (("train", 40), ("val", 20)):
        sample = data.synthetic_images(split, 32, number)
        for i, (image, label) in enumerate(zip(sample.images, sample.labels.tolist())):
            path = tmp_path / "data" / split / sample.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "data"


@pytest.fixture
def here(monkeypatch):
    """Runs are made in this process, which has imported everything; those of the test of a failed run are real ones."""

    def start(command, stdout, stderr, env):
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            main(command[3:])  # after python -m convnext_min.train
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=start, STDOUT=subprocess.STDOUT))


@pytest.fixture
def experiment(monkeypatch):
    made = [
        Trial("a", "convnext_atto", "imagenette", TINY, ("--holdout",)),
        Trial("b / c", "convnext_atto", "imagenette", (*TINY, "stem=overlapping"), ("--holdout",)),
    ]
    monkeypatch.setitem(trials.EXPERIMENTS, "made", made)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_made_once_and_each_row_repeats_its_run(experiment, here, root, tmp_path, monkeypatch):
    output = tmp_path / "results"
    monkeypatch.setattr(sys, "orig_argv", ["python", "first"])
    run.run("made", output, seeds=1, data=str(root))
    first = rows(output / "made" / "runs.csv")
    assert [(row["trial"], row["seed"], row["images"]) for row in first] == [("a", "0", "10"), ("b / c", "0", "10")]

    main([*shlex.split(first[1]["options"]), "--data", str(root), "--output", str(tmp_path / "again")])
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert round(100 * summary["top1"], 3) == float(first[1]["top1"])
    assert summary["recipe"] == json.loads(first[1]["recipe"])

    made, labels = [], run.read_arrays(output / "made" / "predictions.npz")["labels"]

    def note(trial, seed, *_):
        made.append((trial.name, seed))
        return Result(first[0] | {"trial": trial.name, "seed": seed}, labels, labels, [])

    monkeypatch.setattr(run, "run_trial", note)
    monkeypatch.setattr(sys, "orig_argv", ["python", "second"])
    run.run("made", output, seeds=2, data=str(root))
    assert made == [("a", 1), ("b / c", 1)]  # those of seed 0 were not made again
    card = json.loads((output / "made" / "card.json").read_text())
    assert card["runs"] == 4 and card["cpus"] == [first[0]["cpu"]]
    assert card["commands"] == [["python", "first"], ["python", "second"]]


def test_answers_are_kept_and_give_the_accuracy_of_their_row(experiment, here, root, tmp_path, monkeypatch):
    monkeypatch.setitem(trials.EXPERIMENTS, "made", trials.EXPERIMENTS["made"][:1])
    (row,) = run.run("made", tmp_path, seeds=1, data=str(root))
    answers = run.read_arrays(tmp_path / "made" / "predictions.npz")
    assert answers["a/0"].shape == (10,)
    assert 100 * (answers["a/0"] == answers["labels"]).mean() == pytest.approx(row["top1"], abs=1e-3)
    (point,) = rows(tmp_path / "made" / "curves.csv")  # of the one epoch
    assert (point["trial"], point["seed"], int(point["step"])) == ("a", "0", row["steps"])


def test_some_trials_alone(experiment, root, tmp_path, monkeypatch):
    made = []
    row = {"trial": "b / c", "top1": "1", "cpu_seconds": "1", "parameters": "1", "seed": "0", "commit": "", "cpu": ""}
    zeros = np.zeros(3)
    monkeypatch.setattr(run, "run_trial", lambda trial, *_: made.append(trial.name) or Result(row, zeros, zeros, [row]))
    run.run("made", tmp_path, seeds=1, data=str(root), trials=["b / c"])
    assert made == ["b / c"]
    with pytest.raises(ValueError, match="made has no trial 'c'; valid: a, b / c"):
        run.run("made", tmp_path, seeds=1, trials=["c"])
    with pytest.raises(ValueError, match="seeds and workers must be positive, got 1 and 0"):
        run.run("made", tmp_path, seeds=1, workers=0)


def test_a_run_evaluated_on_other_images_is_refused_and_the_madebefore_stay(experiment, tmp_path, monkeypatch):
    row = {"top1": "1", "cpu_seconds": "1", "parameters": "1", "commit": "", "cpu": "", "options": ""}

    def evaluated(trial, seed, *_):
        labels = np.arange(20 if seed == 0 else 10)
        made = row | {"trial": trial.name, "seed": str(seed)}
        return Result(made, labels, labels, [{"trial": trial.name}])

    monkeypatch.setattr(run, "run_trial", evaluated)
    run.run("made", tmp_path, seeds=1)
    with pytest.raises(
        RuntimeError, match=r"a, seed 1, was evaluated on other images than .*made: take another --output"
    ):
        run.run("made", tmp_path, seeds=2)
    assert [made["seed"] for made in rows(tmp_path / "made" / "runs.csv")] == ["0", "0"]
    assert len(run.read_arrays(tmp_path / "made" / "predictions.npz")["labels"]) == 20


def test_a_failed_run_is_named_and_the_others_are_kept(experiment, root, tmp_path, monkeypatch):
    wrong = Trial("wrong", "convnext_atto", "imagenette", ("depths=(1,1)",))
    monkeypatch.setitem(trials.EXPERIMENTS, "made", [wrong, *trials.EXPERIMENTS["made"][:1]])
    with pytest.raises(RuntimeError, match=r"wrong, seed 0, stopped with code 1; see .*output\.txt"):
        run.run("made", tmp_path, seeds=1, data=str(root))
    assert [row["trial"] for row in rows(tmp_path / "made" / "runs.csv")] == ["a"]
    assert "depths takes" in (tmp_path / "made" / "work" / "wrong-0" / "output.txt").read_text()


def test_summary_is_mean_and_standard_deviation():
    made = [
        {"trial": trial, "top1": top1, "cpu_seconds": "10", "parameters": "7"}
        for trial, top1 in (("a", "50.0"), ("a", "53.0"), ("a", "51.0"), ("b", "20.0"))
    ]
    a, b = run.summarize(made)
    assert (a["top1"], a["std"], a["seeds"]) == (round(mean((50, 53, 51)), 2), round(stdev((50, 53, 51)), 2), 3)
    assert (b["top1"], b["std"], b["seeds"]) == (20.0, "", 1)


RUNS = sorted((Path(__file__).parents[1] / "book" / "results").rglob("runs.csv"))


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.parent.name)
def test_committed_summaries_follow_from_the_committed_runs(folder):
    expected = run.summarize(rows(folder))
    assert rows(folder.parent / "summary.csv") == [{k: str(v) for k, v in row.items()} for row in expected]


def test_every_trial_has_a_name_of_its_own_and_a_valid_recipe():
    for listed in trials.EXPERIMENTS.values():
        assert len({trial.name for trial in listed}) == len(listed)
        for trial in listed:
            if isinstance(trial, DenseTrial):
                dense_recipes.get(trial.task, trial.head, trial.backbone, trial.settings)
            else:
                recipes.get(trial.recipe, trial.settings)


@pytest.mark.parametrize("head, metric", [("mask_rcnn", "mask_ap"), ("fcn", "miou")])
def test_runs_of_detectors_and_segmentation_networks_have_rows_alike(head, metric, tmp_path, monkeypatch):
    def start(command, stdout, stderr, env):
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            dense_main(command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=start, STDOUT=subprocess.STDOUT))
    settings = (
        "epochs=1",
        "depths=(1,1,1,1)",
        "dims=(8,8,8,8)",
        "channels=16",
        "hidden=16",
        "rois=16",
        "batch_size=32",
    )
    monkeypatch.setitem(trials.EXPERIMENTS, "made", [DenseTrial("a", "shapes", head, "convnext_atto", settings)])
    made = run.run("made", tmp_path, seeds=2)
    assert [row["seed"] for row in made] == [0, 1] and all(0 <= row[metric] <= 100 for row in made)
    (summary,) = rows(tmp_path / "made" / "summary.csv")
    assert float(summary[metric]) == pytest.approx(mean(row[metric] for row in made), abs=0.006)
    assert len(rows(tmp_path / "made" / "curves.csv")) == 2 and made[0]["images"] == 16
    assert not (tmp_path / "made" / "predictions.npz").exists()
