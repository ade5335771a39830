"""Files on disk: written whole or not at all, hashed, and folders held by one process."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from common.errors import InputError

LOCK_FILE = ".lock"


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk, and only then give it its name.

    A process that dies in between leaves what was there before.

    Raises:
        OSError: disk full, no permission; it names the file, and the temporary one is removed.
    """
    temporary = path.with_name(
        f".{secrets.token_hex(8)}.tmp"
    )  # short, since path's own name may be as long as names go
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides a write that failed
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_json(path: Path, content: Any) -> None:
    """JSON, indented, written atomically."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, or of a folder's files in the order of their names (one mask per nucleus).

    Raises:
        InputError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        parts = [file_sha256(file) for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files' contents are."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock_folder(folder: Path, mend: str) -> IO[bytes]:
    """Hold a folder for this process alone, and remove the temporary files of killed ones.

    The lock belongs to the process and not to the open file, so that loader processes, which live on for seconds when
    this one is killed, do not hold it.

    Args:
        folder: the folder; its lock is the file LOCK_FILE.
        mend: what else the user can do, for the message.

    Returns:
        The lock; it is given back when the file is closed or the process ends, however it ends.

    Raises:
        InputError: another process holds the folder.
    """
    lock = (folder / LOCK_FILE).open("ab")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # what the system says of a lock that is held
        lock.close()
        raise InputError(f"{folder}: another process works in this folder. Wait for it, or {mend}.") from error
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return lock
