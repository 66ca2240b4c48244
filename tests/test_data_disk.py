"""Images from the disk: the same whatever reads them, every one once in evaluation, and none silently lost."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import WNIDS, picture
from PIL import Image
from torchvision.transforms import functional as T

from convnext_min import data, recipes
from convnext_min.data import disk, seeded
from convnext_min.data.disk import Folder, loader, open_source

RECIPE = replace(
    recipes.get("in1k", model="convnext_tiny"), batch_size=6, base_batch=6, resolution=48, eval_resolution=40
)
ROOT = Path(__file__).parents[1]


def drawn(batches, epoch=0, start=0):
    return list(batches.epoch(epoch, start))


def same(ones, others):
    return len(ones) == len(others) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(ones, others)
    )


# ---- Training


def test_batches_are_normalized_images_with_their_labels(image_root):
    batches = loader(image_root, "train", RECIPE, True, workers=0)
    assert (len(batches), batches.batch_size, batches.images) == (3, 6, 20)
    assert batches.classes == ("tench", "English springer")
    assert batches.source == f"{image_root.name}/train: 20 images read from the disk"
    for x, y in batches.epoch(0):
        assert x.shape == (6, 3, 48, 48) and x.dtype == torch.float32 and x.abs().max() < 8
        assert y.shape == (6,) and y.dtype == torch.int64
    batches.resolution = 32
    assert drawn(batches)[0][0].shape == (6, 3, 32, 32)


def test_an_epoch_has_no_image_twice(image_root):
    plain = replace(RECIPE, rand_augment="", erasing=0.0, crop_scale=(1.0, 1.0), batch_size=20)
    ((_, y),) = drawn(loader(image_root, "train", plain, True, workers=0))
    assert y.bincount().tolist() == [12, 8]


def test_images_follow_from_seed_epoch_and_number_whatever_reads_them(image_root, monkeypatch):
    alone = drawn(loader(image_root, "train", RECIPE, True, workers=0), epoch=2)
    monkeypatch.setattr(disk, "CHUNK", 4)  # batches in two parts
    torch.rand(3)  # the global generators have no part in it
    np.random.rand(3)
    assert same(drawn(loader(image_root, "train", RECIPE, True, workers=2), epoch=2), alone)
    assert same(drawn(loader(image_root, "train", RECIPE, True, workers=1), epoch=2, start=2), alone[2:])
    assert not torch.equal(drawn(loader(image_root, "train", RECIPE, True, workers=0), epoch=3)[0][0], alone[0][0])
    assert not torch.equal(
        drawn(loader(image_root, "train", RECIPE, True, seed=1, workers=0), epoch=2)[0][0], alone[0][0]
    )


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_the_batch_of_one(image_root, world):
    alone = drawn(loader(image_root, "train", RECIPE, True, workers=0))
    parts = [
        drawn(loader(image_root, "train", RECIPE, True, rank=rank, world_size=world, workers=0))
        for rank in range(world)
    ]
    together = [tuple(torch.cat(tensors) for tensors in zip(*part)) for part in zip(*parts)]
    assert same(together, alone) and all(len(y) == 6 // world for part in parts for _, y in part)


def test_reading_leaves_the_global_generators_alone(image_root):
    def numbers(read):
        torch.manual_seed(0)
        np.random.seed(0)
        batches = loader(image_root, "train", RECIPE, True, workers=read - 1).epoch(0) if read else ()
        first = [len(y) for _, y in batches]
        return torch.rand(2).tolist() + np.random.rand(2).tolist(), first

    untouched = numbers(0)[0]
    assert numbers(1)[0] == numbers(2)[0] == untouched


def test_workers_end_with_the_epoch_even_if_it_is_left_early(image_root):
    batches = loader(image_root, "train", RECIPE, True, workers=2).epoch(0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    del batches
    gc.collect()
    assert multiprocessing.active_children() == []


def test_random_erasing_is_the_recipes(image_root):
    plain = replace(RECIPE, rand_augment="", crop_scale=(1.0, 1.0), batch_size=20)
    whole, erased = (
        drawn(loader(image_root, "train", replace(plain, erasing=rate), True, workers=0))[0][0] for rate in (0.0, 0.9)
    )
    lowest = (-np.array(data.MEAN) / data.STD).min()  # of an image; noise is not bounded
    assert whole.min() >= lowest - 1e-4
    noisy = (erased < lowest - 1e-4).flatten(1).any(1).float().mean()
    assert 0.5 < noisy <= 1.0


def test_rand_augment_works_at_every_strength_that_it_can_draw():
    recipe = replace(RECIPE, rand_augment="rand-m10-n6-p1.0-inc1")  # 9 ± 0.5 may be 10, where timm posterizes to 0 bits
    augment = disk.transform(recipe, True, 32)
    for number in range(40):
        with seeded(number):
            assert augment(picture(number)).isfinite().all()


def test_an_error_in_a_worker_ends_the_process(image_root):
    program = f"""
import sys
sys.path.insert(0, "tests")
from test_data_disk import RECIPE
from convnext_min.data import disk

def fail(image):
    raise RuntimeError("the transform is wrong")

disk.transform = lambda *_: fail
batches = disk.loader({str(image_root)!r}, "train", RECIPE, True, workers=1)
for x, y in batches.epoch():
    pass
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert run.returncode == 1 and "the transform is wrong" in run.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="not on Windows")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_workers_outlive_a_signal_to_every_process_of_a_job(image_root, name):
    batches = loader(image_root, "train", replace(RECIPE, batch_size=2, base_batch=2), True, workers=2)
    expected, drawing = drawn(batches), batches.epoch()
    first = [next(drawing) for _ in range(2)]  # one from each worker: both have started
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, getattr(signal, name))
    assert same([*first, *drawing], expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_too_little_shared_memory_is_named_and_ends_the_reading(image_root, monkeypatch, workers):
    def fail(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(OSError, match=r"/dev/shm is full: .* --workers 0"):
        drawn(loader(image_root, "train", RECIPE, True, workers=workers))
    assert multiprocessing.active_children() == []


# ---- Evaluation


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("batch_size", [4, 5])  # 11 images: batches of 4, 4, 3 and of 5, 5, 1
def test_evaluation_covers_every_image_once_however_many_processes(image_root, world, batch_size):
    parts = [
        loader(image_root, "val", RECIPE, False, rank=rank, world_size=world, workers=0, batch_size=batch_size)
        for rank in range(world)
    ]
    assert [len(list(part.epoch())) for part in parts] == [3] * world  # though the last part of one may be empty
    seen = [(x, int(label)) for part in parts for xs, y in part.epoch() for x, label in zip(xs, y)]
    assert all(xs.shape == (len(y), 3, 40, 40) for part in parts for xs, y in part.epoch())
    expected = [
        (x, int(label))
        for xs, y in loader(image_root, "val", RECIPE, False, workers=0).epoch()
        for x, label in zip(xs, y)
    ]
    assert len(seen) == len(expected) == 11
    for x, label in seen:
        assert sum(label == other and torch.equal(x, right) for right, other in expected) == 1


def test_the_evaluation_crop_is_the_papers(image_root):
    image = Image.open(image_root / "val" / WNIDS[0] / "0.png")  # 60 x 48

    def first(recipe):
        return next(loader(image_root, "val", recipe, False, workers=0).epoch())[0][0]

    def normalized(image):
        return T.normalize(T.to_tensor(image), data.MEAN, data.STD)

    at_224 = T.center_crop(T.resize(image, 256, T.InterpolationMode.BICUBIC), 224)
    torch.testing.assert_close(first(recipes.get("in1k", model="convnext_base")), normalized(at_224))
    at_384 = T.resize(image, (384, 384), T.InterpolationMode.BICUBIC)  # squeezed
    torch.testing.assert_close(first(recipes.get("in1k-ft384", model="convnext_base")), normalized(at_384))


@pytest.mark.parametrize("size", [(5000, 2), (3, 6000)])
def test_a_long_image_is_evaluated_by_its_centre_without_a_huge_one_in_between(size):
    image = picture(3, size)
    recipe = replace(RECIPE, eval_resolution=40)
    seen = []
    resize = Image.Image.resize

    def spy(self, *arguments, **options):
        seen.append(max(self.size))
        return resize(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", spy)
        x = disk.transform(recipe, False, 40)(image)
    whole = T.normalize(
        T.to_tensor(T.center_crop(T.resize(image, 46, T.InterpolationMode.BICUBIC), 40)), data.MEAN, data.STD
    )
    assert seen and max(seen) <= 30
    torch.testing.assert_close(x, whole, rtol=0, atol=0.1)


def test_every_tenth_image_can_be_held_out(image_root):
    whole = Folder(image_root / "train")
    train, val = (
        loader(image_root, split, RECIPE, split == "train", workers=0, holdout=True) for split in ("train", "val")
    )
    assert (train.images, val.images) == (18, 2) and val.source.startswith(
        f"{image_root.name}/val, held out of train: 2 "
    )
    held_out = [val.dataset.read(i) for i in range(2)]
    assert held_out == [whole.read(0), whole.read(10)]
    assert sorted(held_out + [train.dataset.read(i) for i in range(18)]) == sorted(map(whole.read, range(20)))
    assert [val.dataset.name(i) for i in range(2)] == [whole.name(0), whole.name(10)]


# ---- Images that cannot be read


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_replaced_in_training_and_named_once(damaged_root, capsys, workers):
    batches = loader(damaged_root, "train", replace(RECIPE, batch_size=20), True, workers=workers)
    ((x, y),) = drawn(batches, epoch=1)
    assert len(x) == len(y) == 20
    drawn(batches, epoch=2)
    broken = str(damaged_root.resolve() / "train" / WNIDS[0] / "3.png")
    assert batches.skipped == [broken]
    printed = capsys.readouterr().out
    assert printed.count(broken) == 1 and "another takes its place" in printed


def test_a_broken_image_is_left_out_of_evaluation(damaged_root, capsys):
    batches = loader(damaged_root, "val", RECIPE, False, workers=0, batch_size=4)
    assert [len(y) for _, y in batches.epoch()] == [3, 4, 3]
    assert "left out" in capsys.readouterr().out and len(batches.skipped) == 1


def test_a_disk_that_reads_nothing_is_an_error(damaged_root, monkeypatch):
    def fail(self, index):
        raise OSError("Input/output error")

    monkeypatch.setattr(Folder, "read", fail)
    with pytest.raises(OSError, match=r"100 images in a row cannot be read.*\(OSError: Input/output error\)"):
        drawn(loader(damaged_root, "train", RECIPE, True, workers=0))


# ---- Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be at least 0 and below the number of processes, got 2 of 2"),
        ({"world_size": 4}, "a batch of 6 images cannot be divided among 4 processes"),
        ({"batch_size": 30}, "batch_size=30 is larger than the data set of 20 images"),
    ],
)
def test_impossible_loaders_are_refused(image_root, options, message):
    with pytest.raises(ValueError, match=message):
        loader(image_root, "train", RECIPE, True, workers=0, **options)


def test_wrong_sources_are_named(image_root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/train not found; expected images in"):
        open_source(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"no tar files of 'val'"):
        open_source(f"wds/{tmp_path}", "val")
    with pytest.raises(ValueError, match="'test'"):
        open_source(image_root, "test")
    (tmp_path / "val").mkdir()
    picture(0).save(tmp_path / "val" / "1.png")
    with pytest.raises(
        FileNotFoundError, match="no class folders but 1 images: move each into the folder of its class"
    ):
        open_source(tmp_path, "val")
