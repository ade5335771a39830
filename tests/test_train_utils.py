"""Seeds, averages and pictures that the commands share."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from common.pictures import from_uint8, grid_image, mask_picture, to_uint8
from common.randomness import derived_seed, seed_step, shuffled_by_hash
from engine.machine import update_ema


def test_neighbouring_seeds_are_unrelated_and_fit_torch():
    seeds = {derived_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_step_draws_the_same_whatever_came_before():
    seed_step(1, 10, 0)
    first = torch.randn(4)
    torch.randn(100)
    seed_step(1, 10, 0)
    assert torch.equal(torch.randn(4), first)
    seed_step(1, 10, 1)
    assert not torch.equal(torch.randn(4), first)


def test_ema_follows_its_formula_and_warms_up():
    model = nn.Linear(3, 2)
    ema = copy.deepcopy(model)
    start = ema.weight.clone()
    nn.init.ones_(model.weight)
    update_ema(ema, model, decay=0.99, step=5)
    assert torch.allclose(ema.weight, start * (6 / 15) + 9 / 15)
    before = ema.weight.clone()
    update_ema(ema, model, decay=0.99, step=10**6)
    assert torch.allclose(ema.weight, before * 0.99 + 0.01)


@pytest.mark.parametrize(("value", "byte"), [(-1.0, 0), (1.0, 255), (0.0, 128), (-3.0, 0), (7.0, 255)])
def test_images_are_rounded_and_clipped_to_bytes(value, byte):
    assert np.all(to_uint8(torch.full((3, 2, 4), value)) == byte)
    assert to_uint8(torch.zeros(3, 2, 4)).shape == (2, 4, 3)


def test_grid_places_rows_and_columns():
    dark, bright = torch.full((3, 4, 6), -1.0), torch.full((3, 4, 6), 0.0)
    grid = grid_image([[dark, bright], [bright, dark]])
    assert grid.shape == (2 * 6 + 2, 2 * 8 + 2, 3)
    assert grid[3, 3, 0] == 0 and grid[3, 11, 0] == 128 and grid[9, 3, 0] == 128 and grid[0, 0, 0] == 255


def test_mask_picture_shows_background_black_and_cells_white():
    prob_map = torch.tensor([[[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.5]]])
    assert torch.allclose(mask_picture(prob_map), torch.tensor([-1.0, 1.0, 0.0]).expand(3, 1, 3), atol=1e-6)


def test_from_uint8_undoes_to_uint8_for_every_byte_and_any_strides():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    for image in (every, every[::-1, 3:9], np.rot90(every, 1)):
        assert np.array_equal(to_uint8(from_uint8(image)), image)
    scaled = from_uint8(every[:2])
    assert scaled.shape == (3, 2, 16) and scaled.dtype == torch.float32 and scaled.min() == -1
    assert from_uint8(every).max() == 1


def test_order_by_hash_follows_seed_and_names_and_not_the_order_given():
    names = [f"cell_{number}" for number in range(30)]
    order = shuffled_by_hash(names, 0)
    assert sorted(order) == sorted(names) and order != names
    assert shuffled_by_hash(names[::-1], 0) == order != shuffled_by_hash(names, 1)
    assert shuffled_by_hash(names[:20], 0) == [name for name in order if name in names[:20]]
    assert shuffled_by_hash(["a", "b", "c", "d"], 0) == list("bacd")  # sets made before stay as they are
