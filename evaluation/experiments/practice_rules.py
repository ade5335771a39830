"""The two rules of the practice loop: ignore pixels that were drawn wrongly, and draw hard masks again.

Source: Yang et al. 2023, "FreeMask", arXiv 2310.15160. There, the hardness of a mask follows from its classes. With one
class of cells, all masks would be equal. So here, the hardness of a mask is a segmenter's loss on its image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from evaluation.experiments.segmenter import IGNORE

IGNORE_FACTOR = 1.25  # times a class's mean loss on real images
MOST_DRAWS = 20  # of the hardest mask


class Scored(NamedTuple):
    """Loss of every pixel of an image, (H, W), and its classes, (H, W)."""

    losses: np.ndarray
    classes: np.ndarray


def class_mean_losses(images: Iterable[Scored], num_classes: int) -> list[float]:
    """Mean loss of the pixels of every class over real images; inf for a class that has none."""
    sums, counts = np.zeros(num_classes), np.zeros(num_classes)
    for losses, classes in images:
        known = classes != IGNORE
        sums += np.bincount(classes[known], losses[known], num_classes)
        counts += np.bincount(classes[known], minlength=num_classes)
    return [float(total / count) if count else float("inf") for total, count in zip(sums, counts, strict=True)]


def wrong_pixels(image: Scored, means: list[float], factor: float = IGNORE_FACTOR) -> np.ndarray:
    """(H, W) bool: pixels whose loss exceeds ``factor`` times the mean loss of their class on real images."""
    limits = factor * np.array([*means, *[np.inf] * (256 - len(means))])
    return image.losses > limits[image.classes]


def hardness(image: Scored) -> float:
    """Mean loss of the pixels that are not ignored. 0 if all are: an image that is entirely wrong is not hard."""
    known = image.classes != IGNORE
    return float(image.losses[known].mean()) if known.any() else 0.0


def plan_draws(found: Mapping[str, float], most: int = MOST_DRAWS) -> dict[str, int]:
    """How often to draw each mask: in proportion to its rank. The hardest ``most`` times, easy ones once.

    Args:
        found: mask -> hardness; equal values are ranked by name.
        most: draws of the hardest mask, 1 or more.
    """
    order = sorted(found, key=lambda name: (found[name], name))
    return {name: max(1, round(most * rank / len(order))) for rank, name in enumerate(order, start=1)}
