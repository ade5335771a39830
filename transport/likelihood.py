"""Log-density of data under the probability flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .integrators import ODE_METHODS, Call, solve_adaptive
from .transport import Model, ModelField, Transport


@dataclass(frozen=True)
class LikelihoodResult:
    """Result of ``LikelihoodSolver``.

    Attributes:
        logp: (B,) log-density of x1 in nats, in the units of x1.
        z: (B, ...) noise that x1 is mapped to.
        bits_per_dim: (B,) -logp / (numbers per image x ln 2), for x1's own units. An 8-bit gray value is a step of
            2 / 255 on [-1, 1]: add log2(255 / 2) for bits per gray value.
        nfe: network calls (each for the whole batch).
    """

    logp: Tensor
    z: Tensor
    bits_per_dim: Tensor
    nfe: int


class LikelihoodSolver:
    """log p(x1) = log N(z; 0, 1) - integral over t of div velocity, along the ODE from x1 to its noise z.

    Sources: Chen et al. 2018, arXiv 1806.07366. Hutchinson's estimator of the divergence: Grathwohl et al. 2019,
    arXiv 1810.01367. The probes are chosen once per run, because an adaptive solver cannot handle probes that change
    between calls. ``Sampler.sample_ode_likelihood`` makes this object.

    Attributes:
        nfe: network calls of the last run (each for the whole batch, with its backward passes).
    """

    def __init__(
        self, transport: Transport, method: str, num_steps: int, atol: float, rtol: float, probes: int
    ) -> None:
        self.transport, self.method, self.num_steps = transport, method, num_steps
        self.atol, self.rtol, self.probes = atol, rtol, probes
        self.t_min, self.t_max = transport.sample_interval()
        self.nfe = 0

    def __call__(
        self, x1: Tensor, model: Model, noise_fn: Callable[[Tensor], Tensor] | None = None, **model_kwargs: object
    ) -> LikelihoodResult:
        """Log-densities of a batch, without gradients.

        Args:
            x1: (B, ...) data. float64 stays float64; other types become float32.
            model: called as ``model(x, t, **model_kwargs)``.
            noise_fn: ``noise_fn(x)`` returns standard normal noise with the shape of x. Its signs are a probe. The
                default is torch.randn_like.

        Raises:
            FloatingPointError: the result is not finite.
        """
        x1 = x1.detach() if x1.dtype == torch.float64 else x1.detach().float()
        field = ModelField(self.transport, model, model_kwargs)
        probes = self._probes(x1, noise_fn or torch.randn_like)
        dims = x1[0].numel()

        def augmented(state: Tensor, t: float) -> Tensor:
            """d/dt of (x, log-density so far), one row (numbers per image + 1) per image."""
            velocity, divergence = _velocity_and_divergence(field, state[:, :-1].reshape(x1.shape), t, probes)
            return torch.cat([velocity.flatten(1), divergence[:, None]], dim=1)

        # If t = 1 is singular, the run starts at t_max, with x = alpha x1 (as in ``leave_data``). This scales the
        # density by alpha per dimension.
        alpha = self.transport.path.coefficients(torch.tensor(self.t_max, dtype=torch.float64)).alpha.item()
        start = torch.cat([alpha * x1.flatten(1), x1.new_zeros(len(x1), 1)], dim=1)
        end = self._integrate(augmented, start)
        self.nfe = field.nfe
        z = end[:, :-1]
        log_normal = -0.5 * (z.double().square().sum(1) + dims * math.log(2 * math.pi))
        # The run goes down from t_max, so its integral already has the right sign.
        logp = log_normal + end[:, -1].double() + dims * math.log(alpha)
        if not torch.isfinite(logp).all():
            raise FloatingPointError("the log-likelihood is not finite; check the model's output")
        return LikelihoodResult(logp, z.reshape(x1.shape), -logp / (dims * math.log(2)), self.nfe)

    def _probes(self, x: Tensor, noise_fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Directions (B, ...). The divergence is the sum of the directional derivatives along them."""
        ones = torch.ones_like(x) / math.sqrt(self.probes)
        return [torch.where(noise_fn(x) < 0, -ones, ones) for _ in range(self.probes)]

    def _integrate(self, augmented: Callable[[Tensor, float], Tensor], state: Tensor) -> Tensor:
        row = ODE_METHODS[self.method]
        if row.step is None:
            return solve_adaptive(
                augmented, state, [self.t_max, self.t_min], self.method, self.atol, self.rtol, norm=_largest_error
            )[-1]
        times = [self.t_max - (self.t_max - self.t_min) * i / self.num_steps for i in range(self.num_steps + 1)]
        before: Call | None = None
        for t, t_next in pairwise(times):
            call = Call(state, t, augmented(state, t))
            state, before = row.step(augmented, state, t, t_next - t, call.v, before), call
        return state


def _largest_error(error: Tensor) -> Tensor:
    """Larger of two error norms, of x and of the log-densities. In one norm, the log-density would hardly count."""
    return torch.maximum(error[:, :-1].square().mean().sqrt(), error[:, -1].square().mean().sqrt())


def _velocity_and_divergence(field: ModelField, x: Tensor, t: float, probes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Velocity (B, ...) and its divergence (B,) from one network call and one backward pass per probe."""
    with torch.enable_grad():
        x = x.requires_grad_()
        velocity = field.velocity(x, t)
        divergence = x.new_zeros(len(x))
        for i, probe in enumerate(probes):
            (product,) = torch.autograd.grad(velocity, x, probe, retain_graph=i + 1 < len(probes))
            divergence = divergence + (product * probe).flatten(1).sum(1)
    return velocity.detach(), divergence.detach()
