"""Leak check of the utility experiment: did the synthetic set use labels or test images that it must not know?

At a given share of the labels, everything behind the synthetic set may know that share only:

- the generator's training images,
- the masks that were sampled: masks of the share, recombined cells of the share, or simulated cells,
- the training images of a judge that selected images.

The looks of the set may be those of any image that is not tested on.

The check uses manifests and hashes. Unknown origin counts as a leak.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.disk import file_sha256
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import find_files, find_images, read_mask
from dataset.views import View, center_view, whole_view
from download import PUBLISHED_URLS
from engine.checkpoint import read_checkpoint
from evaluation.experiments.split import SplitPlan
from layouts.recombine import read_origin, read_sources, source_digest
from synthetic.manifest import judge_notes
from synthetic.reader import Sample, SampleSet

LEAST_CELL_SHARE = 0.05  # below this fraction of cell (or background), labels can be equal by chance


def find_leaks(split: SplitPlan, share: int, samples: SampleSet, checkpoint: Path | None = None) -> list[str]:
    """All leaks of a synthetic set at a share of the labels.

    Args:
        split: shares and test pairs.
        share: percent of the labels.
        checkpoint: checkpoint of the generator. Only needed if the set's settings do not name its training images.

    Returns:
        One sentence per leak. Empty if the set may be used.
    """
    return [
        *_masks(split, share, samples),
        *_labels(split, samples),
        *_generator(split, share, samples, checkpoint),
        *_looks(split, share, samples),
        *_judge(split, share, samples),
    ]


def refuse_leaks(split: SplitPlan, share: int, samples: SampleSet, checkpoint: Path | None = None) -> None:
    """Raise InputError with all leaks that :func:`find_leaks` finds."""
    leaks = find_leaks(split, share, samples, checkpoint)
    if leaks:
        raise InputError(f"{samples.folder} leaks at {split.words(share)}: {'; '.join(leaks)}")


def _where(
    split: SplitPlan, share: int, digests: Iterable[str], known: dict[str, str], may_be_equal: bool = False
) -> dict[str, int]:
    """Count the hashes that belong to test pairs ("test"), to pairs outside of the share ("outside"), or to no pair.

    Args:
        may_be_equal: a file of the share may be in the test set, too. It then counts as one of the share.
    """
    test = {known[name] for name in split.test}
    inside = {known[name] for name in split.shares[share]}
    if may_be_equal:
        test -= inside
    else:
        inside -= test
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
    """Leaks by masks, from their hashes. A mask that is not in the split must come from make_masks.py.

    Empty masks are often equal, so a mask of the share may be in the test set, too. :func:`_labels` finds equal cells.
    """
    if "source_mask_sha256" not in samples.columns:
        return ["its manifest has no column source_mask_sha256, so its masks cannot be checked"]
    digests = (sample.columns["source_mask_sha256"] for sample in samples.samples)
    counts = _where(split, share, digests, split.masks, may_be_equal=True)
    leaks = []
    if counts["test"]:
        leaks.append(f"{counts['test']} images are made from masks of the test set")
    if counts["outside"]:
        leaks.append(f"{counts['outside']} images are made from masks of pairs outside of the share")
    if counts["unknown"]:
        leaks += _unknown_masks(split, share, samples)
    return leaks


def _unknown_masks(split: SplitPlan, share: int, samples: SampleSet) -> list[str]:
    """Leaks by masks that are not in the split. Simulated masks and masks recombined from the share are allowed.

    The set's settings say where its masks come from (``mask_origin``). Sets of earlier versions lack this entry. For
    them, settings.json in the folder of the masks says it. This is only valid if the mask files have not changed since
    sampling, so check that as well.
    """
    if "mask_origin" in samples.settings:
        problem = _origin_problem(split, share, "its masks", samples.settings["mask_origin"])
        return [problem] if problem else []
    known = set(split.masks.values())
    unknown = [sample for sample in samples.samples if sample.columns["source_mask_sha256"] not in known]
    paths = {sample.source_mask for sample in unknown}
    folders = sorted({(path or Path()).parent for path in paths})
    found = [_origin_problem(split, share, f"the masks of {folder}", read_origin(folder)) for folder in folders]
    problems = [problem for problem in found if problem]
    if problems:
        return problems
    changed = sum(not _is_unchanged(sample) for sample in unknown)
    return [f"{changed} source masks are missing or have changed, so their origin is unknown"] if changed else []


def _origin_problem(split: SplitPlan, share: int, masks: str, origin: dict[str, Any] | None) -> str | None:
    if origin is None:
        return f"{masks} are neither in the split nor made by make_masks.py, so their origin is unknown"
    if origin["command"] == "merged":
        found = [_origin_problem(split, share, masks, part) for part in origin.get("parts") or [None]]
        return next((problem for problem in found if problem), None)
    if origin["command"] == "pseudo":
        seen = origin.get("segmenter_images_sha256")
        if not seen:
            return f"{masks} were found by a segmenter whose training images are unknown"
        problems = _seen_by(f"the segmenter of {masks} was trained on", _where(split, share, seen, split.images))
        return "; ".join(problems) or None
    if origin["command"] == "simulate" or origin.get("source_sha256") in _recombine_digests(split.part(share)):
        return None
    return f"{masks} are recombined from other cells than those of the share"


def _is_unchanged(sample: Sample) -> bool:
    path = sample.source_mask
    return path is not None and path.exists() and file_sha256(path) == sample.columns["source_mask_sha256"]


def _recombine_digests(folder: Path) -> set[str]:
    """Digests of the cells of a share that ``make_masks.py`` may have recorded: read as ids and as connected parts."""
    digests = set()
    for kind in ("instances", "masks"):
        for components in (False, True):
            with contextlib.suppress(
                InputError
            ):  # no such folder, or no instance labels: nothing is recombined from it
                digests.add(source_digest(read_sources(folder / kind, components)))
    return digests


def _labels(split: SplitPlan, samples: SampleSet) -> list[str]:
    """Leaks by content: labels with the cells of a test mask, whatever their file name and format."""
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
    """Possible cells of a mask file, (H, W) bool each: above 0, above half, or (in a stack) not background."""
    if mask.ndim == 3 and len(mask) > 1:
        return [mask.argmax(axis=0) > 0]
    mask = mask.reshape(mask.shape[-2:])
    return [mask > 0, mask > mask.max() / 2]


def _test_parts(
    foregrounds: list[np.ndarray], view: View | None, config: DataConfig, whole_scale: float | None
) -> Iterable[np.ndarray]:
    """The part of each test mask that a view selects, for the masks that it fits."""
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
    """Leaks by the generator's training images, from the set's settings or from the folders named in its checkpoint."""
    trained_on = samples.settings.get("trained_on")
    if trained_on is None:
        if checkpoint is None:
            mend = (
                f"give `ckpt` {share}=FILE" if split.unit == "percent" else "train its generator again and sample anew"
            )
            return [f"the training images of its generator are not known: {mend}"]
        found = trained_on_by_checkpoint(samples, checkpoint)
        if isinstance(found, str):
            return [found]
        trained_on = found
    counts = _where(split, share, trained_on, split.images)
    labelled = samples.settings.get("labelled_on")
    if split.unit != "labels" or labelled is None:
        return _seen_by("its generator was trained on", counts)
    counts.pop("outside", None)  # they count as unlabelled, if their masks were not seen
    learned = _where(split, share, labelled, split.images)
    return _seen_by("its generator was trained on", counts) + _seen_by("its generator learned the masks of", learned)


def trained_on_by_checkpoint(samples: SampleSet, checkpoint: Path) -> list[str] | str:
    """sha256 of the checkpoint's training images, or a sentence that says why they are unknown."""
    digest = file_sha256(checkpoint) if checkpoint.is_file() else ""
    rows = {sample.columns.get("ckpt_sha256") for sample in samples.samples}
    config = read_checkpoint(checkpoint)["config"]
    if rows != {digest}:
        return f"{checkpoint} is not the checkpoint that made its images"
    started = config.get("train", {}).get("init_from")
    if started and started not in PUBLISHED_URLS and Path(started).name not in PUBLISHED_URLS:
        return f"its generator started from {started}, and the training images of those weights are not known"
    folder = config.get("train", {}).get("data_path")
    if not folder or not Path(folder).is_dir():
        return f"the folder with the training images of its generator ({folder}) is missing, so it cannot be checked"
    return [file_sha256(path) for path in find_images(folder).values()]


def _looks(split: SplitPlan, share: int, samples: SampleSet) -> list[str]:
    """Leaks by the images that gave the looks, if they are not those that the generator learned."""
    seen = (samples.settings.get("look") or {}).get("images_sha256", [])
    tested = _where(split, share, seen, split.images)["test"]
    return [f"its looks are those of {tested} images of the test set"] if tested else []


def _judge(split: SplitPlan, share: int, samples: SampleSet) -> list[str]:
    """Leaks by the training images of judges that selected images of the set."""
    notes = judge_notes(samples.settings)
    if not all(note.get("judge_images_sha256") for note in notes):
        return ["a judge with unknown training images selected its images: run evaluate.py fidelity and filter again"]
    seen = {digest for note in notes for digest in note["judge_images_sha256"]}
    return _seen_by("the judge that selected its images was trained on", _where(split, share, seen, split.images))


def _seen_by(who: str, counts: dict[str, int]) -> list[str]:
    words = {
        "test": "images of the test set",
        "outside": "images outside of the share",
        "unknown": "images that are not in the split",
    }
    return [f"{who} {counts[kind]} {text}" for kind, text in words.items() if counts[kind]]
