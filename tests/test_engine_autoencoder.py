"""Spaces: pixels as they are; latents whose scale, shift and channels come from the autoencoder's own config."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from engine import autoencoder
from engine.autoencoder import HUB_AUTOENCODERS, LatentSpace, PixelSpace, check_space, load_space, space_config

B, H, W = 3, 24, 32
FACTOR, CHANNELS, SCALE, SHIFT = 4, 5, 0.4, 0.15  # of the small autoencoder
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def space(autoencoder_folder: Path) -> LatentSpace:
    space = load_space(str(autoencoder_folder))
    assert isinstance(space, LatentSpace)
    return space


@pytest.fixture
def copy(autoencoder_folder: Path, tmp_path: Path) -> Path:
    """The small autoencoder's folder, for the test to spoil."""
    return Path(shutil.copytree(autoencoder_folder, tmp_path / "copy"))


def edit_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


# --- pixel space -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_space_is_the_identity(images, channels):
    space = load_space("none", channels)
    assert isinstance(space, PixelSpace)
    assert space_config(space) == {"vae": "none", "factor": 1, "channels": channels, "fingerprint": ""}
    assert torch.equal(space.encode(images), images) and torch.equal(space.decode(images), images)


def test_pixel_space_clips_what_a_model_overshoots_and_passes_gradients():
    x = torch.tensor([-1.5, 0.25, 1.5], dtype=torch.bfloat16)
    assert PixelSpace().decode(x).tolist() == [-1, 0.25, 1]
    assert PixelSpace().decode(x).dtype == torch.float32
    y = torch.tensor([0.25], requires_grad=True)
    PixelSpace().decode(y).backward()
    assert y.grad.item() == 1


# --- latent space ----------------------------------------------------------------------------------------------------


def test_scale_shift_channels_and_factor_come_from_the_folder(space, autoencoder_folder):
    assert (space.scale, space.shift, space.channels, space.factor) == (SCALE, SHIFT, CHANNELS, FACTOR)
    config = space_config(space)
    assert config == {
        "vae": str(autoencoder_folder),
        "factor": FACTOR,
        "channels": CHANNELS,
        "fingerprint": space.fingerprint,
    }
    assert len(space.fingerprint) == 16 and json.loads(json.dumps(config)) == config


def test_shift_is_zero_where_the_config_has_none(copy):
    edit_config(copy, shift_factor=None)
    assert load_space(str(copy)).shift == 0.0


def test_autoencoder_is_in_evaluation_mode_without_gradients(space):
    assert not any(module.training for module in space.vae.modules())
    assert not any(parameter.requires_grad for parameter in space.parameters())


def test_moments_are_the_posterior_shifted_and_scaled(space, images):
    mean, std = space.moments(images)
    with torch.no_grad():
        raw_mean, log_variance = space.vae.quant_conv(space.vae.encoder(images)).chunk(2, dim=1)
    assert mean.shape == std.shape == (B, CHANNELS, H // FACTOR, W // FACTOR)
    torch.testing.assert_close(mean, (raw_mean - SHIFT) * SCALE, rtol=0, atol=1e-6)
    torch.testing.assert_close(std, (log_variance / 2).exp() * SCALE, rtol=0, atol=1e-6)


def test_latents_without_sampling_are_the_mean(space, images):
    assert torch.equal(space.encode(images, sample=False), space.moments(images)[0])


def test_sampled_latents_have_the_mean_and_std_of_the_moments(space, images):
    torch.manual_seed(0)
    draws = 2000
    mean, std = space.moments(images[:1, :, :8, :8])
    samples = space.encode(images[:1, :, :8, :8].expand(draws, -1, -1, -1))
    score = (samples - mean) / std  # standard normal, at each of the 5 x 2 x 2 places
    assert score.mean(0).abs().max() < 4 / draws**0.5
    assert (score.std(0) - 1).abs().max() < 4 / (2 * draws) ** 0.5


def test_every_encoding_is_a_new_draw(space, images):
    torch.manual_seed(0)
    first = space.encode(images)
    assert (first - space.encode(images)).abs().amax((1, 2, 3)).min() > 0.1


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_change_nothing(space, images, chunk_size):
    chunked = LatentSpace(space.vae, "chunked")
    chunked.chunk_size = chunk_size
    results = []
    for each in (space, chunked):
        torch.manual_seed(0)
        latents = each.encode(images)
        results.append((latents, each.decode(latents)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_no_more_images_than_the_chunk_size_pass_at_once(space, images):
    sizes = []
    space.vae.encoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    space.vae.decoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    chunked = LatentSpace(space.vae, "chunked")
    chunked.chunk_size = 2
    chunked.decode(chunked.encode(images))
    assert sizes == [2, 1, 2, 1]


def test_decoded_latents_are_images_again(space, images):
    images_again = space.decode(space.encode(images))
    assert images_again.shape == images.shape and images_again.dtype == torch.float32
    assert images_again.abs().max() <= 1
    assert space.decode(100 * torch.ones(1, CHANNELS, 2, 3)).abs().max() <= 1


def test_decode_undoes_scale_and_shift(space):
    raw = torch.randn(B, CHANNELS, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = space.vae.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(space.decode((raw - SHIFT) * SCALE), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sample", [True, False])
def test_a_training_step_may_differentiate_through_latents(space, images, sample):
    latents = space.encode(images, sample)
    assert not latents.is_inference() and not latents.requires_grad
    layer = torch.nn.Conv2d(CHANNELS, 2, 1)
    layer(latents).square().mean().backward()
    assert layer.weight.grad.abs().min() > 0


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_gradients_pass_from_images_to_latents(space):
    latents = torch.randn(2, space.channels, 4, 4, requires_grad=True)
    space.decode(latents).square().mean().backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().min() > 0


def test_fingerprint_is_the_same_wherever_the_autoencoder_lies(space, copy):
    assert load_space(str(copy)).fingerprint == space.fingerprint


def test_fingerprint_differs_where_one_weight_differs(space, copy):
    edit_weights(copy, lambda state: state["decoder.conv_out.bias"].view(-1)[0].add_(1e-3))
    assert load_space(str(copy)).fingerprint != space.fingerprint


@pytest.mark.parametrize("entry", [{"scaling_factor": 0.9}, {"shift_factor": 0.0}])
def test_fingerprint_differs_where_latents_are_scaled_or_shifted_otherwise(space, copy, entry):
    edit_config(copy, **entry)
    assert load_space(str(copy)).fingerprint != space.fingerprint


# --- errors ----------------------------------------------------------------------------------------------------------


def refused(vae: str | Path, match: str) -> str:
    """The message of ``load_space``, which is to be an InputError that names the field with its value, in one line."""
    with pytest.raises(InputError, match=match) as caught:
        load_space(str(vae))
    message = str(caught.value)
    assert message.startswith(f"vae {vae}: ") and "\n" not in message
    return message


def test_missing_folder_is_refused_with_what_may_be_given(tmp_path):
    message = refused(tmp_path / "absent", "no such folder")
    assert all(word in message for word in ("config.json", "ema", "mse", "none"))
    with pytest.raises(InputError, match="absent"):
        check_space(str(tmp_path / "absent"))


def test_a_file_is_no_folder(autoencoder_folder):
    refused(autoencoder_folder / WEIGHTS, "no such folder")


def test_folder_without_config_is_refused_before_anything_is_loaded(copy):
    (copy / "config.json").unlink()
    refused(copy, "config.json")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        check_space(str(copy))


@pytest.mark.parametrize("vae", ["none", *HUB_AUTOENCODERS])
def test_names_pass_the_first_check_without_a_network(vae):
    check_space(vae)


def test_whole_folder_passes_the_first_check(autoencoder_folder):
    check_space(str(autoencoder_folder))


@pytest.mark.parametrize("content", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>404</html>" * 99])
def test_corrupt_weights_are_refused(copy, content):
    (copy / WEIGHTS).write_bytes(content((copy / WEIGHTS).read_bytes()))
    refused(copy, "not a diffusers autoencoder that can be loaded")


@pytest.mark.parametrize("config", ["{not json", ""])
def test_corrupt_config_is_refused(copy, config):
    (copy / "config.json").write_text(config)
    refused(copy, "not a diffusers autoencoder that can be loaded")


@pytest.mark.parametrize(
    "entry",
    [
        {"block_out_channels": []},
        {"block_out_channels": [0]},
        {"block_out_channels": [8, -12, 16]},
        {"block_out_channels": [8] * 60, "down_block_types": ["a"] * 60, "up_block_types": ["a"] * 60},
        {"norm_num_groups": 0},
        {"norm_num_groups": "x"},
        {"latent_channels": 0},
        {"layers_per_block": -1},
        {"down_block_types": []},
        {"up_block_types": ["UpDecoderBlock2D"]},
    ],
)
def test_a_config_of_impossible_numbers_is_refused_before_anything_is_loaded(copy, entry):
    edit_config(copy, **entry)
    name = list(entry)[0]
    refused(copy, rf"not a diffusers autoencoder that can be loaded \({name} (is|has) ")
    with pytest.raises(InputError, match=name):
        check_space(str(copy))


def test_weights_of_another_shape_are_refused(copy):
    edit_weights(copy, lambda state: state.update({"encoder.conv_in.weight": torch.zeros(9, 3, 3, 3)}))
    refused(copy, "not a diffusers autoencoder that can be loaded")


def test_weights_that_lack_a_part_are_refused(copy):
    edit_weights(copy, lambda state: [state.pop(key) for key in list(state) if key.startswith("decoder.")])
    logger, said = logging.getLogger("diffusers"), list[logging.LogRecord]()
    keep = logging.Handler()
    keep.emit = said.append  # type: ignore[method-assign]
    logger.addHandler(keep)
    level = logger.level
    refused(copy, "decoder")
    logger.removeHandler(keep)
    assert said == [] and logger.level == level  # diffusers would list all tensors that are missing


def test_pickled_weights_are_refused_unread(copy):
    state = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    torch.save(state, copy / "diffusion_pytorch_model.bin")
    refused(copy, "safetensors")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Calls of the loader, which finds nothing on disk and no network."""
    calls = []

    def load(source: str, local_files_only: bool) -> None:
        calls.append((source, local_files_only))
        raise OSError("We couldn't connect to 'https://huggingface.co'\nsecond line")

    monkeypatch.setattr(autoencoder, "_load", load)
    return calls


@pytest.mark.parametrize("vae, repository", HUB_AUTOENCODERS.items())
def test_hub_name_without_network_says_which_folder_to_give(hub, caplog, vae, repository):
    with caplog.at_level(logging.INFO):
        message = refused(vae, "neither on disk nor to be had from the hub")
    assert repository in message and "vae FOLDER" in message and "vae none" in message
    assert hub == [(repository, True), (repository, False)]  # the disk first
    assert "asking the hub" in caplog.text


def test_folder_on_disk_never_asks_the_hub(hub, autoencoder_folder):
    refused(autoencoder_folder, "couldn't connect")
    assert hub == [(str(autoencoder_folder), True)]


def test_hub_name_that_is_on_disk_never_asks_the_hub(monkeypatch, space):
    calls = []
    monkeypatch.setattr(
        autoencoder, "_load", lambda source, local_files_only: calls.append(local_files_only) or space.vae
    )
    assert load_space("ema").name == "ema"
    assert calls == [True]
