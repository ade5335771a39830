"""A few of many, evenly spread."""

from __future__ import annotations

import numpy as np


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers 0..count-1, evenly spread and rising, from the first to the last.

    If ``most`` is 1, it is the first.
    """
    if count <= most:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()
