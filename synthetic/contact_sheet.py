"""Which pairs the contact sheet of a set shows. Its rows are masks, synthetic images and (if known) real images."""

from __future__ import annotations

from collections.abc import Callable

from common.spread import evenly

MOST_PAIRS = 8
MOST_LOOKED_AT = 64  # pairs that are read to find some with cells
CAPTIONS = ("mask", "synthetic", "real")


def choose_pairs(count: int, has_cells: Callable[[int], bool]) -> list[int]:
    """Numbers of the pairs to show, spread over the set. Pairs without a cell are shown only if others are too few.

    Args:
        count: pairs of the set.
        has_cells: whether the mask of a pair has a cell.
    """
    looked_at = evenly(count, MOST_LOOKED_AT)
    with_cells = [number for number in looked_at if has_cells(number)]
    empty = [number for number in looked_at if number not in with_cells]
    chosen = [with_cells[place] for place in evenly(len(with_cells), MOST_PAIRS)]
    return sorted(chosen + [empty[place] for place in evenly(len(empty), MOST_PAIRS - len(chosen))])
