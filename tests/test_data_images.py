"""Subsets of an image set: held-out images and subsamples of each class."""

import pytest
import torch

from convnext_min import data


def test_hold_out_takes_a_tenth_of_each_class_and_leaves_the_others():
    images = data.synthetic_images("train", 32, 107)
    train, held = data.hold_out(images)
    assert len(train) + len(held) == 107
    assert torch.bincount(held.labels, minlength=10).tolist() == [2] * 7 + [1] * 3  # 11 or 10 images a class
    assert not {t.numpy().tobytes() for t in held.images} & {t.numpy().tobytes() for t in train.images}


def test_a_subsample_has_that_fraction_of_each_class_and_lies_in_larger_ones():
    images = data.synthetic_images("train", 32, 100)
    parts = [data.subsample(images, fraction) for fraction in (0.001, 0.2, 0.5, 1.0)]
    assert [torch.bincount(part.labels).tolist() for part in parts] == [[n] * 10 for n in (1, 2, 5, 10)]
    contents = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert contents[0] < contents[1] < contents[2] < contents[3]
    assert torch.equal(data.subsample(images, 0.2).images, parts[1].images)


def test_selected_classes_are_labelled_by_their_place():
    images = data.synthetic_images("train", 32, 100)
    chosen = data.select_classes(images, images.classes[3:1:-1])
    names = [images.classes[label] for label in images.labels.tolist()]
    kept = [i for i, name in enumerate(names) if name in chosen.classes]
    assert torch.equal(chosen.images, images.images[kept])
    assert [chosen.classes[label] for label in chosen.labels.tolist()] == [names[i] for i in kept]
    with pytest.raises(ValueError, match="no class violin; there are "):
        data.select_classes(images, ("violin",))
