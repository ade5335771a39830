"""Output of results: tables for the terminal and the report, files, pictures."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.disk import write_atomically
from common.pictures import as_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from synthetic.reader import SampleSet

RESULTS = "evaluation"  # folder of a set with the results of its measures
OUTLINE = "#ff4fd8"  # outline of masks over images: a colour that neither fluorescence nor stains have
LINE_WIDTH = 110  # characters per line of explanations on a terminal


# --- tables ----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Column headings, and rows of text, numbers and None. The first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def texts(self) -> list[list[str]]:
        """The rows as text, formatted by :func:`number`."""
        return [[number(value) for value in row] for row in self.rows]

    def lines(self) -> list[str]:
        """The table for a terminal."""
        rows = [list(self.columns), *self.texts()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = [[text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
        return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


@dataclass(frozen=True)
class Section:
    """How to show one measure, on the terminal and in the report, from the content of its JSON file.

    Attributes:
        name: name of the measure and of its JSON file.
        note: what the numbers mean.
        table: content -> table of numbers.
        notes: content -> sentences about this result.
        pictures: PNG files beside the JSON file.
    """

    name: str
    title: str
    note: str
    table: Callable[[dict], Table]
    notes: Callable[[dict], list[str]] = lambda content: []
    pictures: tuple[str, ...] = ()

    def lines(self, content: dict) -> list[str]:
        """Lines for the terminal."""
        return [*self.table(content).lines(), *textwrap.wrap(self.note, LINE_WIDTH), *self.notes(content)]


def number(value: object, digits: int = 4, sign: str = "") -> str:
    """A value as text: a dash for None, floats with ``digits`` significant digits, other values unchanged.

    Args:
        digits: significant digits of a float.
        sign: "+" also shows the sign of positive floats.
    """
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    magnitude = math.floor(math.log10(abs(value))) if math.isfinite(value) and abs(value) >= 1e-7 else 0
    return format(value, f"{sign}.{max(digits - 1 - magnitude, 0)}f")


def cell(value: float | None, decimals: int) -> str:
    """A number as a cell of a CSV file: empty for None."""
    return "" if value is None else f"{value:.{decimals}f}"


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of the values that are not None. A single value has no spread."""
    known = [value for value in values if value is not None]
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return (float(np.mean(known)) if known else None), spread


def with_spread(mean: float | None, spread: float | None, sign: str = "") -> str:
    """Text "mean ± standard deviation". Only the mean if there is no spread, a dash if there is no mean."""
    text = number(mean, 3, sign)
    return text if spread is None or mean is None else f"{text} ± {number(spread, 2)}"


def written_line(written: str | Sequence[Path]) -> str:
    """Line that names the written files."""
    return f"written: {written if isinstance(written, str) else ', '.join(map(str, written))}"


# --- files and pictures ----------------------------------------------------------------------------------------------


def results_folder(samples: SampleSet) -> Path:
    """``SAMPLE_DIR/evaluation``. Creates the folder if it is missing."""
    folder = samples.folder / RESULTS
    folder.mkdir(exist_ok=True)
    return folder


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches. Avoids pyplot, which needs a display and has global state."""
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook, or a wrong one, would end the import
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def show_image(axis: Axes, image: np.ndarray, title: str, cells: np.ndarray | None = None) -> None:
    """Show one picture of a grid.

    Args:
        image: (H, W, C) uint8, or (H, W) bool.
        title: plain text. May contain file names with any characters.
        cells: (H, W) bool. If given, outline these cells.
    """
    if image.dtype == bool:
        image = np.where(image, 255, 0).astype(np.uint8)[..., None]
    axis.imshow(as_rgb(image), interpolation="nearest")
    if cells is not None and cells.any() and not cells.all():
        axis.contour(cells, levels=[0.5], colors=OUTLINE, linewidths=0.8)
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_axis_off()
