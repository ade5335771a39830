"""The one place that turns a checkpoint, masks and seeds into images; train.py, sample.py and sample_ddp.py call it.

An image depends on the checkpoint, its mask, the seed and its index, and on nothing else: its noise comes from a
generator of its own on the CPU, every batch is padded to the same size, and the solver's steps are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.disk import file_sha256
from common.errors import InputError
from common.plain import WRONG
from common.randomness import derived_seed
from common.spread import evenly
from dataset.config import DataConfig
from dataset.gray import SourceIntensity
from dataset.looks import Looks
from engine.autoencoder import Space, load_space
from engine.checkpoint import build_trained, read_checkpoint
from engine.machine import Machine
from engine.tiling import Windows
from models import MaskCondition, SiT
from transport import LikelihoodResult, Sampler, Transport, create_transport
from transport.sampler import OdeSolver, SdeSolver


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn: everything but checkpoint, mask, seed and index that decides what an image looks like."""

    mode: str = "ODE"
    method: str = "heun"
    num_steps: int = 25
    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    atol: float = 1e-6
    rtol: float = 1e-3
    diffusion_form: str = "SBDM"
    diffusion_norm: float = 1.0
    last_step: str = "Tweedie"
    last_step_size: float | None = None
    tile_overlap: float | None = None  # of windows over a large field: below 1 a share of the side, from 1 on pixels
    look_scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the fields that the mode uses."""
        unused: tuple[str, ...] = SDE_ONLY if self.mode == "ODE" else ODE_ONLY
        unused += ("look_scale",) if self.look_scale == 1 else ()  # which sets without looks do not have
        return {name: value for name, value in asdict(self).items() if name not in unused}


Solver = OdeSolver | SdeSolver  # noise, model and its arguments -> states (S, B, ...)
TILE_OVERLAP = 0.25
ODE_ONLY = ("atol", "rtol")
SDE_ONLY = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint made ready to sample from."""

    model: SiT
    transport: Transport
    space: Space
    data: DataConfig
    config: dict[str, Any]
    step: int
    sha256: str
    trained_on: list[str] | None  # SHA-256 of every training image, where it is known
    intensity: SourceIntensity | None  # gray values of the training images, where they are known
    looks: Looks | None = None  # of the training images, if the model knows looks
    labelled_on: list[str] | None = None  # SHA-256 of the images whose labels it may know, where that is known


def load_trained(
    path: str | Path,
    machine: Machine,
    *,
    raw_weights: bool = False,
    vae: str | None = None,
    expected: Mapping[str, Any] | None = None,
    cfg_scales: Sequence[float] = (),
) -> TrainedModel:
    """Model, transport, space and data configuration, all as the checkpoint says.

    Args:
        path: checkpoint of train.py, or its exported weights.
        machine: where the model goes.
        raw_weights: take the last weights and not their average.
        vae: where the autoencoder lies now; None if it is where training found it.
        expected: what the caller believes of ``model``, ``num_classes`` and ``image_size``; None is no belief.
        cfg_scales: guidance that will be asked for.

    Raises:
        InputError: the checkpoint cannot be used, contradicts what is expected, or the autoencoder is another one.
    """
    state = read_checkpoint(path)
    config, notes = state["config"], {name: state.get(name) or None for name in ("intensity", "looks")}
    try:
        model = build_trained(config["model"], state["model" if raw_weights else "ema"])
        transport, data = create_transport(**config["transport"]), DataConfig.from_dict(config["data"])
        intensity = notes["intensity"] and SourceIntensity.from_dict(notes["intensity"])
        looks = notes["looks"] and Looks.from_dict(notes["looks"])
    except (*WRONG, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: its configuration is not as train.py writes it ({reason}).") from error
    _check_expected(path, config, expected or {})
    if config["model"].get("class_dropout_prob") == 0 and any(scale != 1 for scale in cfg_scales):
        raise InputError(
            f"{path} always saw its masks in training (mask_dropout 0), so guidance has nothing to subtract: give "
            "cfg_scale 1.",
            "cfg_scale",
        )
    space = load_space(vae or config["space"]["vae"], config["data"]["channels"])
    if space.fingerprint != config["space"]["fingerprint"]:
        raise InputError(
            f"vae {space.name}: not the autoencoder that {path} was trained with (that was {config['space']['vae']}); "
            "its latents mean something else. Give the original's folder.",
            "vae",
        )
    if machine.precision == "bf16":
        model.keep_weights_in(torch.bfloat16)
    return TrainedModel(
        model=model.to(machine.device).eval().requires_grad_(False),
        transport=transport,
        space=space.to(machine.device),
        data=data,
        config=config,
        step=state["step"],
        sha256=file_sha256(path),
        trained_on=state.get("trained_on"),
        intensity=intensity,
        looks=looks,
        labelled_on=state.get("labelled_on"),
    )


def _check_expected(path: str | Path, config: dict[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises InputError with all contradictions in one line."""
    known = {
        "model": config["model"]["name"],
        "num_classes": config["data"]["num_classes"],
        "image_size": config["data"]["image_size"],
    }
    wrong = [name for name, value in known.items() if expected.get(name) not in (None, value)]
    if wrong:
        contradictions = ", ".join(f"{name} {expected[name]} (the checkpoint has {known[name]})" for name in wrong)
        raise InputError(f"{path} contradicts {contradictions}. Leave it out, or give another checkpoint.", *wrong)


class ImageSampler:
    """Masks and seeds to images.

    Args:
        model: in evaluation mode, on the machine's device.
        transport: of the checkpoint.
        space: of the checkpoint, on the machine's device.
        machine: device and precision of the model's calls and the decoder's; the solver's state stays float32.
        settings: solver and guidance.
        compiled: compile the network's blocks (the model given is changed): nothing recompiles for other masks.
        before_call: called before every network call; an exception that it raises ends the drawing.
    """

    def __init__(
        self,
        model: SiT,
        transport: Transport,
        space: Space,
        machine: Machine,
        settings: SamplingSettings,
        compiled: bool = False,
        before_call: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.before_call = before_call
        self.compiled = compiled
        if compiled:
            model.compile_blocks()
        self.space = space
        self.machine = machine
        self.settings = settings
        self.transport = transport
        self.solver = create_solver(transport, settings)
        rows, columns = model.grid
        self.latent_shape = (model.in_channels, rows * model.patch_size, columns * model.patch_size)

    @property
    def nfe(self) -> int:
        """Network calls of the last batch."""
        return self.solver.nfe

    def __call__(
        self, prob_maps: Tensor, seeds: Sequence[int], batch_size: int | None = None, looks: Tensor | None = None
    ) -> Tensor:
        """One image per mask.

        Args:
            prob_maps: (n, K, H, W) class probabilities.
            seeds: n seeds, one per image; see ``image_seed``.
            batch_size: pad to this many by repeating the last image, so that all batches are of one shape.
            looks: (n, N) standardised numbers of the images' looks; None for no look.

        Returns:
            (n, C, S, S) float32 in [-1, 1] on the device. Differentiable in ``prob_maps`` in pixel space.
        """
        count = len(seeds)
        prob_maps = fill_batch(prob_maps, batch_size or count)
        seeds = [*seeds, *[seeds[-1]] * (len(prob_maps) - count)]
        condition = self._condition(prob_maps, None if looks is None else fill_batch(looks, len(prob_maps)))
        return self._decode(self._solve(self.solver, seeds, self.latent_shape, self._predict, condition)[-1])[:count]

    def samples(
        self, prob_map: Tensor, seeds: Sequence[int], batch_size: int, looks: Tensor | None = None
    ) -> list[Tensor]:
        """Images of one mask: squares or, with ``tile_overlap`` in the settings, fields of the mask's size.

        Args:
            prob_map: (K, H, W) class probabilities.
            seeds: n seeds, one per image; see ``image_seed``.
            batch_size: images, or windows of a field, that pass through the model at once.
            looks: (n, N) standardised numbers of the images' looks; None for no look.

        Returns:
            n images (C, H, W), float32 in [-1, 1], on the CPU.
        """
        if self.settings.tile_overlap is not None:
            each = [None] * len(seeds) if looks is None else list(looks)
            drawn = zip(seeds, each, strict=True)
            return [self.draw_field(prob_map, seed, batch_size, look).cpu() for seed, look in drawn]
        size = min(len(seeds), batch_size)
        images: list[Tensor] = []
        for first in range(0, len(seeds), size):
            part = slice(first, first + size)
            prob_maps = prob_map.expand(len(seeds[part]), -1, -1, -1)
            images += self(prob_maps, seeds[part], size, None if looks is None else looks[part]).cpu()
        return images

    def draw_field(self, prob_map: Tensor, seed: int, batch_size: int, look: Tensor | None = None) -> Tensor:
        """An image of any height and width, from overlapping windows of the size that the model was trained on.

        At every step of the solver the prediction is the windows' weighted mean (see ``tiling.py``). The mean of what
        the model predicts, whichever quantity that is, equals the mean of velocities: each is linear in the other.

        Args:
            prob_map: (K, H, W) class probabilities at the image's own scale.
            seed: of its noise; see ``image_seed``.
            batch_size: windows that pass through the model at once: memory follows from it and the window.
            look: (N,) standardised numbers of the look, which all windows have; None for no look.

        Returns:
            (C, H, W) float32 in [-1, 1] on the device. Differentiable in ``prob_map`` in pixel space.
        """
        states, decode = self._solve_field(self.solver, prob_map, seed, batch_size, look)
        return decode(states[-1])

    def trajectory(self, prob_map: Tensor, seed: int, batch_size: int, most: int, look: Tensor | None = None) -> Tensor:
        """How an image comes out of the noise: the solver's states as images.

        Args:
            prob_map: (K, H, W) class probabilities; with ``tile_overlap`` in the settings, of a field of any size.
            seed: of its noise; see ``image_seed``.
            batch_size: windows of a field that pass through the model at once.
            most: images to give. If there are more states, they are evenly spread, the first and the last among them.
            look: (N,) standardised numbers of the look; None for no look.

        Returns:
            (S, C, H, W) float32 in [-1, 1] on the device, the noise first and the image last.
        """
        solver = create_solver(self.transport, self.settings, trajectory=True)
        if self.settings.tile_overlap is not None:
            states, decode = self._solve_field(solver, prob_map, seed, batch_size, look)
            return torch.stack([decode(states[number]) for number in evenly(len(states), most)])
        condition = self._condition(prob_map[None], None if look is None else look[None])
        states = self._solve(solver, [seed], self.latent_shape, self._predict, condition)
        return torch.cat([self._decode(states[number]) for number in evenly(len(states), most)])

    def _solve_field(
        self, solver: Solver, prob_map: Tensor, seed: int, batch_size: int, look: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """States (S, 1, C, h, w) of a field, and what makes an image (C, H, W) of one of them."""
        (height, width), factor = prob_map.shape[-2:], self.space.factor
        side = self.latent_shape[1:]
        field = max(side[0], math.ceil(height / factor)), max(side[1], math.ceil(width / factor))
        prob_map = mirror_to(prob_map.to(self.machine.device), factor * field[0], factor * field[1])
        windows = Windows(field, side, (self._overlap(side[0]), self._overlap(side[1])))
        size = batch_size if self.compiled else 0  # compiled, the last windows fill a batch: one shape, one graph
        conditions = {}
        for first in range(0, len(windows), batch_size):
            parts = fill_batch(windows.cut(prob_map, first, batch_size, factor), size)
            conditions[first] = self._condition(parts, None if look is None else look.expand(len(parts), -1))

        def predict(x: Tensor, t: Tensor, y: dict[int, MaskCondition]) -> Tensor:
            def predict_windows(first: int, parts: Tensor) -> Tensor:
                batch = fill_batch(parts, size)
                return self._predict(batch, t.expand(len(batch)), y[first])[: len(parts)]

            return windows.mean(x[0], predict_windows, batch_size)[None]

        def decode(latents: Tensor) -> Tensor:
            with self.machine.autocast():
                return self.space.decode_field(latents[0], windows)[:, :height, :width]

        return self._solve(solver, [seed], (self.latent_shape[0], *field), predict, conditions), decode

    def _overlap(self, side: int) -> int:
        """Latent pixels that neighbouring windows of this side share at least."""
        overlap = TILE_OVERLAP if self.settings.tile_overlap is None else self.settings.tile_overlap
        return min(side - 1, math.ceil(side * overlap if overlap < 1 else overlap / self.space.factor))

    def encode(self, images: Tensor, prob_maps: Tensor, looks: Tensor | None = None) -> Tensor:
        """Real images to their noise: the probability flow ODE backwards.

        Args:
            images: (n, C, S, S) in [-1, 1].
            prob_maps: (n, K, H, W) class probabilities.
            looks: (n, N) standardised numbers of their looks; None for no look.

        Returns:
            (n, C, h, w) float32 noise; ``decode`` leads back to the images.
        """
        x1, condition = self._prepare(images, prob_maps, looks)
        return create_solver(self.transport, self.settings, reverse=True)(x1, self._predict, y=condition)[-1]

    def decode(self, noise: Tensor, prob_maps: Tensor, looks: Tensor | None = None) -> Tensor:
        """Noise (n, C, h, w), masks (n, K, H, W) and looks (n, N) to images (n, C, S, S) in [-1, 1]."""
        return self._decode(self.solver(noise, self._predict, y=self._condition(prob_maps, looks))[-1])

    def likelihood(
        self, images: Tensor, prob_maps: Tensor, seeds: Sequence[int], looks: Tensor | None = None
    ) -> LikelihoodResult:
        """Log-density of real images (or of their latents' mean) under the model, one probe per image and run.

        Args:
            images: (n, C, S, S) in [-1, 1].
            prob_maps: (n, K, H, W) class probabilities.
            seeds: n seeds of the probes.
            looks: (n, N) standardised numbers of the images' looks; None for no look.
        """
        settings = self.settings
        x1, condition = self._prepare(images, prob_maps, looks)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        solver = Sampler(self.transport).sample_ode_likelihood(
            settings.method, settings.num_steps, settings.atol, settings.rtol
        )
        return solver(x1, self._predict, noise_fn=lambda x: self._noise(generators, x.shape[1:]), y=condition)

    def _solve(
        self, solver: Solver, seeds: Sequence[int], shape: Sequence[int], predict: Callable[..., Tensor], y: Any
    ) -> Tensor:
        """Noise (B, *shape) of the seeds -> the states that the solver keeps (S, B, *shape), the end state last."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(generators, shape)
        extra = {"noise_fn": lambda x: self._noise(generators, x.shape[1:])} if self.settings.mode == "SDE" else {}
        return solver(noise, predict, y=y, **extra)

    def _prepare(self, images: Tensor, prob_maps: Tensor, looks: Tensor | None) -> tuple[Tensor, MaskCondition]:
        """Images as the model sees them, without a draw from a posterior, and the condition."""
        with self.machine.autocast():
            x1 = self.space.encode(images.to(self.machine.device), sample=False).float()
        return x1, self._condition(prob_maps, looks)

    def _condition(self, prob_maps: Tensor, looks: Tensor | None = None) -> MaskCondition:
        """All that the network needs of the masks and looks, once per image."""
        extra: dict[str, Any] = {} if looks is None else {"look": looks.to(self.machine.device)}
        with self.machine.autocast():
            return self.model.embed_mask(prob_maps.to(self.machine.device), share_rows=True, **extra)

    def _decode(self, x: Tensor) -> Tensor:
        """States (B, C, h, w) to images, in the machine's precision: the decoder costs more than a small network."""
        with self.machine.autocast():
            return self.space.decode(x)

    def _noise(self, generators: list[torch.Generator], shape: Sequence[int]) -> Tensor:
        """(B, *shape) standard normal numbers, every image's from its own generator."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(self.machine.device)

    def _predict(self, x: Tensor, t: Tensor, y: Any) -> Tensor:
        """The model under guidance; outside of the guidance interval nothing is doubled."""
        if self.before_call is not None:
            self.before_call()
        scale, (low, high) = self.settings.cfg_scale, self.settings.guidance_interval
        extra = {} if self.settings.look_scale == 1 else {"look_scale": self.settings.look_scale}
        if (low, high) != (0.0, 1.0) and not low <= float(t[0]) <= high:
            scale, extra = 1.0, {}
        with self.machine.autocast():
            return self.model.forward_with_cfg(x, t, y, scale, **extra).float()


def create_solver(
    transport: Transport, settings: SamplingSettings, reverse: bool = False, trajectory: bool = False
) -> Solver:
    """The transport's solver for these settings.

    Args:
        transport: of the checkpoint.
        settings: which solver.
        reverse: run an ODE from data to noise.
        trajectory: keep every state, not the end state alone.

    Raises:
        InputError: settings that this transport cannot be solved with.
    """
    try:
        return _solver(Sampler(transport), settings, reverse, trajectory)
    except ValueError as error:
        raise InputError(f"solver: {error}") from error


def _solver(sampler: Sampler, settings: SamplingSettings, reverse: bool, trajectory: bool) -> Solver:
    if settings.mode == "ODE":
        return sampler.sample_ode(
            sampling_method=settings.method,
            num_steps=settings.num_steps,
            atol=settings.atol,
            rtol=settings.rtol,
            reverse=reverse,
            trajectory=trajectory,
        )
    return sampler.sample_sde(
        sampling_method=settings.method,
        num_steps=settings.num_steps,
        diffusion_form=settings.diffusion_form,
        diffusion_norm=settings.diffusion_norm,
        last_step=settings.last_step,
        last_step_size=settings.last_step_size,
        trajectory=trajectory,
    )


def fill_batch(batch: Tensor, size: int) -> Tensor:
    """(n, ...) -> (size, ...): the last one repeated; a batch that is large enough stays."""
    missing = size - len(batch)
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing > 0 else batch


def mirror_to(array: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width): continued by its mirror image at the bottom and right, again and again."""
    rows, columns = (
        np.pad(np.arange(old), (0, new - old), mode="symmetric")
        for old, new in zip(array.shape[-2:], (height, width), strict=True)
    )
    return array[..., torch.from_numpy(rows)[:, None], torch.from_numpy(columns)]


def image_seed(seed: int, index: int, attempt: int = 1) -> int:
    """Seed of the noise of image ``index`` in a set drawn with ``seed``; every further attempt at it has its own.

    ``derived_seed(seed, index, 1)`` is taken: sample_ddp.py cuts windows with it.
    """
    return derived_seed(seed, index) if attempt == 1 else derived_seed(seed, index, 2, attempt)
