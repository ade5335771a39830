"""A practice folder on disk: its rounds, its synthetic sets and the pixels to ignore.

FOLDER/practice.json           settings and what every round gave; written last
FOLDER/round_0/samples         a set of sample_ddp.py; round_1 and so on draw the hard masks again
FOLDER/round_0/ignore/NAME.png 8-bit, 255 where the image was drawn wrongly, else 0
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.disk import SETTINGS
from common.errors import InputError
from common.plain import read_as, read_json
from dataset.files import read_mask
from evaluation.experiments.labelled import Named, set_pairs
from evaluation.experiments.segmenter import IGNORE
from evaluation.fidelity import LabelledImage
from synthetic.manifest import MANIFEST, READ_COLUMNS
from synthetic.reader import SampleSet

PRACTICE_FILE = "practice.json"
AGAIN = "run the same evaluate.py practise again"


class SetFiles(NamedTuple):
    """What is read of a set: columns of its manifest, row by row, and files."""

    rows: list[list[str]]
    paths: list[Path]


class PracticeFolder:
    """The synthetic sets of one selection of labels. A plain set of sample_ddp.py counts as round 0.

    Args:
        folder: of ``evaluate.py practise``, or a set.

    Raises:
        InputError: it is neither, or practise has not finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_plain_set = (folder / MANIFEST).is_file()
        if self.is_plain_set:
            self.rounds = [folder]
        elif (folder / PRACTICE_FILE).is_file():
            content = read_json(folder / PRACTICE_FILE, AGAIN)
            if "results" not in content:  # earlier versions wrote the file after every round
                raise InputError(f"{folder} is not finished: {AGAIN}")
            self.rounds = read_as(folder / PRACTICE_FILE, self._rounds, AGAIN)
        else:
            raise InputError(f"{folder} is neither a set of sample_ddp.py nor a folder of evaluate.py practise")

    def _rounds(self, content: dict[str, Any]) -> list[Path]:
        return [self.folder / f"round_{int(one['round'])}" for one in content["rounds"]]

    def sets(self) -> list[SampleSet]:
        """The set of every round."""
        return [SampleSet(self.set_folder(number)) for number in range(len(self.rounds))]

    def set_folder(self, number: int) -> Path:
        """The folder of the set of a round."""
        return self.rounds[number] if self.is_plain_set else self.rounds[number] / "samples"

    def images(self, num_classes: int, ignore: bool, practise: bool) -> list[LabelledImage]:
        """Images to train on.

        Args:
            num_classes: K of the segmenter.
            ignore: whether pixels that were drawn wrongly get the class ``IGNORE``.
            practise: whether the images of later rounds are included, in which hard masks were drawn again.

        Raises:
            InputError: a plain set has no ignored pixels and no later rounds.
        """
        found = []
        for number in self._numbers(ignore, practise):
            pairs = set_pairs(SampleSet(self.set_folder(number)), num_classes)
            found += [ignored(pair, self.rounds[number]) if ignore else pair.item for pair in pairs]
        return found

    def files(self, ignore: bool, practise: bool) -> list[SetFiles]:
        """What :meth:`images` reads of every set with the same rules. Errors as there."""
        found = []
        for number in self._numbers(ignore, practise):
            samples = SampleSet(self.set_folder(number))
            paths = [path for path in [samples.folder / SETTINGS] if path.is_file()]
            for sample in samples.samples:
                wrong = [ignore_file(self.rounds[number], sample.name)] if ignore else []
                paths += [sample.image_path, sample.label_path, *wrong]
            rows = [[sample.columns.get(name, "") for name in READ_COLUMNS] for sample in samples.samples]
            found.append(SetFiles(rows, paths))
        return found

    def _numbers(self, ignore: bool, practise: bool) -> range:
        """Numbers of the rounds that are read with these rules."""
        if self.is_plain_set and (ignore or practise):
            raise InputError(f"{self.folder} is a plain set: arms with rules need a folder of evaluate.py practise")
        return range(len(self.rounds) if practise else 1)


def ignore_file(round_folder: Path, name: str) -> Path:
    """The file of the pixels of an image that its round marks as drawn wrongly."""
    return round_folder / "ignore" / f"{name}.png"


def ignored(pair: Named, round_folder: Path) -> LabelledImage:
    """The image with class ``IGNORE`` at the pixels that its round marks as drawn wrongly."""
    wrong = read_mask(ignore_file(round_folder, pair.name)) > 0
    return pair.item._replace(classes=np.where(wrong, IGNORE, pair.item.classes).astype(np.uint8))
