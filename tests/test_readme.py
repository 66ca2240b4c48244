"""The tables of README.md and book/results/README.md follow from the recorded results; the tree is the package's."""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
import yaml

from convnext_min.book import results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "book" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORD = (RESULTS / "README.md").read_text(encoding="utf-8")
SUMMARIES = sorted((RESULTS / "imagenette").glob("*/summary.json"))
SPEEDS = sorted((RESULTS / "speed").rglob("[it]*-*.json"))  # inference and training


def runs() -> dict[tuple[str, str], dict[int, list[tuple[Path, float]]]]:
    """Return the runs for a fixed time by (recipe, processor) and minutes: the folder and the top-1 of each."""
    found = defaultdict(lambda: defaultdict(list))
    for path in SUMMARIES:
        summary, recipe = json.loads(path.read_text()), re.match(r"(\w+)-\d+min", path.parent.name)
        ours, used = "for small data", summary["recipe"]
        if used["minutes"] == 30:
            ours += ", first version" + ", smaller images" * (used["resolution"] == 96)
            ours += ", larger batches" * (used["batch_size"] == 128) + ", no mixing" * (not used["cutmix"])
            ours += ", Nesterov momentum" * (used["optimizer"] == "nmuon")
            ours += ", three more changes" * used.get("test_flip", False)
        elif used["optimizer"] == "muon":
            ours += ", first version" if used["batch_size"] == 64 else ", second version"
            ours += ", half the width" * bool(used["dims"])
        row = (recipe[1] if recipe else ours, results.processor(summary))
        found[row][used["minutes"]].append((path.parent.relative_to(RESULTS), summary["top1"]))
    return found


def speeds() -> dict[Path, tuple[str, str, str, float, str, dict]]:
    """Return network, mode, processor, images per second, fastest other and ratio to it of each benchmark."""
    found = {}
    for path in SPEEDS:
        outcome = json.loads(path.read_text())
        medians = {name: result["images_per_second"]["median"] for name, result in outcome["results"].items()}
        ours = medians.pop("convnext_min")
        best = max(medians, key=medians.get)
        network = "{model}, {resolution} px, {batch_size} images".format(**outcome)
        mode = "training" if outcome["mode"] == "train" else "inference"
        ratio = outcome["results"][best]["ratio"]
        found[path] = network, mode, results.processor(outcome), ours, best, ratio
    return found


def test_the_record_has_the_accuracy_of_every_run():
    rows = set()
    for (recipe, processor), of_row in runs().items():
        cells = [", ".join(f"[{top1:.1%}]({folder}/log.csv)" for folder, top1 in of_row[m]) for m in (3, 10, 30)]
        rows.add(f"| {recipe} | {processor} | {' | '.join(cells)} |")
    table = re.findall(r"^\|.*\(imagenette/.*\|$", RECORD, re.MULTILINE)
    assert len(table) == len(set(table)) and set(table) == rows


def test_the_readme_has_the_mean_accuracies_where_timm_ran_too():
    found = runs()
    compared = {processor for recipe, processor in found if recipe == "timm"}
    for (recipe, processor), of_row in found.items():
        if processor not in compared or recipe == "plain":
            continue
        tops = [[top1 for _, top1 in of_row[minutes]] for minutes in (3, 10, 30)]
        cells = [f"{mean(of_cell):.1%} ({len(of_cell)})" if of_cell else "" for of_cell in tops]
        assert f"| {recipe} | {processor} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("path", SPEEDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_record_has_every_benchmark(path):
    network, mode, processor, ours, best, ratio = speeds()[path]
    line = f"| {network} | {mode} | {processor} | {ours:.{1 if ours < 10 else 0}f} | {best} | "
    assert line + f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) |" in RECORD


def test_the_readme_has_the_ratios_of_the_benchmarks():
    ratios = defaultdict(dict)
    for network, mode, processor, _, _, ratio in speeds().values():
        ratios[network, processor][mode] = f"{ratio['median']:.2f}"
    for (network, processor), of_row in ratios.items():
        assert f"| {network} | {processor} | {of_row['training']} | {of_row['inference']} |" in README


def test_the_readmes_have_the_memory_of_every_implementation():
    outcome = json.loads((RESULTS / "speed" / "memory-convnext_tiny-224px-batch8.json").read_text())
    peaks = {name: f"{result['megabytes']:,}" for name, result in outcome["memory"].items()}
    row = "| convnext_tiny, 224 px, 8 images | {} | {} |"
    in_float32 = json.loads((RESULTS / "speed" / "avx2" / "train-convnext_tiny-224px-batch8.json").read_text())
    for measured in (outcome, in_float32):
        megabytes = [f"{measured['memory'][name]['megabytes']:,}" for name in peaks]
        assert row.format(results.processor(measured), " | ".join(megabytes)) in RECORD
    assert list(peaks) == ["convnext_min", "official", "timm", "torchvision"]
    sentence = (
        "Training `convnext_tiny` at 224 px with 8 images takes {convnext_min} MB of memory at its peak with "
        "`convnext_min.fast`, {official} with the official formulation, {timm} with timm and {torchvision} with "
        "torchvision."
    )
    assert sentence.format(**peaks) in " ".join(README.split())


def test_the_record_has_every_experiment_with_its_core_hours():
    rows = re.findall(r"^\| \[`([\w/]+)`\]\(([\w/]+)\) \|.*\| ([\d.]+) \|[^|]*\|$", RECORD, re.MULTILINE)
    listed = {name: hours for name, folder, hours in rows if name == folder}
    cards = {
        path.parent.relative_to(RESULTS).as_posix(): json.loads(path.read_text()) for path in RESULTS.rglob("card.json")
    }
    assert listed == {name: f"{card['cpu_hours']:.1f}" for name, card in cards.items()}


def test_the_readme_has_the_tree_of_the_package():
    tree = README.partition("## Where things are\n\n```\n")[2].partition("```")[0]
    named = set(re.findall(r"^  ([\w.]+)", tree, re.MULTILINE)) | set(re.findall(r"\w+\.py(?=[,)])", tree))
    package = {
        path.name
        for path in (ROOT / "convnext_min").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert named == package - {"__init__.py"}


def test_the_table_of_how_to_read_has_every_chapter_of_the_book():
    table = (ROOT / "book" / "how_to_read.md").read_text(encoding="utf-8").partition("| chapter | needs |")[2]
    listed = re.findall(r"</(notebooks/\w+)>", table.partition("\n\n")[0])
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    assert sorted(listed) == sorted(re.findall(r"file: (notebooks/\w+)", toc))


def test_every_chapter_has_links_to_its_page_and_to_colab():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    pages, repository = config["html"]["baseurl"], config["repository"]
    colab = repository["url"].replace("https://github.com/", "https://colab.research.google.com/github/")
    colab += f"/blob/{repository['branch']}"
    rows = re.findall(r"^\|.*\]\(notebooks/(\w+)\.ipynb\)(.*)\|$", README, re.MULTILINE)
    assert rows
    for name, rest in rows:
        assert f"({pages}notebooks/{name}.html)" in rest and f"({colab}/notebooks/{name}.ipynb)" in rest, name
