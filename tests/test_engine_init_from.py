"""engine/init_from.py: SiT weights fitted to a mask model, key by key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_sit import same, tiny

from common.errors import InputError
from dataset.config import DataConfig
from engine.config import ModelConfig, OptimiserConfig, RunConfig, TrainConfig, TransportConfig
from engine.init_from import adapt_sit_weights, mean_rows, meaning_warnings
from models import SiT


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return tiny().state_dict()


def test_mean_rows_take_the_first_channels_of_every_pixel_not_the_first_half():
    p, channels = 2, 3
    # Row value = 100 * patch row + 10 * patch column + output channel, in the order in which SiT unpatchifies.
    rows = torch.tensor([100 * i + 10 * j + c for i in range(p) for j in range(p) for c in range(2 * channels)])
    expected = [100 * i + 10 * j + c for i in range(p) for j in range(p) for c in range(channels)]
    assert mean_rows(rows, p, channels).tolist() == expected
    weight = rows[:, None].expand(-1, 7)
    assert mean_rows(weight, p, channels)[:, 4].tolist() == expected
    assert rows[: p * p * channels].tolist() != expected


def test_learn_sigma_weights_give_the_mean_half_of_the_image(weights):
    source = tiny(learn_sigma=True, num_classes=2).eval()
    target = tiny(num_classes=2).eval()
    state_dict, report = adapt_sit_weights(source.state_dict(), target)
    target.load_state_dict(state_dict, strict=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    y = torch.zeros(2, 2, 8, 8)
    y[:, 1] = 1
    patches = {}
    for name, model in (("source", source), ("target", target)):
        model.final_layer.linear.register_forward_hook(lambda _m, _i, out, name=name: patches.update({name: out}))
        model(x, t, y)
    both = patches["source"].reshape(2, 4, 4, 2, 2, 6)  # (B, gh, gw, p, p, 2C)
    mean = patches["target"].reshape(2, 4, 4, 2, 2, 3)
    torch.testing.assert_close(mean, both[..., :3])
    assert report.converted == ["final_layer.linear.weight", "final_layer.linear.bias"]


def test_class_table_is_replaced_and_everything_of_the_trunk_is_kept(weights):
    model = tiny(num_classes=2, mask_pixels=2)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    imagenet = {key: value + 1 for key, value in tiny(num_classes=1000).state_dict().items()}
    state_dict, report = adapt_sit_weights(imagenet, model)
    model.load_state_dict(state_dict, strict=True)
    assert report.new == ["y_embedder.embedding_table.weight", "mask_detail.proj.weight"]
    assert report.dropped == ["y_embedder.embedding_table.weight"]
    for key in fresh:
        assert torch.equal(state_dict[key], fresh[key] if key in report.new else imagenet[key]), key
    assert set(report.kept) | set(report.new) == set(fresh)
    assert any("mask_detail.proj.weight" in line for line in report.lines())


def test_position_table_of_another_grid_is_the_models_own(weights):
    model = tiny(input_size=12)
    state_dict, report = adapt_sit_weights(weights, model)
    assert report.new == ["pos_embed"] and report.dropped == ["pos_embed"]
    assert torch.equal(state_dict["pos_embed"], model.state_dict()["pos_embed"])
    assert state_dict["pos_embed"].shape == (1, 36, 24)


def test_mask_model_of_the_same_classes_is_kept_whole(weights):
    source = tiny(mask_pixels=2)
    state_dict, report = adapt_sit_weights(source.state_dict(), tiny(mask_pixels=2))
    assert not report.new and not report.dropped and same(state_dict, dict(source.state_dict()))


def test_other_patch_with_equal_row_count_is_not_mistaken_for_the_same():
    # p = 2, C = 16 and p = 4, C = 4 both have 64 output rows, which mean different pixels.
    source = tiny(patch_size=2, in_channels=16)
    model = tiny(patch_size=4, in_channels=4, input_size=16)
    fresh = model.state_dict()["final_layer.linear.weight"].clone()
    state_dict, report = adapt_sit_weights(source.state_dict(), model)
    assert "final_layer.linear.weight" in report.new
    assert torch.equal(state_dict["final_layer.linear.weight"], fresh)


def test_overlap_and_mask_detail_of_equal_shape_but_another_meaning_are_the_models_own():
    # Windows of 4 x 4 pixels with 4 channels, and of 8 x 8 with 1, both have 128 rows; 8 classes x 4 x 4 mask pixels
    # and 2 classes x 8 x 8 both have 128 columns.
    source = tiny(patch_size=2, in_channels=4, patch_overlap=True, num_classes=8, mask_pixels=4)
    model = tiny(patch_size=4, in_channels=1, patch_overlap=True, num_classes=2, mask_pixels=8, input_size=16)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    state_dict, report = adapt_sit_weights(source.state_dict(), model)
    for key in ("overlap.linear.weight", "overlap.linear.bias", "mask_detail.proj.weight"):
        assert source.state_dict()[key].shape == fresh[key].shape and key in report.new
        assert torch.equal(state_dict[key], fresh[key])


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (None, ["SiT's weights predict the velocity on the Linear path, and this run the data on the GVP path",
                "SiT's weights were trained with a time scale of 1.0, and this run has 1000.0"]),
        ({"transport": {"prediction": "noise"}, "model": {"time_scale": 1000.0}},
         ["the weights predict the noise on the Linear path, and this run the data on the GVP path"]),
        ({"transport": {"prediction": "data", "path_type": "GVP"}, "model": {}},
         ["the weights were trained with a time scale of 1.0, and this run has 1000.0"]),
        ({"transport": {"prediction": "data", "path_type": "GVP"}, "model": {"time_scale": 1000}}, []),
        ({"transport": "of another program"}, ["the weights predict the velocity", "a time scale of 1.0"]),
    ],
)  # fmt: skip
def test_weights_of_another_output_or_time_scale_give_a_warning(trained, words):
    transport = TransportConfig(path_type="GVP", prediction="data")
    model = ModelConfig("SiT-S/2", 8, 3, 2, 0.1, 2, time_scale=1000.0)
    config = RunConfig(model, transport, DataConfig(16), OptimiserConfig(), TrainConfig(Path("a"), Path("b")))
    lines = meaning_warnings(trained, config)
    assert len(lines) == len(words)
    assert all(line.startswith("warning: ") and part in line for line, part in zip(lines, words, strict=True))


def test_the_callers_tensors_are_not_shared_with_the_model(weights):
    state_dict, _ = adapt_sit_weights(weights, tiny())
    state_dict["blocks.0.attn.qkv.weight"].zero_()
    assert weights["blocks.0.attn.qkv.weight"].abs().sum() > 0


@pytest.mark.parametrize("change", [{"hidden_size": 48}, {"depth": 3}, {"mlp_ratio": 2.0}])
def test_weights_of_another_size_are_refused(weights, change):
    with pytest.raises(InputError, match="the weights to start from"):
        adapt_sit_weights(weights, tiny(**change))


def test_refusal_names_both_sizes():
    with torch.device("meta"):
        model = SiT(32, 2, 4, 768, 12, 12)
    with pytest.raises(InputError, match="the weights to start from are 2 blocks of width 24.*the model is SiT-B/2"):
        adapt_sit_weights(tiny().state_dict(), model)
