"""Fidelity: does the image follow its mask, according to a segmenter trained on real images only?

A small U-Net (the judge) is trained on real pairs and segments the synthetic images. Its segmentation is compared with
the masks of the images. The same judge also segments real images that it has not seen. Their score is the ceiling: a
synthetic set need not score higher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import torch

from common.cells import as_ids, connected_cells
from common.disk import file_sha256, write_json
from common.errors import InputError
from common.pictures import repeat_gray, to_uint8
from common.randomness import divide
from dataset.files import Pair, pair_files
from dataset.folders import PairedFolder
from dataset.mask_folder import MaskFolder, MaskItem
from dataset.masks import MaskRule
from evaluation.image_facts import group_near_duplicates, groups_to_divide
from evaluation.instances import AP_THRESHOLDS, InstanceCounts, boundary_f, dice, mean_of_known
from evaluation.judge import FolderJudge, Judge, JudgeRequest, judge_of_folders
from evaluation.output import Section, Table, results_folder
from synthetic.reader import SampleSet

logger = logging.getLogger(__name__)
HELD_OUT_SHARE = 0.2
BATCH_PIXELS = 2**22  # most pixels segmented at once
CROPS_PER_IMAGE = 4  # random crops of each real image, if the generator was trained on random crops
EMPTY_TOLERANCE = 0.02  # an empty mask has fidelity 0 if the judge finds cells in this fraction of the image
BOUNDARY_SHARE = 0.0075  # tolerance as a fraction of the image's diagonal, at least one pixel
JUDGED_AT_ONCE = 16  # images


class LabelledImage(NamedTuple):
    """An image with its true labels.

    Attributes:
        image: uint8 (S, S, C).
        classes: (S, S) uint8 true class ids.
        cells: (S, S) int true instance map.
    """

    image: np.ndarray
    classes: np.ndarray
    cells: np.ndarray


@dataclass
class AgreementScore:
    """Agreement of the judge with the masks of one set of images. None: not defined for this set.

    Attributes:
        dice: foreground Dice, mean over the images whose mask has a cell.
        iou: IoU per class, over all pixels of the set.
        ap: IoU threshold -> average precision of single cells.
        pq: panoptic quality of cells.
        boundary_f: mean F-score of the foreground's boundary.
        count_error: mean absolute difference in the number of cells per image.
        per_image: foreground Dice of every image. :func:`fidelity_of` defines it for masks without a cell.
    """

    images: int
    dice: float | None
    iou: list[float | None]
    ap: dict[str, float | None]
    pq: float | None
    boundary_f: float | None
    count_error: float | None
    per_image: list[float] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain types for JSON, without the values of each image."""
        content = asdict(self)
        del content["per_image"]
        return content


@dataclass
class FidelityReport:
    """Result of ``score_fidelity``."""

    synthetic: AgreementScore
    real: AgreementScore
    real_images_are: str
    judge_pairs: int
    judge_key: str
    judge_cached: bool
    masks_seen_by_judge: int
    provenance: dict[str, list[str]]
    judge_images_sha256: list[str] = field(default_factory=list)  # training images of the judge, to check for leaks
    chosen_by_this_judge: bool = False  # the same judge selected the images of this set

    def to_dict(self) -> dict:
        """Plain types for JSON."""
        nested = {"synthetic": self.synthetic.to_dict(), "real": self.real.to_dict()}
        rest = {name: value for name, value in vars(self).items() if name not in nested}
        return nested | rest


def _table(content: dict) -> Table:
    sides = content["synthetic"], content["real"]
    rows: list[list[object]] = [["Dice of the cells", *(side["dice"] for side in sides)]]
    by_class = list(zip(*(side["iou"] for side in sides), strict=True))
    names = ["the background", "the cells"] if len(by_class) == 2 else [f"class {k}" for k in range(len(by_class))]
    rows += [[f"IoU of {name}", *both] for name, both in zip(names, by_class, strict=True)]
    rows += [[f"AP at IoU {least}", *(side["ap"][least] for side in sides)] for least in sides[0]["ap"]]
    others = {
        "pq": "panoptic quality",
        "boundary_f": "boundary F",
        "count_error": "count error per image",
        "images": "images",
    }
    rows += [[title, *(side[name] for side in sides)] for name, title in others.items()]
    return Table(["", "synthetic", "real"], rows)


def _notes(content: dict) -> list[str]:
    seen = content["masks_seen_by_judge"]
    notes = [
        f"real images: {content['real_images_are']}",
        f"the judge was trained on {content['judge_pairs']} real pairs"
        + (f"; {seen} synthetic images were made from masks in its training set" if seen else ""),
    ]
    if content.get("chosen_by_this_judge"):
        notes.append("this judge selected the images of the set, so its scores are too high; use another seed")
    return notes


SECTION = Section(
    "fidelity",
    "Fidelity: does the image follow its mask? (segmenter trained on real images)",
    "A small U-Net, trained on real pairs, segments the images. Its result is compared with the masks. Real images "
    "that it has not seen give the ceiling. Higher is better, except for the count error: there lower is better.",
    _table,
    _notes,
)


# --- scores ----------------------------------------------------------------------------------------------------------


def score_agreement(
    segment: Callable[[Sequence[np.ndarray]], np.ndarray],
    images: Iterator[LabelledImage],
    num_classes: int,
    separated: bool = False,
) -> AgreementScore:
    """Compare a segmenter with the labels of images.

    Args:
        segment: list of uint8 (S, S, C) -> (B, S, S) uint8 class ids (``Judge.class_maps``).
        images: images with their labels.
        separated: whether class 2 is the border between touching cells (instances with K = 3).

    Raises:
        InputError: there are no images.
    """
    counts, table = InstanceCounts(), np.zeros((num_classes, num_classes), np.int64)
    per_image, with_cells, boundaries = [], [], []
    for batch in _batches(images, JUDGED_AT_ONCE):
        for predicted, item in zip(segment([item.image for item in batch]), batch, strict=True):
            found, truth = predicted > 0, item.classes > 0
            per_image.append(fidelity_of(found, truth))
            if truth.any():
                with_cells.append(per_image[-1])
            tolerance = max(1.0, BOUNDARY_SHARE * math.hypot(*truth.shape))
            boundaries.append(boundary_f(found, truth, tolerance))
            counts.add(cells_of_classes(predicted, separated), item.cells)
            np.add.at(table, (item.classes.ravel(), predicted.ravel()), 1)
    if not per_image:
        raise InputError("there is no image to judge; give a folder with images and masks")
    return AgreementScore(
        images=len(per_image),
        dice=mean_of_known(with_cells),
        iou=class_iou(table),
        ap={str(threshold): counts.ap(threshold) for threshold in AP_THRESHOLDS},
        pq=counts.pq,
        boundary_f=mean_of_known(boundaries),
        count_error=counts.count_error,
        per_image=per_image,
    )


def fidelity_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Foreground Dice, with a softer rule for masks without a cell.

    For an empty mask, the value falls from 1 (no cell found) to 0 (:data:`EMPTY_TOLERANCE` of the image found as cell).
    Dice itself would be 0 after one wrong pixel, and a filter would then remove all empty images.

    Args:
        found: (H, W) bool, cells that the judge found.
        truth: (H, W) bool, cells of the mask.
    """
    return dice(found, truth) if truth.any() else max(0.0, 1 - float(found.mean()) / EMPTY_TOLERANCE)


def class_iou(table: np.ndarray) -> list[float | None]:
    """IoU of every class from a (K, K) table of pixel counts (truth by prediction). None for a class that is absent."""
    hits = np.diag(table)
    union = table.sum(axis=0) + table.sum(axis=1) - hits
    return [float(hit / total) if total else None for hit, total in zip(hits, union, strict=True)]


def cells_of_classes(classes: np.ndarray, separated: bool) -> np.ndarray:
    """Instance map of a predicted class map, by connected components.

    Args:
        classes: (H, W) class ids.
        separated: take the components of class 1, and give each pixel of class 2 to the nearest of them.
    """
    if not separated:
        return connected_cells(classes > 0)
    cores = connected_cells(classes == 1)
    if not cores.any():
        return connected_cells(classes > 0)
    rows, columns = scipy.ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    return np.where(classes > 0, cores[rows, columns], 0)


def _batches(images: Iterator[LabelledImage], size: int) -> Iterator[list[LabelledImage]]:
    """Batches of at most ``size`` images of equal shape. Large images come in smaller batches to limit memory."""
    batch: list[LabelledImage] = []
    for item in images:
        full = len(batch) == size or len(batch) * item.classes.size >= BATCH_PIXELS
        if batch and (full or item.image.shape != batch[0].image.shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


# --- training pairs and held-out pairs of the judge ------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Names of the judge's training pairs and held-out pairs.

    If ``held_out`` is empty, the real images of the set's own masks give the ceiling. ``masks_seen`` counts the
    synthetic images whose mask, or the real image of it, is in a training pair of the judge.
    """

    train: list[str]
    held_out: list[str]
    masks_seen: int


def split_pairs(samples: SampleSet, request: JudgeRequest) -> Split:
    """Choose the judge's training pairs, so that it is evaluated on images that it has not seen.

    1. If the set names its real images, the judge is trained on the pairs that have neither mask nor image in the set:
       the same cells may have masks of two kinds. The real images of the set's masks give the ceiling. This needs at
       least a fifth of the pairs, and at least four, for training.
    2. Otherwise a fifth of the pairs is held out. A hash of seed and name chooses them. The judge may then know masks
       of the set. The report says how many.

    Images that show nearly the same, such as one image under two names, stay together.

    Raises:
        InputError: there are fewer than two pairs.
    """
    pairs = pair_files(request.images, request.masks)
    sources, hashes = _hashes_of_sources(samples), _hashes_of_pairs(pairs, samples.has_real)
    used = set().union(*sources)
    groups = group_near_duplicates(pairs)
    known = {name for names in groups if any(hashes[name] & used for name in names) for name in names}
    free = [name for name in hashes if name not in known]
    if samples.has_real and len(free) >= max(4, HELD_OUT_SHARE * len(pairs)):
        return Split(free, [], 0)
    if len(pairs) < 2:
        raise InputError(
            f"{request.images} holds one pair; the judge needs at least two: one for training and one held out"
        )
    count = max(1, round(HELD_OUT_SHARE * len(pairs)))
    held_out, train = divide(groups_to_divide(groups), count, request.seed)
    learned = set().union(*(hashes[name] for name in train))
    seen = sum(bool(of_sample & learned) for of_sample in sources)
    return Split(sorted(train), sorted(held_out), seen)


def _hashes_of_sources(samples: SampleSet) -> list[set[str]]:
    """For each row of the set: hashes of the mask file and, if it is known, of the real image."""
    masks = [sample.columns.get("source_mask_sha256", "") for sample in samples.samples]
    if not samples.has_real:
        return [{mask} - {""} for mask in masks]
    files = samples.real_files()
    images = {path: file_sha256(path) for path in set(files)}
    return [{mask, images[path]} - {""} for mask, path in zip(masks, files, strict=True)]


def _hashes_of_pairs(pairs: Sequence[Pair], with_images: bool) -> dict[str, set[str]]:
    """Name -> hashes of the mask file and, if asked for, of the image file."""
    return {
        pair.name: {file_sha256(path) for path in (pair.mask_path, *([pair.image_path] if with_images else []))}
        for pair in pairs
    }


# --- the measure -----------------------------------------------------------------------------------------------------


def score_fidelity(samples: SampleSet, request: JudgeRequest) -> FidelityReport:
    """Train or load the judge, and compare its segmentation with the masks, for synthetic and real images.

    Raises:
        InputError: unusable files, or a set without settings.
    """
    (judge, key, cached, pairs), split = prepare_judge(samples, request)
    separated = pairs.rule.has_boundary
    if split.held_out:
        real_images = held_out_images(request, pairs, split.held_out, samples.whole_scale)
        real_are = "held-out pairs"
    else:
        real_images, real_are = set_images(samples, real=True), "those of the same masks"
    return FidelityReport(
        synthetic=_judge(judge, set_images(samples, real=False), samples.num_classes, separated),
        real=_judge(judge, real_images, samples.num_classes, separated),
        real_images_are=real_are + ", which the judge has not seen",
        judge_pairs=len(pairs),
        judge_key=key,
        judge_cached=cached,
        masks_seen_by_judge=split.masks_seen,
        provenance=samples.provenance(),
        judge_images_sha256=[file_sha256(pair.image_path) for pair in pairs.pairs],
        chosen_by_this_judge=samples.chosen_by(key),
    )


def prepare_judge(samples: SampleSet, request: JudgeRequest) -> tuple[FolderJudge, Split]:
    """Choose the judge's pairs by :func:`split_pairs`, then load the judge from the cache or train it."""
    config = samples.require_config()
    split = split_pairs(samples, request)
    return judge_of_folders(request, config, samples.normalizes, samples.mask_type, split.train), split


def _judge(judge: Judge, images: Iterator[LabelledImage], num_classes: int, separated: bool) -> AgreementScore:
    return score_agreement(judge.class_maps, images, num_classes, separated)


def set_images(samples: SampleSet, real: bool) -> Iterator[LabelledImage]:
    """The synthetic images of a set, or the real images of the same masks, with their labels."""
    for sample in samples.samples:
        classes = samples.class_map(sample)
        image = samples.real(sample) if real else samples.synthetic(sample)
        if image.shape[:2] != classes.shape:
            raise InputError(f"{sample.image_path} and its label have different sizes; sample the set again")
        cells = samples.instance_map(sample)
        yield LabelledImage(image, classes, connected_cells(classes > 0) if cells is None else cells)


def held_out_images(
    request: JudgeRequest, pairs: PairedFolder, names: Sequence[str], whole_scale: float | None
) -> Iterator[LabelledImage]:
    """Held-out real pairs, read like the judge's training data. Every call gives the same crops.

    If ``whole_scale`` is given (a set of whole fields), the real images are whole fields, too.
    """
    rule = pairs.rule
    folder = MaskFolder(
        request.masks, pairs.config, rule.mask_type, request.images, normalize=rule.normalize, whole_scale=whole_scale
    )
    yield from folder_images(folder, names, request.seed)


def crops_per_image(folder: MaskFolder) -> int:
    """How often :func:`folder_images` gives each image."""
    return CROPS_PER_IMAGE if folder.config.crop == "random" and folder.whole_scale is None else 1


def folder_images(folder: MaskFolder, names: Sequence[str], seed: int) -> Iterator[LabelledImage]:
    """Pairs of a folder, read as in training. With random crops, each image gives several crops."""
    for number, name in enumerate(names):
        for crop in range(crops_per_image(folder)):
            item = folder.load(name, rng=np.random.default_rng([seed, number, crop]))
            yield labelled_image(item, folder.rule)


def labelled_image(item: MaskItem, rule: MaskRule) -> LabelledImage:
    """A mask and its real image. The image is rounded to 8 bits, like synthetic images."""
    image = to_uint8(torch.as_tensor(item.image))  # (S, S, C)
    classes = np.asarray(item.prob_map).argmax(axis=0).astype(np.uint8)
    cells = as_ids(item.label) if rule.mask_type == "instances" else connected_cells(classes > 0)
    return LabelledImage(repeat_gray(image), classes, cells)


# --- files -----------------------------------------------------------------------------------------------------------


def write_fidelity_report(samples: SampleSet, report: FidelityReport) -> Path:
    """Write ``evaluation/fidelity.json``, and add the column ``fidelity_dice`` to the manifest.

    Returns:
        The folder.
    """
    folder = results_folder(samples)
    write_json(folder / "fidelity.json", report.to_dict())
    samples.write_fidelity(report.synthetic.per_image)
    return folder
