"""Simulated nuclei: shapes, positions, and a simple fluorescence image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import ndimage
from scipy.special import ndtri

from layouts.placing import Field, Piece, fill, place_anywhere, place_beside_another, tidy

TOUCHING_SHARE = 0.12  # fraction of cells placed against another cell on purpose, if touching is allowed
TOUCHING_OVERLAP = 0.15  # largest fraction of a cell that a touching neighbour may cut off
HEADROOM = {True: 0.7, False: 0.45}  # largest possible covered fraction, if touching is allowed (True) or not (False)


@dataclass(frozen=True)
class NucleiSettings:
    """Settings of a simulated set. Lengths are in pixels. A spread is standard deviation / mean.

    Attributes:
        height, width: size of the field.
        cell_size: mean diameter of a circle with the area of the nucleus.
        size_spread: spread of the diameter (log-normal).
        elongation: mean ratio of long to short axis. 1 is round.
        irregularity: deviation of the outline from an ellipse, as a fraction of the radius.
        density: mean fraction of the field that cells cover, 0..1.
        density_spread: spread of the density from image to image (log-normal).
        touching: whether cells may touch. If not, at least one background pixel separates them.
        render: whether to draw images as well.
        seed: seed of the set.
    """

    height: int
    width: int
    cell_size: float
    size_spread: float
    elongation: float
    irregularity: float
    density: float
    density_spread: float
    touching: bool
    render: bool
    seed: int


def log_normal(standard_normal: float, mean: float, spread: float) -> float:
    """Map a standard normal value to a log-normal one with this mean and this spread (standard deviation / mean)."""
    variance = math.log1p(spread**2)
    return mean * math.exp(math.sqrt(variance) * standard_normal - variance / 2)


def draw_density(settings: NucleiSettings, index: int) -> float:
    """Fraction of field number `index` that cells should cover.

    The quantiles follow the golden-ratio sequence, from a start that depends on the seed. So any dozen images in a row
    spread evenly over the distribution, and even a small set has the requested mean.
    """
    start = np.random.default_rng((settings.seed, 0, 2)).random()
    quantile = (start + index * (math.sqrt(5) - 1) / 2) % 1
    density = log_normal(float(ndtri(np.clip(quantile, 0.001, 0.999))), settings.density, settings.density_spread)
    return min(density, HEADROOM[settings.touching])


def draw_nucleus(rng: np.random.Generator, settings: NucleiSettings) -> Piece:
    """A random nucleus: an ellipse with a few slow waves on its outline, scaled to exactly the random area."""
    diameter = max(3.0, log_normal(rng.standard_normal(), settings.cell_size, settings.size_spread))
    ratio = 1 + rng.gamma(4.0, (settings.elongation - 1) / 4)
    turn = rng.uniform(0, 2 * math.pi)
    angles = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    outline = 1 / np.hypot(np.cos(angles - turn) / math.sqrt(ratio), np.sin(angles - turn) * math.sqrt(ratio))
    for waves in range(2, 7):  # one wave would only move the centre; more than six would look rough
        height = settings.irregularity * rng.normal() * 2 / waves
        outline *= np.maximum(0.5, 1 + height * np.cos(waves * angles + rng.uniform(0, 2 * math.pi)))
    # area of r(angle): half the integral of r squared
    outline *= diameter / 2 / math.sqrt(np.mean(outline**2))

    reach = math.ceil(outline.max()) + 1
    centre = reach + rng.uniform(-0.5, 0.5, 2)
    rows, columns = np.mgrid[: 2 * reach + 1, : 2 * reach + 1]
    rows, columns = rows - centre[0], columns - centre[1]
    rim = np.interp(np.arctan2(rows, columns), angles, outline, period=2 * math.pi)
    level = (np.hypot(rows, columns) / rim).astype(np.float32)
    return Piece((level < 1).astype(np.int32), level)


def simulate_field(
    settings: NucleiSettings, index: int, before_piece: Callable[[float], None] = lambda share: None
) -> tuple[np.ndarray, np.ndarray]:
    """Place nuclei on field number `index`.

    Args:
        before_piece: see :func:`layouts.placing.fill`.

    Returns:
        (H, W) int32 instance map, and (H, W) float32 level: 0 at the centre of a nucleus, 1 at its rim, inf outside.
    """
    rng = np.random.default_rng((settings.seed, index, 0))
    overlap = TOUCHING_OVERLAP if settings.touching else 0.0
    field = Field(settings.height, settings.width, gap=0 if settings.touching else 1, max_overlap=overlap)

    def place(field: Field, piece: Piece, rng: np.random.Generator) -> bool:
        if not settings.touching:
            return place_anywhere(field, piece, rng)
        on_purpose = rng.random() < TOUCHING_SHARE
        if (not on_purpose or not field.centres) and place_anywhere(field, piece, rng, alone=True):
            return True
        return bool(field.centres) and place_beside_another(field, piece, rng)

    fill(field, rng, draw_density(settings, index), partial(draw_nucleus, rng, settings), place, before_piece)
    return tidy(field.instance_map), field.level


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """(H, W) Gaussian noise, blurred by sigma pixels, with expected mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    # A Gaussian blur wider than a pixel divides the standard deviation of white noise by 2 sqrt(pi) sigma.
    return noise * max(1.0, 2 * math.sqrt(math.pi) * sigma)


def render_image(instance_map: np.ndarray, level: np.ndarray, cell_size: float, rng: np.random.Generator) -> np.ndarray:
    """A simple fluorescence image of the nuclei: texture, varying brightness, blur, haze, background and noise.

    Meant for learning the commands. It does not model a real microscope.

    Args:
        instance_map: (H, W) int32.
        level: (H, W) float32, from `simulate_field`.
        cell_size: mean diameter in pixels. Textures and blur scale with it.

    Returns:
        (H, W) uint8.
    """
    shape = instance_map.shape
    brightness = np.concatenate([[0.0], np.exp(rng.normal(0, 0.25, int(instance_map.max())))])
    thickness = np.sqrt(np.clip(1 - level**2, 0, 1))  # an ellipsoid is thinner at its rim, and therefore darker
    coarse, fine = _smooth_noise(rng, shape, 0.13 * cell_size), _smooth_noise(rng, shape, 0.045 * cell_size)
    nucleoli = np.clip(_smooth_noise(rng, shape, 0.08 * cell_size) - 1.3, 0, 0.8)
    chromatin = np.clip(1 + 0.16 * coarse + 0.12 * fine - 0.5 * nucleoli, 0.3, None)
    signal = brightness[instance_map] * (0.6 + 0.4 * thickness) * chromatin

    in_focus = ndimage.gaussian_filter(signal, float(np.clip(0.04 * cell_size, 0.6, 3)))
    haze = rng.uniform(0.03, 0.1) * ndimage.gaussian_filter(signal, 0.6 * cell_size)
    down, right = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    slope = rng.normal(0, 0.2, 2)  # uneven illumination
    background = rng.uniform(0.03, 0.08) * np.exp(slope[0] * down + slope[1] * right)
    photons = rng.uniform(100, 400)  # at signal 1; fewer photons mean more noise
    light = rng.poisson(photons * (in_focus + haze + background)) / photons + rng.normal(0, 0.01, shape)
    return np.clip(np.rint(light * rng.uniform(110, 150)), 0, 255).astype(np.uint8)
