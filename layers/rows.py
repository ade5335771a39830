"""Distinct rows: tokens with equal class fractions have equal conditions, so their modulation is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Distinct rows are padded to a multiple of this. Then matrix products have few shapes: little is recompiled, and a row
# gives the same bits with any other rows in the batch.
ROW_MULTIPLE = 64
MOST_KEPT = 2**24  # numbers of a modulation that is kept: 64 MB in float32


class KeptModulation:
    """The latest modulation of all layers, for network calls whose conditions are equal.

    Heun's method calls the network twice at each time: at the end of a step and at the start of the next one. The
    second call gets the modulation of the first one, which has the same bits. One object serves one batch of masks, so
    the weights must not change while it is used.
    """

    def __init__(self) -> None:
        self._latest: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self, c: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor | None]:
        """Modulation of each layer for a condition c (..., D). None for each layer if nothing is kept.

        Nothing is kept on a GPU, because the comparison would wait for the GPU. Nor is a modulation of more than
        ``MOST_KEPT`` numbers.
        """
        widths = sum(layer.get_parameter("adaLN_modulation.1.bias").numel() for layer in layers)
        if c.device.type != "cpu" or c[..., 0].numel() * widths > MOST_KEPT:
            return [None] * len(layers)
        if self._latest is None or not torch.equal(self._latest[0], c):
            self._latest = c, [layer.get_submodule("adaLN_modulation")(c) for layer in layers]
        return self._latest[1]


class MaskRows(NamedTuple):
    """Distinct class fractions within each image of a batch, see :func:`mask_rows`."""

    shares: Tensor  # (R, K) float32
    row_of_token: Tensor  # (B, T) long
    image_of_row: Tensor  # (R,) long

    def to(self, device: torch.device) -> MaskRows:
        return MaskRows(*(part.to(device, non_blocking=True) for part in self))


def distinct_rows(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of class fractions (B, T, K), and the row of each token.

    Returns:
        rows (R, K), and the row of each token (B, T) long. R is a multiple of ROW_MULTIPLE: the last row is repeated.
    """
    rows, row_of_token = torch.unique(shares.flatten(0, 1), dim=0, return_inverse=True)
    padding = -len(rows) % ROW_MULTIPLE
    rows = torch.cat([rows, rows[-1:].expand(padding, -1)])
    return rows, row_of_token.view(shares.shape[:2])


def distinct_rows_of_looks(shares: Tensor, look: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`distinct_rows` for images whose conditions also differ in their looks. Images of one look share rows.

    Args:
        shares: (B, T, K) class fractions.
        look: (B, N) numbers of the look of each image.

    Returns:
        rows (R, K), the row of each token (B, T) long, and an image that has the look of each row (R,) long.
    """
    image = (look[:, None] == look).all(dim=2).float().argmax(dim=1)  # (B,) the first image with the same look
    keyed = torch.cat([image.to(shares)[:, None, None].expand(*shares.shape[:2], 1), shares], dim=2)  # (B, T, 1 + K)
    rows, row_of_token = distinct_rows(keyed)
    return rows[:, 1:], row_of_token, rows[:, 0].long()


def shared_rows(shares: Tensor, look: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Distinct rows of a batch in sampling, or all tokens as they are if the rows exceed half of the tokens.

    Args:
        shares: (B, T, K) class fractions.
        look: (B, N) numbers of the look of each image; None for no look.

    Returns:
        rows (R, K), the row of each token (B, T) long, and the image of each row (R,) long, which is None if all images
        share the rows. Without sharing: ``shares``, None and None.
    """
    image_of_row = None
    if look is None or bool((look == look[:1]).all()):
        rows, row_of_token = distinct_rows(shares)
    else:
        rows, row_of_token, image_of_row = distinct_rows_of_looks(shares, look)
    if 2 * len(rows) > shares.shape[0] * shares.shape[1]:
        return shares, None, None
    return rows, row_of_token, image_of_row


def mask_rows(class_maps: Tensor, num_classes: int, grid: tuple[int, int]) -> MaskRows:
    """Distinct class fractions within each image, for training.

    In training each image has its own time, so tokens of different images cannot share a row. Tokens share a row if all
    their class counts are equal, which is exact. The rows are found on the CPU: finding them on a GPU would wait for
    the GPU to count them. On a GPU a step then takes 0.8 to 0.9 times as long (benchmarks/speed_gpu.md). On a CPU in
    bf16 they gain nothing (benchmarks/speed_cpu.md), so they are off there.

    Args:
        class_maps: (B, H, W) class ids 0..K-1 on the CPU; H and W are multiples of the grid.
        grid: (gh, gw) tokens.

    Returns:
        Rows of all images, in the order of the images. R is a multiple of ROW_MULTIPLE: the last row is repeated.
    """
    (gh, gw), (batch, height, width) = grid, class_maps.shape
    patches = class_maps.numpy().reshape(batch, gh, height // gh, gw, width // gw)
    area = (height // gh) * (width // gw)
    counts = [(patches == k).sum(axis=(2, 4), dtype=np.int64).ravel() for k in range(num_classes)]  # K of (B T,)
    row = np.repeat(np.arange(batch), gh * gw)
    for count in counts[1:]:  # the counts of one class follow from the others
        _, first, row = np.unique(row * (area + 1) + count, return_index=True, return_inverse=True)
    first = np.pad(first, (0, -len(first) % ROW_MULTIPLE), mode="edge")
    shares = np.stack([count[first] for count in counts], axis=1) / np.float32(area)  # (R, K)
    image = first // (gh * gw)
    row_of_token = torch.from_numpy(row.reshape(batch, gh * gw))
    return MaskRows(torch.from_numpy(shares.astype(np.float32)), row_of_token, torch.from_numpy(image))


def spread_rows(rows: Tensor, row_of_token: Tensor | None) -> Tensor:
    """Row of each token: distinct rows (R, N) -> (B, T, N). Without ``row_of_token``, returns ``rows`` (B, T, N)."""
    if row_of_token is None:
        return rows
    rows = rows.contiguous()
    return SpreadRows.apply(rows, row_of_token) if rows.requires_grad else F.embedding(row_of_token, rows)


class SpreadRows(torch.autograd.Function):
    """``F.embedding`` that sums its gradient in float32: a row has many tokens, and long sums in bf16 are inexact."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_token)
        ctx.num_rows, ctx.dtype = len(rows), rows.dtype
        return F.embedding(row_of_token, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row_of_token,) = ctx.saved_tensors
        total = torch.ops.aten.embedding_dense_backward(grad.float(), row_of_token, ctx.num_rows, -1, False)
        return total.to(ctx.dtype), None
