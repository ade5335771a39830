"""Check images and masks before training, and report in plain language.

Problems stop training. Remarks are warnings. Nothing here trains a model or changes a file.
"""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cells import connected_cells
from common.disk import write_bytes, write_json
from common.errors import InputError, list_some, one_line, settings_as_flags, with_flags
from common.spread import evenly
from dataset.agreement import MOST_PAIRS, agreement_warnings, flat_warning, mask_signature, refuse_masks_as_images
from dataset.checks import check_same_size
from dataset.config import DataConfig
from dataset.files import (
    FileError,
    Pair,
    find_images_and_masks,
    list_folders,
    match_names,
    read_image_and_kind,
    read_mask,
    read_mask_and_table,
)
from dataset.folder_hints import Listing, sub_folder_warnings
from dataset.gray import (
    burnt_in_warning,
    colour_warnings,
    default_window_channels,
    image_window,
    narrow_channels_warning,
    to_display,
)
from dataset.mask_facts import MaskStats, mask_stats, named_apart
from dataset.mask_warnings import mask_warnings, refuse_one_class
from dataset.masks import MaskRule, decide_mask_rule
from dataset.names import name_hints
from dataset.scale import scale_warning
from dataset.views import native_view
from evaluation.image_facts import ImageFacts, image_facts, near_duplicates, with_own_names
from evaluation.output import new_figure, save_figure, show_image

logger = logging.getLogger(__name__)
SHEET_IMAGES = 12
FEW_PAIRS = 40  # with fewer, README.md advises evaluate.py practise
DARK = 128  # gray value; images that stay below it count as dark
MANY_CLASSES = 12  # with more, only those that occur are listed
MUCH_LOST = 0.2  # fraction of a typical image that the center crop may lose before a remark


@dataclass
class DataReport:
    """Result of :func:`survey`.

    Attributes:
        images: image files found.
        masks: mask files found.
        pairs: images with a mask.
        sizes: "WIDTH x HEIGHT" -> number of images, most frequent first.
        dtypes: "uint8, 3 channels" -> number of images.
        ranges: dtype -> darkest and brightest value of all images, and the median of the images' brightest values.
        mask_type: one of ``MASK_TYPES``, None if it could not be decided.
        mask_reason: one sentence that says why.
        class_shares: fraction of all pixels per class.
        instances: cells per image, in the order of the pairs.
        instances_are: how cells were counted: "ids" or "connected components".
        without_image: masks without an image.
        without_mask: images without a mask.
        unreadable: file and reason.
        left_out: files in the two folders that are neither image nor mask.
        mismatched: pairs whose image and mask differ in size.
        duplicates: (name, other name, correlation). 1.0 means equal pixels. See ``near_duplicates``.
        problems: faults that stop training.
    """

    images: int
    masks: int
    pairs: int
    sizes: dict[str, int]
    dtypes: dict[str, int]
    ranges: dict[str, dict[str, float]]
    mask_type: str | None = None
    mask_reason: str = ""
    class_shares: list[float] = field(default_factory=list)
    instances: list[int] = field(default_factory=list)
    instances_are: str = ""
    without_image: list[str] = field(default_factory=list)
    without_mask: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in plain language."""
        lines = [f"{self.images} images, {self.masks} masks, {self.pairs} pairs"]
        lines += _counted("sizes (width x height)", self.sizes) + _counted("kinds of images", self.dtypes)
        lines += [
            f"gray values of {dtype} images: {facts['minimum']:g} to {facts['maximum']:g}; median of the images' "
            f"brightest values: {facts['median_maximum']:g}"
            for dtype, facts in self.ranges.items()
        ]
        if self.mask_type is not None:
            lines.append(self.mask_reason)
        if self.class_shares:
            two = ["background", "cells"]
            names = two if len(self.class_shares) == 2 else [f"class {k}" for k in range(len(self.class_shares))]
            shares = [f"{name}: {share * 100:.1f} %" for name, share in zip(names, self.class_shares, strict=True)]
            if len(shares) > MANY_CLASSES:
                shares = [line for line, share in zip(shares, self.class_shares, strict=True) if share > 0]
            lines.append(f"fraction of the pixels: {list_some(shares, MANY_CLASSES)}")
        if self.instances:
            lines.append(
                f"cells per image: {min(self.instances)} to {max(self.instances)}, median "
                f"{np.median(self.instances):g}, {sum(self.instances)} in all (counted as {self.instances_are})"
            )
        lines += [f"remark: {remark}" for remark in self.remarks]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        return lines + ([] if self.problems else ["no problem found: training can start"])


def _number(items: Sequence[object], word: str) -> str:
    """How many there are: ``1 file``, ``2 files``."""
    return f"{len(items)} {word}{'s' * (len(items) != 1)}"


def _counted(title: str, counts: dict[str, int], most: int = 5) -> list[str]:
    shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:most])
    rest = len(counts) - most
    return [f"{title}: {shown}{f' and {rest} more' if rest > 0 else ''}"] if counts else []


def survey(
    image_dir: str | Path,
    mask_dir: str | Path,
    num_classes: int = 2,
    mask_type: str = "auto",
    image_size: int | None = None,
    crop: str = "center",
    normalize: bool = False,
    progress: bool = False,
    mask_values: Sequence[int] | None = None,
) -> tuple[DataReport, list[Pair], MaskRule | None]:
    """Read every file of a data set once and report on it.

    Args:
        mask_type: one of ``MASK_TYPES``.
        image_size: side of the training images. With ``crop`` "random", no image may be smaller.
        crop: same as in training.
        normalize: whether soft maps may have sums other than one.
        mask_values: stored value of each class, if these are not 0..K-1.

    Returns:
        The report, the usable pairs, and the mask rule (None if it could not be decided).

    Raises:
        InputError: a folder is missing or empty.
    """
    DataConfig(image_size or 1, num_classes, crop)  # refuses what training refuses
    listings = list_folders(image_dir, mask_dir)
    images, masks = find_images_and_masks(image_dir, mask_dir, listings)
    pairs, without_mask, without_image = match_names(images, masks)
    facts, image_errors = _read_all(images, image_facts, "reading images", progress)
    facts = with_own_names(facts, images)
    stats, mask_errors = _read_all(masks, _mask_facts, "reading masks", progress)
    report = DataReport(
        images=len(images),
        masks=len(masks),
        pairs=len(pairs),
        sizes=dict(Counter(f"{one.width} x {one.height}" for one in facts.values()).most_common()),
        dtypes=dict(Counter(_kind(one) for one in facts.values()).most_common()),
        ranges=_value_ranges(facts.values()),
        without_image=without_image,
        without_mask=without_mask,
        unreadable=image_errors + mask_errors,
        left_out=_others(listings, {*images.values(), *masks.values()}),
        duplicates=near_duplicates(list(facts.values())),
    )
    usable = []
    for pair in pairs:
        image, mask = facts.get(pair.image_path), stats.get(pair.mask_path)
        if image is None or mask is None:
            continue
        try:
            check_same_size((image.height, image.width), mask[1], pair.mask_path)
            usable.append(pair)
        except FileError as error:
            report.mismatched.append(str(error))
            del stats[pair.mask_path]
    _look_for_masks_as_images(report, usable, facts, stats, (image_dir, mask_dir))
    hints = name_hints(without_mask, without_image, [pair.name for pair in pairs])
    _find_problems(report, hints, list(facts.values()), image_dir, mask_dir, image_size, crop)
    report.remarks += sub_folder_warnings(listings, [*images.values(), *masks.values()])
    named = named_apart([one[0] for one in stats.values()], list(stats))
    rule = _decide(report, named, num_classes, mask_type, mask_dir, normalize, mask_values)
    if rule is not None:
        _count_cells(report, usable, rule, progress)
        some = [usable[index] for index in evenly(len(usable), MOST_PAIRS)]
        small = [facts[pair.image_path].signature for pair in some], [stats[pair.mask_path][2] for pair in some]
        report.remarks += agreement_warnings([pair.name for pair in some], *small)
    _find_remarks(report, list(facts.values()))
    report.remarks += colour_warnings(list(facts), max((one.channels for one in facts.values()), default=1))
    if crop == "center":
        _find_remarks_on_center_crop(report, list(facts.values()), image_size)
    return report, usable, rule


# --- one file --------------------------------------------------------------------------------------------------------


def _read_all(files: dict[str, Path], read, title: str, progress: bool) -> tuple[dict, list[str]]:
    """Facts by path, and one line for every unreadable file."""
    found, errors = {}, []
    for path in tqdm(files.values(), desc=title, unit="file", disable=None if progress else True):
        try:
            found[path] = read(path)
        except FileError as error:
            errors.append(str(error))
    return found, errors


def _others(listings: Sequence[Listing], known: set[Path]) -> list[str]:
    """Names of all other files in the folders, except hidden files."""
    found = {listing.folder / name for listing in listings for name in listing.files}
    return sorted(path.name for path in found - known)


def _mask_facts(path: Path) -> tuple[MaskStats, tuple[int, ...], np.ndarray]:
    mask, table = read_mask_and_table(path)
    return mask_stats(path, mask, path.is_dir(), table), mask.shape, mask_signature(mask)


def common_channels(facts: Sequence[ImageFacts]) -> int:
    """Channels to train with: 3 for gray and RGB images, else the number that all images share (3 if they differ)."""
    counts = {one.channels for one in facts}
    return counts.pop() if len(counts) == 1 and not counts & {1, 3} else 3


def _kind(facts: ImageFacts) -> str:
    return f"{facts.dtype}, {facts.channels} channel{'s' * (facts.channels > 1)}"


def _value_ranges(facts: Iterable[ImageFacts]) -> dict[str, dict[str, float]]:
    by_dtype: dict[str, list[ImageFacts]] = {}
    for one in facts:
        by_dtype.setdefault(one.dtype, []).append(one)
    return {
        dtype: {
            "minimum": min(one.minimum for one in group),
            "maximum": max(one.maximum for one in group),
            "median_maximum": float(np.median([one.maximum for one in group])),
        }
        for dtype, group in by_dtype.items()
    }


# --- judgement -------------------------------------------------------------------------------------------------------


def _find_problems(
    report: DataReport,
    hints: Sequence[str],
    facts: Sequence[ImageFacts],
    image_dir: str | Path,
    mask_dir: str | Path,
    image_size: int | None,
    crop: str,
) -> None:
    """Add all problems, except those of mask values. ``hints`` say why names do not agree."""
    if report.unreadable:
        report.problems.append(f"{_number(report.unreadable, 'file')} cannot be read: {list_some(report.unreadable)}")
    if report.without_mask:
        count, names = _number(report.without_mask, "image"), list_some(report.without_mask)
        report.problems.append(f"{count} without a mask of the same name in {mask_dir}: {names}")
    if report.without_image:
        count, names = _number(report.without_image, "mask"), list_some(report.without_image)
        report.problems.append(f"{count} without an image of the same name in {image_dir}: {names}")
    if hints:
        report.problems[-1] += f"; {'; '.join(hints)}"
    if report.mismatched:
        count, names = _number(report.mismatched, "mask"), list_some(report.mismatched)
        report.problems.append(f"{count} of another shape than the image: {names}")
    channels = common_channels(facts)
    others = [f"{one.name} ({one.channels})" for one in facts if one.channels not in (1, channels)]
    if channels == 3 and others:
        report.problems.append(f"{len(others)} images have neither 1 nor 3 channels: {list_some(others)}")
    three = {one.has_channels: one.name for one in facts if one.channels == 3}
    if len(three) == 2:
        report.problems.append(
            f"some images are RGB (as {three[False]}), some hold three channels that are no colours (as "
            f"{three[True]}): save all alike, or say how to read them with --window-channels"
        )
    if image_size is not None and crop == "random":
        small = []
        for one in facts:
            try:
                native_view(one.height, one.width, image_size)
            except InputError:
                small.append(f"{one.name} ({one.width} x {one.height})")
        if small:
            report.problems.append(
                f"{len(small)} images are smaller than --image-size {image_size}, which --crop random needs: "
                f"{list_some(small)}"
            )


def _look_for_masks_as_images(
    report: DataReport, pairs: Sequence[Pair], facts: dict[Path, ImageFacts], stats: dict[Path, tuple], where: tuple
) -> None:
    """Add a problem if images equal their masks, and a remark if they look like masks."""
    images = [facts[pair.image_path] for pair in pairs]
    sums = [stats[pair.mask_path][0].checksum for pair in pairs]
    try:
        refuse_masks_as_images([one.gray_checksum == own for one, own in zip(images, sums, strict=True)], *where)
    except InputError as error:
        report.problems.append(with_flags(one_line(error)))
    report.remarks += flat_warning([pair.name for pair in pairs], [one.is_flat for one in images])


def _decide(
    report: DataReport,
    stats: Sequence[MaskStats],
    num_classes: int,
    mask_type: str,
    where: str | Path,
    normalize: bool,
    mask_values: Sequence[int] | None,
) -> MaskRule | None:
    if not stats:
        return None
    try:
        rule = decide_mask_rule(stats, num_classes, mask_type, where, normalize, mask_values)
    except InputError as error:
        report.problems.append(with_flags(one_line(error)))
        return None
    report.mask_type, report.mask_reason = rule.mask_type, rule.reason
    try:
        refuse_one_class(stats, rule, where)
    except InputError as error:
        report.problems.append(str(error))
    report.remarks += [settings_as_flags(warning) for warning in mask_warnings(stats, rule)]
    return rule


def _count_cells(report: DataReport, pairs: Sequence[Pair], rule: MaskRule, progress: bool) -> None:
    """Count the cells of each image, and measure the fraction of pixels of each class."""
    totals = np.zeros(rule.num_classes)
    ids = rule.mask_type == "instances"
    report.instances_are = "ids" if ids else "connected components"
    for pair in tqdm(pairs, desc="counting cells", unit="file", disable=None if progress else True):
        mask = read_mask(pair.mask_path)
        probabilities = rule.prob_map(mask)
        totals += probabilities.sum(axis=(1, 2), dtype=np.float64)
        cells = np.unique(mask[mask > 0]).size if ids else int(connected_cells(probabilities.argmax(axis=0) > 0).max())
        report.instances.append(cells)
    if totals.sum() > 0:
        report.class_shares = [round(float(share), 6) for share in totals / totals.sum()]


def _find_remarks(report: DataReport, facts: Sequence[ImageFacts]) -> None:
    """Add all remarks, except those of the center crop."""
    empty = sum(count == 0 for count in report.instances)
    if empty:
        report.remarks.append(f"{empty} of {len(report.instances)} masks have no cell")
    report.remarks += burnt_in_warning([one.name for one in facts], [one.is_burnt_in for one in facts])
    blank = [one.name for one in facts if one.minimum == one.maximum]
    if blank:
        report.remarks.append(f"{_number(blank, 'image')} of a single gray value: {list_some(blank)}")
    if report.left_out:
        report.remarks.append(
            f"{_number(report.left_out, 'file')} neither image nor mask, to be ignored: {list_some(report.left_out)}"
        )
    absent = [str(k) for k, share in enumerate(report.class_shares) if share == 0]
    if absent and report.mask_type == "probability":  # other types have a warning of their own
        report.remarks.append(f"no pixel has class {list_some(absent, 8)}, so the model cannot learn it")
    if report.duplicates:
        names = [f"{one} and {other}" for one, other, _ in report.duplicates]
        report.remarks.append(
            f"{len(names)} pairs of images are nearly equal: {list_some(names)}; do not put such copies into both "
            "training and test images"
        )
    if len(report.ranges) > 1:
        kinds = ", ".join(report.ranges)
        report.remarks.append(
            f"images are stored as {kinds}: the default gray range depends on the kind; --window sets one rule for all"
        )
    if len(report.sizes) > 1:
        report.remarks.append(
            "images have different sizes: --crop center scales each image so that its short side fits, --crop random "
            "keeps the scale"
        )
    report.remarks += scale_warning({one.name: one.pixel_um for one in facts})
    channels = common_channels(facts)
    if channels != 3:
        report.remarks.append(f"images have {channels} channels: train with --vae none --in-channels {channels}")
    elif {one.has_channels for one in facts if one.channels == 3} == {True}:
        report.remarks.append(
            "images have 3 channels that are not colours (axes CYX): train with --vae none --in-channels 3; each "
            "channel gets its own gray range"
        )
    elif all(one.is_gray for one in facts):
        report.remarks.append("all images are gray: if you train on pixels (--vae none), use --in-channels 1")
    _remark_on_narrow_channels(report, facts)
    bytes_ = [one.bright for one in facts if one.dtype == "uint8"]
    if bytes_ and np.median(bytes_) < DARK:
        report.remarks.append(
            f"half of the 8-bit images have hardly a pixel above gray {np.median(bytes_):.0f} of 255: train with "
            "--window 0 99.8, which stretches the contrast of each image"
        )
    if report.pairs < FEW_PAIRS:
        report.remarks.append(
            f"{report.pairs} pairs are few. Below about {FEW_PAIRS}, evaluate.py practise makes synthetic images from "
            "them and from images without labels (docs/utility.md)"
        )


def _remark_on_narrow_channels(report: DataReport, facts: Sequence[ImageFacts]) -> None:
    """Add a remark on channels that would be almost black in the gray range of training."""
    if not facts:
        return
    has_channels = any(one.has_channels for one in facts if one.channels == 3)
    channels = max(one.channels for one in facts)
    config = DataConfig(image_size=1, window_channels=default_window_channels(channels, has_channels))
    warnings = narrow_channels_warning([one.channel_shares for one in facts], config, facts[0].dtype)
    report.remarks += map(settings_as_flags, warnings)


def _find_remarks_on_center_crop(report: DataReport, facts: Sequence[ImageFacts], image_size: int | None) -> None:
    """Add remarks on what the center crop does to these images."""
    lost = [1 - min(one.height, one.width) / max(one.height, one.width) for one in facts]
    if lost and np.median(lost) > MUCH_LOST:
        report.remarks.append(
            f"--crop center cuts {np.median(lost):.0%} off a typical image, at its ends; --crop random uses all of it"
        )
    small = [one.name for one in facts if min(one.height, one.width) < (image_size or 0)]
    if small:
        report.remarks.append(
            f"{len(small)} images are smaller than --image-size {image_size} and will be enlarged, which adds no "
            f"detail: {list_some(small)}"
        )


# --- files -----------------------------------------------------------------------------------------------------------


def write_data_report(report: DataReport, pairs: Sequence[Pair], rule: MaskRule | None, output: Path) -> list[Path]:
    """Write ``data.json``, ``data.txt`` and, if the masks are usable, ``contact_sheet.png`` into ``output``.

    Returns:
        Paths of the written files.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "data.json", asdict(report))
    write_bytes(output / "data.txt", ("\n".join(report.lines()) + "\n").encode())
    written = [output / "data.json", output / "data.txt"]
    if rule is not None and pairs:
        notes = [f"PROBLEM: {line}" for line in report.problems] + [f"remark: {line}" for line in report.remarks]
        draw_contact_sheet(pairs, rule, notes, output / "contact_sheet.png")
        written.append(output / "contact_sheet.png")
    return written


def draw_contact_sheet(pairs: Sequence[Pair], rule: MaskRule, notes: Sequence[str], path: Path) -> None:
    """Draw a few pairs spread over the set below the notes: images in the gray range of training, masks as outlines."""
    chosen = [pairs[index] for index in evenly(len(pairs), SHEET_IMAGES)]
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    lines = [line for note in notes for line in textwrap.wrap(note, 38 * columns, subsequent_indent="    ")]
    figure = new_figure(2.8 * columns, 3 * rows + 0.15 * len(lines))
    if lines:
        figure.suptitle("\n".join(lines), fontsize=7, x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, image, cells) in zip(axes, _drawable(chosen, rule), strict=False):
        show_image(axis, image, name[:32], cells)
    save_figure(figure, path)


def _drawable(pairs: Sequence[Pair], rule: MaskRule) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, uint8 (H, W, C) and cells (H, W) bool of every pair."""
    for pair in pairs:
        image, has_channels = read_image_and_kind(pair.image_path)
        config = DataConfig(image_size=1, window_channels=default_window_channels(image.shape[2], has_channels))
        cells = rule.class_map(read_mask(pair.mask_path)) > 0
        yield pair.name, to_display(image, image_window(image, config)), cells
