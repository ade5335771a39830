"""Cache of facts about files that were checked, so that the next start need not decode them again.

The facts about a file are kept with its size and time of change. Files that were changed, added or renamed are decoded
again. The cache lies in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``), because folders of data may
be read-only. All commands share it. If it is lost, all files are decoded once more. Files of it that nobody has used
for ``DAYS_KEPT`` are removed: another version of the code, or other settings, has files of its own.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.disk import write_atomically
from common.plain import parse_json

logger = logging.getLogger(__name__)
# The facts depend on the code that reads files and finds cells, and on the packages that it uses. If any of them
# changes, all files are decoded again.
_ROOT = Path(__file__).parents[1]
CODE = sorted(path for name in ("dataset", "common") for path in (_ROOT / name).rglob("*.py"))
PACKAGES = {  # name of the module: name of the package
    "numpy": "numpy", "PIL": "pillow", "scipy": "scipy", "skimage": "scikit-image", "tifffile": "tifffile",
    "imagecodecs": "imagecodecs", "liffile": "liffile", "nd2": "nd2", "pylibCZIrw": "pylibCZIrw",
    "pycocotools": "pycocotools", "roifile": "roifile",
}  # fmt: skip
DAYS_KEPT = 90


def cache_folder() -> Path | None:
    """Folder of the user's caches. None for a user without a home folder, as in some containers."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sit-masks" / "checked"
    except RuntimeError:
        return None


class CheckedFiles:
    """Facts about the files of one check.

    Args:
        key: all that the facts depend on beside the files, such as folders, sizes and windows. Types of JSON.
    """

    def __init__(self, key: object) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode())
        for path in CODE:
            digest.update(path.read_bytes())
        digest.update(json.dumps([_version(package) for package in PACKAGES.values()]).encode())
        folder = cache_folder()
        self.path = None if folder is None else folder / f"{digest.hexdigest()[:24]}.jsonl.gz"
        self._lines = self._read()  # name -> line; a line is parsed when it is needed, and takes less memory
        self._stamps: dict[str, list[int]] = {}
        self._changed = False

    def _read(self) -> dict[str, str]:
        if self.path is None:
            return {}
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as file:
                lines = dict(line.rstrip("\n").split("\t", 1) for line in file)
        except (OSError, EOFError, ValueError, zlib.error):  # none yet, or damaged
            return {}
        with contextlib.suppress(OSError):
            os.utime(self.path)  # it is used
        return lines

    def recall(self, files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
        """Facts by name. Leaves out names whose files have changed since."""
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
        """Keep facts about the files of a name. Call :meth:`recall` first; it reads sizes and times."""
        self._lines[_key(name)] = json.dumps([self._stamps[name], facts], separators=(",", ":"))
        self._changed = True

    def save(self) -> None:
        """Write the cache if there are new facts. If the folder is not writable, log it and continue."""
        if self.path is None or not self._changed:
            return
        text = "".join(f"{key}\t{line}\n" for key, line in self._lines.items())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(gzip.compress(text.encode(), compresslevel=1)))
        except OSError as error:
            logger.info("the check of the files cannot be remembered in %s (%s)", self.path.parent, error.strerror)
        with contextlib.suppress(OSError):  # another process may remove the same files
            for path in self.path.parent.iterdir():
                if time.time() - path.stat().st_mtime > DAYS_KEPT * 24 * 3600:
                    path.unlink()


def _version(package: str) -> str:
    """The version of a package; empty if it is not installed, or by other means than a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _key(name: str) -> str:
    """The name as JSON, which has no line ends and no tabs."""
    return json.dumps(name)


def _stamp(path: Path) -> list[int]:
    """Size and time of change in nanoseconds. For a folder, its number of files and a hash of their sizes and times."""
    try:
        if not path.is_dir():
            status = path.stat()
            return [status.st_size, status.st_mtime_ns]
        with os.scandir(path) as entries:
            parts = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
        return [len(parts), int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)]
    except OSError:
        return [-1, -1]
