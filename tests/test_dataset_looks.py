"""The look of an image as numbers: what changes them and what does not."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from common.errors import InputError
from common.spread import evenly
from dataset.config import DataConfig
from dataset.groups import members_of
from dataset.looks import (
    FARTHEST,
    LEAST_OF_GROUP,
    MOST_LOOKS,
    Looks,
    kept_images,
    look_count,
    look_names,
    measure_draw,
    measure_file,
    measure_image,
    measure_spread,
    measure_tensor,
    measure_window,
)
from dataset.views import SYMMETRIES, turn

RANGE = ((0.0, 255.0),)


def field(size: int, cell: float = 200, background: float = 40, noise: float = 5, shift: int = 0) -> np.ndarray:
    """Disks of radius 5 in rows and columns, none in step with blocks of pixels, uint8 (size, size, 3)."""
    rows, columns = np.indices((size, size)) + shift
    cells = ((rows % 17 - 8) ** 2 + (columns % 17 - 8) ** 2 < 25)[..., None]
    gray = np.where(cells, cell, background) + np.random.default_rng(shift).normal(0, noise, (size, size, 3))
    return gray.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (20, 20), (13, 13)])
def test_a_look_is_the_same_for_all_flips_and_turns(height, width):
    image = np.random.default_rng(0).uniform(-1, 1, (3, height, width)).astype(np.float32)
    image[1] *= np.linspace(0, 1, width)  # not alike in both directions
    side = min(height, width) // 4 * 4
    image = image[:, :side, :side]
    expected = measure_window(image)
    for symmetry in range(SYMMETRIES):
        np.testing.assert_allclose(measure_window(turn(image, (1, 2), symmetry)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("channels", "count"), [(1, 10), (3, 33), (5, 60)])
def test_the_numbers_are_named_and_as_many(channels, count):
    image = np.random.default_rng(0).uniform(-1, 1, (channels, 24, 24)).astype(np.float32)
    numbers = measure_window(image)
    assert numbers.dtype == np.float32 and numbers.shape == (count,) == (look_count(channels),)
    named = dict(zip(look_names(channels), numbers, strict=True))
    last = f", channel {channels - 1}" if channels > 1 else ""
    assert named[f"mean{last}"] == pytest.approx(image[-1].mean(), abs=1e-6)
    assert named[f"spread{last}"] == pytest.approx(image[-1].std(), abs=1e-6)
    assert named[f"quantile 0.75{last}"] == pytest.approx(np.quantile(image[-1], 0.75), abs=0.01)
    steps = [np.diff(image[-1], axis=axis) ** 2 for axis in (0, 1)]
    assert named[f"gradients 1 px{last}"] == pytest.approx(
        np.log(np.mean(steps[0]) / 2 + np.mean(steps[1]) / 2), abs=1e-4
    )
    if channels > 1:
        covariance = np.cov(image[0].ravel(), image[channels - 1].ravel(), bias=True)[0, 1]
        assert named[f"covariance, channels 0 and {channels - 1}"] == pytest.approx(covariance, abs=1e-6)


def test_windows_of_one_image_differ_less_than_images_of_different_looks():
    config = DataConfig(image_size=64, crop="random")
    images = [field(160), field(160, cell=40, background=200), field(160, noise=25)]
    rng = np.random.default_rng(0)
    draws = [np.stack([measure_draw(image, RANGE, config, rng) for _ in range(8)]) for image in images]
    looks = Looks.of(list("abc"), [measure_spread(image, RANGE, config) for image in images])
    scaled = [looks.standardise(one) for one in draws]
    within = max(one.std(axis=0).mean() for one in scaled)
    apart = min(np.abs(scaled[i].mean(axis=0) - scaled[j].mean(axis=0)).mean() for i in range(3) for j in range(i))
    assert within < 0.6 * apart


def test_a_look_does_not_tell_where_cells_lie():
    """The same disks elsewhere, at equal cover: no number moves by more than the noise moves it."""
    config = DataConfig(image_size=64, crop="random")
    here, elsewhere = field(160), field(160, shift=6)
    numbers = measure_image(here, RANGE, config), measure_image(elsewhere, RANGE, config)
    np.testing.assert_allclose(*numbers, rtol=0, atol=0.12)  # energies are logarithms


def test_a_file_is_measured_as_training_measures_it():
    image = field(90)[:, :70]
    for config in (DataConfig(image_size=32, crop="center"), DataConfig(image_size=32, crop="random")):
        numbers = measure_file(image, config)
        assert numbers.shape == (33,)
        if config.crop == "random":
            tensor = image.transpose(2, 0, 1) / 127.5 - 1
            np.testing.assert_allclose(measure_tensor(tensor.astype(np.float32), config), numbers, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [4, 7, 40])
def test_small_images_have_a_look(size):
    config = DataConfig(image_size=64, crop="random")
    assert np.isfinite(measure_image(field(size), RANGE, config)).all()


def test_looks_are_standardised_and_far_ones_cut():
    rng = np.random.default_rng(0)
    windows = [rng.normal(3, 2, (4, 10)).astype(np.float32) for _ in range(50)]
    for one in windows:
        one[:, 0] = 0.5  # the same everywhere
    looks = Looks.of([str(number) for number in range(50)], windows)
    scaled = looks.standardise(np.concatenate(windows))
    assert np.abs(scaled[:, 1:].mean(axis=0)).max() < 1e-4 and np.abs(scaled[:, 1:].std(axis=0) - 1).max() < 0.05
    assert (scaled[:, 0] == 0).all() and scaled.dtype == np.float32
    assert np.abs(looks.standardise(np.full(10, 1e6))).max() == FARTHEST


def test_looks_go_through_plain_numbers_unchanged():
    looks = Looks.of(["a", "b"], [np.random.default_rng(n).normal(0, 1, (3, 10)).astype(np.float32) for n in range(2)])
    again = Looks.from_dict(looks.to_dict())
    assert again.names == looks.names
    assert np.array_equal(again.mean, looks.mean) and np.array_equal(again.spread, looks.spread)
    np.testing.assert_allclose(again.numbers, looks.numbers, rtol=1e-5)
    assert all(again.draw(3, index) == looks.draw(3, index) for index in range(20))
    assert {looks.draw(3, index) for index in range(20)} == {0, 1}
    with pytest.raises(InputError, match="measures looks by recipe 0"):
        Looks.from_dict(looks.to_dict() | {"recipe": 0})


def test_as_many_groups_as_looks_are_drawn_in_no_time():
    names = [str(number) for number in range(MOST_LOOKS)]
    looks = Looks.of(names, [np.zeros((1, 10), np.float32)] * MOST_LOOKS, names)
    begun = time.process_time()
    drawn = [looks.draw(0, index, balanced=True) for index in range(200)]
    assert time.process_time() - begun < 2 and len(set(drawn)) > 180
    by_name = sorted(range(MOST_LOOKS), key=lambda number: names[number])
    assert members_of(names) == [[number] for number in by_name]
    assert members_of(["b", "a", "b", "c", "a"]) == [[1, 4], [0, 2], [3]] and members_of([]) == []


def test_rare_groups_of_a_large_set_keep_looks_and_others_their_shares():
    count = 10 * MOST_LOOKS
    assert kept_images(count) == kept_images(count, ["a"] * count) == evenly(count, MOST_LOOKS)
    assert kept_images(3, ["a", "b", "a"]) == [0, 1, 2]
    groups = np.array(["large"] * count)
    groups[count // 2 :] = "half"
    groups[[5, 7]], groups[20:220] = "two", "rare"
    kept = kept_images(count, list(groups))
    assert kept == sorted(set(kept)) and MOST_LOOKS - 4 <= len(kept) <= MOST_LOOKS
    named = Counter(groups[kept])
    assert named["two"] == 2 and LEAST_OF_GROUP <= named["rare"] <= LEAST_OF_GROUP + 20
    assert abs(named["large"] - named["half"]) < 40
    many = [f"g{number // 11}" for number in range(count)]  # 3724 groups
    assert len(Counter(many[number] for number in kept_images(count, many))) == len(set(many))
    assert len(kept_images(count, [str(number) for number in range(count)])) == MOST_LOOKS


def test_looks_of_chosen_groups_and_groups_drawn_equally_often():
    windows = [np.full((2, 10), number, np.float32) for number in range(5)]
    looks = Looks.from_dict(Looks.of(list("abcde"), windows, ["x", "x", "x", "x", "y"]).to_dict())
    assert looks.groups == ("x", "x", "x", "x", "y") and looks.of_groups(["y"]).names == ("e",)
    with pytest.raises(InputError, match="look_group z: the groups are x, y"):
        looks.of_groups(["z"])
    counts = np.bincount([looks.draw(0, index, balanced=True) for index in range(400)], minlength=5)
    assert 170 < counts[4] < 230 and counts[:4].min() > 30
    old = {name: value for name, value in looks.to_dict().items() if name != "groups"}
    assert Looks.from_dict(old).groups == ()
