"""evaluate.py grid: drawn grids of known strength, real images beside them, sets that cannot be measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_sets import Row, write_set

import evaluate
from common.errors import InputError
from common.patch_grid import grid_ratio, image_steps
from evaluation.grid import score_grid
from synthetic.reader import SampleSet

SIZE, PATCH = 48, 8


def ramp(step: int = 1) -> np.ndarray:
    """(48, 48, 3) uint8 whose gray rises by ``step`` from every pixel to the next, along rows and columns."""
    rows, columns = np.indices((SIZE, SIZE))
    return np.repeat((step * (rows + columns)).astype(np.uint8)[..., None], 3, axis=-1)


def with_grid(border_step: int, patch: int = PATCH) -> np.ndarray:
    """As ``ramp``, but gray rises by ``border_step`` across every border of patches."""
    height = np.cumsum([0] + [border_step if index % patch == 0 else 1 for index in range(1, SIZE)])
    return np.repeat((height[:, None] + height[None]).astype(np.uint8)[..., None], 3, axis=-1)


def one_label() -> np.ndarray:
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[10:20, 10:20] = 255
    return label


@pytest.mark.parametrize("strength", [1, 2, 5])
def test_a_drawn_grid_has_the_ratio_that_it_was_drawn_with(strength):
    assert grid_ratio([with_grid(strength)], PATCH) == pytest.approx(strength)


def test_a_grid_of_another_patch_is_no_grid_of_this_one():
    # Borders of 12 pixel patches fall on those of 8 pixel patches at 24 only: 1 of 5; inside are 2 of 42 steps.
    expected = ((4 * 1 + 3) / 5) / ((40 * 1 + 2 * 3) / 42)
    assert grid_ratio([with_grid(3, patch=12)], PATCH) == pytest.approx(expected)


def test_one_direction_counts_as_half():
    height = np.cumsum([0] + [5 if index % PATCH == 0 else 1 for index in range(1, SIZE)])
    stripes = height[:, None] + np.arange(SIZE)[None]  # steps of 5 between rows, of 1 between columns
    assert grid_ratio([stripes], PATCH) == pytest.approx((5 + 1) / 2)


def test_noise_has_ratio_one_and_every_channel_counts():
    noise = np.random.default_rng(0).normal(size=(20, SIZE, SIZE, 1))
    assert grid_ratio(noise, PATCH) == pytest.approx(1, abs=0.03)
    two = np.concatenate([ramp()[..., :1], with_grid(3)[..., :1]], axis=-1)
    assert grid_ratio([two], PATCH) == pytest.approx(2)


def test_images_count_by_their_steps():
    pair = [ramp(2), with_grid(3)]
    assert grid_ratio(pair, PATCH) == pytest.approx(((2 + 3) / 2) / ((2 + 1) / 2))


def test_flat_images_and_single_patches_have_no_ratio():
    assert grid_ratio([np.zeros((SIZE, SIZE))], PATCH) is None
    assert grid_ratio([ramp()], SIZE) is None
    with pytest.raises(ValueError, match="no inside"):
        image_steps(ramp(), 1)


def drawn_set(folder: Path, **settings: Any) -> Path:
    rows = [Row(one_label(), with_grid(strength), ramp()) for strength in (2, 4)]
    return write_set(folder / "set", rows, **settings)


def test_a_set_is_measured_beside_its_real_images(tmp_path, capsys):
    folder = drawn_set(tmp_path, patch_pixels=PATCH)
    evaluate.main(evaluate.parse_args(["grid", str(folder)]))
    printed = capsys.readouterr().out
    content = json.loads((folder / "evaluation" / "grid.json").read_text())
    assert content["grid_synthetic"] == pytest.approx(3) and content["patch_pixels"] == PATCH
    assert 0.9 < content["grid_real"] < 1.1
    rows = list(csv.DictReader((folder / "evaluation" / "grid.csv").open()))
    assert [float(row["grid_synthetic"]) for row in rows] == pytest.approx([2, 4])
    assert "3.000" in printed and "most 4.000 (images/cells_01.png)" in printed


def test_grain_is_the_step_inside_patches_beside_that_of_real_images(tmp_path, capsys):
    """A grid leaves it alone; an image of twice the steps has twice the grain."""
    rows = [Row(one_label(), with_grid(4), ramp()), Row(one_label(), ramp(2), ramp())]
    folder = write_set(tmp_path / "set", rows, patch_pixels=PATCH)
    score = score_grid(SampleSet(folder))
    assert (score.grain_synthetic, score.grain_real, score.grain_ratio) == pytest.approx((1.5, 1, 1.5))
    assert [row.grain_synthetic for row in score.per_image] == pytest.approx([1, 2])
    evaluate.main(evaluate.parse_args(["threshold", str(folder)]))
    assert "grain: 1.500 times that of the real images" in capsys.readouterr().out


def test_flat_real_images_have_no_grain_to_compare_with(tmp_path, capsys):
    rows = [Row(one_label(), ramp(), np.zeros_like(ramp()))]
    folder = write_set(tmp_path / "set", rows, patch_pixels=PATCH)
    assert score_grid(SampleSet(folder)).grain_ratio is None
    evaluate.main(evaluate.parse_args(["grid", str(folder)]))
    assert json.loads((folder / "evaluation" / "grid.json").read_text())["grain_ratio"] is None


def test_the_line_of_threshold_and_the_section_of_the_report_hold_the_ratio(tmp_path, capsys):
    folder = drawn_set(tmp_path, patch_pixels=PATCH)
    evaluate.main(evaluate.parse_args(["threshold", str(folder)]))
    assert "grid of patches: synthetic" in (printed := capsys.readouterr().out) and "3.000" in printed
    evaluate.main(evaluate.parse_args(["grid", str(folder)]))
    evaluate.main(evaluate.parse_args(["report", str(folder)]))
    assert "differences across borders of 8 px patches" in (folder / "evaluation" / "report.html").read_text()


def test_an_old_set_is_told_what_to_write(tmp_path, capsys):
    folder = drawn_set(tmp_path)
    with pytest.raises(InputError, match='"patch_pixels": N'):
        score_grid(SampleSet(folder))
    evaluate.main(evaluate.parse_args(["threshold", str(folder)]))
    assert "grid of patches: not measured" in capsys.readouterr().out


def test_images_of_overlapping_tiles_have_no_common_grid(tmp_path):
    with pytest.raises(InputError, match="overlapping tiles"):
        score_grid(SampleSet(drawn_set(tmp_path, patch_pixels=PATCH, tile_scale=1.0)))
