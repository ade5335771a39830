"""An image depends on checkpoint, mask, seed and index, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autoencoder import PixelSpace
from sample_ddp import Job, plan_jobs
from sampling import ImageSampler, SamplingSettings, image_seed
from train_utils import Machine
from transport import create_transport

CPU = Machine(rank=0, world_size=1, device=torch.device("cpu"), precision="float32")


@pytest.fixture
def sampler(model) -> Callable[..., ImageSampler]:
    """Builds a sampler of the small model with other settings than three Heun steps."""

    def make(**settings: object) -> ImageSampler:
        settings = SamplingSettings(**{"num_steps": 3, **settings})
        return ImageSampler(model, create_transport(prediction="data"), PixelSpace(4), CPU, settings)

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
    sampler(method="euler", num_steps=4, cfg_scale=2.0, guidance_interval=(0.2, 0.6))(masks(2), SEEDS[:2])
    assert batch_sizes == [2, 4, 4, 2]  # times 0, 1/4, 1/2, 3/4


@torch.inference_mode()
def test_no_guidance_costs_nothing(sampler, batch_sizes):
    draw = sampler()
    draw(masks(2), SEEDS[:2])
    assert batch_sizes == [2] * 6
    assert draw.nfe == 6


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
