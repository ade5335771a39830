"""A small SiT for tests of weights files."""

from __future__ import annotations

import torch

from models import SiT


def tiny(**changes) -> SiT:
    """A small SiT with random numbers in every tensor (a fresh one is zero where adaLN-Zero starts)."""
    sizes = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    model = SiT(**(sizes | changes))
    for name, parameter in model.named_parameters():
        if "pos_embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
