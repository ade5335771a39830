"""benchmarks/compare_sets.py: rows of sets and the real images; sets of other masks are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn_sets import Row, write_set
from PIL import Image

from benchmarks import compare_sets
from common.errors import InputError
from synthetic.reader import SampleSet

SIZE = 128  # a picture of this size is shown as it is


def flat_set(folder: Path, gray: int, count: int = 2, real: int = 0) -> Path:
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[40:60, 40:60] = 255
    image, other = (np.full((SIZE, SIZE, 3), value, np.uint8) for value in (gray, real))
    return write_set(folder, [Row(label, image, other)] * count)


def test_rows_are_the_sets_and_the_real_images(tmp_path):
    one, two = flat_set(tmp_path / "one", 60), flat_set(tmp_path / "two", 120)
    args = compare_sets.parse_args([f"a={one}", f"b={two}", "--gamma", "1", "--output", str(tmp_path / "out.png")])
    compare_sets.main(args)
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    right = sheet[:, -SIZE:]  # the last column, without captions
    values = [int(right[row, SIZE // 2, 0]) for row in (64, 64 + 130, 64 + 260)]
    assert values == [60, 120, 0]


def test_gamma_below_one_brightens():
    image = np.full((2, 2, 3), 64, np.uint8)
    assert float(compare_sets.picture(image, 0.5)[0, 0, 0]) == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_sets_of_other_masks_are_refused(tmp_path):
    sets = {str(count): SampleSet(flat_set(tmp_path / str(count), 60, count)) for count in (2, 3)}
    with pytest.raises(InputError, match="holds other images"):
        compare_sets.sheet(sets, 2, 1.0)


def test_a_word_without_a_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare_sets.parse_args(["samples", "--output", "out.png"])
    assert "NAME=SAMPLES" in capsys.readouterr().err
