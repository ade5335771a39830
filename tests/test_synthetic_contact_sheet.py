"""The picture of a set: pairs with cells first, spread over the set, at a size that eyes can read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthetic.contact_sheet import MOST_PAIRS, choose_pairs, draw_sheet


@pytest.mark.parametrize(
    ("count", "with_cells", "chosen"),
    [
        (3, {0, 1, 2}, [0, 1, 2]),
        (10, {1, 4}, [0, 1, 2, 3, 4, 6, 7, 9]),
        (20, set(range(8, 16)), list(range(8, 16))),
        (640, set(range(640)), [0, 91, 182, 273, 365, 456, 547, 639]),
    ],
)
def test_pairs_with_cells_come_first_and_are_spread_over_the_set(count, with_cells, chosen):
    found = choose_pairs(count, with_cells.__contains__)
    assert found == chosen and len(found) <= MOST_PAIRS


def test_few_pairs_of_a_large_set_are_read():
    read = []
    choose_pairs(100_000, lambda number: read.append(number) or True)
    assert len(read) == 64


@pytest.mark.parametrize(("side", "shown"), [(16, 128), (64, 128), (100, 100), (512, 512), (1024, 512)])
def test_small_pictures_are_magnified_and_large_ones_made_smaller(side, shown):
    white, black = torch.ones(1, side, side), -torch.ones(1, side, side)
    sheet = np.asarray(draw_sheet([[white, black], [white, black]]).convert("L"))
    dark = sheet[-shown // 2] < 10
    assert dark[76:].sum() == 2 * shown  # left of it stands the caption


def test_every_row_has_its_caption():
    picture = torch.ones(3, 64, 64)
    sheet = np.asarray(draw_sheet([[picture] * 3]).convert("L"))
    rows = np.flatnonzero((sheet < 128).any(axis=1))
    assert len(np.split(rows, np.flatnonzero(np.diff(rows) > 60) + 1)) == 3
