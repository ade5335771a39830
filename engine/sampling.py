"""Turn a checkpoint, masks and seeds into images. All commands use this file.

An image depends only on the checkpoint, the settings, its mask and look, the seed and its index. Therefore each image
has its own random generator on the CPU, all batches are padded to the same size, and the solver has fixed steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.disk import file_sha256
from common.errors import InputError
from common.faults import short_line
from common.plain import WRONG
from common.randomness import derived_seed
from common.spread import evenly
from dataset.config import DataConfig
from dataset.gray import SourceIntensity
from dataset.looks import Looks
from engine.autoencoder import Space, load_space
from engine.checkpoint import build_trained, naming_checkpoint, read_checkpoint
from engine.machine import Machine
from engine.tiling import Tiles
from layers.mask import MaskCondition
from models import SiT
from transport import ODE_METHOD, ODE_STEPS, TIME_SHIFT, LikelihoodResult, Sampler, Transport, create_transport
from transport.sampler import OdeSolver, SdeSolver


@dataclass(frozen=True)
class SamplingSettings:
    """Solver and guidance: all that decides an image beside checkpoint, mask, look, seed and index."""

    mode: str = "ODE"
    method: str = ODE_METHOD
    num_steps: int = ODE_STEPS
    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    atol: float = 1e-6
    rtol: float = 1e-3
    diffusion_form: str = "SBDM"
    diffusion_norm: float = 1.0
    last_step: str = "Tweedie"
    last_step_size: float | None = None
    tile_overlap: float | None = None  # of tiles of a large field: below 1 a fraction of the side, else pixels
    look_scale: float = 1.0
    time_shift: float = TIME_SHIFT

    def to_dict(self) -> dict[str, Any]:
        """The fields that the mode uses, as plain types."""
        unused: tuple[str, ...] = SDE_ONLY if self.mode == "ODE" else ODE_ONLY
        unused += ("look_scale",) if self.look_scale == 1 else ()  # sets without looks do not have it
        return {name: value for name, value in asdict(self).items() if name not in unused}


Solver = OdeSolver | SdeSolver  # noise, model and its arguments -> states (S, B, ...)
TILE_OVERLAP = 0.25
ODE_ONLY = ("atol", "rtol", "time_shift")
SDE_ONLY = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint that is ready for sampling."""

    model: SiT
    transport: Transport
    space: Space
    data: DataConfig
    config: dict[str, Any]
    step: int
    sha256: str
    trained_on: list[str] | None  # SHA-256 of every training image, if known
    intensity: SourceIntensity | None  # gray values of the training images, if known
    looks: Looks | None = None  # of the training images, if the model knows looks
    labelled_on: list[str] | None = None  # SHA-256 of the images whose labels it may know, if known
    learned_mask_type: str | None = None  # how training read its masks; unknown in checkpoints of earlier versions

    @property
    def mask_type(self) -> str:
        """How training read its masks; "auto" if the checkpoint does not say it."""
        return self.learned_mask_type or self.config.get("train", {}).get("mask_type") or "auto"

    @property
    def image_types(self) -> tuple[str, ...]:
        """Types of gray values of the training images. Empty if they are unknown."""
        return self.intensity.dtypes if self.intensity else ()

    @property
    def normalize_masks(self) -> bool:
        """Whether training divided soft masks by their sum. Other readers of such masks must do the same."""
        return bool(self.config.get("train", {}).get("normalize_masks"))


def load_trained(
    path: str | Path,
    machine: Machine,
    *,
    raw_weights: bool = False,
    vae: str | None = None,
    expected: Mapping[str, Any] | None = None,
    cfg_scales: Sequence[float] = (),
) -> TrainedModel:
    """Load model, transport, space and data configuration of a checkpoint.

    Args:
        path: checkpoint of train.py, or its exported weights.
        machine: device and precision of the model.
        raw_weights: use the last weights instead of the averaged ones.
        vae: present place of the autoencoder. None: the place that training used.
        expected: values of ``model``, ``num_classes`` and ``image_size`` that the user gave. None: not given.
        cfg_scales: guidance scales that will be used.

    Raises:
        InputError: the checkpoint is unusable, contradicts ``expected``, or has another autoencoder.
    """
    state = read_checkpoint(path)
    if raw_weights and not state["model"]:
        raise InputError(f"{path} holds averaged weights only: leave `raw_weights` out, or give a checkpoint (.pt).")
    config, notes = state["config"], {name: state.get(name) or None for name in ("intensity", "looks")}
    try:
        model = build_trained(config["model"], state["model" if raw_weights else "ema"])
        transport, data = create_transport(**config["transport"]), DataConfig.from_dict(config["data"])
        intensity = notes["intensity"] and SourceIntensity.from_dict(notes["intensity"])
        looks = notes["looks"] and Looks.from_dict(notes["looks"])
    except (*WRONG, RuntimeError) as error:
        raise InputError(f"{path}: its configuration is not as train.py writes it ({short_line(error)}).") from error
    _check_expected(path, config["model"]["name"], data, expected or {})
    if config["model"].get("class_dropout_prob") == 0 and any(scale != 1 for scale in cfg_scales):
        raise InputError(
            f"{path} always saw its masks in training (mask_dropout 0), so guidance has nothing to subtract: give "
            "`cfg_scale` 1."
        )
    with naming_checkpoint(Path(path)):
        space = load_space(vae or config["space"]["vae"], data.channels)
    if space.fingerprint != config["space"]["fingerprint"]:
        raise InputError(
            f"`vae` {space.name}: not the autoencoder that {path} was trained with (that was "
            f"{config['space']['vae']}); its latents mean something else. Give the original's folder."
        )
    _check_same_shape(path, model, space, data)
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
        learned_mask_type=state.get("mask_type"),
    )


def _check_same_shape(path: str | Path, model: SiT, space: Space, data: DataConfig) -> None:
    """Raise InputError if the sections of a configuration are not of one run."""
    side = model.grid[0] * model.patch_size * space.factor
    has = {"channels": model.in_channels, "num_classes": model.num_classes, "image_size": side}
    asked = {"channels": space.channels, "num_classes": data.num_classes, "image_size": data.image_size}
    other = [name for name in has if has[name] != asked[name]]
    wrong = [f"{name} {has[name]} of the model and {asked[name]} of the data" for name in other]
    if wrong:
        raise InputError(f"{path}: its configuration is not as train.py writes it ({', '.join(wrong)}).")


def _check_expected(path: str | Path, name: str, data: DataConfig, expected: Mapping[str, Any]) -> None:
    """Raise InputError with all contradictions in one line."""
    known = {"model": name, "num_classes": data.num_classes, "image_size": data.image_size}
    wrong = [name for name, value in known.items() if expected.get(name) not in (None, value)]
    if wrong:
        contradictions = ", ".join(f"`{name}` {expected[name]} (the checkpoint has {known[name]})" for name in wrong)
        raise InputError(f"{path} contradicts {contradictions}. Leave it out, or give another checkpoint.")


class ImageSampler:
    """Makes images from masks and seeds.

    Args:
        model: in evaluation mode, on the machine's device.
        space: space of the checkpoint, on the machine's device.
        machine: device and precision of model and decoder. The solver's state is always float32.
        compiled: compile the blocks of ``model``, in place. Other masks need no new compilation.
        before_call: called with the time t before every network call. Its exceptions end the sampling.
    """

    def __init__(
        self,
        model: SiT,
        transport: Transport,
        space: Space,
        machine: Machine,
        settings: SamplingSettings,
        compiled: bool = False,
        before_call: Callable[[float], None] | None = None,
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
        """Sample one image per mask.

        Args:
            prob_maps: (n, K, H, W) class probabilities.
            seeds: n seeds, one per image; see ``image_seed``.
            batch_size: pad to this size by repeating the last image, so that all batches have one shape.
            looks: (n, N) standardised look numbers of each image; None for no look.

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
        """Sample images of one mask: squares or, with ``tile_overlap`` in the settings, fields of the mask's size.

        Args:
            prob_map: (K, H, W) class probabilities.
            seeds: n seeds, one per image; see ``image_seed``.
            batch_size: images, or tiles of a field, per network call.
            looks: (n, N) standardised look numbers of each image; None for no look.

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
        """Sample an image of any height and width, from overlapping tiles of the training size.

        At every step of the solver, the prediction is the weighted mean of the tiles (see ``tiling.py``). Averaging any
        kind of prediction equals averaging velocities, because each is linear in the other.

        Args:
            prob_map: (K, H, W) class probabilities at the scale of the image.
            seed: seed of the noise; see ``image_seed``.
            batch_size: tiles per network call. It limits the memory.
            look: (N,) standardised look numbers, the same for all tiles; None for no look.

        Returns:
            (C, H, W) float32 in [-1, 1] on the device. Differentiable in ``prob_map`` in pixel space.
        """
        states, decode = self._solve_field(self.solver, prob_map, seed, batch_size, look)
        return decode(states[-1])

    def trajectory(self, prob_map: Tensor, seed: int, batch_size: int, most: int, look: Tensor | None = None) -> Tensor:
        """States of the solver as images: how an image forms from noise.

        Args:
            prob_map: (K, H, W) class probabilities. With ``tile_overlap`` in the settings, a field of any size.
            seed: seed of the noise; see ``image_seed``.
            batch_size: tiles of a field per network call.
            most: most images to return, evenly spread, the first and the last state included.
            look: (N,) standardised look numbers; None for no look.

        Returns:
            (S, C, H, W) float32 in [-1, 1] on the device: first the noise, last the image.
        """
        shown = evenly(self.settings.num_steps + 1, most)
        solver = create_solver(self.transport, self.settings, trajectory=shown)
        if self.settings.tile_overlap is not None:
            states, decode = self._solve_field(solver, prob_map, seed, batch_size, look)
            return torch.stack([decode(state) for state in states])
        condition = self._condition(prob_map[None], None if look is None else look[None])
        states = self._solve(solver, [seed], self.latent_shape, self._predict, condition)
        return torch.cat([self._decode(state) for state in states])

    def _solve_field(
        self, solver: Solver, prob_map: Tensor, seed: int, batch_size: int, look: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """States (S, 1, C, h, w) of a field, and a function from a state to an image (C, H, W)."""
        (height, width), factor = prob_map.shape[-2:], self.space.factor
        side = self.latent_shape[1:]
        field = max(side[0], math.ceil(height / factor)), max(side[1], math.ceil(width / factor))
        prob_map = mirror_to(prob_map.to(self.machine.device), factor * field[0], factor * field[1])
        tiles = Tiles(field, side, (self._overlap(side[0]), self._overlap(side[1])))
        size = batch_size if self.compiled else 0  # a compiled model gets full batches only: one shape, one graph
        conditions = {}
        for first in range(0, len(tiles), batch_size):
            parts = fill_batch(tiles.cut(prob_map, first, batch_size, factor), size)
            own = None if look is None else look.expand(len(parts), -1)
            conditions[first] = self._condition(parts, own, keep=len(tiles) <= batch_size)

        def predict(x: Tensor, t: Tensor, y: dict[int, MaskCondition]) -> Tensor:
            def predict_tiles(first: int, parts: Tensor) -> Tensor:
                batch = fill_batch(parts, size)
                return self._predict(batch, t.expand(len(batch)), y[first])[: len(parts)]

            return tiles.mean(x[0], predict_tiles, batch_size)[None]

        def decode(latents: Tensor) -> Tensor:
            with self.machine.autocast():
                return self.space.decode_field(latents[0], tiles)[:, :height, :width]

        return self._solve(solver, [seed], (self.latent_shape[0], *field), predict, conditions), decode

    def _overlap(self, side: int) -> int:
        """Least overlap of neighbouring tiles of this side, in latent pixels."""
        overlap = TILE_OVERLAP if self.settings.tile_overlap is None else self.settings.tile_overlap
        return min(side - 1, math.ceil(side * overlap if overlap < 1 else overlap / self.space.factor))

    def encode(self, images: Tensor, prob_maps: Tensor, looks: Tensor | None = None) -> Tensor:
        """Turn real images into noise, by the probability flow ODE backwards.

        Args:
            images: (n, C, S, S) in [-1, 1].
            prob_maps: (n, K, H, W) class probabilities.
            looks: (n, N) standardised look numbers of each image; None for no look.

        Returns:
            (n, C, h, w) float32 noise. ``decode`` turns it back into images.

        Raises:
            InputError: the settings are those of an SDE, which has no way back.
        """
        if self.settings.mode != "ODE":
            raise InputError(f"only an ODE turns images into noise; these settings are of an {self.settings.mode}")
        x1, condition = self._prepare(images, prob_maps, looks)
        return create_solver(self.transport, self.settings, reverse=True)(x1, self._predict, y=condition)[-1]

    def decode(self, noise: Tensor, prob_maps: Tensor, looks: Tensor | None = None) -> Tensor:
        """Noise (n, C, h, w), masks (n, K, H, W) and looks (n, N) -> images (n, C, S, S) in [-1, 1]."""
        return self._decode(self.solver(noise, self._predict, y=self._condition(prob_maps, looks))[-1])

    def likelihood(
        self, images: Tensor, prob_maps: Tensor, seeds: Sequence[int], looks: Tensor | None = None
    ) -> LikelihoodResult:
        """Log-density of real images (or of the means of their latents), estimated with one probe per image.

        Args:
            images: (n, C, S, S) in [-1, 1].
            prob_maps: (n, K, H, W) class probabilities.
            seeds: n seeds of the probes.
            looks: (n, N) standardised look numbers of each image; None for no look.
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
        """Solve from the noise (B, *shape) of the seeds. Returns the stored states (S, B, *shape)."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(generators, shape)
        extra = {"noise_fn": lambda x: self._noise(generators, x.shape[1:])} if self.settings.mode == "SDE" else {}
        return solver(noise, predict, y=y, **extra)

    def _prepare(self, images: Tensor, prob_maps: Tensor, looks: Tensor | None) -> tuple[Tensor, MaskCondition]:
        """Images in the space of the model (means of latents), and the condition."""
        with self.machine.autocast():
            x1 = self.space.encode(images.to(self.machine.device), sample=False).float()
        return x1, self._condition(prob_maps, looks)

    def _condition(self, prob_maps: Tensor, looks: Tensor | None = None, keep: bool = True) -> MaskCondition:
        """Embed masks and looks, once for all network calls. ``keep`` as in ``SiT.embed_mask``."""
        extra: dict[str, Any] = {} if looks is None else {"look": looks.to(self.machine.device)}
        with self.machine.autocast():
            return self.model.embed_mask(prob_maps.to(self.machine.device), share_rows=True, keep=keep, **extra)

    def _decode(self, x: Tensor) -> Tensor:
        """States (B, C, h, w) -> images, in the precision of the machine."""
        with self.machine.autocast():
            return self.space.decode(x)

    def _noise(self, generators: list[torch.Generator], shape: Sequence[int]) -> Tensor:
        """(B, *shape) standard normal numbers. Each image has its own generator."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(self.machine.device)

    def _predict(self, x: Tensor, t: Tensor, y: Any) -> Tensor:
        """The prediction of the model with guidance. Outside of the guidance interval, without guidance."""
        self.machine.progress()
        if self.before_call is not None:
            self.before_call(float(t[0]))
        scale, (low, high) = self.settings.cfg_scale, self.settings.guidance_interval
        extra = {} if self.settings.look_scale == 1 else {"look_scale": self.settings.look_scale}
        if (low, high) != (0.0, 1.0) and not is_in_interval(float(t[0]), low, high):
            scale, extra = 1.0, {}
        with self.machine.autocast():
            return self.model.forward_with_cfg(x, t, y, scale, **extra).float()


def is_in_interval(t: float, low: float, high: float) -> bool:
    """Whether t lies in [low, high], as numbers of 32 bits: the solver's 0.6 is above the user's in 64 bits."""
    return bool(np.float32(low) <= np.float32(t) <= np.float32(high))


def create_solver(
    transport: Transport,
    settings: SamplingSettings,
    reverse: bool = False,
    trajectory: bool | Collection[int] = False,
) -> Solver:
    """The transport's solver for these settings.

    Raises:
        InputError: the settings do not fit the transport.
    """
    sampler, names = Sampler(transport), ODE_ONLY if settings.mode == "ODE" else SDE_ONLY
    own: dict[str, Any] = {name: getattr(settings, name) for name in names}
    own |= {"num_steps": settings.num_steps, "trajectory": trajectory}
    try:
        if settings.mode == "ODE":
            return sampler.sample_ode(settings.method, reverse=reverse, **own)
        return sampler.sample_sde(settings.method, **own)
    except ValueError as error:
        raise InputError(f"solver: {error}") from error


def fill_batch(batch: Tensor, size: int) -> Tensor:
    """(n, ...) -> (size, ...) by repeating the last element. A batch that is large enough stays."""
    missing = size - len(batch)
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing > 0 else batch


def mirror_to(array: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width), padded by mirroring at the bottom and right, as often as needed."""
    rows, columns = (
        np.pad(np.arange(old), (0, new - old), mode="symmetric")
        for old, new in zip(array.shape[-2:], (height, width), strict=True)
    )
    return array[..., torch.from_numpy(rows)[:, None], torch.from_numpy(columns)]


def image_seed(seed: int, index: int, attempt: int = 1) -> int:
    """Seed of the noise of image ``index`` in a set with ``seed``. Each attempt has its own seed.

    No attempt uses ``derived_seed(seed, index, 1)``, because the synthetic set crops windows with it.
    """
    return derived_seed(seed, index) if attempt == 1 else derived_seed(seed, index, 2, attempt)
