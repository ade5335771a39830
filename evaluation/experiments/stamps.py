"""What the result of a training depends on, as hashes: a stored result with another stamp is out of date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.disk import file_sha256
from dataset.files import find_files
from evaluation.experiments.arms import SELF_TRAINING, Arm
from evaluation.experiments.label_split import UNLABELLED
from evaluation.experiments.labelled import LabelledFolders
from evaluation.experiments.practice_folder import PracticeFolder
from evaluation.experiments.split import SplitPlan

Stamp = dict[str, Any]


def digest_of(facts: Any) -> str:
    """SHA-256 of facts of JSON types."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path, what: str, known: dict[tuple[int, ...], str] | None = None) -> str:
    """SHA-256 of the names and contents of a folder's files. Errors as of ``find_files``.

    Args:
        what: what the files are, as for ``find_files``.
        known: see ``file_sha256``.
    """
    return digest_of({name: file_sha256(path, known) for name, path in find_files(folder, what).items()})


def is_current(stored: Mapping[str, Any], stamp: Stamp) -> bool:
    """Whether all facts of a stamp are those of a stored result, which may have more."""
    return all(name in stored and stored[name] == value for name, value in json.loads(json.dumps(stamp)).items())


class Stamps:
    """The stamps of one run. Every file is read once, before anything trains on it. Hard links count as one file."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}
        self._digests: dict[tuple[object, ...], Any] = {}

    def of(self, plan: SplitPlan, labels: int, arm: Arm, made: PracticeFolder | None, data: Stamp) -> Stamp:
        """Facts that the score of an arm depends on.

        Args:
            labels: number of labels, a key of ``plan.shares``.
            made: synthetic images. None: the stamp says nothing of them.
            data: how images are read.
        """
        names = [*plan.test, *plan.shares[labels]]
        files = {
            "labelled": self._part(plan.part(labels)),
            "test": self._part(plan.part(None)),
            "groups": digest_of({name: plan.groups.get(name, "") for name in names}),
        }
        unlabelled = plan.part(labels) / UNLABELLED / "images"
        if arm.way == SELF_TRAINING and unlabelled.is_dir():
            files["unlabelled"] = self._folder(unlabelled, "image")
        stamp = {**data, "files": files}
        if arm.is_synthetic and made is not None:
            stamp["sets"] = self._sets(made, arm)
        return stamp

    def _part(self, folder: Path) -> str:
        """One hash of images, masks and instances of a part of a split."""
        own = LabelledFolders.of_part(folder, "auto")
        kinds = {"image": own.images, "mask": own.masks, "instance labels": own.instances}
        return digest_of({what: place and self._folder(place, what) for what, place in kinds.items()})

    def _folder(self, folder: Path, what: str) -> str:
        if (folder, what) not in self._digests:
            self._digests[folder, what] = folder_digest(folder, what, self._known)
        return self._digests[folder, what]

    def _sets(self, made: PracticeFolder, arm: Arm) -> list[str]:
        key = (made.folder, arm.ignores, arm.practises)
        if key not in self._digests:
            rounds = made.files(arm.ignores, arm.practises)
            self._digests[key] = [digest_of([file_sha256(path, self._known) for path in paths]) for paths in rounds]
        return self._digests[key]
