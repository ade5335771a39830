"""What two or more commands share: flag groups, devices and processes, reproducible randomness, EMA, logging."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import CROPS, MASK_TYPES, WINDOW_CHANNELS, WINDOW_SCOPES
from errors import InputError
from image_files import as_rgb
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

PRECISIONS = ("auto", "bf16", "float32")
DEVICES = ("auto", "cuda", "cpu")

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


def check_compiler() -> None:
    """torch.compile builds its code with a C++ compiler, also for a GPU.

    Raises:
        InputError: there is none.
    """
    if not has_compiler():
        compiler = os.environ.get("CXX", "g++")
        raise InputError(f"--compile: no C++ compiler {compiler}. Install it or name one in CXX, or drop the flag.")


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile would call is there."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


# ------------------------------------------------------------------------------------------- processes and precision


@dataclass(frozen=True)
class Machine:
    """Where this process stands among the others and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    precision: str  # bf16 or float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others, which then find what it left on disk."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Travels over the CPU, so that no GPU waits for it."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def max_over_ranks(self, value: float) -> float:
        """The largest of the ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.item()

    def from_all(self, values: Tensor) -> Tensor:
        """Every rank's CPU tensor (n,), stacked (world_size, n)."""
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def to_main(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks in one, on rank 0; empty elsewhere."""
        if self.world_size == 1:
            return values
        lists = [[] for _ in range(self.world_size)] if self.is_main else None
        dist.gather_object(values, lists)
        return [value for one in lists or () for value in one]

    def from_main(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def resolve_device(name: str) -> torch.device:
    """The device of this process: its LOCAL_RANK's GPU, or the CPU.

    Raises:
        InputError: cuda was asked for and there is none, or fewer than processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            f"--device {name}: process {local_rank} finds {count} GPUs on this machine. "
            "Lower --nproc_per_node, or give --device cpu."
        )
    return torch.device("cuda", local_rank)


def resolve_precision(name: str, device: torch.device) -> str:
    """bf16 or float32: auto takes bf16 where the hardware multiplies matrices in it, since emulation is slower."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def start_machine(device: str, precision: str) -> Machine:
    """Join the other processes, where torchrun started several, and choose device and precision.

    gloo joins processes on CPUs; on GPUs nccl moves tensors and gloo what lies on the CPU.
    """
    resolved = resolve_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if world_size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    rank = dist.get_rank() if world_size > 1 else 0
    return Machine(rank, world_size, resolved, resolve_precision(precision, resolved))


def stop_machine() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------- reproducible randomness


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from several whole numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one training step.

    Every draw of a step (times, noise, dropped masks) follows from (seed, step, rank) alone, so a resumed run needs no
    saved random state to draw what an uninterrupted one would have drawn.
    """
    torch.manual_seed(derived_seed(seed, step, rank))


# ------------------------------------------------------------------------------------------------------------- model


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, all parameters in one fused call.

    The decay warms up as (1 + step) / (10 + step), so that a short run is not left with its initial weights.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def grid_image(rows: list[list[Tensor]], pad: int = 2) -> np.ndarray:
    """Rows of images (C, H, W) in [-1, 1] -> one uint8 image (H', W', 3), white between them and beside small ones."""
    from torchvision.utils import make_grid

    tiles = [as_rgb(to_uint8(tile)) for row in rows for tile in row]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    margins = [((0, height - tile.shape[0]), (0, width - tile.shape[1]), (0, 0)) for tile in tiles]
    tiles = np.stack([np.pad(tile, margin, constant_values=255) for tile, margin in zip(tiles, margins, strict=True)])
    grid = make_grid(torch.from_numpy(tiles).permute(0, 3, 1, 2), nrow=len(rows[0]), padding=pad, pad_value=255)
    return grid.permute(1, 2, 0).numpy()


def to_uint8(image: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> (H, W, C) uint8, rounded."""
    return image.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


CLASS_COLORS = (
    (0, 0, 0),
    (255, 255, 255),
    (230, 80, 60),
    (70, 140, 230),
    (90, 190, 90),
    (240, 190, 60),
    (160, 90, 200),
)


def mask_picture(prob_map: Tensor) -> Tensor:
    """(K, H, W) class probabilities -> (3, H, W) in [-1, 1]: background black, cells white, others coloured."""
    colors = torch.tensor([CLASS_COLORS[k % len(CLASS_COLORS)] for k in range(len(prob_map))], dtype=torch.float32)
    return torch.einsum("khw,kc->chw", prob_map.float().cpu(), colors / 127.5 - 1)


# ----------------------------------------------------------------------------------------------------------- logging


class LogFile(logging.FileHandler):
    """A log file on a full disk ends the command like any other file there, instead of a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            with contextlib.suppress(OSError):
                self.stream.close()  # it tries once more to write what it holds
            self.stream = None
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        super().handleError(record)


def start_logging(is_main: bool, log_file: Path | None = None) -> None:
    """Rank 0 logs to stderr and, where given, to a file; the other ranks log warnings only."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if is_main and log_file is not None:
        handlers.append(LogFile(log_file, encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def log_provenance(machine: Machine, seed: int) -> None:
    """First lines of a log: command, commit, versions, device, seed."""
    logger.info("command: %s", " ".join(sys.argv))
    logger.info("commit: %s; python %s, torch %s", commit(), sys.version.split()[0], torch.__version__)
    name = (
        torch.cuda.get_device_name(machine.device)
        if machine.device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    logger.info(
        "device: %s (%s), precision %s, %d process(es), seed %d",
        machine.device, name, machine.precision, machine.world_size, seed,
    )  # fmt: skip


def commit() -> str:
    """The commit of this checkout, with + where files differ from it; "unknown" outside of git."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip() or "unknown"
