"""The check of a folder finds missing classes, wrong counts and damaged_root images."""

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
