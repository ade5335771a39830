"""The utility experiment. It can be interrupted and continued after each training.

There is one training per selection, number of labels, arm and seed. Generator, masks and segmenters may use the labels
of their own selection only. The other training images count as unlabelled. All arms have the same augmentation, and the
same number of steps, except real images trained longer. A split by shares of the labels is one selection, whose numbers
are percentages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from common.disk import SETTINGS, check_folder, file_sha256, lock_folder, write_json
from common.errors import InputError
from common.log import Pace
from common.plain import read_as, read_json
from dataset.config import DataConfig
from evaluation.experiments.arms import ONLY_SYNTHETIC, REAL, SELF_TRAINING, Arm, phases_of
from evaluation.experiments.instance_score import InstanceScore, score_segmenter
from evaluation.experiments.label_split import UNLABELLED
from evaluation.experiments.labelled import LabelledFolders, Named, plain_images, real_pairs, segmenter_classes
from evaluation.experiments.leaks import refuse_leaks
from evaluation.experiments.practice_folder import PracticeFolder
from evaluation.experiments.segmenter import Segmenter, SegmenterConfig, train_segmenter
from evaluation.experiments.sources import pseudo_label
from evaluation.experiments.split import SplitPlan
from evaluation.fidelity import LabelledImage
from evaluation.judge import build_network, judged_channels, load_or_train
from evaluation.output import number
from synthetic.manifest import MANIFEST

logger = logging.getLogger(__name__)
TRIAL_VERSION = 1  # raise it when the same settings would give another score
LEAST_CONFIDENCE = 0.9  # of a pseudo-label
RESULTS, NETWORKS = "results", "segmenters"


@dataclass(frozen=True)
class TrialSettings:
    """Settings that decide a score, besides the data.

    Attributes:
        labels: numbers of labels, or percentages.
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
    ) -> None:
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
        self.num_classes = segmenter_classes(sets[0] if sets else None, config)

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

    def _read(self, share: int | None) -> list[Named]:
        folders = LabelledFolders.of_part(self.plan.part(share), self.settings.mask_type)
        return real_pairs(folders, self.config, self.num_classes)

    def group(self, name: str) -> str:
        """Look or patient of an image."""
        return self.plan.groups.get(name.replace("__", "/", 1) if name.startswith("test__") else name, "")

    def segmenter(self, seed: int, step_factor: int = 1) -> SegmenterConfig:
        """Settings of a segmenter."""
        steps = self.settings.steps * step_factor
        return SegmenterConfig(self.num_classes, judged_channels(self.config), self.settings.crop, steps, seed=seed)

    def stamp(self, arm: Arm) -> dict[str, object]:
        """Facts that the score of an arm depends on. A stored score with other facts is computed again."""
        sets: list[str] = []
        if arm.is_synthetic and self.made is not None:
            sets = [file_sha256(self.made.set_folder(place) / MANIFEST) for place in range(len(self.made.rounds))]
            sets = sets if arm.practises else sets[:1]
        config = dataclasses.replace(self.config, window_values=None)
        return {"data": config.to_dict(), "classes": self.num_classes, "sets": sets}


def run_trial(
    plans: Sequence[SplitPlan],
    synthetic: Path | Mapping[int, Path] | None,
    settings: TrialSettings,
    output: Path,
    device: torch.device,
    selections: Sequence[int] | None = None,
    checkpoints: Mapping[int, Path] | None = None,
) -> list[TrialRow]:
    """Train and test all cases that have no result yet.

    Args:
        plans: the selections.
        synthetic: folder with ``selection_SS/labels_NNN`` for every case, or a set for each number of labels; a number
            without a set trains on real images only. None: arms without synthetic images only.
        output: folder for the results, a file per training.
        selections: numbers of the selections to run now. None: all.
        checkpoints: of the generators, for numbers of labels whose set does not say what it was trained on.

    Returns:
        All rows in ``output`` that belong to these settings.

    Raises:
        InputError: leaks (before any training), unknown numbers of labels, sets that read images in different ways, a
            folder of other settings.
    """
    cases = list(_cases(plans, synthetic, settings, selections, checkpoints or {}))
    _refuse_different_data(cases)
    fixed = settings.fixed() | ({"unit": "percent"} if plans[0].unit == "percent" else {})
    check_folder(output, fixed)
    (output / RESULTS).mkdir(parents=True, exist_ok=True)
    (output / NETWORKS).mkdir(exist_ok=True)
    with lock_folder(output, "name another `output`", [RESULTS, NETWORKS]):
        if not (output / SETTINGS).is_file():
            write_json(output / SETTINGS, fixed)
        jobs = [
            (case, arm, seed)
            for case in cases
            for seed in range(settings.seeds)
            for arm in case.arms
            if not _is_there(_result(output, case, arm, seed), case.stamp(arm))
        ]
        cases.clear()
        total, pace = len(jobs), Pace(len(jobs), "trainings")
        while jobs:
            case, arm, seed = jobs.pop(0)  # the images of a case leave memory with its last job
            row = train_and_test(case, arm, seed, output, device)
            write_json(_result(output, case, arm, seed), {"stamp": case.stamp(arm), "row": asdict(row)})
            done = total - len(jobs)
            logger.info(
                "selection %d, %s, %s, seed %d: AP %s; training %d of %d, %s",
                case.selection, case.plan.words(case.labels), arm.name, seed, number(row.score.ap50), done, total,
                pace(done),
            )  # fmt: skip
    return read_rows(output)


def _cases(
    plans: Sequence[SplitPlan],
    synthetic: Path | Mapping[int, Path] | None,
    settings: TrialSettings,
    selections: Sequence[int] | None,
    checkpoints: Mapping[int, Path],
) -> Iterator[Case]:
    needs_sets = any(arm.is_synthetic for arm in settings.arms)
    if needs_sets and not synthetic:
        by_share = plans[0].unit == "percent"
        need = "`synthetic`: SHARE=SAMPLE_DIR" if by_share else "`sets`: a folder with selection_00/labels_NNN"
        raise InputError(f"arms with synthetic images need {need}")
    for selection, plan in enumerate(plans):
        unknown = sorted(set(settings.labels) - set(plan.shares))
        if unknown:
            known = ", ".join(map(str, plan.shares))
            kind = "`shares`" if plan.unit == "percent" else "`labels`"
            raise InputError(f"{kind} {unknown[0]}: {plan.folder} has no such part; it has {known}")
        if selections is not None and selection not in selections:
            continue
        for labels in settings.labels:
            folder: Path | None
            if isinstance(synthetic, Path):
                folder = synthetic / plan.folder.name / plan.part(labels).name
                folder = folder if needs_sets or folder.is_dir() else None
            else:
                folder = (synthetic or {}).get(labels)
            yield Case(plan, selection, labels, folder, settings, checkpoints.get(labels))


def _refuse_different_data(cases: Sequence[Case]) -> None:
    """Gray values of a window over the data set differ with the labels, and may."""
    configs = [dataclasses.replace(case.config, window_values=None, num_classes=case.num_classes) for case in cases]
    for case, config in zip(cases, configs, strict=True):
        if config != configs[0]:
            one, other = (each.plan.words(each.labels) for each in (cases[0], case))
            raise InputError(f"the sets of {one} and {other} were made at different sizes, classes, crops or windows")


def _result(output: Path, case: Case, arm: Arm, seed: int) -> Path:
    return output / RESULTS / f"{_slug(case, arm.name, seed)}.json"


def _slug(case: Case, arm: str, seed: int) -> str:
    words = "".join(letter if letter.isalnum() else "_" for letter in arm.replace(" ", ""))
    return f"selection_{case.selection:02d}_labels_{case.labels:03d}_{words}_seed_{seed}"


def _is_there(path: Path, stamp: dict[str, object]) -> bool:
    if not path.is_file():
        return False
    if read_json(path, "remove it to train again").get("stamp") == json.loads(json.dumps(stamp)):
        return True
    logger.info("%s was made from other images; it is made again", path.name)
    return False


def read_rows(output: Path) -> list[TrialRow]:
    """All results of a folder, sorted by labels, arm, selection and seed."""
    paths = sorted((output / RESULTS).glob("*.json"))
    rows = [read_as(path, lambda one: TrialRow.from_dict(one["row"]), "remove it to train again") for path in paths]
    return sorted(rows, key=lambda row: (row.labels, row.arm, row.selection, row.seed))


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
    return TrialRow(
        case.selection, case.labels, arm.name, seed, learned, len(made) + len(pseudo), score, dict(by_group)
    )


def _teacher(case: Case, seed: int, output: Path, device: torch.device) -> nn.Module:
    """The segmenter of the real images alone. It is kept for self-training."""
    key = hashlib.sha256(json.dumps(case.stamp(Arm(REAL)), sort_keys=True).encode()).hexdigest()[:8]
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
