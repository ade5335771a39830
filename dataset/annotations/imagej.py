"""ROIs of ImageJ and Fiji: ``NAME.roi`` holds one ROI, ``NAME.zip`` all ROIs of an image."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import roifile

from dataset.annotations.cells import Cell, rings_to_cell
from dataset.decode import FileError
from dataset.names import is_litter

AREAS = ("POLYGON", "FREEHAND", "TRACED", "RECT", "OVAL")
MOST_BYTES = 2**26  # of one ROI


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """The cells of a ROI file. Ids are the names of the ROIs if these are different whole numbers, else 1..n.

    Raises:
        FileError: the file is unreadable, or the ROIs lie on several slices of a stack.
    """
    try:
        rois = _read_zip(path) if path.suffix.lower() == ".zip" else [roifile.ImagejRoi.frombytes(path.read_bytes())]
        slices = {(roi.position, roi.c_position, roi.z_position, roi.t_position) for roi in rois}
        if len(slices) > 1:
            raise FileError(path, f"holds ROIs of {len(slices)} slices of a stack: save those of one slice")
        names = [roi.name for roi in rois]
        by_name = all(name.isdecimal() and int(name) > 0 for name in names) and len(set(names)) == len(names)
        return [_cell(roi, int(roi.name) if by_name else index) for index, roi in enumerate(rois, start=1)]
    except FileError:
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes the reader raises nearly any type
        raise FileError(path, "cannot be read, it is damaged or holds no ROIs", str(error)[:120]) from None


def _read_zip(path: Path) -> list[roifile.ImagejRoi]:
    """All ROIs of an archive, in any of its folders. Other files are ignored."""
    rois = []
    with zipfile.ZipFile(path) as archive:
        members = [one for one in archive.infolist() if one.filename.lower().endswith(".roi")]
        for member in (one for one in members if not is_litter(Path(one.filename).name)):
            if member.file_size > MOST_BYTES:
                raise FileError(path, f"holds a ROI of {member.file_size} bytes ({member.filename})")
            try:
                rois.append(roifile.ImagejRoi.frombytes(archive.read(member)))
            except Exception as error:  # noqa: BLE001 - on damaged bytes the reader raises nearly any type
                raise FileError(path, f"holds a damaged ROI ({member.filename})", str(error)[:120]) from None
    if not rois:
        raise FileError(path, "holds no ROIs")
    return rois


def roi_of(rings: Sequence[np.ndarray], name: str) -> roifile.ImagejRoi:
    """A ROI of these rings (n, 2) of corners x, y: a traced outline, or a composite if there are holes or pieces."""
    points = np.concatenate(rings)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    if len(rings) == 1:
        roi = roifile.ImagejRoi.frompoints(rings[0], name=name)
        roi.roitype, roi.right, roi.bottom = roifile.ROI_TYPE.TRACED, int(right), int(bottom)
        return roi
    path: list[float] = []
    for ring in rings:  # 0: move to, 1: line to, 4: close
        for place, (x, y) in enumerate(ring.tolist()):
            path += [min(place, 1), x, y]
        path.append(4)
    return roifile.ImagejRoi(
        roitype=roifile.ROI_TYPE.RECT, name=name, left=int(left), top=int(top), right=int(right), bottom=int(bottom),
        shape_roi_size=len(path), multi_coordinates=np.array(path, np.float32),
    )  # fmt: skip


def _cell(roi: roifile.ImagejRoi, number: int) -> Cell:
    if roi.multi_coordinates is not None:
        return rings_to_cell(list(roi.coordinates(multi=True)), number)
    if roi.roitype.name not in AREAS:
        return Cell.none(f"a {roi.roitype.name.lower()}")
    if roi.roitype.name == "OVAL":
        return _oval(roi, number)
    return rings_to_cell([np.asarray(roi.coordinates())], number)


def _oval(roi: roifile.ImagejRoi, number: int) -> Cell:
    """A cell of the pixels whose centre lies in the ellipse in the ROI's box."""
    height, width = max(roi.bottom - roi.top, 0), max(roi.right - roi.left, 0)
    rows, columns = np.indices((height, width)) + 0.5
    mask = ((rows / max(height, 1) - 0.5) ** 2 + (columns / max(width, 1) - 0.5) ** 2) <= 0.25
    return Cell(int(roi.top), int(roi.left), mask, number)
