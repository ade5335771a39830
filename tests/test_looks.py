"""Looks and unlabelled images from end to end: train, resume, sample, export, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_helpers import FEW_STEPS, run_here, train_arguments, write_pairs

import evaluate
import sample
import sample_ddp
import train
from common.disk import SETTINGS, file_sha256
from engine.checkpoint import read_checkpoint
from evaluation.looks import _aligned, _mask
from synthetic.reader import SampleSet

pytestmark = pytest.mark.usefixtures("one_block")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """images/, masks/, others/ (without masks) and pseudo/ (their soft masks); two trained runs."""
    folder = tmp_path_factory.mktemp("lab")
    write_pairs(folder, 5)
    images, masks = write_pairs(folder / "more", 3, seed=4)
    (folder / "others").mkdir()
    (folder / "pseudo").mkdir()
    for path in images.iterdir():
        path.rename(folder / "others" / f"new_{path.name}")
    for path in masks.iterdir():
        soft = np.asarray(Image.open(path)).astype(np.float32) * 0.8 + 20
        Image.fromarray(soft.astype(np.uint8)).save(folder / "pseudo" / f"new_{path.name}")
    start(folder, "looks", 4, "--look", "reference", "--unlabelled-path", folder / "others", "--export-safetensors")
    start(folder, "plain", 1)
    return folder


def start(folder: Path, name: str, steps: int, *more: object, code: int = 0) -> str:
    words = train_arguments(folder / "images", folder / "masks", folder / "results", name, steps)[1:]
    found, lines = run_here(train, *words, "--in-channels", 1, "--ckpt-every", 2, *more)
    assert found == code, lines
    return "\n".join(lines)


def newest(lab: Path, name: str) -> Path:
    return max((lab / "results" / name / "checkpoints").glob("*.pt"))


def make_set(lab: Path, folder: Path, *more: object, run: str = "looks", code: int = 0) -> str:
    words = ["ODE", "--ckpt", newest(lab, run), "--mask-path", lab / "masks", "--sample-dir", folder, *FEW_STEPS, *more]
    found, lines = run_here(sample_ddp, *words)
    assert found == code, lines
    return "\n".join(lines)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open() as stream:
        return list(csv.DictReader(stream))


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / row["image"])) for row in rows(folder)])


@pytest.mark.parametrize("more", [[], ["--unlabelled-mask-path"]], ids=["null mask", "pseudo-masks"])
def test_a_run_with_looks_and_unlabelled_images_resumes_bit_for_bit(lab, more):
    flags = ["--look", "reference", "--unlabelled-path", lab / "others", *more, *([lab / "pseudo"] if more else [])]
    start(lab, f"whole{len(more)}", 4, *flags)
    start(lab, f"parts{len(more)}", 2, *flags)
    said = start(lab, f"parts{len(more)}", 4)  # without the flags: the checkpoint has them
    assert "continuing after step 2" in said
    whole, parts = (read_checkpoint(newest(lab, f"{name}{len(more)}")) for name in ("whole", "parts"))
    assert whole["looks"] == parts["looks"] and whole["trained_on"] == parts["trained_on"]
    for kind in ("model", "ema"):
        assert all(torch.equal(whole[kind][name], parts[kind][name]) for name in whole[kind])
    assert whole["model"]["look_embedder.mlp.2.weight"].abs().max() > 0


def test_a_checkpoint_keeps_looks_as_plain_numbers_and_so_does_its_export(lab, tmp_path):
    state = read_checkpoint(newest(lab, "looks"))
    assert state["looks"]["names"] == [f"cell_{n}" for n in range(5)] + [f"new_cell_{n}" for n in range(3)]
    assert np.shape(state["looks"]["numbers"]) == (8, 10) and len(state["trained_on"]) == 8
    assert state["labelled_on"] == sorted(map(file_sha256, (lab / "images").iterdir()))
    json.dumps(state["looks"])
    exported = read_checkpoint(lab / "results" / "looks" / "model.safetensors")
    assert exported["looks"] == state["looks"] and exported["labelled_on"] == state["labelled_on"]
    assert set(exported["ema"]) == set(state["ema"])
    assert read_checkpoint(newest(lab, "plain"))["looks"] is None


def test_images_behind_pseudo_masks_count_as_labelled_unless_their_segmenter_is_known(lab, tmp_path):
    shutil.copytree(lab / "pseudo", tmp_path / "known" / "pseudo")
    note = {"command": "pseudo", "segmenter_images_sha256": ["taught"]}
    (tmp_path / "known" / SETTINGS).write_text(json.dumps(note))
    own, others = ([file_sha256(path) for path in (lab / kind).iterdir()] for kind in ("images", "others"))
    for name, masks, behind in (("p", lab / "pseudo", others), ("k", tmp_path / "known" / "pseudo", ["taught"])):
        start(lab, name, 1, "--unlabelled-path", lab / "others", "--unlabelled-mask-path", masks)
        state = read_checkpoint(newest(lab, name))
        assert state["trained_on"] == sorted(own + others) and state["labelled_on"] == sorted(own + behind)
    make_set(lab, tmp_path / "set", run="k")
    settings = json.loads((tmp_path / "set" / SETTINGS).read_text())
    assert settings["labelled_on"] == sorted([*own, "taught"]) and settings["trained_on"] == sorted(own + others)


def test_a_set_shows_looks_of_training_images_drawn_by_the_seed(lab, tmp_path):
    make_set(lab, tmp_path / "one", "--samples-per-mask", 4)
    found = rows(tmp_path / "one")
    assert {row["look_source"] for row in found} == {"training"} and len({row["look_image"] for row in found}) > 4
    make_set(lab, tmp_path / "two", "--samples-per-mask", 4, "--per-proc-batch-size", 8)
    assert [row["look_image"] for row in rows(tmp_path / "two")] == [row["look_image"] for row in found]
    make_set(lab, tmp_path / "other", "--samples-per-mask", 4, "--seed", 1)
    assert [row["look_image"] for row in rows(tmp_path / "other")] != [row["look_image"] for row in found]


def test_looks_come_from_given_images_the_own_image_one_image_or_nobody(lab, tmp_path):
    make_set(lab, tmp_path / "path", "--look-path", lab / "others")
    assert {row["look_image"] for row in rows(tmp_path / "path")} <= {f"new_cell_{n}" for n in range(3)}
    make_set(lab, tmp_path / "same", "--look", "same", "--data-path", lab / "images")
    assert [row["look_image"] for row in rows(tmp_path / "same")] == [f"cell_{n}" for n in range(5)]
    make_set(lab, tmp_path / "one", "--look-index", 6, "--look-scale", 2)
    assert {(row["look_image"], row["look_scale"]) for row in rows(tmp_path / "one")} == {("new_cell_1", "2.0")}
    make_set(lab, tmp_path / "nobody", "--look", "none")
    assert {(row["look_source"], row["look_image"]) for row in rows(tmp_path / "nobody")} == {("none", "")}
    sets = [pixels(tmp_path / name) for name in ("path", "same", "one", "nobody")]
    assert all((left != right).any() for number, left in enumerate(sets) for right in sets[:number])


def test_a_table_names_the_look_of_each_mask(lab, tmp_path):
    looks = ["new_cell_2", "cell_0", "cell_0", "new_cell_1", "cell_4"]
    table = tmp_path / "looks.csv"
    lines = [f"cell_{number}_mask{('.png', '.ome.tif')[number % 2]},{look}.png" for number, look in enumerate(looks)]
    table.write_text("\n".join(["mask,look", *lines]))
    make_set(lab, tmp_path / "set", "--look-table", table)
    found = rows(tmp_path / "set")
    assert [row["look_image"] for row in found] == looks and {row["look_source"] for row in found} == {"table"}
    make_set(lab, tmp_path / "one", "--look-index", 6)  # that of new_cell_1, which the table gives to cell_3
    same = (pixels(tmp_path / "set") == pixels(tmp_path / "one")).all(axis=(1, 2))
    assert [number for number, equal in enumerate(same) if equal] == [3]

    said = make_set(lab, tmp_path / "s", "--look-table", table, "--look", "training", code=2)
    assert "--look has no effect with --look-table" in said
    table.write_text("\n".join(["mask,look", *lines[:3]]))
    assert "--look-table: 2 masks have no look: cell_3, cell_4" in make_set(
        lab, tmp_path / "s", "--look-table", table, code=2
    )
    table.write_text("\n".join(["mask,look", *lines[:4], "cell_4,nobody"]))
    said = make_set(lab, tmp_path / "s", "--look-table", table, code=2)
    assert "1 looks are not among the 8 to choose from: nobody" in said
    for last, words in (
        ("cell_4", "line 6 has another number of columns"),
        ("cell_4,", "masks without a look: cell_4"),
        (",cell_4", "line 6 has no mask"),
        ("cell_0_mask.ome.tif,cell_1.png", "names with more than one look: cell_0_mask"),
    ):
        table.write_text("\n".join(["mask,look", *lines[:4], last]))
        assert words in make_set(lab, tmp_path / "s", "--look-table", table, code=2)
    table.write_text("\n".join(["mask,look", *lines, lines[0]]))
    assert "more than one look: cell_0" in make_set(lab, tmp_path / "s", "--look-table", table, code=2)
    table.write_text("mask,image\n")
    assert "has no column look" in make_set(lab, tmp_path / "s", "--look-table", table, code=2)


def test_a_set_is_finished_with_the_looks_it_was_begun_with(lab, tmp_path):
    make_set(lab, tmp_path / "set", "--look-path", lab / "others")
    whole = pixels(tmp_path / "set")
    (tmp_path / "set" / "images" / "cell_3.png").unlink()
    make_set(lab, tmp_path / "set", "--look-path", lab / "others")
    assert np.array_equal(pixels(tmp_path / "set"), whole)
    assert "look" in make_set(lab, tmp_path / "set", "--look-index", 0, code=2)


def test_a_checkpoint_without_looks_samples_as_before_and_refuses_the_flags(lab, tmp_path):
    make_set(lab, tmp_path / "plain", run="plain")
    assert "look_source" not in rows(tmp_path / "plain")[0]
    for flags in (["--look", "training"], ["--look-path", lab / "others"], ["--look-scale", 2], ["--look-index", 0]):
        said = make_set(lab, tmp_path / "refused", *flags, run="plain", code=2)
        assert f"{flags[0]} has no effect" in said and "trained without --look reference" in said


def test_all_windows_of_a_large_field_have_one_look(lab, tmp_path):
    make_set(lab, tmp_path / "fields", "--tile", "--tile-scale", 2)
    assert {row["look_source"] for row in rows(tmp_path / "fields")} == {"training"}
    assert pixels(tmp_path / "fields").shape == (5, 48, 40)


@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_a_preview_takes_looks_too(lab, tmp_path, mode):
    words = [mode, "--ckpt", newest(lab, "looks"), "--mask-path", lab / "masks" / "cell_0.png", *FEW_STEPS]
    for number, flags in enumerate([[], ["--look", "same", "--data-path", lab / "images"], ["--look-index", 1]]):
        path = tmp_path / f"{number}.png"
        assert run_here(sample, *words, "--output", path, *flags)[0] == 0
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_real_images_go_to_noise_and_back_with_their_own_looks(lab, tmp_path):
    words = ["--ckpt", newest(lab, "looks"), "--mask-path", lab / "masks", "--data-path", lab / "images", *FEW_STEPS]
    assert run_here(sample, "ODE", "--reverse", *words, "--output", tmp_path / "back.png")[0] == 0
    code, lines = run_here(sample, "ODE", "--reverse", *words, "--output", tmp_path / "x.png", "--look-index", 1)
    assert code == 2 and "--look-index has no effect with --likelihood or --reverse" in lines[-1]


def test_a_rare_group_keeps_its_look_if_there_are_too_many_images(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.looks.MOST_LOOKS", 2)
    table = tmp_path / "groups.csv"
    table.write_text("name,group\n" + "".join(f"cell_{n},{'often' if n != 1 else 'rare'}\n" for n in range(5)))
    start(lab, "rare", 1, "--look", "reference", "--groups", table)
    assert read_checkpoint(newest(lab, "rare"))["looks"]["groups"] == ["often", "rare"]


def test_groups_choose_and_balance_the_looks_of_a_set(lab, tmp_path):
    table = tmp_path / "groups.csv"
    names = [*(f"cell_{n}" for n in range(5)), *(f"new_cell_{n}" for n in range(3))]
    table.write_text("name,patient\n" + "".join(f"{name}.png,{'p1' if name != 'cell_2' else 'p2'}\n" for name in names))
    flags = ["--look", "reference", "--unlabelled-path", lab / "others", "--groups", table]
    start(lab, "groups", 2, *flags, "--group-column", "patient", "--balance-groups")
    state = read_checkpoint(newest(lab, "groups"))
    assert state["looks"]["groups"] == ["p1", "p1", "p2", *["p1"] * 5]
    make_set(lab, tmp_path / "one", "--look-group", "p2", run="groups")
    assert {row["look_image"] for row in rows(tmp_path / "one")} == {"cell_2"}
    make_set(lab, tmp_path / "even", "--balance-groups", "--samples-per-mask", 4, run="groups")
    assert 5 <= sum(row["look_image"] == "cell_2" for row in rows(tmp_path / "even")) <= 15
    said = make_set(lab, tmp_path / "s", "--look-group", "p3", run="groups", code=2)
    assert "--look-group p3: the groups are p1, p2" in said
    assert "have no groups" in make_set(lab, tmp_path / "s", "--balance-groups", code=2)
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    said = start(lab, "x", 1, *flags, "--group-column", "patient", code=2)
    assert "1 of 8 images have no group: new_cell_2" in said
    assert "--balance-groups has no effect without --groups" in start(lab, "x", 1, "--balance-groups", code=2)


def test_what_has_no_effect_or_cannot_be_used_is_refused_in_one_line(lab, tmp_path):
    assert "--look-dropout has no effect with --look none" in start(lab, "x", 1, "--look-dropout", 0.2, code=2)
    assert "--unlabelled-share has no effect without" in start(lab, "x", 1, "--unlabelled-share", 0.2, code=2)
    said = start(lab, "x", 1, "--unlabelled-path", lab / "images", code=2)
    assert "--unlabelled-path" in said and "have the names of labelled ones" in said
    said = start(lab, "looks", 5, "--look", "none", code=2)
    assert "contradicts --look none (the checkpoint has reference)" in said
    assert "--look-index 8: there are 8 looks" in make_set(lab, tmp_path / "s", "--look-index", 8, code=2)
    assert "--look same takes the look" in make_set(lab, tmp_path / "s", "--look", "same", code=2)
    assert "no such file or folder" in make_set(lab, tmp_path / "s", "--look-path", lab / "nowhere", code=2)
    said = make_set(lab, tmp_path / "s", "--look", "training", "--look-path", lab / "others", code=2)
    assert "--look has no effect with --look-path" in said


def test_the_measure_of_looks_tells_the_own_look_from_another(lab, tmp_path):
    make_set(lab, tmp_path / "set", "--look", "same", "--data-path", lab / "images")
    names = [(row["image"], f"{row['look_image']}.png") for row in rows(tmp_path / "set")]
    pairs = [(tmp_path / "set" / image, lab / "images" / look) for image, look in names]
    for synthetic, real in pairs:  # a perfect set: the training views of the real images themselves
        Image.open(real).resize((16, 19), Image.Resampling.BICUBIC).crop((0, 1, 16, 17)).save(synthetic)
    assert run_here(evaluate, "looks", tmp_path / "set")[0] == 0
    near = json.loads((tmp_path / "set" / "evaluation" / "looks.json").read_text())
    for synthetic, _ in pairs:
        Image.fromarray(255 - np.asarray(Image.open(synthetic))).save(synthetic)
    assert run_here(evaluate, "looks", tmp_path / "set", "--data-path", lab / "images")[0] == 0
    far = json.loads((tmp_path / "set" / "evaluation" / "looks.json").read_text())
    assert (near["looks"], near["synthetic_images"], near["real_images"], len(near["numbers"])) == (5, 5, 5, 10)
    own = near["numbers"]["mean"]
    assert own["distance"] == pytest.approx(own["real_distance"], rel=0.1) and own["real_distance"] > 0
    assert far["numbers"]["mean"]["distance"] > 3
    assert (tmp_path / "set" / "evaluation" / "looks.png").stat().st_size > 1000
    assert run_here(evaluate, "report", tmp_path / "set")[0] == 0
    assert "Looks: colour, contrast and grain" in (tmp_path / "set" / "evaluation" / "report.html").read_text()
    make_set(lab, tmp_path / "alone")
    code, lines = run_here(evaluate, "looks", tmp_path / "alone")
    assert code == 2 and "names no real images" in lines[-1]


def test_the_picture_of_looks_has_a_column_for_each_mask_if_masks_repeat(lab, tmp_path):
    make_set(lab, tmp_path / "many", "--look-path", lab / "others", "--samples-per-mask", 4)
    samples = SampleSet(tmp_path / "many")
    names = [f"new_cell_{number}" for number in range(3)]
    grid = _aligned(samples, names)
    assert list(grid) == names and {len(row) for row in grid.values()} == {5}
    columns = [{_mask(one) for one in column if one is not None} for column in zip(*grid.values(), strict=True)]
    assert all(len(masks) == 1 for masks in columns) and len(set.union(*columns)) == 5
    assert all(one is None or one.columns["look_image"] == look for look, row in grid.items() for one in row)
    make_set(lab, tmp_path / "own", "--look", "same", "--data-path", lab / "images")
    assert _aligned(SampleSet(tmp_path / "own"), [f"cell_{number}" for number in range(5)]) == {}
    assert run_here(evaluate, "looks", tmp_path / "many", "--data-path", lab / "others")[0] == 0
    with Image.open(tmp_path / "many" / "evaluation" / "looks.png") as picture:
        assert picture.width / picture.height == pytest.approx(1.6 * 6 / (1.8 * 4), rel=0.01)  # masks, looks, real
