"""Checkpoints: written whole or not at all, and read without running code.

A checkpoint is a dictionary of plain types and tensors with ``model``, ``ema``, ``opt``, ``step`` and ``config`` at the
top level. ``config`` rebuilds everything that sampling needs, so nothing is guessed:

    config = {"model": {...}, "transport": {...}, "space": {...}, "data": {...}, "optimiser": {...}, "train": {...}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.disk import write_atomically, write_bytes
from common.errors import InputError
from common.weights import WouldRunCode, read_tensor_file

NAMES = ("ckpt", "init_from")  # in the errors below: see InputError
PARTS = ("model", "ema", "opt", "step", "config")
CONFIG_PARTS = ("model", "transport", "space", "data")  # what sampling needs
NOTES = ("step", "trained_on", "labelled_on", "intensity", "looks")  # an export keeps them beside the weights


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; see the module's docstring for what it holds."""
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"cannot write {path}: {error}. Is the disk full?") from error


def export_safetensors(path: Path, state: dict[str, Any]) -> None:
    """The averaged weights with their configuration as one safetensors file, for sharing; sampling reads it.

    Optimiser, folders and the rest of the training's own settings stay behind: they may hold paths.

    Args:
        path: the file.
        state: a checkpoint, or ``Training.trained_state()``.
    """
    config = {part: state["config"][part] for part in CONFIG_PARTS}
    notes = {"config": config, **{name: state.get(name) for name in NOTES}}
    metadata = {"format": "pt", **{name: json.dumps(note) for name, note in notes.items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state["ema"].items()}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Checkpoint of this project (or its exported safetensors), on the CPU. Nothing in the file is run.

    Raises:
        InputError: no such file, not a checkpoint, damaged, would run code, or not one of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"ckpt {path}: no such file. Checkpoints lie in RUN_FOLDER/checkpoints/NNNNNNN.pt.", *NAMES)
    try:
        content, metadata = read_tensor_file(path)
        state = _from_export(content, metadata) if path.suffix == ".safetensors" else content
    except WouldRunCode as error:
        raise InputError(
            f"ckpt {path}: holds more than plain tensors and would run code when loaded ({error}); "
            "only files written by train.py are read here.",
            *NAMES,
        ) from error
    except ValueError as error:
        raise InputError(f"ckpt {path}: damaged or not a checkpoint. Give another one of the run.", *NAMES) from error
    missing = [part for part in PARTS if not isinstance(state, dict) or part not in state]
    missing = missing or [f"config.{part}" for part in CONFIG_PARTS if part not in state["config"]]
    if missing:
        raise InputError(
            f"ckpt {path}: has no {', '.join(missing)}, so it was not written by train.py of this project. "
            "To train on from the weights of SiT, give them to train.py as init_from.",
            *NAMES,
        )
    return state


def _from_export(weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """What ``export_safetensors`` wrote, shaped like a checkpoint without an optimiser.

    Raises:
        ValueError: something else wrote the metadata.
    """
    config, step = json.loads(metadata.get("config", "{}")), int(metadata.get("step", "0"))
    notes = {name: json.loads(metadata.get(name, "null")) for name in NOTES}
    return {"model": weights, "ema": weights, "opt": {}, **notes, "step": step, "config": config}
