"""One field of a microscope's file as an array with named axes.

TIFF (OME, ImageJ hyperstacks, plain stacks) is read by tifffile. ``.nd2``, ``.czi`` and ``.lif`` need a reader each,
which ``pip install .[microscopes]`` brings. Of ``.nd2`` and ``.czi``, only the chosen planes are read.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from common.errors import InputError, list_some
from common.faults import short_line
from dataset.decode import MAX_DECODED_BYTES, FileError, check_page
from dataset.scale import pixel_size, sane

PROJECTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max": lambda planes: planes.max(axis=0),
    "mean": lambda planes: planes.mean(axis=0, dtype=np.float64),
}
PACKAGES = {".nd2": "nd2", ".czi": "pylibCZIrw", ".lif": "liffile"}
COLOURS = "S"  # axis of the samples of a colour
# Axes that an image cannot have, and what they are.
OTHER_AXES = {
    "M": "tiles of a mosaic that are not merged", "H": "phases", "R": "rotations", "A": "rotations",
    "I": "illuminations", "V": "views", "B": "blocks", "L": "loops", "N": "slices in time", "Q": "slices in time",
    "\u03bb": "wavelengths", "\u039b": "wavelengths", "U": "a loop without a name",
}  # fmt: skip
_CZI_PIXEL = re.compile(r'<Distance\s+Id="X"[^>]*>.*?<Value>\s*([^<\s]+)\s*</Value>', re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """Which part of a file becomes the image. A number counts from 1.

    Attributes:
        z: plane in depth, or one of ``PROJECTIONS``; None for files without depth.
        time: moment, or one of ``PROJECTIONS``; None for files of one moment.
        scene: field, for files that hold several.
        channels: those that are kept, in this order; empty for all.
        axes: letters of the axes, for files that do not name them, such as ZYX.
    """

    z: str | None = None
    time: str | None = None
    scene: int | None = None
    channels: Sequence[int] = ()
    axes: str = ""


@dataclass(frozen=True)
class Stack:
    """An array and the letters of its axes: T, Z, C, Y, X, and S for the samples of colours, which are RGB.

    Attributes:
        pixel_um: width of a pixel in micrometres, if the file says it.
        is_recording: a microscope wrote the file, and planes that it did not record are 0.
        axes_given: whether the axes are those of the choice, as the file does not name its own.
    """

    array: np.ndarray
    axes: str
    pixel_um: float | None = None
    is_recording: bool = False
    axes_given: bool = False


def read_stack(path: Path, choice: Choice) -> Stack:
    """One field of a file.

    Raises:
        FileError: unreadable, too large, several fields and none chosen, or a reader that is not installed.
    """
    suffix = path.suffix.lower()
    readers = {".nd2": _read_nd2, ".czi": _read_czi, ".lif": _read_lif}
    if choice.axes and suffix in readers:
        raise InputError(f"`axes` {choice.axes}: {path} names its axes itself: leave it out")
    try:
        stack = readers.get(suffix, _read_tiff)(path, choice)
    except ImportError:
        raise InputError(
            f"{path}: {suffix} files need the package {PACKAGES[suffix]}: pip install {PACKAGES[suffix]}, or "
            "pip install '.[microscopes]' in this project's folder; or save TIFF from the microscope's program"
        ) from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes the readers raise nearly any type
        raise FileError(path, "cannot be read, it is damaged or of another kind", short_line(error)) from None
    kept = [one for one in zip(stack.axes, stack.array.shape, strict=True) if one[1] > 1 or one[0] in "YX"]
    array = stack.array.reshape([count for _, count in kept])
    return dataclasses.replace(stack, array=array, axes="".join(axis for axis, _ in kept))


def planes_of(count: int, letter: str, choice: Choice, path: Path) -> list[int]:
    """Places of the planes along Z or T that are needed: one, or all for a projection.

    Raises:
        InputError: no choice for several planes, or a number that does not exist.
    """
    field = {"Z": "z", "T": "time"}[letter]
    chosen = getattr(choice, field)
    if count == 1 and chosen in (None, *PROJECTIONS):
        return [0]
    if chosen is None:
        raise InputError(
            f"`{field}`: {path} has {count} planes along {letter}: say which, by a number from 1 "
            f"to {count}, or {' or '.join(PROJECTIONS)} for a projection"
        )
    if chosen in PROJECTIONS:
        return list(range(count))
    if not chosen.isdecimal() or not 1 <= int(chosen) <= count:
        raise InputError(f"`{field}` {chosen}: {path} has {f'planes 1 to {count}' if count > 1 else 'one plane'}")
    return [int(chosen) - 1]


def _read_tiff(path: Path, choice: Choice) -> Stack:
    with tifffile.TiffFile(path, _multifile=False) as tiff:
        series = [one for one in tiff.series if not one.keyframe.is_reduced]
        chosen = series[_scene(path, choice, [_series_name(one) for one in series])]
        _check_bytes(path, chosen.nbytes)
        check_page(chosen.keyframe, chosen.dtype == bool, path)
        array, axes = chosen.asarray(maxworkers=1), chosen.axes
        is_colour = tifffile.PHOTOMETRIC(chosen.keyframe.photometric).name in ("RGB", "YCBCR")
    given = axes
    if choice.axes and axes.strip("YX"):
        given = choice.axes.upper()
        _check_given_axes(path, given, axes, "TZCS" if is_colour else "TZC")
    _refuse_unnamed_axes(path, array.shape, given)
    return _take_planes(Stack(array, given, pixel_size(path), axes_given=given != axes), choice, path)


def _check_given_axes(path: Path, given: str, axes: str, named: str) -> None:
    """Refuse other letters than those that a file names. Height and width count as named if all other axes are."""
    if len(given) != len(axes):
        raise InputError(f"`axes` {given}: {path} has {len(axes)} axes ({axes})")
    keeps_names = all(one == letter for one, letter in zip(given, axes, strict=True) if letter in named)
    if given != axes and not (keeps_names and axes.strip(f"{named}YX")):
        raise InputError(
            f"`axes` {given}: {path} names its axes itself ({axes}): leave it out, or keep this file in another folder"
        )


def _refuse_unnamed_axes(path: Path, shape: Sequence[int], axes: str) -> None:
    sizes = dict(zip(axes, shape, strict=True))
    unknown = any(axis not in "TZCYXS" and count > 1 for axis, count in sizes.items())
    if unknown or len(sizes) < len(axes) or not {"Y", "X"} <= set(axes):
        text = " x ".join(map(str, shape))
        raise InputError(
            f"`axes`: {path} does not name its dimensions ({text}, read as {axes}): give a letter for each, "
            "such as ZYX, CYX or TYX"
        )


def _take_planes(stack: Stack, choice: Choice, path: Path) -> Stack:
    array = stack.array
    for letter in "TZ":
        count = array.shape[stack.axes.index(letter)] if letter in stack.axes else 1
        places = planes_of(count, letter, choice, path)
        if len(places) < count:
            array = array.take(places, axis=stack.axes.index(letter))
    return dataclasses.replace(stack, array=array)


def _series_name(series: tifffile.TiffPageSeries) -> str:
    """Name and size of an image of a file, such as a preview beside the image."""
    size = " x ".join(map(str, series.shape))
    return f"{series.name}, {size}" if series.name and series.name != "Generic" else size


def _read_nd2(path: Path, choice: Choice) -> Stack:
    import nd2

    with nd2.ND2File(path) as file:
        sizes = dict(file.sizes)
        _refuse_other_axes(path, sizes)
        field = _scene(path, choice, [f"field {number}" for number in range(1, sizes.get("P", 1) + 1)])
        wanted = {letter: planes_of(sizes.get(letter, 1), letter, choice, path) for letter in "TZ"} | {"P": [field]}
        _check_bytes(path, file.nbytes // sizes.get("P", 1) // _left_out(sizes, wanted))
        loops = list(file.loop_indices) or [{}]
        places = {tuple(loop.get(letter, 0) for letter in "TZP"): number for number, loop in enumerate(loops)}
        frames = [
            file.read_frame(places[time, z, field]) for time, z in itertools.product(wanted["T"], wanted["Z"])
        ]  # each without the axes of length 1
        axes = "".join(letter for letter in sizes if letter in "CYXS")
        array = np.stack(frames).reshape(len(wanted["T"]), len(wanted["Z"]), *(sizes[letter] for letter in axes))
        if COLOURS in axes and not file.is_legacy:
            array = array[..., ::-1]  # NIS-Elements stores blue, green, red, and the package gives them so
        size = _nd2_pixel(file)
    return Stack(array, f"TZ{axes}", sane(size), is_recording=True)


def _nd2_pixel(file: Any) -> float | None:
    """Width of a pixel in micrometres. None if the microscope was not calibrated."""
    try:
        volume = file.metadata.channels[0].volume
        return float(volume.axesCalibration[0]) if volume.axesCalibrated[0] else None
    except Exception:  # noqa: BLE001 - notes of the program that cannot be read are no reason to refuse pixels
        return None


def _left_out(sizes: Mapping[str, int], wanted: Mapping[str, Sequence[int]]) -> int:
    """How many times as many planes a field has as are wanted of it."""
    return max(1, sizes.get("T", 1) * sizes.get("Z", 1) // (len(wanted["T"]) * len(wanted["Z"])))


def _read_czi(path: Path, choice: Choice) -> Stack:
    from pylibCZIrw import czi

    with czi.open_czi(str(path)) as file:
        sizes = {axis: high - low for axis, (low, high) in file.total_bounding_box.items()}
        _refuse_other_axes(path, sizes)
        areas = file.scenes_bounding_rectangle_no_pyramid or {None: file.total_bounding_rectangle_no_pyramid}
        names = [f"{area.w} x {area.h}" for area in areas.values()]
        scene, area = list(areas.items())[_scene(path, choice, names)]
        wanted = {letter: planes_of(sizes.get(letter, 1), letter, choice, path) for letter in "TZ"}
        kinds = [file.get_channel_pixel_type(channel) for channel in range(sizes.get("C", 1))]
        if len(set(kinds)) > 1:
            raise FileError(path, f"has channels of different kinds ({', '.join(kinds)}): export one kind as TIFF")
        is_colour = kinds[0].startswith("Bgr")
        count = len(wanted["T"]) * len(wanted["Z"]) * len(kinds) * area.w * area.h
        _check_bytes(path, count * (3 if is_colour else 1) * (1 if kinds[0].endswith(("Gray8", "24")) else 2))
        planes = [
            np.array(file.read(roi=tuple(area), plane={"T": time, "Z": z, "C": channel}, scene=scene))
            for time, z, channel in itertools.product(wanted["T"], wanted["Z"], range(len(kinds)))
        ]
        array = np.stack(planes).reshape(len(wanted["T"]), len(wanted["Z"]), len(kinds), *planes[0].shape)
        size = _CZI_PIXEL.search(file.raw_metadata)
        size_um = float(size.group(1)) * 1e6 if size else None
    array = array[..., ::-1] if is_colour else array[..., 0]  # stored as blue, green, red
    return Stack(array, "TZCYXS" if is_colour else "TZCYX", sane(size_um), is_recording=True)


def _read_lif(path: Path, choice: Choice) -> Stack:
    import liffile

    with liffile.LifFile(path) as file:
        images = list(file.images)
        names = [f"{one.path}, {' x '.join(map(str, one.shape))}" for one in images]
        if not images:
            raise FileError(path, "holds no images")
        chosen = images[_scene(path, choice, names)]
        sizes = dict(zip(chosen.dims, chosen.shape, strict=True))
        _refuse_other_axes(path, sizes)
        _check_bytes(path, chosen.nbytes)
        across = np.asarray(chosen.coords.get("X", ()))
        size = float(across[1] - across[0]) * 1e6 if len(across) > 1 else None
        stack = Stack(np.asarray(chosen.asarray()), "".join(chosen.dims), sane(size), is_recording=True)
    return _take_planes(stack, choice, path)


def _refuse_other_axes(path: Path, sizes: Mapping[str, int]) -> None:
    """Refuse a file with axes that no image has."""
    for letter, count in sizes.items():
        if letter not in "TZCYXSP" and count > 1:
            what = OTHER_AXES.get(letter[:1], "an axis that is not known here")
            raise FileError(
                path, f"has {count} planes along {letter} ({what}): merge or choose them in the microscope's program, "
                "and save TIFF",
            )  # fmt: skip
    if not {"Y", "X"} <= set(sizes):
        raise FileError(path, f"has no image of width and height, only the axes {''.join(sizes)}: choose another scene")


def _check_bytes(path: Path, count: int) -> None:
    if count > 16 * MAX_DECODED_BYTES:
        raise FileError(path, f"holds {count / 2**30:.3g} GiB in one field, at most 16 GiB are read: cut it first")


def _scene(path: Path, choice: Choice, names: Sequence[str]) -> int:
    """Place of the chosen field."""
    if len(names) == 1 and choice.scene in (None, 1):
        return 0
    if choice.scene is None or choice.scene > len(names):
        numbered = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
        count = f"{len(names)} image{'s' * (len(names) > 1)}"
        raise InputError(f"`scene`: {path} holds {count} ({list_some(numbered, 8)}): give the number")
    return choice.scene - 1
