"""Batches, seeds, averages and pictures that the commands share."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from train_utils import StepBatches, derived_seed, grid_image, mask_picture, seed_step, to_uint8, update_ema


def batches(steps: range, rank: int = 0, world_size: int = 1, items: int = 7, size: int = 4) -> list:
    return list(StepBatches(items, size, steps, seed=3, rank=rank, world_size=world_size))


def test_every_image_is_seen_once_per_epoch_across_batches():
    keys = [key for batch in batches(range(7)) for key in batch]  # 7 steps x 4 = 4 epochs of 7
    assert all(Counter(index for index, _ in keys[7 * epoch : 7 * epoch + 7]).total() == 7 for epoch in range(4))
    assert all(len({index for index, _ in keys[7 * epoch : 7 * epoch + 7]}) == 7 for epoch in range(4))
    assert [draw for _, draw in keys] == list(range(28))


def test_epochs_have_different_orders():
    keys = [index for batch in batches(range(7)) for index, _ in batch]
    assert keys[:7] != keys[7:14]


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one():
    assert batches(range(9))[5:] == batches(range(5, 9))


def test_ranks_share_out_the_same_global_batch():
    whole, halves = batches(range(5)), [batches(range(5), rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    assert all(len(batch) == 2 for half in halves for batch in half)


def test_a_set_smaller_than_a_batch_is_seen_several_times():
    (batch,) = batches(range(1), items=3, size=8)
    assert set(Counter(index for index, _ in batch).values()) <= {2, 3}


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
