"""Read image and mask files as they are stored, pair them by name, and write images.

Everything that touches a user's file lies here. A file is read to a numpy array with its own gray values, or refused
with a :class:`FileError` that says what is wrong and how to mend it: no other exception leaves this module, and no file
can run code or fill the memory. What the values of masks mean is decided in ``masks.py``.
"""

from __future__ import annotations

import io
import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from common.cells import count_pieces
from common.errors import InputError, list_some
from dataset.decode import CHANNELS, JPEG_START, LAST_AXIS, MOST_LAST, PNG_START, FileError, decode
from dataset.folder_hints import (
    BY_PRODUCTS,
    Listing,
    files_in,
    leads_up,
    list_folder,
    what_instead,
)
from dataset.names import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    is_split,
    name_hints,
    name_of,
    odd_names,
    partners,
    split_together,
    without_masks,
)

logger = logging.getLogger(__name__)
MAX_NUCLEI_OVERLAP = 0.2  # share of the pixels that two nuclei of one image may both claim
NUCLEI = ".one-file-per-nucleus"  # written beside folders of nuclei that a part of a data set is left with
_FLOWS_ENDING = "_flows"
TWO_FORMS = " (they look alike: the accents are stored in two forms, NFC and NFD)"


@dataclass(frozen=True)
class Pair:
    """An image and its mask. ``mask_path`` is a folder where a mask is stored as one file per nucleus."""

    name: str
    image_path: Path
    mask_path: Path


# ---------------------------------------------------------------------------------------------------- find and pair


def find_files(folder: str | Path, what: str, listing: Listing | None = None) -> dict[str, Path]:
    """Image or mask files of one folder, by stem; hidden files and by-products of Cellpose are left out.

    A folder without files may hold one folder per image instead, as the 2018 Data Science Bowl does:
    ``NAME/images/*.png`` (one file) and ``NAME/masks/*.png`` (one file per nucleus), or ``NAME/*.png`` for masks. A
    mask is then a folder, unless all of these folders hold a single file.

    Args:
        folder: where to look; nothing below it is searched except in the layout above.
        what: what is looked for, for messages. All but "image" may be .npy and .npz or in folders of nuclei, too.
        listing: names in the folder, if they were read already.

    Returns:
        stem -> path, sorted by stem. ``NAME.ome.tif`` has the stem ``NAME``.

    Raises:
        InputError: no such folder, no files in it, or two files with one stem.
    """
    folder = Path(folder)
    suffixes = IMAGE_SUFFIXES if what.startswith("image") else MASK_SUFFIXES
    listing = listing or list_folder(folder, what)
    found: dict[str, Path] = {}
    twice, others, by_products = [], [], []
    for name in sorted((*listing.files, *listing.folders)):
        stem, dot, suffix = name.rpartition(".")
        if not stem or dot + suffix.lower() not in suffixes:
            others.append(name)
        elif BY_PRODUCTS.search(name):
            by_products.append(name)
        else:
            stem = name_of(name)
            if stem in found:
                alike = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", found[stem].name)
                twice.append(f"{found[stem].name} and {name}{TWO_FORMS if alike else ''}")
            found[stem] = folder / name
    odd = odd_names((*found, *others))
    if odd:  # they end in tables, in messages and on a terminal
        raise FileError(folder, odd)
    if twice:
        raise FileError(
            folder, f"has two {what} files with one name: {list_some(twice)}. Keep one of each; if one is the mask of "
            "the other, move the masks into a folder of their own",
        )  # fmt: skip
    if not found:
        found = _find_one_folder_per_image(folder, others, is_image=what.startswith("image"))
    if not found:
        raise FileError(folder, f"holds no {what} files{what_instead(folder, what, others, by_products, suffixes)}")
    flows = {stem for stem in found if stem.endswith(_FLOWS_ENDING) and stem.removesuffix(_FLOWS_ENDING) in found}
    return {stem: path for stem, path in sorted(found.items()) if stem not in flows}


def find_images(folder: str | Path, listing: Listing | None = None) -> dict[str, Path]:
    """:func:`find_files` of images alone: masks that lie beside their images are none."""
    found = find_files(folder, "image", listing)
    if any(path.parent != Path(folder) for path in found.values()):  # a folder per image
        return found
    images = without_masks(found)
    masks = [stem for stem in found if stem not in images]
    if masks:
        logger.info("%s: %d files are masks beside their images, not images: %s", folder, len(masks), list_some(masks))
    return images


def _find_one_folder_per_image(folder: Path, names: Iterable[str], is_image: bool) -> dict[str, Path]:
    """The layout ``NAME/images/FILE`` and ``NAME/masks/FILES``: NAME -> image file or folder of masks.

    If each folder of masks has a single file, these are the masks of whole images, and not of nuclei, unless the folder
    holds the file ``NUCLEI``.
    """
    found, closed = {}, []
    for name in (name for name in names if not leads_up(folder / name)):
        if (folder / name).is_dir() and not os.access(folder / name, os.R_OK | os.X_OK):
            closed.append(name)
            continue
        kinds = ("images", "image") if is_image else ("masks", "mask")
        inner = next((path for kind in kinds if (path := folder / name / kind).is_dir()), None)
        if inner is not None:
            files = files_in(inner)
            if is_image and len(files) != 1:
                raise FileError(
                    inner, f"holds {len(files)} images, but one is expected in a folder per image. To read all of "
                    f"them, give {inner} itself",
                )  # fmt: skip
            found[name] = files[0] if is_image else inner
        elif not is_image and name not in ("images", "masks") and (folder / name).is_dir() and files_in(folder / name):
            found[name] = folder / name
    if found and closed:
        raise FileError(folder, f"has folders that may not be read: {list_some(closed)}. Move them, or get permission")
    splits = [name for name, path in found.items() if path == folder / name and is_split(name)]
    if splits and len(splits) == len(found):
        first = min(splits, key=lambda name: not name.lower().startswith("train"))
        raise FileError(
            folder, f"holds the folders {', '.join(splits)}, whose files are masks of whole images: give one of them, "
            f"{folder / first}",
        )  # fmt: skip
    nuclei = {} if is_image else {name: files_in(path) for name, path in found.items()}
    of_labelme = [name for name, files in nuclei.items() if {"img.png", "label.png"} <= {file.name for file in files}]
    if of_labelme:
        raise FileError(
            folder, f"holds folders of labelme_json_to_dataset (as {of_labelme[0]}): give the .json files to "
            "make_masks.py convert",
        )  # fmt: skip
    if all(len(files) == 1 for files in nuclei.values()) and not (folder / NUCLEI).is_file():
        found |= {name: files[0] for name, files in nuclei.items()}
    return found


def mark_nuclei(folder: Path) -> None:
    """Note in a part that its folders of masks hold nuclei, also if each image of the part has a single nucleus."""
    for kind in ("masks", "instances"):
        if (folder / kind).is_dir() and any(path.is_dir() for path in (folder / kind).iterdir()):
            (folder / kind / NUCLEI).touch()


def match_names(images: dict[str, Path], masks: dict[str, Path]) -> tuple[list[Pair], list[str], list[str]]:
    """Pair files by their stems, see :func:`dataset.names.partners`.

    Returns:
        pairs sorted by name, stems of images without mask, stems of masks without image. Masks beside the images need
        no mask.
    """
    pairs, lonely_images, lonely_masks = partners(images, masks)
    if lonely_images:
        known = without_masks(images)
        lonely_images = [stem for stem in lonely_images if stem in known]
    return [Pair(name, images[a], masks[b]) for name, (a, b) in sorted(pairs.items())], lonely_images, lonely_masks


def list_folders(image_dir: str | Path, mask_dir: str | Path) -> tuple[Listing, Listing]:
    """Names in a folder of images and in one of masks."""
    return list_folder(image_dir, "image"), list_folder(mask_dir, "mask")


def find_images_and_masks(
    image_dir: str | Path, mask_dir: str | Path, listings: Sequence[Listing | None] = (None, None)
) -> tuple[dict[str, Path], dict[str, Path]]:
    """:func:`find_files` of both folders; one folder for both is split by the words in the names."""
    images, masks = find_files(image_dir, "image", listings[0]), find_files(mask_dir, "mask", listings[1])
    first = next(iter(masks.values()))
    together = Path(image_dir).samefile(mask_dir) and first.is_file() and first.parent == Path(mask_dir)
    if together:
        image_stems, mask_stems = split_together({*images, *masks})
        images = {stem: path for stem, path in images.items() if stem in image_stems}
        masks = {stem: path for stem, path in masks.items() if stem in mask_stems}
        if not images or not masks:
            raise InputError(
                f"{image_dir} is given for images and masks: then the masks' names must end with _masks, _mask or "
                "_cp_masks, or have a word such as label or seg" + _seg_hint(Path(image_dir))
            )
    return images, masks


def _seg_hint(folder: Path) -> str:
    segs = sum(path.name.endswith("_seg.npy") for path in folder.iterdir())
    return f"; {segs} _seg.npy of Cellpose are no masks yet: make_masks.py convert makes label images" if segs else ""


def pair_files(
    image_dir: str | Path, mask_dir: str | Path, listings: Sequence[Listing | None] = (None, None)
) -> list[Pair]:
    """Every image with its mask, by name over mixed suffixes.

    Args:
        image_dir: folder of images.
        mask_dir: folder of masks.
        listings: names in the two folders, if they were read already.

    Returns:
        pairs sorted by name.

    Raises:
        InputError: a file without partner (all of them in one message), a missing or empty folder.
    """
    images, masks = find_images_and_masks(image_dir, mask_dir, listings)
    pairs, lonely_images, lonely_masks = match_names(images, masks)
    faults = []
    if lonely_images:
        count = f"{len(lonely_images)} of {len(images)} images in {image_dir}"
        faults.append(f"{count} have no mask in {mask_dir}: {list_some(lonely_images)}")
    if lonely_masks:
        count = f"{len(lonely_masks)} of {len(masks)} masks in {mask_dir}"
        faults.append(f"{count} have no image in {image_dir}: {list_some(lonely_masks)}")
    faults += name_hints(lonely_images, lonely_masks, [pair.name for pair in pairs])
    if faults:
        raise InputError(
            f"{'; '.join(faults)}. A mask has its image's name, alone or with a word such as _masks, _label or _seg, "
            "and any suffix of " + " ".join(MASK_SUFFIXES)
        )
    return pairs


def labels_of_images(images: Iterable[Path], image_dir: str | Path, label_dir: str | Path) -> dict[Path, Path]:
    """Label files of images that have a mask in another folder: image file -> label file, matched as masks are.

    Args:
        images: those files of ``image_dir`` that need one.
        label_dir: folder of label images, which may be ``image_dir`` itself.

    Raises:
        InputError: an image has none (all of them in one message).
    """
    wanted = set(images)
    found, labels = find_images_and_masks(image_dir, label_dir)
    pairs, without, _ = match_names({stem: path for stem, path in found.items() if path in wanted}, labels)
    if without:
        raise InputError(f"{len(without)} images of {image_dir} have no file in {label_dir}: {list_some(without)}")
    return {pair.image_path: pair.mask_path for pair in pairs}


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
    return read_image_and_kind(path)[0]


def read_image_and_kind(path: str | Path) -> tuple[np.ndarray, bool]:
    """:func:`read_image`, and whether the file says that its channels are no colours, as a TIFF of axes CYX does."""
    array, kind = decode(Path(path), as_mask=False)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return _checked(np.ascontiguousarray(array), path), kind == CHANNELS


def read_size(path: str | Path) -> tuple[int, int] | None:
    """(H, W) by the header alone, for a quick look at many files; None where only decoding can tell."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            return None
        with Path(path).open("rb") as file:
            start = file.read(24)
            if start.startswith(PNG_START) and start[12:16] == b"IHDR":
                return int.from_bytes(start[20:24]), int.from_bytes(start[16:20])
            if start.startswith(JPEG_START):
                file.seek(0)
                with Image.open(file, formats=["JPEG"]) as image:
                    return image.height, image.width
    except Exception:  # noqa: BLE001 - what is wrong with the file is said when it is decoded
        return None
    return None


def read_mask(path: str | Path) -> np.ndarray:
    """One mask with its stored values.

    A file with a colour table is read as its gray values if all of the table is gray, else as its numbers (as PASCAL
    VOC stores class ids). RGB is read only if the three channels are equal. A folder is read as one nucleus per file:
    ids 1..n in the order of the names, the first one keeps a pixel that two claim. ``.npy``, ``.npz`` and float TIFF
    may hold a stack (K, H, W).

    Returns:
        (H, W), or (K, H, W) for a stack of class probabilities; bool becomes 0 and 1.

    Raises:
        FileError: as :func:`read_image`; colours; a stack of integer planes.
    """
    return read_mask_and_table(path)[0]


def read_mask_and_table(path: str | Path) -> tuple[np.ndarray, str]:
    """:func:`read_mask`, and its colour table, if one says what the stored numbers are: see :func:`decode.decode`."""
    path = Path(path)
    if path.is_dir():
        return _read_nuclei(path), ""
    array, table = decode(path, as_mask=True)
    if array.ndim == 3 and len(array) == 1:  # a flat mask with an axis too many, as networks give it
        array = array[0]
    is_array = path.suffix.lower() in (".npy", ".npz")
    if array.ndim == 3 and not is_array and array.dtype.kind != "f":
        array = _gray_channel(array, path)
    if is_array and array.ndim == 3 and array.shape[2] <= MOST_LAST < min(array.shape[:2]):
        raise FileError(path, LAST_AXIS)
    return _checked(np.ascontiguousarray(array), path), table


def _read_nuclei(folder: Path) -> np.ndarray:
    files = files_in(folder)
    if not files:
        raise FileError(folder, "is a folder without masks of nuclei")
    claimed = many_pieces = inverted = 0
    for index, file in enumerate(files, start=1):
        nucleus = _read_nucleus(file)
        if index == 1:
            instance_map = np.zeros(nucleus.shape, np.uint16 if len(files) < 2**16 else np.int32)
        if nucleus.shape != instance_map.shape:
            raise FileError(file, f"has {_size(nucleus)} pixels, {files[0].name} beside it {_size(instance_map)}")
        claimed += int(np.count_nonzero(nucleus))
        many_pieces += count_pieces(nucleus) > 2
        inverted += bool(nucleus.mean() > 0.5 and nucleus[[0, -1]].mean() > 0.9 and nucleus[:, [0, -1]].mean() > 0.9)
        instance_map[nucleus & (instance_map == 0)] = index
    if 2 * inverted > len(files) > 1:
        raise FileError(folder, "holds nuclei that are black on white: background must be 0")
    overlap = claimed - np.count_nonzero(instance_map)
    if 2 * many_pieces > len(files) or overlap > MAX_NUCLEI_OVERLAP * claimed:
        raise FileError(
            folder, "holds masks of whole images, not one file per nucleus: give this folder itself, or put all such "
            "folders into one with make_masks.py groups",
        )  # fmt: skip
    return instance_map


def _read_nucleus(file: Path) -> np.ndarray:
    """The mask of one nucleus: (H, W) bool."""
    nucleus = read_mask(file)
    if nucleus.ndim != 2:
        raise FileError(file, "is no flat mask of one nucleus")
    values = np.unique(nucleus)
    if len(values) > 2 and file.suffix.lower() in (".jpg", ".jpeg"):
        raise FileError(file, "is a JPEG, which blurs the edges: export the masks of nuclei anew as PNG or TIFF")
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise FileError(
            file, "is no mask of one nucleus. If it is the mask of a whole image, give its folder",
            f"{file.parent}; gray values {list_some(values.tolist())}",
        )  # fmt: skip
    return nucleus > 0


def _gray_channel(array: np.ndarray, path: Path) -> np.ndarray:
    """The one channel of a mask stored as gray + alpha, RGB or RGBA with equal colours."""
    colours, alpha = (array[:, :, :-1], array[:, :, -1:]) if array.shape[2] in (2, 4) else (array, None)
    if alpha is not None and (alpha != np.iinfo(array.dtype).max).any():
        if (colours == colours[:1, :1]).all():
            raise FileError(
                path, "has one colour and holds the mask in its transparency: save its alpha channel as gray"
            )
        raise FileError(path, "is partly transparent: save the mask as gray without alpha channel")
    if (colours != colours[:, :, :1]).any():
        raise FileError(
            path, "holds colours: save the mask as one gray channel of class or instance numbers, or let "
            "make_masks.py convert turn colours into numbers",
        )  # fmt: skip
    return colours[:, :, 0]


def _checked(array: np.ndarray, path: str | Path) -> np.ndarray:
    if array.dtype.kind not in "uif" or array.size == 0 or array.dtype.itemsize > 8:
        raise FileError(path, f"holds {array.dtype} values: save it as 8-bit, 16-bit or float gray values")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FileError(path, "holds NaN or infinite values: replace them")
    return array


def _size(array: np.ndarray) -> str:
    """Width x height, as image viewers say it. (H, W), (K, H, W) by :func:`read_mask`."""
    return f"{array.shape[-1]} x {array.shape[-2]}"


def image_suffix(channels: int, dtype: np.dtype | type, colours: bool = True) -> str:
    """Suffix of the file that :func:`encode_image` makes: PNG if it holds such an image, else TIFF."""
    plain = channels == 1 or (channels == 3 and colours)
    return ".png" if plain and dtype in (np.uint8, np.uint16) else ".tif"


def encode_image(image: np.ndarray, colours: bool = True) -> bytes:
    """An image as file content, every value kept; the same bytes for the same image.

    Gray and RGB of 8 or 16 bits become PNG, all else TIFF: one plane per channel (axes CYX), as Fiji and Cellpose
    expect fluorescence.

    Args:
        image: (H, W, C) of any dtype that :func:`read_image` returns.
        colours: whether three channels are RGB.
    """
    if image_suffix(image.shape[2], image.dtype, colours) == ".png":
        return bytes(imagecodecs.png_encode(np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0])))
    return encode_tiff(image, colours=colours)


def encode_tiff(image: np.ndarray, planes: bool = True, colours: bool = True, pixel_um: float | None = None) -> bytes:
    """(H, W, C) or (H, W) as TIFF, compressed.

    With ``colours``, three channels are RGB. Others become one plane per channel (axes CYX), or, without ``planes``,
    stay the last axis. ``pixel_um`` is the width of a pixel in micrometres, if it is known.
    """
    buffer = io.BytesIO()
    known: dict[str, Any] = (
        {} if pixel_um is None else {"resolution": (1e4 / pixel_um,) * 2, "resolutionunit": "CENTIMETER"}
    )
    if colours and image.ndim == 3 and image.shape[2] == 3:
        tifffile.imwrite(buffer, image, photometric="rgb", compression="zlib", **known)
    elif image.ndim == 2 or image.shape[2] == 1:
        plane = image.reshape(image.shape[:2])
        tifffile.imwrite(buffer, plane, photometric="minisblack", compression="zlib", **known)
    elif planes:
        stack = np.ascontiguousarray(image.transpose(2, 0, 1))
        tifffile.imwrite(buffer, stack, photometric="minisblack", compression="zlib", metadata={"axes": "CYX"}, **known)
    else:
        tifffile.imwrite(buffer, image, photometric="minisblack", planarconfig="contig", compression="zlib", **known)
    return buffer.getvalue()
