"""How results leave: tables for the terminal and the report, files written whole or not at all, pictures."""

from __future__ import annotations

import math
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

OUTLINE = "#ff4fd8"  # of masks over images: a colour that neither fluorescence nor stains have
LINE_WIDTH = 110  # of explanations on a terminal


# --- tables ----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Column headings, and rows of text, numbers and None. The first column names the rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def texts(self) -> list[list[str]]:
        """The rows as :func:`number` writes them."""
        return [[number(value) for value in row] for row in self.rows]

    def lines(self) -> list[str]:
        """The table for a terminal."""
        rows = [list(self.columns), *self.texts()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = [[text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
        return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


@dataclass(frozen=True)
class Section:
    """One measure as the terminal and the report show it, from the content of its JSON file.

    Attributes:
        name: of the measure and its JSON file.
        title: heading.
        note: what the numbers mean.
        table: content -> numbers.
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
        """What the command prints."""
        return [*self.table(content).lines(), *textwrap.wrap(self.note, LINE_WIDTH), *self.notes(content)]


def number(value: object, digits: int = 4, sign: str = "") -> str:
    """A value as text: a dash for None, fractions with so many significant digits, all else as it is.

    Args:
        value: of a table.
        digits: significant digits of a float.
        sign: "+" shows the sign of positive floats, too.
    """
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    magnitude = math.floor(math.log10(abs(value))) if math.isfinite(value) and abs(value) >= 1e-7 else 0
    return format(value, f"{sign}.{max(digits - 1 - magnitude, 0)}f")


def with_spread(mean: float | None, spread: float | None, sign: str = "") -> str:
    """Mean ± standard deviation; the mean alone if there is no spread, a dash if there is no mean."""
    text = number(mean, 3, sign)
    return text if spread is None or mean is None else f"{text} ± {number(spread, 2)}"


def written_line(written: str | Sequence[Path]) -> str:
    """Where the files of a result are, as a command says it."""
    return f"written: {written if isinstance(written, str) else ', '.join(map(str, written))}"


# --- files and pictures ----------------------------------------------------------------------------------------------


def results_folder(samples: SampleSet) -> Path:
    """``SAMPLE_DIR/evaluation``, made if need be."""
    folder = samples.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    return folder


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches; no pyplot, so no display and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def show_image(axis: Axes, image: np.ndarray, title: str, cells: np.ndarray | None = None) -> None:
    """One picture of a grid.

    Args:
        axis: where.
        image: (H, W, C) uint8, or (H, W) bool.
        title: plain text; it may hold file names with any characters.
        cells: (H, W) bool, outlined if given.
    """
    if image.dtype == bool:
        image = np.where(image, 255, 0).astype(np.uint8)[..., None]
    axis.imshow(as_rgb(image), interpolation="nearest")
    if cells is not None and cells.any() and not cells.all():
        axis.contour(cells, levels=[0.5], colors=OUTLINE, linewidths=0.8)
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_axis_off()
