"""SiT backbone conditioned per patch on a segmentation map, and the registry of its sizes.

A Scalable Interpolant Transformer (Ma et al. 2024, arXiv 2401.08740) is a diffusion transformer (Peebles and Xie 2023,
arXiv 2212.09748) whose blocks are modulated by ``c = time embedding + class embedding`` (adaLN-Zero). Here the class
embedding of every patch is the mean of the class embeddings of the mask pixels under it, so ``c`` differs per token:

    prob_map (B, K, H, W) -> average pooling to the token grid -> weighted sum of K class embeddings -> (B, T, D)

So a constant mask of class k gives exactly the output of the class-conditional SiT for label k. Pooling gives the cell
fraction of a patch but not its location. Therefore the input tokens also receive a linear embedding of the mask pixels
of the patch minus their mean (``mask_detail``). It is exactly zero for patches of one class.

Arguments and state-dict keys are SiT's; published SiT weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.look import LookEmbedder
from layers.mask import MaskCondition, MaskDetail, MaskEmbedder
from layers.overlap import Overlap
from layers.rows import KeptModulation, MaskRows, shared_rows, spread_rows
from layers.sinusoids import TimestepEmbedder, position_embedding
from layers.transformer import Attention, Mlp, PatchEmbed

MOST_TOKENS_UNFUSED = 512
MOST_TOKENS = 2**17  # a longer sequence is a mistake, or a file made to fill the memory


def modulate(x: Tensor, shift: Tensor, scale: Tensor, row_of_token: Tensor | None) -> Tensor:
    """x (B, T, D) with a shift and a scale per token (B, T, D), per image (B, 1, D), or per row (R, D)."""
    return x * spread_rows(1 + scale, row_of_token) + spread_rows(shift, row_of_token)


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: the condition of each token gives shift, scale and gate of both halves."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Tensor, c: Tensor, row_of_token: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D), c (B, T, D) or (R, D) with ``row_of_token`` (B, T) -> (B, T, D).

        ``modulation`` (B, T, 6 D) or (R, 6 D) is that of c, if it is known.
        """
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        # Each part is spread to tokens where it is used: (B, T, D) fits the cache of a CPU, (B, T, 6 D) does not.
        attended = self.attn(modulate(self.norm1(x), shift_attn, scale_attn, row_of_token))
        x = x + spread_rows(gate_attn, row_of_token) * attended
        changed = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp, row_of_token))
        return x + spread_rows(gate_mlp, row_of_token) * changed


class FinalLayer(nn.Module):
    """Modulated output layer: tokens (B, T, D) -> patches (B, T, p p C) and the modulated tokens (B, T, D)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: Tensor, c: Tensor, row_of_token: Tensor | None = None, modulation: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        shift, scale = (self.adaLN_modulation(c) if modulation is None else modulation).chunk(2, dim=-1)
        tokens = modulate(self.norm_final(x), shift, scale, row_of_token)
        return self.linear(tokens), tokens


class SiT(nn.Module):
    """Transformer that predicts velocity, score, noise or data of a noisy image (or latent), given its mask.

    Args:
        input_size: side of the input in pixels (or latent pixels), or (H, W) if it is not square.
        patch_size: side of a patch; divides the input size.
        in_channels: channels C of the input.
        hidden_size: width D.
        depth: number of blocks.
        num_heads: attention heads; divides D.
        mlp_ratio: width of a block's MLP over D.
        class_dropout_prob: probability in [0, 1] with which training drops a sample's whole mask.
        num_classes: number K of mask classes.
        learn_sigma: the network has 2 C output channels, of which the first C are used (as in published weights).
        mask_pixels: mask pixels per token side that ``mask_detail`` sees (patch size x autoencoder factor); 0 = none.
        time_scale: factor on t before its sinusoids; 1 for published weights.
        patch_overlap: neighbouring patches of the output overlap and blend, so that no grid shows.
        look_numbers: count N of numbers that describe the look of an image; 0 = a model without looks.
        look_dropout_prob: probability in [0, 1] with which training drops a sample's look.
    """

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        mask_pixels: int = 0,
        time_scale: float = 1.0,
        patch_overlap: bool = False,
        look_numbers: int = 0,
        look_dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"input size {height} x {width} is not divisible by the patch size {patch_size}")
        if height * width > MOST_TOKENS * patch_size**2:
            raise ValueError(f"input size {height} x {width} gives above {MOST_TOKENS} patches of side {patch_size}")
        if hidden_size % 4 or hidden_size % num_heads:  # sines and cosines of rows and columns; equal heads
            raise ValueError(f"hidden size {hidden_size} is not divisible by 4 and by the {num_heads} heads")
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.look_dropout_prob = look_dropout_prob
        self.learn_sigma = learn_sigma
        self.recompute = False  # store only the input of each block, and compute the block again in the backward pass
        self.compiled = False
        self.grid = (height // patch_size, width // patch_size)
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, time_scale=time_scale)
        self.y_embedder = MaskEmbedder(num_classes, hidden_size, self.grid)
        self.mask_detail = MaskDetail(num_classes, hidden_size, self.grid, mask_pixels) if mask_pixels else None
        self.register_buffer("pos_embed", position_embedding(hidden_size, self.grid))  # (1, T, D), not learned
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        self.overlap = Overlap(hidden_size, patch_size, out_channels, self.grid) if patch_overlap else None
        self.look_embedder = LookEmbedder(look_numbers, hidden_size) if look_numbers else None
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform weights, zero biases, small normal embeddings, and zeros in the layers that start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.get_parameter("proj.bias"))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.get_parameter("mlp.0.weight"), std=0.02)
        nn.init.normal_(self.t_embedder.get_parameter("mlp.2.weight"), std=0.02)
        zero_layers = [layer.get_submodule("adaLN_modulation.1") for layer in (*self.blocks, self.final_layer)]
        zero_layers += [self.final_layer.linear]
        zero_layers += [self.mask_detail.proj] if self.mask_detail is not None else []
        zero_layers += [self.overlap.linear] if self.overlap is not None else []
        for layer in zero_layers:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        if self.look_embedder is not None:
            self.look_embedder.start_at_zero()

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (B, T, p p C), ordered rows, columns, channels -> (B, C, H, W)."""
        (gh, gw), p = self.grid, self.patch_size
        patches = patches.reshape(patches.shape[0], gh, gw, p, p, -1)  # (B, gh, gw, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, gh * p, gw * p)

    def embed_mask(
        self,
        y: Tensor,
        drop: Tensor | None = None,
        share_rows: bool = False,
        rows: MaskRows | None = None,
        look: Tensor | None = None,
        drop_look: Tensor | None = None,
        keep: bool = True,
    ) -> MaskCondition:
        """Compute everything that depends on masks and looks but not on x or t.

        Args:
            y: (B, K, H, W) probability map at any resolution.
            drop: (B,) bool, samples that lose their whole mask; None keeps all.
            rows: result of ``mask_rows`` for y, in training: only these rows are modulated.
            share_rows: keep only the distinct rows of the mask embedding, which is exact. This is for sampling, where
                all images have the same t. A hard binary mask has at most p p + 1 distinct rows, so the modulation of a
                whole batch costs about as much as that of one image. Only images of one look share rows. Has no effect
                if rows exceed half the tokens, or if y needs gradients.
            look: (B, N) standardised look numbers of each image; None for no look.
            drop_look: (B,) bool, samples that lose their look; None keeps all.
            keep: with ``share_rows``, keep the latest modulation for the next network call. That takes up to 64 MB, so
                the many parts of a large field keep none.

        Raises:
            ValueError: y does not have K channels, or the model knows no looks.
        """
        if y.ndim != 4 or y.shape[1] != self.num_classes:
            raise ValueError(f"masks have shape {tuple(y.shape)}; expected (B, {self.num_classes}, H, W)")
        if look is not None and self.look_embedder is None:
            raise ValueError("the model knows no looks (look_numbers 0)")
        shares: Tensor  # class fractions: (B, T, K) of each token, or (R, K) of each row
        row_of_token: Tensor | None = None
        image_of_row: Tensor | None = None
        if rows is not None:
            shares, row_of_token, image_of_row = rows
        elif share_rows and drop is None and not y.requires_grad:
            shares, row_of_token, image_of_row = shared_rows(self.y_embedder.pool(y), look)
        else:
            shares = self.y_embedder.pool(y)
        embedding = self.y_embedder.embed(shares)  # (B, T, D) or (R, D)
        detail = self.mask_detail(y) if self.mask_detail is not None else None  # (B, T, D)
        if drop is not None:
            dropped = drop[:, None] if image_of_row is None else drop[image_of_row]  # (B, 1) or (R,)
            embedding = torch.where(dropped[..., None], self.y_embedder.null(), embedding)
            detail = None if detail is None else detail * ~drop[:, None, None]
        look_embedding = None
        if look is not None and self.look_embedder is not None:
            look_embedding = self.look_embedder(look, drop_look)  # (B, D)
        kept = KeptModulation() if share_rows and keep else None
        return MaskCondition(embedding, detail, row_of_token, image_of_row, look_embedding, kept)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | MaskCondition,
        drop: Tensor | None = None,
        rows: MaskRows | None = None,
        look: Tensor | None = None,
        drop_look: Tensor | None = None,
    ) -> Tensor:
        """Prediction for noisy inputs.

        Args:
            x: (B, C, H, W) points on the path.
            t: (B,) times in [0, 1]; 0 is noise, 1 is data.
            y: (B, K, H', W') probability maps at any resolution, or the result of ``embed_mask``.
            drop: (B,) bool, samples that lose their whole mask; None draws them at random in training.
            rows: see ``embed_mask``.
            look: (B, N) standardised look numbers of each image; None for no look, or if y is a result of
                ``embed_mask``.
            drop_look: (B,) bool, samples that lose their look; None draws them at random in training.

        Returns:
            (B, C, H, W).
        """
        if isinstance(y, Tensor):
            drop = self.draw_dropped(len(y), y.device) if drop is None else drop
            if look is not None and drop_look is None:
                drop_look = self.draw_look_dropped(len(y), y.device)
            y = self.embed_mask(y, drop=drop, rows=rows, look=look, drop_look=drop_look)
        noisy, x = x, self.x_embedder(x) + self.pos_embed  # (B, T, D)
        if y.detail is not None:
            x = x + y.detail
        c = self._time_look_and_mask(t, y)  # (B, T, D), or (R, D) for rows
        layers = [*self.blocks, self.final_layer]
        modulation: Sequence[Tensor | None] = [None] * len(layers)
        if y.kept is not None and not (torch.is_grad_enabled() or self.compiled):
            modulation = y.kept(c, layers)
        for block, own in zip(self.blocks, modulation, strict=False):
            if self.recompute and self.training:
                x = checkpoint(block, x, c, y.row_of_token, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, y.row_of_token, own)  # (B, T, D)
        patches, tokens = self.final_layer(x, c, y.row_of_token, modulation[-1])
        x = self.unpatchify(patches)  # (B, C or 2 C, H, W)
        if self.overlap is not None:
            x = x + self.overlap(tokens, noisy)
        return x[:, : self.in_channels]

    def _time_look_and_mask(self, t: Tensor, y: MaskCondition) -> Tensor:
        """What modulates the blocks, the sum of three embeddings: (B, T, D) for each token, or (R, D) for each row."""
        t_emb = self.t_embedder(t)  # (B, D)
        if self.look_embedder is not None:
            t_emb = t_emb + (self.look_embedder.null if y.look is None else y.look)
        if y.row_of_token is None:
            return t_emb[:, None] + y.embedding
        shared = y.image_of_row is None  # all images have the same time and look; else, each row those of its image
        c = (t_emb[:1] if shared else t_emb[y.image_of_row]) + y.embedding
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(c, 0)  # once for all R
        return c

    def compile_blocks(self) -> None:
        """Compile the blocks and the final layer.

        All blocks share one graph, so this takes seconds instead of minutes. Each block is compiled by itself, so that
        several processes can exchange its gradients during the rest of the backward pass.
        """
        self.compiled = True
        for module in (*self.blocks, self.final_layer):
            module.compile(fullgraph=True)

    def rest_plain_patches(self) -> None:
        """Freeze SiT's own output layer at zero for training with overlapping patches.

        Otherwise it would learn to write patches side by side again. If it has weights (published ones), it keeps
        learning.
        """
        layer = self.final_layer.linear
        layer.requires_grad_(self.overlap is None or bool(layer.weight.any()))

    def use_plain_attention(self, on: bool = True) -> None:
        """Compute attention without the fused kernel, for training in bf16 on a CPU.

        There, the backward pass of the fused kernel is slow (benchmarks/speed_cpu.md). Above ``MOST_TOKENS_UNFUSED``
        tokens it stays on, because it needs less memory.
        """
        fused = not on or self.pos_embed.shape[1] > MOST_TOKENS_UNFUSED
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.fused_attn = fused

    def keep_weights_in(self, dtype: torch.dtype) -> SiT:
        """Round the weights of the matrix products to this dtype once, for sampling.

        Autocast would round them at every call. The output under autocast has the same bits, in less time and memory.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        return self

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor | MaskCondition, cfg_scale: float, look_scale: float = 1.0
    ) -> Tensor:
        """Classifier-free guidance on all channels: null + cfg_scale (masked - null), both in one call of size 2 B.

        Scale 1 is the conditional model, at no extra cost. ``look_scale`` adds guidance on the look only:
        (look_scale - 1) (masked - masked without look), with one more call.

        Returns:
            (B, C, H, W).
        """
        if cfg_scale == look_scale == 1.0:
            return self(x, t, y)
        y = self.embed_mask(y) if isinstance(y, Tensor) else y
        if cfg_scale == 1.0:
            guided = masked = self(x, t, y)
        else:
            masked, null = self(torch.cat([x, x]), torch.cat([t, t]), y.with_null(self.y_embedder.null())).chunk(2)
            guided = null + cfg_scale * (masked - null)
        if look_scale == 1.0 or y.look is None:
            return guided
        return guided + (look_scale - 1) * (masked - self(x, t, replace(y, look=None, kept=None)))

    def draw_dropped(self, batch_size: int, device: torch.device) -> Tensor | None:
        """Samples that lose their mask in this training step, (B,) bool; None outside of training."""
        if not self.training or self.class_dropout_prob == 0:
            return None
        return torch.rand(batch_size, device=device) < self.class_dropout_prob

    def draw_look_dropped(self, batch_size: int, device: torch.device) -> Tensor | None:
        """Samples that lose their look in this training step, (B,) bool; None outside of training."""
        return torch.rand(batch_size, device=device) < self.look_dropout_prob if self.training else None


SIZES = {
    # name: depth, width, heads
    "Ti": (4, 256, 4),  # for a CPU: at equal time ahead of 12 x 192 (benchmarks/nuclei_64px_cpu.md)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8, 16)
SiT_models: dict[str, partial[SiT]] = {
    f"SiT-{size}/{patch_size}": partial(SiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch_size)
    for size, (depth, width, heads) in SIZES.items()
    for patch_size in PATCH_SIZES
}


def patch_size(name: str) -> int:
    """Side of a patch of a registered model, in pixels (or latent pixels)."""
    return SiT_models[name].keywords["patch_size"]


def model_width(name: str) -> int:
    """Width D of a registered model's tokens."""
    return SiT_models[name].keywords["hidden_size"]


def build_model(config: dict[str, Any]) -> SiT:
    """Build the model that ``config["model"]`` of a checkpoint describes: "name" in the registry, and its arguments.

    Raises:
        ValueError: the name is not in the registry.
    """
    arguments = dict(config)
    return registered_model(arguments.pop("name"))(**arguments)


def registered_model(name: str | None) -> partial[SiT]:
    """The entry of ``SiT_models``.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in SiT_models:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(SiT_models)}")
    return SiT_models[name]
