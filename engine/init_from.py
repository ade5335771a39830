"""Start a mask model from SiT weights: keep tensors that fit, convert the output layer, initialise the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from common.errors import InputError, list_some
from download import FINAL_LINEAR, SiTShape, check_state_dict, plain_keys, sit_shape
from engine.config import ModelConfig, RunConfig, TransportConfig


@dataclass
class InitReport:
    """What ``adapt_sit_weights`` did with each state-dict key."""

    kept: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as lines for the log."""
        lines = [f"kept: {len(self.kept)} tensors unchanged"]
        for title, names in (
            ("converted (mean half of learn_sigma)", self.converted),
            ("newly initialised", self.new),
            ("not used from the file", self.dropped),
        ):
            lines.append(f"{title}: {', '.join(names) if names else 'none'}")
        return lines


def adapt_sit_weights(
    state_dict: Mapping[str, torch.Tensor], model: nn.Module
) -> tuple[dict[str, torch.Tensor], InitReport]:
    """Fit SiT weights to a mask model: keep tensors that fit, convert the output layer, keep the model's own rest.

    The model keeps its own tensors in three cases: a class table and mask detail of another number of classes (an
    ImageNet class means nothing for masks), position embeddings of another grid, and patch and output layers of another
    patch size or number of channels.

    Args:
        state_dict: SiT keys to tensors, from ``find_model``.
        model: the newly built model to train.

    Returns:
        A complete state dict for ``model.load_state_dict(..., strict=True)``, and a report on each key.

    Raises:
        InputError: depth, width or feed-forward width differ, so the blocks do not fit.
    """
    own = model.state_dict()
    source = plain_keys(state_dict)
    theirs, ours = check_state_dict(source, "the weights"), sit_shape(own)
    _check_trunk(source, own, theirs, ours)
    halves = theirs.out_channels == 2 * theirs.in_channels and ours.out_channels == ours.in_channels
    result, report = {}, InitReport()
    for key, fresh in own.items():
        value, list_of_key = None if _means_else(key, theirs, ours) else source.get(key), report.kept
        if key in FINAL_LINEAR and value is not None and halves:
            value, list_of_key = mean_rows(value, theirs.patch_size, theirs.in_channels), report.converted
        if value is None or value.shape != fresh.shape:
            result[key] = fresh.clone()
            report.new.append(key)
        else:
            result[key] = value.to(device=fresh.device, dtype=fresh.dtype, copy=True)
            list_of_key.append(key)
    taken = set(report.kept) | set(report.converted)
    report.dropped = [key for key in source if key not in taken]
    return result, report


def _means_else(key: str, theirs: SiTShape, ours: SiTShape) -> bool:
    """Whether the numbers of a tensor belong to other pixels or classes, although its shape may be the same."""
    if key in FINAL_LINEAR or key.startswith("overlap."):
        return (theirs.patch_size, theirs.in_channels) != (ours.patch_size, ours.in_channels)
    return key.startswith("mask_detail.") and theirs.class_rows != ours.class_rows


def meaning_warnings(trained: Mapping[str, Any] | None, config: RunConfig) -> list[str]:
    """Warnings if the weights were trained for another output or another scale of the time than this run.

    Args:
        trained: configuration of the weights. None for SiT's own, which has the defaults.
        config: of this run.
    """
    who = "SiT's weights" if trained is None else "the weights"
    sections = [(trained or {}).get(name) for name in ("transport", "model")]
    transport, model = (one if isinstance(one, dict) else {} for one in sections)
    theirs = [transport.get(name, getattr(TransportConfig, name)) for name in ("prediction", "path_type")]
    ours = [config.transport.prediction, config.transport.path_type]
    warnings = []
    if theirs != ours:
        warnings.append(
            f"warning: {who} predict the {theirs[0]} on the {theirs[1]} path, and this run the {ours[0]} on the "
            f"{ours[1]} path"
        )
    time_scale, own = model.get("time_scale", ModelConfig.time_scale), config.model.time_scale
    if time_scale != own:
        warnings.append(f"warning: {who} were trained with a time scale of {time_scale}, and this run has {own}")
    return warnings


def mean_rows(value: torch.Tensor, patch_size: int, channels: int) -> torch.Tensor:
    """Select the rows of the output layer that give the mean, from a layer that gives mean and sigma.

    Rows are ordered by (patch row, patch column, output channel). Within each pixel, the channels of the mean come
    before those of sigma. (The first half of all rows would be the upper half of each patch.)

    Args:
        value: (p * p * 2C, ...) weight or bias, ... arbitrary.
        patch_size: p.
        channels: C.

    Returns:
        (p * p * C, ...), contiguous.
    """
    rest = value.shape[1:]
    rows = value.reshape(patch_size**2, 2 * channels, *rest)  # (p * p, 2C, ...)
    return rows[:, :channels].reshape(patch_size**2 * channels, *rest).contiguous()  # (p * p * C, ...)


def _check_trunk(source: Mapping, own: Mapping, theirs: SiTShape, ours: SiTShape) -> None:
    """Refuse weights whose blocks or time embedding do not fit: hardly anything would remain."""
    if (theirs.depth, theirs.hidden_size) != (ours.depth, ours.hidden_size):
        raise InputError(
            f"the weights to start from are {theirs}, the model is {ours}; choose a model with the depth and width of "
            "the weights"
        )
    trunk = [key for key in own if key.startswith(("blocks.", "t_embedder."))]
    clashing = [
        f"{key} {tuple(source[key].shape)} instead of {tuple(own[key].shape)}"
        for key in trunk
        if key in source and source[key].shape != own[key].shape
    ]
    if clashing:
        raise InputError(f"the weights to start from do not fit the model: {list_some(clashing)}")
