"""How results go to disk: each file whole or not at all, pictures without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.disk import write_atomically
from common.pictures import as_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTLINE = "#ff4fd8"  # of masks over images: a colour that neither fluorescence nor stains have


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches; no pyplot, so no display and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def show_image(axis: Axes, image: np.ndarray, title: str, cells: np.ndarray | None = None) -> None:
    """One picture of a grid: uint8 (H, W, C), with the outline of ``cells`` (H, W) bool where given."""
    axis.imshow(as_rgb(image), interpolation="nearest")
    if cells is not None and cells.any() and not cells.all():
        axis.contour(cells, levels=[0.5], colors=OUTLINE, linewidths=0.8)
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def number(value: float | None, width: int = 11, digits: int = 3) -> str:
    """A cell of a printed table; a dash where nothing is known."""
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"
