"""What the gray values of masks mean: decided once per folder, then turned into classes or class probabilities.

:func:`mask_stats` collects facts about each mask, :func:`decide_mask_rule` draws one :class:`MaskRule` from all of
them, :func:`class_map` and :func:`prob_map` apply it. Automatic takes clear cases only and refuses the rest with the
likely types named: a wrong guess would train for hours on nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from common.errors import InputError, list_some

MASK_TYPES = ("auto", "binary", "classes", "probability", "instances")
HARD_TYPES = ("binary", "classes", "instances")
MAX_CLASSES = 255  # class maps are uint8
FEW_VALUES = 16
SUM_TOLERANCE = 0.01
# A mask of numbered cells is piecewise constant, an id is one piece apart from crumbs, and there are too many ids for
# classes. Measured: see test_thresholds_of_automatic_have_room_on_real_labels.
MIN_IDS = 8
MAX_UNEQUAL_SHARE = 0.2
MAX_SCATTERED_SHARE = 0.2
MAX_STEP_SHARE = 0.9


@dataclass(frozen=True)
class MaskRule:
    """What the masks of one folder hold, decided once for the folder.

    Attributes:
        mask_type: one of :data:`MASK_TYPES`, never "auto".
        num_classes: K.
        maximum: gray value that means "cell for sure" (binary and probability; 1 otherwise).
        reason: one sentence for the log.
        normalize: divide soft maps by their sum instead of refusing those that do not sum to one.
    """

    mask_type: str
    num_classes: int
    maximum: float
    reason: str
    normalize: bool = False

    @property
    def is_hard(self) -> bool:
        """Each pixel belongs to one class."""
        return self.mask_type in HARD_TYPES

    @property
    def has_boundary(self) -> bool:
        """Class 2 is the boundary between touching cells, made from the ids of instances."""
        return self.mask_type == "instances" and self.num_classes == 3


@dataclass(frozen=True)
class MaskStats:
    """What the decision needs to know of one mask. Pairs are 4-neighbours that are both above 0."""

    name: str
    dtype: np.dtype
    planes: int  # K of a (K, H, W) stack, 0 for a flat mask
    from_folder: bool  # one file per nucleus
    is_whole: bool  # no fractions
    minimum: float
    maximum: float
    distinct: int
    values: frozenset[float]  # the distinct values where they are few, else empty
    near_ends: float = 1.0  # share of pixels close to 0 or to the largest value
    sum_error: float = 0.0  # stacks: largest |sum over K - 1|
    pairs: int = 0
    unequal_pairs: int = 0
    step_pairs: int = 0  # unequal pairs of two values that follow each other in the sorted values
    ids: int = 0
    area: int = 0  # pixels above 0
    main_area: int = 0  # pixels in the largest connected piece of each id

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it; what has its default is left out."""
        kept = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}
        return kept | {"dtype": str(self.dtype), "values": sorted(self.values)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> MaskStats:
        """The inverse of :meth:`to_plain`."""
        return cls(**plain | {"dtype": np.dtype(plain["dtype"]), "values": frozenset(plain["values"])})


def mask_stats(name: str, mask: np.ndarray, from_folder: bool = False) -> MaskStats:
    """Facts about one mask.

    Args:
        name: for messages.
        mask: (H, W) or (K, H, W) as ``read_mask`` gives it.
        from_folder: put together from one file per nucleus.
    """
    if mask.dtype in (np.uint8, np.uint16):
        counts = np.bincount(mask.ravel())  # several times faster than np.unique
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(mask, return_counts=True)
    facts: dict[str, Any] = {
        "dtype": mask.dtype,
        "planes": len(mask) if mask.ndim == 3 else 0,
        "is_whole": mask.dtype.kind in "ui" or bool((values == np.round(values)).all()),
        "minimum": float(values[0]),
        "maximum": float(values[-1]),
        "distinct": len(values),
        "values": frozenset(values.tolist()) if len(values) <= FEW_VALUES else frozenset(),
    }
    if mask.ndim == 3:
        total = mask.sum(axis=0, dtype=np.float64) / _certainty(mask.dtype, facts["maximum"])
        facts["sum_error"] = float(np.abs(total - 1).max())
    elif facts["is_whole"] and len(values) > 2 and values[0] >= 0:
        near = facts["maximum"] / 16
        facts["near_ends"] = float(counts[(values <= near) | (values >= 15 * near)].sum() / mask.size)
        facts.update(_label_evidence(mask, values))
    return MaskStats(name=name, from_folder=from_folder, **facts)


def _label_evidence(mask: np.ndarray, values: np.ndarray) -> dict[str, int]:
    """How much a mask looks like numbered cells: see the thresholds at the top of this file."""
    pairs = unequal_pairs = step_pairs = 0
    parted = mask.copy()  # 0 between touching regions, so that connected components are regions of one value
    for first, second, cut in (
        (mask[:, :-1], mask[:, 1:], parted[:, :-1]),
        (mask[:-1], mask[1:], parted[:-1]),
    ):
        both = (first > 0) & (second > 0)
        unequal = both & (first != second)
        ranks = np.searchsorted(values, first[unequal]), np.searchsorted(values, second[unequal])
        pairs += int(np.count_nonzero(both))
        unequal_pairs += int(np.count_nonzero(unequal))
        step_pairs += int(np.count_nonzero(np.abs(ranks[0] - ranks[1]) == 1))
        cut[unequal] = 0
    pieces, _ = scipy.ndimage.label(parted > 0)
    _, first_pixels, areas = np.unique(pieces, return_index=True, return_counts=True)
    id_of_piece = np.searchsorted(values, parted.ravel()[first_pixels])
    main_areas = np.zeros(len(values), np.int64)
    np.maximum.at(main_areas, id_of_piece, areas)
    main_areas = main_areas[values > 0]
    return {
        "pairs": pairs,
        "unequal_pairs": unequal_pairs,
        "step_pairs": step_pairs,
        "ids": len(main_areas),
        "area": int(np.count_nonzero(parted)),
        "main_area": int(main_areas.sum()),
    }


def decide_mask_rule(
    stats: Sequence[MaskStats], num_classes: int, mask_type: str, where: str | Path, normalize: bool = False
) -> MaskRule:
    """Say what the masks of a folder hold, from all of them together.

    Automatic takes the clear cases only:

    - (K, H, W) stacks and fractions in 0..1 are probabilities;
    - one file per nucleus is instances;
    - nothing but 0 and 255 (or 65535 in 16 bits), or 0 and 1, is binary when K = 2;
    - whole numbers below K are class ids when K > 2;
    - whole numbers with at least :data:`MIN_IDS` ids in one file, each of them one piece of constant value but for
      crumbs, are instances when K is 2 or 3.

    Args:
        stats: of every mask, from :func:`mask_stats`.
        num_classes: K.
        mask_type: one of :data:`MASK_TYPES`.
        where: folder or file, for messages.
        normalize: accept soft maps that do not sum to one and divide them by their sum.

    Raises:
        InputError: the values do not fit the type or K, or automatic finds no clear case.
    """
    if mask_type not in MASK_TYPES:
        raise InputError(f"--mask-type {mask_type!r} is unknown; choose one of {', '.join(MASK_TYPES)}")
    if not stats:
        raise InputError(f"{where} holds no masks")
    negative = [one.name for one in stats if one.minimum < 0]
    if negative:
        raise InputError(f"{len(negative)} masks in {where} hold negative values: {list_some(negative)}")
    planes = sorted({one.planes for one in stats})
    if len(planes) > 1:
        kinds = ", ".join(f"stacks of {count}" if count else "flat" for count in planes)
        raise InputError(f"masks in {where} are of different kinds ({kinds}): give each kind its own folder")
    why = "given by --mask-type"
    if mask_type == "auto":
        mask_type, why = _guess_type(stats, num_classes, where)
    maximum = _check_type(stats, num_classes, mask_type, where, normalize)
    meaning = {
        "binary": f"{maximum / 2:g} and above is cell",
        "classes": f"ids 0..{num_classes - 1}",
        "probability": "one plane per class" if planes[0] > 1 else f"value / {maximum:g} is the probability of cell",
        "instances": "0 is background, every id is a cell" + (", class 2 where cells touch" * (num_classes == 3)),
    }[mask_type]
    return MaskRule(mask_type, num_classes, maximum, f"masks are {mask_type}: {meaning} ({why})", normalize)


# ------------------------------------------------------------------------------------------------------- automatic


def _guess_type(stats: Sequence[MaskStats], num_classes: int, where: str | Path) -> tuple[str, str]:
    """The clear cases of :func:`decide_mask_rule`, with the reason."""
    largest = max(one.maximum for one in stats)
    if stats[0].planes:
        return "probability", f"stacks of {stats[0].planes} planes"
    if any(one.from_folder for one in stats):
        return "instances", "one file per nucleus"
    if not all(one.is_whole for one in stats):
        if largest <= 1:
            return "probability", f"fractions up to {largest:g}"
        raise InputError(
            f"masks in {where} hold fractions up to {largest:g}: probabilities lie in 0..1, ids are whole numbers"
        )
    values = _few_values(stats)
    if num_classes == 2 and values is not None:
        full = 65535 if all(one.dtype == np.uint16 for one in stats) else 255
        for top in (1, 255, full):
            if values <= {0, top}:
                return "binary", "only " + " and ".join(f"{value:g}" for value in sorted(values))
    if largest < num_classes:
        return "classes", f"whole numbers up to {largest:g}"
    if num_classes <= 3 and _looks_like_instances(stats):
        return "instances", f"pieces of constant value, up to {max(one.ids for one in stats)} in one mask"
    raise InputError(_why_unclear(stats, num_classes, where))


def _few_values(stats: Sequence[MaskStats]) -> frozenset[float] | None:
    """The distinct values of all masks, None where one mask has many."""
    return frozenset().union(*(one.values for one in stats)) if all(one.values for one in stats) else None


def _looks_like_instances(stats: Sequence[MaskStats]) -> bool:
    pairs = sum(one.pairs for one in stats)
    unequal = sum(one.unequal_pairs for one in stats)
    # Nested rings of a coarse probability map are piecewise constant, too, but there only neighbouring levels touch.
    steps = sum(one.step_pairs for one in stats)
    graded = unequal > 0.02 * pairs and steps > MAX_STEP_SHARE * unequal
    return (
        max(one.ids for one in stats) >= MIN_IDS
        and unequal <= MAX_UNEQUAL_SHARE * pairs
        and sum(one.main_area for one in stats) >= (1 - MAX_SCATTERED_SHARE) * sum(one.area for one in stats)
        and not graded
    )


def _why_unclear(stats: Sequence[MaskStats], num_classes: int, where: str | Path) -> str:
    """The refusal of automatic: what was found, the likely types, the flag that settles it."""
    largest = max(one.maximum for one in stats)
    values = _few_values(stats)
    shown = f"values up to {largest:g}, {max(one.distinct for one in stats)} different ones in one mask"
    if values is not None and len(values) <= 8:
        shown = "the values " + ", ".join(f"{value:g}" for value in sorted(values))
    one_value = values is not None and len(values - {0}) == 1
    scales = values is not None and not one_value and all(len(one.values - {0}) <= 1 for one in stats)
    patchy = sum(one.unequal_pairs for one in stats) <= MAX_UNEQUAL_SHARE * sum(one.pairs for one in stats)
    soft_edges = largest >= 128 and min(one.near_ends for one in stats) > 0.9
    binary = "" if num_classes == 2 else " --num-classes 2"
    likely = []
    if one_value:
        likely.append(f"one class of cells (--mask-type binary{binary})")
    elif scales:
        likely.append("one class of cells, saved with different values (save all with the same two)")
    elif soft_edges:
        likely.append(f"two values with soft or JPEG edges (--mask-type binary{binary}, cut at half)")
    if patchy and not one_value and largest < 2 * FEW_VALUES:
        likely.append(f"class ids (--mask-type classes --num-classes {int(largest) + 1})")
    if patchy and not soft_edges and largest not in (255, 65535):
        count = "" if num_classes <= 3 else " with --num-classes 2 or 3"
        likely.append(f"numbered cells (--mask-type instances{count})")
    if not patchy:
        likely.append(f"gray probabilities (--mask-type probability{binary})")
        likely.append("images instead of masks")
    first = next(one.name for one in stats if one.maximum == largest)
    return (
        f"masks in {where} hold {shown} (as in {first}), which is unclear for --num-classes {num_classes}. "
        f"Likely: {', or '.join(likely)}. Say which with --mask-type"
    )


# ------------------------------------------------------------------------------------------------------ type given


def _check_type(
    stats: Sequence[MaskStats], num_classes: int, mask_type: str, where: str | Path, normalize: bool
) -> float:
    """The gray value that means "cell for sure", or an InputError where the values do not fit the type."""
    if mask_type == "probability":
        return _check_probability(stats, num_classes, where, normalize)
    if stats[0].planes:
        raise InputError(f"masks in {where} are stacks of {stats[0].planes} planes: only --mask-type probability fits")
    if mask_type == "binary":
        return _check_binary(stats, num_classes, where)
    fractions = [one.name for one in stats if not one.is_whole]
    if fractions:
        raise InputError(f"{len(fractions)} masks in {where} hold fractions, no ids: {list_some(fractions)}")
    if mask_type == "classes":
        above = [f"{one.name} ({one.maximum:g})" for one in stats if one.maximum >= num_classes]
        if above:
            hint = ", or --mask-type binary for 0 and 255" if max(one.maximum for one in stats) == 255 else ""
            raise InputError(
                f"{len(above)} of {len(stats)} masks in {where} have a class id of {num_classes} or more: "
                f"{list_some(above)}. With --num-classes {num_classes} ids are 0..{num_classes - 1}: give more "
                f"classes, or mend the masks{hint}"
            )
    elif num_classes not in (2, 3):
        raise InputError(
            f"masks in {where} are instances: --num-classes is 2 (background, cell) or 3 (background, interior, "
            f"boundary between touching cells), not {num_classes}"
        )
    return 1.0


def _check_binary(stats: Sequence[MaskStats], num_classes: int, where: str | Path) -> float:
    if num_classes != 2:
        raise InputError(f"masks in {where} are binary, that is 2 classes, but --num-classes is {num_classes}")
    largest = max(one.maximum for one in stats)
    if largest == 0:
        return 255.0
    values = _few_values(stats)
    if values is not None and len(values - {0}) == 1:  # one value for cells, whatever it is
        return largest
    full = _full_scale(largest)
    other_scale = [one.name for one in stats if 0 < len(one.values) <= 2 and 0 < one.maximum < full / 2]
    if other_scale and largest >= full / 2:
        raise InputError(
            f"{len(other_scale)} of {len(stats)} masks in {where} have one value below half of {full:g} for cells, "
            f"others {largest:g}: {list_some(other_scale)}. Save all with the same two values"
        )
    if largest < full / 2:
        raise InputError(
            f"masks in {where} reach {largest:g}, not half of {full:g}, with several values between: no binary masks. "
            "Likely numbered cells (--mask-type instances) or class ids (--mask-type classes)"
        )
    return full


def _check_probability(stats: Sequence[MaskStats], num_classes: int, where: str | Path, normalize: bool) -> float:
    planes = stats[0].planes
    if planes > 1 and planes != num_classes:
        raise InputError(f"masks in {where} are stacks of {planes} planes, but --num-classes is {num_classes}")
    if planes <= 1 and num_classes != 2:
        raise InputError(
            f"masks in {where} hold one probability per pixel, that is 2 classes, but --num-classes is {num_classes}: "
            f"give stacks of shape ({num_classes}, H, W) as .npy, .npz or float TIFF"
        )
    dtypes = sorted({"float" if one.dtype.kind == "f" else str(one.dtype) for one in stats})
    if len(dtypes) > 1:
        raise InputError(f"masks in {where} store probabilities as {', '.join(dtypes)}: save them all alike")
    maximum = _certainty(stats[0].dtype, max(one.maximum for one in stats))
    above = [f"{one.name} ({one.maximum:g})" for one in stats if one.maximum > maximum * (1 + SUM_TOLERANCE)]
    if above:
        raise InputError(f"{len(above)} masks in {where} hold probabilities above 1: {list_some(above)}")
    uneven = [f"{one.name} (off by {one.sum_error:.2g})" for one in stats if one.sum_error > SUM_TOLERANCE]
    if planes > 1 and uneven and not normalize:
        raise InputError(
            f"{len(uneven)} of {len(stats)} soft masks in {where} do not sum to 1 over the classes: "
            f"{list_some(uneven)}. Mend them, or have each pixel divided by its sum with --normalize-masks"
        )
    return maximum


def _full_scale(largest: float) -> float:
    """Value of certainty: what the storage offers and not what one folder reaches, so that folders agree."""
    return next((full for full in (1.0, 255.0, 65535.0) if largest <= full), largest)


def _certainty(dtype: np.dtype, largest: float) -> float:
    """Value of probability 1: floats are probabilities as they are."""
    return 1.0 if dtype.kind == "f" else _full_scale(largest)


# ------------------------------------------------------------------------------------------------------ apply a rule


def class_map(mask: np.ndarray, rule: MaskRule) -> np.ndarray:
    """Class ids of a hard mask.

    Args:
        mask: (H, W) as stored.
        rule: of a hard type.

    Returns:
        (H, W) uint8 in 0..K-1. Instances with K = 3: 0 background, 1 interior, 2 pixels of a cell of which one of the
        eight neighbours belongs to another cell.
    """
    if rule.mask_type == "classes":
        return mask.astype(np.uint8)
    if rule.mask_type == "binary":
        return (mask >= rule.maximum / 2).astype(np.uint8)
    classes = (mask > 0).astype(np.uint8)
    if rule.has_boundary:
        classes[_touches_other_cell(mask)] = 2
    return classes


def _touches_other_cell(instance_map: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a cell with another cell among the eight neighbours."""
    touching = np.zeros(instance_map.shape, dtype=bool)
    for first, second in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        one, other = instance_map[first], instance_map[second]
        unequal = (one != other) & (one > 0) & (other > 0)
        touching[first] |= unequal
        touching[second] |= unequal
    return touching


def prob_map(mask: np.ndarray, rule: MaskRule) -> np.ndarray:
    """Class probabilities of a mask.

    Args:
        mask: (H, W) or (K, H, W) as stored, of any type.
        rule: what it holds.

    Returns:
        (K, H, W) float32 in [0, 1], sums to 1 over K.
    """
    if rule.is_hard:
        return one_hot(class_map(mask, rule), rule.num_classes)
    shares = np.clip(mask.astype(np.float32) / np.float32(rule.maximum), 0, 1)
    if shares.ndim == 3 and len(shares) > 1:
        total = shares.sum(axis=0)
        shares[0][total == 0] = 1  # a pixel that no class claims is background
        return shares / np.where(total == 0, 1, total)
    shares = shares.reshape(shares.shape[-2:])
    return np.stack([1 - shares, shares])


def one_hot(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """(H, W) class ids -> (K, H, W) float32."""
    return (classes == np.arange(num_classes)[:, None, None]).astype(np.float32)


def to_prob_map(mask_batch: Tensor, num_classes: int) -> Tensor:
    """(B, H, W) class ids -> (B, K, H, W) float32, on the device of the masks; a float (B, K, H, W) passes through."""
    if mask_batch.is_floating_point():
        return mask_batch
    classes = torch.arange(num_classes, device=mask_batch.device, dtype=mask_batch.dtype)
    return (mask_batch[:, None] == classes[None, :, None, None]).to(torch.float32)
