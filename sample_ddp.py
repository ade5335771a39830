"""Bulk sampling: a folder of masks becomes a data set of synthetic image/label pairs.

    torchrun --nproc_per_node=N sample_ddp.py ODE --ckpt CKPT.pt --data-path IMAGES --mask-path MASKS --num-classes 2 \\
        --sample-dir samples/

The same command runs without torchrun. It writes

    SAMPLE_DIR/images/NAME.png       synthetic images (NAME_0001.png ... if --samples-per-mask is above 1); TIFF if the
                                     model has neither one nor three channels, or for float gray values
    SAMPLE_DIR/masks/NAME.png        the label of each image: the same pixels, the file's own values
    SAMPLE_DIR/manifest.csv          one row per image: mask, seed, index, view, solver, checkpoint
    SAMPLE_DIR/contact_sheet.png     a few masks, synthetic images and (with --data-path) real images
    SAMPLE_DIR/settings.json         what the set was made with
    SAMPLE_DIR/cellpose/ ...         with --export cellpose | stardist | coco | roi | geojson: as these programs read it
    SAMPLE_DIR/attempts/NAME.json    with --min-fidelity: the best attempt at each image so far

Run the same command to continue. It makes images that are missing or incomplete, and refuses a folder made with other
settings. With --data-path, only masks with an image there are used, and the contact sheet shows that image. With
--tile, images have the height and width of their masks instead of the training size. With --shard I/N, each task of a
job array makes a part of the set.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.errors import end_at_interrupt

    end_at_interrupt()

import argparse
import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cli import (
    add_judge_arguments,
    add_machine_arguments,
    add_mask_arguments,
    add_sampling_arguments,
    add_solver_parsers,
)
from common.arguments import part, positive_fraction, positive_int
from common.disk import SETTINGS
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from dataset.gray import INTENSITIES, SOURCE_WINDOWS, choose_format
from dataset.look_choice import LookChoice
from dataset.mask_folder import MaskFolder
from engine.agreement import agree_on_file, agree_on_set
from engine.machine import Machine, check_compiler, log_provenance, start_machine, stop_machine
from engine.sampling import ImageSampler, SamplingSettings, TrainedModel
from layouts.recombine import read_origin
from settings import inputs_of, load_checkpoint, look_choice, open_masks, own_judge_request, sampling_settings
from synthetic.bulk import draw_missing
from synthetic.export import EXPORTS, check_export, export_set
from synthetic.gallery import GALLERY, write_gallery
from synthetic.manifest import MANIFEST
from synthetic.reader import SampleSet
from synthetic.writer import FREE_SETTINGS, Attempt, SetWriter, plan_jobs

if TYPE_CHECKING:
    from evaluation.redraw import Redraw

logger = logging.getLogger("sample_ddp")
MAX_ATTEMPTS = 4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    for mode in add_solver_parsers(parser).values():
        group = mode.add_argument_group("input and output")
        group.add_argument(
            "--mask-path", type=Path, required=True, metavar="MASKS", help="folder of masks, or one mask file"
        )
        add_mask_arguments(group)
        group.add_argument(
            "--data-path",
            type=Path,
            metavar="IMAGES",
            help="real images: only use masks that have one, and name it in the manifest",
        )
        group.add_argument("--sample-dir", type=Path, default=Path("samples"), help="folder to write the data set to")
        group.add_argument(
            "--shard", type=part, metavar="I/N",
            help="make only part I of N of the set, as task I of a job array does; the part that ends last finishes "
            "the set",
        )  # fmt: skip
        group.add_argument("--samples-per-mask", type=positive_int, help="images per mask (default: 1)")
        group.add_argument(
            "--num-samples",
            "--num-fid-samples",
            type=positive_int,
            help="total number of images, spread evenly over the masks (default: by --samples-per-mask)",
        )
        group.add_argument(
            "--export", nargs="+", choices=["plain", *EXPORTS], default=["plain"],
            help="also write the set in the formats of these programs (roi: Fiji, geojson: QuPath); plain: no export",
        )  # fmt: skip
        group.add_argument("--npz", action="store_true", help="also write SAMPLE_DIR.npz for FID programs, as SiT does")
        group.add_argument(
            "--gallery", action="store_true",
            help="also write SAMPLE_DIR/gallery.html, to look at: masks, images, with --data-path real ones",
        )  # fmt: skip
        group.add_argument(
            "--intensity", choices=INTENSITIES, default="display",
            help="gray values to write; display: 8 bits over the whole range; source: type and gray range of the "
            "training images",
        )  # fmt: skip
        group.add_argument(
            "--source-window", choices=SOURCE_WINDOWS,
            help="with --intensity source: give each image the gray range of a random training image (draw), or the "
            "median range of all (median) (default: draw)",
        )  # fmt: skip
        add_redraw_arguments(mode)
        add_sampling_arguments(mode, cfg_scale=1.0)
        add_machine_arguments(mode, can_compile=True)
    args = parser.parse_args(argv)
    check_redraw_arguments(parser, args)
    return args


def add_redraw_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags on sampling an image again. Defaults are filled in later, to detect flags that have no effect."""
    group = parser.add_argument_group("sample an image again if it does not follow its mask")
    group.add_argument(
        "--min-fidelity", type=positive_fraction, metavar="DICE",
        help="sample an image again if a small segmenter (trained on real pairs first) finds its mask with a "
        "lower Dice than this (evaluate.py fidelity shows what real images reach)",
    )  # fmt: skip
    group.add_argument(
        "--max-attempts", type=positive_int, metavar="N",
        help=f"most attempts per image; if all fail, the best stays, marked in the manifest (default: {MAX_ATTEMPTS})",
    )  # fmt: skip
    add_judge_arguments(group)


def check_redraw_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse --min-fidelity without real pairs."""
    if args.min_fidelity is not None and (args.judge_images is None or args.judge_masks is None):
        parser.error("--min-fidelity needs --judge-images IMAGES and --judge-masks MASKS: real pairs for its judge")


def set_settings(
    args: argparse.Namespace,
    settings: SamplingSettings,
    trained: TrainedModel,
    masks: MaskFolder,
    looks: LookChoice | None,
) -> dict[str, Any]:
    """All that decides the content of a set, for settings.json, but the note of its judge (``redraw``)."""
    return {
        "ckpt_sha256": trained.sha256,
        "weights": "raw" if args.raw_weights else "ema",
        "step": trained.step,
        "seed": args.seed,
        "sampling": settings.to_dict(),
        "samples_per_mask": args.samples_per_mask,
        "num_samples": args.num_samples,
        "intensity": args.intensity,
        "source_window": args.source_window,
        "tile_scale": masks.whole_scale,
        "mask_rule": asdict(masks.rule),
        "mask_origin": read_origin(args.mask_path if args.mask_path.is_dir() else args.mask_path.parent),
        "masks": len(masks.names),
        "mask_names_sha256": hashlib.sha256("\n".join(masks.names).encode()).hexdigest(),
        "patch_pixels": trained.model.patch_size * trained.space.factor,
        "data_config": trained.data.to_dict(),
        "trained_on": trained.trained_on,
        "labelled_on": trained.labelled_on,
        "redraw": None,
        "look": None if looks is None else looks.origin,
        "precision": args.precision,
        "compile": args.compile,
        "per_proc_batch_size": args.per_proc_batch_size,
    }


def compared(args: argparse.Namespace, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes must have the same: what decides the content of a set, the part that is made, and its judge.

    Only the first process reads the judge's real pairs.
    """
    decisive = {name: value for name, value in made_with.items() if name not in FREE_SETTINGS}
    judge = ("min_fidelity", "max_attempts", "judge_mask_type", "judge_steps")
    flags = {f"`{name}`": getattr(args, name) for name in judge}
    return decisive | flags | {"`shard`": args.shard and "{}/{}".format(*args.shard)}


# ---------------------------------------------------------------------------------------------------------- the work


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=False)
    settings = sampling_settings(args)
    if args.npz and args.tile:
        raise InputError("--npz holds images of one size, and --tile keeps each mask's own: leave one of them out.")
    machine = start_machine(args.device, args.precision)
    with machine.sharing_errors():
        if args.compile:
            check_compiler()
        sample(args, settings, machine)
        stop_machine(machine)


@torch.inference_mode()
def sample(args: argparse.Namespace, settings: SamplingSettings, machine: Machine) -> None:
    start_logging(machine.is_main)
    trained = load_checkpoint(args, machine)
    looks = look_choice(args, trained)
    form = choose_format(args.intensity, args.source_window, trained.data, trained.intensity)
    with machine.main_first("check the masks"):  # the others reuse its checks
        masks = open_masks(args, trained.data, trained.mask_type, progress=machine.is_main)
    if looks is not None:
        looks.check_masks(masks.names)
    exports = [name for name in args.export if name != "plain"]
    check_export(exports, masks.rule)
    jobs = plan_jobs(masks.names, args.samples_per_mask, args.num_samples)
    made_with = set_settings(args, settings, trained, masks, looks)
    agree_on_set(machine, compared(args, made_with), list(masks.paths.values()))
    redraw, made_with["redraw"] = load_redraw(args, trained, machine)
    sampler = ImageSampler(trained.model, trained.transport, trained.space, machine, settings, args.compile)
    writer = SetWriter(args.sample_dir, masks, form, jobs, made_with, looks)
    machine.on_main(lambda: open_set(args, writer), "open the folder of the set")
    agree_on_file(
        machine, args.sample_dir / SETTINGS, "settings of the set",
        "All processes must see `sample_dir`: put it on a disk that all machines share, or start each machine by "
        "itself with its own `shard` and copy the folders into one.",
    )  # fmt: skip
    log_provenance(machine, args.seed)

    number, count = args.shard or (1, 1)
    mine = jobs[number - 1 :: count][machine.rank :: machine.world_size]
    todo = writer.missing(mine)
    whose = " (counts of this process)" if machine.world_size > 1 else ""
    logger.info("%d images to make, %d are there already%s", len(todo), len(mine) - len(todo), whose)
    again = machine.to_main([writer.image_name(job) for job, _ in todo], "look at what is there")
    machine.on_main(lambda: writer.forget(again), "correct the manifest")
    draw_missing(writer, sampler, todo, args.per_proc_batch_size, redraw, machine.is_main and sys.stderr.isatty())
    machine.barrier("draw their images")
    if machine.is_main:
        if args.shard is None or writer.take_over():
            finish(args, writer, exports, machine)
        else:
            logger.info("part %d of %d is done; the part that ends last finishes the set", number, count)
    machine.barrier("write manifest and exports")
    writer.close()


def open_set(args: argparse.Namespace, writer: SetWriter) -> None:
    """Check what the command will write to, and make the folder of the set."""
    if args.npz:
        writer.check_npz(inputs_of(args))
    writer.open(shared=args.shard is not None)


def finish(args: argparse.Namespace, writer: SetWriter, exports: Sequence[str], machine: Machine) -> None:
    """Write what needs all images: manifest, contact sheet, exports, gallery. The other processes wait."""
    writer.write_manifest()
    machine.progress()
    if args.min_fidelity is not None:
        found = [attempt for job in writer.jobs if (attempt := writer.attempt(job)) is not None]
        log_attempts(args.min_fidelity, found, len(writer.jobs))
    writer.write_contact_sheet()
    images = [writer.image_path(job) for job in writer.jobs]
    for name in exports:
        logger.info("exported %s", export_set(args.sample_dir, images, writer.masks.rule, name))
        machine.progress()
    if args.npz:
        writer.write_npz()
        machine.progress()
    if args.gallery:
        count = write_gallery(SampleSet(args.sample_dir), args.sample_dir / GALLERY)
        logger.info("%s: %d of %d pairs", args.sample_dir / GALLERY, count, len(writer.jobs))
    logger.info("done: %d pairs and %s in %s", len(writer.jobs), MANIFEST, args.sample_dir)


def load_redraw(
    args: argparse.Namespace, trained: TrainedModel, machine: Machine
) -> tuple[Redraw | None, dict[str, Any] | None]:
    """With --min-fidelity: the judge, equal on all ranks, and its note for the settings of the set."""
    if args.min_fidelity is None:
        return None, None
    from evaluation.judge import judge_of_folders  # seconds to import
    from evaluation.redraw import Redraw, TrainedJudge, portable_judge

    def train() -> TrainedJudge:
        request = own_judge_request(args, machine.device)
        found = judge_of_folders(request, trained.data, args.normalize_masks, trained.mask_type)
        return portable_judge(found, args.min_fidelity, args.max_attempts or MAX_ATTEMPTS)

    with torch.inference_mode(False):  # training needs gradients
        judge = machine.on_main(train, "train the judge")
    judge = machine.from_main(judge, "train the judge")
    return Redraw.from_trained(judge, trained.data, machine.device), judge.note


def log_attempts(min_fidelity: float, found: Sequence[Attempt], count: int) -> None:
    """Log how many of ``count`` images were sampled again, and how many stayed below --min-fidelity."""
    again = sum(attempt.tried > 1 for attempt in found)
    missed = sum(not attempt.reached for attempt in found)
    logger.info(
        "--min-fidelity %g: %d of %d images were drawn again; %d did not reach it, their best attempts stay (column "
        "fidelity_reached of the manifest)", min_fidelity, again, count, missed,
    )  # fmt: skip


def run() -> None:
    """Entry point of the script and of ``sit-sample-ddp``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
