"""Nearest training image of a picture, in any turn or flip and at any offset, by normalised cross-correlation.

The distance is sqrt(2 (1 - r)), with r the correlation of the two pictures. It is 0 for a copy, whatever its brightness
and contrast, about 1.4 for unrelated pictures, and 2 for a negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.pictures import from_uint8
from dataset.views import SYMMETRIES, turn

CANDIDATES = 24  # training pictures per query that are compared at full resolution
BLOCK = 64  # training pictures after which only the best are kept; limits the memory
PRODUCTS = 2**22  # most correlations computed at once; limits the memory
FLAT = 1e-3  # a picture with a smaller standard deviation (gray in [-1, 1]) is flat and is not compared


@dataclass(frozen=True)
class Match:
    """Nearest training image of one picture.

    Attributes:
        distance: sqrt(2 (1 - r)), in [0, 2].
        symmetry: number of the ``turn`` that maps the training picture to the query.
        top: first row of the matching crop, in pixels of the reduced training picture.
        left: first column of the matching crop.
    """

    distance: float
    index: int
    symmetry: int
    top: int = 0
    left: int = 0


def small_gray(image: np.ndarray, factor: float) -> np.ndarray:
    """Gray picture, reduced by averaging areas.

    Args:
        image: (H, W, C) uint8.
        factor: pixels of the image per pixel of the result, at least 1.

    Returns:
        (round(H / factor), round(W / factor)) float64 in [-1, 1].
    """
    gray = from_uint8(image).double().mean(dim=0, keepdim=True)
    height, width = (max(1, round(length / factor)) for length in gray.shape[1:])
    return F.adaptive_avg_pool2d(gray, (height, width))[0].numpy()


class NearestTraining:
    """Finds the nearest of the training pictures.

    1. Search: compare every query, in its eight symmetries, with every crop of every training picture. If training
       pictures are larger than the queries, search at half the resolution and keep the :data:`CANDIDATES` best
       training pictures.
    2. Refine: for these pictures, compare all crops within two pixels of the best place at full resolution, in the best
       symmetry.

    Args:
        pictures: training pictures, (h, w) float64 each, at least (side, side).
        side: of the queries, which are (side, side).
    """

    def __init__(self, pictures: Sequence[np.ndarray], side: int) -> None:
        self.pictures, self.side = pictures, side
        shifted = any(picture.shape != (side, side) for picture in pictures)
        self._step, self._candidates = (2, CANDIDATES) if shifted else (1, 1)

    def find(
        self, queries: Sequence[np.ndarray], skip: Sequence[int] | None = None, progress: bool = False
    ) -> list[Match | None]:
        """Nearest training picture of every query, None for a flat query.

        Args:
            queries: (side, side) float64 each.
            skip: for every query the index of a training picture to skip (the query itself).
        """
        found: list[Match | None] = [None] * len(queries)
        shown = [index for index, query in enumerate(queries) if query.std() >= FLAT]
        best = self._search([queries[index] for index in shown], progress)
        for index, values, numbers, places in zip(shown, best.values, best.numbers, best.places, strict=True):
            skipped = None if skip is None else skip[index]
            kept = [rank for rank, number in enumerate(numbers) if values[rank] > -np.inf and number != skipped]
            matches = [
                self._exact(queries[index], int(numbers[rank]), *places[rank].tolist())
                for rank in kept[: self._candidates]
            ]
            found[index] = min(matches, key=lambda match: match.distance, default=None)
        return found

    def _search(self, queries: list[np.ndarray], progress: bool) -> _Best:
        """The candidates of each query, and one more, because one may be skipped."""
        best = _Best(len(queries), self._candidates + 1)
        if not queries:
            return best
        turned = [turn(query, (0, 1), inverse(symmetry)) for query in queries for symmetry in range(SYMMETRIES)]
        kernels = units(self._reduced(turned)).flatten(1).float()  # (q * 8, d)
        side = self.side // self._step
        for index in tqdm(range(len(self.pictures)), "comparing", unit="image", disable=None if progress else True):
            windows = self._reduced([self.pictures[index]])[0].unfold(0, side, 1).unfold(1, side, 1)
            rows, columns = windows.shape[:2]
            windows = units(windows).reshape(rows * columns, -1).float()
            step = SYMMETRIES * max(1, PRODUCTS // (SYMMETRIES * len(windows)))
            values, places = np.empty(len(queries), np.float32), np.empty((len(queries), 3), np.int32)
            for first in range(0, len(kernels), step):
                products = kernels[first : first + step] @ windows.T  # (q * 8, rows * columns)
                highest, where = products.view(len(products) // SYMMETRIES, -1).max(dim=1)
                some = slice(first // SYMMETRIES, (first + step) // SYMMETRIES)
                symmetry, top, left = np.unravel_index(where.numpy(), (SYMMETRIES, rows, columns))
                values[some] = highest.numpy()
                places[some] = np.stack([symmetry, self._step * top, self._step * left], axis=1)
            best.add(index, values, places)
        best.sort()
        return best

    def _reduced(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures (n, h, w) float64 at the resolution of the search."""
        return F.avg_pool2d(torch.from_numpy(np.stack(pictures))[:, None], self._step)[:, 0]

    def _exact(self, query: np.ndarray, index: int, symmetry: int, top: int, left: int) -> Match:
        """The best crop at most two pixels from a place, computed in float64."""
        first = [max(0, start - 2) for start in (top, left)]
        part = self.pictures[index][first[0] : top + self.side + 2, first[1] : left + self.side + 2]
        windows = torch.from_numpy(part).unfold(0, self.side, 1).unfold(1, self.side, 1)
        kernel = torch.from_numpy(turn(query, (0, 1), inverse(symmetry)).copy())
        values = (units(windows) * units(kernel)).sum(dim=(2, 3))  # (rows, columns)
        row, column = divmod(int(values.argmax()), values.shape[1])
        distance = math.sqrt(max(0.0, 2 * (1 - float(values[row, column]))))
        return Match(distance, index, symmetry, first[0] + row, first[1] + column)


class _Best:
    """The training pictures with the highest correlation, for each query; of equal ones, those that came first.

    Attributes:
        values: (q, k) float32 correlations, highest first.
        numbers: (q, k) of the training pictures.
        places: (q, k, 3) symmetry, top and left.
    """

    def __init__(self, queries: int, count: int) -> None:
        self.count = count
        self.values = np.empty((queries, 0), np.float32)
        self.numbers = np.empty((queries, 0), np.int32)
        self.places = np.empty((queries, 0, 3), np.int32)
        self._new: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, number: int, values: np.ndarray, places: np.ndarray) -> None:
        """Correlation (q,) and place (q, 3) of training picture ``number``."""
        self._new.append((values[:, None], np.full((len(values), 1), number, np.int32), places[:, None]))
        if len(self._new) == BLOCK:
            self.sort()

    def sort(self) -> None:
        """Keep the best of those that were added."""
        known = zip((self.values, self.numbers, self.places), *self._new, strict=True)
        values, numbers, places = (np.concatenate(parts, axis=1) for parts in known)
        self._new = []
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.count]
        self.values, self.numbers = (np.take_along_axis(one, order, axis=1) for one in (values, numbers))
        self.places = np.take_along_axis(places, order[:, :, None], axis=1)


def units(pictures: Tensor) -> Tensor:
    """Pictures (..., h, w) scaled to mean 0 and length 1, so that a sum of products is a correlation. 0 if flat."""
    pictures = pictures - pictures.mean(dim=(-2, -1), keepdim=True)
    length = pictures.square().sum(dim=(-2, -1), keepdim=True).sqrt()
    clear = length > FLAT * math.sqrt(pictures.shape[-2] * pictures.shape[-1])
    return torch.where(clear, pictures / length, 0)


def inverse(symmetry: int) -> int:
    """The symmetry that undoes another. A flip undoes itself; 4 - n quarter turns undo n quarter turns."""
    return symmetry if symmetry >= 4 else -symmetry % 4
