"""LabelMe JSON: one file per image; polygons, rectangles, circles and painted masks."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.annotations.cells import Cell, rings_to_cell
from dataset.annotations.geojson import read_annotations, union
from dataset.decode import FileError

CIRCLE_CORNERS = 90
LEAST_POINTS = {"polygon": 3, "rotation": 3, "rectangle": 2, "circle": 2, "mask": 1}


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """The cells of a file, numbered 1..n. Shapes of one label and one group are one cell.

    Raises:
        FileError: the file is no LabelMe file, or belongs to an image of another size.
    """
    content = read_annotations(path)
    try:
        stated = (int(content.get("imageHeight") or size[0]), int(content.get("imageWidth") or size[1]))
        if stated != size:
            raise FileError(path, f"is of {stated[1]} x {stated[0]} pixels, but its image has {size[1]} x {size[0]}")
        groups: dict[Any, list[Cell]] = {}
        for place, shape in enumerate(content["shapes"]):
            group = shape.get("group_id")
            key = (place,) if group is None else (group, shape["label"])
            groups.setdefault(key, []).append(_shape(shape, size))
    except FileError:
        raise
    except Exception as error:  # noqa: BLE001 - odd values raise nearly any type
        raise FileError(
            path, "is no LabelMe file, or has a broken shape", f"{type(error).__name__}: {error}"[:120]
        ) from None
    cells: list[Cell] = []
    for parts in groups.values():
        usable = [one for one in parts if not one.unusable]
        cells.append(union(usable, len(cells) + 1, usable[0].name) if usable else parts[0])
    return cells


def image_name(path: Path) -> str:
    """File name of the image that a file of annotations names. Empty if it names none."""
    content = read_annotations(path)
    name = content.get("imagePath") if isinstance(content, dict) else None
    return str(name or "").replace("\\", "/").rpartition("/")[2]


def _shape(shape: dict[str, Any], size: tuple[int, int]) -> Cell:
    kind, name = shape.get("shape_type") or "polygon", str(shape["label"])
    points = np.array(shape["points"], float).reshape(-1, 2)
    if kind in LEAST_POINTS and len(points) < LEAST_POINTS[kind]:
        return Cell.none(f"a {kind} of {len(points)} points")
    if not np.isfinite(points).all():
        return Cell.none("coordinates that no image has")
    if kind in ("polygon", "rotation"):
        return rings_to_cell([points], name=name, size=size)
    if kind == "rectangle":
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        return rings_to_cell(
            [np.array([[left, top], [right, top], [right, bottom], [left, bottom]])], name=name, size=size
        )
    if kind == "circle":
        angles = np.arange(CIRCLE_CORNERS) * (2 * np.pi / CIRCLE_CORNERS)
        radius = np.hypot(*(points[1] - points[0]))
        ring = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return rings_to_cell([ring], name=name, size=size)
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=["PNG"]) as picture:
            if picture.height > size[0] or picture.width > size[1] or picture.mode not in ("1", "L", "P"):
                raise ValueError(f"a mask of {picture.width} x {picture.height} pixels and colours {picture.mode}")
            mask = np.array(picture) > 0
        left, top = np.floor(points.min(axis=0)).astype(int)
        return Cell(int(top), int(left), mask, name=name)
    return Cell.none(f"a {kind}")
