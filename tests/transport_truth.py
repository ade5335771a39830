"""Closed forms for the transport tests: x1 ~ N(mu, s^2) per number, where every prediction is known on every path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transport import ODE_METHODS, PATHS, OdeSolver, SdeSolver
from transport.path import Path, expand_time

MEAN, STD = 0.8, 0.3


class GaussianModel:
    """The exact prediction for data N(mean, std^2); it refuses times outside [low, high] and anything not finite."""

    def __init__(
        self,
        path: Path | str,
        prediction: str,
        mean: float = MEAN,
        std: float = STD,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        self.path = PATHS[path]() if isinstance(path, str) else path
        self.prediction, self.mean, self.std, self.low, self.high = prediction, mean, std, low, high
        self.calls = 0
        self.times: list = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),) and t.dtype == x.dtype
        assert self.low <= t.min() and t.max() <= self.high, f"model called at t = {t.tolist()[:2]}"
        self.calls += 1
        self.times.append(float(t[0]))
        c = self.path.coefficients(expand_time(t, x))
        variance = c.alpha**2 * self.std**2 + c.sigma**2
        centred = (x - c.alpha * self.mean) / variance
        output = {
            "score": -centred,
            "noise": c.sigma * centred,
            "data": self.mean + c.alpha * self.std**2 * centred,
            "velocity": c.d_alpha * self.mean + (c.alpha * c.d_alpha * self.std**2 + c.sigma * c.d_sigma) * centred,
        }[self.prediction]
        assert torch.isfinite(output).all(), f"the model has no value at t = {t.tolist()[:2]}"
        return output

    def noise_of(self, x1: Tensor, t_start: float = 0.0) -> Tensor:
        """Where the exact probability flow takes data x1 at t_start."""
        c = self.path.coefficients(torch.tensor(t_start, dtype=torch.float64))
        spread = torch.sqrt(c.alpha**2 * self.std**2 + c.sigma**2)
        return c.alpha * self.mean + spread * (x1 - self.mean) / self.std

    def data_of(self, x0: Tensor, t_start: float = 0.0) -> Tensor:
        """Where the exact probability flow takes the state x0 at t_start."""
        c = self.path.coefficients(torch.tensor(t_start, dtype=torch.float64))
        spread = torch.sqrt(c.alpha**2 * self.std**2 + c.sigma**2)
        return self.mean + self.std * (x0 - c.alpha * self.mean) / spread


class MixtureModel:
    """The exact prediction for data 0.3 N(-1, 0.3^2) + 0.7 N(0.6, 0.3^2), which is not linear in x."""

    weights, means, std = (0.3, 0.7), (-1.0, 0.6), 0.3

    def __init__(self, path: str, prediction: str) -> None:
        self.path = PATHS[path]()
        self.components = [GaussianModel(path, prediction, mean, self.std) for mean in self.means]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.path.coefficients(expand_time(t, x))
        variance = c.alpha**2 * self.std**2 + c.sigma**2
        parts = zip(self.weights, self.means, strict=True)
        log_share = [math.log(w) - (x - c.alpha * m) ** 2 / (2 * variance) for w, m in parts]
        share = torch.softmax(torch.stack(log_share), dim=0)
        return (share * torch.stack([component(x, t) for component in self.components])).sum(0)

    def cdf(self, x: Tensor, t: float) -> Tensor:
        """Distribution function of x_t."""
        c = self.path.coefficients(torch.tensor(t, dtype=torch.float64))
        spread = torch.sqrt(c.alpha**2 * self.std**2 + c.sigma**2)
        parts = zip(self.weights, self.means, strict=True)
        return sum(w * torch.special.ndtr((x - c.alpha * m) / spread) for w, m in parts)

    def data_of(self, x0: Tensor, t_start: float = 0.0) -> Tensor:
        """Where the exact flow takes x0: a flow in one dimension keeps every value's quantile; found by bisection."""
        quantile = self.cdf(x0, t_start)
        low, high = torch.full_like(x0, -10.0), torch.full_like(x0, 10.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, 1.0) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle


def normal_quantiles(count: int = 4096, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, 1) values with mean 0 and standard deviation 1 that are spread like a normal sample, without chance."""
    x = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    return (x / x.square().mean().sqrt()).to(dtype)


def sde_moments(solver, model: GaussianModel, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Mean and standard deviation of the SDE's samples for N(0, 1) noise, without chance.

    A run is linear in its start and in the noise of each step: row 0 starts at 0 without noise, row 1 at 1, and row
    k + 2 gets the noise of step k alone.
    """
    x = torch.zeros(solver.num_steps + 2, 1, dtype=dtype)
    x[1] = 1
    rows = iter(range(2, len(x)))

    def noise_fn(x: Tensor) -> Tensor:
        noise = torch.zeros_like(x)
        noise[next(rows)] = 1
        return noise

    end = solver(x, model, noise_fn=noise_fn)[-1].flatten().double()
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


# Network calls of one fixed step, and further ones in the first step.
CALLS = {"euler": (1, 0), "midpoint": (2, 0), "heun": (2, 0), "ab2": (1, 1)}


def stated_calls(solver: OdeSolver | SdeSolver) -> int | None:
    """Network calls that a run has to take; None if the method chooses its steps.

    If t = 1 is singular, the first step of a reverse run has one call, or none for euler. The last step of an SDE has
    one call, if there is one.
    """
    if isinstance(solver, SdeSolver):
        return (len(solver.times) - 1) * {"Euler": 1, "Heun": 2}[solver.method] + (solver.last_step != "None")
    if solver.method not in CALLS:
        return None
    per_step, first = CALLS[solver.method]
    if solver.reverse and solver.t_max < 1:
        order = ODE_METHODS[solver.method].order
        return order - 1 + per_step * (solver.num_steps - 1) + first * (solver.num_steps > 1)
    return per_step * solver.num_steps + first
