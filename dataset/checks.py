"""Check many files at once: a few threads, a progress bar, and every bad file named in one message."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import InputError, list_some
from dataset.config import DataConfig
from dataset.decode import LAST_AXIS
from dataset.files import FileError, Pair, read_image_and_kind, read_mask_and_table, read_size
from dataset.gray import fit_channels
from dataset.names import short_names
from dataset.views import view_of_file

PAIRS_WORTH_A_LOOK = 2000  # with so many, headers are read first
SECONDS_BETWEEN_LINES = 20  # of the log, if no progress bar can be shown
logger = logging.getLogger(__name__)


def for_all(function: Callable[[Any], Any], items: Sequence[Any], title: str, progress: bool) -> Iterable[Any]:
    """Yield ``function`` of every item in order. A few threads work: decoders release the interpreter lock.

    The threads see the context of the caller, such as the bound of ``decoding_at_most``.
    """
    block = 256  # bounds what waits in memory
    context = copy_context()

    def in_context(item: Any) -> Any:
        return context.copy().run(function, item)  # a context serves one thread at a time

    last_line = time.monotonic()
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(items), desc=title, unit="file", disable=None if progress else True) as bar,
    ):
        for start in range(0, len(items), block):
            if progress and bar.disable and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                logger.info("%s: %d of %d", title, start, len(items))
            for result in pool.map(in_context, items[start : start + block]):
                bar.update()
                yield result


def or_error(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a FileError instead of raising it, so that all bad files can be named at once."""

    def wrapped(item: Any) -> Any:
        try:
            return function(item)
        except FileError as error:
            return error

    return wrapped


def refuse_bad(errors: Sequence[FileError], total: int, what: str) -> None:
    """Raise one message for all bad files: files with the same fault together, three names of each."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        names_by_reason: dict[str, list[str]] = {}
        for error, name in zip(errors, short_names([error.path for error in errors]), strict=True):
            names_by_reason.setdefault(error.reason, []).append(name)
        faults = [f"{list_some(names)}: {reason}" for reason, names in names_by_reason.items()]
        more = f"; and {len(faults) - 3} more faults" if len(faults) > 3 else ""
        raise InputError(f"{len(errors)} of {total} {what} cannot be used. {'; '.join(faults[:3])}{more}")


def refuse_bad_sizes(pairs: Sequence[Pair], config: DataConfig, what: str) -> None:
    """Refuse wrong sizes by the headers of many files, within seconds: decoding them may take long."""
    if len(pairs) < PAIRS_WORTH_A_LOOK:
        return

    def check(pair: Pair) -> None:
        image, mask = read_size(pair.image_path), read_size(pair.mask_path)
        if image is not None:
            view_of_file(pair.image_path, image, config)
        if image is not None and mask is not None:
            check_same_size(image, mask, pair.mask_path)

    errors = [error for error in for_all(or_error(check), pairs, "reading headers", False) if error is not None]
    refuse_bad(errors, len(pairs), what)


def check_same_size(image: Sequence[int], mask: Sequence[int], mask_path: Path) -> None:
    """Refuse a mask of another size than its image.

    Args:
        image: height and width of the image.
        mask: shape of the mask, (H, W) or (K, H, W).
        mask_path: for the message.

    Raises:
        FileError: the sizes differ.
    """
    (height, width), size = image, tuple(mask[-2:])
    if tuple(image) == size:
        return
    if tuple(mask[:2]) == tuple(image):
        raise FileError(mask_path, LAST_AXIS)
    hint = "they must agree; was one of them cropped or padded?"
    if size == (width, height):
        hint = "are its rows and columns swapped?"
    elif height * size[1] == width * size[0] and not 0.8 < height / size[0] < 1.25:
        hint = "if the mask was made at another scale, resize it by nearest neighbour"
    raise FileError(mask_path, f"has {size[1]} x {size[0]} pixels, but its image {width} x {height}: {hint}")


class ReadPair(NamedTuple):
    """One pair as stored."""

    image: np.ndarray  # (H, W, C)
    mask: np.ndarray  # (H, W) or (K, H, W)
    table: str  # kind of the mask's colour table, see read_mask_and_table
    has_channels: bool  # the image's file says that its planes are no colours


def read_pair(image_path: Path, mask_path: Path, channels: int) -> ReadPair:
    """An image and its mask; their sizes agree."""
    image, has_channels = read_image_and_kind(image_path)
    image = fit_channels(image, channels, image_path)
    mask, table = read_mask_and_table(mask_path)
    check_same_size(image.shape[:2], mask.shape, mask_path)
    return ReadPair(image, mask, table, has_channels)
