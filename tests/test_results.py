"""Results are found, and what the README says of them is what the files say."""

import json
from pathlib import Path

import pytest
import yaml

from convnext_min import results

ROOT = Path(__file__).parents[1]
SUMMARIES = sorted((ROOT / "book" / "results" / "imagenette").glob("*/summary.json"))


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.parent.name)
def test_the_readme_has_the_accuracies_of_the_runs(path):
    summary = json.loads(path.read_text())
    line = f"| [{path.parent.name}]({path.parent.relative_to(ROOT)}/log.csv) | {summary['seconds']:.0f} s | "
    line += f"{summary['top1']:.1%} | {summary['seed']} |"
    assert line in (ROOT / "README.md").read_text()
    assert summary["images"] == 3925


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.parent.name)
def test_a_run_says_how_to_repeat_it(path):
    summary = json.loads(path.read_text())
    assert len(summary["commit"]) == 40 and summary["versions"]["torch"] and summary["machine"]["cores"]
    assert "convnext_min.train" in summary["command"]


def test_files_of_a_checkout_are_read_from_it():
    log, summary = results.rows("imagenette/3-minutes/log.csv"), results.values("imagenette/3-minutes/summary.json")
    assert int(log[-1]["step"]) == summary["steps"]
    with pytest.raises(FileNotFoundError):
        results.text("imagenette/no-such-run/log.csv")


def test_without_a_checkout_they_are_fetched(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "runs.csv").write_text("step,top1\n1,0.5\n")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "missing")
    monkeypatch.setattr(results, "ADDRESS", (tmp_path / "served").as_uri())
    assert results.rows("runs.csv") == [{"step": "1", "top1": "0.5"}]


def test_they_are_fetched_from_the_repository_of_the_book():
    config = yaml.safe_load((results.FOLDER.parents[1] / "_config.yml").read_text())["repository"]
    path = config["url"].removeprefix("https://github.com/")
    assert f"https://raw.githubusercontent.com/{path}/{config['branch']}/book/results" == results.ADDRESS
