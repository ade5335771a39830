"""Sub-folders of groups become flat folders and a table, and what is no group is refused."""

from __future__ import annotations

import errno
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_helpers import run_here

import make_masks
from common.disk import link_or_copy
from common.errors import InputError
from dataset.files import find_files, pair_files
from dataset.groups import gather_groups, groups_of, read_groups
from evaluation.experiments.label_split import SelectionSettings, make_selections

GROUPS = {"patient_03": 3, "patient.4": 2}  # images of each


@pytest.fixture
def lab(tmp_path) -> Path:
    """images/GROUP/NAME.png, masks/GROUP/NAME_masks.png, new/GROUP/NAME.png; names repeat in every group."""
    rng = np.random.default_rng(0)
    for group, count in GROUPS.items():
        for folder in ("images", "masks", "new"):
            (tmp_path / "lab" / folder / group).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((20, 24), np.uint8)
            mask[3 + number : 9, 4:12] = 255
            image = rng.integers(0, 255, (20, 24), np.uint8)
            Image.fromarray(image).save(tmp_path / "lab" / "images" / group / f"{number:03d}.png")
            Image.fromarray(mask).save(tmp_path / "lab" / "masks" / group / f"{number:03d}_masks.png")
            Image.fromarray(255 - image).save(tmp_path / "lab" / "new" / group / f"new {number}.png")
    for litter in (".DS_Store", "__MACOSX/deep", "lost+found", "patient_03/lost+found"):
        (tmp_path / "lab" / "images" / litter).mkdir(parents=True)
    return tmp_path / "lab"


def test_sub_folders_become_pairs_of_their_groups(lab, tmp_path):
    flags = ["--data-path", lab / "images", "--mask-path", lab / "masks", "--unlabelled-path", lab / "new"]
    assert run_here(make_masks, "groups", *flags, "--output", tmp_path / "flat")[0] == 0
    pairs = pair_files(tmp_path / "flat" / "images", tmp_path / "flat" / "masks")
    new = find_files(tmp_path / "flat" / "unlabelled", "image")
    assert [pair.name for pair in pairs] == sorted(f"{g}_{n:03d}" for g, count in GROUPS.items() for n in range(count))
    names = [*(pair.name for pair in pairs), *new]
    table = read_groups(tmp_path / "flat" / "groups.csv", "group")
    assert groups_of(names, table) == [name[: name.rindex("_")] for name in names]
    for pair in pairs:
        group, number = pair.name[: pair.name.rindex("_")], pair.name[pair.name.rindex("_") + 1 :]
        assert pair.image_path.read_bytes() == (lab / "images" / group / f"{number}.png").read_bytes()
        assert pair.mask_path.read_bytes() == (lab / "masks" / group / f"{number}_masks.png").read_bytes()
        assert pair.image_path.samefile(lab / "images" / group / f"{number}.png")  # no space is used


def test_relative_links_as_of_datalad_lead_to_their_files_from_the_flat_folders(lab, tmp_path):
    (tmp_path / "raw").mkdir()
    for number, path in enumerate(sorted([*lab.rglob("*.png")])):
        path.rename(tmp_path / "raw" / f"{number}.png")
        path.symlink_to(Path("../../../raw") / f"{number}.png")
    gather_groups(tmp_path / "out" / "deeper" / "flat", lab / "images", lab / "masks")
    for pair in pair_files(tmp_path / "out/deeper/flat/images", tmp_path / "out/deeper/flat/masks"):
        group, number = pair.name.rsplit("_", 1)
        assert pair.image_path.samefile(lab / "images" / group / f"{number}.png")
        assert pair.mask_path.samefile(lab / "masks" / group / f"{number}_masks.png")
        assert not pair.image_path.is_symlink() and not pair.mask_path.is_symlink()


def test_files_that_are_in_no_flat_folder_are_named(lab, tmp_path, caplog):
    for folder in ("images", "masks", "new"):
        (lab / folder / "patient.4" / f"{folder}.gif").write_bytes(b"GIF8")
    gather_groups(tmp_path / "flat", lab / "images", lab / "masks", lab / "new")
    for folder in ("images", "masks", "new"):
        assert f"{folder}/patient.4: files of a kind that is not read: {folder}.gif" in caplog.text


def test_a_split_keeps_the_groups_of_sub_folders(lab, tmp_path):
    gather_groups(tmp_path / "flat", lab / "images", lab / "masks")
    plans = make_selections(
        tmp_path / "split", (tmp_path / "flat" / "images", tmp_path / "flat" / "masks"),
        SelectionSettings([1], 2, 0, 0.2, whole_groups=True, test_groups=1),
        groups=read_groups(tmp_path / "flat" / "groups.csv", "group"),
    )  # fmt: skip
    for plan in plans:
        assert len({plan.groups[name] for name in plan.test}) == 1
        assert {plan.groups[name] for name in plan.test} | {plan.groups[name] for name in plan.shares[1]} == set(GROUPS)


@pytest.mark.parametrize("inner", ["", "masks"])
def test_a_group_of_single_nuclei_keeps_one_file_per_nucleus_as_the_others(lab, tmp_path, inner):
    for path in sorted((lab / "masks").rglob("*.png")):
        folder = path.with_name(path.stem.removesuffix("_masks")) / inner
        folder.mkdir(parents=True)
        if path.parent.name == "patient_03":
            shutil.copy(path, folder / "2.png")
        path.rename(folder / "1.png")
    assert not any(path.is_dir() for path in find_files(lab / "masks/patient.4", "mask").values())
    gather_groups(tmp_path / "flat", lab / "images", lab / "masks")
    pairs = pair_files(tmp_path / "flat" / "images", tmp_path / "flat" / "masks")
    counts = {pair.name: len(list(pair.mask_path.iterdir())) for pair in pairs if pair.mask_path.is_dir()}
    assert counts == {f"{g}_{n:03d}": 2 if g == "patient_03" else 1 for g, many in GROUPS.items() for n in range(many)}


def test_whole_masks_of_one_group_and_nuclei_of_another_are_refused(lab, tmp_path):
    for path in sorted((lab / "masks/patient_03").iterdir()):
        folder = path.with_name(path.stem.removesuffix("_masks"))
        folder.mkdir()
        shutil.copy(path, folder / "2.png")
        path.rename(folder / "1.png")
    with pytest.raises(InputError, match=r"patient\.4 has one mask for each image, but .* group patient_03"):
        gather_groups(tmp_path / "flat", lab / "images", lab / "masks")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lab: shutil.copy(lab / "images/patient.4/000.png", lab / "images"), "1 image files .* in no group"),
        (lambda lab: (lab / "masks/patient.4").rename(lab / "masks/p4"), "different groups: .* has p4, patient.4"),
        (lambda lab: (lab / "images/patient.4").rename(lab / "images/Test"), "sub-folders Test, whose names mean no"),
        (lambda lab: (lab / "images/patient.4").rename(lab / os.fsdecode(b"images/p\xe4")), "cannot be printed: 'p"),
        (lambda lab: (lab / "images/patient.4/001.png").unlink(), "masks .* have no image"),
        (lambda lab: shutil.rmtree(lab / "images"), "no such folder"),
        (lambda lab: shutil.move(lab / "images/patient.4", lab / "images/patient_03/x"), "patient_03 holds images and"),
    ],
)
def test_what_is_unclear_is_refused_before_anything_is_written(lab, tmp_path, change, words):
    change(lab)
    with pytest.raises(InputError, match=words):
        gather_groups(tmp_path / "flat", lab / "images", lab / "masks")
    assert not (tmp_path / "flat").exists()


def test_a_full_disk_leaves_nothing_behind_and_the_same_call_works_later(lab, tmp_path, monkeypatch):
    calls = []

    def full(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        shutil.copy(source, target)

    monkeypatch.setattr("dataset.groups.link_or_copy", full)
    with pytest.raises(OSError, match="No space left") as error:
        gather_groups(tmp_path / "flat", lab / "images", lab / "masks")
    assert not (tmp_path / "flat").exists() and ".tmp" not in error.value.filename
    gather_groups(tmp_path / "flat", lab / "images", lab / "masks")
    assert (tmp_path / "flat" / "groups.csv").is_file()


def test_two_images_of_one_name_are_refused(lab, tmp_path):
    (lab / "new/patient_03").rename(lab / "new/patient_03_new")
    shutil.copytree(lab / "new/patient_03_new", lab / "new/patient_03")
    (lab / "new/patient_03/new 0.png").rename(lab / "new/patient_03/new_new 0.png")
    with pytest.raises(InputError, match="two images would get one name: patient_03_new_new 0"):
        gather_groups(tmp_path / "flat", unlabelled_dir=lab / "new")


@pytest.mark.parametrize("given", [[], ["--data-path", "x"]])
def test_folders_that_do_not_belong_together_are_refused(tmp_path, given):
    code, lines = run_here(make_masks, "groups", *given, "--output", tmp_path / "flat")
    assert code == 2 and "--mask-path" in lines[-1]


def test_sub_folders_given_to_a_flat_reader_name_the_command(lab):
    with pytest.raises(InputError, match="did you mean .*make_masks.py groups"):
        find_files(lab / "images", "image")


# --- the names of a table --------------------------------------------------------------------------------------------


def table(folder: Path, *rows: str, columns: str = "name,group") -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    "name", ["f1", "f1.tif", "f1.ome.tif", "f1.ome", "f1.PNG", "f1.czi", "f1_img.png", "raw_f1.tif"]
)
def test_a_name_of_a_table_is_that_of_training_with_and_without_suffix(tmp_path, name):
    assert groups_of(["f1"], read_groups(table(tmp_path, f"{name},a"), "group")) == ["a"]


def test_names_with_a_dot_and_accents_of_a_mac_stay_apart(tmp_path):
    names = ["scan.01", "scan.02", "scan.02.tif", "Zelle ä"]
    rows = ["scan.01,a", "scan.02,b", "scan.02.tif,b", f"{unicodedata.normalize('NFD', 'Zelle ä')}.png,d"]
    found = read_groups(table(tmp_path, *rows), "group")
    assert groups_of([names[0], names[1], names[3]], found) == ["a", "b", "d"]
    with pytest.raises(InputError, match="1 of 1 images have no group: scan"):
        groups_of(["scan"], found)


def test_a_row_of_another_image_gives_no_group(tmp_path):
    found = read_groups(table(tmp_path, "f1_raw,a", "f1_img,b", "f2_raw,c"), "group")
    for names in (["f1"], ["f2_raw", "f2"]):
        with pytest.raises(InputError, match=f"images have no group: {names[-1]}"):
            groups_of(names, found)


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        ("group,name", ["a,f1", "b"], "table.csv: line 3 has another number of columns than the header"),
        ("name,group", ["f1,2,a"], "table.csv: line 2 has another number of columns than the header"),
        ("name,group", ["f1,a", ",b"], "table.csv: line 3 has no name"),
        ("name,group", ["", "f1,a", "", "", ",b", "f2,c"], "table.csv: line 6 has no name"),
        ("name,group", ['f1,"a', 'b"', "", "f2"], "table.csv: line 5 has another number of columns"),
        ("name,group", ["f1.png,a", "f2,b", "f1.tif,b"], "table.csv: names with more than one group: f1"),
        ("name;group", ["f1;a"], "table.csv has no column name; it has name;group. Commas must separate the columns"),
    ],
)
def test_rows_that_say_nothing_or_contradict_each_other_are_refused(tmp_path, columns, rows, words):
    with pytest.raises(InputError, match=re.escape(words)):
        read_groups(table(tmp_path, *rows, columns=columns), "group")


def test_the_same_row_twice_and_an_empty_row_are_no_fault(tmp_path):
    assert read_groups(table(tmp_path, "f1.png,a", "f1,a", ","), "group") == {"f1": "a"}


def test_a_split_takes_the_names_of_training(lab, tmp_path):
    for number in range(3):
        (lab / f"images/patient_03/{number:03d}.png").rename(lab / f"images/patient_03/{number:03d}_img.png")
    folders = (lab / "images/patient_03", lab / "masks/patient_03")
    groups = read_groups(table(tmp_path, *(f"{number:03d}_img.png,{number}" for number in range(3))), "group")
    settings = SelectionSettings([1], 1, 0, whole_groups=True, test_groups=1)
    (plan,) = make_selections(tmp_path / "split", folders, settings, groups=groups)
    assert plan.groups == {f"{number:03d}": str(number) for number in range(3)}
    assert groups_of([pair.name for pair in pair_files(*folders)], groups) == ["0", "1", "2"]


def test_masks_of_nuclei_whose_name_has_a_dot_stay_with_their_selection(lab, tmp_path):
    masks = tmp_path / "nuclei"
    for number in range(3):
        image = lab / f"images/patient_03/{number:03d}.png"
        image.rename(image.with_name(f"scan.{number:03d}.png"))
        folder = masks / f"scan.{number:03d}"
        folder.mkdir(parents=True)
        nuclei = np.zeros((2, 20, 24), np.uint8)
        nuclei[0, 2:6, 2:6], nuclei[1, 9:15, 9 + number : 16] = 255, 255
        for place, nucleus in enumerate(nuclei):
            Image.fromarray(nucleus).save(folder / f"{place}.png")
    folders = (lab / "images/patient_03", masks)
    (plan,) = make_selections(tmp_path / "split", folders, SelectionSettings([1], 1, 0, 0.3))
    for part in (None, 1):
        pairs = pair_files(plan.part(part) / "images", plan.part(part) / "masks")
        assert [pair.name for pair in pairs] == (plan.test if part is None else plan.shares[1])


def test_a_disk_without_links_gets_copies(lab, tmp_path, monkeypatch):
    def no_links(*paths: object) -> None:
        raise OSError

    monkeypatch.setattr("os.link", no_links)
    link_or_copy(lab / "images", tmp_path / "copy")
    source = lab / "images/patient_03/000.png"
    assert (tmp_path / "copy/patient_03/000.png").read_bytes() == source.read_bytes()
    assert not (tmp_path / "copy/patient_03/000.png").samefile(source)
