"""Images of Imagenette come from a folder, the cache or a download, and damaged ones are left out by name."""

import functools
import io
import shutil
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image
from torchvision.datasets import utils

from convnext_min.data import image_folder, imagenette

MODULE = sys.modules["convnext_min.data.imagenette"]  # not the function of that name


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No variable, an empty home, nothing said or looked up before."""
    monkeypatch.delenv("IMAGENETTE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    MODULE._download.cache_clear()
    MODULE._print_once.cache_clear()


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


def test_a_given_folder(root, capsys):
    train, val = imagenette("train", root, 32), imagenette("val", root, 32)
    assert (len(train), len(val)) == (6, 4) and train.images.shape == (6, 3, 32, 32)
    assert train.classes == ("tench", "English springer") and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    red, blue = train.images[0].float().mean((1, 2)), train.images[-1].float().mean((1, 2))
    assert red[0] > 240 > 20 > red[2] and blue[2] > 240 > 20 > blue[0]
    assert capsys.readouterr().out.count("Data: data from the given path") == 1


def test_a_folder_whose_name_the_terminal_cannot_encode_is_read(root, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert len(imagenette("val", root.rename(root.parent / "猫"), 32)) == 4


def test_of_several_processes_the_first_prints(root, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    imagenette("val", root, 32)
    assert capsys.readouterr().out == ""


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
        monkeypatch.setattr(MODULE, "ARCHIVES", {160: (url, None)})
        yield path
        server.shutdown()


def test_a_process_that_downloads_more_slowly_than_another_takes_its_images(archive, monkeypatch, tmp_path):
    plain = utils.download_and_extract_archive

    def download(url, root, md5):
        plain(url, root, md5=md5)
        name = "imagenette2-160"
        shutil.copytree(f"{root}/{name}", tmp_path / "home" / ".cache" / "convnext_min" / name)

    monkeypatch.setattr(utils, "download_and_extract_archive", download)
    assert len(imagenette("train", size=32)) == 6


def test_the_download(archive, capsys):
    assert len(imagenette("train", size=32)) == 6
    archive.unlink()
    MODULE._download.cache_clear()
    assert len(imagenette("val", size=32)) == 4  # out of the cache now
    assert "from the cache" in capsys.readouterr().out


def test_a_download_that_breaks_off_is_named_and_leaves_nothing(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(OSError, match=r"imagenette2-160\.tgz broke off .* run it again, or set IMAGENETTE_DIR"):
        imagenette("train", size=32)
    assert not list((tmp_path / "home" / ".cache" / "convnext_min").iterdir())


def test_without_network_synthetic_images_replace_them_and_one_line_says_so(monkeypatch, tmp_path, capsys):
    missing = (tmp_path / "imagenette2-160.tgz").as_uri()
    monkeypatch.setattr(MODULE, "ARCHIVES", {160: (missing, None)})
    train, val = imagenette("train", size=32), imagenette("val", size=32)
    assert "synthetic images" in train.source and (len(train), len(val)) == (2000, 500)
    out = capsys.readouterr().out
    assert out.count("no network") == 1 and "IMAGENETTE_DIR" in out


def test_held_out_images_need_no_val_folder(root):
    shutil.rmtree(root / "val")
    with pytest.raises(FileNotFoundError, match="val/ not found in the given path"):
        imagenette("train", root, 32)  # before any image is decoded
    assert len(imagenette("train", root, 32, holdout=True)) == 6


@pytest.mark.parametrize("source", ["wds//data/shards", "hfds/cifar100"])
def test_sources_that_are_read_from_the_disk_are_named(source):
    with pytest.raises(
        ValueError, match=f"{source} is read from the disk, not into memory: choose a recipe with loader=disk"
    ):
        imagenette("train", source)


@pytest.mark.parametrize("home", ["none", "not writable"])
def test_without_a_place_for_the_download_synthetic_images_stand_in(monkeypatch, tmp_path, capsys, home):
    if home == "none":
        monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    else:
        (tmp_path / "home").touch()  # a file where the folder would be
    assert imagenette("val", size=32).source.startswith("synthetic images")
    out = capsys.readouterr().out
    assert "so synthetic images drawn by code replace Imagenette; set IMAGENETTE_DIR" in out and out.count("\n") == 1
