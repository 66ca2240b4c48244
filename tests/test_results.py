"""Results are found and complete, and what recipes and pages show of them is what the files hold."""

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import nbformat
import pytest
import yaml
from helpers import run_cell

from convnext_min import recipes, weights
from convnext_min.book import result_figures, results
from convnext_min.convnext import ConvNeXt

ROOT = Path(__file__).parents[1]
SUMMARIES = sorted((ROOT / "book" / "results" / "imagenette").glob("*/summary.json"))
HELD_OUT = sorted((ROOT / "book" / "results" / "imagenette").glob("held_out/*/summary.json"))


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.parent.name)
def test_a_run_kept_to_its_time_and_saw_all_images(path):
    summary = json.loads(path.read_text())
    assert summary["images"] == 3925 and summary["seconds"] <= 60 * summary["recipe"]["minutes"]


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.parent.name)
def test_a_run_that_was_to_help_choose_saw_no_validation_images(path):
    summary = json.loads(path.read_text())
    assert "--holdout" in summary["command"] and "/train: 9,469 images" in summary["validation"]
    assert summary["images"] == 953 and summary["seconds"] <= 60 * summary["recipe"]["minutes"]


@pytest.mark.parametrize(
    "path", [path for path in SUMMARIES if path.parent.name[0].isdigit()], ids=lambda path: path.parent.name
)
def test_a_run_for_some_minutes_had_the_values_of_its_recipe(path):
    summary = json.loads(path.read_text())
    recipe = recipes.get(f"imagenette-{summary['recipe']['minutes']}min")
    small = {
        "base_lr": 1.1e-2,
        "resolution": 96,
        "eval_resolution": 96,
        "progressive": ((0.3, 48), (0.7, 64)),
    }
    large = {"resolution": 128, "eval_resolution": 128, "progressive": ((0.3, 64), (0.8, 96))}
    old = {  # minutes, batch, CutMix, side: what the first versions of two recipes had, and what was tried in the third
        (3, 64, 0.0, 96): {"base_lr": 1.6e-2, "resolution": 96, "eval_resolution": 96, "progressive": ((0.6, 64),)},
        (10, 64, 0.0, 128): {"base_lr": 1.2e-2} | large,
        (30, 128, 1.0, 96): small,
        (30, 128, 0.0, 96): small | {"mixup": 0.0, "cutmix": 0.0},
        (30, 64, 0.0, 128): {"base_lr": 1.1e-2, "mixup": 0.0, "cutmix": 0.0} | large,
        (30, 128, 0.0, 128): {"base_lr": 1.1e-2, "mixup": 0.0, "cutmix": 0.0} | large,
    }
    recorded = recipes.complete(recipes.Recipe, summary["recipe"])
    label = {run: name for name, run in result_figures.TIMED_RUNS + result_figures.TRIED_RUNS}[path.parent.name]
    changes = old.get((recipe.minutes, *(recorded[key] for key in ("batch_size", "cutmix", "resolution"))), {})
    changes |= {"dims": (20, 40, 80, 160)} if recorded["dims"] else {}
    if "three more changes" in label:
        changes |= {"progressive": ((0.2, 48), (0.4, 64), (0.8, 96)), "drop_path": 0.1}
        changes |= {"eval_resolution": 144, "test_flip": True}
    changes |= {"optimizer": "nmuon" if label == "for small data" or "Nesterov momentum" in label else "muon"}
    recipe = replace(recipe, batch_size=recorded["batch_size"], **changes)
    assert json.loads(json.dumps(asdict(recipe))) == json.loads(json.dumps(recorded))


SPEEDS = sorted((ROOT / "book" / "results" / "speed").rglob("[it]*-*.json"))  # inference and training


@pytest.mark.parametrize("path", SPEEDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_benchmark_tried_every_setting_of_every_implementation(path):
    outcome = json.loads(path.read_text())
    formats = 1 if outcome["machine"].get("capability") == "AVX2" else 2  # without instructions for bfloat16
    settings = len(outcome["results"]["timm"]["trials"])
    others = set(outcome["results"]) - {"convnext_min"}
    assert others == {"official", "timm", "torchvision"} and settings == 4 * formats


@pytest.mark.parametrize("path", SUMMARIES + HELD_OUT, ids=lambda path: path.parent.name)
def test_a_run_says_how_to_repeat_it(path):
    summary = json.loads(path.read_text())
    assert len(summary["commit"]) == 40 and summary["versions"]["torch"] and summary["machine"]["cores"]
    assert "convnext_min.train" in summary["command"]


@pytest.fixture(scope="module")
def execute():
    spec = importlib.util.spec_from_file_location("execute", ROOT / "book" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(cell):
    """Return the printed text and the tables of a cell; pictures depend on versions."""
    printed = [output.text for output in cell.outputs if output.output_type == "stream"]
    tables = [output.data.get("text/html") for output in cell.outputs if output.output_type == "execute_result"]
    return printed, tables


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if '"results"' in path.read_text()],
    ids=lambda path: path.stem,
)
def test_pages_show_what_the_files_of_results_say(path, execute):
    """Cells with the tag "results" show nothing but results: run again, they have to show the committed outputs."""
    namespace, count = {}, 0
    for cell in execute.code_cells(nbformat.read(path, 4)):
        if execute.is_of_results(cell):
            text, value = run_cell(cell.source, namespace)
            shown = [text] * bool(text), [] if value is None else [value._repr_html_()]
            assert shown == committed(cell), f"run `make results`:\n{cell.source}"
            count += 1
        else:
            exec(execute.definitions(cell.source), namespace)
    assert count > 0


def test_files_of_a_checkout_are_read_from_it():
    log, summary = results.rows("imagenette/3min-seed-0/log.csv"), results.values("imagenette/3min-seed-0/summary.json")
    assert int(log[-1]["step"]) == summary["steps"]
    with pytest.raises(FileNotFoundError):
        results.text("imagenette/no-such-run/log.csv")


def test_without_a_checkout_they_are_fetched(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "runs.csv").write_text("step,top1\n1,0.5\n")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "missing")
    monkeypatch.setattr(results, "ADDRESS", (tmp_path / "served").as_uri())
    assert results.rows("runs.csv") == [{"step": "1", "top1": "0.5"}]


def test_the_small_backbone_is_in_a_checkout_or_downloaded(tmp_path, monkeypatch):
    assert results.backbone() == results.FOLDER / results.BACKBONE
    served = tmp_path / "served" / results.BACKBONE
    weights.save_pretrained(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=2), served, ["cat", "dog"])
    (served / "summary.json").write_text("{}")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "missing")
    monkeypatch.setattr(results, "ADDRESS", (tmp_path / "served").as_uri())
    folder = results.backbone()
    assert weights.read_labels(folder) == ["cat", "dog"] and weights.load(folder).head.out_features == 2


def test_they_are_fetched_from_the_repository_of_the_book():
    config = yaml.safe_load((results.FOLDER.parents[1] / "_config.yml").read_text())["repository"]
    path = config["url"].removeprefix("https://github.com/")
    assert f"https://raw.githubusercontent.com/{path}/{config['branch']}/book/results" == results.ADDRESS
