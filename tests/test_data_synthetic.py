"""The drawn images are the same on every call, and not solved by a linear model of the pixels."""

import pytest
import torch

from convnext_min.data import synthetic_images


def test_synthetic_images_are_balanced_deterministic_and_split():
    images = synthetic_images("train", 32, 60)
    again, val = synthetic_images("train", 32, 60), synthetic_images("val", 32, 60)
    assert torch.equal(images.images, again.images) and images.labels.bincount().tolist() == [6] * 10
    same = (images.images[:, None] == val.images[None]).flatten(2).all(-1)
    assert not same.any()


def test_a_linear_model_of_the_pixels_does_not_solve_synthetic_images():
    train, val = synthetic_images("train", 32), synthetic_images("val", 32)
    x, test = (s.images.flatten(1).double() / 255 - 0.5 for s in (train, val))
    targets = torch.nn.functional.one_hot(train.labels).double()
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ targets)
    assert (test @ weights).argmax(1).eq(val.labels).double().mean() < 0.6


def test_an_unknown_split_of_synthetic_images_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        synthetic_images("test")
