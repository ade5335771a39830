"""Sub-folders of groups become flat folders and a table, and what is no group is refused."""

from __future__ import annotations

import errno
import os
import shutil
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
    (tmp_path / "lab" / "images" / ".DS_Store").touch()
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lab: shutil.copy(lab / "images/patient.4/000.png", lab / "images"), "1 image files .* in no group"),
        (lambda lab: (lab / "masks/patient.4").rename(lab / "masks/p4"), "different groups: .* has p4, patient.4"),
        (lambda lab: (lab / "images/patient.4").rename(lab / "images/Test"), "sub-folders Test, whose names mean no"),
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


def test_a_disk_without_links_gets_copies(lab, tmp_path, monkeypatch):
    def no_links(*paths: object) -> None:
        raise OSError

    monkeypatch.setattr("os.link", no_links)
    link_or_copy(lab / "images", tmp_path / "copy")
    source = lab / "images/patient_03/000.png"
    assert (tmp_path / "copy/patient_03/000.png").read_bytes() == source.read_bytes()
    assert not (tmp_path / "copy/patient_03/000.png").samefile(source)
