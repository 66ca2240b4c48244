"""Where images come from, what happens to damaged ones, and that batches are what they claim to be."""

import functools
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Imagenette

from convnext_min import data
from convnext_min.data import Batches, image_folder, imagenette, offline_sample, random_crops


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No variable, an empty home, nothing said or looked up before."""
    monkeypatch.delenv("IMAGENETTE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data._downloaded.cache_clear()
    data._say.cache_clear()


def write(path, color, mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    for split, number in (("train", 3), ("val", 2)):
        for wnid, color in (("n01440764", "red"), ("n02102040", "blue")):
            for i in range(number):
                write(tmp_path / "data" / split / wnid / f"{i}.JPEG", color)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def images():
    return offline_sample("train", 32, 60)


def test_a_given_folder(root, capsys):
    train, val = imagenette("train", root, 32), imagenette("val", root, 32)
    assert (len(train), len(val)) == (6, 4) and train.images.shape == (6, 3, 32, 32)
    assert train.classes == ("tench", "English springer") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    red, blue = train.images[0].float().mean((1, 2)), train.images[-1].float().mean((1, 2))
    assert red[0] > 240 > 20 > red[2] and blue[2] > 240 > 20 > blue[0]
    assert capsys.readouterr().out.count("Data: data from the given path") == 1


def test_the_variable(root, monkeypatch):
    monkeypatch.setenv("IMAGENETTE_DIR", str(root))
    assert len(imagenette("val", size=32)) == 4


def test_wrong_folders_are_named(root, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        imagenette("train", tmp_path / "nowhere")
    monkeypatch.setenv("IMAGENETTE_DIR", str(root / "train"))
    with pytest.raises(FileNotFoundError, match=r"train/ and val/ not found in IMAGENETTE_DIR"):
        imagenette("train")
    with pytest.raises(ValueError, match="'test'"):
        imagenette("test", root)


def test_any_mode_of_image_becomes_rgb(root):
    for mode, name in (("L", "grey.png"), ("CMYK", "cmyk.jpg"), ("RGBA", "alpha.png")):
        write(root / "train" / "n01440764" / name, (90, 90, 90), mode)
    images = image_folder(root / "train", 16)
    assert len(images) == 9 and images.images.shape == (9, 3, 16, 16)
    grey = images.images[images.labels == 0].float().mean((2, 3))
    assert (abs(grey - 90) < 3).all(1).sum() == 3


def test_broken_images_are_named_and_left_out(root):
    broken = root / "train" / "n01440764" / "1.JPEG"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"skipped 1 of 6 .*1\.JPEG"):
        images = image_folder(root / "train", 16)
    assert len(images) == 5 and images.labels.tolist() == [0, 0, 1, 1, 1] and images.skipped == (broken.resolve(),)


def test_a_class_without_images_is_an_error(root):
    (root / "train" / "n03000684").mkdir()
    (root / "val" / "n03000684").mkdir()
    with pytest.raises(FileNotFoundError, match="n03000684"):
        image_folder(root / "train", 16)


def test_classes_must_be_the_same_in_both_splits(root):
    (root / "val" / "n02102040").rename(root / "val" / "n03000684")
    with pytest.raises(FileNotFoundError, match="n0"):
        imagenette("train", root)


@pytest.fixture
def archive(root, tmp_path, monkeypatch):
    """The archive that an Imagenette of two classes is downloaded from, out of a server on this machine."""
    path = tmp_path / "imagenette2-160.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, "imagenette2-160")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setattr(Imagenette, "_ARCHIVES", {"160px": (url, None)})
        yield path
        server.shutdown()


def test_a_process_that_downloads_more_slowly_than_another_takes_its_images(archive, monkeypatch, tmp_path):
    plain = Imagenette.__init__

    def download(self, root, *arguments, **options):
        plain(self, root, *arguments, **options)
        name = "imagenette2-160"
        shutil.copytree(f"{root}/{name}", tmp_path / "home" / ".cache" / "convnext_min" / name)

    monkeypatch.setattr(Imagenette, "__init__", download)
    assert len(imagenette("train", size=32)) == 6


def test_the_download(archive, capsys):
    assert len(imagenette("train", size=32)) == 6
    archive.unlink()
    data._downloaded.cache_clear()
    assert len(imagenette("val", size=32)) == 4  # out of the cache now
    assert "from the cache" in capsys.readouterr().out


def test_a_download_that_breaks_off_is_named_and_leaves_nothing(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(OSError, match=r"imagenette2-160\.tgz broke off .* run it again, or set IMAGENETTE_DIR"):
        imagenette("train", size=32)
    assert not list((tmp_path / "home" / ".cache" / "convnext_min").iterdir())


def test_without_network_the_sample_stands_in_and_says_so_once(monkeypatch, tmp_path, capsys):
    missing = (tmp_path / "imagenette2-160.tgz").as_uri()
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"160px": (missing, None)})
    train, val = imagenette("train", size=32), imagenette("val", size=32)
    assert "offline sample" in train.source and (len(train), len(val)) == (2000, 500)
    out = capsys.readouterr().out
    assert out.count("no network") == 1 and "IMAGENETTE_DIR" in out


def test_the_sample_is_balanced_deterministic_and_split(images):
    again, val = offline_sample("train", 32, 60), offline_sample("val", 32, 60)
    assert torch.equal(images.images, again.images) and images.labels.bincount().tolist() == [6] * 10
    same = (images.images[:, None] == val.images[None]).flatten(2).all(-1)
    assert not same.any()


def test_pixels_alone_do_not_tell_the_classes_of_the_sample():
    train, val = offline_sample("train", 32), offline_sample("val", 32)
    x, test = (s.images.flatten(1).double() / 255 - 0.5 for s in (train, val))
    targets = torch.nn.functional.one_hot(train.labels).double()
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ targets)
    assert (test @ weights).argmax(1).eq(val.labels).double().mean() < 0.6


def test_training_batches_follow_from_seed_epoch_and_number(images):
    def batches(seed, epoch, start=0):
        return list(Batches(images, 16, 24, True, seed).epoch(epoch, start))

    first, again, late = batches(0, 1), batches(0, 1), batches(0, 1, start=2)
    torch.manual_seed(5)  # the global generator has no part in it
    assert len(first) == 3 and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again))
    assert len(late) == 1 and torch.equal(late[0][0], first[2][0])
    assert not torch.equal(first[0][0], batches(0, 2)[0][0]) and not torch.equal(first[0][0], batches(1, 1)[0][0])
    assert first[0][0].shape == (16, 3, 24, 24) and first[0][0].dtype == torch.float32


def test_a_set_smaller_than_a_batch_is_one_batch(images):
    assert [len(y) for _, y in Batches(images, 100, 24, True).epoch(0)] == [60]


def test_evaluation_keeps_order_and_every_image(images):
    batches = Batches(images, 16, 32, False)
    x, y = (torch.cat(parts) for parts in zip(*batches.epoch(0)))
    assert len(batches) == 4 and torch.equal(y, images.labels)
    torch.testing.assert_close(x, data.normalize(images.images))
    assert next(Batches(images, 16, 48, False).epoch(0))[0].shape == (16, 3, 48, 48)


@pytest.mark.parametrize("scale", [(0.1, 0.5), (0.35, 1.0), (1.0, 1.0)])
def test_crops_have_the_area_and_shape_asked_for(scale):
    size, n = 200, 2000
    tops, lefts, heights, widths = random_crops(n, size, scale, np.random.default_rng(0))
    assert (
        (tops >= 0).all() and (tops + heights <= size).all() and (lefts >= 0).all() and (lefts + widths <= size).all()
    )
    area, ratio = heights * widths / size**2, widths / heights
    assert scale[0] - 0.02 < area.min() and area.max() < scale[1] + 0.02
    assert abs(area.mean() - sum(scale) / 2) < 0.02
    assert ratio.min() > 0.72 and ratio.max() < 1.38 and abs(np.log(ratio).mean()) < 0.02


def test_half_of_the_images_are_flipped():
    ramp = torch.arange(32, dtype=torch.uint8).expand(400, 3, 32, 32).contiguous()
    image_set = data.ImageSet(ramp, torch.zeros(400, dtype=torch.long), ("ramp",), "ramps")
    x, _ = next(Batches(image_set, 400, 32, True, scale=(1.0, 1.0)).epoch(0))
    assert 0.4 < (x[:, 0, 0, 0] > x[:, 0, 0, -1]).double().mean() < 0.6


def test_impossible_batches_are_refused(images):
    with pytest.raises(ValueError, match="batch_size=0"):
        Batches(images, 0, 32, True)
    with pytest.raises(ValueError, match=r"\(0.5, 0.2\)"):
        Batches(images, 8, 32, True, scale=(0.5, 0.2))
