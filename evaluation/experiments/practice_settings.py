"""What the practice loop is told: its settings, its unlabelled images, and the commands that it calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evaluation.experiments.labelled import LabelledFolders
from evaluation.experiments.practice_masks import CellFiles, MaskPart
from evaluation.experiments.practice_rules import IGNORE_FACTOR, MOST_DRAWS
from evaluation.experiments.segmenter import SegmenterConfig

SIMULATED_SHARE = 0.25
CLASS_PSEUDO_SHARE = 0.5  # of masks with classes


@dataclass(frozen=True)
class PracticeSettings:
    """Settings that decide the result, besides the data.

    Attributes:
        masks: number of new masks.
        simulated_share: fraction of the new masks that is simulated, not recombined. None: ``SIMULATED_SHARE``, or none
            if the masks have classes, which cannot be simulated.
        pseudo_share: fraction of the new masks that is taken from a segmentation of the unlabelled images. None: none,
            or ``CLASS_PSEUDO_SHARE`` if the masks have classes.
        pseudo_masks: whether the generator trains on soft pseudo-masks of the unlabelled images.
        generators: number of trainings of the generator. Each after the first gets new pseudo-masks.
        most_rounds: largest number of rounds after the first one.
        most_draws: number of images of the hardest mask.
        ignore_factor: a pixel is ignored if its loss exceeds this factor times its class's mean loss on real images.
        folds: number of parts of the cross-validation.
        steps: training steps of every segmenter.
        crop: side of the segmenters' training squares, pixels.
        unlabelled_images: largest number of unlabelled images in which cells are counted.
        seed: of all random numbers.
    """

    masks: int = 100
    simulated_share: float | None = None
    pseudo_share: float | None = None
    pseudo_masks: bool = True
    generators: int = 1
    most_rounds: int = 0
    most_draws: int = MOST_DRAWS
    ignore_factor: float = IGNORE_FACTOR
    folds: int = 3
    steps: int = SegmenterConfig.steps
    crop: int = 64
    unlabelled_images: int = 60
    seed: int = 0


class Unlabelled(NamedTuple):
    """Images without labels, or None, and a folder of their soft pseudo-masks, or None."""

    images: Path | None
    masks: Path | None = None


class Tools(Protocol):
    """The other commands, as the loop calls them. A call that is repeated continues the work of the first."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides their results, besides the arguments of the calls. JSON types."""

    def train(self, folders: LabelledFolders, unlabelled: Unlabelled, run: Path, steps: int | None = None) -> Path:
        """Train a generator, for ``steps`` if given; its checkpoint."""

    def make_masks(self, part: MaskPart, cells: CellFiles, side: int, seed: int, output: Path) -> None:
        """Make a part of the masks."""

    def sample(self, checkpoint: Path, masks: Path, mask_type: str, seed: int, output: Path) -> None:
        """Draw one image of every mask, in the looks of all training images."""
