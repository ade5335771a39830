"""Threshold: does the image follow its mask? Thresholds the image and compares the result with the mask.

Needs no trained network. Otsu's threshold splits every synthetic image into bright and dark, and the result is compared
with the mask. The same is done with the real images of the same masks. Their Dice is the ceiling. If cells and
background differ by more than brightness, even real images score low; then look at the ratio. Guidance can raise the
Dice by raising the contrast. Therefore mean and standard deviation of the gray values are reported as well.

Source of the threshold: Otsu 1979, IEEE Trans. Systems, Man and Cybernetics 9(1).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from skimage.filters import threshold_otsu

from common.disk import write_csv, write_json
from common.errors import InputError
from evaluation.instances import dice
from evaluation.output import Section, Table, cell, new_figure, results_folder, save_figure, show_image
from synthetic.reader import Sample, SampleSet

logger = logging.getLogger(__name__)
NUM_BINS = 256
PICTURE_ROWS = ("worst", "median", "best")


def otsu_threshold(gray: np.ndarray) -> float | None:
    """Threshold that splits gray values into two classes with the largest variance between them.

    If a gap separates the two groups, every threshold in the gap is equally good. This takes the middle of the gap.

    Source: Otsu 1979.

    Args:
        gray: values in [0, 1], any shape.

    Returns:
        The threshold: ``gray > threshold`` is the bright class. None if all values are in one bin.
    """
    counts, edges = np.histogram(gray, bins=NUM_BINS, range=(0.0, 1.0))
    occupied = np.flatnonzero(counts)
    if len(occupied) < 2:
        return None
    darker = threshold_otsu(hist=(counts, np.arange(NUM_BINS)))  # the last bin of the dark class
    brighter = occupied[occupied > darker][0]
    return float((edges[darker + 1] + edges[brighter]) / 2)


def thresholded(gray: np.ndarray, brighter: bool) -> np.ndarray:
    """Cells by Otsu's threshold, (H, W) bool. An image with a single gray value has no cells.

    Args:
        gray: (H, W) in [0, 1].
        brighter: whether cells are the bright class.
    """
    threshold = otsu_threshold(gray)
    if threshold is None:
        return np.zeros(gray.shape, dtype=bool)
    return (gray > threshold) == brighter


def to_gray(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> (H, W) float64 in [0, 1], the mean of the channels."""
    return image.mean(axis=-1) / 255.0


@dataclass
class PixelStatistics:
    """Mean and standard deviation of gray values in [0, 1] over all pixels of all images added so far."""

    count: int = 0
    total: float = 0.0
    total_of_squares: float = 0.0

    def add(self, gray: np.ndarray) -> None:
        """Add the pixels of one image."""
        self.count += gray.size
        self.total += float(gray.sum())
        self.total_of_squares += float(np.square(gray).sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        return max(self.total_of_squares / self.count - self.mean**2, 0.0) ** 0.5


@dataclass
class ImageScore:
    """Dice of one thresholded image with its mask, and Dice of the real image of the same mask.

    ``skipped`` gives the reason if there is no Dice: the crop of the mask has ``no cell`` or ``only cell``.
    """

    image: str
    dice_synthetic: float | None = None
    dice_real: float | None = None
    skipped: str = ""


@dataclass
class ThresholdScore:
    """Result of ``score_by_threshold``. Gray values are in [0, 1], differences are relative to the real value."""

    images: int
    compared: int
    no_cell: int
    only_cell: int
    brighter: bool
    polarity_from: str
    dice_synthetic: float | None
    dice_real: float | None
    dice_ratio: float | None
    mean_synthetic: float
    std_synthetic: float
    mean_real: float | None
    std_real: float | None
    mean_difference: float | None
    std_difference: float | None
    provenance: dict[str, list[str]] = field(default_factory=dict)
    per_image: list[ImageScore] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain types for JSON, without the rows of each image."""
        content = asdict(self)
        del content["per_image"]
        content["polarity"] = "brighter" if content.pop("brighter") else "darker"
        return content


def _table(content: dict) -> Table:
    quantities = {
        "dice": "Dice with the mask",
        "mean": "mean gray value, 0 to 1",
        "std": "standard deviation of gray values",
    }
    rows = []
    for name, title in quantities.items():
        synthetic, real = content[f"{name}_synthetic"], content[f"{name}_real"]
        rows.append([title, synthetic, real, _ratio(synthetic, real)])
    return Table(["", "synthetic", "real images of the same masks", "synthetic / real"], rows)


def _notes(content: dict) -> list[str]:
    return [
        f"{content['compared']} of {content['images']} images compared; left out of the Dice: {content['no_cell']} "
        f"without a cell, {content['only_cell']} without background",
        f"cells are {content['polarity']} than the background, according to the {content['polarity_from']} images",
    ]


SECTION = Section(
    "threshold",
    "Threshold: does the image follow its mask? (bright against dark)",
    "Otsu's threshold splits each image, and the result is compared with its mask. High contrast raises the Dice, so "
    "check that mean and standard deviation of the gray values agree with the real images.",
    _table,
    _notes,
    ("threshold.png",),
)


def score_by_threshold(samples: SampleSet) -> ThresholdScore:
    """Dice of the thresholded images with their masks, for synthetic and real images.

    Returns:
        Means over the images whose mask has both cell and background, and one row per image.

    Raises:
        InputError: a file is unreadable, or sizes differ.
    """
    brighter, polarity_from = decide_polarity(samples)
    scores: list[ImageScore] = []
    synthetic_pixels, real_pixels = PixelStatistics(), PixelStatistics()
    for sample in samples.samples:
        cells = samples.foreground(sample)
        synthetic = to_gray(samples.synthetic(sample))
        check_sizes(sample, synthetic, cells)
        synthetic_pixels.add(synthetic)
        score = ImageScore(sample.columns["image"], skipped=why_skipped(cells))
        if samples.has_real:
            real = to_gray(samples.real(sample))
            check_sizes(sample, real, cells)
            real_pixels.add(real)
        if not score.skipped:
            score.dice_synthetic = dice(thresholded(synthetic, brighter), cells)
            score.dice_real = dice(thresholded(real, brighter), cells) if samples.has_real else None
        scores.append(score)
    return _summary(scores, brighter, polarity_from, synthetic_pixels, real_pixels, samples)


def decide_polarity(samples: SampleSet) -> tuple[bool, str]:
    """Decide for the whole set whether cells are brighter than the background. Uses the real images if there are any.

    Sums up the mean inside the mask minus the mean outside, over all images. So images with high contrast count more.

    Returns:
        (True if cells are brighter, ``"real"`` or ``"synthetic"``: the images that were used).
    """
    source = "real" if samples.has_real else "synthetic"
    difference = 0.0
    for sample in samples.samples:
        cells = samples.foreground(sample)
        if why_skipped(cells):
            continue
        gray = to_gray(samples.real(sample) if samples.has_real else samples.synthetic(sample))
        check_sizes(sample, gray, cells)
        difference += float(gray[cells].mean() - gray[~cells].mean())
    return difference >= 0, source


def why_skipped(cells: np.ndarray) -> str:
    """Reason why a mask gives no Dice: ``no cell`` or ``only cell``. An empty string if it gives one."""
    if not cells.any():
        return "no cell"
    return "only cell" if cells.all() else ""


def check_sizes(sample: Sample, gray: np.ndarray, cells: np.ndarray) -> None:
    """Raise InputError if an image and its label differ in size."""
    if gray.shape != cells.shape:
        raise InputError(
            f"{sample.image_path} or its real image is {gray.shape[0]} x {gray.shape[1]}, its label "
            f"{sample.label_path} is {cells.shape[0]} x {cells.shape[1]}; sample the set again"
        )


def _summary(
    scores: Sequence[ImageScore],
    brighter: bool,
    polarity_from: str,
    synthetic: PixelStatistics,
    real: PixelStatistics,
    samples: SampleSet,
) -> ThresholdScore:
    compared = [score for score in scores if not score.skipped]
    dice_synthetic = float(np.mean([score.dice_synthetic for score in compared])) if compared else None
    dice_real = float(np.mean([score.dice_real for score in compared])) if compared and samples.has_real else None
    mean_real, std_real = (real.mean, real.std) if real.count else (None, None)
    return ThresholdScore(
        images=len(scores),
        compared=len(compared),
        no_cell=sum(score.skipped == "no cell" for score in scores),
        only_cell=sum(score.skipped == "only cell" for score in scores),
        brighter=brighter,
        polarity_from=polarity_from,
        dice_synthetic=dice_synthetic,
        dice_real=dice_real,
        dice_ratio=_ratio(dice_synthetic, dice_real),
        mean_synthetic=synthetic.mean,
        std_synthetic=synthetic.std,
        mean_real=mean_real,
        std_real=std_real,
        mean_difference=_relative_difference(synthetic.mean, mean_real),
        std_difference=_relative_difference(synthetic.std, std_real),
        provenance=samples.provenance(),
        per_image=list(scores),
    )


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _relative_difference(value: float, reference: float | None) -> float | None:
    ratio = _ratio(value, reference)
    return None if ratio is None else ratio - 1


# --- files -----------------------------------------------------------------------------------------------------------


def write_threshold_report(samples: SampleSet, score: ThresholdScore) -> Path:
    """Write ``threshold.json``, ``threshold.csv`` and ``threshold.png`` into ``SAMPLE_DIR/evaluation``.

    Returns:
        The folder.
    """
    folder = results_folder(samples)
    write_json(folder / "threshold.json", score.to_dict())
    rows = [[row.image, cell(row.dice_synthetic, 6), cell(row.dice_real, 6), row.skipped] for row in score.per_image]
    write_csv(folder / "threshold.csv", ["image", "dice_synthetic", "dice_real", "skipped"], rows)
    draw_extremes(samples, score, folder / "threshold.png")
    return folder


def pick_extremes(values: Sequence[float | None]) -> list[int]:
    """Indices of the worst, median and best value, without repeats. Skips None."""
    order = sorted((index for index, value in enumerate(values) if value is not None), key=lambda i: (values[i], i))
    if not order:
        return []
    return list(dict.fromkeys([order[0], order[(len(order) - 1) // 2], order[-1]]))


def draw_extremes(samples: SampleSet, score: ThresholdScore, path: Path) -> None:
    """Draw the worst, median and best image: mask, synthetic and real image, each with the outline of the mask.

    Draws nothing if no image could be compared.
    """
    picked = pick_extremes([row.dice_synthetic for row in score.per_image])
    if not picked:
        return
    columns = 3 if samples.has_real else 2
    figure = new_figure(2.6 * columns, 2.8 * len(picked))
    axes = figure.subplots(len(picked), columns, squeeze=False)
    titles = PICTURE_ROWS if len(picked) == 3 else [""] * len(picked)
    for row, index, title in zip(axes, picked, titles, strict=True):
        sample, found = samples.samples[index], score.per_image[index]
        cells = samples.foreground(sample)
        show_image(row[0], cells, f"{title} {sample.name}".strip()[:28])
        pictures = [("synthetic", samples.synthetic(sample), found.dice_synthetic)]
        if samples.has_real:
            pictures.append(("real", samples.real(sample), found.dice_real))
        for axis, (kind, image, value) in zip(row[1:], pictures, strict=True):
            show_image(axis, image, f"{kind}, Dice {value:.2f}", cells)
    save_figure(figure, path)
