"""Check outputs: no command overwrites its inputs or other people's files, or writes into a folder of other work."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from common.disk import names_in, real_path
from common.errors import InputError, list_some
from common.plain import read_json

MAKER = "SiT for cell segmentation"  # text chunk "Software" of our pictures


def maker_note() -> PngImagePlugin.PngInfo:
    """Text that marks a picture as ours, for ``Image.save(pnginfo=...)``."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Software", MAKER)
    return note


def check_apart(output: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that is an input, or lies in a folder of inputs.

    Args:
        output: file or folder to write.
        inputs: files and folders that are read. None is skipped.

    Raises:
        InputError: the output is an input, or lies in a folder of inputs.
    """
    target = real_path(output)
    for given in inputs:
        if given is None:
            continue
        source = real_path(given)
        same = target == source or (output.exists() and source.exists() and output.samefile(source))
        if same or (source.is_dir() and source in target.parents):
            raise InputError(f"`output` {output}: {given} is read by this command. Name another place.")


def check_output_picture(path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse a PNG that is an input, or that exists and was not made by us.

    Raises:
        InputError: the PNG is refused.
    """
    check_apart(path, inputs)
    if path.exists() and not _is_our_picture(path):
        _refuse(path)


def _is_our_picture(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == MAKER
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def check_output_table(path: Path, header: Iterable[str], inputs: Iterable[str | Path | None]) -> None:
    """Refuse a CSV file that is an input, or that exists with another header.

    Raises:
        InputError: the file is refused.
    """
    check_apart(path, inputs)
    first = ",".join(header).encode()
    if path.is_file():
        with path.open("rb") as file:
            if file.readline(len(first) + 2).strip() == first:
                return
    if path.exists():
        _refuse(path)


def check_output_arrays(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, inputs: Iterable[str | Path | None]
) -> None:
    """Refuse an .npz that is an input, or that exists and holds anything that would not be written again.

    Args:
        shapes: name of every array that will be written, and its shape.
        dtype: their type.

    Raises:
        InputError: the file is refused.
    """
    check_apart(path, inputs)
    if not path.exists():
        return
    found = _arrays_of(path) if path.is_file() else {}
    ours = {f"{name}.npy": (shape, np.dtype(dtype)) for name, shape in shapes.items()}
    if not found or any(ours.get(name) != header for name, header in found.items()):
        _refuse(path)


def _arrays_of(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array of an .npz, by their headers. Empty for a file that is none."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    if np.lib.format.read_magic(member) != (1, 0):
                        return {}  # so long a header has no array of ours
                    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                    found[name] = (shape, dtype)
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return {}
    return found


def _refuse(path: Path) -> None:
    raise InputError(f"`output` {path} exists, and this command did not make it. Name another file, or remove it.")


def check_output_folder(folder: Path, results: str, keys: Iterable[str], inputs: Iterable[str | Path | None]) -> None:
    """Refuse a folder of inputs, and a folder with other files than earlier results of the same command.

    Args:
        folder: folder for the results. It need not exist.
        results: name of the JSON file that marks a folder of this command.
        keys: some keys of that file.
        inputs: files and folders that are read. None is skipped.

    Raises:
        InputError: the folder is refused, or is a file.
    """
    check_apart(folder, inputs)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`output` {folder} is a file. Name a folder.")
    others = names_in(folder)
    if not others:
        return
    try:
        is_own = set(keys) <= set(read_json(folder / results, "name a new folder"))
    except (OSError, ValueError):
        is_own = False
    if not is_own:
        held = list_some(others, 1)
        raise InputError(
            f"`output` {folder} holds other files ({held}) and no {results} of this command. Name a new folder."
        )
