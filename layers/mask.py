"""Embeddings of the mask: the class fractions of each patch, and where in the patch the classes lie."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.rows import ROW_MULTIPLE, KeptModulation


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


@dataclass(frozen=True)
class MaskCondition:
    """Embedded masks and looks of a batch. They are computed once and reused in every network call.

    Attributes:
        embedding: (B, T, D) mask embedding of each token, or (R, D) its distinct rows if ``row_of_token`` is set.
        detail: (B, T, D) addition to the input tokens; None for a model without mask detail.
        row_of_token: (B, T) long, row of ``embedding`` of each token; None if each token has its own embedding.
        image_of_row: (R,) long, image of each row; the row takes the time t and the look of this image. None if all
            images share the rows; then they must have the same look and the same t, as in a solver step.
        look: (B, D) embedding of the look of each image; None for no look.
        kept: keeps the modulation of the latest call in sampling; None in training.
    """

    embedding: Tensor
    detail: Tensor | None
    row_of_token: Tensor | None = None
    image_of_row: Tensor | None = None
    look: Tensor | None = None
    kept: KeptModulation | None = None

    def with_null(self, null: Tensor) -> MaskCondition:
        """Condition of 2 B images: the B images with their masks, then without masks. Looks are kept in both.

        Args:
            null: (D,) embedding of "no mask".
        """
        detail = None if self.detail is None else torch.cat([self.detail, torch.zeros_like(self.detail)])
        look = None if self.look is None else torch.cat([self.look, self.look])
        if self.row_of_token is None:
            embedding = torch.cat([self.embedding, null.expand_as(self.embedding)])
            return replace(self, embedding=embedding, detail=detail, look=look)
        images, device = len(self.row_of_token), self.row_of_token.device
        nulls = 1 if self.image_of_row is None else images  # null rows: one for all images, or one for each
        padded = nulls + -nulls % ROW_MULTIPLE
        embedding = torch.cat([self.embedding, null.expand(padded, -1)])
        null_of_image = len(self.embedding) + torch.arange(images, device=device).clamp(max=nulls - 1)  # (B,)
        row_of_token = torch.cat([self.row_of_token, null_of_image[:, None].expand_as(self.row_of_token)])
        image_of_row = self.image_of_row
        if image_of_row is not None:
            image_of_null = images + torch.arange(padded, device=device).clamp(max=images - 1)
            image_of_row = torch.cat([image_of_row, image_of_null])
        return MaskCondition(embedding, detail, row_of_token, image_of_row, look, self.kept)
