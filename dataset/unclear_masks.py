"""What to say about a folder of masks whose type is not clear: the likely types, and the setting that decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataset.mask_facts import FEW_VALUES, MaskStats, are_patchy, few_values, listed
from dataset.mask_warnings import MOST_GRAY

MUCH_FLAT = 0.1  # of the pixels above 0; only numbers that were blurred have areas of one gray
_BLURRED = "numbers of classes or cells, blurred by a resize: resize them by nearest neighbour"
MOST_SHARP = 4  # values in masks without soft edges: two, with two crumbs of a resize


def why_unclear(stats: Sequence[MaskStats], num_classes: int, where: str | Path) -> str:
    """Message for unclear masks: what was found, the likely types, and the setting that decides."""
    largest = max(one.maximum for one in stats)
    values = few_values(stats)
    shown = f"values up to {largest:g}, {max(one.distinct for one in stats)} different ones in one mask"
    if values is not None and len(values) <= 8:
        shown = "the values " + ", ".join(f"{value:g}" for value in sorted(values))
    likely = _likely_few(stats, num_classes, values, largest) if values is not None else []
    likely += _likely_types(stats, num_classes, values, largest)
    if not likely:
        likely.append("none of the known types (class ids 0..K-1, numbered cells, 0 and 255): look at the masks")
    first = next(one.name for one in stats if one.maximum == largest)
    return (
        f"masks in {where} have {shown} (as in {first}), which is unclear for num_classes={num_classes}. "
        f"Likely: {', or '.join(likely)}. Give what fits"
    )


def _likely_few(stats: Sequence[MaskStats], num_classes: int, values: frozenset[float], largest: float) -> list[str]:
    """Likely types of masks with few different values."""
    classes = sorted(values)
    count = f" num_classes={len(classes)}" * (len(classes) != num_classes)
    flag = f"mask_values={listed(classes)}{count}"
    one_per_mask = all(len(one.values - {0}) <= 1 for one in stats)
    likely = []
    if len(values - {0}) == 1:
        binary = "" if num_classes == 2 else " num_classes=2"
        likely.append(f"one class of cells (mask_type=binary{binary})")
    elif one_per_mask:
        likely.append("one class of cells, saved with different values (save all with the same two)")
    if _has_void(values):
        mend = f"write 0 (background) or an id there, or make it a class of its own ({flag})"
        return [*likely, f"255 for pixels to ignore, and there is no such class: {mend}"]
    if _soft_edges(stats, largest):
        return likely
    background = "the value of the background first"
    if classes[0] > 0 and len(classes) > 1:
        likely.append(f"{len(classes)} classes without a 0 ({flag}, {background})")
    elif len(classes) > 2 and largest >= max(num_classes, 2 * len(classes)):
        likely.append(f"{len(classes)} classes with gray values for display ({flag}, {background})")
    elif len(classes) > 2 and largest >= num_classes == len(classes):
        likely.append(f"{len(classes)} classes whose numbers have gaps ({flag}, {background})")
    return likely


def _likely_types(
    stats: Sequence[MaskStats], num_classes: int, values: frozenset[float] | None, largest: float
) -> list[str]:
    """Likely types of masks with any number of values."""
    binary = "" if num_classes == 2 else " num_classes=2"
    patchy = are_patchy(stats)
    one_value = values is not None and len(values - {0}) == 1
    void = values is not None and _has_void(values)
    soft = not void and _soft_edges(stats, largest)
    flat = max(one.gray_flat for one in stats) > MUCH_FLAT
    likely = []
    if soft:
        likely.append(f"two values with soft or JPEG edges (mask_type=binary{binary}, cut at half)")
    if patchy and not (one_value or void or soft) and largest < 2 * FEW_VALUES:
        likely.append(f"class ids (mask_type=classes num_classes={int(largest) + 1})")
    if patchy and not soft and largest not in (255, 65535):
        count = "" if num_classes <= 3 else " with num_classes=2 or num_classes=3"
        likely.append(f"numbered cells (mask_type=instances{count})")
    if all(one.name.lower().endswith((".jpg", ".jpeg")) for one in stats) and not (one_value or soft):
        likely.append("numbers of classes or cells that JPEG has blurred: export them anew as PNG or TIFF")
    elif not patchy and flat:
        likely.append(_BLURRED)
    if not patchy:
        likely.append(f"gray probabilities (mask_type=probability{binary})")
        if not (soft or flat):
            likely.append(
                f"cells with very soft edges (mask_type=binary{binary}, cut at half)" if largest >= 128 else _BLURRED
            )
        likely.append("images instead of masks, or distance maps")
    return likely


def _has_void(values: frozenset[float]) -> bool:
    """Whether the values are ids 0..K-1 and 255, which often marks pixels to ignore."""
    return len(values) > 2 and max(values) == 255 and max(values - {255}) == len(values) - 2


def _soft_edges(stats: Sequence[MaskStats], largest: float) -> bool:
    """Whether the masks look like two values with grays at the edges only."""
    return (
        largest >= 128
        and max(one.distinct for one in stats) > MOST_SHARP
        and all(one.near_ends > MOST_GRAY and one.gray_share <= MOST_GRAY for one in stats)
        and all(one.gray_flat <= MUCH_FLAT for one in stats)
    )
