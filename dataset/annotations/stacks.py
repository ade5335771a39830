"""Arrays of many planes: one cell per page of an image, or N images of K classes each as in PanNuke."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from dataset.annotations.cells import Cell, labels_to_cells
from dataset.decode import MAX_DECODED_BYTES, FileError


def read_array(path: Path) -> np.ndarray:
    """An array from ``.npy`` or a multi-page TIFF. A ``.npy`` is mapped, so only used parts are read from the disk.

    Raises:
        FileError: the file is unreadable or too large.
    """
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with tifffile.TiffFile(path, _multifile=False) as tiff:
            if len(tiff.series) == 1 and tiff.series[0].nbytes > MAX_DECODED_BYTES:
                raise FileError(path, "is larger than 1 GiB as decoded")
            pages = [page.asarray() for page in tiff.pages]
        if len({page.shape for page in pages}) > 1:
            raise FileError(path, "has pages of different sizes")
        return np.stack(pages)
    except FileError:
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes the readers raise nearly any type
        raise FileError(path, "cannot be read, it is damaged or no array of numbers", str(error)[:120]) from None


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """One cell per page of (N, H, W). Its id is the number of the page, from 1.

    Raises:
        FileError: a page is no mask of one cell, or has another size than the image.
    """
    pages = read_array(path)
    if pages.ndim == 2:
        raise FileError(path, "is a flat label image already: train on it as it is")
    if pages.ndim != 3 or pages.shape[1:] != size:
        shape = " x ".join(map(str, pages.shape))
        raise FileError(path, f"has the shape {shape}: (cells, {size[0]}, {size[1]}) is needed, one page per cell")
    cells = []
    for number, page in enumerate(pages, start=1):
        values = np.unique(page)
        if len(values) > 2 or (len(values) == 2 and values[0] != 0):
            raise FileError(path, f"page {number} is no mask of one cell: it holds {len(values)} values")
        if len(values) and values[-1] > 0:
            cells += labels_to_cells((page > 0) * np.int64(number))
        else:
            cells.append(Cell.none("an empty page"))
    return cells


def has_pages(path: Path) -> bool:
    """Whether a TIFF has several pages."""
    try:
        with tifffile.TiffFile(path, _multifile=False) as tiff:
            return len(tiff.pages) > 1
    except (OSError, ValueError):
        return False


def is_image_stack(path: Path) -> bool:
    """Whether a ``.npy`` holds N images of K planes, (N, H, W, K)."""
    return path.suffix.lower() == ".npy" and read_array(path).ndim == 4


def cells_of_planes(path: Path, planes: np.ndarray) -> list[Cell]:
    """Cells of (H, W, K). Each plane holds the ids of one class.

    The last plane is the background if it is above 0 exactly where all others are 0. If two planes share an id, the
    cells get new ids, plane by plane.

    Raises:
        FileError: the planes hold fractions or negative values.
    """
    if planes.dtype.kind not in "uif" or (planes < 0).any() or (planes != np.round(planes)).any():
        raise FileError(path, "holds fractions or negative values, no ids")
    labels = planes.astype(np.int64)
    rest = labels[..., :-1]
    if labels.shape[2] > 1 and np.array_equal(labels[..., -1] > 0, (rest == 0).all(axis=2)):
        labels = rest
    cells, seen, shared = [], set(), False
    for plane in range(labels.shape[2]):
        found = labels_to_cells(labels[..., plane])
        shared |= any(cell.number in seen for cell in found)
        seen |= {cell.number for cell in found}
        cells += [Cell(cell.top, cell.left, cell.mask, cell.number, f"plane {plane + 1}") for cell in found]
    if shared:
        cells = [Cell(one.top, one.left, one.mask, number, one.name) for number, one in enumerate(cells, start=1)]
    return cells
