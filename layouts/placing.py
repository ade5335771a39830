"""Place pieces (cells or clusters of cells) on an empty field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from common.cells import connected_cells

LEAST_CELL_AREA = 6  # pixels; smaller remains at the border of an image or of a neighbour do not count as cells
OFF_MIDDLE = 0.05  # farthest that a single cell lies off the middle, as a fraction of the side of the field
POSITIONS_TRIED = 60  # positions to try per cell before giving up


@dataclass(frozen=True)
class Piece:
    """One cell, or a few touching cells, in a small array.

    Attributes:
        labels: (h, w) int32, 0 outside, 1..n the cells.
        level: (h, w) float32. If two cells overlap at a pixel, the lower level gets it. Simulated nuclei have 0 at the
            centre and 1 at the rim, so that the border is midway. Recombined cells have 0, so that the first one stays.
        classes: (h, w) class numbers of the cells' pixels, or None.
    """

    labels: np.ndarray
    level: np.ndarray
    classes: np.ndarray | None = None

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.labels))


class Field:
    """A field of view to fill with pieces. Pieces may cross its border, as cells do under a microscope.

    Args:
        height, width: size in pixels.
        gap: least number of background pixels between two pieces. 0 lets them touch.
        max_overlap: largest fraction of its visible area that a cell may lose to others. Only used if gap is 0.

    Attributes:
        instance_map: (height, width) int32, 0 background.
        class_map: (height, width) uint16, the classes of the pieces; 0 where they have none.
    """

    def __init__(self, height: int, width: int, gap: int, max_overlap: float):
        self.instance_map = np.zeros((height, width), dtype=np.int32)
        self.class_map = np.zeros((height, width), dtype=np.uint16)
        self.level = np.full((height, width), np.inf, dtype=np.float32)
        self.covered = 0
        self.centres: list[tuple[float, float, float]] = []  # row, column, radius of every piece on the field
        self._gap = gap
        self._max_overlap = max_overlap
        self._blocked = np.zeros((height, width), dtype=bool)
        self._area = np.zeros(1)  # per id: visible pixels at the time of placing
        self._lost = np.zeros(1)  # per id: pixels lost to others since then

    def _window(self, piece: Piece, top: int, left: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Slices of the field that the piece covers, and slices of the piece that are inside the field."""
        height, width = self.instance_map.shape
        piece_height, piece_width = piece.labels.shape
        first_row, first_column = min(max(top, 0), height), min(max(left, 0), width)
        rows = slice(first_row, max(first_row, min(top + piece_height, height)))  # empty where the piece lies outside
        columns = slice(first_column, max(first_column, min(left + piece_width, width)))
        part = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        return (rows, columns), part

    def meets_another(self, piece: Piece, top: int, left: int) -> bool:
        where, part = self._window(piece, top, left)
        return bool(np.any((piece.labels[part] > 0) & (self.instance_map[where] > 0)))

    def place(self, piece: Piece, top: int, left: int) -> bool:
        """Place the piece with its upper left corner at (top, left). If the rules forbid it, change nothing.

        Returns:
            Whether the piece was placed.
        """
        where, part = self._window(piece, top, left)
        labels, level = piece.labels[part], piece.level[part]
        inside = labels > 0
        if not inside.any() or np.any(inside & self._blocked[where]):
            return False
        there = self.instance_map[where]
        takes = inside & (level < self.level[where])
        count = int(piece.labels.max())
        area = np.bincount(labels[inside], minlength=count + 1)
        refused = np.bincount(labels[inside & ~takes], minlength=count + 1)
        robbed = np.bincount(there[takes], minlength=len(self._lost))
        robbed[0] = 0
        if np.any(refused > self._max_overlap * area) or np.any(self._lost + robbed > self._max_overlap * self._area):
            return False

        self.covered += int(np.count_nonzero(takes & (there == 0)))
        self._lost = np.concatenate([self._lost + robbed, refused[1:]])
        there[takes] = labels[takes] + len(self._area) - 1  # `there` is a view: this writes the field
        self.level[where][takes] = level[takes]
        if piece.classes is not None:
            self.class_map[where][takes] = piece.classes[part][takes]
        self._area = np.concatenate([self._area, area[1:]])
        if self._gap:
            self._block(piece, top, left)
        height, width = piece.labels.shape
        self.centres.append((top + height / 2, left + width / 2, math.sqrt(piece.area / math.pi)))
        return True

    def _block(self, piece: Piece, top: int, left: int) -> None:
        """Block the piece and `gap` pixels around it for other pieces."""
        halo = np.pad(piece.labels > 0, self._gap)
        halo = ndimage.binary_dilation(halo, np.ones((3, 3), dtype=bool), iterations=self._gap)
        around = Piece(halo.astype(np.int32), piece.level)
        where, part = self._window(around, top - self._gap, left - self._gap)
        self._blocked[where] |= halo[part]


def place_anywhere(field: Field, piece: Piece, rng: np.random.Generator, alone: bool = False) -> bool:
    """Try uniformly random positions. Positions across the border count, too, so that no pixel is preferred.

    Args:
        alone: only accept positions where the piece covers no other piece, even if the field's rules allow overlap.
    """
    height, width = field.instance_map.shape
    piece_height, piece_width = piece.labels.shape
    tops = rng.integers(1 - piece_height, height, POSITIONS_TRIED).tolist()
    lefts = rng.integers(1 - piece_width, width, POSITIONS_TRIED).tolist()
    return any(
        not (alone and field.meets_another(piece, top, left)) and field.place(piece, top, left)
        for top, left in zip(tops, lefts, strict=True)
    )


def box_of(piece: Piece) -> tuple[slice, slice]:
    """The rows and columns that hold the cells of the piece."""
    return ndimage.find_objects((piece.labels > 0).astype(int))[0]


def fits_whole(field: Field, piece: Piece) -> bool:
    """Whether the piece fits into the field without touching its border."""
    return all(
        own.stop - own.start <= length - 2 for length, own in zip(field.instance_map.shape, box_of(piece), strict=True)
    )


def place_in_middle(field: Field, piece: Piece, rng: np.random.Generator) -> bool:
    """Place a piece about the middle of an empty field, whole if it fits. False if none of its pixels lies there."""
    corner = []
    for length, own in zip(field.instance_map.shape, box_of(piece), strict=True):
        room = length - (own.stop - own.start)  # pixels beside the piece
        first = round(room / 2 + rng.uniform(-OFF_MIDDLE, OFF_MIDDLE) * length)
        corner.append((min(max(first, 1), room - 1) if room > 1 else room // 2) - own.start)
    return field.place(piece, *corner)


def place_beside_another(field: Field, piece: Piece, rng: np.random.Generator) -> bool:
    """Move the piece from a random direction towards another one until they meet, then a little further."""
    height, width = piece.labels.shape
    radius = math.sqrt(piece.area / math.pi)
    for _ in range(POSITIONS_TRIED // 6):
        row, column, other_radius = field.centres[rng.integers(len(field.centres))]
        angle, press = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.25) * radius
        towards = [row - height / 2, column - width / 2, math.sin(angle), math.cos(angle)]
        distance = 1.6 * (radius + other_radius)
        while distance > 0 and not field.meets_another(piece, *_shifted(towards, distance)):
            distance -= 1
        if field.place(piece, *_shifted(towards, distance - press)):
            return True
    return False


def _shifted(towards: list[float], distance: float) -> tuple[int, int]:
    row, column, down, right = towards
    return round(row + distance * down), round(column + distance * right)


def fill(
    field: Field,
    rng: np.random.Generator,
    foreground: float,
    draw_piece: Callable[[], Piece],
    place: Callable[[Field, Piece, np.random.Generator], bool],
    before_piece: Callable[[float], None] = lambda share: None,
) -> None:
    """Place pieces until they cover the fraction `foreground` of the field, or until no more piece fits.

    Pieces are chosen in batches and placed from large to small. Any other order would favour small pieces, which fit
    into the remaining gaps. New batches replace the area that the border cut off and the pieces that found no place.
    ``before_piece`` is called with the share of the work that is done; an exception that it raises ends the work.
    """
    failed_rounds = 0
    while failed_rounds < 3:
        batch = _draw_batch(rng, foreground * field.instance_map.size - field.covered, draw_piece)
        if not batch:
            return
        placed = 0
        for piece in sorted(batch, key=lambda piece: -piece.area):
            before_piece(min(1.0, field.covered / (foreground * field.instance_map.size)))
            placed += place(field, piece, rng)
        failed_rounds = 0 if placed else failed_rounds + 1


def _draw_batch(rng: np.random.Generator, missing: float, draw_piece: Callable[[], Piece]) -> list[Piece]:
    """Random pieces with a total area of `missing` on average. The last piece is kept at random to reach this mean."""
    batch = []
    while missing > 0:
        piece = draw_piece()
        if piece.area > missing and rng.uniform(0, piece.area) > missing:
            break
        batch.append(piece)
        missing -= piece.area
    return batch


def tidy(instance_map: np.ndarray) -> np.ndarray:
    """Keep the largest connected part of every cell, drop tiny ones, and number the cells 1..n in the order of ids.

    Args:
        instance_map: (H, W) int, 0 background.

    Returns:
        (H, W) int32.
    """
    tidied = np.zeros(instance_map.shape, dtype=np.int32)
    number = 0
    for cell_id, where in enumerate(ndimage.find_objects(instance_map), start=1):
        if where is None:
            continue
        parts = connected_cells(instance_map[where] == cell_id)
        areas = np.bincount(parts.ravel())[1:]
        if areas.max() >= LEAST_CELL_AREA:
            number += 1
            tidied[where][parts == areas.argmax() + 1] = number
    return tidied
