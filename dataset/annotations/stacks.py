"""Arrays of many planes: one cell per page of an image, or N images of K classes each as in PanNuke and CoNIC."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import tifffile

from common.errors import list_some
from common.faults import short_line
from dataset.annotations.cells import LARGEST_ID, Cell, labels_to_cells
from dataset.decode import MAX_DECODED_BYTES, FileError, check_page

ARRAYS = (".npy", ".npz")
TIFFS = (".tif", ".tiff")
MOST_LOOKED_AT = 64  # images that decide which plane is the background
LEAST_AGREEMENT = 0.99  # share of pixels in which a plane of background must be the rest of the others


def read_array(path: Path) -> np.ndarray:
    """An array from ``.npy``, ``.npz`` or a multi-page TIFF.

    A ``.npy`` is mapped, so only used parts are read from the disk.

    Raises:
        FileError: the file is unreadable or too large, or holds no numbers.
    """
    try:
        if path.suffix.lower() == ".npz":
            array = _read_archive(path)
        elif path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            array = _read_pages(path)
        if array.dtype.kind not in "buif":
            raise FileError(path, f"holds values of the type {array.dtype}: numbers are needed")
        return array
    except FileError:
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes the readers raise nearly any type
        if "Python objects" in str(error) or "Object arrays" in str(error):
            raise FileError(
                path,
                "holds Python objects, which are not read. If it is of Cellpose, name it NAME_seg.npy and leave the "
                "format out",
            ) from None
        raise FileError(path, "cannot be read, it is damaged or no array of numbers", short_line(error)) from None


def _read_pages(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path, _multifile=False) as tiff:
        sizes = [series.nbytes for series in tiff.series]
        if max(sizes) > MAX_DECODED_BYTES:
            raise FileError(path, "is larger than 1 GiB as decoded")
        check_page(tiff.pages[0].aspage(), tiff.series[0].dtype == bool, path)
        if len(sizes) == 1 and tiff.series[0].ndim == 3 and tiff.series[0].axes[1:] == "YX":
            return tiff.series[0].asarray(maxworkers=1)  # Fiji's stacks may have one page for all planes
        pages = [page.asarray() for page in tiff.pages]
    if len({page.shape for page in pages}) > 1:
        raise FileError(path, "has pages of different sizes")
    return np.stack(pages)


def _read_archive(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        if len(archive.files) != 1:
            raise FileError(
                path, f"holds {len(archive.files)} arrays: {list_some(archive.files)}. Save the masks alone"
            )
        if archive.zip.getinfo(archive.zip.namelist()[0]).file_size > MAX_DECODED_BYTES:
            raise FileError(path, "is larger than 1 GiB as decoded")
        return archive[archive.files[0]]


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
        turned = ": its cells must be the first axis" if pages.ndim == 3 and pages.shape[:2] == size else ""
        raise FileError(
            path, f"has the shape ({shape}): (cells, {size[0]}, {size[1]}) is needed, one page per cell{turned}"
        )
    if len(pages) > 1 and all(np.count_nonzero(page) * 2 > page.size for page in pages):
        raise FileError(path, "has pages that are mostly cell: if the cells are black on white, invert the pages")
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
    """Whether a file is a TIFF of several pages, or of several planes in one page."""
    if path.suffix.lower() not in TIFFS:
        return False
    try:
        with tifffile.TiffFile(path, _multifile=False) as tiff:
            return len(tiff.pages) > 1 or (
                len(tiff.series) == 1 and tiff.series[0].axes in ("ZYX", "TYX", "CYX", "QYX", "IYX")
            )
    except Exception:  # noqa: BLE001 - what is wrong with the file is said when it is read
        return False


def is_flat_and_gray(path: Path) -> bool:
    """Whether a file is a TIFF of one gray page, without a colour table."""
    if path.suffix.lower() not in TIFFS:
        return False
    try:
        with tifffile.TiffFile(path, _multifile=False) as tiff:
            page = tiff.pages.first
            return len(tiff.pages) == 1 and page.ndim == 2 and page.photometric != tifffile.PHOTOMETRIC.PALETTE
    except Exception:  # noqa: BLE001 - what is wrong with the file is said when it is read
        return False


def is_image_stack(path: Path) -> bool:
    """Whether an array holds N images of K planes, (N, H, W, K)."""
    return path.suffix.lower() in ARRAYS and read_array(path).ndim == 4


def cells_of_planes(path: Path, planes: np.ndarray, background: int | None) -> list[Cell]:
    """Cells of (H, W, K). Each plane holds the ids of one class, as in PanNuke.

    Two planes with the same foreground are ids and their classes, as in CoNIC. If two planes share an id, the cells get
    new ids, plane by plane.

    Args:
        path: the file, for messages.
        planes: (H, W, K).
        background: place of the plane without cells, or None.

    Raises:
        FileError: the planes hold fractions or negative values.
    """
    whole = planes.dtype.kind in "uib" or (planes.dtype.kind == "f" and np.isfinite(planes).all())
    if not whole or (planes < 0).any() or (planes != np.round(planes)).any() or planes.max(initial=0) > LARGEST_ID:
        raise FileError(path, "holds fractions, negative or very large values, no ids")
    labels = planes.astype(np.int64)
    covered = labels > 0
    is_full = covered.any(axis=2).all() and covered.any(axis=(0, 1)).sum() == 1
    if labels.shape[2] > 1 and background is None and is_full and len(np.unique(labels[covered])) == 1:
        return []  # nothing but background: one value in one plane
    if labels.shape[2] == 2 and labels.any() and np.array_equal(labels[..., 0] > 0, labels[..., 1] > 0):
        return _cells_and_classes(path, labels)
    cells, seen, shared = [], set(), False
    for plane in (one for one in range(labels.shape[2]) if one != background):
        found = labels_to_cells(labels[..., plane])
        shared |= any(cell.number in seen for cell in found)
        seen |= {cell.number for cell in found}
        cells += [Cell(cell.top, cell.left, cell.mask, cell.number, f"plane {plane + 1}") for cell in found]
    if shared:
        cells = [Cell(one.top, one.left, one.mask, number, one.name) for number, one in enumerate(cells, start=1)]
    return cells


def background_of(path: Path, array: np.ndarray) -> int | None:
    """Place of the plane of (N, H, W, K) that is the background: 0, K - 1, or None.

    A background has one value, and only where all other planes are 0. The majority of the first images with cells
    decides. If a plane of cells looks the same, as it holds one cell an image, the background is the one with the value
    1.

    Raises:
        FileError: both planes can be the background.
    """
    last, votes, seen = array.shape[3] - 1, Counter[int](), 0
    largest = {0: 0.0, last: 0.0}
    for planes in array if last else ():
        covered = np.asarray(planes) > 0
        if not covered.any() or covered.all(axis=(0, 1)).any():  # nothing, or nothing but background
            continue
        seen += 1
        for plane in (0, last):
            rest = ~np.delete(covered, plane, axis=2).any(axis=2)
            agrees = (covered[..., plane] == rest).mean() >= LEAST_AGREEMENT
            largest[plane] = max(largest[plane], float(planes[..., plane].max()))
            votes[plane] += bool(agrees and len(np.unique(planes[..., plane])) <= 2)
        if seen == MOST_LOOKED_AT:
            break
    found = [plane for plane in (0, last) if votes[plane] * 2 > seen and votes[plane] == max(votes.values())]
    if len(found) > 1:
        found = [plane for plane in found if largest[plane] == 1]
        if len(found) != 1:
            raise FileError(path, "has two planes that can both be the background: leave the background out")
    return found[0] if found else None


def _cells_and_classes(path: Path, labels: np.ndarray) -> list[Cell]:
    """Cells of two planes (H, W, 2), ids and classes: every id has one class, and a class has many ids."""
    for ids, classes in ((labels[..., 0], labels[..., 1]), (labels[..., 1], labels[..., 0])):
        cells = labels_to_cells(ids)
        kinds = [
            np.unique(classes[one.top :, one.left :][: one.mask.shape[0], : one.mask.shape[1]][one.mask])
            for one in cells
        ]
        if all(len(kind) == 1 for kind in kinds):
            return [
                Cell(one.top, one.left, one.mask, one.number, f"class {kind[0]}")
                for one, kind in zip(cells, kinds, strict=True)
            ]
    raise FileError(path, "has two planes with the same foreground, which are no ids and their classes")
