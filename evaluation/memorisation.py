"""Memorisation: does the generator repeat its training images?

Finds the nearest training image of every synthetic image, and of held-out real images for reference. Images are
reduced to gray pictures of at most ``SIDE`` pixels a side. They are compared in all eight symmetries, because training
turns and flips its images, and at every offset if training uses random crops (``evaluation/nearest.py``). The distance
is sqrt(2 (1 - r)), with r the correlation of two pictures. It is 0 for a copy, whatever its brightness and contrast,
and about 1.4 for unrelated pictures.

No fixed distance separates copies from new images: dim crops with one nucleus resemble each other, and real ones do,
too. Therefore the measure counts synthetic images that are nearer to a training image than every reference image. It
also states how many to expect by chance.

An image made from the mask of a training image has its cells in the same places. So it is nearer to this image than
held-out images can be. If the training masks are known, such images are therefore counted separately. To decide, look
at the picture of the closest pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.disk import file_sha256, write_csv, write_json
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import find_files, find_images, read_image
from dataset.views import turn, view_of_file
from evaluation.image_facts import Shown, near_duplicates, shown_among
from evaluation.nearest import Match, NearestTraining, small_gray
from evaluation.output import Section, Table, cell, new_figure, results_folder, save_figure, show_image
from synthetic.reader import SampleSet, read_real, read_whole

SIDE = 32
CLOSEST = 10


# --- the measure -----------------------------------------------------------------------------------------------------


@dataclass
class MemorisationReport:
    """Result of ``score_memorisation``.

    Attributes:
        samples: distance of every synthetic image. None for an image with a single gray value.
        reference: distances of held-out real images. Without such images, distance of each training image to the
            nearest other training image.
        reference_is: text that names the reference.
        reference_left_out: number of reference images left out because they (nearly) equal a training image.
        closer_than_any: number of synthetic images nearer to a training image than every reference image.
        closer_by_chance: expected value of ``closer_than_any`` if synthetic images were like the reference images: the
            sum over the images of k / (k + n), with the k squares of an image and n reference images. The nearest of
            these k + n pictures is one of the k with this probability.
        made_from_training_masks: number of synthetic images made from training masks. None if the masks are unknown.
        closer_of_other_masks: number of images in ``closer_than_any`` that were made from other masks.
        closest: the nearest pairs.
    """

    training_images: int
    samples: list[float | None]
    reference: list[float]
    reference_is: str
    reference_left_out: int
    closer_than_any: int
    closer_by_chance: float
    made_from_training_masks: int | None
    closer_of_other_masks: int | None
    closest: list[dict]
    provenance: dict[str, list[str]] = field(default_factory=dict)


def _table(content: dict) -> Table:
    rows = []
    for title, values in (("synthetic images", content["samples"]), (content["reference_is"], content["reference"])):
        known = [value for value in values if value is not None]
        rows.append([title, *(np.percentile(known, [0, 5, 50]).tolist() if known else [None] * 3), len(known)])
    return Table(["distance to the nearest training image", "smallest", "5th percentile", "median", "images"], rows)


def _notes(content: dict) -> list[str]:
    notes = [
        f"{content['closer_than_any']} of {len(content['samples'])} synthetic images are nearer to a training image "
        f"than all {len(content['reference'])} reference images; by chance, expect {content['closer_by_chance']:.1f}"
    ]
    if content["reference_left_out"]:
        notes.append(
            f"{content['reference_left_out']} reference images were left out because they show what a training image "
            "shows"
        )
    if content["made_from_training_masks"] is not None:
        notes.append(
            f"{content['made_from_training_masks']} synthetic images were made from training masks, so their cells are "
            f"in the same places; {content['closer_of_other_masks']} of the others are nearer than all reference images"
        )
    return notes


SECTION = Section(
    "memorisation",
    "Memorisation: does it repeat its training images?",
    "Distance 0 means a copy, in any turn, flip, brightness or contrast. 1.4 means unrelated images. The picture shows "
    "the closest pairs: synthetic image left, training image right. In a copy, grain and background agree as well.",
    _table,
    _notes,
    ("memorisation.png",),
)


def score_memorisation(
    samples: SampleSet,
    train_dir: str | Path,
    held_out_dir: str | Path | None = None,
    train_mask_dir: str | Path | None = None,
    progress: bool = False,
) -> tuple[MemorisationReport, list[tuple[int, Match]], list[Path]]:
    """Find the nearest training image of every synthetic image, and of every reference image.

    Args:
        train_dir: training images of the generator.
        held_out_dir: real images that were not used in training.
        train_mask_dir: training masks. If given, images made from them are counted separately.

    Returns:
        The report, the closest pairs (index of the synthetic image, match) and the training files.

    Raises:
        InputError: files are unreadable, or there are no held-out images and fewer than two training images.
    """
    config = samples.require_config()
    factor = max(1.0, config.image_size / SIDE)
    side = max(1, round(config.image_size / factor))
    paths = list(find_images(train_dir).values())
    if held_out_dir is None and len(paths) < 2:
        raise InputError(f"{train_dir} holds one image: give held-out real images as well")
    bar = partial(tqdm, unit="image", disable=None if progress else True)
    training = [small_gray(_training_picture(path, config), factor) for path in bar(paths, desc="reading training")]
    squares = (samples.squares(samples.synthetic(one)) for one in bar(samples.samples, desc="reading set"))
    drawn = [[small_gray(square, factor) for square in one] for one in squares]  # a large field has several squares
    nearest = NearestTraining(training, side)
    found = iter(nearest.find([picture for pictures in drawn for picture in pictures], progress=progress))
    by_square = [[one for one in itertools.islice(found, len(pictures)) if one is not None] for pictures in drawn]
    matches = [min(one, key=lambda match: match.distance, default=None) for one in by_square]
    others = paths if held_out_dir is None else list(find_images(held_out_dir).values())
    kept = _references(paths, others, held_out_dir or train_dir)
    real = [small_gray(read_real(others[index], config), factor) for index in bar(kept, desc="reading reference")]
    skip = kept if held_out_dir is None else None
    reference = [match.distance for match in nearest.find(real, skip, progress) if match is not None]
    from_training = _made_from(samples, train_mask_dir)
    least = min(reference, default=0.0)
    near = [match is not None and match.distance < least for match in matches]
    known = {index: match for index, match in enumerate(matches) if match is not None}
    order = sorted(known, key=lambda index: known[index].distance)
    closest = [(index, known[index]) for index in order[:CLOSEST]]
    report = MemorisationReport(
        training_images=len(paths),
        samples=[None if match is None else match.distance for match in matches],
        reference=reference,
        reference_is="training images to the nearest other one" if held_out_dir is None else "held-out real images",
        reference_left_out=len(others) - len(kept),
        closer_than_any=sum(near),
        closer_by_chance=sum(len(one) / (len(reference) + len(one)) for one in by_square if one),
        made_from_training_masks=None if from_training is None else sum(from_training),
        closer_of_other_masks=None
        if from_training is None
        else sum(one and not known for one, known in zip(near, from_training, strict=True)),
        closest=[
            {"image": samples.samples[i].columns["image"], "training_image": paths[match.index].name, **asdict(match)}
            for i, match in closest
        ],
        provenance=samples.provenance(),
    )
    return report, closest, paths


def _references(training: Sequence[Path], others: Sequence[Path], where: str | Path) -> list[int]:
    """Numbers of the other images that show what no training image shows.

    Raises:
        InputError: there is none.
    """
    shown_twice = _shown_in_training(training, others)
    kept = [index for index, path in enumerate(others) if path not in shown_twice]
    if not kept:
        raise InputError(
            f"{where}: every image shows what a training image shows, so none can be a reference: give other held-out "
            "images"
        )
    return kept


def _shown_in_training(training: Sequence[Path], others: Sequence[Path]) -> set[Path]:
    """The other images that (nearly) equal a training image. If ``others`` are the training images, those that equal
    another training image."""
    shown = {path: Shown.of(str(path), read_image(path)) for path in dict.fromkeys([*training, *others])}
    if others is training:
        return {Path(name) for *pair, _ in near_duplicates(list(shown.values())) for name in pair}
    known = shown_among([shown[path] for path in others], [shown[path] for path in training])
    return {path for path, one in zip(others, known, strict=True) if one}


def _made_from(samples: SampleSet, train_mask_dir: str | Path | None) -> list[bool] | None:
    """Whether each synthetic image was made from a mask of the folder, by the hash in the manifest. None if unknown."""
    if train_mask_dir is None or "source_mask_sha256" not in samples.columns:
        return None
    known = {file_sha256(path) for path in find_files(train_mask_dir, "mask").values()}
    return [sample.columns["source_mask_sha256"] in known for sample in samples.samples]


def _training_picture(path: Path, config: DataConfig) -> np.ndarray:
    """The part of a training image that training can use, uint8 (H, W, C): the middle square, or the whole image.

    Raises:
        InputError: the file is unreadable, or smaller than a random crop.
    """
    image = read_whole(path, config)
    view_of_file(path, image.shape, config)  # refuses an image that is too small
    return image


# --- files -----------------------------------------------------------------------------------------------------------


def write_memorisation_report(
    samples: SampleSet, report: MemorisationReport, closest: list[tuple[int, Match]], paths: list[Path]
) -> Path:
    """Write ``memorisation.json``, ``memorisation.csv`` and ``memorisation.png`` (closest pairs). Return the folder."""
    folder = results_folder(samples)
    write_json(folder / "memorisation.json", asdict(report))
    rows = [
        [sample.columns["image"], cell(value, 5)] for sample, value in zip(samples.samples, report.samples, strict=True)
    ]
    write_csv(folder / "memorisation.csv", ["image", "distance"], rows)
    draw_closest(samples, closest, paths, folder / "memorisation.png")
    return folder


def draw_closest(samples: SampleSet, closest: list[tuple[int, Match]], paths: list[Path], path: Path) -> None:
    """Draw the closest pairs side by side. The training image is turned and cropped to match the synthetic image."""
    if not closest:
        return
    config = samples.require_config()
    factor = max(1.0, config.image_size / SIDE)
    rows = -(-len(closest) // 2)
    figure = new_figure(9, 2.4 * rows)
    axes = figure.subplots(rows, 4, squeeze=False).reshape(-1, 2)
    for axis in axes.ravel():
        axis.set_axis_off()
    for (left, right), (index, match) in zip(axes, closest, strict=False):
        sample = samples.samples[index]
        show_image(left, samples.synthetic(sample), f"synthetic {sample.name[:20]}")
        window = _matching_window(paths[match.index], match, config, factor)
        show_image(right, window, f"training {paths[match.index].stem[:16]}, {match.distance:.2f}")
    save_figure(figure, path)


def _matching_window(path: Path, match: Match, config: DataConfig, factor: float) -> np.ndarray:
    """The crop of a training image that belongs to a match, uint8 (S, S, C)."""
    picture = _training_picture(path, config)
    size = config.image_size
    top, left = (min(round(start * factor), max(0, length - size)) for start, length in
                 zip((match.top, match.left), picture.shape[:2], strict=True))  # fmt: skip
    return turn(picture[top : top + size, left : left + size], (0, 1), match.symmetry)
