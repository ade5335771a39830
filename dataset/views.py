"""Views: which part of an image is used and at what scale. Also the eight symmetries of the square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import InputError
from dataset.config import MAX_SIDE, DataConfig
from dataset.files import FileError

SYMMETRIES = 8  # turns and flips of a square


@dataclass(frozen=True)
class View:
    """The part of a source image that is used: resize(source, scaled)[top : top + height, left : left + width].

    Image, mask and label use the same view, so that their pixels stay aligned. At native scale a view only crops. It is
    the square that the model sees. For a large field, it is the whole source.
    """

    scaled_height: int
    scaled_width: int
    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.height, self.width

    def is_native(self, height: int, width: int) -> bool:
        """Whether a source of this size is only cropped, not resized."""
        return (height, width) == (self.scaled_height, self.scaled_width)

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Crop an array (H, W, ...) that already has the scaled size. Does not copy."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize with antialiased bicubic and crop. (H, W, C) -> (height, width, C), same dtype, integers rounded."""
        if self.is_native(*image.shape[:2]):
            return self.cut(image)
        import torch  # here, so that making masks starts without it
        import torch.nn.functional as F

        batch = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
        target = (self.scaled_height, self.scaled_width)
        scaled = F.interpolate(batch, target, mode="bicubic", antialias=True, align_corners=False)[0]
        part = self.cut(scaled.permute(1, 2, 0).numpy())
        if image.dtype.kind in "ui":
            limits = np.iinfo(image.dtype)
            part = np.clip(np.rint(part, dtype=np.float64), limits.min, limits.max)
        return np.ascontiguousarray(part, dtype=image.dtype)

    def apply_labels(self, labels: np.ndarray) -> np.ndarray:
        """Resize with nearest neighbour and crop. (..., H, W) -> (..., height, width), same dtype, no new values."""
        height, width = labels.shape[-2:]
        if self.is_native(height, width):
            return labels[..., self.top : self.top + self.height, self.left : self.left + self.width]
        rows = ((self.top + np.arange(self.height) + 0.5) * (height / self.scaled_height)).astype(np.int64)
        columns = ((self.left + np.arange(self.width) + 0.5) * (width / self.scaled_width)).astype(np.int64)
        return labels[..., np.minimum(rows, height - 1)[:, None], np.minimum(columns, width - 1)]

    def apply_probabilities(self, probabilities: np.ndarray) -> np.ndarray:
        """Resize by the exact mean over each new pixel, and crop. (K, H, W) -> (K, height, width) float32.

        Sums over K are preserved.
        """
        _, height, width = probabilities.shape
        if self.is_native(height, width):
            return self.apply_labels(probabilities)
        rows = _area_weights(height, self.scaled_height, self.top, self.height)
        columns = _area_weights(width, self.scaled_width, self.left, self.width)
        return rows @ probabilities.astype(np.float32, copy=False) @ columns.T


def _area_weights(source: int, scaled: int, start: int, size: int) -> np.ndarray:
    """(size, source) float32: weight of each source pixel in each new pixel. Rows sum to 1."""
    edges = (start + np.arange(size + 1)) * (source / scaled)
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.clip(overlap, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def center_view(height: int, width: int, size: int) -> View:
    """Resize the short side to ``size`` and take the middle square, as SiT and ADM do.

    Raises:
        InputError: the long side would become longer than ``MAX_SIDE``.
    """
    scale = size / min(height, width)
    scaled_height, scaled_width = max(size, round(height * scale)), max(size, round(width * scale))
    if max(scaled_height, scaled_width) > MAX_SIDE:
        raise InputError(
            f"an image of {width} x {height} pixels is too long for crop=center: with a short side of {size}, the long "
            f"one would have more than {MAX_SIDE} pixels. Cut it into shorter images"
        )
    return View(scaled_height, scaled_width, (scaled_height - size) // 2, (scaled_width - size) // 2, size, size)


def native_view(height: int, width: int, size: int, rng: np.random.Generator | None = None) -> View:
    """A square at native scale: the middle one, or a uniformly random one if ``rng`` is given.

    Raises:
        InputError: the image is smaller than the square.
    """
    if min(height, width) < size:
        raise InputError(
            f"an image of {width} x {height} pixels is smaller than image_size={size}, which crop=random needs: "
            "take a smaller square or crop=center"
        )
    if rng is None:
        return View(height, width, (height - size) // 2, (width - size) // 2, size, size)
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return View(height, width, top, left, size, size)


def whole_view(height: int, width: int, scale: float = 1.0) -> View:
    """The whole source, resized by the factor ``scale``.

    Raises:
        InputError: a side would be longer than ``MAX_SIDE``.
    """
    if not scale * max(height, width) <= MAX_SIDE:
        raise InputError(
            f"`tile_scale` {scale:g} makes {height} x {width} pixels longer than {MAX_SIDE}; give a smaller one"
        )
    scaled_height, scaled_width = (max(1, round(scale * length)) for length in (height, width))
    return View(scaled_height, scaled_width, 0, 0, scaled_height, scaled_width)


def view_of(shape: Sequence[int], config: DataConfig, rng: np.random.Generator | None = None) -> View:
    if config.crop == "center":
        return center_view(shape[0], shape[1], config.image_size)
    return native_view(shape[0], shape[1], config.image_size, rng)


def view_of_file(path: Path, shape: Sequence[int], config: DataConfig, rng: np.random.Generator | None = None) -> View:
    try:
        return view_of(shape, config, rng)
    except InputError as error:
        raise FileError(path, str(error)) from None


def turn(array: np.ndarray, axes: tuple[int, int], symmetry: int) -> np.ndarray:
    """One of the eight symmetries of the square: ``symmetry % 4`` quarter turns, then a flip if ``symmetry >= 4``."""
    turned = np.rot90(array, symmetry % 4, axes)
    return np.flip(turned, axes[1]) if symmetry >= 4 else turned
