"""Logging to stderr and to a file in the run folder."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from common.errors import forget_stdout, printable, settings_as_flags

logger = logging.getLogger(__name__)
LINE_SECONDS = 10.0  # between two lines about the progress of work
Item = TypeVar("Item")


class LogFile(logging.FileHandler):
    """Log file that raises an error if the disk is full, instead of printing a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            if self.stream is not None:
                with contextlib.suppress(OSError):
                    self.stream.close()  # closing tries to write once more
            self.stream = None
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        super().handleError(record)


class PlainFormatter(logging.Formatter):
    """Escapes control characters, which names of files may hold. Line ends stay. Warnings name flags, not settings."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable(settings_as_flags(text) if record.levelno == logging.WARNING else text, keep="\n\t")


def say(text: str) -> None:
    """Print a result of a command on stdout, without control characters. Nobody need read it: ``| head`` is fine."""
    try:
        print(printable(text, keep="\n\t"), flush=True)
    except BrokenPipeError:
        forget_stdout()


def duration(seconds: float) -> str:
    """Time as text, such as ``03:04:05`` or ``2 days 03:04:05``."""
    if not math.isfinite(seconds):
        return "unknown time"
    days, rest = divmod(int(seconds), 24 * 3600)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days:,} day{'s' if days > 1 else ''} {clock}" if days else clock


class Pace:
    """Rate and time left of long work, for its lines in the log. The clock starts with the object.

    Args:
        total: how much there is to do.
        unit: what is counted, such as ``steps``.
    """

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self._started = total, unit, time.perf_counter()

    def __call__(self, done: int) -> str:
        """Such as ``2.50 steps/s, 00:01:40 left``, if ``done`` of the work is done."""
        rate = done / max(time.perf_counter() - self._started, 1e-9)
        return f"{rate:.3g} {self.unit}/s, {duration((self.total - done) / rate if rate else math.inf)} left"


def with_progress(items: Collection[Item], title: str, unit: str) -> Iterator[Item]:
    """The items one by one. A terminal shows a progress bar; else, the log gets a line every :data:`LINE_SECONDS`.

    Args:
        title: of the work, such as ``converting``.
        unit: what an item is, such as ``image``.
    """
    bar = tqdm(items, desc=title, unit=unit, disable=None)
    pace, last = Pace(len(items), f"{unit}s"), time.perf_counter()
    for done, item in enumerate(bar, start=1):
        yield item
        if bar.disable and time.perf_counter() - last >= LINE_SECONDS:
            last = time.perf_counter()
            logger.info("%s: %d of %d %ss, %s", title, done, len(items), unit, pace(done))


def start_logging(is_main: bool, log_file: Path | None = None) -> None:
    """Set up logging. The main process logs to stderr and, if given, to a file. Others only log warnings."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if is_main and log_file is not None:
        handlers.append(LogFile(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(PlainFormatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        handlers=handlers,
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
