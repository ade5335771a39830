"""Gray values: from files to [-1, 1] and back.

A window (gray range) is the pair of gray values that become -1 and 1. The checkpoint stores the windows of the training
images. So synthetic images can be written with 8 bits for display, or with the range and type of the training images.
If the data set has one window, the mapping is inverted exactly. If each training image has its own window, a synthetic
image gets the window of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.pictures import to_uint8
from common.randomness import derived_seed
from common.spread import evenly
from dataset.config import DataConfig, Window
from dataset.decode import colour_note
from dataset.files import FileError, encode_image, image_suffix
from dataset.names import short_names

ROBUST_PERCENTILES = (0.1, 99.9)  # of gray values, so that a few odd pixels do not count
BURNT_SHARE = 0.001  # of the pixels have the largest value if something was drawn into an image
BURNT_REST = 0.25  # of the range up to this value are used by all other pixels
NARROW_SHARE = 0.1  # a channel that uses less than this fraction of the common gray range is narrow
INTENSITIES = ("display", "source")
SOURCE_WINDOWS = ("draw", "median")
MOST_WINDOWS = 256  # most windows in a checkpoint; they represent those of a larger set
_DRAW = 2  # makes the random choice of a window independent of noise and crop of the same image
_SAMPLED_PIXELS = 2**14
_NOTED_IMAGES = 20  # whose headers are looked at


# --- from files to [-1, 1] --------------------------------------------------------------------------------------------


def default_window_channels(channels: int, has_channels: bool | None = None) -> str | None:
    """One window for gray and RGB images. One for each channel if they are stains, which differ in brightness.

    Args:
        has_channels: whether the files say that their channels are not colours. None if no file was read yet.

    Returns:
        One of ``WINDOW_CHANNELS``. None for three channels that may be RGB or stains.
    """
    if channels == 3:
        return None if has_channels is None else "separate" if has_channels else "joint"
    return "joint" if channels == 1 else "separate"


def image_window(image: np.ndarray, config: DataConfig) -> Window:
    """The window of one image (H, W, C): the gray values that become -1 and 1."""
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
    """Window between two percentiles. If these are equal, between smallest and largest value. Never empty."""
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
    """Map a window to [-1, 1], and clip values outside.

    Args:
        image: (..., C) of any type, or (C, ...) with ``channels_first``.
        window: one pair of gray values, or C of them.

    Returns:
        float32 of the same shape.
    """
    low, high = np.array(window, np.float64).T  # (1,) or (C,) each
    if channels_first:
        low, high = (ends.reshape(-1, *[1] * (image.ndim - 1)) for ends in (low, high))
    scaled = image.astype(np.float32)  # one copy, changed in place, because this is the loader's largest cost
    scaled -= low.astype(np.float32)
    scaled *= (2 / (high - low)).astype(np.float32)
    scaled -= np.float32(1)
    return np.clip(scaled, -1, 1, out=scaled)


def fit_channels(image: np.ndarray, channels: int, where: str | Path) -> np.ndarray:
    """Check that an image (H, W, C) fits a model with ``channels`` channels.

    C must equal ``channels``. Two exceptions: a gray image fits 3 channels, and RGB with equal channels fits 1.

    Returns:
        (H, W, channels), or (H, W, 1), which :func:`to_tensor` repeats later to save memory.

    Raises:
        FileError: the number of channels does not fit, or the image has colours and the model is gray.
    """
    found = image.shape[2]
    if channels == 1 and found == 3:
        if (image != image[:, :, :1]).any():
            raise FileError(where, "has colours, but the model takes 1 gray channel: save it as gray, or train with 3")
        return np.ascontiguousarray(image[:, :, :1])
    if found == channels or (found, channels) == (1, 3):
        return image
    hint = {2: " (one may be transparency: save it without)", 4: " (one may be transparency: save it as RGB)"}
    mend = "vae=none in_channels=N trains on N channels"
    count = f"{found} channel{'s' * (found > 1)}{hint.get(found, '')}"
    raise FileError(where, f"has {count}, but the model takes {channels}; {mend}")


def check_type(dtype: np.dtype, known: Collection[str], config: DataConfig, where: str | Path) -> None:
    """Refuse gray values of another type than those that gave the window of the data set: all could lie outside of it.

    Args:
        dtype: of the image.
        known: types of the images that gave the window. Empty if they are unknown.

    Raises:
        FileError: another type.
    """
    if config.window_values is not None and known and str(dtype) not in known:
        raise FileError(
            where, f"has gray values of {dtype}, but the window of the data set is for {' and '.join(known)}: save it "
            "as such, or train with window_scope=image",
        )  # fmt: skip


def to_tensor(image: np.ndarray, window: Window, channels: int) -> Tensor:
    """(S, S, C or 1) as stored -> (channels, S, S) float32 in [-1, 1]."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))  # before the conversion to float: less memory to move
    tensor = torch.from_numpy(window_image(planes, window, channels_first=True))
    return tensor if len(planes) == channels else tensor.repeat(channels, 1, 1)


# --- and back: the images of a synthetic set --------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceIntensity:
    """The gray values of a training set. A checkpoint stores them as a plain dict.

    Attributes:
        dtypes: types of gray values in the files, sorted. Images can only be written back if there is one type.
        channels: largest number of channels of a file. 1 if all files are gray, even if the model has three.
        windows: windows of the training images, at most ``MOST_WINDOWS``, evenly spread. One if all are equal.
        colours: whether three channels are RGB (not stains).
    """

    dtypes: tuple[str, ...]
    channels: int
    windows: tuple[Window, ...]
    colours: bool = True

    @classmethod
    def of(
        cls, windows: Sequence[Window], dtypes: Sequence[np.dtype], channels: int, colours: bool = True
    ) -> SourceIntensity:
        """Collect the gray values of all training images."""
        most = max(map(len, windows))  # gray and RGB images can be mixed
        windows = [window * most if len(window) == 1 else window for window in windows]
        ordered = sorted(windows, key=lambda window: (window[0][1] - window[0][0], window))  # narrow ones first
        if len(set(ordered)) == 1:
            ordered = ordered[:1]
        chosen = tuple(ordered[index] for index in evenly(len(ordered), MOST_WINDOWS))
        return cls(tuple(sorted({str(dtype) for dtype in dtypes})), channels, chosen, colours)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for checkpoints."""
        windows = [[list(pair) for pair in window] for window in self.windows]
        return {"dtypes": list(self.dtypes), "channels": self.channels, "windows": windows, "colours": self.colours}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SourceIntensity:
        """The inverse of :meth:`to_dict`."""
        windows = tuple(tuple((float(low), float(high)) for low, high in window) for window in values["windows"])
        if not windows:
            raise ValueError("it has no windows")
        return cls(tuple(values["dtypes"]), values["channels"], windows, values.get("colours", True))

    def median_window(self) -> Window:
        """Median of the lower ends and median of the upper ends."""
        middle = np.median(np.array(self.windows), axis=0)
        return tuple((float(low), float(high)) for low, high in middle)


@dataclass(frozen=True)
class ImageFormat:
    """Format of the image files of a synthetic set.

    Attributes:
        channels: number of channels in the file. A gray file holds the mean of the model's channels.
        dtype: type of the gray values.
        windows: windows to choose from. Empty for 8 bits over the whole range.
        colours: whether three channels are RGB. Stains are written as planes of a TIFF.
    """

    channels: int
    dtype: np.dtype = np.dtype(np.uint8)
    windows: tuple[Window, ...] = ()
    colours: bool = True

    @property
    def suffix(self) -> str:
        """Suffix of the image files."""
        return image_suffix(self.channels, self.dtype, self.colours)

    def window(self, seed: int, index: int) -> Window | None:
        """Gray values for -1 and 1 of image ``index``. None for 8 bits over the whole range."""
        return self.windows[derived_seed(seed, index, _DRAW) % len(self.windows)] if self.windows else None

    def encode(self, image: np.ndarray, window: Window | None) -> bytes:
        """File content of an image (C, H, W) in [-1, 1]."""
        image = image.mean(axis=0, keepdims=True) if self.channels == 1 else image
        return encode_image(to_gray_values(image, window, self.dtype), self.colours)


def choose_format(
    intensity: str, source_window: str | None, data: DataConfig, source: SourceIntensity | None
) -> ImageFormat:
    """Choose the format of the image files.

    Args:
        intensity: one of ``INTENSITIES``.
        source_window: one of ``SOURCE_WINDOWS``. None means "draw".
        source: gray values of the training images, from the checkpoint. None if the checkpoint lacks them.

    Raises:
        InputError: a setting has no effect, or the gray values of the training images are unknown or of several types.
    """
    if intensity == "display":
        if source_window is not None:
            raise InputError("`source_window` has no effect with intensity=display: leave it out.")
        return ImageFormat(data.channels, colours=source is None or source.colours)
    if source is None:
        raise InputError("intensity=source: the checkpoint does not know the gray values of its training images.")
    if len(source.dtypes) != 1:
        raise InputError(
            f"intensity=source: the training images had several types of gray values ({' and '.join(source.dtypes)}), "
            "so the type to write is not clear. Leave it out."
        )
    if source_window is not None and len(source.windows) == 1:
        raise InputError("`source_window` has no effect: all training images had one window. Leave it out.")
    windows = (source.median_window(),) if source_window == "median" else source.windows
    channels = min(source.channels, data.channels)  # a model of three channels may have been trained on gray files
    return ImageFormat(channels, np.dtype(source.dtypes[0]), windows, source.colours)


def to_gray_values(image: np.ndarray, window: Window | None, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`window_image`. Integers are rounded.

    Args:
        image: (C, H, W) in [-1, 1].
        window: gray values for -1 and 1. None means 0 and 255.

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
    """An image (H, W, C) as uint8 for display: its window becomes 0..255. Without a window, it stays as it is."""
    if window is None:
        return image
    return to_uint8(torch.from_numpy(window_image(image, window)).permute(2, 0, 1))


def window_columns(window: Window | None) -> dict[str, str]:
    """Columns of a manifest: lower and upper end, one number or one per channel. Empty without a window."""
    ends = ([], []) if window is None else zip(*window, strict=True)
    low, high = (" ".join(f"{value:.9g}" for value in values) for values in ends)
    return {"window_low": low, "window_high": high}


def window_from_columns(row: dict[str, str]) -> Window | None:
    """The inverse of :func:`window_columns`. None if the columns are empty or missing.

    Raises:
        ValueError: no numbers, or not as many in both columns.
    """
    ends = [[float(word) for word in (row.get(name) or "").split()] for name in ("window_low", "window_high")]
    return tuple(zip(*ends, strict=True)) or None


# --- what looks wrong -------------------------------------------------------------------------------------------------


def is_burnt_in(image: np.ndarray) -> bool:
    """Whether pixels are far brighter than all others, as a scale bar or text that was drawn into the image.

    Args:
        image: (H, W, C) of any type.
    """
    top = image.max()
    rest = image[image < top]
    if image.size - rest.size < BURNT_SHARE * image.size or not rest.size:
        return False
    low, high = float(rest.min()), float(rest.max())
    return low < high < low + BURNT_REST * (float(top) - low)


def burnt_in_warning(names: Sequence[str], burnt_in: Sequence[bool]) -> list[str]:
    """A warning if some images are burnt in, see :func:`is_burnt_in`."""
    found = [name for name, one in zip(names, burnt_in, strict=True) if one]
    if len(found) < max(1, len(names) // 20):
        return []
    return [
        f"{len(found)} of {len(names)} images have pixels far brighter than all others (as {found[0]}), as a scale bar "
        "or text has. They make the rest of the image nearly black: crop them off, or choose a gray range without them"
    ]


def robust_maximum(image: np.ndarray) -> float:
    """Gray value below which nearly all pixels of an image lie, so that a hot pixel does not count. Looks at some."""
    return float(np.percentile(spread_pixels(image, _SAMPLED_PIXELS), ROBUST_PERCENTILES[1]))


def spread_pixels(image: np.ndarray, most: int) -> np.ndarray:
    """About ``most`` pixels (n, C), or all, from all columns of an image (H, W, C)."""
    pixels = image.reshape(-1, image.shape[2])
    stride = max(1, len(pixels) // most)
    while math.gcd(stride, image.shape[1]) > 1:  # else the same few columns
        stride += 1
    return pixels[::stride]


def channel_shares(image: np.ndarray) -> tuple[float, ...]:
    """Fraction of the common gray range that each channel uses, between robust percentiles. Empty for gray images.

    Args:
        image: (H, W, C).

    Returns:
        C numbers in [0, 1].
    """
    if image.shape[2] == 1:
        return ()
    low, high = np.percentile(spread_pixels(image, _SAMPLED_PIXELS), ROBUST_PERCENTILES, axis=0)
    return tuple(((high - low) / max(high.max() - low.min(), 1e-12)).tolist())


def narrow_channels_warning(shares: Sequence[Sequence[float]], config: DataConfig, dtype: str) -> list[str]:
    """A warning if all channels have one window and a channel hardly uses it.

    Args:
        shares: :func:`channel_shares` of every image.
        dtype: type of the gray values in the files.
    """
    counts = [len(one) for one in shares if one]
    fixed = dtype == "uint8" and config.window is None  # such images keep their range, whatever the config says
    if not counts or (config.window_channels == "separate" and not fixed):
        return []
    median = np.median([one for one in shares if len(one) == max(counts)], axis=0)
    narrow = [f"channel {k} uses {share:.1%}" for k, share in enumerate(median, start=1) if share < NARROW_SHARE]
    if not narrow:
        return []
    window = f" window=({ROBUST_PERCENTILES[0]:g}, {ROBUST_PERCENTILES[1]:g})" if fixed else ""
    return [
        f"{', '.join(narrow)} of the common gray range of the {max(counts)} channels (median of {len(shares)} "
        f"images), so a model hardly sees it; window_channels=separate{window} gives every channel its own range"
    ]


def colour_warnings(paths: Sequence[Path], channels: int) -> list[str]:
    """Warnings about channels that are no gray values of the microscope: transparency, and colours of a lookup table.

    Looks at the headers of a few images. ``channels`` is the largest number of channels, as the images are read.
    """
    some = [paths[index] for index in evenly(len(paths), _NOTED_IMAGES)]
    notes = dict(zip(short_names(some), map(colour_note, some), strict=True))
    clear = next((name for name, note in notes.items() if note == "transparency"), None)
    tinted = next((name for name, note in notes.items() if note == "colour table"), None)
    warnings = []
    if clear and channels in (2, 4):
        warnings.append(
            f"channel {channels} is transparency (as in {clear}): if it holds no stain, save the images without it"
        )
    if tinted:
        warnings.append(
            f"images have a colour table (as in {tinted}) and are read in its colours: if it only tints gray values, "
            "as lookup tables of Fiji do, save them as gray (Image > Lookup Tables > Grays)"
        )
    return warnings
