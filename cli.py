"""What two or more commands share: flag groups, devices and processes, reproducible randomness, EMA, logging."""

from __future__ import annotations

import argparse
import logging
import math

from dataset.config import CROPS, WINDOW_CHANNELS, WINDOW_SCOPES
from dataset.masks import MASK_TYPES
from engine.machine import DEVICES, PRECISIONS
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

# ---------------------------------------------------------------------------------------------------- argument types


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def non_negative_int(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0 and below 2^63")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def overlap(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf") or (value > 1 and not value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text} is neither a share between 0 and 1 nor a number of pixels")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def part_of_time(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1, which is all the time there is")
    return value


def positive_fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1")
    return value


# ------------------------------------------------------------------------------------------------------- flag groups


def add_mask_type_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument("--mask-type", choices=MASK_TYPES, default="auto", help="what the mask files hold")


def add_device_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU where there is one")


def add_mask_arguments(group: argparse._ActionsContainer) -> None:
    """What the mask files hold, wherever masks are read."""
    add_mask_type_argument(group)
    group.add_argument(
        "--normalize-masks", action="store_true", help="divide soft maps by their sum where they do not sum to one"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """How files become tensors in training; sampling takes all but the masks' own flags from the checkpoint."""
    group = parser.add_argument_group("images and masks")
    add_mask_arguments(group)
    group.add_argument(
        "--crop",
        choices=CROPS,
        default="center",
        help="center: resize the short side to the image size and cut the middle; random: windows at native scale",
    )
    group.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="stretch these percentiles of gray (0 to 100) to the full range; without it 8-bit images keep their range "
        "and others are stretched between robust percentiles",
    )
    group.add_argument(
        "--window-scope", choices=WINDOW_SCOPES, default="image", help="percentiles of each image, or of the data set"
    )
    group.add_argument(
        "--window-channels",
        choices=WINDOW_CHANNELS,
        help="one window for all channels, or one for each (default: joint for gray and RGB, else separate)",
    )


def add_transport_arguments(parser: argparse.ArgumentParser) -> None:
    """The interpolant and what the model predicts (training)."""
    group = parser.add_argument_group("transport")
    group.add_argument("--path-type", choices=list(PATHS), default="Linear", help="interpolant between noise and data")
    group.add_argument(
        "--prediction",
        choices=list(PREDICTIONS),
        help="what the model predicts (default: velocity; data for pixels whose patch exceeds 3/4 of the width)",
    )
    group.add_argument(
        "--loss-weight",
        choices=list(LOSS_WEIGHTS),
        help="weight of the loss over time (default: none; for data prediction: velocity)",
    )
    group.add_argument("--train-eps", type=non_negative_float, help="no training time is nearer to a singular end")
    group.add_argument("--sample-eps", type=non_negative_float, help="no solver time is nearer to a singular end")
    group.add_argument(
        "--time-sampling",
        choices=list(TIME_SAMPLINGS),
        help="how training times are drawn (default: uniform for latents, logit-normal for pixels)",
    )
    group.add_argument(
        "--time-mean", type=finite_float,
        help="logit-normal: mean of logit(t) (default: 0; -1.2 where pixels are predicted)",
    )  # fmt: skip
    group.add_argument("--time-std", type=positive_float, default=1.0, help="logit-normal: its standard deviation")


def add_solver_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Sub-commands ODE and SDE with the flags of their solvers."""
    modes = parser.add_subparsers(dest="mode", required=True, metavar="ODE|SDE")
    ode = modes.add_parser("ODE", help="deterministic sampling")
    group = ode.add_argument_group("ODE solver")
    group.add_argument("--sampling-method", type=str.lower, choices=list(ODE_METHODS), default="heun", help="solver")
    group.add_argument("--num-sampling-steps", type=positive_int, help="steps of a fixed-step solver (default: 25)")
    group.add_argument("--atol", type=positive_float, help="absolute tolerance of an adaptive solver (default: 1e-6)")
    group.add_argument("--rtol", type=positive_float, help="relative tolerance of an adaptive solver (default: 1e-3)")
    sde = modes.add_parser("SDE", help="stochastic sampling")
    group = sde.add_argument_group("SDE solver")
    group.add_argument(
        "--sampling-method", type=str.capitalize, choices=list(SDE_METHODS), default="Euler", help="solver"
    )
    group.add_argument("--num-sampling-steps", type=positive_int, help="steps (default: 250)")
    group.add_argument("--diffusion-form", choices=list(DIFFUSION_FORMS), default="SBDM", help="diffusion over time")
    group.add_argument("--diffusion-norm", type=positive_float, default=1.0, help="factor on the diffusion")
    group.add_argument("--last-step", choices=[str(name) for name in LAST_STEPS], default="Tweedie", help="how it ends")
    group.add_argument("--last-step-size", type=part_of_time, help="(default: the size of the other steps)")
    return {"ODE": ode, "SDE": sde}


def add_sampling_arguments(parser: argparse.ArgumentParser, cfg_scale: float) -> None:
    """Checkpoint, guidance and what must agree with the checkpoint; for sample.py and sample_ddp.py alike."""
    group = parser.add_argument_group("model")
    group.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint written by train.py")
    group.add_argument("--raw-weights", action="store_true", help="sample from the last weights and not from their EMA")
    group.add_argument("--vae", help="where the autoencoder lies now, if not where training found it")
    group.add_argument("--num-classes", type=positive_int, help="checked against the checkpoint")
    group.add_argument("--image-size", type=positive_int, help="checked against the checkpoint")
    group.add_argument("--model", help="checked against the checkpoint")
    group = parser.add_argument_group("large fields")
    group.add_argument(
        "--tile", action="store_true", help="the whole of every mask instead of a square, by overlapping windows"
    )
    group.add_argument(
        "--tile-scale",
        type=positive_float,
        metavar="FACTOR",
        help="pixels of the image for each of the mask (default: 1; a checkpoint of --crop center needs it said)",
    )
    group.add_argument(
        "--tile-overlap",
        type=overlap,
        metavar="SHARE|PIXELS",
        help="what neighbouring windows share at least: below 1 a share of the image size, else pixels; 0 shows "
        "seams (default: 0.25)",
    )
    group = parser.add_argument_group("guidance and randomness")
    group.add_argument(
        "--cfg-scale", type=non_negative_float, default=cfg_scale, help="classifier-free guidance; 1 is none"
    )
    group.add_argument(
        "--guidance-interval",
        type=fraction,
        nargs=2,
        metavar=("LO", "HI"),
        default=(0.0, 1.0),
        help="times at which guidance is on; 0 is noise, 1 is data",
    )
    group.add_argument("--seed", "--global-seed", type=non_negative_int, default=0, help="seed of the noise")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images drawn at once by a process")


def add_machine_arguments(parser: argparse.ArgumentParser, can_compile: bool = False) -> None:
    """Where and how precisely the work is done; ``can_compile`` where torch.compile is offered."""
    group = parser.add_argument_group("machine")
    add_device_argument(group)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 autocast where the hardware multiplies in it",
    )
    if can_compile:
        group.add_argument(
            "--compile", action="store_true",
            help="torch.compile the network: minutes at the start, faster steps; on a CPU it needs a C++ compiler",
        )  # fmt: skip
