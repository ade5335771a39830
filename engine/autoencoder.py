"""Convert images to the space of the model and back: latents of a diffusers autoencoder, or pixels.

Only this file knows a latent scale. All other files see latents of about unit variance, or pixels in [-1, 1].
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.faults import short_line
from common.plain import WRONG, check_fields, read_json
from engine.tiling import Tiles

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

logger = logging.getLogger(__name__)
HUB_AUTOENCODERS = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
HUB_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
}  # of both
PIXEL_SPACE = "none"
COUNTS = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")  # of a config.json
MOST_CHANNELS = 2**13
MOST_BLOCKS = 8  # each but the first halves the sides
NOT_LOADABLE = (*WRONG, OSError, RuntimeError)  # what diffusers raises for damaged files


class PixelSpace(nn.Module):
    """The identity: the model works on pixels. No download, no reconstruction loss."""

    name = PIXEL_SPACE
    factor = 1
    fingerprint = ""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, images: Tensor, sample: bool = True) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> the same."""
        return images

    def decode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, float32 in [-1, 1]."""
        return x.float().clamp(-1, 1)

    def decode_field(self, x: Tensor, tiles: Tiles) -> Tensor:
        """(C, H, W) -> the same, float32 in [-1, 1]."""
        return self.decode(x)


class LatentSpace(nn.Module):
    """A diffusers ``AutoencoderKL``. Scale, shift and channel count come from its own config.

    Args:
        vae: the autoencoder, in evaluation mode, without gradients.
        name: what the user gave for it: a folder or a name of HUB_AUTOENCODERS.
    """

    chunk_size = 8  # images per call of the autoencoder; limits its memory and does not change the result

    def __init__(self, vae: AutoencoderKL, name: str) -> None:
        super().__init__()
        self.vae = vae
        self.name = name
        self.channels: int = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scale: float = vae.config.scaling_factor
        self.shift: float = getattr(vae.config, "shift_factor", None) or 0.0
        self.fingerprint = fingerprint(vae)

    @torch.inference_mode()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents, each (B, C, H / f, W / f)."""
        posteriors = [self.vae.encode(chunk).latent_dist for chunk in images.split(self.chunk_size)]
        # Contiguous, because torch.randn_like depends on strides, and strides would depend on the number of chunks.
        mean = torch.cat([posterior.mean for posterior in posteriors]).contiguous()
        std = torch.cat([posterior.std for posterior in posteriors]).contiguous()
        return (mean - self.shift) * self.scale, std * self.scale

    def encode(self, images: Tensor, sample: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, H / f, W / f), drawn from the posterior or its mean."""
        mean, std = self.moments(images)
        latents = self.draw(mean, std) if sample else mean
        return latents.clone()  # a normal tensor: autograd refuses inference tensors

    @staticmethod
    def draw(mean: Tensor, std: Tensor) -> Tensor:
        """A random draw from the posterior. Shapes as in ``moments``."""
        return mean + std * torch.randn_like(std)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, C, H / f, W / f) -> images (B, 3, H, W), float32 in [-1, 1]. Differentiable."""
        latents = x / self.scale + self.shift
        images = [self.vae.decode(chunk).sample.float().clamp(-1, 1) for chunk in latents.split(self.chunk_size)]
        return torch.cat(images)

    def decode_field(self, x: Tensor, tiles: Tiles) -> Tensor:
        """Latents (C, H / f, W / f) of any size -> image (3, H, W), float32 in [-1, 1], by overlapping tiles.

        The tile limits the memory. A field is never decoded as a whole, even if it would fit: norms and attention of
        the decoder see their whole input, so the image would depend on the memory of the machine.
        """
        image = tiles.mean(x, lambda _, latents: self.decode(latents), self.chunk_size, scale=self.factor)
        return image.clamp(-1, 1)  # the mean may exceed the range by rounding


Space = PixelSpace | LatentSpace


class SpaceShape(NamedTuple):
    """Shape of the model's input: sides are ``factor`` times smaller than the image's, with ``channels`` channels."""

    factor: int
    channels: int


def load_space(vae: str, channels: int = 3) -> Space:
    """The space that ``vae`` names.

    Args:
        vae: "none" for pixels, "ema" or "mse" for the published Stable Diffusion autoencoders, or the folder of any
            diffusers autoencoder. If the files are on disk, the hub is not asked.
        channels: image channels. For an autoencoder, its own number of channels.

    Raises:
        InputError: see ``check_space``; the weights are damaged; or they are not on disk and cannot be downloaded.
    """
    check_space(vae, channels)
    if vae == PIXEL_SPACE:
        return PixelSpace(channels)
    return LatentSpace(_from_hub(vae) if vae in HUB_AUTOENCODERS else _from_folder(Path(vae)), vae)


def check_space(vae: str, channels: int = 3) -> SpaceShape:
    """The shape of the space that ``vae`` names. Loads no weights.

    Args:
        vae: see ``load_space``.

    Raises:
        InputError: there is no such folder, it holds no autoencoder, or the number of channels differs.
    """
    if vae == PIXEL_SPACE:
        return SpaceShape(1, channels)
    config = HUB_CONFIG if vae in HUB_AUTOENCODERS else _read_config(Path(vae))
    takes = config.get("in_channels", 3)
    if channels != takes:
        raise InputError(
            f"`in_channels` {channels}: the autoencoder {vae} takes images of {takes} channel(s). Give {takes}, or "
            f"work on pixels: `vae` {PIXEL_SPACE}."
        )
    return SpaceShape(2 ** (len(config.get("block_out_channels", (64,))) - 1), config.get("latent_channels", 4))


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a diffusers autoencoder."""
    names = ", ".join(HUB_AUTOENCODERS)
    mend = f"Give the folder of a diffusers autoencoder (config.json and its weights), one of {names}"
    if not folder.is_dir():
        raise InputError(f"`vae` {folder}: no such folder. {mend}, or {PIXEL_SPACE} to work on pixels.")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"`vae` {folder}: {path} does not exist. {mend}, or {PIXEL_SPACE} to work on pixels.")
    try:
        config = check_fields(_Shape, read_json(path, mend))
        _check_counts(config)
    except ValueError as error:
        raise _not_loadable(folder, error) from error
    return config


@dataclass(frozen=True)
class _Shape:
    """Types of the settings of a diffusers autoencoder that decide its shape."""

    in_channels: int
    out_channels: int
    latent_channels: int
    layers_per_block: int
    norm_num_groups: int
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    scaling_factor: float
    shift_factor: float | None


def _check_counts(config: dict[str, Any]) -> None:
    """Raise ValueError if a number of channels, layers or groups is out of bounds, or there are no blocks."""
    blocks = config.get("block_out_channels", (64,))
    counts = [(name, config.get(name, 1)) for name in COUNTS] + [("block_out_channels", count) for count in blocks]
    for name, count in counts:
        if not 1 <= count <= MOST_CHANNELS:
            raise ValueError(f"{name} is {count}")
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if not 1 <= len(config.get(name, blocks)) == len(blocks) <= MOST_BLOCKS:
            raise ValueError(f"{name} has {len(config.get(name, blocks))} entries")


def _not_loadable(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"`vae` {folder}: not a diffusers autoencoder that can be loaded ({short_line(error)}). The folder needs "
        "config.json and diffusion_pytorch_model.safetensors."
    )


@dataclass(frozen=True)
class SpaceTypes:
    """Types of what :func:`space_config` returns."""

    vae: str
    factor: int
    channels: int
    fingerprint: str | None


def space_config(space: Space) -> dict[str, Any]:
    """Entry of the space in a checkpoint, in plain types. It identifies the autoencoder."""
    return {"vae": space.name, "factor": space.factor, "channels": space.channels, "fingerprint": space.fingerprint}


def fingerprint(vae: AutoencoderKL) -> str:
    """First 16 hex digits of the SHA-256 of scale, shift and weights. Identifies an autoencoder."""
    digest = hashlib.sha256(repr((vae.config.scaling_factor, getattr(vae.config, "shift_factor", None))).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _from_folder(folder: Path) -> AutoencoderKL:
    try:
        return _load(str(folder), local_files_only=True)
    except NOT_LOADABLE as error:
        raise _not_loadable(folder, error) from error


def _from_hub(vae: str) -> AutoencoderKL:
    repository = HUB_AUTOENCODERS[vae]
    try:
        return _load(repository, local_files_only=True)
    except NOT_LOADABLE:
        logger.info("%s is not on disk, or damaged; asking the hub", repository)
    try:
        return _load(repository, local_files_only=False)
    except NOT_LOADABLE as error:
        raise InputError(
            f"`vae` {vae}: {repository} is neither on disk nor to be had from the hub ({short_line(error)}). Download "
            "that repository where there is a network and give its folder: `vae` FOLDER; or `vae` none for pixels."
        ) from error


def _load(source: str, local_files_only: bool) -> AutoencoderKL:
    """Load weights from safetensors only, because a pickle could run code."""
    from diffusers import AutoencoderKL  # takes seconds to import, and pixel space does not need it
    from diffusers.utils import logging as words_of_diffusers

    before = words_of_diffusers.get_verbosity()
    words_of_diffusers.set_verbosity_error()  # else it lists all tensors that are missing
    try:
        vae, info = AutoencoderKL.from_pretrained(
            source,
            use_safetensors=True,
            local_files_only=local_files_only,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    finally:
        words_of_diffusers.set_verbosity(before)
    if info["missing_keys"]:  # diffusers would continue with random weights
        raise OSError(f"the weights lack {info['missing_keys'][0]}")
    if not vae.config.scaling_factor:
        raise OSError("scaling_factor in config.json is 0 or missing")
    return vae.eval().requires_grad_(False)


def check_same_space(space: Space, saved: dict[str, Any]) -> None:
    """The autoencoder of a continued run may have moved, but must be the one it began with.

    Raises:
        InputError: it is another one, and its latents mean something else.
    """
    now = space_config(space)
    if any(now[name] != value for name, value in saved.items() if name != "vae"):
        raise InputError(
            f"`vae` {now['vae']}: not the autoencoder that this run began with (that was {saved['vae']}); give the "
            "original's folder, or start anew with another `run_name`."
        )
