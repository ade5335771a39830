"""Pictures for display: grids of images, colours for channels and for mask classes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.outputs import maker_note

GRID_GAP = 2  # pixels between the images of a grid
SMALL, LARGE = 128, 512  # pixels of the longer side: smaller pictures are magnified, larger ones are reduced
_MARGIN, _FONT_SIZE = 76, 14  # of the captions


def grid_image(rows: list[list[Tensor]]) -> np.ndarray:
    """Rows of images (C, H, W) in [-1, 1] -> one uint8 image (H', W', 3). White separates and pads the images."""
    tiles = [as_rgb(to_uint8(tile)) for row in rows for tile in row]
    columns = len(rows[0])
    height, width = (max(tile.shape[axis] for tile in tiles) + GRID_GAP for axis in (0, 1))
    grid = np.full((math.ceil(len(tiles) / columns) * height + GRID_GAP, columns * width + GRID_GAP, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = GRID_GAP + number // columns * height, GRID_GAP + number % columns * width
        grid[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return grid


def captioned_sheet(captions: Sequence[str], columns: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """A picture with a caption at the left of each row, in a readable size.

    Args:
        captions: captions of the rows. If there are fewer rows, the last captions are left out.
        columns: for each column, the pictures of all rows, (C, H, W) in [-1, 1].

    Returns:
        (H', W', 3) uint8.
    """
    rows = [[_at_good_size(picture) for picture in row] for row in zip(*columns, strict=True)]
    grid = grid_image(rows)
    sheet = Image.new("RGB", (grid.shape[1] + _MARGIN, grid.shape[0]), "white")
    sheet.paste(Image.fromarray(grid), (_MARGIN, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, caption in enumerate(captions[: len(rows)]):
        middle = (number + 0.5) * grid.shape[0] / len(rows)
        draw.text((_MARGIN - 4, middle), caption, fill="black", font=font, anchor="rm")
    return np.array(sheet)


def _at_good_size(picture: Tensor) -> Tensor:
    """Magnify a small picture by a whole number, without smoothing. Reduce a large one by area."""
    longer = max(picture.shape[1:])
    if longer <= LARGE:
        return F.interpolate(picture[None], scale_factor=max(1, SMALL // longer), mode="nearest")[0]
    size = [max(1, round(LARGE / longer * length)) for length in picture.shape[1:]]
    return F.interpolate(picture[None], size, mode="area")[0]


def sheet_png(tiles: list[Tensor]) -> bytes:
    """Images (C, H, W) in [-1, 1] side by side as a PNG, about twice as wide as high. Free places are white."""
    columns = min(len(tiles), max(5, math.ceil(math.sqrt(2 * len(tiles)))))
    tiles = tiles + [torch.ones_like(tiles[0])] * (-len(tiles) % columns)
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    buffer = io.BytesIO()
    Image.fromarray(grid_image(rows)).save(buffer, format="PNG", pnginfo=maker_note())
    return buffer.getvalue()


def to_uint8(image: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> (H, W, C) uint8, rounded."""
    return image.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def from_uint8(image: np.ndarray) -> Tensor:
    """The inverse of :func:`to_uint8`: (H, W, C) uint8 -> (C, H, W) float32 in [-1, 1]."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(planes) / 127.5 - 1


CLASS_COLORS = (
    (0, 0, 0),
    (255, 255, 255),
    (230, 80, 60),
    (70, 140, 230),
    (90, 190, 90),
    (240, 190, 60),
    (160, 90, 200),
    (60, 205, 205),
    (245, 150, 195),
    (150, 105, 65),
    (185, 230, 80),
    (20, 125, 105),
    (140, 140, 150),
    (250, 165, 115),
    (95, 85, 215),
    (185, 30, 95),
)


def class_color(number: int) -> tuple[int, int, int]:
    """Colour of a class. Background alone is black; the others repeat after fifteen."""
    return CLASS_COLORS[1 + (number - 1) % (len(CLASS_COLORS) - 1)] if number else CLASS_COLORS[0]


def mask_picture(prob_map: Tensor) -> Tensor:
    """(K, H, W) class probabilities -> (3, H, W) in [-1, 1]: background black, cells white, others coloured."""
    colors = torch.tensor([class_color(k) for k in range(len(prob_map))], dtype=torch.float32)
    return torch.einsum("khw,kc->chw", prob_map.float().cpu(), colors / 127.5 - 1)


# Colours for the channels of an image that is neither gray nor RGB, the same as in Fiji's composite view.
_CHANNEL_COLORS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0))


def as_rgb(image: np.ndarray) -> np.ndarray:
    """RGB picture for display. Gray is repeated, RGB stays, other channels are overlaid, each in its own colour.

    Args:
        image: (H, W, C) uint8.

    Returns:
        (H, W, 3) uint8.
    """
    channels = image.shape[-1]
    if channels in (1, 3):
        return np.broadcast_to(image, (*image.shape[:2], 3))
    colors = np.array([_CHANNEL_COLORS[k % len(_CHANNEL_COLORS)] for k in range(channels)])
    return np.minimum(image.astype(np.uint32) @ colors.astype(np.uint32), 255).astype(np.uint8)


def repeat_gray(image: np.ndarray) -> np.ndarray:
    """Repeat a gray image (H, W, 1) to three channels, for code that only takes RGB. Other images stay unchanged."""
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
