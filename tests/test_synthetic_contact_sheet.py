"""The picture of a set: pairs with cells first, spread over the set."""

from __future__ import annotations

import pytest

from synthetic.contact_sheet import MOST_PAIRS, choose_pairs


@pytest.mark.parametrize(
    ("count", "with_cells", "chosen"),
    [
        (3, {0, 1, 2}, [0, 1, 2]),
        (10, {1, 4}, [0, 1, 2, 4, 5, 6, 8, 9]),
        (20, set(range(8, 16)), list(range(8, 16))),
        (640, set(range(640)), [0, 91, 183, 274, 365, 456, 548, 639]),
    ],
)
def test_pairs_with_cells_come_first_and_are_spread_over_the_set(count, with_cells, chosen):
    found = choose_pairs(count, with_cells.__contains__)
    assert found == chosen and len(found) <= MOST_PAIRS


def test_few_pairs_of_a_large_set_are_read():
    read = []
    choose_pairs(100_000, lambda number: read.append(number) or True)
    assert len(read) == 64
