"""Meaning of mask values: decided once per folder, then applied to turn masks into classes or class probabilities.

``mask_facts`` collects facts about each mask. :func:`decide_mask_rule` makes one :class:`MaskRule` from all of them.
:meth:`MaskRule.class_map` and :meth:`MaskRule.prob_map` apply it. The automatic mode only accepts clear cases. It
refuses all others and names the likely types, because a wrong guess would waste hours of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.cells import meetings
from common.errors import InputError, list_some
from dataset.mask_facts import MaskStats, are_patchy, certainty, few_values, full_scale, listed
from dataset.mask_warnings import refuse_other_colours
from dataset.unclear_masks import why_unclear
from dataset.views import View

MASK_TYPES = ("auto", "binary", "classes", "probability", "instances")
DECIDED_TYPES = MASK_TYPES[1:]
HARD_TYPES = ("binary", "classes", "instances")
SUM_TOLERANCE = 0.01
# Thresholds for masks of numbered cells: pieces have constant values, each id is one piece except for small crumbs, and
# there are too many ids for classes. Checked by test_thresholds_of_automatic_have_room_on_real_labels.
MIN_IDS = 8
MAX_SCATTERED_SHARE = 0.2
MAX_STEP_SHARE = 0.9


@dataclass(frozen=True)
class MaskRule:
    """How to read the masks of one folder. Decided once per folder.

    Attributes:
        mask_type: one of :data:`DECIDED_TYPES`.
        maximum: gray value that means "certainly cell" (binary and probability; 1 otherwise).
        reason: one sentence for the log.
        normalize: divide soft maps by their sum. If False, refuse those that do not sum to one.
        values: stored value of each class in the order of the classes, if these are not 0..K-1.
    """

    mask_type: str
    num_classes: int
    maximum: float
    reason: str
    normalize: bool = False
    values: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for values that no rule has, as a damaged file may hold."""
        if self.mask_type not in DECIDED_TYPES:
            raise ValueError(f"mask_type is {self.mask_type!r} instead of one of {', '.join(DECIDED_TYPES)}")
        if self.maximum <= 0:
            raise ValueError(f"maximum is {self.maximum:g} instead of a number above 0")

    @property
    def is_hard(self) -> bool:
        """Whether each pixel belongs to exactly one class."""
        return self.mask_type in HARD_TYPES

    @property
    def has_boundary(self) -> bool:
        """Whether class 2 is the boundary between touching cells, computed from instance ids."""
        return self.mask_type == "instances" and self.num_classes == 3

    def class_map(self, mask: np.ndarray, view: View | None = None) -> np.ndarray:
        """Class ids of a mask. For soft masks, the most probable class. Hard masks stay hard if resized.

        Args:
            mask: (H, W) or (K, H, W) as stored.
            view: part of the mask to use. None: the whole mask.

        Returns:
            (H, W) uint8 in 0..K-1. Instances with K = 3: 0 background, 1 interior, 2 boundary. A pixel of a cell is
            boundary if one of its eight neighbours belongs to another cell.
        """
        if not self.is_hard:
            return self.prob_map(mask, view).argmax(axis=0).astype(np.uint8)
        if view is None:
            return self._classes(mask)
        if view.is_native(*mask.shape):
            return view.cut(self._classes(mask))  # crop last, so that neighbours beyond the crop's edge count
        return self._classes(view.apply_labels(mask))  # resize first, so that the boundary keeps its width

    def prob_map(self, mask: np.ndarray, view: View | None = None) -> np.ndarray:
        """Class probabilities of a mask.

        Args:
            mask: (H, W) or (K, H, W) as stored, of any type.
            view: part of the mask to use. None: the whole mask.

        Returns:
            (K, H, W) float32 in [0, 1], sums to 1 over K.
        """
        if self.is_hard:
            classes = self.class_map(mask, view)
            return (classes == np.arange(self.num_classes)[:, None, None]).astype(np.float32)
        if view is None:
            return self._probabilities(mask)
        height, width = mask.shape[-2:]
        if view.is_native(height, width):  # crop first: stored values are faster to crop than probabilities
            return self._probabilities(view.apply_probabilities(mask.reshape(-1, height, width)))
        return view.apply_probabilities(self._probabilities(mask))

    def _classes(self, mask: np.ndarray) -> np.ndarray:
        if self.mask_type == "classes":
            if self.values is None:
                return mask.astype(np.uint8)
            order = np.argsort(self.values)
            return order[np.searchsorted(np.array(self.values)[order], mask)].astype(np.uint8)
        if self.mask_type == "binary":
            return (mask >= self.maximum / 2).astype(np.uint8)
        classes = (mask > 0).astype(np.uint8)
        if self.has_boundary:
            classes[_touches_other_cell(mask)] = 2
        return classes

    def _probabilities(self, mask: np.ndarray) -> np.ndarray:
        shares = np.clip(mask.astype(np.float32) / np.float32(self.maximum), 0, 1)
        if shares.ndim == 3 and len(shares) > 1:
            total = shares.sum(axis=0)
            shares[0][total == 0] = 1  # a pixel without any class is background
            return shares / np.where(total == 0, 1, total)
        shares = shares.reshape(shares.shape[-2:])
        return np.stack([1 - shares, shares])


IDS = {"classes", "instances"}  # types of whole numbers


def decide_mask_rule(
    stats: Sequence[MaskStats],
    num_classes: int,
    mask_type: str,
    where: str | Path,
    normalize: bool = False,
    values: Sequence[int] | None = None,
    learned: str = "auto",
) -> MaskRule:
    """Decide how to read the masks of a folder, from the facts of all of them.

    The type "auto" only accepts clear cases:

    - (K, H, W) stacks and fractions in 0..1 are probabilities;
    - one file per nucleus is instances;
    - only 0 and 255 (or 65535 in 16 bits), or only 0 and 1, is binary if K = 2;
    - whole numbers below K are class ids if K > 2;
    - whole numbers are instances if K is 2 or 3, one file has at least :data:`MIN_IDS` ids, and each id is one piece of
      constant value except for small crumbs.

    Args:
        stats: facts of every mask, from :func:`mask_stats`.
        mask_type: one of :data:`MASK_TYPES`.
        normalize: accept soft maps that do not sum to one, and divide them by their sum.
        values: stored value of each class, in the order of the classes. Masks with only these values are classes. Masks
            of ids 0..K-1 are also accepted.
        learned: type of the masks that the model was trained on, if known. It tells "auto" whether whole numbers are
            cells or classes: two cells with the ids 1 and 2 look like classes.

    Raises:
        InputError: the values do not fit the type or K, or "auto" finds no clear case.
    """
    if mask_type not in MASK_TYPES:
        raise InputError(f"mask_type={mask_type} is unknown; choose one of {', '.join(MASK_TYPES)}")
    _refuse_mixed(stats, where)
    if values is not None:
        rule = _rule_of_values(stats, num_classes, mask_type, where, values)
        if rule is not None:
            refuse_other_colours(stats, rule.mask_type, where)
            return rule
    why = "given as mask_type"
    if mask_type == "auto":
        mask_type, why = _guess_type(stats, num_classes, where)
        says_itself = max(one.maximum for one in stats) < 2 or any(one.from_folder for one in stats)
        if {mask_type, learned} == IDS and not says_itself:
            mask_type, why = learned, "as in training"
    blurred = [one.name for one in stats if one.name.lower().endswith((".jpg", ".jpeg"))]
    if mask_type in ("classes", "instances") and blurred:
        raise InputError(
            f"{len(blurred)} of {len(stats)} masks in {where} are JPEG ({list_some(blurred)}), which changes the "
            "numbers of classes and cells at every edge: export them anew as PNG or TIFF"
        )
    maximum = _check_type(stats, num_classes, mask_type, where, normalize)
    refuse_other_colours(stats, mask_type, where)
    found_out = why != "given as mask_type"
    meaning = {
        "binary": f"0 is background, {maximum:g} is cell" if found_out else f"gray {maximum / 2:g} and above is cell",
        "classes": f"ids 0..{num_classes - 1}",
        "probability": "one plane per class"
        if stats[0].planes > 1
        else f"value / {maximum:g} is the probability of cell",
        "instances": "0 is background, every id is a cell" + (", class 2 where cells touch" * (num_classes == 3)),
    }[mask_type]
    return MaskRule(mask_type, num_classes, maximum, f"masks are {mask_type}: {meaning} ({why})", normalize)


def _refuse_mixed(stats: Sequence[MaskStats], where: str | Path) -> None:
    """Refuse what no type has: no masks, negative values, masks of different kinds."""
    if not stats:
        raise InputError(f"{where} holds no masks")
    negative = [one.name for one in stats if one.minimum < 0]
    if negative:
        mend = (
            "Probabilities are needed: apply a softmax or a sigmoid to the output of a network"
            if stats[0].planes or not all(one.is_whole for one in stats)
            else "Often -1 marks pixels to ignore, and there is no such class: write 0 (background) or an id there"
        )
        raise InputError(f"{len(negative)} masks in {where} have negative values: {list_some(negative)}. {mend}")
    planes = sorted({one.planes for one in stats})
    if len(planes) > 1:
        kinds = ", ".join(f"stacks of {count}" if count else "flat" for count in planes)
        raise InputError(f"masks in {where} are of different kinds ({kinds}): give each kind its own folder")
    tables = {one.table.partition(" ")[0]: one.name for one in stats if one.table}
    if len(tables) > 1:
        raise InputError(
            f"masks in {where} have colour tables of two kinds: with a gray table the gray values count (as in "
            f"{tables['gray']}), with a coloured table the numbers in the file (as in {tables['coloured']}). Save "
            "all masks in the same way, best without a colour table"
        )


def _rule_of_values(
    stats: Sequence[MaskStats], num_classes: int, mask_type: str, where: str | Path, values: Sequence[int]
) -> MaskRule | None:
    """Rule for classes with given stored values. None if the masks hold class ids 0..K-1 instead."""
    given = f"mask_values={listed(values)}"
    if len(values) != num_classes or len(set(values)) != num_classes or mask_type not in ("auto", "classes"):
        raise InputError(
            f"{given} does not fit num_classes={num_classes} and mask_type={mask_type}: give a different value for "
            "each class, and only for masks of classes"
        )
    others = {one.name: sorted(one.values - set(values)) for one in stats if not one.values <= set(values)}
    many = [one.name for one in stats if not one.values]
    if not others and not many:
        meaning = ", ".join(f"{value} is {k}" for k, value in enumerate(values))
        reason = f"masks are classes: {meaning} (given as mask_values)"
        return MaskRule("classes", num_classes, 1.0, reason, values=tuple(values))
    if max(one.maximum for one in stats) < num_classes and all(one.is_whole for one in stats):
        return None
    shown = [f"{name} ({list_some([f'{value:g}' for value in found])})" for name, found in others.items()]
    raise InputError(
        f"{len(others) + len(many)} of {len(stats)} masks in {where} hold other values than {given}: "
        f"{list_some(shown + many)}"
    )


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
        full = next((full for full in (100, 255) if largest <= full and largest > 10), None)
        scale = f" Divide probabilities by {full}, or cut them at half (mask_type=binary)." * (full == 255)
        scale = f" Divide percentages by {full}." if full == 100 else scale
        raise InputError(
            f"masks in {where} have fractions up to {largest:g}: probabilities are in 0..1, and ids are whole numbers."
            f"{scale} If numbers of cells or classes were resized, resize them by nearest neighbour"
        )
    values = few_values(stats)
    if num_classes == 2 and values is not None:
        full = 65535 if all(one.dtype == np.uint16 for one in stats) else 255
        for top in (1, 255, full):
            if values <= {0, top}:
                return "binary", "only " + " and ".join(f"{value:g}" for value in sorted(values))
    if largest < num_classes:
        return "classes", f"whole numbers up to {largest:g}"
    if num_classes <= 3 and _looks_like_instances(stats):
        return "instances", f"pieces of constant value, up to {max(one.ids for one in stats)} in one mask"
    raise InputError(why_unclear(stats, num_classes, where))


def _looks_like_instances(stats: Sequence[MaskStats]) -> bool:
    pairs = sum(one.pairs for one in stats)
    unequal = sum(one.unequal_pairs for one in stats)
    # A coarse probability map also has pieces of constant value (nested rings). But there, only adjacent levels touch.
    steps = sum(one.step_pairs for one in stats)
    graded = unequal > 0.02 * pairs and steps > MAX_STEP_SHARE * unequal
    return (
        max(one.ids for one in stats) >= MIN_IDS
        and are_patchy(stats)
        and sum(one.main_area for one in stats) >= (1 - MAX_SCATTERED_SHARE) * sum(one.area for one in stats)
        and not graded
    )


# ------------------------------------------------------------------------------------------------------ type given


def _check_type(
    stats: Sequence[MaskStats], num_classes: int, mask_type: str, where: str | Path, normalize: bool
) -> float:
    """The gray value that means "certainly cell". Raises InputError if the values do not fit the type."""
    if mask_type == "probability":
        return _check_probability(stats, num_classes, where, normalize)
    if stats[0].planes:
        raise InputError(f"masks in {where} are stacks of {stats[0].planes} planes: only mask_type=probability fits")
    if mask_type == "binary":
        return _check_binary(stats, num_classes, where)
    fractions = [one.name for one in stats if not one.is_whole]
    if fractions:
        raise InputError(f"{len(fractions)} masks in {where} have fractions instead of ids: {list_some(fractions)}")
    if mask_type == "classes":
        above = [f"{one.name} ({one.maximum:g})" for one in stats if one.maximum >= num_classes]
        if above:
            hint = ", or mask_type=binary for 0 and 255" if max(one.maximum for one in stats) == 255 else ""
            raise InputError(
                f"{len(above)} of {len(stats)} masks in {where} have a class id of {num_classes} or more: "
                f"{list_some(above)}. With num_classes={num_classes}, ids are 0..{num_classes - 1}: give more "
                f"classes, or correct the masks{hint}"
            )
    elif num_classes not in (2, 3):
        raise InputError(
            f"masks in {where} are instances: `num_classes` is 2 (background, cell) or 3 (background, interior, "
            f"boundary between touching cells), not {num_classes}"
        )
    return 1.0


def _check_binary(stats: Sequence[MaskStats], num_classes: int, where: str | Path) -> float:
    if num_classes != 2:
        raise InputError(f"masks in {where} are binary, that is 2 classes, but num_classes={num_classes}")
    largest = max(one.maximum for one in stats)
    if largest == 0:
        return 255.0
    values = few_values(stats)
    if values is not None and len(values - {0}) == 1:  # any single value means cell
        return largest
    full = full_scale(largest)
    other_scale = [one.name for one in stats if 0 < len(one.values) <= 2 and 0 < one.maximum < full / 2]
    if other_scale and largest >= full / 2:
        raise InputError(
            f"{len(other_scale)} of {len(stats)} masks in {where} mark cells with a value below half of {full:g}, "
            f"others with {largest:g}: {list_some(other_scale)}. Save all with the same two values"
        )
    if largest < full / 2 and not are_patchy(stats):
        raise InputError(
            f"masks in {where} have {max(one.distinct for one in stats)} values up to {largest:g}, below half of "
            f"{full:g}: cut at half, no cell would be left. Likely: gray probabilities (mask_type=probability)"
        )
    if largest < full / 2:
        raise InputError(
            f"masks in {where} have several values up to {largest:g}, below half of {full:g}: they are not binary. "
            "Likely: numbered cells (mask_type=instances) or class ids (mask_type=classes)"
        )
    return full


def _check_probability(stats: Sequence[MaskStats], num_classes: int, where: str | Path, normalize: bool) -> float:
    planes = stats[0].planes
    if planes > 1 and planes != num_classes:
        raise InputError(
            f"masks in {where} are stacks of {planes} planes, but num_classes={num_classes}. If each plane is a cell, "
            "make_masks.py convert makes label images"
        )
    if planes <= 1 and num_classes != 2:
        raise InputError(
            f"masks in {where} have one probability per pixel, that is 2 classes, but num_classes={num_classes}: "
            f"give stacks of shape ({num_classes}, H, W) as .npy, .npz or float TIFF"
        )
    dtypes = sorted({"float" if one.dtype.kind == "f" else str(one.dtype) for one in stats})
    if len(dtypes) > 1:
        raise InputError(f"masks in {where} store probabilities as {', '.join(dtypes)}: save all with the same type")
    maximum = certainty(stats[0].dtype, max(one.maximum for one in stats))
    above = [f"{one.name} ({one.maximum:g})" for one in stats if one.maximum > maximum * (1 + SUM_TOLERANCE)]
    if above:
        raise InputError(f"{len(above)} masks in {where} have probabilities above 1: {list_some(above)}")
    uneven = [f"{one.name} (off by {one.sum_error:.2g})" for one in stats if one.sum_error > SUM_TOLERANCE]
    if planes > 1 and uneven and not normalize:
        raise InputError(
            f"{len(uneven)} of {len(stats)} soft masks in {where} do not sum to 1 over the classes: "
            f"{list_some(uneven)}. Plane 0 is the background. Correct them, or divide each pixel by its sum with "
            "normalize_masks=True. If each plane is a cell, make_masks.py convert makes label images"
        )
    return maximum


# ------------------------------------------------------------------------------------------------------ apply a rule


def _touches_other_cell(instance_map: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a cell with another cell among the eight neighbours."""
    touching = np.zeros(instance_map.shape, dtype=bool)
    for first, second, meets in meetings(instance_map):
        touching[first] |= meets
        touching[second] |= meets
    return touching


def to_prob_map(mask_batch: Tensor, num_classes: int) -> Tensor:
    """(B, H, W) class ids -> (B, K, H, W) float32, on the same device. A float (B, K, H, W) is returned unchanged."""
    if mask_batch.is_floating_point():
        return mask_batch
    classes = torch.arange(num_classes, device=mask_batch.device, dtype=mask_batch.dtype)
    return (mask_batch[:, None] == classes[None, :, None, None]).to(torch.float32)
