"""The one place that turns a checkpoint, masks and seeds into images; train.py, sample.py and sample_ddp.py call it.

An image depends on the checkpoint, its mask, the seed and its index, and on nothing else: its noise comes from a
generator of its own on the CPU, every batch is padded to the same size, and the solver's steps are fixed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder import Space, load_space
from checkpoint import file_sha256, read_checkpoint
from data import DataConfig
from errors import InputError
from intensity import SourceIntensity
from models import MaskCondition, SiT, build_model
from train_utils import Machine, derived_seed
from transport import ODE_METHODS, LikelihoodResult, Sampler, Transport, create_transport


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

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> SamplingSettings:
        """Settings of a parsed command line; flags of the other mode keep their defaults.

        Raises:
            InputError: a guidance interval that is empty, or a flag that has no effect beside the others.
        """
        low, high = args.guidance_interval
        if low >= high:
            raise InputError(f"--guidance-interval {low:g} {high:g}: the first time must be below the second.")
        if (low, high) != (0.0, 1.0) and args.cfg_scale == 1.0:
            raise InputError("--guidance-interval has no effect at --cfg-scale 1: give a scale other than 1.")
        solver = {name: getattr(args, name, None) for name in ODE_ONLY + SDE_ONLY}
        solver["num_steps"] = args.num_sampling_steps or (250 if args.mode == "SDE" else None)
        adaptive = args.mode == "ODE" and ODE_METHODS[args.sampling_method].adaptive
        idle = ["num_steps"] if adaptive else [name for name in ODE_ONLY if solver[name] is not None]
        for name in idle:
            if solver[name] is not None:
                flag = "--num-sampling-steps" if adaptive else f"--{name}"
                kind = "an adaptive" if adaptive else "a fixed-step"
                raise InputError(f"{flag} has no effect on {args.sampling_method}, {kind} solver: leave it out.")
        if getattr(args, "last_step", None) == "None" and args.last_step_size is not None:
            raise InputError("--last-step-size has no effect on --last-step None: leave it out.")
        given = {name: value for name, value in solver.items() if value is not None}
        return cls(
            mode=args.mode,
            method=args.sampling_method,
            cfg_scale=args.cfg_scale,
            guidance_interval=(low, high),
            **given,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, the fields that the mode uses."""
        unused = SDE_ONLY if self.mode == "ODE" else ODE_ONLY
        return {name: value for name, value in asdict(self).items() if name not in unused}


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


def load_trained(args: argparse.Namespace, machine: Machine) -> TrainedModel:
    """Model, transport, space and data configuration, all as the checkpoint says.

    Args:
        args: ``ckpt``, ``raw_weights``, ``vae`` and the flags that must agree with the checkpoint.
        machine: where the model goes.

    Raises:
        InputError: the checkpoint cannot be used, a flag contradicts it, or the autoencoder is another one.
    """
    state = read_checkpoint(args.ckpt)
    config = state["config"]
    check_against_checkpoint(args, config)
    space = load_space(args.vae or config["space"]["vae"], config["data"]["channels"])
    if space.fingerprint != config["space"]["fingerprint"]:
        raise InputError(
            f"--vae {space.name}: not the autoencoder that {args.ckpt} was trained with (that was "
            f"{config['space']['vae']}); its latents mean something else. Give the original's folder."
        )
    model = build_model(config["model"])
    model.load_state_dict(state["model" if args.raw_weights else "ema"])
    return TrainedModel(
        model=model.to(machine.device).eval().requires_grad_(False),
        transport=create_transport(**config["transport"]),
        space=space.to(machine.device),
        data=DataConfig.from_dict(config["data"]),
        config=config,
        step=state["step"],
        sha256=file_sha256(args.ckpt),
        trained_on=state.get("trained_on"),
        intensity=SourceIntensity.from_dict(state["intensity"]) if state.get("intensity") else None,
    )


def check_against_checkpoint(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Flags that repeat what the checkpoint knows may not contradict it.

    Raises:
        InputError: all contradictions in one line.
    """
    known = {
        "model": config["model"]["name"],
        "num_classes": config["data"]["num_classes"],
        "image_size": config["data"]["image_size"],
    }
    wrong = [
        f"--{name.replace('_', '-')} {getattr(args, name)} (the checkpoint has {value})"
        for name, value in known.items()
        if getattr(args, name, None) not in (None, value)
    ]
    if wrong:
        raise InputError(f"{args.ckpt} contradicts {', '.join(wrong)}. Leave the flag out, or give another checkpoint.")


class ImageSampler:
    """Masks and seeds to images.

    Args:
        model: in evaluation mode, on the machine's device.
        transport: of the checkpoint.
        space: of the checkpoint, on the machine's device.
        machine: device and precision of the model's calls and the decoder's; the solver's state stays float32.
        settings: solver and guidance.
        compiled: run the network through torch.compile: one graph with guidance, one without, whatever the masks.
    """

    def __init__(
        self,
        model: SiT,
        transport: Transport,
        space: Space,
        machine: Machine,
        settings: SamplingSettings,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.compiled = compiled
        self._guided = torch.compile(model.forward_with_cfg, fullgraph=True) if compiled else model.forward_with_cfg
        self.space = space
        self.machine = machine
        self.settings = settings
        self.transport = transport
        self.solver = create_solver(transport, settings)
        self.latent_shape = (model.in_channels, *(side * model.patch_size for side in model.grid))

    @property
    def nfe(self) -> int:
        """Network calls of the last batch."""
        return self.solver.nfe

    def __call__(self, prob_maps: Tensor, seeds: Sequence[int], batch_size: int | None = None) -> Tensor:
        """One image per mask.

        Args:
            prob_maps: (n, K, H, W) class probabilities.
            seeds: n seeds, one per image; see ``image_seed``.
            batch_size: pad to this many by repeating the last image, so that all batches are of one shape.

        Returns:
            (n, C, S, S) float32 in [-1, 1] on the device. Differentiable in ``prob_maps`` in pixel space.
        """
        count = len(seeds)
        padding = max(0, (batch_size or count) - count)
        seeds = [*seeds, *[seeds[-1]] * padding]
        prob_maps = torch.cat([prob_maps, prob_maps[-1:].expand(padding, -1, -1, -1)])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(generators, self.latent_shape)
        condition = self._condition(prob_maps)
        extra = {"noise_fn": lambda x: self._noise(generators, x.shape[1:])} if self.settings.mode == "SDE" else {}
        states = self.solver(noise, self._predict, y=condition, **extra)  # (1, B, C, H, W)
        return self._decode(states[-1])[:count]

    def encode(self, images: Tensor, prob_maps: Tensor) -> Tensor:
        """Real images to their noise: the probability flow ODE backwards.

        Args:
            images: (n, C, S, S) in [-1, 1].
            prob_maps: (n, K, H, W) class probabilities.

        Returns:
            (n, C, h, w) float32 noise; ``decode`` leads back to the images.
        """
        x1, condition = self._prepare(images, prob_maps)
        return create_solver(self.transport, self.settings, reverse=True)(x1, self._predict, y=condition)[-1]

    def decode(self, noise: Tensor, prob_maps: Tensor) -> Tensor:
        """Noise (n, C, h, w) and masks (n, K, H, W) to images (n, C, S, S) in [-1, 1]."""
        _, condition = self._prepare(None, prob_maps)
        return self._decode(self.solver(noise, self._predict, y=condition)[-1])

    def likelihood(self, images: Tensor, prob_maps: Tensor, seeds: Sequence[int]) -> LikelihoodResult:
        """Log-density of real images (or of their latents' mean) under the model, one probe per image and run.

        Args:
            images: (n, C, S, S) in [-1, 1].
            prob_maps: (n, K, H, W) class probabilities.
            seeds: n seeds of the probes.
        """
        settings = self.settings
        x1, condition = self._prepare(images, prob_maps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        solver = Sampler(self.transport).sample_ode_likelihood(
            settings.method, settings.num_steps, settings.atol, settings.rtol
        )
        return solver(x1, self._predict, noise_fn=lambda x: self._noise(generators, x.shape[1:]), y=condition)

    def _prepare(self, images: Tensor | None, prob_maps: Tensor) -> tuple[Tensor | None, MaskCondition]:
        """Images as the model sees them, without a draw from a posterior, and the masks' condition."""
        with self.machine.autocast():
            x1 = None if images is None else self.space.encode(images.to(self.machine.device), sample=False).float()
        return x1, self._condition(prob_maps)

    def _condition(self, prob_maps: Tensor) -> MaskCondition:
        """All that the network needs of the masks, once per image."""
        with self.machine.autocast():
            condition = self.model.embed_mask(prob_maps.to(self.machine.device), share_rows=True)
        if self.compiled and condition.row_of_token is not None:
            torch._dynamo.mark_dynamic(condition.embedding, 0)  # else every new number of distinct rows recompiles
        return condition

    def _decode(self, x: Tensor) -> Tensor:
        """States (B, C, h, w) to images, in the machine's precision: the decoder costs more than a small network."""
        with self.machine.autocast():
            return self.space.decode(x)

    def _noise(self, generators: list[torch.Generator], shape: Sequence[int]) -> Tensor:
        """(B, *shape) standard normal numbers, every image's from its own generator."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(self.machine.device)

    def _predict(self, x: Tensor, t: Tensor, y: Any) -> Tensor:
        """The model under guidance; outside of the guidance interval nothing is doubled."""
        scale, (low, high) = self.settings.cfg_scale, self.settings.guidance_interval
        if (low, high) != (0.0, 1.0) and not low <= float(t[0]) <= high:
            scale = 1.0
        with self.machine.autocast():
            return self._guided(x, t, y, scale).float()


def create_solver(transport: Transport, settings: SamplingSettings, reverse: bool = False) -> Callable[..., Tensor]:
    """The transport's solver for these settings; ``reverse`` runs an ODE from data to noise."""
    sampler = Sampler(transport)
    if settings.mode == "ODE":
        return sampler.sample_ode(
            sampling_method=settings.method,
            num_steps=settings.num_steps,
            atol=settings.atol,
            rtol=settings.rtol,
            reverse=reverse,
        )
    return sampler.sample_sde(
        sampling_method=settings.method,
        num_steps=settings.num_steps,
        diffusion_form=settings.diffusion_form,
        diffusion_norm=settings.diffusion_norm,
        last_step=settings.last_step,
        last_step_size=settings.last_step_size,
    )


def image_seed(seed: int, index: int, attempt: int = 1) -> int:
    """Seed of the noise of image ``index`` in a set drawn with ``--seed``; every further attempt at it has its own.

    ``derived_seed(seed, index, 1)`` is taken: sample_ddp.py cuts windows with it.
    """
    return derived_seed(seed, index) if attempt == 1 else derived_seed(seed, index, 2, attempt)
