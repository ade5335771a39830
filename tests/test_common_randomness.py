"""Seeds and random orders depend on their arguments only."""

from __future__ import annotations

import torch

from common.randomness import compared_sides, derived_seed, random_halves, seed_step, shuffled_by_hash


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


def test_order_by_hash_follows_seed_and_names_and_not_the_order_given():
    names = [f"cell_{number}" for number in range(30)]
    order = shuffled_by_hash(names, 0)
    assert sorted(order) == sorted(names) and order != names
    assert shuffled_by_hash(names[::-1], 0) == order != shuffled_by_hash(names, 1)
    assert shuffled_by_hash(names[:20], 0) == [name for name in order if name in names[:20]]
    assert shuffled_by_hash(["a", "b", "c", "d"], 0) == list("bacd")  # sets made before stay as they are


def test_halves_never_share_a_group():
    groups = ["a", "b", "a", "c", "c", "c"]
    halvings = random_halves(groups)
    assert len(halvings) == 20
    for first, second in halvings:
        assert sorted([*first, *second]) == list(range(6))
        assert not {groups[place] for place in first} & {groups[place] for place in second}
    assert random_halves(["a", "a"]) == random_halves([]) == []


def test_compared_sides_are_alike():
    groups = ["a", "b", "a", "c", "c", "c", "d", "e"]
    for synthetic, expected in ((1, 1), (2, 2), (9, 2)):
        for side in compared_sides(groups, synthetic, is_paired=False):
            assert len(side.synthetic) == len(side.real) == len(side.half) == expected
            assert set(side.synthetic) <= set(range(synthetic)) and len(set(side.synthetic)) == expected
            shown = [groups[place] for place in (*side.real, *side.half)]
            assert len(set(shown)) == 2 * expected  # one crop of an image, in one half
    for side in compared_sides(groups, 8, is_paired=True):
        assert side.synthetic.tolist() == side.real.tolist() and sorted([*side.real, *side.half]) == list(range(8))
    assert compared_sides(["a", "a"], 5, is_paired=False) == []
