"""Labelled images for segmenters: real pairs of a folder, images of a synthetic set, images without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cells import connected_cells, without_gaps
from common.errors import InputError
from common.randomness import shuffled_by_hash
from dataset.checks import check_same_size
from dataset.config import DataConfig
from dataset.files import (
    FileError,
    find_images,
    find_images_and_masks,
    labels_of_images,
    read_image,
    read_mask,
)
from dataset.mask_folder import MaskFolder
from evaluation.fidelity import LabelledImage, labelled_image
from synthetic.reader import SampleSet, read_whole


class Named(NamedTuple):
    """A labelled image and its name."""

    name: str
    item: LabelledImage


class LabelledFolders(NamedTuple):
    """Where labelled images lie.

    Attributes:
        images: real images.
        masks: their masks.
        instances: instance labels, or None: then the connected parts of the masks are the cells.
        mask_type: what the masks hold.
    """

    images: Path
    masks: Path
    instances: Path | None = None
    mask_type: str = "auto"

    @classmethod
    def of_part(cls, folder: Path, mask_type: str) -> LabelledFolders:
        """The folders of a part of a split."""
        cells = folder / "instances"
        return cls(folder / "images", folder / "masks", cells if cells.is_dir() else None, mask_type)

    def with_ids_of_masks(self, num_classes: int) -> LabelledFolders:
        """The same; the masks are the instances, too, if training with ``num_classes`` reads an id per cell in them."""
        if self.instances is not None:
            return self
        rule = self.read_masks(num_classes).rule
        return self._replace(instances=self.masks) if rule.mask_type == "instances" else self

    def check_instances(self) -> None:
        """Read all labels as :func:`real_pairs` reads those with instances, before anything trains on them.

        Raises:
            InputError: an image has no instances, masks do not tell cell from background, or files are unusable.
        """
        if self.instances is None:
            return
        try:
            masks = self.read_masks(num_classes=2)
        except InputError as error:
            raise InputError(f"{error}. With `instances`, masks hold cell and background, or the ids") from error
        cells = self.cells_of(masks)
        for name in masks.names:
            read_cells(cells[name], masks.sizes[name])

    def cells_of(self, masks: MaskFolder) -> dict[str, Path]:
        """Name of each mask -> file of its instances; none without instances."""
        if self.instances is None or masks.image_paths is None:
            return {}
        found = labels_of_images(masks.image_paths.values(), self.images, self.instances)
        return {name: found[path] for name, path in masks.image_paths.items()}

    def read_masks(self, num_classes: int) -> MaskFolder:
        """The masks at the size of their files; images of any number of channels."""
        first = next(iter(find_images_and_masks(self.images, self.masks)[0].values()))
        channels = read_image(first).shape[2]
        config = DataConfig(image_size=1, num_classes=num_classes, channels=3 if channels == 1 else channels)
        return MaskFolder(self.masks, config, self.mask_type, self.images, whole_scale=1.0)


def segmenter_classes(samples: SampleSet | None, config: DataConfig, parts: Sequence[LabelledFolders] = ()) -> int:
    """Classes that a segmenter learns: those of the masks, but a boundary made from instances is no class.

    Args:
        samples: a synthetic set, which says what its masks are. None: the masks of ``parts`` decide.
    """
    if samples is not None:
        rule = samples.settings.get("mask_rule") or {}
        has_boundary = rule.get("mask_type") == "instances" and rule.get("num_classes") == 3
    else:
        is_unclear = config.num_classes == 3 and config.mask_values is None
        has_boundary = is_unclear and any(part.read_masks(config.num_classes).rule.has_boundary for part in parts)
    return 2 if has_boundary else config.num_classes


def read_cells(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Instance labels of an image, (H, W) with the ids of the file.

    Args:
        path: label file, or folder of nuclei.
        size: height and width of the image.

    Raises:
        FileError: unreadable, of another size, or no label image.
    """
    cells = read_mask(path)
    check_same_size(size, cells.shape, path)
    if cells.ndim != 2 or (cells < 0).any() or (cells != np.floor(cells)).any():
        raise FileError(path, "is no label image: it must hold one plane of whole numbers, 0 for background")
    return cells


def real_pairs(folders: LabelledFolders, config: DataConfig, num_classes: int) -> list[Named]:
    """All pairs, whole at native scale; the resized middle square under crop "center"."""
    own = dataclasses.replace(config, num_classes=num_classes)
    scale = 1.0 if config.crop == "random" else None
    masks = MaskFolder(folders.masks, own, folders.mask_type, folders.images, whole_scale=scale)
    cells = folders.cells_of(masks)
    found = []
    for name in masks.names:
        item = masks.load(name)
        pair = labelled_image(item, masks.rule)
        ids = pair.cells
        if cells:
            ids = item.view.apply_labels(read_cells(cells[name], masks.sizes[name]))
        found.append(Named(name, pair._replace(cells=without_gaps(ids))))
    return found


def set_pairs(samples: SampleSet, num_classes: int) -> list[Named]:
    """Images of a synthetic set with their labels."""
    found = []
    for sample in samples.samples:
        classes, cells = samples.class_map(sample), samples.instance_map(sample)
        if num_classes == 2:
            classes = (classes > 0).astype(np.uint8)
        cells = connected_cells(classes > 0) if cells is None else without_gaps(cells)
        found.append(Named(sample.name, LabelledImage(samples.synthetic(sample), classes, cells)))
    return found


def plain_images(folder: Path, config: DataConfig, most: int | None, seed: int) -> list[tuple[str, np.ndarray]]:
    """Images without labels as uint8 (H, W, C): all, or ``most`` of them, chosen by the seed and their names."""
    files = find_images(folder)
    names: Sequence[str] = shuffled_by_hash(files, seed)[:most]
    return [(name, read_whole(files[name], config)) for name in names]
