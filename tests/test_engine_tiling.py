"""Tiles cover a field, and their weights sum to 1 without steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tiling import Tiles, hill, spread_starts


@given(side=st.integers(2, 40), more=st.integers(0, 200), shared=st.integers(0, 39))
@settings(max_examples=200, deadline=None)
def test_tiles_cover_the_field_and_share_what_was_asked_for(side, more, shared):
    shared = min(shared, side - 1)
    starts = spread_starts(side + more, side, shared)
    assert starts[0] == 0 and starts[-1] == more
    gaps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    assert all(0 < gap <= side - shared for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spread
    assert not gaps or (len(gaps) - 1) * (side - shared) < more  # one tile fewer would not do


def test_hill_is_positive_smooth_and_symmetric():
    weight = hill(16, torch.device("cpu"))
    assert (weight > 0).all() and torch.allclose(weight, weight.flip(0))
    assert weight.max() <= 1 and weight[0] < 0.01
    assert torch.allclose(weight + weight.roll(8), torch.ones(16))  # half overlap: the weights sum to 1


@pytest.mark.parametrize("overlap", [(0, 0), (3, 2), (4, 5)])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_mean_of_cut_tiles_is_the_field(overlap, batch_size):
    field = torch.randn(5, 23, 17, generator=torch.Generator().manual_seed(0))
    tiles = Tiles((23, 17), (8, 6), overlap)
    sizes = []

    def same(first: int, parts: torch.Tensor) -> torch.Tensor:
        assert torch.equal(parts, tiles.cut(field, first, batch_size))
        sizes.append(len(parts))
        return parts

    assert torch.allclose(tiles.mean(field, same, batch_size), field, atol=1e-6)
    assert sum(sizes) == len(tiles) and max(sizes) <= batch_size


def test_tiles_that_grow_land_on_their_place():
    field = torch.randn(2, 11, 9, generator=torch.Generator().manual_seed(0))
    tiles = Tiles((11, 9), (4, 5), (2, 2))
    enlarge = torch.nn.Upsample(scale_factor=3)
    grown = tiles.mean(field, lambda first, parts: enlarge(parts), 4, scale=3)
    assert torch.allclose(grown, enlarge(field[None])[0], atol=1e-6)
    assert torch.equal(tiles.cut(enlarge(field[None])[0], 2, 3, scale=3), enlarge(tiles.cut(field, 2, 3)))


def test_tiles_that_disagree_are_joined_without_a_step():
    """Every tile says its own constant: the largest step of the mean stays far below the tiles' difference."""
    tiles = Tiles((16, 40), (16, 16), (0, 8))

    def own_constant(first: int, parts: torch.Tensor) -> torch.Tensor:
        return torch.arange(first, first + len(parts)).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).float()

    line = tiles.mean(torch.zeros(1, 16, 40), own_constant, 3)[0, 7]
    assert line[0] == 0 and line[-1] == pytest.approx(3, abs=1e-6)
    steps = line.diff()
    assert (steps >= -1e-6).all() and steps.max() < 0.25
    hard = Tiles((16, 40), (16, 20), (0, 0)).mean(torch.zeros(1, 16, 40), lambda first, parts: parts + first, 1)
    assert hard[0, 7].diff().max() == 1


def test_a_field_of_one_tile_is_what_the_function_gives():
    field = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Tiles((8, 6), (8, 6), (4, 3)).mean(field, lambda first, parts: 3 * parts, 2), 3 * field)


@pytest.mark.parametrize(("field", "overlap"), [((7, 9), (2, 2)), ((9, 9), (8, 2)), ((9, 9), (-1, 2))])
def test_tiles_that_cannot_cover_are_refused(field, overlap):
    with pytest.raises(ValueError, match="do not cover"):
        Tiles(field, (8, 8), overlap)
