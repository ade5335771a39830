"""The look of an image (colour, contrast, grain) as a few fixed numbers, measured from the image itself.

The numbers of a crop. Flips and quarter turns do not change them:

    for each channel         mean, standard deviation, quantiles, gradient energy at three scales
    for each two channels    covariance

No number tells a position. Training measures the look on another random crop than the one the model sees. So the look
describes what the crops of an image have in common. The look of a whole image is the mean over evenly spread crops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import InputError
from common.randomness import derived_seed
from common.spread import evenly
from dataset.config import DataConfig, Window
from dataset.gray import image_window, to_tensor
from dataset.groups import members_of
from dataset.views import center_view, native_view

LOOKS = (NO_LOOK, REFERENCE) = ("none", "reference")  # looks that a model can be trained with
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SCALES = (1, 2, 4)  # pixels: gradients are measured between the means of blocks of this side
WINDOW_SHARE = 0.75  # side of a measured crop, as a fraction of the training size
WINDOWS_PER_SIDE = 4  # most crops along each side of a whole image
LEAST_ENERGY = 1e-6  # keeps the logarithm finite for a crop of one gray value
LEAST_SPREAD = 1e-3  # least standard deviation: avoids division by zero
FARTHEST = 5.0  # standardised numbers are clipped to this absolute value
MOST_LOOKS = 4096  # most looks in a checkpoint; of larger data sets, an even selection
LEAST_OF_GROUP = 32  # least looks of each group in this selection, if it has as many
RECIPE = 1  # version of the numbers; raise it when their meaning changes
_DRAW, _DRAW_GROUP = 3, 4  # other random draws of the same image use other numbers


@functools.cache
def look_names(channels: int) -> tuple[str, ...]:
    """Name of each number, in order."""
    each = ("mean", "spread", *(f"quantile {q:g}" for q in QUANTILES), *(f"gradients {s} px" for s in SCALES))
    names = [f"{name}, channel {channel}" if channels > 1 else name for name in each for channel in range(channels)]
    pairs = zip(*np.triu_indices(channels, 1), strict=True)
    return (*names, *(f"covariance, channels {left} and {right}" for left, right in pairs))


def look_count(channels: int) -> int:
    """How many numbers describe a look, for images with this many channels."""
    return len(look_names(channels))


def measure_window(image: np.ndarray) -> np.ndarray:
    """Look numbers of one crop, see the module's docstring.

    Args:
        image: (C, h, w) in [-1, 1].

    Returns:
        (N,) float32, in the order of :func:`look_names`. Sums are computed in float64, so that a turned crop gives the
        same numbers.
    """
    pixels = np.sort(image.reshape(len(image), -1), axis=1)  # (C, P)
    ranks = np.rint(np.array(QUANTILES) * (pixels.shape[1] - 1)).astype(int)
    quantiles = pixels[:, ranks].T  # (Q, C)
    wide = image.astype(np.float64)
    flat = wide.reshape(len(image), -1)
    mean = flat.mean(axis=1)
    covariance = flat @ flat.T / flat.shape[1] - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(covariance.diagonal(), 0))
    energies = [_gradient_energy(wide)]
    for factor in np.divide(SCALES[1:], SCALES[:-1]).astype(int):
        wide = _block_means(wide, factor)
        energies.append(_gradient_energy(wide))
    parts = (mean, spread, quantiles.ravel(), *energies, covariance[np.triu_indices(len(image), 1)])
    return np.concatenate(parts).astype(np.float32)


def _block_means(image: np.ndarray, side: int) -> np.ndarray:
    """Means of blocks: (C, h, w) -> (C, h / side, w / side). If side does not divide h or w, the margin is cut off."""
    height, width = (length // side * side for length in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    part = image[:, top : top + height, left : left + width]
    parts = [part[:, row::side, column::side] for row in range(side) for column in range(side)]
    return sum(parts[1:], parts[0]) / side**2


def _gradient_energy(image: np.ndarray) -> np.ndarray:
    """Logarithm of the mean squared difference of neighbouring pixels, over both axes: (C, h, w) -> (C,)."""
    energy, count = np.zeros(len(image)), 0
    for steps in (image[:, 1:] - image[:, :-1], image[:, :, 1:] - image[:, :, :-1]):
        energy += np.einsum("chw,chw->c", steps, steps)
        count += steps[0].size
    return np.log(energy / max(1, count) + LEAST_ENERGY)


def measure_draw(image: np.ndarray, window: Window, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Look numbers (N,) of a random crop of an image.

    Args:
        image: (H, W, C) as stored, or the resized square with crop "center".
        window: gray values that become -1 and 1.
    """
    view = native_view(image.shape[0], image.shape[1], _fitting_side(image, config), rng)
    return measure_window(to_tensor(view.cut(image), window, config.channels).numpy())


def measure_image(image: np.ndarray, window: Window, config: DataConfig) -> np.ndarray:
    """Look numbers (N,) of a whole image: the mean over evenly spread crops. Arguments as in :func:`measure_draw`."""
    return measure_spread(image, window, config).mean(axis=0)


def measure_spread(image: np.ndarray, window: Window, config: DataConfig) -> np.ndarray:
    """Look numbers (n, N) of crops spread evenly over an image. Arguments as in :func:`measure_draw`."""
    side = _fitting_side(image, config)
    tops, lefts = (_starts(length, side) for length in image.shape[:2])
    parts = (image[top : top + side, left : left + side] for top in tops for left in lefts)
    return np.stack([measure_window(to_tensor(part, window, config.channels).numpy()) for part in parts])


def measure_file(image: np.ndarray, config: DataConfig) -> np.ndarray:
    """Look numbers (N,) of an image (H, W, C) as stored, in the gray range and crop of training."""
    window = image_window(image, config)
    if config.crop == "center":
        image = center_view(image.shape[0], image.shape[1], config.image_size).apply_image(image)
    return measure_image(image, window, config)


def measure_tensor(image: np.ndarray, config: DataConfig) -> np.ndarray:
    """Look numbers (N,) of an image (C, H, W) with values in [-1, 1]."""
    return measure_image(image.transpose(1, 2, 0), ((-1.0, 1.0),), config)


def _fitting_side(image: np.ndarray, config: DataConfig) -> int:
    """Side of a measured crop: a multiple of the largest block, so that turns do not move the blocks."""
    side, unit = min(int(WINDOW_SHARE * config.image_size), *image.shape[:2]), max(SCALES)
    return max(side // unit * unit, min(unit, *image.shape[:2]))


def _starts(length: int, side: int) -> np.ndarray:
    """First pixels of evenly spread crops along one axis, at most ``WINDOWS_PER_SIDE``."""
    count = min(WINDOWS_PER_SIDE, -(-length // side))
    return np.linspace(0, length - side, count).round().astype(int)


def kept_images(count: int, groups: Sequence[str] = ()) -> list[int]:
    """Numbers of the images whose looks a checkpoint stores, evenly spread over the images of every group.

    Groups keep their shares, but a rare group has at least :data:`LEAST_OF_GROUP` looks.

    Args:
        count: of the images.
        groups: of the images; empty if they have none.
    """
    members = members_of(groups)
    if count <= MOST_LOOKS or not MOST_LOOKS >= len(members) > 0:
        return evenly(count, MOST_LOOKS)
    least = min(LEAST_OF_GROUP, MOST_LOOKS // len(members))
    certain = sum(min(len(one), least) for one in members)
    share = (MOST_LOOKS - certain) / (count - certain)  # of the other images
    kept = [evenly(len(one), least + int(share * max(0, len(one) - least))) for one in members]
    return sorted(one[place] for one, places in zip(members, kept, strict=True) for place in places)


@dataclass(frozen=True)
class Looks:
    """Looks of images, and the mean and spread that standardise them and new ones. Checkpoints store plain numbers.

    Attributes:
        names: of the images.
        numbers: (M, N) float32, not standardised.
        mean: (N,) mean over all measured crops.
        spread: (N,) standard deviation over all measured crops.
        groups: of the images; empty if they have none.
    """

    names: tuple[str, ...]
    numbers: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], windows: Sequence[np.ndarray], groups: Sequence[str] = ()) -> Looks:
        """Looks of training images. For each image, ``windows`` has what :func:`measure_spread` returns."""
        together = np.concatenate(windows).astype(np.float64)
        numbers = np.stack([one.mean(axis=0) for one in windows])
        mean, spread = together.mean(axis=0), np.maximum(together.std(axis=0), LEAST_SPREAD)
        return cls(tuple(names), numbers, mean.astype(np.float32), spread.astype(np.float32), tuple(groups))

    def standardise(self, numbers: np.ndarray) -> np.ndarray:
        """Input of the model: (..., N) numbers minus their mean, over their spread, clipped; float32."""
        scaled = (numbers.astype(np.float32) - self.mean) / self.spread
        return np.clip(scaled, -FARTHEST, FARTHEST)

    def with_images(self, names: Sequence[str], numbers: np.ndarray) -> Looks:
        """Looks of other images, standardised in the same way; ``numbers`` (M, N) are not standardised."""
        return Looks(tuple(names), numbers, self.mean, self.spread)

    def of_groups(self, chosen: Sequence[str]) -> Looks:
        """The looks of these groups only.

        Raises:
            InputError: there is no such group.
        """
        unknown = sorted(set(chosen) - set(self.groups))
        if unknown:
            known = (
                f"the groups are {', '.join(sorted(set(self.groups)))}" if self.groups else "the looks have no groups"
            )
            raise InputError(f"`look_group` {unknown[0]}: {known}.")
        kept = [number for number, group in enumerate(self.groups) if group in chosen]
        names, groups = (tuple(one[number] for number in kept) for one in (self.names, self.groups))
        return Looks(names, self.numbers[kept], self.mean, self.spread, groups)

    @functools.cached_property
    def _members(self) -> list[list[int]]:
        return members_of(self.groups)

    def draw(self, seed: int, index: int, balanced: bool = False) -> int:
        """Number of the look that image ``index`` of a set drawn with ``seed`` takes.

        Args:
            balanced: all groups are equally likely, instead of all looks.
        """
        if balanced:
            group = self._members[derived_seed(seed, index, _DRAW_GROUP) % len(self._members)]
            return group[derived_seed(seed, index, _DRAW) % len(group)]
        return derived_seed(seed, index, _DRAW) % len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for checkpoints."""
        numbers = [[float(f"{value:.6g}") for value in row] for row in self.numbers]
        return {
            "recipe": RECIPE,
            "names": list(self.names),
            "numbers": numbers,
            "mean": self.mean.tolist(),
            "spread": self.spread.tolist(),
            "groups": list(self.groups),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Looks:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: another version measured the numbers in another way.
        """
        if values["recipe"] != RECIPE:
            raise InputError(f"the checkpoint measures looks by recipe {values['recipe']}, this version by {RECIPE}")
        numbers, mean, spread = (np.array(values[name], np.float32) for name in ("numbers", "mean", "spread"))
        return cls(tuple(values["names"]), numbers, mean, spread, tuple(values.get("groups", ())))
