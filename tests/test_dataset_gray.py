"""Synthetic images get the gray values of the training images back; the manifest records each gray range."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from script_helpers import FEW_STEPS, TINY, call, write_pairs

import sample_ddp
import train
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import read_image
from dataset.folders import PairedFolder
from dataset.gray import (
    MOST_WINDOWS,
    ImageFormat,
    SourceIntensity,
    channel_shares,
    choose_format,
    image_window,
    robust_maximum,
    spread_pixels,
    to_display,
    to_gray_values,
    window_columns,
    window_from_columns,
    window_image,
)
from engine.checkpoint import export_safetensors, read_checkpoint
from synthetic.reader import SampleSet

TWO = SourceIntensity(("uint16",), 1, (((10.0, 500.0),), ((30.0, 900.0),)))


@pytest.mark.parametrize(
    ("dtype", "window"),
    [(np.uint8, ((0, 255),)), (np.uint16, ((0, 65535),)), (np.uint16, ((500, 4000), (7, 60000)))],
)
def test_gray_values_inside_the_window_come_back_exactly(dtype, window):
    gray = np.linspace([low for low, _ in window], [high for _, high in window], 12 * 500).round()
    image = gray.reshape(12, 500, len(window)).astype(dtype)
    unit = window_image(image, window).transpose(2, 0, 1)
    back = to_gray_values(unit, window, np.dtype(dtype))
    assert back.dtype == dtype and np.array_equal(back, image)


def test_float_images_come_back_within_rounding_and_whole_numbers_stay_in_their_type():
    window = ((-3.5, 12.25),)
    image = np.random.default_rng(0).uniform(-3.5, 12.25, (6, 5, 1)).astype(np.float32)
    back = to_gray_values(window_image(image, window).transpose(2, 0, 1), window, np.dtype(np.float32))
    assert back.dtype == np.float32 and np.abs(back - image).max() < 1e-5
    ends = to_gray_values(np.array([[[-9.0, 9.0]]]), ((-20, 300),), np.dtype(np.uint8))
    assert ends.ravel().tolist() == [0, 255]


def test_display_of_source_values_is_what_display_would_have_been():
    unit = np.random.default_rng(0).uniform(-1, 1, (2, 9, 8)).astype(np.float32)
    window = ((100, 4000), (0, 60000))
    source = to_gray_values(unit, window, np.dtype(np.uint16))
    shown = to_display(source, window).astype(int)
    assert np.abs(shown - to_gray_values(unit, None, np.dtype(np.uint8))).max() <= 1
    assert (shown == to_gray_values(unit, None, np.dtype(np.uint8))).mean() > 0.95
    image = np.zeros((2, 3, 1), np.uint8)
    assert to_display(image, None) is image


def test_window_columns_are_read_back():
    for window in (None, ((0.0, 65535.0),), ((0.125, 2.0), (3.0, 1e-7))):
        assert window_from_columns(window_columns(window)) == window
    assert window_columns(((1, 2), (3, 4.5))) == {"window_low": "1 3", "window_high": "2 4.5"}


def test_channels_get_windows_of_their_own_where_they_are_separate():
    image = np.stack([np.arange(100), 500 + 3 * np.arange(100)], axis=-1).reshape(10, 10, 2).astype(np.uint16)
    config = DataConfig(8, window=(0, 100), channels=2)
    assert image_window(image, config) == ((0, 797),)
    separate = dataclasses.replace(config, window_channels="separate")
    assert image_window(image, separate) == ((0, 99), (500, 797))
    values = window_image(image, image_window(image, separate))
    assert values.min((0, 1)).tolist() == [-1, -1] and values.max((0, 1)).tolist() == [1, 1]
    first = window_image(image.transpose(2, 0, 1), image_window(image, separate), channels_first=True)
    assert np.array_equal(first.transpose(1, 2, 0), values)
    assert DataConfig.from_dict(json.loads(json.dumps(separate.to_dict()))) == separate


def test_window_of_the_data_set_is_one_per_channel_where_they_are_separate(tmp_path):
    images, masks = write_pairs(tmp_path, count=3)
    for number, path in enumerate(sorted(images.glob("*.png"))):
        planes = np.stack([np.full((24, 20), 5 * number), np.full((24, 20), 1000 + number)]).astype(np.uint16)
        tifffile.imwrite(path.with_suffix(".tif"), planes, metadata={"axes": "CYX"})
        path.unlink()
    config = DataConfig(16, window=(0, 100), window_scope="dataset", window_channels="separate", channels=2)
    assert PairedFolder(images, masks, config).config.window_values == ((0, 10), (1000, 1002))


def test_source_keeps_at_most_256_windows_spread_over_all():
    many = [((0.0, float(high)),) for high in np.random.default_rng(0).permutation(5000)]
    source = SourceIntensity.of(many, [np.dtype(np.uint16)] * 5000, 1)
    highs = [window[0][1] for window in source.windows]
    assert len(highs) == MOST_WINDOWS and highs[0] == 0 and highs[-1] == 4999
    assert np.median(highs) == pytest.approx(2500, abs=20)
    assert SourceIntensity.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    assert SourceIntensity.of([((0.0, 9.0),)] * 40, [np.dtype(np.uint8)] * 40, 1).windows == (((0.0, 9.0),),)
    mixed = SourceIntensity.of([((0.0, 9.0),), ((0.0, 3.0), (1.0, 5.0))], [np.dtype(np.uint8)] * 2, 3)
    assert mixed.windows == (((0.0, 3.0), (1.0, 5.0)), ((0.0, 9.0), (0.0, 9.0)))


def test_window_is_drawn_by_seed_and_index_and_the_median_is_for_all():
    form = choose_format("source", None, DataConfig(8, channels=1), TWO)
    assert form.dtype == np.uint16 and form.suffix == ".png"
    drawn = [form.window(0, index) for index in range(40)]
    assert drawn == [form.window(0, index) for index in range(40)]
    assert set(drawn) == set(TWO.windows)
    assert drawn != [form.window(1, index) for index in range(40)]
    assert choose_format("source", "median", DataConfig(8), TWO).window(0, 7) == ((20.0, 700.0),)
    assert choose_format("display", None, DataConfig(8), None) == ImageFormat(3)
    assert ImageFormat(3).window(0, 1) is None


def test_gray_files_come_back_gray_from_a_model_of_three_channels():
    form = choose_format("source", None, DataConfig(8, channels=3), dataclasses.replace(TWO, windows=(((0, 300),),)))
    assert (form.channels, form.suffix) == (1, ".png")
    assert choose_format("source", None, DataConfig(8), dataclasses.replace(TWO, channels=3)).channels == 3
    assert choose_format("source", None, DataConfig(8, channels=1), dataclasses.replace(TWO, channels=3)).channels == 1


def test_what_cannot_be_written_back_is_refused():
    data = DataConfig(8)
    with pytest.raises(InputError, match="source_window has no effect with intensity=display"):
        choose_format("display", "median", data, TWO)
    with pytest.raises(InputError, match="does not know the gray values"):
        choose_format("source", None, data, None)
    with pytest.raises(InputError, match=r"types of gray values \(uint16 and uint8\)"):
        choose_format("source", None, data, dataclasses.replace(TWO, dtypes=("uint16", "uint8")))
    with pytest.raises(InputError, match="all training images had one window"):
        choose_format("source", "draw", data, dataclasses.replace(TWO, windows=TWO.windows[:1]))


@pytest.fixture(scope="module", params=["uint16", "float32"])
def trained(request, one_block, tmp_path_factory) -> tuple[str, Path, Path, Path]:
    """Kind of gray values, checkpoint, images and masks of a run on images of very different exposure."""
    folder = tmp_path_factory.mktemp(request.param)
    images, masks = write_pairs(folder / "pairs")
    for number, path in enumerate(sorted(images.glob("*.png"))):
        gray = (
            read_image(path)[:, :, 0].astype(np.float64) * (1 + 40 * number) / (1 if request.param == "uint16" else 1e3)
        )
        tifffile.imwrite(path.with_suffix(".tif"), gray.astype(request.param))
        path.unlink()
    paths = ["--data-path", images, "--mask-path", masks, "--results-dir", folder, "--run-name", "run"]
    channels = {"uint16": 1, "float32": 3}[request.param]  # gray files both times, and gray is what comes back
    call(train, *paths, *TINY, "--max-steps", 2, "--in-channels", channels, "--export-safetensors")
    return request.param, folder / "run" / "checkpoints" / "0000002.pt", images, masks


def test_set_has_type_and_range_of_the_training_images(trained, tmp_path):
    dtype, checkpoint, images, masks = trained
    paths = ["--ckpt", checkpoint, "--data-path", images, "--mask-path", masks]
    call(sample_ddp, "ODE", *paths, *FEW_STEPS, "--sample-dir", tmp_path / "display")
    more = ["--intensity", "source", "--npz", "--export", "cellpose"]
    call(sample_ddp, "ODE", *paths, *FEW_STEPS, "--sample-dir", tmp_path / "source", *more)
    with (checkpoint.parents[1] / "windows.csv").open(newline="") as file:
        known = {(row["window_low"], row["window_high"]) for row in csv.DictReader(file)}
    assert len(known) == 6
    with (tmp_path / "source" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["window_low"], row["window_high"]) for row in rows} <= known
    shown, source = SampleSet(tmp_path / "display"), SampleSet(tmp_path / "source")
    for row, one, other in zip(rows, shown.samples, source.samples, strict=True):
        image = read_image(other.image_path)
        assert image.dtype == dtype and other.image_path.suffix == {"uint16": ".png", "float32": ".tif"}[dtype]
        assert float(row["window_low"]) - 1 <= image.min() and image.max() <= float(row["window_high"]) + 1
        drawn = shown.synthetic(one).astype(int).mean(axis=2, keepdims=True)
        assert image.shape == (16, 16, 1) and np.abs(drawn - source.synthetic(other)).max() <= 1
        exported = tifffile.imread(tmp_path / "source" / "cellpose" / f"{other.name}_img.tif")
        assert np.array_equal(exported, image[:, :, 0])
    with np.load(tmp_path / "source.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(
            arrays["arr_0"][2], source.synthetic(source.samples[2])
        )


def test_exported_weights_know_the_gray_values(trained, tmp_path):
    _, checkpoint, _, _ = trained
    state = read_checkpoint(checkpoint)
    export_safetensors(tmp_path / "model.safetensors", state)
    assert read_checkpoint(tmp_path / "model.safetensors")["intensity"] == state["intensity"]
    assert len(state["intensity"]["windows"]) == 6


def test_bright_pixels_are_found_in_every_channel_and_every_column():
    blue = np.zeros((512, 512, 3), np.uint8)
    blue[..., 2] = np.arange(512)[None, :] % 256
    assert robust_maximum(blue) > 250 and channel_shares(blue)[2] == pytest.approx(1)
    stripes = np.zeros((2048, 2048, 1), np.uint8)
    stripes[:, 1::2] = 200  # a stride of a power of 2 would see every second column only
    assert 0.4 < (spread_pixels(stripes, 2**14) > 0).mean() < 0.6
