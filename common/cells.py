"""Instance maps: (H, W) integers, 0 background, one id for each cell."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from skimage.measure import label
from skimage.segmentation import relabel_sequential

LEAST_CELL_PIXELS = 4  # a mean cell below this size is noise, and millions of them would fill the memory
FEW_IDS = 2**16  # so many fit into any memory

# Slices of a map, and of its neighbours to the right, below, below right and below left: all pairs of neighbours.
NEIGHBOURS = (
    (np.s_[:, :-1], np.s_[:, 1:]),
    (np.s_[:-1, :], np.s_[1:, :]),
    (np.s_[:-1, :-1], np.s_[1:, 1:]),
    (np.s_[:-1, 1:], np.s_[1:, :-1]),
)


def meetings(instance_map: np.ndarray) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice], np.ndarray]]:
    """Where two cells touch, at a side or a corner of a pixel.

    Yields:
        The slices of each of ``NEIGHBOURS``, and which pixels of the first (bool) belong to a cell whose neighbour in
        the second belongs to another cell.
    """
    for first, second in NEIGHBOURS:
        one, other = instance_map[first], instance_map[second]
        yield first, second, (one != other) & (one > 0) & (other > 0)


def are_noise(count: int, pixels: int) -> bool:
    """Whether there are more ids than cells can be on this number of pixels."""
    return count > FEW_IDS and count * LEAST_CELL_PIXELS > pixels


def distinct(values: np.ndarray) -> np.ndarray:
    """(n,) sorted, each value once. Takes twice the memory of the array; ``np.unique`` of numpy 2.3 takes ten times."""
    ordered = np.sort(values, axis=None)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


def connected_cells(mask: np.ndarray) -> np.ndarray:
    """Instance map of a mask by connected components. Pixels that share a corner belong together.

    Args:
        mask: (H, W) bool, or numbers: 0 is background, all others are cell.

    Returns:
        (H, W) int32, 0 background, cells 1..n in the order of their first pixel.
    """
    return label(mask != 0, connectivity=2).astype(np.int32, copy=False)


def count_pieces(mask: np.ndarray) -> int:
    """Connected pieces of a mask (H, W) that are no crumbs (a tenth of the largest one)."""
    areas = np.bincount(connected_cells(mask).ravel())[1:]
    return int(np.count_nonzero(areas * 10 > areas.max(initial=0)))


def without_gaps(labels: np.ndarray) -> np.ndarray:
    """The same cells, numbered 1..n in the order of their ids.

    Args:
        labels: (H, W) whole numbers of any type, at least 0.

    Returns:
        (H, W) int32.
    """
    return relabel_sequential(labels.astype(np.int64, copy=False))[0].astype(np.int32, copy=False)


def as_ids(labels: np.ndarray) -> np.ndarray:
    """An instance map of whole numbers (H, W) as integers. Fiji, for one, stores ids as 32-bit floats."""
    return labels if labels.dtype.kind in "ui" else labels.astype(np.int64)


def touches_border(labels: np.ndarray) -> np.ndarray:
    """Sorted ids of the cells with a pixel in the first or last row or column.

    Args:
        labels: (H, W) integers, 0 background.
    """
    edges = [labels[0], labels[-1], labels[:, 0], labels[:, -1]]
    return np.setdiff1d(np.concatenate(edges), [0])
