"""Choose the look of each image of a synthetic set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.disk import file_sha256
from common.errors import InputError
from dataset.checks import for_all, or_error, refuse_bad
from dataset.config import DataConfig
from dataset.files import FileError, find_files, read_image
from dataset.gray import fit_channels
from dataset.looks import Looks, measure_file, measure_tensor
from dataset.mask_folder import MaskItem

LOOK_SOURCES = (TRAINING, SAME, NOBODY) = ("training", "same", "none")
PATH = "path"  # looks of given images


@dataclass(frozen=True)
class LookChoice:
    """How each image gets its look. The choice depends on the seed of the set and the index of the image.

    Attributes:
        source: one of LOOK_SOURCES, or PATH.
        looks: looks to choose from. For SAME and NOBODY, looks of the training images, which give the scale.
        config: how images become tensors.
        number: number of one look for all images. None: choose at random.
        balanced: choose each group of looks equally often.
        origin: entry for settings.json.
    """

    source: str
    looks: Looks
    config: DataConfig
    number: int | None
    origin: dict[str, Any]
    balanced: bool = False

    def columns(self, seed: int, index: int, mask_name: str) -> dict[str, str]:
        """Columns of the manifest about the look of image ``index``."""
        names = {NOBODY: "", SAME: mask_name}
        name = names[self.source] if self.source in names else self.looks.names[self._number(seed, index)]
        return {"look_source": self.source, "look_image": name}

    def batch(self, seed: int, indices: Sequence[int], items: Sequence[MaskItem]) -> Tensor | None:
        """Standardised looks (n, N) of images ``indices`` with masks ``items``. None for no look."""
        if self.source == NOBODY:
            return None
        if self.source == SAME:
            images = [item.image for item in items if item.image is not None]
            return self.of_images(images)
        numbers = self.looks.numbers[[self._number(seed, index) for index in indices]]
        return torch.from_numpy(self.looks.standardise(numbers))

    def of_images(self, images: Sequence[np.ndarray] | Tensor) -> Tensor:
        """Standardised looks (n, N) of images (C, H, W) in [-1, 1]."""
        numbers = np.stack([measure_tensor(np.asarray(image), self.config) for image in images])
        return torch.from_numpy(self.looks.standardise(numbers))

    def _number(self, seed: int, index: int) -> int:
        return self.looks.draw(seed, index, self.balanced) if self.number is None else self.number


def choose_looks(
    training: Looks,
    config: DataConfig,
    source: str | None,
    look_path: Path | None,
    look_index: int | None,
    groups: Sequence[str] = (),
    balanced: bool = False,
) -> LookChoice:
    """Make the choice from settings, and check them.

    Args:
        training: looks of the checkpoint.
        config: data settings of the checkpoint.
        source: one of LOOK_SOURCES. None: PATH if a path is given, else TRAINING.
        look_path: folder or file of images to take looks from.
        look_index: number of one look for all images.
        groups: only use looks of these groups of training images. Empty: use all.
        balanced: choose each group equally often.

    Raises:
        InputError: unusable images, no look of this number, no such group, or a setting without effect.
    """
    looks = training
    origin: dict[str, Any] = {}
    if look_path is not None:
        source, (looks, origin) = PATH, _measure_files(look_path, training, config)
    source = source or TRAINING
    for field, value in (("look_group", groups), ("balance_groups", balanced)):
        if value and source != TRAINING:
            raise InputError(f"{field} has no effect on look {source}: it chooses training images.", field)
        if value and not training.groups:
            raise InputError(f"{field} has no effect: the looks of this checkpoint have no groups.", field)
    if groups:
        looks, origin = training.of_groups(groups), {"groups": sorted(groups)}
    if balanced:
        origin = origin | {"balanced": True}
    if look_index is not None and source not in (TRAINING, PATH):
        raise InputError(f"look_index {look_index} has no effect on look {source}: leave it out.", "look_index", "look")
    if look_index is not None and look_index >= len(looks.names):
        raise InputError(
            f"look_index {look_index}: there are {len(looks.names)} looks, counted from 0 ({looks.names[0]}).",
            "look_index",
        )
    origin = {"source": source, "index": look_index, **origin}
    return LookChoice(source, looks, config, look_index, origin, balanced)


def _measure_files(path: Path, training: Looks, config: DataConfig) -> tuple[Looks, dict[str, Any]]:
    """Looks of a folder of images (or one image), and hashes of the files."""
    if not path.exists():
        raise InputError(f"look_path {path}: no such file or folder.", "look_path")
    files = find_files(path, "image") if path.is_dir() else {path.stem: path}

    def measure(file: Path) -> np.ndarray:
        return measure_file(fit_channels(read_image(file), config.channels, file), config)

    found = list(for_all(or_error(measure), list(files.values()), "measuring looks", progress=False))
    refuse_bad([one for one in found if isinstance(one, FileError)], len(found), f"images of {path}")
    hashes = list(for_all(file_sha256, list(files.values()), "hashing images", progress=False))
    return training.with_images(list(files), np.stack(found)), {"images_sha256": hashes}
