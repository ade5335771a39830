"""--tile: images of any height and width, without seams, from tiles of the training size."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from script_helpers import run
from tiny_sit import write_checkpoint
from torch._dynamo.testing import CompileCounter

import sample
import sample_ddp
from common.errors import InputError
from dataset.config import DataConfig
from dataset.views import whole_view
from engine import machine
from engine.autoencoder import PixelSpace, load_space
from engine.machine import Machine
from engine.sampling import ImageSampler, SamplingSettings, mirror_to
from engine.tiling import Tiles
from models import SiT
from transport import create_transport

CPU = Machine(rank=0, world_size=1, device=torch.device("cpu"), precision="float32")
SDE = {"mode": "SDE", "method": "Euler"}


@pytest.fixture
def sampler(model) -> Callable[..., ImageSampler]:
    """Builds a sampler of the small model: tiles of 12 x 8, half of which neighbours share."""

    def make(**settings: Any) -> ImageSampler:
        own = SamplingSettings(**{"num_steps": 3, "tile_overlap": 0.5, **settings})
        return ImageSampler(model, create_transport(prediction="data"), PixelSpace(4), CPU, own)

    return make


def hard_mask(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(3, height, width) class map of blocks of 3 x 3 pixels."""
    labels = torch.randint(0, 3, (-(-height // 3), -(-width // 3)), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(3, 0).repeat_interleave(3, 1)[:height, :width]
    return torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float()


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0}, SDE])
@torch.inference_mode()
def test_a_field_of_the_training_size_is_the_image_without_tiles(sampler, settings):
    draw, mask = sampler(**settings), hard_mask(12, 8)
    assert (draw.draw_field(mask, 7, 5) - draw(mask[None], [7])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0}, SDE])
@torch.inference_mode()
def test_any_height_and_width_comes_out_and_the_batch_size_hardly_matters(sampler, settings):
    draw, mask = sampler(**settings), hard_mask(29, 21)
    image = draw.draw_field(mask, 7, 4)
    assert image.shape == (4, 29, 21)
    assert torch.equal(draw.draw_field(mask, 7, 4), image)
    assert (draw.draw_field(mask, 7, 3) - image).abs().max() < 1e-4
    assert not torch.allclose(draw.draw_field(mask, 8, 4), image, atol=1e-2)


@torch.inference_mode()
def test_a_mask_smaller_than_a_tile_is_padded_and_cropped(sampler):
    image = sampler().draw_field(hard_mask(5, 19), 7, 4)
    assert image.shape == (4, 5, 19)


def test_reflection_padding_can_exceed_the_mask():
    row = torch.tensor([[1, 2, 3]])
    assert mirror_to(row, 2, 8).tolist() == [[1, 2, 3, 3, 2, 1, 1, 2]] * 2


@torch.inference_mode()
def test_no_network_call_is_larger_than_the_batch_and_masks_are_embedded_once(sampler, model, monkeypatch):
    sizes, embedded, embed = [], [], model.embed_mask
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    monkeypatch.setattr(model, "embed_mask", lambda y, **more: embedded.append(len(y)) or embed(y, **more))
    sampler().draw_field(hard_mask(24, 20), 7, 4)  # 3 rows of 4 tiles
    assert sizes == [4, 4, 4] * 4  # three steps of ab2
    assert embedded == [4, 4, 4]


@torch.inference_mode()
def test_latents_are_decoded_in_tiles(make_model, autoencoder_folder):
    space = load_space(str(autoencoder_folder))
    model = make_model(in_channels=5, mask_pixels=8)  # tiles of 48 x 32 pixels
    settings = SamplingSettings(num_steps=2, tile_overlap=0.5)
    draw = ImageSampler(model, create_transport(), space, CPU, settings)
    calls, decode = [], space.vae.decode
    space.vae.decode = lambda latents: calls.append(tuple(latents.shape)) or decode(latents)
    image = draw.draw_field(hard_mask(61, 45), 7, 4)  # 16 x 12 latents: two rows of two tiles
    assert image.shape == (3, 61, 45) and image.abs().max() <= 1
    assert calls == [(4, 5, 12, 8)]
    mask = hard_mask(48, 32)
    assert (draw.draw_field(mask, 7, 4) - draw(mask[None], [7])[0]).abs().max() < 1e-5


def test_a_gradient_reaches_a_soft_mask_through_all_tiles(sampler):
    mask = hard_mask(14, 18).requires_grad_()
    sampler(num_steps=1, method="euler", cfg_scale=2.0).draw_field(mask, 7, 4).square().sum().backward()
    assert (mask.grad.abs().sum(dim=0) > 0).float().mean() > 0.99


# ----------------------------------------------------------------------------------------------------------- no seam


class PixelwiseModel:
    """E[x1 given x_t] where pixels are independent, x1 ~ N(m, s^2) with m the mask's first channel: exact anywhere.

    ``disagreement`` brightens what a tile says by this times the share of the second channel in it.
    """

    in_channels, patch_size, grid, spread = 1, 2, (6, 4), 0.2

    def __init__(self, disagreement: float = 0.0) -> None:
        self.disagreement = disagreement

    def embed_mask(self, y: torch.Tensor, share_rows: bool = False, keep: bool = True) -> torch.Tensor:
        return y[:, :1] + self.disagreement * (y[:, 1:2].mean(dim=(2, 3), keepdim=True) - 1 / 3)

    def forward_with_cfg(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
        t = t.view(-1, 1, 1, 1)
        gain = t * self.spread**2 / (t**2 * self.spread**2 + (1 - t) ** 2)
        return y + gain * (x - t * y)


def draw_field(mask: torch.Tensor, disagreement: float = 0.0, overlap: float = 0.5, **settings: Any) -> torch.Tensor:
    own = SamplingSettings(**{"num_steps": 8, "tile_overlap": overlap, **settings})
    sampler = ImageSampler(
        cast(SiT, PixelwiseModel(disagreement)), create_transport(prediction="data"), PixelSpace(1), CPU, own
    )
    return sampler.draw_field(mask, 3, 4)[0]


@pytest.mark.parametrize("settings", [{}, {**SDE, "num_steps": 20}])
@torch.inference_mode()
def test_tiles_that_agree_equal_one_network_for_the_whole_field(settings):
    mask, settings = 0.8 * hard_mask(30, 22) - 0.4, SamplingSettings(**{"num_steps": 8, **settings})
    whole = ImageSampler(PixelwiseModel(), create_transport(prediction="data"), PixelSpace(1), CPU, settings)
    whole.latent_shape = (1, 30, 22)
    assert torch.allclose(
        draw_field(mask, **vars(settings) | {"tile_overlap": 0.4}), whole(mask[None], [3])[0, 0], atol=1e-5
    )


def border_gradient(image: torch.Tensor, tiles: Tiles) -> float:
    """Mean absolute difference of pixels across the tiles' borders, over that of all other neighbours."""
    across: list[float] = []
    inside: list[float] = []
    for axis in (0, 1):
        steps = image.diff(dim=axis).abs().mean(dim=1 - axis)
        starts, side, length = tiles.starts[axis], tiles.size[axis], tiles.field[axis]
        borders = {*starts, *(start + side for start in starts)} - {0, length}
        for position, step in enumerate(steps.tolist(), 1):
            (across if position in borders else inside).append(step)
    return float(np.mean(across) / np.mean(inside))


@torch.inference_mode()
def test_gradients_across_tile_borders_equal_those_inside():
    """Tiles that disagree on the brightness: tiles side by side show it as steps, blended ones do not."""
    mask = hard_mask(120, 96)
    mask[0] = 0
    tiles, blended = Tiles((120, 96), (12, 8), (0, 0)), Tiles((120, 96), (12, 8), (6, 4))
    side_by_side, smooth = draw_field(mask, 2.0, 0), draw_field(mask, 2.0)
    assert border_gradient(draw_field(mask, 0.0, 0), tiles) == pytest.approx(1, abs=0.05)
    assert border_gradient(side_by_side, tiles) > 1.5
    assert border_gradient(smooth, blended) == pytest.approx(1, abs=0.05)
    assert border_gradient(smooth, tiles) == pytest.approx(1, abs=0.05)


# ------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small untrained model of 16 x 16 pixels, tiles at native scale."""
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "0000001.pt", DataConfig(16, crop="random"), step=1
    )


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """Instance labels of three sizes, none of them a multiple of the patch."""
    folder = tmp_path_factory.mktemp("masks")
    for name, (height, width) in {"a": (35, 21), "b": (16, 16), "c": (9, 40)}.items():
        rows, columns = np.indices((height, width))
        label = (rows // 8 * 5 + columns // 8 + 1) * 7 * ((rows % 8 < 6) & (columns % 8 < 6))
        Image.fromarray(label.astype(np.uint16)).save(folder / f"{name}.png")
    return folder


FAST = ["--device", "cpu", "--precision", "float32", "--num-sampling-steps", "2", "--per-proc-batch-size", "4"]


def sample_set(checkpoint: Path, masks: Path, folder: Path, *more: object) -> dict[str, bytes]:
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", masks, "--sample-dir", folder, *FAST, "--tile", *more]
    sample_ddp.main(sample_ddp.parse_args([str(word) for word in words]))
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_a_set_of_fields_has_every_masks_own_size_and_labels(checkpoint, masks, tmp_path):
    files = sample_set(checkpoint, masks, tmp_path / "set", "--export", "cellpose")
    with (tmp_path / "set" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, (height, width) in zip(rows, [(35, 21), (16, 16), (9, 40)], strict=True):
        with Image.open(tmp_path / "set" / row["image"]) as image, Image.open(tmp_path / "set" / row["label"]) as label:
            assert image.size == label.size == (width, height)
            with Image.open(tmp_path / "set" / row["source_mask"]) as mask:
                assert np.array_equal(np.array(label), np.array(mask))
        assert [int(row[f"crop_{name}"]) for name in ("height", "width", "top", "left")] == [height, width, 0, 0]
        assert row["tile_overlap"] == "0.25"
    assert "cellpose/a_masks.tif" in files
    (tmp_path / "set" / "images" / "c.png").unlink()
    assert sample_set(checkpoint, masks, tmp_path / "set", "--export", "cellpose") == files


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_make_the_same_fields_as_one(checkpoint, masks, tmp_path):
    files = sample_set(checkpoint, masks, tmp_path / "one")
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", masks, "--sample-dir", tmp_path / "two", *FAST, "--tile"]
    run("sample_ddp.py", *words, ranks=2)
    found = {f"images/{path.name}": path.read_bytes() for path in (tmp_path / "two" / "images").iterdir()}
    assert sorted(found) == ["images/a.png", "images/b.png", "images/c.png"]
    assert found == {name: content for name, content in files.items() if name.startswith("images/")}


def test_compiled_fields_of_all_sizes_share_a_graph_and_are_the_same(checkpoint, masks, tmp_path, monkeypatch):
    plain = sample_set(checkpoint, masks, tmp_path / "plain")
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    compiled = sample_set(checkpoint, masks, tmp_path / "compiled", "--compile")
    assert counter.frame_count == 2  # a block and the final layer
    for name in ("images/a.png", "images/b.png", "images/c.png"):
        one, other = (np.array(Image.open(io.BytesIO(files[name]))).astype(int) for files in (plain, compiled))
        assert np.abs(one - other).max() <= 2


def test_a_scale_resizes_mask_label_and_image_alike(checkpoint, masks, tmp_path):
    sample_set(checkpoint, masks, tmp_path / "set", "--tile-scale", 2)
    with Image.open(tmp_path / "set" / "masks" / "a.png") as label, Image.open(masks / "a.png") as mask:
        assert np.array_equal(np.array(label), np.array(mask).repeat(2, 0).repeat(2, 1))
    with Image.open(tmp_path / "set" / "images" / "a.png") as image:
        assert image.size == (42, 70)


def test_a_preview_of_a_field_shows_mask_and_images_whole(checkpoint, masks, tmp_path):
    words = ["ODE", "--ckpt", checkpoint, "--mask-path", masks / "a.png", "--num-samples", 2, *FAST, "--tile"]
    sample.main(sample.parse_args([*map(str, words), "--output", str(tmp_path / "grid.png")]))
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * (21 + 2) + 2, 35 + 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile-overlap", "0.3"], "--tile-overlap has no effect without --tile"),
        (["--tile-scale", "2"], "--tile-scale has no effect without --tile"),
        (["--tile", "--npz"], "--npz holds images of one size"),
        (["--tile", "--tile-overlap", "16"], "a tile has 16 pixels"),
    ],
)
def test_a_flag_of_large_fields_that_cannot_work_is_refused(checkpoint, masks, tmp_path, words, message):
    paths = ["--ckpt", str(checkpoint), "--mask-path", str(masks), "--sample-dir", str(tmp_path / "set")]
    with pytest.raises(InputError, match=message):
        sample_ddp.main(sample_ddp.parse_args(["ODE", *paths, *FAST, *words]))
    assert not (tmp_path / "set").exists()


def test_tiles_that_change_nothing_are_refused(checkpoint, masks):
    words = [
        "ODE",
        "--ckpt",
        str(checkpoint),
        "--mask-path",
        str(masks / "b.png"),
        *FAST,
        "--tile",
        "--mask-type",
        "instances",
    ]
    with pytest.raises(InputError, match="--tile has no effect: the masks have the model's own 16 x 16 pixels"):
        sample.main(sample.parse_args(words))


def test_a_checkpoint_of_resized_images_needs_the_scale(masks, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "0000001.pt", DataConfig(16, crop="center"), step=1)
    with pytest.raises(InputError, match="--tile-scale 16 / "):
        sample_set(checkpoint, masks, tmp_path / "set")
    assert "images/a.png" in sample_set(checkpoint, masks, tmp_path / "set", "--tile-scale", 1)


@pytest.mark.parametrize("scale", [1e300, 1e9, 2000.0])
def test_a_scale_that_makes_a_field_too_large_is_refused_before_anything_is_allocated(scale):
    with pytest.raises(InputError, match=r"makes 40 x 52 pixels longer than 65536; give a smaller one"):
        whole_view(40, 52, scale)
    assert whole_view(40, 52, 2.0).size == (80, 104)
