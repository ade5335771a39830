"""Embedding of the look of an image: its colour, contrast and grain as numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.mask import wide


class LookEmbedder(nn.Module):
    """Look numbers (B, N) -> embedding (B, D), which the model adds to the time embedding.

    ``null`` is the learned embedding of "no look". The last layer and ``null`` start at zero, so that a new model gives
    the output of a model without looks.
    """

    def __init__(self, look_numbers: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(look_numbers, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.null = nn.Parameter(torch.zeros(hidden_size))

    def start_at_zero(self) -> None:
        """Set the last layer and ``null`` to zero."""
        for parameter in (*self.mlp[2].parameters(), self.null):
            nn.init.zeros_(parameter)

    def forward(self, look: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embedding of standardised looks.

        Args:
            look: (B, N) standardised numbers.
            drop: (B,) bool, true for samples that get ``null``. None keeps all looks.

        Returns:
            (B, D).
        """
        embedding = self.mlp(look.to(wide(self.null.dtype)))
        if drop is None:
            return embedding
        return torch.where(drop[:, None], self.null.to(embedding.dtype), embedding)
