"""Checkpoints: written whole or not at all, read without running code, and the run folder that holds them.

A checkpoint is a dictionary of plain types and tensors with ``model``, ``ema``, ``opt``, ``step`` and ``config`` at the
top level. ``config`` rebuilds everything that sampling needs, so nothing is guessed:

    config = {"model": {...}, "transport": {...}, "space": {...}, "data": {...}, "train": {...}}
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import socket
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch

from common.disk import lock_folder, sync_folder, write_atomically
from common.errors import InputError

logger = logging.getLogger(__name__)
PARTS = ("model", "ema", "opt", "step", "config")
CONFIG_PARTS = ("model", "transport", "space", "data")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; see the module's docstring for what it holds."""
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"cannot write {path}: {error}. Is the disk full?") from error


def export_safetensors(path: Path, state: dict[str, Any]) -> None:
    """The averaged weights with their configuration as one safetensors file, for sharing; sampling reads it.

    The command line of the training stays behind: it may hold paths.
    """
    config = {part: state["config"][part] for part in CONFIG_PARTS}
    metadata = {"format": "pt", "config": json.dumps(config), "step": str(state["step"])}
    metadata["intensity"] = json.dumps(state.get("intensity"))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state["ema"].items()}
    write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))


def _read_safetensors(path: Path) -> dict[str, Any]:
    """What ``export_safetensors`` wrote, shaped like a checkpoint without an optimiser.

    Raises:
        ValueError: damaged, or written by something else.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        config, step = json.loads(metadata.get("config", "{}")), int(metadata.get("step", "0"))
        intensity = json.loads(metadata.get("intensity", "null"))
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(str(error)) from error
    return {"model": weights, "ema": weights, "opt": {}, "step": step, "config": config, "intensity": intensity}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Checkpoint of this project (or its exported safetensors), on the CPU. Nothing in the file is run.

    Raises:
        InputError: no such file, not a checkpoint, damaged, would run code, or not one of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--ckpt {path}: no such file. Checkpoints lie in RUN_FOLDER/checkpoints/NNNNNNN.pt.")
    try:
        if path.suffix == ".safetensors":
            state = _read_safetensors(path)
        else:
            _check_crc(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # on odd pickle protocols; the error below says enough
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"--ckpt {path}: holds more than plain tensors and would run code when loaded, or is no checkpoint; "
            "only files written by train.py are read here."
        ) from error
    except Exception as error:  # a damaged pickle can raise any exception at all; none of them is a fault of ours
        raise InputError(f"--ckpt {path}: damaged or not a checkpoint. Give another checkpoint of the run.") from error
    missing = [part for part in PARTS if not isinstance(state, dict) or part not in state]
    missing = missing or [f"config.{part}" for part in CONFIG_PARTS if part not in state["config"]]
    if missing:
        raise InputError(
            f"--ckpt {path}: has no {', '.join(missing)}, so it was not written by train.py of this project. "
            "Weights of SiT go to train.py --init-from."
        )
    return state


def _check_crc(path: Path) -> None:
    """Compare every stored block with its checksum; torch.load does not.

    torch.save compresses nothing, so that a file that would unpack to more than its own size is none of its files.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(block.file_size for block in archive.infolist()) > path.stat().st_size:
            raise ValueError("it would unpack to more than its own size")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum of {damaged} does not match")


class RunFolder:
    """One training run on disk: config.json, log.txt, metrics.jsonl, checkpoints/ and previews/.

    Args:
        path: the folder; made where it does not exist.
        keep: how many checkpoints stay.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        self.checkpoints = path / "checkpoints"
        self.previews = path / "previews"
        self.metrics = path / "metrics.jsonl"
        self._lock: IO[bytes] | None = None

    def create(self) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.previews.mkdir(exist_ok=True)

    def lock(self) -> None:
        """Keep a second process out for as long as this one lives, and clear away what a killed one left half-written.

        Raises:
            InputError: another process trains in this folder.
        """
        self._lock = lock_folder(self.path, "choose another --run-name", (self.checkpoints.name, self.previews.name))

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending."""
        names = (path.stem for path in self.checkpoints.glob("*.pt"))
        return sorted(int(name) for name in names if name.isdigit())

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"{step:07d}.pt"

    def preview_path(self, step: int) -> Path:
        return self.previews / f"{step:07d}.png"

    def save(self, state: dict[str, Any]) -> Path:
        """Write the checkpoint of ``state["step"]``, then drop the oldest beyond ``keep``."""
        path = self.checkpoint_path(state["step"])
        save_checkpoint(path, state)
        sync_folder(self.checkpoints)  # before an older one goes
        for step in self.steps()[: -self.keep]:
            self.checkpoint_path(step).unlink(missing_ok=True)
        return path

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; None in a new run.

        Raises:
            InputError: there are checkpoints and every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return read_checkpoint(self.checkpoint_path(step))
            except InputError as error:
                logger.warning("%s Falling back to the one before.", error)
        if steps:
            raise InputError(
                f"{self.checkpoints}: all {len(steps)} checkpoints are damaged. Remove them to start anew."
            )
        return None

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after ``step`` (and a torn last line): the resumed run writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
        write_atomically(self.metrics, lambda file: file.write("".join(kept).encode()))

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Append a line; it is on the disk before a checkpoint of its step is, so that a power cut leaves no gap."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.metrics)) from error


def choose_run_folder(results_dir: Path, run_name: str | None, title: str) -> Path:
    """Where a run goes: ``RESULTS_DIR/RUN_NAME``, else the next free ``RESULTS_DIR/NNN-title``.

    A number is never used twice, also after a folder was deleted in between. Workers that torchrun restarted, because
    one died or because a machine came or went, continue the folder that their launch began.
    """
    if run_name:
        return results_dir / run_name
    numbered = {path: int(path.name.split("-")[0]) for path in results_dir.glob("*-*") if _is_numbered(path)}
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, which starts a command once and then only again
        for path in sorted(numbered, key=numbered.__getitem__, reverse=True):
            marker = path / ".launch"
            if marker.is_file() and marker.read_text() == launch_id():
                return path
    return results_dir / f"{max(numbered.values(), default=-1) + 1:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', title)}"


def _is_numbered(path: Path) -> bool:
    return path.is_dir() and re.match(r"\d{3,}-", path.name) is not None


def launch_id() -> str:
    """What stays the same when torchrun restarts its workers, and is no other launch's.

    Host, run id, and number and starting time of torchrun's own process: the number alone comes again, in containers
    at once.
    """
    parent = os.getppid()
    try:  # the 20th field after the name, which may hold spaces: proc_pid_stat(5), starttime
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        started = ""
    return f"{socket.gethostname()} {parent} {started} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"
