"""Grid and grain: do the borders of the network's patches show in the image, and is it noisier than real ones?

The network writes an image patch by patch. If neighbouring patches disagree, the image shows a grid. The grid ratio is
the mean absolute difference of neighbouring pixels across patch borders, divided by the same mean inside patches. Rows
and columns both count. Without a grid the ratio is near 1. Real images are measured at the same places for comparison.

The mean inside patches is the grain. Grain above that of the real images is noise, below it is blur.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from common.disk import write_csv, write_json
from common.errors import InputError
from common.patch_grid import Steps, image_steps
from evaluation.output import Section, Table, cell, number, results_folder
from synthetic.manifest import SETTINGS
from synthetic.reader import SampleSet

PATCH_SETTING = "patch_pixels"  # key in settings.json: side of the model's patches in pixels of the image


@dataclass
class ImageGrid:
    """Grid ratio and grain (0 to 255) of one image and of the real image of its mask."""

    image: str
    synthetic: float | None
    real: float | None = None
    grain_synthetic: float | None = None
    grain_real: float | None = None


@dataclass
class GridScore:
    """Result of ``score_grid``: ratios and grain (0 to 255) over all images together, and one row per image."""

    images: int
    patch_pixels: int
    grid_synthetic: float | None
    grid_real: float | None
    grain_synthetic: float | None
    grain_real: float | None
    provenance: dict[str, list[str]] = field(default_factory=dict)
    per_image: list[ImageGrid] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain types for JSON, without the rows of each image."""
        content = asdict(self)
        del content["per_image"]
        known = {row.image: row.synthetic for row in self.per_image if row.synthetic is not None}
        if known:
            worst = max(known, key=lambda image: known[image])
            content |= {"median": float(np.median(list(known.values())))}
            content |= {"most": known[worst], "most_image": worst}
        return content | {"grain_ratio": self.grain_ratio}

    @property
    def grain_ratio(self) -> float | None:
        """Grain of the synthetic images over that of the real ones. None without real images, or if they are flat."""
        return self.grain_synthetic / self.grain_real if self.grain_synthetic is not None and self.grain_real else None


def _table(content: dict) -> Table:
    grid = f"differences across borders of {content['patch_pixels']} px patches / inside patches"
    grain = "grain: differences inside patches (0 to 255)"
    return Table(
        ["", "synthetic", "real images of the same masks"],
        [
            [grid, content["grid_synthetic"], content["grid_real"]],
            [grain, content.get("grain_synthetic"), content.get("grain_real")],
        ],
    )


def _notes(content: dict) -> list[str]:
    if "most" not in content:
        return []
    most = f"{number(content['most'])} ({content['most_image']})"
    return [f"{content['images']} images: median {number(content['median'])}, most {most}"]


SECTION = Section(
    "grid",
    "Grid: do the network's patches show?",
    "The mean difference of neighbouring pixels across the borders of the network's patches, divided by the same mean "
    "inside the patches. 1 means no grid. Real images are measured at the same places. Grain above that of the real "
    "images is noise, below it is blur.",
    _table,
    _notes,
)


def patch_pixels(samples: SampleSet) -> int:
    """Side of a patch in pixels of the images, from the set's settings.

    Raises:
        InputError: the settings lack the entry, or the images were sampled as overlapping tiles.
    """
    if samples.whole_scale is not None:
        raise InputError(
            f"{samples.folder}: its images were put together from overlapping tiles, whose patches have no common "
            "grid; measure a set that was sampled without tiles"
        )
    patch = samples.settings.get(PATCH_SETTING)
    if not isinstance(patch, int) or patch < 2:
        raise InputError(
            f"{samples.folder / SETTINGS} does not say how large the patches are. Sample the set again, or add "
            f'"{PATCH_SETTING}": N to the file, with N = patch size of the model (8 for SiT-Ti/8) x factor of the '
            "autoencoder (1 for pixels, 8 for Stable Diffusion's)"
        )
    return patch


def score_grid(samples: SampleSet) -> GridScore:
    """Grid ratio of the synthetic images and of the real images of the same masks.

    Raises:
        InputError: the patch size of the set is unknown, or a file is unreadable.
    """
    patch = patch_pixels(samples)
    total, total_real, rows = Steps(), Steps(), []
    for sample in samples.samples:
        steps = image_steps(samples.synthetic(sample), patch)
        total = total.plus(steps)
        row = ImageGrid(sample.columns["image"], steps.ratio, grain_synthetic=steps.inside)
        if samples.has_real:
            real = image_steps(samples.real(sample), patch)
            total_real = total_real.plus(real)
            row.real, row.grain_real = real.ratio, real.inside
        rows.append(row)
    return GridScore(
        len(rows), patch, total.ratio, total_real.ratio, total.inside, total_real.inside, samples.provenance(), rows
    )


def grid_lines(samples: SampleSet) -> list[str]:
    """Lines for the output of another measure: grid ratios and grain, or the reason why there are none."""
    try:
        score = score_grid(samples)
    except InputError as error:
        return [f"grid of patches: not measured ({error})"]
    grid = f"synthetic {number(score.grid_synthetic)}, real {number(score.grid_real)} (1 means no grid)"
    lines = [f"grid of patches: {grid}"]
    if score.grain_ratio is not None:
        lines.append(f"grain: {number(score.grain_ratio)} times that of the real images (more is noise, less is blur)")
    return lines


def write_grid_report(samples: SampleSet, score: GridScore) -> Path:
    """Write ``grid.json`` and ``grid.csv`` into ``SAMPLE_DIR/evaluation``.

    Returns:
        The folder.
    """
    folder = results_folder(samples)
    write_json(folder / "grid.json", score.to_dict())
    rows = [
        [row.image, *(cell(value, 6) for value in (row.synthetic, row.real, row.grain_synthetic, row.grain_real))]
        for row in score.per_image
    ]
    write_csv(folder / "grid.csv", ["image", "grid_synthetic", "grid_real", "grain_synthetic", "grain_real"], rows)
    return folder
