"""Files on disk: written whole or not at all, hashed, and folders held by one process."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from common.errors import InputError, list_some

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"
SETTINGS = "settings.json"  # of a folder: what its files were made with
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without a lock service answers
# Names of half-written files. The second form is that of earlier versions.
TEMPORARY_NAME = re.compile(r"\.sit-[0-9a-f]{8}\.tmp|\.[0-9a-f]{16}\.tmp")
# A spreadsheet runs a cell that begins with one of these. Apostrophes may stand before it: see write_csv.
FORMULA = re.compile(r"'*[=+\-@\t\r].", re.DOTALL)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk, and only then give it its name.

    A process that dies in between leaves what was there before.

    Raises:
        OSError: disk full, no permission; it names the file, and the temporary one is removed.
    """
    # short and without path's own name, which may be as long as names go
    temporary = path.with_name(f".sit-{secrets.token_hex(4)}.tmp")
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
    """Write a table, whole or not at all. `read_csv` gives the same texts back.

    File names come from users and from downloaded data, and a spreadsheet runs a cell that begins with = + - or @ as a
    formula. Quotes do not stop it. An apostrophe in front does, so such a text gets one, and `read_csv` removes it.
    Refusing the names would shut out files such as ``-3.png``. Numbers stay as they are, written as text or not.
    """
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)  # the plain one leaves a lone \r unquoted
    plain.writerow(columns)
    for row in rows:
        cells = [_guarded(cell) for cell in row]
        writer = quoted if any("\r" in str(cell) for cell in cells) else plain
        writer.writerow(cells)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a table that `write_csv` wrote.

    A row with too few cells has None for the others; one with too many has the rest under the key None.

    Raises:
        InputError: it is no CSV.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            rows = [{name: _unguarded(cell) for name, cell in row.items()} for row in reader]
            return list(reader.fieldnames or []), rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no readable CSV file ({error}); make it again, or restore it") from error


def _guarded(cell: object) -> object:
    if not isinstance(cell, str) or not FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _unguarded(cell: Any) -> Any:
    guarded = isinstance(cell, str) and cell.startswith("'") and FORMULA.match(cell)
    return cell[1:] if guarded else cell


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
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{path} is no regular file")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def _is_passing(name: str) -> bool:
    """Whether a file is a lock or a temporary file of ours, such as another process writes at this moment."""
    return name == LOCK_FILE or TEMPORARY_NAME.fullmatch(name) is not None


def check_folder(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> bool:
    """Refuse a folder that holds other work. Nothing in it is touched, and it need not exist.

    Args:
        folder: where a command is about to write.
        settings: what the work is made with, as SETTINGS holds it. None: the folder must be new or empty.
        free: names of settings that may differ.
        upgrade: turns the settings of an earlier version into those of this one.

    Returns:
        Whether the folder holds work of the same settings, which can be continued.

    Raises:
        InputError: the folder is a file, holds other files, or holds work made with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    path = folder / SETTINGS
    # Looked at first: a process that fills the folder at this moment writes its settings before anything else.
    is_used = folder.is_dir() and any(not _is_passing(entry.name) for entry in folder.iterdir())
    if settings is None or not path.is_file():
        if is_used:
            what = (
                "is not empty"
                if settings is None
                else f"is not empty and has no {SETTINGS}: it is no set of this command"
            )
            raise InputError(f"{folder} {what}; name a new or an empty folder")
        return False
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read, so the work cannot be continued; name another folder") from error
    if not isinstance(old, dict):
        raise InputError(f"{path} was not written by this command; name another folder")
    old, new = upgrade(old), json.loads(json.dumps(settings))
    changed = [name for name in new if name not in free and old.get(name) != new[name]]
    if changed:
        changes = list_some([f"{name} {old.get(name)} -> {new[name]}"[:100] for name in changed])
        raise InputError(
            f"{folder} holds a set made with other settings ({changes}); name another folder, or give the "
            "same settings to continue"
        )
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files' contents are."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock_folder(folder: Path, mend: str, parts: Sequence[str] = (), shared: bool = False) -> IO[bytes]:
    """Hold a folder for this process alone, and remove the temporary files that killed processes left in it.

    With ``shared``, hold it together with other processes that share it. Temporary files stay: they may be theirs.

    The lock belongs to the process, not to the open file. Loader processes live on for seconds after this one is
    killed, and they must not hold it.

    Some network file systems have no locks. There, a warning says so and the work goes on. Temporary files stay,
    because another process may be writing them.

    Args:
        folder: the folder; its lock is the file LOCK_FILE.
        mend: what else the user can do, for the message.
        parts: sub-folders that belong to the folder's owner. Temporary files are removed from the folder and from
            these only: in any other sub-folder another process may be at work.
        shared: let other processes share the folder. None can then hold it alone.

    Returns:
        The lock. It ends when the file is closed or when the process ends, however it ends.

    Raises:
        InputError: another process holds the folder.
    """
    lock = (folder / LOCK_FILE).open("a+b")  # a shared lock needs a file that can be read
    try:
        fcntl.lockf(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # what the system says if another process has the lock
        lock.close()
        raise InputError(f"{folder}: another process works in this folder. Wait for it, or {mend}.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            lock.close()
            raise OSError(error.errno, error.strerror, str(folder / LOCK_FILE)) from error
        _warn_of_no_locks(folder)
        return lock
    if shared:
        return lock
    for place in (folder, *(folder / part for part in parts)):
        if place.is_dir() and not place.is_symlink():
            for file in place.iterdir():
                if TEMPORARY_NAME.fullmatch(file.name):
                    file.unlink(missing_ok=True)
    return lock


@cache
def _warn_of_no_locks(folder: Path) -> None:
    """Say it once for each folder."""
    logger.warning(
        "%s: this file system has no locks, so a second process in this folder is not noticed. "
        "Start only one process at a time for this folder.",
        folder,
    )
