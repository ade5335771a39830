"""Write a synthetic set: names, images, labels, manifest, contact sheet."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.disk import SETTINGS, check_folder, file_sha256, lock_folder, write_atomically, write_json
from common.errors import InputError, list_some
from common.pictures import grid_image, mask_picture, repeat_gray
from common.randomness import derived_seed
from dataset.files import FileError, read_image
from dataset.folders import MaskFolder, MaskItem
from dataset.gray import ImageFormat, to_display, window_columns
from engine.sampling import SamplingSettings, TrainedModel
from synthetic import manifest
from synthetic.manifest import relative_to_set, upgrade_settings

logger = logging.getLogger(__name__)

CONTACT_SHEET_ROWS = 8
CONTACT_SHEET_SIDE = 512  # pixels; larger images are shown smaller
MOST_IMAGES = 10_000_000
MOST_NAME_BYTES = 230  # file systems end at 255; a number and a suffix come behind


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


# Change the speed, and the images by a rounding difference only: a set may be finished with other values.
FREE_SETTINGS = ("patch_pixels", "precision", "compile", "per_proc_batch_size")


def open_sample_dir(sample_dir: Path, settings: dict[str, Any]) -> IO[bytes]:
    """Check, make and lock the folder, and write down what it is made with.

    Returns:
        The lock.

    Raises:
        InputError: it holds something else, or another process works in it.
    """
    check_folder(sample_dir, settings, FREE_SETTINGS, upgrade_settings)
    sample_dir.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(sample_dir, "give another --sample-dir", (manifest.IMAGES, manifest.LABELS, manifest.ATTEMPTS))
    check_folder(sample_dir, settings, FREE_SETTINGS, upgrade_settings)  # another process may have been first
    write_json(sample_dir / SETTINGS, settings)
    (sample_dir / "images").mkdir(exist_ok=True)
    (sample_dir / "masks").mkdir(exist_ok=True)
    if settings["redraw"] is not None:
        (sample_dir / "attempts").mkdir(exist_ok=True)
    return lock


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
    added = earlier_rows(args.sample_dir)
    rows = []
    for job in jobs:
        view = masks.view(job.mask_name, window_rng(args.seed, job))
        row = {
            "image": image_name(job, form),
            "label": f"masks/{written_label(args.sample_dir, job).name}",
            "source_mask": relative_to_set(masks.paths[job.mask_name], args.sample_dir),
            "source_mask_sha256": hashes[job.mask_name],
            "real_image": relative_to_set(masks.image_paths[job.mask_name], args.sample_dir)
            if masks.image_paths
            else "",
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
    manifest.write_manifest(args.sample_dir, rows)


def forget_rows(folder: Path, images: Sequence[str]) -> None:
    """Take images that are drawn again out of the manifest, and with them what evaluate.py found in those before."""
    rows, again = earlier_rows(folder), set(images)
    left = [row for image, row in rows.items() if image not in again]
    if not left:
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
    elif len(left) < len(rows):
        manifest.write_manifest(folder, left)


def earlier_rows(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of the manifest by image; none if there is no manifest yet, or a damaged one, which is written anew."""
    if not (folder / manifest.MANIFEST).is_file():
        return {}
    try:
        _, rows = manifest.read_manifest(folder)
    except InputError as error:
        logger.warning("%s. It is written anew.", error)
        return {}
    return {row["image"]: row for row in rows}


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
