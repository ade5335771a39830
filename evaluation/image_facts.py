"""Facts of one image file to compare it with others: size, kind, gray values, and a small gray version."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.agreement import gray_checksum, is_flat, signature
from dataset.files import Pair, read_image, read_image_and_kind
from dataset.gray import channel_shares, is_burnt_in, robust_maximum
from dataset.scale import pixel_size

logger = logging.getLogger(__name__)
BLOCK = 1024  # images compared with all others at once: bounds the memory
NEAR_DUPLICATE = 0.99  # least correlation of two duplicates, reduced to SIGNATURE_SIDE x SIGNATURE_SIDE pixels


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
    signatures = np.stack([one.signature for one in facts])
    for start in range(0, len(facts), BLOCK):
        part = signatures[start : start + BLOCK]
        for number, values in enumerate(part @ signatures[: start + BLOCK].T, start):
            near = np.flatnonzero(values[:number] >= NEAR_DUPLICATE)
            while len(near := near[groups[near] != groups[number]]):
                nearest = int(near[values[near].argmax()])
                join(nearest, number, float(values[nearest]))
    return sorted(found, key=lambda entry: (-entry[2], entry[0], entry[1]))


def shown_among(images: Sequence[ImageFacts | Shown], others: Sequence[ImageFacts | Shown]) -> list[bool]:
    """Whether each image shows (nearly) the same as one of the others."""
    if not others:
        return [False] * len(images)
    digests, signatures = {one.digest for one in others}, np.stack([one.signature for one in others])
    found: list[bool] = []
    for start in range(0, len(images), BLOCK):
        part = images[start : start + BLOCK]
        near = (np.stack([one.signature for one in part]) @ signatures.T >= NEAR_DUPLICATE).any(axis=1)
        found += [bool(alike) or one.digest in digests for alike, one in zip(near, part, strict=True)]
    return found


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
