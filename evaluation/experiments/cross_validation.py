"""Cross-validation inside a selection of labelled images. It needs no test images and no other labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.errors import InputError
from common.randomness import shuffled_groups
from evaluation.experiments.instance_score import InstanceScore, score_segmenter
from evaluation.experiments.labelled import Named
from evaluation.experiments.practice_rules import Scored, hardness
from evaluation.experiments.segmenter import Phase, Segmenter, SegmenterConfig, train_segmenter
from evaluation.experiments.sources import Labelled
from evaluation.fidelity import LabelledImage
from evaluation.image_facts import Shown, group_alike, groups_to_divide

LABELLED = "labelled"  # part of the masks: the labelled images' own ones


class Fold(NamedTuple):
    """The labelled images to train on, and those that are held out."""

    number: int
    train: list[Named]
    held_out: list[Named]


class Made(NamedTuple):
    """A synthetic image.

    Attributes:
        name: its file, without suffix.
        mask: name of the mask that it was drawn from. Several images can share one.
        item: image, classes (ignored pixels included) and cells.
    """

    name: str
    mask: str
    item: LabelledImage


@dataclass(frozen=True)
class FoldResult:
    """Score of one fold's segmenter on the held-out real images, and the hardness of each held-out mask."""

    fold: int
    score: InstanceScore
    hardness: dict[str, float]

    @classmethod
    def from_dict(cls, content: dict) -> FoldResult:
        """The inverse of ``dataclasses.asdict``."""
        return cls(content["fold"], InstanceScore(**content["score"]), content["hardness"])


def make_folds(pairs: Sequence[Named], count: int, seed: int) -> list[Fold]:
    """Folds of the labelled images, at most one per image; every image is held out once.

    Images that show nearly the same, such as one image under two names, are held out together.

    Raises:
        InputError: fewer than two images or folds.
    """
    if count < 2:
        raise InputError(f"{count} `folds`: cross-validation needs two or more")
    if len(pairs) < 2:
        raise InputError(f"{len(pairs)} labelled image: cross-validation needs two or more")
    alike = group_alike([Shown.of(one.name, one.item.image) for one in pairs])
    groups = shuffled_groups(groups_to_divide(alike), seed)
    order = {name: place for place, names in enumerate(groups) for name in names}
    count = min(count, len(groups))
    parts = [[one for one in pairs if order[one.name] % count == number] for number in range(count)]
    return [
        Fold(number, [one for other in parts if other is not part for one in other], part)
        for number, part in enumerate(parts)
    ]


def fold_of_mask(mask: str, count: int, seed: int) -> int:
    """The fold that holds out a mask, the same for all images of it."""
    return int(hashlib.sha256(f"{seed} {mask}".encode()).hexdigest()[:8], 16) % count


def run_fold(
    fold: Fold, count: int, made: Sequence[Made], config: SegmenterConfig, device: torch.device
) -> tuple[nn.Module, FoldResult]:
    """Train on the other folds, real and synthetic in equal parts, and test on this one.

    The segmenter has seen neither the held-out real images, nor images of their masks, nor any image of the other
    held-out masks. So the hardness of a mask is measured on images that are new to the segmenter.

    Args:
        fold: images to train on and to hold out.
        made: synthetic images. Without any, the segmenter trains on real images alone.
    """
    held_with_image = dict.fromkeys((f"{LABELLED}_{one.name}" for one in fold.train), False)
    held_with_image |= dict.fromkeys((f"{LABELLED}_{one.name}" for one in fold.held_out), True)

    def is_held_out(mask: str) -> bool:
        return held_with_image.get(mask, fold_of_mask(mask, count, config.seed) == fold.number)

    mine = [one for one in made if is_held_out(one.mask)]
    others = [one.item for one in made if not is_held_out(one.mask)]
    sources = [(Labelled([one.item for one in fold.train]), 0.5)] + ([(Labelled(others), 0.5)] if others else [])
    network = train_segmenter([Phase(1, sources)], config, device)
    segmenter = Segmenter([network], device)
    score, _ = score_segmenter(segmenter, [(one.item, "") for one in fold.held_out], config.num_classes)
    found: dict[str, list[float]] = {}
    for one in mine:
        losses = segmenter.pixel_losses(one.item.image, one.item.classes)
        found.setdefault(one.mask, []).append(hardness(Scored(losses, one.item.classes)))
    return network, FoldResult(fold.number, score, {mask: float(np.mean(values)) for mask, values in found.items()})
