"""Coefficients, conversions and names."""

from __future__ import annotations

import pytest
import torch
from transport_truth import GaussianModel

from transport import DIFFUSION_FORMS, ODE_METHODS, PATHS, PREDICTIONS, Sampler, choose, create_transport

ENDS = [1e-3, 0.01, 0.5, 0.99, 0.999]


@pytest.mark.parametrize("path", PATHS)
def test_time_derivatives_equal_autograd(path):
    t = torch.tensor(ENDS, dtype=torch.float64, requires_grad=True)
    c = PATHS[path]().coefficients(t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_float32_coefficients_keep_six_digits_near_the_ends(path):
    t = torch.tensor([*ENDS, 1 - 1e-5])
    for single, double in zip(PATHS[path]().coefficients(t), PATHS[path]().coefficients(t.double()), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_path_runs_from_noise_to_data(path):
    c = PATHS[path]().coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert c.alpha.tolist() == pytest.approx([0, 1], abs=0.007)
    assert c.sigma.tolist() == pytest.approx([1, 0], abs=1e-4)
    assert (c.alpha[0] == 0) == PATHS[path].pure_noise_start
    assert bool(torch.isfinite(c.d_sigma[1])) == PATHS[path].finite_velocity_end


@pytest.mark.parametrize("t", ENDS)
@pytest.mark.parametrize("path", PATHS)
def test_velocity_to_score_to_noise_to_data_to_velocity_is_the_identity(path, t):
    generator = torch.Generator().manual_seed(0)
    path, times = PATHS[path](), torch.full((5,), t)
    x0, x1 = torch.randn(2, 5, 3, 4, 6, generator=generator)
    x, velocity = path.interpolate(x0, x1, times)
    value = velocity
    for source, target in (("velocity", "score"), ("score", "noise"), ("noise", "data"), ("data", "velocity")):
        value = path.convert(value, source, target, x, times)
    # A division by alpha or sigma (0.001 at these ends) makes 1e-4 of float32's 1e-7.
    assert value.dtype == torch.float32
    assert (value - velocity).abs().max() < 1e-3 * velocity.abs().max()


@pytest.mark.parametrize("path", PATHS)
def test_conversions_equal_the_closed_forms(path):
    x, t = torch.randn(7, 2, 3, dtype=torch.float64), torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    truth = {prediction: GaussianModel(path, prediction)(x, t) for prediction in PREDICTIONS}
    for source in PREDICTIONS:
        for target in PREDICTIONS:
            value = PATHS[path]().convert(truth[source], source, target, x, t)
            torch.testing.assert_close(value, truth[target], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_diffusion_is_a_tensor_like_t_and_never_negative(path, form):
    t = torch.linspace(0.001, 0.999, 5)
    w = DIFFUSION_FORMS[form](PATHS[path](), t)
    assert w.shape == t.shape and torch.isfinite(w).all() and (w >= 0).all()


def test_names_are_case_insensitive_and_unknown_ones_list_the_choices():
    assert choose("HEUN", ODE_METHODS, "ODE method") == "heun"
    assert type(create_transport("linear", "Velocity").path) is PATHS["Linear"]
    sampler = Sampler(create_transport())
    for call, match in (
        (lambda: create_transport("Cosine"), "unknown path type 'Cosine'; choose one of Linear, GVP, VP"),
        (lambda: create_transport(prediction="v"), "unknown prediction 'v'; choose one of velocity, score"),
        (lambda: create_transport(loss_weight="snr"), "unknown loss weight 'snr'; choose one of None, velocity"),
        (lambda: create_transport(time_sampling="beta"), "unknown time sampling 'beta'; choose one of uniform"),
        (lambda: sampler.sample_ode("heun2"), "unknown ODE method 'heun2'; choose one of euler, midpoint, heun, ab2"),
        (lambda: sampler.sample_ode(time_shift=0), "time_shift is 0; it must be between 0.01 and 100"),
        (lambda: sampler.sample_ode_likelihood("rk45"), "unknown ODE method 'rk45'"),
        (lambda: sampler.sample_sde("Milstein"), "unknown SDE method 'Milstein'; choose one of Euler, Heun"),
        (lambda: sampler.sample_sde(diffusion_form="inccreasing"), "choose one of constant, SBDM, sigma, linear"),
        (lambda: sampler.sample_sde(last_step="Median"), "choose one of Mean, Tweedie, Euler, None"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_numbers_out_of_range_and_choices_without_effect_are_refused():
    sampler = Sampler(create_transport())
    for call, match in (
        (lambda: create_transport(train_eps=0.5), r"train_eps is 0.5; it must lie in \[0, 0.5\)"),
        (lambda: create_transport(sample_eps=-1.0), "sample_eps is -1.0"),
        (lambda: create_transport("VP", train_eps=0.0), "velocity of path VP is infinite at t = 1"),
        (lambda: create_transport(time_std=0.0), "time_std is 0.0"),
        (lambda: create_transport(loss_weight="velocity"), "'velocity' has no effect on prediction 'velocity'"),
        (lambda: sampler.sample_ode(num_steps=0), "num_steps is 0"),
        (lambda: sampler.sample_ode("dopri5", rtol=0.0), "rtol is 0.0"),
        (lambda: sampler.sample_sde(diffusion_norm=0.0), "diffusion_norm is 0.0"),
        (lambda: sampler.sample_sde(last_step=None, last_step_size=0.1), "no effect without a last step"),
        (lambda: sampler.sample_sde(last_step_size=1.0), "last_step_size is 1.0"),
        (lambda: sampler.sample_ode_likelihood(probes=0), "probes is 0"),
        (lambda: Sampler(create_transport(prediction="data", sample_eps=0.0)).sample_ode(), "singular at t = 1"),
        (lambda: Sampler(create_transport(prediction="noise", sample_eps=0.0)).sample_ode(), "singular at t = 0"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_each_eps_is_kept_and_defaulted_on_its_own():
    assert create_transport().train_interval() == create_transport().sample_interval() == (0.0, 1.0)
    only_train, only_sample = create_transport(train_eps=0.1), create_transport(sample_eps=0.2)
    assert only_train.train_interval() == (0.1, 0.9) and only_train.sample_interval() == (0.0, 1.0)
    assert only_sample.train_interval() == (0.0, 1.0) and only_sample.sample_interval() == (0.2, 0.8)
    assert create_transport(prediction="noise").sample_interval() == (0.001, 0.999)
    assert create_transport("VP").train_interval() == (0.0, 0.999)
    assert create_transport().sample_interval(needs_score=True, diffusion_form="SBDM") == (0.001, 0.999)
    assert create_transport().sample_interval(needs_score=True, diffusion_form="sigma") == (0.0, 0.999)
