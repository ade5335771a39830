"""Files on disk: atomic writing, hashes, tables, and locked folders."""

from __future__ import annotations

import contextlib
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
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

from common.errors import InputError, list_some
from common.plain import read_json

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"
SETTINGS = "settings.json"  # file in a folder: the settings that made its files
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a file system without locks
# What systems leave in folders and at the top of disks.
LITTER = {
    "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "lost+found", "$recycle.bin",
    "system volume information",
}  # fmt: skip
# Names of unfinished files. The second form comes from earlier versions.
TEMPORARY_NAME = re.compile(r"\.sit-[0-9a-f]{8}\.tmp|\.[0-9a-f]{16}\.tmp")
# A spreadsheet runs a cell that begins with one of these as a formula. Apostrophes may come first: see write_csv.
FORMULA = re.compile(r"'*[=+\-@\t\r].", re.DOTALL)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it.

    If the process dies meanwhile, the old file stays.

    Raises:
        OSError: the disk is full, or permission is missing. The error names the file; the temporary file is removed.
    """
    # The temporary name is short, because the name of the file may already have the maximum length.
    temporary = path.with_name(f".sit-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides a failed write
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; see :func:`write_atomically`."""
    write_atomically(path, lambda file: file.write(content))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a new or empty folder, whole or not at all, so that the same command can run again after a full disk.

    The files are written into a folder within it, and moved up at the end. So the folder may be a volume of a
    container. It is locked meanwhile. What a killed process left is removed.

    Yields:
        The folder to fill.

    Raises:
        InputError: the folder is a file or holds something, or another process works in it.
    """
    check_folder(folder)
    existed = folder.is_dir()
    temporary = folder / f".sit-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock_until_filled(folder):
            check_folder(folder)  # again: another process may have been first
            temporary.mkdir()
            with _moved_up(temporary):
                yield temporary
    except BaseException as error:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, InputError):  # the user knows nothing of the folder within
            error.args = (error.marked.replace(f"/{temporary.name}", ""),)
        if isinstance(error, OSError) and error.errno:
            of_copy = error.filename2 or error.filename  # of a copy, the second is the new file
            name = str(of_copy or folder).replace(f"/{temporary.name}", "").removesuffix(f"/{LOCK_FILE}")
            raise OSError(error.errno, error.strerror, name) from error
        raise


@contextlib.contextmanager
def _lock_until_filled(folder: Path) -> Iterator[None]:
    """Lock a folder, and remove the lock file at the end."""
    lock = lock_folder(folder, "name another folder")
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)  # while it is locked: see lock_folder
        lock.close()


@contextlib.contextmanager
def _moved_up(temporary: Path) -> Iterator[None]:
    """Move what the block puts into a folder to its parent, all or nothing, and remove the folder."""
    paths: list[Path] = []
    try:
        yield
        paths = sorted(temporary.iterdir())
        for path in paths:
            path.replace(temporary.parent / path.name)
        temporary.rmdir()
    except BaseException:
        for path in paths:
            if not os.path.lexists(path):  # it was moved
                with contextlib.suppress(OSError):
                    _remove(temporary.parent / path.name)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def real_path(path: str | Path) -> Path:
    """The absolute path, with links followed. A loop of links keeps its name, where ``Path.resolve`` may fail."""
    return Path(os.path.realpath(path))


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy if the disk has no links. An existing file stays.

    Of a folder, link all its files. Of a symbolic link, link the file that it leads to: a second name of the link
    itself would lead elsewhere if the link is relative.

    Raises:
        FileExistsError: the source is a folder, and the target exists.
    """
    if source.is_dir():
        target.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            link_or_copy(path, target / path.name)
    elif not target.exists():
        try:
            os.link(real_path(source), target)
        except OSError:
            write_bytes(target, source.read_bytes())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically. `read_csv` returns the same texts.

    File names come from users and from downloaded data. A spreadsheet runs a cell that begins with = + - or @ as a
    formula, even in quotes. An apostrophe in front prevents this. So such texts get an apostrophe, and `read_csv`
    removes it. Refusing such names would exclude files such as ``-3.png``. Numbers stay unchanged, also as text.

    Raises:
        InputError: see :func:`table_bytes`.
    """
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)  # `plain` would not quote a single \r
    plain.writerow(columns)
    for row in rows:
        cells = [_guarded(cell) for cell in row]
        writer = quoted if any("\r" in str(cell) for cell in cells) else plain
        writer.writerow(cells)
    write_bytes(path, table_bytes(text.getvalue(), path))


def table_bytes(text: str, path: Path) -> bytes:
    """Text of the table ``path`` as UTF-8.

    Raises:
        InputError: the text holds the name of a file or folder that is not UTF-8.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        cell = re.split('[,"\n]', text[: error.start])[-1] + re.split('[,"\n]', text[error.start :])[0]
        raise InputError(
            f"{path} cannot name {ascii(cell)}, which has bytes that are not UTF-8, so rename the file or folder"
        ) from None


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a table written by `write_csv`, or by a spreadsheet as UTF-8.

    Raises:
        InputError: the file is not valid CSV, or a row has another number of columns than the header.
    """
    columns, rows = read_csv_lines(path)
    return columns, [row for _, row in rows]


def read_csv_lines(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """:func:`read_csv`, with the number of each row's last line: blank lines are no rows, a cell may have several."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = list(reader.fieldnames or [])  # reads the first line, if there is one
            rows = [  # DictReader has a line_num, too, but counts no blank lines
                (reader.reader.line_num, {name: _unguarded(cell) for name, cell in row.items()}) for row in reader
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable CSV file ({error}); make it again, or restore it") from error
    odd = [str(number) for number, row in rows if None in row or None in row.values()]
    if odd:
        raise InputError(f"{path}: line {list_some(odd)} has another number of columns than the header")
    return columns, rows


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
    """Write indented JSON atomically."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def file_sha256(path: str | Path, known: dict[tuple[int, ...], str] | None = None) -> str:
    """Hexadecimal SHA-256 of a file, or of a folder's files in the order of their names (one mask per nucleus).

    Args:
        known: hashes of files that were read already, to be extended. Hard links to one file are then read once. It is
            for a single check of many files, not for files that change meanwhile.

    Raises:
        InputError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        parts = [file_sha256(file, known) for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise InputError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            if known is None:
                return hashlib.file_digest(file, "sha256").hexdigest()
            status = os.fstat(file.fileno())
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if key not in known:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            return known[key]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def is_litter(name: str) -> bool:
    """Whether a name counts for nothing in a folder: a hidden one, as our locks and temporary files, or of LITTER."""
    return name.startswith(".") or name.lower() in LITTER


def names_in(folder: Path) -> list[str]:
    """Sorted names in a folder that count, see :func:`is_litter`. Empty if the folder does not exist."""
    return sorted(entry.name for entry in folder.iterdir() if not is_litter(entry.name)) if folder.is_dir() else []


def check_folder(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> bool:
    """Refuse a folder that holds other work. Changes nothing in it. The folder need not exist.

    Args:
        folder: folder that a command is about to write to.
        settings: settings of the work, as stored in SETTINGS. None: the folder must be new or empty.
        free: names of settings that may differ.
        upgrade: converts the settings of an earlier version.

    Returns:
        Whether the folder holds work with the same settings, which can be continued.

    Raises:
        InputError: the folder is a file, holds other files, or holds work with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    path = folder / SETTINGS
    # Looked at first: a process that fills the folder at this moment writes its settings before anything else.
    others = names_in(folder)
    if settings is None or not path.is_file():
        if others:
            why = "" if settings is None else f" and has no {SETTINGS}, so this command did not make it"
            held = list_some(others, 1)
            raise InputError(f"{folder} is not empty (it holds {held}){why}; name a new or an empty folder")
        return False
    old = upgrade(read_json(path, "the work cannot be continued, so name another folder"))
    new = json.loads(json.dumps(settings))
    changed = [name for name in new if name not in free and old.get(name) != new[name]]
    if changed:
        changes = list_some([text for name in changed for text in _changes(name, old.get(name), new[name])])
        raise InputError(
            f"{folder} holds a set made with other settings ({changes}); name another folder, or give the "
            "same settings to continue"
        )
    return True


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """What differs between two values of a setting. Of two mappings, only the keys that differ are named."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        return [text for key in keys for text in _changes(f"{name} {key}", old.get(key), new.get(key))]
    return [f"{name} {old} -> {new}"[:100]]


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def lock_folder(
    folder: Path, mend: str, parts: Sequence[str] = (), shared: bool = False, wait_seconds: float = 0.0
) -> IO[bytes]:
    """Lock a folder for this process, and remove temporary files and folders that killed processes left in it.

    With ``shared``, other processes can share the lock. Temporary files then stay, because they may belong to another
    process.

    The lock belongs to the process, not to the open file. If this process is killed, its loader processes live on for
    seconds, and they must not keep the lock.

    Some network file systems have no locks. Then a warning is logged and the work continues. Temporary files stay,
    because another process may be writing them.

    Args:
        mend: what else the user can do, for the message.
        parts: subfolders that belong to the same work. Temporary files are only removed from the folder and from these,
            because another process may work in other subfolders.
        shared: let other processes share the folder. Then none can lock it alone.
        wait_seconds: how long to wait for a lock that another process holds.

    Returns:
        The lock. It ends when the file is closed or when the process ends.

    Raises:
        InputError: another process holds the lock.
    """
    lock = (folder / LOCK_FILE).open("a+b")  # a shared lock needs a file that can be read
    try:
        _wait_for_lock(lock, folder, shared, wait_seconds)
        if not os.fstat(lock.fileno()).st_nlink:  # new_folder removed the file before it ended
            lock.close()
            return lock_folder(folder, mend, parts, shared, wait_seconds)
    except (BlockingIOError, PermissionError) as error:  # another process has the lock
        lock.close()
        holder, advice = _holder(folder)
        raise InputError(
            f"{folder}: another process works in this folder{holder}. Wait for it, or {mend}.{advice}"
        ) from error
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
                    _remove(file)
    return lock


def open_work(
    folder: Path, settings: Mapping[str, Any], parts: Sequence[str] = (),
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> IO[bytes]:  # fmt: skip
    """Make a folder for work, or open the same work to continue it. Lock the folder.

    Its settings are written before anything else: a folder without them is taken for other work.

    Args:
        settings: of the work, as :func:`check_folder` compares them.
        parts: subfolders that belong to the work, as of :func:`lock_folder`.
        upgrade: converts the settings of an earlier version.

    Returns:
        The lock. It ends when it is closed or when the process ends.

    Raises:
        InputError: the folder holds something else, or another process works in it.
    """
    check_folder(folder, settings, upgrade=upgrade)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder, "name another `output`", parts)
    if not check_folder(folder, settings, upgrade=upgrade):  # again: another process may have been first
        write_json(folder / SETTINGS, settings)
    return lock


def _remove(path: Path) -> None:
    """Remove a file, or a folder that ``new_folder`` could not finish."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _wait_for_lock(lock: IO[bytes], folder: Path, shared: bool, seconds: float) -> None:
    """Take the lock. Raises OSError if another process still holds it after this time."""
    deadline, said = time.monotonic() + seconds, False
    while True:
        try:
            fcntl.lockf(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                raise
        if not said:
            logger.warning("%s: waiting up to %.0f s for another process%s", folder, seconds, _holder(folder)[0])
            said = True
        time.sleep(min(1.0, seconds / 10))


def sign_lock(lock: IO[bytes]) -> None:
    """Write machine and process into a lock file, for the message of a process that finds the folder locked.

    Raises:
        OSError: the disk is full. The error names the file.
    """
    try:
        lock.truncate(0)
        os.write(lock.fileno(), f"{socket.gethostname()} {os.getpid()}".encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(lock.name)) from error


def _holder(folder: Path) -> tuple[str, str]:
    """Who signed the lock of a folder, and what to do if that machine is dead. Empty texts if nobody signed."""
    try:
        host, pid = (folder / LOCK_FILE).read_text(errors="replace")[:300].split()
    except (OSError, ValueError):
        return "", ""
    if host == socket.gethostname():
        return f" ({pid})", ""
    advice = (
        f" If {host} is dead, its lock on a network disk can outlive it for minutes: try again later, or remove "
        f"{folder / LOCK_FILE} if no process of {host} writes here."
    )
    return f" ({pid} on {host})", advice


@cache
def _warn_of_no_locks(folder: Path) -> None:
    """Warn once per folder."""
    logger.warning(
        "%s: this file system has no locks, so a second process in this folder is not noticed. "
        "Start only one process at a time for this folder.",
        folder,
    )
