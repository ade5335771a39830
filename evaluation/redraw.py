"""Draw again what does not follow its mask: the judge of ``evaluate.py fidelity`` inside of bulk sampling.

An image is drawn until the judge finds its mask in it with the Dice asked for, each attempt with noise of its own, at
most ``max_attempts`` times; then the best attempt stays and is marked. What was chosen by a judge is at its best before
that judge: measure such a set with another one (``evaluate.py fidelity --seed``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.disk import file_sha256
from common.pictures import repeat_gray
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from evaluation.fidelity import fidelity_of
from evaluation.judge import Judge, JudgeConfig, build_network, judged_channels, load_or_train_judge
from synthetic.writer import Attempt


@dataclass(frozen=True)
class RedrawSettings:
    """When to draw again, and what the judge learns from.

    Attributes:
        min_fidelity: Dice with the mask (:func:`evaluation.fidelity.fidelity_of`) from which an image is kept, (0, 1].
        max_attempts: draws of an image at most.
        images: real images that teach the judge.
        masks: their masks.
        mask_type: what the masks hold.
        normalize: divide soft masks by their sum.
        steps: training steps of the judge.
        seed: of the judge.
        cache_dir: where trained judges are kept.
    """

    min_fidelity: float
    max_attempts: int
    images: Path
    masks: Path
    mask_type: str = "auto"
    normalize: bool = False
    steps: int = 400
    seed: int = 0
    cache_dir: Path = Path("judges")


class TrainedJudge(NamedTuple):
    """Weights of a judge on the CPU, and what a set made with it says about it (plain types)."""

    weights: dict[str, torch.Tensor]
    note: dict[str, Any]


def train_redraw_judge(
    settings: RedrawSettings, config: DataConfig, device: torch.device, progress: bool = False
) -> TrainedJudge:
    """The judge, from the cache where it has been trained before.

    Args:
        settings: its pairs and budget.
        config: of the generator; the judge sees images as it does.
        device: where to train.
        progress: show a progress bar.

    Raises:
        InputError: unusable files.
    """
    pairs = PairedFolder(
        settings.images, settings.masks, config, settings.mask_type,
        seed=settings.seed, progress=progress, normalize=settings.normalize,
    )  # fmt: skip
    judge_config = JudgeConfig(config.num_classes, judged_channels(config), settings.steps, seed=settings.seed)
    judge, key, _ = load_or_train_judge(pairs, judge_config, settings.cache_dir, device, progress)
    weights = {name: value.detach().cpu() for name, value in judge.network.state_dict().items()}
    note = {
        "min_fidelity": settings.min_fidelity,
        "max_attempts": settings.max_attempts,
        "judge_key": key,
        "judge_weights_sha256": weights_sha256(weights),
        "judge_images_sha256": sorted(file_sha256(pair.image_path) for pair in pairs.pairs),
    }
    return TrainedJudge(weights, note)


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """One hash of all weights: a judge that was trained again is another one where its numbers differ."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


class Redraw:
    """Decides after every draw of an image which one is kept, and whether to draw again.

    One image is judged at a time. What a network answers depends in the last bits on how many images it is given, and
    an image may not depend on its neighbours.

    Args:
        judge: segmenter that learned from real pairs.
        min_fidelity: see :class:`RedrawSettings`.
        max_attempts: see :class:`RedrawSettings`.
    """

    def __init__(self, judge: Judge, min_fidelity: float, max_attempts: int) -> None:
        self.judge = judge
        self.min_fidelity = min_fidelity
        self.max_attempts = max_attempts

    @classmethod
    def from_trained(cls, trained: TrainedJudge, config: DataConfig, device: torch.device) -> Redraw:
        """The same judge on any process."""
        network = build_network(config.num_classes, channels=judged_channels(config))
        network.load_state_dict(trained.weights)
        judge = Judge(network, device, config.image_size)
        return cls(judge, trained.note["min_fidelity"], trained.note["max_attempts"])

    def __call__(self, before: Attempt | None, prob_map: np.ndarray, image: np.ndarray, number: int) -> Attempt:
        """The better of two draws; of equal ones the first.

        Args:
            before: the draw that is kept so far, None for the first.
            prob_map: (K, S, S) the image's mask.
            image: (S, S, C) uint8 draw.
            number: of this draw, from 1.
        """
        found = self.judge.class_maps([repeat_gray(image)])[0] > 0
        fidelity = fidelity_of(found, prob_map.argmax(axis=0) > 0)
        if before is not None and before.fidelity >= fidelity:
            return replace(before, tried=number)
        return Attempt(number, fidelity, fidelity >= self.min_fidelity, tried=number)

    def is_done(self, attempt: Attempt) -> bool:
        """Whether the draw that is kept is good enough, or no draw is left."""
        return attempt.reached or attempt.tried >= self.max_attempts
