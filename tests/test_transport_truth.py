"""Every combination that a flag can name, against Gaussian data whose flow is known in closed form."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transport_truth import MEAN, STD, GaussianModel, normal_quantiles, sde_moments, stated_calls

from transport import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    ODE_METHOD,
    ODE_METHODS,
    ODE_STEPS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
    TIME_SHIFT,
    Sampler,
    create_transport,
)
from transport.integrators import shifted_times


@pytest.mark.parametrize("method", ODE_METHODS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), (-1.0, 0.5)])
def test_ode_ends_at_mean_and_std(path, prediction, method, mean, std):
    transport = create_transport(path, prediction)
    solver = Sampler(transport).sample_ode(method, num_steps=250 if method == "euler" else 50)
    low, high = transport.sample_interval()
    model = GaussianModel(path, prediction, mean, std, low, high)
    states = solver(normal_quantiles(), model)
    assert states.shape == (1, 4096, 1) and states.dtype == torch.float32
    assert states[-1].mean().item() == pytest.approx(mean, rel=0.02)
    assert states[-1].std().item() == pytest.approx(std, rel=0.02)
    assert solver.nfe == model.calls
    assert stated_calls(solver) in (None, model.calls)


def check_sde(path, prediction, method, form, last_step):
    transport = create_transport(path, prediction)
    solver = Sampler(transport).sample_sde(method, form, last_step=last_step, num_steps=250)
    low, high = transport.sample_interval(needs_score=True, diffusion_form=form)
    assert high < 1
    model = GaussianModel(path, prediction, low=low, high=high)
    mean, std = sde_moments(solver, model)
    bar = 0.08 if (form, last_step) == ("constant", "Mean") else 0.04
    assert mean == pytest.approx(MEAN, rel=bar), prediction
    assert std == pytest.approx(STD, rel=bar), prediction
    assert solver.nfe == stated_calls(solver) == model.calls


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_sde_keeps_mean_and_std(path, form, last_step, method):
    # One prediction each, in turn; test_sde_keeps_mean_and_std_for_every_prediction (slow) runs them all.
    turn = list(DIFFUSION_FORMS).index(form) + list(LAST_STEPS).index(last_step) + list(SDE_METHODS).index(method)
    check_sde(path, list(PREDICTIONS)[turn % len(PREDICTIONS)], method, form, last_step)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_sde_keeps_mean_and_std_for_every_prediction(path, prediction):
    for form, last_step, method in product(DIFFUSION_FORMS, LAST_STEPS, SDE_METHODS):
        check_sde(path, prediction, method, form, last_step)


def test_default_sde_draws_the_right_distribution():
    torch.manual_seed(0)
    solver = Sampler(create_transport()).sample_sde()
    end = solver(torch.randn(4096, 1), GaussianModel("Linear", "velocity"))[-1]
    assert end.mean().item() == pytest.approx(MEAN, abs=4 * STD / 64)
    assert end.std().item() == pytest.approx(STD, rel=0.045)  # 4 standard errors


@pytest.mark.parametrize("norm", [0.25, 4.0])
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_norm_is_a_factor_of_the_diffusion_and_leaves_the_distribution(form, norm):
    sampler = Sampler(create_transport("GVP"))
    plain, scaled = sampler.sample_sde("Heun", form), sampler.sample_sde("Heun", form, diffusion_norm=norm)
    for t in (0.1, 0.5, 0.9):
        assert scaled.diffusion(t) == pytest.approx(norm * plain.diffusion(t))
    mean, std = sde_moments(scaled, GaussianModel("GVP", "velocity"))
    assert (mean, std) == (pytest.approx(MEAN, rel=0.04), pytest.approx(STD, rel=0.04))


@pytest.mark.parametrize("path", PATHS)
def test_last_step_leaves_no_noise_on_data_that_is_one_point(path):
    # With s = 0 all noise must be gone, at any number of steps; what a denoiser says is where the sample ends.
    methods = ("euler", "midpoint", "heun", "ab2", "dopri5")
    for prediction, method, steps in product(("data", "noise", "score"), methods, (4, 25)):
        model, solver = GaussianModel(path, prediction, std=0.0), Sampler(create_transport(path, prediction))
        end = solver.sample_ode(method, steps)(normal_quantiles(64), model)
        assert end[-1].sub(MEAN).abs().max() < 2e-3, (prediction, method, steps)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "ab2"])
@pytest.mark.parametrize("path", PATHS)
def test_one_or_two_steps_are_finite_and_counted(path, method, steps):
    for prediction, reverse in product(PREDICTIONS, (False, True)):
        transport = create_transport(path, prediction)
        solver = Sampler(transport).sample_ode(method, steps, reverse=reverse)
        low, high = transport.sample_interval()
        solver(normal_quantiles(64), GaussianModel(path, prediction, low=low, high=high))
        assert solver.nfe == stated_calls(solver)


def spread_of_brightness(method: str, steps: int, shift: float) -> float:
    """Spread of the mean brightness of 128 x 128 pixels over that of the data: 0.2, in [-1, 1].

    The mean times 128 is one number, whose noise has standard deviation 1.
    """
    model = GaussianModel("Linear", "velocity", mean=0.0, std=0.2 * 128)
    solver = Sampler(create_transport()).sample_ode(method, steps, time_shift=shift)
    return solver(torch.ones(1, 1, dtype=torch.float64), model)[-1].item() / model.std


@pytest.mark.parametrize(("method", "steps"), [("heun", 25), ("ab2", 16)])
def test_images_differ_in_brightness_as_much_as_the_data(method, steps):
    assert spread_of_brightness(method, steps, 1) < 0.9  # with equal steps, images are too alike
    assert spread_of_brightness(method, steps, TIME_SHIFT) == pytest.approx(1, abs=0.08)


def test_images_of_the_default_differ_in_brightness_as_much_as_the_data():
    assert spread_of_brightness(ODE_METHOD, ODE_STEPS, TIME_SHIFT) == pytest.approx(1, abs=0.05)


def test_shifted_times_reach_both_ends_and_shorten_the_first_step():
    times = shifted_times(0.1, 0.9, 100, 4)
    assert (times[0], times[-1]) == (0.1, pytest.approx(0.9))
    assert times[1] - times[0] == pytest.approx(0.8 / 100 / 4, rel=0.05)
    assert times[-1] - times[-2] == pytest.approx(0.8 / 100 * 4, rel=0.05)
    assert shifted_times(0, 1, 4, 1) == [0, 0.25, 0.5, 0.75, 1]
