"""Error of the ODE solvers at few network calls: on data with an exactly known flow, or on a trained network.

    python benchmarks/solver_error.py
    python benchmarks/solver_error.py --ckpt CKPT.pt --mask-path MASKS --output bench/solver_error

The first one prints the tables of benchmarks/solver_error.md (about ten seconds on one core). The second one draws the
same images from the same noise with few and with many calls, and writes OUTPUT.json and OUTPUT.png: the root mean
square difference to --reference-calls of Heun, in gray values of 255. About a thousand network calls.

The exact data: 0.5 N(-1, 0.25^2) + 0.5 N(1, 0.25^2), one number per sample. In one dimension, the probability flow
keeps the quantile of every value. So the exact end of each sample follows from the two distribution functions, without
a solver. The error is the root mean square over 4096 values of x0 that are spread like a normal sample.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import provenance, table
from benchmarks.workloads import first_masks
from cli import add_device_argument
from common.arguments import non_negative_float, positive_int
from common.disk import write_json
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from engine.machine import Machine, start_machine
from engine.sampling import ImageSampler, SamplingSettings, TrainedModel, image_seed
from evaluation.output import new_figure, save_figure
from settings import load_checkpoint
from transport import ODE_METHODS, Sampler, create_transport

MEANS, STD = (-1.0, 1.0), 0.25
BUDGETS = (8, 16, 25, 50)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
FIXED_STEP = [name for name, row in ODE_METHODS.items() if not row.adaptive]
CURVE_BUDGETS = (8, 10, 12, 16, 20, 25, 50, 100)
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


def steps_within(method: str, calls: int) -> int:
    """Number of steps of a fixed-step method for at most this many network calls."""
    row = ODE_METHODS[method]
    return (calls - row.starter_calls) // row.calls


def print_exact_tables() -> None:
    """One table per path and prediction."""
    adaptive = [name for name, row in ODE_METHODS.items() if row.adaptive]
    for path_type, prediction in SETTINGS:
        print(f"**{path_type} path, {prediction} prediction**\n")
        rows = []
        for method in FIXED_STEP:
            runs = [measure(path_type, prediction, method, steps_within(method, calls)) for calls in BUDGETS]
            rows.append([method, *(f"{error:.4f}" for error, _ in runs)])
        print("\n".join(table(["method", *(f"{calls} calls" for calls in BUDGETS)], rows)) + "\n")
        rows = []
        for method in adaptive:
            runs = [measure(path_type, prediction, method, rtol=rtol) for rtol in TOLERANCES]
            rows.append([method, *(f"{error:.4f} ({calls})" for error, calls in runs)])
        print("\n".join(table(["method", *(f"rtol {rtol:g}" for rtol in TOLERANCES)], rows)) + "\n")


# -------------------------------------------------------------------------------------------------- a trained network


@torch.inference_mode()
def curve(args: argparse.Namespace, trained: TrainedModel, machine: Machine) -> dict[str, list[dict[str, float]]]:
    """Per method, for every budget: network calls, and the error of the images (mean and largest over them)."""
    prob_maps = first_masks(args.mask_path, trained.data, args.num_images)
    seeds = [image_seed(args.seed, index) for index in range(len(prob_maps))]

    def draw(method: str, calls: int) -> tuple[Tensor, int]:
        settings = SamplingSettings(method=method, num_steps=steps_within(method, calls), cfg_scale=args.cfg_scale)
        sampler = ImageSampler(trained.model, trained.transport, trained.space, machine, settings)
        return sampler(prob_maps, seeds), sampler.nfe

    reference, _ = draw("heun", args.reference_calls)
    found: dict[str, list[dict[str, float]]] = {}
    for method in FIXED_STEP:
        found[method] = []
        for budget in CURVE_BUDGETS:
            images, calls = draw(method, budget)
            errors = (images - reference).square().mean((1, 2, 3)).sqrt() * 127.5
            row = {"calls": calls, "error": errors.mean().item(), "largest": errors.max().item()}
            found[method].append(row)
            print(
                f"{method}: {calls} calls, error {row['error']:.3f} of 255 (largest {row['largest']:.3f})", flush=True
            )
    return found


def plot_curve(found: dict[str, list[dict[str, float]]], reference_calls: int, path: Path) -> None:
    """Plot error against network calls, both logarithmic. Leaves out the reference, whose error is 0."""
    figure = new_figure(6, 4)
    axis = figure.subplots()
    for method, rows in found.items():
        rows = [row for row in rows if row["error"] > 0]
        axis.plot([row["calls"] for row in rows], [row["error"] for row in rows], marker="o", label=method)
    axis.set(xscale="log", yscale="log", xlabel="network calls")
    axis.set_ylabel(f"difference to {reference_calls} calls of Heun\n(root mean square, gray values of 255)")
    axis.legend()
    save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    if args.ckpt is None:
        print_exact_tables()
        return
    if args.mask_path is None:
        raise InputError("--ckpt needs masks to draw from: give --mask-path MASKS.")
    start_logging(is_main=True)
    machine = start_machine(args.device, "float32")
    trained = load_checkpoint(args, machine)
    found = curve(args, trained, machine)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = provenance(args, machine)
    record |= {"checkpoint": trained.sha256, "step": trained.step, "cfg_scale": args.cfg_scale, "seed": args.seed}
    record |= {"images": args.num_images, "reference": f"heun, {args.reference_calls} calls", "curves": found}
    write_json(args.output.with_suffix(".json"), record)
    plot_curve(found, args.reference_calls, args.output.with_suffix(".png"))
    print(f"{args.output}.json, .png")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="measure on this network instead of the exact one")
    parser.add_argument(
        "--raw-weights", action="store_true", help="use the last weights instead of their average (EMA)"
    )
    parser.add_argument("--vae", help="new place of the autoencoder, if it has moved since training")
    parser.add_argument("--mask-path", type=Path, metavar="MASKS", help="folder of masks (or one file)")
    parser.add_argument(
        "--num-images", type=positive_int, default=8, help="number of images, one per mask (default: 8)"
    )
    parser.add_argument("--cfg-scale", type=non_negative_float, default=1.0, help="guidance scale (default: 1, none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument(
        "--reference-calls", type=positive_int, default=100, help="network calls of the reference, Heun (default: 100)"
    )
    parser.add_argument("--output", type=Path, default=Path("bench/solver_error"), help="output files, without suffix")
    add_device_argument(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse_args)
