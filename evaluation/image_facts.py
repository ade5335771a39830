"""Facts of one image file to compare it with others: size, kind, gray values, and a small gray version."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.agreement import SIGNATURE_SIDE, gray_checksum, is_flat, signature
from dataset.files import Pair, read_image, read_image_and_kind
from dataset.gray import channel_shares, is_burnt_in, robust_maximum
from dataset.scale import pixel_size

logger = logging.getLogger(__name__)
BLOCK = 512  # images compared with all others at once: bounds the memory
NEAR_DUPLICATE = 0.99  # least correlation of two duplicates, reduced to SIGNATURE_SIDE x SIGNATURE_SIDE pixels
# Uneven illumination makes different fields of one microscope correlate. So what remains without a smooth surface must
# correlate, too: below 0.25 for different fields, above 0.75 for weak cells and their JPEG of quality 50.
NEAR_DETAIL = 0.4
SURFACE_DEGREE = 4  # of the polynomial that is this surface
LEAST_DETAIL = 1e-3  # length of what remains, below which it is rounding


@dataclass(frozen=True)
class ImageFacts:
    """Facts of one image file."""

    name: str
    height: int
    width: int
    channels: int
    dtype: str
    minimum: float
    maximum: float
    bright: float  # without hot pixels
    is_gray: bool  # one channel, or RGB of equal channels
    has_channels: bool  # the file says that its channels are not colours
    channel_shares: tuple[float, ...]
    digest: str
    is_flat: bool  # consists of pieces of one gray value, as a mask does
    gray_checksum: int
    is_burnt_in: bool  # a scale bar or text was drawn into it
    pixel_um: float | None  # width of a pixel, if the file says it
    signature: np.ndarray = field(repr=False)  # (SIGNATURE_SIDE ** 2,) float32, zero mean, unit length, or all 0


class Shown(NamedTuple):
    """What tells whether two images show the same: less than :class:`ImageFacts`, and quicker to find."""

    name: str
    digest: str
    signature: np.ndarray

    @classmethod
    def of(cls, name: str, image: np.ndarray) -> Shown:
        """Of an image (H, W, C)."""
        return cls(name, _digest(image), signature(image))


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(f"{image.shape} {image.dtype}".encode() + image.tobytes()).hexdigest()


def image_facts(path: Path) -> ImageFacts:
    """Read one image. Raises FileError if it cannot be read."""
    image, has_channels = read_image_and_kind(path)
    height, width, channels = image.shape
    return ImageFacts(
        name=path.name,
        height=height,
        width=width,
        channels=channels,
        dtype=str(image.dtype),
        minimum=float(image.min()),
        maximum=float(image.max()),
        bright=robust_maximum(image),
        is_gray=channels in (1, 3) and bool((image == image[:, :, :1]).all()),
        has_channels=has_channels,
        channel_shares=channel_shares(image),
        digest=_digest(image),
        is_flat=is_flat(image),
        gray_checksum=gray_checksum(image),
        pixel_um=pixel_size(path),
        is_burnt_in=is_burnt_in(image),
        signature=signature(image),
    )


def with_own_names(facts: Mapping[Path, ImageFacts], files: Mapping[str, Path]) -> dict[Path, ImageFacts]:
    """The same facts; files of one name, as in a folder per image, are named by the keys of ``files``."""
    often = Counter(path.name for path in files.values())
    names = {path: name if often[path.name] > 1 else path.name for name, path in files.items()}
    return {path: replace(one, name=names[path]) for path, one in facts.items()}


def near_duplicates(facts: Sequence[ImageFacts | Shown]) -> list[tuple[str, str, float]]:
    """Pairs of images with the same content, whatever their size, brightness and compression.

    n images that show the same give n - 1 pairs that join them, not all pairs.

    Returns:
        (name, other name, correlation), highest first. 1.0 means equal pixels.
    """
    if not facts:
        return []
    found, groups = [], np.arange(len(facts))

    def join(first: int, second: int, correlation: float) -> None:
        groups[groups == groups[second]] = groups[first]
        found.append((facts[first].name, facts[second].name, round(correlation, 4)))

    by_digest: dict[str, int] = {}
    for number, one in enumerate(facts):
        if (earlier := by_digest.setdefault(one.digest, number)) != number:
            join(earlier, number, 1.0)
    views = _views(facts)
    for start in range(0, len(facts), BLOCK):
        table = _correlations(views[:, start : start + BLOCK], views[:, : start + BLOCK])
        for number, values in enumerate(table, start):
            near = np.flatnonzero(values[:number])
            while len(near := near[groups[near] != groups[number]]):
                nearest = int(near[values[near].argmax()])
                join(nearest, number, float(values[nearest]))
    return sorted(found, key=lambda entry: (-entry[2], entry[0], entry[1]))


def shown_among(images: Sequence[ImageFacts | Shown], others: Sequence[ImageFacts | Shown]) -> list[bool]:
    """Whether each image shows (nearly) the same as one of the others."""
    if not others:
        return [False] * len(images)
    digests, views = {one.digest for one in others}, _views(others)
    found: list[bool] = []
    for start in range(0, len(images), BLOCK):
        part = images[start : start + BLOCK]
        near = _correlations(_views(part), views).max(axis=1) > 0
        found += [bool(alike) or one.digest in digests for alike, one in zip(near, part, strict=True)]
    return found


def _views(images: Sequence[ImageFacts | Shown]) -> np.ndarray:
    """(2, n, D): signatures (n, D), and what remains of them without a smooth surface, of unit length or 0."""
    whole = np.stack([one.signature for one in images])
    surfaces = _surfaces()
    details = whole - (whole @ surfaces) @ surfaces.T
    lengths = np.linalg.norm(details, axis=1, keepdims=True)
    return np.stack([whole, np.where(lengths > LEAST_DETAIL, details / np.maximum(lengths, LEAST_DETAIL), 0)])


@functools.cache
def _surfaces() -> np.ndarray:
    """(SIGNATURE_SIDE ** 2, k) orthonormal polynomials in x and y."""
    y, x = np.mgrid[-1 : 1 : SIGNATURE_SIDE * 1j, -1 : 1 : SIGNATURE_SIDE * 1j]
    degrees = range(SURFACE_DEGREE + 1)
    terms = [(x**i * y**j).ravel() for i in degrees for j in degrees if i + j <= SURFACE_DEGREE]
    return np.linalg.qr(np.stack(terms, axis=1))[0].astype(np.float32)


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, m) correlations of two sets of :func:`_views`; 0 if they do not show the same."""
    table = first[0] @ second[0].T
    table[table < NEAR_DUPLICATE] = 0
    table[first[1] @ second[1].T < NEAR_DETAIL] = 0
    return table


def group_alike(images: Sequence[Shown]) -> list[list[str]]:
    """Names in groups that show nearly the same."""
    group = {one.name: [one.name] for one in images}
    for first, second, _ in near_duplicates(images):
        one, other = group[first], group[second]
        if one is not other:
            one += other
            for name in other:
                group[name] = one
    return list({id(names): names for names in group.values()}.values())


def group_near_duplicates(pairs: Sequence[Pair]) -> list[list[str]]:
    """Names of pairs in groups whose images show nearly the same."""
    return group_alike([Shown.of(pair.name, read_image(pair.image_path)) for pair in pairs])


def groups_to_divide(groups: list[list[str]]) -> list[list[str]]:
    """The groups; a single one is divided, since nothing could be held out otherwise."""
    if len(groups) > 1 or not groups:
        return groups
    names = groups[0]
    if len(names) > 1:
        logger.warning("all %d images show nearly the same, so scores on held-out ones are too good", len(names))
    return [[name] for name in names]
