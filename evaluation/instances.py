"""Agreement of single cells: matching, average precision, panoptic quality, counts; and of boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.ndimage
import scipy.sparse

from layouts.recombine import touching_pairs

AP_THRESHOLDS = (0.5, 0.75, 0.9)


def overlap_table(predicted: np.ndarray, truth: np.ndarray) -> scipy.sparse.coo_array:
    """IoU of every predicted with every true cell. Only pairs that overlap have an entry, in the order of their rows.

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
    ids_predicted, predicted, areas_predicted = np.unique(predicted, return_inverse=True, return_counts=True)
    ids_truth, truth, areas_truth = np.unique(truth, return_inverse=True, return_counts=True)
    pairs, counts = np.unique(predicted.ravel() * len(ids_truth) + truth.ravel(), return_counts=True)
    rows, columns = np.divmod(pairs, len(ids_truth))
    iou = counts / (areas_predicted[rows] + areas_truth[columns] - counts)
    cells = (ids_predicted[rows] != 0) & (ids_truth[columns] != 0)
    number_predicted, number_truth = (np.cumsum(ids != 0) - 1 for ids in (ids_predicted, ids_truth))
    places = number_predicted[rows[cells]], number_truth[columns[cells]]
    return scipy.sparse.coo_array((iou[cells], places), shape=(np.sum(ids_predicted != 0), np.sum(ids_truth != 0)))


@dataclass
class InstanceCounts:
    """Matches of predicted and true cells, summed over images.

    - ``ap(t)`` is TP / (TP + FP + FN) over the matches with IoU >= t, as Cellpose and StarDist report it
      (Stringer et al. 2021, doi:10.1038/s41592-020-01018-x).
    - ``pq`` is the sum of the IoU of all matches with IoU > 0.5 over TP + FP / 2 + FN / 2
      (Kirillov et al. 2019, arXiv 1801.00868).

    No cell has an IoU above 0.5 with two others, so these matches need no assignment. A cell can have exactly 0.5 with
    two others, if it is made of them both in equal parts. It then matches one of them.
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
        high = table.data >= 0.5
        predicted_ids, true_ids, overlaps = table.row[high], table.col[high], table.data[high]
        first = np.unique(predicted_ids, return_index=True)[1]  # one match for each predicted cell
        first = first[np.unique(true_ids[first], return_index=True)[1]]  # and for each true cell
        self.matched += overlaps[first].tolist()

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
        return sum(value for value in self.matched if value > 0.5) / total if total else None

    @property
    def count_error(self) -> float | None:
        """Mean absolute difference of the number of cells per image."""
        return float(np.mean(np.abs(self.count_errors))) if self.count_errors else None


def touching_cells(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The true cells that touch another one, and the predicted cells that belong to them.

    A predicted cell belongs to the true cell that it shares most pixels with. AP of the two maps is the AP of touching
    cells: a merged pair misses at least one cell, and a prediction on a lone cell or on background counts nowhere.

    Args:
        predicted: (H, W) int, 0 background.
        truth: (H, W) int, likewise.

    Returns:
        predicted and truth without the other cells.
    """
    touching = np.unique(touching_pairs(truth))
    kept_truth = np.where(np.isin(truth, touching), truth, 0)
    both = (predicted > 0) & (truth > 0)
    pairs, counts = np.unique(np.stack([predicted[both], truth[both]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    ids, first = np.unique(pairs[0, order], return_index=True)  # the first is the largest overlap
    of_touching = ids[np.isin(pairs[1, order][first], touching)]
    return np.where(np.isin(predicted, of_touching), predicted, 0), kept_truth


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
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of different shapes: {predicted.shape} and {truth.shape}")
    if predicted.dtype != bool or truth.dtype != bool:
        raise ValueError(f"masks must be bool, got {predicted.dtype} and {truth.dtype}")
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 1.0
