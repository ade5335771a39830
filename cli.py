"""Flags that several commands share. ``settings.py`` makes settings from them."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.arguments import (
    batch_size,
    finite_float,
    fraction,
    guidance_scale,
    non_negative_float,
    non_negative_int,
    number,
    overlap,
    part_of_time,
    percentile,
    positive_float,
    positive_int,
    seed_number,
)
from dataset.config import CROPS, WINDOW_CHANNELS, WINDOW_SCOPES
from dataset.look_choice import LOOK_SOURCES
from dataset.masks import MASK_TYPES
from engine.machine import DEVICES, PRECISIONS
from transport import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    LOSS_WEIGHTS,
    ODE_METHOD,
    ODE_METHODS,
    ODE_STEPS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
    TIME_SAMPLINGS,
    TIME_SHIFT,
    TIME_SHIFTS,
)

JUDGE_STEPS, JUDGE_CACHE = 400, Path("judges")
time_shift = number(float, *TIME_SHIFTS)


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
        "--sampling-method", type=str.lower, choices=list(ODE_METHODS), default=ODE_METHOD, help="name of the solver"
    )
    group.add_argument(
        "--num-sampling-steps", type=positive_int, help=f"steps of a fixed-step solver (default: {ODE_STEPS})"
    )
    group.add_argument(
        "--time-shift", type=time_shift, metavar="FACTOR",
        help="how much shorter the first steps of a fixed-step solver are; 1 gives equal steps "
        f"(default: {TIME_SHIFT:g})",
    )  # fmt: skip
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
        "--look-table", type=Path, metavar="CSV", help="table with columns 'mask' and 'look': the look of each mask"
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
        "--look-scale", type=guidance_scale, default=1.0, help="scale of guidance on the look alone; 1 means none"
    )
    group = parser.add_argument_group("guidance and randomness")
    group.add_argument(
        "--cfg-scale", type=guidance_scale, default=cfg_scale,
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


def add_judge_training(
    parser: argparse.ArgumentParser, seed: str = "seed of the judge's training and of the choice of held-out images"
) -> None:
    """Training of the judge (a small segmenter), for the measures of evaluate.py that need one.

    Args:
        seed: help of ``--seed``.
    """
    parser.add_argument("--steps", type=positive_int, default=JUDGE_STEPS, help="training steps of the judge")
    parser.add_argument("--seed", type=seed_number, default=0, help=seed)
    cache = "folder that keeps trained judges, for reuse"
    parser.add_argument("--cache-dir", default=str(JUDGE_CACHE), metavar="FOLDER", help=cache)


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
            help="compile the network: slow start (seconds to minutes), faster steps; needs a C++ compiler",
        )  # fmt: skip
