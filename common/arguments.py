"""Argument types: numbers in a range, with clear error messages. Does not import torch, so that commands start fast."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

LONGEST = 40  # characters of a number; longer ones are typing errors, and fill the terminal
LEAST_FLOAT = 2.0**-126  # smallest normal number of 32 bits; the networks take smaller ones for 0
_PLAIN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[+-]?(?:inf|nan)", re.IGNORECASE)


def plain_number(kind: type[int] | type[float], text: str) -> int | float:
    """A number in plain digits. Python also reads ``1_000``, blanks, and digits of other scripts; they are refused.

    Raises:
        argparse.ArgumentTypeError: the text is too long for a number.
        ValueError: it is no number.
    """
    if len(text) > LONGEST:
        raise argparse.ArgumentTypeError(f"{text[:20]}... ({len(text)} characters) is too long for a number")
    if not _PLAIN.fullmatch(text):
        raise ValueError(f"{text!r} is no number")
    return kind(text)


def number_as_text(value: float) -> str:
    """The shortest text of a number that a command reads back as this number."""
    short = f"{value:g}"  # six digits
    if float(short) == value:
        return short
    return str(value)


def number(
    kind: type[int] | type[float], least: float, most: float, *, open_least: bool = False, open_most: bool = False
) -> Callable[[str], int | float]:
    """Make an argument type: a number from ``least`` to ``most``. An open end is not included.

    An infinite end means no limit. The number itself must be finite.
    """

    def parse(text: str) -> int | float:
        value = plain_number(kind, text)
        above = value > least if open_least else value >= least
        if least == 0 and open_least and 0 < value < LEAST_FLOAT:
            raise argparse.ArgumentTypeError(f"{text} is too small: numbers of 32 bits end at {LEAST_FLOAT:.2g}")
        below = value < most if open_most else value <= most
        if not (above and below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {_in_words(kind, least, most, open_least, open_most)}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse names it: "invalid number value: 'x'"
    return parse


def _in_words(kind: type, least: float, most: float, open_least: bool, open_most: bool) -> str:
    noun = "a whole number" if kind is int else "a number"
    if most == math.inf:
        if least == -math.inf:
            return "a finite number"
        return f"{noun} above {least}" if open_least else f"{noun} of at least {least}"
    if kind is int:
        return f"{noun} from {least} to {most}"
    if open_least:
        return f"strictly between {least} and {most}" if open_most else f"above {least} and up to {most}"
    return f"between {least} and {most}"


MOST = 10**9  # limit of all counts; more steps, images or pixels must be a typing error
MOST_AT_ONCE = 2**17  # limit of a batch, and of the images in one picture; more would fill the memory
positive_int = number(int, 1, MOST)
batch_size = number(int, 1, MOST_AT_ONCE)
non_negative_int = number(int, 0, MOST)
seed_number = number(int, 0, 2**63 - 1)
positive_float = number(float, 0, math.inf, open_least=True)
non_negative_float = number(float, 0, math.inf)
finite_float = number(float, -math.inf, math.inf)
fraction = number(float, 0, 1)
positive_fraction = number(float, 0, 1, open_least=True)
part_of_time = number(float, 0, 1, open_least=True, open_most=True)
percentile = number(float, 0, 100)
guidance_scale = number(float, 0, 100)  # beyond, numbers of 16 bits overflow
percent = number(int, 1, 100)


def overlap(text: str) -> float:
    value = float(plain_number(float, text))
    if not 0 <= value < float("inf") or (value > 1 and not value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text} is neither a fraction between 0 and 1 nor a number of pixels")
    return value


def interval(text: str) -> tuple[float, float]:
    """LO:HI as two numbers in [0, 1], for argparse."""
    low, colon, high = text.partition(":")
    try:
        values = plain_number(float, low), plain_number(float, high)
    except ValueError:
        colon = ""
    if not colon or not 0 <= values[0] < values[1] <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not LO:HI with 0 <= LO < HI <= 1")
    return values


def part(text: str) -> tuple[int, int]:
    """I/N with 1 <= I <= N as (I, N), for argparse."""
    number, slash, count = text.partition("/")
    if not (slash and number.isascii() and number.isdecimal() and count.isascii() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 2/8")
    values = int(positive_int(number)), int(positive_int(count))
    if values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: parts count from 1 to {values[1]}")
    return values


def by_share(text: str) -> tuple[int, Path]:
    """PERCENT=PATH, for argparse."""
    share, equals, path = text.partition("=")
    if not (equals and share.isascii() and share.isdecimal() and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not PERCENT=PATH, such as 10=samples_10")
    return int(percent(share)), Path(path)
