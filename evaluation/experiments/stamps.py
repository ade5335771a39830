"""What stored results depend on, as hashes: with other files, a result is out of date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.disk import file_sha256
from common.errors import InputError
from dataset.files import find_files, find_images, find_images_and_masks
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
        what: what the files are, as for ``find_files``. Masks beside images do not count as images.
        known: see ``file_sha256``.
    """
    files = find_images(folder) if what == "image" else find_files(folder, what)
    return digest_of({name: file_sha256(path, known) for name, path in files.items()})


# --- of a practice folder --------------------------------------------------------------------------------------------

FILES = {  # setting of a practice folder -> what its files are
    "images_sha256": "labelled images",
    "masks_sha256": "masks",
    "instances_sha256": "instances",
    "unlabelled_sha256": "unlabelled images",
}


def hashes_of_labels(folders: LabelledFolders, unlabelled: Path | None) -> dict[str, Any]:
    """The values of ``FILES``: a hash of each labelled image, and one of all files for each of the others, or None."""
    known: dict[tuple[int, ...], str] = {}
    images = sorted(find_images_and_masks(folders.images, folders.masks)[0].values())
    return {
        "images_sha256": [file_sha256(path, known) for path in images],
        "masks_sha256": folder_digest(folders.masks, "mask", known),
        "instances_sha256": folders.instances and folder_digest(folders.instances, "instance labels", known),
        "unlabelled_sha256": unlabelled and folder_digest(unlabelled, "image", known),
    }


def refuse_other_files(folder: Path, new: Mapping[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The settings ``old`` of a practice folder that is to be continued with ``new``.

    Raises:
        InputError: the folder was begun with other files, or does not say with which.
    """
    if "practice" in old and any(name not in old for name in (*FILES, "train_flags", "sample_flags")):
        raise InputError(
            f"{folder} was begun by an earlier version. It did not note masks, instances, unlabelled images and flags, "
            "so they may have changed since. Name another folder. The sets of this one can still be used"
        )
    changed = [what for name, what in FILES.items() if name in old and old[name] != new[name]]
    if changed:
        raise InputError(
            f"{folder} was begun with other {' and '.join(changed)}. Its segmenters and scores do not belong to these: "
            "name another folder, or restore the files"
        )
    return old


# --- of a result of utility ------------------------------------------------------------------------------------------


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
            self._digests[key] = [
                digest_of([one.rows, [file_sha256(path, self._known) for path in one.paths]])
                for one in made.files(arm.ignores, arm.practises)
            ]
        return self._digests[key]
