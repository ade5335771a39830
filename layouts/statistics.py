"""Statistics of label images: numbers of cells, sizes, covered fractions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cells import touches_border, without_gaps
from common.disk import write_csv
from layouts.recombine import boxes_of, share_seen_whole, touching_pairs


@dataclass(frozen=True)
class Measurement:
    """Measurements of one instance map. Areas, elongations and weights only cover cells that no image border cuts.

    The weight of a cell is 1 / (pixels of the image * probability of being seen whole). It makes sets of different
    image sizes comparable: every image counts the same.
    """

    pixels: int
    cells: int
    foreground: float
    touching: int
    areas: np.ndarray
    elongations: np.ndarray
    weights: np.ndarray


def measure(instance_map: np.ndarray) -> Measurement:
    """Count and measure the cells of an (H, W) instance map. Ids may have gaps, as after a cell was deleted by hand.

    Elongation is the ratio of the axes of the ellipse with the cell's second moments. A pixel counts as a square with
    variance 1/12. scikit-image leaves this out, so that a cell one pixel wide would be infinitely elongated.
    """
    instance_map = without_gaps(instance_map)
    boxes = boxes_of(instance_map)
    inner = np.setdiff1d(np.arange(1, len(boxes) + 1), touches_border(instance_map))
    areas, elongations = np.zeros(len(inner)), np.zeros(len(inner))
    for number, (top, bottom, left, right) in enumerate(boxes[inner - 1]):
        rows, columns = np.nonzero(instance_map[top:bottom, left:right] == inner[number])
        (down, both), (_, across) = np.cov(rows, columns, bias=True) + np.eye(2) / 12
        middle, spread = (down + across) / 2, math.hypot((down - across) / 2, both)
        areas[number], elongations[number] = len(rows), math.sqrt((middle + spread) / (middle - spread))
    return Measurement(
        pixels=instance_map.size,
        cells=len(boxes),
        foreground=np.count_nonzero(instance_map) / instance_map.size,
        touching=len(np.unique(touching_pairs(instance_map))),
        areas=areas,
        elongations=elongations,
        weights=1 / share_seen_whole(boxes[inner - 1], instance_map.shape) / instance_map.size,
    )


def summarize(measurements: Iterable[Measurement]) -> dict[str, float]:
    """Summary of a set, in the order of display."""
    measurements = list(measurements)
    crowding = np.array([1e4 * item.cells / item.pixels for item in measurements])
    foreground = np.array([item.foreground for item in measurements])
    areas = np.concatenate([item.areas for item in measurements])
    elongations = np.concatenate([item.elongations for item in measurements])
    weights = np.concatenate([item.weights for item in measurements])

    def mean(values: np.ndarray) -> float:
        return float(np.average(values, weights=weights)) if len(values) else math.nan

    def area_below_which(share: float) -> float:
        order = np.argsort(areas)
        reached = np.cumsum(weights[order])
        return float(areas[order][np.searchsorted(reached, share * reached[-1])]) if len(areas) else math.nan

    touching = np.array([1e4 * item.touching / item.pixels for item in measurements])
    return {
        "images": len(measurements),
        "cells per 100 x 100 pixels": float(crowding.mean()),
        "foreground share, mean": float(foreground.mean()),
        "foreground share, standard deviation": float(foreground.std()),
        "cell diameter in pixels, mean": mean(np.sqrt(4 / math.pi * areas)),
        "cell area in pixels, 10th percentile": area_below_which(0.1),
        "cell area in pixels, median": area_below_which(0.5),
        "cell area in pixels, 90th percentile": area_below_which(0.9),
        "elongation, mean": mean(elongations),
        "share of cells that touch another": float(touching.sum() / max(crowding.sum(), 1e-9)),
    }


STATISTICS = ("name", "cells", "whole_cells", "foreground", "touching_cells", "mean_area", "median_area",
              "mean_elongation")  # fmt: skip


def write_statistics(path: Path, measurements: dict[str, Measurement]) -> None:
    """Write one row per image. Area and elongation stay empty if the border cuts every cell."""
    rows = []
    for name, item in measurements.items():
        shape = ["", "", ""]
        if len(item.areas):
            shape = [f"{np.mean(item.areas):.1f}", f"{np.median(item.areas):.1f}", f"{np.mean(item.elongations):.3f}"]
        rows.append([name, item.cells, len(item.areas), f"{item.foreground:.4f}", item.touching, *shape])
    write_csv(path, STATISTICS, rows)


def write_summary(path: Path, columns: dict[str, dict[str, float]]) -> str:
    """Write the summaries side by side. Returns them as text. What is not known, or not asked for, stays empty."""
    names = list(columns)
    table = [[measure, *(_shown(columns[name].get(measure)) for name in names)] for measure in columns[names[0]]]
    write_csv(path, ["measure", *names], table)
    return "\n".join(f"{row[0]:<40}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in [["", *names], *table])


def _shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
