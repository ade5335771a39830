"""The network: SiT's output on constant masks, which outputs a mask changes, guidance, the registry."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from dataset.masks import to_prob_map
from layers.mask import MaskCondition, MaskEmbedder
from layers.overlap import Overlap
from layers.rows import ROW_MULTIPLE, distinct_rows, mask_rows, spread_rows
from layers.sinusoids import position_embedding
from models import SiT, SiT_models, build_model
from transport import Sampler, create_transport

B, C, K, D, H, W, GH, GW, P = 5, 4, 3, 32, 12, 8, 6, 4, 4  # of the small model; P mask pixels per token side
RESOLUTIONS = [(24, 16), (6, 4), (96, 80), (3, 2), (37, 53), (1, 1)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def inputs(batch: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, C, H, W), torch.rand(batch)


def hard_masks(batch: int = B, height: int = GH * P, width: int = GW * P) -> torch.Tensor:
    """(B, K, height, width) one-hot noise."""
    return F.one_hot(torch.randint(K, (batch, height, width)), K).permute(0, 3, 1, 2).float()


def soft_masks(batch: int = B, height: int = GH * P, width: int = GW * P) -> torch.Tensor:
    return torch.randn(batch, K, height, width).softmax(1)


def constant_masks(labels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.one_hot(labels, K).float()[:, :, None, None].expand(-1, -1, height, width)


def class_conditional_sit(weights: dict, x, t, labels, heads: int = 4, depth: int = 2, patch: int = 2) -> torch.Tensor:
    """SiT for class labels, from the formulas of arXiv 2212.09748 and a state dict; one condition per image."""

    def linear(value, name):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def modulation(name, parts):
        return linear(c * torch.sigmoid(c), f"{name}.adaLN_modulation.1")[:, None].chunk(parts, dim=2)

    batch, _, height, width = x.shape
    gh, gw = height // patch, width // patch
    kernel = weights["x_embedder.proj.weight"]
    tokens = [
        torch.einsum("bcij,dcij->bd", x[:, :, r : r + patch, s : s + patch], kernel) + weights["x_embedder.proj.bias"]
        for r in range(0, height, patch)
        for s in range(0, width, patch)
    ]
    h = torch.stack(tokens, dim=1) + weights["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=t.dtype) / 128)
    hidden = linear(torch.cat([angles.cos(), angles.sin()], dim=1), "t_embedder.mlp.0")
    c = linear(hidden * torch.sigmoid(hidden), "t_embedder.mlp.2")
    c = c + weights["y_embedder.embedding_table.weight"][labels]
    for index in range(depth):
        block = f"blocks.{index}"
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation(block, 6)
        qkv = linear(norm(h) * (1 + scale_attn) + shift_attn, f"{block}.attn.qkv")
        q, k, v = qkv.view(batch, gh * gw, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        h = h + gate_attn * linear((weight @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = linear(norm(h) * (1 + scale_mlp) + shift_mlp, f"{block}.mlp.fc1")
        gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        h = h + gate_mlp * linear(gelu, f"{block}.mlp.fc2")
    shift, scale = modulation("final_layer", 2)
    patches = linear(norm(h) * (1 + scale) + shift, "final_layer.linear").view(batch, gh, gw, patch, patch, -1)
    rows = [torch.cat([patches[:, r, s] for s in range(gw)], dim=2) for r in range(gh)]  # (B, p, W, C)
    return torch.cat(rows, dim=1).permute(0, 3, 1, 2)


# --- parity with the class-conditional SiT ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", RESOLUTIONS)
def test_constant_mask_equals_the_class_conditional_sit(model, size):
    x, t = inputs()
    labels = torch.arange(B) % K
    output = model(x, t, constant_masks(labels, *size))
    expected = class_conditional_sit(model.state_dict(), x, t, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("hidden_size", "num_heads"), [(30, 3), (32, 5)])
def test_a_width_that_does_not_divide_is_refused_at_once(make_model, hidden_size, num_heads):
    with pytest.raises(ValueError, match=f"hidden size {hidden_size} is not divisible by 4 and by the {num_heads} h"):
        make_model(hidden_size=hidden_size, num_heads=num_heads)


def test_constant_mask_equals_the_class_conditional_sit_in_float64(model):
    x, t = torch.randn(B, C, H, W).double(), torch.rand(B).double()
    labels = torch.arange(B) % K
    model = model.double()
    output = model(x, t, constant_masks(labels, 37, 53).double())
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, class_conditional_sit(model.state_dict(), x, t, labels), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", RESOLUTIONS)
def test_constant_mask_gives_the_bits_of_the_label_row(model, size):
    x, t = inputs()
    labels = torch.arange(B) % K
    row = model.y_embedder.embedding_table.weight[labels][:, None].expand(-1, GH * GW, -1)
    condition = model.embed_mask(constant_masks(labels, *size))
    assert torch.equal(condition.embedding, row)
    assert condition.detail.count_nonzero() == 0
    assert torch.equal(model(x, t, constant_masks(labels, *size)), model(x, t, MaskCondition(row, None)))


def test_learn_sigma_returns_the_mean_half(make_model):
    model = make_model(learn_sigma=True)
    x, t = inputs()
    labels = torch.arange(B) % K
    both = class_conditional_sit(model.state_dict(), x, t, labels)
    output = model(x, t, constant_masks(labels, 24, 16))
    assert both.shape == (B, 2 * C, H, W) and output.shape == (B, C, H, W)
    torch.testing.assert_close(output, both[:, :C], rtol=0, atol=2e-5 * both.abs().max().item())


def test_fresh_model_starts_at_zero_and_with_zero_detail():
    fresh = SiT((H, W), 2, C, D, 2, 4, num_classes=K, mask_pixels=P)
    x, t = inputs()
    assert fresh(x, t, hard_masks()).count_nonzero() == 0
    assert fresh.mask_detail(hard_masks()).count_nonzero() == 0


# --- mask embedding --------------------------------------------------------------------------------------------------


def test_mask_embedding_is_the_share_weighted_sum_of_class_rows(model):
    y = soft_masks()
    embedding = model.embed_mask(y).embedding
    table = model.y_embedder.embedding_table.weight
    for row, column in [(0, 0), (2, 3), (5, 1)]:
        shares = y[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P].mean((2, 3))  # (B, K)
        expected = sum(shares[:, k, None] * table[k] for k in range(K))
        torch.testing.assert_close(embedding[:, row * GW + column], expected, rtol=0, atol=1e-6)


def test_mask_embedding_stays_float32_under_bf16_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        condition = model.embed_mask(soft_masks(), share_rows=False)
        output = model(*inputs(), condition)
    assert condition.embedding.dtype == torch.float32
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("make_drop", [torch.ones_like, torch.zeros_like])
def test_dropped_mask_is_the_learned_null_everywhere(model, make_drop):
    drop = make_drop(torch.arange(B), dtype=torch.bool)
    y = hard_masks()
    condition = model.embed_mask(y, drop=drop)
    kept = model.embed_mask(y)
    null = model.y_embedder.embedding_table.weight[K].expand_as(kept.embedding)
    assert torch.equal(condition.embedding, null if drop.all() else kept.embedding)
    assert torch.equal(condition.detail, torch.zeros_like(kept.detail) if drop.all() else kept.detail)


def test_dropped_mask_gives_the_output_of_the_null_label(model):
    x, t = inputs()
    output = model(x, t, model.embed_mask(hard_masks(), drop=torch.ones(B, dtype=torch.bool)))
    expected = class_conditional_sit(model.state_dict(), x, t, torch.full((B,), K))
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_learned_null_is_not_background(model):
    x, t = inputs()
    background = constant_masks(torch.zeros(B, dtype=torch.long), 24, 16)
    dropped = model(x, t, model.embed_mask(background, drop=torch.ones(B, dtype=torch.bool)))
    assert (dropped - model(x, t, background)).abs().amax((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_null_row_exists_with_and_without_mask_dropout(make_model, dropout):
    assert make_model(class_dropout_prob=dropout).y_embedder.embedding_table.weight.shape == (K + 1, D)


def test_training_drops_whole_samples_at_the_given_rate(make_model):
    model = make_model(class_dropout_prob=0.3).train()
    batch = 200
    x, t = inputs(batch)
    y = hard_masks(batch)
    with torch.no_grad():
        output = model(x, t, y)
        masked = model(x, t, model.embed_mask(y))
        null = model(x, t, model.embed_mask(y, drop=torch.ones(batch, dtype=torch.bool)))
    is_masked = (output - masked).abs().amax((1, 2, 3)) < 1e-4
    is_null = (output - null).abs().amax((1, 2, 3)) < 1e-4
    assert (is_masked ^ is_null).all()  # nothing between: a sample has its mask, or none of it
    assert 35 <= is_null.sum() <= 85  # 60 expected, standard deviation 6.5


def test_masks_are_dropped_in_training_only(make_model):
    (x, t), y = inputs(), hard_masks()
    always = make_model(class_dropout_prob=1.0)
    null = always(x, t, always.embed_mask(y, drop=torch.ones(B, dtype=torch.bool)))
    kept = always(x, t, always.embed_mask(y))
    torch.testing.assert_close(always(x, t, y), kept)
    torch.testing.assert_close(always.train()(x, t, y), null)
    never = make_model(class_dropout_prob=0.0).train()
    torch.testing.assert_close(never(x, t, y), kept)


@pytest.mark.parametrize("shape", [(B, H, W), (B, K + 1, H, W), (B, 1, H, W)])
def test_masks_without_k_channels_are_refused(model, shape):
    with pytest.raises(ValueError, match=rf"masks have shape .*expected \(B, {K}, H, W\)"):
        model.embed_mask(torch.zeros(shape))


# --- mask detail -----------------------------------------------------------------------------------------------------


def test_mask_detail_is_linear_in_the_patch_less_its_mean(model):
    y = soft_masks()
    detail, weight = model.mask_detail(y), model.mask_detail.proj.weight  # weight columns: class, row, column
    for row, column in [(0, 0), (2, 3), (5, 1)]:
        patch = y[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P]  # (B, K, P, P)
        expected = (patch - patch.mean((2, 3), keepdim=True)).flatten(1) @ weight.T
        torch.testing.assert_close(detail[:, row * GW + column], expected, rtol=0, atol=1e-6)


def test_mask_detail_brings_finer_masks_to_its_pixels_by_area(model):
    y = soft_masks(height=3 * GH * P, width=2 * GW * P)
    expected = model.mask_detail(y.unflatten(3, (-1, 2)).unflatten(2, (-1, 3)).mean((3, 5)))
    torch.testing.assert_close(model.mask_detail(y), expected, rtol=0, atol=1e-6)


def test_pixels_moved_within_a_patch_reach_the_output_through_the_detail_only(make_model):
    x, t = inputs()
    y = hard_masks()
    moved = y.clone()
    moved[:, :, 8:12, 4:8] = y[:, :, 8:12, 4:8].flip(2, 3).roll(1, 2)  # token (2, 1), its shares unchanged
    plain, detailed = make_model(mask_pixels=0), make_model()
    assert torch.equal(plain(x, t, y), plain(x, t, moved))
    before, after = detailed.embed_mask(y), detailed.embed_mask(moved)
    assert torch.equal(before.embedding, after.embedding)
    changed = (before.detail != after.detail).any(2)
    assert changed[:, 2 * GW + 1].all() and changed.sum() == B
    difference = (detailed(x, t, y) - detailed(x, t, moved)).abs()
    assert difference.amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("scale", [1, 2, 5])
@pytest.mark.parametrize("value", [0.3, 0.1, 1 / 3, 0.7])
def test_detail_is_exactly_zero_for_soft_constants(model, value, scale):
    shares = torch.tensor([value, 0.2, 0.8 - value])
    y = shares[None, :, None, None].expand(B, K, GH * P * scale, GW * P * scale).contiguous()
    assert model.mask_detail(y).count_nonzero() == 0


@pytest.mark.parametrize("value", [0.3, 1 / 3])
def test_detail_of_soft_constants_is_rounding_at_odd_resolutions(model, value):
    shares = torch.tensor([value, 0.2, 0.8 - value])
    y = shares[None, :, None, None].expand(B, K, 37, 53).contiguous()
    assert model.mask_detail(y).abs().max() < 1e-6


def test_detail_is_exactly_zero_for_the_constant_patches_of_a_hard_mask(model):
    y = constant_masks(torch.zeros(B, dtype=torch.long), 24, 16).clone()
    y[:, :, :, :9] = torch.tensor([0.0, 0.0, 1.0])[:, None, None]  # the edge runs through the third token column
    detail = model.mask_detail(y).unflatten(1, (GH, GW))
    assert detail[:, :, [0, 1, 3]].count_nonzero() == 0
    assert detail[:, :, 2].abs().amax((1, 2)).min() > 0.01


# --- per token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, column", [(0, 0), (4, 1), (2, 3)])
def test_without_attention_mask_and_input_of_a_patch_reach_that_patch_only(model, row, column):
    """Modulation is per token, and image patches, mask patches and output patches are in one order."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    x, t = inputs()
    y = hard_masks()
    other_y, other_x = y.clone(), x.clone()
    other_y[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P] = torch.eye(K)[0][:, None, None]
    other_x[:, :, row * 2 : row * 2 + 2, column * 2 : column * 2 + 2] += 1
    here = torch.zeros(H, W, dtype=torch.bool)
    here[row * 2 : row * 2 + 2, column * 2 : column * 2 + 2] = True
    for output in (model(x, t, other_y), model(other_x, t, y)):
        difference = (output - model(x, t, y)).abs()
        assert difference[..., ~here].max() < 1e-5
        assert difference[..., here].amax((1, 2)).min() > 1e-2


def test_modulation_varies_by_token(model):
    """The same input token under different conditions leaves a block differently, whatever the axis of the chunk."""
    x = torch.randn(1, 1, D).expand(B, GH * GW, D)
    condition = torch.randn(B, GH * GW, D)
    varied = model.blocks[0](x, condition)
    uniform = model.blocks[0](x, condition[:, :1].expand_as(condition))
    assert varied.std(dim=1).mean() > 0.1
    assert uniform.std(dim=1).max() < 1e-5


def test_with_attention_a_mask_patch_reaches_every_token(model):
    x, t = inputs()
    y = hard_masks()
    other = y.clone()
    other[:, :, :P, :P] = torch.eye(K)[1][:, None, None]
    assert (model(x, t, other) - model(x, t, y)).abs().amax((0, 1)).min() > 0


# --- gradients -------------------------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient(make_model):
    model = make_model()
    x, t = inputs()
    condition = model.embed_mask(soft_masks(), drop=torch.arange(B) < 2)
    model(x, t, condition).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    assert (model.y_embedder.embedding_table.weight.grad.abs().amax(1) > 0).all()  # K classes and the null
    assert (model.mask_detail.proj.weight.grad.abs().amax(0) > 0).all()  # every mask pixel


def test_soft_mask_gets_a_gradient_at_every_pixel_of_every_class(model):
    y = soft_masks(height=48, width=32).requires_grad_()
    model(*inputs(), y).square().mean().backward()
    assert torch.isfinite(y.grad).all()
    assert (y.grad.abs() > 0).float().mean() > 0.999


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_gradient_through_heun_steps_agrees_with_finite_differences(make_model, prediction, cfg_scale):
    solver = Sampler(create_transport(prediction=prediction)).sample_ode("heun", num_steps=4)
    x0, weight, y0 = torch.randn(2, C, H, W), torch.randn(2, C, H, W), soft_masks(2)
    # A small last layer keeps guided samples near unit size, so that four steps are a smooth function of the mask.
    model = make_model()
    model.final_layer.linear.weight.data.mul_(0.3)

    def objective(y: torch.Tensor) -> torch.Tensor:
        states = solver(x0.to(y.dtype), model.forward_with_cfg, y=y, cfg_scale=cfg_scale)
        return (states[-1] * weight.to(y.dtype)).sum()

    y32 = y0.clone().requires_grad_()
    (gradient32,) = torch.autograd.grad(objective(y32), y32)

    model.double()
    y = y0.double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(y), y)
    directions = [torch.randn_like(y) for _ in range(3)]
    for index in [(0, 1, 3, 2), (1, 2, 20, 15)]:  # single mask pixels
        directions.append(torch.zeros_like(y))
        directions[-1][index] = 1
    with torch.no_grad():
        for direction in directions:
            step = 1e-5 * direction
            difference = (objective(y + step) - objective(y - step)) / 2e-5
            assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=0.01)
    assert (gradient32.double() - gradient).norm() < 0.01 * gradient.norm()


# --- overlapping patches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_overlapping_patches_start_at_zero_and_add_two_keys(make_model, learn_sigma):
    plain, model = make_model(learn_sigma=learn_sigma), make_model(learn_sigma=learn_sigma, patch_overlap=True)
    fresh = SiT((H, W), 2, C, D, 2, 4, num_classes=K, patch_overlap=True).overlap.linear
    assert fresh.weight.count_nonzero() == 0 and fresh.bias.count_nonzero() == 0
    added = model.load_state_dict(plain.state_dict(), strict=False)
    assert added.missing_keys == ["overlap.linear.weight", "overlap.linear.bias"] and not added.unexpected_keys
    (x, t), y = inputs(), hard_masks()
    assert not torch.equal(model(x, t, y), plain(x, t, y))
    model.overlap.linear.load_state_dict(
        {name: torch.zeros_like(value) for name, value in model.overlap.linear.state_dict().items()}
    )
    assert torch.equal(model(x, t, y), plain(x, t, y))


@pytest.mark.parametrize(("patch", "grid"), [(1, (3, 5)), (2, (6, 4)), (3, (2, 3)), (8, (3, 2)), (16, (1, 1))])
def test_the_weights_of_all_windows_on_a_pixel_sum_to_one(patch, grid):
    overlap = Overlap(D, patch, 2, grid)
    shift, scale = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 7.0])  # of each channel, the same in all windows
    bias = torch.cat([shift / overlap.SHIFT_GAIN, scale]).repeat_interleave(overlap.side**2)
    torch.nn.init.zeros_(overlap.linear.weight)
    overlap.linear.bias.data.copy_(bias)
    noisy = torch.randn(B, 2, grid[0] * patch, grid[1] * patch)
    means = F.interpolate(F.avg_pool2d(noisy, patch), noisy.shape[2:], mode="bilinear")
    output = overlap(torch.randn(B, grid[0] * grid[1], D), noisy)
    torch.testing.assert_close(output, shift[:, None, None] + scale[:, None, None] * (noisy - means))


def test_tokens_of_different_brightness_make_slopes_and_no_steps():
    grid, patch = (5, 6), 8
    overlap = Overlap(D, patch, 1, grid)
    with torch.no_grad():
        overlap.linear.weight.copy_(torch.randn(1, D).expand(8 * patch**2, -1))  # every token one brightness
        field = overlap(torch.randn(1, 30, D), torch.ones(1, 1, 40, 48))[0, 0]  # (H, W)
    steps = field.diff(dim=1).abs().mean(0)
    assert steps[patch - 1 :: patch].mean() < 1.05 * steps[patch:-patch].mean()
    assert steps.mean() > 0.1


def test_a_token_writes_around_its_own_patch():
    overlap = Overlap(D, 4, 3, (5, 6))
    torch.nn.init.zeros_(overlap.linear.bias)
    tokens = torch.zeros(1, 30, D)
    tokens[0, 2 * 6 + 3] = 1  # row 2, column 3
    rows, columns = overlap(tokens, torch.randn(1, 3, 20, 24)).abs().sum((0, 1)).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 13, 10, 17)


def test_every_weight_of_overlapping_patches_learns_and_soft_masks_get_gradients(make_model):
    model = make_model(patch_overlap=True)
    y = soft_masks(height=48, width=32).requires_grad_()
    model(*inputs(), y).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.overlap.parameters())
    assert (y.grad.abs() > 0).float().mean() > 0.999


def test_overlapping_patches_keep_shared_rows_and_batch_neighbours(make_model):
    model = make_model(patch_overlap=True)
    x, y = torch.randn(SHARED_BATCH, C, H, W), constant_masks(torch.arange(SHARED_BATCH) % K, 24, 16)
    t = torch.full((SHARED_BATCH,), 0.3)
    shared, own = model.embed_mask(y, share_rows=True), model.embed_mask(y)
    assert shared.row_of_token is not None
    torch.testing.assert_close(model(x, t, shared), model(x, t, own), rtol=0, atol=1e-4)
    other = torch.cat([x[:1], torch.randn(SHARED_BATCH - 1, C, H, W)])
    assert torch.equal(model(x, t, shared)[0], model(other, t, shared)[0])


def test_plain_patches_rest_at_zero_and_given_ones_learn(make_model):
    fresh = SiT((H, W), 2, C, D, 2, 4, num_classes=K, patch_overlap=True)
    fresh.rest_plain_patches()
    assert [name for name, p in fresh.named_parameters() if not p.requires_grad] == [
        "final_layer.linear.weight", "final_layer.linear.bias",
    ]  # fmt: skip
    for model in (make_model(patch_overlap=True), make_model()):
        model.rest_plain_patches()
        assert all(p.requires_grad for p in model.parameters())


# --- shared rows and guidance ----------------------------------------------------------------------------------------

SHARED_BATCH = 7  # 168 tokens: enough for 64 distinct rows to be fewer than half


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0, 0.0])
def test_shared_rows_give_the_output_of_rows_per_token(model, cfg_scale):
    x, _ = inputs(SHARED_BATCH)
    t = torch.full((SHARED_BATCH,), 0.3)  # one solver step: all images at the same time
    y = constant_masks(torch.arange(SHARED_BATCH) % K, 24, 16).clone()
    y[2, :, :, :9] = torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    shared, own = model.embed_mask(y, share_rows=True), model.embed_mask(y)
    assert shared.row_of_token is not None and own.row_of_token is None
    assert shared.embedding.shape == (ROW_MULTIPLE, D)
    assert shared.with_null(model.y_embedder.null()).embedding.shape == (2 * ROW_MULTIPLE, D)
    torch.testing.assert_close(shared.embedding[shared.row_of_token], own.embedding, rtol=0, atol=1e-7)
    assert torch.equal(shared.detail, own.detail)
    expected = model.forward_with_cfg(x, t, own, cfg_scale)
    torch.testing.assert_close(model.forward_with_cfg(x, t, shared, cfg_scale), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, cfg_scale), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_image_has_the_same_bits_whatever_its_batch_neighbours(make_model, cfg_scale):
    """Few rows, more than one multiple of rows, and soft neighbours that share none."""
    model = make_model(input_size=(48, 64), patch_size=8, hidden_size=192, num_heads=3, mask_pixels=8)
    batch, height, width = 6, 48, 64
    t = torch.full((batch,), 0.3)
    first_x = torch.randn(1, C, height, width)
    blobs = F.interpolate(torch.rand(1, 1, 5, 7), (height, width), mode="bilinear") > 0.5
    first_y = torch.cat([~blobs, blobs, torch.zeros_like(blobs)], dim=1).float()
    half_noise = hard_masks(batch - 1, height, width)
    half_noise[:, :, :, 16:] = torch.eye(K)[0][:, None, None]
    neighbours = {
        "few rows": constant_masks(torch.zeros(batch - 1, dtype=torch.long), height, width),
        "more rows": half_noise,
        "own rows": soft_masks(batch - 1, height, width),
    }
    outputs, rows = {}, {}
    with torch.no_grad():
        for name, masks in neighbours.items():
            condition = model.embed_mask(torch.cat([first_y, masks]), share_rows=True)
            x = torch.cat([first_x, torch.randn(batch - 1, C, height, width)])
            outputs[name] = model.forward_with_cfg(x, t, condition, cfg_scale)[0]
            rows[name] = condition.embedding.shape[:-1]
    assert rows["few rows"] == (ROW_MULTIPLE,) and rows["more rows"] == (2 * ROW_MULTIPLE,)
    assert rows["own rows"] == (batch, 48)
    for output in outputs.values():
        assert torch.equal(output, outputs["few rows"])


def test_rows_are_not_shared_where_that_saves_nothing_or_gradients_are_needed(model):
    few = constant_masks(torch.arange(SHARED_BATCH) % K, 24, 16)
    assert model.embed_mask(few, share_rows=True).row_of_token is not None
    assert model.embed_mask(soft_masks(SHARED_BATCH), share_rows=True).row_of_token is None
    assert model.embed_mask(few[:5], share_rows=True).row_of_token is None
    condition = model.embed_mask(few.clone().requires_grad_(), share_rows=True)
    assert condition.row_of_token is None and condition.embedding.requires_grad


def test_distinct_rows_are_exact_and_padded():
    shares = torch.rand(9, K)[torch.randint(9, (B, GH * GW))]
    rows, row_of_token = distinct_rows(shares)
    assert torch.equal(rows[row_of_token], shares)
    assert len(rows) == ROW_MULTIPLE and len(rows.unique(dim=0)) == 9


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5, 4.0])
def test_guidance_is_null_plus_scale_times_the_difference_on_all_channels(make_model, cfg_scale, learn_sigma):
    model = make_model(learn_sigma=learn_sigma)
    x, t = inputs()
    y = hard_masks()
    masked = model(x, t, y)
    null = model(x, t, model.embed_mask(y, drop=torch.ones(B, dtype=torch.bool)))
    output = model.forward_with_cfg(x, t, y, cfg_scale)
    assert output.shape == (B, C, H, W)
    assert (masked - null).abs().amax((0, 2, 3)).min() > 0.05  # every channel is guided
    torch.testing.assert_close(output, null + cfg_scale * (masked - null), rtol=0, atol=1e-4)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("cfg_scale, batch", [(1.0, B), (4.0, 2 * B)])
def test_guidance_calls_the_network_once_and_scale_one_costs_nothing(model, cfg_scale, batch, embedded):
    calls = Counter()
    model.blocks[0].register_forward_hook(lambda block, args, output: calls.update([len(output)]))
    x, t = inputs()
    y = model.embed_mask(hard_masks()) if embedded else hard_masks()
    output = model.forward_with_cfg(x, t, y, cfg_scale)
    assert calls == {batch: 1}
    assert torch.equal(output, model(x, t, y)) == (cfg_scale == 1)


# --- layout ----------------------------------------------------------------------------------------------------------


def test_unpatchify_puts_patches_row_by_row_with_channels_last(model):
    image = torch.randn(B, C, H, W)
    patches = [image[:, :, r : r + 2, s : s + 2].permute(0, 2, 3, 1) for r in range(0, H, 2) for s in range(0, W, 2)]
    assert torch.equal(model.unpatchify(torch.stack(patches, dim=1).flatten(2)), image)


def test_position_embedding_is_column_first_then_row():
    width, grid = 24, (3, 5)
    embedding = position_embedding(width, grid)
    assert embedding.shape == (1, 15, width) and embedding.dtype == torch.float32
    for row in range(3):
        for column in range(5):
            expected = [
                function(place / 10_000 ** (k / 6)) for place in (column, row) for function in (math.sin, math.cos)
                for k in range(6)
            ]  # fmt: skip
            torch.testing.assert_close(embedding[0, row * 5 + column], torch.tensor(expected))


def test_position_embedding_is_a_buffer_under_the_key_of_sit(model):
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())


def test_time_scale_multiplies_t(make_model):
    plain, scaled = make_model().t_embedder, make_model(time_scale=1000.0).t_embedder
    t = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(scaled(t), plain(1000 * t))
    sinusoids = plain.sinusoids(t)
    frequency = torch.exp(-math.log(10_000) * torch.arange(128, dtype=t.dtype) / 128)
    expected = torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], dim=1)
    torch.testing.assert_close(sinusoids, expected, rtol=0, atol=1e-6)


def test_every_sample_has_its_own_time(model):
    x, y = torch.randn(1, C, H, W).expand(B, -1, -1, -1), hard_masks(1).expand(B, -1, -1, -1)
    t = torch.linspace(0, 1, B)
    output = model(x, t, y)
    for index in range(B):
        torch.testing.assert_close(output[index], model(x[:1], t[index : index + 1], y[:1])[0], rtol=0, atol=1e-5)
    assert (output[0] - output[-1]).abs().max() > 0.05


@pytest.mark.parametrize("size", [(12, 7), (11, 8), 9])
def test_input_size_not_divisible_by_the_patch_is_refused(size):
    with pytest.raises(ValueError, match=r"input size \d+ x \d+ is not divisible by the patch size 2"):
        SiT(size, 2, hidden_size=32, depth=1, num_heads=4)


# --- registry --------------------------------------------------------------------------------------------------------

BLOCK_KEYS = [
    f"{layer}.{kind}"
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    for kind in ("weight", "bias")
]
OTHER_KEYS = [
    "pos_embed",
    "y_embedder.embedding_table.weight",
    *(
        f"{layer}.{kind}"
        for layer in ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear")
        for kind in ("weight", "bias")
    ),
    *(f"final_layer.adaLN_modulation.1.{kind}" for kind in ("weight", "bias")),
]
SHAPES = {"Ti": (4, 256, 4), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def test_registry_holds_every_size_with_every_patch():
    assert sorted(SiT_models) == sorted(f"SiT-{size}/{patch}" for size in SHAPES for patch in (2, 4, 8, 16))


@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("name", SiT_models)
def test_registry_entry_has_its_shape_and_the_keys_of_sit(name, detail):
    size, patch = name.removeprefix("SiT-").split("/")
    (depth, width, heads), patch = SHAPES[size], int(patch)
    with torch.device("meta"):
        model = SiT_models[name](input_size=32, num_classes=2, mask_pixels=patch * detail)
    assert (len(model.blocks), model.patch_size, model.grid) == (depth, patch, (32 // patch, 32 // patch))
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    state = model.state_dict()
    keys = [*OTHER_KEYS, *(f"blocks.{index}.{key}" for index in range(depth) for key in BLOCK_KEYS)]
    assert sorted(state) == sorted([*keys, *["mask_detail.proj.weight"] * detail])
    assert state["pos_embed"].shape == (1, (32 // patch) ** 2, width)
    assert state["x_embedder.proj.weight"].shape == (width, 4, patch, patch)
    assert state["final_layer.linear.weight"].shape == (4 * patch**2, width)
    assert state["blocks.0.mlp.fc1.weight"].shape == (4 * width, width)
    assert state["t_embedder.mlp.0.weight"].shape == (width, 256)
    if detail:
        assert state["mask_detail.proj.weight"].shape == (width, 2 * patch**2)


def test_xl_2_for_imagenet_has_the_published_number_of_weights():
    with torch.device("meta"):
        model = SiT_models["SiT-XL/2"](learn_sigma=True)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 675_129_632  # with the position embedding


def test_build_model_takes_the_checkpoint_config_and_leaves_it_alone():
    config = {"name": "SiT-Ti/8", "input_size": 16, "num_classes": 2, "depth": 1}
    with torch.device("meta"):
        model = build_model(config)
    assert (len(model.blocks), model.patch_size, model.num_classes) == (1, 8, 2)
    assert config["name"] == "SiT-Ti/8"


def test_unknown_model_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"unknown model 'SiT-B/3'; choose one of .*SiT-Ti/2.*SiT-XL/16"):
        build_model({"name": "SiT-B/3"})


def test_rows_found_on_the_cpu_are_the_distinct_shares_of_each_image():
    class_maps = torch.randint(3, (2, 24, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    class_maps[0, :12] = 1  # half of the first image is of one class
    rows = mask_rows(class_maps, 3, (6, 4))
    shares = MaskEmbedder(3, 8, (6, 4)).pool(to_prob_map(class_maps, 3))  # (2, 24, 3)
    assert torch.equal(rows.shares[rows.row_of_token], shares)
    assert torch.equal(rows.image_of_row[rows.row_of_token], torch.arange(2)[:, None].expand(2, 24))
    assert len(rows.shares) == len(rows.image_of_row) == 64
    distinct = [len({tuple(share) for share in image.tolist()}) for image in shares]
    assert [len(set(image.tolist())) for image in rows.row_of_token] == distinct
    assert distinct[0] < 24


def test_rows_within_images_give_the_output_and_gradients_of_one_condition_per_token(model):
    x, t, drop = torch.randn(3, 4, 12, 8), torch.rand(3), torch.tensor([False, True, False])
    class_maps = torch.randint(3, (3, 24, 16), dtype=torch.uint8).repeat_interleave(2, 1)[:, :24]
    y, seen = to_prob_map(class_maps, 3), []
    for rows in (None, mask_rows(class_maps, 3, model.grid)):
        model.zero_grad()
        output = model(x, t, y, drop=drop, rows=rows)
        output.square().sum().backward()
        seen.append([output.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for per_token, per_row in zip(*seen, strict=True):
        torch.testing.assert_close(per_row, per_token, rtol=1e-4, atol=1e-4 * float(per_token.abs().max()))


def test_gradients_of_many_tokens_are_summed_in_float32():
    rows = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    spread_rows(rows, torch.zeros(1, 1000, dtype=torch.long)).sum().backward()
    assert rows.grad.tolist() == [[1000.0] * 3, [0.0] * 3]  # a sum in bf16 stays at 256


@pytest.mark.parametrize(("side", "fused"), [(16, False), (24, True)], ids=["256 tokens", "576 tokens"])
def test_plain_attention_is_the_same_attention_and_left_alone_on_long_sequences(make_model, side, fused):
    model = make_model(input_size=side, patch_size=1, hidden_size=8, num_heads=2, depth=1)
    x, y = torch.randn(1, 4, side, side), torch.ones(1, 3, side, side) / 3
    before = model(x, torch.tensor([0.3]), y)
    model.use_plain_attention()
    torch.testing.assert_close(model(x, torch.tensor([0.3]), y), before)
    assert [block.attn.fused_attn for block in model.blocks] == [fused]
