"""Gray values of synthetic images: 8 bits to look at, or the range and type of the training images.

A model works on [-1, 1]. The windows, the gray values that these ends were in the training files, lie in the
checkpoint, so that an image can leave as it would have come from the microscope: with the one window of a data set by
the exact inverse of reading it; where each training image had a window of its own, a synthetic one takes one of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.pictures import to_uint8
from common.randomness import derived_seed
from dataset.config import DataConfig, Window
from dataset.files import FileError, encode_image, image_suffix

ROBUST_PERCENTILES = (0.1, 99.9)


NARROW_SHARE = 0.1  # of the gray range that all channels of an image share
_SAMPLED_PIXELS = 2**14


def default_window_channels(channels: int, has_channels: bool | None = None) -> str | None:
    """Gray and RGB have one window; other channels are stains, each of a brightness of its own.

    Args:
        channels: of the images.
        has_channels: whether their files say that the channels are no colours; None if no file was read yet.

    Returns:
        One of ``WINDOW_CHANNELS``; None for three channels that may be RGB or stains.
    """
    if channels == 3 and has_channels is None:
        return None
    return "separate" if channels not in (1, 3) or (channels == 3 and has_channels) else "joint"


def channel_shares(image: np.ndarray) -> tuple[float, ...]:
    """How much of the gray range of all channels each channel uses, between robust percentiles; empty for gray.

    Args:
        image: (H, W, C).

    Returns:
        C numbers in [0, 1].
    """
    if image.shape[2] == 1:
        return ()
    pixels = image.reshape(-1, image.shape[2])
    low, high = np.percentile(pixels[:: max(1, len(pixels) // _SAMPLED_PIXELS)], ROBUST_PERCENTILES, axis=0)
    return tuple(((high - low) / max(high.max() - low.min(), 1e-12)).tolist())


def narrow_channels_warning(shares: Sequence[Sequence[float]], config: DataConfig, dtype: str) -> str | None:
    """What to say if images share one window that a channel hardly uses; None if all is well.

    Args:
        shares: :func:`channel_shares` of every image.
        config: how the images are read.
        dtype: of their files.
    """
    counts = [len(one) for one in shares if one]
    fixed = dtype == "uint8" and config.window is None  # then channels keep their range, whatever the config says
    if not counts or (config.window_channels == "separate" and not fixed):
        return None
    median = np.median([one for one in shares if len(one) == max(counts)], axis=0)
    narrow = [f"channel {k} uses {share:.1%}" for k, share in enumerate(median, start=1) if share < NARROW_SHARE]
    if not narrow:
        return None
    window = f" window=({ROBUST_PERCENTILES[0]:g}, {ROBUST_PERCENTILES[1]:g})" if fixed else ""
    return (
        f"{', '.join(narrow)} of the gray range that the {max(counts)} channels share (median of {len(shares)} "
        f"images): a model hardly sees it; window_channels=separate{window} gives every channel a range of its own"
    )


def image_window(image: np.ndarray, config: DataConfig) -> Window:
    """Gray values of one image (H, W, C) that become -1 and 1."""
    if config.window_values is not None:
        return config.window_values
    if config.window is None and image.dtype == np.uint8:
        return ((0.0, 255.0),)
    return percentile_windows(image, config)


def percentile_windows(values: np.ndarray, config: DataConfig) -> Window:
    """One window of (..., C) gray values, or one per channel."""
    percentiles = config.window or ROBUST_PERCENTILES
    channels = np.moveaxis(values, -1, 0) if config.window_channels == "separate" else [values]
    return tuple(_percentile_window(np.ascontiguousarray(channel), percentiles) for channel in channels)


def _percentile_window(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Two percentiles; smallest and largest value where the percentiles meet, and never an empty window."""
    if values.dtype in (np.uint8, np.uint16):
        cumulative = np.cumsum(np.bincount(values.ravel()))  # exact, and faster than sorting
        ranks = [share / 100 * (values.size - 1) for share in percentiles]
        low, high = (float(np.searchsorted(cumulative, rank, side="right")) for rank in ranks)
    else:
        low, high = (float(value) for value in np.percentile(values.astype(np.float64), percentiles))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low, low + 1.0)


def window_image(image: np.ndarray, window: Window, channels_first: bool = False) -> np.ndarray:
    """Map the window to [-1, 1] and clip at its ends. (..., C) or (C, ...) of any dtype -> float32."""
    low, high = np.array(window, np.float64).T  # (1,) or (C,) each
    if channels_first:
        low, high = (ends.reshape(-1, *[1] * (image.ndim - 1)) for ends in (low, high))
    scaled = image.astype(np.float32)  # a copy, changed in place: this is the loader's largest cost
    scaled -= low.astype(np.float32)
    scaled *= (2 / (high - low)).astype(np.float32)
    scaled -= np.float32(1)
    return np.clip(scaled, -1, 1, out=scaled)


def fit_channels(image: np.ndarray, channels: int, where: str | Path) -> np.ndarray:
    """Check that (H, W, C) can give ``channels``: C is that, or 1 for RGB, or RGB of equal channels for 1.

    Returns:
        (H, W, channels), or (H, W, 1), which :func:`to_tensor` repeats: memory holds each gray value once.

    Raises:
        FileError: another number of channels, or colours where gray is asked for.
    """
    found = image.shape[2]
    if channels == 1 and found == 3:
        if (image != image[:, :, :1]).any():
            raise FileError(where, "holds colours, the model takes 1 gray channel: save it as gray, or train with 3")
        return np.ascontiguousarray(image[:, :, :1])
    if found == channels or (found, channels) == (1, 3):
        return image
    hint = {2: " (or a transparent alpha channel: save it without)", 4: " (or a transparent RGB image: flatten it)"}
    mend = "vae=none in_channels=N trains on N"
    count = f"{found} channel{'s' * (found > 1)}{hint.get(found, '')}"
    raise FileError(where, f"has {count}, the model takes {channels}; {mend}")


def to_tensor(image: np.ndarray, window: Window, channels: int) -> Tensor:
    """(S, S, C or 1) as stored -> (channels, S, S) float32 in [-1, 1]."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))  # while values are small
    tensor = torch.from_numpy(window_image(planes, window, channels_first=True))
    return tensor if len(planes) == channels else tensor.repeat(channels, 1, 1)


INTENSITIES = ("display", "source")
SOURCE_WINDOWS = ("draw", "median")
MOST_WINDOWS = 256  # kept in a checkpoint; they stand for those of any larger set
_DRAW = 2  # keeps the draw of a window apart from the noise's and the crop's of the same image


@dataclass(frozen=True)
class SourceIntensity:
    """The gray values of a training set; a checkpoint keeps them as a plain dict.

    Attributes:
        dtypes: kinds of gray values in the files, sorted; one of them where images can be written back.
        channels: most channels of a file; 1 where all are gray, also for a model of three.
        windows: windows of the training images, all alike counted once; at most ``MOST_WINDOWS``, spread evenly.
        colours: whether three channels are RGB; stains are not.
    """

    dtypes: tuple[str, ...]
    channels: int
    windows: tuple[Window, ...]
    colours: bool = True

    @classmethod
    def of(
        cls, windows: Sequence[Window], dtypes: Sequence[np.dtype], channels: int, colours: bool = True
    ) -> SourceIntensity:
        """Of all training images.

        Args:
            windows: of every image; their order does not matter.
            dtypes: of every image's file.
            channels: most channels of a file.
            colours: whether three channels are RGB.
        """
        most = max(map(len, windows))  # gray beside RGB
        windows = [window * most if len(window) == 1 else window for window in windows]
        ordered = sorted(windows, key=lambda window: (window[0][1] - window[0][0], window))
        if len(set(ordered)) == 1:
            ordered = ordered[:1]
        chosen = np.unique(np.linspace(0, len(ordered) - 1, MOST_WINDOWS).round().astype(int))
        return cls(
            tuple(sorted({str(dtype) for dtype in dtypes})),
            channels,
            tuple(ordered[index] for index in chosen),
            colours,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types for checkpoints."""
        windows = [[list(pair) for pair in window] for window in self.windows]
        return {"dtypes": list(self.dtypes), "channels": self.channels, "windows": windows, "colours": self.colours}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SourceIntensity:
        """The inverse of :meth:`to_dict`."""
        windows = tuple(tuple((float(low), float(high)) for low, high in window) for window in values["windows"])
        return cls(tuple(values["dtypes"]), values["channels"], windows, values.get("colours", True))

    def median_window(self) -> Window:
        """The medians of all lower and of all upper ends."""
        middle = np.median(np.array(self.windows), axis=0)
        return tuple((float(low), float(high)) for low, high in middle)


@dataclass(frozen=True)
class ImageFormat:
    """What the files of a synthetic set hold.

    Attributes:
        channels: of an image in its file; a gray one is the mean of what the model drew.
        dtype: of its gray values.
        windows: those to choose from; none for 8 bits over the whole range.
        colours: whether three channels are RGB; stains go out as planes of a TIFF.
    """

    channels: int
    dtype: np.dtype = np.dtype(np.uint8)
    windows: tuple[Window, ...] = ()
    colours: bool = True

    @property
    def suffix(self) -> str:
        """Of the image files."""
        return image_suffix(self.channels, self.dtype, self.colours)

    def window(self, seed: int, index: int) -> Window | None:
        """Gray values that -1 and 1 of image ``index`` become; None for 8 bits over the whole range."""
        return self.windows[derived_seed(seed, index, _DRAW) % len(self.windows)] if self.windows else None

    def encode(self, image: np.ndarray, window: Window | None) -> bytes:
        """File content of an image (C, H, W) in [-1, 1]."""
        image = image.mean(axis=0, keepdims=True) if self.channels == 1 else image
        return encode_image(to_gray_values(image, window, self.dtype), self.colours)


def choose_format(
    intensity: str, source_window: str | None, data: DataConfig, source: SourceIntensity | None
) -> ImageFormat:
    """The format that the flags ask for.

    Args:
        intensity: one of ``INTENSITIES``.
        source_window: one of ``SOURCE_WINDOWS``; None is "draw".
        data: of the checkpoint.
        source: of the checkpoint; None in one that does not know.

    Raises:
        InputError: a flag without effect, or training images that had no one range to go back to.
    """
    if intensity == "display":
        if source_window is not None:
            raise InputError("source_window has no effect on intensity=display: leave it out.")
        return ImageFormat(data.channels, colours=source is None or source.colours)
    if source is None:
        raise InputError("intensity=source: the checkpoint does not know the gray values of its training images.")
    if len(source.dtypes) != 1:
        raise InputError(
            f"intensity=source: the training images were {' and '.join(source.dtypes)}, there is no one kind of gray "
            "values to go back to. Leave it out."
        )
    if source_window is not None and len(source.windows) == 1:
        raise InputError("source_window has no effect: all training images had one window. Leave it out.")
    windows = (source.median_window(),) if source_window == "median" else source.windows
    channels = min(source.channels, data.channels)  # gray files trained a model of three channels, too
    return ImageFormat(channels, np.dtype(source.dtypes[0]), windows, source.colours)


def to_gray_values(image: np.ndarray, window: Window | None, dtype: np.dtype) -> np.ndarray:
    """The inverse of ``data.window_image``, whole numbers rounded.

    Args:
        image: (C, H, W) in [-1, 1].
        window: gray values of -1 and 1; None is 0 and 255.
        dtype: of the result.

    Returns:
        (H, W, C).
    """
    low, high = np.array(window or ((0.0, 255.0),), np.float64).T  # (1,) or (C,) each
    unit = np.clip(np.asarray(image, np.float64).transpose(1, 2, 0), -1, 1)
    gray = low + (unit + 1) * ((high - low) / 2)
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        gray = np.clip(np.rint(gray), limits.min, limits.max)
    return np.ascontiguousarray(gray, dtype=dtype)


def to_display(image: np.ndarray, window: Window | None) -> np.ndarray:
    """An image of a set as 8 bits over the whole range. (H, W, C) -> the same shape, uint8."""
    if window is None:
        return image
    return to_uint8(torch.from_numpy(window_image(image, window)).permute(2, 0, 1))


def window_columns(window: Window | None) -> dict[str, str]:
    """Columns of a manifest: lower and upper ends, one number or one per channel; empty without a window."""
    ends = ([], []) if window is None else zip(*window, strict=True)
    low, high = (" ".join(f"{value:.9g}" for value in values) for values in ends)
    return {"window_low": low, "window_high": high}


def window_from_columns(row: dict[str, str]) -> Window | None:
    """The inverse of :func:`window_columns`; None where the columns are empty or absent."""
    ends = [[float(word) for word in (row.get(name) or "").split()] for name in ("window_low", "window_high")]
    return tuple(zip(*ends, strict=True)) or None
