"""The commands that the practice loop runs, and those that it tells the user to run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from common.children import run_child
from common.errors import InputError
from evaluation.experiments.labelled import LabelledFolders
from evaluation.experiments.practice_masks import CellFiles, MaskPart
from evaluation.experiments.practice_settings import Unlabelled

ROOT = Path(__file__).parents[2]


class CommandTools:
    """The other commands, each in its own process. If they are run again, they continue."""

    def __init__(self, train_flags: Sequence[str], sample_flags: Sequence[str], device: str) -> None:
        self._train_flags, self._sample_flags, self._device = list(train_flags), list(sample_flags), device

    @property
    def settings(self) -> dict[str, list[str]]:
        """The flags, which decide what the commands make."""
        return {"train_flags": self._train_flags, "sample_flags": self._sample_flags}

    def train(self, folders: LabelledFolders, unlabelled: Unlabelled, run: Path, steps: int | None = None) -> Path:
        """Train a generator, for ``steps`` if given; its last checkpoint."""
        masks, mask_type = folders.masks, folders.mask_type
        if folders.instances is not None:
            masks, mask_type = folders.instances, "instances"
        words: list[object] = ["--data-path", folders.images, "--mask-path", masks, "--mask-type", mask_type]
        if unlabelled.images is not None:
            words += ["--unlabelled-path", unlabelled.images]
            words += [] if "--look" in self._train_flags else ["--look", "reference"]
        if unlabelled.masks is not None:
            words += ["--unlabelled-mask-path", unlabelled.masks]
        words += ["--device", self._device, *self._train_flags, *([] if steps is None else ["--max-steps", steps])]
        _run("train.py", *words, "--results-dir", run.parent, "--run-name", run.name)
        return max((run / "checkpoints").glob("*.pt"))

    def make_masks(self, part: MaskPart, cells: CellFiles, side: int, seed: int, output: Path) -> None:
        """Make a part of the masks."""
        words: list[object] = [part.kind, "--output", output, "--count", part.count, "--image-size", side]
        words += ["--seed", seed]
        if part.kind == "recombine":
            words += ["--instances", cells.instances, "--crop", cells.crop]
            words += ["--components"] if cells.components else []
            words += [] if cells.classes is None else ["--classes", cells.classes]
        for name, value in part.values.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *(value if isinstance(value, tuple) else [value])]
        _run("make_masks.py", *words)

    def sample(self, checkpoint: Path, masks: Path, mask_type: str, seed: int, output: Path) -> None:
        """Draw one image of every mask, in the looks of all training images."""
        words = ["--ckpt", checkpoint, "--mask-path", masks, "--mask-type", mask_type, "--seed", seed]
        words += ["--device", self._device]
        _run("sample_ddp.py", "ODE", *words, "--sample-dir", output, *self._sample_flags)


def _run(script: str, *words: object) -> None:
    """A command of this project, in a process of its own.

    Raises:
        InputError: it ended with an error, which it has said.
    """
    code = run_child([sys.executable, ROOT / script, *map(str, words)])
    if code:
        raise InputError(f"{script} ended with exit code {code}; its message is above")


def _quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def segmenter_commands(folder: Path) -> dict[str, list[str]]:
    """How to train users' segmenters with each of the sets."""
    return {
        name: [
            f"Cellpose: python -m cellpose --train --dir {_quoted(folder / name / 'cellpose')} --img_filter _img "
            "--mask_filter _masks --pretrained_model None --no_norm --min_train_masks 1",
            f"StarDist, as we measured it: benchmarks/segmenters/run.sh {_quoted(folder / name)} TEST OUTPUT stardist "
            "(TEST holds images/ and instances/ as PNG)",
        ]
        for name in ("real", "real_and_synthetic")
    }
