"""Where a segmenter's training squares come from: labelled images, and real cells pasted on real backgrounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dataset.views import SYMMETRIES, turn
from evaluation.experiments.segmenter import IGNORE, Found, Square, target_of
from evaluation.fidelity import LabelledImage

ON_A_CELL = 0.5  # share of the squares that lie around a cell: sparse images would show background only
MOST_PASTED = 4  # cells that copy-paste puts on a square


class Labelled:
    """Squares of labelled images, at any place of a random image.

    Args:
        images: images of any size, with classes (``IGNORE`` allowed) and cells; smaller ones are mirrored at the edge.
    """

    def __init__(self, images: Sequence[LabelledImage]) -> None:
        self.images = list(images)
        self._targets = [target_of(item.classes, item.cells) for item in self.images]
        self._places = [np.argwhere(item.cells > 0) for item in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, rng: np.random.Generator, side: int) -> Square:
        """A square of a random image, around a cell with probability ``ON_A_CELL``."""
        number = int(rng.integers(len(self.images)))
        image, target, _ = self._cut(number, rng, side)
        return Square(image, target)

    def _cut(self, number: int, rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image (S, S, C), target (2, S, S) and cells (S, S) of one square."""
        item, places = self.images[number], self._places[number]
        height, width = item.cells.shape
        centre = None
        if len(places) and rng.random() < ON_A_CELL:
            centre = places[rng.integers(len(places))]
        rows, columns = (
            _indices(length, side, None if centre is None else int(centre[axis]), rng)
            for axis, length in enumerate((height, width))
        )
        where = np.ix_(rows, columns)
        return item.image[where], self._targets[number][:, where[0], where[1]], item.cells[where]


def _indices(length: int, side: int, centre: int | None, rng: np.random.Generator) -> np.ndarray:
    """``side`` rows or columns of an image, mirrored at its edge if it has fewer."""
    if length <= side:
        mirrored = np.abs((np.arange(side) - (side - length) // 2) % (2 * length))
        return np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    start = int(rng.integers(length - side + 1))
    if centre is not None:
        start = int(np.clip(centre - rng.integers(side), 0, length - side))
    return np.arange(start, start + side)


class CopyPaste(Labelled):
    """Squares of labelled images with more cells on them, cut from labelled images of the same group.

    Source: Ghiasi et al. 2021, "Simple Copy-Paste", arXiv 2012.07177. Pasted cells are turned and hide what is below.

    Args:
        groups: look of each image; cells stay in their look.
    """

    def __init__(self, images: Sequence[LabelledImage], groups: Sequence[str]) -> None:
        super().__init__(images)
        self._donors = [
            [other for other, name in enumerate(groups) if name == group and len(self._places[other])]
            for group in groups
        ]

    def draw(self, rng: np.random.Generator, side: int) -> Square:
        """A square with up to ``MOST_PASTED`` pasted cells."""
        number = int(rng.integers(len(self.images)))
        image, target, cells = (part.copy() for part in self._cut(number, rng, side))
        classes, free = target[0], int(cells.max()) + 1
        for _ in range(int(rng.integers(MOST_PASTED + 1)) if self._donors[number] else 0):
            donor = self._donors[number][rng.integers(len(self._donors[number]))]
            free = self._paste(donor, image, classes, cells, free, rng)
        return Square(image, target_of(classes, cells))

    def _paste(
        self, donor: int, image: np.ndarray, classes: np.ndarray, cells: np.ndarray, free: int, rng: np.random.Generator
    ) -> int:
        """Put one cell of the donor somewhere on the square, in place; the next free id."""
        item, places = self.images[donor], self._places[donor]
        cell = item.cells[tuple(places[rng.integers(len(places))])]
        rows, columns = np.nonzero(item.cells == cell)
        box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        symmetry = int(rng.integers(SYMMETRIES))
        shape = turn(item.cells[box] == cell, (0, 1), symmetry)
        patch, names = turn(item.image[box], (0, 1), symmetry), turn(item.classes[box], (0, 1), symmetry)
        top, left = (int(rng.integers(length)) for length in cells.shape)
        inside = np.argwhere(shape)
        goal = inside + (top - shape.shape[0] // 2, left - shape.shape[1] // 2)
        seen = np.all((goal >= 0) & (goal < cells.shape), axis=1)
        source, goal = tuple(inside[seen].T), tuple(goal[seen].T)
        image[goal], classes[goal], cells[goal] = patch[source], names[source], free
        return free + 1


def pseudo_label(image: np.ndarray, segment: Callable[[np.ndarray], Found], least_confidence: float) -> LabelledImage:
    """An unlabelled image with what a segmenter finds in it; pixels below a confidence are ignored.

    Source: Sohn et al. 2020, "FixMatch", arXiv 2001.07685 (the threshold).

    Args:
        image: uint8 (H, W, C).
        segment: image -> ``Found``.
        least_confidence: probability of the most probable class, in [0, 1].
    """
    found = segment(image)
    classes = np.where(found.confidence >= least_confidence, found.classes, IGNORE).astype(np.uint8)
    return LabelledImage(image, classes, found.cells)
