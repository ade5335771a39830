"""All processes of a run continue from the same checkpoint and train on the same files, or the run does not begin."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from common.disk import file_sha256
from common.weights import archive_checksum
from dataset.folders import PairedFolder
from dataset.unlabelled import UnlabelledFolder, image_names
from engine.machine import Machine
from engine.run_folder import RunFolder

SEEN_AFTER_SECONDS = 60.0  # network file systems show a new file on other machines that late


def agree_on_checkpoint(machine: Machine, run: RunFolder, path: Path | None) -> None:
    """Refuse to go on if a process does not see the checkpoint that rank 0 continues from, or sees another one.

    Args:
        machine: this process.
        run: folder of the run.
        path: the checkpoint, as rank 0 says; None for a new run.

    Raises:
        InputError: on every rank.
    """
    if machine.world_size == 1:
        return
    if path is None:
        steps = run.steps()
        seen = f"{run.checkpoint_path(steps[-1])}" if steps else "none"
    else:
        seen = _seen(path)
    machine.check_same(
        {"checkpoint to continue from": seen},
        f"All processes must see {run.path.parent}: put it on a disk that all machines share.",
    )


def _seen(path: Path) -> str:
    deadline = time.monotonic() + SEEN_AFTER_SECONDS
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.5)
    if not path.is_file():
        return f"no {path}"
    checksum = archive_checksum(path) if path.suffix == ".pt" else file_sha256(path)
    return f"{path.name} with checksum {checksum[:12]}"


def agree_on_file(machine: Machine, path: Path, what: str, mend: str, *fields: str) -> None:
    """Refuse to go on if a process does not see the file that rank 0 sees.

    Args:
        machine: this process.
        path: the file; rank 0 has it.
        what: the file in words.
        mend: what to do if a process does not see it.
        fields: names in ``mend``.

    Raises:
        InputError: on every rank.
    """
    if machine.world_size > 1:
        machine.check_same({what: _seen(path)}, mend, *fields)


def agree_on_data(
    machine: Machine, dataset: PairedFolder, unlabelled: Sequence[UnlabelledFolder | PairedFolder]
) -> None:
    """Refuse to train on different files.

    Names are compared by all processes. If there are several machines, one process of each also compares the content.

    Raises:
        InputError: on every rank.
    """
    if machine.peers is None:
        return
    names = [f"{pair.image_path.name} {pair.mask_path.name}" for pair in dataset.pairs]
    found: dict[str, object] = {
        "number of pairs": len(names),
        "names of the pairs": _checksum(names),
        "content of the files": None,
        "names of the unlabelled images": _checksum([name for source in unlabelled for name in image_names(source)]),
    }
    if machine.peers.several_hosts and os.environ.get("LOCAL_RANK", "0") == "0":
        masks = [file_sha256(pair.mask_path) for pair in dataset.pairs]
        found["content of the files"] = _checksum([*dataset.image_hashes, *masks])
        hashes = [one for source in unlabelled for one in source.image_hashes]
        found["content of the unlabelled images"] = _checksum(hashes)
    machine.check_same(
        found, "data_path and mask_path must hold the same files on every machine.", "data_path", "mask_path"
    )


def _checksum(texts: list[str]) -> str:
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return f"checksum {digest[:12]}"
