"""Synthetic images of ten classes, drawn by code: data for every machine without a network."""

import colorsys
import math

import numpy as np
import torch
from tqdm.auto import tqdm

from convnext_min.data.images import ImageSet


def synthetic_images(split: str, size: int = 64, number: int | None = None) -> ImageSet:
    """Draw images of ten classes, five shapes and five textures; the same images on every call.

    Place, scale, angle (up to 30 degrees), colours, background, clutter and noise are random. `number` is 2,000 for
    "train" and 500 for "val" by default; a smaller number gives the first of them. Classes alternate, so every slice is
    balanced. Raises ValueError for an unknown `split`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    number = number or {"train": 2000, "val": 500}[split]
    images = torch.empty(number, size, size, 3, dtype=torch.uint8)
    for index in tqdm(range(number), "drawing", unit="image", delay=2):
        rng = np.random.default_rng((split == "val", index))
        images[index] = torch.from_numpy(_draw(PATTERNS[index % len(PATTERNS)], size, rng))
    labels = torch.arange(number) % len(PATTERNS)
    source = f"synthetic images, {split}: {number:,} drawn images at {size}x{size}"
    return ImageSet(images.permute(0, 3, 1, 2), labels, PATTERNS, source)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v, math.sqrt(3) / 2 * np.abs(u) - v / 2) - 0.5


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    turn = np.abs(np.arctan2(v, u) % (math.tau / 5) - math.pi / 5)  # 0 at a notch, pi / 5 at a point
    radius = np.hypot(u, v)
    return 0.834 * (radius * np.cos(turn) - 0.42) - 0.552 * radius * np.sin(turn)  # the line from a notch to a point


def _dots(u: np.ndarray, v: np.ndarray, waves: float) -> np.ndarray:
    cell = 1.5 * math.pi / waves
    return np.hypot(u % cell - cell / 2, v % cell - cell / 2) - 0.33 * cell


# Signed distance, negative inside, of points (u, v) from the edge of an object of radius 1 around (0, 0). Textures have
# about `waves` / 3 periods across the object.
SHAPES = {
    "circle": lambda u, v: np.hypot(u, v) - 0.9,
    "triangle": _triangle,
    "star": _star,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.2,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.75 - np.hypot(u - 0.5, v)),
}
TEXTURES = {
    "stripes": lambda u, v, waves: np.sin(waves * u) / waves,
    "checkerboard": lambda u, v, waves: np.sin(waves * u) * np.sin(waves * v) / waves,
    "dots": _dots,
    "spiral": lambda u, v, waves: np.sin(waves * np.hypot(u, v) + np.arctan2(v, u)) / waves,
    "waves": lambda u, v, waves: np.sin(waves * (v + 0.3 * np.sin(5 * u))) / waves,
}
PATTERNS = (*SHAPES, *TEXTURES)


def _draw(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one image of a shape or texture: uint8 (size, size, 3)."""
    uniform = rng.uniform
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = axis[None, :], axis[:, None]

    def rotated(cx: float, cy: float, most: float = math.pi) -> tuple[np.ndarray, np.ndarray]:
        """Return coordinates around (cx, cy), rotated by a random angle between -`most` and `most`."""
        cos, sin = math.cos(angle := uniform(-most, most)), math.sin(angle)
        return cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)

    def color(value: float, saturation: tuple[float, float]) -> np.ndarray:
        """Return a random hue as red, green and blue in [0, 1]."""
        return np.array(colorsys.hsv_to_rgb(uniform(0, 1), uniform(*saturation), value), np.float32)

    def paint(distance: np.ndarray, ink: np.ndarray) -> None:
        """Paint `ink` where `distance` (in half widths of the picture) is negative, with a soft edge of one pixel."""
        nonlocal picture
        cover = np.clip(0.5 - distance * (size / 2), 0, 1)[..., None]
        picture = picture + cover * (ink - picture)

    # Background: one colour, with a soft pattern of light and shade
    value = uniform(0, 0.4)
    light = sum(uniform(0, 0.08) * np.sin(uniform(1, 6) * rotated(0, 0)[0] + uniform(0, math.tau)) for _ in range(3))
    picture = color(0.15 + 0.8 * value, (0.1, 0.7)) * (1 + light[..., None])

    # Clutter: small bars and ellipses
    for _ in range(rng.integers(1, 5)):
        u, v = rotated(uniform(-1, 1), uniform(-1, 1))
        a, b = uniform(0.05, 0.2), uniform(0.02, 0.1)
        bar = np.maximum(np.abs(u) - a, np.abs(v) - b)
        ellipse = (np.hypot(u / a, v / b) - 1) * min(a, b)
        paint(bar if uniform(0, 1) < 0.5 else ellipse, color(uniform(0.1, 1), (0.1, 0.8)))

    # The object, lighter than the background
    radius = uniform(0.5, 0.85) if name in SHAPES else uniform(0.7, 0.95)
    u, v = (
        axis / radius for axis in rotated(uniform(radius - 1, 1 - radius), uniform(radius - 1, 1 - radius), math.pi / 6)
    )
    if name in SHAPES:
        distance = SHAPES[name](u, v)
    else:  # a patch of the texture, its shape between a disc and a square
        power = uniform(2, 8)
        patch = (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power) - 1
        distance = np.maximum(TEXTURES[name](u, v, uniform(6, 11)), patch)
    ink = color(0.15 + 0.8 * (value + uniform(0.4, 0.6)), (0.2, 0.9))
    paint(distance * radius, ink * (1 + 0.15 * u[..., None]))

    picture = picture + uniform(0, 0.05) * rng.standard_normal(picture.shape, np.float32)
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8)
