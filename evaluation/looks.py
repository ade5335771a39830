"""Looks: are colour, contrast and grain of the synthetic images those of the real ones?

Each number that describes a look (``dataset/looks.py``) is compared over the images of both sides. For comparison, each
distance is also computed between two random halves of the real images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import wasserstein_distance

from common.disk import write_json
from common.errors import InputError
from common.randomness import random_halves
from dataset.files import find_files
from dataset.looks import look_names, measure_image
from evaluation.output import Section, Table, new_figure, results_folder, save_figure, show_image
from synthetic.reader import SampleSet, read_whole

ROWS, COLUMNS = 6, 8  # of the picture
FULL_RANGE = ((0.0, 255.0),)


@dataclass(frozen=True)
class NumberScore:
    """One number of the looks, synthetic and real.

    Attributes:
        synthetic_mean, real_mean: over the images.
        distance: Wasserstein distance of synthetic and real values, divided by the standard deviation of the real ones.
        real_distance: mean of the same between random halves of the real images; None for a single image.
    """

    synthetic_mean: float
    real_mean: float
    distance: float
    real_distance: float | None


@dataclass(frozen=True)
class LooksReport:
    """Result of ``score_looks``."""

    numbers: dict[str, NumberScore]
    synthetic_images: int
    real_images: int
    looks: int  # different ones in the set, as the manifest says; 0 if it does not

    def to_dict(self) -> dict:
        """Plain types for JSON."""
        return asdict(self)


def _table(content: dict) -> Table:
    rows = [
        [name, one["synthetic_mean"], one["real_mean"], one["distance"], one["real_distance"]]
        for name, one in content["numbers"].items()
    ]
    return Table(["", "synthetic, mean", "real, mean", "distance / real std", "real - real / real std"], rows)


def _notes(content: dict) -> list[str]:
    numbers = content["numbers"].values()
    mean = float(np.mean([one["distance"] for one in numbers]))
    halves = [one["real_distance"] for one in numbers if one["real_distance"] is not None]
    beside = f", {np.mean(halves):.3f} between halves of the real images" if halves else ""
    return [
        f"mean distance {mean:.3f}{beside}; {content['synthetic_images']} synthetic images of {content['looks']} "
        f"looks, {content['real_images']} real images"
    ]


SECTION = Section(
    "looks",
    "Looks: colour, contrast and grain",
    "Means over the images on [-1, 1], and Wasserstein distances in standard deviations of the real images. 'real - "
    "real' is the distance between random halves of the real images. Gradients are logarithms.",
    _table,
    _notes,
    ("looks.png",),
)


def score_looks(samples: SampleSet, image_dir: Path | None = None) -> LooksReport:
    """Measure the looks of the set and of real images.

    Args:
        samples: the synthetic set.
        image_dir: real images. None: those that the manifest names.

    Raises:
        InputError: no real images are known.
    """
    config = samples.require_config()
    if image_dir is not None:
        real = [read_whole(path, config) for path in find_files(image_dir, "image").values()]
    elif samples.has_real:
        real = [samples.real(one) for one in samples.samples]
    else:
        raise InputError(f"the manifest of {samples.folder} names no real images: give a folder of real images")
    theirs = _measure(samples, real)
    ours = _measure(samples, (samples.synthetic(one) for one in samples.samples))
    halves = [[np.concatenate([theirs[i] for i in half]) for half in pair] for pair in random_halves(len(theirs))]
    all_ours, all_theirs = np.concatenate(ours), np.concatenate(theirs)
    numbers = {}
    for column, name in enumerate(look_names(config.channels)):
        sides = [[half[:, column] for half in pair] for pair in halves]
        numbers[name] = _compare(all_ours[:, column], all_theirs[:, column], sides)
    return LooksReport(
        numbers=numbers,
        synthetic_images=len(samples),
        real_images=len(real),
        looks=len({one.columns["look_image"] for one in samples.samples if one.columns.get("look_image")}),
    )


def _measure(samples: SampleSet, images: Iterable[np.ndarray]) -> list[np.ndarray]:
    """For each image, uint8 (H, W, C): the looks (n, N) of squares of the training size that cover it."""
    config = samples.require_config()
    last = 1 if config.channels == 1 else None  # the reader repeats gray
    return [
        np.stack([measure_image(part[:, :, :last], FULL_RANGE, config) for part in samples.squares(image)])
        for image in images
    ]


def _compare(ours: np.ndarray, theirs: np.ndarray, halves: Sequence[Sequence[np.ndarray]]) -> NumberScore:
    spread = max(float(theirs.std()), 1e-3)
    floor = [wasserstein_distance(one, other) / spread for one, other in halves]
    return NumberScore(
        synthetic_mean=float(ours.mean()),
        real_mean=float(theirs.mean()),
        distance=float(wasserstein_distance(ours, theirs)) / spread,
        real_distance=float(np.mean(floor)) if floor else None,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def write_looks_report(samples: SampleSet, report: LooksReport) -> Path:
    """Write ``looks.json``, and ``looks.png`` if the manifest names looks. Returns the folder."""
    folder = results_folder(samples)
    write_json(folder / "looks.json", report.to_dict())
    if report.looks:
        draw_looks(samples, folder / "looks.png")
    return folder


def draw_looks(samples: SampleSet, path: Path) -> None:
    """A row for each of the most frequent looks: images of different masks, with the outlines of the masks."""
    counts = Counter(one.columns["look_image"] for one in samples.samples if one.columns["look_image"])
    looks = [name for name, _ in counts.most_common(ROWS)]
    columns = min(COLUMNS, max(counts.values()))
    figure = new_figure(1.6 * columns, 1.8 * len(looks))
    for axes, look in zip(figure.subplots(len(looks), columns, squeeze=False), looks, strict=True):
        shown = [one for one in samples.samples if one.columns["look_image"] == look][:columns]
        for axis in axes:
            axis.set_axis_off()
        for place, (axis, sample) in enumerate(zip(axes, shown, strict=False)):
            title = f"look of {look[:20]}" if place == 0 else ""
            show_image(axis, samples.synthetic(sample), title, samples.foreground(sample))
    save_figure(figure, path)
