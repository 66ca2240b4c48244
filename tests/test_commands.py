"""The commands on the pages about ImageNet, COCO and ADE20K are commands that the programs take."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convnext_min import recipes
from convnext_min.data import check, class_map
from convnext_min.dense import recipes as dense_recipes
from convnext_min.dense import train as dense_train
from convnext_min.dense.models import create_dense_model
from convnext_min.train.__main__ import read_arguments
from convnext_min.train.plan import main as plan_main
from convnext_min.train.plan import plan
from convnext_min.weights import find

ROOT = Path(__file__).parents[1]


def commands(page: str) -> list[str]:
    text = re.sub(r"\\\n\s*", "", (ROOT / "book" / page).read_text())
    return re.findall(r"^(?:python|torchrun) .*$", text, re.MULTILINE)


COMMANDS, DENSE = commands("imagenet.md"), commands("coco_and_ade20k.md")
TRAINING = [line for line in COMMANDS if "convnext_min.train " in line and "--evaluate" not in line]
EVALUATIONS = [line for line in COMMANDS if "convnext_min.train " in line and "--evaluate" in line]
DENSE_TRAINING = [line for line in DENSE if "convnext_min.dense.train " in line]


def test_the_page_has_commands_of_every_kind():
    assert len(TRAINING) >= 7 and any("convnext_min.data.check" in line for line in COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "convnext_min.data." in line])
def test_a_command_about_the_images_is_taken(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "check", lambda *_: [])
    monkeypatch.setattr(class_map, "read_classes", lambda _: ["n01440764"])
    module, *options = shlex.split(line)[2:]
    {"check": check, "class_map": class_map}[module.rpartition(".")[2]].main(options)


@pytest.mark.parametrize("line", TRAINING)
def test_a_training_command_fits_its_recipe_and_its_processes(line):
    launcher, _, options = line.partition("convnext_min.train ")
    args = read_arguments(shlex.split(options))
    recipe = recipes.get(args.recipe, args.set, args.model)
    processes = 1
    for option in ("--nnodes", "--nproc-per-node"):
        if option in launcher:
            processes *= int(launcher.split(f"{option} ")[1].split()[0])
    made = plan(recipe, 1_281_167, processes, args.micro_batch)
    assert made.recipe == recipe and made.warnings == ()


def test_evaluations_name_released_weights_or_a_run_and_set_nothing_of_the_training():
    sources = []
    for line in EVALUATIONS:
        args = read_arguments(shlex.split(line.partition("convnext_min.train ")[2]))
        sources.append(args.evaluate)
        assert args.data and args.resolution is None and not args.set
        if not args.evaluate.endswith(".pt"):
            assert find(args.model, args.evaluate).startswith("https://dl.fbaipublicfiles.com/convnext/")
    assert sources == ["in1k", "in1k_384", "runs/tiny/checkpoint.pt"]


def test_the_plan_on_the_page_is_made(capsys):
    (line,) = [line for line in COMMANDS if "train.plan" in line]
    options = [part for part in shlex.split(line)[3:] if part != "--measure"]
    plan_main(options)
    assert "effective batch size 4,096 = " in capsys.readouterr().out


def test_the_page_about_dense_tasks_checks_the_folders_and_predicts():
    modules = [line.split(" -m ")[1].split()[0] for line in DENSE]
    assert len(DENSE_TRAINING) >= 7
    assert modules.count("convnext_min.dense.datasets") == 2 and modules.count("convnext_min.dense.predict") == 1


def test_the_recipe_on_the_page_is_shown(capsys):
    (line,) = [line for line in DENSE if "dense.recipes" in line]
    dense_recipes.main(shlex.split(line)[3:])
    assert "Swin's configuration" in capsys.readouterr().out


@pytest.mark.parametrize("line", DENSE_TRAINING)
def test_a_command_for_a_dense_task_fits_its_recipe_and_its_processes(line):
    launcher, _, options = line.partition("convnext_min.dense.train ")
    args = dense_train.read_arguments(shlex.split(options))
    if args.evaluate:
        replace(dense_recipes.RECIPES[args.task], **recipes.parse_settings(dense_recipes.DenseRecipe, args.set))
        return
    recipe = dense_recipes.get(args.task, args.head, args.backbone, args.set, args.pretrained)
    processes = int(launcher.split("--nproc-per-node ")[1].split()[0]) if "torchrun" in launcher else 1
    assert recipe.batch_size % processes == 0
    assert find(args.backbone, args.pretrained).startswith("https://dl.fbaipublicfiles.com/convnext/")
    with torch.device("meta"):
        create_dense_model(f"{args.head}:{args.backbone}", recipe, 80)


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("book/*.md")], ids=lambda path: path.name)
def test_code_and_commands_fit_the_page(page):
    fences = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for language, block in fences if language in ("", "python") for line in block.splitlines()]
    assert [line for line in lines if len(line) > 80 and "://" not in line] == []  # a fork's address may be longer
