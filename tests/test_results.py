"""What the README says of results is what the files in book/results say."""

import json
from pathlib import Path

import pytest

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
