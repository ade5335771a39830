"""Train SiT on image/mask pairs.

    torchrun --nproc_per_node=N train.py --data-path IMAGES --mask-path MASKS --image-size 256 --num-classes 2 \\
        --model SiT-B/2 --epochs 100 --global-batch-size 64 --wandb

The same command runs without torchrun on one GPU or on a CPU (there: ``--vae none --model SiT-Ti/8 --image-size 64``).
Started again with the same ``--run-name`` it continues, and ends with the weights of a run that was not interrupted.

The resume policy, in the order that matters:
 1. The newest whole checkpoint of the run folder wins; a damaged one is passed over with a warning.
 2. Without one, --ckpt gives weights, EMA, optimiser and step; else --init-from gives weights; else all is new.
 3. Architecture, transport, space and data configuration come from the checkpoint. A flag that was given and
    contradicts them is refused (FIXED_ON_RESUME); other flags that were given replace the file's and are logged; flags
    that were not given keep the file's values, but for paths, --compile and --recompute-activations. The autoencoder
    may lie elsewhere, and must be the same.
 4. No random state is saved: every draw follows from (seed, step, rank), every batch from (seed, images seen so far).
    Another number of processes or --global-batch-size goes on in the data where the run stopped, and is logged.
 5. Sums of the metrics since their last line are in the checkpoint; lines after its step are cut and written again.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

import wandb_utils
from cli import (
    add_data_arguments,
    add_machine_arguments,
    add_transport_arguments,
    fraction,
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    seed_number,
)
from common.disk import write_atomically, write_csv, write_json
from common.errors import EXIT_INTERRUPTED, CommandParser, InputError, one_line, run_command
from common.log import start_logging
from dataset.batches import Batch, StepBatches, WaitingClock, make_loader, prefetch
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.gray import SourceIntensity, default_window_channels, window_columns
from dataset.views import SYMMETRIES
from download import PUBLISHED_URLS
from engine.autoencoder import PIXEL_SPACE, LatentSpace, Space, check_space, load_space, space_config
from engine.checkpoint import RunFolder, choose_run_folder, export_safetensors, launch_id, read_checkpoint
from engine.latents import LatentPairs
from engine.machine import (
    Machine,
    check_compiler,
    count_parameters,
    log_provenance,
    resolve_precision,
    start_machine,
    stop_machine,
)
from engine.training import Previews, Training
from models import MOST_TOKENS, SiT_models, model_width, patch_size
from transport import create_transport

logger = logging.getLogger("train")
# What a checkpoint fixes for good. Everything else may change on resume and is logged.
FIXED_ON_RESUME = (
    "model", "image_size", "in_channels", "num_classes", "no_mask_detail", "time_scale", "init_from", "crop", "window",
    "window_scope", "window_channels", "path_type", "prediction", "loss_weight", "train_eps", "sample_eps",
    "time_sampling", "time_mean", "time_std",
)  # fmt: skip
# Where things are, how they are shown and what this machine can do: never taken from a checkpoint.
NOT_FROM_CHECKPOINT = (
    "data_path", "mask_path", "results_dir", "run_name", "ckpt", "wandb", "device", "compile", "recompute_activations",
)  # fmt: skip
MOST_WORKERS = 1024
NO_CACHE = "none"
WAITING_WORTH_SAYING = 0.05
MOST_OF_WIDTH = 0.75  # numbers of a patch over width up to which velocity prediction was tried in pixel space
EXIT_STOPPED_BY_SIGNAL = 143
SAME_CTRL_C_SECONDS = 2.0


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("data and run")
    group.add_argument("--data-path", type=Path, required=True, metavar="IMAGES", help="folder of images")
    group.add_argument("--mask-path", type=Path, required=True, metavar="MASKS", help="folder of masks, paired by name")
    group.add_argument("--results-dir", type=Path, default=Path("results"), help="where run folders go")
    group.add_argument("--run-name", help="name of the run folder; an existing one is continued")
    group.add_argument("--ckpt", type=Path, metavar="FILE", help="resume from this checkpoint")
    group.add_argument(
        "--init-from", metavar="FILE", help="start new from these weights (ours, or SiT's by name or file)"
    )

    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=list(SiT_models), default="SiT-B/2", metavar="NAME", help="SiT-SIZE/PATCH")
    group.add_argument("--image-size", type=positive_int, default=256, help="side of the training images, pixels")
    group.add_argument(
        "--in-channels", type=positive_int, default=3,
        help="channels of the images; other than 3 with --vae none: 1 for gray, 2, 4, ... for fluorescence",
    )  # fmt: skip
    group.add_argument("--num-classes", type=positive_int, default=2, help="mask classes, background included")
    group.add_argument(
        "--vae",
        default="ema",
        help="ema or mse (Stable Diffusion autoencoders), a diffusers folder, or none for pixels",
    )
    group.add_argument(
        "--latent-cache",
        metavar="FOLDER",
        help=f"where encoded images are kept, or {NO_CACHE} to encode anew at each step (default: RESULTS_DIR/latents "
        "for --crop center, where a run is long enough to gain from it)",
    )
    group.add_argument("--no-mask-detail", action="store_true", help="condition on pooled masks only, as plain SiT")
    group.add_argument(
        "--mask-dropout", type=fraction, default=0.1,
        help="share of samples that lose their whole mask, which guidance needs; 0 where sampling stays at guidance 1",
    )  # fmt: skip
    group.add_argument(
        "--time-scale", type=positive_float,
        help="factor on t before its sinusoids (default: 1000 for pixels; 1 for latents, which SiT's weights need)",
    )  # fmt: skip
    add_data_arguments(parser)
    add_transport_arguments(parser)

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, default=1400, help="passes over the data")
    group.add_argument("--max-steps", type=positive_int, help="steps; given, it replaces --epochs")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="images per step over all processes")
    group.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        metavar="PARTS",
        help="work through a batch in so many parts: the same update with less memory",
    )
    group.add_argument(
        "--recompute-activations",
        action="store_true",
        help="keep less for the backward pass and compute it again: much less memory, slower steps",
    )
    group.add_argument("--lr", type=positive_float, default=1e-4, help="learning rate of AdamW")
    group.add_argument("--warmup-steps", type=non_negative_int, default=100, help="steps until the full learning rate")
    group.add_argument(
        "--cooldown-steps", type=non_negative_int, default=0, help="last steps, over which the learning rate falls to 0"
    )
    group.add_argument("--weight-decay", type=non_negative_float, default=0.0, help="of AdamW")
    group.add_argument(
        "--grad-clip", type=non_negative_float, default=1.0, help="bound of the gradient norm; 0 is none"
    )
    group.add_argument("--ema-decay", type=fraction, default=0.9999, help="of the averaged weights; warms up")
    group.add_argument("--seed", "--global-seed", type=seed_number, default=0, help="of every random draw")

    group = parser.add_argument_group("logging and checkpoints")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps")
    group.add_argument("--ckpt-every", type=positive_int, default=1000, help="steps; the last step is always kept")
    group.add_argument("--keep", type=positive_int, default=3, help="how many checkpoints stay")
    group.add_argument(
        "--export-safetensors",
        action="store_true",
        help="at the end also write model.safetensors: averaged weights, config",
    )
    group.add_argument("--sample-every", type=positive_int, default=1000, help="steps between previews")
    group.add_argument("--cfg-scale", type=non_negative_float, default=4.0, help="guidance of the previews")
    group.add_argument("--wandb", action="store_true", help="log to Weights and Biases, too")
    group.add_argument(
        "--num-workers",
        type=number(int, 0, MOST_WORKERS),
        help="loader processes (default: 4, or 0 where one thread keeps up)",
    )
    add_machine_arguments(parser, can_compile=True)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    args.window_channels = args.window_channels or default_window_channels(args.in_channels)
    return args


# ------------------------------------------------------------------------------------------------- before the work


def check_arguments(args: argparse.Namespace, world_size: int) -> None:
    """Everything that can be said without reading the data.

    Raises:
        InputError: the flag and how to mend it.
    """
    check_batch(args, world_size)
    if args.compile:
        check_compiler()
    for flag, path in (("--data-path", args.data_path), ("--mask-path", args.mask_path)):
        if not path.is_dir():
            raise InputError(f"{flag} {path}: no such folder.")
    name = args.run_name
    if name is not None and (name in ("", ".", "..") or "/" in name or not name.isprintable()):
        raise InputError(f"--run-name {name!r}: give the name of a folder; --results-dir says where it lies.")
    if args.ckpt and not args.ckpt.is_file():
        raise InputError(f"--ckpt {args.ckpt}: no such file. Checkpoints lie in RUN_FOLDER/checkpoints/NNNNNNN.pt.")
    if args.ckpt and args.ckpt.suffix == ".safetensors":
        raise InputError(f"--ckpt {args.ckpt}: exported weights have no optimiser to resume with; give --init-from.")
    if args.ckpt and args.init_from:
        raise InputError("--ckpt resumes and --init-from starts new: give one of them.")
    if transport_config(args)["time_sampling"] == "uniform" and args.given & {"time_mean", "time_std"}:
        raise InputError(
            "--time-mean and --time-std have no effect on uniform times: give --time-sampling logit-normal."
        )
    if args.window is not None and not 0 <= args.window[0] < args.window[1] <= 100:
        raise InputError(f"--window {args.window[0]:g} {args.window[1]:g}: two percentiles, 0 <= LOW < HIGH <= 100.")
    if args.in_channels == 1 and "window_channels" in args.given:
        raise InputError("--window-channels has no effect on --in-channels 1: leave it out.")
    if args.mask_dropout == 0 and "cfg_scale" in args.given and args.cfg_scale != 1:
        raise InputError(
            f"--cfg-scale {args.cfg_scale:g} of the previews needs images without a mask in training: leave it out, or "
            "give --mask-dropout above 0."
        )
    check_space(args.vae, args.in_channels)
    check_transport(args)
    if args.wandb:
        wandb_utils.check_wandb()


def check_batch(args: argparse.Namespace, world_size: int) -> None:
    """Raises InputError for a batch that processes and parts cannot share equally."""
    if args.global_batch_size % world_size:
        raise InputError(
            f"--global-batch-size {args.global_batch_size} is not divisible by the {world_size} processes."
        )
    if args.global_batch_size // world_size % args.accumulate:
        raise InputError(
            f"--accumulate {args.accumulate} does not divide the {args.global_batch_size // world_size} images that a "
            "process has of --global-batch-size."
        )


def default_prediction(args: argparse.Namespace) -> str:
    """Velocity for latents as in SiT, and for pixels where the width carries a patch; else the data.

    A network that predicts the data has to learn to pass on what it sees of a nearly clean patch; to the velocity the
    input is added. With few steps that decides: nuclei at 64 px, patch 8, gray in one channel, three CPU minutes each:
    Dice ratio 0.97 for velocity, 0.90 for data (benchmarks/nuclei_64px_cpu.md). A patch of more numbers than the width
    carries needs data prediction (Li & He 2025, arXiv 2511.13720).
    """
    numbers = args.in_channels * patch_size(args.model) ** 2
    carried = args.vae != PIXEL_SPACE or numbers <= MOST_OF_WIDTH * model_width(args.model)
    return "velocity" if carried else "data"


def transport_config(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``create_transport``.

    Times are logit-normal in pixel space. Data prediction has to train near the noise, where the brightness of a patch
    is decided: 300 steps of SiT-Ti/8 gave a Dice ratio of 0.48 at mean 0, 0.77 at -1.2 and 0.60 at -2.
    """
    in_pixels = args.vae == PIXEL_SPACE
    prediction = args.prediction or default_prediction(args)
    time_mean = -1.2 if in_pixels and prediction == "data" else 0.0
    return {
        "path_type": args.path_type,
        "prediction": prediction,
        "loss_weight": args.loss_weight or ("velocity" if prediction == "data" else None),
        "train_eps": args.train_eps,
        "sample_eps": args.sample_eps,
        "time_sampling": args.time_sampling or ("logit-normal" if in_pixels else "uniform"),
        "time_mean": time_mean if args.time_mean is None else args.time_mean,
        "time_std": args.time_std,
    }


def check_transport(args: argparse.Namespace) -> None:
    """Raises InputError for a combination of transport flags that has no meaning or no effect."""
    try:
        create_transport(**transport_config(args))
    except ValueError as error:
        raise InputError(f"transport flags: {error}") from error


def model_config(args: argparse.Namespace, space: Space) -> dict[str, Any]:
    """Arguments of ``build_model``.

    Raises:
        InputError: the image size is no multiple of autoencoder factor x patch size.
    """
    unit = space.factor * patch_size(args.model)
    if args.image_size % unit:
        lower = args.image_size // unit * unit
        sizes = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise InputError(
            f"--image-size {args.image_size} is not divisible by {unit} (autoencoder factor {space.factor} x patch "
            f"size {patch_size(args.model)} of {args.model}): give {sizes}."
        )
    if (args.image_size // unit) ** 2 > MOST_TOKENS:
        raise InputError(
            f"--image-size {args.image_size}: gives above {MOST_TOKENS} patches; {args.model} reads fewer."
        )
    return {
        "name": args.model,
        "input_size": args.image_size // space.factor,
        "in_channels": space.channels,
        "num_classes": args.num_classes,
        "class_dropout_prob": args.mask_dropout,
        "mask_pixels": 0 if args.no_mask_detail else unit,
        "time_scale": args.time_scale or (1000.0 if args.vae == PIXEL_SPACE else 1.0),
    }


def check_latent_cache(args: argparse.Namespace) -> None:
    """Raises InputError where --latent-cache was given and has no effect."""
    if "latent_cache" in args.given and args.vae == PIXEL_SPACE:
        raise InputError("--latent-cache has no effect with --vae none: there are no latents.")
    if "latent_cache" in args.given and args.crop != "center":
        raise InputError(
            "--latent-cache has no effect with --crop random, whose windows are new at each step: give --crop center."
        )


def find_state(args: argparse.Namespace, run: RunFolder) -> dict[str, Any] | None:
    """The checkpoint to continue from; None for a new run. See the resume policy above."""
    steps = run.steps()
    own = args.ckpt is not None and args.ckpt.resolve().parent == run.checkpoints.resolve()
    if own and steps and args.ckpt.resolve() != run.checkpoint_path(steps[-1]).resolve():
        raise InputError(
            f"--ckpt {args.ckpt} is not the newest checkpoint of its run folder (that is {steps[-1]:07d}.pt), and "
            "going back would overwrite what came after: branch off with another --run-name."
        )
    return run.newest() or (read_checkpoint(args.ckpt) if args.ckpt else None)


def saved_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the run that wrote a checkpoint, with what it chose where a flag was left out."""
    return config["train"] | config["transport"] | {"time_scale": config["model"]["time_scale"]}


def merge_arguments(args: argparse.Namespace, saved: dict[str, Any]) -> list[str]:
    """Take from the checkpoint what was not given on the command line; a new --epochs replaces its --max-steps.

    Returns:
        What the command line changed, for the log.

    Raises:
        InputError: flags that contradict the checkpoint.
    """
    contradicted, changed = [], []
    for name, value in saved.items():
        if name in NOT_FROM_CHECKPOINT or not hasattr(args, name):
            continue
        if name == "max_steps" and args.given & {"epochs", "max_steps"} == {"epochs"}:
            continue
        given = getattr(args, name)
        same = list(given) == list(value) if isinstance(given, (list, tuple)) and value is not None else given == value
        flag = f"--{name.replace('_', '-')}"
        if name not in args.given or same:
            setattr(args, name, value)
        elif name in FIXED_ON_RESUME:
            contradicted.append(f"{flag} {given} (the checkpoint has {value})")
        else:
            changed.append(f"{flag}: {value} -> {given}")
    if contradicted:
        raise InputError(
            f"the checkpoint contradicts {', '.join(contradicted)}. Leave the flag out, or start anew with another "
            "--run-name."
        )
    return changed


def check_same_space(now: dict[str, Any], saved: dict[str, Any]) -> None:
    """The autoencoder of a continued run may have moved, but must be the one it began with.

    Raises:
        InputError: it is another one, and its latents mean something else.
    """
    if any(now[name] != value for name, value in saved.items() if name != "vae"):
        raise InputError(
            f"--vae {now['vae']}: not the autoencoder that this run began with (that was {saved['vae']}); give the "
            "original's folder, or start anew with another --run-name."
        )


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as plain types for config.json and the checkpoint."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "given"
    }


# ----------------------------------------------------------------------------------------------------------- the run


def open_run(args: argparse.Namespace, machine: Machine) -> RunFolder:
    """Make and lock the run folder on rank 0; every rank learns its name."""
    path, problem = None, None
    if machine.is_main:
        try:
            title = f"{args.model.replace('/', '-')}-{args.path_type}"
            path = choose_run_folder(args.results_dir, args.run_name, title)
            run = RunFolder(path, args.keep)
            run.create()
            run.lock()
            write_atomically(path / ".launch", lambda file: file.write(launch_id().encode()))
        except (InputError, OSError) as error:
            problem = one_line(error)
    path, problem = machine.from_main((path, problem))
    if problem:
        raise InputError(problem)
    return run if machine.is_main else RunFolder(path, args.keep)


def encode_once(pairs: PairedFolder, training: Training) -> LatentPairs | None:
    """The data set as kept latents, filled where it is not yet; None where images are encoded at each step."""
    args, machine, space, folder = training.args, training.machine, training.space, training.args.latent_cache
    if not isinstance(space, LatentSpace) or folder == NO_CACHE:
        return None
    if args.crop != "center":
        logger.info("images are encoded at each step: windows of --crop random are always new")
        return None
    if folder is None and training.total_steps * args.global_batch_size < SYMMETRIES * len(pairs):
        logger.info("images are encoded at each step: in so short a run that is less work than all views of each")
        return None
    folder = Path(folder or args.results_dir / "latents")
    hashes = machine.from_main(pairs.image_hashes if machine.is_main else None)
    latents = LatentPairs(pairs, space, folder, hashes)
    latents.prepare(machine)
    return latents


def step_batches(source: PairedFolder | LatentPairs, training: Training) -> Iterator[Batch]:
    """Batches of the steps still to take, fetched in the background. Loader processes are started where one thread
    could not keep up: for data that is read again each time, and for images in memory that feed a GPU."""
    args, machine = training.args, training.machine
    steps = range(training.step, training.total_steps)
    keys = StepBatches(
        len(source), args.global_batch_size, steps, args.seed, machine.rank, machine.world_size, training.images_seen
    )
    workers = args.num_workers
    if workers is None:
        light = isinstance(source, LatentPairs) or machine.device.type == "cpu"
        workers = 0 if source.in_memory and light else 4
    loader = make_loader(source, keys, workers, pin_memory=machine.device.type == "cuda")
    return prefetch(loader, training.prepare_batch)


class StopRequest:
    """SIGTERM, SIGUSR1 (Slurm's warning, torchrun's restart) and Ctrl-C ask the loop to save and leave.

    A second Ctrl-C leaves at once; not within seconds, since torchrun passes on the one that its processes had, too.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = math.inf
        for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(one, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and time.monotonic() > self._since + SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED_BY_SIGNAL


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=False)
    machine = start_machine(args.device, args.precision)
    train(args, machine)
    stop_machine()  # not after an error: the others would leave, and torchrun end this process, before it has said it


def train(args: argparse.Namespace, machine: Machine) -> None:
    # Check
    check_arguments(args, machine.world_size)
    run = open_run(args, machine)
    start_logging(machine.is_main, run.path / "log.txt")
    log_provenance(machine, args.seed)
    logger.info("run folder: %s", run.path)
    state = find_state(args, run)
    if state is not None:
        for change in merge_arguments(args, saved_arguments(state["config"])):
            logger.info("changed on resume: %s", change)
        check_batch(args, machine.world_size)
        machine = replace(machine, precision=resolve_precision(args.precision, machine.device))
    check_latent_cache(args)

    # Space and data
    space = load_space(args.vae, args.in_channels).to(machine.device)
    model = model_config(args, space)
    data = DataConfig.from_dict(state["config"]["data"]) if state else data_config(args)
    dataset = PairedFolder(
        args.data_path, args.mask_path, data, args.mask_type,
        seed=args.seed, progress=machine.is_main, normalize=args.normalize_masks,
    )  # fmt: skip
    config = {
        "model": model,
        "transport": transport_config(args),
        "space": space_config(space),
        "data": dataset.config.to_dict(),
        "train": plain_arguments(args),
        "machine": {"world_size": machine.world_size, "device": machine.device.type, "precision": machine.precision},
    }
    if state is not None:
        check_same_space(config["space"], state["config"]["space"])
    if machine.is_main:
        write_json(run.path / "config.json", config)

    # Model, EMA, optimiser, resume
    training = Training(args, config, machine, space)
    logger.info("%s: %.1f million parameters", args.model, count_parameters(training.model) / 1e6)
    if state is not None:
        training.load(state)
        logger.info("continuing after step %d", training.step)
        log_machine_changes(state["config"].get("machine", {}), config["machine"])
    elif args.init_from:
        for line in training.start_from(args.init_from):
            logger.info("%s", line)
    if machine.is_main:
        note_images(training, dataset)
        training.intensity = SourceIntensity.of(dataset.windows, dataset.dtypes, dataset.stored_channels).to_dict()
        write_windows(run.path / "windows.csv", dataset)
        run.cut_metrics(training.step)
    training.prepare_model()
    run_loop(training, dataset, run)


def note_images(training: Training, dataset: PairedFolder) -> None:
    """Remember what the model has seen, so that evaluate.py can tell a leak. Unknown after --init-from.

    Published weights have seen ImageNet and none of a lab's images.
    """
    before, source = training.trained_on, training.args.init_from
    if (source is None or Path(source).name in PUBLISHED_URLS) and (training.step == 0 or before is not None):
        images = set(dataset.image_hashes)
        if before is not None and images != set(before):
            logger.warning("changed on resume: the images are others than before (%d now)", len(images))
        training.trained_on = sorted(images.union(before or ()))


def write_windows(path: Path, dataset: PairedFolder) -> None:
    """The gray values of every training image that became -1 and 1."""
    rows = [
        (pair.image_path.name, dtype, *window_columns(window).values())
        for pair, dtype, window in zip(dataset.pairs, dataset.dtypes, dataset.windows, strict=True)
    ]
    write_csv(path, ("name", "dtype", "window_low", "window_high"), rows)


def log_machine_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Another number of processes sees the same batches in the same order; only the noise is drawn anew."""
    for name, value in before.items():
        if now[name] != value:
            logger.warning(
                "changed on resume: %s: %s -> %s (equal in distribution, not bit for bit)", name, value, now[name]
            )


def data_config(args: argparse.Namespace) -> DataConfig:
    window = tuple(args.window) if args.window else None
    return DataConfig(
        image_size=args.image_size, num_classes=args.num_classes, crop=args.crop,
        window=window, window_scope=args.window_scope, window_channels=args.window_channels,
        channels=args.in_channels,
    )  # fmt: skip


def run_loop(training: Training, dataset: PairedFolder, run: RunFolder) -> None:
    """All steps that are left, with metrics, previews and checkpoints on the way."""
    args, machine = training.args, training.machine
    training.total_steps = total = training.steps_in_all(len(dataset))
    epochs = (training.images_seen + (total - training.step) * args.global_batch_size) / len(dataset)
    logger.info("%d steps of %d images (%.1f epochs)", total, args.global_batch_size, epochs)
    previews = Previews(dataset, training) if machine.is_main else None
    cut_short = training.step > 0 and preview_is_due(training) and not run.preview_path(training.step).exists()
    if machine.is_main and cut_short:  # killed between a checkpoint and its preview
        save_preview(previews, run, training.step)
    if training.step >= total:
        logger.info("nothing left to do: the run is at step %d of %d", training.step, total)
        export_weights(training, run)
        return
    source = encode_once(dataset, training) or dataset
    if args.wandb:
        wandb_utils.start_run(run.path, run.path.name, training.config)
    stop = StopRequest()
    clock = WaitingClock(machine.device)
    bar = tqdm(
        clock.watch(step_batches(source, training)),
        initial=training.step, total=total, unit="step", disable=not (machine.is_main and sys.stderr.isatty()),
    )  # fmt: skip
    started, steps_before = time.perf_counter(), training.step
    for batch in bar:
        training.train_step(batch)
        step, last = training.step, training.step == total
        if step % args.log_every == 0 or last:
            metrics = training.read_metrics()
            seconds = time.perf_counter() - started
            metrics["speed/images_per_sec"] = (step - steps_before) * args.global_batch_size / seconds
            metrics["speed/waiting_share"] = machine.max_over_ranks(clock.read_seconds() / seconds)
            if machine.is_main:
                record_metrics(training, run, metrics, total)
            training.check_finite(run)
            started, steps_before = time.perf_counter(), step
        stopped = machine.any_rank(stop.signal is not None) and not last
        if step % args.ckpt_every == 0 or last or stopped:
            save(training, run, last)
        if machine.is_main and preview_is_due(training) and not stopped:
            save_preview(previews, run, step)
        if stopped:
            logger.warning("signal received: leaving at step %d; the same command continues", step)
            sys.exit(stop.exit_code)
    export_weights(training, run)
    machine.barrier()
    wandb_utils.finish()
    logger.info("done: %d steps; sample with --ckpt %s", total, run.checkpoint_path(total))


def save(training: Training, run: RunFolder, last: bool) -> None:
    """A checkpoint of weights that are finite and were still learning; all ranks come here together.

    In the middle of skipped steps nothing is saved but the end of the run: weights that have blown up can be finite,
    and give no finite gradient any more. The steps since the checkpoint before are taken again.
    """
    training.check_finite(run)
    if training.skipped_in_a_row.item() and not last:
        logger.warning("step %d was skipped (not finite): no checkpoint now", training.step)
        return
    state = training.state()
    if training.machine.is_main:
        logger.info("saved %s", run.save(state))


def export_weights(training: Training, run: RunFolder) -> None:
    if training.args.export_safetensors and training.machine.is_main:
        weights = {"ema": training.ema.state_dict(), "config": training.config, "step": training.step}
        export_safetensors(run.path / "model.safetensors", weights)
        logger.info("exported %s", run.path / "model.safetensors")


def record_metrics(training: Training, run: RunFolder, metrics: dict[str, float], total: int) -> None:
    """metrics.jsonl first, then the log, then wandb."""
    step, lr = training.step, training.optimizer.param_groups[0]["lr"]
    metrics = {**metrics, "train/lr": lr}
    run.log_metrics({"step": step, **metrics})
    speed, waiting = metrics["speed/images_per_sec"], metrics["speed/waiting_share"]
    left = (total - step) * training.args.global_batch_size / speed
    notes = f", {100 * waiting:.0f}% of the time waiting for data" if waiting >= WAITING_WORTH_SAYING else ""
    if metrics["train/skipped_steps"]:
        notes += f", {metrics['train/skipped_steps']:.0f} steps skipped (not finite)"
    logger.info(
        "step %d of %d: loss %.4f, gradient norm %.3f, lr %.2e, %.1f images/s, %s left%s",
        step, total, metrics["train/loss"], metrics["train/grad_norm"], lr, speed,
        time.strftime("%H:%M:%S", time.gmtime(left)), notes,
    )  # fmt: skip
    wandb_utils.log(metrics, step)


def preview_is_due(training: Training) -> bool:
    return training.step % training.args.sample_every == 0 or training.step >= training.total_steps


def save_preview(previews: Previews, run: RunFolder, step: int) -> None:
    picture = previews.draw()
    path = run.preview_path(step)
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))
    logger.info("preview: %s", path)
    wandb_utils.log_image("preview", path, step)


def run() -> None:
    """Entry point of the script and of ``sit-train``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
