"""Filter: select the images of a set that follow their masks best. The set itself stays unchanged."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from common.disk import SETTINGS, new_folder, real_path, write_csv, write_json
from common.errors import InputError, list_some
from common.plain import read_json
from evaluation.output import RESULTS, Section, Table, results_folder
from synthetic.manifest import FIDELITY_COLUMN, MANIFEST, judge_notes, number_or_none, relative_to_set, write_manifest
from synthetic.reader import Sample, SampleSet

KEPT, DROPPED = "kept.csv", "dropped.csv"


@dataclass(frozen=True)
class FilterResult:
    """Images that are kept, and images that are dropped with the reason.

    Attributes:
        rule: text that states the rule.
        kept: rows of the manifest, in its order.
        dropped: (row, reason), in the order of the manifest.
        mean_before: mean fidelity of all images.
        mean_after: mean fidelity of the kept images.
    """

    rule: str
    kept: list[Sample]
    dropped: list[tuple[Sample, str]]
    mean_before: float
    mean_after: float

    def to_dict(self) -> dict:
        """Plain types for JSON; the rows are in the CSV files."""
        return asdict(self) | {"kept": len(self.kept), "dropped": len(self.dropped)}


def _table(content: dict) -> Table:
    everything = content["kept"] + content["dropped"]
    rows = [["all", everything, content["mean_before"]], ["kept", content["kept"], content["mean_after"]]]
    return Table(["", "images", f"mean {FIDELITY_COLUMN}"], rows)


SECTION = Section(
    "filter",
    "Filter: images that follow their masks best",
    "kept.csv and dropped.csv list the images. The set itself is unchanged.",
    _table,
    lambda content: [f"kept {content['kept']} of {content['kept'] + content['dropped']} images: {content['rule']}"],
)


def filter_set(samples: SampleSet, min_fidelity: float | None = None, keep_share: float | None = None) -> FilterResult:
    """Choose images by the column ``fidelity_dice`` of the manifest.

    Args:
        samples: a set on which ``evaluate.py fidelity`` has run.
        min_fidelity: keep images with at least this Dice.
        keep_share: keep this fraction of the images, the best ones, but at least one. Of equal images, the first wins.

    Raises:
        InputError: the manifest has no fidelity, or no image would be kept.
        ValueError: both rules or none are given.
    """
    values = read_fidelity(samples)
    if min_fidelity is not None and keep_share is None:
        rule = f"{FIDELITY_COLUMN} of at least {min_fidelity:g}"
        limit = f"{FIDELITY_COLUMN} below {min_fidelity:g}"
        keep = {index for index, value in enumerate(values) if value >= min_fidelity}
    elif keep_share is not None and min_fidelity is None:
        count = max(1, math.floor(keep_share * len(values) + 0.5))
        order = sorted(range(len(values)), key=lambda index: (-values[index], index))
        rule = f"the best {keep_share * 100:g} % by {FIDELITY_COLUMN}, down to {values[order[count - 1]]:.4f}"
        limit = f"not among the best {count} of {len(values)} by {FIDELITY_COLUMN}"
        keep = set(order[:count])
    else:
        raise ValueError("give either min_fidelity or keep_share")
    if not keep:
        raise InputError(
            f"`min_fidelity` {min_fidelity:g} keeps none of the {len(values)} images of {samples.folder}; the best has "
            f"{max(values):.4f}"
        )
    return FilterResult(
        rule=rule,
        kept=[sample for index, sample in enumerate(samples.samples) if index in keep],
        dropped=[(sample, limit) for index, sample in enumerate(samples.samples) if index not in keep],
        mean_before=sum(values) / len(values),
        mean_after=sum(values[index] for index in keep) / len(keep),
    )


def read_fidelity(samples: SampleSet) -> list[float]:
    """The column ``fidelity_dice``, one number per image.

    Raises:
        InputError: the column is missing, or a row has no number.
    """
    if FIDELITY_COLUMN not in samples.columns:
        raise InputError(
            f"{samples.folder / MANIFEST} has no column {FIDELITY_COLUMN}; run evaluate.py fidelity on the set first"
        )
    values = [number_or_none(sample.columns[FIDELITY_COLUMN]) for sample in samples.samples]
    rows = zip(samples.samples, values, strict=True)
    bad = [sample.columns["image"] for sample, value in rows if value is None or not 0 <= value <= 1]
    if bad:
        raise InputError(
            f"{samples.folder / MANIFEST}: {len(bad)} rows have no number from 0 to 1 in {FIDELITY_COLUMN}: "
            f"{list_some(bad)}; run evaluate.py fidelity on the set again"
        )
    return [value for value in values if value is not None]


def write_filter_report(samples: SampleSet, result: FilterResult, output: Path | None = None) -> list[Path]:
    """Write ``kept.csv``, ``dropped.csv`` and ``filter.json``. If ``output`` is given, copy the kept images there.

    Args:
        output: new folder for copies of the kept images with their labels, manifest and settings.

    Returns:
        Paths of the written files.

    Raises:
        InputError: ``output`` is not empty.
    """
    if output is not None:
        copy_set(samples, result, output)
    folder = results_folder(samples)
    write_csv(folder / KEPT, samples.columns, ([s.columns[name] for name in samples.columns] for s in result.kept))
    write_csv(
        folder / DROPPED,
        ["image", "label", FIDELITY_COLUMN, "reason"],
        ([s.columns[name] for name in ("image", "label", FIDELITY_COLUMN)] + [why] for s, why in result.dropped),
    )
    write_json(folder / "filter.json", result.to_dict())
    return [folder / KEPT, folder / DROPPED, *([output] if output is not None else [])]


def filter_note(samples: SampleSet, result: FilterResult, output: Path) -> dict:
    """Entry for the new set's settings: the rule, and the training images of every judge that selected its images.

    The set may have been selected before, by ``sample_ddp.py --min-fidelity`` or by this command. If the training
    images of one judge are unknown, the list is empty, and ``evaluate.py utility`` refuses the set.
    """
    fidelity = samples.folder / RESULTS / "fidelity.json"
    judge = read_json(fidelity, "run evaluate.py fidelity again") if fidelity.is_file() else {}
    seen = [note.get("judge_images_sha256") or [] for note in (judge, *judge_notes(samples.settings))]
    before = samples.settings.get("filter")
    return {
        "filtered_from": relative_to_set(samples.folder, output),
        "rule": result.rule,
        "judge_key": judge.get("judge_key"),
        "judge_images_sha256": sorted(set().union(*seen)) if all(seen) else [],
        **({"before": before} if before else {}),
    }


def copy_set(samples: SampleSet, result: FilterResult, output: Path) -> None:
    """Copy the kept images into a new set, whole or not at all.

    Raises:
        InputError: ``output`` exists and is not an empty folder, or lies inside the set.
    """
    if real_path(output).is_relative_to(real_path(samples.folder)):
        raise InputError(f"{output} lies inside the set {samples.folder}; name a folder beside it")
    rows = []
    with new_folder(output) as folder:
        for sample in result.kept:
            for name, path in (("image", sample.image_path), ("label", sample.label_path)):
                target = folder / sample.columns[name]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            outside = {"real_image": sample.real_path, "source_mask": sample.source_mask}
            moved = {name: relative_to_set(path, output) for name, path in outside.items() if path is not None}
            rows.append(sample.columns | moved)
        write_json(folder / SETTINGS, samples.settings | {"filter": filter_note(samples, result, output)})
        dropped = [[sample.columns["image"], sample.columns[FIDELITY_COLUMN], why] for sample, why in result.dropped]
        write_csv(folder / DROPPED, ["image", FIDELITY_COLUMN, "reason"], dropped)
        write_manifest(folder, rows)
