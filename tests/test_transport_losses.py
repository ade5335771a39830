"""Training losses against their formulas."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transport_truth import GaussianModel

from transport import LOSS_WEIGHTS, PATHS, PREDICTIONS, create_transport
from transport.transport import LOSS_T_CLIP, MAX_LOSS_WEIGHT

TRAINABLE = [
    combination
    for combination in product(PATHS, PREDICTIONS, LOSS_WEIGHTS)
    if combination[1:] != ("velocity", "velocity")
]


def loss_and_parts(transport, x1, model):
    """The loss, and the noise and times that went into it."""
    seen = {}

    def spy(xt, t):
        seen.update(xt=xt, t=t)
        return model(xt, t.to(xt.dtype))

    torch.manual_seed(3)
    loss = transport.training_losses(spy, x1)["loss"]
    c = transport.path.coefficients(seen["t"][:, None])
    return loss, (seen["xt"] - c.alpha * x1) / c.sigma, seen["t"]


def error_of(name, model, xt, t, x0, x1, path):
    """Squared error (B,) of the model's output, read as the prediction ``name``, against the sample's own value."""
    target = path.convert(x0, "noise", name, xt, t)
    value = path.convert(model(xt, t), model.prediction, name, xt, t)
    return (value - target).square().mean(1)


@pytest.mark.parametrize(("path", "prediction", "weight"), TRAINABLE)
def test_loss_equals_its_formula(path, prediction, weight):
    transport = create_transport(path, prediction, weight, train_eps=0.15)  # no weight is capped in there
    x1 = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = GaussianModel(path, prediction, mean=-0.5, std=0.7)
    loss, x0, t = loss_and_parts(transport, x1, model)
    t = t.double()
    xt, _ = transport.path.interpolate(x0, x1, t)
    c = transport.path.coefficients(t)
    if weight == "velocity":
        expected = error_of("velocity", model, xt, t, x0, x1, transport.path)
    elif weight == "likelihood":
        expected = c.sigma * c.wronskian / c.alpha * error_of("score", model, xt, t, x0, x1, transport.path)
    else:
        scale = c.sigma**2 if prediction == "score" else 1
        expected = scale * error_of(prediction, model, xt, t, x0, x1, transport.path)
    keep = LOSS_WEIGHTS[weight](c, prediction) < MAX_LOSS_WEIGHT
    assert keep.sum() > 40
    torch.testing.assert_close(loss.double()[keep], expected[keep], rtol=1e-4, atol=1e-7)


def test_data_prediction_with_velocity_weight_is_the_velocity_loss_up_to_the_clip():
    x1 = torch.randn(512, 2, 3, 5)
    weighted = create_transport("Linear", "data", "velocity", train_eps=0.0)
    torch.manual_seed(0)
    data = weighted.training_losses(GaussianModel("Linear", "data"), x1)
    torch.manual_seed(0)
    velocity = create_transport().training_losses(GaussianModel("Linear", "velocity"), x1)
    early = data["t"] <= 1 - LOSS_T_CLIP
    assert 0 < early.sum() < len(x1) and torch.equal(data["t"], velocity["t"])
    torch.testing.assert_close(data["loss"][early], velocity["loss"][early], rtol=1e-3, atol=1e-5)
    plain = (data["pred"] - x1).square().flatten(1).mean(1)
    torch.testing.assert_close(data["loss"][~early], plain[~early] / LOSS_T_CLIP**2)


@pytest.mark.parametrize(("path", "prediction", "weight"), TRAINABLE)
def test_weights_are_finite_and_capped_at_both_ends(path, prediction, weight, monkeypatch):
    eps = 1e-6 if path == "VP" and prediction == "velocity" else 0.0
    transport = create_transport(path, prediction, weight, train_eps=eps)
    for draw in (0.0, 1e-7, 0.5, 1 - 1e-7, 1.0):
        monkeypatch.setattr(
            "transport.transport.TIME_SAMPLINGS",
            {"uniform": lambda size, device, mean, std, draw=draw: torch.full((size,), draw)},
        )
        result = transport.training_losses(lambda x, t: torch.zeros_like(x), torch.ones(3, 2))
        assert torch.isfinite(result["loss"]).all(), draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_times_are_float32_on_the_device_of_the_data_whatever_its_dtype(dtype):
    seen = []

    def model(x, t):
        seen.append((x.dtype, t.dtype, t.shape, len(t.unique())))
        return x.bfloat16()

    create_transport().training_losses(model, torch.zeros(9, 2).to(dtype))
    assert seen == [(torch.float32, torch.float32, (9,), 9)]


def test_uniform_times_fill_their_interval():
    torch.manual_seed(0)
    t = create_transport(train_eps=0.1).sample_times(20000)
    assert t.min() >= 0.1 and t.max() <= 0.9
    assert t.mean().item() == pytest.approx(0.5, abs=0.01) and t.std().item() == pytest.approx(0.8 / 12**0.5, rel=0.03)


def test_logit_normal_times_have_the_given_mean_and_std():
    torch.manual_seed(0)
    logit = create_transport(time_sampling="logit-normal", time_mean=-0.8, time_std=0.6).sample_times(20000).logit()
    assert logit.mean().item() == pytest.approx(-0.8, abs=0.02) and logit.std().item() == pytest.approx(0.6, rel=0.03)


def test_loss_reaches_the_model_and_its_arguments():
    scale = torch.ones((), requires_grad=True)
    x1 = torch.randn(4, 3, 5, 7)
    loss = create_transport(prediction="data").training_losses(lambda x, t, y: scale * x + y, x1, {"y": 0.1})["loss"]
    assert loss.shape == (4,)
    loss.mean().backward()
    assert scale.grad.abs() > 0


def test_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"returned \(2, 6, 4, 4\) for an input of \(2, 3, 4, 4\).*learn_sigma"):
        create_transport().training_losses(lambda x, t: torch.cat([x, x], 1), torch.zeros(2, 3, 4, 4))
