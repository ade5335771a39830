"""Facts about the values of one mask. ``dataset/masks.py`` decides from them how to read a folder."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage

from common.cells import are_noise, count_pieces, distinct
from dataset.decode import FileError
from dataset.names import short_names

FEW_VALUES = 16
MAX_UNEQUAL_SHARE = 0.2  # of the pairs of pixels above 0, in masks of constant pieces
RIM = 0.9  # fraction of the pixels of a rim that have both a lower and a higher value beside them
BAND_PIXELS = 2**18  # looked at together


@dataclass(frozen=True)
class MaskStats:
    """Facts about one mask. "Pairs" are pixels beside or below each other that are both above 0."""

    name: str
    dtype: np.dtype
    planes: int  # K of a (K, H, W) stack, 0 for a flat mask
    from_folder: bool  # one file per nucleus
    is_whole: bool  # no fractions
    minimum: float
    maximum: float
    distinct: int
    values: frozenset[float]  # the distinct values if they are few, else empty
    near_ends: float = 1.0  # fraction of pixels close to 0 or to the largest value
    gray_share: float = 0.0  # fraction of the pixels clearly above 0 that are clearly below the largest value
    gray_flat: float = 0.0  # the same, of those whose four neighbours have the same value
    sum_error: float = 0.0  # stacks: largest |sum over K - 1|
    pairs: int = 0
    unequal_pairs: int = 0
    step_pairs: int = 0  # unequal pairs of two values that are adjacent in the sorted list of values
    ids: int = 0
    area: int = 0  # pixels above 0
    main_area: int = 0  # pixels in the largest connected piece of each id
    table: str = ""  # kind of the file's colour table, see read_mask_and_table
    # Of stacks, the pixels count that are no background by plane 0: their value is 1.
    frame: float = 0.0  # fraction of the border's pixels with the border's most frequent value, if this is not 0
    frame_area: float = 0.0  # fraction of all pixels with this value
    frame_value: float = 0.0  # this value
    checksum: int = 0  # of the pixels
    filled: float = 1.0  # area with holes filled, as a multiple of the area
    pieces: int = 0  # masks of one id: its pieces, without crumbs
    cell_area: float = 0.0  # mean number of pixels of a cell: of an id, or of a piece in masks of one id
    rims: tuple[float, ...] = ()  # few values: those that only form thin rims between lower and higher ones

    def to_plain(self) -> dict[str, Any]:
        """Plain types for JSON. Leaves out fields with their default value."""
        kept = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}
        return kept | {"dtype": str(self.dtype), "values": sorted(self.values)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> MaskStats:
        """The inverse of :meth:`to_plain`."""
        return cls(**plain | {"dtype": np.dtype(plain["dtype"]), "values": frozenset(plain["values"])})


def named_apart(stats: Iterable[MaskStats], paths: Sequence[Path]) -> list[MaskStats]:
    """The facts, named by their files so that the names differ: see ``short_names``."""
    return [replace(one, name=name) for one, name in zip(stats, short_names(paths), strict=True)]


def mask_stats(file: str | Path, mask: np.ndarray, from_folder: bool = False, table: str = "") -> MaskStats:
    """Facts about one mask.

    Args:
        file: for messages.
        mask: (H, W) or (K, H, W) from ``read_mask``.
        from_folder: whether the mask was put together from one file per nucleus.
        table: kind of the file's colour table.

    Raises:
        FileError: there are more ids than cells can be.
    """
    narrow = mask.dtype in (np.uint8, np.uint16)  # counting is several times faster than sorting
    values = np.flatnonzero(np.bincount(mask.ravel())) if narrow else distinct(mask)
    is_whole = mask.dtype.kind in "ui" or bool((values == np.round(values)).all())
    if is_whole and are_noise(len(values), mask.size):
        raise FileError(file, f"has {len(values)} values in {mask.size} pixels, which cannot be cells or classes")
    facts: dict[str, Any] = {
        "dtype": mask.dtype,
        "planes": len(mask) if mask.ndim == 3 else 0,
        "is_whole": is_whole,
        "minimum": float(values[0]),
        "maximum": float(values[-1]),
        "distinct": len(values),
        "values": frozenset(values.tolist()) if len(values) <= FEW_VALUES else frozenset(),
    }
    if mask.ndim == 3:
        total = mask.sum(axis=0, dtype=np.float64) / certainty(mask.dtype, facts["maximum"])
        facts["sum_error"] = float(np.abs(total - 1).max())
    elif facts["is_whole"] and len(values) > 2 and values[0] >= 0:
        facts.update(_grays(mask, facts["maximum"] / 16))
        facts.update(_label_evidence(mask, values))
        if len(values) <= FEW_VALUES:
            facts["rims"] = _rims(mask, values)
        facts["cell_area"] = facts["area"] / max(facts["ids"], 1)
    facts["checksum"] = zlib.crc32(np.ascontiguousarray(mask).data)
    if mask.ndim == 2:
        facts.update(_frame(mask))
        if facts["is_whole"] and len(values) > 1 and values[0] == 0:
            facts["filled"] = _filled(mask)
            if len(values) == 2:
                facts["pieces"] = count_pieces(mask)
                facts["cell_area"] = np.count_nonzero(mask) / max(facts["pieces"], 1)
    elif len(mask) > 1:
        facts.update(_frame((mask[0] < certainty(mask.dtype, facts["maximum"]) / 2).astype(np.uint8)))
    return MaskStats(name=Path(file).name, from_folder=from_folder, table=table, **facts)


def _grays(mask: np.ndarray, near: float) -> dict[str, float]:
    """Facts that tell soft edges and blurred numbers from hard masks. Values within ``near`` of an end are not gray."""
    above = grays = flat = 0
    for start, rows in _bands(mask):
        gray = (rows > near) & (rows < 15 * near)
        above += int(np.count_nonzero(rows > near))
        grays += int(np.count_nonzero(gray))
        around = mask[max(start - 1, 0) : start + len(rows) + 1]  # a row of overlap, so that all pixels are looked at
        middle = around[1:-1, 1:-1]
        same = (middle > near) & (middle < 15 * near)
        for beside in (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]):
            same &= middle == beside
        flat += int(np.count_nonzero(same))
    return {"near_ends": 1 - grays / mask.size, "gray_share": grays / max(above, 1), "gray_flat": flat / max(above, 1)}


def _rims(mask: np.ndarray, values: np.ndarray) -> tuple[float, ...]:
    """Values that a smoothing resize leaves between two others: never 3 pixels wide, lower and higher ones beside."""
    flat = scipy.ndimage.minimum_filter(mask, 3) == scipy.ndimage.maximum_filter(mask, 3)
    lowest, highest = scipy.ndimage.minimum_filter(mask, 5), scipy.ndimage.maximum_filter(mask, 5)
    rims = []
    for value in values[1:-1]:
        here = mask == value
        between = (lowest < value) & (highest > value) & here
        if not (here & flat).any() and between.sum() > RIM * here.sum():
            rims.append(float(value))
    return tuple(rims)


def _frame(mask: np.ndarray) -> dict[str, float]:
    """Facts on the border's most frequent value, if it is not 0. They reveal swapped background and cells."""
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    values, counts = np.unique(border, return_counts=True)
    value = values[counts.argmax()]
    if value <= 0:
        return {}
    area = float(np.mean(mask == value))
    return {"frame": float(counts.max() / border.size), "frame_area": area, "frame_value": float(value)}


def _filled(mask: np.ndarray) -> float:
    """Area of the cells with their holes filled, as a multiple of their area."""
    background, count = scipy.ndimage.label(mask == 0)
    areas = np.bincount(background.ravel(), minlength=count + 1)
    edges = np.concatenate([background[0], background[-1], background[:, 0], background[:, -1]])
    areas[edges] = 0  # open to the border, so no hole
    cells = np.count_nonzero(mask)
    return float((cells + areas[1:].sum()) / cells)


def _bands(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """An array (H, W) in bands of rows, each with its first row. What is computed of a band takes little memory."""
    step = max(1, BAND_PIXELS // array.shape[-1])
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def _label_evidence(mask: np.ndarray, values: np.ndarray) -> dict[str, int]:
    """Facts that tell whether a mask holds numbered cells. ``dataset/masks.py`` has the thresholds."""
    pairs = unequal_pairs = step_pairs = 0
    inside = mask > 0  # False between touching regions, so that connected components are regions of one value
    for start, rows in _bands(mask):
        below = mask[start + 1 : start + 1 + len(rows)]
        part = inside[start : start + len(rows)]
        for first, second, cut in ((rows[:, :-1], rows[:, 1:], part[:, :-1]), (rows[: len(below)], below, part)):
            both = (first > 0) & (second > 0)
            unequal = both & (first != second)
            ranks = np.searchsorted(values, first[unequal]), np.searchsorted(values, second[unequal])
            pairs += int(np.count_nonzero(both))
            unequal_pairs += int(np.count_nonzero(unequal))
            step_pairs += int(np.count_nonzero(np.abs(ranks[0] - ranks[1]) == 1))
            cut[: len(unequal)][unequal] = False
    areas, first_pixels = _regions(inside)
    main_areas = np.zeros(len(values), np.int32)
    np.maximum.at(main_areas, np.searchsorted(values, mask.ravel()[first_pixels]), areas)
    return {
        "pairs": pairs,
        "unequal_pairs": unequal_pairs,
        "step_pairs": step_pairs,
        "ids": int(np.count_nonzero(values > 0)),
        "area": int(np.count_nonzero(inside)),
        "main_area": int(main_areas.sum()),
    }


def _regions(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area and first pixel (in the flat array) of each connected piece of (H, W) bool: (n,) int32 each."""
    pieces, count = scipy.ndimage.label(inside)
    areas, first_pixels = np.zeros(count + 1, np.int32), np.full(count + 1, -1, np.int32)
    for start, rows in _bands(pieces):
        found, at, here = np.unique(rows, return_index=True, return_counts=True)
        areas[found] += here.astype(np.int32)
        new = first_pixels[found] < 0
        first_pixels[found[new]] = at[new] + start * pieces.shape[1]
    return areas[1:], first_pixels[1:]


def are_patchy(stats: Sequence[MaskStats]) -> bool:
    """Whether the masks consist of pieces of constant value."""
    return sum(one.unequal_pairs for one in stats) <= MAX_UNEQUAL_SHARE * sum(one.pairs for one in stats)


def few_values(stats: Sequence[MaskStats]) -> frozenset[float] | None:
    """The distinct values of all masks. None if a mask has many values."""
    return frozenset().union(*(one.values for one in stats)) if all(one.values for one in stats) else None


def listed(values: Sequence[float]) -> str:
    """Values as a Python tuple."""
    return f"({', '.join(f'{value:g}' for value in values)})"


def full_scale(largest: float) -> float:
    """Value of certainty: the largest value of the storage type, not of one folder, so that folders agree."""
    return next((full for full in (1.0, 255.0, 65535.0) if largest <= full), largest)


def certainty(dtype: np.dtype, largest: float) -> float:
    """Stored value of probability 1. Floats are probabilities already."""
    return 1.0 if dtype.kind == "f" else full_scale(largest)
