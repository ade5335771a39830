"""evaluate.py threshold: known overlaps, polarity, skipped crops, gray values, files."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from drawn_sets import Row, disk, five_rows, paint, write_set
from PIL import Image

import evaluate
from common.errors import InputError
from dataset.config import DataConfig
from dataset.masks import MaskRule
from evaluation.experiments.labelled import set_pairs
from evaluation.instances import dice
from evaluation.threshold import (
    SECTION,
    decide_polarity,
    otsu_threshold,
    pick_extremes,
    score_by_threshold,
    thresholded,
    write_threshold_report,
)
from synthetic.reader import SampleSet

ROOT = Path(__file__).parents[1]
SIZE = 64


def label_of(cells: np.ndarray) -> np.ndarray:
    return np.where(cells, 255, 0).astype(np.uint8)


def shifted_row(shift: int, row: int = 30, **kinds) -> Row:
    """Mask: a disk of radius 12; synthetic image: the disk moved to the right; real image: exact."""
    truth = disk(SIZE, row, 25, 12)
    return Row(label_of(truth), paint(disk(SIZE, row, 25 + shift, 12), **kinds), paint(truth, **kinds))


def shifted_dice(shift: int) -> float:
    """Dice of two discs at a distance: area of the lens over the area of a disc."""
    radius = math.sqrt(disk(SIZE, 30, 25, 12).sum() / math.pi)  # of the circle with the drawn disk's area
    half = shift / (2 * radius)
    return (2 * math.acos(half) - 2 * half * math.sqrt(1 - half**2)) / math.pi


# --- measures --------------------------------------------------------------------------------------------------------


def test_dice_of_rectangles_that_share_a_third():
    first, second = np.zeros((5, 12), bool), np.zeros((5, 12), bool)
    first[1:3, 0:6], second[1:3, 4:10] = True, True
    assert dice(first, second) == pytest.approx(2 * 4 / 24)
    assert dice(first, ~first) == 0 and dice(first, first) == 1
    empty = np.zeros((5, 12), bool)
    assert dice(empty, empty) == 1 and dice(empty, first) == 0


def test_masks_of_other_shape_or_type_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        dice(np.zeros((3, 4), bool), np.zeros((4, 3), bool))
    with pytest.raises(ValueError, match="bool"):
        dice(np.zeros((3, 4)), np.zeros((3, 4), bool))


def test_otsu_takes_the_middle_between_two_gray_values():
    gray = np.array([[0.2] * 7 + [0.8] * 2])
    assert otsu_threshold(gray) == pytest.approx(0.5, abs=1 / 256)
    assert thresholded(gray, brighter=True).tolist() == [[False] * 7 + [True] * 2]
    assert thresholded(gray, brighter=False).tolist() == [[True] * 7 + [False] * 2]


def test_otsu_equals_the_search_over_every_threshold():
    rng = np.random.default_rng(0)
    gray = np.clip(np.concatenate([rng.normal(0.3, 0.1, 3000), rng.normal(0.6, 0.08, 900)]), 0, 1)
    values = (np.minimum(np.floor(gray * 256), 255) + 0.5) / 256

    def between(edge: float) -> float:
        low, high = values[values < edge], values[values > edge]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    best = max((edge / 256 for edge in range(1, 256)), key=between)
    assert otsu_threshold(gray) == pytest.approx(best)


def test_image_of_one_gray_value_has_no_threshold_and_no_cells():
    flat = np.full((6, 9), 0.3)
    assert otsu_threshold(flat) is None
    assert not thresholded(flat, brighter=True).any() and not thresholded(flat, brighter=False).any()


def test_extremes_are_worst_median_best_without_the_skipped():
    assert pick_extremes([0.5, None, 0.9, 0.1, 0.7, 0.6]) == [3, 5, 2]
    assert pick_extremes([None, 0.4]) == [1]
    assert pick_extremes([None]) == []


# --- sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [{}, {"cell": 40, "background": 200}], ids=["brighter", "darker"])
def test_shifted_disks_give_the_dice_of_their_lens_and_real_images_one(tmp_path, kinds):
    shifts = [0, 6, 12, 26]
    samples = SampleSet(write_set(tmp_path / "set", [shifted_row(shift, **kinds) for shift in shifts]))
    score = score_by_threshold(samples)
    assert score.brighter == (not kinds) and score.polarity_from == "real"
    found = [row.dice_synthetic for row in score.per_image]
    assert found[0] == 1 and found[3] == 0
    assert found[1:3] == pytest.approx([shifted_dice(6), shifted_dice(12)], abs=0.02)
    assert score.dice_real == 1
    assert score.dice_synthetic == pytest.approx(np.mean(found))
    assert score.dice_ratio == pytest.approx(score.dice_synthetic)
    assert score.mean_difference == pytest.approx(0) and score.std_difference == pytest.approx(0)


def test_polarity_is_decided_once_on_the_real_images(tmp_path):
    truth = disk(SIZE, 30, 25, 12)
    inverted = Row(label_of(truth), paint(truth, cell=40, background=200), paint(truth))
    samples = SampleSet(write_set(tmp_path / "set", [inverted] * 3))
    assert decide_polarity(samples) == (True, "real")
    assert score_by_threshold(samples).dice_synthetic == 0


def test_without_real_images_the_synthetic_ones_decide_and_the_report_says_so(tmp_path):
    truth = disk(SIZE, 30, 25, 12)
    rows = [Row(label_of(truth), paint(truth, cell=40, background=200))]
    score = score_by_threshold(SampleSet(write_set(tmp_path / "set", rows)))
    assert (score.brighter, score.polarity_from) == (False, "synthetic")
    assert score.dice_synthetic == 1 and score.dice_real is None and score.mean_difference is None
    assert "according to the synthetic images" in "\n".join(SECTION.lines(score.to_dict()))


def test_crops_without_cell_or_background_are_counted_apart(tmp_path):
    nothing, everything = np.zeros((SIZE, SIZE), bool), np.ones((SIZE, SIZE), bool)
    rows = [shifted_row(0)] + [
        Row(label_of(cells), paint(disk(SIZE, 9, 9, 5)), paint(cells)) for cells in (nothing, everything, nothing)
    ]
    score = score_by_threshold(SampleSet(write_set(tmp_path / "set", rows)))
    assert (score.images, score.compared, score.no_cell, score.only_cell) == (4, 1, 2, 1)
    assert score.dice_synthetic == 1
    assert "2 without a cell, 1 without background" in "\n".join(SECTION.lines(score.to_dict()))


def test_set_with_nothing_to_compare_gives_a_table_without_a_number(tmp_path):
    rows = [Row(np.zeros((SIZE, SIZE), np.uint8), paint(disk(SIZE, 9, 9, 5)))]
    samples = SampleSet(write_set(tmp_path / "set", rows))
    score = score_by_threshold(samples)
    assert score.dice_synthetic is None and score.compared == 0
    folder = write_threshold_report(samples, score)
    assert json.loads((folder / "threshold.json").read_text())["dice_synthetic"] is None


def test_gray_value_statistics_are_those_of_all_pixels(tmp_path):
    half = np.zeros((SIZE, SIZE), bool)
    half[:, : SIZE // 2] = True
    row = Row(label_of(half), paint(half, cell=204, background=102), paint(half, cell=102, background=51))
    score = score_by_threshold(SampleSet(write_set(tmp_path / "set", [row, row])))
    assert (score.mean_synthetic, score.std_synthetic) == pytest.approx((0.6, 0.2))
    assert (score.mean_real, score.std_real) == pytest.approx((0.3, 0.1))
    assert (score.mean_difference, score.std_difference) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("mask_type", "encode"),
    [
        ("instances", lambda cells: np.where(cells, 300, 0).astype(np.uint16)),
        ("classes", lambda cells: np.where(cells, 2, 0).astype(np.uint8)),
        ("binary", lambda cells: np.where(cells, 1, 0).astype(np.uint8)),
        ("probability", lambda cells: np.where(cells, 180, 90).astype(np.uint8)),
    ],
)
def test_every_kind_of_label_gives_the_same_cells(tmp_path, mask_type, encode):
    truth = disk(SIZE, 30, 25, 12)
    config = DataConfig(image_size=SIZE, num_classes=3 if mask_type == "classes" else 2)
    samples = SampleSet(write_set(tmp_path / "set", [Row(encode(truth), paint(truth), mask_type=mask_type)], config))
    assert np.array_equal(samples.foreground(samples.samples[0]), truth)


@pytest.mark.parametrize(
    ("mask_type", "values", "cells"),
    [
        ("probability", (0, 1), False),  # 1 of 255 is 0.4 %, not class 1
        ("probability", (0, 200), True),
        ("binary", (0, 20), False),  # 20 of 255 is background with a JPEG's noise
        ("binary", (0, 255), True),
    ],
)
def test_a_crop_of_few_values_is_read_by_the_rule_of_its_set(tmp_path, mask_type, values, cells):
    truth = disk(SIZE, 30, 25, 12)
    rule = MaskRule(mask_type, 2, 255.0, "255 is the largest value of the folder")
    rows = [Row(np.where(truth, values[1], values[0]).astype(np.uint8), paint(truth), mask_type=mask_type)]
    samples = SampleSet(write_set(tmp_path / "set", rows, mask_rule=asdict(rule)))
    assert np.array_equal(samples.foreground(samples.samples[0]), truth & cells)


def test_real_image_is_cut_by_the_view_of_its_label(tmp_path):
    whole = paint(disk(200, 70, 120, 12))[:90, :150]  # not square, larger than the crop
    window = disk(200, 70, 120, 12)[20 : 20 + SIZE, 80 : 80 + SIZE]
    row = Row(label_of(window), paint(window), whole, view=(90, 150, 20, 80, SIZE, SIZE))
    samples = SampleSet(write_set(tmp_path / "set", [row], DataConfig(image_size=SIZE, crop="random")))
    assert np.array_equal(samples.real(samples.samples[0]), paint(window))
    assert score_by_threshold(samples).dice_real == 1


def test_center_crop_resizes_the_real_image_as_training_does(tmp_path):
    whole = paint(disk(2 * SIZE, 60, 50, 24))
    truth = whole[::2, ::2, 0] > 99
    row = Row(label_of(truth), paint(truth), whole)
    samples = SampleSet(write_set(tmp_path / "set", [row]))
    real = samples.real(samples.samples[0])
    assert real.shape == (SIZE, SIZE, 3)
    assert dice(real[..., 0] > 120, truth) > 0.97


@pytest.mark.parametrize("crop", ["center", "random"])
def test_real_image_of_another_size_than_the_view_was_made_for_is_refused(tmp_path, crop):
    truth = disk(SIZE, 30, 25, 12)
    whole = paint(disk(200, 70, 120, 12))[:100, :150]
    row = Row(label_of(truth), paint(truth), whole, view=(90, 150, 20, 80, SIZE, SIZE))
    samples = SampleSet(write_set(tmp_path / "set", [row], DataConfig(image_size=SIZE, crop=crop)))
    with pytest.raises(InputError, match="150 x 100 pixels"):
        score_by_threshold(samples)


def test_real_image_is_windowed_as_in_training(tmp_path):
    truth = disk(SIZE, 30, 25, 12)
    dark = np.where(truth, 2000, 500).astype(np.uint16)  # 16 bits, far from the full range
    config = DataConfig(image_size=SIZE, window=(0.0, 100.0))
    samples = SampleSet(write_set(tmp_path / "set", [Row(label_of(truth), paint(truth), dark)], config))
    assert np.array_equal(samples.real(samples.samples[0]), paint(truth, cell=255, background=0))


def test_real_nuclei_beside_themselves_give_equal_numbers_near_the_known_ceiling(tmp_path):
    """Otsu's Dice of real 64 px fluorescence crops is known to be about 0.88."""
    nuclei = ROOT.parent / "shared" / "data" / "nuclei" / "val"
    if not nuclei.is_dir():
        pytest.skip("the real nuclei are not on this machine")
    config = DataConfig(image_size=SIZE, crop="random", window=(0.0, 99.8))
    rows = []
    for image_path in sorted((nuclei / "images").glob("fluo_*.png"))[::3]:
        image = np.array(Image.open(image_path).convert("RGB"))
        mask = np.array(Image.open(nuclei / "masks" / image_path.name))
        height, width = mask.shape
        top, left = (height - SIZE) // 2, (width - SIZE) // 2
        crop = (slice(top, top + SIZE), slice(left, left + SIZE))
        rows.append(Row(mask[crop], image[crop], image, view=(height, width, top, left, SIZE, SIZE)))
    folder = write_set(tmp_path / "set", rows, config)
    samples = SampleSet(folder)
    for sample in samples.samples:
        Image.fromarray(samples.real(sample)).save(sample.image_path)
    score = score_by_threshold(SampleSet(folder))
    assert score.dice_synthetic == score.dice_real and score.mean_difference == 0 and score.brighter
    assert 0.8 < score.dice_real < 0.95


# --- bad input -------------------------------------------------------------------------------------------------------


def test_folder_without_manifest_is_named(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.csv does not exist.*sample_ddp\.py"):
        SampleSet(tmp_path)


def test_all_missing_files_are_in_one_message(tmp_path):
    folder = write_set(tmp_path / "set", [shifted_row(0), shifted_row(3), shifted_row(6)])
    (folder / "images" / "cells_00.png").unlink()
    (folder / "masks" / "cells_02.png").unlink()
    with pytest.raises(InputError, match=r"2 files .*cells_00\.png.*cells_02\.png"):
        SampleSet(folder)


def test_moved_real_images_are_found_by_real_dir(tmp_path):
    folder = write_set(tmp_path / "set", [shifted_row(0)])
    (tmp_path / "set_real").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="real_dir"):
        score_by_threshold(SampleSet(folder))
    assert score_by_threshold(SampleSet(folder, tmp_path / "moved")).dice_real == 1


def test_what_needs_no_real_image_works_without_them(tmp_path, capsys):
    folder, other = write_set(tmp_path / "set", five_rows(SIZE), patch_pixels=8), tmp_path / "other"
    SampleSet(folder).write_fidelity([0.9, 0.8, 0.7, 0.6, 0.5])
    (tmp_path / "set_real").rename(other)
    for command in (
        ["filter", folder, "--keep-share", "0.5"],
        ["memorisation", folder, "--data-path", other],
        ["looks", folder, "--data-path", other],
    ):
        evaluate.main(evaluate.parse_args(list(map(str, command))))
    assert len(set_pairs(SampleSet(folder), 2)) == 5  # as for evaluate.py utility
    printed = capsys.readouterr().out
    assert "kept 3 of 5" in printed and "5 synthetic images" in printed
    for command in ("threshold", "grid", "population", "looks"):
        with pytest.raises(InputError, match="5 real images are not there"):
            evaluate.main(evaluate.parse_args([command, str(folder)]))


def test_rows_partly_without_real_image_are_refused(tmp_path):
    truth = disk(SIZE, 30, 25, 12)
    with pytest.raises(InputError, match="empty in 1 of 2 rows"):
        SampleSet(write_set(tmp_path / "set", [shifted_row(0), Row(label_of(truth), paint(truth))]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column image, label"),
        ("image,label\n", "no rows"),
        ("image,label\na.png\n", "line 2"),
        ("image,label\na,b,c\n", "line 2"),
        ("picture,label\na,b\n", "no column image"),
    ],
)
def test_damaged_manifest_is_said_in_words(tmp_path, text, words):
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        SampleSet(tmp_path)


def test_class_beyond_the_sets_classes_is_refused(tmp_path):
    label = np.full((SIZE, SIZE), 2, np.uint8)
    folder = write_set(tmp_path / "set", [Row(label, paint(label > 0), mask_type="classes")])
    with pytest.raises(InputError, match="class 2, the set has 2 classes"):
        score_by_threshold(SampleSet(folder))


def test_label_of_another_size_is_refused(tmp_path):
    folder = write_set(tmp_path / "set", [shifted_row(0)])
    Image.fromarray(np.zeros((SIZE, SIZE - 2), np.uint8)).save(folder / "masks" / "cells_00.png")
    with pytest.raises(InputError, match="64 x 62"):
        score_by_threshold(SampleSet(folder))


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_prints_the_table_and_writes_json_csv_and_picture(tmp_path, capsys):
    folder = write_set(tmp_path / "set", [shifted_row(0), shifted_row(6), shifted_row(12)])
    evaluate.main(evaluate.parse_args(["threshold", str(folder)]))
    printed = capsys.readouterr().out
    assert "Dice with the mask" in printed and "cfg_scale 1.0" in printed
    summary = json.loads((folder / "evaluation" / "threshold.json").read_text())
    assert summary["images"] == 3 and summary["dice_real"] == 1 and summary["polarity"] == "brighter"
    rows = list(csv.DictReader((folder / "evaluation" / "threshold.csv").open()))
    assert [row["image"] for row in rows] == [f"images/cells_0{number}.png" for number in range(3)]
    assert np.mean([float(row["dice_synthetic"]) for row in rows]) == pytest.approx(summary["dice_synthetic"], abs=1e-5)
    with Image.open(folder / "evaluation" / "threshold.png") as picture:
        assert min(picture.size) > 200
    assert {path.name for path in (folder / "evaluation").iterdir()} == {
        "threshold.json", "threshold.csv", "threshold.png",
    }  # fmt: skip


def test_command_ends_with_one_line_and_code_two_on_bad_input(tmp_path):
    finished = run("threshold", str(tmp_path / "absent"))
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert "manifest.csv" in finished.stderr


@pytest.mark.parametrize("arguments", [[], *([name] for name in evaluate.MEASURES)], ids=str)
def test_help_exits_zero(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.parse_args([*arguments, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "usage" in text and "(default: [" not in text and "(default: True)" not in text


def test_misspelt_flag_is_refused_with_the_one_that_was_meant(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.parse_args(["threshold", str(tmp_path), "--real-dirr", "x"])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "--real-dirr" in printed and printed.count("\n") == 1
