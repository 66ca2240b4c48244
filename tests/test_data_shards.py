"""Tar shards hold the images of the folder they are made from; a faulty one is refused with tar file and key."""

import gzip
import io
import tarfile
from dataclasses import replace

import pytest
import torch
from image_folders import WNIDS, picture, write_shards

from convnext_min import recipes
from convnext_min.data.disk import loader, open_source
from convnext_min.data.sources import Folder

RECIPE = replace(
    recipes.get("in1k", model="convnext_tiny"), batch_size=6, base_batch=6, resolution=48, eval_resolution=40
)


def drawn(batches, start=0):
    return list(batches.epoch(0, start))


def same(ones, others):
    return len(ones) == len(others) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(ones, others)
    )


def write_tar(path, members):
    """Write a tar file of (name, content); content None makes a folder."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))


def png(number=0):
    file = io.BytesIO()
    picture(number).save(file, "png")
    return file.getvalue()


def test_shards_hold_the_same_images_as_the_folder(image_root, tmp_path):
    write_shards(image_root, tmp_path, 3)
    folder, shards = Folder(image_root / "val"), open_source(f"wds/{tmp_path}", "val")
    assert len(shards) == 11 and shards.classes == ("0", "1")
    assert sorted(map(shards.read, range(11))) == sorted(map(folder.read, range(11)))
    batches = loader(f"wds/{tmp_path}", "train", RECIPE, True, workers=2)
    assert len(batches) == 3 and same(drawn(batches, start=1), drawn(batches)[1:])
    (tmp_path / "classes.txt").write_text("tench\nspringer\n")
    assert open_source(f"wds/{tmp_path}", "val").classes == ("tench", "springer")


def test_a_broken_image_in_a_shard_is_named_with_its_tar(damaged_root, tmp_path_factory):
    target = tmp_path_factory.mktemp("shards")
    write_shards(damaged_root, target, 1)
    batches = loader(f"wds/{target}", "val", RECIPE, False, workers=0)
    assert sum(len(y) for _, y in batches.epoch()) == 10
    assert batches.skipped == [f"{target.resolve()}/made-val-0000.tar: a/00003"]


def test_a_shard_without_labels_is_named(image_root, tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        tar.add(image_root / "train" / WNIDS[0] / "0.png", "a/0.png")
    with pytest.raises(ValueError, match=r"train-0\.tar has 1 images without a \.cls file, such as a/0"):
        open_source(f"wds/{tmp_path}", "train")


def test_a_shard_that_is_cut_off_or_empty_is_named(image_root, tmp_path):
    write_shards(image_root, tmp_path, 1)
    (shard,) = tmp_path.glob("*val*.tar")
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"val-0000\.tar is cut off, or no tar file \(.*\): fetch it again"):
        open_source(f"wds/{tmp_path}", "val")
    tarfile.open(shard, "w").close()
    with pytest.raises(FileNotFoundError, match="no images in the 1 tar files of 'val'"):
        open_source(f"wds/{tmp_path}", "val")


def test_a_shard_that_is_cut_off_between_two_images_is_named(image_root, tmp_path):
    write_shards(image_root, tmp_path, 1)
    (shard,) = tmp_path.glob("*val*.tar")
    with tarfile.open(shard) as tar:
        border = tar.getmembers()[8].offset
    shard.write_bytes(shard.read_bytes()[:border])
    with pytest.raises(ValueError, match=r"val-0000\.tar is cut off, .*its end is missing"):
        open_source(f"wds/{tmp_path}", "val")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"-1", r"train-0\.tar: a/0\.cls must hold a class number of 0 or more, got '-1'"),
        (b"tench", r"train-0\.tar: a/0\.cls must hold a class number .* got 'tench'"),
        (b"1.0", r"a/0\.cls must hold a class number .* got '1\.0'"),
        (b"", r"a/0\.cls must hold a class number .* got ''"),
        (b"\xff\xfe", r"a/0\.cls must hold a class number"),
        (None, r"train-0\.tar: a/0\.cls is a folder or a link, not a file"),
        (b"3", r"train-0\.tar: a/0 has the label 3, but .*classes\.txt has 3 classes, numbered from 0"),
    ],
)
def test_a_label_that_is_no_class_is_named_with_its_tar_and_key(tmp_path, label, message):
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    write_tar(tmp_path / "train-0.tar", [("a/0.png", png()), ("a/0.cls", label)])
    with pytest.raises(ValueError, match=message):
        open_source(f"wds/{tmp_path}", "train")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", png()), ("0.cls", b"0"), ("0.cls", b"1")], r"train-0\.tar: there are two labels of 0"),
        ([("0.png", png()), ("0.cls", b"0"), ("0.jpg", png())], r"train-0\.tar: there are two images of 0"),
        ([("0.png", None), ("0.cls", b"0")], r"train-0\.tar: 0\.png is a folder or a link"),
    ],
)
def test_a_key_that_is_not_one_image_with_one_label_is_named(tmp_path, members, message):
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(ValueError, match=message):
        open_source(f"wds/{tmp_path}", "train")


def test_a_compressed_shard_is_told_from_a_truncated_one(image_root, tmp_path):
    write_shards(image_root, tmp_path, 1)
    (shard,) = tmp_path.glob("*val*.tar")
    packed = gzip.compress(shard.read_bytes())
    shard.write_bytes(packed)
    with pytest.raises(ValueError, match=r"val-0000\.tar is compressed.* unpack it to a plain tar file"):
        open_source(f"wds/{tmp_path}", "val")
    shard.rename(f"{shard}.gz")
    with pytest.raises(FileNotFoundError, match=r"no tar files of 'val'.*val-0000\.tar\.gz is compressed"):
        open_source(f"wds/{tmp_path}", "val")


def test_a_shard_belongs_to_the_split_that_is_a_word_in_its_name(tmp_path):
    for name in ("train-no-interval-0", "imagenet_validation_0", "valid-1", "Training-2", "evaluation", "trainval"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", png()), (f"{name}.cls", b"0")])
    images = {split: open_source(f"wds/{tmp_path}", split) for split in ("train", "val")}
    assert [images["train"].keys[i] for i in range(2)] == ["Training-2", "train-no-interval-0"]
    assert [images["val"].keys[i] for i in range(2)] == ["imagenet_validation_0", "valid-1"]
    assert len(images["train"]) == len(images["val"]) == 2
    (tmp_path / "evaluation.tar").rename(tmp_path / "train-val-0.tar")
    with pytest.raises(ValueError, match=r"train-val-0\.tar has the words of both splits in its name"):
        open_source(f"wds/{tmp_path}", "train")


@pytest.mark.parametrize("without_highest", ["train", "val"])
def test_both_splits_have_the_classes_of_both(tmp_path, without_highest):
    for split in ("train", "val"):
        members = [
            (f"{label}.{kind}", part) for label in range(3) for kind, part in (("png", png()), ("cls", b"%d" % label))
        ]
        write_tar(tmp_path / f"{split}-0.tar", members[: 4 if split == without_highest else 6])
    train, val = (open_source(f"wds/{tmp_path}", split) for split in ("train", "val"))
    assert train.classes == val.classes == ("0", "1", "2")
    assert train.labels.max() + val.labels.max() == 3


def test_a_shard_that_changes_is_scanned_again(tmp_path):
    for number in (1, 2):
        members = [(f"{i}.{kind}", part) for i in range(number) for kind, part in (("png", png()), ("cls", b"0"))]
        write_tar(tmp_path / "train-0.tar", members)
        assert len(open_source(f"wds/{tmp_path}", "train")) == number


def test_images_of_a_shard_that_pillow_cannot_decode_are_counted(tmp_path, capsys):
    members = [("0.png", png()), ("0.cls", b"0"), ("0.json", b"{}"), ("1.heic", b"x"), ("1.cls", b"0")]
    write_tar(tmp_path / "train-0.tar", members)
    loader(f"wds/{tmp_path}", "train", replace(RECIPE, batch_size=2), False, workers=0)
    assert f"left out of the train shards in {tmp_path}: 1 .heic images" in capsys.readouterr().out


def test_every_tenth_image_of_shards_can_be_held_out_without_a_val_split(image_root, tmp_path):
    write_shards(image_root, tmp_path, 1)
    next(tmp_path.glob("*val*.tar")).unlink()
    train, val = (
        loader(f"wds/{tmp_path}", split, RECIPE, split == "train", workers=0, holdout=True)
        for split in ("train", "val")
    )
    assert (train.images, val.images) == (18, 2)
