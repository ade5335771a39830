"""Strong augmentation for tools that bring little of it: the changes of ``evaluate.py utility``, in numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

# the values of evaluation/experiments/augmentation.py, which needs torch
ZOOM = 1.25  # largest factor on lengths, and its inverse the smallest
BEND_POINTS, BEND = 5, 0.05  # control points per side; standard deviation of their shift, as a share of half a side
GAMMA, GAIN, OFFSET, CHANNEL_GAIN = 0.25, 0.2, 0.1, 0.08  # standard deviations
MOST_NOISE = 0.06  # standard deviation
BLUR_SHARE, MOST_BLUR = 0.3, 1.2  # share of the examples, pixels


def augment(image: np.ndarray, cells: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random turn, mirror, zoom and bending of both, then new gray values of the image.

    Args:
        image: (H, W, C) float32, black 0, white 1.
        cells: (H, W) instance map. What enters from outside is mirrored at the border.

    Returns:
        Arrays of the same shapes. Gray values are within 0 and 1.
    """
    places = _places(cells.shape, rng)
    moved = [ndimage.map_coordinates(image[..., c], places, order=1, mode="mirror") for c in range(image.shape[2])]
    labels = ndimage.map_coordinates(cells, places, order=0, mode="mirror")
    return _new_gray(np.stack(moved, axis=-1), rng), labels


def _places(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(2, H, W): row and column that each pixel comes from."""
    half = np.array(shape)[:, None, None] / 2
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")) - (half - 0.5)
    angle, zoom = rng.uniform(0, 2 * math.pi), ZOOM ** rng.uniform(-1, 1)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / zoom
    turn[:, 1] *= rng.choice([-1, 1])
    factors = [size / BEND_POINTS for size in shape]
    bend = np.stack([ndimage.zoom(rng.normal(0, BEND, (BEND_POINTS,) * 2), factors, mode="nearest") for _ in range(2)])
    return np.einsum("ij,jhw->ihw", turn, grid) + bend * half + (half - 0.5)


def _new_gray(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gamma, gain and offset of all channels, a gain of each, blur of some examples, and noise."""
    gray = image.clip(0, 1) ** math.exp(GAMMA * rng.normal())
    gains = np.exp(GAIN * rng.normal() + CHANNEL_GAIN * rng.normal(size=image.shape[2]))
    gray = gray * gains + OFFSET * rng.normal()
    if rng.random() < BLUR_SHARE:
        width = rng.uniform(0, MOST_BLUR)
        gray = ndimage.gaussian_filter(gray, (width, width, 0))
    gray = gray + MOST_NOISE * rng.random() * rng.normal(size=gray.shape)
    return gray.clip(0, 1).astype(np.float32)
