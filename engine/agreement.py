"""All processes of a run have the same settings, checkpoint and files, or the run does not begin."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.disk import file_sha256
from common.weights import archive_checksum
from dataset.folders import PairedFolder
from dataset.unlabelled import ImageFolder
from engine.config import LOCAL, NO_CACHE, RunConfig
from engine.machine import Machine
from engine.run_folder import RunFolder

LONGEST_TEXT = 80  # of a setting in a message; longer ones are shown as a checksum
SEEN_AFTER_SECONDS = 60.0  # network file systems show a new file on other machines that late
# Places of files, and how a process loads them. Each machine may have its own.
OF_A_MACHINE = {"vae", "latent_cache", "init_from", "unlabelled_path", "unlabelled_mask_path", "groups", "num_workers"}


def agree_on_checkpoint(machine: Machine, run: RunFolder, path: Path | None) -> None:
    """Refuse to go on if a process does not see the checkpoint that rank 0 continues from, or sees another one.

    ``path`` is that checkpoint, as rank 0 says. None for a new run.

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
    place = run.path.parent if path is None or path.parent == run.checkpoints else path.parent
    machine.check_same(
        {"checkpoint to continue from": seen},
        f"All processes must see {place}: put it on a disk that all machines share.",
    )


def _seen(path: Path) -> str:
    deadline = time.monotonic() + SEEN_AFTER_SECONDS
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.5)
    if not path.is_file():
        return f"no {path}"
    checksum = archive_checksum(path) if path.suffix == ".pt" else file_sha256(path)
    return f"{path.name} with checksum {checksum[:12]}"


def agree_on_file(machine: Machine, path: Path, what: str, mend: str) -> None:
    """Refuse to go on if a process does not see the file that rank 0 sees.

    Args:
        path: the file; rank 0 has it.
        what: the file in words.
        mend: what to do if a process does not see it.

    Raises:
        InputError: on every rank.
    """
    if machine.world_size > 1:
        machine.check_same({what: _seen(path)}, mend)


def agree_on_run(
    machine: Machine,
    config: RunConfig,
    dataset: PairedFolder,
    unlabelled: Sequence[ImageFolder],
    groups: Sequence[str] = (),
    autoencoder: str | None = None,
) -> None:
    """Refuse to train with different settings, files or groups, such as by two commands on two machines.

    Names are compared by all processes. If there are several machines, one process of each also compares the content.

    Args:
        groups: of all images, labelled ones first; empty without groups.
        autoencoder: its fingerprint. Each machine may have it in another place.

    Raises:
        InputError: on every rank. It names the first thing that differs.
    """
    if machine.peers is None:
        return
    machine_has = OF_A_MACHINE | {name for name, saved in config.flags().items() if saved.resume == LOCAL}
    settings = {f"`{name}`": str(saved.value) for name, saved in config.flags().items() if name not in machine_has}
    names = [f"{pair.image_path.name} {pair.mask_path.name}" for pair in dataset.pairs]
    others = [name for source in unlabelled for name in source.names]
    found: dict[str, object] = settings | {
        "number of pairs": len(names),
        "names of the pairs": _checksum(names),
        "content of the files": None,
        "number of unlabelled images": len(others),
        "names of the unlabelled images": _checksum(others),
        "content of the unlabelled images": None,
        "number of groups": len(set(groups)),
        "groups of the images": _checksum(groups),
        "autoencoder": autoencoder,
        "`latent_cache`": _kind_of_cache(config.train.latent_cache),
    }
    if machine.peers.several_hosts and machine.peers.first_on_host:
        masks = [file_sha256(pair.mask_path) for pair in dataset.pairs]
        found["content of the files"] = _checksum([*dataset.image_hashes, *masks])
        hashes = [one for source in unlabelled for one in source.image_hashes]
        found["content of the unlabelled images"] = _checksum(hashes)
    fields = ["data_path", "mask_path", *(["unlabelled_path"] if unlabelled else []), *(["groups"] if groups else [])]
    shown = ", ".join(f"`{name}`" for name in fields)
    machine.check_same(found, f"Give the same command on every machine; {shown} must hold the same on all.")


def _kind_of_cache(latent_cache: str | None) -> str:
    """What is asked for: each machine may have a folder of its own, but all encode once, or none does."""
    return "no value" if latent_cache is None else NO_CACHE if latent_cache == NO_CACHE else "a folder"


def agree_on_set(machine: Machine, settings: Mapping[str, Any], masks: Sequence[Path]) -> None:
    """Refuse to make a set with different settings or masks, such as by two commands on two machines.

    Settings are compared by all processes. If there are several machines, one process of each also compares the masks.

    Args:
        settings: what decides the content of the set, as for settings.json.
        masks: files of the masks, in the same order on every process.

    Raises:
        InputError: on every rank. It names the first thing that differs.
    """
    if machine.peers is None:
        return
    found: dict[str, object] = dict(_flat(settings))
    found["content of the masks"] = None
    if machine.peers.several_hosts and machine.peers.first_on_host:
        found["content of the masks"] = _checksum([file_sha256(path) for path in masks])
    machine.check_same(found, "Give the same command on every machine; checkpoint and masks must be the same on all.")


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings by the words that lead to each, as texts. Leaves out what is not set."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{name} {inner}", text) for inner, text in _flat(value))
        elif value is not None:
            text = str(value)
            yield name, text if len(text) <= LONGEST_TEXT else _checksum([text])


def _checksum(texts: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return f"checksum {digest[:12]}"
