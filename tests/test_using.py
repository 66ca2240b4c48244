"""Every block of Python on the page "Using a ConvNeXt" runs, with other weights in place of the released ones."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_convnext import randomize

from convnext_min import convnext, weights
from convnext_min.convnext import ConvNeXt
from convnext_min.data import WNIDS

PAGE = (Path(__file__).parents[1] / "book" / "using.md").read_text(encoding="utf-8")
SEEN = list(WNIDS.values())[:7]  # classes of the small backbone
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder with files of the official release's names."""
    folder = tmp_path_factory.mktemp("release")
    for tag, classes in (("in22k_in1k", 1000), ("in22k", 21841)):
        with torch.device("meta"):
            shapes = convnext.convnext_tiny(num_classes=classes).state_dict()
        state = {key: torch.full(value.shape, 0.01) for key, value in shapes.items()}
        torch.save({"model": state}, folder / weights.PRETRAINED["convnext_tiny"][tag])
    return folder


@pytest.mark.filterwarnings("ignore")  # of the exporter and of transformers, about themselves
@pytest.mark.parametrize("block", BLOCKS, ids=[re.sub(r"\W+", " ", block)[-40:] for block in BLOCKS])
def test_a_block_of_the_page_runs(block, release, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "OFFICIAL_URL", f"{release.as_uri()}/")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save("dog.jpg")
    small = randomize(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=2))
    save_file(small.state_dict(), "model.safetensors")
    images = torch.randn(2, 3, 64, 96)
    loader = [(images, torch.tensor([0, 1]))]
    names = {"images": images, "loader": loader}
    exec(compile(block, "book/using.md", "exec"), names)
    check(names, small, images)


def check(names, small, images):
    """Check what a block of the page has computed, by the names it used."""
    if "probabilities" in names:
        assert names["probabilities"].sum().item() == pytest.approx(1, abs=1e-4)
    if "answers" in names:
        assert len(names["answers"]) == 2 and set(names["answers"]) <= set(SEEN)
    if "features" in names:
        assert names["features"].shape == (2, 768)
    if "maps" in names:
        assert [level.shape[1] for level in names["maps"]] == [96, 192, 384, 768]
    if "optimizer" in names:
        assert names["model"].head.weight.shape == (2, 768)
    if "logits" in names:
        assert names["logits"].shape == (2, 10) and names["logits"].dtype == torch.bfloat16
    if "size" in names:
        assert Path("model.onnx").is_file()
    if "save_pretrained" in names:
        with torch.inference_mode():
            expected, got = small(images), names["theirs"].eval()(images).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(names["ours"].eval()(images), expected)


def test_the_page_shows_the_uses_it_names():
    assert len(BLOCKS) == 10
    used = "\n".join(BLOCKS)
    for name in ("convnext_tiny", "backbone", "load", "convert", "save_pretrained", "convnext_min.timm"):
        assert re.search(rf"\b{re.escape(name)}\b", used), name


def test_the_page_lists_the_released_weights():
    rows = dict(re.findall(r"^\| `(convnext_\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    listed = [(model, tag) for model, tags in rows.items() for tag in re.findall(r"`(\w+)`", tags)]
    assert listed == weights.list_pretrained()
