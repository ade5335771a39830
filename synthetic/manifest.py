"""The table and the settings of a synthetic set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common.disk import read_csv, write_csv
from common.errors import InputError, list_some

MANIFEST = "manifest.csv"
SETTINGS = "settings.json"


def read_manifest(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a manifest.

    Raises:
        InputError: absent, no CSV, empty, or without the columns image and label.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a SAMPLE_DIR that sample_ddp.py has written")
    columns, rows = read_csv(path)
    missing = [name for name in ("image", "label") if name not in columns]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; give a SAMPLE_DIR that sample_ddp.py has written")
    if not rows:
        raise InputError(f"{path} has no rows: there is nothing to evaluate")
    short = [str(number) for number, row in enumerate(rows, 2) if None in row or None in row.values()]
    if short:
        raise InputError(f"{path}: line {list_some(short)} has another number of columns than the header")
    return columns, rows


def write_manifest(folder: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Write a manifest, whole or not at all."""
    write_csv(folder / MANIFEST, columns, [[row.get(name, "") for name in columns] for row in rows])


def read_settings(folder: Path) -> dict:
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable JSON ({error}); sample the set again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no settings; sample the set again")
    return settings
