"""Has a synthetic set seen what it must not: the check of the utility experiment, from manifests and hashes.

At a share of the labels everything that makes the synthetic set may know that share only: the generator's training
images, the masks that it draws from (masks of the share, recombined cells of the share, or simulated ones), and the
judge of a filter. What cannot be told counts as a leak: an experiment is as good as what is known about it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.cells import connected_cells, without_gaps
from common.disk import file_sha256
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import find_files, read_mask
from dataset.views import View, center_view, whole_view
from download import PUBLISHED_URLS
from engine.checkpoint import read_checkpoint
from evaluation.split import SplitPlan
from synthetic.reader import SampleSet

LEAST_CELL_SHARE = 0.05  # labels with less cell (or background) can be equal by chance


def find_leaks(split: SplitPlan, share: int, samples: SampleSet, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with using a synthetic set at a share; empty where it may be used.

    Args:
        split: shares and test pairs.
        share: percent.
        samples: the synthetic set.
        checkpoint: of the generator, where the set's settings do not say what it was trained on.

    Returns:
        One sentence per leak.
    """
    return [
        *_masks(split, share, samples),
        *_labels(split, samples),
        *_generator(split, share, samples, checkpoint),
        *_judge(split, share, samples),
    ]


def refuse_leaks(split: SplitPlan, share: int, samples: SampleSet, checkpoint: Path | None = None) -> None:
    """Raises InputError with everything that :func:`find_leaks` finds."""
    leaks = find_leaks(split, share, samples, checkpoint)
    if leaks:
        raise InputError(f"{samples.folder} leaks at {share} % of the labels: {'; '.join(leaks)}")


def _where(split: SplitPlan, share: int, digests: Iterable[str], known: dict[str, str]) -> dict[str, int]:
    """How many hashes belong to the test pairs, to pairs outside of the share, and to nothing known."""
    test = {known[name] for name in split.test}
    inside = {known[name] for name in split.shares[share]} - test
    everything = set(known.values())
    counts: dict[str, int] = defaultdict(int)
    for digest in digests:
        if digest in test:
            counts["test"] += 1
        elif digest not in inside:
            counts["outside" if digest in everything else "unknown"] += 1
    return counts


# --- masks -----------------------------------------------------------------------------------------------------------


def _masks(split: SplitPlan, share: int, samples: SampleSet) -> list[str]:
    """Where the masks come from, by their hashes; unknown ones must be of make_masks.py."""
    if "source_mask_sha256" not in samples.columns:
        return ["its manifest has no column source_mask_sha256, so its masks cannot be checked"]
    counts = _where(split, share, (sample.columns["source_mask_sha256"] for sample in samples.samples), split.masks)
    leaks = []
    if counts["test"]:
        leaks.append(f"{counts['test']} images are made from masks of the test set")
    if counts["outside"]:
        leaks.append(f"{counts['outside']} images are made from masks of pairs outside of the share")
    if counts["unknown"]:
        known = set(split.masks.values())
        folders = {
            Path(sample.columns.get("source_mask") or ".").parent
            for sample in samples.samples
            if sample.columns["source_mask_sha256"] not in known
        }
        problems = [problem for folder in sorted(folders) if (problem := _made_masks(split, share, folder))]
        leaks += problems
        if not problems:
            leaks += _unchanged(samples, known)
    return leaks


def _made_masks(split: SplitPlan, share: int, folder: Path) -> str | None:
    """What is wrong with masks of a folder that are none of the split's: None for simulated or recombined ones."""
    try:
        settings = json.loads((folder.parent / "settings.json").read_text(encoding="utf-8"))
        command, source = settings.get("command"), settings.get("source_sha256")
    except (OSError, ValueError, AttributeError):
        return f"the masks of {folder} are neither of the split nor made by make_masks.py, so their origin is unknown"
    if command == "simulate":
        return None
    if command == "recombine" and source in _recombine_digests(split.part(share)):
        return None
    return f"the masks of {folder} are recombined from other cells than those of the share"


def _unchanged(samples: SampleSet, known: set[str]) -> list[str]:
    """The files of made masks must still be those of the manifest: their folder speaks for them."""
    changed = 0
    for sample in samples.samples:
        digest, path = sample.columns["source_mask_sha256"], Path(sample.columns.get("source_mask") or ".")
        if digest not in known and not (path.exists() and file_sha256(path) == digest):
            changed += 1
    return [f"{changed} source masks are gone or changed since, so their origin is unknown"] if changed else []


def _recombine_digests(folder: Path) -> set[str]:
    """What make_masks.py recombine writes as source_sha256 for the labels of a share, as ids and as components."""
    digests = set()
    for kind in ("instances", "masks"):
        if not (folder / kind).is_dir():
            continue
        labels = {name: read_mask(path) for name, path in find_files(folder / kind, "instance labels").items()}
        if any(label.ndim != 2 or label.dtype.kind not in "ui" for label in labels.values()):
            continue
        for components in (False, True):
            digest = hashlib.sha256()
            for name, label in sorted(labels.items()):
                cells = connected_cells(label) if components else without_gaps(label)
                digest.update(f"{name} {cells.shape}".encode() + cells.astype("<i4").tobytes())
            digests.add(digest.hexdigest())
    return digests


def _labels(split: SplitPlan, samples: SampleSet) -> list[str]:
    """Labels that show the cells of a test mask, whatever their file is called and however it is stored."""
    config = samples.require_config()
    tested = find_files(split.part(None) / "masks", "mask").values()
    foregrounds = [cells for path in tested for cells in _foregrounds(read_mask(path))]
    by_view: dict[View | None, set[bytes]] = {}
    found = 0
    for sample in samples.samples:
        cells = samples.foreground(sample)
        if not LEAST_CELL_SHARE <= cells.mean() <= 1 - LEAST_CELL_SHARE:
            continue
        if sample.view not in by_view:
            parts = _test_parts(foregrounds, sample.view, config, samples.whole_scale)
            by_view[sample.view] = {_digest(part) for part in parts}
        found += _digest(cells) in by_view[sample.view]
    return [f"{found} labels show the cells of test masks"] if found else []


def _foregrounds(mask: np.ndarray) -> list[np.ndarray]:
    """Where a mask file can mean cells, (H, W) bool each: above 0, above half, or not background in a stack."""
    if mask.ndim == 3 and len(mask) > 1:
        return [mask.argmax(axis=0) > 0]
    mask = mask.reshape(mask.shape[-2:])
    return [mask > 0, mask > mask.max() / 2]


def _test_parts(
    foregrounds: list[np.ndarray], view: View | None, config: DataConfig, whole_scale: float | None
) -> Iterable[np.ndarray]:
    """What a view shows of the test masks that it fits."""
    for foreground in foregrounds:
        height, width = foreground.shape
        middle = center_view(height, width, config.image_size)
        if view is None or view == middle:
            yield middle.apply_labels(foreground)
        elif view.is_native(height, width) or (whole_scale and view == whole_view(height, width, whole_scale)):
            yield view.apply_labels(foreground)


def _digest(cells: np.ndarray) -> bytes:
    return hashlib.sha256(f"{cells.shape}".encode() + np.packbits(cells).tobytes()).digest()


# --- generator and judge ---------------------------------------------------------------------------------------------


def _generator(split: SplitPlan, share: int, samples: SampleSet, checkpoint: Path | None) -> list[str]:
    """What the generator was trained on: from the set's settings, else from the folders that its checkpoint names."""
    trained_on = samples.settings.get("trained_on")
    if trained_on is None and checkpoint is None:
        return [f"what its generator was trained on is not known: give --ckpt {share}=FILE"]
    if trained_on is None:
        found = trained_on_by_checkpoint(samples, checkpoint)
        if isinstance(found, str):
            return [found]
        trained_on = found
    return _seen_by("its generator was trained on", _where(split, share, trained_on, split.images))


def trained_on_by_checkpoint(samples: SampleSet, checkpoint: Path) -> list[str] | str:
    """sha256 of the images in the folder that the checkpoint was trained on, or why that cannot be told."""
    digest = file_sha256(checkpoint) if checkpoint.is_file() else ""
    rows = {sample.columns.get("ckpt_sha256") for sample in samples.samples}
    config = read_checkpoint(checkpoint)["config"]
    if rows != {digest}:
        return f"{checkpoint} is not the checkpoint that made it"
    started = config.get("train", {}).get("init_from")
    if started and started not in PUBLISHED_URLS and Path(started).name not in PUBLISHED_URLS:
        return f"its generator started from {started}, and what those weights have seen is not known"
    folder = config.get("train", {}).get("data_path")
    if not folder or not Path(folder).is_dir():
        return f"the folder that its generator was trained on ({folder}) is not there, so it cannot be checked"
    return [file_sha256(path) for path in find_files(folder, "image").values()]


def _judge(split: SplitPlan, share: int, samples: SampleSet) -> list[str]:
    """A filtered set has been seen by a judge, and the judge has seen real images."""
    note = samples.settings.get("filter")
    if note is None:
        return []
    if not note.get("judge_images_sha256"):
        return ["it is filtered by a judge whose images are not known: run evaluate.py fidelity and filter again"]
    return _seen_by(
        "the judge of its filter was trained on", _where(split, share, note["judge_images_sha256"], split.images)
    )


def _seen_by(who: str, counts: dict[str, int]) -> list[str]:
    words = {
        "test": "images of the test set",
        "outside": "images outside of the share",
        "unknown": "images that are not in the split",
    }
    return [f"{who} {counts[kind]} {text}" for kind, text in words.items() if counts[kind]]
