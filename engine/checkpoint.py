"""Checkpoints: written atomically, and read without running code.

A checkpoint is a dictionary of plain types and tensors with ``model``, ``ema``, ``opt``, ``step`` and ``config`` at the
top level. ``config`` rebuilds everything that sampling needs, so nothing is guessed:

    config = {"model": {...}, "transport": {...}, "space": {...}, "data": {...}, "optimiser": {...}, "train": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from common.disk import write_atomically, write_bytes
from common.errors import InputError, list_some, one_line
from common.plain import WRONG, build, check_fields, parse_json
from common.weights import WouldRunCode, read_tensor_file
from dataset.config import DataConfig
from engine.autoencoder import SpaceTypes
from engine.config import ModelConfig, OptimiserConfig, RunConfig, TransportConfig
from models import SiT, build_model, registered_model

PARTS = ("model", "ema", "opt", "step", "config")
CONFIG_PARTS = ("model", "transport", "space", "data")  # what sampling needs
NOTES = (
    "step",
    "trained_on",
    "labelled_on",
    "intensity",
    "looks",
    "mask_type",
)  # an export keeps them beside the weights
MOST_STEPS = 10**12
MOST_IMAGES = 10**15


@dataclass(frozen=True)
class CheckpointTypes:
    """Types of the parts of a checkpoint."""

    model: dict[str, Any]
    ema: dict[str, Any]
    opt: dict[str, Any]
    step: int
    config: dict[str, Any]
    trained_on: list[str] | None
    labelled_on: list[str] | None
    intensity: dict[str, Any] | None
    looks: dict[str, Any] | None
    mask_type: str | None
    images_seen: int
    since_log: int


@dataclass(frozen=True)
class TrainTypes:
    """Types of those settings of the training that others read."""

    mask_type: str
    init_from: str | None
    data_path: str | None


@dataclass(frozen=True)
class MachineTypes:
    """Types of what ``Machine.describe`` returns."""

    world_size: int
    device: str
    precision: str


# Names may be missing or unknown here: the settings of training have become more. Builders of models look at the rest.
SECTIONS: dict[str, type] = {
    "model": ModelConfig, "transport": TransportConfig, "train": TrainTypes, "optimiser": OptimiserConfig,
    "machine": MachineTypes,
}  # fmt: skip


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. The top of this file lists its content.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # torch's error for a full disk
        raise OSError(f"cannot write {path}: {error}. Is the disk full?") from error


def export_safetensors(path: Path, state: dict[str, Any]) -> None:
    """Write the averaged weights and their configuration as one safetensors file, for sharing. Sampling can read it.

    The file has no optimiser and no settings of the training, because they may hold paths.

    Args:
        path: file to write.
        state: a checkpoint, or ``Training.trained_state()``.
    """
    config = {part: state["config"][part] for part in CONFIG_PARTS}
    config["space"] = config["space"] | {"vae": Path(config["space"]["vae"]).name}  # of a folder, without its path
    notes = {"config": config, **{name: state.get(name) for name in NOTES}}
    metadata = {"format": "pt", **{name: json.dumps(note) for name, note in notes.items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state["ema"].items()}
    write_bytes(path, safetensors.torch.save(tensors, metadata))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, or an exported safetensors file. Tensors are on the CPU. Runs no code.

    Raises:
        InputError: the file is missing, damaged, no checkpoint of this project, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"`ckpt` {path}: no such file. Checkpoints lie in RUN_FOLDER/checkpoints/NNNNNNN.pt.")
    try:
        content, metadata = read_tensor_file(path)
        state = _from_export(content, metadata) if path.suffix == ".safetensors" else content
    except WouldRunCode as error:
        raise InputError(
            f"`ckpt` {path}: holds more than plain tensors and would run code when loaded ({error}); "
            "only files written by train.py are read here."
        ) from error
    except ValueError as error:
        raise InputError(f"`ckpt` {path}: damaged or not a checkpoint. Give another one of the run.") from error
    missing = [part for part in PARTS if not isinstance(state, dict) or part not in state]
    config = {} if missing else state["config"]
    missing = missing or [
        f"config.{part}" for part in CONFIG_PARTS if not isinstance(config, dict) or part not in config
    ]
    if missing:
        raise InputError(
            f"`ckpt` {path}: has no {', '.join(missing)}, so it was not written by train.py of this project. "
            "To train on from the weights of SiT, give them to train.py as `init_from`."
        )
    try:
        _check_types(state)
    except ValueError as error:
        raise InputError(f"`ckpt` {path}: not as train.py writes it: {error}. Give another one of the run.") from error
    return state


def _check_types(state: dict[str, Any]) -> None:
    """Raise ValueError if a value of a checkpoint has the wrong type, or one that sampling reads is missing."""
    check_fields(CheckpointTypes, state)
    for name, most in (("step", MOST_STEPS), ("images_seen", MOST_IMAGES), ("since_log", state["step"])):
        if not 0 <= state.get(name, 0) <= most:
            raise ValueError(f"{name} is {state[name]}")
    for part, kind in SECTIONS.items():
        check_fields(kind, state["config"].get(part, {}))
    DataConfig.from_dict(state["config"]["data"])
    build(SpaceTypes, state["config"]["space"])


def saved_config(path: Path, state: dict[str, Any]) -> RunConfig:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        InputError: a setting is missing or has the wrong type.
    """
    try:
        return RunConfig.from_dict(state["config"])
    except WRONG as error:
        raise InputError(f"`ckpt` {path}: not as train.py writes it: {error}. Give another one of the run.") from error


@contextmanager
def naming_checkpoint(path: Path | None, *places: str) -> Iterator[None]:
    """Add the file to errors about values that come from a checkpoint. None: there is no checkpoint.

    Args:
        places: fields with the place of what is read, if this is what the checkpoint says.
    """
    try:
        yield
    except (InputError, OSError) as error:
        if path is None or str(path) in str(error):
            raise
        note = f"The checkpoint is {path}."
        if places:
            shown = " and ".join(f"`{place}`" for place in places)
            note = f"The checkpoint {path} names it: give {shown} if it has moved."
        raise InputError(f"{one_line(error).rstrip('.')}. {note}") from error


def _shape(value: object) -> tuple[int, ...]:
    """Shape of a tensor; () for everything else."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _check_size(asked: dict[str, Any], weights: dict[str, Any]) -> None:
    """Raise ValueError if the weights have another depth, width or number of patches than is asked for."""
    side = asked["input_size"] // asked["patch_size"]
    size = (1, side**2, asked["hidden_size"])
    if _shape(weights.get("pos_embed")) != size or not 1 <= asked["depth"] <= len(weights):
        raise ValueError(
            f"the configuration asks for {asked['depth']} blocks of width {size[2]} for {side} x {side} patches, "
            "unlike the weights"
        )


def build_trained(config: dict[str, Any], weights: dict[str, Any]) -> SiT:
    """Build the model of a checkpoint and load its weights.

    The sizes in the configuration are compared with the weights first, because a configuration of a few bytes could
    ask for a model that fills the memory. The weights are never larger than their file. ``config`` is the section
    "model" of the checkpoint's configuration.

    Raises:
        ValueError: the configuration does not fit the weights.
    """
    known = registered_model(config.get("name")).keywords
    if "depth" in known:  # all SiTs have it; a benchmark adds other models to the table
        _check_size(known | config, weights)
    with torch.device("meta"):  # shapes without memory
        shapes = {name: value.shape for name, value in build_model(config).state_dict().items()}
    wrong = [name for name, shape in shapes.items() if _shape(weights.get(name)) != tuple(shape)]
    wrong += [name for name in weights if name not in shapes]
    if wrong:
        raise ValueError(f"the configuration does not fit the weights: {list_some(wrong)}")
    check_numbers(weights)
    model = build_model(config)
    model.load_state_dict(weights)
    return model


def check_numbers(weights: Mapping[str, Any]) -> None:
    """Raise ValueError if a weight is not finite or no float. Training saves no such weights."""
    wrong = [
        name
        for name, value in weights.items()
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.isfinite().all()
    ]
    if wrong:
        raise ValueError(f"these weights are not finite numbers: {list_some(wrong)}")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if AdamW cannot go on with what it has remembered of each parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        moments = optimizer.state.get(parameter, {})
        shapes = {"step": (), "exp_avg": _shape(parameter), "exp_avg_sq": _shape(parameter)} if moments else {}
        found = {f"{name} of parameter {number}": moments[name] for name in shapes}
        check_numbers(found)
        wrong = [name for name, shape in zip(found, shapes.values(), strict=True) if _shape(found[name]) != shape]
        wrong += [name for name, value in found.items() if "exp_avg of" not in name and (value < 0).any()]
        if wrong:
            raise ValueError(f"the optimiser's state does not fit the weights: {list_some(wrong)}")


def _from_export(weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """A file of ``export_safetensors`` in the form of a checkpoint without raw weights and optimiser.

    Raises:
        ValueError: ``export_safetensors`` did not write the metadata.
    """
    config, step = parse_json(metadata.get("config", "{}")), int(metadata.get("step", "0"))
    notes = {name: parse_json(metadata.get(name, "null")) for name in NOTES}
    return {"model": {}, "ema": weights, "opt": {}, **notes, "step": step, "config": config}
