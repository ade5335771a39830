"""Tiles: cover a field larger than the training size with overlapping tiles, and average the network's outputs.

The output for a large field is the weighted mean of the network's outputs on tiles of the training size. A solver takes
this mean at every step. This is MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113): all tiles share one state, so
each tile continues what its neighbours have begun.

How far the borders of the tiles show is measured in benchmarks/design_choices.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Tiles:
    """Tiles of one size that cover a field, evenly spread.

    Attributes:
        field: height and width of the field, at least those of a tile.
        size: height and width of a tile.
        overlap: least height and width that neighbouring tiles share, below those of a tile.

    Raises:
        ValueError: the field is smaller than a tile, or the overlap is not smaller than a tile.
    """

    field: Size
    size: Size
    overlap: Size

    def __post_init__(self) -> None:
        for length, side, shared in zip(self.field, self.size, self.overlap, strict=True):
            if length < side or not 0 <= shared < side:
                raise ValueError(f"tiles of {side} with an overlap of {shared} do not cover a field of {length}")

    @cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """First rows and first columns of the tiles."""
        rows, columns = (spread_starts(*sizes) for sizes in zip(self.field, self.size, self.overlap, strict=True))
        return rows, columns

    @cached_property
    def corners(self) -> list[Size]:
        """Top left corner of every tile, row by row."""
        rows, columns = self.starts
        return [(row, column) for row in rows for column in columns]

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.corners)

    def cut(self, field: Tensor, first: int = 0, count: int | None = None, scale: int = 1) -> Tensor:
        """Cut tiles (n, C, h s, w s) out of a field (C, H s, W s), s the scale.

        Starts at tile number ``first`` and returns at most ``count`` tiles (None: all).
        """
        height, width = (scale * side for side in self.size)
        corners = self.corners[first:][:count]
        parts = [field[:, scale * r : scale * r + height, scale * c : scale * c + width] for r, c in corners]
        return torch.stack(parts)

    def mean(self, field: Tensor, function: Callable[[int, Tensor], Tensor], batch_size: int, scale: int = 1) -> Tensor:
        """Apply a function to all tiles of a field, and take the weighted mean of its outputs.

        Args:
            field: (C, H, W).
            function: ``function(first, tiles)`` maps tiles (n, C, h, w), which start at number ``first``, to
                (n, D, h scale, w scale).
            batch_size: most tiles per call of the function. It limits the memory.
            scale: output pixels per field pixel.

        Returns:
            (D, H scale, W scale). For a field of one tile, this is exactly the output of the function.
        """
        if len(self) == 1:
            return function(0, field[None])[0]
        height, width = (scale * side for side in self.size)
        weight = hill(height, field.device)[:, None] * hill(width, field.device)  # (h scale, w scale)
        for first in range(0, len(self), batch_size):
            out = function(first, self.cut(field, first, batch_size))
            if first == 0:
                total = out.new_zeros(out.shape[1], *(scale * length for length in self.field))
            for (row, column), part in zip(self.corners[first:], out, strict=False):
                total[:, scale * row : scale * row + height, scale * column : scale * column + width] += part * weight
        lengths = zip(self.starts, self.field, self.size, strict=True)
        rows, columns = (weight_sum(starts, scale, scale * n, scale * m, field.device) for starts, n, m in lengths)
        return total / (rows[:, None] * columns)


def spread_starts(length: int, side: int, shared: int) -> list[int]:
    """Evenly spread starts of the fewest tiles that cover ``length`` and overlap by at least ``shared``."""
    count = 1 + math.ceil((length - side) / (side - shared))
    return [round(number * (length - side) / max(1, count - 1)) for number in range(count)]


def covering_squares(array: np.ndarray, side: int) -> list[np.ndarray]:
    """Evenly spread squares that cover an array (H, W, ...); all of it if it is smaller."""
    rows, columns = (spread_starts(length, min(side, length), 0) for length in array.shape[:2])
    return [array[row : row + side, column : column + side] for row in rows for column in columns]


def hill(side: int, device: torch.device) -> Tensor:
    """(side,) weights sin^2. Above 0 at every pixel, and near 0 at the ends, so that tile borders make no step."""
    pixels = torch.arange(side, dtype=torch.float32, device=device)
    return (torch.pi * (pixels + 0.5) / side).sin().square()


def weight_sum(starts: list[int], scale: int, length: int, side: int, device: torch.device) -> Tensor:
    """(length,) sum of the weights of all tiles along one side of the field."""
    total, weight = torch.zeros(length, device=device), hill(side, device)
    for start in starts:
        total[scale * start : scale * start + side] += weight
    return total
