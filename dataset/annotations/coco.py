"""COCO JSON: one file for many images, polygons or run lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import list_some
from dataset.annotations.cells import LARGEST_ID, Cell
from dataset.annotations.geojson import read_json
from dataset.decode import FileError

LEAST_COORDINATES = 6  # of a polygon; pycocotools takes four numbers for a box


def sources(path: Path) -> dict[str, Callable[[tuple[int, int]], list[Cell]]]:
    """For every image of the file, by its name without suffix, a function of the image's size that gives its cells.

    Ids are ``instance_id`` if all annotations of an image have one, as in our own export, else ``id``. The cells are
    numbered 1..n if these are not different whole numbers that fit a label image.

    Raises:
        FileError: it is no COCO file.
    """
    content = read_json(path)
    try:
        names = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
        by_image: dict[Any, list[dict[str, Any]]] = {one["id"]: [] for one in content["images"]}
        unknown = sorted({str(one["image_id"]) for one in content["annotations"] if one["image_id"] not in by_image})
        if unknown:
            raise FileError(path, f"has annotations of images that it does not list: image_id {list_some(unknown)}")
        for one in content["annotations"]:
            if "segments_info" in one:
                raise FileError(path, "is for panoptic PNGs: convert these, and say that each colour is a cell")
            by_image[one["image_id"]].append(one)
        images = {Path(str(one["file_name"]).replace("\\", "/")).name: one for one in content["images"]}
        if len(images) < len(content["images"]):
            raise FileError(path, "names two images alike in different folders: give each folder a file of its own")
        return {
            Path(name).stem.removesuffix(".ome"): _Image(path, one, by_image[one["id"]], names)
            for name, one in images.items()
        }
    except KeyError as error:
        raise FileError(path, f"is no COCO file: {error} is missing") from None
    except (TypeError, AttributeError) as error:
        raise FileError(path, "is no COCO file", f"{type(error).__name__}: {error}"[:120]) from None


class _Image:
    """One image of a COCO file."""

    def __init__(self, path: Path, image: dict[str, Any], annotations: list[dict[str, Any]], names: dict[Any, str]):
        self._path, self._image, self._annotations, self._names = path, image, annotations, names

    def __call__(self, size: tuple[int, int]) -> list[Cell]:
        stated = (self._image.get("height", size[0]), self._image.get("width", size[1]))
        name = self._image["file_name"]
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

    def _numbers(self) -> list[int] | list[None]:
        """Ids of the cells; None for all if those of the file do not fit a label image."""
        key = "instance_id" if all("instance_id" in one for one in self._annotations) else "id"
        ids = [one.get(key) for one in self._annotations]
        fit = all(isinstance(one, int) and 0 < one <= LARGEST_ID for one in ids) and len(set(ids)) == len(ids)
        return ids if fit else [None] * len(ids)

    def _cell(self, annotation: dict[str, Any], number: int | None, size: tuple[int, int]) -> Cell:
        from pycocotools import mask as rle

        outline, name = annotation.get("segmentation"), self._names.get(annotation.get("category_id"), "")
        if annotation.get("iscrowd"):
            return Cell.none("a crowd: iscrowd is 1")
        if not outline:
            return Cell.none("a box without an outline")
        if isinstance(outline, list):
            outline = [ring for ring in outline if len(ring) >= LEAST_COORDINATES]
            if not outline:
                return Cell.none("an outline of less than three corners")
            if not all(np.isfinite(ring).all() for ring in outline):
                return Cell.none("coordinates that no image has")
            code = rle.merge(rle.frPyObjects(outline, *size))
        elif isinstance(outline["counts"], list):
            code = rle.frPyObjects(outline, *outline["size"])
        else:
            code = {"size": outline["size"], "counts": outline["counts"].encode()}
        if tuple(code["size"]) != size:
            raise ValueError(f"run lengths of a field of {code['size']}")
        mask = rle.decode(code).astype(bool)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return Cell(0, 0, np.zeros((1, 1), bool), number, name)
        top, left = int(rows[0]), int(columns[0])
        return Cell(top, left, mask[top : rows[-1] + 1, left : columns[-1] + 1], number, name)
