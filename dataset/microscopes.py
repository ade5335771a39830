"""Files of microscopes with channels, depth and time, as flat images of one field: nothing is chosen by guess.

TIFF (OME, ImageJ hyperstacks, plain stacks) is read by tifffile. ``.nd2``, ``.czi`` and ``.lif`` need a reader each,
which ``pip install .[microscopes]`` brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from common.disk import new_folder, write_bytes
from common.errors import InputError, list_some
from dataset.decode import MAX_DECODED_BYTES, FileError, check_page
from dataset.files import encode_tiff

PROJECTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max": lambda planes: planes.max(axis=0),
    "mean": lambda planes: planes.mean(axis=0, dtype=np.float64),
}
SUFFIXES = (".tif", ".tiff", ".nd2", ".czi", ".lif")
PACKAGES = {".nd2": "nd2", ".czi": "czifile", ".lif": "liffile"}
COLOURS = "S"  # axis of the samples of a colour


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
    """An array and the letters of its axes: T, Z, C, Y, X, and S for the samples of colours."""

    array: np.ndarray
    axes: str


def read_stack(path: Path, choice: Choice) -> Stack:
    """One field of a file.

    Raises:
        FileError: unreadable, too large, several fields and none chosen, or a reader that is not installed.
    """
    suffix = path.suffix.lower()
    readers = {".nd2": _read_nd2, ".czi": _read_czi, ".lif": _read_lif}
    try:
        stack = readers.get(suffix, _read_tiff)(path, choice)
    except ImportError:
        raise InputError(
            f"{path}: {suffix} files need the package {PACKAGES[suffix]}: pip install {PACKAGES[suffix]}, or "
            "pip install .[microscopes] in this project's folder; or save TIFF from the microscope's program"
        ) from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes the readers raise nearly any type
        detail = " ".join(str(error).split())[:120]
        raise FileError(path, "cannot be read, it is damaged or of another kind", detail) from None
    axes = choice.axes.upper() if choice.axes and stack.axes.strip("YX") else stack.axes
    if len(axes) != stack.array.ndim:
        raise InputError(f"axes {choice.axes}: {path} has {stack.array.ndim} axes ({stack.axes})", "axes")
    kept = [place for place, (axis, n) in enumerate(zip(axes, stack.array.shape, strict=True)) if n > 1 or axis in "YX"]
    array = stack.array.reshape([stack.array.shape[place] for place in kept])
    return Stack(array, "".join(axes[place] for place in kept))


def _read_tiff(path: Path, choice: Choice) -> Stack:
    with tifffile.TiffFile(path, _multifile=False) as tiff:
        series = [one for one in tiff.series if not one.keyframe.is_reduced]
        chosen = series[_scene(path, choice, [_series_name(one) for one in series])]
        _check_bytes(path, chosen.nbytes)
        check_page(chosen.keyframe, chosen.dtype == bool, path)
        return Stack(chosen.asarray(maxworkers=1), chosen.axes)


def _series_name(series: tifffile.TiffPageSeries) -> str:
    """Name and size of an image of a file, such as a preview beside the image."""
    size = " x ".join(map(str, series.shape))
    return f"{series.name}, {size}" if series.name and series.name != "Generic" else size


def _read_nd2(path: Path, choice: Choice) -> Stack:
    import nd2

    with nd2.ND2File(path) as file:
        sizes = dict(file.sizes)
        _check_bytes(path, file.nbytes)
        array, axes = file.asarray(), "".join("P" if axis == "P" else axis for axis in sizes)
    return _take_scene(path, choice, array, axes, "P")


def _read_czi(path: Path, choice: Choice) -> Stack:
    import czifile

    with czifile.CziFile(path) as file:
        _check_bytes(path, int(np.prod(file.shape)) * np.dtype(file.dtype).itemsize)
        axes = file.axes.replace("S", "P").replace("0", COLOURS)  # there S is the scene and 0 the samples
        return _take_scene(path, choice, file.asarray(max_workers=1), axes, "P")


def _read_lif(path: Path, choice: Choice) -> Stack:
    import liffile

    with liffile.LifFile(path) as file:
        chosen = list(file.images)[_scene(path, choice, [one.name for one in file.images])]
        _check_bytes(path, chosen.nbytes)
        return Stack(np.asarray(chosen.asarray()), "".join(chosen.dims))


def _check_bytes(path: Path, count: int) -> None:
    if count > 16 * MAX_DECODED_BYTES:
        raise FileError(path, f"holds {count / 2**30:.3g} GiB in one field, at most 16 GiB are read: cut it first")


def _scene(path: Path, choice: Choice, names: Sequence[str]) -> int:
    """Place of the chosen field."""
    if len(names) == 1 and choice.scene in (None, 1):
        return 0
    if choice.scene is None or choice.scene > len(names):
        numbered = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
        raise InputError(
            f"scene: {path} holds {len(names)} images ({list_some(numbered, 8)}): give the number", "scene"
        )
    return choice.scene - 1


def _take_scene(path: Path, choice: Choice, array: np.ndarray, axes: str, letter: str) -> Stack:
    if letter not in axes:
        return Stack(array, axes)
    place = axes.index(letter)
    index = _scene(path, choice, [f"field {number}" for number in range(1, array.shape[place] + 1)])
    return Stack(array.take(index, axis=place), axes.replace(letter, ""))


def flatten(stack: Stack, choice: Choice, path: Path) -> tuple[np.ndarray, bool]:
    """The chosen plane or projection.

    Returns:
        (H, W, C) in the file's own type, rounded; whether three channels are RGB.

    Raises:
        InputError: an axis that needs a choice and has none, or the other way round.
    """
    array, axes = stack.array, stack.axes
    unknown = "".join(axis for axis in axes if axis not in "TZCYXS")
    if unknown or len(set(axes)) < len(axes) or not {"Y", "X"} <= set(axes):
        shape = " x ".join(map(str, array.shape))
        raise InputError(
            f"axes: {path} does not name its dimensions ({shape}, read as {axes}): give a letter for each, "
            "such as ZYX, CYX or TYX",
            "axes",
        )
    for letter, field in (("Z", "z"), ("T", "time")):
        array, axes = _reduce(array, axes, letter, field, getattr(choice, field), path)
    if "C" in axes and "S" in axes:
        raise FileError(path, "holds channels that are colour pictures: save one of them")
    colours = "S" in axes
    channel = "S" if colours else "C"
    order = "YX" + (channel if channel in axes else "")
    array = array.transpose([axes.index(axis) for axis in order])
    array = array.reshape(*array.shape[:2], -1)
    if choice.channels:
        if max(choice.channels) > array.shape[2]:
            raise InputError(f"channels {max(choice.channels)}: {path} has {array.shape[2]}", "channels")
        array = array[..., [number - 1 for number in choice.channels]]
    return np.ascontiguousarray(array), colours and array.shape[2] == 3


def _reduce(
    array: np.ndarray, axes: str, letter: str, field: str, chosen: str | None, path: Path
) -> tuple[np.ndarray, str]:
    """Take a plane of one axis, or project along it."""
    if letter not in axes:
        return array, axes
    place, dtype = axes.index(letter), array.dtype
    count = array.shape[place]
    if chosen is None:
        raise InputError(
            f"{field}: {path} has {count} planes along {letter}: say which, by a number from 1 "
            f"to {count}, or {' or '.join(PROJECTIONS)} for a projection",
            field,
        )
    planes = np.moveaxis(array, place, 0)
    if chosen in PROJECTIONS:
        flat = PROJECTIONS[chosen](planes)
        flat = np.rint(flat).astype(dtype) if dtype.kind in "ui" else flat.astype(dtype)
    else:
        if not chosen.isdecimal() or not 1 <= int(chosen) <= count:
            raise InputError(f"{field} {chosen}: {path} has planes 1 to {count}", field)
        flat = planes[int(chosen) - 1]
    return flat, axes.replace(letter, "")


def flatten_folder(source: Path, output: Path, choice: Choice) -> list[Path]:
    """Write one flat TIFF for every file; all are read before the first is written.

    Returns:
        The files.

    Raises:
        InputError: nothing to read, a folder that holds something, a file that cannot be read or needs a choice.
    """
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty: give a new folder")
    files = [source] if source.is_file() else sorted(source.iterdir()) if source.is_dir() else []
    files = [one for one in files if one.suffix.lower() in SUFFIXES and not one.name.startswith(".")]
    if not files:
        raise InputError(f"{source} holds no files of {' '.join(SUFFIXES)}")
    names = [one.name.removesuffix(one.suffix).removesuffix(".ome") for one in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{source} has two files with one name: {list_some(twice)}. Keep one of each")
    contents = [_content(path, choice) for path in files]
    with new_folder(output) as folder:
        for name, content in zip(names, contents, strict=True):
            write_bytes(folder / f"{name}.tif", content)
    return [output / f"{name}.tif" for name in names]


def _content(path: Path, choice: Choice) -> Any:
    image, colours = flatten(read_stack(path, choice), choice, path)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise FileError(path, "holds NaN or infinite values: replace them")
    return encode_tiff(image, colours=colours)
