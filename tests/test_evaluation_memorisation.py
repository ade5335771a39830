"""evaluate.py memorisation: a planted copy is found in every turn and at every offset, unrelated images are not."""

from __future__ import annotations

import csv
import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from drawn_sets import Row, write_set
from PIL import Image

import evaluate
from common.errors import InputError
from dataset.config import DataConfig
from dataset.views import SYMMETRIES, turn
from evaluation.memorisation import score_memorisation, write_memorisation_report
from evaluation.nearest import Match, NearestTraining, small_gray
from synthetic.manifest import write_manifest
from synthetic.reader import SampleSet, read_real

SIZE = 48


def blobs(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A smooth random gray picture, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    gray = np.zeros((height, width))
    for _ in range(max(6, height * width // 300)):
        row, column, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 7)
        gray += rng.uniform(0.3, 1) * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * radius**2))
    return np.repeat((30 + 200 * gray / gray.max()).astype(np.uint8)[..., None], 3, axis=-1)


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    return np.clip(image * 0.8 + 15 + np.random.default_rng(seed).normal(0, 5, image.shape), 0, 255).astype(np.uint8)


def save(folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def blob_set(folder: Path, images: list[np.ndarray], **settings) -> SampleSet:
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[5:20, 7:30] = 255
    config = DataConfig(image_size=SIZE, **settings)
    return SampleSet(write_set(folder, [Row(label, image) for image in images], config))


@pytest.fixture
def training(tmp_path) -> Path:
    return save(tmp_path / "train", {f"train_{seed}": blobs(seed) for seed in range(12)})


@pytest.fixture
def held_out(tmp_path) -> Path:
    return save(tmp_path / "held_out", {f"other_{seed}": blobs(200 + seed) for seed in range(8)})


# --- distance --------------------------------------------------------------------------------------------------------


def test_copy_has_distance_zero_whatever_its_brightness_and_contrast():
    pictures = [small_gray(blobs(seed), 1.5) for seed in range(3)]
    nearest = NearestTraining(pictures, 32)
    copy, negative = nearest.find([pictures[1] * 0.4 + 0.2, -pictures[1]])
    assert copy == Match(pytest.approx(0, abs=1e-6), 1, 0) and negative.distance > 0.5


def test_distance_follows_from_the_correlation():
    rng = np.random.default_rng(0)
    first, second = (one - one.mean() for one in rng.normal(size=(2, 20, 20)))
    second -= first * (first * second).sum() / (first**2).sum()
    mixed = first / np.linalg.norm(first) * 0.6 + second / np.linalg.norm(second) * 0.8  # correlation 0.6
    assert NearestTraining([first], 20).find([mixed])[0].distance == pytest.approx(np.sqrt(2 * 0.4))


@pytest.mark.parametrize("symmetry", range(SYMMETRIES))
def test_turned_copy_is_found_with_its_turn_whole_and_sliding(symmetry):
    large = [small_gray(blobs(seed, 60, 71), 1) for seed in range(3)]
    whole = NearestTraining([one[:32, :32] for one in large], 32)
    (match,) = whole.find([turn(large[2][:32, :32], (0, 1), symmetry)])
    assert (match.index, match.symmetry) == (2, symmetry) and match.distance < 1e-6
    (match,) = NearestTraining(large, 32).find([turn(large[1][13:45, 29:61], (0, 1), symmetry)])
    assert (match.index, match.symmetry, match.top, match.left) == (1, symmetry, 13, 29)
    assert match.distance < 1e-6


def test_flat_pictures_match_nothing_and_are_matched_by_nothing():
    flat = np.full((32, 32), 0.5)
    picture = small_gray(blobs(0), 1.5)
    nearest = NearestTraining([flat, picture], 32)
    nothing, match = nearest.find([flat, picture])
    assert nothing is None and match.index == 1
    assert NearestTraining([np.full((40, 50), 0.3)], 32).find([picture])[0].distance >= np.sqrt(2)


def test_a_picture_that_is_skipped_does_not_match_itself():
    for height, width in ((32, 32), (50, 43)):
        pictures = [small_gray(blobs(seed, height, width), 1) for seed in range(40)]
        nearest = NearestTraining(pictures, 32)
        windows = [picture[:32, :32] for picture in pictures]
        own, others = nearest.find(windows), nearest.find(windows, range(40))
        assert [match.index for match in own] == list(range(40)) and max(match.distance for match in own) < 1e-6
        assert all(match.index != number and match.distance > 0.1 for number, match in enumerate(others))


@pytest.mark.parametrize("size", [32, 36])
def test_the_matches_are_the_same_in_blocks_of_training_pictures(size, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [*rng.normal(size=(60, size, size))] * 2  # of two copies, the first is found
    places = range(0, 120, 5)
    queries = [rng.normal(size=(32, 32)) + pictures[place][:32, :32] for place in places]
    found = []
    for block in (7, len(pictures)):
        monkeypatch.setattr("evaluation.nearest.BLOCK", block)
        nearest = NearestTraining(pictures, 32)
        found.append([nearest.find(queries), nearest.find(queries, places)])
    assert found[0] == found[1]
    own, others = ([match.index for match in matches] for matches in found[0])
    assert own == [place % 60 for place in places] and others == [(place + 60) % 120 for place in places]


def test_the_memory_does_not_grow_with_the_training_pictures():
    rng = np.random.default_rng(0)
    queries, pictures = [*rng.normal(size=(200, 4, 4))], [*rng.normal(size=(2000, 4, 4))]
    tracemalloc.start()
    NearestTraining(pictures, 4).find(queries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(queries) * len(pictures)  # less than one number for each pair


def all_distances(query: np.ndarray, picture: np.ndarray) -> dict[tuple[int, int, int], float]:
    """Distance of a query to every window in every turn, one by one: (symmetry, top, left) -> distance."""
    side, found = len(query), {}
    for top, left in np.ndindex(*(length - side + 1 for length in picture.shape)):
        for symmetry in range(SYMMETRIES):
            window = turn(picture[top : top + side, left : left + side], (0, 1), symmetry)
            correlation = np.corrcoef(window.ravel(), query.ravel())[0, 1]
            found[symmetry, top, left] = np.sqrt(max(0, 2 * (1 - correlation)))
    return found


@pytest.mark.parametrize("shape", [(20, 20), (24, 29)], ids=["whole", "shifted"])
def test_match_is_the_best_of_all_windows_in_all_turns(shape):
    pictures = [small_gray(blobs(seed, *shape), 1) for seed in range(4)]
    queries = [small_gray(blobs(50 + seed, 20, 20), 1) for seed in range(3)]
    for query, match in zip(queries, NearestTraining(pictures, 20).find(queries), strict=True):
        distances = [all_distances(query, picture) for picture in pictures]
        assert match.distance == pytest.approx(distances[match.index][match.symmetry, match.top, match.left])
        assert match.distance == pytest.approx(min(min(one.values()) for one in distances))


# --- sets ------------------------------------------------------------------------------------------------------------


def test_planted_copy_is_found_and_own_images_are_like_held_out_ones(tmp_path, training, held_out):
    copy = noisy(np.rot90(blobs(7)), seed=0)
    samples = blob_set(tmp_path / "set", [blobs(300), copy, blobs(301), blobs(302)])
    report, closest, paths = score_memorisation(samples, training, held_out)
    assert report.closest[0]["image"] == "images/cells_01.png"
    assert report.closest[0]["training_image"] == "train_7.png" and paths[closest[0][1].index].name == "train_7.png"
    assert report.samples[1] < 0.2 < min(report.reference)
    others = [value for index, value in enumerate(report.samples) if index != 1]
    assert min(others) > 0.6 * min(report.reference) and report.closer_than_any >= 1
    assert len(report.reference) == 8 and report.training_images == 12


def test_planted_window_of_a_larger_training_image_is_found(tmp_path):
    large = {f"large_{seed}": blobs(seed, 90, 110) for seed in range(3)}
    training = save(tmp_path / "train", large)
    held_out = save(tmp_path / "held_out", {"other": blobs(900, 90, 110)})
    copy = noisy(np.flip(large["large_2"][22 : 22 + SIZE, 37 : 37 + SIZE], 1), seed=1)
    samples = blob_set(tmp_path / "set", [blobs(300), copy], crop="random")
    report, _, _ = score_memorisation(samples, training, held_out)
    assert report.closest[0]["training_image"] == "large_2.png" and report.closest[0]["image"] == "images/cells_01.png"
    assert report.samples[1] < 0.35 < report.samples[0]
    assert abs(report.closest[0]["top"] * 1.5 - 22) <= 1 and abs(report.closest[0]["left"] * 1.5 - 37) <= 1


def test_without_held_out_images_each_training_image_stands_beside_the_others(tmp_path, training):
    report, _, _ = score_memorisation(blob_set(tmp_path / "set", [blobs(300)]), training)
    assert len(report.reference) == 12 and min(report.reference) > 0.2 and "nearest other one" in report.reference_is
    one = save(tmp_path / "one", {"a": blobs(1)})
    with pytest.raises(InputError, match="give held-out real images"):
        score_memorisation(blob_set(tmp_path / "set2", [blobs(300)]), one)


def test_images_that_training_holds_twice_are_no_yardstick(tmp_path, training, held_out):
    copies = blob_set(tmp_path / "set", [blobs(3), blobs(4), blobs(300)])
    Image.fromarray(noisy(blobs(3), 1)).save(training / "twice.png")
    report, _, _ = score_memorisation(copies, training)
    assert (report.closer_than_any, report.reference_left_out, len(report.reference)) == (2, 2, 11)
    Image.fromarray(blobs(5)).save(held_out / "leaked.png")
    report, _, _ = score_memorisation(copies, training, held_out)
    assert (report.closer_than_any, report.reference_left_out, len(report.reference)) == (2, 1, 8)
    with pytest.raises(InputError, match="every image shows what a training image shows"):
        score_memorisation(copies, training, training)


def test_every_copy_of_a_training_image_leaves_the_references(tmp_path, training, held_out):
    """Whatever the order in which a set of paths is walked: no copy is left, so copies in the synthetic set show."""
    copies = blob_set(tmp_path / "set", [blobs(3), blobs(300)])
    for number in range(6):
        Image.fromarray(blobs(3)).save(held_out / f"copy_{number}.png")
    report, _, _ = score_memorisation(copies, training, held_out)
    assert (report.closer_than_any, report.reference_left_out, len(report.reference)) == (1, 6, 8)


def test_a_field_of_several_squares_is_expected_nearer_than_all_references_more_often(tmp_path, training, held_out):
    fields = [blobs(400 + number, 2 * SIZE, 2 * SIZE) for number in range(3)]
    fields[2][:SIZE, :SIZE] = 90  # a flat square is compared with nothing
    label = np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    rows = [Row(label, image) for image in fields]
    samples = SampleSet(write_set(tmp_path / "set", rows, DataConfig(image_size=SIZE), tile_scale=1.0))
    report, _, _ = score_memorisation(samples, training, held_out)
    squares = [4, 4, 3]
    assert [len(samples.squares(field)) for field in fields] == [4, 4, 4]
    assert report.closer_by_chance == pytest.approx(sum(k / (8 + k) for k in squares))


def test_a_training_image_is_at_distance_zero_from_itself_if_its_brightest_part_lies_outside_of_the_square(tmp_path):
    """The gray range is that of the whole image, as in training and in sampling."""
    config = DataConfig(image_size=SIZE, window=(0.0, 99.0))
    image = np.concatenate([blobs(1, SIZE, SIZE), np.full((SIZE // 2, SIZE, 3), 255, np.uint8)]) // 2
    image[SIZE:] = 255
    training = save(tmp_path / "train", {"a": np.concatenate([image[SIZE:], image]), "b": blobs(2)})
    own = read_real(training / "a.png", config)
    samples = SampleSet(write_set(tmp_path / "set", [Row(np.zeros((SIZE, SIZE), np.uint8), own)], config))
    report, _, _ = score_memorisation(samples, training)
    assert report.samples[0] < 1e-6


def test_images_smaller_than_a_random_crop_are_refused_by_name(tmp_path, training, held_out):
    samples = blob_set(tmp_path / "set", [blobs(300)], crop="random")
    for folder in (training, held_out):
        Image.fromarray(blobs(5, SIZE - 8, SIZE)).save(folder / "small.png")
        with pytest.raises(InputError, match=rf"{folder.name}.small\.png: an image of 48 x 40 pixels is smaller"):
            score_memorisation(samples, training, held_out)
        (folder / "small.png").unlink()


def test_samples_made_from_training_masks_are_counted_apart(tmp_path, training, held_out):
    samples = blob_set(tmp_path / "set", [noisy(blobs(3), 1), noisy(blobs(4), 2), blobs(300)])
    masks = save(tmp_path / "masks", {"a": np.full((4, 5), 255, np.uint8)})
    digest = hashlib.sha256((masks / "a.png").read_bytes()).hexdigest()
    rows = [
        row.columns | {"source_mask_sha256": digest if n == 0 else "other"} for n, row in enumerate(samples.samples)
    ]
    write_manifest(samples.folder, rows)
    report, _, _ = score_memorisation(SampleSet(samples.folder), training, held_out, masks)
    assert (report.closer_than_any, report.made_from_training_masks, report.closer_of_other_masks) == (2, 1, 1)


def test_picture_shows_the_closest_pairs_and_csv_every_image(tmp_path, training, held_out):
    samples = blob_set(tmp_path / "set", [noisy(np.rot90(blobs(7)), 0), np.full((SIZE, SIZE, 3), 9, np.uint8)])
    folder = write_memorisation_report(samples, *score_memorisation(samples, training, held_out))
    rows = list(csv.DictReader((folder / "memorisation.csv").open()))
    assert [row["image"] for row in rows] == ["images/cells_00.png", "images/cells_01.png"]
    assert float(rows[0]["distance"]) < 0.2 and rows[1]["distance"] == ""
    assert len(json.loads((folder / "memorisation.json").read_text())["closest"]) == 1
    assert np.array(Image.open(folder / "memorisation.png")).std() > 10


def test_command_prints_the_numbers(tmp_path, training, held_out, capsys):
    samples = blob_set(tmp_path / "set", [noisy(blobs(7), 0), blobs(300)])
    command = ["memorisation", str(samples.folder), "--data-path", str(training), "--held-out", str(held_out)]
    evaluate.main(evaluate.parse_args(command))
    printed = capsys.readouterr().out
    assert "1 of 2 synthetic images are nearer to a training image" in printed and "held-out real images" in printed
