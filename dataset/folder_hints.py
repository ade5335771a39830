"""What to say about a folder without the files that are looked for, and about files that are not read."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.disk import is_litter
from common.errors import list_some
from dataset.decode import FileError
from dataset.names import IMAGE_SUFFIXES, MASK_SUFFIXES

logger = logging.getLogger(__name__)
# What Cellpose writes beside images and masks and that is neither. NAME_flows counts only beside NAME.
BY_PRODUCTS = re.compile(r"(_seg\.npy|_(flows|outlines)_cp_masks\.\w+)$")
_ANNOTATIONS = (".roi", ".zip", ".json", ".geojson")
_MICROSCOPES = (".nd2", ".czi", ".lif")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_NOTES = {"", ".txt", ".csv", ".tsv", ".md", ".json", ".xml", ".yaml", ".yml", ".log", ".xlsx", ".pdf", ".db", ".ini"}
# What to do with files of other programs, by suffix.
_OTHERS = {
    ".xml": "export COCO from CVAT, or GeoJSON from QuPath for annotations of Aperio and ASAP",
    ".csv": "save the labels as TIFF, in napari a labels layer",
    ".txt": "export COCO or GeoJSON from the program that wrote them",
    ".mat": "save the label image in it as TIFF",
    ".h5": "save the label image in it as TIFF",
    ".hdf5": "save the label image in it as TIFF",
    ".zarr": "save the label image in it as TIFF",
    ".ndjson": "export COCO",
    ".gz": "unpack it",
    ".tar": "unpack it",
    ".7z": "unpack it",
    ".qpdata": "export GeoJSON from QuPath",
    ".xcf": "save it as PNG",
    ".psd": "save it as PNG",
    ".svg": "save it as PNG",
}
_MASK_WORD = re.compile(r"mask|label|seg|anno", re.IGNORECASE)
MOST_LEVELS = 3  # of sub-folders that are searched for files


class Listing(NamedTuple):
    """Names in a folder, sorted. Hidden ones and those that systems leave everywhere are left out."""

    folder: Path
    files: tuple[str, ...]
    folders: tuple[str, ...]


def list_folder(folder: str | Path, what: str) -> Listing:
    """Read the names in a folder. On a network disk with many files this takes seconds, so it is done once.

    Args:
        folder: the folder.
        what: what it holds, for the message.

    Raises:
        FileError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(folder, f"is no folder of {what} files: {no_folder(folder)}")
    names: dict[bool, list[str]] = {False: [], True: []}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_litter(entry.name):
                names[_is_folder(entry)].append(entry.name)
    return Listing(folder, tuple(sorted(names[False])), tuple(sorted(names[True])))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def files_in(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Image files of a folder, by name. Hidden ones are left out."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return [folder / name for name in names if Path(name).suffix.lower() in suffixes]


def _files_if_readable(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """:func:`files_in` for hints, which stop no command: none of a folder without permission."""
    try:
        return files_in(folder, suffixes)
    except OSError:
        return []


def other_program(suffix: str) -> str:
    """What to do with files of this suffix, which are not read; empty if nothing is known."""
    mend = _OTHERS.get(suffix.lower())
    return f": {mend}" if mend else ""


def no_folder(path: Path) -> str:
    """What lies at ``path`` in place of a folder, and what to give."""
    if not path.exists():
        pattern = ": give the folder, without a pattern" if set(path.name) & set("*?[") else ""
        return f"not found{pattern}"
    if path.suffix.lower() in _ARCHIVES:
        return "it is an archive: unpack it, and give the folder"
    if path.suffix.lower() in _ANNOTATIONS:
        return "it is a file of annotations: make_masks.py convert turns it into label images"
    return f"it is a file: give the folder, such as {path.parent}"


def what_instead(
    folder: Path, what: str, others: Sequence[str], by_products: Sequence[str], suffixes: Sequence[str]
) -> str:
    """What a folder without the files that are looked for holds, and what to give."""
    segs = sum(name.endswith("_seg.npy") for name in by_products)
    if segs and not what.startswith("image"):
        return f" but {segs} _seg.npy of Cellpose: make_masks.py convert turns them into label images"
    archives = [name for name in others if name.lower().endswith(".zip") and not _holds_rois(folder / name)]
    if archives:
        return f" but archives ({list_some(archives, 1)}): unpack them"
    stacks = [name for name in others if name.lower().endswith(_MICROSCOPES)]
    if stacks:
        return f" but files of a microscope ({list_some(stacks, 1)}): make_masks.py images turns them into flat TIFFs"
    annotations = [name for name in others if name.lower().endswith(_ANNOTATIONS)]
    if annotations and not what.startswith("image"):
        first = list_some(annotations, 1)
        return f" but annotations of another program ({first}): make_masks.py convert turns them into label images"
    arrays = [name for name in others if name.lower().endswith((".zarr", ".n5"))]
    if arrays:
        return f" but arrays ({list_some(arrays, 1)}), which are not read: save them as TIFF"
    inner = [name for name in others if (folder / name).is_dir() and not leads_up(folder / name)]
    if inner:
        return _which_folder(folder, what, inner, suffixes)
    kinds = Counter(Path(name).suffix.lower() for name in others)
    kind, count = max(kinds.items(), key=lambda one: one[1]) if kinds else ("", 0)
    if kind and not what.startswith("image") and other_program(kind):
        return f" but {count} {kind}, which are not read{other_program(kind)}"
    if kind:
        return f" but {count} {kind}, which are not read: save them as {' '.join(suffixes)}"
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    hidden = sorted(name for name in names if name.startswith(".") and Path(name).suffix.lower() in suffixes)
    only = f" but {len(hidden)} hidden ones (as {hidden[0]}), which are no images" if hidden else ""
    return f"{only or ('' if names else ', it is empty')}, it must hold {' '.join(suffixes)}"


def _which_folder(folder: Path, what: str, inner: Sequence[str], suffixes: Sequence[str]) -> str:
    """Which sub-folder to give: one that is named after what is looked for, else one for training, else the first."""
    deepest = {name: _first_with_files(folder / name, suffixes) for name in inner}
    full = [name for name in inner if deepest[name] is not None]
    named = [name for name in inner if name.startswith(what)]
    parts = [name for name in full if name.lower().startswith("train")]
    wanted = next(iter([name for name in named if name in full] or named or parts or full), None)
    if wanted is None:
        return f", nor do its sub-folders ({list_some(inner)}), it must hold {' '.join(suffixes)}"
    path = deepest[wanted] or folder / wanted
    below = _files_if_readable(path, suffixes)
    kept = [name for name in full if files_in(folder / name, suffixes)]
    has_mask = any(_MASK_WORD.search(file.name) for file in below)
    if len(kept) > 1 and len(below) == 2 and has_mask and not parts:
        return (
            f", but folders of two files (as {below[0].relative_to(folder)} and {below[1].name}). If these are one "
            "image and its mask: put all images into one folder, all masks into another, each named after its folder"
        )
    groups = ". If each sub-folder is a group, such as a patient: make_masks.py groups puts them into one folder"
    return f"; did you mean {path}?{f' It holds {len(below)}' if below else ''}{groups if len(kept) > 1 else ''}"


def _first_with_files(folder: Path, suffixes: Sequence[str], levels: int = MOST_LEVELS) -> Path | None:
    """The folder, or the first one below it, that holds such files."""
    if _files_if_readable(folder, suffixes):
        return folder
    if levels == 0:
        return None
    try:
        with os.scandir(folder) as entries:
            kept = [entry.name for entry in entries if not is_litter(entry.name) and _is_folder(entry)]
    except OSError:  # no permission
        return None
    inner = sorted(name for name in kept if not leads_up(folder / name))
    found = (_first_with_files(folder / name, suffixes, levels - 1) for name in inner[:20])
    return next((path for path in found if path is not None), None)


def leads_up(path: Path) -> bool:
    """Whether a link leads to a folder around itself, or to nothing."""
    try:
        return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve(strict=True))
    except (OSError, RuntimeError):  # nothing is there, or it leads to itself
        return True


def _holds_rois(path: Path) -> bool:
    """Whether a zip archive holds ROIs of ImageJ."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.lower().endswith(".roi") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def warn_of_skipped(
    listings: Sequence[Listing], known: Iterable[Path], suffixes: Sequence[str] = MASK_SUFFIXES
) -> None:
    """Log warnings about files in folders of images and of masks that are not read.

    Args:
        listings: folders of images and of masks.
        known: files, or folders of nuclei, that are read.
        suffixes: kinds of files that are read.
    """
    for warning in _other_files_warnings(listings, suffixes) + sub_folder_warnings(listings, known, suffixes):
        logger.warning("%s", warning)


def _other_files_warnings(listings: Sequence[Listing], suffixes: Sequence[str]) -> list[str]:
    """Warnings about files that look like data and are of a kind that is not read, such as .gif and .jp2."""
    warnings = []
    for listing in dict.fromkeys(listings):
        others = [
            name
            for name in listing.files
            if Path(name).suffix.lower() not in _NOTES.union(suffixes) and not BY_PRODUCTS.search(name)
        ]
        if others:
            warnings.append(f"{listing.folder}: files of a kind that is not read: {list_some(others)}")
    return warnings


def sub_folder_warnings(
    listings: Sequence[Listing], known: Iterable[Path], suffixes: Sequence[str] = MASK_SUFFIXES
) -> list[str]:
    """Warnings about sub-folders with files that are not read. Arguments: see :func:`warn_of_skipped`."""
    folders = [listing.folder for listing in listings]
    used = [os.path.abspath(path) for path in (*folders, *known)]  # noqa: PTH100 - many files: strings are quicker
    warnings = []
    for listing in dict.fromkeys(listings):
        start = os.path.join(os.path.abspath(listing.folder), "")  # noqa: PTH100, PTH118
        tops = {path[len(start) :].partition(os.sep)[0] for path in used if path.startswith(start)}
        for name in listing.folders:
            count = 0 if name in tops else len(_files_if_readable(listing.folder / name, suffixes))
            if count:
                warnings.append(f"{listing.folder}: files in the sub-folder {name} ({count}) are not read")
    return warnings
