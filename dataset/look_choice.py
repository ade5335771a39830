"""Choose the look of each image of a synthetic set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.disk import file_sha256
from common.errors import InputError, list_some
from dataset.checks import for_all, or_error, refuse_bad
from dataset.config import DataConfig
from dataset.files import FileError, find_images, read_image
from dataset.folder_hints import list_folder, warn_of_skipped
from dataset.gray import check_type, fit_channels
from dataset.looks import Looks, measure_file, measure_tensor
from dataset.mask_folder import MaskItem
from dataset.names import bare_mask_name, by_bare_names, name_of, odd_names, read_names

LOOK_SOURCES = (TRAINING, SAME, NOBODY) = ("training", "same", "none")
PATH = "path"  # looks of given images
TABLE = "table"  # a look for each mask


@dataclass(frozen=True)
class LookChoice:
    """How each image gets its look. The choice depends on the seed of the set and the index of the image.

    Attributes:
        source: one of LOOK_SOURCES, PATH or TABLE.
        looks: looks to choose from. For SAME and NOBODY, looks of the training images, which give the scale.
        config: how images become tensors.
        number: number of one look for all images. None: choose at random.
        balanced: choose each group of looks equally often.
        origin: entry for settings.json.
        table: name of a mask -> number of its look, for TABLE.
    """

    source: str
    looks: Looks
    config: DataConfig
    number: int | None
    origin: dict[str, Any]
    balanced: bool = False
    table: Mapping[str, int] = field(default_factory=dict)

    def check_masks(self, names: Iterable[str]) -> None:
        """Refuse masks that have no look in the table.

        Raises:
            InputError: names some of them.
        """
        without = [name for name in names if name not in self.table] if self.source == TABLE else []
        if without:
            raise InputError(f"`look_table`: {len(without)} masks have no look: {list_some(without)}.")

    def columns(self, seed: int, index: int, mask_name: str) -> dict[str, str]:
        """Columns of the manifest about the look of image ``index``."""
        names = {NOBODY: "", SAME: mask_name}
        name = names[self.source] if self.source in names else self.looks.names[self._number(seed, index, mask_name)]
        return {"look_source": self.source, "look_image": name}

    def batch(self, seed: int, indices: Sequence[int], items: Sequence[MaskItem]) -> Tensor | None:
        """Standardised looks (n, N) of images ``indices``. None for no look.

        Args:
            items: their masks, which SAME and TABLE need.
        """
        if self.source == NOBODY:
            return None
        if self.source == SAME:
            images = [item.image for item in items if item.image is not None]
            return self.of_images(images)
        masks = [item.name for item in items] if self.source == TABLE else [""] * len(indices)
        chosen = [self._number(seed, index, mask) for index, mask in zip(indices, masks, strict=True)]
        numbers = self.looks.numbers[chosen]
        return torch.from_numpy(self.looks.standardise(numbers))

    def of_images(self, images: Sequence[np.ndarray] | Tensor) -> Tensor:
        """Standardised looks (n, N) of images (C, H, W) in [-1, 1]."""
        numbers = np.stack([measure_tensor(np.asarray(image), self.config) for image in images])
        return torch.from_numpy(self.looks.standardise(numbers))

    def _number(self, seed: int, index: int, mask_name: str) -> int:
        """Number of the look of an image. Only TABLE needs the name of its mask."""
        if self.source == TABLE:
            return self.table[mask_name]
        return self.looks.draw(seed, index, self.balanced) if self.number is None else self.number


def choose_looks(
    training: Looks,
    config: DataConfig,
    source: str | None,
    look_path: Path | None,
    look_index: int | None,
    groups: Sequence[str] = (),
    balanced: bool = False,
    table_path: Path | None = None,
    dtypes: Sequence[str] = (),
) -> LookChoice:
    """Make the choice from settings, and check them.

    Args:
        training: looks of the checkpoint.
        source: one of LOOK_SOURCES. None: PATH if a path is given, else TRAINING.
        look_path: folder or file of images to take looks from.
        look_index: number of one look for all images.
        groups: only use looks of these groups of training images. Empty: use all.
        balanced: choose each group equally often.
        table_path: table of masks and their looks, see :func:`read_look_table`.
        dtypes: types of gray values of the training images. Empty if they are unknown.

    Raises:
        InputError: unusable images, no look of this number, no such group, or a setting without effect.
    """
    looks = training
    origin: dict[str, Any] = {}
    if look_path is not None:
        source, (looks, origin) = PATH, _measure_files(look_path, training, config, dtypes)
    table: dict[str, int] = {}
    if table_path is not None:
        if source in LOOK_SOURCES:
            raise InputError("`look_table` names a look for each mask: leave `look` out.")
        source, table = TABLE, read_look_table(table_path, looks.names)
        origin = origin | {"table_sha256": file_sha256(table_path)}
    source = source or TRAINING
    for name, value in (("look_group", groups), ("balance_groups", balanced)):
        if value and source != TRAINING:
            raise InputError(f"`{name}` has no effect on `look` {source}: it chooses training images.")
        if value and not training.groups:
            raise InputError(f"`{name}` has no effect: the looks of this checkpoint have no groups.")
    if groups:
        looks, origin = training.of_groups(groups), {"groups": sorted(groups)}
    if balanced:
        origin = origin | {"balanced": True}
    if look_index is not None and source not in (TRAINING, PATH):
        raise InputError(f"`look_index` {look_index} has no effect on `look` {source}: leave it out.")
    if look_index is not None and look_index >= len(looks.names):
        raise InputError(
            f"`look_index` {look_index}: there are {len(looks.names)} looks, counted from 0 ({looks.names[0]})."
        )
    origin = {"source": source, "index": look_index, **origin}
    return LookChoice(source, looks, config, look_index, origin, balanced, table)


def read_look_table(path: Path, looks: Sequence[str]) -> dict[str, int]:
    """Number of the look of every mask, from a table with the columns ``mask`` and ``look`` (names of files).

    Args:
        path: CSV file. Names may have a suffix.
        looks: names of the looks.

    Raises:
        InputError: a column, a name or a look is missing, a mask is there twice, or a look is not in ``looks``.
    """
    table = read_names(path, "mask", "look", once=True)
    without = [mask for mask, look in table.items() if not look]
    if without:
        raise InputError(f"{path}: masks without a look: {list_some(without)}")
    numbers = {name: number for number, name in reversed(list(enumerate(looks)))}  # of equal names, the first
    known = {mask: name_of(look) for mask, look in (by_bare_names(table, bare_mask_name) | table).items()}
    unknown = sorted({look for look in known.values() if look not in numbers})
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} looks are not among the {len(looks)} to choose from: {list_some(unknown)}."
        )
    return {mask: numbers[look] for mask, look in known.items()}


def _measure_files(
    path: Path, training: Looks, config: DataConfig, dtypes: Sequence[str]
) -> tuple[Looks, dict[str, Any]]:
    """Looks of a folder of images (or one image), and hashes of the files."""
    if not path.exists():
        raise InputError(f"`look_path` {path}: no such file or folder.")
    listings = [list_folder(path, "image")] if path.is_dir() else []
    files = find_images(path, *listings) if listings else {name_of(path.name): path}
    warn_of_skipped(listings, files.values())
    odd = odd_names(files)  # they end in the manifest
    if odd:
        raise InputError(f"`look_path` {path.parent} {odd}")

    def measure(file: Path) -> np.ndarray:
        image = fit_channels(read_image(file), config.channels, file)
        check_type(image.dtype, dtypes, config, file)
        return measure_file(image, config)

    found = list(for_all(or_error(measure), list(files.values()), "measuring looks", progress=False))
    refuse_bad([one for one in found if isinstance(one, FileError)], len(found), f"images of {path}")
    hashes = list(for_all(file_sha256, list(files.values()), "hashing images", progress=False))
    return training.with_images(list(files), np.stack(found)), {"images_sha256": hashes}
