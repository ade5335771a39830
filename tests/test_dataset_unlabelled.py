"""Images without masks beside labelled ones: what is read, what is refused, and what a step is fed."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_helpers import write_pairs

from common.errors import InputError
from dataset import unlabelled as module
from dataset.batches import StepBatches
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.look_choice import choose_looks
from dataset.looks import Looks
from dataset.unlabelled import Mixture, UnlabelledFolder, read_unlabelled, refuse_shared_images

CONFIG = DataConfig(image_size=16, crop="random", channels=1)


@pytest.fixture
def lab(tmp_path: Path) -> PairedFolder:
    return PairedFolder(*write_pairs(tmp_path / "lab"), CONFIG)


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Four images under names of their own, and masks/ beside them."""
    images, masks = write_pairs(tmp_path / "others", 4, (30, 24), seed=5)
    for path in [*images.iterdir(), *masks.iterdir()]:
        path.rename(path.with_name(f"new_{path.name}"))
    return images


def looks_of(lab: PairedFolder) -> Looks:
    return Looks.of([pair.name for pair in lab.pairs], [lab.look_windows(index) for index in range(len(lab))])


def test_unlabelled_images_are_read_as_labelled_ones_and_have_no_cells(lab, others):
    folder = UnlabelledFolder(others, CONFIG, seed=0, progress=False)
    assert folder.names == [f"new_cell_{number}" for number in range(4)] and len(folder.image_hashes) == 4
    example = folder[2, 7]
    assert example["image"].shape == (1, 16, 16) and example["image"].dtype == torch.float32
    assert example["mask"].shape == (16, 16) and not example["mask"].any()
    gray = np.rint((example["image"][0].numpy() + 1) * 127.5)
    stored = np.asarray(Image.open(others / "new_cell_2.png"))
    assert set(gray.ravel()) <= set(stored.ravel().astype(float))
    assert all(torch.equal(one, two) for one, two in zip(example.values(), folder[2, 7].values(), strict=True))
    assert not torch.equal(example["image"], folder[2, 8]["image"])


def test_masks_beside_unlabelled_images_are_no_images(lab, others, tmp_path):
    pseudo = tmp_path / "pseudo"
    pseudo.mkdir()
    for mask in (others.parent / "masks").iterdir():
        cells = np.asarray(Image.open(mask)) > 0
        np.savez(pseudo / f"{mask.stem}.npz", mask=np.uint8(255) * np.stack([~cells, cells]))
        mask.rename(others / f"{mask.stem}_masks.png")
    names = [f"new_cell_{number}" for number in range(4)]
    assert read_unlabelled([others], [], lab, progress=False)[0].names == names
    assert read_unlabelled([others], [pseudo], lab, progress=False)[0].names == names


def test_images_that_do_not_fit_the_memory_are_read_again_and_are_the_same(others, monkeypatch):
    held = UnlabelledFolder(others, CONFIG, seed=0, progress=False)
    monkeypatch.setattr(module, "MEMORY_GB", 1e-6)
    read = UnlabelledFolder(others, CONFIG, seed=0, progress=False)
    assert held.in_memory and not read.in_memory
    for key in ((0, 3), (3, 4), (0, 5)):
        assert torch.equal(held[key]["image"], read[key]["image"])
        assert np.array_equal(held.look_draw(*key), read.look_draw(*key))


@pytest.mark.parametrize("with_masks", [False, True])
def test_images_of_another_type_than_the_window_of_the_data_set_are_refused(tmp_path, others, with_masks):
    images, masks = write_pairs(tmp_path / "deep")
    for path in images.iterdir():
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 100).save(path)
    folders = [others], [others.parent / "masks"] if with_masks else []
    common = PairedFolder(images, masks, dataclasses.replace(CONFIG, window_scope="dataset"))
    with pytest.raises(InputError, match="4 of 4 unlabelled .*has gray values of uint8, but .* is for uint16: save it"):
        read_unlabelled(*folders, common, progress=False)
    with pytest.raises(InputError, match="4 of 4 images .*has gray values of uint8"):
        choose_looks(looks_of(common), common.config, None, others, None, dtypes=["uint16"])
    each = PairedFolder(images, masks, CONFIG)
    assert len(read_unlabelled(*folders, each, progress=False)[0]) == 4
    assert len(choose_looks(looks_of(each), each.config, None, others, None, dtypes=["uint16"]).looks.names) == 4


def test_files_that_are_not_read_are_named(lab, others, caplog):
    (others / "more").mkdir()
    (others / "new_cell_0.png").rename(others / "more" / "x.png")
    (others / "y.gif").write_bytes(b"GIF8")
    for read in (
        lambda: read_unlabelled([others], [], lab, False),
        lambda: choose_looks(looks_of(lab), CONFIG, None, others, None),
    ):
        caplog.clear()
        read()
        assert "files in the sub-folder more (1) are not read" in caplog.text
        assert "files of a kind that is not read: y.gif" in caplog.text


def test_an_image_for_a_look_whose_name_no_manifest_can_hold_is_refused(lab, others):
    odd = (others / "new_cell_0.png").rename(others / os.fsdecode(b"p\xe4.png"))
    with pytest.raises(InputError, match=r"look_path .*cannot be printed: 'p\\udce4'"):
        choose_looks(looks_of(lab), lab.config, None, odd, None)


def test_a_look_comes_from_another_window_than_the_example(lab):
    looks = np.stack([lab.look_draw(1, draw) for draw in range(6)])
    assert len(np.unique(looks[:, 0])) > 1  # windows differ from draw to draw
    assert np.array_equal(lab.look_draw(1, 3), looks[3])


def mixture(lab: PairedFolder, others: Path, *, pseudo_masks: bool) -> Mixture:
    masks = [others.parent / "masks"] if pseudo_masks else []
    sources = read_unlabelled([others], masks, lab, progress=False)
    return Mixture(lab, sources, looks_of(lab), 2, seed=0, pseudo_masks=pseudo_masks, soft=pseudo_masks)


def test_a_mixture_gives_labelled_examples_unchanged_and_says_who_has_a_mask(lab, others):
    mixed = mixture(lab, others, pseudo_masks=False)
    assert (len(mixed), mixed.num_unlabelled) == (6, 4)
    for index in range(10):
        example = mixed[index, 20 + index]
        assert bool(example["has_mask"]) == (index < 6)
        assert example["look"].shape == (10,) and example["look"].dtype == torch.float32
        if index < 6:
            plain = lab[index, 20 + index]
            assert torch.equal(example["image"], plain["image"]) and torch.equal(example["mask"], plain["mask"])


def test_pseudo_masks_are_kept_in_half_of_the_draws_and_all_masks_are_probabilities(lab, others):
    mixed = mixture(lab, others, pseudo_masks=True)
    kept = [bool(mixed[7, draw]["has_mask"]) for draw in range(200)]
    assert 70 < sum(kept) < 130
    assert all(bool(mixed[index, 0]["has_mask"]) for index in range(6))
    for index in (0, 7):
        mask = mixed[index, 1]["mask"]
        assert mask.shape == (2, 16, 16) and torch.equal(mask.sum(0), torch.ones(16, 16))


@pytest.mark.parametrize("share", [0.25, 0.1, 0.6])
def test_every_batch_holds_its_share_and_every_image_comes_equally_often(share):
    batches = list(StepBatches(6, 20, range(12), 3, 0, 1, num_unlabelled=4, unlabelled_share=share))
    counts = [sum(index >= 6 for index, _ in batch) for batch in batches]
    assert all(abs(count - 20 * share) < 1 for count in counts)
    keys = [key for batch in batches for key in batch]
    assert [draw for _, draw in keys] == list(range(240))
    seen = np.bincount([index for index, _ in keys], minlength=10)
    assert np.ptp(seen[:6]) <= 1 and np.ptp(seen[6:]) <= 1


def test_batches_with_unlabelled_images_go_on_and_are_shared_out_as_those_without():
    def keys(steps: range, rank: int = 0, ranks: int = 1) -> list:
        return list(StepBatches(6, 4, steps, 3, rank, ranks, num_unlabelled=5, unlabelled_share=0.25))

    assert keys(range(9))[5:] == keys(range(5, 9))
    halves = [keys(range(5), rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in keys(range(5))]
    labelled = [index for batch in keys(range(12)) for index, _ in batch if index < 6]
    alone = [index for batch in StepBatches(6, 4, range(9), 3, 0, 1) for index, _ in batch]
    assert labelled == alone  # unlabelled images come between and change no order


def test_balanced_groups_come_equally_often_and_go_on_as_they_would():
    def batches(steps: range) -> list:
        groups = [*"aaaab", *"ccdd"]
        return list(StepBatches(5, 8, steps, 3, 0, 1, num_unlabelled=4, unlabelled_share=0.25, groups=groups))

    seen = np.bincount([index for batch in batches(range(10)) for index, _ in batch], minlength=9)
    assert (seen[:4].sum(), seen[4]) == (30, 30) and np.ptp(seen[:4]) <= 1
    assert (seen[5:7].sum(), seen[7:].sum()) == (10, 10)
    assert batches(range(10))[4:] == batches(range(4, 10))


@pytest.mark.parametrize("spoil", ["empty", "missing", "name", "content", "channels", "small", "pseudo-masks"])
def test_unlabelled_folders_that_cannot_be_used_are_refused(lab, others, spoil, tmp_path):
    masks, message = [], ""
    if spoil == "empty":
        others, message = tmp_path / "nothing", "holds no image files"
        others.mkdir()
    elif spoil == "missing":
        others, message = tmp_path / "nowhere", "is no folder of image files: not found"
    elif spoil == "name":
        (others / "new_cell_1.png").rename(others / "cell_1.png")
        message = "unlabelled_path .*: 1 images have the names of labelled ones: cell_1"
    elif spoil == "content":
        shutil.copy(lab.pairs[2].image_path, others / "copy.png")
        message = "1 images are labelled ones under other names: copy"
    elif spoil == "channels":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(others / "rgb.png")
        message = "rgb.png.*has colours, but the model takes 1 gray channel"
    elif spoil == "small":
        Image.fromarray(np.arange(15 * 40, dtype=np.uint16).reshape(15, 40).astype(np.uint8)).save(others / "thin.png")
        message = "thin.png: an image of 40 x 15 pixels is smaller than image_size=16"
    else:
        masks, message = [others, others], "names 2 folders for the 1 of unlabelled_path"
    with pytest.raises(InputError, match=message):
        refuse_shared_images(read_unlabelled([others], masks, lab, progress=False), lab)


def test_pseudo_masks_are_probabilities_even_if_the_labels_store_other_values(tmp_path, others):
    config = dataclasses.replace(CONFIG, mask_values=(0, 255))
    lab = PairedFolder(*write_pairs(tmp_path / "lab"), config, "classes")
    (folder,) = read_unlabelled([others], [others.parent / "masks"], lab, progress=False)
    assert lab.rule.mask_type == "classes" and folder.rule.mask_type == "probability"
    assert folder[0, 0]["mask"].shape == (2, 16, 16)


def test_pseudo_masks_that_do_not_sum_to_one_are_divided_by_their_sum_on_request(tmp_path, others):
    lab, masks = PairedFolder(*write_pairs(tmp_path / "lab"), CONFIG), tmp_path / "soft"
    masks.mkdir()
    for number, path in enumerate(sorted(others.iterdir())):
        height, width = np.asarray(Image.open(path)).shape[:2]
        stack = np.stack([np.full((height, width), 0.9), np.full((height, width), 0.3 + 0.01 * number)])
        np.save(masks / f"{path.stem}.npy", stack.astype(np.float32))
    with pytest.raises(InputError, match="normalize_masks"):
        read_unlabelled([others], [masks], lab, progress=False)
    (folder,) = read_unlabelled([others], [masks], lab, progress=False, normalize=True)
    assert folder[0, 0]["mask"][:, 0, 0].tolist() == pytest.approx([0.75, 0.25])
