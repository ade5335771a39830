"""How large a pixel is, by the header of an image file, and a warning if one folder mixes sizes."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from pathlib import Path

import tifffile

from dataset.decode import TIFF_STARTS

SAME_SIZE = 1.05  # pixel sizes whose ratio is below this are called equal: two calibrations of one objective
MOST_SIZES = 4  # that a warning names
# Resolutions in dots per inch or cm count only if a pixel is smaller: all programs write 72 or 300 dots per inch.
LARGEST_BY_RESOLUTION_UM = 15.0
LARGEST_UM = 10_000.0
_MICROMETRES = {
    "nm": 1e-3, "um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0,
    "micrometre": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25_400.0,
}  # fmt: skip
_OME_SIZE = re.compile(r"""\bPhysicalSizeX\s*=\s*(["'])(.+?)\1""")
_OME_UNIT = re.compile(r"""\bPhysicalSizeXUnit\s*=\s*(["'])(.+?)\1""")
_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
_IMAGEJ_UNIT = re.compile(r"^unit=(.+)$", re.MULTILINE)
_APERIO = re.compile(r"\bMPP\s*=\s*([\d.eE+-]+)")


def sane(size_um: float | None) -> float | None:
    """A size in micrometres, or None if it cannot be one of a pixel."""
    return size_um if size_um is not None and math.isfinite(size_um) and 0 < size_um < LARGEST_UM else None


def pixel_size(path: Path) -> float | None:
    """Width of a pixel in micrometres by the header of a TIFF.

    OME-TIFF says it in its XML, ImageJ by a resolution and a unit, scanners by ``MPP`` or dots per centimetre.

    Returns:
        None if the file does not say it, is no TIFF, or cannot be read.
    """
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start not in TIFF_STARTS:
                return None
            with tifffile.TiffFile(file, _multifile=False) as tiff:
                return sane(_size_of_page(tiff.pages.first))
    except Exception:  # noqa: BLE001 - what is wrong with the file is said when it is decoded
        return None


def _size_of_page(page: tifffile.TiffPage) -> float | None:
    text = page.description
    if pixels := _OME_PIXELS.search(text):
        given, unit = _OME_SIZE.search(pixels.group()), _OME_UNIT.search(pixels.group())
        if given:
            factor = _MICROMETRES.get(html.unescape(unit.group(2)).strip() if unit else "um")
            return float(given.group(2)) * factor if factor else None
    if aperio := _APERIO.search(text):
        return float(aperio.group(1))
    tag = page.tags.get("XResolution")
    if tag is None or not all(tag.value):
        return None
    dots, per = tag.value
    if text.startswith("ImageJ="):
        unit = _IMAGEJ_UNIT.search(text)
        name = unit.group(1).strip().replace("\\u00B5", "\u00b5").lower() if unit else ""
        return _MICROMETRES[name] * per / dots if name in _MICROMETRES else None
    lengths = {tifffile.RESUNIT.INCH: 25_400.0, tifffile.RESUNIT.CENTIMETER: 10_000.0}
    unit_tag = page.tags.get("ResolutionUnit")
    length = lengths.get(unit_tag.value) if unit_tag is not None else None
    size = length * per / dots if length else math.inf
    return size if size < LARGEST_BY_RESOLUTION_UM else None


def scale_warning(sizes: Mapping[str, float | None], what: str = "images") -> list[str]:
    """A warning if files of one set have pixels of different sizes. Files that do not say a size do not count.

    Args:
        sizes: name of a file -> width of its pixels in micrometres.
        what: what the files are.
    """
    known = sorted((size, name) for name, size in sizes.items() if size is not None)
    if not known or known[-1][0] < known[0][0] * SAME_SIZE:
        return []
    groups: list[list[tuple[float, str]]] = []
    for one in known:
        if groups and one[0] < groups[-1][0][0] * SAME_SIZE:
            groups[-1].append(one)
        else:
            groups.append([one])
    shown = groups if len(groups) <= MOST_SIZES else [*groups[: MOST_SIZES - 1], groups[-1]]
    texts = [f"{group[0][0]:.3g} um ({len(group)}, as {group[0][1]})" for group in shown]
    more = f" and {len(groups) - len(shown)} more sizes" if len(groups) > len(shown) else ""
    return [
        f"pixels of the {what} have different sizes: {', '.join(texts)}{more}. A cell is then not equally large in "
        "all of them: rescale images and masks to one pixel size (masks by nearest neighbour), or train one model for "
        "each"
    ]
