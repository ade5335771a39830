"""A few of many, evenly spread."""

from __future__ import annotations

import pytest

from common.spread import evenly


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [(1, 5, [0]), (3, 5, [0, 1, 2]), (11, 3, [0, 5, 10]), (100, 4, [0, 33, 66, 99]), (9, 1, [0])],
)
def test_the_first_and_the_last_are_among_the_chosen(count, most, chosen):
    assert evenly(count, most) == chosen
