"""Groups of images, such as patients or microscopes, from a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.disk import read_csv
from common.errors import InputError, list_some


def read_groups(path: Path, column: str) -> dict[str, str]:
    """Group of every name, from a table with the columns ``name`` (with or without suffix) and ``column``.

    Raises:
        InputError: a column is missing.
    """
    columns, rows = read_csv(path)
    missing = [name for name in ("name", column) if name not in columns]
    if missing:
        raise InputError(f"{path} has no column {missing[0]}; it has {', '.join(columns)}")
    return {Path(row["name"]).stem: row[column] for row in rows}


def groups_of(names: Sequence[str], groups: Mapping[str, str]) -> list[str]:
    """Group of each image.

    Args:
        names: of images, without suffix.
        groups: see :func:`read_groups`.

    Raises:
        InputError: an image has no group.
    """
    without = [name for name in names if not groups.get(name)]
    if without:
        raise InputError(f"groups: {len(without)} of {len(names)} images have none: {list_some(without)}.", "groups")
    return [groups[name] for name in names]


def members_of(groups: Sequence[str]) -> list[list[int]]:
    """Numbers of the members of each group, groups sorted by name."""
    return [[number for number, one in enumerate(groups) if one == group] for group in sorted(set(groups))]
