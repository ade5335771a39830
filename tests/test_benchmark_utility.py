"""The benchmarks of utility plan command lines that evaluate.py takes, and stop in time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn_sets import five_rows, write_set
from PIL import Image

import evaluate
import sample_ddp
import train
from benchmarks import cell_seeds, label_ceiling, utility
from common.errors import InputError
from dataset.groups import read_groups
from evaluation.experiments.arms import arm_of
from synthetic.manifest import write_column


def words_of(name: str, *more: str):
    return utility.parse_args([name, "--data", "data", *more])


@pytest.mark.parametrize("name", utility.BENCHMARKS)
def test_every_planned_command_line_is_one_of_evaluate(name, tmp_path):
    args = words_of(name, "--selections-made", "2", "--train-flags", "--seed 3", "--practise-flags=--no-pseudo-masks")
    jobs = utility.plan(name, Path("data"), tmp_path, args)
    assert len(jobs) == 1 + 2 * 2 * len(utility.BENCHMARKS[name].labels)
    assert len({done for done, _ in jobs}) == len(jobs)
    for _, words in jobs:
        parsed = evaluate.parse_args(words)
        if parsed.command == "utility":
            assert all(map(arm_of, parsed.arms))
        if parsed.command == "practise":
            assert not parsed.pseudo_masks
            train.parse_args(["--data-path", "i", "--mask-path", "m", *parsed.train_flags])
            sample_ddp.parse_args(["ODE", "--ckpt", "c", "--mask-path", "m", *parsed.sample_flags])


def test_parts_are_run_and_unknown_numbers_refused(tmp_path):
    args = words_of("nuclei", "--labels", "5", "--selections", "1", "--stages", "practise")
    ((done, words),) = utility.plan("nuclei", Path("data"), tmp_path, args)
    assert done == tmp_path / "nuclei/sets/selection_01/labels_005/practice.html" and words[0] == "practise"
    with pytest.raises(InputError, match="7: nuclei has 3, 5, 10, 30"):
        utility.plan("nuclei", Path("data"), tmp_path, words_of("nuclei", "--labels", "7"))


def test_a_command_that_takes_too_long_is_ended_and_one_that_fails_is_said(monkeypatch, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n")
    monkeypatch.setattr(utility, "ROOT", tmp_path)
    assert not utility.run_for(["60", "0"], 0.3)
    assert utility.run_for(["0", "0"], 60)
    with pytest.raises(InputError, match="exit code 3"):
        utility.run_for(["0", "3"], 60)


@pytest.fixture
def two_modalities(tmp_path) -> Path:
    """A folder as the nuclei's: two images of each part, bright cells and dark cells."""
    rows = ["name,modality"]
    for part in ("train", "val"):
        for kind in ("images", "masks", "instances"):
            (tmp_path / part / kind).mkdir(parents=True)
        for modality, (ground, cell) in {"bright": (20, 200), "dark": (200, 20)}.items():
            cells = np.zeros((96, 96), np.uint8)
            cells[20:40, 20:40], cells[50:80, 50:70] = 1, 2
            name = f"{part}_{modality}.png"
            Image.fromarray(np.where(cells > 0, cell, ground).astype(np.uint8)).save(tmp_path / part / "images" / name)
            Image.fromarray(((cells > 0) * 255).astype(np.uint8)).save(tmp_path / part / "masks" / name)
            Image.fromarray(cells).save(tmp_path / part / "instances" / name)
            rows.append(f"{name},{modality}")
    (tmp_path / "index.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_ceiling_gives_each_modality_its_share_and_scores_each(two_modalities, capsys):
    shares = ["--shares", "bright=3", "dark=1"]
    label_ceiling.main(label_ceiling.parse_args([str(two_modalities), "--steps", "2", *shares]))
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["all", "bright", "dark"]
    pairs = label_ceiling.read_pairs(two_modalities / "train")
    modalities = read_groups(two_modalities / "index.csv", "modality")
    parts = label_ceiling.sources(pairs, modalities, {"bright": 3.0, "dark": 1.0})
    assert [(part.images[0].image.mean() < 128, share) for part, share in parts] == [(True, 3.0), (False, 1.0)]
    with pytest.raises(InputError, match="no image is gray; there are bright, dark"):
        label_ceiling.sources(pairs, modalities, {"gray": 1.0})


def test_the_ceiling_trains_on_a_folder_and_on_the_part_of_a_set_that_has_a_look(two_modalities, tmp_path, capsys):
    samples = write_set(tmp_path / "set", five_rows(64))
    write_column(samples, "look_image", ["bright_1", "bright_2", "dark_1", "dark_2", "dark_3"])
    assert [len(label_ceiling.synthetic_source(samples, looks).images) for looks in ("", "bright", "dark")] == [5, 2, 3]
    with pytest.raises(InputError, match="no image in a look whose name starts with 'gray'"):
        label_ceiling.synthetic_source(samples, "gray")
    words = [str(two_modalities), "--steps", "2", "--labelled", str(two_modalities / "val"), "--looks", "bright"]
    label_ceiling.main(label_ceiling.parse_args([*words, "--synthetic", str(samples), "--synthetic-share", "0.25"]))
    assert "bright: AP 0.5" in capsys.readouterr().out


def test_seeds_are_compared_on_images_that_no_selection_holds(two_modalities, monkeypatch, capsys):
    part = two_modalities / "split" / "selection_01" / "labels_010"
    for kind in ("images", "masks", "instances"):
        (part / kind).mkdir(parents=True)
        (part / kind / "train_bright.png").write_bytes(
            (two_modalities / "train" / kind / "train_bright.png").read_bytes()
        )
    modalities = read_groups(two_modalities / "index.csv", "modality")
    monkeypatch.setattr(cell_seeds, "CHOSEN", {"bright": 3, "dark": 3})
    chosen = cell_seeds.choosing_images(two_modalities, two_modalities / "split", modalities)
    assert [pair.name for pair in chosen] == ["train_dark"]
    cell_seeds.main(cell_seeds.parse_args([str(two_modalities), str(two_modalities / "split"), "--steps", "2"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["connected interiors", "saddle 0.1"]
