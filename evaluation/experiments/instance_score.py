"""Scores of an instance segmenter over test images: AP, AP of touching cells, PQ, Dice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from evaluation.experiments.segmenter import Found
from evaluation.fidelity import LabelledImage
from evaluation.instances import InstanceCounts, dice, mean_of_known, touching_cells


@dataclass(frozen=True)
class InstanceScore:
    """Scores over test images; None if nothing can be said.

    Attributes:
        ap50, ap75, ap90: average precision at an IoU of 0.5, 0.75, 0.9, over the cells of all images.
        ap50_touching: AP at 0.5 of the cells that touch another one.
        pq: panoptic quality.
        dice: foreground, mean over the images with cells.
        class_dice: of the classes 1..K-1, over the pixels of all images.
    """

    ap50: float | None
    ap75: float | None
    ap90: float | None
    ap50_touching: float | None
    pq: float | None
    dice: float | None
    class_dice: list[float | None]


@dataclass
class ScoreSums:
    """What is counted image by image."""

    num_classes: int
    cells: InstanceCounts = field(default_factory=InstanceCounts)
    touching: InstanceCounts = field(default_factory=InstanceCounts)
    dices: list[float] = field(default_factory=list)
    pixels: np.ndarray | None = None  # (K, 3): in both, found, true

    def add(self, found: Found, item: LabelledImage) -> None:
        """Count one image."""
        self.cells.add(found.cells, item.cells)
        self.touching.add(*touching_cells(found.cells, item.cells))
        if (item.classes > 0).any():
            self.dices.append(dice(found.classes > 0, item.classes > 0))
        numbers = np.arange(self.num_classes)[:, None]
        one, other = found.classes.ravel() == numbers, item.classes.ravel() == numbers
        counts = np.stack([(one & other).sum(1), one.sum(1), other.sum(1)], axis=1)
        self.pixels = counts if self.pixels is None else self.pixels + counts

    def score(self) -> InstanceScore:
        """The scores of all images so far."""
        counts = [] if self.pixels is None else self.pixels[1:].tolist()
        return InstanceScore(
            ap50=self.cells.ap(0.5),
            ap75=self.cells.ap(0.75),
            ap90=self.cells.ap(0.9),
            ap50_touching=self.touching.ap(0.5),
            pq=self.cells.pq,
            dice=mean_of_known(self.dices),
            class_dice=[2 * both / (one + other) if one + other else None for both, one, other in counts],
        )


def score_segmenter(
    segment: Callable[[np.ndarray], Found], images: Iterable[tuple[LabelledImage, str]], num_classes: int
) -> tuple[InstanceScore, dict[str, InstanceScore]]:
    """Run a segmenter on labelled images.

    Args:
        segment: a whole uint8 image (H, W, C) -> what is found.
        images: each with the name of its group (look, patient).

    Returns:
        The score over all images, and the score of each group.
    """
    everything = ScoreSums(num_classes)
    groups: dict[str, ScoreSums] = {}
    for item, group in images:
        found = segment(item.image)
        everything.add(found, item)
        groups.setdefault(group, ScoreSums(num_classes)).add(found, item)
    return everything.score(), {group: sums.score() for group, sums in groups.items()}
