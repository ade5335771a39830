"""Paths x_t = alpha_t x1 + sigma_t x0 between noise x0 (t = 0) and data x1 (t = 1), and the predictions on them.

Source: Ma et al. 2024 (SiT), arXiv 2401.08740. The paper's time runs the other way: paper time = 1 - t, and its
velocity has the opposite sign.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

PREDICTIONS = {
    "velocity": "E[dx_t/dt given x_t]",
    "score": "grad log p_t(x_t)",
    "noise": "E[x0 given x_t]",
    "data": "E[x1 given x_t]",
}


def choose(name: str | None, table: Iterable[str], what: str) -> str:
    """The key of ``table`` that equals ``name``, ignoring case. ``None`` means the key "None".

    Raises:
        ValueError: there is no such key. The message lists the keys.
    """
    for key in table:
        if key.lower() == str(name).lower():
            return key
    raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(table)}")


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Reshape (B,) times to (B, 1, ..., 1), so that they broadcast over x (B, ...)."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


class Coefficients(NamedTuple):
    """Factors of the path and their time derivatives. Each has the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def wronskian(self) -> Tensor:
        """d_alpha sigma - alpha d_sigma > 0: how fast the signal-to-noise ratio grows."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma


class Path(ABC):
    """x_t = alpha_t x1 + sigma_t x0."""

    pure_noise_start: bool  # alpha_0 = 0, so formulas that divide by alpha fail at t = 0
    finite_velocity_end: bool  # d_sigma is finite at t = 1; if not, there is no velocity at t = 1

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """alpha_t, sigma_t, d_alpha_t, d_sigma_t for t in [0, 1], any shape."""

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The point x_t (B, ...) on the path from x0 to x1 and its velocity dx_t/dt (B, ...), t (B,)."""
        c = self.coefficients(expand_time(t, x1))
        return c.alpha * x1 + c.sigma * x0, c.d_alpha * x1 + c.d_sigma * x0

    def ends(self, value: Tensor, source: str, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The expected data and noise, E[x1 given x_t] and E[x0 given x_t], that follow from a prediction.

        Every prediction is linear in these two, and x = alpha data + sigma noise always holds. Singular: "score" and
        "noise" at alpha = 0, "data" at sigma = 0.

        Args:
            value: (B, ...) the prediction.
            source: kind of the prediction, a key of ``PREDICTIONS``.
            x: (B, ...) point on the path.
            t: (B,) times in [0, 1].

        Returns:
            data (B, ...) and noise (B, ...).
        """
        c = self.coefficients(expand_time(t, x))
        if source == "velocity":
            return (c.sigma * value - c.d_sigma * x) / c.wronskian, (c.d_alpha * x - c.alpha * value) / c.wronskian
        if source == "data":
            return value, (x - c.alpha * value) / c.sigma
        if source == "score":
            value = -c.sigma * value
        return (x - c.sigma * value) / c.alpha, value

    def convert(self, value: Tensor, source: str, target: str, x: Tensor, t: Tensor) -> Tensor:
        """Convert a prediction to another kind at the same x and t; see ``ends``. "score" divides by sigma."""
        if source == target:
            return value
        data, noise = self.ends(value, source, x, t)
        if target == "data":
            return data
        if target == "noise":
            return noise
        c = self.coefficients(expand_time(t, x))
        if target == "score":
            return -noise / c.sigma
        return c.d_alpha * data + c.d_sigma * noise


class LinearPath(Path):
    """Straight lines: alpha = t, sigma = 1 - t."""

    pure_noise_start = True
    finite_velocity_end = True

    def coefficients(self, t: Tensor) -> Coefficients:
        return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


class GVPPath(Path):
    """Generalised variance preserving: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    pure_noise_start = True
    finite_velocity_end = True

    def coefficients(self, t: Tensor) -> Coefficients:
        quarter = math.pi / 2
        # 1 - t is exact near t = 1, where cos(pi t / 2) would cancel in float32.
        alpha, sigma = torch.sin(quarter * t), torch.sin(quarter * (1 - t))
        return Coefficients(alpha, sigma, quarter * sigma, -quarter * alpha)


class VPPath(Path):
    """Variance preserving diffusion with linear beta from 0.1 (data) to 20 (noise); alpha_0 = 0.0066, not 0.

    log alpha = -(1 - t)^2 (20 - 0.1) / 4 - (1 - t) 0.1 / 2, sigma^2 = 1 - alpha^2. Source: Song et al. 2021,
    arXiv 2011.13456. sigma falls like a square root at t = 1, so d_sigma is infinite there.
    """

    beta_min = 0.1
    beta_max = 20.0
    pure_noise_start = False
    finite_velocity_end = False

    def coefficients(self, t: Tensor) -> Coefficients:
        back, spread = 1 - t, self.beta_max - self.beta_min
        log_alpha = -0.25 * back**2 * spread - 0.5 * back * self.beta_min
        d_log_alpha = 0.5 * back * spread + 0.5 * self.beta_min
        alpha = torch.exp(log_alpha)
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))  # 1 - exp(.) would cancel near t = 1
        return Coefficients(alpha, sigma, alpha * d_log_alpha, -(alpha**2) * d_log_alpha / sigma)


PATHS: dict[str, type[Path]] = {"Linear": LinearPath, "GVP": GVPPath, "VP": VPPath}


def _sbdm(path: Path, t: Tensor) -> Tensor:
    c = path.coefficients(t)
    return c.sigma * c.wronskian / c.alpha


# w(t) in dX = (velocity + w score) dt + sqrt(2 w) dW. Every w >= 0 gives the same marginals. SBDM is the classic
# reverse diffusion. It is infinite at alpha = 0.
DIFFUSION_FORMS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "constant": lambda path, t: torch.ones_like(t),
    "SBDM": _sbdm,
    "sigma": lambda path, t: path.coefficients(t).sigma,
    "linear": lambda path, t: 1 - t,
    "decreasing": lambda path, t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t: torch.sin(math.pi * t) ** 2,
}
