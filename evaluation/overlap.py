"""Overlap of two masks."""

from __future__ import annotations

import numpy as np


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Dice coefficient 2 |A and B| / (|A| + |B|) of two masks.

    Source: Dice 1945, Ecology 26(3).

    Args:
        predicted: (H, W) bool.
        truth: (H, W) bool.

    Returns:
        Value in [0, 1]; 1 where both are empty.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(predicted, truth)
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0


def iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks; 1 where both are empty.

    Args:
        predicted: (H, W) bool.
        truth: (H, W) bool.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(predicted, truth)
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def _check_shapes(predicted: np.ndarray, truth: np.ndarray) -> None:
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of different shapes: {predicted.shape} and {truth.shape}")
    if predicted.dtype != bool or truth.dtype != bool:
        raise ValueError(f"masks must be bool, got {predicted.dtype} and {truth.dtype}")
