"""Arithmetic of the network (from its sizes), and the rate of matrix products on this machine.

FLOP here: two per multiplication and addition of a matrix product or convolution, as ``torch.utils.flop_counter``
counts them (the tests compare the two); all else is left out. Of the attention's backward pass the four products of
the gradient are counted, and not the fifth one that fused kernels compute once more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from models import SiT


@dataclass(frozen=True)
class Flops:
    """FLOP of one call of the network."""

    forward: int = 0
    backward: int = 0
    modulation: int = 0  # of the forward pass: the part of the adaLN layers

    @property
    def training(self) -> int:
        return self.forward + self.backward


def linear(rows: int, inputs: int, outputs: int, input_gradient: bool = True) -> Flops:
    """A linear layer on so many rows; its backward pass has the weight's gradient and, where needed, the input's."""
    product = 2 * rows * inputs * outputs
    return Flops(product, product * (2 if input_gradient else 1))


def sit_flops(model: SiT, batch: int, rows: int | None = None, with_mask: bool = True) -> Flops:
    """FLOP of one call of the network, for images without looks.

    Args:
        batch: images B.
        rows: rows of the modulation: B T for one condition per token (the default), fewer for distinct rows, B for one
            condition per image.
        with_mask: count what depends on the masks, which sampling computes once and not at each call.
    """
    width, tokens = model.pos_embed.shape[-1], model.pos_embed.shape[1]
    every = batch * tokens
    rows = every if rows is None else rows
    hidden, heads_out = (
        layer.get_parameter(f"{name}.bias").numel()
        for layer, name in ((model.blocks[0], "mlp.fc1"), (model.final_layer, "linear"))
    )
    product = 2 * batch * tokens * tokens * width  # queries by keys, and weights by values
    block = [linear(every, width, 3 * width), linear(every, width, width), Flops(2 * product, 4 * product)]
    block += [linear(every, width, hidden), linear(every, hidden, width)]
    parts = [
        linear(every, model.in_channels * model.patch_size**2, width, input_gradient=False),
        linear(batch, model.t_embedder.frequency_embedding_size, width, input_gradient=False),
        linear(batch, width, width),
        linear(every, width, heads_out),
        *(len(model.blocks) * block),
    ]
    if model.overlap is not None:
        parts.append(linear(every, width, model.overlap.linear.out_features))
    if with_mask:
        parts.append(linear(rows, model.num_classes, width, input_gradient=False))
        if model.mask_detail is not None:
            parts.append(linear(every, model.mask_detail.proj.in_features, width, input_gradient=False))
    modulation = linear(rows, width, (6 * len(model.blocks) + 2) * width)
    parts.append(modulation)
    return Flops(sum(p.forward for p in parts), sum(p.backward for p in parts), modulation.forward)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int, seconds: float = 0.5) -> float:
    """FLOP per second of a product of two (side, side) matrices, the mean over about so many seconds."""
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    synchronize(device)
    first @ second
    synchronize(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(4):
            first @ second
        synchronize(device)
        count += 4
    return 2 * side**3 * count / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
