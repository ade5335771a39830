"""Pairs by name: which words count as a word for masks, and what is refused because two names would fit."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import InputError
from dataset import names
from dataset.config import DataConfig
from dataset.files import find_files, pair_files
from dataset.mask_folder import MaskFolder
from dataset.names import partners, split_together
from evaluation.data_report import survey


@pytest.mark.parametrize(
    ("image", "mask", "name"),
    [
        ("f1", "f1", "f1"),
        ("f1", "f1_masks", "f1"),
        ("f1_img", "f1_masks", "f1"),
        ("f1", "f1_label", "f1"),
        ("f1", "f1-labels", "f1"),
        ("f1", "f1_seg", "f1"),
        ("f1", "f1.mask", "f1"),
        ("f1", "f1_Mask", "f1"),
        ("f1", "mask_f1", "f1"),
        ("f1", "f1_segmentation", "f1"),
        ("f1", "f1_anno", "f1"),
        ("f1_raw", "f1_mask", "f1"),
        ("f1_image", "f1_gt", "f1"),
        ("image_1", "mask_1", "1"),
        ("im_1", "gt_1", "1"),
        ("image_1", "image_1_mask", "image_1"),
    ],
)
def test_words_for_masks_and_images_pair(image, mask, name):
    assert partners([image], [mask]) == ({name: (image, mask)}, [], [])


@pytest.mark.parametrize(("image", "mask"), [("f1", "f2_mask"), ("f1", "f1_flow"), ("a_1", "b_1"), ("f1", "f1mask")])
def test_other_names_do_not_pair(image, mask):
    assert partners([image], [mask]) == ({}, [image], [mask])


def test_the_plain_name_comes_first_and_two_masks_of_one_image_are_refused():
    assert partners(["f1"], ["f1", "f1_label"]) == ({"f1": ("f1", "f1")}, [], ["f1_label"])
    with pytest.raises(InputError, match="image f1 has 2 masks: f1_label, f1_seg"):
        partners(["f1"], ["f1_label", "f1_seg"])
    with pytest.raises(InputError, match="f1 and f1_raw would make one pair"):
        partners(["f1", "f1_raw"], ["f1_label"])


@pytest.mark.parametrize("pattern", ["{}_label", "mask_{}", "{}_masks", "{}-seg", "{}_Nuclei", "Mask of {}"])
def test_one_folder_for_images_and_masks_is_split_by_the_names(tmp_path, pattern):
    for number in range(3):
        Image.fromarray(np.full((8, 8), 9 * number, np.uint8)).save(tmp_path / f"f{number}.png")
        Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / f"{pattern.format(f'f{number}')}.png")
    pairs = pair_files(tmp_path, tmp_path)
    assert [(pair.name, pair.mask_path.stem) for pair in pairs] == [
        (f"f{number}", pattern.format(f"f{number}")) for number in range(3)
    ]
    masks = MaskFolder(tmp_path, DataConfig(image_size=8))  # to generate from: the images are left out
    assert {path.stem for path in masks.paths.values()} == {pair.mask_path.stem for pair in pairs}
    assert split_together(["a", "b"]) == ({"a", "b"}, set())


def test_a_single_mask_has_the_name_that_it_has_in_its_folder(tmp_path):
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "f1.ome.tif")
    for given in (tmp_path, tmp_path / "f1.ome.tif"):
        assert list(MaskFolder(given, DataConfig(image_size=8)).paths) == ["f1"]


def test_the_data_report_gives_the_hint_of_training(tmp_path):
    for folder, stem in (("images", "F1"), ("masks", "f1 ")):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / folder / f"{stem}.png")
    report, _, _ = survey(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(InputError, match="capital letters or spaces only: f1"):
        pair_files(tmp_path / "images", tmp_path / "masks")
    assert any("capital letters or spaces only: f1" in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["a.gif", "b.gif"], "but 2 .gif, which are not read: save them as .png"),
        (["a.h5"], "but 1 .h5, which are not read"),
        (["a.czi"], "make_masks.py images"),
        (["a.ome.zarr", "b.ome.zarr"], r"but arrays \(a.ome.zarr and 1 more\), which are not read: save them as TIFF"),
        (["Thumbs.db", ".DS_Store", "._a.png"], "it must hold .png"),
    ],
)
@pytest.mark.parametrize("what", ["image", "mask"])
def test_a_folder_of_other_files_says_what_it_holds(tmp_path, files, words, what):
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(InputError, match=words):
        find_files(tmp_path, what)


def test_images_and_masks_of_one_name_in_one_folder_are_told_what_to_do(tmp_path):
    for file in ("f1.png", "f1.tif"):
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(InputError, match="move the masks into a folder of their own"):
        find_files(tmp_path, "image")


def test_names_for_messages_have_the_parent_folders_that_tell_files_apart():
    paths = [Path("/lab/A/images/image.tif"), Path("/lab/B/images/image.tif"), Path("/lab/B/images/other.tif")]
    assert names.short_names(paths) == ["A/images/image.tif", "B/images/image.tif", "other.tif"]
    assert names.short_names([Path("a.png"), Path("a.png")]) == ["a.png", "a.png"] and names.short_names([]) == []


def test_a_shell_that_misreads_names_is_told_the_setting(monkeypatch):
    assert "Rename them" in names.odd_names(["a\nb"])
    monkeypatch.setattr(names.sys, "getfilesystemencoding", lambda: "ascii")
    assert "LC_ALL=C.UTF-8" in names.odd_names(["z\udcc3\udca9lle"])
    assert names.odd_names(["zélle"]) == ""


def test_folders_two_levels_up_name_the_folder_to_give(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "all" / kind).mkdir(parents=True)
        for number in range(3):
            mask = np.arange(64, dtype=np.uint8).reshape(8, 8)
            Image.fromarray(mask).save(tmp_path / "all" / kind / f"{number}.png")
    with pytest.raises(InputError, match=r"holds 3 images.*give .*all/images itself"):
        find_files(tmp_path, "image")
    with pytest.raises(InputError, match=r"no mask of one nucleus.*give its folder .*all/masks;"):
        MaskFolder(tmp_path, DataConfig(image_size=8))


@pytest.mark.parametrize(
    ("image", "mask", "name"),
    [
        ("t007", "man_seg007", "007"),  # Cell Tracking Challenge
        ("t007", "man_track007", "007"),
        ("image007", "mask007", "007"),
        ("f1", "f1.ome_cp_masks", "f1"),
        ("f1", "f1.jpg", "f1"),
        ("f1.tif", "f1", "f1"),
        ("f1", "f1.tif_mask", "f1"),
        ("f1", "f1_Simple Segmentation", "f1"),  # ilastik
        ("f1", "f1_binary_mask", "f1"),
        ("f1", "f1_label_img", "f1"),
        ("f1", "LblImg_f1", "f1"),  # TrackMate
        ("f1", "f1-labeling", "f1"),  # Labkit
        ("f1_0000", "f1", "f1"),  # nnU-Net
        ("f1", "f1_Nuclei", "f1"),  # CellProfiler
        ("f1", "f1_Cells", "f1"),
        ("f1", "f1_NucleiObjects", None),
        ("f1", "f1_nuclei_labels", "f1"),
        ("f1", "f1_cell_masks", "f1"),
        ("f1", "Nuclei_f1", "f1"),
        ("f1", "f1_Object Predictions", "f1"),  # ilastik
        ("f1", "f1-Object-Identities", "f1"),
        ("f1", "f1_Simple-Segmentation", "f1"),
        ("f1", "Mask of f1.tif", "f1"),  # Fiji
        ("f1", "Count Masks of f1", "f1"),
        ("f1", "Segmentation of f1", "f1"),
        ("f1", "f1-lbl", "f1"),  # MorphoLibJ
        ("f1", "f1_inst_map", "f1"),
        ("f1", "f1_segmentation_mask", "f1"),
        ("f1", "f1_manual_nuclei_mask", "f1"),
        ("s.svs [d=1,x=0,y=0,w=64,h=64]", "s.svs [d=1,x=0,y=0,w=64,h=64]-labelled", "s.svs [d=1,x=0,y=0,w=64,h=64]"),
        ("f1_jpg.rf.3ab", "f1_jpg.rf.3ab_mask", "f1_jpg.rf.3ab"),  # Roboflow
        ("f1_nuclei", "f1_nuclei_mask", "f1_nuclei"),
    ],
)
def test_names_that_programs_and_challenges_give_pair(image, mask, name):
    expected = ({}, [image], [mask]) if name is None else ({name: (image, mask)}, [], [])
    assert partners([image], [mask]) == expected


def test_a_nearer_name_comes_first_and_two_kinds_of_masks_of_one_image_are_refused():
    pairs, *lonely = partners(["f1", "f1_cells"], ["f1_label", "f1_cells_label"])
    assert pairs == {"f1": ("f1", "f1_label"), "f1_cells": ("f1_cells", "f1_cells_label")} and lonely == [[], []]
    with pytest.raises(InputError, match="image f1 has 2 masks: f1_Cells, f1_Nuclei. Keep one of them"):
        partners(["f1"], ["f1_Cells", "f1_Nuclei"])
    with pytest.raises(InputError, match="images f1_cells and f1 would make one pair"):
        partners(["f1_cells", "f1"], ["f1_cells_label"])
    assert names.name_hints([], ["f1_Nuclei"], ["f1"]) == [
        "f1_Nuclei is a second mask of the image f1: keep one mask for each image"
    ]


def test_masks_named_after_what_they_show_are_told_from_images_beside_them():
    assert split_together({"f1", "f2", "f1_Nuclei", "f2_Nuclei"}) == ({"f1", "f2"}, {"f1_Nuclei", "f2_Nuclei"})
    stains = {"f1_nuclei", "f1_cells", "f2_nuclei", "f2_cells"}  # images: none is named after another
    assert split_together(stains) == (stains, set())


def test_frames_of_the_cell_tracking_challenge_in_one_folder_are_told_apart():
    assert split_together({"t000", "t001", "man_seg000", "man_seg001"}) == (
        {"t000", "t001"},
        {"man_seg000", "man_seg001"},
    )


def test_a_second_mask_of_an_image_is_named(tmp_path):
    for name in ("images/f1.png", "masks/f1_mask.png", "masks/f1_label.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / name)
    words = "f1_label is a second mask of the image f1"
    with pytest.raises(InputError, match=words):
        pair_files(tmp_path / "images", tmp_path / "masks")
    assert any(words in problem for problem in survey(tmp_path / "images", tmp_path / "masks")[0].problems)


def test_two_names_that_look_alike_are_explained(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / (unicodedata.normalize(form, "\u00e9.png"))).write_bytes(b"x")
    with pytest.raises(InputError, match="they look alike: the accents are stored in two forms"):
        find_files(tmp_path, "image")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("masks.zip", "it is an archive: unpack it"),
        ("coco.json", "it is a file of annotations: make_masks.py convert"),
        ("table.csv", "it is a file: give the folder, such as"),
        ("*.png", "not found: give the folder, without a pattern"),
        ("hidden", r"but 1 hidden ones \(as \._a.png\)"),
        ("empty", "it is empty"),
        ("deep", "did you mean .*deep/images/train"),
        ("parts", "did you mean .*parts/train_set"),
        ("fields", "folders of two files"),
    ],
)
def test_what_is_given_in_place_of_a_folder_of_images_is_answered_with_what_to_give(tmp_path, path, words):
    for name in (
        "masks.zip", "coco.json", "table.csv", "hidden/._a.png", "deep/images/train/a.png", "parts/holdout/a.png",
        "parts/holdout/b.png", "parts/train_set/b.png", "parts/train_set/c.png",
        "fields/1/image.png", "fields/1/mask.png", "fields/2/image.png", "fields/2/mask.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        find_files(tmp_path / path, "image")


@pytest.mark.parametrize("name", ["train", "Validation", "test_set", "held-out", "fold1", "fold_2"])
def test_names_of_parts_of_a_data_set_are_known(name):
    assert names.is_split(name) and not names.is_split("sample1") and not names.is_split("test1")


@pytest.mark.parametrize(
    ("images", "masks", "words"),
    [
        (["f1_w1", "f1_w2", "f2_w1"], ["f1", "f2"], "2 images begin with the name of the mask f1 (f1_w1, f1_w2): if"),
        (["f1"], ["f1_nuclei_masks", "f1_cyto_masks"], "2 masks begin with the name of the image f1"),
    ],
)
def test_channels_in_files_of_their_own_and_two_kinds_of_masks_are_named(images, masks, words):
    (hint,) = names.name_hints(images, masks)
    assert words in hint
    assert names.name_hints(images[:1], masks[:1]) != [hint]


@pytest.mark.parametrize(
    ("file", "words"),
    [("f1.xml", "GeoJSON from QuPath"), ("f1.mat", "save the label image"), ("f1.txt", "export COCO")],
)
def test_labels_of_other_programs_are_answered_with_what_to_export(tmp_path, file, words):
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(InputError, match=words):
        find_files(tmp_path, "mask")


def test_links_to_folders_around_them_are_not_followed(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(b"x")
    for name, target in (("up", ".."), ("self", "self"), ("here", ".")):
        (tmp_path / "images" / name).symlink_to(target)
    with pytest.raises(InputError, match="holds no image files") as refused:
        find_files(tmp_path / "images", "image")
    assert "did you mean" not in str(refused.value)


def test_folders_of_labelme_json_to_dataset_are_told_apart_from_nuclei(tmp_path):
    for name in ("img.png", "label.png", "label_viz.png"):
        (tmp_path / "f1_json").mkdir(exist_ok=True)
        (tmp_path / "f1_json" / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"labelme_json_to_dataset \(as f1_json\)"):
        find_files(tmp_path, "mask")


def test_the_icon_of_a_folder_of_macos_is_ignored(tmp_path):
    for name in ("a.png", "Icon\r"):
        (tmp_path / name).write_bytes(b"x")
    assert list(find_files(tmp_path, "image")) == ["a"]
