"""Plain values from files that others may have written: JSON read safely, and fields compared with their types."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.faults import short_line

MOST_NUMBER = 2**64  # seeds have up to 64 bits
# What code raises if a value is missing or has the wrong type.
WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
_NOUNS: dict[Any, str] = {
    int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null",
    dict: "a dictionary", Mapping: "a dictionary", list: "a list", tuple: "a list", Sequence: "a list",
}  # fmt: skip


def parse_json(text: str | bytes) -> Any:
    """Content of JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or holds a number that is not finite or too large.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:20]}")
    return value


def _bounded(text: str) -> int:
    if len(text) > 21 or abs(int(text)) > MOST_NUMBER:
        raise ValueError(f"it holds a whole number of {len(text)} digits")
    return int(text)


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        mend: what the user can do if the file is damaged, such as "run the measure again".

    Raises:
        InputError: the file is missing or damaged, or holds something else than an object. The message names it.
    """
    if not path.is_file():  # opening a pipe would block forever
        raise InputError(f"{path} does not exist; {mend}")
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{path} is not readable JSON ({short_line(error)}); {mend}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} instead of an object; {mend}")
    return content


def read_as(path: Path, convert: Callable[[dict[str, Any]], Any], mend: str) -> Any:
    """Read a JSON file and convert its content.

    Raises:
        InputError: the file is missing or damaged, or ``convert`` finds a value missing or of the wrong type.
    """
    content = read_json(path, mend)
    try:
        return convert(content)
    except WRONG as error:
        raise InputError(
            f"{path} holds unexpected values ({type(error).__name__}: {short_line(error)}); {mend}"
        ) from error


def check_fields(kind: type, values: object) -> dict[str, Any]:
    """Compare values with the types of a dataclass's fields. Missing and unknown names are allowed.

    Numbers must be finite and whole numbers at most 2^64. A list may stand for a tuple, and text for a path.

    Returns:
        The same values.

    Raises:
        ValueError: not a dictionary, or a value of another type. The message names the field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is a {type(values).__name__} instead of a dictionary")
    hints = _hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{name} is {_shown(value)} instead of {_noun(hints[name])}")
    return values


def build(kind: type, values: object) -> Any:
    """Make a dataclass from plain values; see :func:`check_fields`.

    Raises:
        ValueError: a value has the wrong type, or a name is missing or unknown.
    """
    try:
        return kind(**check_fields(kind, values))
    except TypeError as error:  # a missing or unknown name
        raise ValueError(str(error)) from error


def _hints(kind: type) -> dict[str, Any]:
    found = typing.get_type_hints(kind)
    return {field.name: found[field.name] for field in fields(kind)}


def _fits(value: object, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if origin is tuple and parts[-1] is not Ellipsis:
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(one, parts[0]) for one in value)
    if hint in (int, float):
        return _is_number(value) and (hint is float or isinstance(value, int))
    if hint is Path:
        return isinstance(value, (str, Path))
    return isinstance(value, hint) if isinstance(hint, type) else True


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MOST_NUMBER
    return isinstance(value, float) and math.isfinite(value)


def _noun(hint: Any) -> str:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return " or ".join(_NOUNS.get(part) or _NOUNS.get(typing.get_origin(part), "text") for part in parts)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, (str, bool, float, type(None))) else type(value).__name__
    if isinstance(value, int) and not isinstance(value, bool):
        text = str(value) if abs(value) < 10**15 else "a very large number"
    return text[:60]
