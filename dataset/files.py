"""Read image and mask files as they are stored, pair them by name, and write images.

Everything that touches a user's file lies here. A file is read to a numpy array with its own gray values, or refused
with a :class:`FileError` that says what is wrong and how to mend it: no other exception leaves this module, and no file
can run code or fill the memory. What the values of masks mean is decided in ``masks.py``.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from common.errors import InputError, list_some

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".npy", ".npz")
MASK_ENDINGS = ("_cp_masks", "_masks")  # Cellpose: NAME_cp_masks beside NAME, NAME_masks beside NAME_img
IMAGE_ENDING = "_img"
MAX_DECODED_BYTES = 2**30  # one file; 32768 x 32768 pixels of 8-bit gray. A whole slide has to be cut into tiles
MAX_CHANNELS = 64
# What Cellpose writes beside images and masks and that is neither. NAME_flows counts only beside NAME.
_BY_PRODUCTS = re.compile(r"(_seg\.npy|_(flows|outlines)_cp_masks\.\w+)$")
_FLOWS_ENDING = "_flows"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_START, _JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# Pillow modes that numpy takes as they are, and what the others become without loss of gray values.
_PLAIN_MODES = {"L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I", "F"}
_CONVERTED_MODES = {"1": "L", "CMYK": "RGB", "YCbCr": "RGB", "PA": "RGBA", "RGBX": "RGB"}
_NOT_FLAT = "one 2-D image per file is needed, save the planes as files of their own"


# tifffile logs every damaged tag; the FileError says it once.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

# Pillow's limit on pixels is lower than stitched fields of a slide scanner; _check_size has ours, in bytes.
Image.MAX_IMAGE_PIXELS = None


class FileError(InputError):
    """One file cannot be used.

    Attributes:
        path: the file.
        reason: our own words, without the path and without a decoder's text. Files of one reason are named together.
    """

    def __init__(self, path: str | Path, reason: str, detail: str = "") -> None:
        """``detail`` is what a decoder said; it is shown for a single file and decides nothing."""
        super().__init__(f"{path}: {reason}{f' ({detail})' if detail else ''}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Pair:
    """An image and its mask. ``mask_path`` is a folder where a mask is stored as one file per nucleus."""

    name: str
    image_path: Path
    mask_path: Path


# ---------------------------------------------------------------------------------------------------- find and pair


def find_files(folder: str | Path, what: str) -> dict[str, Path]:
    """Image or mask files of one folder, by stem; hidden files and by-products of Cellpose are left out.

    A folder without files may hold one folder per image instead, as the 2018 Data Science Bowl does:
    ``NAME/images/*.png`` (one file) and ``NAME/masks/*.png`` (one file per nucleus), or ``NAME/*.png`` for masks. A
    mask is then a folder.

    Args:
        folder: where to look; nothing below it is searched except in the layout above.
        what: what is looked for, for messages. All but "image" may be .npy and .npz or in folders of nuclei, too.

    Returns:
        stem -> path, sorted by stem. ``NAME.ome.tif`` has the stem ``NAME``.

    Raises:
        InputError: no such folder, no files in it, or two files with one stem.
    """
    folder = Path(folder)
    suffixes = IMAGE_SUFFIXES if what.startswith("image") else MASK_SUFFIXES
    if not folder.is_dir():
        raise FileError(folder, f"is no folder of {what} files: {'it is a file' if folder.exists() else 'not found'}")
    found: dict[str, Path] = {}
    twice, others = [], []
    with os.scandir(folder) as entries:  # no stat per file: 100,000 names take well under a second
        for name in sorted(entry.name for entry in entries if not entry.name.startswith(".")):
            stem, dot, suffix = name.rpartition(".")
            if not stem or dot + suffix.lower() not in suffixes:
                others.append(name)
            elif not _BY_PRODUCTS.search(name):
                stem = stem.removesuffix(".ome")
                if stem in found:
                    twice.append(f"{found[stem].name} and {name}")
                found[stem] = folder / name
    odd = [ascii(name) for name in (*found, *others) if not name.isprintable()]
    if odd:  # they end in tables, in messages and on a terminal
        raise FileError(folder, f"has names with characters that cannot be printed: {list_some(odd)}. Rename them")
    if twice:
        raise FileError(folder, f"has two {what} files with one name: {list_some(twice)}. Keep one of each")
    if not found:
        found = _find_one_folder_per_image(folder, others, is_image=what.startswith("image"))
    if not found:
        inner = [name for name in others if (folder / name).is_dir()]
        hint = next((name for name in inner if name.startswith(what)), None)
        rest = f"; did you mean {folder / hint}?" if hint else ", it must hold " + " ".join(suffixes)
        raise FileError(folder, f"holds no {what} files{rest}")
    flows = {stem for stem in found if stem.endswith(_FLOWS_ENDING) and stem.removesuffix(_FLOWS_ENDING) in found}
    return {stem: path for stem, path in sorted(found.items()) if stem not in flows}


def _find_one_folder_per_image(folder: Path, names: Iterable[str], is_image: bool) -> dict[str, Path]:
    """The layout ``NAME/images/FILE`` and ``NAME/masks/FILES``: NAME -> image file or folder of masks."""
    found = {}
    for name in names:
        inner = folder / name / ("images" if is_image else "masks")
        if inner.is_dir():
            files = _files_in(inner)
            if is_image and len(files) != 1:
                raise InputError(f"{inner} holds {len(files)} images, one is expected in a folder per image")
            found[name] = files[0] if is_image else inner
        elif not is_image and name not in ("images", "masks") and (folder / name).is_dir() and _files_in(folder / name):
            found[name] = folder / name
    return found


def _files_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return [folder / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]


def match_names(images: dict[str, Path], masks: dict[str, Path]) -> tuple[list[Pair], list[str], list[str]]:
    """Pair by stem, where NAME also meets NAME_masks and NAME_cp_masks, and NAME_img counts as NAME.

    Returns:
        pairs sorted by name, stems of images without mask, stems of masks without image.
    """
    pairs: dict[str, Pair] = {}
    lonely_images = []
    used: dict[str, str] = {}
    for stem, image_path in images.items():
        base = stem.removesuffix(IMAGE_ENDING) or stem
        keys = (stem, base, *(start + end for start in (base, stem) for end in MASK_ENDINGS))
        key = next((key for key in keys if key in masks), None)
        if key is None:
            lonely_images.append(stem)
            continue
        name = stem if key == stem else base
        if key in used or name in pairs:
            other = used[key] if key in used else pairs[name].image_path.stem
            raise InputError(f"images {other} and {stem} would make one pair of the name {name}: rename one")
        used[key] = stem
        pairs[name] = Pair(name, image_path, masks[key])
    lonely_masks = [stem for stem in masks if stem not in used]
    return [pairs[name] for name in sorted(pairs)], lonely_images, lonely_masks


def find_images_and_masks(image_dir: str | Path, mask_dir: str | Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """:func:`find_files` of both folders; one folder for both is split by the endings of :data:`MASK_ENDINGS`."""
    images, masks = find_files(image_dir, "image"), find_files(mask_dir, "mask")
    together = Path(image_dir).samefile(mask_dir) and next(iter(masks.values())).is_file()
    if together:
        images = {stem: path for stem, path in images.items() if not stem.endswith(MASK_ENDINGS)}
        masks = {stem: path for stem, path in masks.items() if stem.endswith(MASK_ENDINGS)}
        if not images or not masks:
            raise InputError(
                f"{image_dir} is given for images and masks: then the masks' names must end with _masks or _cp_masks"
            )
    return images, masks


def pair_files(image_dir: str | Path, mask_dir: str | Path) -> list[Pair]:
    """Every image with its mask, by name over mixed suffixes.

    Returns:
        pairs sorted by name.

    Raises:
        InputError: a file without partner (all of them in one message), a missing or empty folder.
    """
    images, masks = find_images_and_masks(image_dir, mask_dir)
    pairs, lonely_images, lonely_masks = match_names(images, masks)
    faults = []
    if lonely_images:
        count = f"{len(lonely_images)} of {len(images)} images in {image_dir}"
        faults.append(f"{count} have no mask in {mask_dir}: {list_some(lonely_images)}")
    if lonely_masks:
        count = f"{len(lonely_masks)} of {len(masks)} masks in {mask_dir}"
        faults.append(f"{count} have no image in {image_dir}: {list_some(lonely_masks)}")
    if faults:
        raise InputError(
            f"{'; '.join(faults)}. A mask has its image's name (NAME, NAME_masks or NAME_cp_masks) and any suffix of "
            + " ".join(MASK_SUFFIXES)
        )
    return pairs


# ------------------------------------------------------------------------------------------------------- read files


def read_image(path: str | Path) -> np.ndarray:
    """One image with its stored gray values.

    PNG, JPEG, BMP and TIFF, recognised by content. A palette becomes RGB, an opaque alpha channel is dropped, 1-bit
    becomes 0 and 255, float64 becomes float32; 16-bit colour keeps its 16 bits.

    Returns:
        (H, W, C) uint8, uint16 or another real dtype, C >= 1, finite.

    Raises:
        FileError: unreadable, truncated, a stack of planes, NaN or infinity, above :data:`MAX_DECODED_BYTES`.
    """
    array = _read(Path(path), as_mask=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return _checked(np.ascontiguousarray(array), path)


def read_size(path: str | Path) -> tuple[int, int] | None:
    """(H, W) by the header alone, for a quick look at many files; None where only decoding can tell."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(24)
            if start.startswith(_PNG_START) and start[12:16] == b"IHDR":
                return int.from_bytes(start[20:24]), int.from_bytes(start[16:20])
            if start.startswith(_JPEG_START):
                file.seek(0)
                with Image.open(file, formats=["JPEG"]) as image:
                    return image.height, image.width
    except Exception:  # noqa: BLE001 - what is wrong with the file is said when it is decoded
        return None
    return None


def read_mask(path: str | Path) -> np.ndarray:
    """One mask with its stored values.

    A gray palette is read as its gray values, a coloured one as its indices (as PASCAL VOC stores class ids); RGB only
    where the three channels are equal. A folder is read as one nucleus per file: ids 1..n in the order of the names,
    the first one keeps a pixel that two claim. ``.npy``, ``.npz`` and float TIFF may hold a stack (K, H, W).

    Returns:
        (H, W), or (K, H, W) for a stack of class probabilities; bool becomes 0 and 1.

    Raises:
        FileError: as :func:`read_image`; colours; a stack of integer planes.
    """
    path = Path(path)
    if path.is_dir():
        return _read_nuclei(path)
    array = _read(path, as_mask=True)
    if array.ndim == 3 and len(array) == 1:  # a flat mask with an axis too many, as networks give it
        array = array[0]
    if array.ndim == 3 and path.suffix.lower() not in (".npy", ".npz") and array.dtype.kind != "f":
        array = _gray_channel(array, path)
    return _checked(np.ascontiguousarray(array), path)


def _read_nuclei(folder: Path) -> np.ndarray:
    files = _files_in(folder)
    if not files:
        raise FileError(folder, "holds no nucleus masks")
    instance_map: np.ndarray | None = None
    for index, file in enumerate(files, start=1):
        nucleus = read_mask(file)
        if nucleus.ndim != 2:
            raise FileError(file, "is no flat mask of one nucleus")
        if instance_map is None:
            instance_map = np.zeros(nucleus.shape, np.uint16 if len(files) < 2**16 else np.int32)
        if nucleus.shape != instance_map.shape:
            raise FileError(file, f"has {_size(nucleus)} pixels, {files[0].name} beside it {_size(instance_map)}")
        values = np.unique(nucleus)
        if len(values) > 2 or (len(values) == 2 and values[0] != 0):
            raise FileError(file, f"is no mask of one nucleus: gray values {list_some(values.tolist())}")
        instance_map[(nucleus > 0) & (instance_map == 0)] = index
    return instance_map


def _read(path: Path, as_mask: bool) -> np.ndarray:
    """Decode by content; every fault of a decoder becomes a FileError."""
    try:
        if not path.is_file():  # also keeps pipes and devices from being opened
            raise FileError(path, "is no regular file" if path.exists() else "no such file, or a broken link")
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(0)
            if not start:
                raise FileError(path, "is empty (0 bytes)")
            if as_mask and path.suffix.lower() in (".npy", ".npz"):
                array = _decode_numpy(file, path)
            elif start.startswith(_TIFF_STARTS):
                array = _decode_tiff(file, path, as_mask)
            else:
                array = _decode_with_pillow(file, path, as_mask)
                array = array if as_mask else _without_opaque_alpha(array)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes the decoders raise nearly any type
        detail = " ".join((str(error) or type(error).__name__).split())[:120]
        raise FileError(path, "cannot be read, it is damaged or no image file", detail) from None
    return array


def _decode_with_pillow(file: BinaryIO, path: Path, as_mask: bool) -> np.ndarray:
    with Image.open(file, formats=["PNG", "JPEG", "BMP"]) as image:
        deep_colour = any(";16" in str(tile[-1]) and not str(tile[-1]).startswith("I") for tile in image.tile)
        value_bytes = 4 if image.mode in ("I", "F") else 2 if deep_colour or image.mode.startswith("I;16") else 1
        _check_size((image.height, image.width, len(image.getbands())), value_bytes, path)
        if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
            raise FileError(path, f"is an animation of {image.n_frames} frames: {_NOT_FLAT}")
        if deep_colour:
            file.seek(0)
            return imagecodecs.png_decode(file.read())  # Pillow would cut 16-bit colour to 8 bits
        image.load()
        if "exif" in image.info and image.getexif().get(0x0112, 1) != 1:
            raise FileError(path, "carries a rotation tag (EXIF): save it upright, so that image and mask agree")
        if image.mode == "P":
            return _palette_to_array(image, as_mask)
        if image.mode not in _PLAIN_MODES:
            if image.mode not in _CONVERTED_MODES:
                raise FileError(path, f"has the unusual pixel format {image.mode}: save it as gray or RGB")
            image = image.convert(_CONVERTED_MODES[image.mode])
        return np.array(image)


def _palette_to_array(image: Image.Image, as_mask: bool) -> np.ndarray:
    if not as_mask:
        return np.array(image.convert("RGBA" if "transparency" in image.info else "RGB"))
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    return _palette_mask(np.array(image), palette)


def _palette_mask(indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Gray values where all used colours are gray, else the indices. ``palette``: (n, 3)."""
    used = np.unique(indices)
    used = palette[used[used < len(palette)]]
    if len(used) and (used == used[:, :1]).all():
        return palette[:, 0][np.minimum(indices, len(palette) - 1)]
    return indices


def _decode_tiff(file: BinaryIO, path: Path, as_mask: bool) -> np.ndarray:
    with tifffile.TiffFile(file, _multifile=False) as tiff:  # an OME header must not open other files
        series = [one for one in tiff.series if not one.keyframe.is_reduced]
        if len(series) != 1:
            raise FileError(path, f"holds {len(series)} images of different kinds: {_NOT_FLAT}")
        series, page = series[0], series[0].keyframe
        _check_size(series.shape, series.dtype.itemsize, path)
        kept = [(axis, n) for axis, n in zip(series.axes, series.shape, strict=True) if n > 1 or axis in "YX"]
        axes, shape = "".join(axis for axis, _ in kept), tuple(n for _, n in kept)
        extra = axes.replace("Y", "").replace("X", "")
        if sorted(axes.replace(extra, "")) != ["X", "Y"] or len(extra) > 1:
            raise FileError(path, f"is a stack of shape {' x '.join(map(str, shape))}: {_NOT_FLAT}")
        is_soft_stack = as_mask and series.dtype.kind == "f"
        if extra and extra not in "SC" and not is_soft_stack:
            raise FileError(
                path,
                f"is a 3-D stack of {shape[axes.index(extra)]} planes: {_NOT_FLAT} (if they are channels, store them "
                "as such: axes CYX)",
            )
        array = series.asarray(maxworkers=1).reshape(shape)
        array = _photometric_to_gray(array, page, path, as_mask)
    order = extra + "YX" if is_soft_stack else "YX" + extra
    if array.ndim == len(axes):  # a palette image gained its colour axis above
        array = array.transpose([axes.index(axis) for axis in order])
    alpha = page.photometric.name == "RGB" or {1, 2} & set(page.extrasamples)  # else a channel, perhaps saturated
    if extra == "S" and alpha and not as_mask:
        array = _without_opaque_alpha(array)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _photometric_to_gray(array: np.ndarray, page: tifffile.TiffPage, path: Path, as_mask: bool) -> np.ndarray:
    """Turn palette and 1-bit TIFF pages into gray or RGB; refuse what could be read in two ways."""
    kind = page.photometric.name
    if kind == "PALETTE" and page.colormap is not None:
        palette = (np.asarray(page.colormap).T >> 8).astype(np.uint8)
        return _palette_mask(array, palette) if as_mask else palette[array]
    if kind == "MINISWHITE" and not page.software.startswith("tifffile"):
        # Half of the programs invert such a file and half do not, so image and mask could disagree.
        # tifffile itself writes bool arrays like this and means them as they are.
        raise FileError(
            path, "is stored as 'white is zero': save it as 'black is zero' (Fiji: Lookup Tables > Invert LUT)"
        )
    if kind not in ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR"):
        raise FileError(path, f"has the colour space {kind}: save it as gray or RGB")
    return array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else array


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
                raise FileError(path, f"holds {len(members)} arrays, not one: {list_some(archive.namelist())}")
            _check_size((members[0].file_size,), 1, path)
            with archive.open(members[0]) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
    else:
        _check_size((os.fstat(file.fileno()).st_size,), 1, path)
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif" or array.size == 0:
        shape = " x ".join(map(str, array.shape))
        raise FileError(path, f"holds {array.dtype} numbers of shape ({shape}): (H, W) or (K, H, W) is expected")
    return array.astype(np.uint8) if array.dtype == bool else array


def _gray_channel(array: np.ndarray, path: Path) -> np.ndarray:
    """The one channel of a mask stored as gray + alpha, RGB or RGBA with equal colours."""
    colours, alpha = (array[:, :, :-1], array[:, :, -1:]) if array.shape[2] in (2, 4) else (array, None)
    if alpha is not None and (alpha != np.iinfo(array.dtype).max).any():
        raise FileError(path, "is partly transparent: save the mask as gray without alpha channel")
    if (colours != colours[:, :, :1]).any():
        raise FileError(path, "holds colours: save the mask as one gray channel of class or instance numbers")
    return colours[:, :, 0]


def _checked(array: np.ndarray, path: str | Path) -> np.ndarray:
    if array.dtype.kind not in "uif" or array.size == 0 or array.dtype.itemsize > 8:
        raise FileError(path, f"holds {array.dtype} values: save it as 8-bit, 16-bit or float gray values")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FileError(path, "holds NaN or infinite values: replace them")
    return array


def _check_size(shape: tuple[int, ...], bytes_per_value: int, path: Path) -> None:
    """Refuse before decoding what would fill the memory (a damaged header, a decompression bomb, a whole slide)."""
    size = math.prod(int(n) for n in shape) * bytes_per_value
    if size > MAX_DECODED_BYTES or min(shape) < 1:
        raise FileError(
            path,
            f"claims {' x '.join(map(str, shape))} values ({size / 2**30:.3g} GiB), at least one and at most "
            f"{MAX_DECODED_BYTES / 2**30:g} GiB are read: cut it into tiles",
        )


def _size(array: np.ndarray) -> str:
    """Width x height, as image viewers say it. (H, W), (K, H, W) by :func:`read_mask`."""
    return f"{array.shape[-1]} x {array.shape[-2]}"


def image_suffix(channels: int, dtype: np.dtype | type) -> str:
    """Suffix of the file that :func:`encode_image` makes: PNG where it holds such an image, else TIFF."""
    return ".png" if channels in (1, 3) and dtype in (np.uint8, np.uint16) else ".tif"


def encode_image(image: np.ndarray) -> bytes:
    """An image as file content, every value kept; the same bytes for the same image.

    Gray and RGB of 8 or 16 bits become PNG, all else TIFF: one plane per channel (axes CYX), as Fiji and Cellpose
    expect fluorescence.

    Args:
        image: (H, W, C) of any dtype that :func:`read_image` returns.
    """
    if image_suffix(image.shape[2], image.dtype) == ".png":
        return imagecodecs.png_encode(np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0]))
    return encode_tiff(image)


def encode_tiff(image: np.ndarray, planes: bool = True) -> bytes:
    """(H, W, C) or (H, W) as TIFF, compressed.

    Three channels of whole numbers are RGB. Others become one plane per channel (axes CYX), or, without ``planes``,
    stay the last axis.
    """
    buffer = io.BytesIO()
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype.kind == "u":
        tifffile.imwrite(buffer, image, photometric="rgb", compression="zlib")
    elif image.ndim == 2 or image.shape[2] == 1:
        plane = image.reshape(image.shape[:2])
        tifffile.imwrite(buffer, plane, photometric="minisblack", compression="zlib")
    elif planes:
        stack = np.ascontiguousarray(image.transpose(2, 0, 1))
        tifffile.imwrite(buffer, stack, photometric="minisblack", compression="zlib", metadata={"axes": "CYX"})
    else:
        tifffile.imwrite(buffer, image, photometric="minisblack", planarconfig="contig", compression="zlib")
    return buffer.getvalue()
