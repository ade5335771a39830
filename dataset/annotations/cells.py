"""Cells of one image from other programs, and the label image of these cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.draw import polygon2mask

from common.cells import are_noise, distinct
from dataset.decode import FileError

LARGEST_ID = 2**31 - 1
MANY_INSIDE = 3  # an entry that encloses so many other cells may be a region of interest
# The centre of a pixel that lies exactly on an outline belongs to one of the two sides, not to both.
_BESIDE_THE_LINE = 1e-6


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        top, left: row and column in the image of the first pixel of the mask. It may lie outside of the image.
        mask: (h, w) bool, the pixels of the cell.
        number: its id in the file, or None.
        name: name of its class, or empty.
        unusable: why the entry is no cell, such as "a line". Empty for a cell.
        has_nucleus: the file also holds an outline of its nucleus, which is not drawn.
    """

    top: int
    left: int
    mask: np.ndarray
    number: int | None = None
    name: str = ""
    unusable: str = ""
    has_nucleus: bool = False

    @classmethod
    def none(cls, unusable: str) -> Cell:
        """An entry of the file that encloses no pixels."""
        return cls(0, 0, np.zeros((0, 0), bool), unusable=unusable)


@dataclass
class CellCounts:
    """Counts of the cells of one image.

    Attributes:
        read: entries of the file.
        written: cells in the label image.
        overlapping: cells that share a pixel with another cell.
        outside: cells that reach beyond the image.
        enclosing: cells with several other cells inside, which may be regions.
        with_nucleus: cells with an outline of their nucleus, which is not drawn.
        dropped: reason -> number of entries that are not in the label image.
    """

    read: int = 0
    written: int = 0
    overlapping: int = 0
    outside: int = 0
    enclosing: int = 0
    with_nucleus: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: CellCounts) -> CellCounts:
        """Counts of both."""
        return CellCounts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __str__(self) -> str:
        words = [f"{self.read} cells read, {self.written} written"]
        words += [f"{count} dropped ({reason})" for reason, count in sorted(self.dropped.items())]
        if self.overlapping:
            words.append(f"{self.overlapping} overlap (the smaller cell keeps the pixels)")
        if self.outside:
            words.append(f"{self.outside} reach beyond the image")
        return ", ".join(words)


def rings_to_cell(
    rings: Sequence[np.ndarray], number: int | None = None, name: str = "", size: tuple[int, int] | None = None
) -> Cell:
    """A cell of the pixels with their centre inside the outline. A ring inside another ring is a hole.

    Args:
        rings: each (n, 2), x and y of the corners. The centre of the first pixel is at (0.5, 0.5), as in ImageJ and
            QuPath.
        number: id of the cell.
        name: name of its class.
        size: height and width of the image. Only one pixel beyond it is drawn of a large outline. None: all is drawn.
    """
    rings = [np.asarray(ring, np.float64) for ring in rings if len(ring) >= 3]
    points = np.concatenate(rings) if rings else np.zeros((0, 2))
    if not len(points):
        return Cell.none("no outline")
    if not np.isfinite(points).all() or np.abs(points).max() > 2**24:
        return Cell.none("coordinates that no image has")
    left, top = (math.floor(value) for value in points.min(axis=0))
    right, bottom = (math.ceil(value) for value in points.max(axis=0))
    if size is not None:
        if top > size[0] or left > size[1] or bottom < 0 or right < 0:
            row, column = min(max(top, -2), size[0] + 1), min(max(left, -2), size[1] + 1)  # any place outside
            return Cell(row, column, np.ones((1, 1), bool), number, name)
        top, left = max(top, -1), max(left, -1)
        bottom, right = min(bottom, size[0] + 1), min(right, size[1] + 1)
    mask = np.zeros((max(bottom - top, 1), max(right - left, 1)), bool)
    for ring in rings:
        mask ^= polygon2mask(mask.shape, ring[:, ::-1] - (top + 0.5 + _BESIDE_THE_LINE, left + 0.5 + _BESIDE_THE_LINE))
    return Cell(top, left, mask, number, name)


def check_size(path: Path, array: np.ndarray, size: tuple[int, int]) -> None:
    """Refuse a label image (H, W) or (H, W, C) of another height and width than its image.

    Raises:
        FileError: the sizes differ.
    """
    if array.shape[:2] != size:
        raise FileError(path, f"has {array.shape[1]} x {array.shape[0]} pixels, but its image {size[1]} x {size[0]}")


def labels_to_cells(labels: np.ndarray, names: Mapping[int, str] | None = None) -> list[Cell]:
    """Cells of a label image (H, W), 0 background, with their ids.

    Raises:
        ValueError: there are more ids than cells can be.
    """
    numbers = distinct(labels)
    if are_noise(len(numbers), labels.size):
        raise ValueError(f"has {len(numbers)} values in {labels.size} pixels, which cannot be cells")
    labels = labels.astype(np.int64, copy=False)
    numbers, compact = np.unique(labels, return_inverse=True)
    compact = compact.reshape(labels.shape)
    if len(numbers) and numbers[0] != 0:  # no background
        compact, numbers = compact + 1, np.concatenate([[0], numbers])
    return [
        Cell(place[0].start, place[1].start, compact[place] == index, int(number), (names or {}).get(int(number), ""))
        for index, (number, place) in enumerate(zip(numbers[1:], ndimage.find_objects(compact), strict=True), start=1)
    ]


def ids_of_names(names: Sequence[str]) -> list[int]:
    """Ids of cells: their names, if these are different whole numbers that fit a label image, else 1..n."""
    numbers = [int(name) if name.isdecimal() and len(name) < 20 else 0 for name in names]
    fit = len(set(numbers)) == len(numbers) and all(0 < number <= LARGEST_ID for number in numbers)
    return numbers if fit else list(range(1, len(names) + 1))


def numbered(cells: Sequence[Cell]) -> list[int]:
    """Ids of cells: the ids of the file if every cell has one, else 1..n in their order.

    Raises:
        ValueError: two cells have the same id, or an id does not fit into a label image.
    """
    numbers = [cell.number for cell in cells]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return list(range(1, len(cells) + 1))
    twice = [number for number, count in Counter(known).items() if count > 1]
    if twice:
        raise ValueError(f"has two cells of the id {twice[0]}")
    if known and not 0 < min(known) <= max(known) <= LARGEST_ID:
        raise ValueError(f"holds ids from {min(known)} to {max(known)}: 1 to {LARGEST_ID} are possible")
    return known


def draw_cells(
    cells: Iterable[Cell], shape: tuple[int, int], names: Sequence[str] | None = None, as_classes: bool = False
) -> tuple[np.ndarray, CellCounts]:
    """Draw all cells into one label image. If cells overlap, the smaller one keeps the pixels, so it does not vanish.

    Args:
        cells: cells in the order of the file.
        shape: height and width of the image.
        names: draw only cells of these classes. None: all cells.
        as_classes: draw the number of the class (its place in ``names``, from 1) instead of the id.

    Returns:
        Label image (H, W) uint16, or int32 if an id needs it, and the counts.

    Raises:
        ValueError: two cells have the same id, or an id does not fit into a label image.
    """
    everything = list(cells)
    counts = CellCounts(read=len(everything))
    dropped: Counter[str] = Counter(cell.unusable for cell in everything if cell.unusable)
    usable = [cell for cell in everything if not cell.unusable]
    counts.with_nucleus = sum(cell.has_nucleus for cell in usable)
    if names is not None:
        dropped["another class"] = sum(cell.name not in names for cell in usable)
        usable = [cell for cell in usable if cell.name in names]
    # The largest cell first. The smaller ones are drawn over it.
    in_order = sorted(zip(numbered(usable), usable, strict=True), key=lambda one: -np.count_nonzero(one[1].mask))
    placed: list[_Placed] = []
    for number, cell in in_order:
        one = _Placed(number, cell.name, *_inside(cell, shape))
        counts.outside += int(np.count_nonzero(one.inside) < np.count_nonzero(cell.mask))
        if one.inside.any():
            placed.append(one)
        else:
            dropped["outside of the image" if cell.mask.any() else "no pixel"] += 1
    drawn = np.zeros(shape, np.int32)  # place in ``placed`` of the cell that is seen, from 1
    claims = np.zeros(shape, np.uint16)  # number of cells with this pixel
    for place, one in enumerate(placed, start=1):
        drawn[one.part][one.inside] = place
        claims[one.part] += one.inside
    seen = np.bincount(drawn.ravel(), minlength=len(placed) + 1)[1:]  # visible pixels of each placed cell
    counts.written = int(np.count_nonzero(seen))
    counts.overlapping = sum(bool((claims[one.part][one.inside] > 1).any()) for one in placed)
    counts.enclosing = sum(_encloses_many(drawn, place, one, seen) for place, one in enumerate(placed, start=1))
    dropped["covered by smaller cells"] = len(placed) - counts.written
    counts.dropped = Counter({reason: count for reason, count in sorted(dropped.items()) if count})
    classes = {name: number for number, name in enumerate(names or (), start=1)}
    values = [0, *(classes[one.name] if as_classes else one.number for one in placed)]
    dtype = np.uint16 if max(values) < 2**16 else np.int32
    return np.array(values, dtype)[drawn], counts


@dataclass(frozen=True)
class _Placed:
    """A cell on the image: its id, its class, the part of the image under its mask, and the mask within this part."""

    number: int
    name: str
    part: tuple[slice, slice]
    inside: np.ndarray


def _encloses_many(drawn: np.ndarray, place: int, one: _Placed, seen: np.ndarray) -> bool:
    """Whether all visible pixels of several other cells lie in this one.

    Args:
        drawn: (H, W) place of the cell that is seen, from 1.
        place: place of this cell.
        one: this cell.
        seen: visible pixels of each cell.
    """
    found = drawn[one.part][one.inside]
    if (found == place).all():
        return False
    places, pixels = np.unique(found[(found > 0) & (found != place)], return_counts=True)
    return int(np.count_nonzero(pixels == seen[places - 1])) >= MANY_INSIDE


def _inside(cell: Cell, shape: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of the image under the mask of a cell, and the mask within the image."""
    height, width = cell.mask.shape
    top, left = max(cell.top, 0), max(cell.left, 0)
    bottom, right = max(min(cell.top + height, shape[0]), top), max(min(cell.left + width, shape[1]), left)
    inside = cell.mask[top - cell.top : bottom - cell.top, left - cell.left : right - cell.left]
    return (slice(top, bottom), slice(left, right)), inside
