"""Sample an image again if it does not follow its mask: the judge of ``evaluate.py fidelity`` inside bulk sampling.

Each attempt has its own noise. The first attempt with the requested Dice is kept. After ``max_attempts`` attempts, the
best one is kept and marked. Scores from the judge that selected the images are biased upwards, so evaluate such a set
with another judge (``evaluate.py fidelity --seed``).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from common.disk import file_sha256
from common.pictures import repeat_gray
from dataset.config import DataConfig
from evaluation.fidelity import fidelity_of
from evaluation.judge import FolderJudge, Judge, build_network, judged_channels
from synthetic.writer import Attempt


class TrainedJudge(NamedTuple):
    """Weights of a judge on the CPU, and its entry for the settings of a set (plain types)."""

    weights: dict[str, torch.Tensor]
    note: dict[str, Any]


def portable_judge(found: FolderJudge, min_fidelity: float, max_attempts: int) -> TrainedJudge:
    """The judge in a form that other processes can rebuild, and its note. Arguments as for :class:`Redraw`."""
    weights = {name: value.detach().cpu() for name, value in found.judge.network.state_dict().items()}
    note = {
        "min_fidelity": min_fidelity,
        "max_attempts": max_attempts,
        "judge_key": found.key,
        "judge_weights_sha256": weights_sha256(weights),
        "judge_images_sha256": sorted(file_sha256(pair.image_path) for pair in found.pairs.pairs),
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
        min_fidelity: least Dice of an image that is kept (:func:`evaluation.fidelity.fidelity_of`), in (0, 1].
        max_attempts: most attempts per image, at least 1.
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
