"""What the chapters write out themselves computes what the package does, and their exercises can be solved."""

import ast
import inspect
import re
from pathlib import Path

import nbformat
import pytest
import torch
import torchvision
from helpers import equal, run_cell
from timm.models import swin_transformer
from torch import nn

from convnext_min import blocks, build, convnext, convnext_atto, recipes
from convnext_min.book import dense_exercises, exercises
from convnext_min.book.exercises import same
from convnext_min.data import Batches, synthetic_images
from convnext_min.dense.features import ConvNeXtFeatures, with_fpn
from convnext_min.experiments import few_images
from convnext_min.isotropic import ConvNeXtIsotropic
from convnext_min.recipes import Recipe
from convnext_min.train import RunConfig, create_model, train

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
GLOBS = ("0[1-9]_*.ipynb", "attention_and_swin.ipynb", "1[0-5]_*.ipynb")
CHAPTERS = {path.stem: path for glob in GLOBS for path in sorted(NOTEBOOKS.glob(glob))}


def cells(chapter: str, tag: str | None = None) -> list[str]:
    """Sources of the code cells with `tag`, or of those that are no part of an exercise, without magics."""
    found = [cell for cell in nbformat.read(CHAPTERS[chapter], 4).cells if cell.cell_type == "code"]
    tags = [set(cell.metadata.get("tags", ())) & {"exercise", "solution"} for cell in found]
    sources = [cell.source for cell, own in zip(found, tags) if own == ({tag} if tag else set())]
    return [re.sub(r"(?m)^\s*%[a-z].*$", "", source) for source in sources]


def lifted(chapter: str) -> dict:
    """The chapter's imports, functions, classes and constants in capitals, without anything that it runs."""

    def kept(node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            return all(isinstance(target, ast.Name) and target.id.isupper() for target in node.targets)
        return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))

    trees = [ast.parse(source) for source in cells(chapter)]
    body = [node for tree in trees for node in tree.body if kept(node)]
    namespace = {"__name__": chapter}
    torch.manual_seed(0)
    exec(compile(ast.Module(body, []), CHAPTERS[chapter].name, "exec"), namespace)
    return namespace


@pytest.fixture(scope="module", params=CHAPTERS)
def chapter(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def namespace(chapter) -> dict:
    return lifted(chapter)


# What a chapter writes, in its own names; what the package has, in the package's; the shape of the input.
WRITTEN = [
    ("01_resnet50_and_the_recipe", "Bottleneck(32, 8)", "blocks.Bottleneck(32, 8)", (2, 32, 8, 8)),
    ("01_resnet50_and_the_recipe", "Bottleneck(16, 8, 2)", "blocks.Bottleneck(16, 8, 2)", (2, 16, 8, 8)),
    ("01_resnet50_and_the_recipe", "ResNet()", "torchvision.models.resnet50()", (2, 3, 32, 32)),
    ("01_resnet50_and_the_recipe", "DropPath(0.3)", "convnext.DropPath(0.3)", (32, 3, 4, 4)),
    ("02_macro_design", "make_stages((3, 3, 9, 3))[1]", "build('stage_ratio').stages[1]", (2, 256, 8, 8)),
    ("02_macro_design", "patchify_stem(3, 64)", "build('patchify').stem", (2, 3, 16, 16)),
    ("03_resnextify", "DepthwiseBottleneck(32, 8)", "blocks.DepthwiseBottleneck(32, 8)", (2, 32, 8, 8)),
    ("03_resnextify", "DepthwiseBottleneck(16, 8, 2)", "blocks.DepthwiseBottleneck(16, 8, 2)", (2, 16, 8, 8)),
    ("04_inverted_bottleneck", "InvertedBottleneck(8, 8)", "blocks.InvertedBottleneck(8, 8)", (2, 8, 8, 8)),
    ("04_inverted_bottleneck", "InvertedBottleneck(8, 16, 2)", "blocks.InvertedBottleneck(8, 16, 2)", (2, 8, 8, 8)),
    ("05_large_kernels", "MovedUpBlock(8, 16, 2)", "blocks.MovedUpBlock(8, 16, 2)", (2, 8, 14, 14)),
    (
        "05_large_kernels",
        "MovedUpBlock(8, 8, kernel_size=11)",
        "blocks.MovedUpBlock(8, 8, kernel_size=11)",
        (2, 8, 14, 14),
    ),
    ("06_micro_design", "GELU()", "nn.GELU()", (2, 8, 7, 7)),
    ("06_micro_design", "MyFewerActivationsBlock(8, 16, 2)", "blocks.FewerActivationsBlock(8, 16, 2)", (2, 8, 14, 14)),
    ("06_micro_design", "MyFewerNormsBlock(8, 16, 2)", "blocks.FewerNormsBlock(8, 16, 2)", (2, 8, 14, 14)),
    ("06_micro_design", "LayerNorm2d(8)", "convnext.LayerNorm(8)", (2, 8, 7, 7)),
    ("06_micro_design", "MyConvNeXtBlock(8)", "blocks.ConvNeXtBlock(8, 8)", (2, 8, 14, 14)),
    ("06_micro_design", "MyConvNeXt()", "build('convnext')", (2, 3, 32, 32)),
    ("07_convnext", "LayerNorm(8)", "convnext.LayerNorm(8)", (2, 8, 7, 7)),
    ("07_convnext", "DropPath(0.3)", "convnext.DropPath(0.3)", (32, 3, 4, 4)),
    ("07_convnext", "Block(8, 0.3)", "convnext.Block(8, 0.3)", (4, 8, 14, 14)),
    ("07_convnext", "ConvNeXt()", "convnext.ConvNeXt()", (2, 3, 32, 32)),
    ("13_isotropic", "Isotropic(2, 8, 4, 5)", "ConvNeXtIsotropic(3, 5, 2, 8, 4)", (2, 3, 16, 16)),
    (
        "14_detection",
        "nn.Sequential(Levels(convnext_atto()), Pyramid([40, 80, 160, 320], 16))",
        "with_fpn(ConvNeXtFeatures(convnext_atto()), 16)",
        (1, 3, 64, 64),
    ),
]
PACKAGE = {
    "ConvNeXtFeatures": ConvNeXtFeatures,
    "ConvNeXtIsotropic": ConvNeXtIsotropic,
    "convnext_atto": convnext_atto,
    "with_fpn": with_fpn,
    "blocks": blocks,
    "build": build,
    "convnext": convnext,
    "nn": nn,
    "torchvision": torchvision,
}


@pytest.mark.parametrize("chapter, expression, reference, shape", WRITTEN, ids=[f"{w[0][:2]}-{w[1]}" for w in WRITTEN])
def test_what_a_chapter_writes_is_what_the_package_has(chapter, expression, reference, shape):
    same(eval(expression, lifted(chapter)), eval(reference, dict(PACKAGE)), shape)


@pytest.mark.parametrize("shift", [0, 3])
def test_the_swin_block_is_timms(shift):
    mine = lifted("attention_and_swin")["SwinBlock"](16, heads=2, shift=shift)
    theirs = swin_transformer.SwinTransformerBlock(16, (14, 14), num_heads=2, shift_size=shift)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        mine.load_state_dict(dict(zip(mine.state_dict(), theirs.state_dict().values())))
        x = torch.randn(2, 16, 14, 14)
        right = theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(mine(x), right, rtol=0, atol=1e-5)


def test_label_smoothing_is_pytorchs():
    smoothed = lifted("01_resnet50_and_the_recipe")["smoothed_cross_entropy"]
    logits, y = torch.randn(6, 10), torch.tensor([0, 3, 3, 9, 1, 0])
    for epsilon in (0.0, 0.1, 0.5):
        right = torch.nn.functional.cross_entropy(logits, y, label_smoothing=epsilon)
        torch.testing.assert_close(smoothed(logits, y, epsilon), right)


def test_cutmix_labels_are_the_shares_of_the_pixels():
    cutmix = lifted("01_resnet50_and_the_recipe")["cutmix"]
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 20), torch.eye(4)
    for seed in range(20):
        mixed, shares = cutmix(images, labels, 0.7, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        for i in range(4):
            assert (mixed[i] == i).float().mean().item() == pytest.approx(shares[i, i].item(), abs=1e-6)


def test_exercises_and_solutions_come_in_pairs(chapter):
    assert 2 <= len(cells(chapter, "exercise")) == len(cells(chapter, "solution")) <= 4


def test_checks_reject_the_starting_stubs(chapter, namespace):
    def insist(check, *answers):
        check(*answers)

    for stub in cells(chapter, "exercise"):
        with pytest.raises(AssertionError):
            exec(stub, namespace | {"attempt": insist})
            pytest.fail(f"accepted:\n{stub}")  # not an AssertionError


def test_checks_accept_the_solutions(chapter, namespace, capsys):
    for solution in cells(chapter, "solution"):
        exec(solution, dict(namespace))
        assert "correct: " in capsys.readouterr().out, solution


def test_every_check_belongs_to_an_exercise():
    names = (
        name for module in (exercises, dense_exercises) for name, _ in inspect.getmembers(module, inspect.isfunction)
    )
    checks = {name for name in names if name.startswith("check_")}
    stubs = "\n".join(stub for chapter in CHAPTERS for stub in cells(chapter, "exercise"))
    assert [name for name in sorted(checks) if name not in stubs] == []


def test_the_solution_of_the_schedule_has_the_papers_values_by_default(capsys):
    namespace = lifted("01_resnet50_and_the_recipe")
    exec(cells("01_resnet50_and_the_recipe", "solution")[2], namespace)
    recipe = Recipe()
    assert namespace["learning_rate"](20) == recipe.lr == 4e-3
    assert namespace["learning_rate"](300) == pytest.approx(recipe.min_lr)


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_the_training_loop_of_chapter_8_trains_as_train_does(amp):
    chapter = "08_training_on_imagenette"
    namespace = lifted(chapter)
    (source,) = [cell.source for cell in nbformat.read(CHAPTERS[chapter], 4).cells if cell.get("id") == "08-loop"]
    run_cell(source, namespace)
    settings = ["epochs=3", "batch_size=8", "progressive=((0.5, 32),)", "resolution=48", "eval_resolution=48"]
    settings += ["depths=(1, 1, 1, 1)", "dims=(8, 8, 16, 16)", "layer_scale_init=0.2", f"amp={amp}"]
    recipe = recipes.get("imagenette", settings)
    train_set, val_set = synthetic_images("train", 48, 40), synthetic_images("val", 48, 20)
    torch.manual_seed(0)
    model = create_model("convnext_atto", recipe, num_classes=10)
    batches = Batches(train_set, 8, 48, True, 0, recipe.crop_scale)
    ema, top1 = namespace["fit"](model, recipe, batches, Batches(val_set, 20, 48, False))
    trained = []
    config = RunConfig(device="cpu", accelerate=False)
    history = train(
        "convnext_atto", recipe, train_set, val_set, config=config, after_step=lambda trainer: trained.append(trainer)
    )
    assert equal(model.state_dict(), trained[-1].model.state_dict())
    assert equal(ema.state_dict(), history.model.state_dict())
    assert not equal(model.state_dict(), ema.state_dict())
    assert amp == "bf16" or top1 == pytest.approx(history.top1)  # `train` evaluates in bfloat16, too


def test_the_range_test_takes_one_step_at_each_rate():
    range_test = lifted("08_training_on_imagenette")["range_test"]
    batches = Batches(synthetic_images("train", 32, 20), 10, 32, train=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    before = model[1].weight.detach().clone()
    assert len(range_test(model, batches, [1e-3])) == 1
    moved = (model[1].weight - before).abs().median().item()
    assert moved == pytest.approx(1e-3, rel=0.1)  # Adam's first step has the size of the rate
    assert len(range_test(model, batches, [0.0] * 5)) == 5  # more steps than an epoch has


def test_a_running_average_begins_with_the_first_value_and_follows_the_others():
    smoothed = lifted("08_training_on_imagenette")["smoothed"]
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([0.0] * 50 + [1.0] * 50)[-1] == pytest.approx(1.0, abs=0.01)


def test_what_a_block_adds_is_proportional_to_its_layer_scale():
    additions = lifted("08_training_on_imagenette")["additions"]
    images, model = torch.randn(2, 3, 64, 64), convnext.convnext_atto(num_classes=10, layer_scale_init_value=0.1)
    small = additions(model, images)[0]
    model.stages[0][0].gamma.data.mul_(2)
    assert additions(model, images)[0] == pytest.approx(2 * small, rel=1e-3)


def test_pictures_are_those_with_the_numbers_and_only_of_the_images_that_were_numbered():
    namespace = lifted("08_training_on_imagenette")
    sample = synthetic_images("val", 32, 20)
    namespace["imagenette"] = lambda split: sample
    fig = namespace["pictures"]([3, 17], sample.labels.numpy())
    assert [ax.get_title() for ax in fig.axes[:2]] == [f"{i}\n{sample.classes[sample.labels[i]]}" for i in (3, 17)]
    assert (fig.axes[1].images[0].get_array() == sample.images[17].permute(1, 2, 0).numpy()).all()
    with pytest.raises(ValueError, match="not to synthetic images"):
        namespace["pictures"]([3], sample.labels.numpy()[:-1])


def test_the_linear_probe_of_the_chapter_is_that_of_the_experiment(images):
    namespace = lifted("12_pretrained_and_fine_tuning")
    model = convnext.convnext_atto(num_classes=7)
    x = namespace["features"](model, images)
    torch.testing.assert_close(few_images.features(model.eval(), images), x)
    ours = few_images.linear_probe(x, images.labels, 10, 0.01)
    theirs = namespace["linear_probe"](x, images.labels, 10, 0.01)
    torch.testing.assert_close(theirs.weight, ours.weight)
