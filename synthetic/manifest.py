"""The table and the settings of a synthetic set: their names, columns and paths."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from common.disk import SETTINGS, read_csv, real_path, write_csv
from common.errors import InputError, list_some
from common.plain import check_fields, read_json

MANIFEST = "manifest.csv"
IMAGES, LABELS, ATTEMPTS = "images", "masks", "attempts"  # folders of a set
LABEL_SUFFIXES = (".png", ".tif")

AGAIN = "sample the set again"  # what to do about damaged settings
SAMPLING, MIN_FIDELITY, FIDELITY = "sample_ddp.py", "sample_ddp.py --min-fidelity", "evaluate.py fidelity"


@dataclass(frozen=True)
class Column:
    """A column of the manifest: what it says, and which command writes it."""

    name: str
    meaning: str
    writer: str = SAMPLING


@dataclass(frozen=True)
class KnownSettings:
    """Types of those settings of a set that are read again. A set may lack any of them."""

    data_config: dict[str, Any] | None
    mask_rule: dict[str, Any] | None
    tile_scale: float | None
    redraw: dict[str, Any] | None
    filter: dict[str, Any] | None
    trained_on: list[str] | None
    labelled_on: list[str] | None
    mask_origin: dict[str, Any] | None
    look: dict[str, Any] | None


COLUMNS = (
    Column("image", "synthetic image, a path within the set"),
    Column("label", "the label that it was made from, a path within the set"),
    Column("source_mask", "mask file that the label was cut from, relative to the set"),
    Column("source_mask_sha256", "SHA-256 of that file"),
    Column("real_image", "real image of the mask, relative to the set; empty without `--data-path`"),
    Column("seed", "`--seed` of the set"),
    Column("index", "number of the image in the set; with the seed it decides the noise"),
    Column("crop_top", "first row of the label in the resized mask"),
    Column("crop_left", "first column of the label in the resized mask"),
    Column("crop_scaled_height", "height to which the mask was resized before the cut"),
    Column("crop_scaled_width", "width to which the mask was resized before the cut"),
    Column("crop_height", "height of the label"),
    Column("crop_width", "width of the label"),
    Column("tile_overlap", "least overlap of the tiles of a large field; empty without `--tile`"),
    Column("mask_type", "what the label holds: binary, classes, instances or probability"),
    Column("label_derivation", "how the label was resized"),
    Column("intensity", "gray values of the image: display (8 bits) or source (those of the training images)"),
    Column("window_low", "gray value of -1, one number or one per channel"),
    Column("window_high", "gray value of 1, one number or one per channel"),
    Column("cfg_scale", "classifier-free guidance; 1 is none"),
    Column(
        "look_source", "source of the look: training, path, table, same or none; empty if the model has no look input"
    ),
    Column("look_image", "name of the image that gave the look"),
    Column("look_scale", "guidance on the look; 1 is none"),
    Column("guidance_interval", "times at which guidance was on"),
    Column("sampler", "ODE or SDE"),
    Column("method", "solver"),
    Column("num_steps", "steps of the solver"),
    Column("time_shift", "how much shorter its first steps are; 1 means equal steps"),
    Column("weights", "ema (averaged) or raw"),
    Column("ckpt_sha256", "SHA-256 of the checkpoint"),
    Column("attempt", "number of the attempt that was kept, from 1", MIN_FIDELITY),
    Column("attempt_fidelity", "Dice of that attempt with its mask, by the judge", MIN_FIDELITY),
    Column("fidelity_reached", "yes or no: whether that Dice reaches the threshold", MIN_FIDELITY),
    Column("fidelity_dice", "Dice of the image with its label, by the judge", FIDELITY),
)
# The fields of a View, in their order.
VIEW_COLUMNS = ("crop_scaled_height", "crop_scaled_width", "crop_top", "crop_left", "crop_height", "crop_width")
# Columns that say how the images were made: a measure without them is not repeatable.
PROVENANCE_COLUMNS = ("cfg_scale", "sampler", "method", "num_steps", "time_shift", "seed", "ckpt_sha256")
# Columns that decide what is read as an image and its label. The others, and those that measures add, do not.
READ_COLUMNS = ("image", "label", "mask_type", "intensity", "window_low", "window_high")
ATTEMPT_COLUMNS = tuple(column.name for column in COLUMNS if column.writer == MIN_FIDELITY)
ATTEMPT_FIDELITY = ATTEMPT_COLUMNS[1]
(FIDELITY_COLUMN,) = (column.name for column in COLUMNS if column.writer == FIDELITY)


# --------------------------------------------------------------------------------------------------------------- paths


def relative_to_set(path: Path, folder: Path) -> str:
    """A path as a set holds it: relative to the set's folder, so that both can be moved together.

    If the folder is a link, ``..`` leads to the parent of what it links to.
    """
    found = os.path.relpath(path.absolute(), folder.absolute())
    if real_path(folder / found) != real_path(path):
        found = os.path.relpath(real_path(path), real_path(folder))
    return Path(found).as_posix()


def path_in_set(name: str, folder: Path) -> Path:
    """The file outside of the set that a manifest names: relative to the set. Old sets hold a path as typed."""
    return folder / name if (folder / name).exists() or not Path(name).exists() else Path(name)


def label_path(folder: Path, name: str) -> Path:
    """The label of a pair (without suffix), as PNG or TIFF.

    Raises:
        InputError: there is none.
    """
    for suffix in LABEL_SUFFIXES:
        path = folder / LABELS / f"{name}{suffix}"
        if path.is_file():
            return path
    raise InputError(f"{folder / LABELS} has no label of {name}; run sample_ddp.py with the same settings again")


def _leaves_the_set(name: str) -> bool:
    kinds: tuple[type[PurePath], ...] = (PurePosixPath, PureWindowsPath)
    return not name or any(kind(name).is_absolute() or ".." in kind(name).parts for kind in kinds)


# -------------------------------------------------------------------------------------------------- files of the table


def read_manifest(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a manifest.

    Raises:
        InputError: absent, no CSV, empty, without the columns image and label, or with an image or label outside of
            the set.
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
    outside = [row[name] for row in rows for name in ("image", "label") if _leaves_the_set(row[name])]
    if outside:
        raise InputError(f"{path} names files outside of the set: {list_some(outside)}; they must lie in {folder}")
    return columns, rows


def number_or_none(text: str | None) -> float | None:
    """The number in a cell. None if it holds none, or NaN."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(value) else value


def write_manifest(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest atomically. Columns have the order of COLUMNS; unknown ones come last."""
    rows = list(rows)
    found = dict.fromkeys(name for row in rows for name in row)
    known = [column.name for column in COLUMNS if column.name in found]
    _write(folder, list(dict.fromkeys([*known, *found])), rows)


def _write(folder: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    write_csv(folder / MANIFEST, columns, [[row.get(name, "") for name in columns] for row in rows])


def write_column(folder: Path, name: str, values: Sequence[str]) -> None:
    """Add a column to a manifest, or replace its values, one per row. The other columns keep their order.

    Raises:
        InputError: the manifest cannot be read.
    """
    columns, rows = read_manifest(folder)
    rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    _write(folder, list(dict.fromkeys([*columns, name])), rows)


def read_settings(folder: Path) -> dict[str, Any]:
    """Settings that a set was made with. Empty if the set has no such file.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    settings = upgrade_settings(read_json(path, AGAIN))
    try:
        check_fields(KnownSettings, settings)
        if settings.get("tile_scale") is not None and settings["tile_scale"] <= 0:
            raise ValueError(f"tile_scale is {settings['tile_scale']}")
    except ValueError as error:
        raise InputError(f"{path}: {error}; {AGAIN}") from error
    return settings


def upgrade_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the present form. Earlier ODE solvers took equal steps, and did not say so."""
    sampling = settings.get("sampling")
    if isinstance(sampling, dict) and sampling.get("mode") == "ODE":
        settings = settings | {"sampling": {"time_shift": 1.0} | sampling}
    return _with_redraw(settings)


def _with_redraw(settings: dict[str, Any]) -> dict[str, Any]:
    """The same, with the note of ``--min-fidelity`` under "redraw". Earlier versions kept it under "filter"."""
    note = settings.get("filter")
    if "redraw" in settings or not isinstance(note, dict):
        return settings
    if "min_fidelity" in note:
        return {name: value for name, value in settings.items() if name != "filter"} | {"redraw": note}
    before = note.get("before")
    while isinstance(before, dict):  # filtered, perhaps several times, after it was drawn again
        if "min_fidelity" in before:
            return settings | {"redraw": before}
        before = before.get("before")
    return settings


def judge_notes(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Notes of the judges that selected images of a set: by ``--min-fidelity``, and by ``evaluate.py filter``."""
    return [note for name in ("redraw", "filter") if (note := settings.get(name))]
