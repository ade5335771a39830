"""A small SiT for tests of weights files, and a small checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from dataset.config import DataConfig
from engine.checkpoint import save_checkpoint
from models import SiT, build_model


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


def write_checkpoint(path: Path, data: DataConfig, step: int, looks: dict | None = None, **sizes: int) -> Path:
    """A checkpoint of a SiT for pixels with one block, whose weights are not zero."""
    model = {"name": "SiT-Ti/8", "depth": 1, "hidden_size": 32, "input_size": data.image_size, "mask_pixels": 8}
    model |= {"in_channels": data.channels, "num_classes": data.num_classes} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(model)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    config = {
        "model": model,
        "transport": {"prediction": "data"},
        "space": {"vae": "none", "factor": 1, "channels": data.channels, "fingerprint": ""},
        "data": data.to_dict(),
    }
    weights = network.state_dict()
    state = {"model": weights, "ema": weights, "opt": {}, "step": step, "config": config}
    save_checkpoint(path, state | ({} if looks is None else {"looks": looks}))
    return path
