"""Whether masks lie where the cells of their images are: small versions of both are compared, without a model.

An image in which cells are brighter than the rest correlates with its mask, and one in which they are darker correlates
negatively. A set in which both occur, or in which a mask fits better if it is turned, or fits another image better, is
shown to a person. Nothing is refused: two kinds of microscopy in one set are common.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import InputError
from dataset.mask_facts import certainty
from dataset.views import SYMMETRIES, turn

SIGNATURE_SIDE = 32
MOST_PAIRS = 512  # compared with each other, spread over the set
CLEAR = 0.3  # correlation of image and mask above which cells are clearly brighter or darker
CLOSE = 0.5  # correlation above which a turned mask, or that of another image, fits
BETTER = 0.5  # of this correlation: the mask as it is must fit less well than that
MOSTLY_FLAT = 0.9  # of the pixels of pieces have the value of their neighbour; in images of a microscope, noise is seen
MOST_PIXELS = 2**18  # of an image that are looked at for this
_MIX = np.array([1, 3.1, 9.7, 29.3, 88.1])  # makes one number of the channels of a pixel
LEAST, SOME = 3, 0.05  # pairs, and fraction of the pairs, for a warning about turned and swapped masks


def signature(image: np.ndarray) -> np.ndarray:
    """Small gray version of an image, zero mean and unit length, so that a dot product is a correlation.

    Args:
        image: (H, W, C) of any type.

    Returns:
        (SIGNATURE_SIDE ** 2,) float32; all 0 for an image of one gray value.
    """
    gray = torch.from_numpy(image.mean(axis=-1, dtype=np.float32))[None, None]
    small = F.adaptive_avg_pool2d(gray, SIGNATURE_SIDE)[0, 0].numpy().ravel().astype(np.float64)
    small -= small.mean()
    length = np.linalg.norm(small)
    scale = max(1.0, abs(float(image.max())))
    return (small / length if length > 1e-4 * scale else np.zeros_like(small)).astype(np.float32)


def mask_signature(mask: np.ndarray) -> np.ndarray:
    """:func:`signature` of the cells of a mask (H, W), or (K, H, W) with the background in plane 0."""
    cells = mask > 0 if mask.ndim == 2 else 1 - mask[0] / certainty(mask.dtype, float(mask.max()))
    return signature(cells.astype(np.float32)[:, :, None])


def is_flat(image: np.ndarray) -> bool:
    """Whether an image consists of pieces of one gray value or colour, as a mask does.

    Pixels of the most frequent value do not count, because the background of an image may be saturated.

    Args:
        image: (H, W, C) of any type. The middle rows are looked at, at most :data:`MOST_PIXELS`.
    """
    rows = min(len(image), max(1, MOST_PIXELS // image.shape[1]))
    part = image[(len(image) - rows) // 2 :, :, : len(_MIX)][:rows]
    code = part.astype(np.float64) @ _MIX[: part.shape[2]]
    values, counts = np.unique(code.ravel()[:: max(1, code.size // 2**14)], return_counts=True)
    inside = code != values[counts.argmax()]
    both = inside[:, 1:] & inside[:, :-1]
    return bool(both.any() and (code[:, 1:] == code[:, :-1])[both].mean() > MOSTLY_FLAT)


def gray_checksum(image: np.ndarray) -> int:
    """Checksum of a gray image (H, W, C), as ``MaskStats`` has one of a mask. 0 if it has colours or one value only."""
    gray = image[:, :, 0]
    is_gray = image.shape[2] in (1, 3) and (image == image[:, :, :1]).all() and (gray != gray[0, 0]).any()
    return zlib.crc32(np.ascontiguousarray(gray).data) if is_gray else 0


def refuse_masks_as_images(equal: Sequence[bool], image_dir: str | Path, mask_dir: str | Path) -> None:
    """Refuse a set in which most images are their own masks.

    Args:
        equal: whether an image equals its mask, pixel by pixel, for each pair.
        image_dir: folder of images, for the message.
        mask_dir: folder of masks.

    Raises:
        InputError: more than half of the images do.
    """
    if 2 * sum(equal) > len(equal):
        raise InputError(
            f"{sum(equal)} of {len(equal)} images in {image_dir} equal their masks in {mask_dir}, pixel by pixel: give "
            "the folder of the images as `data_path`"
        )  # fmt: skip


def flat_warning(names: Sequence[str], flat: Sequence[bool]) -> list[str]:
    """A warning if most images look like masks, see :func:`is_flat`."""
    found = [name for name, one in zip(names, flat, strict=True) if one]
    if 2 * len(found) <= len(names):
        return []
    return [
        f"{len(found)} of {len(names)} images consist of pieces of one gray value, as masks do (as {found[0]}): are "
        "the folders of images and masks swapped, or were masks given as images?"
    ]


def agreement_warnings(names: Sequence[str], images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[str]:
    """Warnings about pairs that may not belong together.

    Args:
        images: :func:`signature` of each image.
        masks: :func:`mask_signature` of each mask.
    """
    if not names:
        return []
    image_table, mask_table = np.stack(images), np.stack(masks)
    own = (image_table * mask_table).sum(axis=1)
    warnings = []
    if len(names) > 2 and (image_table == image_table[0]).all() and image_table.any():
        warnings.append(f"all {len(names)} images are equal: was one file copied under every name?")
    bright, dark = np.flatnonzero(own > CLEAR), np.flatnonzero(own < -CLEAR)
    if len(bright) and len(dark):
        fewer, word = (bright, "brighter") if len(bright) < len(dark) else (dark, "darker")
        warnings.append(
            f"in {len(fewer)} of {len(names)} pairs, the cells are {word} than the rest of the image (as in "
            f"{names[fewer[0]]}), in others it is the other way round: images or masks are inverted, or these "
            "are two kinds of microscopy, which need look=reference in training"
        )
    return warnings + _turned(names, image_table, mask_table, own) + _swapped(names, image_table, mask_table, own)


def _turned(names: Sequence[str], images: np.ndarray, masks: np.ndarray, own: np.ndarray) -> list[str]:
    """A warning if masks fit only when they are turned or mirrored, all in one way."""
    squares = masks.reshape(-1, SIGNATURE_SIDE, SIGNATURE_SIDE)
    turned = [turn(squares, (1, 2), symmetry).reshape(len(masks), -1) for symmetry in range(1, SYMMETRIES)]
    fits = np.stack([np.abs((images * one).sum(axis=1)) for one in turned])
    clearly = (fits > CLOSE) & (np.abs(own) < BETTER * fits) & (fits == fits.max(axis=0))
    way = int(clearly.sum(axis=1).argmax())
    found = np.flatnonzero(clearly[way])
    if len(found) < max(LEAST, SOME * len(names)):
        return []
    return [
        f"{len(found)} of {len(names)} masks fit their image only if they are turned or mirrored, all in the same way "
        f"(as in {names[found[0]]}): are rows and columns swapped, or is one of the two upside down?"
    ]


def _swapped(names: Sequence[str], images: np.ndarray, masks: np.ndarray, own: np.ndarray) -> list[str]:
    """A warning if masks fit other images than their own."""
    fits = np.abs(images @ masks.T)
    best = fits.argmax(axis=1)
    fit = fits[np.arange(len(best)), best]
    found = np.flatnonzero((fit > CLOSE) & (np.abs(own) < BETTER * fit))
    if len(found) < max(LEAST, SOME * len(names)):
        return []
    first = found[0]
    return [
        f"{len(found)} of {len(names)} images fit the mask of another image better than their own (as {names[first]}, "
        f"which fits that of {names[best[first]]}): do the names of images and masks belong together?"
    ]
