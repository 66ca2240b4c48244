"""Decoded images are kept in the cache, found again only for the same contents, and bounded in size."""

import os
import shutil
import sys
from multiprocessing import get_context
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from image_folders import WNIDS

from convnext_min.data import decoded, image_folder

MODULE = sys.modules["convnext_min.data.imagenette"]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Use a cache in an empty home, from one image on."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(decoded, "SMALLEST", 1)
    MODULE._print_once.cache_clear()
    return tmp_path / "home" / ".cache" / "convnext_min" / "decoded"


@pytest.fixture
def root(image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "data")
    return tmp_path / "data" / "train"


def test_a_second_run_reads_the_same_images_without_decoding(root, monkeypatch, capsys, home):
    first = image_folder(root, 24)
    assert str(home) in capsys.readouterr().out and len(list(home.iterdir())) == 1
    monkeypatch.setattr(MODULE, "decode", Mock(side_effect=AssertionError("decoded again")))
    second = image_folder(root, 24)
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    assert first.source == second.source


def test_changes_to_the_images_in_memory_are_not_kept(root):
    image_folder(root, 24)
    image_folder(root, 24).images.zero_()
    assert image_folder(root, 24).images.any()


@pytest.mark.parametrize("change", ["contents", "size", "exif"])
def test_other_contents_or_settings_are_decoded(root, change, monkeypatch):
    image_folder(root, 24)
    files = sorted((root / WNIDS[0]).iterdir())
    if change == "contents":  # the same name, length and time
        state, contents = files[0].stat(), files[0].read_bytes()
        files[0].write_bytes(files[1].read_bytes()[: len(contents)])
        os.utime(files[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    counted = Mock(side_effect=MODULE.decode)
    monkeypatch.setattr(MODULE, "decode", counted)
    image_folder(root, 32 if change == "size" else 24, exif_orientation=change != "exif")
    assert counted.called


def test_a_folder_with_a_damaged_file_is_not_kept(damaged_root, home):
    with pytest.warns(UserWarning, match="cannot be decoded"):
        image_folder(damaged_root / "train", 24)
    assert not list(home.glob("*"))


@pytest.mark.parametrize("damage", [b"", b"not an array", "cut"])
def test_a_damaged_cache_is_decoded_again(root, home, damage):
    images = image_folder(root, 24).images
    (path,) = home.iterdir()
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else damage)
    assert torch.equal(image_folder(root, 24).images, images)
    assert torch.equal(image_folder(root, 24).images, images) and np.load(path).shape[1:] == (24, 24, 3)


def test_the_arrays_not_used_for_longest_are_deleted(root, home, monkeypatch):
    array = len(image_folder(root, 24)) * 24 * 24 * 3 + 128  # bytes
    monkeypatch.setattr(decoded, "LIMIT", int(2.5 * array))
    (first,) = home.iterdir()
    image_folder(root, 24, exif_orientation=False)
    second = next(path for path in home.iterdir() if path != first)
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    image_folder(root, 24)  # uses the first
    image_folder(root, 23)
    assert first.exists() and not second.exists() and len(list(home.iterdir())) == 2


def test_without_room_or_home_images_are_decoded_and_nothing_is_kept(root, home, monkeypatch, capsys):
    monkeypatch.setattr(decoded, "LIMIT", 1000)
    assert len(image_folder(root, 24)) == 20 and not list(home.glob("*"))
    monkeypatch.setattr(decoded, "data_cache", Mock(side_effect=OSError("no home")))
    assert len(image_folder(root, 24)) == 20 and "decoded images" not in capsys.readouterr().out


def _read(root, smallest, results):
    decoded.SMALLEST = smallest
    results.put(image_folder(root, 24).images.sum().item())


def test_two_processes_at_once_read_the_same(root, home):
    context = get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_read, args=(root, 1, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums[0] == sums[1] == image_folder(root, 24).images.sum().item()
    assert [path.suffix for path in home.iterdir()] == [".npy"]
