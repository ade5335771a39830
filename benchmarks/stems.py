"""Patch embeddings that see more than their own patch, for benchmarks/equal_minutes.py.

Both add to the plain patch embedding and start at zero, so the network starts as SiT and keeps SiT's keys.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2

from torch import Tensor, nn

from layers.transformer import PatchEmbed
from models import SiT

STEM_WIDTH = 32  # channels after the first convolution; each further one doubles them


def convolutions(patch_size: int, in_channels: int, hidden_size: int) -> nn.Module:
    """3 x 3 convolutions that halve the side until a patch is one token (Xiao et al. 2021, arXiv 2106.14881)."""
    layers: list[nn.Module] = []
    channels = in_channels
    for level in range(int(log2(patch_size))):
        layers += [nn.Conv2d(channels, STEM_WIDTH << level, 3, stride=2, padding=1), nn.SiLU()]
        channels = STEM_WIDTH << level
    return nn.Sequential(*layers, nn.Conv2d(channels, hidden_size, 1))


def wider_window(patch_size: int, in_channels: int, hidden_size: int) -> nn.Module:
    """One convolution that sees half a patch more on each side."""
    return nn.Sequential(nn.Conv2d(in_channels, hidden_size, 2 * patch_size, patch_size, patch_size // 2))


class StemmedPatchEmbed(PatchEmbed):
    """The plain patch embedding plus that of a stem: image (B, C, H, W) -> tokens (B, T, D)."""

    def __init__(self, stem: nn.Module, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__(patch_size, in_channels, hidden_size)
        self.stem = stem

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = super().forward(x)
        return tokens + self.stem(x).flatten(2).transpose(1, 2)


def stemmed_sit(
    make_stem: Callable[[int, int, int], nn.Module],
    *,
    hidden_size: int,
    patch_size: int,
    in_channels: int,
    **config: object,
) -> SiT:
    """SiT with a stem; a model config names its other arguments."""
    model = SiT(hidden_size=hidden_size, patch_size=patch_size, in_channels=in_channels, **config)  # type: ignore[arg-type]
    sizes = (patch_size, in_channels, hidden_size)
    model.x_embedder = StemmedPatchEmbed(make_stem(*sizes), *sizes)
    model.initialize_weights()
    for parameter in list(model.x_embedder.stem.children())[-1].parameters():
        nn.init.zeros_(parameter)
    return model
