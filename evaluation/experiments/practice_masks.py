"""New masks whose density, sizes and touching follow the unlabelled images, as a segmenter counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.disk import SETTINGS, link_or_copy, write_bytes, write_json
from dataset.config import DataConfig
from dataset.files import encode_image, find_images_and_masks, match_names
from dataset.masks import MaskRule
from dataset.views import center_view, whole_view
from engine.tiling import covering_squares
from evaluation.experiments.segmenter import split_cells
from layouts.nuclei import HEADROOM
from layouts.recombine import read_origin
from layouts.statistics import Measurement, measure, summarize

LEVELS = 4  # of density: a part of the masks is made for each
LEAST_DENSITY, LEAST_CELLS = 0.01, 3
SCALE_LIMITS, SCALE_SPREAD = (0.5, 2.0), 1.15
TOUCHING = 0.02  # share of the cells from which simulated cells may touch


@dataclass(frozen=True)
class LayoutStatistics:
    """Statistics that new masks follow.

    Attributes:
        images: number of segmented images.
        densities: fraction of a square that cells cover, at ``LEVELS`` quantiles, rising.
        diameter: mean diameter, pixels.
        size_spread: standard deviation of the diameter divided by its mean.
        elongation: mean ratio of the axes, at least 1.
        touching: fraction of the cells that touch another cell.
        scale: median diameter divided by that of the labelled cells.
        labelled_touching: fraction of the labelled cells that touch another cell.
    """

    images: int
    densities: list[float]
    diameter: float
    size_spread: float
    elongation: float
    touching: float
    scale: float
    labelled_touching: float


def layout_statistics(
    found: Sequence[np.ndarray], labelled: Sequence[np.ndarray], side: int
) -> LayoutStatistics | None:
    """Statistics of instance maps. Sizes are those of whole cells, weighted as :class:`Measurement` says.

    Args:
        found: (H, W) instance maps of the unlabelled images.
        labelled: (H, W) instance maps of the labelled images.
        side: side of a mask, pixels.

    Returns:
        None if there are fewer than ``LEAST_CELLS`` whole cells.
    """
    if not found:
        return None
    measured, own = [measure(one) for one in found], [measure(one) for one in labelled]
    if sum(len(one.areas) for one in measured) < LEAST_CELLS or not any(len(one.areas) for one in own):
        return None
    summary, own_summary = summarize(measured), summarize(own)
    shares = np.array([square.mean() for one in found for square in covering_squares(one > 0, side)])
    dense = shares[shares >= LEAST_DENSITY]
    levels = np.quantile(dense if len(dense) else shares[shares > 0], (np.arange(LEVELS) + 0.5) / LEVELS)
    diameter, median_area = summary["cell diameter in pixels, mean"], "cell area in pixels, median"
    scale = math.sqrt(summary[median_area] / own_summary[median_area])
    return LayoutStatistics(
        images=len(measured),
        densities=[float(value) for value in levels],
        diameter=diameter,
        size_spread=min(1.0, _deviation(measured, diameter) / diameter),
        elongation=max(1.0, float(summary["elongation, mean"])),
        touching=float(summary["share of cells that touch another"]),
        scale=float(np.clip(scale, *SCALE_LIMITS)),
        labelled_touching=float(own_summary["share of cells that touch another"]),
    )


def _deviation(measured: Sequence[Measurement], mean: float) -> float:
    """Weighted standard deviation of the diameter of cells with this mean."""
    areas, weights = (np.concatenate([getattr(one, name) for one in measured]) for name in ("areas", "weights"))
    return math.sqrt(np.average((np.sqrt(4 / math.pi * areas) - mean) ** 2, weights=weights))


class CellFiles(NamedTuple):
    """Label files to cut cells from, as ``make_masks.py recombine`` takes them.

    Attributes:
        instances: label images.
        components: whether their connected parts are the cells.
        classes: class maps of the same images, or None.
        crop: how the generator reads its images, see :class:`DataConfig`.
    """

    instances: Path
    components: bool
    classes: Path | None = None
    crop: str = "random"


@dataclass(frozen=True)
class MaskPart:
    """One call of ``make_masks.py``: name -> value of its settings."""

    kind: str
    count: int
    values: dict[str, object]


def plan_parts(
    statistics: LayoutStatistics, count: int, simulated_share: float, side: int, single: bool = False
) -> list[MaskPart]:
    """Plan recombined and simulated layouts at every level of density.

    Args:
        simulated_share: fraction of the masks to simulate, in [0, 1].
        side: side of a mask, pixels.
        single: whether each mask gets one recombined cell in its middle; then all are one part.
    """
    simulated = round(count * simulated_share)
    low, high = statistics.scale / SCALE_SPREAD, statistics.scale * SCALE_SPREAD
    size = (round(low, 4), round(high, 4))
    if single:
        return [MaskPart("recombine", count, {"scale": size, "single": True})] if count else []
    parts = []
    for level, density in enumerate(statistics.densities):
        recombined: dict[str, object] = {"density": _four_digits(min(density, 0.9)), "scale": size}
        if statistics.touching > statistics.labelled_touching:
            recombined["max_overlap"] = 0.1  # cells may be laid against each other beyond their source's clusters
        touching = statistics.touching > TOUCHING
        drawn: dict[str, object] = {
            "density": _four_digits(min(density, HEADROOM[touching])),
            "cell_size": round(float(np.clip(statistics.diameter, 4, side)), 2),
            "size_spread": round(statistics.size_spread, 3),
            "elongation": round(min(4.0, statistics.elongation), 3),
            "touching": touching,
        }
        for kind, total, values in (("recombine", count - simulated, recombined), ("simulate", simulated, drawn)):
            own = total // LEVELS + (level < total % LEVELS)
            if own:
                parts.append(MaskPart(kind, own, values))
    return parts


def _four_digits(value: float) -> float:
    """A positive number with four significant digits: sparse cells have a density far below 0.001."""
    return float(f"{value:.4g}")


def merge_masks(parts: Sequence[Path], output: Path) -> dict[str, str]:
    """Link the masks of several folders into one folder, and note where they come from.

    Args:
        parts: folders of ``make_masks.py``, or of :func:`write_pseudo_masks`. Class maps go before instance maps.
        output: gets ``instances`` and ``settings.json``.

    Returns:
        Name of every mask -> name of its part.
    """
    (output / "instances").mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for part in parts:
        own = part / "classes"
        for path in sorted((own if own.is_dir() else part / "instances").iterdir()):
            name = f"{part.name}_{path.stem}"
            link_or_copy(path, output / "instances" / f"{name}{path.suffix}")
            names[name] = part.name
    origins = [read_origin(part / "instances") for part in parts]
    known = [origin for origin in origins if origin is not None]  # labelled masks need none: their hashes are known
    write_json(output / SETTINGS, {"command": "merged", "parts": known})
    return names


def link_labelled(images: Path, masks: Path, output: Path) -> None:
    """The labelled images' own masks as a part, each under the name of its image."""
    (output / "instances").mkdir(parents=True, exist_ok=True)
    for pair in match_names(*find_images_and_masks(images, masks))[0]:
        link_or_copy(pair.mask_path, output / "instances" / f"{pair.name}{pair.mask_path.suffix}")


def write_pseudo_masks(
    found: Sequence[tuple[str, np.ndarray]],
    seen: Sequence[str],
    side: int,
    count: int,
    output: Path,
    stored: Sequence[int] | None = None,
) -> int:
    """Masks that a segmenter found in unlabelled images, as one square of each image with cells.

    Args:
        found: (name, (H, W) instance or class map).
        seen: sha256 of the images that taught the segmenter; the check of leaks reads them.
        side: of the squares.
        count: masks at most.
        output: gets ``instances`` and ``settings.json``.
        stored: value that a file stores for each class of a class map; None: its number.

    Returns:
        How many were made.
    """
    (output / "instances").mkdir(parents=True, exist_ok=True)
    made = 0
    for name, array in found:
        squares = covering_squares(array, side)
        square = max(squares, key=lambda one: np.count_nonzero(one))
        if made == count or not square.any():
            continue
        values = square if stored is None else np.array(stored)[square]
        content = encode_image(values.astype(np.uint16)[..., None])
        write_bytes(output / "instances" / f"{name}.png", content)
        made += 1
    note_pseudo_masks(output, seen)
    return made


def note_pseudo_masks(folder: Path, seen: Sequence[str]) -> None:
    """Note in ``settings.json`` whose labels are behind pseudo-masks, for the check of leaks."""
    write_json(folder / SETTINGS, {"command": "pseudo", "segmenter_images_sha256": list(seen)})


def soft_mask(probabilities: np.ndarray, interior: np.ndarray, num_classes: int) -> np.ndarray:
    """The mask that a generator trains on, from what a segmenter says of an image.

    Args:
        probabilities: (2, H, W) of background and cell, or (K, H, W) of the generator's own classes.
        interior: (H, W) probability of a cell's interior.
        num_classes: K of the generator. If it has one class more than the segmenter, that is the boundary between
            touching cells: there, the cell's probability is the boundary's.

    Returns:
        (K, H, W) uint8, the sum over K is 255.
    """
    if num_classes > len(probabilities):
        cells = split_cells(probabilities.argmax(0) > 0, interior)
        touching = MaskRule("instances", 3, 1.0, "").class_map(cells) == 2
        probabilities = np.stack([probabilities[0], *(probabilities[1] * part for part in (~touching, touching))])
    soft = (255 * probabilities).astype(np.uint8)
    soft[0] = 255 - soft[1:].sum(axis=0, dtype=np.uint8)
    return soft


def on_whole_image(mask: np.ndarray, size: tuple[int, int], config: DataConfig) -> np.ndarray:
    """Bring a mask from the part of an image that segmenters see to the size of its file.

    Args:
        mask: (K, h, w) uint8 of :func:`soft_mask`.
        size: height and width of the file.

    Returns:
        (K, H, W) uint8. Pixels outside of that part are background.
    """
    view = center_view(*size, config.image_size) if config.crop == "center" else whole_view(*size)
    scaled = np.zeros((len(mask), view.scaled_height, view.scaled_width), np.uint8)
    scaled[0] = 255
    scaled[:, view.top : view.top + view.height, view.left : view.left + view.width] = mask
    return whole_view(*size).apply_labels(scaled)
