import hashlib
import itertools
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Imagenette

from convnext_min import data
from convnext_min.data import Batches, ImageSet, image_folder, imagenette, normalize, offline_sample


REAL = os.environ.get("IMAGENETTE_DIR")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """An empty home, no IMAGENETTE_DIR and nothing remembered from other tests."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("IMAGENETTE_DIR", raising=False)
    data._downloaded.cache_clear()
    data._say.cache_clear()


def save(path: Path, color, mode: str = "RGB", size=(48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """Two classes of Imagenette, two images each, in both splits."""
    for split, wnid, name in itertools.product(("train", "val"), ("n01440764", "n03888257"), "ab"):
        save(tmp_path / "images" / split / wnid / f"{name}.JPEG", (200, 100, 50))
    return tmp_path / "images"


@pytest.fixture(scope="module")
def numbered():
    """23 images; every pixel of image i is 10 * i, so that a batch says which images it holds."""
    labels = torch.arange(23)
    images = (10 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 40, 40)
    return ImageSet(images, labels, tuple(map(str, range(23))), "numbered")


def same(these, those) -> bool:
    return len(these) == len(those) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(these, those)
    )


def test_given_path_comes_before_the_variable(root, monkeypatch, capsys):
    monkeypatch.setenv("IMAGENETTE_DIR", "/not/there")
    for split in ("train", "val"):
        images = imagenette(split, root, 32)
        assert images.images.shape == (4, 3, 32, 32) and images.images.dtype == torch.uint8
        assert images.labels.tolist() == [0, 0, 1, 1] and images.classes == ("tench", "parachute")
        assert images.source == f"images/{split}: 4 images at 32x32"
    assert capsys.readouterr().out == "Data: images from the given path\n"


def test_variable_may_name_the_folder_above(root, monkeypatch):
    (root.parent / "above").mkdir()
    root.rename(root.parent / "above" / "imagenette2-160")
    monkeypatch.setenv("IMAGENETTE_DIR", str(root.parent / "above"))
    assert len(imagenette("val", size=32)) == 4


@pytest.mark.parametrize("given", [True, False])
def test_wrong_path_names_what_is_missing(tmp_path, monkeypatch, given):
    (tmp_path / "half" / "train").mkdir(parents=True)
    monkeypatch.setenv("IMAGENETTE_DIR", str(tmp_path / "half"))
    with pytest.raises(FileNotFoundError, match=r"val/ not found in .*half; expected .*train/<class>/\*\.JPEG"):
        imagenette("train", tmp_path / "half" if given else None)
    with pytest.raises(FileNotFoundError, match="/nowhere not found in the given path"):
        imagenette("train", "/nowhere")


def test_splits_must_have_the_same_classes(root):
    save(root / "val" / "n03000684" / "a.JPEG", "red")
    with pytest.raises(FileNotFoundError, match="n03000684"):
        imagenette("train", root, 32)


@pytest.mark.parametrize("make", [imagenette, offline_sample])
def test_wrong_split(make):
    with pytest.raises(ValueError, match="'train' or 'val', got 'test'"):
        make("test")


def test_every_mode_becomes_rgb_and_broken_files_are_named(root):
    folder = root / "train" / "n01440764"
    for mode, suffix in (("L", "jpeg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png")):
        save(folder / f"z{mode}.{suffix}", (90, 90, 90), mode)
    (folder / "c_empty.jpg").touch()
    whole = (folder / "a.JPEG").read_bytes()
    (folder / "d_cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"skipped 2 of 10 files .*c_empty\.jpg, .*d_cut\.jpg"):
        images = image_folder(root / "train", 32)
    assert [path.name for path in images.skipped] == ["c_empty.jpg", "d_cut.jpg"]
    assert images.labels.tolist() == [0] * 6 + [1] * 2
    gray = images.images[2:6].float()
    assert (gray - 90).abs().max() < 6


def test_class_without_images_is_an_error(root):
    (root / "train" / "n03394916").mkdir()
    with pytest.raises(FileNotFoundError, match=r"class folder .*n03394916 holds no readable image"):
        image_folder(root / "train", 32)
    (root / "train" / "n03394916" / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 of 5"), pytest.raises(FileNotFoundError, match="n03394916"):
        image_folder(root / "train", 32)


def test_centre_is_kept(tmp_path):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "wide.png")
    assert image_folder(tmp_path, 20).images[:, :, :, 2:-2].eq(255).all()


@pytest.fixture
def archive(root, monkeypatch):
    """torchvision finds an archive of `root` at a file:// address."""
    root = root.rename(root.parent / "imagenette2-160")
    path = root.parent / "imagenette2-160.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, root.name)
    table = {"160px": (path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest())}
    monkeypatch.setattr(Imagenette, "_ARCHIVES", table)
    return path


def test_download_into_the_cache(archive, capsys):
    first = imagenette("train", size=32)
    archive.unlink()
    data._downloaded.cache_clear()  # as in a new process
    assert torch.equal(imagenette("train", size=32).images, first.images) and len(first) == 4
    assert [path.name for path in (Path.home() / ".cache" / "convnext_min").iterdir()] == ["imagenette2-160"]
    assert capsys.readouterr().out == "Data: imagenette2-160 from the cache\n"
    assert socket.getdefaulttimeout() is None


def test_damaged_download_leaves_nothing(archive):
    archive.write_bytes(b"damaged")
    with pytest.raises(RuntimeError):
        imagenette("train", size=32)
    assert not list((Path.home() / ".cache" / "convnext_min").iterdir())


def test_without_network_the_sample_and_one_line(archive, capsys):
    archive.unlink()
    for split in ("train", "val"):
        assert imagenette(split, size=8).source.startswith(f"offline sample, {split}")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no network" in out and "IMAGENETTE_DIR" in out


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor(data.MEAN).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)
    torch.testing.assert_close(normalize(images), expected)


def test_training_batches_depend_on_seed_epoch_and_number_alone():
    images = offline_sample("train", 32, 50)
    batches = Batches(images, 8, 24, train=True, seed=3)
    torch.manual_seed(0)
    first = list(batches.epoch(1))
    torch.manual_seed(1)
    assert same(first, list(Batches(images, 8, 24, train=True, seed=3).epoch(1)))
    assert same(first[4:], list(batches.epoch(1, start=4)))
    assert not same(first, list(batches.epoch(2)))
    assert not same(first, list(Batches(images, 8, 24, train=True, seed=4).epoch(1)))


def test_epoch_is_a_permutation_without_the_short_batch(numbered):
    batches = Batches(numbered, 5, 16, train=True)
    epochs = [torch.cat([y for _, y in batches.epoch(i)]).tolist() for i in (0, 1)]
    assert len(batches) == 4 and len(set(epochs[0])) == len(set(epochs[1])) == 20 and epochs[0] != epochs[1]
    for x, y in batches.epoch(0):
        assert torch.equal(x, normalize((10 * y).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)))
    assert [len(y) for _, y in Batches(numbered, 64, 16, train=True).epoch()] == [23]


@pytest.mark.parametrize("resolution", [40, 24, 56])
def test_evaluation_is_complete_and_in_order(numbered, resolution):
    batches = Batches(numbered, 5, resolution, train=False)
    xs, ys = zip(*batches.epoch())
    assert len(batches) == len(ys) == 5 and torch.equal(torch.cat(ys), numbered.labels)
    values = (10 * numbered.labels).to(torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(torch.cat(xs), normalize(values.expand(-1, 3, resolution, resolution)))


def test_resolution_may_change_between_epochs(numbered):
    batches = Batches(numbered, 5, 16, train=True)
    batches.resolution = 20
    x, y = next(batches.epoch())
    assert x.shape == (5, 3, 20, 20) and x.dtype == torch.float32 and y.dtype == torch.int64


def test_crops_have_the_area_and_aspect_asked_for():
    tops, lefts, heights, widths = data.random_crops(20_000, 1000, (0.2, 1.0), np.random.default_rng(0))
    area, ratio = heights * widths / 1e6, np.log(widths / heights)
    assert 0.198 < area.min() < 0.21 and 0.99 < area.max() <= 1 and abs(area.mean() - 0.6) < 0.01
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.01 and abs(ratio.mean()) < 0.01
    small = ratio[area < 0.5]  # every aspect ratio fits: uniform
    assert abs(small.std() - np.log(4 / 3) / np.sqrt(3)) < 0.005
    assert min(tops.min(), lefts.min()) == 0 and (tops + heights).max() == (lefts + widths).max() == 1000


def test_half_of_the_images_are_flipped():
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(1000, 3, 32, 32)
    images = ImageSet(ramp, torch.zeros(1000, dtype=torch.int64), ("ramp",), "ramp")
    x, _ = next(Batches(images, 1000, 32, train=True, scale=(1.0, 1.0)).epoch())
    flipped = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert 440 < flipped.sum() < 560
    assert torch.equal(x[~flipped], normalize(ramp[~flipped])) and torch.equal(
        x[flipped].flip(-1), normalize(ramp[flipped])
    )


def test_shrinking_is_antialiased():
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8).expand(1, 3, 64, 64)
    images = ImageSet(board, torch.zeros(1, dtype=torch.int64), ("board",), "board")
    for train in (True, False):
        x, _ = next(Batches(images, 1, 16, train, scale=(1.0, 1.0)).epoch())
        assert (x - normalize(torch.full_like(board, 128))).abs().max() < 0.3


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"resolution": 0}, {"scale": (0.5, 1.1)}, {"scale": (0.0, 1.0)}])
def test_wrong_batches(numbered, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).replace("(", r"\(").replace(")", r"\)")):
        Batches(numbered, **{"batch_size": 4, "resolution": 16, "train": True} | wrong)


def test_subset_says_so(numbered):
    few = numbered.subset([3, 1])
    assert few.labels.tolist() == [3, 1] and few.classes == numbered.classes and few.source == "numbered, 2 of them"


def test_sample_is_the_same_every_time_and_no_image_twice():
    train, val = offline_sample("train", 32, 40), offline_sample("val", 32, 40)
    assert torch.equal(train.images[:20], offline_sample("train", 32, 20).images)
    assert len({image.numpy().tobytes() for image in torch.cat([train.images, val.images])}) == 80
    assert torch.bincount(train.labels).tolist() == [4] * 10 and len(train.classes) == 10


def test_sample_is_not_for_linear_classifiers():
    (x, y), (held_out, truth) = ((normalize(s.images), s.labels) for s in map(offline_sample, ("train", "val")))
    x, held_out = (torch.nn.functional.avg_pool2d(images, 4).flatten(1) for images in (x, held_out))
    targets = torch.nn.functional.one_hot(y, 10).float() - 0.1
    accuracies = []
    for ridge in (1e1, 1e3, 1e5):
        weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ targets)
        accuracies.append(((held_out @ weights).argmax(1) == truth).float().mean().item())
    assert 0.1 < max(accuracies) < 0.6


@pytest.mark.skipif(not REAL, reason="needs the real images")
def test_imagenette_is_whole():
    root = data._checked(Path(REAL), "IMAGENETTE_DIR")
    for split, number in (("train", 9469), ("val", 3925)):
        folders, files, _ = data.list_images(root / split)
        assert len(files) == number and [folder.name for folder in folders] == sorted(data.WNIDS)
