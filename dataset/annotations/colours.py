"""Label images in colours: each colour is a class, or each colour is a cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import InputError, list_some
from dataset.annotations.cells import Cell, check_size, labels_to_cells
from dataset.files import FileError, read_image, read_mask_and_table

MANY_COLOURS = 16
SMALL_PIXELS = 4  # most regions of this size are blends of two colours at an edge
EACH_A_CELL = "cells"


def cells_of(path: Path, size: tuple[int, int], colours: Sequence[str]) -> list[Cell]:
    """Regions of a label image in colours, numbered by class or by cell.

    Args:
        path: label image.
        size: height and width of its image.
        colours: colours of the classes as RRGGBB, background first. ("cells",): every colour but black is a cell.
            Empty: the numbers of the file's colour table are the classes.

    Raises:
        FileError: the file holds other colours, or is not such a file.
        InputError: no colours are given, and the file has no colour table.
    """
    table = read_mask_table(path) if not colours else None
    if table is not None:
        check_size(path, table, size)
        return labels_to_cells(table, {number: f"class {number}" for number in np.unique(table).tolist()})
    image = read_image(path)
    check_size(path, image, size)
    if not colours and image.shape[2] == 1:
        raise FileError(path, "is a gray mask already: train on it as it is, or say which gray value is which class")
    if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
        raise FileError(path, "is no label image in colours: 8-bit RGB is needed, without transparency")
    packed = np.repeat(image, 3 // image.shape[2], axis=2).astype(np.int64) @ np.array([65536, 256, 1])
    values, counts = np.unique(packed, return_counts=True)
    if not colours:
        raise InputError(_which_colours(path, values, counts))
    if list(colours) == [EACH_A_CELL]:
        _check_cells(path, values, counts)
        return labels_to_cells(np.where(packed > 0, np.searchsorted(values, packed) + (values[0] > 0), 0))
    known = [int(colour, 16) for colour in colours]
    others = [f"{value:06x}" for value in values.tolist() if value not in known]
    if others:
        blends = "; JPEG and smooth edges mix colours: save PNG without smoothing (antialiasing)"
        hint = blends if len(others) > MANY_COLOURS else ""
        raise FileError(path, f"holds {len(others)} colours that are not given: {list_some(others)}{hint}")
    classes = np.zeros(size, np.int64)
    for number, value in enumerate(known):
        classes[packed == value] = number
    return labels_to_cells(classes, {number: f"class {number}" for number in range(len(known))})


def _check_cells(path: Path, values: np.ndarray, counts: np.ndarray) -> None:
    """Refuse pictures in which each colour cannot be a cell.

    Raises:
        FileError: the background is not black, or colours are mixed at the edges.
    """
    most = int(counts.argmax())
    if values[0] != 0 and counts[most] * 2 > counts.sum():
        raise FileError(
            path, f"has no black, and {int(values[most]):06x} covers most of it: paint the background black, so that "
            "it is no cell",
        )  # fmt: skip
    small = int(np.count_nonzero(counts <= SMALL_PIXELS))
    if small > MANY_COLOURS and small * 2 > len(values):
        raise FileError(
            path, f"holds {len(values)} colours, most of them in a few pixels, which are no cells: save PNG without "
            "smoothing (antialiasing), and not JPEG",
        )  # fmt: skip


def read_mask_table(path: Path) -> np.ndarray | None:
    """The numbers in a file with a coloured table. None for other files."""
    try:
        mask, table = read_mask_and_table(path)
    except FileError:
        return None  # colours without a table
    return mask if table.startswith("coloured") else None


def _which_colours(path: Path, values: np.ndarray, counts: np.ndarray) -> str:
    """Message that lists the colours of this file, the most frequent first."""
    if len(values) > MANY_COLOURS:
        return f"{path} holds {len(values)} colours: if each is a cell, give `class_colours` {EACH_A_CELL}"
    ordered = " ".join(f"{value:06x}" for value in values[np.argsort(-counts)].tolist())
    return (
        f"{path} holds the colours {ordered}: give the colour of each class, background first, or say that each is a "
        f"cell (`class_colours` {EACH_A_CELL})"
    )
