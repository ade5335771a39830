"""Write a synthetic set: names, images, labels, manifest, contact sheet, and one array of all images."""

from __future__ import annotations

import io
import logging
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from common.arguments import number_as_text
from common.disk import (
    SETTINGS,
    check_folder,
    file_sha256,
    lock_folder,
    real_path,
    table_bytes,
    write_atomically,
    write_json,
)
from common.errors import InputError, list_some
from common.outputs import check_output_arrays
from common.pictures import captioned_sheet, from_uint8, mask_picture, repeat_gray
from common.plain import build, read_json
from common.randomness import derived_seed
from common.spread import evenly
from dataset.files import FileError, read_image, read_mask
from dataset.gray import ImageFormat, to_display, window_columns
from dataset.look_choice import LookChoice
from dataset.mask_folder import MaskFolder, MaskItem
from synthetic.manifest import (
    ATTEMPT_COLUMNS,
    ATTEMPTS,
    IMAGES,
    LABEL_SUFFIXES,
    LABELS,
    MANIFEST,
    VIEW_COLUMNS,
    label_path,
    read_manifest,
    relative_to_set,
    upgrade_settings,
    write_manifest,
)

logger = logging.getLogger(__name__)

PARTS = (IMAGES, LABELS, ATTEMPTS)  # folders of a set that are locked with it
MOST_IMAGES = 10_000_000
MOST_SHOWN = 8  # pairs of the contact sheet
MOST_LOOKED_AT = 64  # pairs that are read to find some with cells
MOST_NAME_BYTES = 230  # file systems end at 255; a number and a suffix come behind
# Settings that may differ when a set is continued. They follow from checkpoint or masks, or they only change speed and
# rounding.
FREE_SETTINGS = ("patch_pixels", "precision", "compile", "per_proc_batch_size", "mask_origin")


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
            f"`num_samples` {num_samples} is more than `samples_per_mask` {samples_per_mask} makes of "
            f"{len(mask_names)} masks: leave one of them out."
        )
    per_mask = samples_per_mask or (math.ceil(num_samples / len(mask_names)) if num_samples else 1)
    if per_mask * len(mask_names) > MOST_IMAGES:
        raise InputError(f"{per_mask} images from each of {len(mask_names)} masks: a set has at most {MOST_IMAGES:,}.")
    long = [name for name in mask_names if len(name.encode()) > MOST_NAME_BYTES]
    if long:
        raise InputError(f"`mask_path`: names of above {MOST_NAME_BYTES} bytes are too long: {list_some(long)}.")
    jobs = [
        Job(f"{mask}_{copy + 1:04d}" if per_mask > 1 else mask, mask, number * per_mask + copy)
        for copy in range(per_mask)
        for number, mask in enumerate(mask_names)
    ][:num_samples]
    return sorted(jobs, key=lambda job: job.index)


@dataclass(frozen=True)
class Attempt:
    """The best draw of an image so far, as a judge sees it.

    Attributes:
        number: number of this draw, from 1.
        fidelity: its Dice with the mask, in [0, 1].
        reached: whether this Dice is high enough.
        tried: number of draws so far.
    """

    number: int
    fidelity: float
    reached: bool
    tried: int

    def columns(self) -> dict[str, str]:
        """Its columns of the manifest."""
        values = (str(self.number), f"{self.fidelity:.4f}", "yes" if self.reached else "no")
        return dict(zip(ATTEMPT_COLUMNS, values, strict=True))

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Attempt:
        """The inverse of ``asdict``. Earlier versions saved the columns instead, for finished images only."""
        if "number" in plain:
            return build(cls, plain)
        number, fidelity, reached = (plain[name] for name in ATTEMPT_COLUMNS)
        return cls(int(number), float(fidelity), reached == "yes", int(number) if reached == "yes" else MOST_IMAGES)


class SetWriter:
    """A set that is being made. Knows what is missing, and writes every file of the set.

    Args:
        masks: masks that it is made from.
        form: type and gray values of its images.
        jobs: all images of the set.
        settings: content of settings.json. A folder holds images of equal settings only.
        looks: which look each image gets; None if the model knows no looks.
    """

    def __init__(
        self,
        folder: Path,
        masks: MaskFolder,
        form: ImageFormat,
        jobs: Sequence[Job],
        settings: dict[str, Any],
        looks: LookChoice | None = None,
    ) -> None:
        self.folder, self.masks, self.form, self.jobs, self.settings = folder, masks, form, jobs, settings
        self.looks = looks
        self.seed: int = settings["seed"]
        self._judged = settings["redraw"] is not None
        self._lock: IO[bytes] | None = None
        self._shared = False

    def open(self, shared: bool = False) -> None:
        """Check, make and lock the folder, and write its settings.

        Args:
            shared: other launches make other parts of the set at the same time.

        Raises:
            InputError: the folder holds something else, another process works in it, or the manifest cannot name a
                mask or image.
        """
        check_folder(self.folder, self.settings, FREE_SETTINGS, upgrade_settings)
        sources = [*self.masks.paths.values(), *(self.masks.image_paths or {}).values()]
        for path in {path.parent: path for path in sources}.values():  # one of each folder: the others differ in name
            table_bytes(relative_to_set(path, self.folder), self.folder / MANIFEST)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shared = shared
        self._hold()
        check_folder(self.folder, self.settings, FREE_SETTINGS, upgrade_settings)  # another process may have been first
        if not shared or not (self.folder / SETTINGS).is_file():
            write_json(self.folder / SETTINGS, self.settings)
        for part in PARTS if self._judged else PARTS[:2]:
            (self.folder / part).mkdir(exist_ok=True)

    def _hold(self) -> None:
        self._lock = lock_folder(self.folder, "give another folder", PARTS, self._shared)

    def take_over(self) -> bool:
        """Try to lock a shared folder alone, to finish the set. Only the launch that ends last succeeds.

        Each launch gives its shared lock back first. So the last launch finds no other lock, and all images.

        Returns:
            Whether this process has the lock and all images of the set are there.
        """
        self.close()
        self._shared = False
        try:
            self._hold()
        except InputError:  # the other launch finishes the set when it ends
            return False
        return all(self.image_path(job).is_file() for job in self.jobs) and not self.missing(self.jobs)

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()

    # ------------------------------------------------------------------------------------------------ what is there

    def image_name(self, job: Job) -> str:
        """Path of the image within the set, as the manifest names it."""
        return f"{IMAGES}/{job.name}{self.form.suffix}"

    def image_path(self, job: Job) -> Path:
        """Path of the image."""
        return self.folder / self.image_name(job)

    def load(self, job: Job) -> MaskItem:
        """The job's mask, cut to its square."""
        return self.masks.load(job.mask_name, rng=self._crop_rng(job))

    def _crop_rng(self, job: Job) -> np.random.Generator:
        """Chooses the square of a random crop. Depends on (seed, index) only."""
        return np.random.default_rng(derived_seed(self.seed, job.index, 1))

    def missing(self, jobs: Sequence[Job]) -> list[tuple[Job, int]]:
        """Jobs that are not finished, each with the number of its next draw.

        A job is finished if its image and label are whole and, with a judge, no draw is left. Masks are read only for
        images that are there, by a few threads.
        """
        with ThreadPoolExecutor() as pool:
            numbers = pool.map(self._next_draw, jobs)
            return [(job, number) for job, number in zip(jobs, numbers, strict=True) if number is not None]

    def _next_draw(self, job: Job) -> int | None:
        if not self.image_path(job).is_file():
            return 1
        attempt = self.attempt(job) if self._judged else None
        if (self._judged and attempt is None) or not self._is_whole(job):
            return 1
        if attempt is None or attempt.reached or attempt.tried >= self.settings["redraw"]["max_attempts"]:
            return None
        return attempt.tried + 1

    def _is_whole(self, job: Job) -> bool:
        """Whether the image is whole and the label equals the one that would be written now."""
        item = self.load(job)
        content, suffix = label_bytes(item.label)
        label = self.folder / LABELS / f"{job.name}{suffix}"
        if not label.is_file() or not (label.read_bytes() == content or label_is_equal(label, item.label)):
            return False
        return image_is_whole(self.image_path(job), (*item.view.size, self.form.channels))

    def attempt(self, job: Job) -> Attempt | None:
        """The best draw so far. None if there is no note, or a damaged one."""
        try:
            return Attempt.from_plain(read_json(self._attempt_path(job), "it is made again"))
        except (ValueError, KeyError):
            return None

    def _attempt_path(self, job: Job) -> Path:
        return self.folder / ATTEMPTS / f"{job.name}.json"

    def _earlier_rows(self) -> dict[str, dict[str, str]]:
        """Rows of the manifest by image. Empty if there is no manifest, or a damaged one, which is written again."""
        if not (self.folder / MANIFEST).is_file():
            return {}
        try:
            _, rows = read_manifest(self.folder)
        except InputError as error:
            logger.warning("%s. It is written anew.", error)
            return {}
        return {row["image"]: row for row in rows}

    # ------------------------------------------------------------------------------------------------------ writing

    def forget(self, images: Sequence[str]) -> None:
        """Remove the rows of images that are drawn again, because evaluate.py may have scored the old images."""
        if self._shared:  # other launches may do the same now; the manifest is written again at the end
            if images:
                (self.folder / MANIFEST).unlink(missing_ok=True)
            return
        rows, again = self._earlier_rows(), set(images)
        left = [row for image, row in rows.items() if image not in again]
        if not left:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        elif len(left) < len(rows):
            write_manifest(self.folder, left)

    def write_pair(self, job: Job, item: MaskItem, image: np.ndarray, attempt: Attempt | None) -> None:
        """Write label, note and image (C, H, W) in [-1, 1]. The image is last, so its presence proves the others."""
        self.image_path(job).unlink(missing_ok=True)  # an earlier draw, or one from an older mask
        content, suffix = label_bytes(item.label)
        for other in LABEL_SUFFIXES:
            if other != suffix:
                (self.folder / LABELS / f"{job.name}{other}").unlink(missing_ok=True)
        write_atomically(self.folder / LABELS / f"{job.name}{suffix}", lambda file: file.write(content))
        if attempt is not None:
            self.write_attempt(job, attempt)
        picture = self.form.encode(image, self.form.window(self.seed, job.index))
        write_atomically(self.image_path(job), lambda file: file.write(picture))

    def write_attempt(self, job: Job, attempt: Attempt) -> None:
        """Save which draw is kept so far."""
        write_json(self._attempt_path(job), asdict(attempt))

    def write_manifest(self) -> None:
        """Write a row for every pair. Columns that evaluate.py added stay."""
        hashes = {name: file_sha256(path) for name, path in self.masks.paths.items()}
        added = self._earlier_rows()
        write_manifest(
            self.folder,
            [added.get(self.image_name(job), {}) | self._row(job, hashes[job.mask_name]) for job in self.jobs],
        )

    def _row(self, job: Job, mask_sha256: str) -> dict[str, Any]:
        settings, sampling = self.settings, self.settings["sampling"]
        view = self.masks.view(job.mask_name, self._crop_rng(job))
        real = self.masks.image_paths[job.mask_name] if self.masks.image_paths else None
        attempt = self.attempt(job) if self._judged else None
        return {
            "image": self.image_name(job),
            "label": label_path(self.folder, job.name).relative_to(self.folder).as_posix(),
            "source_mask": relative_to_set(self.masks.paths[job.mask_name], self.folder),
            "source_mask_sha256": mask_sha256,
            "real_image": "" if real is None else relative_to_set(real, self.folder),
            "seed": self.seed,
            "index": job.index,
            **dict(zip(VIEW_COLUMNS, astuple(view), strict=True)),
            "tile_overlap": sampling["tile_overlap"],
            "mask_type": self.masks.rule.mask_type,
            "label_derivation": "same crop, nearest neighbour, source values",
            "intensity": settings["intensity"],
            **window_columns(self.form.window(self.seed, job.index) or self.masks.config.window_values),
            "cfg_scale": sampling["cfg_scale"],
            **self._look_columns(job),
            "guidance_interval": " ".join(map(number_as_text, sampling["guidance_interval"])),
            "sampler": sampling["mode"],
            "method": sampling["method"],
            "num_steps": sampling["num_steps"],
            "time_shift": sampling.get("time_shift", 1.0),
            "weights": settings["weights"],
            "ckpt_sha256": settings["ckpt_sha256"],
            **({} if attempt is None else attempt.columns()),
        }

    def _look_columns(self, job: Job) -> dict[str, Any]:
        if self.looks is None:
            return {}
        columns = self.looks.columns(self.seed, job.index, job.mask_name)
        return columns | {"look_scale": self.settings["sampling"].get("look_scale", 1.0)}

    # ----------------------------------------------------------------------------------------------- looks at the set

    def displayed(self, job: Job) -> np.ndarray:
        """A synthetic image of the set as (H, W, C) uint8, where 0 is -1 and 255 is 1."""
        return to_display(read_image(self.image_path(job)), self.form.window(self.seed, job.index))

    def write_contact_sheet(self) -> None:
        """Write ``contact_sheet.png``: masks, synthetic and (if there are any) real images of a few pairs.

        Chosen masks are read twice. Keeping all candidates in memory would need gigabytes for large fields.
        """
        chosen = choose_pairs(len(self.jobs), lambda number: bool(self.load(self.jobs[number]).prob_map[1:].any()))
        sheet = Image.fromarray(
            captioned_sheet(("mask", "synthetic", "real"), [self._pictures(self.jobs[number]) for number in chosen])
        )
        write_atomically(self.folder / "contact_sheet.png", lambda file: sheet.save(file, format="PNG"))

    def _pictures(self, job: Job) -> list[torch.Tensor]:
        """Mask, synthetic image and (if there is one) real image of a job, each (C, H, W) in [-1, 1]."""
        item = self.load(job)
        real = [] if item.image is None else [torch.as_tensor(item.image)]
        return [mask_picture(torch.as_tensor(item.prob_map)), from_uint8(self.displayed(job)), *real]

    @property
    def npz_path(self) -> Path:
        """SAMPLE_DIR.npz."""
        folder = real_path(self.folder)
        return folder.with_name(f"{folder.name}.npz")

    @property
    def _npz_shape(self) -> tuple[int, ...]:
        """(N, H, W, C), gray repeated to 3."""
        side = self.masks.config.image_size
        return len(self.jobs), side, side, 3 if self.form.channels == 1 else self.form.channels

    def check_npz(self, inputs: Iterable[str | Path | None] = ()) -> None:
        """Refuse to write over another file than the array of this set.

        Raises:
            InputError: SAMPLE_DIR.npz is an input, or holds something else.
        """
        check_output_arrays(self.npz_path, {"arr_0": self._npz_shape}, "uint8", inputs)

    def write_npz(self) -> None:
        """Write SAMPLE_DIR.npz with arr_0 (N, H, W, C) uint8. Holds one image in memory.

        Raises:
            InputError: as for :meth:`check_npz`.
        """
        header = {"descr": "|u1", "fortran_order": False, "shape": self._npz_shape}

        def write(file: Any) -> None:
            with (
                zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
                archive.open("arr_0.npy", "w", force_zip64=True) as array,
            ):
                np.lib.format.write_array_header_1_0(array, header)
                for job in self.jobs:
                    array.write(repeat_gray(self.displayed(job)).tobytes())

        self.check_npz()  # again, because sampling takes time
        write_atomically(self.npz_path, write)
        logger.info("%s: %d images", self.npz_path, len(self.jobs))


def choose_pairs(count: int, has_cells: Callable[[int], bool]) -> list[int]:
    """Numbers of the pairs to show, spread over the set. Pairs without a cell are shown only if others are too few."""
    looked_at = evenly(count, MOST_LOOKED_AT)
    with_cells = [number for number in looked_at if has_cells(number)]
    empty = [number for number in looked_at if number not in with_cells]
    chosen = [with_cells[place] for place in evenly(len(with_cells), MOST_SHOWN)]
    return sorted(chosen + [empty[place] for place in evenly(len(empty), MOST_SHOWN - len(chosen))])


def label_bytes(label: np.ndarray) -> tuple[bytes, str]:
    """Encode a label without loss. Returns content and suffix: PNG for 8 and 16 bits, TIFF for other types."""
    buffer, label = io.BytesIO(), _stored(label)
    if label.ndim == 2 and label.dtype in (np.uint8, np.uint16):
        Image.fromarray(label).save(buffer, format="PNG")
        return buffer.getvalue(), ".png"
    import tifffile

    tifffile.imwrite(buffer, label, compression="zlib", photometric="minisblack")
    return buffer.getvalue(), ".tif"


def label_is_equal(path: Path, label: np.ndarray) -> bool:
    """Whether a file holds this label. Other versions of Pillow and zlib write the same values differently."""
    try:
        found = read_mask(path)
    except FileError:
        return False
    return found.dtype == _stored(label).dtype and np.array_equal(found, label)


def _stored(label: np.ndarray) -> np.ndarray:
    """A label in the type of its file: integers of a flat label in 8 or 16 bits, if they fit."""
    if label.ndim != 2 or label.dtype in (np.uint8, np.uint16) or not np.issubdtype(label.dtype, np.integer):
        return label
    return label.astype(np.uint16) if label.min() >= 0 and label.max() < 2**16 else label


def image_is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
    """Whether an image can be decoded completely and has this height, width and number of channels."""
    try:
        return read_image(path).shape == shape
    except FileError:
        return False
