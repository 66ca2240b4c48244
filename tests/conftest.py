"""Tests compute on the CPU, also where there is a GPU: some compare results bit for bit.

Those of test_gpu.py need one, and run alone: `TEST_GPU=1 python -m pytest tests/test_gpu.py`.
"""

import os
import shutil

import pytest

if not os.environ.get("TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from compatibility import (  # noqa: F401 (hooks)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)
from helpers import folder_of_images
from image_folders import WNIDS, write_images

from convnext_min.book import results
from convnext_min.data import synthetic_images


@pytest.fixture(scope="session")
def images():
    """Return 40 drawn images of ten classes."""
    return synthetic_images("train", 32, 40)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder with 96 training and 16 validation images of two classes, not to be changed."""
    return folder_of_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def image_root(tmp_path_factory):
    """A folder with 20 images for training and 11 for validation, not to be changed."""
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


@pytest.fixture
def damaged_root(image_root, tmp_path):
    """A copy of `image_root` in which one training and one validation image are truncated."""
    shutil.copytree(image_root, tmp_path, dirs_exist_ok=True)
    for split in ("train", "val"):
        path = tmp_path / split / WNIDS[0] / "3.png"
        path.write_bytes(path.read_bytes()[:-40])
    return tmp_path


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    """Return an empty folder in which the book looks for recorded results."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path
