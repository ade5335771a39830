"""Files that were decoded whole once are remembered, so that the next start need not decode them again.

What was found out about each file is kept with its size and time of change: a file that was changed, added or renamed
is decoded again, the others are not. It lies in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``), so
that folders of data may be read-only and all commands and runs share it. Losing it costs one more decode.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.disk import write_atomically
from common.plain import parse_json

logger = logging.getLogger(__name__)
# What a check finds depends on the code of this package: if any of it changes, all files are decoded again.
CODE = sorted(Path(__file__).parent.glob("*.py"))


def cache_folder() -> Path | None:
    """Where the user's caches lie; None for a user without a home, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sit-masks" / "checked"
    except RuntimeError:
        return None


class CheckedFiles:
    """Facts about the files of one check.

    Args:
        key: all that the facts depend on beside the files themselves (folders, sizes, windows), as JSON can hold it.
    """

    def __init__(self, key: object) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode())
        for path in CODE:
            digest.update(path.read_bytes())
        folder = cache_folder()
        self.path = None if folder is None else folder / f"{digest.hexdigest()[:24]}.jsonl.gz"
        self._lines = self._read()  # name -> line, parsed when it is asked for: a line takes less memory
        self._stamps: dict[str, list[int]] = {}
        self._changed = False

    def _read(self) -> dict[str, str]:
        if self.path is None:
            return {}
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as file:
                return dict(line.rstrip("\n").split("\t", 1) for line in file)
        except (OSError, EOFError, ValueError):  # none yet, or damaged
            return {}

    def recall(self, files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
        """Facts by name, of those names whose files are as they were when the facts were found out."""
        self._stamps = {name: [number for path in paths for number in _stamp(path)] for name, paths in files.items()}
        known = {}
        for name in files:
            try:
                stamp, facts = parse_json(self._lines.get(_key(name), "[null, null]"))
            except (ValueError, TypeError):  # a damaged line
                continue
            if stamp == self._stamps[name]:
                known[name] = facts
        return known

    def remember(self, name: str, facts: Any) -> None:
        """Keep what was found out about the files of a name, as they were at :meth:`recall`."""
        self._lines[_key(name)] = json.dumps([self._stamps[name], facts], separators=(",", ":"))
        self._changed = True

    def save(self) -> None:
        """Write what is new; a cache folder that cannot be written is no reason to stop."""
        if self.path is None or not self._changed:
            return
        text = "".join(f"{key}\t{line}\n" for key, line in self._lines.items())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(gzip.compress(text.encode(), compresslevel=1)))
        except OSError as error:
            logger.info("the check of the files cannot be remembered in %s (%s)", self.path.parent, error.strerror)


def _key(name: str) -> str:
    """The name in one line without a tab."""
    return json.dumps(name)


def _stamp(path: Path) -> list[int]:
    """Size and time of change in nanoseconds; of a folder those of its files together."""
    try:
        if not path.is_dir():
            status = path.stat()
            return [status.st_size, status.st_mtime_ns]
        with os.scandir(path) as entries:
            parts = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
        return [len(parts), int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)]
    except OSError:
        return [-1, -1]
