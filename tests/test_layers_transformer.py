"""layers/transformer.py: equal to timm's layers, whose state-dict keys SiT's weights have."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import Mlp as TimmMlp
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import nn

from layers.transformer import Attention, Mlp, PatchEmbed


def same_output(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> bool:
    ours.load_state_dict(theirs.state_dict())
    return torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_timms(fused):
    ours, theirs = Attention(24, 3), TimmAttention(24, num_heads=3, qkv_bias=True)
    ours.fused_attn = theirs.fused_attn = fused
    assert same_output(ours, theirs, torch.randn(2, 5, 24))


def test_mlp_is_timms():
    theirs = TimmMlp(24, 96, act_layer=partial(nn.GELU, approximate="tanh"))
    assert same_output(Mlp(24, 96), theirs, torch.randn(2, 5, 24))


def test_patches_are_timms():
    assert same_output(PatchEmbed(4, 3, 24), TimmPatchEmbed((8, 12), 4, 3, 24), torch.randn(2, 3, 8, 12))


def test_tokens_lie_in_memory_one_after_the_other():
    """Transposed tokens had NaN gradients in compiled layers in bf16 (torch 2.14 on a CPU)."""
    assert PatchEmbed(4, 3, 24)(torch.randn(2, 3, 8, 12)).is_contiguous()
