"""Synthetic sets with known answers, in the files that sample_ddp.py writes."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.config import DataConfig
from synthetic.manifest import VIEW_COLUMNS


def place(rng: np.random.Generator, low: float, high: float) -> tuple[float, float]:
    """A random row and column."""
    row, column = rng.uniform(low, high, 2)
    return row, column


def disk(size: int, row: float, column: float, radius: float) -> np.ndarray:
    """(size, size) bool, True within ``radius`` of the centre of pixel (row, column)."""
    rows, columns = np.mgrid[:size, :size]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def paint(cells: np.ndarray, cell: int = 200, background: int = 40) -> np.ndarray:
    """uint8 (H, W, 3) of a mask in two gray values."""
    return np.repeat(np.where(cells, cell, background).astype(np.uint8)[..., None], 3, axis=-1)


@dataclass
class Row:
    """One image of a drawn set: arrays as they go into the files, and the view (None: the whole real image)."""

    label: np.ndarray
    synthetic: np.ndarray
    real: np.ndarray | None = None
    view: tuple[int, ...] | None = None  # scaled height, scaled width, top, left, height, width
    mask_type: str = "binary"


def five_rows(size: int) -> list[Row]:
    """Five bright disks, each lower than the one before, with a little noise, and the real images without it."""
    rows = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cells = disk(size, 12 + 3 * seed, 20, 7)
        image = np.clip(paint(cells) + rng.normal(0, 4, (size, size, 1)), 0, 255).astype(np.uint8)
        rows.append(Row(np.where(cells, 255, 0).astype(np.uint8), image, paint(cells)))
    return rows


def write_set(folder: Path, rows: list[Row], config: DataConfig | None = None, **settings: object) -> Path:
    """Write rows as SAMPLE_DIR/{images,masks}, manifest.csv and settings.json; real images go beside SAMPLE_DIR."""
    real_dir = folder.parent / f"{folder.name}_real"
    for path in (folder / "images", folder / "masks", real_dir):
        path.mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows):
        name = f"cells_{number:02d}.png"
        size = row.label.shape[-2:]
        Image.fromarray(row.synthetic).save(folder / "images" / name)
        Image.fromarray(row.label).save(folder / "masks" / name)
        if row.real is not None:
            Image.fromarray(row.real).save(real_dir / name)
        view = row.view or (*size, 0, 0, *size)
        lines.append(
            {
                "image": f"images/{name}",
                "label": f"masks/{name}",
                "real_image": "" if row.real is None else str(real_dir / name),
                "mask_type": row.mask_type,
                "cfg_scale": "1.0",
                **dict(zip(VIEW_COLUMNS, view, strict=True)),
            }
        )
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    config = config or DataConfig(image_size=rows[0].label.shape[-1])
    (folder / "settings.json").write_text(json.dumps({"data_config": config.to_dict()} | settings))
    return folder
