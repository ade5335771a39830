"""Error of the ODE solvers with few network calls, on data whose flow is known exactly.

    python benchmarks/solver_error.py

prints the markdown tables of docs/transport.md (about ten seconds on one core). Data: 0.5 N(-1, 0.25^2) +
0.5 N(1, 0.25^2), one number per sample. In one dimension the probability flow keeps every value's quantile, so that the
exact end of each sample comes from the two distribution functions, without a solver. A row's number is the root mean
square error over 4096 values of x0 that are spread like a normal sample.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transport import ODE_METHODS, Sampler, create_transport  # noqa: E402

MEANS, STD = (-1.0, 1.0), 0.25
BUDGETS = (8, 16, 25, 50)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
SETTINGS = (("Linear", "velocity"), ("Linear", "data"), ("GVP", "velocity"), ("VP", "velocity"))


class Mixture:
    """The exact model of the data for one path and prediction."""

    def __init__(self, path_type: str, prediction: str) -> None:
        self.path, self.prediction = create_transport(path_type).path, prediction

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.path.coefficients(t[:, None])
        variance = c.alpha**2 * STD**2 + c.sigma**2
        means = torch.tensor(MEANS, dtype=x.dtype)
        share = torch.softmax(-((x - c.alpha * means) ** 2) / (2 * variance), dim=1)
        centred = x - c.alpha * (share * means).sum(1, keepdim=True)
        data = (share * means).sum(1, keepdim=True) + c.alpha * STD**2 * centred / variance
        return data if self.prediction == "data" else c.d_alpha * data + c.d_sigma * c.sigma * centred / variance

    def cdf(self, x: Tensor, t: float) -> Tensor:
        """Distribution function of x_t."""
        c = self.path.coefficients(torch.tensor(t, dtype=torch.float64))
        spread = torch.sqrt(c.alpha**2 * STD**2 + c.sigma**2)
        return sum(torch.special.ndtr((x - c.alpha * mean) / spread) for mean in MEANS) / len(MEANS)

    def flow(self, x0: Tensor) -> Tensor:
        """Exact end of the flow from x0, by bisection."""
        quantile, low, high = self.cdf(x0, 0.0), torch.full_like(x0, -10.0), torch.full_like(x0, 10.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, 1.0) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle


def measure(path_type: str, prediction: str, method: str, num_steps: int = 1, rtol: float = 1e-3) -> tuple[float, int]:
    """Root mean square error of a run and its network calls."""
    model = Mixture(path_type, prediction)
    x0 = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)[:, None]
    solver = Sampler(create_transport(path_type, prediction)).sample_ode(method, num_steps, atol=rtol / 1000, rtol=rtol)
    error = solver(x0, model)[-1] - model.flow(x0)
    return error.square().mean().sqrt().item(), solver.nfe


def main(args: argparse.Namespace) -> None:
    """Print one table per path and prediction."""
    fixed = [name for name, row in ODE_METHODS.items() if not row.adaptive]
    adaptive = [name for name, row in ODE_METHODS.items() if row.adaptive]
    for path_type, prediction in SETTINGS:
        print(f"**{path_type} path, {prediction} prediction**\n")
        print("| method | " + " | ".join(f"{calls} calls" for calls in BUDGETS) + " |")
        print("|---" * (len(BUDGETS) + 1) + "|")
        for method in fixed:
            row = ODE_METHODS[method]
            runs = [measure(path_type, prediction, method, (b - row.starter_calls) // row.calls) for b in BUDGETS]
            print(f"| {method} | " + " | ".join(f"{error:.4f}" for error, _ in runs) + " |")
        print("\n| method (error at its own number of calls) | " + " | ".join(f"rtol {r:g}" for r in TOLERANCES) + " |")
        print("|---" * (len(TOLERANCES) + 1) + "|")
        for method in adaptive:
            runs = [measure(path_type, prediction, method, rtol=rtol) for rtol in TOLERANCES]
            print(f"| {method} | " + " | ".join(f"{error:.4f} ({calls})" for error, calls in runs) + " |")
        print()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """No options but --help."""
    return argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
