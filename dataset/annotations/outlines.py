"""Outlines of a region along the corners of its pixels, for ROIs and GeoJSON. They enclose exactly its pixels."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

Corner = tuple[int, int]  # x, y; the first pixel lies between (0, 0) and (1, 1)


def outlines(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Polygons of a region (H, W) bool: for each connected piece its outer ring, then the rings of its holes.

    Returns:
        For each piece, a list of rings. A ring is (n, 2) integer corners x, y, and does not repeat its first corner.
    """
    pieces, count = ndimage.label(mask)  # pixels that only share a corner belong to different pieces
    polygons = []
    for index, place in enumerate(ndimage.find_objects(pieces), start=1):
        offset = (place[1].start, place[0].start)
        rings = [ring + offset for ring in _rings(pieces[place] == index)]
        rings.sort(key=lambda ring: -abs(_area(ring)))
        polygons.append(rings)
    assert len(polygons) == count
    return polygons


def _rings(piece: np.ndarray) -> list[np.ndarray]:
    """Closed rings along the edges between inside and outside, with the inside on the right."""
    following = _edges(piece)
    rings = []
    while following:
        start = corner = min(following)
        step = (0, 0)
        ring = []
        while True:
            ends = following[corner]
            # If two pixels touch at a corner, turn left. Then the ring meets no corner twice.
            left = (corner[0] + step[1], corner[1] - step[0])
            after = ends.pop(ends.index(left) if left in ends else 0)
            if not ends:
                del following[corner]
            turn = (after[0] - corner[0], after[1] - corner[1])
            if turn != step:
                ring.append(corner)
            corner, step = after, turn
            if corner == start:
                break
        rings.append(np.array(ring))
    return rings


def _edges(piece: np.ndarray) -> dict[Corner, list[Corner]]:
    """Corner -> ends of the edges that begin there, with the inside on the right."""
    padded = np.pad(piece, 1)
    inside = padded[1:-1, 1:-1]
    sides = (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),  # outside above: from left to right
        (padded[1:-1, 2:], (1, 0), (1, 1)),  # at the right: down
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    following: dict[Corner, list[Corner]] = {}
    for neighbour, begin, end in sides:
        for row, column in np.argwhere(inside & ~neighbour).tolist():
            corner = (column + begin[0], row + begin[1])
            following.setdefault(corner, []).append((column + end[0], row + end[1]))
    return following


def _area(ring: np.ndarray) -> float:
    """Area of a ring, with a sign."""
    x, y = ring.T.astype(float)
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
