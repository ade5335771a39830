"""Paths from noise (t = 0) to data (t = 1), training losses on them, and solvers that run along them.

Numerics only: ``path`` (coefficients, conversions) -> ``transport`` (losses) -> ``integrators`` (one step)
-> ``sampler`` and ``likelihood`` (whole runs). docs/transport.md explains it.
benchmarks/solver_error.md holds the errors of the solvers.

    transport = create_transport("Linear", "velocity")
    loss = transport.training_losses(model, x1, {"y": y})["loss"].mean()
    images = Sampler(transport).sample_ode("ab2", num_steps=32)(x0, model, y=y)[-1]
"""

from .integrators import ODE_METHODS, SDE_METHODS
from .likelihood import LikelihoodResult, LikelihoodSolver
from .path import DIFFUSION_FORMS, PATHS, PREDICTIONS, choose
from .sampler import LAST_STEPS, ODE_METHOD, ODE_STEPS, TIME_SHIFT, TIME_SHIFTS, OdeSolver, Sampler, SdeSolver
from .transport import LOSS_WEIGHTS, TIME_SAMPLINGS, Transport, create_transport

__all__ = [
    "DIFFUSION_FORMS",
    "LAST_STEPS",
    "LOSS_WEIGHTS",
    "ODE_METHOD",
    "ODE_METHODS",
    "ODE_STEPS",
    "PATHS",
    "PREDICTIONS",
    "SDE_METHODS",
    "TIME_SAMPLINGS",
    "TIME_SHIFT",
    "TIME_SHIFTS",
    "LikelihoodResult",
    "LikelihoodSolver",
    "OdeSolver",
    "Sampler",
    "SdeSolver",
    "Transport",
    "choose",
    "create_transport",
]
