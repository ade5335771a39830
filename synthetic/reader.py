"""Read a synthetic set that ``sample_ddp.py`` wrote: manifest, images, labels, and the real images of the labels.

All images are returned as uint8 (H, W, C). C is the model's number of channels; gray is repeated to three. Synthetic
images that hold gray values of the training images are mapped back by the range in the manifest. Real images are mapped
as in training, cut by the view of their label, and rounded to 8 bits like synthetic images.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from common.cells import as_ids
from common.disk import SETTINGS, real_path
from common.errors import InputError, list_some
from common.pictures import repeat_gray, to_uint8
from common.plain import build
from dataset.config import DataConfig, Window
from dataset.files import read_image, read_mask
from dataset.gray import fit_channels, image_window, to_display, window_from_columns, window_image
from dataset.mask_facts import listed
from dataset.masks import DECIDED_TYPES, MaskRule
from dataset.views import View, center_view, view_of_file, whole_view
from engine.tiling import covering_squares
from synthetic.manifest import (
    AGAIN,
    FIDELITY_COLUMN,
    MANIFEST,
    PROVENANCE_COLUMNS,
    VIEW_COLUMNS,
    judge_notes,
    path_in_set,
    read_manifest,
    read_settings,
    write_column,
)


@dataclass(frozen=True)
class Sample:
    """One row of a manifest.

    Attributes:
        label_path: the label that it was made from. Both have the same height and width.
        real_path: the real image of the label, or None.
        source_mask: the mask file that the label was cut from, or None if the manifest does not name it.
        view: the part of the real image that the label shows, or None.
        mask_type: what the label holds: ``binary``, ``classes``, ``probability`` or ``instances``.
        window: range of gray values that the image holds. None: 8 bits over the whole range.
        columns: the whole row as text.
    """

    image_path: Path
    label_path: Path
    real_path: Path | None
    source_mask: Path | None
    view: View | None
    mask_type: str
    window: Window | None
    columns: dict[str, str]

    @property
    def name(self) -> str:
        """The synthetic image's file name without suffix."""
        return self.image_path.stem


class SampleSet:
    """The rows of ``SAMPLE_DIR/manifest.csv`` and their files. All files of the set exist when the object is made.

    Args:
        sample_dir: folder written by ``sample_ddp.py``.
        real_dir: folder to look for the real images in instead of the paths in the manifest.

    Raises:
        InputError: no manifest, no rows, a missing column, or missing files (all of them counted in one message).
    """

    def __init__(self, sample_dir: str | os.PathLike, real_dir: str | os.PathLike | None = None) -> None:
        self.folder = Path(sample_dir)
        self.settings = read_settings(self.folder)
        self.columns, rows = read_manifest(self.folder)
        self.samples = [self._sample(row, None if real_dir is None else Path(real_dir)) for row in rows]
        self._check_files()
        config, rule = self.settings.get("data_config"), self.settings.get("mask_rule")
        try:
            self.config = DataConfig.from_dict(config) if config else None
            self._rule: MaskRule | None = build(MaskRule, rule) if rule else None
        except ValueError as error:
            raise InputError(f"{self.folder / SETTINGS}: {error}; {AGAIN}") from error
        if self.samples[0].real_path is not None and self.config is None:
            raise InputError(
                f"{self.folder / SETTINGS} has no data_config, so real images cannot be brought to the gray values of "
                "training; sample the set again with sample_ddp.py"
            )
        self.whole_scale: float | None = self.settings.get("tile_scale")  # of whole masks; None: squares

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def mask_type(self) -> str:
        """What the labels hold. Real masks are read alike, where their values leave a choice."""
        return self.samples[0].mask_type

    @cached_property
    def has_real(self) -> bool:
        """Whether the rows name their real images (all do, or none).

        Raises:
            InputError: real images are missing. What needs none of them opens the set all the same.
        """
        real = [row.real_path for row in self.samples if row.real_path is not None]
        absent = [path for path in real if not path.is_file()]
        if absent:
            raise InputError(
                f"{len(absent)} real images are not there: {list_some(absent)}; say with `real_dir` where they are now"
            )
        return bool(real)

    @property
    def num_classes(self) -> int:
        """Number K of mask classes, background counted."""
        return self.config.num_classes if self.config is not None else 2

    @property
    def normalizes(self) -> bool:
        """Whether the set's soft masks were divided by their sum."""
        return self._rule is not None and self._rule.normalize

    def provenance(self) -> dict[str, list[str]]:
        """How the images were made and selected: column or setting -> at most three distinct values."""
        found = {
            name: sorted({row.columns[name] for row in self.samples})[:3]
            for name in PROVENANCE_COLUMNS
            if name in self.columns
        }
        for note in judge_notes(self.settings):
            found |= {name: [str(note[name])] for name in ("min_fidelity", "rule") if name in note}
        return {name: values for name, values in found.items() if values != [""]}

    def chosen_by(self, judge_key: str) -> bool:
        """Whether this judge selected images of the set. Its own scores of them are then biased upwards."""
        return any(note.get("judge_key") == judge_key for note in judge_notes(self.settings))

    def write_fidelity(self, values: Sequence[float]) -> None:
        """Write the fidelity of every image into the manifest. ``values`` have the order of ``samples``."""
        write_column(self.folder, FIDELITY_COLUMN, [f"{value:.4f}" for value in values])

    def require_config(self) -> DataConfig:
        """How training read its images.

        Raises:
            InputError: the settings of the set do not say it.
        """
        if self.config is None:
            raise InputError(f"{self.folder / SETTINGS} has no data_config; sample the set again with sample_ddp.py")
        return self.config

    def synthetic(self, sample: Sample) -> np.ndarray:
        """The synthetic image, uint8 (H, W, C)."""
        image = read_image(sample.image_path)
        if sample.window is not None and len(sample.window) not in (1, image.shape[2]):
            raise InputError(
                f"{sample.image_path} has {image.shape[2]} channels, but window_low and window_high in {MANIFEST} hold "
                f"{len(sample.window)} numbers; {AGAIN}"
            )
        image = to_display(image, sample.window)
        if image.dtype != np.uint8:
            raise InputError(f"{sample.image_path} is {image.dtype}, not 8-bit as sample_ddp.py writes its images")
        if self.config is None:  # a set of another tool: gray or RGB
            return repeat_gray(image)[:, :, :3]
        return repeat_gray(fit_channels(image, self.config.channels, sample.image_path))

    def real(self, sample: Sample) -> np.ndarray:
        """The real image of the label, uint8 (H, W, C), with gray values and view as in training.

        Raises:
            InputError: the image is unreadable, or does not have the size that the view was made for.
        """
        if sample.real_path is None:
            raise ValueError(f"the manifest names no real image of {sample.name}")
        config = self.require_config()
        image = fit_channels(read_image(sample.real_path), config.channels, sample.real_path)
        height, width = image.shape[:2]
        view = sample.view or center_view(height, width, config.image_size)
        if self.whole_scale is not None:
            fits = view == whole_view(height, width, self.whole_scale)
        elif config.crop == "center":
            fits = view == center_view(height, width, config.image_size)
        else:
            fits = (height, width) == (view.scaled_height, view.scaled_width)
        if not fits:
            raise InputError(
                f"{sample.real_path} has {width} x {height} pixels, which is not the size that the row of "
                f"{sample.columns['image']} in {MANIFEST} was cut from; give the folder of the original images"
            )
        return _windowed(image, view, config)

    def real_files(self) -> list[Path]:
        """For every row the file of its real image. Several samples or crops of one image have the same file."""
        return [real_path(sample.real_path) for sample in self.samples if sample.real_path is not None]

    def squares(self, array: np.ndarray) -> list[np.ndarray]:
        """Evenly spread squares of the training size that cover an image or label (H, W, ...).

        Raises:
            InputError: the image is smaller than a square.
        """
        side = self.require_config().image_size
        height, width = array.shape[:2]
        if min(height, width) < side:
            raise InputError(
                f"{self.folder} holds an image of {width} x {height} pixels, smaller than the squares of {side} x "
                f"{side} that are compared here; leave such masks out"
            )
        return covering_squares(array, side)

    def foreground(self, sample: Sample) -> np.ndarray:
        """Pixels of cells in the label, (H, W) bool. Errors as for :meth:`class_map`."""
        return self.class_map(sample) > 0

    def class_map(self, sample: Sample) -> np.ndarray:
        """Class ids of the label, (H, W) uint8 in 0..K-1. For probabilities, the most probable class.

        The rule of the set's mask folder decides. In a set without a rule, the values of the label decide; if they do
        not either, the largest value of its type means 1.

        Raises:
            InputError: the label is unreadable, or holds other values than its type allows.
        """
        label = self._label(sample)
        if label.ndim == 3:
            return label.argmax(axis=0).astype(np.uint8)
        values = None if self._rule is None else self._rule.values
        holds_ids = sample.mask_type == "classes" or self._holds_ids(sample, label)
        if values or holds_ids:
            self._check_ids(sample, label, values)
        if self._rule is not None and (values or sample.mask_type != "classes"):
            return self._rule.class_map(label)
        if holds_ids:
            return label.astype(np.uint8)
        if sample.mask_type == "binary" and len(np.unique(label[label > 0])) < 2:  # {0, 1} as well as {0, 255}
            return (label > 0).astype(np.uint8)
        whole = float(np.iinfo(label.dtype).max) if label.dtype.kind in "ui" else 1.0
        return MaskRule(sample.mask_type, self.num_classes, whole, "the whole range of the label's type").class_map(
            label
        )

    def instance_map(self, sample: Sample) -> np.ndarray | None:
        """Instance map of the label, (H, W) int, 0 background. None if the label has no instances."""
        return as_ids(self._label(sample)) if sample.mask_type == "instances" else None

    def _label(self, sample: Sample) -> np.ndarray:
        label = read_mask(sample.label_path)
        if label.ndim == 3 and sample.mask_type != "probability":
            raise InputError(f"{sample.label_path} is a stack of {len(label)} planes, not a label of sample_ddp.py")
        if label.ndim == 3 and self.config is not None and len(label) != self.num_classes:
            raise InputError(f"{sample.label_path} has {len(label)} planes, the set has {self.num_classes} classes")
        return label

    def _check_ids(self, sample: Sample, label: np.ndarray, values: Sequence[int] | None) -> None:
        """Refuse a label with other values than those of the classes. None: their ids."""
        if values:
            others = np.setdiff1d(label, values)
            if len(others):
                raise InputError(
                    f"{sample.label_path} holds the value {others[0]}, the classes of the set have {listed(values)}; "
                    f"{AGAIN}"
                )
        elif label.max(initial=0) >= self.num_classes:
            raise InputError(f"{sample.label_path} holds class {label.max()}, the set has {self.num_classes} classes")

    def _holds_ids(self, sample: Sample, label: np.ndarray) -> bool:
        """Whether a single-plane label of a probability set holds class ids."""
        return (
            sample.mask_type == "probability" and label.dtype.kind in "ui" and label.max(initial=0) < self.num_classes
        )

    def _sample(self, row: dict[str, str], real_dir: Path | None) -> Sample:
        real, mask = row.get("real_image"), row.get("source_mask")
        real_image = path_in_set(real, self.folder) if real else None
        if real_image is not None and real_dir is not None:
            real_image = real_dir / real_image.name
        where = f"{self.folder / MANIFEST}: row of {row['image']}"
        try:
            numbers = [int(row[name]) for name in VIEW_COLUMNS] if row.get(VIEW_COLUMNS[0]) else None
        except (KeyError, ValueError) as error:
            raise InputError(f"{where} has no whole numbers in {', '.join(VIEW_COLUMNS)}") from error
        try:
            window = window_from_columns(row) if row.get("intensity") == "source" else None
            if not all(-math.inf < low < high < math.inf for low, high in window or ()):
                raise ValueError("a range without gray values")
        except ValueError as error:
            raise InputError(
                f"{where} has window_low {row.get('window_low')!r} and window_high {row.get('window_high')!r}: as many "
                f"numbers are needed in both, the low ones below the high ones; {AGAIN}"
            ) from error
        mask_type = row.get("mask_type") or "binary"
        if mask_type not in DECIDED_TYPES:
            raise InputError(
                f"{where} has mask_type {mask_type!r} instead of one of {', '.join(DECIDED_TYPES)}; {AGAIN}"
            )
        return Sample(
            image_path=self.folder / row["image"],
            label_path=self.folder / row["label"],
            real_path=real_image,
            source_mask=path_in_set(mask, self.folder) if mask else None,
            view=View(*numbers) if numbers else None,
            mask_type=mask_type,
            window=window,
            columns=row,
        )

    def _check_files(self) -> None:
        """Name all missing files of the set in one message. Real images must be named in all rows or in none."""
        own = [path for row in self.samples for path in (row.image_path, row.label_path) if not path.is_file()]
        if own:
            raise InputError(
                f"{len(own)} files of {self.folder / MANIFEST} are missing: {list_some(own)}; start sample_ddp.py "
                "again with the same settings, it makes what is missing"
            )
        real = [row.real_path for row in self.samples if row.real_path is not None]
        if real and len(real) < len(self.samples):
            raise InputError(
                f"{self.folder / MANIFEST}: real_image is empty in {len(self.samples) - len(real)} of "
                f"{len(self.samples)} rows; sample the set again, with all real images or without any"
            )


def read_real(path: Path, config: DataConfig, rng: np.random.Generator | None = None) -> np.ndarray:
    """A real image as in training, uint8 (S, S, C), rounded to 8 bits like synthetic images.

    Args:
        path: any image file.
        config: data settings of the set: size, crop and gray range.
        rng: chooses the square with crop "random". None: the middle.

    Raises:
        InputError: the file is unreadable, or the image is smaller than the square.
    """
    image = fit_channels(read_image(path), config.channels, path)
    return _windowed(image, view_of_file(path, image.shape, config, rng), config)


def read_whole(path: Path, config: DataConfig) -> np.ndarray:
    """Like :func:`read_real`, but with crop "random" the whole image at its own scale."""
    image = fit_channels(read_image(path), config.channels, path)
    height, width = image.shape[:2]
    view = center_view(height, width, config.image_size) if config.crop == "center" else whole_view(height, width)
    return _windowed(image, view, config)


def _windowed(image: np.ndarray, view: View, config: DataConfig) -> np.ndarray:
    window = image_window(image, config)  # the range of the whole image, as in training
    gray = window_image(view.apply_image(image), window)  # (S, S, C) in [-1, 1]
    return repeat_gray(to_uint8(torch.from_numpy(gray).permute(2, 0, 1)))


def describe_provenance(provenance: dict[str, list[str]]) -> list[str]:
    """One line that says how a set was made. No line if the manifest does not say it."""
    short = {name: [value[:12] if name == "ckpt_sha256" else value for value in v] for name, v in provenance.items()}
    words = [f"{name} {'/'.join(values)}" for name, values in short.items()]
    return [f"made with {', '.join(words)}"] if words else []
