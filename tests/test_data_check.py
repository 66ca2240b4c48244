"""The check of a folder finds missing classes, wrong counts and damaged_root images."""

import os
import subprocess
import sys

import pytest
from image_folders import WNIDS
from timm.data import ImageNetInfo

from convnext_min.data.check import check, main


def test_a_whole_folder_passes_the_check(image_root, capsys):
    assert check(image_root, workers=0) == []
    main([str(image_root), "--workers", "2"])
    assert "is complete and can be read" in capsys.readouterr().out


def test_the_check_names_broken_images_unless_it_is_quick(damaged_root, capsys):
    assert check(damaged_root, quick=True) == []
    found = check(damaged_root, workers=0)
    assert len(found) == 2 and all(
        f"{split}/{WNIDS[0]}/3.png: " in line for split, line in zip(("train", "val"), found)
    )
    with pytest.raises(SystemExit, match="2 problems in"):
        main([str(damaged_root), "--workers", "0"])


def test_the_check_compares_the_classes(damaged_root):
    (damaged_root / "val" / WNIDS[1]).rename(damaged_root / "val" / "n03000684")
    assert check(damaged_root, quick=True) == [
        f"1 classes are in train/ and not in val/: {WNIDS[1]}",
        "1 classes are in val/ and not in train/: n03000684",
    ]
    (damaged_root / "val" / "n03000684").rename(damaged_root / "elsewhere")
    (damaged_root / "val" / WNIDS[0]).rename(damaged_root / "away")
    assert "holds no class folders" in check(damaged_root, quick=True)[0]


def test_the_check_counts_imagenet_1k(tmp_path):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    assert len(wnids) == 1000
    for split, last in (("train", 1000), ("val", 999)):
        for wnid in wnids[:last]:
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / "0.JPEG").touch()
    assert check(tmp_path, quick=True) == [
        f"1 classes are in train/ and not in val/: {wnids[-1]}",
        "train/ has 1,000 images; ImageNet-1K has 1,281,167",
        f"val/ lacks 1 classes of ImageNet-1K: {wnids[-1]}",
        "val/ has 999 images; ImageNet-1K has 50,000",
    ]


def test_the_check_goes_on_after_an_empty_class(damaged_root):
    for name in ("n03000684", "n03028079"):
        for split in ("train", "val"):
            (damaged_root / split / name).mkdir()
    found = check(damaged_root, workers=0)
    assert found[0] == "train/ has 2 classes without images: n03000684, n03028079"
    assert len([line for line in found if "3.png: " in line]) == 2 and len(found) == 4


def test_the_check_reports_copies_and_training_images_in_val(damaged_root):
    def copy(source, target):
        (damaged_root / target).write_bytes((damaged_root / source).read_bytes())

    a, b = WNIDS
    copy(f"train/{a}/0.png", f"val/{a}/copy.png")
    copy(f"train/{a}/1.png", f"val/{b}/copy.png")
    copy(f"train/{a}/2.png", f"train/{a}/copy.png")
    copy(f"val/{a}/2.png", f"val/{b}/copy2.png")
    (damaged_root / "train" / a / "3.png").unlink()
    (damaged_root / "val" / a / "3.png").unlink()
    root = damaged_root.resolve()
    assert check(damaged_root, workers=0) == [
        f"1 images are both in train/ and in val/, such as {root}/train/{a}/0.png = {root}/val/{a}/copy.png",
        "1 images are both in train/ and in val/, in different classes, such as "
        f"{root}/train/{a}/1.png = {root}/val/{b}/copy.png",
        f"1 images are more than once in train/, such as {root}/train/{a}/2.png = {root}/train/{a}/copy.png",
        "1 images are more than once in val/, in different classes, such as "
        f"{root}/val/{a}/2.png = {root}/val/{b}/copy2.png",
    ]
    assert check(damaged_root, quick=True) == []


def test_the_check_counts_files_that_loaders_leave_out(damaged_root):
    (damaged_root / "train" / WNIDS[0] / "x.heic").touch()
    (damaged_root / "train" / WNIDS[0] / "up").symlink_to("..")
    (found,) = check(damaged_root, quick=True)
    assert "1 .heic file" in found and "1 link to a folder that contains it" in found


def test_the_check_prints_names_that_the_terminal_cannot_encode(damaged_root):
    (damaged_root / "train" / WNIDS[0]).rename(damaged_root / "train" / "猫")
    (damaged_root / "val" / WNIDS[0]).rename(damaged_root / "val" / "猫")
    run = subprocess.run(
        [sys.executable, "-m", "convnext_min.data.check", str(damaged_root), "--workers", "0"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        timeout=100,
    )
    out = run.stdout.decode("cp1252")
    assert run.returncode == 1 and out.count("\\u732b") == 2 and b"Traceback" not in run.stderr
