"""Order, calls, reversal, gradients and memory of the solvers."""

from __future__ import annotations

import gc
import importlib.util
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transport_truth import CALLS, MEAN, STD, GaussianModel, MixtureModel, normal_quantiles, sde_moments, stated_calls

from transport import DIFFUSION_FORMS, ODE_METHODS, PATHS, PREDICTIONS, SDE_METHODS, Sampler, create_transport
from transport.sampler import LAST_STEPS

FIXED = [name for name, row in ODE_METHODS.items() if not row.adaptive]


def slope(steps, errors):
    """Observed order: minus the slope of log(error) over log(steps)."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", FIXED)
def test_observed_order_is_the_stated_one(method, path, prediction):
    # An eps that is small beside the steps; the interval of the Linear and GVP velocity has no eps at all.
    eps = None if prediction == "velocity" and path != "VP" else 1e-5
    transport = create_transport(path, prediction, sample_eps=eps)
    model, x0 = MixtureModel(path, prediction), normal_quantiles(32, torch.float64)
    exact = model.data_of(x0, transport.sample_interval()[0])
    steps, errors = [64, 96, 128, 192], []
    for num_steps in steps:
        end = Sampler(transport).sample_ode(method, num_steps)(x0, model)[-1]
        errors.append((end - exact).square().mean().sqrt().item())
    assert slope(steps, errors) == pytest.approx(ODE_METHODS[method].order, abs=0.2)
    docstring = ODE_METHODS[method].step.__doc__
    assert f"order {ODE_METHODS[method].order}" in docstring


@pytest.mark.parametrize("method", FIXED)
def test_a_time_shift_keeps_the_order(method):
    model, x0, steps, errors = MixtureModel("Linear", "velocity"), normal_quantiles(32, torch.float64), [64, 128], []
    exact = model.data_of(x0, 0.0)
    for num_steps in steps:
        end = Sampler(create_transport()).sample_ode(method, num_steps, time_shift=4)(x0, model)[-1]
        errors.append((end - exact).square().mean().sqrt().item())
    assert slope(steps, errors) == pytest.approx(ODE_METHODS[method].order, abs=0.2)


@pytest.mark.parametrize(("method", "order"), [("Euler", 1), ("Heun", 2)])
def test_observed_weak_order_is_the_stated_one(method, order):
    steps, errors = [50, 100, 200, 400], []
    for num_steps in steps:
        solver = Sampler(create_transport("GVP")).sample_sde(method, "sigma", num_steps=num_steps)
        mean, std = sde_moments(solver, GaussianModel("GVP", "velocity"), torch.float64)
        errors.append(math.hypot(mean - MEAN, std - STD))
    assert slope(steps, errors) == pytest.approx(order, abs=0.2)
    assert f"weak order {order}" in SDE_METHODS[method].__doc__


@pytest.mark.parametrize(("method", "calls"), [("euler", 24), ("midpoint", 48), ("heun", 48), ("ab2", 25)])
def test_network_calls_equal_the_stated_count(method, calls):
    for path, prediction in product(PATHS, PREDICTIONS):
        solver = Sampler(create_transport(path, prediction)).sample_ode(method, 24)
        model = GaussianModel(path, prediction)
        solver(normal_quantiles(8), model)
        solver(normal_quantiles(8), model)
        assert solver.nfe == stated_calls(solver) == calls and model.calls == 2 * calls


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_forward_after_reverse_returns_the_input(path, prediction, method):
    transport = create_transport(path, prediction)
    steps = 1000 if method == "euler" else 100
    low, high = transport.sample_interval()
    model = GaussianModel(path, prediction, low=low, high=high)
    x1 = MEAN + STD * normal_quantiles(33)
    reverse = Sampler(transport).sample_ode(method, steps, reverse=True)
    noise = reverse(x1, model)[-1]
    assert reverse.nfe == model.calls and stated_calls(reverse) in (None, model.calls)
    torch.testing.assert_close(noise.double(), model.noise_of(x1.double(), low), rtol=0, atol=0.05)
    again = Sampler(transport).sample_ode(method, steps)(noise, model)[-1]
    torch.testing.assert_close(again, x1, rtol=0, atol=0.02 * STD)


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_trajectory_stores_every_state_and_ends_like_a_run_without(method):
    for prediction, reverse in product(("velocity", "data"), (False, True)):
        sampler, model = Sampler(create_transport(prediction=prediction)), GaussianModel("Linear", prediction)
        x = normal_quantiles(5)
        states = sampler.sample_ode(method, 10, reverse=reverse, trajectory=True)(x, model)
        assert states.shape == (11, 5, 1)
        if method != "dopri5":
            assert torch.equal(states[0], x)
        end = sampler.sample_ode(method, 10, reverse=reverse)(x, model)
        assert end.shape == (1, 5, 1)
        torch.testing.assert_close(states[-1], end[-1], rtol=1e-3, atol=1e-3)
        for asked in ([0, 4], (10, 4), []):  # the final one always comes with them
            some = sampler.sample_ode(method, 10, reverse=reverse, trajectory=asked)(x, model)
            torch.testing.assert_close(some, states[sorted({*asked, 10})], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_sde_trajectory_stores_every_state_or_those_that_are_asked_for(last_step):
    def states(trajectory: bool | list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        solver = Sampler(create_transport()).sample_sde(num_steps=10, last_step=last_step, trajectory=trajectory)
        return solver(normal_quantiles(5), GaussianModel("Linear", "velocity"))

    assert states(True).shape == (11, 5, 1)
    assert torch.equal(states([0, 4]), states(True)[[0, 4, 10]])


@pytest.mark.parametrize("asked", [[-1], [3, 11]])
def test_a_state_that_no_run_has_is_refused(asked):
    with pytest.raises(ValueError, match="its states have the numbers 0 to 10"):
        Sampler(create_transport()).sample_ode(num_steps=10, trajectory=asked)


def test_batch_neighbours_do_not_change_a_fixed_step_image():
    model, x0 = GaussianModel("Linear", "data"), torch.randn(6, 3, 4, 5)
    solver = Sampler(create_transport(prediction="data")).sample_ode()
    assert torch.equal(solver(x0, model)[-1][:2], solver(x0[:2], model)[-1])


def test_default_for_images_is_ab2_with_32_steps():
    solver = Sampler(create_transport()).sample_ode()
    assert (solver.method, solver.num_steps, stated_calls(solver)) == ("ab2", 32, 33)


def test_the_given_eps_bounds_the_times():
    for prediction, method in product(PREDICTIONS, (*FIXED, "dopri5")):
        model = GaussianModel("GVP", prediction, low=0.02, high=0.98 + 1e-6)
        solver = Sampler(create_transport("GVP", prediction, sample_eps=0.02)).sample_ode(method, 100)
        solver(normal_quantiles(8), model)
        assert min(model.times) == pytest.approx(0.02)
    for form in DIFFUSION_FORMS:
        model = GaussianModel("GVP", "velocity", low=0.02, high=0.98 + 1e-6)
        solver = Sampler(create_transport("GVP", sample_eps=0.02)).sample_sde("Heun", form, num_steps=100)
        solver(normal_quantiles(8), model)


def test_last_step_of_the_sde_is_as_large_as_the_others_unless_given():
    sampler = Sampler(create_transport("VP"))
    assert sampler.sample_sde(num_steps=50).times[-1] == pytest.approx(0.98)
    assert len(sampler.sample_sde(num_steps=50).times) == 50
    assert sampler.sample_sde(num_steps=50, last_step_size=0.04).times[-1] == pytest.approx(0.96)
    assert sampler.sample_sde(num_steps=50, last_step=None).times[-1] == pytest.approx(0.999)


def test_values_that_are_not_finite_raise():
    sampler = Sampler(create_transport())
    for solver in (sampler.sample_ode(), sampler.sample_sde(num_steps=3), sampler.sample_ode_likelihood("heun", 3)):
        with pytest.raises(FloatingPointError, match="not finite"):
            solver(torch.zeros(2, 3), lambda x, t: x * math.nan)


def test_state_is_float32_under_a_low_precision_model():
    seen = set()

    def model(x, t):
        seen.add((x.dtype, t.dtype))
        return (-x).bfloat16()

    end = Sampler(create_transport()).sample_ode(num_steps=3)(torch.zeros(2, 3, dtype=torch.bfloat16), model)
    assert end.dtype == torch.float32 and seen == {(torch.float32, torch.float32)}


def masked_model(x, t, y):
    """A smooth function of x, t and a soft mask y (B, K, H, W)."""
    wave = torch.sin(x + 2 * y[:, :1]) + t[:, None, None, None] * y[:, 1:].square()
    return torch.tanh(wave) - 0.5 * x


def guided_model(x, t, y, scale=3.0):
    plain = masked_model(x, t, torch.full_like(y, 0.5))
    return plain + scale * (masked_model(x, t, y) - plain)


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("model", [masked_model, guided_model])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_four_heun_steps_pass_the_gradient_to_a_soft_mask(model, prediction, dtype):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 1, 3, 5, generator=generator).to(dtype)
    mask, direction = torch.rand(2, 2, 2, 3, 5, generator=generator).to(dtype)
    solver = Sampler(create_transport(prediction=prediction)).sample_ode("heun", 4)

    def loss(y):
        return solver(x0, model, y=y)[-1].square().sum()

    y = mask.clone().requires_grad_()
    loss(y).backward()
    step = 1e-3
    with torch.no_grad():
        differences = (loss(mask + step * direction) - loss(mask - step * direction)) / (2 * step)
    assert (y.grad * direction).sum().item() == pytest.approx(differences.item(), rel=0.01)


@pytest.mark.parametrize("method", [*FIXED, "Euler", "Heun"])
def test_memory_does_not_grow_with_the_steps(method):
    sampler = Sampler(create_transport())
    make = sampler.sample_sde if method in SDE_METHODS else sampler.sample_ode
    most = [max(states_held(make(method, num_steps=steps), range(steps - 3, steps + 1))) for steps in (6, 24)]
    assert most[0] == most[1] <= 8


def test_adaptive_methods_hold_no_trajectory():
    held = states_held(Sampler(create_transport()).sample_ode("dopri5", num_steps=1000), range(8, 25))
    assert max(held) <= 12


def states_held(solver, calls):
    """Number of tensors of the state's shape that are alive during these calls of the model."""
    shape, held, count = (3, 2, 5, 7), [], 0

    def model(x, t):
        nonlocal count
        count += 1
        if count in calls:
            held.append(sum(type(o) is torch.Tensor and o.shape == shape for o in gc.get_objects()))
        return -x

    with torch.inference_mode():
        assert solver(torch.randn(shape), model).shape == (1, *shape)
    return held


def test_table_of_the_record_is_what_the_benchmark_measures():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("solver_error", root / "benchmarks" / "solver_error.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    table = (root / "benchmarks" / "solver_error.md").read_text().split("**Linear path, velocity prediction**")[1]
    for method in FIXED:
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} |"))
        per_step, first = CALLS[method]
        for cell, budget in zip(row.split("|")[2:6], benchmark.BUDGETS, strict=True):
            steps = (budget - first) // per_step
            error, calls = benchmark.measure("Linear", "velocity", method, steps)
            assert float(cell) == pytest.approx(error, abs=1e-4) and budget - 1 <= calls <= budget


def test_tolerances_that_cannot_be_reached_are_said_in_words():
    transport = create_transport()
    for tolerance in (1e-320, 1e-30):
        solver = Sampler(transport).sample_ode(sampling_method="dopri5", atol=tolerance, rtol=tolerance)
        with pytest.raises(FloatingPointError, match=f"dopri5 cannot reach the tolerances atol {tolerance:g}"):
            solver(torch.randn(2, 3), lambda x, t: torch.sin(3 * x))
