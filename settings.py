"""From flags to settings: the configuration of a run, the settings of the sampler, and what the flags name."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cli import JUDGE_CACHE, JUDGE_STEPS
from common.arguments import number_as_text
from common.errors import InputError, as_flag
from dataset.config import DataConfig
from dataset.gray import default_window_channels
from dataset.look_choice import LookChoice, choose_looks
from dataset.looks import REFERENCE, look_count
from dataset.mask_folder import MaskFolder
from engine.autoencoder import PIXEL_SPACE, check_space
from engine.config import (
    FIXED,
    LOCAL,
    ModelConfig,
    OptimiserConfig,
    RunConfig,
    TrainConfig,
    TransportConfig,
    choose_model,
    choose_transport,
)
from engine.machine import Machine
from engine.sampling import ODE_ONLY, SDE_ONLY, TILE_OVERLAP, SamplingSettings, TrainedModel, load_trained
from flag_rules import LOOK_FLAGS, check_needs, is_adaptive

if TYPE_CHECKING:
    from evaluation.judge import JudgeRequest

logger = logging.getLogger(__name__)
SDE_STEPS = 250

# ------------------------------------------------------------------------------------------------------------ training


def resolve(args: argparse.Namespace, world_size: int = 1, saved: RunConfig | None = None) -> RunConfig:
    """The configuration of a run: from the command line, else the checkpoint, else defaults that depend on others.

    Args:
        world_size: number of processes that share a batch.
        saved: configuration in the checkpoint that the run continues.

    Raises:
        InputError: flags contradict the checkpoint or each other, or have no effect.
    """
    args = argparse.Namespace(**vars(args))
    if saved is not None:
        _continue_from(args, saved)
    _check_batch(args, world_size)
    args.window_channels = args.window_channels or default_window_channels(args.in_channels)
    in_pixels = args.vae == PIXEL_SPACE
    given = {field.name: getattr(args, field.name) for field in fields(TransportConfig)}
    transport = choose_transport(given, args.model, args.in_channels, in_pixels)
    vars(args).update(asdict(transport))
    check_needs(args)
    model = choose_model(
        args.model,
        args.image_size,
        check_space(args.vae, args.in_channels),
        num_classes=args.num_classes,
        mask_dropout=args.mask_dropout,
        mask_detail=not args.no_mask_detail,
        time_scale=args.time_scale or (1000.0 if in_pixels else 1.0),
        patch_overlap=not args.no_patch_overlap,
        look_numbers=look_count(args.in_channels) if args.look == REFERENCE else 0,
        look_dropout=args.look_dropout,
    )
    if saved is not None:
        _check_same_model(model, saved.model)
    return RunConfig(
        model=model,
        transport=transport,
        data=DataConfig(
            image_size=args.image_size,
            num_classes=args.num_classes,
            crop=args.crop,
            window=args.window,
            window_scope=args.window_scope,
            window_channels=args.window_channels,
            window_values=saved.data.window_values if saved else None,
            channels=args.in_channels,
            mask_values=args.mask_values,
        ),
        optimiser=_section(OptimiserConfig, args),
        train=_section(TrainConfig, args),
    )


Section = TypeVar("Section", OptimiserConfig, TrainConfig)


def _section(kind: type[Section], args: argparse.Namespace) -> Section:
    """A section of the configuration whose fields have the same names as flags."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def _continue_from(args: argparse.Namespace, saved: RunConfig) -> None:
    """Take values that were not given from the checkpoint, and log given values that differ from it.

    A new --epochs replaces the --max-steps of the checkpoint.

    Raises:
        InputError: flags contradict the checkpoint.
    """
    contradicted = []
    for name, (value, resume) in saved.flags().items():
        ended = name == "max_steps" and args.given & {"epochs", "max_steps"} == {"epochs"}
        if resume == LOCAL or ended:
            continue
        given = getattr(args, name)
        if name not in args.given or given == value or _shown(given) == _shown(value):
            setattr(args, name, value)
        elif resume == FIXED:
            contradicted.append(f"{as_flag(name)} {_shown(given)} (the checkpoint has {_shown(value)})")
        else:
            logger.info("changed on resume: %s: %s -> %s", as_flag(name), _shown(value), _shown(given))
    if contradicted:
        raise InputError(
            f"the checkpoint contradicts {', '.join(contradicted)}. Leave the flag out, or start a new run: give "
            "another --run-name."
        )


def _check_same_model(asked: ModelConfig, saved: ModelConfig) -> None:
    """Raise InputError if the settings of a continued run ask for another model than the checkpoint has.

    It is not built then. Its size may have no bounds.
    """
    names = [one.name for one in fields(ModelConfig) if one.metadata.get("resume", FIXED) == FIXED]
    other = [name for name in names if getattr(asked, name) != getattr(saved, name)]
    if other:
        pairs = [f"{name} {getattr(asked, name)} (the checkpoint's model has {getattr(saved, name)})" for name in other]
        raise InputError(f"the settings of this run ask for another model: {', '.join(pairs)}.")


def _shown(value: Any) -> str:
    """A value in the form of the command line."""
    values = value if isinstance(value, (list, tuple)) else [str(value)]
    return " ".join(one if isinstance(one, str) else number_as_text(one) for one in values)


def _check_batch(args: argparse.Namespace, world_size: int) -> None:
    """Raise InputError if the batch cannot be divided equally among processes and accumulation steps."""
    if args.global_batch_size % world_size:
        raise InputError(
            f"--global-batch-size {args.global_batch_size} is not divisible by the {world_size} processes."
        )
    if args.global_batch_size // world_size % args.accumulate:
        raise InputError(
            f"--accumulate {args.accumulate} does not divide the {args.global_batch_size // world_size} images of each "
            "process (--global-batch-size / processes)."
        )


# ------------------------------------------------------------------------------------------------------------ sampling


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """Settings of the sampler, from the flags of ``add_sampling_arguments``.

    Raises:
        InputError: the guidance interval is empty, or a flag has no effect.
    """
    low, high = args.guidance_interval
    if low >= high:
        raise InputError(f"--guidance-interval {low:g} {high:g}: the first time must be below the second.")
    check_needs(args)
    names = ODE_ONLY if args.mode == "ODE" else SDE_ONLY
    solver = {name: getattr(args, name) for name in names}
    solver["num_steps"] = args.num_sampling_steps or (SDE_STEPS if args.mode == "SDE" else None)
    if is_adaptive(args.sampling_method):
        solver["time_shift"] = 1.0  # an adaptive solver chooses its own steps
    overlap = TILE_OVERLAP if args.tile_overlap is None else args.tile_overlap
    return SamplingSettings(
        mode=args.mode,
        method=args.sampling_method,
        cfg_scale=args.cfg_scale,
        look_scale=args.look_scale,
        guidance_interval=(low, high),
        tile_overlap=overlap if args.tile else None,
        **{name: value for name, value in solver.items() if value is not None},
    )


def inputs_of(args: argparse.Namespace) -> tuple[str | Path | None, ...]:
    """Files and folders that a sampler reads; its outputs must not replace them."""
    return args.mask_path, args.data_path, args.ckpt, args.look_path, args.look_table


def load_checkpoint(args: argparse.Namespace, machine: Machine) -> TrainedModel:
    """Load the checkpoint of ``--ckpt``, and check it against --model, --num-classes and --image-size.

    Raises:
        InputError: see ``engine.sampling.load_trained``.
    """
    expected = {name: getattr(args, name, None) for name in ("model", "num_classes", "image_size")}
    scales = (getattr(args, "cfg_scale", 1.0), *getattr(args, "cfg_scales", ()))
    trained = load_trained(
        args.ckpt, machine, raw_weights=args.raw_weights, vae=args.vae, expected=expected, cfg_scales=scales
    )
    args.image_size = trained.data.image_size  # for the message if memory runs out
    return trained


def look_choice(args: argparse.Namespace, trained: TrainedModel) -> LookChoice | None:
    """Which look every image takes; None if the checkpoint knows no looks.

    Raises:
        InputError: a flag that has no effect, or images that cannot be used.
    """
    given = [name for name in (*LOOK_FLAGS, "look_scale") if name in args.given]
    if trained.looks is None and given:
        raise InputError(f"{as_flag(given[0])} has no effect: {args.ckpt} was trained without --look reference.")
    if args.look == "same" and args.data_path is None:
        raise InputError("--look same takes the look of each mask's own image: give --data-path IMAGES, too.")
    if trained.looks is None:
        return None
    return choose_looks(
        trained.looks, trained.data, args.look, args.look_path, args.look_index, args.look_group, args.balance_groups,
        args.look_table, trained.image_types,
    )  # fmt: skip


def field_scale(args: argparse.Namespace, data: DataConfig) -> float | None:
    """Scale of whole masks for --tile. None without --tile.

    Raises:
        InputError: the checkpoint was trained on resized images, so the user has to say by how much.
    """
    if args.tile and args.tile_scale is None and data.crop == "center":
        raise InputError(
            f"--tile: {args.ckpt} was trained on images resized to a short side of {data.image_size} (--crop center), "
            f"so give the scale of its cells: --tile-scale {data.image_size} / (short side of the training images in "
            "pixels), or 1 if they were not resized."
        )
    return (args.tile_scale or 1.0) if args.tile else None


def open_masks(args: argparse.Namespace, data: DataConfig, learned: str, progress: bool = False) -> MaskFolder:
    """The masks to generate from, all checked, cut as the flags say.

    Args:
        data: of the checkpoint.
        learned: type of the masks in training.

    Raises:
        InputError: masks that cannot be used, or --tile without effect.
    """
    masks = MaskFolder(
        args.mask_path, data.with_mask_values(args.mask_values), args.mask_type, image_dir=args.data_path,
        progress=progress, normalize=args.normalize_masks, whole_scale=field_scale(args, data), learned=learned,
    )  # fmt: skip
    if args.tile:
        check_fields(args, masks.view_sizes(), data.image_size)
    return masks


def check_fields(args: argparse.Namespace, sizes: set[tuple[int, int]], side: int) -> None:
    """Raise InputError if --tile has no effect, or if the overlap is not smaller than a tile of ``side`` pixels."""
    if sizes == {(side, side)}:
        raise InputError(f"--tile has no effect: the masks have the model's own {side} x {side} pixels. Leave it out.")
    if args.tile_overlap is not None and args.tile_overlap >= side:
        raise InputError(f"--tile-overlap {args.tile_overlap:g}: a tile has {side} pixels. Give fewer, or a fraction.")


def judge_request(args: argparse.Namespace, device: torch.device) -> JudgeRequest:
    """The judge of a measure, from the flags of ``add_real_pairs`` and ``add_judge_training``."""
    from evaluation.judge import JudgeRequest  # seconds to import

    return JudgeRequest(
        args.data_path, args.mask_path, args.cache_dir, device, args.mask_type, args.steps, args.seed, progress=True
    )


def own_judge_request(args: argparse.Namespace, device: torch.device) -> JudgeRequest:
    """The judge of a command that samples, from the flags of ``add_judge_arguments``."""
    from evaluation.judge import JudgeRequest  # seconds to import

    return JudgeRequest(
        args.judge_images, args.judge_masks, args.judge_cache or JUDGE_CACHE, device, args.judge_mask_type or "auto",
        args.judge_steps or JUDGE_STEPS, progress=True,
    )  # fmt: skip
