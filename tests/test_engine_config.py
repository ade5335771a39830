"""The configuration of a run: every flag has its field, every field its rule for a continued run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

import train
from common.errors import InputError
from dataset.config import DataConfig
from engine.config import FIXED, LOCAL, RunConfig, default_prediction
from settings import resolve

WORDS = ["--data-path", "images", "--mask-path", "masks", "--vae", "none", "--model", "SiT-Ti/8", "--image-size", "64"]


@pytest.fixture
def config() -> RunConfig:
    return resolve(train.parse_args([*WORDS, "--window", "1", "99", "--lr", "2e-3"]))


def test_every_flag_of_training_has_one_field(config):
    flags = set(vars(train.parse_args(WORDS))) - {"given", "ckpt", "preset"}  # these choose, and are not kept
    assert set(config.flags()) == flags


def test_what_a_continued_run_may_not_change(config):
    fixed = {name for name, saved in config.flags().items() if saved.resume == FIXED}
    assert fixed == {
        "model", "image_size", "in_channels", "num_classes", "mask_values", "no_mask_detail", "no_patch_overlap",
        "time_scale", "init_from", "crop", "window", "window_scope", "window_channels", "path_type", "prediction",
        "loss_weight", "train_eps", "sample_eps", "time_sampling", "time_mean", "time_std", "look",
    }  # fmt: skip
    local = {name for name, saved in config.flags().items() if saved.resume == LOCAL}
    assert local == {
        "data_path", "mask_path", "results_dir", "run_name", "wandb", "device", "compile", "recompute_activations",
    }  # fmt: skip


def test_a_configuration_is_kept_as_plain_types_and_read_again(config):
    plain = json.loads(json.dumps(config.to_dict()))
    again = RunConfig.from_dict(plain)
    assert again.to_dict() == config.to_dict()
    assert replace(again, train=config.train) == config  # paths are kept as text
    assert plain["data"]["window"] == [1.0, 99.0] and plain["optimiser"]["lr"] == 2e-3


def test_what_a_checkpoint_lacks_or_has_too_much_is_no_obstacle(config):
    plain = config.to_dict()
    plain["model"]["from_the_future"] = 1
    del plain["optimiser"]["cooldown_steps"]
    assert RunConfig.from_dict(plain).optimiser == config.optimiser


def test_library_errors_name_fields_and_no_flags():
    for wrong, words in (
        ({"crop": "x"}, "crop 'x' is unknown; choose one of center, random"),
        ({"num_classes": 1}, "num_classes 1 must lie in 2.."),
        ({"window": (9, 9)}, "window 9 9: give two percentiles"),
        ({"channels": 0}, "channels 0 must lie in 1..1024"),
    ):
        with pytest.raises(InputError, match=f"^{words}") as caught:
            DataConfig(**{"image_size": 8, **wrong})
        (name,) = wrong
        assert caught.value.marked.startswith(f"`{name}` ") and "--" not in str(caught.value)


def test_wide_models_predict_the_velocity_of_pixels_and_narrow_ones_the_data():
    assert default_prediction("SiT-B/16", 3, in_pixels=False) == "velocity"
    channels = math.floor(0.75 * 768 / 256)
    assert default_prediction("SiT-B/16", channels, in_pixels=True) == "velocity"
    assert default_prediction("SiT-B/16", channels + 1, in_pixels=True) == "data"
