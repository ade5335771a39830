"""Read weights files (.pt and .safetensors) safely: no code is run, and no file unpacks to more than its size."""

from __future__ import annotations

import hashlib
import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from common.faults import short_line


class DamagedFile(ValueError):
    """The file is damaged or not a weights file."""


class WouldRunCode(ValueError):
    """The file names a class or function that could run code when loaded. Nothing was run."""


def read_tensor_file(path: Path, allowed: Sequence[type] = ()) -> tuple[Any, dict[str, str]]:
    """Content of a .safetensors file, or of a file written by `torch.save`, on the CPU.

    Compares checksums, which `torch.load` does not do. No tensor may be larger than the file, because a stored tensor
    with strides of 0 can claim any size.

    Args:
        path: the file. Its suffix tells the format.
        allowed: other classes that a .pt file may hold, beyond tensors and plain types.

    Returns:
        The content, and the metadata of a .safetensors file (empty for others).

    Raises:
        DamagedFile: the file cannot be read, or would unpack to more than its size.
        WouldRunCode: the file holds other things than tensors, plain types and the allowed classes.
    """
    content, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path, allowed), {})
    largest = path.stat().st_size
    if _written_out(content) > largest:
        raise DamagedFile("it would unpack to more than its own size")
    for tensor in _tensors(content):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise DamagedFile(f"it holds a tensor of kind {tensor.device.type}, {tensor.layout}")
        if tensor.numel() * tensor.element_size() > largest:
            raise DamagedFile("it would unpack to more than its own size")
    return content, metadata


def archive_checksum(path: Path) -> str:
    """Hexadecimal digest of a file written by `torch.save`, from the checksums stored in it. Does not read the content.

    `read_tensor_file` compares the content with these checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            blocks = [f"{block.filename} {block.file_size} {block.CRC}" for block in archive.infolist()]
    except zipfile.BadZipFile:
        return "none"
    return hashlib.sha256("\n".join(blocks).encode()).hexdigest()


def _read_torch(path: Path, allowed: Sequence[type]) -> Any:
    """`torch.load` with tensors and plain types only, after the archive's own checks."""
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about odd pickle protocols; the error below is enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except (DamagedFile, OSError):  # a disk error does not mean that the file is damaged
        raise
    except zipfile.BadZipFile as error:
        raise DamagedFile("it is not an archive of torch.save (version 1.6 or later)") from error
    except Exception as error:  # a damaged pickle can raise any exception
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise WouldRunCode(refused.group(1)) from error
        raise DamagedFile(f"{type(error).__name__}: {short_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Compare every block with its checksum, and refuse files that would unpack to more than their size.

    `torch.save` does not compress, so all blocks together are smaller than the file.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        blocks = archive.infolist()
        if sum(block.file_size for block in blocks) > size:
            raise DamagedFile("it would unpack to more than its own size")
        damaged = archive.testzip()
        if damaged is not None:
            raise DamagedFile(f"the checksum of {damaged} does not match")
        pickles = [archive.read(block) for block in blocks if block.filename.endswith("data.pkl")]
    # torch allows bytearray, which creates as many bytes as a number in the pickle says.
    if any(b"bytearray" in pickled for pickled in pickles):
        raise DamagedFile("it holds a bytearray")
    if any(_largest_tuple(pickled) > size for pickled in pickles):
        raise DamagedFile("it would unpack to more than its own size")


def _largest_tuple(pickled: bytes) -> int:
    """Number of values of the largest tuple of a pickle, if every tuple is written out wherever it occurs.

    Nothing is built. A tuple that holds a tuple twice, and so on, is small. But it has no end for a dictionary that
    hashes it as a key.
    """
    mark, stack, memo, largest = -1, list[int](), dict[Any, int](), 0  # the stack holds numbers of values
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "MARK":
            stack.append(mark)
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if opcode.name == "MEMOIZE" else argument] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        else:
            taken = list[int]()
            before = [one.name for one in opcode.stack_before]
            if "mark" in before:
                while (value := stack.pop()) != mark:
                    taken.append(value)
            for _ in range(sum(name not in ("mark", "stackslice") for name in before)):
                taken.append(stack.pop())
            is_tuple = opcode.name.startswith("TUPLE")
            stack.extend(1 + sum(taken) if is_tuple else 1 for _ in opcode.stack_after)
            largest = max(largest, stack[-1] if is_tuple else 0)
    return largest


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # a damaged header can raise any exception
        raise DamagedFile(f"{type(error).__name__}: {short_line(error)}") from error


def _tensors(content: Any) -> Iterable[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    left, seen = [content], set()
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:  # a pickle may contain itself
            seen.add(id(item))
            left.extend(item.values() if isinstance(item, dict) else item)


def _written_out(content: Any) -> float:
    """Number of values if every list and dictionary is written out wherever it occurs. Infinite if one holds itself.

    A pickle of a few bytes can hold a list twice in a list that is twice in a list, and so on: its text has no end.
    """
    sizes: dict[int, float] = {}
    left = [(content, False)]
    while left:
        item, counted = left.pop()
        if not isinstance(item, (dict, list, tuple)):
            continue
        inside = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        if counted:
            sizes[id(item)] = 1.0 + sum(sizes.get(id(one), 1.0) for one in inside)
        elif id(item) not in sizes:
            sizes[id(item)] = math.inf  # until all that it holds is counted
            left.append((item, True))
            left.extend((one, False) for one in inside)
    return sizes.get(id(content), 1.0)
