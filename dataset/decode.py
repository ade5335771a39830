"""Decode the bytes of one file, or refuse it with a :class:`FileError`: no other exception leaves this module."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from common.errors import InputError, list_some
from common.faults import short_line

MAX_DECODED_BYTES = 2**30  # one file; 32768 x 32768 pixels of 8-bit gray. A whole slide has to be cut into tiles
ORIENTATION_TAG = 274  # of EXIF and TIFF; 1 is upright
ROTATED = "carries a rotation tag (EXIF or TIFF orientation): save it upright, so that image and mask agree"
LAST_AXIS = "has its classes in the last axis (H, W, K): store them in the first (K, H, W)"
MOST_LAST = 16  # a last axis as short as this holds classes or channels, and not columns
CHANNELS = "channels"  # several planes that the file does not call colours, such as stains
# A gray table is read as its gray values, a coloured one as the numbers in the file. The colours in use may follow.
TABLES = ("gray", "coloured")
MOST_COLOURS = 16  # of a table that are kept
_most_bytes: ContextVar[int] = ContextVar("most_bytes", default=MAX_DECODED_BYTES)
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_START, JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# What lies in place of the file, by its first bytes in lower case.
_SAVE = "save it as PNG or TIFF"
NOT_THE_FILE = {
    b"version ": "is a pointer of Git LFS and not the file itself: run git lfs pull",
    **dict.fromkeys((b"<!doctyp", b"<html"), "is a web page and no image: the download went wrong"),
    b"gif8": f"is a GIF: {_SAVE}",
    b"riff": f"is a WebP: {_SAVE}",
    b"\0\0\0\x0cjp": f"is a JPEG 2000: {_SAVE}",
    b"\x89hdf": f"is an HDF5 file: {_SAVE}",
    b"matlab 5": f"is a MATLAB file: {_SAVE}",
    b"%pdf": f"is a PDF: {_SAVE}",
    b"<?xml": "is an XML file and no image",
    b"pk\x03\x04": "is a zip archive: unpack it; make_masks.py convert reads archives of ROIs",
    b"\x1f\x8b": "is a gzip archive: unpack it",
    b"\x93numpy": "is a NumPy array: name it .npy, which is read for masks",
    b"\0\x05\x16\x07": "holds notes of macOS and no image: delete it",
}
COLOUR_SPACES = {"SEPARATED": "CMYK", "CIELAB": "Lab", "YCBCR": "YCbCr"}  # as image programs call them
# Pillow modes that numpy takes as they are, and what the others become without loss of gray values.
_PLAIN_MODES = {"L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I", "F"}
_CONVERTED_MODES = {"1": "L", "CMYK": "RGB", "YCbCr": "RGB", "PA": "RGBA", "RGBX": "RGB"}
NOT_FLAT = "one 2-D image per file is needed; make_masks.py images takes a plane, a projection or a field of a stack"
NOT_FLAT_MASK = "one flat mask is needed; make_masks.py convert reads one cell per page, make_masks.py images one plane"


# tifffile logs every damaged tag; the FileError says it once.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# Pillow's limit on pixels is lower than stitched fields of a slide scanner; _check_size has ours, in bytes.
Image.MAX_IMAGE_PIXELS = None


class FileError(InputError):
    """One file cannot be used.

    Attributes:
        reason: our own words, without the path and without a decoder's text. Files of one reason are named together.
    """

    def __init__(self, path: str | Path, reason: str, detail: str = "") -> None:
        """``detail`` is what a decoder said; it is shown for a single file and decides nothing."""
        super().__init__(f"{path}: {reason}{f' ({detail})' if detail else ''}")
        self.path, self.reason = Path(path), reason


def decode(path: Path, as_mask: bool) -> tuple[np.ndarray, str]:
    """Decode by content; every fault of a decoder becomes a FileError.

    Returns:
        the array; one of :data:`TABLES` if the pixels of a mask are numbers of a colour table, followed by the colours
        if they are few (``coloured 0:000000 1:ff0000``); :data:`CHANNELS` for an image whose planes are no colours;
        else "".
    """
    table = ""
    try:
        if not path.is_file():  # also keeps pipes and devices from being opened
            raise FileError(path, "is not a regular file" if path.exists() else "no such file, or a broken link")
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(0)
            if not start:
                raise FileError(path, "is empty (0 bytes)")
            is_array = as_mask and path.suffix.lower() in (".npy", ".npz")
            for beginning, what in NOT_THE_FILE.items():
                if start.lower().startswith(beginning) and not is_array:
                    raise FileError(path, what)
            if is_array:
                array = _decode_numpy(file, path)
            elif start.startswith(TIFF_STARTS):
                array, table = _decode_tiff(file, path, as_mask)
            else:
                array, table = _decode_with_pillow(file, path, as_mask)
                array = array if as_mask else _without_opaque_alpha(array)
    except InputError:
        raise
    except PermissionError:
        raise FileError(path, "may not be read by this user: change its permissions") from None
    except UnidentifiedImageError:
        raise FileError(path, "cannot be read, it is damaged or no image file") from None
    except Exception as error:  # noqa: BLE001 - on damaged bytes the decoders raise nearly any type
        raise FileError(path, "cannot be read, it is damaged or no image file", short_line(error)) from None
    return array.astype(array.dtype.newbyteorder("="), copy=False), table


def _decode_with_pillow(file: BinaryIO, path: Path, as_mask: bool) -> tuple[np.ndarray, str]:
    with Image.open(file, formats=["PNG", "JPEG", "BMP"]) as image:
        is_deep = any(";16" in str(tile[-1]) and not str(tile[-1]).startswith("I") for tile in image.tile)
        deep_colour = is_deep and image.format == "PNG"  # BGR;16 of a BMP is 5 or 6 bits a colour
        value_bytes = 4 if image.mode in ("I", "F") else 2 if deep_colour or image.mode.startswith("I;16") else 1
        _check_size((image.height, image.width, len(image.getbands())), value_bytes, path)
        frames = getattr(image, "n_frames", 1)
        if image.format == "PNG" and frames > 1:
            raise FileError(path, f"is an animation of {frames} frames: save one of them as PNG or TIFF")
        image.load()
        if image.getexif().get(ORIENTATION_TAG, 1) not in (0, 1):
            raise FileError(path, ROTATED)
        if deep_colour:
            file.seek(0)
            return imagecodecs.png_decode(file.read()), ""  # Pillow would cut 16-bit colour to 8 bits
        if image.mode == "P":
            return _palette_to_array(image, as_mask)
        if image.mode in _PLAIN_MODES:
            return np.array(image), ""
        if image.mode not in _CONVERTED_MODES:
            raise FileError(path, f"has the unusual pixel format {image.mode}: save it as gray or RGB")
        return np.array(image.convert(_CONVERTED_MODES[image.mode])), ""


def _palette_to_array(image: Image.Image, as_mask: bool) -> tuple[np.ndarray, str]:
    if not as_mask:
        return np.array(image.convert("RGBA" if "transparency" in image.info else "RGB")), ""
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    return _palette_mask(np.array(image), palette)


def _palette_mask(indices: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, str]:
    """Gray values if the whole table (n, 3) is gray, else the numbers. The table decides, not the colours in use:
    files of one folder share a table and use different parts of it."""
    if len(palette) and (palette == palette[:, :1]).all():
        return palette[:, 0][np.minimum(indices, len(palette) - 1)], "gray"
    used = np.unique(indices)
    colours = [f" {index}:{''.join(f'{one:02x}' for one in palette[index])}" for index in used if index < len(palette)]
    return indices, "coloured" + "".join(colours if len(used) <= MOST_COLOURS else [])


def _decode_tiff(file: BinaryIO, path: Path, as_mask: bool) -> tuple[np.ndarray, str]:
    with tifffile.TiffFile(file, _multifile=False) as tiff:  # an OME header must not open other files
        needed = NOT_FLAT_MASK if as_mask else NOT_FLAT
        full_size = [series for series in tiff.series if not series.keyframe.is_reduced]
        if len(full_size) != 1:
            raise FileError(path, f"holds {len(full_size)} images of different kinds: {needed}")
        series, page = full_size[0], full_size[0].keyframe
        _check_size(series.shape, series.dtype.itemsize, path)
        check_page(page, series.dtype == bool, path)
        kept = [(axis, n) for axis, n in zip(series.axes, series.shape, strict=True) if n > 1 or axis in "YX"]
        axes, shape = "".join(axis for axis, _ in kept), tuple(n for _, n in kept)
        extra = axes.replace("Y", "").replace("X", "")
        if sorted(axes.replace(extra, "")) != ["X", "Y"] or len(extra) > 1:
            raise FileError(path, f"is a stack of shape {' x '.join(map(str, shape))}: {needed}")
        is_soft_stack = as_mask and series.dtype.kind == "f"
        if extra and extra not in "SC" and not as_mask and shape[-1] <= MOST_LAST < min(shape[:2]):
            text = " x ".join(map(str, shape))
            raise FileError(path, f"has its channels in the last axis ({text}): store them in the first, axes CYX")
        if extra and extra not in "SC" and not is_soft_stack:
            channels = "" if as_mask else " (if they are channels, store them as such: axes CYX)"
            raise FileError(path, f"is a 3-D stack of {shape[axes.index(extra)]} planes: {needed}{channels}")
        array = series.asarray(maxworkers=1).reshape(shape)
        kind, table = tifffile.PHOTOMETRIC(page.photometric).name, ""
        if not (extra and kind == "PALETTE" and not as_mask):  # Fiji's table only tints the planes
            array, table = _photometric_to_gray(array, page, path, as_mask)
        if as_mask and extra == "C" and not is_soft_stack:
            raise FileError(path, f"holds {shape[axes.index('C')]} channels: save the mask as one gray channel")
    order = extra + "YX" if is_soft_stack else "YX" + extra
    if array.ndim == len(axes):  # a palette image gained its colour axis above
        array = array.transpose([axes.index(axis) for axis in order])
    alpha = kind == "RGB" or {1, 2} & set(page.extrasamples)  # else a channel, perhaps saturated
    if extra == "S" and alpha and not as_mask:
        array = _without_opaque_alpha(array)
    if extra and not as_mask and kind not in ("RGB", "YCBCR"):
        table = CHANNELS
    return array, table


def colour_note(path: Path) -> str:
    """What the header of an image says about its pixels that a person should know: transparency or a lookup table.

    Returns:
        "transparency", "colour table" (one with colours), or "".
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start in TIFF_STARTS:
                with tifffile.TiffFile(file, _multifile=False) as tiff:
                    page = tiff.pages.first
                    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
                        is_gray = (np.asarray(page.colormap) == page.colormap[:1]).all()
                        return "" if is_gray or len(tiff.pages) > 1 else "colour table"
                    return "transparency" if {1, 2} & set(page.extrasamples) else ""
            with Image.open(file, formats=["PNG", "BMP"]) as image:
                if image.mode == "P":
                    table = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
                    return "" if (table == table[:, :1]).all() else "colour table"
                return "transparency" if image.mode in ("LA", "PA", "RGBA") else ""
    except Exception:  # noqa: BLE001 - what is wrong with the file is said when it is decoded
        return ""


def check_page(page: tifffile.TiffPage, is_bool: bool, path: Path) -> None:
    """Refuse pages of a TIFF that programs show in different ways.

    Raises:
        FileError: a rotation tag, "white is zero", or a colour space that is neither gray nor RGB.
    """
    orientation = page.tags.get(ORIENTATION_TAG)
    if orientation is not None and orientation.value not in (0, 1):
        raise FileError(path, ROTATED)
    kind = tifffile.PHOTOMETRIC(page.photometric).name
    if kind == "MINISWHITE" and not (page.software.startswith("tifffile") and is_bool):
        # Half of the programs invert such a file and half do not, so image and mask could disagree.
        # tifffile itself writes bool arrays like this and means them as they are.
        raise FileError(
            path, "is stored as 'white is zero': save it as 'black is zero' (Fiji: Lookup Tables > Invert LUT)"
        )
    # JPEG keeps colours as YCbCr and is decoded to RGB. Without JPEG the numbers in the file are no RGB.
    is_raw = kind == "YCBCR" and tifffile.COMPRESSION(page.compression).name not in ("JPEG", "OJPEG")
    no_table = kind == "PALETTE" and page.colormap is None
    if is_raw or no_table or kind not in ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR", "PALETTE"):
        raise FileError(path, f"has the colour space {COLOUR_SPACES.get(kind, kind)}: save it as gray or RGB")


def _photometric_to_gray(
    array: np.ndarray, page: tifffile.TiffPage, path: Path, as_mask: bool
) -> tuple[np.ndarray, str]:
    """Turn palette and 1-bit TIFF pages into gray or RGB."""
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
        table = np.asarray(page.colormap).T  # (n, 3) of 16 bits; some programs write 8 bits
        palette = (table >> 8 if table.max() > 255 else table).astype(np.uint8)
        return _palette_mask(array, palette) if as_mask else (palette[array], "")
    return (array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else array), ""


def _without_opaque_alpha(array: np.ndarray) -> np.ndarray:
    """Gray + alpha or RGBA without the alpha channel, where that is full everywhere."""
    if array.ndim == 3 and array.shape[2] in (2, 4) and array.dtype.kind == "u":
        return array[:, :, :-1] if (array[:, :, -1] == np.iinfo(array.dtype).max).all() else array
    return array


def _decode_numpy(file: BinaryIO, path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) != 1:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                raise FileError(path, f"holds {len(members)} arrays: {list_some(names)}. Save the mask alone")
            _check_size((members[0].file_size,), 1, path)
            with archive.open(members[0]) as member:
                array = _read_array(member, path)
    else:
        _check_size((os.fstat(file.fileno()).st_size,), 1, path)
        array = _read_array(file, path)
    if array.shape[2:] == (1,):  # a flat mask with an axis too many
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif" or array.size == 0:
        shape = " x ".join(map(str, array.shape))
        raise FileError(path, f"holds {array.dtype} numbers of shape ({shape}): (H, W) or (K, H, W) is expected")
    return array.astype(np.uint8) if array.dtype == bool else array


def _read_array(file: Any, path: Path) -> np.ndarray:
    """A NumPy array of numbers; one of Python objects is not read, since that can run code."""
    try:
        return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise FileError(
            path, "holds Python objects and no numbers, and is not read: save the label image alone"
        ) from None


@contextmanager
def decoding_at_most(bytes_: int) -> Iterator[None]:
    """Inside the block, files of more decoded bytes are refused before they are decoded. Larger ones than
    :data:`MAX_DECODED_BYTES` are always refused."""
    token = _most_bytes.set(bytes_)
    try:
        yield
    finally:
        _most_bytes.reset(token)


def _check_size(shape: tuple[int, ...], bytes_per_value: int, path: Path) -> None:
    """Refuse before decoding what would fill the memory (a damaged header, a decompression bomb, a whole slide)."""
    size = math.prod(int(n) for n in shape) * bytes_per_value
    most = min(MAX_DECODED_BYTES, _most_bytes.get())
    if size > most or min(shape) < 1:
        raise FileError(
            path,
            f"claims {' x '.join(map(str, shape))} values ({_bytes(size)}), at least one and at most {_bytes(most)} "
            "are read: cut it into tiles",
        )


def _bytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
