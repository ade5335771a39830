"""What stands for the objects of NumPy while a pickle is read: notes that run nothing.

NumPy does not check what a pickle says about an array: a false data type makes it follow addresses that the file
chose. So no object of NumPy is made from a pickle. An array is noted as its type, shape and bytes, and becomes an array
only if these are numbers or text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_PLAIN_TYPE = re.compile(r"[biufcSU]\d{1,9}")


class NotPlain(ValueError):
    """The file holds something else than plain data."""


class Call:
    """What a name in a pickle stands for. The pickle can call it, but not change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *values: Any) -> Any:
        return self._function(*values)

    def __setstate__(self, state: Any) -> None:
        raise NotPlain("a function that is changed is no plain data")


class NumberType:
    """Type of the numbers of an array, as a pickle states it."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """The type of NumPy. Raises NotPlain if it is not one of numbers or text."""
        if not isinstance(self.code, str) or not _PLAIN_TYPE.fullmatch(self.code) or self.order not in tuple("<>=|"):
            raise NotPlain(f"an array of {str(self.code)[:20]} is no plain data")
        return np.dtype(self.order + self.code)


class Array:
    """An array as a pickle states it: its type, shape, and bytes or a list of objects."""

    __slots__ = ("content", "fortran", "shape", "type")

    def __init__(self, content: Any = b"", kind: Any = None, shape: Any = (0,), order: str = "C") -> None:
        if order not in ("C", "F"):
            raise NotPlain("an array of another order is no plain data")
        self.content, self.type, self.shape, self.fortran = content, kind, shape, order == "F"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, self.shape, self.type, self.fortran, self.content = state

    @property
    def objects(self) -> list[Any] | None:
        """The objects of an array of Python objects."""
        return self.content if isinstance(self.content, list) else None

    def plain(self) -> np.ndarray:
        """The array. Raises NotPlain if it does not hold numbers or text."""
        if not isinstance(self.type, NumberType) or self.objects is not None:
            raise NotPlain("an array of Python objects is no plain data")
        values = np.frombuffer(self.content, self.type.dtype(), count=math.prod(self.shape))
        return values.reshape(self.shape, order="F" if self.fortran else "C")


def _from_buffer(content: Any, kind: Any, shape: Any, order: str, *_: Any) -> Array:
    return Array(content, kind, shape, order)


def _scalar(kind: NumberType, content: bytes = b"") -> Any:
    return Array(content, kind, ()).plain().item()


def _path(*parts: str) -> str:
    return "/".join(map(str, parts))


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


# The module names of numpy's functions differ between its versions.
_FUNCTIONS = {
    "multiarray._reconstruct": Call(lambda *_: Array()),
    "multiarray.scalar": Call(_scalar),
    "numeric._frombuffer": Call(_from_buffer),
}
# All names in a pickle of dicts, lists, strings, numbers and numpy arrays, and what stands for them. File names may be
# paths, and old pickles keep bytes as text.
PLAIN = (
    {"numpy.ndarray": Call(Array), "numpy.dtype": Call(NumberType), "_codecs.encode": Call(_bytes)}
    | {f"numpy.{core}.{name}": function for core in ("core", "_core") for name, function in _FUNCTIONS.items()}
    | {
        f"pathlib{part}.{name}": Call(_path)
        for part in ("", "._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    }
)
