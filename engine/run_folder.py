"""The folder of one training run: its name, its lock and its files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.disk import lock_folder, names_in, sign_lock, sync_folder, write_bytes
from common.errors import InputError
from common.plain import read_json
from engine.checkpoint import read_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)
PREVIEW_GRID = "preview/grid"  # metric of a preview: how far the patches show in it
CONFIG, LOG = "config.json", "log.txt"
REQUEUE_SECONDS = 120.0  # a restarted run waits this long for the lock of its earlier process on a network disk
RESTARTED = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # variables that count the restarts of a run
LAST_NUMBER = ".last_run"  # file in the results folder that holds the highest number of a run


class RunFolder:
    """One training run on disk: config.json, log.txt, metrics.jsonl, checkpoints/ and previews/.

    Args:
        path: the folder. ``create`` makes it.
        keep: number of newest checkpoints to keep.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        self.checkpoints = path / "checkpoints"
        self.previews = path / "previews"
        self.metrics = path / "metrics.jsonl"
        self._lock: IO[bytes] | None = None
        self._is_new = False
        self._whole: set[Path] = set()  # checkpoints that were written or read by this process

    def create(self, must_be_new: bool = False) -> bool:
        """Make the folder, or use an existing one that holds a run.

        Args:
            must_be_new: use no existing folder.

        Returns:
            False if the folder exists but must be new.

        Raises:
            InputError: the folder holds other files.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.mkdir()  # one of two processes succeeds
            self._is_new = True
        except FileExistsError:
            if must_be_new:
                return False
            self._check_is_a_run()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.previews.mkdir(exist_ok=True)
        note_number(self.path)
        return True

    def _check_is_a_run(self) -> None:
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file. Choose another `run_name` for this run.")
        barely_begun = set(names_in(self.path)) <= self._first_names()
        if not (self.steps() or barely_begun or self._has_config()):
            raise InputError(
                f"{self.path} holds other files and is no run of train.py. Choose another `run_name` for this run."
            )

    def _has_config(self) -> bool:
        try:
            config = read_json(self.path / CONFIG, "start a new run")
        except (OSError, ValueError):
            return False
        return {"model", "transport"} <= set(config)

    def _first_names(self) -> set[str]:
        """Names that a run may leave if it was stopped at its start, besides passing ones."""
        return {self.checkpoints.name, self.previews.name, LOG}

    @contextlib.contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """Remove a new run folder if the block refuses the user's input."""
        try:
            yield
        except InputError:
            if self._is_new and not self.steps() and not self.metrics.exists():
                shutil.rmtree(self.path, ignore_errors=True)  # all in it was written by this process
            raise

    def lock(self) -> None:
        """Lock the folder for the life of this process, and remove incomplete files of a killed process.

        Raises:
            InputError: another process trains in this folder.
        """
        patience = REQUEUE_SECONDS if any(os.environ.get(name, "0") != "0" for name in RESTARTED) else 0.0
        self._lock = lock_folder(
            self.path,
            "choose another name for this run",
            (self.checkpoints.name, self.previews.name),
            wait_seconds=patience,
        )
        sign_lock(self._lock)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending. Copies that the user made under other names do not count."""
        paths = [path for path in self.checkpoints.glob("*.pt") if path.stem.isdecimal()]
        return sorted(step for path in paths if path == self.checkpoint_path(step := int(path.stem)))

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"{step:07d}.pt"

    def preview_path(self, step: int) -> Path:
        return self.previews / f"{step:07d}.png"

    def save(self, state: dict[str, Any]) -> Path:
        """Write the checkpoint of ``state["step"]``, then remove the oldest ones beyond ``keep``.

        Counts only whole checkpoints up to this step, so the new one always stays.
        """
        path = self.checkpoint_path(state["step"])
        save_checkpoint(path, state)
        sync_folder(self.checkpoints)  # before an older one is removed
        self._whole.add(path)
        whole = [step for step in self.steps() if step <= state["step"] and self._is_whole(step)]
        for step in whole[: -self.keep]:
            self.checkpoint_path(step).unlink(missing_ok=True)
        return path

    def _is_whole(self, step: int) -> bool:
        """Whether a checkpoint can be read. Tries each file once, and sets damaged ones aside."""
        path = self.checkpoint_path(step)
        if path not in self._whole:
            try:
                read_checkpoint(path)
            except InputError as error:
                self._set_aside(path, error)
                return False
            self._whole.add(path)
        return True

    def _set_aside(self, path: Path, error: InputError) -> None:
        """Rename a damaged checkpoint, so that nothing reads it again."""
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        logger.warning("%s It is kept as %s.", error, aside.name)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its path. None in a new run. Newer damaged ones are set aside.

        Raises:
            InputError: all checkpoints are damaged. They keep their names.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self.checkpoint_path(step)
            try:
                state = read_checkpoint(path)
            except InputError as error:
                logger.warning("%s Falling back to the one before.", error)
                damaged.append((path, error))
                continue
            for other, fault in damaged:
                self._set_aside(other, fault)
            self._whole.add(path)
            return path, state
        if damaged:
            raise InputError(
                f"{self.checkpoints}: all {len(damaged)} checkpoints are damaged. Remove them to start anew."
            )
        return None

    def cut_metrics(self, step: int) -> None:
        """Remove lines that a continued run writes again.

        These are the lines after ``step``, an incomplete last line, and the preview at ``step`` without its picture.
        """
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(errors="replace").splitlines():
            try:
                content = json.loads(line)
                again = PREVIEW_GRID in content and content["step"] == step and not self.preview_path(step).exists()
                if content["step"] <= step and not again:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_bytes(self.metrics, "".join(kept).encode())

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Append a line, and wait until it is on the disk. The checkpoint comes later, so a power cut leaves no gap."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics)) from error


def choose_run_folder(results_dir: Path, run_name: str | None, title: str) -> Path:
    """Folder of a run: ``RESULTS_DIR/RUN_NAME``, or the next free ``RESULTS_DIR/NNN-title`` without a name.

    A number is never used twice, even if its folder was deleted: a file beside the folders holds the last number.

    Raises:
        InputError: torchrun may restart the run, but it has no name. Each restart would begin a new run.
    """
    if run_name:
        return results_dir / run_name
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0":
        raise InputError(
            f"torchrun may restart this run up to {restarts} times, and only a run with a name continues: give "
            "`run_name` NAME."
        )
    number = max([_noted_number(results_dir), *map(_number_of, results_dir.glob("*-*"))]) + 1
    return results_dir / f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', title)}"


def note_number(run_folder: Path) -> None:
    """Save the number of a numbered run folder, so that it is not used again."""
    results_dir, number = run_folder.parent, _number_of(run_folder)
    if number > _noted_number(results_dir):
        write_bytes(results_dir / LAST_NUMBER, str(number).encode())


def _noted_number(results_dir: Path) -> int:
    file = results_dir / LAST_NUMBER
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1


def _number_of(path: Path) -> int:
    """The number of a run folder, or of a file or broken link that takes its name. -1 for other names."""
    match = re.match(r"(\d{3,})-", path.name)
    return int(match[1]) if match else -1
