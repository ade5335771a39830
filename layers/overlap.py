"""Output patches that overlap and blend, so that no grid of patches shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Overlap(nn.Module):
    """Output layer whose patches overlap: each token also writes into the neighbouring patches.

    For each pixel, output = shift + scale * detail of the noisy input. Each token gives shift and scale in a window of
    about twice the side of its patch. The weight of a window falls linearly from its middle to zero at its edge, and
    the weighted windows are added. So the output changes gradually from one token to the next. The weights of each
    pixel sum to 1, also at the edges of the image, where fewer windows overlap.

    The scale is needed because a velocity contains the noise of every pixel, and a token only sees the noise of its own
    patch. With shifts alone, noise would remain where a neighbour writes, again in a grid. The detail is the input
    minus its interpolated patch means, so that the scale does not change the brightness.

    The layer starts at zero. ``SHIFT_GAIN`` makes the shifts learn faster than other layers (benchmarks/grid.md).
    """

    SHIFT_GAIN = 4.0  # a power of two: exact in every dtype
    window: Tensor
    reached: Tensor

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.patch_size, self.margin = grid, patch_size, patch_size // 2
        self.side = patch_size + 2 * self.margin  # pixels of a window: 2 p, or 2 p - 1 for odd p
        self.linear = nn.Linear(hidden_size, 2 * out_channels * self.side**2)  # shifts, then scales
        fade = 1 - (torch.arange(self.side) - (self.side - 1) / 2).abs() / patch_size
        window = (fade[:, None] * fade).flatten()  # (side side,)
        reached = self.add_up(window[None, :, None].repeat(1, 1, grid[0] * grid[1]))  # 1, less at the image's edges
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("reached", reached, persistent=False)  # (1, 1, H, W)

    def add_up(self, windows: Tensor) -> Tensor:
        """Sum of all windows, cut off at the edges of the image: (B, C side side, T) -> (B, C, H, W)."""
        size = (self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)
        return F.fold(windows, size, self.side, padding=self.margin, stride=self.patch_size)

    def forward(self, tokens: Tensor, noisy: Tensor) -> Tensor:
        """tokens (B, T, D), noisy (B, C, H, W) -> (B, C, H, W), or (B, 2 C, H, W) if sigma is learned."""
        windows = self.linear(tokens).unflatten(2, (-1, len(self.window))) * self.window  # (B, T, 2 C, side side)
        field = self.add_up(windows.flatten(2).transpose(1, 2)) / self.reached
        shift, scale = field.chunk(2, dim=1)
        means = F.avg_pool2d(noisy, self.patch_size)
        detail = noisy - F.interpolate(means, noisy.shape[2:], mode="bilinear", align_corners=False)
        return self.SHIFT_GAIN * shift + scale * detail.repeat(1, shift.shape[1] // detail.shape[1], 1, 1)
