"""Batches depend on seed, epoch and number alone, and are normalized crops of the right images."""

import numpy as np
import pytest
import torch

from convnext_min.data import Batches, ImageSet, normalize, random_crops, synthetic_images


@pytest.fixture(scope="module")
def images():
    return synthetic_images("train", 32, 60)


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
    torch.testing.assert_close(x, normalize(images.images))
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
    image_set = ImageSet(ramp, torch.zeros(400, dtype=torch.long), ("ramp",), "ramps")
    x, _ = next(Batches(image_set, 400, 32, True, scale=(1.0, 1.0)).epoch(0))
    assert 0.4 < (x[:, 0, 0, 0] > x[:, 0, 0, -1]).double().mean() < 0.6


def test_impossible_batches_are_refused(images):
    with pytest.raises(ValueError, match="batch_size=0"):
        Batches(images, 0, 32, True)
    with pytest.raises(ValueError, match=r"\(0.5, 0.2\)"):
        Batches(images, 8, 32, True, scale=(0.5, 0.2))
