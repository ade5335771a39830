"""Pairs that do not belong together are warned about in training and in the data report; good sets are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cells import connected_cells
from common.errors import InputError
from dataset.agreement import agreement_warnings, is_flat, mask_signature, signature
from dataset.config import DataConfig
from dataset.files import pair_files, read_image, read_mask
from dataset.folders import PairedFolder
from dataset.gray import is_burnt_in
from evaluation.data_report import survey

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data in ../shared/data are absent")
COUNT, SIDE = 12, 64


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask (64, 64) uint8: bright disks with noise on dark ground."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for row, column in rng.uniform(6, SIDE - 6, (5, 2)):
        mask[(rows - row) ** 2 + (columns - column) ** 2 <= 30] = 255
    return np.clip(np.where(mask, 170, 50) + rng.normal(0, 8, mask.shape), 0, 255).astype(np.uint8), mask


def warnings_of(pairs) -> list[str]:
    names = [f"f{index}" for index in range(len(pairs))]
    return agreement_warnings(
        names, [signature(i[:, :, None]) for i, _ in pairs], [mask_signature(m) for _, m in pairs]
    )


GOOD = [drawn(seed) for seed in range(COUNT)]


def test_good_pairs_are_not_warned_about():
    assert warnings_of(GOOD) == [] == warnings_of([(255 - image, mask) for image, mask in GOOD]) == warnings_of([])


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(255 - i if n == 4 else i, m) for n, (i, m) in enumerate(GOOD)], "in 1 of 12 pairs, the cells are darker"),
        ([(255 - i if n == 4 else i, m) for n, (i, m) in enumerate(GOOD)], "which need look=reference in training"),
        ([(i, 255 - m if n == 4 else m) for n, (i, m) in enumerate(GOOD)], "(as in f4)"),
        ([(i, m.T) for i, m in GOOD], "12 of 12 masks fit their image only if they are turned"),
        ([(i, m[::-1] if n % 2 else m) for n, (i, m) in enumerate(GOOD)], "6 of 12 masks fit their image only if"),
        ([(i, GOOD[n - 1][1]) for n, (i, _) in enumerate(GOOD)], "(as f0, which fits that of f1)"),
        ([(GOOD[0][0], m) for _, m in GOOD], "all 12 images are equal"),
    ],
)
def test_pairs_that_do_not_belong_together_are_named(pairs, words):
    assert any(words in warning for warning in warnings_of(pairs))


def test_stacks_of_probabilities_have_their_background_in_the_first_plane():
    mask = GOOD[0][1] > 0
    assert np.allclose(mask_signature(np.stack([~mask, mask]).astype(np.float32)), mask_signature(mask), atol=1e-5)


def test_training_and_the_data_report_give_the_same_warning(tmp_path, caplog):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index, (image, mask) in enumerate(GOOD):
        Image.fromarray(image).save(tmp_path / "images" / f"f{index}.png")
        Image.fromarray(np.ascontiguousarray(mask.T)).save(tmp_path / "masks" / f"f{index}.png")
    PairedFolder(tmp_path / "images", tmp_path / "masks", DataConfig(image_size=32))
    (remark,) = (one for one in survey(tmp_path / "images", tmp_path / "masks")[0].remarks if "turned" in one)
    assert remark in caplog.text


@needs_data
@pytest.mark.parametrize(("kind", "prefix"), [("nuclei", "fluo_"), ("histology", ""), ("leukocytes", "")])
def test_real_sets_are_not_warned_about(kind, prefix):
    folder = DATA / kind / "val"
    pairs = [pair for pair in pair_files(folder / "images", folder / "masks") if pair.name.startswith(prefix)]
    assert warnings_of([(read_image(p.image_path).mean(axis=2), read_mask(p.mask_path)) for p in pairs]) == []


def written(folder: Path, kind: str, arrays: list[np.ndarray]) -> Path:
    (folder / kind).mkdir(parents=True)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / kind / f"f{number}.png")
    return folder / kind


def numbered(seed: int) -> np.ndarray:
    """(64, 64) uint16 cells with ids."""
    return (connected_cells(drawn(seed)[1]) * 3).astype(np.uint16)


@pytest.mark.parametrize("mask", [lambda seed: drawn(seed)[1], numbered])
def test_masks_given_as_images_are_refused(tmp_path, mask):
    arrays = [mask(seed) for seed in range(6)]
    images, masks = written(tmp_path, "images", arrays), written(tmp_path, "masks", arrays)
    with pytest.raises(InputError, match="6 of 6 images .* equal their masks") as error:
        PairedFolder(images, masks, DataConfig(16, 2, channels=1), "instances")
    assert error.value.marked.endswith("`data_path`")
    report, *_ = survey(images, masks, mask_type="instances")
    assert any("equal their masks" in problem and "--data-path" in problem for problem in report.problems)


def test_images_that_look_like_masks_are_warned_about_in_training_and_in_the_report(tmp_path, caplog):
    images = written(tmp_path, "images", [numbered(seed) for seed in range(6)])
    masks = written(tmp_path, "masks", [drawn(seed)[1] for seed in range(6)])
    PairedFolder(images, masks, DataConfig(16, 2, channels=1))
    report, *_ = survey(images, masks)
    for lines in ([record.getMessage() for record in caplog.records], report.remarks):
        assert any("6 of 6 images consist of pieces of one gray value" in line for line in lines)


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_noise_saturated_ground_and_smooth_images_are_not_flat(channels):
    image, mask = drawn(1)
    saturated = np.where(mask, image, 255)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    smooth = np.sin(rows / 20) * columns
    blank = np.zeros_like(image)
    for one, expected in ((image, False), (saturated, False), (smooth, False), (blank, False), (mask, True)):
        assert is_flat(np.dstack([one] * channels)) == expected


@needs_data
@pytest.mark.parametrize("folder", ["nuclei/train", "leukocytes/train", "histology/train"])
def test_real_images_are_not_flat_and_their_masks_are(folder):
    paths = sorted((DATA / folder / "images").iterdir())[:40]
    masks = sorted((DATA / folder / "masks").iterdir())[:40]
    assert sum(is_flat(read_image(path)) for path in paths) == 0
    assert all(is_flat(read_mask(path)[:, :, None]) for path in masks if np.ptp(read_mask(path)))


def test_scale_bars_are_warned_about_in_training_and_in_the_report(tmp_path, caplog):
    images = [GOOD[index][0].astype(np.uint16) * 10 for index in range(6)]
    assert not any(is_burnt_in(image[:, :, None]) for image in images)
    for image in images:
        image[-6:-3, 30:50] = 65535
    paths = written(tmp_path, "images", images), written(tmp_path, "masks", [mask for _, mask in GOOD[:6]])
    PairedFolder(*paths, DataConfig(16, 2, channels=1))
    report, *_ = survey(*paths)
    for lines in ([record.getMessage() for record in caplog.records], report.remarks):
        assert any("6 of 6 images have pixels far brighter than all others" in line for line in lines)


def test_points_and_stacks_with_the_background_in_another_plane_are_warned_about(tmp_path, caplog):
    images = written(tmp_path, "images", [image for image, _ in GOOD[:6]])
    points, stacks = tmp_path / "points", tmp_path / "stacks"
    for folder in (points, stacks):
        folder.mkdir()
    for index, (_, mask) in enumerate(GOOD[:6]):
        dots = np.zeros_like(mask)
        dots[5::9, 4::11] = 255
        Image.fromarray(dots).save(points / f"f{index}.png")
        np.save(stacks / f"f{index}.npy", np.stack([mask > 0, mask == 0]).astype(np.float32))
    for folder, words in ((points, "are these points?"), (stacks, "plane 0 must be the background")):
        caplog.clear()
        PairedFolder(images, folder, DataConfig(16, 2, channels=1))
        assert words in caplog.text and any(words in remark for remark in survey(images, folder)[0].remarks)
