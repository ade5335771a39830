"""Files of microscopes with channels, depth and time, as flat images of one field: nothing is chosen by guess."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from common.disk import check_folder, new_folder, write_bytes
from common.errors import InputError, list_some
from common.log import with_progress
from dataset.decode import FileError
from dataset.files import encode_tiff
from dataset.folder_hints import list_folder, warn_of_skipped
from dataset.microscope_files import PACKAGES, PROJECTIONS, Choice, Stack, read_stack
from dataset.names import odd_names, plain_name
from dataset.scale import scale_warning

SUFFIXES = (".tif", ".tiff", *PACKAGES)
logger = logging.getLogger(__name__)


def flatten(stack: Stack, choice: Choice, path: Path) -> tuple[np.ndarray, bool]:
    """The chosen plane or projection.

    Args:
        stack: the planes that are needed, from :func:`read_stack`.

    Returns:
        (H, W, C) in the file's own type, rounded; whether three channels are RGB.

    Raises:
        InputError: a channel that does not exist, or planes that were not recorded.
    """
    array, axes = stack.array, stack.axes
    if "C" in axes and "S" in axes:
        raise FileError(path, "holds channels that are colour pictures: save one of them")
    colours = "S" in axes
    channel = "S" if colours else "C"
    if channel not in axes:
        array, axes = array[..., None], axes + channel
    array = np.moveaxis(array, axes.index(channel), -1)
    axes = axes.replace(channel, "")
    if choice.channels:
        if max(choice.channels) > array.shape[-1]:
            raise InputError(f"`channels` {max(choice.channels)}: {path} has {array.shape[-1]}")
        array = array[..., [number - 1 for number in choice.channels]]
    projections = {letter: chosen for letter, chosen in (("T", choice.time), ("Z", choice.z)) if letter in axes}
    is_mean = "mean" in projections.values()
    if stack.is_recording or (is_mean and array.dtype.kind != "b"):
        _refuse_empty_planes(array, axes, colours, is_mean, path)
    for letter, projection in projections.items():
        array = _project(np.moveaxis(array, axes.index(letter), 0), projection or "")
        axes = axes.replace(letter, "")
    return np.ascontiguousarray(array if axes == "YX" else array.swapaxes(0, 1)), colours and array.shape[2] == 3


def _refuse_empty_planes(array: np.ndarray, axes: str, colours: bool, is_mean: bool, path: Path) -> None:
    """Refuse planes that are 0 throughout, as programs fill in what was not recorded. A maximum takes no harm."""
    across = (axes.index("Y"), axes.index("X"))
    planes = np.asarray(array.any(axis=(*across, -1) if colours else across))
    planes = planes.reshape(-1, 1 if colours else array.shape[-1])
    filled = planes.all(axis=0) if is_mean else planes.any(axis=0)  # (C,)
    if not filled.all():
        channels = [int(place) + 1 for place in np.flatnonzero(~filled)]
        raise FileError(
            path, f"has nothing but 0 in channel {', '.join(map(str, channels))} of the chosen planes, as planes have "
            "that were not recorded: choose other planes or other channels",
        )  # fmt: skip


def _project(planes: np.ndarray, projection: str) -> np.ndarray:
    """(n, ...) -> (...) in the same type."""
    flat = PROJECTIONS[projection](planes)
    return np.rint(flat).astype(planes.dtype) if planes.dtype.kind in "uib" else flat.astype(planes.dtype)


def flatten_folder(source: Path, output: Path, choice: Choice) -> list[Path]:
    """Write one flat TIFF for every file, or none.

    Returns:
        The files.

    Raises:
        InputError: nothing to read, a folder that holds something, a file that cannot be read or needs a choice.
    """
    check_folder(output)
    listings = [list_folder(source, "image")] if source.is_dir() else []
    files = [source] if source.is_file() else [source / name for one in listings for name in one.files]
    files = [one for one in files if one.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"{source} holds no files of {' '.join(SUFFIXES)}")
    odd = odd_names(one.name for one in files)
    if odd:
        raise InputError(f"{source} {odd}")
    names = [plain_name(one.stem) for one in files]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise InputError(f"{source} has two files with one name: {list_some(twice)}. Keep one of each")
    warn_of_skipped(listings, files, SUFFIXES)
    sizes: dict[str, float | None] = {}
    axes_given = False
    with new_folder(output) as folder:
        for name, path in with_progress(list(zip(names, files, strict=True)), "flattening", "file"):
            content, sizes[path.name], needs_axes = _content(path, choice)
            write_bytes(folder / f"{name}.tif", content)
            axes_given |= needs_axes
        if choice.axes and not axes_given:
            raise InputError(f"`axes` {choice.axes} has no effect: no file of {source} needs it: leave it out")
    for warning in scale_warning(sizes):
        logger.warning("%s: %s", source, warning)
    return [output / f"{name}.tif" for name in names]


def _content(path: Path, choice: Choice) -> tuple[bytes, float | None, bool]:
    """The flat TIFF of a file, its pixel size, and whether its axes are those of the choice."""
    stack = read_stack(path, choice)
    image, colours = flatten(stack, choice, path)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise FileError(path, "holds NaN or infinite values: replace them")
    return encode_tiff(image, colours=colours, pixel_um=stack.pixel_um), stack.pixel_um, stack.axes_given
