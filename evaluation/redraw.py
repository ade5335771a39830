"""Sample an image again if it does not follow its mask: the judge of ``evaluate.py fidelity`` inside bulk sampling.

Each attempt has its own noise. The first attempt with the requested Dice is kept. After ``max_attempts`` attempts, the
best one is kept and marked. Scores from the judge that selected the images are biased upwards, so evaluate such a set
with another judge (``evaluate.py fidelity --seed``).
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
    """When to sample again, and how to train the judge.

    Attributes:
        min_fidelity: keep an image with at least this Dice (:func:`evaluation.fidelity.fidelity_of`), in (0, 1].
        max_attempts: most attempts per image.
        images: real images to train the judge.
        masks: their masks.
        mask_type: one of ``MASK_TYPES``.
        normalize: divide soft masks by their sum.
        steps: training steps of the judge.
        seed: seed of the judge's training.
        cache_dir: folder that keeps trained judges.
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
    """Weights of a judge on the CPU, and its entry for the settings of a set (plain types)."""

    weights: dict[str, torch.Tensor]
    note: dict[str, Any]


def train_redraw_judge(
    settings: RedrawSettings, config: DataConfig, device: torch.device, progress: bool = False
) -> TrainedJudge:
    """Train the judge, or load it from the cache.

    Args:
        settings: pairs and training steps of the judge.
        config: data settings of the generator. The judge reads images in the same way.
        device: where to train.
        progress: show a progress bar.

    Raises:
        InputError: files are unusable.
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
    """Hash of all weights. A judge that was trained again has another hash if its numbers differ."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


class Redraw:
    """Decides after every attempt which one is kept, and whether to sample again.

    Judges one image at a time. The last bits of a network's output depend on the batch size, and an image must not
    depend on the other images of its batch.

    Args:
        judge: segmenter trained on real pairs.
        min_fidelity: see :class:`RedrawSettings`.
        max_attempts: see :class:`RedrawSettings`.
    """

    def __init__(self, judge: Judge, min_fidelity: float, max_attempts: int) -> None:
        self.judge = judge
        self.min_fidelity = min_fidelity
        self.max_attempts = max_attempts

    @classmethod
    def from_trained(cls, trained: TrainedJudge, config: DataConfig, device: torch.device) -> Redraw:
        """Rebuild the same judge in any process."""
        network = build_network(config.num_classes, channels=judged_channels(config))
        network.load_state_dict(trained.weights)
        judge = Judge(network, device, config.image_size)
        return cls(judge, trained.note["min_fidelity"], trained.note["max_attempts"])

    def __call__(self, before: Attempt | None, prob_map: np.ndarray, image: np.ndarray, number: int) -> Attempt:
        """The better of two attempts. If they are equal, the first.

        Args:
            before: best attempt so far, None at the first call.
            prob_map: (K, S, S) mask of the image.
            image: (S, S, C) uint8 image of this attempt.
            number: number of this attempt, from 1.
        """
        found = self.judge.class_maps([repeat_gray(image)])[0] > 0
        fidelity = fidelity_of(found, prob_map.argmax(axis=0) > 0)
        if before is not None and before.fidelity >= fidelity:
            return replace(before, tried=number)
        return Attempt(number, fidelity, fidelity >= self.min_fidelity, tried=number)

    def is_done(self, attempt: Attempt) -> bool:
        """Whether the best attempt is good enough, or no attempt is left."""
        return attempt.reached or attempt.tried >= self.max_attempts
