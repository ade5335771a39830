"""Shared flags of the commands: numbers, rules between flags, errors that name flags."""

from __future__ import annotations

import argparse
import math

import pytest
from script_helpers import run_here

import sample
import sample_ddp
import train
from common.arguments import number, part
from common.errors import CommandParser, InputError, with_flags
from flag_rules import NEEDS

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


def test_every_need_names_flags_of_a_command():
    paths = ["--ckpt", "a.pt", "--mask-path", "masks"]
    known = set(vars(train.parse_args(["--data-path", "images", "--mask-path", "masks"])))
    for command in (sample, sample_ddp):
        for mode in ("ODE", "SDE"):
            known |= set(vars(command.parse_args([mode, *paths])))
    for need in NEEDS:
        assert {*need.flags, need.other} <= known, need


def test_a_field_is_shown_as_its_flag_where_the_command_has_it():
    args = argparse.Namespace(vae="x", in_channels=3, image_size=64)
    error = InputError("vae /a/vae/b: takes channels 3, not vae. image_size 3", "vae", "channels", "image_size", "crop")
    shown = with_flags(str(error), error.fields, args)
    assert shown == "--vae /a/vae/b: takes --in-channels 3, not --vae. --image-size 3"
    assert with_flags("crop 'x' is unknown", ("crop",), args) == "crop 'x' is unknown"


@pytest.mark.parametrize("command", [train, sample, sample_ddp])
def test_a_batch_or_picture_that_would_fill_the_memory_is_refused(command, capsys):
    flags = {train: "--global-batch-size", sample: "--num-samples", sample_ddp: "--per-proc-batch-size"}
    mode = [] if command is train else ["ODE"]
    with pytest.raises(SystemExit):
        command.parse_args([*mode, flags[command], "1000000000"])
    assert "is not a whole number from 1 to 1" in capsys.readouterr().err
