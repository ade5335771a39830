"""Training of a transport: time sampling, prediction target, loss weight, and singular ends of the path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .path import PATHS, PREDICTIONS, Coefficients, LinearPath, Path, choose, expand_time

Model = Callable[..., Tensor]

DEFAULT_EPS = 1e-3  # distance in t from an end where the prediction or the score is singular

# Loss weights grow without limit towards an end of the path, so they are capped. The cap is the value of 1 / (1 - t)^2
# at t = 0.95. This is the weight of data prediction with the loss on the velocity (Linear path), and Li & He 2025,
# arXiv 2511.13720, clip it there.
LOSS_T_CLIP = 0.05
MAX_LOSS_WEIGHT = 1 / LOSS_T_CLIP**2


def _velocity_weight(c: Coefficients, prediction: str) -> Tensor:
    if prediction == "velocity":
        return torch.ones_like(c.alpha)
    return (c.wronskian / (c.sigma if prediction == "data" else c.alpha)) ** 2


def _likelihood_weight(c: Coefficients, prediction: str) -> Tensor:
    if prediction == "velocity":
        return c.alpha / (c.sigma * c.wronskian)
    return c.alpha * c.wronskian / c.sigma**3 if prediction == "data" else c.wronskian / (c.alpha * c.sigma)


# Factors on the squared residual of the prediction. (For "score", the residual is multiplied by sigma, which gives the
# residual of the noise.) "velocity" gives the squared error of the velocity. "likelihood" gives SBDM diffusion x
# squared error of the score. Its integral bounds the likelihood.
LOSS_WEIGHTS: dict[str, Callable[[Coefficients, str], Tensor]] = {
    "None": lambda c, prediction: torch.ones_like(c.alpha),
    "velocity": _velocity_weight,
    "likelihood": _likelihood_weight,
}

# Random times in [0, 1], uniform ones below 1, (B,) float32 on the device. The transport scales them to its interval.
TIME_SAMPLINGS: dict[str, Callable[..., Tensor]] = {
    "uniform": lambda size, device, mean, std: torch.rand(size, device=device),
    "logit-normal": lambda size, device, mean, std: torch.sigmoid(mean + std * torch.randn(size, device=device)),
}


@dataclass(frozen=True)
class Transport:
    """A path, the model's prediction on it, and its training. Build it with ``create_transport``."""

    path: Path = field(default_factory=LinearPath)
    prediction: str = "velocity"
    loss_weight: str = "None"
    train_eps: float | None = None
    sample_eps: float | None = None
    time_sampling: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0

    def singular_ends(self, needs_score: bool = False, diffusion_form: str | None = None) -> tuple[bool, bool]:
        """Whether the model's output cannot be used at t = 0 and at t = 1.

        At t = 0: if alpha_0 = 0, "score" and "noise" do not determine the data, and SBDM diffusion is infinite. At
        t = 1: all predictions except a finite velocity divide by sigma = 0, or were never trained there. So does the
        score that an SDE needs.
        """
        start = self.path.pure_noise_start and (self.prediction in ("score", "noise") or diffusion_form == "SBDM")
        end = needs_score or self.prediction != "velocity" or not self.path.finite_velocity_end
        return start, end

    def train_interval(self) -> tuple[float, float]:
        """Times [t_min, t_max] of training: ``train_eps`` from both ends. Default: 0.001 from singular ends."""
        if self.train_eps is not None:
            return self.train_eps, 1 - self.train_eps
        start, end = self.singular_ends()
        return DEFAULT_EPS * start, 1 - DEFAULT_EPS * end

    def sample_interval(self, needs_score: bool = False, diffusion_form: str | None = None) -> tuple[float, float]:
        """Times [t_min, t_max] at which a solver may call the model: ``sample_eps`` from both ends.

        Default: 0.001 from singular ends.

        Raises:
            ValueError: ``sample_eps`` is 0 and an end is singular.
        """
        start, end = self.singular_ends(needs_score, diffusion_form)
        if self.sample_eps is None:
            return DEFAULT_EPS * start, 1 - DEFAULT_EPS * end
        if self.sample_eps == 0 and (start or end):
            where = "t = 0" if start else "t = 1"
            raise ValueError(
                f"sample_eps is 0, but prediction {self.prediction!r} on {type(self.path).__name__} is "
                f"singular at {where}; give sample_eps > 0 (default {DEFAULT_EPS})"
            )
        return self.sample_eps, 1 - self.sample_eps

    def sample_times(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """(B,) float32 training times in the training interval, from torch's global generator of the device."""
        t_min, t_max = self.train_interval()
        draw = TIME_SAMPLINGS[self.time_sampling](size, device, self.time_mean, self.time_std)
        return t_min + (t_max - t_min) * draw

    def training_losses(
        self,
        model: Model,
        x1: Tensor,
        model_kwargs: Mapping[str, object] | None = None,
        t: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Choose random times and noise, call the model once, and weight its squared error.

        Args:
            model: called as ``model(xt, t, **model_kwargs)`` with xt (B, ...) float32 and t (B,) float32.
            x1: (B, ...) data.
            model_kwargs: further arguments of the model, such as the mask.
            t: (B,) float32 times from ``sample_times``. None: choose them here.
            x0: (B, ...) noise. None: choose it here.

        Returns:
            "loss": (B,) float32, mean of weight x (prediction - target)^2 over each example. For "score", the residual
            is multiplied by sigma, which gives the residual of the noise. Weights are capped at ``MAX_LOSS_WEIGHT``.
            "pred": (B, ...) the model's output. "t": (B,) the times.

        Raises:
            ValueError: the model's output does not have the shape of x1.
        """
        x1 = x1 if x1.dtype == torch.float64 else x1.float()
        t = self.sample_times(len(x1), x1.device) if t is None else t
        x0 = torch.randn_like(x1) if x0 is None else x0
        xt, velocity = self.path.interpolate(x0, x1, t)
        pred = model(xt, t, **(model_kwargs or {}))
        check_output(pred, xt)
        residual = self._residual(pred.to(x1.dtype), x0, x1, velocity, t)
        weight = LOSS_WEIGHTS[self.loss_weight](self.path.coefficients(t), self.prediction).clamp(max=MAX_LOSS_WEIGHT)
        return {"loss": weight * residual.square().flatten(1).mean(1), "pred": pred, "t": t}

    def _residual(self, pred: Tensor, x0: Tensor, x1: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "score":
            return self.path.coefficients(expand_time(t, x1)).sigma * pred + x0
        return pred - {"velocity": velocity, "noise": x0, "data": x1}[self.prediction]


def check_output(output: Tensor, x: Tensor) -> None:
    """Raise ValueError if a model's output does not have the shape of its input."""
    if output.shape != x.shape:
        raise ValueError(
            f"the model returned {tuple(output.shape)} for an input of {tuple(x.shape)}; they must be "
            "equal (a model with learn_sigma returns twice the channels)"
        )


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    time_sampling: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
) -> Transport:
    """Make a ``Transport`` and check its arguments. Names are case-insensitive.

    Args:
        path_type: key of ``PATHS``.
        prediction: key of ``PREDICTIONS``: what the model returns.
        loss_weight: key of ``LOSS_WEIGHTS``. None: the plain squared error of the prediction.
        train_eps: distance of the training times from both ends, in [0, 0.5). None: 0.001 from singular ends.
        sample_eps: the same for solvers.
        time_sampling: key of ``TIME_SAMPLINGS``.
        time_mean: mean of logit(t) of "logit-normal". Values below 0 train more on noisy states.
        time_std: standard deviation of logit(t) of "logit-normal", above 0.

    Raises:
        ValueError: an unknown name, a number out of range, or a weight that has no effect on the prediction.
    """
    path = PATHS[choose(path_type, PATHS, "path type")]()
    prediction = choose(prediction, PREDICTIONS, "prediction")
    loss_weight = choose(loss_weight, LOSS_WEIGHTS, "loss weight")
    if loss_weight == prediction == "velocity":
        raise ValueError(
            "loss weight 'velocity' has no effect on prediction 'velocity', whose loss it already is; leave it out"
        )
    for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
        if eps is not None and not 0 <= eps < 0.5:
            raise ValueError(f"{name} is {eps}; it must lie in [0, 0.5)")
    if train_eps == 0 and prediction == "velocity" and not path.finite_velocity_end:
        raise ValueError(f"train_eps is 0, but the velocity of path {path_type} is infinite at t = 1; give one above 0")
    if not time_std > 0:
        raise ValueError(f"time_std is {time_std}; it must be above 0")
    return Transport(
        path,
        prediction,
        loss_weight,
        train_eps,
        sample_eps,
        choose(time_sampling, TIME_SAMPLINGS, "time sampling"),
        time_mean,
        time_std,
    )


class ModelField:
    """A model as functions of (x, t: float). Counts calls, checks outputs and converts predictions. One per solver run.

    Attributes:
        nfe: network calls so far.
    """

    def __init__(self, transport: Transport, model: Model, model_kwargs: Mapping[str, object]) -> None:
        self.transport, self.model, self.model_kwargs = transport, model, model_kwargs
        self.nfe = 0

    def times(self, x: Tensor, t: float) -> Tensor:
        """t as (B,), with the dtype of x (float32 or float64) and on its device."""
        return torch.full((len(x),), t, dtype=x.dtype, device=x.device)

    def output(self, x: Tensor, t: float) -> Tensor:
        """The model's own prediction (B, ...)."""
        self.nfe += 1
        output = self.model(x, self.times(x, t), **self.model_kwargs)
        check_output(output, x)
        return output.to(x.dtype)

    def predict(self, target: str, x: Tensor, t: float) -> Tensor:
        """The prediction ``target`` (B, ...), from one call."""
        return self.transport.path.convert(self.output(x, t), self.transport.prediction, target, x, self.times(x, t))

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """dx/dt of the probability flow (B, ...), from one call."""
        return self.predict("velocity", x, t)

    def predict_ends(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """E[x1 given x] and E[x0 given x], both (B, ...), from one call."""
        return self.transport.path.ends(self.output(x, t), self.transport.prediction, x, self.times(x, t))

    def velocity_and_score(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocity and score, both (B, ...), from one call."""
        output, times = self.output(x, t), self.times(x, t)
        velocity, score = (
            self.transport.path.convert(output, self.transport.prediction, target, x, times)
            for target in ("velocity", "score")
        )
        return velocity, score

    def one_minus_tau(self, x: Tensor, t: float) -> Tensor:
        """sigma / (alpha + sigma) = 1 - tau: distance to the data, in the time tau of the straight path."""
        c = self.transport.path.coefficients(self.times(x, t)[0])
        return c.sigma / (c.alpha + c.sigma)
