"""Population: do synthetic and real cells agree in number, size, shape, brightness and texture?

Numbers and shapes come from the labels, brightness and texture from the images inside the labels. If the set was made
from the real masks, shapes agree by construction. Then only brightness, contrast and texture are informative. Each
distance is one to random halves of the real images. For comparison, it is also computed for the other half.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
from scipy.stats import wasserstein_distance
from skimage.measure import regionprops_table

from common.cells import connected_cells, touches_border, without_gaps
from common.disk import write_csv, write_json
from common.errors import InputError
from common.randomness import compared_sides
from dataset.config import DataConfig
from dataset.mask_folder import MaskFolder
from evaluation.fidelity import LabelledImage, crops_per_image, folder_images, set_images
from evaluation.output import Section, Table, new_figure, results_folder, save_figure
from synthetic.reader import SampleSet

SEED = 0  # of crops
TEXTURE_SIGMA = 2.0  # pixels; structure below this size counts as texture
# Quantity -> (title with unit, "cell" or "image": what has one value).
QUANTITIES = {
    "count": ("cells per image", "image"),
    "area": ("area of a cell, pixels", "cell"),
    "eccentricity": ("eccentricity of a cell", "cell"),
    "intensity": ("mean gray of a cell, 0 to 1", "cell"),
    "spread": ("spread of mean grays in an image", "image"),
    "contrast": ("cell minus background, gray", "cell"),
    "texture": ("fine structure in a cell, gray", "cell"),
}

PROPERTIES = ("label", "area", "eccentricity", "intensity_mean", "intensity_std")


def measure_image(item: LabelledImage) -> dict[str, np.ndarray]:
    """All quantities of one image.

    - ``count``: number of cells.
    - ``area`` and ``eccentricity``: only of cells that do not touch the image's edge. Eccentricity is
      sqrt(1 - minor^2 / major^2) of the ellipse with the cell's second moments: 0 for a disk, near 1 for a line.
    - ``intensity``: mean gray value inside, 0..1.
    - ``spread``: standard deviation of the intensity over the cells of the image, if it has two or more.
    - ``contrast``: intensity minus the mean gray value outside of all cells.
    - ``texture``: standard deviation of the fine structure inside. Fine structure is the gray value minus a Gaussian
      mean (:data:`TEXTURE_SIGMA`) over pixels of cells, so the edge and the brightness of the cell do not count.

    Args:
        item: image uint8 (S, S, C) with its instance map.

    Returns:
        quantity -> one value per cell (``count`` and ``spread``: one value, or none).
    """
    gray = item.image.mean(axis=-1) / 255.0
    cells = without_gaps(item.cells)
    fine = gray - _smooth_within(gray, cells)
    table = regionprops_table(cells, np.dstack([gray, fine]), PROPERTIES)
    whole = ~np.isin(table["label"], touches_border(cells))
    outside, intensity = gray[cells == 0], table["intensity_mean-0"]
    return {
        "count": np.array([float(len(whole))]),
        "area": table["area"][whole],
        "eccentricity": table["eccentricity"][whole],
        "intensity": intensity,
        "spread": np.array([intensity.std()] if len(intensity) > 1 else []),
        "contrast": intensity - outside.mean() if outside.size else np.zeros(0),
        "texture": table["intensity_std-1"],
    }


def _smooth_within(gray: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Gaussian mean over the pixels of all cells. Not defined outside of cells."""
    inside = (cells > 0).astype(np.float64)
    weight = scipy.ndimage.gaussian_filter(inside, TEXTURE_SIGMA)
    return scipy.ndimage.gaussian_filter(gray * inside, TEXTURE_SIGMA) / np.maximum(weight, 1e-12)


Population = list[dict[str, np.ndarray]]  # one entry per image


def measure_population(images: Iterable[LabelledImage]) -> Population:
    """:func:`measure_image` of every image."""
    return [measure_image(item) for item in images]


def values_of(population: Population, quantity: str) -> np.ndarray:
    """All values of a quantity."""
    return np.concatenate([image[quantity] for image in population]) if population else np.zeros(0)


@dataclass
class QuantityScore:
    """Synthetic and real values of one quantity. ``None`` if one side has no value.

    Attributes:
        title: name with the unit.
        synthetic_mean, real_mean, synthetic_std, real_std: mean and standard deviation of the values.
        distance: mean Wasserstein distance of synthetic images to random halves of the real ones, in the quantity's
            unit.
        relative: distance divided by the standard deviation of the real values.
        real_distance: as the distance, of as many images of the other half.
        real_distance_max: largest distance between random halves of the real images.
    """

    title: str
    synthetic_values: int
    real_values: int
    synthetic_mean: float | None = None
    synthetic_std: float | None = None
    real_mean: float | None = None
    real_std: float | None = None
    distance: float | None = None
    relative: float | None = None
    real_distance: float | None = None
    real_distance_max: float | None = None


@dataclass
class PopulationReport:
    """Result of ``score_population``."""

    quantities: dict[str, QuantityScore]
    synthetic_images: int
    real_images: int
    real_images_are: str
    cells_are: str
    provenance: dict[str, list[str]]


def _table(content: dict) -> Table:
    names = ("synthetic_mean", "real_mean", "distance", "real_distance", "relative")
    rows = [[one["title"], *(one[name] for name in names)] for one in content["quantities"].values()]
    return Table(["", "synthetic, mean", "real, mean", "distance", "real - real", "distance / real std"], rows)


def _notes(content: dict) -> list[str]:
    return [
        f"{content['synthetic_images']} synthetic images; {content['real_images']} real images, "
        f"{content['real_images_are']}; cells are counted as {content['cells_are']}"
    ]


SECTION = Section(
    "population",
    "Population: are synthetic and real cells alike?",
    "Means, and Wasserstein distances to the cells of random halves of the real images: of synthetic images, and "
    "('real - real') of as many images of the other half, which is the best to expect. The last column gives the "
    "distance in standard deviations of the real cells. Numbers and shapes come from the masks; brightness, contrast "
    "and texture come from the images.",
    _table,
    _notes,
    ("population.png",),
)


def compare_populations(
    synthetic: Population, real: Population, groups: Sequence[Hashable], is_paired: bool = False
) -> dict[str, QuantityScore]:
    """Wasserstein distances of every quantity to random halves of the real images, see :func:`compared_sides`.

    If all real images are crops of one, the synthetic images are compared with all of them.

    Args:
        groups: for every entry of ``real`` the image that it was cropped from. An image lies in one half.
        is_paired: entry i of ``synthetic`` was made from the mask of entry i of ``real``.
    """
    sides = compared_sides(groups, len(synthetic), is_paired)
    scores = {}
    for quantity, (title, _) in QUANTITIES.items():
        ours, theirs = values_of(synthetic, quantity), values_of(real, quantity)
        score = QuantityScore(title, len(ours), len(theirs))
        if len(ours):
            score.synthetic_mean, score.synthetic_std = float(ours.mean()), float(ours.std())
        if len(theirs):
            score.real_mean, score.real_std = float(theirs.mean()), float(theirs.std())
        halves = [_values_at(real, side.half, quantity) for side in sides] or [theirs]
        drawn = [_values_at(synthetic, side.synthetic, quantity) for side in sides] or [ours]
        distances = _distances(drawn, halves)
        if distances and score.real_mean is not None and score.real_std is not None:
            score.distance = distance = float(np.mean(distances))
            is_spread = score.real_std > 1e-9 * max(1.0, abs(score.real_mean))  # more than rounding
            score.relative = distance / score.real_std if is_spread else None
        floor = _distances([_values_at(real, side.real, quantity) for side in sides], halves)
        if floor:
            score.real_distance, score.real_distance_max = float(np.mean(floor)), float(np.max(floor))
        scores[quantity] = score
    return scores


def _values_at(population: Population, places: np.ndarray, quantity: str) -> np.ndarray:
    return values_of([population[place] for place in places], quantity)


def _distances(sides: Sequence[np.ndarray], halves: Sequence[np.ndarray]) -> list[float]:
    """Wasserstein distances of sides and halves that have values."""
    pairs = zip(sides, halves, strict=False)  # a single half has no other one
    return [wasserstein_distance(side, half) for side, half in pairs if len(side) and len(half)]


def score_population(
    samples: SampleSet,
    image_dir: str | None = None,
    mask_dir: str | None = None,
    mask_type: str = "auto",
) -> tuple[PopulationReport, Population, Population]:
    """Measure the cells of the set and of real pairs.

    Args:
        image_dir: real images. None: those that the manifest names.
        mask_type: one of ``MASK_TYPES``.

    Returns:
        The report, and the populations of the synthetic and the real images.

    Raises:
        InputError: no real images are known.
    """
    ids = samples.mask_type == "instances"
    is_paired = image_dir is None or mask_dir is None
    if image_dir is not None and mask_dir is not None:
        config: DataConfig = samples.require_config()
        folder = MaskFolder(
            mask_dir, config, mask_type, image_dir, normalize=samples.normalizes, whole_scale=samples.whole_scale,
            learned=samples.mask_type,
        )  # fmt: skip
        ids = ids and folder.rule.mask_type == "instances"
        real = measure_population(_cells_alike(folder_images(folder, folder.names, SEED), ids))
        groups: Sequence[Hashable] = np.repeat(folder.names, crops_per_image(folder)).tolist()
        real_are = f"those of {image_dir}"
    elif samples.has_real:
        real = measure_population(_cells_alike(set_images(samples, real=True), ids))
        groups, real_are = samples.real_files(), "those of the same masks"
    else:
        raise InputError(f"the manifest of {samples.folder} names no real images: give real images and their masks")
    synthetic = measure_population(_cells_alike(set_images(samples, real=False), ids))
    report = PopulationReport(
        quantities=compare_populations(synthetic, real, groups, is_paired),
        synthetic_images=len(synthetic),
        real_images=len(set(groups)),
        real_images_are=real_are,
        cells_are="instances" if ids else "connected components",
        provenance=samples.provenance(),
    )
    return report, synthetic, real


def _cells_alike(images: Iterable[LabelledImage], ids: bool) -> Iterable[LabelledImage]:
    """Use instances if both sides have them. If not, use connected components: touching cells then count as one."""
    for item in images:
        yield item if ids else item._replace(cells=connected_cells(item.classes > 0))


# --- files -----------------------------------------------------------------------------------------------------------


def write_population_report(
    samples: SampleSet, report: PopulationReport, synthetic: Population, real: Population
) -> Path:
    """Write ``population.json``, ``population.csv`` (one row per value) and ``population.png``. Returns the folder."""
    folder = results_folder(samples)
    write_json(folder / "population.json", asdict(report))
    rows = []
    for kind, population in (("synthetic", synthetic), ("real", real)):
        for quantity in QUANTITIES:
            rows += [[kind, quantity, f"{value:.6g}"] for value in values_of(population, quantity)]
    write_csv(folder / "population.csv", ["set", "quantity", "value"], rows)
    draw_histograms(report, synthetic, real, folder / "population.png")
    return folder


def draw_histograms(report: PopulationReport, synthetic: Population, real: Population, path: Path) -> None:
    """Draw one histogram per quantity. Real and synthetic values share the bins."""
    figure = new_figure(13, 5.6)
    axes = figure.subplots(2, 4).ravel()
    for axis in axes[len(report.quantities) :]:
        axis.set_axis_off()
    for axis, (quantity, score) in zip(axes, report.quantities.items(), strict=False):
        sides = {"real": values_of(real, quantity), "synthetic": values_of(synthetic, quantity)}
        both = np.concatenate(list(sides.values()))
        axis.set_title(score.title, fontsize=9)
        if not len(both):
            continue
        low, high = np.percentile(both, [0, 99.5])
        bins = np.linspace(low, high if high > low else low + 1, 31)
        for (name, values), color in zip(sides.items(), ("#7a7a7a", "#d6278f"), strict=True):
            if len(values):
                weights = np.full(len(values), 1 / len(values))
                axis.hist(values, bins, weights=weights, histtype="stepfilled", alpha=0.45, label=name, color=color)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("fraction", fontsize=8)
    save_figure(figure, path)
