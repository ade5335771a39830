"""Bulk sampling: a folder of masks becomes a data set of synthetic image/label pairs.

    torchrun --nproc_per_node=N sample_ddp.py ODE --ckpt CKPT.pt --data-path IMAGES --mask-path MASKS --num-classes 2 \\
        --sample-dir samples/

The same command runs without torchrun. It writes

    SAMPLE_DIR/images/NAME.png       synthetic images (NAME_0001.png ... with --samples-per-mask above 1; TIFF where
                                     the model has other than one or three channels, and for float gray values)
    SAMPLE_DIR/masks/NAME.png        the label each was made from: the same pixels, the file's own values
    SAMPLE_DIR/manifest.csv          one row per image: mask, seed, index, view, solver, checkpoint
    SAMPLE_DIR/contact_sheet.png     mask | synthetic | real (with --data-path) of the first few
    SAMPLE_DIR/settings.json         what the set was made with
    SAMPLE_DIR/cellpose/ ...         with --export cellpose | stardist | coco: as these segmenters read it
    SAMPLE_DIR/attempts/NAME.json    with --min-fidelity, which draws again what does not follow its mask

Started again it makes what is missing or torn, and refuses a folder made with other settings. With --data-path only
masks that have an image there are used, and that real image stands beside the synthetic one. With --tile the images
have their masks' own height and width instead of the training size.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import logging
import math
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from checkpoint import LOCK_FILE, file_sha256, lock_folder, write_atomically, write_csv, write_json
from data import MASK_TYPES, MaskFolder, MaskItem
from errors import CommandParser, InputError, list_some, one_line, run_command
from export import EXPORTS, check_export, export_set
from image_files import FileError, read_image, repeat_gray
from intensity import (
    INTENSITIES,
    SOURCE_WINDOWS,
    ImageFormat,
    choose_format,
    to_display,
    to_gray_values,
    window_columns,
)
from sampling import (
    ImageSampler,
    SamplingSettings,
    TrainedModel,
    check_fields,
    field_scale,
    image_seed,
    load_trained,
)
from train_utils import (
    Machine,
    add_machine_arguments,
    add_mask_arguments,
    add_sampling_arguments,
    add_solver_parsers,
    check_compiler,
    derived_seed,
    grid_image,
    log_provenance,
    mask_picture,
    positive_fraction,
    positive_int,
    start_logging,
    start_machine,
    stop_machine,
)

if TYPE_CHECKING:
    from evaluation.redraw import Redraw

logger = logging.getLogger("sample_ddp")

CONTACT_SHEET_ROWS = 8
CONTACT_SHEET_SIDE = 512  # pixels; larger images are shown smaller
MOST_IMAGES = 10_000_000
MOST_NAME_BYTES = 230  # file systems end at 255; a number and a suffix come behind
MAX_ATTEMPTS, JUDGE_STEPS, JUDGE_CACHE = 4, 400, Path("judges")

T = TypeVar("T")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    for mode in add_solver_parsers(parser).values():
        group = mode.add_argument_group("input and output")
        group.add_argument(
            "--mask-path", type=Path, required=True, metavar="MASKS", help="folder of masks (or one file)"
        )
        add_mask_arguments(group)
        group.add_argument(
            "--data-path", type=Path, metavar="IMAGES", help="use only masks with an image here, and show it beside"
        )
        group.add_argument("--sample-dir", type=Path, default=Path("samples"), help="where the data set goes")
        group.add_argument("--samples-per-mask", type=positive_int, help="images drawn from every mask (default: 1)")
        group.add_argument(
            "--num-samples", "--num-fid-samples", type=positive_int, help="images in all, spread evenly over the masks"
        )
        group.add_argument(
            "--export", nargs="+", choices=["plain", *EXPORTS], default=["plain"],
            help="also write the set as these segmenters read it; plain is the set itself",
        )  # fmt: skip
        group.add_argument("--npz", action="store_true", help="also write SAMPLE_DIR.npz for FID suites, as SiT does")
        group.add_argument(
            "--intensity", choices=INTENSITIES, default="display",
            help="display: 8 bits over the whole range; source: type and gray values of the training images",
        )  # fmt: skip
        group.add_argument(
            "--source-window", choices=SOURCE_WINDOWS,
            help="which of the training images' windows an image gets back: one drawn by its seed, or the median of "
            "all (default: draw)",
        )  # fmt: skip
        add_redraw_arguments(mode)
        add_sampling_arguments(mode, cfg_scale=1.0)
        add_machine_arguments(mode, can_compile=True)
    args = parser.parse_args(argv)
    check_redraw_arguments(parser, args)
    return args


def add_redraw_arguments(parser: argparse.ArgumentParser) -> None:
    """When to draw an image again. Defaults are filled in later, so that a flag without effect is seen."""
    group = parser.add_argument_group("drawing again what does not follow its mask")
    group.add_argument(
        "--min-fidelity", type=positive_fraction, metavar="DICE",
        help="draw an image again while a small segmenter, trained on real pairs first, finds its mask in it with a "
        "lower Dice than this (evaluate.py fidelity shows what real images reach)",
    )  # fmt: skip
    group.add_argument(
        "--max-attempts", type=positive_int, metavar="N",
        help=f"draws of an image; then the best one stays, marked in the manifest (default: {MAX_ATTEMPTS})",
    )  # fmt: skip
    group.add_argument("--judge-images", type=Path, metavar="IMAGES", help="real images that teach the segmenter")
    group.add_argument("--judge-masks", type=Path, metavar="MASKS", help="their masks")
    group.add_argument("--judge-mask-type", choices=MASK_TYPES, help="what those mask files hold (default: auto)")
    group.add_argument("--judge-steps", type=positive_int, help=f"its training steps (default: {JUDGE_STEPS})")
    group.add_argument(
        "--judge-cache", type=Path, metavar="FOLDER", help=f"where trained ones are kept (default: {JUDGE_CACHE})"
    )


def check_redraw_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line where a flag for drawing again has no effect, or the judge nothing to learn from."""
    names = ("max_attempts", "judge_images", "judge_masks", "judge_mask_type", "judge_steps", "judge_cache")
    given = [name for name in names if getattr(args, name) is not None]
    if args.min_fidelity is None and given:
        parser.error(f"--{given[0].replace('_', '-')} has no effect without --min-fidelity: leave it out")
    if args.min_fidelity is not None and (args.judge_images is None or args.judge_masks is None):
        parser.error("--min-fidelity needs --judge-images IMAGES and --judge-masks MASKS: real pairs for its judge")


# ------------------------------------------------------------------------------------------------------ what to make


@dataclass(frozen=True)
class Job:
    """One image to make."""

    name: str  # of the synthetic pair, without suffix
    mask_name: str
    index: int  # in the set: with the seed it decides the noise (and the window of a random crop)


def plan_jobs(mask_names: Sequence[str], samples_per_mask: int | None, num_samples: int | None) -> list[Job]:
    """All images of a set, ordered by index = number of the mask x samples per mask + number of the sample.

    With ``num_samples``, every mask gets one image before any mask gets its next.

    Raises:
        InputError: both are given and ask for different things, or too much; a name is too long.
    """
    if num_samples and samples_per_mask and num_samples > samples_per_mask * len(mask_names):
        raise InputError(
            f"--num-samples {num_samples} is more than --samples-per-mask {samples_per_mask} makes of "
            f"{len(mask_names)} masks: leave one of them out."
        )
    per_mask = samples_per_mask or (math.ceil(num_samples / len(mask_names)) if num_samples else 1)
    if per_mask * len(mask_names) > MOST_IMAGES:
        raise InputError(f"{per_mask} images from each of {len(mask_names)} masks: a set has at most {MOST_IMAGES:,}.")
    long = [name for name in mask_names if len(name.encode()) > MOST_NAME_BYTES]
    if long:
        raise InputError(f"--mask-path: names of above {MOST_NAME_BYTES} bytes are too long: {list_some(long)}.")
    jobs = [
        Job(f"{mask}_{copy + 1:04d}" if per_mask > 1 else mask, mask, number * per_mask + copy)
        for copy in range(per_mask)
        for number, mask in enumerate(mask_names)
    ][:num_samples]
    return sorted(jobs, key=lambda job: job.index)


def window_rng(seed: int, job: Job) -> np.random.Generator:
    """Decides the window of a random crop; it follows from (seed, index)."""
    return np.random.default_rng(derived_seed(seed, job.index, 1))


def load_mask(masks: MaskFolder, job: Job, seed: int) -> MaskItem:
    """The job's mask, cut to its window."""
    return masks.load(job.mask_name, rng=window_rng(seed, job))


def set_settings(
    args: argparse.Namespace,
    settings: SamplingSettings,
    trained: TrainedModel,
    masks: MaskFolder,
    judged: dict[str, Any] | None,
) -> dict[str, Any]:
    """What decides the content of a set; a folder holds one set only. ``judged`` is the note of its judge, if any."""
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
        "masks": len(masks.names),
        "mask_names_sha256": hashlib.sha256("\n".join(masks.names).encode()).hexdigest(),
        "data_config": trained.data.to_dict(),
        "trained_on": trained.trained_on,
        "filter": judged,
        "precision": args.precision,
        "compile": args.compile,
        "per_proc_batch_size": args.per_proc_batch_size,
    }


# Change the speed, and the images by a rounding difference only: a set may be finished with other values.
FREE_SETTINGS = ("precision", "compile", "per_proc_batch_size")


def check_sample_dir(sample_dir: Path, settings: dict[str, Any]) -> None:
    """The folder is new, empty, or was made with the same settings; nothing in it is touched.

    Raises:
        InputError: it holds something else.
    """
    path = sample_dir / "settings.json"
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path}: damaged; remove {sample_dir} or give another --sample-dir.") from error
        if not isinstance(old, dict):
            raise InputError(f"{path}: not written by this command; give another --sample-dir.")
        new = json.loads(json.dumps(settings))
        names = [name for name in new if name not in FREE_SETTINGS and old.get(name) != new[name]]
        if names:
            changes = ", ".join(f"{name} {old.get(name)} -> {new[name]}"[:100] for name in names)
            raise InputError(
                f"--sample-dir {sample_dir} holds a set made with other settings ({changes}): give another folder."
            )
    elif sample_dir.is_dir() and any(entry.name != LOCK_FILE for entry in sample_dir.iterdir()):
        raise InputError(
            f"--sample-dir {sample_dir} is not empty and holds no settings.json of this command: give another."
        )


def open_sample_dir(sample_dir: Path, settings: dict[str, Any]) -> IO[bytes]:
    """Check, make and lock the folder, and write down what it is made with.

    Returns:
        The lock.

    Raises:
        InputError: it holds something else, or another process works in it.
    """
    check_sample_dir(sample_dir, settings)
    sample_dir.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(sample_dir, "give another --sample-dir")
    check_sample_dir(sample_dir, settings)  # another process may have been first
    write_json(sample_dir / "settings.json", settings)
    (sample_dir / "images").mkdir(exist_ok=True)
    (sample_dir / "masks").mkdir(exist_ok=True)
    if settings["filter"] is not None:
        (sample_dir / "attempts").mkdir(exist_ok=True)
    return lock


# --------------------------------------------------------------------------------------------------- files of a pair


def label_bytes(label: np.ndarray) -> tuple[bytes, str]:
    """A label as file content and suffix, every value kept: PNG for 8 and 16 bits, TIFF for the rest."""
    buffer = io.BytesIO()
    if label.ndim == 2 and label.dtype in (np.uint8, np.uint16):
        Image.fromarray(label).save(buffer, format="PNG")
        return buffer.getvalue(), ".png"
    if label.ndim == 2 and np.issubdtype(label.dtype, np.integer) and label.min() >= 0 and label.max() < 2**16:
        return label_bytes(label.astype(np.uint16))
    import tifffile

    tifffile.imwrite(buffer, label, compression="zlib", photometric="minisblack")
    return buffer.getvalue(), ".tif"


def image_name(job: Job, form: ImageFormat) -> str:
    """The job's synthetic image as the manifest names it: a path within the set."""
    return f"images/{job.name}{form.suffix}"


def image_path(sample_dir: Path, job: Job, form: ImageFormat) -> Path:
    """Where the job's synthetic image lies."""
    return sample_dir / image_name(job, form)


def image_is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
    """Whether a synthetic image decodes to the end with its height, width and channels."""
    try:
        return read_image(path).shape == shape
    except FileError:
        return False


def written_label(sample_dir: Path, job: Job) -> Path:
    """Where the label of a pair that was written lies."""
    path = sample_dir / "masks" / f"{job.name}.png"
    return path if path.is_file() else path.with_suffix(".tif")


def jobs_to_do(args: argparse.Namespace, masks: MaskFolder, jobs: Sequence[Job], form: ImageFormat) -> list[Job]:
    """Jobs whose image is missing or torn. Masks are read for images that are there only, by a few threads."""

    def is_done(job: Job) -> bool:
        there = image_path(args.sample_dir, job, form).is_file()
        if there and args.min_fidelity is not None:
            there = bool(read_attempt(args.sample_dir, job))
        return there and pair_is_whole(args.sample_dir, job, load_mask(masks, job, args.seed), form)

    with ThreadPoolExecutor() as pool:
        return [job for job, done in zip(jobs, pool.map(is_done, jobs), strict=True) if not done]


def pair_is_whole(sample_dir: Path, job: Job, item: MaskItem, form: ImageFormat) -> bool:
    """Whether the job's image is whole and its label is the one that would be written now."""
    content, suffix = label_bytes(item.label)
    label_path = sample_dir / "masks" / f"{job.name}{suffix}"
    if not label_path.is_file() or label_path.read_bytes() != content:
        return False
    return image_is_whole(image_path(sample_dir, job, form), (*item.view.size, form.channels))


def attempt_path(sample_dir: Path, job: Job) -> Path:
    """Where --min-fidelity notes which attempt at the job's image stayed."""
    return sample_dir / "attempts" / f"{job.name}.json"


def read_attempt(sample_dir: Path, job: Job) -> dict[str, str]:
    """The note on the attempt that stayed, as columns of the manifest; empty where there is none or it is torn."""
    try:
        return json.loads(attempt_path(sample_dir, job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_pair(
    sample_dir: Path, job: Job, item: MaskItem, image: np.ndarray, form: ImageFormat, seed: int, note: dict[str, str]
) -> None:
    """Label first, image (C, H, W) in [-1, 1] last: where that is, its label and the note on its attempt are, too."""
    image_path(sample_dir, job, form).unlink(missing_ok=True)  # of a mask that was mended since
    content, suffix = label_bytes(item.label)
    write_atomically(sample_dir / "masks" / f"{job.name}{suffix}", lambda file: file.write(content))
    if note:
        write_json(attempt_path(sample_dir, job), note)
    picture = form.encode(image, form.window(seed, job.index))
    write_atomically(image_path(sample_dir, job, form), lambda file: file.write(picture))


# ---------------------------------------------------------------------------------------------------------- the work


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=False)
    settings = SamplingSettings.from_args(args)
    if args.compile:
        check_compiler()
    if args.npz and args.tile:
        raise InputError("--npz holds images of one size, and --tile keeps each mask's own: leave one of them out.")
    machine = start_machine(args.device, args.precision)
    sample(args, settings, machine)
    stop_machine()  # not after an error: the others would leave, and torchrun end this process, before it has said it


@torch.inference_mode()
def sample(args: argparse.Namespace, settings: SamplingSettings, machine: Machine) -> None:
    start_logging(machine.is_main)
    trained = load_trained(args, machine)
    form = choose_format(args.intensity, args.source_window, trained.data, trained.intensity)
    with machine.main_first():  # the files that it decoded need no second decode
        masks = MaskFolder(
            args.mask_path, trained.data, args.mask_type, image_dir=args.data_path,
            progress=machine.is_main, normalize=args.normalize_masks, whole_scale=field_scale(args, trained.data),
        )  # fmt: skip
    if args.tile:
        check_fields(args, masks.view_sizes(), trained.data.image_size)
    exports = [name for name in args.export if name != "plain"]
    check_export(exports, masks.rule)
    jobs = plan_jobs(masks.names, args.samples_per_mask, args.num_samples)
    redraw, judged = load_redraw(args, trained, machine)
    sampler = ImageSampler(trained.model, trained.transport, trained.space, machine, settings, args.compile)
    made_with = set_settings(args, settings, trained, masks, judged)
    lock = on_main(machine, lambda: open_sample_dir(args.sample_dir, made_with))
    log_provenance(machine, args.seed)
    logger.info("%d masks, %s: %s", len(masks.names), masks.rule.mask_type, masks.rule.reason)

    mine = jobs[machine.rank :: machine.world_size]
    todo = jobs_to_do(args, masks, mine, form)
    logger.info("%d images to make, %d are there already (counts of this process)", len(todo), len(mine) - len(todo))
    again = machine.to_main([image_name(job, form) for job in todo])
    on_main(machine, lambda: forget_rows(args.sample_dir / "manifest.csv", again))
    make_images(args, sampler, masks, todo, form, machine, redraw)
    machine.barrier()
    if machine.is_main:
        write_manifest(args, settings, trained, masks, jobs, form)
        if redraw is not None:
            log_attempts(args, jobs)
        write_contact_sheet(args, masks, jobs, form)
        images = [image_path(args.sample_dir, job, form) for job in jobs]
        for name in exports:
            logger.info("exported %s", export_set(args.sample_dir, images, masks.rule, name))
        if args.npz:
            write_npz(args, jobs, form)
        logger.info("done: %d pairs and manifest.csv in %s", len(jobs), args.sample_dir)
    machine.barrier()
    if lock is not None:
        lock.close()


def on_main(machine: Machine, work: Callable[[], T]) -> T | None:
    """What ``work`` gives on rank 0, None elsewhere; what is wrong with the user's input there ends every rank."""
    problem, found = None, None
    if machine.is_main:
        try:
            found = work()
        except (InputError, OSError) as error:
            problem = one_line(error)
    problem = machine.from_main(problem)
    if problem:
        raise InputError(problem)
    return found


def load_redraw(
    args: argparse.Namespace, trained: TrainedModel, machine: Machine
) -> tuple[Redraw | None, dict[str, Any] | None]:
    """With --min-fidelity: who decides what is drawn again, the same on all ranks, and its note for the settings."""
    if args.min_fidelity is None:
        return None, None
    from evaluation.redraw import Redraw, RedrawSettings, train_redraw_judge  # seconds to import

    settings = RedrawSettings(
        min_fidelity=args.min_fidelity,
        max_attempts=args.max_attempts or MAX_ATTEMPTS,
        images=args.judge_images,
        masks=args.judge_masks,
        mask_type=args.judge_mask_type or "auto",
        normalize=args.normalize_masks,
        steps=args.judge_steps or JUDGE_STEPS,
        cache_dir=args.judge_cache or JUDGE_CACHE,
    )
    with torch.inference_mode(False):  # it learns
        judge = on_main(machine, lambda: train_redraw_judge(settings, trained.data, machine.device, progress=True))
    judge = machine.from_main(judge)
    return Redraw.from_trained(judge, trained.data, machine.device), judge.note


def make_images(
    args: argparse.Namespace,
    sampler: ImageSampler,
    masks: MaskFolder,
    todo: list[Job],
    form: ImageFormat,
    machine: Machine,
    redraw: Redraw | None = None,
) -> None:
    """Draw batch after batch; background threads encode and write while the next batch is drawn.

    What is to be drawn again comes first in the next batch, so that few images wait in memory.
    """
    size = 1 if args.tile else args.per_proc_batch_size  # a field is a batch of windows
    shown = machine.is_main and sys.stderr.isatty()
    waiting = deque((job, 1) for job in todo)
    with ThreadPoolExecutor(max_workers=2) as writers, tqdm(total=len(todo), unit="image", disable=not shown) as bar:
        pending: list[Future[None]] = []
        while waiting:
            batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            items = [load_mask(masks, job, args.seed) for job, _ in batch]
            prob_maps = torch.stack([torch.as_tensor(item.prob_map) for item in items])  # (n, K, H, W)
            seeds = [image_seed(args.seed, job.index, attempt) for job, attempt in batch]
            if args.tile:
                images = sampler.draw_field(prob_maps[0], seeds[0], args.per_proc_batch_size)[None]
            else:
                images = sampler(prob_maps, seeds, batch_size=size)
            for (job, attempt), item, image in zip(batch, items, images.cpu().numpy(), strict=True):
                kept = kept_image(redraw, job, item, image, attempt)
                if kept is None:
                    waiting.appendleft((job, attempt + 1))
                else:
                    picture, note = kept
                    pending.append(
                        writers.submit(write_pair, args.sample_dir, job, item, picture, form, args.seed, note)
                    )
                    bar.update()
            pending = finished(pending, most_left=4 * size)
            if not shown:
                logger.info("%d of %d images", len(todo) - len(waiting), len(todo))
        finished(pending, most_left=0)


def kept_image(
    redraw: Redraw | None, job: Job, item: MaskItem, image: np.ndarray, attempt: int
) -> tuple[np.ndarray, dict[str, str]] | None:
    """The image (C, H, W) that stays (this one, or an attempt before it) with the note on it; None: draw it again."""
    if redraw is None:
        return image, {}
    shown = to_gray_values(image, None, np.dtype(np.uint8))
    kept = redraw(job.index, np.asarray(item.prob_map), image, attempt, shown)
    return None if kept is None else (kept.image, kept.columns())


def log_attempts(args: argparse.Namespace, jobs: list[Job]) -> None:
    """How often images were drawn, and how many never reached --min-fidelity."""
    found = [read_attempt(args.sample_dir, job) for job in jobs]
    again = sum(int(notes["attempt"]) > 1 or notes["fidelity_reached"] == "no" for notes in found)
    missed = sum(notes["fidelity_reached"] == "no" for notes in found)
    logger.info(
        "--min-fidelity %g: %d of %d images were drawn again; %d did not reach it, their best attempts stay (column "
        "fidelity_reached of the manifest)", args.min_fidelity, again, len(jobs), missed,
    )  # fmt: skip


def finished(pending: list[Future[None]], most_left: int) -> list[Future[None]]:
    """Wait until at most so many writes are left; raise what went wrong in those that ended."""
    while len(pending) > most_left:
        pending.pop(0).result()
    return pending


def write_manifest(
    args: argparse.Namespace,
    settings: SamplingSettings,
    trained: TrainedModel,
    masks: MaskFolder,
    jobs: list[Job],
    form: ImageFormat,
) -> None:
    """manifest.csv: how every pair came to be. Columns that evaluate.py added stay."""
    hashes = {name: file_sha256(path) for name, path in masks.paths.items()}
    path = args.sample_dir / "manifest.csv"
    added = read_manifest(path)
    rows = []
    for job in jobs:
        view = masks.view(job.mask_name, window_rng(args.seed, job))
        row = {
            "image": image_name(job, form),
            "label": f"masks/{written_label(args.sample_dir, job).name}",
            "source_mask": masks.paths[job.mask_name].absolute(),
            "source_mask_sha256": hashes[job.mask_name],
            "real_image": masks.image_paths[job.mask_name].absolute() if masks.image_paths else "",
            "seed": args.seed,
            "index": job.index,
            "crop_top": view.top,
            "crop_left": view.left,
            "crop_scaled_height": view.scaled_height,
            "crop_scaled_width": view.scaled_width,
            "crop_height": view.height,
            "crop_width": view.width,
            "tile_overlap": "" if settings.tile_overlap is None else settings.tile_overlap,
            "mask_type": masks.rule.mask_type,
            "label_derivation": "same crop, nearest neighbour, source values",
            "intensity": args.intensity,
            **window_columns(form.window(args.seed, job.index) or masks.config.window_values),
            "cfg_scale": settings.cfg_scale,
            "guidance_interval": "{:g} {:g}".format(*settings.guidance_interval),
            "sampler": settings.mode,
            "method": settings.method,
            "num_steps": settings.num_steps,
            "weights": "raw" if args.raw_weights else "ema",
            "ckpt_sha256": trained.sha256,
            **(read_attempt(args.sample_dir, job) if args.min_fidelity else {}),
        }
        rows.append(added.get(row["image"], {}) | row)
    columns = dict.fromkeys([*row, *(name for one in rows for name in one)])  # ours first
    write_rows(path, list(columns), rows)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """A table whose rows may lack columns."""
    write_csv(path, columns, [[row.get(name, "") for name in columns] for row in rows])


def forget_rows(path: Path, images: Sequence[str]) -> None:
    """Take images that are drawn again out of the manifest, and with them what evaluate.py found in those before."""
    rows, again = read_manifest(path), set(images)
    left = [row for image, row in rows.items() if image not in again]
    if len(left) < len(rows):
        write_rows(path, list(next(iter(rows.values()))), left)


def read_manifest(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a manifest by image; none where there is no manifest yet."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file) if row.get("image")}


def write_contact_sheet(args: argparse.Namespace, masks: MaskFolder, jobs: list[Job], form: ImageFormat) -> None:
    """A look at the set: mask | synthetic | real, where there is a real one, of a few pairs spread over it."""
    rows = []
    for number in np.unique(np.linspace(0, len(jobs) - 1, CONTACT_SHEET_ROWS).astype(int)):
        job = jobs[number]
        item = load_mask(masks, job, args.seed)
        pixels = torch.from_numpy(displayed(args, job, form)).permute(2, 0, 1).float() / 127.5 - 1
        row = [mask_picture(torch.as_tensor(item.prob_map)), pixels]
        row += [torch.as_tensor(item.image)] if item.image is not None else []
        rows.append([shrink(picture, CONTACT_SHEET_SIDE) for picture in row])
    sheet = Image.fromarray(grid_image(rows))
    write_atomically(args.sample_dir / "contact_sheet.png", lambda file: sheet.save(file, format="PNG"))


def displayed(args: argparse.Namespace, job: Job, form: ImageFormat) -> np.ndarray:
    """A synthetic image of the set as 8 bits over the whole range, (H, W, C)."""
    return to_display(read_image(image_path(args.sample_dir, job, form)), form.window(args.seed, job.index))


def shrink(picture: torch.Tensor, side: int) -> torch.Tensor:
    """(C, H, W) with its longer side brought down to ``side`` by area where it is longer."""
    scale = side / max(picture.shape[1:])
    if scale >= 1:
        return picture
    size = [max(1, round(scale * length)) for length in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="area")[0]


def write_npz(args: argparse.Namespace, jobs: Sequence[Job], form: ImageFormat) -> None:
    """SAMPLE_DIR.npz with arr_0 (N, H, W, C) uint8, streamed: one image in memory at a time. Gray is repeated to 3."""
    shape = repeat_gray(displayed(args, jobs[0], form)).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(jobs), *shape)}

    def write(file: Any) -> None:
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for job in jobs:
                array.write(repeat_gray(displayed(args, job, form)).tobytes())

    folder = args.sample_dir.resolve()
    path = folder.with_name(f"{folder.name}.npz")
    write_atomically(path, write)
    logger.info("%s: %d images", path, len(jobs))


if __name__ == "__main__":
    run_command(main, parse_args)
