"""Looks in the network: no look is SiT, a look changes the output, rows of different looks, guidance on the look."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import SiT

N, B, C, H, W, K = 5, 7, 4, 12, 8, 3  # numbers of a look; the small model of conftest.py


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.fixture
def model(make_model) -> SiT:
    return make_model(look_numbers=N)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t, hard masks of whole patches, looks."""
    classes = torch.randint(K, (B, 3, 2)).repeat_interleave(8, 1).repeat_interleave(8, 2)  # (B, 24, 16)
    y = torch.nn.functional.one_hot(classes, K).movedim(3, 1).float()
    return torch.randn(B, C, H, W), torch.full((B,), 0.3), y, torch.randn(B, N)


def test_a_new_model_gives_every_look_the_output_of_a_model_without_looks():
    x, t, y, look = inputs()
    arguments = {"input_size": (H, W), "patch_size": 2, "in_channels": C, "hidden_size": 32, "depth": 2}
    torch.manual_seed(0)
    model = SiT(**arguments, num_heads=4, num_classes=K, look_numbers=N).eval()
    plain = SiT(**arguments, num_heads=4, num_classes=K).eval()
    weights = model.state_dict()
    torch.nn.init.normal_(weights["blocks.0.adaLN_modulation.1.weight"], std=0.1)
    torch.nn.init.normal_(weights["final_layer.linear.weight"], std=0.1)
    torch.nn.init.normal_(weights["final_layer.adaLN_modulation.1.weight"], std=0.1)
    plain.load_state_dict({name: value for name, value in weights.items() if not name.startswith("look_embedder.")})
    assert plain(x, t, y).abs().max() > 0.1
    assert torch.equal(model(x, t, y, look=look), plain(x, t, y))
    assert torch.equal(model(x, t, y), plain(x, t, y))


def test_a_dropped_look_is_the_class_conditional_sit_whose_time_embedding_holds_the_null(model, make_model):
    x, t, y, look = inputs()
    assert model.look_embedder.null.abs().min() > 0
    plain = make_model()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("look_embedder.")}
    weights["t_embedder.mlp.2.bias"] = weights["t_embedder.mlp.2.bias"] + model.look_embedder.null
    plain.load_state_dict(weights)
    dropped = model(x, t, y, look=look, drop_look=torch.ones(B, dtype=torch.bool))
    assert torch.equal(dropped, model(x, t, y))
    torch.testing.assert_close(dropped, plain(x, t, y), rtol=0, atol=1e-4)


def test_a_look_reaches_its_own_image_only(model):
    x, t, y, look = inputs()
    other = torch.cat([torch.randn(1, N), look[1:]])
    first, second = model(x, t, y, look=look), model(x, t, y, look=other)
    assert (first[0] - second[0]).abs().max() > 0.01
    assert torch.equal(first[1:], second[1:])


def test_every_weight_of_the_look_learns_and_training_drops_looks(make_model):
    model = make_model(look_numbers=N, look_dropout_prob=0.5).train()
    x, t, y, look = inputs()
    drop = model.draw_look_dropped(1000, torch.device("cpu"))
    assert 400 < drop.sum() < 600
    model(x, t, y, look=look, drop_look=drop[:B] | (torch.arange(B) == 0)).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.look_embedder.parameters())
    assert model.eval().draw_look_dropped(B, torch.device("cpu")) is None


@pytest.mark.parametrize("look_scale", [1.0, 2.5])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_shared_rows_of_different_looks_give_the_output_of_rows_per_token(model, cfg_scale, look_scale):
    x, t, y, look = inputs()
    y[:] = y[:, :, :1, :1]  # few rows, else they are not shared
    shared, own = model.embed_mask(y, share_rows=True, look=look), model.embed_mask(y, look=look)
    assert shared.row_of_token is not None and shared.image_of_row is not None and own.row_of_token is None
    expected = model.forward_with_cfg(x, t, own, cfg_scale, look_scale)
    torch.testing.assert_close(model.forward_with_cfg(x, t, shared, cfg_scale, look_scale), expected, rtol=0, atol=1e-4)


def test_rows_are_shared_by_all_images_of_one_look(model):
    _, _, y, look = inputs()
    one = model.embed_mask(y, share_rows=True, look=look[:1].expand(B, N))
    assert one.image_of_row is None and torch.equal(one.row_of_token, model.embed_mask(y, share_rows=True).row_of_token)


def test_images_of_one_look_share_rows_with_each_other_only(model):
    _, _, y, look = inputs()
    y[:] = y[:1, :, :1, :1]  # one mask of one class: a row for each look
    look[[3, 5]] = look[1].clone()
    shared, own = model.embed_mask(y, share_rows=True, look=look), model.embed_mask(y, look=look)
    row_of_image = shared.row_of_token[:, 0].tolist()
    assert len(set(row_of_image)) == B - 2 and row_of_image[1] == row_of_image[3] == row_of_image[5]
    x, t = torch.randn(B, C, H, W), torch.full((B,), 0.3)
    torch.testing.assert_close(model(x, t, shared), model(x, t, own), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("cfg_scale", "look_scale"), [(1.0, 1.0), (4.0, 1.0), (4.0, 2.0)])
@pytest.mark.parametrize("soft", [False, True])
def test_calls_at_one_time_compute_the_modulation_once_with_the_same_bits(model, cfg_scale, look_scale, soft):
    x, t, y, look = inputs()
    y = y if not soft else torch.rand_like(y).softmax(dim=1)
    condition, computed = model.embed_mask(y, share_rows=True, look=look), []
    fresh = replace(condition, kept=None)
    for block in model.blocks:
        block.adaLN_modulation.register_forward_hook(lambda *_: computed.append(1))
    with torch.no_grad():
        for time, times in ((0.3, 1), (0.3, 0), (0.6, 1)):  # as Heun's method calls
            computed.clear()
            found = model.forward_with_cfg(x, t * 0 + time, condition, cfg_scale, look_scale)
            without_look = look_scale != 1  # of guidance on the look: a condition of its own
            assert len(computed) == len(model.blocks) * (times + without_look)
            assert torch.equal(found, model.forward_with_cfg(x, t * 0 + time, fresh, cfg_scale, look_scale))
    computed.clear()
    model(x, t, condition).sum().backward()
    assert len(computed) == len(model.blocks) and look.grad is None


def test_an_image_with_a_look_has_the_same_bits_whatever_its_batch_neighbours(model):
    x, t, y, look = inputs()
    y[:] = y[:, :, :1, :1]
    with torch.no_grad():
        first = model.forward_with_cfg(x, t, model.embed_mask(y, share_rows=True, look=look), 4.0)[0]
        x[1:], look[1:], y[1:] = torch.randn_like(x[1:]), torch.randn_like(look[1:]), y[1:].roll(1, 1)
        condition = model.embed_mask(y, share_rows=True, look=look)
        assert condition.image_of_row is not None
        assert torch.equal(model.forward_with_cfg(x, t, condition, 4.0)[0], first)


def test_guidance_on_the_look_adds_the_difference_that_the_look_makes(model):
    x, t, y, look = inputs()
    condition = model.embed_mask(y, look=look)
    with_look, without = model(x, t, condition), model(x, t, replace(condition, look=None))
    guided = model.forward_with_cfg(x, t, condition, 1.0, look_scale=3.0)
    torch.testing.assert_close(guided, without + 3 * (with_look - without), rtol=0, atol=1e-5)
    null = model(x, t, model.embed_mask(y, drop=torch.ones(B, dtype=torch.bool), look=look))
    both = model.forward_with_cfg(x, t, condition, 4.0, look_scale=3.0)
    expected = null + 4 * (with_look - null) + 2 * (with_look - without)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)


def test_a_look_for_a_model_that_knows_none_is_refused(make_model):
    x, t, y, look = inputs()
    with pytest.raises(ValueError, match="knows no looks"):
        make_model()(x, t, y, look=look)
