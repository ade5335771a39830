"""evaluation/instances.py on drawn cells whose answer is known."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from drawn_sets import disk
from scipy.optimize import linear_sum_assignment

from common.cells import connected_cells
from evaluation.instances import InstanceCounts, boundary, boundary_f, mean_of_known, overlap_table

SHAPE = (40, 60)


def boxes(*corners: tuple[int, int, int, int]) -> np.ndarray:
    """Instance map of rectangles (top, left, height, width) with ids 5, 10, 15 ... (not consecutive on purpose)."""
    instance_map = np.zeros(SHAPE, np.uint16)
    for number, (top, left, height, width) in enumerate(corners, 1):
        instance_map[top : top + height, left : left + width] = 5 * number
    return instance_map


def counts(predicted: np.ndarray, truth: np.ndarray) -> InstanceCounts:
    result = InstanceCounts()
    result.add(predicted, truth)
    return result


def test_overlap_table_of_shifted_boxes():
    truth = boxes((2, 2, 10, 10), (20, 30, 10, 10))
    predicted = boxes((2, 4, 10, 10), (20, 30, 10, 5))
    np.testing.assert_allclose(overlap_table(predicted, truth).toarray(), [[80 / 120, 0], [0, 50 / 100]])


def test_thousands_of_cells_need_no_table_of_all_pairs():
    side, cell = 80, 6
    truth = np.kron(np.arange(1, side**2 + 1).reshape(side, side), np.ones((cell, cell), int))
    predicted = np.roll(truth, 1, axis=1)
    tracemalloc.start()
    score = counts(predicted, truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * side**4 / 10  # a tenth of one table of numbers
    inside = 5 / 7
    assert score.predicted == score.true == side**2 == len(score.matched)
    assert score.matched == [inside] * side**2 and score.ap(0.5) == 1 and score.ap(0.75) == 0


def test_equal_maps_score_one_whatever_their_ids():
    truth = boxes((2, 2, 10, 10), (20, 30, 10, 10))
    score = counts(np.where(truth > 0, 900 - truth, 0), truth)
    assert [score.ap(value) for value in (0.5, 0.75, 0.9)] == [1, 1, 1]
    assert score.pq == 1 and score.count_error == 0


def test_ap_counts_hits_misses_and_false_cells():
    truth = boxes((2, 2, 10, 10), (2, 20, 10, 10), (20, 2, 10, 10))
    # IoU 1; IoU 80 / 120; none for the third true cell; one false cell.
    predicted = boxes((2, 2, 10, 10), (2, 22, 10, 10), (30, 45, 5, 5))
    score = counts(predicted, truth)
    assert score.ap(0.5) == pytest.approx(2 / 4)
    assert score.ap(0.75) == pytest.approx(1 / 5)
    assert score.pq == pytest.approx((1 + 2 / 3) / 3)
    assert score.count_error == 0


def test_cells_of_iou_one_half_match_as_in_stardist_and_cellpose():
    truth = boxes((2, 2, 10, 10), (20, 30, 10, 10))
    predicted = boxes((2, 2, 10, 5), (20, 30, 10, 10))  # IoU 50 / 100, and 1
    score = counts(predicted, truth)
    assert score.ap(0.5) == 1 and score.ap(0.75) == pytest.approx(1 / 3)
    assert score.pq == pytest.approx(1 / 2)  # panoptic quality takes what is above one half


def test_a_cell_that_is_two_halves_of_others_matches_one_of_them():
    halves, whole = boxes((2, 2, 10, 5), (2, 7, 10, 5)), boxes((2, 2, 10, 10))
    for predicted, truth in ((halves, whole), (whole, halves)):
        assert counts(predicted, truth).ap(0.5) == pytest.approx(1 / 2)  # 1 hit, 1 miss or false cell


def test_matches_are_those_of_the_optimal_assignment():
    """StarDist and Cellpose assign cells so that the number of pairs with IoU >= t is largest."""
    rng = np.random.default_rng(0)
    for _ in range(200):  # coarse blocks on both sides, so that many pairs have exactly one half
        predicted, truth = (np.kron(rng.integers(0, 4, (2, 6)), np.ones((2, 2), int)) for _ in range(2))
        table = overlap_table(predicted, truth).toarray()
        for threshold in (0.5, 0.75):
            ours = round(sum(value >= threshold for value in counts(predicted, truth).matched))
            assigned = linear_sum_assignment(np.where(table >= threshold, 1, 0), maximize=True)
            assert ours == (table[assigned] >= threshold).sum()


def test_counts_add_up_over_images():
    truth = boxes((2, 2, 10, 10))
    score = counts(truth, truth)
    score.add(boxes((2, 2, 10, 10), (20, 20, 4, 4)), np.zeros_like(truth))
    assert score.ap(0.5) == pytest.approx(1 / 3) and score.count_error == 1.0


def test_merged_cells_miss_all():
    truth = boxes((2, 2, 10, 10), (2, 12, 10, 10), (2, 22, 10, 10))
    score = counts(connected_cells(truth > 0), truth)
    assert score.ap(0.5) == 0 and score.count_errors == [-2]


def test_without_cells_there_is_no_score():
    score = counts(np.zeros(SHAPE, int), np.zeros(SHAPE, int))
    assert score.ap(0.5) is None and score.pq is None and score.count_error == 0


def test_threshold_below_one_half_is_refused():
    with pytest.raises(ValueError, match="below 0.5"):
        counts(boxes((2, 2, 4, 4)), boxes((2, 2, 4, 4))).ap(0.3)


def test_connected_cells_join_at_corners_only():
    cells = np.zeros((8, 9), bool)
    cells[0:2, 0:2] = cells[2:4, 2:4] = True
    cells[6, 6] = True
    assert connected_cells(cells).max() == 2


def test_boundary_leaves_out_the_edge_of_the_image():
    cells = np.zeros((6, 8), bool)
    cells[:, :3] = True
    assert boundary(cells).sum() == 6 and boundary(cells)[:, 2].all()


@pytest.mark.parametrize(("shift", "value"), [(0, 1.0), (2, 1.0), (3, 0.0)])
def test_boundary_f_of_a_shifted_edge_falls_beyond_the_tolerance(shift, value):
    truth, predicted = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    truth[:, :10], predicted[:, : 10 + shift] = True, True
    assert boundary_f(predicted, truth, tolerance=2) == value


def test_boundary_f_of_empty_masks():
    empty, cells = np.zeros((20, 20), bool), disk(20, 10, 10, 4)
    assert boundary_f(empty, empty, 2) is None
    assert boundary_f(empty, cells, 2) == boundary_f(cells, empty, 2) == 0


def test_mean_leaves_out_what_is_unknown():
    assert mean_of_known([1.0, None, 0.0]) == 0.5 and mean_of_known([None]) is None
