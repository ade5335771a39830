"""Picture of a set: a few masks, below them the synthetic images, and below these the real images if there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.pictures import grid_image

MOST_PAIRS = 8
MOST_LOOKED_AT = 64  # pairs that are read to find some with cells
SMALL, LARGE = 128, 512  # pixels of a picture's longer side: smaller ones are magnified, larger ones are shown smaller
CAPTIONS = ("mask", "synthetic", "real")
_MARGIN, _FONT_SIZE = 76, 14


def choose_pairs(count: int, has_cells: Callable[[int], bool]) -> list[int]:
    """Numbers of the pairs to show, spread over the set. Pairs without a cell are shown only if others are too few.

    Args:
        count: pairs of the set.
        has_cells: whether the mask of a pair has a cell.
    """
    looked_at = _spread(range(count), MOST_LOOKED_AT)
    with_cells = [number for number in looked_at if has_cells(number)]
    empty = [number for number in looked_at if number not in with_cells]
    chosen = _spread(with_cells, MOST_PAIRS)
    return sorted(chosen + _spread(empty, MOST_PAIRS - len(chosen)))


def draw_sheet(pairs: Sequence[Sequence[Tensor]]) -> Image.Image:
    """The sheet, one column for each pair.

    Args:
        pairs: for each the mask's picture, the synthetic image and perhaps the real one, (C, H, W) in [-1, 1]. All have
            the same number of pictures.
    """
    rows = [[_at_good_size(picture) for picture in row] for row in zip(*pairs, strict=True)]
    grid = grid_image(rows)
    sheet = Image.new("RGB", (grid.shape[1] + _MARGIN, grid.shape[0]), "white")
    sheet.paste(Image.fromarray(grid), (_MARGIN, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, caption in enumerate(CAPTIONS[: len(rows)]):
        middle = (number + 0.5) * grid.shape[0] / len(rows)
        draw.text((_MARGIN - 4, middle), caption, fill="black", font=font, anchor="rm")
    return sheet


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of the numbers, at equal distances."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[i] for i in np.linspace(0, len(numbers) - 1, most).astype(int)]


def _at_good_size(picture: Tensor) -> Tensor:
    """A small picture magnified by a whole number, pixel by pixel; a large one made smaller by area."""
    longer = max(picture.shape[1:])
    if longer <= LARGE:
        return F.interpolate(picture[None], scale_factor=max(1, SMALL // longer), mode="nearest")[0]
    size = [max(1, round(LARGE / longer * length)) for length in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="area")[0]
