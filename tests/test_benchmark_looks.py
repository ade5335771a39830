"""The benchmark of looks: colours are changed as it says, and folds keep the held-out look apart."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from drawn_sets import five_rows, write_set
from PIL import Image
from skimage.color import rgb2lab

from benchmarks import looks
from common.errors import InputError
from evaluation.experiments.segmenter import Square
from synthetic.manifest import write_column


def picture(low: int, high: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (24, 20, 3), dtype=np.uint8)


def test_colour_transfer_gives_an_image_the_mean_and_spread_of_another():
    target = picture(110, 150, seed=1)
    moved = rgb2lab(looks.transfer_colours(picture(60, 200), looks.colour_moments(target)))
    for found, wanted in zip((moved.mean((0, 1)), moved.std((0, 1))), looks.colour_moments(target), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1.0)


@pytest.mark.parametrize("targets", [[], [picture(10, 90, seed=2)]], ids=["random colours", "colours of an image"])
def test_half_of_the_squares_are_recoloured_and_labels_stay(targets):
    class Fixed:
        def draw(self, rng: np.random.Generator, side: int) -> Square:
            return Square(picture(100, 160), np.ones((2, side, side), np.uint8))

    source, rng = looks.Recoloured(Fixed(), targets), np.random.default_rng(0)
    squares = [source.draw(rng, 24) for _ in range(40)]
    changed = sum(not np.array_equal(square.image, picture(100, 160)) for square in squares)
    assert 10 < changed < 30 and all(square.target.all() for square in squares)


def fold(data: Path, name: str, held_out: str) -> looks.Fold:
    args = looks.parse_args([name, "--data", str(data)])
    return looks.Fold(name, data, held_out, data / "out", args)


def test_folds_keep_labels_of_the_held_out_look_and_test_images_apart(tmp_path):
    rows = [(f"{look}_{number}.png", split, look) for look in "ab" for split in ("train", "val") for number in range(3)]
    (tmp_path / "leukocytes").mkdir()
    with (tmp_path / "leukocytes" / "index.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("name", "split", "look"), *rows])
    members = fold(tmp_path, "leukocytes", "b").members
    kinds = {part: {(row["look"], row["split"]) for row in found} for part, found in members.items()}
    assert kinds == {"labelled": {("a", "train")}, "new": {("b", "train")}, "test": {("b", "val")}}
    with pytest.raises(InputError, match="'c' is no look of leukocytes; choose from a, b"):
        fold(tmp_path, "leukocytes", "c")


def test_the_table_shows_mean_and_spread_and_survives_arms_without_scores():
    scores = {
        "real": [
            {"ap50": 0.2, "dice": 0.5, "class_dice": [0.4, None]},
            {"ap50": 0.4, "dice": 0.5, "class_dice": [0.6, 0.8]},
        ]
    }
    lines = looks.table_of(scores | {"ceiling": []}, 3)
    assert lines[2] == "| real | 2 | 0.300 ± 0.141 | 0.500 ± 0.000 | 0.500 ± 0.141 | 0.800 |"
    assert lines[3] == "| ceiling | 0 | - | - | - | - |"


def test_the_picture_shows_each_image_between_its_masks_image_and_its_looks(tmp_path):
    grays = {"a": 60, "b": 220}
    rows = [(f"{look}_{number}.png", "train", look) for look in grays for number in range(5)]
    folder = tmp_path / "leukocytes" / "train"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for name, _, look in rows:
        Image.new("RGB", (64, 64), (grays[look],) * 3).save(folder / "images" / name)
        Image.new("L", (64, 64), 1).save(folder / "masks" / name)
    with (tmp_path / "leukocytes" / "index.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("name", "split", "look"), *rows])
    held_out = fold(tmp_path, "leukocytes", "b")
    held_out.link()
    held_out.write_picture()  # no set yet
    assert not (held_out.folder / "pairs.png").exists()
    samples = write_set(held_out.folder / "set_generator_new", five_rows(64))
    write_column(samples, "source_mask", [f"masks/a_{number}.png" for number in range(5)])
    write_column(samples, "look_image", [f"b_{number}" for number in range(5)])
    (samples / "whole").touch()
    held_out.write_picture()
    sheet = np.asarray(Image.open(held_out.folder / "pairs.png"))
    middle = sheet.shape[0] // 8  # of the first of four rows
    column = sheet[:, -20].astype(int)
    assert [int(column[middle * (2 * row + 1), 0]) for row in (1, 3)] == [60, 220]
