"""The class map gives each class of ImageNet-1K its number in ImageNet-22K."""

import pytest
from image_folders import WNIDS

from convnext_min.data.class_map import class_map, main, read_classes


def test_the_class_map(image_root, tmp_path, capsys):
    assert class_map(["n3", "n1", "n2"], ["n1", "n3"]) == [1, 0]
    with pytest.raises(ValueError, match=r"1 of 2 classes are not in the list of 2: \['n9'\]"):
        class_map(["n1", "n2"], ["n1", "n9"])
    with pytest.raises(ValueError, match="1 classes appear twice in the list of 3"):
        class_map(["n1", "n2", "n1"], ["n1"])
    (tmp_path / "all.txt").write_text(f"n00000001\n{WNIDS[1]}\n{WNIDS[0]}\n")
    main([str(tmp_path / "all.txt"), str(image_root / "train"), str(tmp_path / "map.txt")])
    assert (tmp_path / "map.txt").read_text() == "2\n1\n" and "2 classes" in capsys.readouterr().out


def test_hidden_folders_are_no_classes(tmp_path):
    for name in ("n2", "n1", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    assert read_classes(str(tmp_path)) == ["n1", "n2"]
