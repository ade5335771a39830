"""Seeds: every random draw follows from whole numbers, so no random state is ever saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from several whole numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one training step.

    Every draw of a step (times, noise, dropped masks) follows from (seed, step, rank) alone, so a resumed run needs no
    saved random state to draw what an uninterrupted one would have drawn.
    """
    torch.manual_seed(derived_seed(seed, step, rank))


def shuffled_by_hash(names: Iterable[str], seed: int) -> list[str]:
    """Names in an order that follows from the seed and each name alone: one name more moves no other two."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest())
