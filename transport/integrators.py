"""One step of each solver, for functions of (x, t). ``sampler`` connects them with models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


class Call(NamedTuple):
    """A call of the velocity: state x (B, ...), time t, and velocity v (B, ...) there."""

    x: Tensor
    t: float
    v: Tensor


def euler_step(velocity: Velocity, x: Tensor, t: float, h: float, v: Tensor, before: Call | None) -> Tensor:
    """Explicit Euler: order 1, 1 call per step.

    All steps of an ODE share these arguments.

    Args:
        velocity: dx/dt as a function of (x, t).
        x: (B, ...) state at t.
        t: time.
        h: step size. A negative step goes backwards.
        v: velocity(x, t), computed by the caller because every solver needs it.
        before: the call one step earlier. None at the first step.

    Returns:
        (B, ...) state at t + h.
    """
    return x + h * v


def midpoint_step(velocity: Velocity, x: Tensor, t: float, h: float, v: Tensor, before: Call | None) -> Tensor:
    """Explicit midpoint rule: order 2, 2 calls per step."""
    return x + h * velocity(x + h / 2 * v, t + h / 2)


def heun_step(velocity: Velocity, x: Tensor, t: float, h: float, v: Tensor, before: Call | None) -> Tensor:
    """Heun's method (explicit trapezoid rule): order 2, 2 calls per step."""
    return x + h / 2 * (v + velocity(x + h * v, t + h))


def ab2_step(velocity: Velocity, x: Tensor, t: float, h: float, v: Tensor, before: Call | None) -> Tensor:
    """Two-step Adams-Bashforth: order 2, 1 call per step. The first step is Heun's, with 2 calls.

    The steps may differ in size: the velocity is the straight line in t through the last two calls.
    """
    if before is None:
        return heun_step(velocity, x, t, h, v, None)
    return x + h * (v + h / (2 * (t - before.t)) * (v - before.v))


@dataclass(frozen=True)
class OdeMethod:
    """A row of ``ODE_METHODS``.

    Attributes:
        order: order of convergence.
        step: one fixed step. None if torchdiffeq adapts the step size.
        calls: network calls per fixed step. 0 if the number adapts.
        starter_calls: additional calls in the first step.
    """

    order: int
    step: Callable[..., Tensor] | None = None
    calls: int = 0
    starter_calls: int = 0

    @property
    def adaptive(self) -> bool:
        return self.step is None


def shifted_times(low: float, high: float, steps: int, shift: float) -> list[float]:
    """``steps`` + 1 times from ``low`` to ``high``, denser near ``low``.

    With s = ``shift``, u from 0 to 1 in equal steps goes to u / (s - (s - 1) u): the timestep shift of Esser et al.
    (arXiv 2403.03206, section 5.3.2), for time that runs from noise to data. The first step is about s times as short
    as the others are in the mean. 1 gives equal steps.
    """
    parts = [i / steps for i in range(steps + 1)]
    return [low + (high - low) * u / (shift - (shift - 1) * u) for u in parts]


# torchdiffeq's fehlberg2 is left out, because it is inaccurate at the default tolerances: docs/transport.md.
ODE_METHODS = {
    "euler": OdeMethod(1, euler_step, 1),
    "midpoint": OdeMethod(2, midpoint_step, 2),
    "heun": OdeMethod(2, heun_step, 2),
    "ab2": OdeMethod(2, ab2_step, 1, starter_calls=1),
    "dopri5": OdeMethod(5),
    "dopri8": OdeMethod(8),
    "bosh3": OdeMethod(3),
    "adaptive_heun": OdeMethod(2),
}


def solve_adaptive(
    velocity: Velocity,
    x: Tensor,
    times: list[float],
    method: str,
    atol: float,
    rtol: float,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """States (S, B, ...) at S monotonic ``times``, by torchdiffeq's adaptive ``method``.

    One error norm covers the whole batch. So an image depends on the others in its batch, within the tolerance.

    Raises:
        FloatingPointError: the tolerances cannot be reached.
    """
    low, high = min(times), max(times)

    def bounded(t: Tensor, state: Tensor) -> Tensor:
        # The search for the first step size may go beyond the end.
        return velocity(state, min(max(float(t), low), high))

    grid = torch.tensor(times, dtype=torch.float64, device=x.device)
    # Steps must end at the quarters of the interval. At the end, because torchdiffeq would step past it and interpolate
    # back. Before, because a flow that starts nearly straight would lead to one giant step (docs/transport.md).
    quarters = [times[0] + (times[-1] - times[0]) * i / 4 for i in (1, 2, 3, 4)]
    options: dict[str, object] = {"step_t": torch.tensor(quarters, dtype=torch.float64, device=x.device)}
    if norm is not None:
        options["norm"] = norm
    import torchdiffeq  # loads scipy's integrators, and most runs use fixed steps

    try:
        return torchdiffeq.odeint(bounded, x, grid, method=method, atol=atol, rtol=rtol, options=options)
    except AssertionError as error:  # "underflow in dt": no step is small enough
        raise FloatingPointError(
            f"{method} cannot reach the tolerances atol {atol:g} and rtol {rtol:g} ({error}); give larger ones"
        ) from error


Drift = Callable[[Tensor, float], Tensor]


def sde_euler_step(
    drift: Drift,
    diffusion: Callable[[float], float],
    x: Tensor,
    t: float,
    h: float,
    noise: Tensor,
) -> Tensor:
    """Euler-Maruyama (Ito) for dX = drift dt + sqrt(2 diffusion) dW: weak order 1, 1 call per step.

    Args:
        drift: function of (x, t).
        diffusion: function of t.
        x: (B, ...) state at t.
        h: step size, above 0.
        noise: (B, ...) standard normal.

    Returns:
        (B, ...) state at t + h.
    """
    return x + h * drift(x, t) + math.sqrt(2 * h * diffusion(t)) * noise


def sde_heun_step(
    drift: Drift,
    diffusion: Callable[[float], float],
    x: Tensor,
    t: float,
    h: float,
    noise: Tensor,
) -> Tensor:
    """Stochastic Heun: weak order 2, 2 calls per step.

    The noise is additive, so Ito and Stratonovich agree. The trapezoid rule gives its variance.
    """
    kick = math.sqrt(h * (diffusion(t) + diffusion(t + h))) * noise
    slope = drift(x, t)
    return x + h / 2 * (slope + drift(x + h * slope + kick, t + h)) + kick


SDE_METHODS: dict[str, Callable[..., Tensor]] = {"Euler": sde_euler_step, "Heun": sde_heun_step}
