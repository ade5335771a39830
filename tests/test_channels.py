"""Images of one, two and more channels keep their number from the files to the synthetic set and its measures."""

from __future__ import annotations

import csv
import json
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
from dataset.config import DataConfig
from dataset.files import encode_image, encode_tiff, read_image, read_image_and_kind
from dataset.folders import PairedFolder
from dataset.gray import SourceIntensity, choose_format
from dataset.masks import MaskRule
from engine.autoencoder import check_space
from engine.checkpoint import read_checkpoint
from evaluation.data_report import survey
from synthetic.export import export_set

pytestmark = pytest.mark.usefixtures("one_block")


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
    with pytest.raises(InputError, match="3 of 3 pairs.*cell_0.png, cell_1.png, cell_2.png: has colours"):
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
     (3, np.float32), (5, np.float32), (3, np.int32)],
)  # fmt: skip
def test_written_images_are_read_back_with_every_value(tmp_path, channels, dtype):
    image = np.random.default_rng(0).integers(0, 256, (12, 7, channels)).astype(dtype)
    image[..., -1] = np.iinfo(dtype).max if dtype != np.float32 else 1  # a saturated channel is no alpha channel
    for content in (encode_image(image), encode_tiff(image), encode_tiff(image, planes=False)):
        (tmp_path / "a").write_bytes(content)
        read, has_channels = read_image_and_kind(tmp_path / "a")
        assert read.dtype == dtype and np.array_equal(read, image) and has_channels == (channels not in (1, 3))
    (tmp_path / "a").write_bytes(encode_image(image, colours=False))
    assert read_image_and_kind(tmp_path / "a")[1] == (channels > 1)
    assert encode_image(image) == encode_image(np.asfortranarray(image))  # as a tensor with channels first gives it


def test_channels_that_are_no_rgb_are_shown_in_colours_of_their_own():
    image = np.array([[[255, 0], [0, 255], [255, 255]]], np.uint8)
    assert as_rgb(image).tolist() == [[[255, 0, 0], [0, 255, 0], [255, 255, 0]]]
    assert as_rgb(np.full((1, 1, 4), 200, np.uint8)).tolist() == [[[255, 255, 255]]]
    assert as_rgb(image[:, :, :1]).tolist() == [[[255] * 3, [0] * 3, [255] * 3]]


# ------------------------------------------------------------------------------------------- three stains are no RGB


def write_stains(folder: Path, count: int = 4, scale: tuple[float, ...] = (200, 8, 3), **options) -> Path:
    """TIFFs of axes CYX whose channels differ in brightness, with label images beside them."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        labels = np.zeros((32, 40), np.uint8)
        labels[6:14, 5 + number : 15 + number] = labels[20:27, 22:33] = 255
        gray = rng.integers(40, 60, (len(scale), 32, 40)) + np.where(labels, 120, 0)
        planes = (gray * np.array(scale)[:, None, None]).astype(np.uint16)
        tifffile.imwrite(folder / "images" / f"f{number}.tif", planes, imagej=True, metadata={"axes": "CYX"} | options)
        Image.fromarray(labels).save(folder / "masks" / f"f{number}.png")
    return folder


def stains_of(folder: Path, **settings) -> PairedFolder:
    config = DataConfig(image_size=32, channels=3, **{"window_channels": None} | settings)
    return PairedFolder(folder / "images", folder / "masks", config)


def test_three_channels_of_a_file_that_calls_them_channels_get_a_window_each(tmp_path):
    data = stains_of(write_stains(tmp_path))
    assert data.config.window_channels == "separate" and not data.colours
    assert all(len(window) == 3 for window in data.windows)
    image = data.example(0)["image"]
    assert (image.amax((1, 2)) - image.amin((1, 2)) > 1.9).all()


def test_rgb_of_16_bits_keeps_one_window_for_its_colours(tmp_path):
    write_stains(tmp_path)
    for path in (tmp_path / "images").iterdir():
        tifffile.imwrite(path, tifffile.imread(path).transpose(1, 2, 0), photometric="rgb")
    data = stains_of(tmp_path)
    assert data.config.window_channels == "joint" and data.colours
    assert all(len(window) == 1 for window in data.windows)


def test_rgb_beside_stains_is_refused_unless_the_windows_are_given(tmp_path):
    write_stains(tmp_path)
    path = tmp_path / "images" / "f0.tif"
    tifffile.imwrite(path, tifffile.imread(path).transpose(1, 2, 0), photometric="rgb")
    with pytest.raises(InputError, match=r"1 images are RGB \(as f0.tif\), 3 hold three channels.*window_channels="):
        stains_of(tmp_path)
    assert len(stains_of(tmp_path, window_channels="separate").windows[0]) == 3
    assert any("some images are RGB" in line for line in survey(tmp_path / "images", tmp_path / "masks")[0].problems)


def test_a_channel_that_hardly_uses_the_shared_range_is_warned_about(tmp_path, caplog):
    write_stains(tmp_path)
    stains_of(tmp_path, window_channels="joint")
    assert "channel 2 uses 3." in caplog.text and "channel 3 uses 1." in caplog.text
    assert "window_channels=separate gives every channel" in caplog.text
    caplog.clear()
    stains_of(tmp_path)
    assert "uses" not in caplog.text


def test_8_bit_stains_keep_their_range_and_the_warning_says_both_flags(tmp_path, caplog):
    write_stains(tmp_path, scale=(1, 1, 1))
    for path in (tmp_path / "images").iterdir():
        planes = (tifffile.imread(path) * np.array([1, 0.05, 1])[:, None, None]).astype(np.uint8)
        tifffile.imwrite(path, planes, photometric="minisblack", metadata={"axes": "CYX"})
    stains_of(tmp_path)
    assert "channel 2 uses" in caplog.text and "window_channels=separate window=(0.1, 99.9)" in caplog.text
    report, *_ = survey(tmp_path / "images", tmp_path / "masks")
    assert any("--window-channels separate --window 0.1 99.9" in line for line in report.remarks)
    assert any("3 channels that are not colours" in line for line in report.remarks)


def test_stains_with_the_lookup_tables_of_fiji_are_read_as_they_are(tmp_path):
    planes = np.random.default_rng(0).integers(0, 255, (3, 20, 24), dtype=np.uint8)
    table = np.zeros((3, 256), np.uint16)
    table[0] = np.arange(256) * 257
    options = {"photometric": "palette", "colormap": table, "metadata": {"axes": "CYX"}}
    tifffile.imwrite(tmp_path / "a.tif", planes, **options)
    image, has_channels = read_image_and_kind(tmp_path / "a.tif")
    assert has_channels and np.array_equal(image, planes.transpose(1, 2, 0))


@pytest.mark.parametrize("intensity", ["display", "source"])
def test_synthetic_stains_leave_as_planes_and_are_exported_as_planes(tmp_path, intensity):
    data = stains_of(write_stains(tmp_path))
    source = SourceIntensity.of(data.windows, data.dtypes, data.stored_channels, data.colours)
    assert SourceIntensity.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    form = choose_format(intensity, None, data.config, source)
    assert form.suffix == ".tif"
    for name in ("set/images", "set/masks"):
        (tmp_path / name).mkdir(parents=True)
    image = data.example(0)["image"].numpy()
    path = tmp_path / "set" / "images" / "f0.tif"
    path.write_bytes(form.encode(image, form.window(0, 0)))
    Image.fromarray(np.full(image.shape[1:], 255, np.uint8)).save(tmp_path / "set" / "masks" / "f0.png")
    read, has_channels = read_image_and_kind(path)
    assert has_channels and read.shape == (32, 32, 3)
    assert read.dtype == (np.uint16 if intensity == "source" else np.uint8)
    export_set(tmp_path / "set", [path], MaskRule("binary", 2, 255, ""), "cellpose")
    with tifffile.TiffFile(tmp_path / "set" / "cellpose" / "f0_img.tif") as file:
        assert file.series[0].axes == "CYX" and file.pages[0].photometric.name == "MINISBLACK"
        assert np.array_equal(file.asarray(), read.transpose(2, 0, 1))
    export_set(tmp_path / "set", [path], MaskRule("binary", 2, 255, ""), "stardist")
    again, has_channels = read_image_and_kind(tmp_path / "set" / "stardist" / "images" / "f0.tif")
    assert has_channels and np.array_equal(again, read)
