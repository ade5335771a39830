"""common/cells.py on drawn cells whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from common.cells import connected_cells, touches_border, without_gaps


def test_cells_that_meet_at_a_corner_are_one_and_are_numbered_by_their_first_pixel():
    mask = np.zeros((8, 9), bool)
    mask[0:2, 0:2] = mask[2:4, 2:4] = True
    mask[6, 6] = mask[5, 8] = True
    cells = connected_cells(mask)
    assert cells.dtype == np.int32 and cells.max() == 3
    assert (cells[0, 0], cells[3, 3], cells[5, 8], cells[6, 6]) == (1, 1, 2, 3)


def test_touching_ids_are_one_component_because_only_background_parts():
    mask = np.zeros((4, 6), np.uint16)
    mask[1:3, 1:3], mask[1:3, 3:5] = 40, 7
    assert connected_cells(mask).max() == 1
    assert connected_cells(np.zeros((4, 6), np.float32)).max() == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint32, np.float32, ">u2", ">f4"])
def test_without_gaps_keeps_cells_background_and_order(dtype):
    labels = np.array([[0, 0, 9], [120, 9, 9], [120, 3, 0]], dtype)
    assert without_gaps(labels).tolist() == [[0, 0, 2], [3, 2, 2], [3, 1, 0]]
    assert without_gaps(labels).dtype == np.int32
    assert without_gaps(np.full((2, 3), 5, dtype)).tolist() == [[1] * 3] * 2  # no background
    assert without_gaps(np.zeros((2, 3), dtype)).max() == 0


def test_ids_at_the_border_are_those_of_all_four_sides():
    labels = np.zeros((7, 9), int)
    labels[0, 3], labels[6, 4], labels[3, 0], labels[2, 8], labels[3, 4] = 11, 2, 5, 8, 6
    assert touches_border(labels).tolist() == [2, 5, 8, 11]
    assert touches_border(np.zeros((7, 9), int)).tolist() == []
