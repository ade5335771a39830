"""Command line: flags that several commands share, and the step from flags to settings."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from common.arguments import (
    batch_size,
    finite_float,
    fraction,
    non_negative_float,
    non_negative_int,
    overlap,
    part_of_time,
    percentile,
    positive_float,
    positive_int,
    seed_number,
)
from common.errors import InputError, as_flag
from dataset.config import CROPS, WINDOW_CHANNELS, WINDOW_SCOPES, DataConfig
from dataset.gray import default_window_channels
from dataset.look_choice import LOOK_SOURCES, LookChoice, choose_looks
from dataset.looks import REFERENCE, look_count
from dataset.mask_folder import MaskFolder
from dataset.masks import MASK_TYPES
from engine.autoencoder import PIXEL_SPACE, check_space
from engine.config import (
    FIXED,
    LOCAL,
    OptimiserConfig,
    RunConfig,
    TrainConfig,
    TransportConfig,
    choose_model,
    choose_transport,
)
from engine.machine import DEVICES, PRECISIONS, Machine
from engine.sampling import TILE_OVERLAP, SamplingSettings, TrainedModel, load_trained
from flag_rules import LOOK_FLAGS, check_needs
from transport import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    LOSS_WEIGHTS,
    ODE_METHODS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
    TIME_SAMPLINGS,
)

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------- flag groups


def add_mask_type_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--mask-type", choices=MASK_TYPES, default="auto",
        help="meaning of the mask values (auto: find out from all files)",
    )  # fmt: skip


def add_device_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (auto: GPU if there is one)")


def add_mask_arguments(group: argparse._ActionsContainer) -> None:
    """Flags on the meaning of mask values, for every command that reads masks."""
    add_mask_type_argument(group)
    group.add_argument(
        "--normalize-masks", action="store_true", help="divide soft maps by their sum if they do not sum to 1"
    )
    add_mask_values_argument(group)


def add_mask_values_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--mask-values", type=non_negative_int, nargs="+", metavar="VALUE",
        help="gray value of each class in the mask files, background first, such as 0 128 255 for three classes",
    )  # fmt: skip


def add_output_argument(parser: argparse.ArgumentParser, folder: str) -> None:
    """Folder for results, for evaluate.py."""
    parser.add_argument("--output", type=Path, default=Path(folder), metavar="FOLDER", help="folder for the results")


def add_real_pairs(parser: argparse.ArgumentParser, what: str) -> None:
    """Folders of real images and masks. ``what`` completes the help text."""
    parser.add_argument("--data-path", required=True, metavar="IMAGES", help=f"real images{what}")
    parser.add_argument("--mask-path", required=True, metavar="MASKS", help="masks of the real images")
    add_mask_type_argument(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """How to read files in training. Sampling takes these settings from the checkpoint, except those of masks."""
    group = parser.add_argument_group("images and masks")
    add_mask_arguments(group)
    group.add_argument(
        "--crop", choices=CROPS, default="center",
        help="center: resize the short side to the image size and keep the middle; random: cut random squares, not "
        "resized",
    )  # fmt: skip
    group.add_argument(
        "--window", type=percentile, nargs=2, metavar=("LOW", "HIGH"),
        help="gray range: stretch these percentiles of the gray values (0 to 100) to the full range; by default, 8-bit "
        "images keep their range and other images are stretched between robust percentiles",
    )  # fmt: skip
    group.add_argument(
        "--window-scope", choices=WINDOW_SCOPES, default="image",
        help="take the percentiles of each image, or of the whole data set",
    )  # fmt: skip
    group.add_argument(
        "--window-channels", choices=WINDOW_CHANNELS,
        help="joint: one gray range for all channels; separate: one for each channel (default: joint for gray and RGB, "
        "separate for other images and for TIFF files with axes CYX)",
    )  # fmt: skip


def add_transport_arguments(parser: argparse.ArgumentParser) -> None:
    """The interpolant and what the model predicts (training)."""
    group = parser.add_argument_group("transport")
    group.add_argument("--path-type", choices=list(PATHS), default="Linear", help="interpolant between noise and data")
    group.add_argument(
        "--prediction", choices=list(PREDICTIONS),
        help="what the model predicts (default: velocity; in pixel space: data if a patch has more values than 3/4 of "
        "the model's width)",
    )  # fmt: skip
    group.add_argument(
        "--loss-weight", choices=list(LOSS_WEIGHTS),
        help="weight of the loss over time (default: None, no weight; for data prediction: velocity)",
    )  # fmt: skip
    eps = "keep {} times (0 to 1) at least this far from a singularity (default: by path and prediction)"
    group.add_argument("--train-eps", type=non_negative_float, help=eps.format("training"))
    group.add_argument("--sample-eps", type=non_negative_float, help=eps.format("solver"))
    group.add_argument(
        "--time-sampling", choices=list(TIME_SAMPLINGS),
        help="distribution of training times (default: uniform for latents, logit-normal for pixels)",
    )  # fmt: skip
    group.add_argument(
        "--time-mean", type=finite_float,
        help="mean of logit(t) for logit-normal times (default: 0; -1.2 for data prediction on pixels)",
    )  # fmt: skip
    group.add_argument(
        "--time-std", type=positive_float, default=1.0, help="standard deviation of logit(t) for logit-normal times"
    )


def add_solver_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Subcommands ODE and SDE with the flags of their solvers."""
    modes = parser.add_subparsers(dest="mode", required=True, metavar="ODE|SDE")
    ode = modes.add_parser("ODE", help="deterministic sampling (faster, the usual choice)")
    group = ode.add_argument_group("ODE solver")
    group.add_argument(
        "--sampling-method", type=str.lower, choices=list(ODE_METHODS), default="heun", help="name of the solver"
    )
    group.add_argument("--num-sampling-steps", type=positive_int, help="steps of a fixed-step solver (default: 25)")
    group.add_argument("--atol", type=positive_float, help="absolute tolerance of an adaptive solver (default: 1e-6)")
    group.add_argument("--rtol", type=positive_float, help="relative tolerance of an adaptive solver (default: 1e-3)")
    sde = modes.add_parser("SDE", help="stochastic sampling")
    group = sde.add_argument_group("SDE solver")
    group.add_argument(
        "--sampling-method", type=str.capitalize, choices=list(SDE_METHODS), default="Euler", help="name of the solver"
    )
    group.add_argument("--num-sampling-steps", type=positive_int, help="steps of the solver (default: 250)")
    group.add_argument(
        "--diffusion-form", choices=list(DIFFUSION_FORMS), default="SBDM",
        help="how the strength of the noise depends on time (docs/transport.md)",
    )  # fmt: skip
    group.add_argument("--diffusion-norm", type=positive_float, default=1.0, help="factor on the strength of the noise")
    group.add_argument(
        "--last-step", choices=[str(name) for name in LAST_STEPS], default="Tweedie",
        help="how to take the last step, which removes the remaining noise; None leaves it in",
    )  # fmt: skip
    group.add_argument(
        "--last-step-size",
        type=part_of_time,
        help="length of the last step in time, 0 to 1 (default: as the other steps)",
    )
    return {"ODE": ode, "SDE": sde}


def add_checkpoint_arguments(group: argparse._ActionsContainer) -> None:
    """The checkpoint, and how to read it: for every command that samples."""
    group.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint written by train.py")
    group.add_argument(
        "--raw-weights", action="store_true", help="sample with the last weights instead of their average (EMA)"
    )
    group.add_argument("--vae", help="new folder of the autoencoder, if it has moved since training")


def add_sampling_arguments(parser: argparse.ArgumentParser, cfg_scale: float) -> None:
    """Flags of sample.py and sample_ddp.py: checkpoint, large fields, guidance and seed."""
    group = parser.add_argument_group("model")
    add_checkpoint_arguments(group)
    checked = "optional: the checkpoint knows it; stops if yours differs"
    group.add_argument("--num-classes", type=positive_int, help=checked)
    group.add_argument("--image-size", type=positive_int, help=checked)
    group.add_argument("--model", help=checked)
    group = parser.add_argument_group("large fields")
    group.add_argument(
        "--tile", action="store_true", help="sample the whole mask in overlapping tiles, instead of one square of it"
    )
    group.add_argument(
        "--tile-scale", type=positive_float, metavar="FACTOR",
        help="image pixels per mask pixel (default: 1; required for a checkpoint of --crop center)",
    )  # fmt: skip
    group.add_argument(
        "--tile-overlap", type=overlap, metavar="FRACTION|PIXELS",
        help="least overlap of neighbouring tiles: a fraction of the image size if below 1, else pixels; 0 leaves "
        "visible seams (default: 0.25)",
    )  # fmt: skip
    group = parser.add_argument_group("looks (of a checkpoint trained with --look reference)")
    group.add_argument(
        "--look", choices=LOOK_SOURCES,
        help="take the look of a training image drawn by the seed, of the mask's own image (same, with --data-path), "
        "or no look (default: training)",
    )  # fmt: skip
    group.add_argument(
        "--look-path", type=Path, metavar="IMAGES", help="take looks from this folder (or file) of images"
    )
    group.add_argument(
        "--look-index",
        type=non_negative_int,
        metavar="N",
        help="one look for all images: that of training image N, or image N of --look-path, by name, from 0",
    )
    group.add_argument(
        "--look-group", nargs="+", default=(), metavar="GROUP", help="take looks of these groups (train.py --groups)"
    )
    group.add_argument("--balance-groups", action="store_true", help="draw looks of every group equally often")
    group.add_argument(
        "--look-scale", type=non_negative_float, default=1.0, help="scale of guidance on the look alone; 1 means none"
    )
    group = parser.add_argument_group("guidance and randomness")
    group.add_argument(
        "--cfg-scale", type=non_negative_float, default=cfg_scale,
        help="scale of classifier-free guidance: above 1 exaggerates what the mask asks for, 1 means none",
    )  # fmt: skip
    group.add_argument(
        "--guidance-interval", type=fraction, nargs=2, metavar=("LO", "HI"), default=(0.0, 1.0),
        help="use guidance only between these times; 0 is noise, 1 is data",
    )  # fmt: skip
    group.add_argument(
        "--seed", "--global-seed", type=seed_number, default=0,
        help="seed of the noise: another seed gives other images",
    )  # fmt: skip
    group.add_argument(
        "--per-proc-batch-size", type=batch_size, default=32,
        help="images that each process samples at once; lower it if memory runs out",
    )  # fmt: skip


def add_judge_arguments(group: argparse._ActionsContainer) -> None:
    """A small segmenter that finds cells in images. Its defaults are filled in later, to detect unused flags."""
    group.add_argument("--judge-images", type=Path, metavar="IMAGES", help="real images to train the segmenter")
    group.add_argument("--judge-masks", type=Path, metavar="MASKS", help="masks of these real images")
    group.add_argument("--judge-mask-type", choices=MASK_TYPES, help="meaning of their mask values (default: auto)")
    group.add_argument(
        "--judge-steps", type=positive_int, help=f"training steps of the segmenter (default: {JUDGE_STEPS})"
    )
    group.add_argument(
        "--judge-cache", type=Path, metavar="FOLDER",
        help=f"folder that keeps trained segmenters, for reuse (default: {JUDGE_CACHE})",
    )  # fmt: skip


JUDGE_STEPS, JUDGE_CACHE = 400, Path("judges")


def add_machine_arguments(parser: argparse.ArgumentParser, can_compile: bool = False) -> None:
    """Device and precision; with ``can_compile`` also torch.compile."""
    group = parser.add_argument_group("machine")
    add_device_argument(group)
    group.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="number format of the network (auto: bf16 if the hardware supports it, else float32)",
    )  # fmt: skip
    if can_compile:
        group.add_argument(
            "--compile", action="store_true",
            help="compile the network: slow start (minutes), faster steps; on a CPU, this needs a C++ compiler",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ training


def resolve(args: argparse.Namespace, world_size: int = 1, saved: RunConfig | None = None) -> RunConfig:
    """The configuration of a run: from the command line, else the checkpoint, else defaults that depend on others.

    Args:
        args: arguments of train.py.
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
    return RunConfig(
        model=choose_model(
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
        ),
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


def _shown(value: Any) -> str:
    """A value in the form of the command line."""
    values = value if isinstance(value, (list, tuple)) else [str(value)]
    return " ".join(one if isinstance(one, str) else f"{one:g}" for one in values)


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
    names = ("atol", "rtol") if args.mode == "ODE" else SDE_FLAGS
    solver = {name: getattr(args, name) for name in names}
    solver["num_steps"] = args.num_sampling_steps or (SDE_STEPS if args.mode == "SDE" else None)
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


SDE_STEPS = 250
SDE_FLAGS = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")


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
        trained.looks, trained.data, args.look, args.look_path, args.look_index, args.look_group, args.balance_groups
    )


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


def open_masks(args: argparse.Namespace, data: DataConfig, progress: bool = False) -> MaskFolder:
    """The masks to generate from, all checked, cut as the flags say.

    Raises:
        InputError: masks that cannot be used, or --tile without effect.
    """
    masks = MaskFolder(
        args.mask_path, data.with_mask_values(args.mask_values), args.mask_type, image_dir=args.data_path,
        progress=progress, normalize=args.normalize_masks, whole_scale=field_scale(args, data),
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
