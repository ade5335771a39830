"""ROIs of ImageJ and Fiji: ``NAME.roi`` holds one ROI, ``NAME.zip`` all ROIs of an image."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import roifile

from common.disk import is_litter
from common.errors import list_some
from common.faults import short_line
from dataset.annotations.cells import Cell, ids_of_names, rings_to_cell
from dataset.decode import FileError

NO_CELLS = {"TEXT": "a text", "IMAGE": "a picture", "NOROI": "an empty ROI"}
AREAS = ("POLYGON", "FREEHAND", "TRACED", "RECT", "OVAL")
MOST_BYTES = 2**26  # of one ROI
LARGEST_WHOLE = 60_535  # ImageJ reads a larger 16-bit number as a negative one
# A shape is a path of segments: the kind, then this many numbers. 0 moves, 1 draws a line, 2 and 3 a curve, 4 closes.
PATH_NUMBERS = {0: 2, 1: 2, 2: 4, 3: 6, 4: 0}
CURVE_POINTS = 16  # corners in place of one curve


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """The cells of a ROI file. Ids are the names of the ROIs if these are different whole numbers, else 1..n.

    A group of ImageJ is the class "group 1", "group 2", ...

    Raises:
        FileError: the file is unreadable, or the ROIs lie on several slices of a stack.
    """
    try:
        rois = _read_zip(path) if path.suffix.lower() == ".zip" else [roifile.ImagejRoi.frombytes(path.read_bytes())]
        _check_places(path, rois)
        if not rois:
            return [Cell.none("nothing: the archive holds no ROIs")]
        return [
            _cell(roi, number, size) for roi, number in zip(rois, ids_of_names([roi.name for roi in rois]), strict=True)
        ]
    except FileError:
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes the reader raises nearly any type
        raise FileError(path, "cannot be read, it is damaged or holds no ROIs", short_line(error)) from None


def _check_places(path: Path, rois: Sequence[roifile.ImagejRoi]) -> None:
    """Refuse ROIs of several channels, slices or moments. A ROI without such a place, 0, belongs to all of them."""
    axes = {"channels": "c_position", "slices": "z_position", "moments": "t_position", "slices of a stack": "position"}
    for what, name in axes.items():
        places = {getattr(roi, name) for roi in rois} - {0}
        if len(places) > 1:
            one = what.partition(" ")[0].removesuffix("s")
            raise FileError(path, f"holds ROIs of {len(places)} {what}: save those of one {one}")


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
                raise FileError(path, f"holds a damaged ROI ({member.filename})", short_line(error)) from None
        others = [one.filename for one in archive.infolist() if not one.is_dir()]
    if not rois and others:
        raise FileError(path, f"holds no ROIs but {list_some(others, 1)}: unpack it")
    return rois


def roi_of(rings: Sequence[np.ndarray], name: str) -> roifile.ImagejRoi:
    """A ROI of these rings (n, 2) of corners x, y: a traced outline, or a composite if there are holes or pieces.

    A corner beyond :data:`LARGEST_WHOLE` makes a composite, too, whose corners are floats. Its box then ends there.
    """
    points = np.concatenate(rings)
    (left, top), (right, bottom) = (np.minimum(one, LARGEST_WHOLE) for one in (points.min(axis=0), points.max(axis=0)))
    if len(rings) == 1 and points.max() <= LARGEST_WHOLE:
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


def _cell(roi: roifile.ImagejRoi, number: int, size: tuple[int, int]) -> Cell:
    kind = roi.subtype.name if roi.subtype.name in NO_CELLS else roi.roitype.name
    name = f"group {roi.group}" if roi.group else ""
    if kind in NO_CELLS:
        return Cell.none(NO_CELLS[kind])
    if roi.multi_coordinates is not None:
        return rings_to_cell(_rings_of_path(np.asarray(roi.multi_coordinates)), number, name, size)
    if kind not in AREAS:
        return Cell.none(f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind.lower()}")
    if kind == "OVAL":
        return _oval(roi, number, name, size)
    return rings_to_cell([np.asarray(roi.coordinates())], number, name, size)


def _rings_of_path(path: np.ndarray) -> list[np.ndarray]:
    """Rings, each (n, 2), x and y of the corners, of the path of a shape: see :data:`PATH_NUMBERS`.

    Raises:
        ValueError: the path is damaged.
    """
    rings: list[list[np.ndarray]] = []
    place = 0
    while place < len(path):
        kind = int(path[place])
        if kind not in PATH_NUMBERS or (kind and not rings):
            raise ValueError(f"a shape with a segment of the kind {path[place]:g}")
        points = path[place + 1 : place + 1 + PATH_NUMBERS[kind]].reshape(-1, 2)
        place += 1 + PATH_NUMBERS[kind]
        if kind == 0:
            rings.append([points])
        elif len(points):
            rings[-1].append(points if kind == 1 else _curve(np.concatenate([rings[-1][-1][-1:], points])))
    return [np.concatenate(ring) for ring in rings]


def _curve(points: np.ndarray) -> np.ndarray:
    """(CURVE_POINTS, 2) corners along a Bezier curve after its start, by the algorithm of de Casteljau.

    Args:
        points: (3, 2) or (4, 2) start, control points and end.
    """
    t = np.linspace(0, 1, CURVE_POINTS + 1)[1:, None]
    between = list(points)
    while len(between) > 1:
        between = [(1 - t) * one + t * other for one, other in pairwise(between)]
    return between[0]


def _oval(roi: roifile.ImagejRoi, number: int, name: str, size: tuple[int, int]) -> Cell:
    """A cell of the pixels whose centre lies in the ellipse in the ROI's box."""
    height, width = max(roi.bottom - roi.top, 0), max(roi.right - roi.left, 0)
    top, left = max(int(roi.top), -1), max(int(roi.left), -1)  # one pixel beyond the image tells that it is cut
    rows = np.arange(top, min(int(roi.bottom), size[0] + 1)) + 0.5 - roi.top
    columns = np.arange(left, min(int(roi.right), size[1] + 1)) + 0.5 - roi.left
    mask = (rows[:, None] / max(height, 1) - 0.5) ** 2 + (columns / max(width, 1) - 0.5) ** 2 <= 0.25
    if not mask.size and height and width:
        return Cell(-1, -1, np.ones((1, 1), bool), number, name)  # all of it is outside
    return Cell(top, left, mask, number, name)
