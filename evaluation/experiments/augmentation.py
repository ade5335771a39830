"""Strong augmentation for segmenters: turns, zoom, elastic bending, brightness, contrast, colour, blur and noise.

Every arm of the utility experiment gets it, because a lab would use it before it makes synthetic images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ZOOM = 1.25  # largest factor on lengths, and its inverse the smallest
BEND_POINTS, BEND = 5, 0.05  # control points per side; standard deviation of their shift, as a share of the side
GAMMA, GAIN, OFFSET, CHANNEL_GAIN = 0.25, 0.2, 0.1, 0.08  # standard deviations
MOST_NOISE = 0.06  # standard deviation, of gray values in [0, 1]
BLUR_SHARE, MOST_BLUR = 0.3, 1.2  # share of the examples, pixels
BLUR_RADIUS = 3


def augment(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random change of every example; pixels and targets move together.

    Args:
        images: (B, C, S, S) float32 in [-1, 1].
        targets: (B, T, S, S) uint8 maps of ids, moved by nearest neighbour.
        generator: of the CPU; all draws come from it.

    Returns:
        images and targets of the same shapes and ranges.
    """
    images, targets = move(images, targets, sampling_grid(len(images), images.shape[-1], generator))
    return change_gray(images, generator), targets


def sampling_grid(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Where each new pixel comes from: a free rotation, mirror and zoom, then a smooth elastic shift.

    Returns:
        (B, S, S, 2) float32, x and y in [-1, 1], as ``torch.nn.functional.grid_sample`` takes it.
    """
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    zoom = ZOOM ** (2 * torch.rand(count, generator=generator) - 1)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    zero = torch.zeros(count)
    matrix = torch.stack([mirror * cosine, -sine, zero, mirror * sine, cosine, zero], dim=1).view(count, 2, 3)
    grid = F.affine_grid(matrix, [count, 1, side, side], align_corners=False)
    shift = BEND * torch.randn(count, 2, BEND_POINTS, BEND_POINTS, generator=generator)
    smooth = F.interpolate(shift, (side, side), mode="bicubic", align_corners=True)
    return grid + smooth.permute(0, 2, 3, 1)


def move(images: Tensor, targets: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Images bilinear, targets by nearest neighbour; what lies outside is mirrored at the border."""
    grid = grid.to(images.device)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    labels = F.grid_sample(targets.float(), grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return moved, labels.round().to(targets.dtype)


def change_gray(images: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma, gain and offset of all channels, a gain of each, blur of some examples, and noise. Range [-1, 1]."""
    count, channels = images.shape[:2]

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator).to(images.device)

    gray = images.add(1).div(2).clamp(0, 1)
    gray = gray ** torch.exp(GAMMA * draw(1, 1, 1))
    gray = gray * torch.exp(GAIN * draw(1, 1, 1) + CHANNEL_GAIN * draw(channels, 1, 1)) + OFFSET * draw(1, 1, 1)
    gray = blur(gray, generator)
    noise = MOST_NOISE * torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    gray = gray + noise * draw(*images.shape[1:])
    return gray.clamp(0, 1).mul(2).sub(1)


def blur(gray: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur of a random share of the examples, all by the same width."""
    sigma = max(0.2, MOST_BLUR * float(torch.rand((), generator=generator)))
    chosen = (torch.rand(len(gray), generator=generator) < BLUR_SHARE).to(gray.device)
    if not chosen.any():
        return gray
    places = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=gray.device, dtype=gray.dtype)
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).repeat(gray.shape[1], 1, 1, 1)  # (C, 1, 1, 2 r + 1)
    part = F.pad(gray[chosen], (BLUR_RADIUS,) * 4, mode="replicate")
    part = F.conv2d(part, weights, groups=gray.shape[1])
    part = F.conv2d(part, weights.transpose(2, 3), groups=gray.shape[1])
    blurred = gray.clone()
    blurred[chosen] = part
    return blurred
