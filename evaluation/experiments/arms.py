"""The arms of the utility experiment: what a segmenter trains on. All but one have the same number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import InputError
from evaluation.experiments.segmenter import Phase
from evaluation.experiments.sources import CopyPaste, Labelled
from evaluation.fidelity import LabelledImage

REAL, LONGER, COPY_PASTE, SELF_TRAINING = "real", "real, longer", "copy-paste", "self-training"
WITHOUT_SYNTHETIC = (REAL, LONGER, COPY_PASTE, SELF_TRAINING)
ONLY_SYNTHETIC = "synthetic"
LONGER_FACTOR = 3  # on the steps of the arm ``LONGER``
WAYS = ("real + synthetic", "copy-paste + synthetic", "synthetic then real", "80 % synthetic")
PRETRAINING = 0.5  # share of the steps on synthetic images alone
RULES = {"": (False, False), "ignore": (True, False), "practise": (False, True), "both rules": (True, True)}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        way: one of ``WITHOUT_SYNTHETIC`` or ``WAYS``, or ``ONLY_SYNTHETIC``.
        rules: key of ``RULES``: whether badly drawn pixels are ignored, and whether hard masks are drawn more often.
    """

    way: str
    rules: str = ""

    @property
    def name(self) -> str:
        """Name in tables and flags, such as ``real + synthetic, ignore``."""
        return f"{self.way}, {self.rules}" if self.rules else self.way

    @property
    def ignores(self) -> bool:
        """Whether pixels that were drawn wrongly are ignored."""
        return RULES[self.rules][0]

    @property
    def practises(self) -> bool:
        """Whether hard masks are drawn more often."""
        return RULES[self.rules][1]

    @property
    def step_factor(self) -> int:
        """Factor on the number of steps that the other arms have."""
        return LONGER_FACTOR if self.way == LONGER else 1

    @property
    def is_synthetic(self) -> bool:
        """Whether it needs a synthetic set."""
        return self.way not in WITHOUT_SYNTHETIC


ARMS = {arm.name: arm for arm in [*map(Arm, WITHOUT_SYNTHETIC), *(Arm(way, rules) for way in WAYS for rules in RULES)]}
SHARE_ARMS = {name: Arm(name) for name in (REAL, ONLY_SYNTHETIC, WAYS[0])}  # for a split by shares of the labels
ALL_ARMS = {**ARMS, **SHARE_ARMS}


def arm_of(name: str) -> Arm:
    """The arm with a given name.

    Raises:
        InputError: the name is unknown.
    """
    if name not in ALL_ARMS:
        raise InputError(f"`arms` {name!r}: unknown; choose from {'; '.join(ALL_ARMS)}")
    return ALL_ARMS[name]


def phases_of(
    arm: Arm,
    real: Sequence[LabelledImage],
    groups: Sequence[str],
    synthetic: Sequence[LabelledImage] = (),
    pseudo: Sequence[LabelledImage] = (),
) -> list[Phase]:
    """The training phases of an arm.

    Args:
        groups: group (look, patient) of each labelled image.
        synthetic: synthetic images, for arms that use them.
        pseudo: images with pseudo-labels, for self-training.
    """
    own = Labelled(real)
    if arm.way in (REAL, LONGER):
        return [Phase(1, [(own, 1)])]
    if arm.way == COPY_PASTE:
        return [Phase(1, [(own, 0.5), (CopyPaste(real, groups), 0.5)])]
    if arm.way == SELF_TRAINING:
        return [Phase(1, [(own, 0.5), (Labelled(pseudo), 0.5)])]
    made = Labelled(synthetic)
    mixtures: Mapping[str, list[Phase]] = {
        ONLY_SYNTHETIC: [Phase(1, [(made, 1)])],
        "real + synthetic": [Phase(1, [(own, 0.5), (made, 0.5)])],
        "copy-paste + synthetic": [Phase(1, [(own, 1 / 3), (CopyPaste(real, groups), 1 / 3), (made, 1 / 3)])],
        "synthetic then real": [Phase(PRETRAINING, [(made, 1)]), Phase(1 - PRETRAINING, [(own, 1)])],
        "80 % synthetic": [Phase(1, [(own, 0.2), (made, 0.8)])],
    }
    return mixtures[arm.way]
