"""COCO JSON: one file for many images, polygons or run lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import list_some
from dataset.annotations.cells import LARGEST_ID, Cell, rings_to_cell
from dataset.annotations.geojson import read_annotations, union
from dataset.decode import FileError
from dataset.names import plain_name

LEAST_COORDINATES = 6  # of a polygon; pycocotools takes four numbers for a box


def sources(path: Path) -> dict[str, Callable[[tuple[int, int]], list[Cell]]]:
    """For every image of the file, by its name without suffix, a function of the image's size that gives its cells.

    Ids are ``instance_id`` if all annotations of an image have one, as in our own export, else ``id``. The cells are
    numbered 1..n if these are not different whole numbers that fit a label image.

    Raises:
        FileError: it is no COCO file.
    """
    content = read_annotations(path)
    try:
        names = {_key(one["id"]): str(one["name"]) for one in content.get("categories") or []}
        by_image: dict[str, list[dict[str, Any]]] = {_key(one["id"]): [] for one in content["images"]}
        if len(by_image) < len(content["images"]):
            raise FileError(path, "gives one id to two images: give each an id of its own")
        unknown = sorted({_key(one["image_id"]) for one in content["annotations"]} - set(by_image))
        if unknown:
            raise FileError(path, f"has annotations of images that it does not list: image_id {list_some(unknown)}")
        for one in content["annotations"]:
            if "segments_info" in one:
                raise FileError(path, "is for panoptic PNGs: convert these, and say that each colour is a cell")
            by_image[_key(one["image_id"])].append(one)
        images = {_name(str(one["file_name"])): one for one in content["images"]}
        if len(images) < len(content["images"]):
            raise FileError(
                path, "names two images alike, in different folders or with different suffixes: give each a file of "
                "its own",
            )  # fmt: skip
        return {name: _Image(path, one, by_image[_key(one["id"])], names) for name, one in images.items()}
    except KeyError as error:
        raise FileError(path, f"is no COCO file: {error} is missing") from None
    except (TypeError, AttributeError) as error:
        raise FileError(path, "is no COCO file", f"{type(error).__name__}: {error}"[:120]) from None


def _key(value: Any) -> str:
    """An id as text. Some programs write the same id as 1, 1.0 and "1"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _name(file_name: str) -> str:
    """Name of an image without folder and suffix, which may be one of any program."""
    return plain_name(Path(file_name.replace("\\", "/")).stem)


class _Image:
    """One image of a COCO file."""

    def __init__(self, path: Path, image: dict[str, Any], annotations: list[dict[str, Any]], names: dict[str, str]):
        self._path, self._image, self._annotations, self._names = path, image, annotations, names

    def __call__(self, size: tuple[int, int]) -> list[Cell]:
        stated, name = self._stated_size(size), self._image["file_name"]
        if stated != size:
            raise FileError(
                self._path, f"says {name} has {stated[1]} x {stated[0]} pixels, it has {size[1]} x {size[0]}"
            )
        try:
            numbers = self._numbers()
            return [self._cell(one, number, size) for one, number in zip(self._annotations, numbers, strict=True)]
        except Exception as error:  # noqa: BLE001 - pycocotools raises nearly any type on odd values
            words = f"{type(error).__name__}: {error}"[:120]
            raise FileError(self._path, f"has an outline of {name} that cannot be read", words) from None

    def _stated_size(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(height, width) by the file; those of ``size`` if it does not say them."""
        try:
            return tuple(int(self._image.get(side) or own) for side, own in zip(("height", "width"), size, strict=True))
        except (TypeError, ValueError, OverflowError) as error:
            words = f"gives {self._image['file_name']} a height or width that is no number"
            raise FileError(self._path, words, f"{type(error).__name__}: {error}"[:120]) from None

    def _numbers(self) -> list[int] | list[None]:
        """Ids of the cells; None for all if those of the file do not fit a label image."""
        key = "instance_id" if all("instance_id" in one for one in self._annotations) else "id"
        ids = [one.get(key) for one in self._annotations]
        fit = all(isinstance(one, int) and 0 < one <= LARGEST_ID for one in ids) and len(set(ids)) == len(ids)
        return ids if fit else [None] * len(ids)

    def _cell(self, annotation: dict[str, Any], number: int | None, size: tuple[int, int]) -> Cell:
        from pycocotools import mask as rle

        outline, name = annotation.get("segmentation"), self._names.get(_key(annotation.get("category_id")), "")
        if _key(annotation.get("iscrowd") or 0) not in ("0", "False"):
            return Cell.none("a crowd: iscrowd is 1")
        if not outline:
            return Cell.none("a box without an outline")
        if isinstance(outline, list):
            outline = _rings(outline)
            if not outline:
                return Cell.none("an outline of less than three corners")
            if any(len(ring) % 2 for ring in outline):
                return Cell.none("an outline with half a corner")
            if not all(np.isfinite(ring).all() and np.abs(ring).max() < 2**24 for ring in outline):
                return Cell.none("coordinates that no image has")
            if any(_is_beyond(ring, size) for ring in outline):  # pycocotools cuts it without a word
                parts = [rings_to_cell([np.reshape(ring, (-1, 2))], size=size) for ring in outline]
                return union(parts, number, name)
            mask = rle.decode(rle.merge(rle.frPyObjects(outline, *size))).astype(bool)
        else:
            mask = _filled(outline, size)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return Cell(0, 0, np.zeros((1, 1), bool), number, name)
        top, left = int(rows[0]), int(columns[0])
        return Cell(top, left, mask[top : rows[-1] + 1, left : columns[-1] + 1], number, name)


def _rings(outline: list[Any]) -> list[list[float]]:
    """Rings x, y, x, y, ... with three corners or more. One ring, and corners in pairs, are read, too."""
    if not isinstance(outline[0], list):
        outline = [outline]
    rings = [
        [value for corner in ring for value in (corner if isinstance(corner, list) else [corner])] for ring in outline
    ]
    return [ring for ring in rings if len(ring) >= LEAST_COORDINATES]


def _is_beyond(ring: list[float], size: tuple[int, int]) -> bool:
    """Whether an outline reaches beyond the image by a pixel or more."""
    x, y = ring[::2], ring[1::2]
    return min(*x, *y) <= -1 or max(x) >= size[1] + 1 or max(y) >= size[0] + 1


def _filled(outline: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Mask (H, W) of run lengths, which fill the columns with 0 and 1 by turns.

    Raises:
        ValueError: they do not fill the image exactly.
    """
    counts = outline["counts"]
    runs = list(map(int, counts)) if isinstance(counts, list) else _unpacked(str(counts))
    if tuple(outline["size"]) != size:
        raise ValueError(f"run lengths of a field of {outline['size']}")
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise ValueError(f"run lengths that do not fill {size[0]} x {size[1]} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def _unpacked(text: str) -> list[int]:
    """Run lengths of their text: 5 bits a character from "0" on, the lowest first; the 6th bit says that more follow.

    From the fourth number on, the text holds the difference to the number before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"run lengths with the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # a set sign bit
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("run lengths that end in the middle of a number")
    return runs
