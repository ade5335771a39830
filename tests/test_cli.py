"""Shared flags of the commands: numbers, rules between flags, errors that name flags."""

from __future__ import annotations

import argparse
import math
import pickle

import pytest
from script_helpers import run_here

import evaluate
import make_masks
import sample
import sample_ddp
import train
from common.arguments import number, part
from common.errors import CommandParser, InputError, settings_as_flags, with_flags
from flag_rules import NEEDS, check_needs
from settings import sampling_settings

TYPES = {
    "count": (number(int, 1, 100), ("1", "100"), ("0", "101", str(2**70), str(10**12))),
    "share": (number(float, 0, 1), ("0", "1", "0.5"), ("-0.1", "1.1", "nan", "inf")),
    "above": (number(float, 0, math.inf, open_least=True), ("1e-9", "1e300"), ("0", "-1", "inf", "nan")),
    "inside": (number(float, 0, 1, open_least=True, open_most=True), ("0.5",), ("0", "1")),
    "finite": (number(float, -math.inf, math.inf), ("-5", "0"), ("inf", "-inf", "nan")),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_number_keeps_to_its_ends(name):
    parse, good, bad = TYPES[name]
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not "):
            parse(text)


@pytest.mark.parametrize(
    "flag", ["--max-steps", "--epochs", "--num-workers", "--num-classes", "--warmup-steps", "--keep", "--image-size"]
)
@pytest.mark.parametrize("value", [2**70, 10**12])
def test_a_number_beyond_all_reason_ends_in_one_line(flag, value):
    code, lines = run_here(train, "--data-path", "images", "--mask-path", "masks", flag, value)
    assert code == 2 and f"{flag}: {value} is not a whole number" in lines[-1]


@pytest.mark.parametrize(
    ("flag", "value"), [("--time-shift", "1e30"), ("--time-shift", "1e-16"), ("--cfg-scale", "1e38")]
)
def test_a_shift_or_guidance_that_the_solver_cannot_take_ends_in_one_line(flag, value):
    code, lines = run_here(sample_ddp, "ODE", "--ckpt", "a.pt", "--mask-path", "masks", flag, value)
    assert code == 2 and f"{flag}: {value} is not between" in lines[-1]


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "-1/4", "1/0", "1/2/3", "a/b", "1/1000000000000", "\u00b2/4"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        part(text)
    assert part("2/8") == (2, 8)


def test_a_word_for_a_number_is_said():
    code, lines = run_here(train, "--data-path", "images", "--mask-path", "masks", "--keep", "many")
    assert code == 2 and "--keep: invalid whole number value: 'many'" in lines[-1]


@pytest.mark.parametrize("command", [train, sample, sample_ddp])
def test_help_shows_no_empty_default(command, capsys):
    code, _ = run_here(command, *([] if command is train else ["ODE"]), "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert code == 0 and "(default: 0)" in text and "(default: )" not in text and "(default: None)" not in text


def test_flags_on_the_command_line_are_told_from_defaults():
    parser = CommandParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--name", "--title", default="x")
    assert parser.parse_args([]).given == set()
    assert parser.parse_args(["--steps", "3", "--title", "x"]).given == {"steps", "name"}
    assert parser.parse_args(["--fast"]).given == {"fast"}
    assert sample.parse_args(["ODE", "--ckpt", "a.pt", "--mask-path", "m"]).given == {"ckpt", "mask_path"}


COMMANDS = {
    "train": train.parse_args(["--data-path", "images", "--mask-path", "masks"]),
    "sample": sample.parse_args(["ODE", "--ckpt", "a.pt", "--mask-path", "masks"]),
    "sample_ddp": sample_ddp.parse_args(["SDE", "--ckpt", "a.pt", "--mask-path", "masks"]),
}
PAIRS = ["--data-path", "images", "--mask-path", "masks"]
MEASURES = {
    "data": PAIRS,
    "fidelity": ["set", *PAIRS],
    "realism": ["set", "--data-path", "images"],
    "population": ["set"],
    "sweep": ["--ckpt", "a.pt", *PAIRS],
    "split": PAIRS,
    "practise": PAIRS,
    "utility": ["split"],
}
COMMANDS |= {name: evaluate.parse_args([name, *words]) for name, words in MEASURES.items()}


def test_a_guidance_interval_works_with_each_kind_of_guidance():
    paths = ["--ckpt", "a.pt", "--mask-path", "masks"]
    for flag in ("--cfg-scale", "--look-scale"):
        args = sample_ddp.parse_args(["ODE", *paths, flag, "2", "--guidance-interval", "0.2", "0.8"])
        assert sampling_settings(args).guidance_interval == (0.2, 0.8)


def test_every_need_names_flags_of_a_command():
    for need in NEEDS:
        places = [vars(args) for name, args in COMMANDS.items() if need.command in ("", name)]
        for flag in need.flags:
            known = flag.removeprefix("no_") if flag == "no_pseudo_masks" else flag
            assert any({known, *need.others} <= set(names) for names in places), (flag, need)


def test_a_flag_that_turns_something_off_is_known_by_its_own_name():
    parser = CommandParser()
    parser.add_argument("--no-colour", dest="colour", action="store_false")
    args = parser.parse_args(["--no-colour"])
    assert (args.given, args.colour) == ({"no_colour"}, False) and parser.parse_args([]).given == set()


@pytest.mark.parametrize(
    ("measure", "words", "flag"),
    [
        ("practise", ["--most-draws", "3"], "--most-draws"),
        ("realism", ["--inception-weights", "w.pth", "--steps", "9"], "--steps"),
        ("realism", ["--inception-weights", "w.pth", "--mask-path", "masks"], "--mask-path"),
        ("population", ["--mask-type", "binary"], "--mask-type"),
        ("sweep", ["--cfg-scales", "1", "--guidance-intervals", "0.2:0.8"], "--guidance-intervals"),
        ("sweep", ["--solvers", "sde-euler", "--time-shifts", "3"], "--time-shifts"),
        ("practise", ["--pseudo-share", "0.5"], "--pseudo-share"),
        ("practise", ["--no-pseudo-masks"], "--no-pseudo-masks"),
        ("practise", ["--unlabelled-images", "9"], "--unlabelled-images"),
        ("utility", ["--sets", "sets", "--image-size", "64"], "--image-size"),
        ("utility", ["--synthetic", "10=set", "--in-channels", "1"], "--in-channels"),
        ("utility", ["--shares", "10", "--ckpt", "10=a.pt"], "--ckpt"),
        ("split", ["--groups", "t.csv", "--test-groups", "3"], "--groups"),
        ("split", ["--whole-groups"], "--whole-groups"),
        ("split", ["--selections", "3"], "--selections"),
        ("split", ["--group-column", "look"], "--group-column"),
        ("split", ["--labels", "5", "--shares", "10"], "--shares"),
        ("split", ["--labels", "5", "--test-groups", "3"], "--test-groups"),
        ("split", ["--test-instances", "cells"], "--test-instances"),
        ("split", ["--labels", "5", "--test-instances", "cells"], "--test-instances"),
        ("split", ["--labels", "5", "--groups", "t.csv", "--test-groups", "3", "--test-share", "0.5"], "--test-share"),
        (
            "split",
            [
                "--labels",
                "5",
                "--groups",
                "t.csv",
                "--test-groups",
                "3",
                "--test-data-path",
                "i",
                "--test-mask-path",
                "m",
            ],
            "--test-groups",
        ),
    ],
)
def test_a_measure_refuses_flags_without_effect_before_it_reads_a_file(measure, words, flag):
    code, lines = run_here(evaluate, measure, *MEASURES[measure], *words)
    assert code == 2 and f"error: {flag} has no effect " in lines[-1]


def test_flags_that_request_nothing_are_taken():
    for measure, words in (
        ("sweep", ["--cfg-scales", "1", "--guidance-intervals", "0:1"]),
        ("sweep", ["--cfg-scales", "1", "2", "--guidance-intervals", "0.2:0.8"]),
        ("sweep", ["--solvers", "sde-euler", "heun", "--time-shifts", "3"]),
        ("practise", ["--pseudo-share", "0"]),
        ("split", ["--test-groups", "0"]),
        ("utility", ["--selections", "0"]),
        ("utility", ["--shares", "10", "--image-size", "64"]),
        ("realism", ["--inception-weights", "w.pth", "--seed", "3"]),
        ("split", ["--labels", "5", "--groups", "t.csv", "--group-column", "look"]),
    ):
        check_needs(evaluate.parse_args([measure, *MEASURES[measure], *words]))


def test_a_field_is_shown_as_its_flag_where_the_command_has_it():
    args = argparse.Namespace(vae="x", in_channels=3, image_size=64)
    error = InputError("`vae` /a/vae/b vae c: takes `channels` 3, not `vae`. `image_size` 3")
    assert str(error) == "vae /a/vae/b vae c: takes channels 3, not vae. image_size 3"
    shown = with_flags(error.marked, args)
    assert shown == "--vae /a/vae/b vae c: takes --in-channels 3, not --vae. --image-size 3"
    assert with_flags("`crop` 'x' is unknown", args) == "crop 'x' is unknown"
    assert with_flags("`crop` 'x' is unknown") == "--crop 'x' is unknown"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # it comes from processes that load images


@pytest.mark.parametrize("command", [train, sample, sample_ddp])
def test_a_batch_or_picture_that_would_fill_the_memory_is_refused(command, capsys):
    flags = {train: "--global-batch-size", sample: "--num-samples", sample_ddp: "--per-proc-batch-size"}
    mode = [] if command is train else ["ODE"]
    with pytest.raises(SystemExit):
        command.parse_args([*mode, flags[command], "1000000000"])
    assert "is not a whole number from 1 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mask_type=binary is unknown", "--mask-type binary is unknown"),
        ("likely: ids (mask_type=classes num_classes=3).", "likely: ids (--mask-type classes --num-classes 3)."),
        ("give window=(0, 99.8), or crop=center", "give --window 0 99.8, or --crop center"),
        ("normalize_masks=True. If", "--normalize-masks. If"),
        ("intensity=source: leave it out", "--intensity source: leave it out"),
        ("image_size=64/none: is no folder", None),
        ("/data/image_size=64: is no folder", None),
        ("masks in runs/image_size=64,crop=random have no image", None),
        ("out/crop=random/masks/a.png is empty", None),
        ("my_image_size=64 and x-crop=random", None),
    ],
)
def test_settings_become_flags_and_names_of_folders_stay(text, shown):
    assert settings_as_flags(text) == (shown or text)


def test_a_folder_named_after_a_setting_is_named_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, lines = run_here(make_masks, "recombine", "--instances", "image_size=64/none", "--output", tmp_path / "out")
    assert code == 2 and " image_size=64/none: " in lines[-1]
