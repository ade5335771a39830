"""Presets of train.py: each has a published number, sets its flags, and is overridden by the user's flags."""

from __future__ import annotations

import pytest
from script_helpers import ROOT, run_here, write_pairs

import train
from presets import PRESETS
from settings import resolve

PATHS = ["--data-path", "images", "--mask-path", "masks"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_number_in_its_record(name):
    preset = PRESETS[name]
    assert preset.ratio in (ROOT / preset.record).read_text()
    (row,) = [line for line in (ROOT / "benchmarks/presets.md").read_text().splitlines() if f"| `{name}` |" in line]
    assert f"| {preset.ratio} " in row


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_that_can_start(name):
    preset = PRESETS[name]
    config = resolve(train.parse_args([*PATHS, "--preset", name]))
    words = preset.flags.split()
    assert config.optimiser.max_steps == int(words[words.index("--max-steps") + 1])
    assert config.data.channels == int(words[words.index("--in-channels") + 1])
    assert config == resolve(train.parse_args([*words, *PATHS]))


def test_the_flags_of_the_user_override_those_of_a_preset():
    words = [*PATHS, "--preset", "nuclei-64-cpu"]
    args = train.parse_args(["--lr", "0.01", *words, "--window", "1", "99"])
    assert (args.lr, args.window, args.max_steps) == (0.01, [1.0, 99.0], 4200)
    assert {"lr", "window", "max_steps", "preset"} <= args.given and "seed" not in args.given
    assert resolve(train.parse_args([*words, "--epochs", "3"])).optimiser.max_steps is None


def test_an_unknown_preset_is_refused_with_the_list():
    code, lines = run_here(train, *PATHS, "--preset", "nuclei")
    assert code == 2 and all(name in lines[-1] for name in PRESETS)


@pytest.mark.usefixtures("one_block")
def test_a_run_says_what_its_preset_set_and_continues_by_the_same_command(tmp_path):
    images, masks = write_pairs(tmp_path / "pairs")
    words = ["--data-path", images, "--mask-path", masks, "--results-dir", tmp_path, "--run-name", "run"]
    words += ["--preset", "quickstart", "--image-size", 16, "--global-batch-size", 4, "--device", "cpu"]
    code, lines = run_here(train, *words, "--max-steps", 1)
    assert code == 0 and any("preset quickstart: --vae none --model SiT-Ti/8" in line for line in lines)
    code, lines = run_here(train, *words, "--max-steps", 2)
    assert code == 0 and any("continuing after step 1" in line for line in lines)


def test_a_preset_that_builds_on_another_run_asks_for_it(tmp_path):
    images, masks = write_pairs(tmp_path / "pairs")
    words = ["--data-path", images, "--mask-path", masks, "--results-dir", tmp_path, "--preset", "nuclei-128-cpu"]
    code, lines = run_here(train, *words)
    assert code == 2 and "--preset nuclei-128-cpu needs --init-from" in lines[-1]
