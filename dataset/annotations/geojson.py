"""GeoJSON of QuPath: polygons with holes, multipolygons, and classifications as classes by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.faults import short_line
from dataset.annotations.cells import Cell, ids_of_names, rings_to_cell
from dataset.decode import FileError

DETECTIONS = ("detection", "cell")
NO_CELLS = {"tile": "a tile", "tma_core": "a core of a microarray", "root": "the whole image"}
SUBCELLULAR = "Subcellular"  # how QuPath begins the classes of spots and clusters that it finds in cells
IGNORED = "*"  # QuPath ignores classes with this ending, such as Region* and Ignore*


def read_annotations(path: Path) -> Any:
    """The content of a JSON file of another program: of any kind, with any numbers.

    Raises:
        FileError: the file is no JSON, or damaged.
    """
    try:
        return json.loads(path.read_bytes())  # UTF-8, 16 or 32
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(path, "is no JSON, or a damaged one", short_line(error)) from None


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """The objects of a GeoJSON file. Ids are the names of the objects if these are different whole numbers, else 1..n.

    An annotation of QuPath that holds detections or cells is a region, not a cell. So is an object of a class that
    QuPath ignores, such as Region*.

    Raises:
        FileError: the file is no GeoJSON of polygons.
    """
    try:
        features = list(_features(read_annotations(path)))
        numbers = ids_of_names([str((one.get("properties") or {}).get("name", "")) for one in features])
        cells = [_cell(one, number, size) for one, number in zip(features, numbers, strict=True)]
        return _without_regions(cells, [_kind(one) for one in features])
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(path, "is no GeoJSON of polygons", f"{type(error).__name__}: {error}"[:120]) from None


def _features(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, list):
        for one in content:
            yield from _features(one)
    elif content["type"] == "FeatureCollection":
        yield from content["features"]
    elif content["type"] == "Feature":
        yield content
    elif content["type"] == "GeometryCollection":
        for one in content["geometries"]:
            yield from _features(one)
    else:
        yield {"geometry": content, "properties": {}}


def _cell(feature: dict[str, Any], number: int, size: tuple[int, int]) -> Cell:
    geometry, properties = feature.get("geometry"), feature.get("properties") or {}
    kind = "nothing" if geometry is None else geometry["type"]
    polygons = list(_polygons(geometry)) if geometry else []
    if kind not in ("Polygon", "MultiPolygon") and not polygons:
        return Cell.none("nothing" if kind == "nothing" else f"a {kind}")
    named = properties.get("classification") or {}
    name = str(named.get("name") or ": ".join(named.get("names", ()))) if isinstance(named, dict) else str(named)
    if name.endswith(IGNORED):
        return Cell.none(f"of the class {name}, which QuPath ignores")
    if name.startswith(SUBCELLULAR):
        return Cell.none("a spot in a cell")
    parts = [
        rings_to_cell([np.array(ring, float)[:, :2] for ring in polygon if len(ring)], size=size)
        for polygon in polygons
    ]
    cell = union([part for part in parts if not part.unusable], number, name)
    return dataclasses.replace(cell, has_nucleus=feature.get("nucleusGeometry") is not None)


def _polygons(geometry: dict[str, Any]) -> Iterator[list[Any]]:
    """All polygons of a geometry, each a list of rings."""
    if geometry["type"] == "Polygon":
        yield geometry["coordinates"]
    elif geometry["type"] == "MultiPolygon":
        yield from geometry["coordinates"]
    elif geometry["type"] == "GeometryCollection":
        for one in geometry["geometries"]:
            yield from _polygons(one)


def _kind(feature: dict[str, Any]) -> str:
    """QuPath's type of an object: annotation, detection, cell or tile. Empty for files of other programs."""
    kind = (feature.get("properties") or {}).get("objectType")
    if kind is None:  # QuPath before 0.3
        kind = str(feature.get("id", "")).removeprefix("Path").removesuffix("Object")
    return str(kind).lower()


def _without_regions(cells: list[Cell], kinds: Sequence[str]) -> list[Cell]:
    """Mark entries that are no cells: tiles and the like, annotations that hold detections or cells, and detections in
    a cell, which are parts of it."""
    inner = [cell for cell, kind in zip(cells, kinds, strict=True) if kind in DETECTIONS and cell.mask.any()]
    first = np.array([_first_pixel(cell) for cell in inner], int).reshape(-1, 2)
    covered = union([cell for cell, kind in zip(cells, kinds, strict=True) if kind == "cell"], None, "")
    kept = []
    for cell, kind in zip(cells, kinds, strict=True):
        if kind in NO_CELLS:
            cell = Cell.none(NO_CELLS[kind])
        elif kind == "annotation" and _holds(cell, first):
            cell = Cell.none("a region with cells in it")
        elif kind == "detection" and cell.mask.any() and _holds(covered, _first_pixel(cell)[None]):
            cell = Cell.none("a spot in a cell")
        kept.append(cell)
    return kept


def _first_pixel(cell: Cell) -> np.ndarray:
    """(2,) row and column in the image of a pixel of a cell."""
    return np.argwhere(cell.mask)[0] + (cell.top, cell.left)


def _holds(region: Cell, pixels: np.ndarray) -> bool:
    """Whether one of the pixels (n, 2), row and column in the image, belongs to a region."""
    rows, columns = (pixels - (region.top, region.left)).T
    height, width = region.mask.shape
    within = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return bool(region.mask[rows[within], columns[within]].any())


def union(parts: list[Cell], number: int | None, name: str) -> Cell:
    """One cell of several pieces."""
    if not parts:
        return Cell.none("no outline")
    top, left = min(one.top for one in parts), min(one.left for one in parts)
    bottom = max(one.top + one.mask.shape[0] for one in parts)
    right = max(one.left + one.mask.shape[1] for one in parts)
    mask = np.zeros((bottom - top, right - left), bool)
    for one in parts:
        height, width = one.mask.shape
        mask[one.top - top : one.top - top + height, one.left - left : one.left - left + width] |= one.mask
    return Cell(top, left, mask, number, name)
