"""Several processes need one file: the first makes it, and the others wait."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import filelock

from common.disk import NO_LOCKS
from common.errors import InputError

logger = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 3600.0


@contextlib.contextmanager
def one_maker(path: Path, makes: str) -> Iterator[None]:
    """Hold a lock beside ``path``. The system releases it if the process dies, so no stale lock can block others.

    Look again for the file once the lock is held: another process may have made it.

    Args:
        makes: what the process does to make the file, as in "another process that downloads it".

    Raises:
        InputError: another process held the lock for too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("waiting for another process that %s %s (it holds %s)", makes, path.name, lock.lock_file)
            lock.acquire(timeout=LONGEST_WAIT_SECONDS)
    except filelock.Timeout as error:
        raise InputError(
            f"waited {LONGEST_WAIT_SECONDS / 60:.0f} minutes for another process that {makes} {path.name}: end that "
            f"process (it holds {lock.lock_file}), and start again"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: no file locks here, so another process may make %s, too", path.parent, path.name)
    try:
        yield
    finally:
        lock.release()
