"""Masks saved for display (0, 128, 255), from the message with the flag to copy to training, sampling, measures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_helpers import FEW_STEPS, TINY, call, run_here, write_pairs

import evaluate
import sample
import sample_ddp
import train
from engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("one_block")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Images, their masks of ids 0, 1, 2, and the same masks of the values 0, 128, 255."""
    folder = tmp_path_factory.mktemp("values")
    images, masks = write_pairs(folder, count=8)
    (folder / "seen").mkdir()
    for path in masks.iterdir():
        cell = np.array(Image.open(path)) > 0
        ids = cell * np.where(np.arange(cell.shape[1]) % 2, 1, 2).astype(np.uint8)
        Image.fromarray(ids.astype(np.uint8)).save(path)
        Image.fromarray(np.array([0, 128, 255], np.uint8)[ids]).save(folder / "seen" / path.name)
    return images, masks, folder / "seen"


def train_words(images: Path, masks: Path, results: Path) -> list[object]:
    paths = ["--data-path", images, "--mask-path", masks, "--results-dir", results, "--run-name", "run"]
    return [*paths, *TINY, "--max-steps", 1, "--num-classes", 3]


@pytest.fixture(scope="module")
def checkpoint(pairs, tmp_path_factory) -> Path:
    """Of masks that hold ids."""
    results = tmp_path_factory.mktemp("results")
    call(train, *train_words(pairs[0], pairs[1], results))
    return results / "run" / "checkpoints" / "0000001.pt"


def flags_in(line: str) -> list[str]:
    """The flag that a message gives to copy."""
    found = re.search(r"--mask-values(?: \d+)+", line)
    assert found is not None, line
    return found[0].split()


def test_training_prints_the_flag_and_takes_it(pairs, tmp_path):
    words = train_words(pairs[0], pairs[2], tmp_path)
    code, lines = run_here(train, *words)
    assert code == 2 and flags_in(lines[-1]) == ["--mask-values", "0", "128", "255"]
    call(train, *words, *flags_in(lines[-1]))
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "0000001.pt")
    assert tuple(state["config"]["data"]["mask_values"]) == (0, 128, 255)


def test_sampling_prints_the_flag_and_takes_it(pairs, checkpoint, tmp_path):
    words = ["ODE", "--ckpt", checkpoint, *FEW_STEPS]
    one = [*words, "--mask-path", pairs[2] / "cell_0.png", "--num-samples", 1, "--output", tmp_path / "grid.png"]
    code, lines = run_here(sample, *one)
    assert code == 2
    call(sample, *one, *flags_in(lines[-1]))
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
def test_bulk_sampling_and_the_measures_take_the_flag(pairs, checkpoint, tmp_path, capsys):
    images, masks, seen = pairs
    words = ["ODE", "--ckpt", checkpoint, *FEW_STEPS, "--mask-path", seen, "--data-path", images]
    code, lines = run_here(sample_ddp, *words, "--sample-dir", tmp_path / "set")
    assert code == 2
    values = flags_in(lines[-1])
    call(sample_ddp, *words, "--sample-dir", tmp_path / "set", *values)
    label = np.array(Image.open(tmp_path / "set" / "masks" / "cell_0.png"))
    assert set(np.unique(label)) == {0, 128, 255}  # as they came
    real = ["--data-path", images, "--mask-path", seen]
    judged = [*real, "--steps", 2, "--cache-dir", tmp_path / "judges", "--device", "cpu"]
    for measure, more in (("population", real), ("fidelity", judged), ("realism", judged)):
        code, lines = run_here(evaluate, measure, tmp_path / "set", *more)
        assert code == 2 and flags_in(lines[-1]) == values, measure
        call(evaluate, measure, tmp_path / "set", *more, *values)
    assert "judge" in capsys.readouterr().out


def test_sampling_reads_ids_as_training_did(pairs, tmp_path):
    """Two cells with the ids 1 and 2 are cells for a model of cells, also for its export, and classes for another."""
    cells = tmp_path / "cells"
    cells.mkdir()
    for path in pairs[1].iterdir():
        ids = np.zeros_like(np.array(Image.open(path)))
        ids[1:5, 1:5], ids[6:9, 6:9], ids[10:14, 1:5] = 1, 2, 3
        Image.fromarray(ids).save(cells / path.name)
    words = train_words(pairs[0], cells, tmp_path)
    call(train, *words, "--mask-type", "instances", "--export-safetensors")
    two = tmp_path / "two.png"
    Image.fromarray(np.where(ids == 3, 0, ids).astype(np.uint8)).save(two)
    for ckpt in ("checkpoints/0000001.pt", "model.safetensors"):
        output = tmp_path / ckpt.replace("/", "_")
        words = ["ODE", "--ckpt", tmp_path / "run" / ckpt, *FEW_STEPS, "--mask-path", two, "--sample-dir", output]
        call(sample_ddp, *words)
        assert json.loads((output / "settings.json").read_text())["mask_rule"]["mask_type"] == "instances"
        call(sample_ddp, *words[:-1], tmp_path / f"{output.name}_classes", "--mask-type", "classes")
