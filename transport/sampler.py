"""Sampling: ODE and SDE solvers from noise to data and back. ``Sampler`` makes them.

ODE: dX = velocity dt. SDE (Ito, t from 0 to 1): dX = (velocity + w score) dt + sqrt(2 w) dW with
w(t) = ``diffusion_norm`` x the diffusion form. Both have the marginals p_t for every w >= 0. In the SiT paper
(arXiv 2401.08740) the noise term is sqrt(w_paper) dW, so w_paper = 2 w.

The end at t = 1 is singular, except for velocity prediction on the Linear and GVP paths. In the singular case, the
velocity is a difference divided by sigma = 0, and no solver calls the model at t = 1. The last ODE step uses the
coordinates of the straight path, z = x / (alpha + sigma) at tau = alpha / (alpha + sigma). There, the slope
dz/dtau = E[x1] - E[x0] stays finite. At tau = 1 no noise is left, for any path and step size. docs/transport.md has the
derivation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise

import torch
from torch import Tensor

from .integrators import ODE_METHODS, SDE_METHODS, Call, OdeMethod, shifted_times, solve_adaptive
from .likelihood import LikelihoodSolver
from .path import DIFFUSION_FORMS, choose
from .transport import Model, ModelField, Transport

# heun takes more calls and leaves noise in the image, fewer steps blur (benchmarks/design_choices.md)
ODE_METHOD, ODE_STEPS = "ab2", 32
TIME_SHIFTS = (0.01, 100.0)  # least and largest; beyond, steps vanish
TIME_SHIFT = 2.0  # of the commands: with equal steps, images are too bright and too alike (docs/transport.md)
LAST_STEPS: dict[str, str] = {
    "Mean": "the SDE's drift without its noise",
    "Tweedie": "E[x1 given x_t], the denoised state",
    "Euler": "one Euler step of the ODE",
    "None": "none: the state at t_max, with its remaining noise",
}


def check_finite(x: Tensor, what: str) -> None:
    """Raise FloatingPointError if a sample is not finite."""
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            f"{what} gave values that are not finite; take more steps or less guidance, or check the model's weights"
        )


def kept_states(trajectory: bool | Collection[int], num_steps: int) -> list[int]:
    """Numbers of the states that a run returns, rising. 0 is the start, ``num_steps`` the final state."""
    if isinstance(trajectory, bool):
        return list(range(num_steps + 1)) if trajectory else [num_steps]
    if not all(0 <= number <= num_steps for number in trajectory):
        raise ValueError(f"trajectory is {trajectory}; its states have the numbers 0 to {num_steps}")
    return sorted({*trajectory, num_steps})


class OdeSolver:
    """Probability flow ODE between noise and data. Made by ``Sampler.sample_ode``.

    Attributes:
        nfe: network calls of the last run (each for the whole batch).
    """

    def __init__(
        self,
        transport: Transport,
        method: str,
        num_steps: int,
        atol: float,
        rtol: float,
        reverse: bool,
        trajectory: bool | Collection[int],
        time_shift: float,
    ) -> None:
        self.transport, self.reverse, self.kept = transport, reverse, kept_states(trajectory, num_steps)
        self.method, self.num_steps, self.atol, self.rtol = method, num_steps, atol, rtol
        self.t_min, self.t_max = transport.sample_interval()
        self.time_shift, self.nfe = time_shift, 0

    def __call__(self, x0: Tensor, model: Model, **model_kwargs: object) -> Tensor:
        """Integrate from noise at t = 0 to data at t = 1 (``reverse``: from data to noise).

        Args:
            x0: (B, ...) start. float64 stays float64; other types become float32.
            model: called as ``model(x, t, **model_kwargs)``. t is (B,) with the dtype of x.
            **model_kwargs: further arguments of the model. Gradients flow to them.

        Returns:
            (S, B, ...) states, the final one last. S = 1, or as many as ``trajectory`` asks for.

        Raises:
            ValueError: the model's output does not have the shape of x0.
            FloatingPointError: the result is not finite.
        """
        x0 = x0 if x0.dtype == torch.float64 else x0.float()
        field = ModelField(self.transport, model, model_kwargs)
        # A reverse run uses the same times backwards.
        times = shifted_times(self.t_min, self.t_max, self.num_steps, self.time_shift)
        run = self._adaptive if ODE_METHODS[self.method].adaptive else self._fixed
        try:
            states = run(field, x0, times)
        finally:
            self.nfe = field.nfe
        check_finite(states[-1], f"ODE method {self.method}")
        return states

    def _fixed(self, field: ModelField, x: Tensor, times: list[float]) -> Tensor:
        row = ODE_METHODS[self.method]
        assert row.step is not None, "adaptive methods have a loop of their own"
        times = [*times[:-1], 1.0]
        if self.reverse:
            times.reverse()
        states = [x] if 0 in self.kept else []
        before: Call | None = None
        for number, (t, t_next) in enumerate(pairwise(times), start=1):
            if t == 1 and self.t_max < 1:
                x = leave_data(field, row.order, x, t_next)
            else:
                v = field.velocity(x, t)
                if t_next == 1 and self.t_max < 1:
                    x_next = reach_data(field, row, x, t, v, (t + self.t_max) / 2, before)
                else:
                    x_next = row.step(field.velocity, x, t, t_next - t, v, before)
                before, x = Call(x, t, v), x_next
            if number in self.kept:
                states.append(x)
        return torch.stack(states)

    def _adaptive(self, field: ModelField, x: Tensor, times: list[float]) -> Tensor:
        singular = self.t_max < 1
        if self.reverse:
            times.reverse()
            x = leave_data(field, 1, x, self.t_max) if singular else x
        times = [time for number, time in enumerate(times) if number == 0 or number in self.kept]
        states = solve_adaptive(field.velocity, x, times, self.method, self.atol, self.rtol)
        states = states if 0 in self.kept else states[1:]
        if self.reverse or not singular:
            return states
        data = field.predict("data", states[-1], self.t_max)
        return torch.cat([states[:-1], data[None]])


def reach_data(
    field: ModelField,
    row: OdeMethod,
    x: Tensor,
    t: float,
    v: Tensor,
    t_middle: float,
    before: Call | None,
) -> Tensor:
    """Last ODE step, from t to t = 1, in straight coordinates (derived in docs/transport.md).

    Let D be E[x1 given x_t], and r = 1 - tau the distance to the data. Euler ends at D. The other methods use a second
    estimate D' at r' and end at

        D + r^2 / (2 r' (r - r')) (D' - D)      midpoint rule: D' at the middle of the step
        D + r^2 / (r^2 - r'^2) (D' - D)         ab2: D' at the state ``before``, without another call

    Every end is a combination of estimates of the data, so no noise is left.

    Args:
        row: the method.
        x: (B, ...) state at t.
        t: time of the last call.
        v: (B, ...) velocity at (x, t).
        t_middle: time of the second call of the midpoint rule.
        before: the call one step earlier. None at the first step.

    Returns:
        (B, ...) state at t = 1.
    """
    path = field.transport.path
    data, noise = path.ends(v, "velocity", x, field.times(x, t))
    if row.order == 1:
        return data
    left = field.one_minus_tau(x, t)
    if before is not None and row.starter_calls:
        x_other, t_other, v_other = before
        left_other = field.one_minus_tau(x, t_other)
        weight = left**2 / (left**2 - left_other**2)
    else:
        c = path.coefficients(field.times(x, t_middle)[0])
        x_other, t_other = c.alpha * data + c.sigma * noise, t_middle
        v_other = field.velocity(x_other, t_other)
        left_other = field.one_minus_tau(x, t_other)
        weight = left**2 / (2 * left_other * (left - left_other))
    data_other = path.convert(v_other, "velocity", "data", x_other, field.times(x, t_other))
    return data + weight * (data_other - data)


def leave_data(field: ModelField, order: int, x: Tensor, t: float) -> Tensor:
    """First step of a reverse ODE run, from t = 1 to t, in straight coordinates. Euler (no call) or Heun (1 call).

    The slope at t = 1 needs no call: E[x1] is x itself, and E[x0] is 0 for data with a smooth density.
    """
    path = field.transport.path
    c = path.coefficients(field.times(x, t)[0])
    if order == 1:
        return c.alpha * x
    data, noise = field.predict_ends(c.alpha * x, t)
    return (c.alpha + c.sigma) * (x - field.one_minus_tau(x, t) / 2 * (x + data - noise))


class SdeSolver:
    """Reverse-time diffusion from noise to data. Made by ``Sampler.sample_sde``.

    Attributes:
        nfe: network calls of the last run (each for the whole batch).
    """

    def __init__(
        self,
        transport: Transport,
        method: str,
        diffusion_form: str,
        diffusion_norm: float,
        last_step: str,
        last_step_size: float | None,
        num_steps: int,
        trajectory: bool | Collection[int],
    ) -> None:
        self.transport, self.method, self.kept = transport, method, kept_states(trajectory, num_steps)
        self.diffusion_form, self.diffusion_norm = diffusion_form, diffusion_norm
        self.last_step, self.num_steps = last_step, num_steps
        t_min, t_max = transport.sample_interval(needs_score=True, diffusion_form=diffusion_form)
        regular = num_steps
        if last_step != "None":
            size = (1 - t_min) / num_steps if last_step_size is None else last_step_size
            t_max, regular = min(1 - size, t_max), num_steps - 1
            if regular and t_max <= t_min:
                raise ValueError(f"last_step_size {size:g} leaves no time for {regular} other steps")
        # The last step is one of num_steps. The others divide the remaining time equally.
        self.times = [t_min + (t_max - t_min) * i / regular for i in range(regular + 1)] if regular else [t_min]
        self.nfe = 0

    def diffusion(self, t: float) -> float:
        """w(t) = norm x form."""
        form = DIFFUSION_FORMS[self.diffusion_form]
        return self.diffusion_norm * float(form(self.transport.path, torch.tensor(t, dtype=torch.float64)))

    def __call__(
        self, x0: Tensor, model: Model, noise_fn: Callable[[Tensor], Tensor] | None = None, **model_kwargs: object
    ) -> Tensor:
        """Integrate from noise to data. Result and errors as for ``OdeSolver``.

        Args:
            x0: (B, ...) noise.
            model: called as ``model(x, t, **model_kwargs)``.
            noise_fn: ``noise_fn(x)`` returns standard normal noise with the shape of x. Called once per step. The
                default is torch.randn_like.
        """
        x = x0 if x0.dtype == torch.float64 else x0.float()
        field = ModelField(self.transport, model, model_kwargs)

        def drift(x: Tensor, t: float) -> Tensor:
            velocity, score = field.velocity_and_score(x, t)
            return velocity + self.diffusion(t) * score

        step, states = SDE_METHODS[self.method], [x] if 0 in self.kept else []
        try:
            for number, (t, t_next) in enumerate(pairwise(self.times), start=1):
                x = step(drift, self.diffusion, x, t, t_next - t, (noise_fn or torch.randn_like)(x))
                if number in self.kept:
                    states.append(x)
            if self.last_step != "None":
                x = self._finish(field, drift, x)
                states.append(x)
        finally:
            self.nfe = field.nfe
        check_finite(x, f"SDE with diffusion form {self.diffusion_form} and method {self.method}")
        return torch.stack(states)

    def _finish(self, field: ModelField, drift: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
        t = self.times[-1]
        if self.last_step == "Tweedie":
            return field.predict("data", x, t)
        slope = drift if self.last_step == "Mean" else field.velocity
        return x + (1 - t) * slope(x, t)


class Sampler:
    """Makes solvers for a transport, and checks their arguments before any work."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def sample_ode(
        self,
        sampling_method: str = ODE_METHOD,
        num_steps: int = ODE_STEPS,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
        trajectory: bool | Collection[int] = False,
        time_shift: float = 1.0,
    ) -> OdeSolver:
        """A solver of the probability flow ODE.

        Args:
            sampling_method: key of ``ODE_METHODS``, any case.
            num_steps: number of steps of a fixed-step method. Adaptive methods choose their own steps. For them, it is
                the number of intervals between the stored states of a trajectory.
            reverse: whether to go from data to noise.
            trajectory: whether to return every state, not only the final one. Or the numbers of some, from 0 to
                ``num_steps``: no others stay in memory. The final one always comes with them.
            time_shift: how much shorter the steps near the noise are: ``integrators.shifted_times``. 1 gives equal
                steps. Adaptive methods choose their own.
        """
        method = choose(sampling_method, ODE_METHODS, "ODE method")
        check_steps(num_steps, atol, rtol)
        least, most = TIME_SHIFTS
        if not least <= time_shift <= most:
            raise ValueError(f"time_shift is {time_shift}; it must be between {least:g} and {most:g}, or steps vanish")
        return OdeSolver(self.transport, method, num_steps, atol, rtol, reverse, trajectory, time_shift)

    def sample_sde(
        self,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Tweedie",
        last_step_size: float | None = None,
        num_steps: int = 250,
        trajectory: bool | Collection[int] = False,
    ) -> SdeSolver:
        """A solver of the reverse-time SDE.

        Args:
            sampling_method: key of ``SDE_METHODS``, any case.
            diffusion_form: key of ``DIFFUSION_FORMS``.
            diffusion_norm: factor on the diffusion form, above 0.
            last_step: key of ``LAST_STEPS``. None returns the state at t_max.
            last_step_size: length of the last step in t, in (0, 1). None: same length as the other steps.
            num_steps: total number of steps, including the last one.
            trajectory: whether to return every state, not only the final one. Or the numbers of some, from 0 to
                ``num_steps``: no others stay in memory. The final one always comes with them.
        """
        method = choose(sampling_method, SDE_METHODS, "SDE method")
        form = choose(diffusion_form, DIFFUSION_FORMS, "diffusion form")
        last_step = choose(last_step, LAST_STEPS, "last step")
        check_steps(num_steps)
        if not diffusion_norm > 0:
            raise ValueError(f"diffusion_norm is {diffusion_norm}; it must be above 0 (for none, sample the ODE)")
        if last_step_size is not None and last_step == "None":
            raise ValueError("last_step_size has no effect without a last step; leave one of them out")
        if last_step_size is not None and not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size is {last_step_size}; it must lie between 0 and 1")
        return SdeSolver(self.transport, method, form, diffusion_norm, last_step, last_step_size, num_steps, trajectory)

    def sample_ode_likelihood(
        self,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        probes: int = 1,
    ) -> LikelihoodSolver:
        """A solver for the log-density of data.

        Args:
            sampling_method: key of ``ODE_METHODS``, any case.
            num_steps: number of steps of a fixed-step method. Adaptive methods choose their own steps.
            probes: number of Rademacher probes per image for the divergence. They are chosen once per run; their
                results are averaged.
        """
        method = choose(sampling_method, ODE_METHODS, "ODE method")
        check_steps(num_steps, atol, rtol)
        if probes < 1:
            raise ValueError(f"probes is {probes}; it must be at least 1")
        return LikelihoodSolver(self.transport, method, num_steps, atol, rtol, probes)


def check_steps(num_steps: int, atol: float = 1.0, rtol: float = 1.0) -> None:
    """Raise ValueError if a solver cannot run with these numbers."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not (atol > 0 and rtol > 0):
        raise ValueError(f"atol is {atol} and rtol is {rtol}; both must be above 0")
