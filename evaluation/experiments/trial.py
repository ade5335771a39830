"""The utility experiment. It can be interrupted and continued after each training.

There is one training per selection, number of labels, arm and seed. Generator, masks and segmenters may use the labels
of their own selection only. The other training images count as unlabelled. All arms have the same augmentation, and the
same number of steps, except real images trained longer. A split by shares of the labels is one selection, whose numbers
are percentages.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.disk import file_sha256, open_work, write_json
from common.errors import InputError
from common.log import Pace
from common.plain import read_as, read_json
from dataset.config import DataConfig
from evaluation.experiments.arms import ONLY_SYNTHETIC, REAL, SELF_TRAINING, Arm, arm_of, phases_of
from evaluation.experiments.instance_score import InstanceScore, score_segmenter
from evaluation.experiments.label_split import UNLABELLED
from evaluation.experiments.labelled import LabelledFolders, Named, plain_images, real_pairs, segmenter_classes
from evaluation.experiments.leaks import refuse_leaks
from evaluation.experiments.practice_folder import PracticeFolder
from evaluation.experiments.segmenter import Segmenter, SegmenterConfig, train_segmenter
from evaluation.experiments.sources import pseudo_label
from evaluation.experiments.split import SplitPlan
from evaluation.experiments.stamps import Stamp, Stamps, digest_of, is_current
from evaluation.fidelity import LabelledImage
from evaluation.judge import build_network, judged_channels, load_or_train
from evaluation.output import number

logger = logging.getLogger(__name__)
TRIAL_VERSION = 2  # raise it when the same settings would give another score
LEAST_CONFIDENCE = 0.9  # of a pseudo-label
RESULTS, REPLACED, NETWORKS = "results", "replaced", "segmenters"


@dataclass(frozen=True)
class TrialSettings:
    """Settings that decide a score, besides the data.

    Attributes:
        arms: to train; an arm that is named twice is trained once.
        labels: numbers of labels, or percentages; each once, too.
        seeds: number of trainings of every arm and selection.
        steps: steps of every training.
        crop: side of the training squares, pixels.
        pseudo_images: largest number of unlabelled images for self-training.
        mask_type: meaning of the values in the real masks.
        mask_values: stored value of each class in the real masks; None is what the set's generator was trained with.
        config: how images are read, if no synthetic set says it.
    """

    arms: tuple[Arm, ...]
    labels: tuple[int, ...]
    seeds: int = 1
    steps: int = SegmenterConfig.steps
    crop: int = 64
    pseudo_images: int = 60
    mask_type: str = "auto"
    mask_values: Sequence[int] | None = None
    config: DataConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", tuple(dict.fromkeys(self.arms)))
        object.__setattr__(self, "labels", tuple(dict.fromkeys(self.labels)))

    def fixed(self) -> dict:
        """Settings that all results in one folder share."""
        return {
            "trial": TRIAL_VERSION,
            "steps": self.steps,
            "crop": self.crop,
            "pseudo_images": self.pseudo_images,
            "mask_type": self.mask_type,
        }


@dataclass(frozen=True)
class TrialRow:
    """One training and its scores on the test images."""

    selection: int
    labels: int
    arm: str
    seed: int
    real_images: int
    synthetic_images: int
    score: InstanceScore
    groups: dict[str, InstanceScore]
    pseudo_images: int = 0

    @classmethod
    def from_dict(cls, content: dict) -> TrialRow:
        """The inverse of ``dataclasses.asdict``."""
        groups = {name: InstanceScore(**score) for name, score in content["groups"].items()}
        return cls(**{**content, "score": InstanceScore(**content["score"]), "groups": groups})


class Case:
    """One selection at one number of labels. Images are read at their first use.

    Args:
        labels: number of labels, a key of ``plan.shares``.
        synthetic: practice folder or synthetic set of this case, or None.
        checkpoint: of the generator, if the set does not say what it was trained on.
        stamps: of the run.

    Raises:
        InputError: a leak.
    """

    def __init__(
        self,
        plan: SplitPlan,
        selection: int,
        labels: int,
        synthetic: Path | None,
        settings: TrialSettings,
        checkpoint: Path | None = None,
        stamps: Stamps | None = None,
    ) -> None:
        self.stamps = stamps or Stamps()
        self.plan, self.selection, self.labels, self.settings = plan, selection, labels, settings
        self.made = None if synthetic is None else PracticeFolder(synthetic)
        sets = [] if self.made is None else self.made.sets()
        for samples in sets:
            refuse_leaks(plan, labels, samples, checkpoint)
        config = sets[0].require_config() if sets else settings.config
        if config is None:
            raise InputError(
                "no synthetic set says how images are read: give `image_size` and the other fields of training"
            )
        self.config = config.with_mask_values(settings.mask_values)
        parts = [self._folders(labels), self._folders(None)]
        self.num_classes = segmenter_classes(sets[0] if sets else None, self.config, parts)

    @property
    def arms(self) -> list[Arm]:
        """The arms that this case can run: without a set, those of real images."""
        return [arm for arm in self.settings.arms if self.made is not None or not arm.is_synthetic]

    @cached_property
    def real(self) -> list[Named]:
        """The labelled images."""
        return self._read(self.labels)

    @cached_property
    def test(self) -> list[Named]:
        """The test images."""
        return self._read(None)

    def _folders(self, share: int | None) -> LabelledFolders:
        return LabelledFolders.of_part(self.plan.part(share), self.settings.mask_type)

    def _read(self, share: int | None) -> list[Named]:
        return real_pairs(self._folders(share), self.config, self.num_classes)

    def group(self, name: str) -> str:
        """Look or patient of an image: of a training image by its own name, of a test image by that of its file."""
        groups = self.plan.groups
        tested = name.replace("__", "/", 1) if name.startswith("test__") else name
        return groups.get(name) or groups.get(tested, "")

    def segmenter(self, seed: int, step_factor: int = 1) -> SegmenterConfig:
        """Settings of a segmenter."""
        steps = self.settings.steps * step_factor
        return SegmenterConfig(self.num_classes, judged_channels(self.config), self.settings.crop, steps, seed=seed)

    @property
    def data(self) -> Stamp:
        """How images are read. Gray values of a window over the data set differ with the labels, and may."""
        config = dataclasses.replace(self.config, window_values=None, num_classes=self.num_classes)
        return {"data": config.to_dict(), "classes": self.num_classes}

    def stamp(self, arm: Arm) -> Stamp:
        """Facts that the score of an arm depends on. A stored score with other facts is computed again."""
        return self.stamps.of(self.plan, self.labels, arm, self.made, self.data)


@dataclass(frozen=True)
class Study:
    """Selections, synthetic sets and settings: which cases there are, and which results are of them.

    Attributes:
        plans: the selections.
        synthetic: folder with ``selection_SS/labels_NNN`` for every case, or a set for each number of labels; a number
            without a set trains on real images only. None: arms without synthetic images only.
        checkpoints: of the generators, for numbers of labels whose set does not say what it was trained on.
        stamps: facts about the files, each computed once.
    """

    plans: Sequence[SplitPlan]
    synthetic: Path | Mapping[int, Path] | None
    settings: TrialSettings
    checkpoints: Mapping[int, Path]
    stamps: Stamps = field(default_factory=Stamps)

    def cases(self, selections: Sequence[int] | None) -> list[Case]:
        """The cases of these selections, or of all.

        Raises:
            InputError: nothing to train, unknown numbers, leaks, sets that read images in different ways.
        """
        self._refuse_nothing()
        self._refuse_unknown(selections)
        needs_sets = any(arm.is_synthetic for arm in self.settings.arms)
        found = []
        for selection, plan in enumerate(self.plans):
            if selections is not None and selection not in selections:
                continue
            for labels in self.settings.labels:
                folder = self._set_folder(plan, labels)
                if isinstance(self.synthetic, Path) and not needs_sets:
                    folder = folder if folder is not None and folder.is_dir() else None
                checkpoint = self.checkpoints.get(labels)
                found.append(Case(plan, selection, labels, folder, self.settings, checkpoint, self.stamps))
        _refuse_different_data(found)
        return found

    def _set_folder(self, plan: SplitPlan, labels: int) -> Path | None:
        """Where the synthetic images of a case lie, or None."""
        if isinstance(self.synthetic, Path):
            return self.synthetic / plan.folder.name / plan.part(labels).name
        return (self.synthetic or {}).get(labels)

    def _refuse_nothing(self) -> None:
        """Raise InputError if no arm has anything to train on."""
        plan, synthetic, arms = self.plans[0], self.synthetic, self.settings.arms
        by_share = plan.unit == "percent"
        if not self.settings.labels:
            held = ", ".join(map(str, plan.shares))
            raise InputError(
                f"nothing is chosen of {plan.folder}, which has {held}: give `synthetic`, a set for one of them, or "
                "`shares`, to train on real images alone"
            )
        if not synthetic and any(arm.is_synthetic for arm in arms):
            need = "`synthetic`: SHARE=SAMPLE_DIR" if by_share else "`sets`: a folder with selection_00/labels_NNN"
            raise InputError(f"arms with synthetic images need {need}")
        if not synthetic or isinstance(synthetic, Path) or not all(arm.is_synthetic for arm in arms):
            return
        without = [labels for labels in self.settings.labels if labels not in synthetic]
        if without:
            raise InputError(
                f"no arm can run at {plan.words(without[0])}: give `synthetic`, a set for them, or an arm without "
                f"synthetic images, such as {REAL}"
            )

    def _refuse_unknown(self, selections: Sequence[int] | None) -> None:
        """Raise InputError if the split has no such selection or number of labels."""
        count = len(self.plans)
        unknown = sorted(set(selections or ()) - set(range(count)))
        if unknown:
            raise InputError(f"`selections` {unknown[0]}: there are {count}, from 0 to {count - 1}")
        for plan in self.plans:
            unknown = sorted(set(self.settings.labels) - set(plan.shares))
            if unknown:
                known = ", ".join(map(str, plan.shares))
                kind = "`shares`" if plan.unit == "percent" else "`labels`"
                raise InputError(f"{kind} {unknown[0]}: {plan.folder} has no such part; it has {known}")

    def read_rows(self, output: Path, data: Stamp) -> list[TrialRow]:
        """The results of a folder whose stamp is current, by labels, arm, selection and seed. Others are counted.

        Args:
            data: how images are read, as in all stamps.
        """
        rows, unknown, other = [], 0, 0
        for path in sorted((output / RESULTS).glob("*.json")):
            row, stored = read_as(path, _row_and_stamp, "remove it to train again")
            if self._is_current(row, stored, data):
                rows.append(row)
            elif "files" in stored:
                other += 1
            else:
                unknown += 1
        reasons = (
            (other, "are of other images or sets"),
            (unknown, "are of an earlier version, which noted no images"),
        )
        for count, reason in reasons:
            if count:
                logger.warning("left out: %d results in %s %s", count, output / RESULTS, reason)
        return sorted(rows, key=lambda row: (row.labels, row.arm, row.selection, row.seed))

    def _is_current(self, row: TrialRow, stored: Mapping[str, Any], data: Stamp) -> bool:
        """Whether a result, also one that this run did not ask for, is of these images and sets."""
        if row.selection >= len(self.plans) or row.labels not in self.plans[row.selection].shares:
            return False
        plan = self.plans[row.selection]
        try:
            arm = arm_of(row.arm)
            folder = self._set_folder(plan, row.labels) if arm.is_synthetic else None
            made = PracticeFolder(folder) if folder is not None and folder.is_dir() else None
            return is_current(stored, self.stamps.of(plan, row.labels, arm, made, data))
        except InputError:  # the set is being made anew, or the arm is of another version
            return False


def run_trial(
    study: Study, output: Path, device: torch.device, selections: Sequence[int] | None = None
) -> list[TrialRow]:
    """Train and test all cases that have no result yet.

    Args:
        output: folder for the results, a file per training.
        selections: numbers of the selections to run now. None: all.

    Returns:
        All rows in ``output`` whose stamp is that of these images, settings and sets. Where ``study.synthetic`` names
        no set, the set is not compared.

    Raises:
        InputError: leaks (before any training), nothing to train, unknown numbers of labels or selections, sets that
            read images in different ways, a folder of other settings.
    """
    cases = study.cases(selections)
    data = cases[0].data
    fixed = study.settings.fixed() | ({"unit": "percent"} if study.plans[0].unit == "percent" else {})
    with open_work(output, fixed, [RESULTS, NETWORKS]):
        for name in (RESULTS, NETWORKS):
            (output / name).mkdir(exist_ok=True)
        jobs = [
            (case, arm, seed)
            for case in cases
            for seed in range(study.settings.seeds)
            for arm in case.arms
            if not _is_there(_result(output, case, arm, seed), case.stamp(arm))
        ]
        stale = sum(_result(output, *job).is_file() for job in jobs)
        if stale:
            logger.warning(
                "%d results in %s are of other images or sets, or of an earlier version that did not note its images. "
                "They are computed again. The old ones go to %s.", stale, output / RESULTS, output / REPLACED,
            )  # fmt: skip
        cases.clear()
        total, pace = len(jobs), Pace(len(jobs), "trainings")
        while jobs:
            case, arm, seed = jobs.pop(0)  # the images of a case leave memory with its last job
            row = train_and_test(case, arm, seed, output, device)
            _write_result(output, _result(output, case, arm, seed), {"stamp": case.stamp(arm), "row": asdict(row)})
            done = total - len(jobs)
            logger.info(
                "selection %d, %s, %s, seed %d: AP %s; training %d of %d, %s",
                case.selection, case.plan.words(case.labels), arm.name, seed, number(row.score.ap50), done, total,
                pace(done),
            )  # fmt: skip
    return study.read_rows(output, data)


def _refuse_different_data(cases: Sequence[Case]) -> None:
    for case in cases:
        if case.data != cases[0].data:
            one, other = (each.plan.words(each.labels) for each in (cases[0], case))
            raise InputError(f"the sets of {one} and {other} were made at different sizes, classes, crops or windows")


def _result(output: Path, case: Case, arm: Arm, seed: int) -> Path:
    return output / RESULTS / f"{_slug(case, arm.name, seed)}.json"


def _slug(case: Case, arm: str, seed: int) -> str:
    words = "".join(letter if letter.isalnum() else "_" for letter in arm.replace(" ", ""))
    return f"selection_{case.selection:02d}_labels_{case.labels:03d}_{words}_seed_{seed}"


def _is_there(path: Path, stamp: Stamp) -> bool:
    return path.is_file() and is_current(read_json(path, "remove it to train again").get("stamp", {}), stamp)


def _write_result(output: Path, path: Path, content: dict[str, Any]) -> None:
    """Write a result. The one that it replaces is kept."""
    if path.is_file():
        (output / REPLACED).mkdir(exist_ok=True)
        path.replace(output / REPLACED / f"{path.stem}_{file_sha256(path)[:8]}.json")
    write_json(path, content)


def _row_and_stamp(content: dict[str, Any]) -> tuple[TrialRow, dict[str, Any]]:
    return TrialRow.from_dict(content["row"]), dict(content.get("stamp", {}))


def train_and_test(case: Case, arm: Arm, seed: int, output: Path, device: torch.device) -> TrialRow:
    """One training of one arm and its scores on the test images."""
    real = [one.item for one in case.real]
    groups = [case.group(one.name) for one in case.real]
    made: list[LabelledImage] = []
    pseudo: list[LabelledImage] = []
    if arm.is_synthetic and case.made is not None:
        made = case.made.images(case.num_classes, arm.ignores, arm.practises)
    if arm.way == SELF_TRAINING:
        pseudo = _pseudo_labelled(case, seed, output, device)
    if arm.way == REAL:
        network = _teacher(case, seed, output, device)
    else:
        config = case.segmenter(seed, arm.step_factor)
        network = train_segmenter(phases_of(arm, real, groups, made, pseudo), config, device)
    tested = [(one.item, case.group(one.name)) for one in case.test]
    score, by_group = score_segmenter(Segmenter([network], device), tested, case.num_classes)
    learned = 0 if arm.way == ONLY_SYNTHETIC else len(real)
    return TrialRow(case.selection, case.labels, arm.name, seed, learned, len(made), score, dict(by_group), len(pseudo))


def _teacher(case: Case, seed: int, output: Path, device: torch.device) -> nn.Module:
    """The segmenter of the real images alone. It is kept for self-training."""
    key = digest_of(case.stamp(Arm(REAL)))[:8]
    path = output / NETWORKS / f"{_slug(case, REAL, seed)}_{key}.pt"
    config = case.segmenter(seed)

    def train() -> nn.Module:
        groups = [case.group(one.name) for one in case.real]
        return train_segmenter(phases_of(Arm(REAL), [one.item for one in case.real], groups), config, device)

    return load_or_train(path, build_network(config.num_classes + 1, channels=config.channels), train)[0]


def _pseudo_labelled(case: Case, seed: int, output: Path, device: torch.device) -> list[LabelledImage]:
    folder = case.plan.part(case.labels) / UNLABELLED / "images"
    if not folder.is_dir():
        raise InputError(f"{folder} is not there: without unlabelled images leave {SELF_TRAINING!r} out of the `arms`")
    images = plain_images(folder, case.config, case.settings.pseudo_images, seed)
    segmenter = Segmenter([_teacher(case, seed, output, device)], device)
    return [pseudo_label(image, segmenter, LEAST_CONFIDENCE) for _, image in images]
