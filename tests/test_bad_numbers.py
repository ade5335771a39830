"""Every number of every command: what is none, or beyond reason, ends in one line. Finds the flags by itself."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from script_helpers import exit_code

import app
import evaluate
import make_masks
import sample
import sample_ddp
import train
from common.arguments import by_share, interval, part
from common.errors import InputError
from engine.config import RunConfig
from settings import resolve, sampling_settings

COMMANDS = (app, evaluate, make_masks, sample, sample_ddp, train)
WORDS = (None, Path, str.lower, str.capitalize, shlex.split)  # types of flags that take no number
# Types whose text has a number in it.
PARTS: dict[object, str] = {part: "{}/2", interval: "{}:1", by_share: "{}=folder"}
NO_NUMBER = (
    "", "one", "nan", "inf", "-inf", "1e400", "9" * 5000, "1" + "0" * 39 + ".0e9", "1_000", " 1", "1 ", "0x10",
    "\uff11", "\u00b2", "1,5", "1e", "--1", "1\n", "\x1b[2J1",
)  # fmt: skip
NO_COUNT = ("-1", "0.5", "1e3", "1e-320", str(2**70), str(10**25))
# Flags for which these values mean something.
NEGATIVE = {"--time-mean"}
ABOVE_MOST = {"--seed"}  # any number of 63 bits
ZERO = {
    "--cfg-scale", "--cfg-scales", "--cooldown-steps", "--density-spread", "--ema-decay",
    "--gap", "--grad-clip", "--guidance-interval", "--guidance-intervals", "--irregularity", "--look-dropout",
    "--look-index", "--look-scale", "--mask-dropout", "--mask-values", "--max-overlap", "--most-rounds",
    "--num-workers", "--port", "--pseudo-share", "--sample-eps", "--seed", "--selections", "--simulated-share",
    "--size-spread", "--test-groups", "--tile-overlap", "--time-mean", "--train-eps", "--warmup-steps",
    "--weight-decay", "--window",
}  # fmt: skip


class _Found(Exception):
    pass


@cache
def parser_of(command: ModuleType) -> argparse.ArgumentParser:
    """The parser that a command builds."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(_Found) as found:
        command.parse_args([])
    return found.value.args[0]


def flags_of(
    parser: argparse.ArgumentParser, before: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    """Every flag, with the subcommands that lead to it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from flags_of(below, (*before, name))
        elif action.option_strings:
            yield before, action


def form_of(kind: object) -> str:
    return PARTS.get(kind, "{}")


def numbers_of(command: ModuleType) -> list[tuple[tuple[str, ...], argparse.Action]]:
    return [(before, action) for before, action in flags_of(parser_of(command)) if action.type not in WORDS]


def is_count(action: argparse.Action) -> bool:
    assert action.type is not None and hasattr(action.type, "__name__")
    return action.type is not interval and action.type.__name__ in ("whole number", "part", "by_share")


def parse(command: ModuleType, before: tuple[str, ...], action: argparse.Action, text: str) -> tuple[int, str]:
    """Exit code and what is said; -1 if the value is taken and another flag is missed."""
    words = [form_of(action.type).format(text)] * (action.nargs if isinstance(action.nargs, int) else 1)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            args = parser_of(command).parse_args([*before, action.option_strings[0], *words])
            values = getattr(args, action.dest)
        except SystemExit as end:
            missed = "the following arguments are required" in said.getvalue()
            return -1 if missed else exit_code(end), said.getvalue()
    assert values is not None
    return -1, ""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.__name__)
def test_what_is_no_number_ends_in_one_line_that_names_the_flag(command):
    taken, wordy = [], []
    for before, action in numbers_of(command):
        flag = action.option_strings[0]
        for text in (*NO_NUMBER, *(NO_COUNT if is_count(action) else ())):
            if text in (str(2**70),) and flag in ABOVE_MOST:
                continue
            code, said = parse(command, before, action, text)
            if code != 2 or flag not in said:
                taken.append(f"{' '.join(before)} {flag} {text[:30]!r}")
            elif len(said) > 500 or said.count("\n") != 1 or "\x1b" in said:
                wordy.append(f"{' '.join(before)} {flag} {text[:30]!r}")
    assert taken == []
    assert wordy == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.__name__)
def test_negative_numbers_zero_and_numbers_beyond_reason_are_taken_by_few(command):
    def taken(text: str, but: set[str]) -> list[str]:
        found = [(before, action) for before, action in numbers_of(command) if action.option_strings[0] not in but]
        return [
            f"{' '.join(before)} {action.option_strings[0]}"
            for before, action in found
            if parse(command, before, action, text)[0] != 2
        ]

    assert taken("-1", NEGATIVE) == []
    assert taken("0", ZERO) == []
    counts = {action.option_strings[0] for _, action in numbers_of(command) if not is_count(action)}
    assert taken(str(10**12), ABOVE_MOST | counts) == []


def test_the_flags_of_numbers_are_found():
    found = {command.__name__: {action.option_strings[0] for _, action in numbers_of(command)} for command in COMMANDS}
    assert {"--lr", "--window", "--num-workers", "--unlabelled-share"} <= found["train"]
    assert {"--shard", "--atol", "--judge-steps", "--guidance-interval"} <= found["sample_ddp"]
    assert {"--shares", "--guidance-intervals", "--synthetic", "--folds"} <= found["evaluate"]
    assert {"--density", "--gap", "--channels"} <= found["make_masks"] and found["app"] >= {"--port", "--judge-steps"}


EDGES = ("0", "1e-38", "2e-38", "1", "2", "1e9", "1e30", "1e300", "1000000000", str(2**63 - 1))


def edges(command: ModuleType, mode: str) -> list[list[str]]:
    """Command lines with one number at an end of its range each."""
    lines = []
    for before, action in numbers_of(command):
        if before != ((mode,) if mode else ()):
            continue
        for text in EDGES:
            if parse(command, before, action, text)[0] != 2:
                words = [form_of(action.type).format(text)] * (action.nargs if isinstance(action.nargs, int) else 1)
                lines.append([action.option_strings[0], *words])
    return lines


def test_training_takes_or_refuses_the_ends_of_every_number():
    usual = ["--data-path", "i", "--mask-path", "m", "--vae", "none", "--model", "SiT-Ti/8"]
    lines = edges(train, "")
    assert len(lines) > 100
    for words in lines:
        size = [] if "--image-size" in words else ["--image-size", "16"]
        logit = ["--time-sampling", "logit-normal"] if "--time-std" in words else []
        with contextlib.suppress(InputError):
            config = resolve(train.parse_args([*usual, *size, *logit, *words]))
            assert isinstance(config, RunConfig)
            assert all(math.isfinite(one) for one in config.to_dict()["optimiser"].values() if one is not None)


@pytest.mark.parametrize("command", [sample, sample_ddp], ids=lambda one: one.__name__)
@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_sampling_takes_or_refuses_the_ends_of_every_number(command, mode):
    lines = edges(command, mode)
    assert len(lines) > 40
    for words in lines:
        more = ["--sampling-method", "dopri5"] if {"--atol", "--rtol"} & set(words) else []
        more += ["--judge-images", "i", "--judge-masks", "m"] if "--min-fidelity" in words else []
        given = [mode, "--ckpt", "a.pt", "--mask-path", "m", *more, *words]
        with contextlib.suppress(InputError):
            sampling_settings(command.parse_args(given))


def test_new_masks_take_or_refuse_the_ends_of_every_number():
    for mode, usual in (("simulate", []), ("recombine", ["--instances", "i"])):
        for words in edges(make_masks, mode):
            with contextlib.suppress(InputError):
                make_masks.check_args(make_masks.parse_args([mode, "--output", "o", *usual, *words]))
