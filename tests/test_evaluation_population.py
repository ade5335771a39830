"""evaluate.py population: shapes, brightness and texture of drawn cells, and distances of known populations."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import tifffile
from drawn_sets import Row, disk, five_rows, paint, place, write_set
from PIL import Image

import evaluate
from common.errors import InputError
from dataset.config import DataConfig
from evaluation.fidelity import LabelledImage
from evaluation.looks import score_looks
from evaluation.population import (
    compare_populations,
    measure_image,
    measure_population,
    score_population,
    write_population_report,
)
from synthetic.manifest import write_manifest
from synthetic.reader import SampleSet

SIZE = 64


def ellipse(height: int, width: int, row: float, column: float, a: float, b: float, angle: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    x = (columns - column) * np.cos(angle) + (rows - row) * np.sin(angle)
    y = -(columns - column) * np.sin(angle) + (rows - row) * np.cos(angle)
    return (x / a) ** 2 + (y / b) ** 2 <= 1


def item_of(instance_map: np.ndarray, image: np.ndarray | None = None) -> LabelledImage:
    image = paint(instance_map > 0) if image is None else image
    return LabelledImage(image, (instance_map > 0).astype(np.uint8), instance_map)


# --- one image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0, 0.5, np.pi / 2])
def test_ellipse_gives_its_area_and_eccentricity_at_any_angle(angle):
    found = measure_image(item_of(ellipse(70, 90, 34, 44, 20, 12, angle).astype(int)))
    assert found["count"].tolist() == [1]
    assert found["area"] == pytest.approx(np.pi * 20 * 12, rel=0.02)
    assert found["eccentricity"] == pytest.approx(np.sqrt(1 - 0.6**2), abs=0.01)


def test_disk_has_no_eccentricity_and_a_line_nearly_one():
    assert measure_image(item_of(disk(SIZE, 30, 30, 12).astype(int)))["eccentricity"] == pytest.approx(0, abs=0.05)
    line = np.zeros((30, 40), int)
    line[15, 5:35] = 3
    assert measure_image(item_of(line))["eccentricity"][0] > 0.99


@pytest.mark.parametrize(("height", "width", "value"), [(4, 8, np.sqrt(48 / 63)), (1, 2, 1), (1, 1, 0), (5, 5, 0)])
def test_eccentricity_takes_pixels_as_points(height, width, value):
    """As scikit-image and CellProfiler do. With pixels as squares a variance of 1 / 12 would be added to each side."""
    cells = np.zeros((20, 30), int)
    cells[7 : 7 + height, 9 : 9 + width] = 1
    assert measure_image(item_of(cells))["eccentricity"] == pytest.approx([value])


def test_cells_at_the_edge_are_counted_but_have_no_area():
    cells = np.zeros((40, 50), int)
    cells[10:14, 20:26], cells[0:5, 30:36], cells[36:40, 1:4] = 7, 9, 2
    found = measure_image(item_of(cells))
    assert found["count"].tolist() == [3] and found["area"].tolist() == [24]
    assert len(found["intensity"]) == 3


def test_brightness_and_contrast_are_the_painted_gray_values():
    cells = np.zeros((40, 50), int)
    cells[10:20, 10:20], cells[25:35, 30:40] = 1, 2
    image = np.full((40, 50, 3), 51, np.uint8)
    image[cells == 1], image[cells == 2] = 153, 204
    found = measure_image(item_of(cells, image))
    assert found["intensity"] == pytest.approx([0.6, 0.8]) and found["contrast"] == pytest.approx([0.4, 0.6])


def test_the_spread_in_an_image_is_that_of_its_cells_means():
    cells = np.zeros((SIZE, SIZE), int)
    cells[5:15, 5:15], cells[30:40, 30:45] = 1, 2
    image = np.full((SIZE, SIZE, 1), 40, np.uint8)
    image[cells == 1], image[cells == 2] = 100, 200
    assert measure_image(item_of(cells, image))["spread"] == pytest.approx([50 / 255])
    assert measure_image(item_of(np.where(cells == 1, 1, 0), image))["spread"].size == 0


def test_flat_cells_have_no_texture_and_noise_has_its_standard_deviation():
    cells = disk(SIZE, 30, 30, 20).astype(int)
    assert measure_image(item_of(cells))["texture"] == pytest.approx(0, abs=1e-6)
    noise = np.random.default_rng(0).normal(0, 20, (SIZE, SIZE, 1))
    noisy = np.clip(paint(cells > 0, 128) + noise, 0, 255).astype(np.uint8)
    kept = np.sqrt(1 - 2 / (4 * np.pi * 4) * 2 + 1 / (4 * np.pi * 4))  # variance left by subtracting a Gaussian mean
    assert measure_image(item_of(cells, noisy))["texture"] == pytest.approx(20 / 255 * kept, rel=0.05)


def test_image_without_cells_has_a_count_of_zero_only():
    found = measure_image(item_of(np.zeros((20, 30), int)))
    assert found["count"].tolist() == [0] and all(len(found[name]) == 0 for name in found if name != "count")


def test_image_that_is_all_cell_has_no_contrast():
    found = measure_image(item_of(np.ones((20, 30), int)))
    assert len(found["contrast"]) == 0 and len(found["intensity"]) == 1 and len(found["area"]) == 0


# --- populations -----------------------------------------------------------------------------------------------------


def population_of(radius: float, cell: int, count: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        cells = disk(SIZE, *place(rng, 25, 38), radius)
        images.append(item_of(cells.astype(int), paint(cells, cell)))
    return measure_population(images)


def test_brighter_cells_are_that_far_apart_and_nothing_else_is():
    real, brighter = population_of(9, 150), population_of(9, 175, seed=1)
    scores = compare_populations(brighter, real, range(len(real)))
    assert scores["intensity"].distance == pytest.approx(25 / 255) == scores["contrast"].distance
    assert scores["intensity"].real_distance == pytest.approx(0, abs=1e-9)
    assert scores["count"].distance == 0 and scores["eccentricity"].distance < 0.1
    assert scores["area"].distance < 0.02 * np.pi * 81


def test_equal_populations_differ_no_more_than_real_halves():
    rng = np.random.default_rng(0)

    def draw(count):
        names = ("area", "eccentricity", "intensity", "contrast", "texture")
        ones = {"count": lambda: rng.poisson(9, 1).astype(float), "spread": lambda: rng.normal(5, 1, 1)}
        return [
            {name: rng.normal(5, 1, 20) for name in names} | {name: one() for name, one in ones.items()}
            for _ in range(count)
        ]

    for score in compare_populations(draw(30), draw(30), range(30)).values():
        assert score.distance < 1.5 * score.real_distance_max
    for synthetic, real in ((400, 40), (40, 400), (10, 40)):  # however many there are, they are equally far
        scores = compare_populations(draw(synthetic), draw(real), range(real)).values()
        ratios = [score.distance / score.real_distance for score in scores]
        assert 0.8 < np.mean(ratios) < 1.25


def test_shapes_of_the_same_masks_are_as_far_from_half_of_the_real_images_as_the_other_half_is(tmp_path):
    score = score_population(bright_set(tmp_path / "set", 175))[0].quantities
    assert all(score[name].distance == score[name].real_distance for name in ("count", "area", "eccentricity"))
    assert score["intensity"].distance > 0 and score["intensity"].real_distance == pytest.approx(0, abs=1e-9)


def test_a_single_real_image_is_compared_as_a_whole(tmp_path):
    real, brighter = population_of(9, 150, count=2), population_of(9, 175, count=3)
    score = compare_populations(brighter, real, ["one", "one"])["intensity"]
    assert score.distance == pytest.approx(25 / 255) and score.real_distance is None


def test_looks_that_are_those_of_the_real_images_are_as_far_from_half_of_them_as_the_other_half_is(tmp_path):
    rng = np.random.default_rng(0)
    label = np.where(disk(SIZE, 30, 30, 9), 255, 0).astype(np.uint8)
    images = [paint(label > 0, int(rng.integers(100, 200)), int(rng.integers(10, 90))) for _ in range(20)]
    samples = SampleSet(write_set(tmp_path / "set", [Row(label, image, image) for image in images]))
    paired = score_looks(samples).numbers.values()
    assert all(one.distance == one.real_distance for one in paired)
    in_folder = score_looks(samples, tmp_path / "set_real").numbers.values()
    assert sum(one.distance for one in in_folder) > 0.5 * sum(one.real_distance for one in in_folder) > 0


def test_missing_cells_leave_the_distance_unknown():
    empty = measure_population([item_of(np.zeros((20, 20), int))] * 2)
    scores = compare_populations(empty, population_of(9, 150), range(12))
    assert scores["area"].distance is None and scores["count"].distance == 1


# --- sets ------------------------------------------------------------------------------------------------------------


def bright_set(folder, cell: int, radius: float = 9) -> SampleSet:
    rows = []
    for seed in range(6):
        cells = disk(SIZE, 25 + seed, 30, radius)
        label = np.where(cells, 255, 0).astype(np.uint8)
        rows.append(Row(label, paint(cells, cell), paint(cells, 150)))
    return SampleSet(write_set(folder, rows))


def test_set_against_its_own_real_images_and_against_a_folder(tmp_path):
    samples = bright_set(tmp_path / "set", 175)
    own, _, _ = score_population(samples)
    assert own.quantities["intensity"].distance == pytest.approx(25 / 255) and "same masks" in own.real_images_are
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(3):
        cells = disk(SIZE, 30, 30, 6)
        Image.fromarray(paint(cells, 150)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(np.where(cells, 255, 0).astype(np.uint8)).save(tmp_path / "masks" / f"{number}.png")
    other, _, _ = score_population(samples, tmp_path / "images", tmp_path / "masks")
    expected = disk(SIZE, 30, 30, 9).sum() - disk(SIZE, 30, 30, 6).sum()
    assert other.quantities["area"].distance == pytest.approx(expected) and other.real_images == 3


def test_several_samples_of_one_mask_leave_the_distance_of_real_halves_as_it_is(tmp_path):
    rows = [
        Row(np.where(cells, 255, 0).astype(np.uint8), paint(cells, 170), paint(cells, 150 - 9 * number))
        for number, cells in enumerate(disk(SIZE, 25 + number, 30, 5 + number) for number in range(6))
    ]
    samples = SampleSet(write_set(tmp_path / "set", rows))
    once, looks_once = score_population(samples)[0], score_looks(samples)
    write_manifest(samples.folder, [row.columns for row in samples.samples for _ in range(4)])
    samples = SampleSet(samples.folder)
    report, looks = score_population(samples)[0], score_looks(samples)
    assert (report.synthetic_images, report.real_images, looks.synthetic_images, looks.real_images) == (24, 6, 24, 6)
    for quantity in ("area", "intensity", "contrast"):
        distance = report.quantities[quantity].real_distance
        assert distance == pytest.approx(once.quantities[quantity].real_distance) and distance > 0
    for name, number in looks.numbers.items():
        assert number.real_distance == pytest.approx(looks_once.numbers[name].real_distance)


def test_crops_of_one_real_image_lie_in_one_half(tmp_path):
    """Each image has cells of its own gray value, so only halves that share images are alike."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    cells = np.tile(disk(16, 8, 8, 5), (8, 8))
    for number in range(4):
        Image.fromarray(paint(cells, 80 + 40 * number)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(np.where(cells, 255, 0).astype(np.uint8)).save(tmp_path / "masks" / f"{number}.png")
    samples = SampleSet(write_set(tmp_path / "set", five_rows(SIZE), DataConfig(SIZE, crop="random")))
    report, _, real = score_population(samples, tmp_path / "images", tmp_path / "masks")
    assert len(real) == 16 and report.real_images == 4
    assert report.quantities["intensity"].real_distance > 40 / 255


def test_ids_that_are_stored_as_float_are_cells(tmp_path):
    """Fiji stores label images with large ids as 32-bit floats."""
    cells = np.zeros((SIZE, SIZE), np.float32)
    cells[10:20, 10:20], cells[10:20, 20:30] = 70000, 3
    samples = SampleSet(write_set(tmp_path / "set", [Row(cells.astype(np.uint8), paint(cells), mask_type="instances")]))
    (tmp_path / "set" / "masks" / "cells_00.png").unlink()
    tifffile.imwrite(tmp_path / "set" / "masks" / "cells_00.tif", cells)
    write_manifest(samples.folder, [row.columns | {"label": "masks/cells_00.tif"} for row in samples.samples])
    for kind, content in (("images", paint(cells)), ("masks", cells)):
        (tmp_path / kind).mkdir()
        tifffile.imwrite(tmp_path / kind / "a.tif", content)
    samples = SampleSet(samples.folder)
    report, synthetic, real = score_population(samples, tmp_path / "images", tmp_path / "masks", "instances")
    for population in (synthetic, real):
        assert population[0]["area"].tolist() == [100, 100]
    assert report.cells_are == "instances" and samples.instance_map(samples.samples[0]).dtype.kind == "i"


def test_real_ids_of_few_cells_are_read_as_those_of_the_set(tmp_path):
    cells = np.zeros((SIZE, SIZE), np.uint8)
    cells[10:20, 10:20], cells[10:20, 20:30] = 1, 2  # two cells that touch, not the classes 1 and 2
    rows = [Row(cells, paint(cells > 0), mask_type="instances")]
    samples = SampleSet(write_set(tmp_path / "set", rows, DataConfig(SIZE, num_classes=3)))
    for kind, content in (("images", paint(cells > 0)), ("masks", cells)):
        (tmp_path / kind).mkdir()
        Image.fromarray(content).save(tmp_path / kind / "a.png")
    report, _, real = score_population(samples, tmp_path / "images", tmp_path / "masks")
    assert report.cells_are == "instances" and real[0]["count"].tolist() == [2]


def test_files_hold_the_table_every_value_and_the_histograms(tmp_path):
    samples = bright_set(tmp_path / "set", 175)
    folder = write_population_report(samples, *score_population(samples))
    rows = list(csv.DictReader((folder / "population.csv").open()))
    assert sum(row["set"] == "real" and row["quantity"] == "area" for row in rows) == 6
    assert json.loads((folder / "population.json").read_text())["quantities"]["intensity"]["relative"] is None
    assert np.array(Image.open(folder / "population.png")).std() > 5


def test_command_prints_the_table_and_wants_both_folders_or_none(tmp_path, capsys):
    samples = bright_set(tmp_path / "set", 175)
    with pytest.raises(InputError, match="go together"):
        evaluate.main(evaluate.parse_args(["population", str(samples.folder), "--data-path", str(tmp_path)]))
    evaluate.main(evaluate.parse_args(["population", str(samples.folder)]))
    printed = capsys.readouterr().out
    assert "mean gray of a cell" in printed and "connected components" in printed
