"""Images of one, two and more channels keep their number from the files to the synthetic set and its measures."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from script_helpers import FEW_STEPS, TINY, call, write_pairs

import evaluate
import sample
import sample_ddp
import train
from common.errors import InputError, run_command
from common.pictures import as_rgb
from dataset.files import encode_image, encode_tiff, read_image
from engine.autoencoder import check_space
from engine.checkpoint import read_checkpoint


def two_channel_pairs(folder: Path) -> tuple[Path, Path]:
    """``write_pairs`` with 16-bit images of two channels: the cells, and their negative a hundred times as bright."""
    images, masks = write_pairs(folder)
    for path in images.glob("*.png"):
        gray = np.array(Image.open(path)).astype(np.uint16)
        tifffile.imwrite(path.with_suffix(".tif"), np.stack([gray, 100 * (255 - gray)]), metadata={"axes": "CYX"})
        path.unlink()
    return images, masks


def trained(folder: Path, images: Path, masks: Path, channels: int) -> Path:
    """Checkpoint of two steps."""
    paths = ["--data-path", images, "--mask-path", masks, "--results-dir", folder, "--run-name", "run"]
    call(train, *paths, *TINY, "--max-steps", 2, "--in-channels", channels)
    return folder / "run" / "checkpoints" / "0000002.pt"


@pytest.fixture(scope="module", params=[1, 2])
def sampled(request, tmp_path_factory) -> tuple[int, Path, Path, tuple[Path, Path]]:
    """Channels, checkpoint, sampled set and pairs of a model of one and of two channels."""
    folder = tmp_path_factory.mktemp(f"channels_{request.param}")
    pairs = write_pairs(folder / "pairs") if request.param == 1 else two_channel_pairs(folder / "pairs")
    checkpoint = trained(folder, *pairs, request.param)
    call(
        sample_ddp, "ODE", "--ckpt", checkpoint, "--data-path", pairs[0], "--mask-path", pairs[1], "--sample-dir",
        folder / "set", "--npz", "--export", "cellpose", "stardist", "coco", *FEW_STEPS,
    )  # fmt: skip
    return request.param, checkpoint, folder / "set", pairs


def test_model_data_and_space_have_the_channels(sampled):
    channels, checkpoint, _, _ = sampled
    config = read_checkpoint(checkpoint)["config"]
    assert config["model"]["in_channels"] == config["data"]["channels"] == config["space"]["channels"] == channels
    with Image.open(checkpoint.parents[1] / "previews" / "0000002.png") as preview:
        assert preview.mode == "RGB"


def test_set_and_exports_hold_the_channels(sampled):
    channels, _, folder, _ = sampled
    suffix = {1: ".png", 2: ".tif"}[channels]
    image = read_image(folder / "images" / f"cell_3{suffix}")
    assert image.shape == (16, 16, channels) and image.dtype == np.uint8
    cellpose, stardist = folder / "cellpose" / "cell_3_img.tif", folder / "stardist" / "images" / "cell_3.tif"
    assert np.array_equal(read_image(cellpose), image) and np.array_equal(read_image(stardist), image)
    assert tifffile.imread(cellpose).shape == {1: (16, 16), 2: (2, 16, 16)}[channels]
    assert tifffile.imread(stardist).shape == {1: (16, 16), 2: (16, 16, 2)}[channels]  # StarDist: channels last
    assert np.array_equal(read_image(folder / "coco" / "images" / f"cell_3{suffix}"), image)
    with np.load(folder.with_name("set.npz")) as arrays:
        assert arrays["arr_0"].shape == (6, 16, 16, {1: 3, 2: 2}[channels])
        assert np.array_equal(arrays["arr_0"][3][:, :, :channels], image)
    with (folder / "manifest.csv").open(newline="") as file:
        assert all((folder / row["image"]).suffix == suffix for row in csv.DictReader(file))


def test_finished_set_is_left_alone_and_a_torn_image_is_made_again(sampled):
    _, checkpoint, folder, pairs = sampled
    before = {path: path.read_bytes() for path in (folder / "images").iterdir()}
    torn = sorted(before)[2]
    torn.write_bytes(before[torn][: len(before[torn]) // 2])
    paths = ["--data-path", pairs[0], "--mask-path", pairs[1], "--sample-dir", folder]
    call(sample_ddp, "ODE", "--ckpt", checkpoint, *paths, *FEW_STEPS)
    assert {path: path.read_bytes() for path in (folder / "images").iterdir()} == before


@pytest.mark.parametrize("measure", ["threshold", "population", "fidelity", "realism", "memorisation"])
def test_measures_take_the_set(sampled, measure, tmp_path):
    _, _, folder, (images, masks) = sampled
    real = {
        "fidelity": ["--data-path", images, "--mask-path", masks, "--steps", 2, "--cache-dir", tmp_path],
        "realism": ["--data-path", images, "--mask-path", masks, "--steps", 2, "--cache-dir", tmp_path],
        "memorisation": ["--data-path", images],
    }
    call(evaluate, measure, folder, *real.get(measure, []))
    assert (folder / "evaluation" / f"{measure}.json").is_file()


def test_preview_likelihood_and_round_trip(sampled, tmp_path):
    _, checkpoint, _, (images, masks) = sampled
    real = ["--ckpt", checkpoint, "--data-path", images, "--mask-path", masks, *FEW_STEPS]
    one = ["--ckpt", checkpoint, "--mask-path", masks / "cell_0.png", *FEW_STEPS]
    call(sample, "ODE", *one, "--output", tmp_path / "a.png")
    call(sample, "ODE", "--likelihood", *real, "--output", tmp_path / "a.csv")
    call(sample, "ODE", "--reverse", *real, "--output", tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as other:
        assert one.mode == other.mode == "RGB"
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 7


def test_resume_with_other_channels_is_refused(sampled, monkeypatch, capsys):
    channels, checkpoint, _, (images, masks) = sampled
    paths = ["--data-path", images, "--mask-path", masks, "--results-dir", checkpoint.parents[2], "--run-name", "run"]
    words = ["train.py", *map(str, paths), *TINY, "--max-steps", "3", "--in-channels", "3"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        run_command(train.main, train.parse_args)
    assert f"--in-channels 3 (the checkpoint has {channels})" in capsys.readouterr().err


def test_coloured_images_are_refused_for_one_channel(tmp_path):
    images, masks = write_pairs(tmp_path / "pairs", count=3)
    for path in images.glob("*.png"):
        gray = np.array(Image.open(path))
        Image.fromarray(np.stack([gray, gray, gray // 2], axis=2)).save(path)
    with pytest.raises(InputError, match="3 of 3 pairs.*cell_0.png, cell_1.png, cell_2.png: holds colours"):
        trained(tmp_path, images, masks, 1)


def test_rgb_of_equal_channels_trains_as_gray(tmp_path):
    images, masks = write_pairs(tmp_path / "pairs", count=3)
    for path in images.glob("*.png"):
        Image.open(path).convert("RGB").save(path)
    assert read_checkpoint(trained(tmp_path, images, masks, 1))["config"]["model"]["in_channels"] == 1


@pytest.mark.parametrize("vae", ["ema", "folder"])
def test_an_autoencoder_takes_its_own_channels_only(vae, autoencoder_folder):
    with pytest.raises(InputError, match=r"in_channels 1: the autoencoder .* takes images of 3 channel\(s\)"):
        check_space(str(autoencoder_folder) if vae == "folder" else vae, 1)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(1, np.uint8), (3, np.uint8), (1, np.uint16), (3, np.uint16), (2, np.uint8), (4, np.uint16), (1, np.float32),
     (3, np.float32), (5, np.float32)],
)  # fmt: skip
def test_written_images_are_read_back_with_every_value(tmp_path, channels, dtype):
    image = np.random.default_rng(0).integers(0, 256, (12, 7, channels)).astype(dtype)
    image[..., -1] = np.iinfo(dtype).max if dtype != np.float32 else 1  # a saturated channel is no alpha channel
    for content in (encode_image(image), encode_tiff(image), encode_tiff(image, planes=False)):
        (tmp_path / "a").write_bytes(content)
        read = read_image(tmp_path / "a")
        assert read.dtype == dtype and np.array_equal(read, image)
    assert encode_image(image) == encode_image(np.asfortranarray(image))  # as a tensor with channels first gives it


def test_channels_that_are_no_rgb_are_shown_in_colours_of_their_own():
    image = np.array([[[255, 0], [0, 255], [255, 255]]], np.uint8)
    assert as_rgb(image).tolist() == [[[255, 0, 0], [0, 255, 0], [255, 255, 0]]]
    assert as_rgb(np.full((1, 1, 4), 200, np.uint8)).tolist() == [[[255, 255, 255]]]
    assert as_rgb(image[:, :, :1]).tolist() == [[[255] * 3, [0] * 3, [255] * 3]]
