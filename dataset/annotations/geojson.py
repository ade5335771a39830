"""GeoJSON of QuPath: polygons with holes, multipolygons, and classifications as classes by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataset.annotations.cells import Cell, rings_to_cell
from dataset.decode import FileError


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(path, "is no JSON, or a damaged one", str(error)[:120]) from None


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """The objects of a GeoJSON file. Ids are the objects' names if all are different whole numbers, else 1..n.

    Raises:
        FileError: it is no GeoJSON.
    """
    try:
        features = list(_features(read_json(path)))
        names = [str((one.get("properties") or {}).get("name", "")) for one in features]
        by_name = all(name.isdecimal() and int(name) > 0 for name in names) and len(set(names)) == len(names)
        return [_cell(one, int(names[k]) if by_name else k + 1) for k, one in enumerate(features)]
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
    else:
        yield {"geometry": content, "properties": {}}


def _cell(feature: dict[str, Any], number: int) -> Cell:
    geometry, properties = feature.get("geometry"), feature.get("properties") or {}
    kind = "nothing" if geometry is None else geometry["type"]
    if geometry is None or kind not in ("Polygon", "MultiPolygon"):
        return Cell.none(f"a {kind}")
    named = properties.get("classification") or {}
    name = str(named.get("name") or ": ".join(named.get("names", ()))) if isinstance(named, dict) else str(named)
    polygons = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    parts = [rings_to_cell([np.array(ring, float)[:, :2] for ring in polygon]) for polygon in polygons]
    return union([part for part in parts if not part.unusable], number, name)


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
