"""A convolutional U-Net in SiT's place: what a user would train instead, with everything else equal.

    python benchmarks/unet_baseline.py train.py --model U-Net ...the flags of train.py...
    python benchmarks/unet_baseline.py sample_ddp.py ODE --ckpt CKPT.pt ...the flags of sample_ddp.py...

Adds U-Nets to the table of models and then runs the command. Data, transport, optimiser, average of the weights,
checkpoints and sampling are therefore those of SiT. The network is ``UNet2DModel`` of diffusers; the class
probabilities of the mask are further input channels. ``U-Net`` has about as many parameters as SiT-Ti/8.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from layers.rows import MaskRows
from models import SiT_models

COMMANDS = ("train.py", "sample.py", "sample_ddp.py")
NORM_GROUPS = 8
HEAD_WIDTH = 32
WIDTHS = {"U-Net-tiny": (16, 32), "U-Net": (32, 64, 96, 160)}  # channels, from the finest to the coarsest level


class MaskUNet(nn.Module):
    """U-Net with the interface of ``models.SiT``: the same arguments, the same calls.

    Attention is on the coarsest level only. A dropped mask is all zeros, which no probability map is.

    Args:
        widths: channels of each level; every level halves the side.
        input_size: side of the input.
        in_channels: channels C of the input.
        num_classes: number K of mask classes.
        class_dropout_prob: probability with which training drops a sample's whole mask.
        time_scale: factor on t before its sinusoids.
        ignored: arguments of SiT that a U-Net has no use for.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        input_size: int,
        in_channels: int,
        num_classes: int,
        class_dropout_prob: float,
        time_scale: float,
        patch_size: int,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.time_scale = time_scale
        self.patch_size = patch_size
        self.grid = (input_size // patch_size, input_size // patch_size)
        self.recompute = False
        plain = len(widths) - 1
        self.unet = UNet2DModel(
            sample_size=input_size,
            in_channels=in_channels + num_classes,
            out_channels=in_channels,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            norm_num_groups=NORM_GROUPS,
            attention_head_dim=HEAD_WIDTH if widths[-1] % HEAD_WIDTH == 0 else widths[-1],
        )

    def embed_mask(
        self,
        y: Tensor,
        drop: Tensor | None = None,
        share_rows: bool = False,
        rows: MaskRows | None = None,
        keep: bool = True,
    ) -> Tensor:
        """(B, K, H, W) probability map at any resolution -> (B, K, h, w) at the input's; zeros where dropped."""
        height, width = (self.patch_size * length for length in self.grid)
        y = F.adaptive_avg_pool2d(y.float(), (height, width))
        return y if drop is None else y * ~drop[:, None, None, None]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None, rows: MaskRows | None = None
    ) -> Tensor:
        """x (B, C, h, w), t (B,), y (B, K, H, W) -> (B, C, h, w)."""
        drop = self.draw_dropped(len(y), y.device) if drop is None else drop
        return self.unet(torch.cat([x, self.embed_mask(y, drop)], dim=1), self.time_scale * t).sample

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance, as SiT's."""
        if cfg_scale == 1.0:
            return self(x, t, y)
        y = self.embed_mask(y)
        both = torch.cat([y, torch.zeros_like(y)])
        masked, null = self(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return null + cfg_scale * (masked - null)

    def draw_dropped(self, batch_size: int, device: torch.device) -> Tensor | None:
        """(B,) bool: which samples lose their mask in this training step; None outside of training."""
        if not self.training or self.class_dropout_prob == 0:
            return None
        return torch.rand(batch_size, device=device) < self.class_dropout_prob

    def compile_blocks(self) -> None:
        self.unet.compile()

    def use_plain_attention(self, on: bool = True) -> None:
        """SiT's choice of an attention kernel; there is nothing to choose here."""

    def rest_plain_patches(self) -> None:
        """SiT's output layer; a U-Net has no patches."""

    def keep_weights_in(self, dtype: torch.dtype) -> MaskUNet:
        """Round the weights of convolutions and matrix products once."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        return self


def add_unets() -> None:
    """Put the U-Nets into the table of models.

    ``patch_size`` is the number that has to divide the side. ``hidden_size`` is only compared with the numbers of a
    patch, to choose what to predict: it is large enough for the velocity.
    """
    for name, widths in WIDTHS.items():
        side = 2 ** (len(widths) - 1)
        builder: Any = partial(MaskUNet, widths=widths, patch_size=side, hidden_size=4 * side**2)
        SiT_models[name] = builder  # the table is typed for SiTs


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"{__doc__}\nThe first word must be one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    add_unets()
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
