"""``NAME_seg.npy`` of Cellpose: a pickled dict. Only plain data is taken from it; nothing in it can run."""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.faults import short_line
from dataset.annotations.cells import Cell, check_size, labels_to_cells
from dataset.annotations.plain_arrays import PLAIN, Array, NotPlain
from dataset.decode import MAX_DECODED_BYTES, FileError

_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")  # the steps of a pickle that number an object
_MEND = "save the masks as PNG or TIFF in Cellpose"


class PlainUnpickler(pickle.Unpickler):
    """Refuses every name but those of :data:`PLAIN`, and takes what stands for them."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for this name. Raises UnpicklingError if it is no plain data."""
        if f"{module}.{name}" not in PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        return PLAIN[f"{module}.{name}"]


def _check_memo(file: BinaryIO) -> None:
    """Refuse a pickle that gives an object a number beyond its steps: the unpickler reserves a place for each number.

    Runs nothing, and leaves the file where it was.

    Raises:
        UnpicklingError: such a number.
        ValueError: this is no pickle.
    """
    start = file.tell()
    for step, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name in _PUTS and argument is not None and argument > step:
            raise pickle.UnpicklingError(f"the number {argument} of an object is no plain data")
    file.seek(start)


def read_seg(path: Path) -> dict[str, Any]:
    """The dict of a ``_seg.npy``. Its masks are an array; other arrays are not read.

    Raises:
        FileError: the file is no ``_seg.npy``, or holds more than plain data.
    """
    try:
        if path.stat().st_size > MAX_DECODED_BYTES:
            raise FileError(path, "is larger than 1 GiB")
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if shape not in ((), (1,)) or dtype.kind != "O":
                raise FileError(path, "is no _seg.npy of Cellpose: it holds an array, and no dict")
            _check_memo(file)
            content = PlainUnpickler(file).load()
        if isinstance(content, Array) and content.objects:
            content = content.objects[0]
        if not isinstance(content, dict) or not isinstance(content.get("masks"), Array):
            raise FileError(path, "is no _seg.npy of Cellpose: it has no masks")
        return {**content, "masks": content["masks"].plain()}
    except FileError:
        raise
    except (pickle.UnpicklingError, NotPlain) as error:
        words = f"holds something else than numbers, strings and arrays, and is not read: {_MEND}"
        raise FileError(path, words, str(error)) from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes an unpickler raises nearly any type
        raise FileError(path, "cannot be read, it is damaged or no _seg.npy", short_line(error)) from None


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """The cells of a ``_seg.npy``; their ids are kept.

    Raises:
        FileError: the masks are no label image of this size.
    """
    masks = read_seg(path)["masks"]
    masks = masks[0] if masks.ndim == 3 and len(masks) == 1 else masks
    if masks.ndim != 2 or masks.dtype.kind not in "uif":
        shape = " x ".join(map(str, masks.shape))
        raise FileError(path, f"holds masks of {masks.dtype} and shape ({shape}): one flat label image is needed")
    if masks.size and not (masks.min() >= 0 and (masks == np.floor(masks)).all() and masks.max() < 2**63):
        raise FileError(path, f"holds masks with negative or broken numbers, which are no ids of cells: {_MEND}")
    check_size(path, masks, size)
    return labels_to_cells(masks)
