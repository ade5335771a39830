"""Does the generator repeat its training images: nearest training image of every sample, beside held-out real images.

Images are compared as gray pictures of at most ``SIDE`` pixels a side, in all eight symmetries (training turns and
flips its images) and, if training cuts random squares, at every offset: see ``evaluation/nearest.py``. The distance is
sqrt(2 (1 - r)) with r the correlation of the two pictures: 0 for a copy whatever its brightness and contrast, about 1.4
for unrelated pictures.

How near is too near depends on the images: dim windows with one nucleus resemble each other, real ones too. So samples
count that are nearer to a training image than any reference image is, beside how many of them chance would put there.

A sample made from a training image's own mask has its cells where that image has them and is nearer to it than held-out
images with cells elsewhere can be. So samples are counted apart by whether their mask is one of training, where the
masks are known. How a sample looks beside its nearest training image, in the picture, decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.disk import file_sha256, write_csv, write_json
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import find_files, read_image
from dataset.gray import fit_channels, image_window, to_display
from dataset.views import center_view, turn
from evaluation.image_facts import image_facts, near_duplicates
from evaluation.nearest import Match, NearestTraining, small_gray
from evaluation.output import Section, Table, new_figure, results_folder, save_figure, show_image
from synthetic.reader import SampleSet, read_real

SIDE = 32
CLOSEST = 10


# --- the measure -----------------------------------------------------------------------------------------------------


@dataclass
class MemorisationReport:
    """Result of ``score_memorisation``.

    Attributes:
        samples: distance of every synthetic image, None for one of a single gray value.
        reference: distances of the real images that are no training images (or, without such, of each training image
            to the nearest other one).
        reference_is: in words.
        reference_left_out: how many real images show (nearly) what another training image shows and are no yardstick.
        closer_than_any: samples nearer to a training image than any reference image is.
        closer_by_chance: how many that would be on average if samples were like the reference images.
        made_from_training_masks: samples whose source mask is one of training; None where that is not known.
        closer_of_other_masks: of the samples counted in ``closer_than_any`` those made from other masks.
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

    def to_dict(self) -> dict:
        """Plain types for JSON."""
        return asdict(self)


def _table(content: dict) -> Table:
    rows = []
    for title, values in (("synthetic images", content["samples"]), (content["reference_is"], content["reference"])):
        known = [value for value in values if value is not None]
        rows.append([title, *(np.percentile(known, [0, 5, 50]).tolist() if known else [None] * 3), len(known)])
    return Table(["distance to the nearest training image", "least", "5 %", "median", "images"], rows)


def _notes(content: dict) -> list[str]:
    notes = [
        f"{content['closer_than_any']} of {len(content['samples'])} synthetic images are nearer to a training image "
        f"than any of the {len(content['reference'])} reference images; {content['closer_by_chance']:.1f} would be by "
        "chance"
    ]
    if content["reference_left_out"]:
        notes.append(f"{content['reference_left_out']} real images show what another training image shows: left out")
    if content["made_from_training_masks"] is not None:
        notes.append(
            f"{content['made_from_training_masks']} synthetic images were made from masks of training and have their "
            f"cells in the same places; of the others {content['closer_of_other_masks']} are nearer than any reference"
        )
    return notes


SECTION = Section(
    "memorisation",
    "Does it repeat its training images",
    "0 is a copy in any turn, flip, brightness or contrast; 1.4 are unrelated images. The picture shows the closest "
    "pairs, synthetic left, training image right: grain and background tell a copy.",
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
    """Nearest training image of every sample, beside held-out real images.

    Args:
        samples: the synthetic set.
        train_dir: images that the generator was trained on.
        held_out_dir: real images that it was not trained on.
        train_mask_dir: masks of training, to know which samples were made from them.
        progress: show a progress bar.

    Returns:
        The report, the closest pairs (number of the sample, match) and the training files.

    Raises:
        InputError: fewer than two training images and no held-out ones, or unreadable files.
    """
    config = samples.require_config()
    factor = max(1.0, config.image_size / SIDE)
    side = max(1, round(config.image_size / factor))
    paths = list(find_files(train_dir, "image").values())
    if held_out_dir is None and len(paths) < 2:
        raise InputError(f"{train_dir} holds one image: give held-out real images, too")
    bar = partial(tqdm, unit="image", disable=None if progress else True)
    training = [small_gray(_training_picture(path, config), factor) for path in bar(paths, desc="reading training")]
    squares = (samples.squares(samples.synthetic(one)) for one in bar(samples.samples, desc="reading set"))
    drawn = [[small_gray(square, factor) for square in one] for one in squares]  # several of a large field
    nearest = NearestTraining(training, side)
    found = iter(nearest.find([picture for pictures in drawn for picture in pictures], progress=progress))
    matches = [_closest(itertools.islice(found, len(pictures))) for pictures in drawn]
    alone = held_out_dir is None
    others = paths if alone else list(find_files(held_out_dir, "image").values())
    reference_is = "training images to the nearest other one" if alone else "held-out real images"
    shown_twice = _shown_in_training(paths, others)
    kept = [index for index, path in enumerate(others) if path not in shown_twice]
    if not kept:
        raise InputError(
            f"{held_out_dir or train_dir}: every image shows what an image of training shows, so none says how near a "
            "new one comes: give other held-out images"
        )
    skip = kept if alone else None
    yardstick = bar([others[index] for index in kept], desc="reading reference")
    real = [small_gray(read_real(path, config), factor) for path in yardstick]
    reference = [match.distance for match in nearest.find(real, skip, progress) if match is not None]
    from_training = _made_from(samples, train_mask_dir)
    least = min(reference, default=0.0)
    near = [match is not None and match.distance < least for match in matches]
    order = sorted((i for i, match in enumerate(matches) if match is not None), key=lambda i: matches[i].distance)
    closest = [(index, matches[index]) for index in order[:CLOSEST]]
    report = MemorisationReport(
        training_images=len(paths),
        samples=[None if match is None else match.distance for match in matches],
        reference=reference,
        reference_is=reference_is,
        reference_left_out=len(others) - len(kept),
        closer_than_any=sum(near),
        closer_by_chance=len(order) / (len(reference) + 1),
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


def _closest(matches: Iterable[Match | None]) -> Match | None:
    """The nearest of the matches of an image's squares; None where all of them are flat."""
    return min((match for match in matches if match is not None), key=lambda match: match.distance, default=None)


def _shown_in_training(training: Sequence[Path], others: Sequence[Path]) -> set[Path]:
    """The other images that show (nearly) what a training image shows; where they are the training images themselves,
    what another one shows."""
    known, facts = set(map(str, training)), {path: image_facts(path) for path in {*training, *others}}
    pairs = near_duplicates([replace(one, name=str(path)) for path, one in facts.items()])
    found = {Path(name) for first, second, _ in pairs if {first, second} & known for name in (first, second)}
    return (found if others is training else found.union(training)) & set(others)


def _made_from(samples: SampleSet, train_mask_dir: str | Path | None) -> list[bool] | None:
    """Which samples were made from masks of a folder, by the hash in the manifest."""
    if train_mask_dir is None or "source_mask_sha256" not in samples.columns:
        return None
    known = {file_sha256(path) for path in find_files(train_mask_dir, "mask").values()}
    return [sample.columns["source_mask_sha256"] in known for sample in samples.samples]


def _training_picture(path: Path, config: DataConfig) -> np.ndarray:
    """A training image as far as training can show it, uint8 (H, W, C): the middle square, or the whole image."""
    image = fit_channels(read_image(path), config.channels, path)
    if config.crop == "center":
        image = center_view(image.shape[0], image.shape[1], config.image_size).apply_image(image)
    return to_display(image, image_window(image, config))


# --- files -----------------------------------------------------------------------------------------------------------


def write_memorisation_report(
    samples: SampleSet, report: MemorisationReport, closest: list[tuple[int, Match]], paths: list[Path]
) -> Path:
    """Write ``memorisation.json``, ``memorisation.csv`` and the closest pairs, ``memorisation.png``; the folder."""
    folder = results_folder(samples)
    write_json(folder / "memorisation.json", report.to_dict())
    rows = [
        [sample.columns["image"], "" if value is None else f"{value:.5f}"]
        for sample, value in zip(samples.samples, report.samples, strict=True)
    ]
    write_csv(folder / "memorisation.csv", ["image", "distance"], rows)
    draw_closest(samples, closest, paths, folder / "memorisation.png")
    return folder


def draw_closest(samples: SampleSet, closest: list[tuple[int, Match]], paths: list[Path], path: Path) -> None:
    """The closest pairs side by side, the training image turned and cut as it lies on the sample."""
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
    """The part of a training image that a match means, uint8 (S, S, C)."""
    picture = _training_picture(path, config)
    size = config.image_size
    top, left = (min(round(start * factor), max(0, length - size)) for start, length in
                 zip((match.top, match.left), picture.shape[:2], strict=True))  # fmt: skip
    return turn(picture[top : top + size, left : left + size], (0, 1), match.symmetry)
