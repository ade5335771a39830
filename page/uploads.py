"""Files that a browser sends."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import InputError


@contextlib.contextmanager
def uploaded(content: bytes, name: str, suffixes: Sequence[str]) -> Iterator[Path]:
    """A file of the browser in a private temporary folder, removed at the end.

    Args:
        content: of the file.
        name: that the user's file has. Only its suffix is used. Error messages inside the block show it.
        suffixes: allowed ones, lower case.

    Raises:
        InputError: another suffix.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in suffixes:
        raise InputError(f"{name}: give a file of one of the kinds {' '.join(suffixes)}.")
    with tempfile.TemporaryDirectory(prefix="sit-page-") as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(content)
        try:
            yield path
        except InputError as error:
            raise InputError(error.marked.replace(str(path), name)) from error
