"""``NAME_seg.npy`` of Cellpose: a pickled dict. Only plain data is taken from it; nothing in it can run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dataset.annotations.cells import Cell, labels_to_cells
from dataset.decode import MAX_DECODED_BYTES, FileError

# All names in a pickle of dicts, lists, strings, numbers and numpy arrays. None has side effects. The module names of
# numpy's functions differ between its versions.
_FUNCTIONS = {
    "multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "multiarray.scalar": np.float64(0).__reduce__()[0],
    "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
}
PLAIN = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype} | {
    f"numpy.{core}.{name}": function for core in ("core", "_core") for name, function in _FUNCTIONS.items()
}


class PlainUnpickler(pickle.Unpickler):
    """Refuses everything but :data:`PLAIN`."""

    def find_class(self, module: str, name: str) -> Any:
        """The object of this name. Raises UnpicklingError if it is not in :data:`PLAIN`."""
        if f"{module}.{name}" not in PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        return PLAIN[f"{module}.{name}"]


def read_seg(path: Path) -> dict[str, Any]:
    """The dict of a ``_seg.npy``.

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
            if shape != () or not dtype.hasobject:
                raise FileError(path, "is no _seg.npy of Cellpose: it holds an array, and no dict")
            content = PlainUnpickler(file).load()
        content = content.item() if isinstance(content, np.ndarray) else content
    except FileError:
        raise
    except pickle.UnpicklingError as error:
        raise FileError(
            path, "holds something else than numbers, strings and arrays, and is not read", str(error)
        ) from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes an unpickler raises nearly any type
        raise FileError(path, "cannot be read, it is damaged or no _seg.npy", str(error)[:120]) from None
    if not isinstance(content, dict) or not isinstance(content.get("masks"), np.ndarray):
        raise FileError(path, "is no _seg.npy of Cellpose: it has no masks")
    return content


def cells_of(path: Path, size: tuple[int, int]) -> list[Cell]:
    """The cells of a ``_seg.npy``; their ids are kept."""
    masks = read_seg(path)["masks"]
    if masks.ndim != 2 or masks.dtype.kind not in "ui" or (masks.size and masks.min() < 0):
        shape = " x ".join(map(str, masks.shape))
        raise FileError(path, f"holds masks of {masks.dtype} and shape ({shape}): one flat label image is needed")
    if masks.shape != size:
        raise FileError(path, f"has {masks.shape[1]} x {masks.shape[0]} pixels, but its image {size[1]} x {size[0]}")
    return labels_to_cells(masks)
