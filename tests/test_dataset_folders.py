"""Data sets: one square for image, mask and label; windows; random choices; every bad file named before any step."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import find_files
from dataset.folders import PairedFolder
from dataset.gray import fit_channels, image_window, window_image
from dataset.mask_folder import MaskFolder
from dataset.views import View, center_view, native_view
from evaluation.data_report import survey

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data in ../shared/data are absent")


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, photometric="minisblack")
    else:
        Image.fromarray(array).save(path)
    return path


def cells(height: int, width: int, count: int, seed: int = 0) -> np.ndarray:
    """Instance map of disks that may touch, (H, W) uint16."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.uint16)
    for index in range(1, count + 1):
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        labels[((rows - row) ** 2 + (columns - column) ** 2 <= 36) & (labels == 0)] = index
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five pairs of different size whose image shows the mask: gray 200 in cells, 40 outside."""
    for index in range(5):
        labels = cells(60 + 7 * index, 80 + 3 * index, 25, index)
        save(tmp_path / "images" / f"c{index}.png", np.where(labels, 200, 40).astype(np.uint8))
        save(tmp_path / "masks" / f"c{index}.png", np.where(labels, 255, 0).astype(np.uint8))
        save(tmp_path / "instances" / f"c{index}.png", labels)
    return tmp_path / "images", tmp_path / "masks"


# ------------------------------------------------------------------------------------------------------ config


def test_config_survives_json_and_refuses_nonsense():
    config = DataConfig(64, 3, "random", (0.5, 99.5), "dataset", "separate", ((3.0, 700.0), (0.0, 9.0)), 2)
    assert DataConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong, words in (
        ({"image_size": 0}, "image_size 0"),
        ({"num_classes": 1}, "num_classes 1"),
        ({"num_classes": 256}, "num_classes 256"),
        ({"crop": "middle"}, "center, random"),
        ({"window_scope": "all"}, "image, dataset"),
        ({"window_channels": "all"}, "joint, separate"),
        ({"window": (50, 50)}, "LOW < HIGH"),
        ({"window": (-1, 50)}, "LOW < HIGH"),
    ):
        with pytest.raises(InputError, match=words):
            DataConfig(**{"image_size": 64, **wrong})


# ------------------------------------------------------------------------------------------------------ views


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 48))
@settings(max_examples=60, deadline=None)
def test_center_view_keeps_image_labels_and_probabilities_on_the_same_pixels(height, width, size):
    view = center_view(height, width, size)
    assert min(view.scaled_height, view.scaled_width) == size
    ramp = np.arange(width, dtype=np.float32)[None, :, None] + np.zeros((height, 1, 1), np.float32)
    labels = view.apply_labels(np.arange(height * width).reshape(height, width) % width)
    soft = view.apply_probabilities(ramp.transpose(2, 0, 1))
    image = view.apply_image(ramp)
    assert image.shape == (size, size, 1) and labels.shape == (size, size) and soft.shape == (1, size, size)
    assert abs(labels - soft[0]).max() <= 0.5 + 0.51 * width / view.scaled_width
    assert abs(image[:, :, 0] - soft[0]).max() <= 1 + width / view.scaled_width


def test_a_strip_whose_resized_side_would_fill_the_memory_is_refused(tmp_path):
    save(tmp_path / "images" / "strip.png", np.zeros((1, 4096), np.uint8))
    save(tmp_path / "masks" / "strip.png", np.zeros((1, 4096), np.uint8))
    with pytest.raises(InputError, match=r"strip\.png: an image of 4096 x 1 pixels is too long for crop=center"):
        PairedFolder(tmp_path / "images", tmp_path / "masks", DataConfig(256))
    assert center_view(1, 256, 256).scaled_width == 256 * 256


@given(height=st.integers(3, 40), width=st.integers(3, 40), size=st.integers(1, 48))
@settings(max_examples=40, deadline=None)
def test_probabilities_are_averaged_by_exact_area_and_keep_their_sum(height, width, size):
    first = np.random.default_rng(0).random((height, width), dtype=np.float32)
    whole = View(size, size, 0, 0, size, size).apply_probabilities(np.stack([first, 1 - first]))
    assert whole.sum(axis=0) == pytest.approx(np.ones((size, size)), abs=1e-5)
    assert whole[0].mean() == pytest.approx(first.mean(), abs=1e-5)


def test_labels_resized_up_and_down_take_the_pixel_under_the_centre():
    labels = np.arange(12).reshape(3, 4)
    assert np.array_equal(View(6, 8, 0, 2, 6, 6).apply_labels(labels), labels.repeat(2, 0).repeat(2, 1)[:, 2:8])
    assert View(1, 2, 0, 0, 1, 1).apply_labels(labels).tolist() == [[5]]


def test_images_at_native_scale_are_cut_and_not_touched():
    image = np.random.default_rng(0).integers(0, 65535, (50, 70, 3), dtype=np.uint16)
    view = native_view(50, 70, 32)
    assert (view.top, view.left) == (9, 19)
    assert np.array_equal(view.apply_image(image), image[9:41, 19:51])
    assert np.array_equal(center_view(50, 50, 50).apply_image(image[:, :50]), image[:, :50])


def test_resized_whole_numbers_stay_in_range():
    image = np.where(np.arange(64)[:, None, None] % 7 < 3, 255, 0).astype(np.uint8).repeat(64, 1)
    small = center_view(64, 64, 40).apply_image(image)
    assert small.dtype == np.uint8
    assert abs(small.astype(float).mean() - image.mean()) < 3  # a wrapped overshoot would move the mean


def test_native_view_refuses_images_that_are_too_small():
    with pytest.raises(InputError, match="70 x 50 pixels is smaller than image_size=64"):
        native_view(50, 70, 64)


def test_native_views_reach_every_place():
    rng = np.random.default_rng(0)
    views = [native_view(10, 12, 9, rng) for _ in range(200)]
    assert {(view.top, view.left) for view in views} == {(top, left) for top in range(2) for left in range(4)}


# ------------------------------------------------------------------------------------------------------ gray values


def test_8_bit_images_keep_their_range_and_others_get_a_robust_window():
    config = DataConfig(8)
    eight = np.full((9, 7, 3), 30, np.uint8)
    assert image_window(eight, config) == ((0, 255),)
    rng = np.random.default_rng(0)
    sixteen = rng.integers(1000, 3000, (200, 300, 1), dtype=np.uint16)
    sixteen[0, 0], sixteen[0, 1] = 0, 65535  # a dead and a hot pixel
    ((low, high),) = image_window(sixteen, config)
    assert 1000 <= low <= 1010 and 2990 <= high <= 3000
    (moved,) = image_window(sixteen.astype(np.float32) - 5000, config)
    assert moved == pytest.approx((low - 5000, high - 5000), abs=2)
    assert image_window(sixteen, DataConfig(8, window=(25, 75)))[0] == pytest.approx((1500, 2500), abs=30)


@needs_data
def test_a_16_bit_file_that_holds_0_to_235_is_not_black():
    image = tifffile.imread(DATA / "readers" / "stardist" / "images" / "img2d.tif")[:, :, None]
    values = window_image(image, image_window(image, DataConfig(64)))
    assert values.min() == -1 and values.max() == 1
    assert values.std() > 0.2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_constant_and_nearly_empty_images_give_finite_values(dtype):
    config = DataConfig(8, window=(0.1, 99.9))
    image = np.full((60, 70, 1), 9, dtype)
    assert (window_image(image, image_window(image, config)) == -1).all()
    image[3, 4] = 200  # below the percentile, but all that there is to see
    assert image_window(image, config) == ((9, 200),)


def test_window_maps_its_ends_to_one_and_clips_beyond():
    image = np.array([0, 100, 150, 200, 250], np.uint16)
    assert window_image(image, ((100, 200),)).tolist() == [-1, -1, 0, 1, 1]
    assert window_image(np.array([0, 255], np.uint8), ((0, 255),)).tolist() == [-1, 1]


def test_window_of_the_data_set_is_one_for_all_and_is_kept_in_the_config(tmp_path):
    for index, level in enumerate((100, 1000, 4000)):
        save(tmp_path / "images" / f"{index}.tif", np.linspace(0, level, 1200).reshape(30, 40).astype(np.uint16))
        save(tmp_path / "masks" / f"{index}.png", np.eye(30, 40, dtype=np.uint8) * 255)
    config = DataConfig(16, window=(0, 100), window_scope="dataset")
    dataset = PairedFolder(tmp_path / "images", tmp_path / "masks", config)
    assert dataset.config.window_values == ((0, 4000),)
    assert dataset.windows == [((0, 4000),)] * 3
    assert dataset.example(0)["image"].max() < -0.9 < 0.4 < dataset.example(2)["image"].max()
    masks = MaskFolder(tmp_path / "masks", dataset.config, image_dir=tmp_path / "images")
    assert np.array_equal(masks.load("1").image, dataset.example(1)["image"].numpy())
    save(tmp_path / "images" / "3.png", np.zeros((30, 40), np.uint8))
    save(tmp_path / "masks" / "3.png", np.zeros((30, 40), np.uint8))
    with pytest.raises(InputError, match="uint16, uint8.*window_scope=image"):
        PairedFolder(tmp_path / "images", tmp_path / "masks", config)


def test_channels_are_repeated_kept_or_refused():
    gray, colour = np.ones((4, 5, 1), np.uint8), np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert fit_channels(gray, 3, "a") is gray
    assert fit_channels(colour, 3, "a") is colour
    assert np.array_equal(fit_channels(np.repeat(gray, 3, 2), 1, "a"), gray)
    with pytest.raises(InputError, match="a: has colours, but the model takes 1 gray channel"):
        fit_channels(colour, 1, "a")
    wrong = ((gray, 2), (np.ones((4, 5, 4)), 3), (np.ones((4, 5, 2)), 3), (colour, 5))
    for image, channels in wrong:
        with pytest.raises(InputError, match=f"has {image.shape[2]} channels?.*takes {channels}; .*in_channels=N"):
            fit_channels(image, channels, "a")


def test_five_channel_images_stay_five_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 4000, (5, 30, 40), dtype=np.uint16)
    tifffile.imwrite(save(tmp_path / "images" / "a.tif", array[0]), array, metadata={"axes": "CYX"}, imagej=True)
    save(tmp_path / "masks" / "a.png", np.eye(30, 40, dtype=np.uint8) * 255)
    dataset = PairedFolder(tmp_path / "images", tmp_path / "masks", DataConfig(16, crop="random", channels=5))
    assert dataset[0, 0]["image"].shape == (5, 16, 16)


# ------------------------------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_image_and_mask_move_together(folders, crop, in_memory):
    memory_gb = 4.0 if in_memory else 0.0
    dataset = PairedFolder(*folders, DataConfig(32, crop=crop), memory_gb=memory_gb)
    assert dataset.in_memory is in_memory
    for draw in range(20):
        example = dataset[draw % 5, draw]
        assert example["image"].shape == (3, 32, 32)
        assert example["image"].dtype == torch.float32
        assert example["mask"].shape == (32, 32)
        assert example["mask"].dtype == torch.uint8
        shown = example["image"][0] > 120 / 127.5 - 1
        agree = (shown == (example["mask"] == 1)).float().mean()
        assert agree == 1 if crop == "random" else agree > 0.9


@pytest.mark.parametrize("crop", ["center", "random"])
def test_memory_does_not_change_an_example(folders, crop):
    config = DataConfig(32, num_classes=3, crop=crop, window=(1, 99))
    images, instances = folders[0], folders[0].parent / "instances"
    held = PairedFolder(images, instances, config, "instances", seed=3)
    read = PairedFolder(images, instances, config, "instances", seed=3, memory_gb=0)
    assert not read.in_memory
    for draw in range(10):
        for key in ("image", "mask"):
            assert torch.equal(held[draw % 5, draw][key], read[draw % 5, draw][key])


def test_random_choices_depend_on_seed_and_draw_only(folders):
    config = DataConfig(32, crop="random")
    first, second, other = (PairedFolder(*folders, config, seed=seed) for seed in (1, 1, 2))
    second[4, 99], second[0, 3]
    for draw in (0, 5, 2**63 + 17, 2**64 - 1):
        assert torch.equal(first[2, draw]["image"], second[2, draw]["image"])
    images = [first[2, draw]["image"] for draw in range(30)]
    assert len({image.numpy().tobytes() for image in images}) > 20
    assert any(not torch.equal(first[2, draw]["image"], other[2, draw]["image"]) for draw in range(5))


def test_augmentation_reaches_all_eight_symmetries_and_example_none(folders):
    dataset = PairedFolder(*folders, DataConfig(32))
    plain = dataset.example(1)["mask"]
    seen = {dataset[1, draw]["mask"].numpy().tobytes() for draw in range(100)}
    expected = {
        torch.rot90(one, turns).contiguous().numpy().tobytes() for one in (plain, plain.flip(1)) for turns in range(4)
    }
    assert seen == expected
    still = PairedFolder(*folders, DataConfig(32), augment=False)
    assert torch.equal(still[1, 7]["mask"], plain)


def test_examples_can_be_changed_without_changing_the_data(folders):
    dataset = PairedFolder(*folders, DataConfig(32, crop="random"))
    before = {key: value.clone() for key, value in dataset.example(0).items()}
    for value in dataset.example(0).values():
        value.zero_()
    assert all(torch.equal(dataset.example(0)[key], before[key]) for key in before)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_hard_masks_stay_hard_and_soft_masks_sum_to_one(folders, crop):
    images, masks = folders
    hard = PairedFolder(images, masks.parent / "instances", DataConfig(32, 3, crop))
    assert set(torch.cat([hard[i, i]["mask"].ravel() for i in range(5)]).tolist()) == {0, 1, 2}
    for index, file in enumerate(sorted(images.iterdir())):
        height, width = np.array(Image.open(file)).shape
        stack = np.random.default_rng(index).dirichlet(np.ones(3), (height, width)).transpose(2, 0, 1)
        save(masks.parent / "soft" / f"{file.stem}.npy", stack.astype(np.float32))
    soft = PairedFolder(images, masks.parent / "soft", DataConfig(32, 3, crop))
    example = soft[3, 8]["mask"]
    assert example.shape == (3, 32, 32)
    assert example.dtype == torch.float32
    assert torch.allclose(example.sum(0), torch.ones(32, 32), atol=1e-5)
    assert example.std() > 0.05


def test_names_restrict_the_pairs(folders):
    dataset = PairedFolder(*folders, DataConfig(32), names=["c3", "c1"])
    assert [pair.name for pair in dataset.pairs] == ["c1", "c3"]
    assert len(dataset) == 2
    with pytest.raises(InputError, match="1 of 2 names .*: x"):
        PairedFolder(*folders, DataConfig(32), names=["c3", "x"])
    with pytest.raises(InputError, match="list of names is empty"):
        PairedFolder(*folders, DataConfig(32), names=[])


def test_all_bad_files_are_named_in_one_line(folders):
    images, masks = folders
    for name in ("c0", "c1", "c2"):
        content = (images / f"{name}.png").read_bytes()
        (images / f"{name}.png").write_bytes(content[: len(content) // 2])
    save(masks / "c3.png", np.zeros((5, 6), np.uint8))
    with pytest.raises(InputError) as caught:
        PairedFolder(images, masks, DataConfig(32))
    message = str(caught.value)
    assert message.startswith(
        f"4 of 5 pairs of {images} and {masks} cannot be used. c0.png, c1.png, c2.png: cannot be read"
    )
    assert "c3.png: has 6 x 5 pixels, but its image 89 x 81" in message
    assert "\n" not in message


def test_images_smaller_than_the_crop_are_all_named(folders):
    with pytest.raises(InputError, match="2 of 5 pairs .*c0.png: an image of 80 x 60 .*image_size=70"):
        PairedFolder(*folders, DataConfig(70, crop="random"))


def test_the_log_says_what_the_masks_are(folders, caplog):
    with caplog.at_level(logging.INFO):
        PairedFolder(*folders, DataConfig(32))
    assert "5 pairs" in caplog.text and "masks are binary" in caplog.text and "only 0 and 255" in caplog.text


def test_the_log_hints_at_a_window_for_dark_8_bit_images(folders, caplog):
    rng = np.random.default_rng(0)
    for file in folders[0].iterdir():  # noise, since images of flat pieces give a warning of their own
        flat = np.array(Image.open(file))
        save(file, flat - rng.integers(0, 9, flat.shape, dtype=np.uint8))
    with caplog.at_level(logging.WARNING):
        PairedFolder(*folders, DataConfig(32))
        assert not caplog.records
        for file in folders[0].iterdir():
            save(file, np.array(Image.open(file)) // 4)
        PairedFolder(*folders, DataConfig(32, window=(0, 99)))
        assert not caplog.records
        PairedFolder(*folders, DataConfig(32))
    assert "50 of 255" in caplog.text and "window=(0.1, 99.9)" in caplog.text


# ------------------------------------------------------------------------------------------------------ masks alone


@pytest.mark.parametrize("crop", ["center", "random"])
def test_label_prob_map_and_image_of_a_mask_lie_on_the_same_pixels(folders, crop):
    images = folders[0]
    instances = images.parent / "instances"
    masks = MaskFolder(instances, DataConfig(32, 2, crop), image_dir=images)
    assert masks.names == [f"c{index}" for index in range(5)]
    assert masks.rule.mask_type == "instances"
    item = masks.load("c2", np.random.default_rng(5))
    assert item.view == masks.view("c2", np.random.default_rng(5))
    stored = np.array(Image.open(instances / "c2.png"))
    assert item.label.dtype == np.uint16
    assert np.array_equal(item.label, item.view.apply_labels(stored))
    assert np.array_equal(item.prob_map, masks.rule.prob_map(item.label))
    agree = ((item.image[0] > 120 / 127.5 - 1) == (item.label > 0)).mean()
    assert agree == 1 if crop == "random" else agree > 0.9
    assert item.window == ((0, 255),)
    assert (item.path, masks.image_paths["c2"]) == (instances / "c2.png", images / "c2.png")


def test_a_mask_gives_what_training_saw_at_the_same_place(folders):
    for crop in ("center", "random"):
        config = DataConfig(32, 3, crop)
        instances = folders[0].parent / "instances"
        dataset = PairedFolder(folders[0], instances, config)
        item = MaskFolder(instances, config, image_dir=folders[0]).load("c1")
        assert np.array_equal(item.prob_map.argmax(0), dataset.example(1)["mask"].numpy())
        assert np.array_equal(item.image, dataset.example(1)["image"].numpy())


def test_one_mask_file_is_enough(folders):
    masks = MaskFolder(folders[1] / "c1.png", DataConfig(48))
    assert masks.names == ["c1"]
    assert masks.image_paths is None
    item = masks.load("c1")
    assert item.image is None and item.window is None
    assert item.prob_map.shape == (2, 48, 48)
    assert set(np.unique(item.label)) == {0, 255}
    with pytest.raises(InputError, match="no such file"):
        MaskFolder(folders[1] / "absent.png", DataConfig(48))


def test_masks_without_an_image_are_left_out_only_when_images_are_asked_for(folders):
    (folders[0] / "c0.png").unlink()
    assert len(MaskFolder(folders[1], DataConfig(32))) == 5
    assert len(MaskFolder(folders[1], DataConfig(32), image_dir=folders[0])) == 4


def test_masks_in_a_cellpose_folder_are_told_from_the_images(folders):
    for name in ("c0", "c1"):
        for source, ending in ((folders[0], "_img"), (folders[1], "_masks")):
            (source / f"{name}.png").rename(folders[0].parent / "masks" / f"{name}{ending}.png")
    for name in ("c2", "c3", "c4"):
        (folders[1] / f"{name}.png").unlink()
    assert MaskFolder(folders[1], DataConfig(32)).names == ["c0", "c1"]
    assert MaskFolder(folders[1], DataConfig(32), image_dir=folders[1]).names == ["c0", "c1"]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_the_label_of_a_soft_stack_is_a_float_stack(tmp_path, dtype):
    stack = np.zeros((3, 30, 40), dtype)
    stack[1, :, :20], stack[2, :, 20:] = 1, 1
    save(tmp_path / "a.npy", stack)
    item = MaskFolder(tmp_path, DataConfig(16, 3)).load("a")
    assert item.label.shape == (3, 16, 16)
    assert item.label.dtype == np.float32
    assert item.prob_map[:, 3, 2] == pytest.approx([0, 1, 0])


def test_bad_masks_are_all_named(folders):
    for name in ("c0", "c4"):
        (folders[1] / f"{name}.png").write_text("no image")
    with pytest.raises(InputError, match="2 of 5 masks of .* cannot be used. c0.png, c4.png: cannot be read"):
        MaskFolder(folders[1], DataConfig(32))


@needs_data
def test_dsb_original_trains_and_samples_as_it_is():
    root = DATA / "readers" / "dsb_original"
    dataset = PairedFolder(root, root, DataConfig(64, 2, "random"))
    assert dataset.rule.mask_type == "instances"
    assert [pair.name for pair in dataset.pairs] == ["fluo", "pp", "pw"]
    assert dataset[0, 1]["image"].shape == (3, 64, 64)
    item = MaskFolder(root, DataConfig(256, 3), image_dir=root).load("fluo")
    assert sorted(np.unique(item.label)) == list(range(8))


@needs_data
def test_real_16_bit_and_label_folders_pair():
    folder = DATA / "readers" / "omnipose"
    dataset = PairedFolder(folder / "images", folder / "labels", DataConfig(48, 3, "random", (0.1, 99.9)))
    assert len(dataset) == 7
    for index in range(7):
        example = dataset.example(index)
        assert example["image"].std() > 0.1
        assert set(example["mask"].unique().tolist()) <= {0, 1, 2}


# ------------------------------------------------------------------------------------------------ what labs bring along


def paired(folder: Path, **config) -> PairedFolder:
    return PairedFolder(folder / "images", folder / "masks", DataConfig(image_size=32, **config))


def write_masks(folder: Path, make: Callable[[np.ndarray, int], np.ndarray], suffix: str = ".png") -> Path:
    """Five images, and for each the mask that ``make(cells, index)`` gives."""
    for index in range(5):
        labels = cells(40, 44, 12, index)
        save(folder / "images" / f"c{index}.png", np.where(labels, 200, 40).astype(np.uint8))
        save(folder / "masks" / f"c{index}{suffix}", make(labels, index))
    return folder


def test_equal_masks_and_hollow_cells_are_warned_about(tmp_path, caplog):
    one = np.where(cells(40, 44, 12), 255, 0).astype(np.uint8)
    paired(write_masks(tmp_path / "equal", lambda *_: one))
    assert "all 5 masks are equal" in caplog.text
    caplog.clear()

    def outline(labels: np.ndarray, _: int) -> np.ndarray:
        rows, columns = np.mgrid[:40, :44]
        distance = np.hypot(rows - 20, columns - 20 - labels.max() % 3)
        return np.where((distance > 9) & (distance < 11), 255, 0).astype(np.uint8)

    paired(write_masks(tmp_path / "hollow", outline))
    assert "in 5 of 5 masks the cells are hollow" in caplog.text
    caplog.clear()
    paired(write_masks(tmp_path / "fine", lambda labels, _: np.where(labels, 255, 0).astype(np.uint8)))
    assert "cells are hollow" not in caplog.text and "masks are equal" not in caplog.text


def test_blank_images_and_types_side_by_side_are_warned_about(tmp_path, caplog):
    folder = write_masks(tmp_path, lambda labels, _: np.where(labels, 255, 0).astype(np.uint8))
    save(folder / "images" / "c1.png", np.full((40, 44), 7, np.uint8))
    (folder / "images" / "c2.png").unlink()
    save(folder / "images" / "c2.tif", np.arange(40 * 44).reshape(40, 44).astype(np.uint16))
    paired(folder)
    assert "1 hold a single gray value: c1.png" in caplog.text and "stored as uint16, uint8" in caplog.text


def test_ids_and_classes_in_jpeg_are_refused_and_binary_jpeg_is_not(tmp_path):
    folder = write_masks(tmp_path, lambda labels, _: (labels * 9).astype(np.uint8), ".jpg")
    for mask_type in ("auto", "instances", "classes"):
        with pytest.raises(InputError, match="JPEG.*export them anew as PNG or TIFF"):
            PairedFolder(folder / "images", folder / "masks", DataConfig(image_size=32), mask_type)
    binary = write_masks(tmp_path / "b", lambda labels, _: np.where(labels, 255, 0).astype(np.uint8), ".jpg")
    assert len(PairedFolder(binary / "images", binary / "masks", DataConfig(image_size=32), "binary")) == 5


def test_classes_in_the_last_axis_are_told_where_they_belong(tmp_path):
    folder = write_masks(tmp_path, lambda labels, _: np.stack([labels == 0, labels > 0], 2).astype(np.float32), ".npy")
    with pytest.raises(InputError, match=r"last axis \(H, W, K\): store them in the first \(K, H, W\)"):
        paired(folder)


def test_two_scales_of_one_class_are_not_taken_for_classes_first(tmp_path):
    folder = write_masks(tmp_path, lambda labels, n: ((labels > 0) * (255 if n % 2 else 1)).astype(np.uint8))
    with pytest.raises(InputError, match="Likely: one class of cells, saved with different values"):
        paired(folder)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((24, 20), "a.png: has 20 x 24 pixels, but its image 24 x 20: are its rows and columns swapped"),
        ((40, 48), "48 x 40 pixels.*resize it by nearest neighbour"),
        ((21, 24), "24 x 21 pixels.*they must agree"),
    ],
)
def test_training_and_the_data_report_say_how_a_mask_and_its_image_differ(tmp_path, shape, words):
    for folder, size in (("images", (20, 24)), ("masks", shape)):
        (tmp_path / folder).mkdir()
        pixels = np.zeros(size, np.uint8)
        pixels[4:9, 4:9] = 255
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    with pytest.raises(InputError, match=words):
        PairedFolder(tmp_path / "images", tmp_path / "masks", DataConfig(image_size=8))
    report, _, _ = survey(tmp_path / "images", tmp_path / "masks")
    assert re.search(words, report.problems[0])


def test_files_and_sub_folders_that_are_not_read_are_warned_about(folders, caplog):
    images, masks = folders
    (images / "more").mkdir()
    shutil.copy(next(images.glob("*.png")), images / "more" / "x.png")
    (masks / "y.gif").write_bytes(b"GIF8")
    (masks / "notes.txt").write_text("nothing")
    PairedFolder(images, masks, DataConfig(image_size=16))
    assert "files in the sub-folder more (1) are not read" in caplog.text
    assert "files of a kind that is not read: y.gif" in caplog.text and "notes.txt" not in caplog.text
    assert any("sub-folder more" in remark for remark in survey(images, masks)[0].remarks)


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder that the system refuses to read, as it does for users without permission (not for root)."""
    folder.mkdir()
    scandir, stat, access = os.scandir, os.stat, os.access

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if Path(path) == folder else scandir(path))
    monkeypatch.setattr(os, "stat", lambda path, **k: refuse(path) if folder in Path(path).parents else stat(path, **k))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))


def test_a_sub_folder_without_permission_stops_no_command(folders, monkeypatch, caplog):
    images, masks = folders
    (images / "more").mkdir()
    shutil.copy(next(images.glob("*.png")), images / "more" / "x.png")
    close(images / "private", monkeypatch)
    PairedFolder(images, masks, DataConfig(image_size=16))
    assert "files in the sub-folder more (1) are not read" in caplog.text


def test_a_sub_folder_without_permission_does_not_hide_which_folder_is_meant(folders, monkeypatch):
    images, masks = folders
    close(images.parent / "private", monkeypatch)
    with pytest.raises(InputError, match="did you mean .*images"):
        find_files(images.parent, "image")
    for path in [*masks.iterdir()]:
        (masks / path.stem / "masks").mkdir(parents=True)
        path.rename(masks / path.stem / "masks" / "1.png")
    close(masks / "c9", monkeypatch)  # it may be one of the masks
    with pytest.raises(InputError, match="folders that may not be read: c9"):
        find_files(masks, "mask")


def test_transparency_and_lookup_tables_are_warned_about(tmp_path, caplog):
    fire = np.stack([np.arange(256), np.arange(256) // 2, np.zeros(256)]).astype(np.uint16) * 257
    for name in "abc":
        mask = save(tmp_path / "masks" / f"{name}.png", np.where(cells(40, 40, 9, ord(name)), 255, 0).astype(np.uint8))
        gray = np.asarray(Image.open(mask)) // 2 + 40
        save(tmp_path / "clear" / f"{name}.png", np.dstack([gray, gray, gray, gray]))
        (tmp_path / "tinted").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / "tinted" / f"{name}.tif", gray, photometric="palette", colormap=fire)
    for folder, channels, words in (("clear", 4, "channel 4 is transparency"), ("tinted", 3, "have a colour table")):
        PairedFolder(tmp_path / folder, tmp_path / "masks", DataConfig(16, channels=channels))
        assert words in caplog.text
        assert any(words in remark for remark in survey(tmp_path / folder, tmp_path / "masks")[0].remarks)
        caplog.clear()
