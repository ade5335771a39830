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
from dataset.config import DataConfig
from dataset.files import find_files, read_mask
from dataset.mask_folder import MaskFolder
from evaluation.fidelity import LabelledImage, labelled_image
from synthetic.reader import SampleSet, read_whole


class Named(NamedTuple):
    """A labelled image and its name."""

    name: str
    item: LabelledImage


def segmenter_classes(samples: SampleSet | None, config: DataConfig) -> int:
    """Classes that a segmenter learns: those of the masks, but a boundary made from instances is no class."""
    rule = (samples.settings.get("mask_rule") or {}) if samples is not None else {}
    has_boundary = rule.get("mask_type") == "instances" and rule.get("num_classes") == 3
    return 2 if has_boundary else config.num_classes


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
        any_size = DataConfig(image_size=1, num_classes=num_classes)
        rule = MaskFolder(self.masks, any_size, self.mask_type, self.images, whole_scale=1.0).rule
        return self._replace(instances=self.masks) if rule.mask_type == "instances" else self


def real_pairs(folders: LabelledFolders, config: DataConfig, num_classes: int) -> list[Named]:
    """All pairs, whole at native scale; the resized middle square under crop "center"."""
    own = dataclasses.replace(config, num_classes=num_classes)
    scale = 1.0 if config.crop == "random" else None
    masks = MaskFolder(folders.masks, own, folders.mask_type, folders.images, whole_scale=scale)
    cells = find_files(folders.instances, "instance labels") if folders.instances is not None else {}
    found = []
    for name in masks.names:
        item = masks.load(name)
        pair = labelled_image(item, masks.rule)
        ids = pair.cells
        if cells:
            if name not in cells:
                raise InputError(f"{folders.instances} has no file for {name}")
            ids = item.view.apply_labels(read_mask(cells[name]))
        found.append(Named(name, pair._replace(cells=without_gaps(ids.astype(np.int64)))))
    return found


def set_pairs(samples: SampleSet, num_classes: int) -> list[Named]:
    """Images of a synthetic set with their labels."""
    found = []
    for sample in samples.samples:
        classes, cells = samples.class_map(sample), samples.instance_map(sample)
        if num_classes == 2:
            classes = (classes > 0).astype(np.uint8)
        cells = connected_cells(classes > 0) if cells is None else without_gaps(cells.astype(np.int64))
        found.append(Named(sample.name, LabelledImage(samples.synthetic(sample), classes, cells)))
    return found


def plain_images(folder: Path, config: DataConfig, most: int | None, seed: int) -> list[tuple[str, np.ndarray]]:
    """Images without labels as uint8 (H, W, C): all, or ``most`` of them, chosen by the seed and their names."""
    files = find_files(folder, "image")
    names: Sequence[str] = shuffled_by_hash(files, seed)[:most]
    return [(name, read_whole(files[name], config)) for name in names]
