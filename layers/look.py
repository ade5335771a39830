"""The look of an image (colour, contrast, grain) as a part of the condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.mask import wide


class LookEmbedder(nn.Module):
    """Numbers of a look (B, N) -> (B, D), which is added to the time embedding.

    The last layer and the learned null start at zero, so that the model begins as one without looks. ``null`` stands
    for "no look", as the last row of the class table stands for "no mask".
    """

    def __init__(self, look_numbers: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(look_numbers, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.null = nn.Parameter(torch.zeros(hidden_size))

    def start_at_zero(self) -> None:
        """Weights of the last layer and the null to zero."""
        for parameter in (*self.mlp[2].parameters(), self.null):
            nn.init.zeros_(parameter)

    def forward(self, look: Tensor, drop: Tensor | None = None) -> Tensor:
        """look (B, N) standardised; drop (B,) bool, samples that lose their look, None keeps all -> (B, D)."""
        embedding = self.mlp(look.to(wide(self.null.dtype)))
        if drop is None:
            return embedding
        return torch.where(drop[:, None], self.null.to(embedding.dtype), embedding)
