"""Train SiT on image/mask pairs.

    torchrun --nproc_per_node=N train.py --data-path IMAGES --mask-path MASKS --image-size 256 --num-classes 2 \\
        --model SiT-B/2 --epochs 100 --global-batch-size 64 --wandb

The same command runs without torchrun on one GPU or on a CPU (there: ``--vae none --model SiT-Ti/8 --image-size 64``).
Run the same command with the same ``--run-name`` to continue. The run ends with the weights of an uninterrupted one.

How a run continues:
 1. The newest whole checkpoint of the run folder is used. Damaged ones are skipped with a warning.
 2. If there is none, --ckpt gives weights, EMA, optimiser and step. Without --ckpt, --init-from gives weights. Without
    both, the model is new.
 3. A flag that is not given keeps the checkpoint's value. A flag that is given and differs is refused if its field is
    fixed (architecture, transport, data). If the field may change, the new value is used and logged. The folders of
    images, masks and results, --device, --compile, --recompute-activations and --wandb never come from a checkpoint.
    Other places do: give them again if they have moved. The autoencoder must stay the same. engine/config.py has all
    fields.
 4. No random state is saved. Random numbers follow from (seed, step, rank), batches from (seed, images seen so far).
    With another number of processes or --global-batch-size, the run continues in the data where it stopped.
 5. The checkpoint holds the sums of the metrics since the last line. Lines after its step are cut and written again.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.errors import end_at_interrupt

    end_at_interrupt()

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import wandb_utils
from cli import add_data_arguments, add_machine_arguments, add_transport_arguments
from common.arguments import (
    batch_size,
    fraction,
    guidance_scale,
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    seed_number,
)
from common.disk import real_path, write_csv, write_json
from common.errors import CommandParser, InputError, as_flag, run_command
from common.log import start_logging
from dataset.folders import PairedFolder
from dataset.gray import window_columns
from dataset.groups import groups_of, read_groups
from dataset.looks import LOOKS, NO_LOOK
from dataset.unlabelled import ImageFolder, read_unlabelled, refuse_shared_images
from engine.agreement import agree_on_checkpoint, agree_on_run
from engine.autoencoder import check_same_space, load_space
from engine.checkpoint import naming_checkpoint, read_checkpoint, saved_config
from engine.config import LOCAL, NO_CACHE, OptimiserConfig, RunConfig, TrainConfig
from engine.loop import run_loop
from engine.machine import (
    Machine,
    check_compiler,
    log_command,
    log_machine,
    log_machine_changes,
    resolve_precision,
    start_machine,
    stop_machine,
)
from engine.run_folder import CONFIG, LOG, RunFolder, choose_run_folder
from engine.training import Training
from models import SiT_models
from presets import PRESETS, Preset
from settings import resolve

logger = logging.getLogger("train")
MOST_WORKERS = 1024
MOST_UNLABELLED = 0.9


def build_parser() -> CommandParser:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    add_run_arguments(parser)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_look_arguments(parser)
    add_transport_arguments(parser)
    add_optimisation_arguments(parser)
    add_logging_arguments(parser)
    add_machine_arguments(parser, can_compile=True)
    for section in (OptimiserConfig, TrainConfig):
        parser.set_defaults(**{one.name: one.default for one in fields(section) if one.default is not MISSING})
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the pairs lie, and where the run does."""
    group = parser.add_argument_group("data and run")
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="use the flags of a measured run (benchmarks/presets.md); your own flags override them",
    )
    group.add_argument("--data-path", type=Path, required=True, metavar="IMAGES", help="folder of images")
    group.add_argument("--mask-path", type=Path, required=True, metavar="MASKS", help="folder of masks, paired by name")
    group.add_argument("--results-dir", type=Path, help="folder that holds the run folders")
    group.add_argument("--run-name", help="run folder: new, or one to continue (default: new, with a number)")
    group.add_argument("--ckpt", type=Path, metavar="FILE", help="branch off from this checkpoint, in a new run folder")
    group.add_argument(
        "--init-from",
        metavar="FILE",
        help="start a new run from these weights (a checkpoint of this project, or SiT's by name or file)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, and what it sees of images and masks."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=list(SiT_models), default="SiT-B/2", metavar="NAME",
        help="SiT-SIZE/PATCH, sizes Ti S B L XL, patches 2 4 8 16",
    )  # fmt: skip
    group.add_argument("--image-size", type=positive_int, default=256, help="side of the training images in pixels")
    group.add_argument(
        "--in-channels", type=positive_int, default=3,
        help="channels of the images; with --vae none also 1 for gray, and 2, 4, ... for fluorescence",
    )  # fmt: skip
    group.add_argument("--num-classes", type=positive_int, default=2, help="number of classes, background included")
    group.add_argument(
        "--vae",
        help="autoencoder: ema or mse (of Stable Diffusion, downloaded once), a diffusers folder, or none to train on "
        "pixels",
    )  # fmt: skip
    group.add_argument(
        "--latent-cache", metavar="FOLDER",
        help=f"where encoded images are kept, or {NO_CACHE} to encode anew at each step (default: RESULTS_DIR/latents "
        "for --crop center, if the run is long enough to gain from it)",
    )  # fmt: skip
    group.add_argument(
        "--no-mask-detail", action="store_true",
        help="only give the model the class fractions of each patch, not its pixels",
    )  # fmt: skip
    group.add_argument(
        "--no-patch-overlap", action="store_true", help="output patches side by side, as in SiT (may show a grid)"
    )
    group.add_argument(
        "--mask-dropout", type=fraction, default=0.1,
        help="fraction of examples trained without their mask, for guidance; 0 if you only sample with --cfg-scale 1",
    )  # fmt: skip
    group.add_argument(
        "--time-scale", type=positive_float,
        help="factor on t before its sine embedding (default: 1000 for pixels; 1 for latents, as SiT's weights need)",
    )  # fmt: skip


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    """Length of the run, batches, learning rate."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, help="passes over the labelled images")
    group.add_argument("--max-steps", type=positive_int, help="total number of steps; replaces --epochs")
    group.add_argument("--global-batch-size", type=batch_size, help="images per step over all processes")
    group.add_argument(
        "--accumulate", type=positive_int, metavar="PARTS",
        help="split a batch into this many parts: the same update with less memory",
    )  # fmt: skip
    group.add_argument(
        "--recompute-activations", action="store_true",
        help="compute activations again in the backward pass: much less memory, slower steps",
    )  # fmt: skip
    group.add_argument("--lr", type=positive_float, help="highest learning rate of AdamW")
    group.add_argument(
        "--warmup-steps", type=non_negative_int, help="steps over which the learning rate rises to its full value"
    )
    group.add_argument(
        "--cooldown-steps", type=non_negative_int, help="number of last steps, over which the learning rate falls to 0"
    )
    group.add_argument("--weight-decay", type=non_negative_float, help="weight decay of AdamW")
    group.add_argument("--grad-clip", type=non_negative_float, help="largest gradient norm; 0 means no limit")
    group.add_argument(
        "--ema-decay", type=fraction,
        help="decay of the averaged weights (EMA); rises to this value over the first steps",
    )  # fmt: skip
    group.add_argument("--seed", "--global-seed", type=seed_number, help="seed of all random numbers")


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run writes, and how often; its loader processes."""
    group = parser.add_argument_group("logging and checkpoints")
    group.add_argument("--log-every", type=positive_int, help="steps between lines of the log and of metrics.jsonl")
    group.add_argument(
        "--ckpt-every", type=positive_int, help="steps between checkpoints; the last step is always saved"
    )
    group.add_argument("--keep", type=positive_int, help="number of newest checkpoints to keep")
    group.add_argument(
        "--export-safetensors", action="store_true",
        help="at the end, also write model.safetensors with averaged weights and configuration",
    )  # fmt: skip
    group.add_argument("--sample-every", type=positive_int, help="steps between previews: pictures of a few masks")
    group.add_argument("--cfg-scale", type=guidance_scale, help="guidance scale of the previews; 1 means none")
    group.add_argument("--wandb", action="store_true", help="also log to Weights and Biases")
    group.add_argument(
        "--num-workers", type=number(int, 0, MOST_WORKERS),
        help="loader processes beside each training process (default: 4, or 0 if one thread is fast enough)",
    )  # fmt: skip


def add_look_arguments(parser: argparse.ArgumentParser) -> None:
    """The look of images, and images without masks."""
    group = parser.add_argument_group("looks and unlabelled images")
    group.add_argument(
        "--look", choices=LOOKS, default=NO_LOOK,
        help="reference: the look of an image (colour, contrast, grain), measured from it, is an input of the model",
    )  # fmt: skip
    group.add_argument(
        "--look-dropout", type=fraction, default=0.15,
        help="fraction of examples trained without their look, for --look-scale and for sampling without a look",
    )  # fmt: skip
    group.add_argument(
        "--unlabelled-path", nargs="+", metavar="IMAGES", help="folders of images without masks, which teach looks"
    )
    group.add_argument(
        "--unlabelled-mask-path", nargs="+", metavar="MASKS",
        help="for each --unlabelled-path a folder of soft pseudo-masks: probability of cell, or one plane per class",
    )  # fmt: skip
    group.add_argument(
        "--unlabelled-share", type=number(float, 0.001, MOST_UNLABELLED), help="fraction of a batch that is unlabelled"
    )
    group.add_argument("--groups", metavar="CSV", help="table of groups, with the columns 'name' and 'group'")
    group.add_argument(
        "--group-column", metavar="COLUMN", help="column of --groups to use instead of 'group', such as patient"
    )
    group.add_argument("--balance-groups", action="store_true", help="train on each group equally often")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; ``given`` of the result names those that stood on the command line or in the preset."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if args.preset is None:
        return args
    both = parser.parse_args([*PRESETS[args.preset].flags.split(), *words])  # the later one of two equal flags wins
    if "epochs" in args.given and "max_steps" not in args.given:
        both.max_steps, both.given = None, both.given - {"max_steps"}
    return both


# ------------------------------------------------------------------------------------------------------------ the run


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=False)
    machine = start_machine(args.device, args.precision)
    with machine.sharing_errors():
        train(args, machine)
        stop_machine(machine)


def train(args: argparse.Namespace, machine: Machine) -> None:
    """Check the arguments, prepare the run, and train to the last step."""
    check_arguments(args)
    if not continues(args):
        resolve(args, machine.world_size)  # refuse what is wrong before there is a folder
    run = open_run(args, machine)
    start_logging(machine.is_main, run.path / LOG)
    log_command()
    logger.info("run folder: %s", run.path)
    if preset := PRESETS.get(args.preset):
        logger.info("preset %s: %s", args.preset, preset.flags)
        logger.info(
            "your own flags override it; without them it gave a Dice ratio of %s (%s)", preset.ratio, preset.record
        )
    with run.removed_if_refused():
        training, dataset, unlabelled = prepare(args, machine, run)
    run_loop(training, dataset, run, unlabelled)


def prepare(
    args: argparse.Namespace, machine: Machine, run: RunFolder
) -> tuple[Training, PairedFolder, list[ImageFolder]]:
    """Do everything that can refuse the user's input.

    Returns:
        The training at its next step, the labelled pairs, and the folders of unlabelled images.
    """
    path, state = find_state(args, run, machine) or (None, None)
    with naming_checkpoint(path):
        saved = saved_config(path, state) if path and state else None
        if saved is not None:
            check_saved(saved)
        config = resolve(args, machine.world_size, saved)
    machine = replace(machine, precision=resolve_precision(config.train.precision, machine.device))
    log_machine(machine, config.optimiser.seed)
    run.keep = config.train.keep
    vars(args).update(  # for the message if memory runs out
        model=config.model.name,
        image_size=config.data.image_size,
        global_batch_size=config.optimiser.global_batch_size,
        accumulate=config.optimiser.accumulate,
    )
    with naming_checkpoint(path):
        space = load_space(config.train.vae, config.data.channels).to(machine.device)
        if state is not None:
            check_same_space(space, state["config"]["space"])
    dataset = PairedFolder(
        config.train.data_path, config.train.mask_path, config.data, config.train.mask_type,
        seed=config.optimiser.seed, progress=machine.is_main, normalize=config.train.normalize_masks,
    )  # fmt: skip
    images, masks = config.train.unlabelled_path, config.train.unlabelled_mask_path
    places = ["unlabelled_path", "unlabelled_mask_path"] if masks else ["unlabelled_path"]
    with naming(args, path, *places):
        unlabelled = read_unlabelled(images, masks, dataset, machine.is_main, config.train.normalize_masks)
    names = [name for one in (dataset, *unlabelled) for name in one.names]
    table, column = config.train.groups, config.train.group_column
    with naming(args, path, "groups"):
        groups = [] if table is None else groups_of(names, read_groups(Path(table), column))
    agree_on_run(machine, config, dataset, unlabelled, groups, space.fingerprint)
    if unlabelled:
        machine.on_main(lambda: refuse_shared_images(unlabelled, dataset), "compare images")
    config = replace(config, data=dataset.config)
    training = Training(config, machine, space, groups, named_by(args, path, "latent_cache"))
    millions = sum(parameter.numel() for parameter in training.model.parameters()) / 1e6
    logger.info("%s: %.1f million parameters", config.model.name, millions)
    if machine.is_main:
        write_json(run.path / CONFIG, training.record)
    with naming_checkpoint(path):
        set_weights(training, state)
    training.measure_looks(dataset, unlabelled)
    if machine.is_main:
        run.cut_metrics(training.step)
        training.note_images(dataset, unlabelled)
        write_windows(run.path / "windows.csv", dataset)
    training.prepare_model()
    return training, dataset, unlabelled


def named_by(args: argparse.Namespace, path: Path | None, *flags: str) -> Path | None:
    """The checkpoint, if it says the values of these flags. None if the user does."""
    return None if args.given & set(flags) else path


def naming(args: argparse.Namespace, path: Path | None, *flags: str) -> contextlib.AbstractContextManager[None]:
    """Add the checkpoint to errors about the values of these flags, if it says them."""
    return naming_checkpoint(named_by(args, path, *flags), *flags)


def check_arguments(args: argparse.Namespace) -> None:
    """Check what needs neither data nor checkpoint.

    Raises:
        InputError: names the flag and says how to mend it.
    """
    preset = PRESETS.get(args.preset, Preset("", "", ""))
    for name in preset.needs:
        if name not in args.given and not continues(args):
            raise InputError(f"--preset {args.preset} needs {as_flag(name)}, too: see {preset.record}.")
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
    if args.wandb:
        wandb_utils.check_wandb()
        wandb_utils.check_server()


def check_saved(saved: RunConfig) -> None:
    """Raise InputError if a checkpoint holds a value that its flag refuses."""
    parser = build_parser()
    for name, (value, resume) in saved.flags().items():
        if resume != LOCAL:
            parser.check_value(name, value)


def continues(args: argparse.Namespace) -> bool:
    """Whether there is a checkpoint whose values replace the defaults of flags."""
    named = args.run_name and RunFolder(args.results_dir / args.run_name, args.keep).steps()
    return bool(args.ckpt or named)


def open_run(args: argparse.Namespace, machine: Machine) -> RunFolder:
    """Make and lock the run folder on rank 0, and tell all ranks its path."""

    def make() -> RunFolder:
        names = args.model, args.path_type
        if args.ckpt and not args.run_name:
            saved = saved_config(args.ckpt, read_checkpoint(args.ckpt))
            names = saved.model.name, saved.transport.path_type
        title = "-".join(names)
        run = RunFolder(choose_run_folder(args.results_dir, args.run_name, title), args.keep)
        while not run.create(must_be_new=not args.run_name):  # another start took this number
            run = RunFolder(choose_run_folder(args.results_dir, args.run_name, title), args.keep)
        run.lock()
        return run

    made = machine.on_main(make, "open the run folder")
    path = machine.from_main(made.path if made else None, "open the run folder")
    return made or RunFolder(path, args.keep)


def find_state(args: argparse.Namespace, run: RunFolder, machine: Machine) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from and its path, the same on every rank. None for a new run."""

    def choose() -> tuple[Path, dict[str, Any]] | None:
        return run.newest() or ((args.ckpt, read_checkpoint(args.ckpt)) if args.ckpt else None)

    steps = run.steps()
    own = args.ckpt is not None and real_path(args.ckpt).parent == real_path(run.checkpoints)
    if own and steps and real_path(args.ckpt) != real_path(run.checkpoint_path(steps[-1])):
        raise InputError(
            f"--ckpt {args.ckpt} is not the newest checkpoint of its run folder (that is {steps[-1]:07d}.pt), and "
            "going back would overwrite what came after: branch off with another --run-name."
        )
    path, state = machine.on_main(choose, "look for a checkpoint") or (None, None)
    path = machine.from_main(path, "look for a checkpoint")
    agree_on_checkpoint(machine, run, path)
    if path is None:
        return None
    if args.ckpt and real_path(path) != real_path(args.ckpt):
        logger.info("--ckpt %s is not used: the run folder has a checkpoint of its own, %s", args.ckpt, path.name)
    return path, read_checkpoint(path) if state is None else state


def set_weights(training: Training, state: dict[str, Any] | None) -> None:
    """Load weights and counters of the checkpoint. For a new run, load the weights of --init-from if it is given."""
    if state is not None:
        training.load(state)
        logger.info("continuing after step %d", training.step)
        log_machine_changes(state["config"].get("machine", {}), training.machine.describe())
    elif training.config.train.init_from:
        for line in training.start_from(training.config.train.init_from):
            logger.info("%s", line)


def write_windows(path: Path, dataset: PairedFolder) -> None:
    """Write the gray values of each training image that training maps to -1 and 1."""
    rows = [
        (pair.image_path.name, dtype, *window_columns(window).values())
        for pair, dtype, window in zip(dataset.pairs, dataset.dtypes, dataset.windows, strict=True)
    ]
    write_csv(path, ("name", "dtype", "window_low", "window_high"), rows)


def run() -> None:
    """Entry point of the script and of ``sit-train``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
