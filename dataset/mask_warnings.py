"""What looks wrong in a folder of masks: faults that stop training, and warnings for a person to judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError, list_some
from dataset.mask_facts import MaskStats, are_patchy, listed

if TYPE_CHECKING:  # make_masks.py does without torch
    from dataset.masks import MaskRule

HOLLOW = 1.5  # area with holes filled, as a multiple of the area
MUCH_FRAME = 0.9  # fraction of the border's pixels with one value, above which a mask may be inverted
SOME = 0.1  # fraction of the masks that must look inverted for a warning
MOST_GRAY = 0.75  # of the pixels of cells; above it, the edges of a mask are too soft to be cut at half unseen
SEVERAL_EQUAL = 3
POINT = 4  # pixels; cells smaller than this on average are points
SEVERAL_PIECES = 3  # of one id; a cell that is cut in two is common


def refuse_one_class(stats: Sequence[MaskStats], rule: MaskRule, where: str | Path) -> None:
    """Refuse to train if all masks together have only one class: no cell anywhere, or no background.

    Raises:
        InputError: the masks have only one class.
    """
    found = _classes_found(stats, rule)
    if found is None or len(found) > 1:
        return
    masks = f"{len(stats)} masks in {where} (as {stats[0].name})"
    if found == {0}:
        raise InputError(f"{masks}: no mask has a cell. Was the export complete?")
    framed = [one.frame_value for one in stats if _is_framed(one)]
    mend = f"If {framed[0]:g} is the background, write 0 there" if framed else "Was the export complete?"
    raise InputError(f"{masks}: every pixel has class {min(found)}, no mask has background. {mend}")


def refuse_no_labels(stats: Sequence[MaskStats], where: str | Path) -> None:
    """Refuse files that should number cells and clearly do not.

    Raises:
        InputError: JPEG files, a background that is not 0, numbers of classes, or gray values.
    """
    blurred = [one.name for one in stats if one.name.lower().endswith((".jpg", ".jpeg"))]
    if blurred:
        raise InputError(f"{len(blurred)} files in {where} are JPEG ({blurred[0]}), which changes the numbers of cells")
    framed = [one for one in stats if _is_framed(one)]
    if 2 * len(framed) > len(stats):
        raise InputError(
            f"in {len(framed)} of {len(stats)} files in {where}, one number covers the border and more than half of "
            f"the pixels (as in {framed[0].name}): background must be 0"
        )
    area, main_area = sum(one.area for one in stats), sum(one.main_area for one in stats)
    if 2 * sum(one.unequal_pairs for one in stats) > sum(one.pairs for one in stats) > 0 or 2 * main_area < area:
        raise InputError(
            f"files in {where} (as {stats[0].name}) do not number cells: most numbers are spread over many pieces, as "
            "those of classes and gray values are"
        )


def refuse_other_colours(stats: Sequence[MaskStats], mask_type: str, where: str | Path) -> None:
    """Refuse files whose colour tables do not agree: a number then means another class in each of them.

    Colours of numbered cells have no meaning, so they are not compared. Neither are files that have one colour under
    two numbers.

    Raises:
        InputError: one colour has two numbers, or, in masks of classes, one number has two colours.
    """
    number_of: dict[str, tuple[str, str]] = {}
    colour_of: dict[str, tuple[str, str]] = {}
    mend = "make_masks.py convert turns colours into numbers, each colour into the same one"
    for one in stats:
        used = [entry.split(":") for entry in one.table.split()[1:]]
        if mask_type not in ("binary", "classes") or len({colour for _, colour in used}) < len(used):
            continue
        for number, colour in used:
            known, name = number_of.setdefault(colour, (number, one.name))
            if known != number:
                raise InputError(
                    f"masks in {where} have colour tables of different order: the colour {colour} is {known} in {name} "
                    f"and {number} in {one.name}. {mend}"
                )
            shown, name = colour_of.setdefault(number, (colour, one.name))
            if shown != colour and mask_type == "classes":
                raise InputError(
                    f"masks in {where} have different colour tables: {number} is the colour {shown} in {name} and "
                    f"{colour} in {one.name}. {mend}"
                )


def mask_warnings(stats: Sequence[MaskStats], rule: MaskRule) -> list[str]:
    """Warnings that do not stop training: missing classes, and masks that look inverted, copied or not filled."""
    hard = rule.mask_type in ("binary", "instances")
    full = [one for one in stats if hard and one.minimum > 0]
    framed = [one for one in stats if _is_framed(one) and (one.planes > 1 or (hard and one.minimum == 0))]
    points = [one for one in stats if hard and 0 < one.cell_area < POINT]
    hollow = [one for one in stats if hard and one.filled > HOLLOW]
    lumped = [one for one in stats if rule.mask_type == "instances" and one.pieces >= SEVERAL_PIECES]
    warnings = _class_warnings(stats, rule)
    if full:
        warnings.append(
            f"{len(full)} of {len(stats)} masks have no background: every pixel is a cell (as in {full[0].name}). Are "
            "the cells black on white?"
        )
    if len(framed) > SOME * len(stats):
        plane = "plane 0 must be the background"
        mend = plane if framed[0].planes else "are the cells black on white? Background must be 0"
        warnings.append(
            f"in {len(framed)} of {len(stats)} masks, one piece covers the border and more than half of the pixels "
            f"(as in {framed[0].name}): {mend}"
        )
    if 2 * len(points) > sum(one.maximum > 0 for one in stats):
        warnings.append(
            f"in {len(points)} of {len(stats)} masks, cells have less than {POINT} pixels (as in {points[0].name}): "
            "are these points? Masks must cover the whole cell"
        )
    (checksum, equal), *_ = Counter(one.checksum for one in stats if one.distinct > 1).most_common(1) or [(0, 0)]
    if equal >= SEVERAL_EQUAL and 2 * equal > len(stats):
        first = next(one.name for one in stats if one.checksum == checksum)
        count = f"all {equal} masks" if equal == len(stats) else f"{equal} of {len(stats)} masks (as {first})"
        warnings.append(f"{count} are equal, pixel by pixel: was one file copied under several names?")
    if 2 * len(hollow) > len(stats):
        warnings.append(
            f"in {len(hollow)} of {len(stats)} masks the cells are hollow (as in {hollow[0].name}): are these "
            "outlines? Masks must be filled"
        )
    if lumped:
        warnings.append(
            f"in {len(lumped)} of {len(stats)} masks, all cells have one number (as in {lumped[0].name}): is it a "
            "binary mask among numbered cells? Every cell needs its own number"
        )
    soft = [one for one in stats if one.gray_share > MOST_GRAY and not are_patchy([one])]
    if rule.mask_type == "binary" and soft:
        warnings.append(
            f"in {len(soft)} of {len(stats)} masks, most pixels of the cells are gray (as in {soft[0].name}): cut at "
            "half, cells may shrink or vanish. If these are probabilities, say so with mask_type=probability"
        )
    return warnings


def _class_warnings(stats: Sequence[MaskStats], rule: MaskRule) -> list[str]:
    """Warnings about classes that are missing, that only lie between others, or that may be numbers of cells."""
    warnings = []
    found = _classes_found(stats, rule) or set()
    absent = sorted(set(range(rule.num_classes)) - found) if len(found) > 1 else []
    if found == {0}:
        warnings.append("no mask has a cell")
    elif absent:
        given = f"mask_values={listed(sorted(found))} num_classes={len(found)}"
        first = f". If the background has another number, put it first in {given}" if absent[0] == 0 else ""
        warnings.append(f"no mask has a pixel of class {list_some(absent, 8)}, so the model cannot learn it{first}")
    if rule.mask_type != "classes":
        return warnings
    present = {value for one in stats for value in one.values}
    rims = sorted(v for v in present if all(v in one.rims for one in stats if v in one.values))
    if rims:
        example = next(one.name for one in stats if rims[0] in one.rims)
        warnings.append(
            f"the number {rims[0]:g} only forms thin rims between lower and higher numbers (as in {example}): were the "
            "masks resized with smoothing? Resize them by nearest neighbour. Nothing is wrong if this class is a border"
        )
    several = [one for one in stats if one.ids > 1]
    apart = sum(one.unequal_pairs == 0 for one in several)
    if len(several) > 2 and 2 * apart > len(several) and all(one.main_area == one.area for one in several):
        warnings.append(
            f"every number is a single piece in each mask (as in {several[0].name}): are these numbered cells? Then "
            "give mask_type=instances"
        )
    return warnings


def _is_framed(one: MaskStats) -> bool:
    """Whether one value covers the border and more than half of the pixels."""
    return one.frame > MUCH_FRAME and one.frame_area > 0.5


def _classes_found(stats: Sequence[MaskStats], rule: MaskRule) -> set[int] | None:
    """Classes that occur in the masks. None if the facts do not tell."""
    if rule.mask_type in ("binary", "instances"):
        cell = rule.maximum / 2 if rule.mask_type == "binary" else 0.5
        full = all(one.minimum >= cell for one in stats)
        some = any(one.maximum >= cell for one in stats)
        found = ({1} if some else set()) | (set() if full else {0})
        return found | ({2} if rule.has_boundary and len(found) == 2 else set())
    if rule.mask_type == "probability":
        return {0} if stats[0].planes == 0 and all(one.maximum == 0 for one in stats) else None
    if not all(one.values for one in stats):
        return None
    stored = set().union(*(one.values for one in stats))
    values = range(rule.num_classes) if rule.values is None else rule.values
    return {k for k, value in enumerate(values) if value in stored}
