"""Log-densities against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from transport_truth import MEAN, STD, GaussianModel

from transport import ODE_METHODS, PATHS, PREDICTIONS, Sampler, create_transport


def gaussian_logp(x1):
    return (-0.5 * ((x1 - MEAN) / STD).square() - math.log(STD * math.sqrt(2 * math.pi))).flatten(1).sum(1).double()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_likelihood_is_the_log_density_within_3_nats_of_256_dimensions(path, prediction):
    torch.manual_seed(0)
    x1 = MEAN + STD * torch.randn(3, 4, 8, 8)
    transport = create_transport(path, prediction)
    low, high = transport.sample_interval()
    solver = Sampler(transport).sample_ode_likelihood()
    result = solver(x1, GaussianModel(path, prediction, low=low, high=high))
    assert (result.logp - gaussian_logp(x1)).abs().max() < 3
    torch.testing.assert_close(result.bits_per_dim, -result.logp / 256 / math.log(2))
    assert result.z.shape == x1.shape and result.nfe == solver.nfe > 0
    assert not result.logp.requires_grad and not result.z.requires_grad


@pytest.mark.parametrize("method", ODE_METHODS)
def test_every_method_gives_the_likelihood(method):
    torch.manual_seed(0)
    x1 = MEAN + STD * torch.randn(3, 4, 8, 8)
    steps = 1000 if method == "euler" else 100
    result = Sampler(create_transport("GVP")).sample_ode_likelihood(method, steps)(x1, GaussianModel("GVP", "velocity"))
    assert (result.logp - gaussian_logp(x1)).abs().max() < 3


class TiltedModel:
    """Exact velocity (Linear path) for N(0, A A^T) in two dimensions, whose Jacobian is not diagonal."""

    mix = torch.tensor([[1.0, 0.0], [0.9, 0.3]])

    def __call__(self, x, t):
        covariance, t = self.mix @ self.mix.T, t[0]
        variance = t**2 * covariance + (1 - t) ** 2 * torch.eye(2)
        return x @ torch.linalg.inv(variance) @ (t * covariance - (1 - t) * torch.eye(2))


def test_many_probes_approach_the_exact_divergence():
    torch.manual_seed(0)
    model = TiltedModel()
    x1 = torch.randn(200, 2) @ model.mix.T
    expected = torch.distributions.MultivariateNormal(torch.zeros(2), scale_tril=model.mix).log_prob(x1).double()
    sampler = Sampler(create_transport())

    def error(**options):
        logp = sampler.sample_ode_likelihood(rtol=1e-5, **options)(x1, model).logp
        return (logp - expected).square().mean().sqrt().item()

    one, many = error(), error(probes=16)
    assert one > 0.1
    assert many == pytest.approx(one / 4, rel=0.3)


def test_probes_are_drawn_once_per_run():
    drawn = []

    def noise_fn(x):
        drawn.append(x)
        return torch.randn_like(x)

    solver = Sampler(create_transport()).sample_ode_likelihood(probes=3)
    solver(torch.zeros(2, 3), GaussianModel("Linear", "velocity"), noise_fn=noise_fn)
    assert len(drawn) == 3 and solver.nfe > 3


def test_likelihood_works_without_gradients_and_leaves_its_input_alone():
    x1 = torch.zeros(2, 3)
    with torch.no_grad():
        Sampler(create_transport()).sample_ode_likelihood("heun", 4)(x1, GaussianModel("Linear", "velocity"))
    assert not x1.requires_grad
