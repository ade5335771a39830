"""Seeds. All random numbers follow from whole numbers (seed, step, index), so no random state is saved."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

HALVINGS = 20


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from several whole numbers. Similar inputs give unrelated seeds, but zeros at the end do not count:
    (3, 17) and (3, 17, 0) give the same one.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one training step.

    All random numbers of a step (times, noise, dropped masks) depend on (seed, step, rank) only. So a resumed run gets
    the same numbers as an uninterrupted one, without a saved random state.
    """
    torch.manual_seed(derived_seed(seed, step, rank))


def random_halves(groups: Sequence[Hashable]) -> list[list[np.ndarray]]:
    """Places of a list in two halves, ``HALVINGS`` times. Always the same halves; none for a single group.

    Args:
        groups: for every place what it belongs to, such as the image of a crop. A group lies in one half.
    """
    numbers, count = _numbers(groups), len(set(groups))
    rng = np.random.default_rng(0)
    halvings = [np.array_split(rng.permutation(count), 2) for _ in range(HALVINGS if count > 1 else 0)]
    return [[np.flatnonzero(np.isin(numbers, half)) for half in halves] for halves in halvings]


def _numbers(groups: Sequence[Hashable]) -> np.ndarray:
    """The number of each place's group; groups are numbered in the order in which they come."""
    number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([number_of[group] for group in groups])


def one_of_each(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random place of every group, in random order. Crops of one image are not independent images."""
    order = rng.permutation(len(groups))
    return rng.permutation(order[np.unique(groups[order], return_index=True)[1]])


class Sides(NamedTuple):
    """Places of images of two sides, and those of half of the real images, which both are compared with."""

    synthetic: np.ndarray
    real: np.ndarray
    half: np.ndarray


def compared_sides(groups: Sequence[Hashable], synthetic: int, is_paired: bool) -> list[Sides]:
    """What to compare, ``HALVINGS`` times, so that synthetic and real images of one distribution are equally far.

    The sides are alike: as many images, none of the half's own masks, and no more crops of one image than in the half.
    None for a single group.

    Args:
        groups: for every real place the image that it was cropped from.
        synthetic: number of synthetic places.
        is_paired: synthetic place i was made from the mask of real place i.
    """
    rng, numbers, found = np.random.default_rng(1), _numbers(groups), []
    for half, rest in random_halves(groups):
        if is_paired:
            found.append(Sides(rest, rest, half))
            continue
        own, other = (places[one_of_each(numbers[places], rng)] for places in (half, rest))
        count = min(len(own), len(other), synthetic)
        found.append(Sides(rng.permutation(synthetic)[:count], other[:count], own[:count]))
    return found


def divide(groups: Sequence[Sequence[str]], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Names in two random parts, the first with at most ``count`` names. No group lies in both.

    If every group has more than ``count`` names, the first part is the smallest one.
    """
    first: list[str] = []
    rest: list[Sequence[str]] = []
    for names in shuffled_groups(groups, seed):
        if len(first) + len(names) <= count:
            first += names
        else:
            rest.append(names)
    if not first and rest:
        first += rest.pop(rest.index(min(rest, key=len)))
    return first, [name for names in rest for name in names]


def shuffled_groups(groups: Iterable[Sequence[str]], seed: int) -> list[Sequence[str]]:
    """Groups of names in random order, as :func:`shuffled_by_hash` orders the least name of each."""
    by_name = {min(names): names for names in groups}
    return [by_name[name] for name in shuffled_by_hash(by_name, seed)]


def shuffled_by_hash(names: Iterable[str], seed: int) -> list[str]:
    """Names in random order. The sort key depends on seed and name only, so a new name never reorders the others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest())
