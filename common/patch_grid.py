"""Differences of neighbouring gray values across the borders of a network's patches, and inside the patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Steps(NamedTuple):
    """Sums and counts of the absolute differences ("steps") of neighbouring pixels, over all channels."""

    border_sum: float = 0.0
    border_count: int = 0
    inside_sum: float = 0.0
    inside_count: int = 0

    def plus(self, other: Steps) -> Steps:
        return Steps(
            self.border_sum + other.border_sum,
            self.border_count + other.border_count,
            self.inside_sum + other.inside_sum,
            self.inside_count + other.inside_count,
        )

    @property
    def ratio(self) -> float | None:
        """Mean step across borders / mean step inside patches. None if there is no border or no step inside."""
        if self.border_count == 0 or self.inside_sum == 0:
            return None
        return (self.border_sum / self.border_count) / (self.inside_sum / self.inside_count)

    @property
    def inside(self) -> float | None:
        """Mean step inside patches. None if there is none."""
        return self.inside_sum / self.inside_count if self.inside_count else None


def image_steps(image: np.ndarray, patch: int) -> Steps:
    """Steps of one image. Its patches begin at the upper left corner.

    Args:
        image: (H, W) or (H, W, C), any number type.
        patch: side of a patch in pixels, at least 2.

    Raises:
        ValueError: the patch is smaller than 2 pixels, so it has no inside.
    """
    if patch < 2:
        raise ValueError(f"patches of {patch} pixel have no inside; a grid needs patches of at least 2 pixels")
    image = image.astype(np.float64)
    total = Steps()
    for axis in (0, 1):
        steps = np.moveaxis(np.abs(np.diff(image, axis=axis)), axis, 0)
        border = np.arange(1, len(steps) + 1) % patch == 0
        across, inside = steps[border], steps[~border]
        total = total.plus(Steps(float(across.sum()), across.size, float(inside.sum()), inside.size))
    return total


def grid_ratio(images: Sequence[np.ndarray], patch: int) -> float | None:
    """Grid ratio over the steps of several images; see :func:`image_steps`."""
    total = Steps()
    for image in images:
        total = total.plus(image_steps(image, patch))
    return total.ratio
