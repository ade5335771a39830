"""Sine-cosine embeddings (Vaswani et al. 2017, arXiv 1706.03762) of the time, and of where a patch lies."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from layers.mask import wide


class TimestepEmbedder(nn.Module):
    """Time (B,) -> (B, D): sinusoids and a two-layer MLP.

    SiT uses t in [0, 1], but the periods of the sinusoids were designed for 0 to 1000. ``time_scale`` is a factor on t.
    Published weights need 1.
    """

    frequency_embedding_size = 256
    max_period = 10_000.0

    def __init__(self, hidden_size: int, time_scale: float = 1.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.time_scale = time_scale

    def sinusoids(self, t: Tensor) -> Tensor:
        """(B,) -> (B, frequency_embedding_size) float32 (float64 in a float64 model): cosines, then sines."""
        half, dtype = self.frequency_embedding_size // 2, wide(next(self.mlp.parameters()).dtype)
        exponent = torch.arange(half, dtype=dtype, device=t.device) / half
        frequencies = torch.exp(-math.log(self.max_period) * exponent)  # (half,)
        angles = (self.time_scale * t.to(dtype))[:, None] * frequencies  # (B, half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(t))


def position_embedding(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """Fixed two-dimensional sine-cosine embedding (1, T, D). The first half of the channels is for columns, the second
    for rows, as in DiT's weights.
    """
    quarter = hidden_size // 4
    frequency = 1.0 / 10_000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = (index.reshape(-1, 1) * frequency for index in np.indices(grid))  # each (T, D / 4)
    parts = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]
