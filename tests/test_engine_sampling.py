"""An image depends on checkpoint, mask, seed and index, and on nothing else."""

from __future__ import annotations

import copy
import functools
import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_sit import write_checkpoint
from torch._dynamo.testing import CompileCounter

from common.errors import InputError
from dataset.config import DataConfig
from engine.autoencoder import PixelSpace, load_space
from engine.checkpoint import read_checkpoint, save_checkpoint
from engine.machine import Machine
from engine.peers import Peers
from engine.sampling import ImageSampler, SamplingSettings, image_seed, load_trained
from layers.rows import KeptModulation
from synthetic.writer import Job, plan_jobs
from transport import TIME_SHIFT, create_transport

CPU = Machine(rank=0, world_size=1, device=torch.device("cpu"), precision="float32")


@pytest.fixture
def sampler(model) -> Callable[..., ImageSampler]:
    """Builds a sampler of the small model with other settings than three Heun steps."""

    def make(**settings: Any) -> ImageSampler:
        own = SamplingSettings(**{"num_steps": 3, **settings})
        return ImageSampler(model, create_transport(prediction="data"), PixelSpace(4), CPU, own)

    return make


@pytest.fixture
def batch_sizes(model) -> list[int]:
    """The batch size of every network call of the small model so far."""
    sizes: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return sizes


def masks(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 12, 8) hard class maps."""
    labels = torch.randint(0, 3, (count, 12, 8), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()


SEEDS = [image_seed(5, index) for index in range(5)]


@torch.inference_mode()
def test_every_network_call_is_a_sign_of_progress_for_the_processes_that_wait(sampler):
    """Without one, they would take hours of sampling for a standstill."""
    draw = sampler()
    peers = Peers(dist.HashStore(), 0, ["nodea"])
    draw.machine = replace(CPU, peers=peers)
    draw(masks(2), SEEDS[:2])
    peers.leave()
    assert peers._progress == draw.nfe > 0


@torch.inference_mode()
def test_an_image_is_the_same_alone_and_among_others(sampler):
    draw, y = sampler(), masks(5)
    together = draw(y, SEEDS, batch_size=6)
    for index in range(5):
        assert torch.equal(draw(y[index : index + 1], SEEDS[index : index + 1], batch_size=6)[0], together[index])
    assert (draw(y[:1], SEEDS[:1])[0] - together[0]).abs().max() < 1e-4  # another batch size: rounding only


@torch.inference_mode()
def test_sde_noise_is_every_images_own(sampler):
    draw, y = sampler(mode="SDE", method="Euler"), masks(4)
    together = draw(y, SEEDS[:4], batch_size=4)
    shuffled = draw(y[[2, 0]], [SEEDS[2], SEEDS[0]], batch_size=4)
    assert torch.equal(shuffled[0], together[2]) and torch.equal(shuffled[1], together[0])


@torch.inference_mode()
def test_seed_and_mask_change_the_image(sampler):
    draw, y = sampler(), masks(2)
    images = draw(y[[0, 0, 1]], [SEEDS[0], SEEDS[1], SEEDS[0]])
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    assert not torch.allclose(images[0], images[2], atol=1e-2)


@torch.inference_mode()
def test_nothing_is_doubled_outside_the_guidance_interval(sampler, batch_sizes):
    sampler(method="euler", num_steps=4, cfg_scale=2.0, guidance_interval=(0.2, 0.6), time_shift=1)(masks(2), SEEDS[:2])
    assert batch_sizes == [2, 4, 4, 2]  # times 0, 1/4, 1/2, 3/4


@torch.inference_mode()
@pytest.mark.parametrize("end", [0.6, 0.7])
def test_the_guidance_interval_includes_its_ends(model, batch_sizes, end):
    """In 32 bits, 0.6 is more than in 64 bits, and 0.7 less."""
    interval = {0.6: (0.0, 0.6), 0.7: (0.7, 1.0)}[end]
    own = SamplingSettings(method="euler", num_steps=10, cfg_scale=2.0, guidance_interval=interval, time_shift=1)
    ImageSampler(model, create_transport(), PixelSpace(4), CPU, own)(masks(2), SEEDS[:2])
    assert batch_sizes == ([4] * 7 + [2] * 3 if end == 0.6 else [2] * 7 + [4] * 3)


@torch.inference_mode()
def test_only_an_ode_turns_images_into_noise(sampler):
    draw = sampler(mode="SDE", method="Euler")
    with pytest.raises(InputError, match="only an ODE"):
        draw.encode(torch.zeros(2, 1, 12, 8), masks(2))


@torch.inference_mode()
def test_no_guidance_costs_nothing(sampler, batch_sizes):
    draw = sampler()
    draw(masks(2), SEEDS[:2])
    assert batch_sizes == [2] * 4  # three steps of ab2
    assert draw.nfe == 4


def partly_noise(count: int, height: int) -> torch.Tensor:
    """(count, 3, 96, 64) hard class maps, noise above ``height``, background below."""
    labels = torch.zeros(count, 96, 64, dtype=torch.long)
    labels[:, :height] = torch.randint(0, 3, (count, height, 64), generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()


@pytest.fixture
def large_sampler(make_model) -> Callable[..., ImageSampler]:
    """Builds a sampler of 24 x 16 tokens, four mask pixels each way."""

    def make(compiled: bool, **settings: Any) -> ImageSampler:
        model = make_model(input_size=(48, 32), mask_pixels=4).requires_grad_(False)
        own = SamplingSettings(method="euler", num_steps=2, **settings)
        return ImageSampler(model, create_transport(prediction="data"), PixelSpace(4), CPU, own, compiled)

    return make


@torch.inference_mode()
def test_a_compiled_sampler_has_one_graph_of_a_block_whatever_the_number_of_distinct_rows(large_sampler, monkeypatch):
    counter = CompileCounter()  # runs the graphs as they are: no C++ compiler is needed
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    draw, plain = large_sampler(True, cfg_scale=2.0), large_sampler(False, cfg_scale=2.0)
    rows, graphs = [], []
    for y in (partly_noise(4, 4), partly_noise(4, 40), partly_noise(4, 0)):
        rows.append(len(draw.model.embed_mask(y, share_rows=True).embedding))
        torch.testing.assert_close(draw(y, SEEDS[:4]), plain(y, SEEDS[:4]), rtol=0, atol=1e-4)
        graphs.append(counter.frame_count)
    assert len(set(rows)) > 1
    assert graphs == [2, 2, 2]  # a block's and the last layer's


@pytest.mark.slow  # minutes of C++
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
@torch.inference_mode()
def test_a_compiled_sampler_draws_the_same_images(large_sampler):
    y = partly_noise(4, 40)
    difference = large_sampler(True)(y, SEEDS[:4]) - large_sampler(False)(y, SEEDS[:4])
    assert difference.abs().max() < 2 / 255


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0}], ids=["plain", "guided"])
def test_weights_rounded_once_draw_the_same_bits_as_weights_rounded_at_every_call(make_model, settings):
    model = make_model(mask_pixels=2)
    machine = Machine(rank=0, world_size=1, device=torch.device("cpu"), precision="bf16")
    settings = SamplingSettings(num_steps=2, **settings)
    once = copy.deepcopy(model).keep_weights_in(torch.bfloat16)
    images = [
        ImageSampler(one, create_transport(), PixelSpace(4), machine, settings)(masks(3), SEEDS[:3])
        for one in (model, once)
    ]
    assert once.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert torch.equal(*images)


@torch.inference_mode()
def test_latents_are_decoded_in_chunks_and_in_the_precision_of_the_machine(make_model, autoencoder_folder):
    model = make_model(in_channels=5, mask_pixels=8)
    space = load_space(str(autoencoder_folder))
    images = {}
    for precision, chunk_size in (("float32", 8), ("float32", 2), ("bf16", 2)):
        space.chunk_size = chunk_size
        machine = Machine(rank=0, world_size=1, device=torch.device("cpu"), precision=precision)
        draw = ImageSampler(model, create_transport(), space, machine, SamplingSettings(num_steps=1))
        noise = draw._noise([torch.Generator().manual_seed(seed) for seed in SEEDS[:3]], draw.latent_shape)
        images[precision, chunk_size] = draw._decode(noise)
    exact, chunks, rounded = images.values()
    assert exact.shape == (3, 3, 48, 32) and exact.dtype == rounded.dtype == torch.float32
    assert (chunks - exact).abs().max() < 1e-5
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_a_gradient_reaches_a_soft_mask(sampler):
    y = masks(2).requires_grad_()
    sampler(num_steps=2, cfg_scale=2.0)(y, SEEDS[:2]).square().sum().backward()
    assert y.grad is not None and (y.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_jobs_count_through_masks_and_samples():
    assert plan_jobs(["a", "b"], None, None) == [Job("a", "a", 0), Job("b", "b", 1)]
    assert [job.name for job in plan_jobs(["a", "b"], 2, None)] == ["a_0001", "a_0002", "b_0001", "b_0002"]


def test_a_number_of_samples_is_spread_evenly_over_the_masks():
    jobs = plan_jobs(["a", "b", "c"], None, 4)
    assert [(job.name, job.index) for job in jobs] == [("a_0001", 0), ("a_0002", 1), ("b_0001", 2), ("c_0001", 4)]


@torch.no_grad()
def test_noise_of_an_image_leads_back_to_it(model):
    settings = SamplingSettings(num_steps=60)
    draw = ImageSampler(model, create_transport(prediction="velocity"), PixelSpace(4), CPU, settings)
    images, y = 0.3 * torch.tanh(torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))), masks(2)
    again = draw.decode(draw.encode(images, y), y)
    assert (again - images).abs().max() < 0.01
    assert not torch.allclose(draw.encode(images, masks(2, seed=9)), draw.encode(images, y), atol=1e-2)


@torch.no_grad()
def test_likelihood_is_finite_and_the_same_for_the_same_seeds(model):
    settings = SamplingSettings(num_steps=10)
    draw = ImageSampler(model, create_transport(prediction="velocity"), PixelSpace(4), CPU, settings)
    images, y = torch.zeros(2, 4, 12, 8), masks(2)
    first, again = (draw.likelihood(images, y, SEEDS[:2]) for _ in range(2))
    assert torch.isfinite(first.logp).all()
    assert torch.equal(first.logp, again.logp)
    assert torch.allclose(first.bits_per_dim, -first.logp / (4 * 12 * 8 * torch.log(torch.tensor(2.0))).double())


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{}, {"mode": "SDE", "method": "Euler"}], ids=["ODE", "SDE"])
def test_a_trajectory_leads_from_the_noise_to_the_image(sampler, settings):
    draw, y = sampler(num_steps=6, **settings), masks(1)
    frames = draw.trajectory(y[0], SEEDS[0], batch_size=1, most=4)
    noise = torch.randn(draw.latent_shape, generator=torch.Generator().manual_seed(SEEDS[0]))
    assert len(frames) == 4
    assert torch.equal(frames[0], draw.space.decode(noise[None])[0])
    assert torch.equal(frames[-1], draw(y, SEEDS[:1])[0])


@torch.inference_mode()
def test_a_trajectory_of_a_field_ends_at_the_field(sampler):
    draw = sampler(tile_overlap=0.25)
    field = torch.nn.functional.one_hot(torch.arange(17 * 15).reshape(17, 15) % 3, 3).permute(2, 0, 1).float()
    frames = draw.trajectory(field, SEEDS[0], batch_size=3, most=100)
    assert frames.shape == (4, 4, 17, 15)
    assert torch.equal(frames[-1], draw.draw_field(field, SEEDS[0], batch_size=3))


@torch.inference_mode()
def test_parts_of_a_large_field_keep_no_modulation_each(sampler):
    """It would take megabytes for each part until the field is done."""
    draw, kept = sampler(num_steps=1, tile_overlap=0.0), []
    draw.before_call = lambda time: kept.append(sum(type(one) is KeptModulation for one in gc.get_objects()))
    draw.draw_field(masks(1)[0].repeat(1, 3, 3), SEEDS[0], batch_size=2)
    assert max(kept) <= 1


@torch.inference_mode()
@pytest.mark.parametrize("settings", [{}, {"mode": "SDE", "method": "Euler"}, {"tile_overlap": 0.25}])
def test_a_trajectory_keeps_only_the_states_that_it_shows(sampler, settings):
    """A field of a million pixels with 250 steps would fill gigabytes."""
    draw, kept = sampler(num_steps=60, **settings), []
    shape = (1, *draw.latent_shape)  # of a state, also of a field of this size
    y = masks(1)[0]

    def count(time: float) -> None:
        if time > 0.9:
            kept.append(sum(type(one) is torch.Tensor and one.shape == shape for one in gc.get_objects()))

    draw.before_call = count
    assert len(draw.trajectory(y, SEEDS[0], batch_size=1, most=4)) == 4
    assert kept and max(kept) < 4 + 12  # and those of the present step


@torch.inference_mode()
def test_a_drawing_ends_where_the_caller_wants(model, sampler):
    """What is called before a network call may raise, and no further call is made."""
    calls = []

    def stop(time: float) -> None:
        calls.append(time)
        if len(calls) == 3:
            raise KeyError("enough")

    draw = ImageSampler(
        model, create_transport(prediction="data"), PixelSpace(4), CPU, sampler().settings, before_call=stop
    )
    with pytest.raises(KeyError, match="enough"):
        draw(masks(1), SEEDS[:1])
    assert len(calls) == 3 and calls[0] == 0 < calls[2] < 1


def test_settings_say_the_time_shift_of_an_ode():
    import sample_ddp
    from settings import sampling_settings

    def kept(*flags):
        args = sample_ddp.parse_args([*flags, "--ckpt", "a.pt", "--mask-path", "masks"])
        return sampling_settings(args).to_dict().get("time_shift")

    assert (kept("ODE"), kept("ODE", "--time-shift", "3"), kept("SDE")) == (TIME_SHIFT, 3.0, None)
    assert kept("ODE", "--sampling-method", "dopri5") == 1.0  # it chooses its own steps


@torch.inference_mode()
def test_guidance_on_the_look_stays_within_the_guidance_interval(make_model):
    model, calls = make_model(look_numbers=3), []
    model.register_forward_hook(lambda module, inputs, output: calls.append(inputs[2].look is not None))
    own = SamplingSettings(method="euler", num_steps=4, look_scale=2.0, guidance_interval=(0.2, 0.6), time_shift=1)
    draw = ImageSampler(model, create_transport(prediction="data"), PixelSpace(4), CPU, own)
    draw(masks(2), SEEDS[:2], looks=torch.ones(2, 3))
    assert calls == [True, True, False, True, False, True]  # without look at times 1/4 and 1/2


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("data", {"image_size": 16, "num_classes": 3}, "channels 1 of the model and 3 of the data"),
        ("data", {"image_size": 16, "channels": 1}, "num_classes 3 of the model and 2 of the data"),
        ("data", {"image_size": 24, "channels": 1, "num_classes": 3}, "image_size 16 of the model and 24 of the data"),
        ("model", {"name": "SiT-Ti/8"}, "input_size"),
        ("space", {"vae": "none"}, "factor"),
    ],
)
def test_a_checkpoint_that_lacks_settings_or_contradicts_itself_is_refused_with_its_name(
    tmp_path, section, values, words
):
    path = write_checkpoint(tmp_path / "a.pt", DataConfig(16, num_classes=3, channels=1), step=1)
    assert load_trained(path, CPU).data.channels == 1
    state = read_checkpoint(path)
    save_checkpoint(path, state | {"config": state["config"] | {section: values}})
    with pytest.raises(InputError, match=rf"a\.pt.*{words}"):
        load_trained(path, CPU)
