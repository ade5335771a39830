"""A gallery of a set: one HTML file with masks, images and real images, to look at in a browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from common.cells import meetings
from common.disk import real_path, write_bytes
from common.pictures import as_rgb, class_color
from common.spread import evenly
from synthetic.manifest import ATTEMPT_FIDELITY, FIDELITY_COLUMN, number_or_none
from synthetic.reader import Sample, SampleSet

GALLERY = "gallery.html"
MOST_PAIRS = 300
MOST_BYTES = 24 * 2**20  # of all pictures
LONGEST_SIDE = 256  # pixels; larger pictures are shrunk
TEMPLATE = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
).get_template("gallery.html.jinja")


@dataclass(frozen=True)
class Shown:
    """One pair in the gallery.

    Attributes:
        name: of the image.
        number: its place in the set.
        fidelity: Dice of the image with its mask, if it is known.
        size: height and width in pixels.
        pictures: caption and PNG as base64, in this order: mask, synthetic, real.
    """

    name: str
    number: int
    fidelity: float | None
    size: tuple[int, int]
    pictures: list[tuple[str, str]]


def write_gallery(samples: SampleSet, path: Path) -> int:
    """Write the gallery.

    Returns:
        How many pairs it shows: at most :data:`MOST_PAIRS`, and fewer if :data:`MOST_BYTES` hold fewer.
    """
    column = next((name for name in (FIDELITY_COLUMN, ATTEMPT_FIDELITY) if name in samples.columns), None)
    values = [number_or_none(sample.columns.get(column or "")) for sample in samples.samples]
    order = sorted(range(len(values)), key=lambda number: (values[number] or 0.0, number))
    # evenly spread from the lowest fidelity to the highest, or over the set if no fidelity is known
    chosen = [order[place] for place in evenly(len(order), MOST_PAIRS)]
    pairs: list[Shown] = []
    size = 0
    for place in _ends_first(len(chosen)):
        pair = _pair(samples, chosen[place], values[chosen[place]])
        size += sum(len(picture) for _, picture in pair.pictures)
        if pairs and size > MOST_BYTES:
            break
        pairs.append(pair)
    pairs.sort(key=lambda pair: pair.number)
    text = TEMPLATE.render(
        name=real_path(samples.folder).name, total=len(samples), pairs=pairs, has_fidelity=column is not None
    )
    write_bytes(path, text.encode())
    return len(pairs)


def _ends_first(count: int) -> Iterator[int]:
    """The numbers 0..count-1, each once: the first, the last, the middle, then the middles of what lies between."""
    yield from (0, count - 1) if count > 1 else range(count)
    gaps = [(0, count - 1)]
    for low, high in gaps:  # the list grows during the loop
        if high - low > 1:
            middle = (low + high) // 2
            yield middle
            gaps += [(low, middle), (middle, high)]


def _pair(samples: SampleSet, number: int, fidelity: float | None) -> Shown:
    sample = samples.samples[number]
    mask = mask_colours(samples, sample)
    pictures = [("mask", _png(mask, smooth=False)), ("synthetic", _png(samples.synthetic(sample)))]
    if samples.has_real:
        pictures.append(("real", _png(samples.real(sample))))
    return Shown(sample.name, number, fidelity, (mask.shape[0], mask.shape[1]), pictures)


def mask_colours(samples: SampleSet, sample: Sample) -> np.ndarray:
    """The label as (H, W, 3) uint8: classes in their colours, a black line between touching cells."""
    classes = samples.class_map(sample)
    picture = np.array([class_color(k) for k in range(256)], np.uint8)[classes]
    cells = samples.instance_map(sample)
    if cells is not None:
        line = np.zeros(cells.shape, bool)  # in the cell with the larger id, so that it is one pixel wide
        for first, second, meets in meetings(cells):
            line[first] |= meets & (cells[first] > cells[second])
            line[second] |= meets & (cells[first] < cells[second])
        picture[line & (classes == 1)] = 0
    return picture


def _png(picture: np.ndarray, smooth: bool = True) -> str:
    """An image (H, W, C) uint8 as a PNG in base64, shrunk if it is large. Gray is stored as gray."""
    picture = np.ascontiguousarray(as_rgb(picture))
    is_gray = (picture == picture[:, :, :1]).all()
    image = Image.fromarray(picture[:, :, 0] if is_gray else picture)
    if max(image.size) > LONGEST_SIDE:
        width, height = (max(1, round(side * LONGEST_SIDE / max(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
