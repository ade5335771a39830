"""Embeddings of the mask: the class fractions of each patch, and where in the patch the classes lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype for times and masks: the dtype of the weights, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


class MaskEmbedder(nn.Module):
    """Probability map (B, K, H, W) at any resolution -> one class embedding per token (B, T, D).

    The last of the K + 1 rows of ``embedding_table`` is the learned null condition of classifier-free guidance
    (Ho and Salimans 2022, arXiv 2207.12598). It exists even if training drops no masks.
    """

    def __init__(self, num_classes: int, hidden_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.num_classes = num_classes
        self.grid = grid

    def pool(self, y: Tensor) -> Tensor:
        """Class fractions of each patch: (B, K, H, W) -> (B, T, K), at least float32."""
        y = y.to(wide(self.embedding_table.weight.dtype))
        return F.adaptive_avg_pool2d(y, self.grid).flatten(2).transpose(1, 2)

    def embed(self, shares: Tensor) -> Tensor:
        """Weighted sum of the class embeddings: class fractions (..., K) -> (..., D), at least float32."""
        with torch.autocast(shares.device.type, enabled=False):
            return shares @ self.embedding_table.weight[: self.num_classes].to(shares.dtype)

    def null(self) -> Tensor:
        """(D,) embedding of "no mask"."""
        return self.embedding_table.weight[self.num_classes].to(wide(self.embedding_table.weight.dtype))

    def forward(self, y: Tensor) -> Tensor:
        return self.embed(self.pool(y))


class MaskDetail(nn.Module):
    """Linear embedding of the mask pixels of each patch minus their mean. It tells where in the patch the cells lie.

    It starts at zero, so that a new model gives the output of plain SiT. It has no bias and is exactly zero for a patch
    of one class. So constant masks give the output of the class-conditional SiT.
    """

    def __init__(self, num_classes: int, hidden_size: int, grid: tuple[int, int], mask_pixels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(num_classes * mask_pixels**2, hidden_size, bias=False)
        self.grid = grid
        self.mask_pixels = mask_pixels

    def forward(self, y: Tensor) -> Tensor:
        """(B, K, H, W) at any resolution -> (B, T, D)."""
        (gh, gw), p = self.grid, self.mask_pixels
        y = y.to(wide(self.proj.weight.dtype))
        y = F.adaptive_avg_pool2d(y, (gh * p, gw * p))  # (B, K, gh p, gw p)
        y = y.unflatten(2, (gh, p)).unflatten(4, (gw, p))  # (B, K, gh, p, gw, p)
        patches = y.permute(0, 2, 4, 1, 3, 5).reshape(y.shape[0], gh * gw, y.shape[1], p * p)  # (B, T, K, p p)
        patches = patches - patches[..., :1]  # exact zeros if all pixels are equal: a mean alone may round
        patches = patches - patches.mean(-1, keepdim=True)
        return self.proj(patches.flatten(2))
