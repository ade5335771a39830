"""Agreement of single cells: matching, average precision, panoptic quality, counts; and of boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.ndimage

AP_THRESHOLDS = (0.5, 0.75, 0.9)
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


def connected_cells(cells: np.ndarray) -> np.ndarray:
    """Instance map of a mask by connected components (eight neighbours): touching cells become one.

    Args:
        cells: (H, W) bool.

    Returns:
        (H, W) int, 0 background, 1..n.
    """
    return scipy.ndimage.label(cells, structure=EIGHT_NEIGHBOURS)[0]


def overlap_table(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """IoU of every predicted with every true cell.

    Args:
        predicted: (H, W) int, 0 background, any positive ids.
        truth: (H, W) int, likewise.

    Returns:
        (predicted cells, true cells) float64 in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"instance maps of different shapes: {predicted.shape} and {truth.shape}")
    ids_predicted, predicted = np.unique(predicted, return_inverse=True)
    ids_truth, truth = np.unique(truth, return_inverse=True)
    table = np.zeros((len(ids_predicted), len(ids_truth)))
    np.add.at(table, (predicted.ravel(), truth.ravel()), 1)
    union = table.sum(axis=1, keepdims=True) + table.sum(axis=0, keepdims=True) - table
    return (table / np.maximum(union, 1))[ids_predicted != 0][:, ids_truth != 0]


@dataclass
class InstanceCounts:
    """Matches of predicted and true cells, summed over images.

    Two cells match where their IoU is above 0.5, which no cell can have with two others, so that no assignment is
    needed. ``ap(t)`` is TP / (TP + FP + FN) over the matches with IoU >= t (as Cellpose and StarDist report it;
    Stringer et al. 2021, doi:10.1038/s41592-020-01018-x), ``pq`` is the sum of matched IoU over TP + FP / 2 + FN / 2
    (Kirillov et al. 2019, arXiv 1801.00868).
    """

    predicted: int = 0
    true: int = 0
    count_errors: list[int] = field(default_factory=list)
    matched: list[float] = field(default_factory=list)

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Count one image: two (H, W) instance maps."""
        table = overlap_table(predicted, truth)
        self.predicted += table.shape[0]
        self.true += table.shape[1]
        self.count_errors.append(table.shape[0] - table.shape[1])
        self.matched += table[table > 0.5].tolist()

    def ap(self, threshold: float) -> float | None:
        """Average precision at one IoU threshold of at least 0.5; None without any cell.

        Raises:
            ValueError: the threshold is below 0.5, where matches are not unique.
        """
        if threshold < 0.5:
            raise ValueError(f"threshold {threshold} is below 0.5, where matches are not unique")
        hits = sum(value >= threshold for value in self.matched)
        total = self.predicted + self.true - hits
        return hits / total if total else None

    @property
    def pq(self) -> float | None:
        """Panoptic quality of the one class cell; None without any cell."""
        total = (self.predicted + self.true) / 2
        return sum(self.matched) / total if total else None

    @property
    def count_error(self) -> float | None:
        """Mean absolute difference of the number of cells per image."""
        return float(np.mean(np.abs(self.count_errors))) if self.count_errors else None


def boundary(cells: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch its outside (four neighbours); the image's edge is no boundary. (H, W) bool."""
    return cells & ~scipy.ndimage.binary_erosion(cells, border_value=1)


def boundary_f(predicted: np.ndarray, truth: np.ndarray, tolerance: float) -> float | None:
    """F-score of the boundary pixels that have one of the other mask within ``tolerance`` pixels.

    Source: Csurka et al. 2013, BMVC, "What is a good evaluation measure for semantic segmentation?".

    Args:
        predicted: (H, W) bool.
        truth: (H, W) bool.
        tolerance: distance in pixels up to which a boundary pixel counts as met.

    Returns:
        Value in [0, 1]; None where neither mask has a boundary.
    """
    first, second = boundary(predicted), boundary(truth)
    if not first.any() and not second.any():
        return None
    if not first.any() or not second.any():
        return 0.0
    precision = float((scipy.ndimage.distance_transform_edt(~second)[first] <= tolerance).mean())
    recall = float((scipy.ndimage.distance_transform_edt(~first)[second] <= tolerance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Mean without the None entries; None where nothing is left."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


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
