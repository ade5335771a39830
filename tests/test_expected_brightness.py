"""benchmarks/expected_brightness.py: how bright images are that resemble the training images, whatever others are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn_sets import Row, disk, paint, write_set
from PIL import Image

from benchmarks import expected_brightness
from common.errors import InputError
from dataset.config import DataConfig

SIZE = 24
CONFIG = DataConfig(SIZE, crop="random")


def training(folder: Path) -> list[str]:
    """Ten pairs with cells of 200 on a background of 40, of many sizes; the flags that name them."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(10):
        cells = disk(SIZE, 12, 12, 2 + number)
        Image.fromarray(paint(cells)).save(folder / "images" / f"{number}.png")
        Image.fromarray(np.where(cells, 255, 0).astype(np.uint8)).save(folder / "masks" / f"{number}.png")
    return ["--data-path", str(folder / "images"), "--mask-path", str(folder / "masks")]


def test_darker_real_images_do_not_make_a_right_set_too_bright(tmp_path, capsys):
    masks = [disk(SIZE, 10, 10, radius) for radius in (3, 5, 8)]
    label = [np.where(cells, 255, 0).astype(np.uint8) for cells in masks]
    rows = [Row(one, paint(cells), paint(cells, 100, 20)) for one, cells in zip(label, masks, strict=True)]
    folder = write_set(tmp_path / "set", rows, CONFIG)
    expected_brightness.main(expected_brightness.parse_args([str(folder), *training(tmp_path / "pairs")]))
    row = capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]
    of_real, of_expected = float(row[4]), float(row[5])
    assert of_real == pytest.approx(2, abs=0.05) and of_expected == pytest.approx(1, abs=0.005)


def test_the_line_is_read_at_the_fractions_of_the_set():
    fractions = np.linspace(0, 1, 12).reshape(6, 2)
    pairs = np.stack([fractions, 0.2 + 0.5 * fractions], axis=-1)
    mean, error = expected_brightness.expected_with_error(pairs, np.array([0.1, 0.3]), np.random.default_rng(0))
    assert mean == pytest.approx(0.3) and error == pytest.approx(0, abs=1e-9)


def test_a_set_without_real_images_is_refused(tmp_path):
    cells = disk(SIZE, 10, 10, 4)
    folder = write_set(tmp_path / "set", [Row(np.where(cells, 255, 0).astype(np.uint8), paint(cells))], CONFIG)
    words = [str(folder), *training(tmp_path / "pairs")]
    with pytest.raises(InputError, match="names no real images"):
        expected_brightness.main(expected_brightness.parse_args(words))
