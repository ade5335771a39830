"""Looks: are colour, contrast and grain of the synthetic images those of the real ones?

Each number that describes a look (``dataset/looks.py``) is compared with random halves of the real images. For
comparison, each distance is also computed for the other half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import wasserstein_distance

from common.disk import write_json
from common.errors import InputError
from common.randomness import compared_sides
from dataset.files import find_images
from dataset.looks import look_names, measure_image
from dataset.names import name_of
from evaluation.output import Section, Table, new_figure, results_folder, save_figure, show_image
from synthetic.reader import Sample, SampleSet, read_whole

ROWS, COLUMNS = 6, 8  # of the picture
MOST_LETTERS = 20  # of a name in it
FULL_RANGE = ((0.0, 255.0),)


@dataclass(frozen=True)
class NumberScore:
    """One number of the looks, synthetic and real.

    Attributes:
        synthetic_mean, real_mean: over the images.
        distance: mean Wasserstein distance of synthetic images to random halves of the real ones, divided by the
            standard deviation of the real values; to all of a single image.
        real_distance: the same for as many images of the other half; None for a single image.
    """

    synthetic_mean: float
    real_mean: float
    distance: float
    real_distance: float | None


@dataclass(frozen=True)
class LooksReport:
    """Result of ``score_looks``."""

    numbers: dict[str, NumberScore]
    synthetic_images: int
    real_images: int
    looks: int  # different ones in the set, as the manifest says; 0 if it does not


def _table(content: dict) -> Table:
    rows = [
        [name, one["synthetic_mean"], one["real_mean"], one["distance"], one["real_distance"]]
        for name, one in content["numbers"].items()
    ]
    return Table(["", "synthetic, mean", "real, mean", "distance / real std", "real - real / real std"], rows)


def _notes(content: dict) -> list[str]:
    numbers = content["numbers"].values()
    mean = float(np.mean([one["distance"] for one in numbers]))
    halves = [one["real_distance"] for one in numbers if one["real_distance"] is not None]
    beside = f", {np.mean(halves):.3f} between halves of the real images" if halves else ""
    looks = f" of {content['looks']} looks" if content["looks"] else ""
    return [
        f"mean distance {mean:.3f}{beside}; {content['synthetic_images']} synthetic images{looks}, "
        f"{content['real_images']} real images"
    ]


SECTION = Section(
    "looks",
    "Looks: colour, contrast and grain",
    "Means over the images on [-1, 1], and Wasserstein distances in standard deviations of the real images: of "
    "synthetic images to random halves of the real ones, and ('real - real') of as many images of the other half. "
    "Gradients are logarithms.",
    _table,
    _notes,
    ("looks.png",),
)


def score_looks(samples: SampleSet, image_dir: Path | None = None) -> LooksReport:
    """Measure the looks of the set and of real images.

    Args:
        image_dir: real images. None: those that the manifest names.

    Raises:
        InputError: no real images are known.
    """
    config = samples.require_config()
    if image_dir is not None:
        files = list(find_images(image_dir).values())
        real = [read_whole(path, config) for path in files]
    elif samples.has_real:
        files = samples.real_files()
        real = [samples.real(one) for one in samples.samples]
    else:
        raise InputError(f"the manifest of {samples.folder} names no real images: give a folder of real images")
    theirs = _measure(samples, real)
    ours = _measure(samples, (samples.synthetic(one) for one in samples.samples))
    triples = [
        (_at(ours, side.synthetic), _at(theirs, side.real), _at(theirs, side.half))
        for side in compared_sides(files, len(ours), is_paired=image_dir is None)
    ]
    all_ours, all_theirs = np.concatenate(ours), np.concatenate(theirs)
    numbers = {}
    for column, name in enumerate(look_names(config.channels)):
        sides = [tuple(side[:, column] for side in triple) for triple in triples]
        numbers[name] = _compare(all_ours[:, column], all_theirs[:, column], sides)
    return LooksReport(
        numbers=numbers,
        synthetic_images=len(samples),
        real_images=len(set(files)),
        looks=len({one.columns["look_image"] for one in samples.samples if one.columns.get("look_image")}),
    )


def _measure(samples: SampleSet, images: Iterable[np.ndarray]) -> list[np.ndarray]:
    """For each image, uint8 (H, W, C): the looks (n, N) of squares of the training size that cover it."""
    config = samples.require_config()
    last = 1 if config.channels == 1 else None  # the reader repeats gray
    return [
        np.stack([measure_image(part[:, :, :last], FULL_RANGE, config) for part in samples.squares(image)])
        for image in images
    ]


def _at(looks: Sequence[np.ndarray], places: np.ndarray) -> np.ndarray:
    """Looks (n, N) of all squares of some images."""
    return np.concatenate([looks[place] for place in places])


def _compare(ours: np.ndarray, theirs: np.ndarray, sides: Sequence[tuple[np.ndarray, ...]]) -> NumberScore:
    """Score of one number, from all values and from those of ``compared_sides``."""
    spread = max(float(theirs.std()), 1e-3)
    distances = [wasserstein_distance(drawn, half) for drawn, _, half in sides] or [wasserstein_distance(ours, theirs)]
    floor = [wasserstein_distance(other, half) for _, other, half in sides]
    return NumberScore(
        synthetic_mean=float(ours.mean()),
        real_mean=float(theirs.mean()),
        distance=float(np.mean(distances)) / spread,
        real_distance=float(np.mean(floor)) / spread if floor else None,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def write_looks_report(samples: SampleSet, report: LooksReport, image_dir: Path | None = None) -> Path:
    """Write ``looks.json``, and ``looks.png`` (with real images of ``image_dir``) if the manifest names looks."""
    folder = results_folder(samples)
    write_json(folder / "looks.json", asdict(report))
    if report.looks:
        draw_looks(samples, folder / "looks.png", image_dir)
    return folder


def draw_looks(samples: SampleSet, path: Path, image_dir: Path | None = None) -> None:
    """A row for each of the most frequent looks, with the outlines of the masks.

    The first column shows the real image of the look, if it is known. If most of these looks were drawn with the same
    masks, each other column is one mask, shown on top. Otherwise every image has its own mask.
    """
    counts = Counter(look for look in map(_look, samples.samples) if look)
    looks = [name for name, _ in counts.most_common(ROWS)]
    rows: Mapping[str, Sequence[Sample | None]]
    rows, heads = _aligned(samples, looks), True
    if not rows:
        heads = False
        rows = {name: [one for one in samples.samples if _look(one) == name][:COLUMNS] for name in looks}
    real = _real_images(samples, looks, image_dir)
    columns = max(map(len, rows.values()))
    figure = new_figure(1.6 * (columns + bool(real)), 1.8 * (len(looks) + heads))
    grid = figure.subplots(len(looks) + heads, columns + bool(real), squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    if heads:
        column = [next(one for one in places if one is not None) for places in zip(*rows.values(), strict=True)]
        for axis, sample in zip(grid[0, bool(real) :], column, strict=True):
            show_image(axis, samples.foreground(sample), _short(_mask(sample)[0]))
    for line, (look, drawn) in zip(grid[int(heads) :], rows.items(), strict=True):
        if look in real:
            show_image(line[0], real[look], f"real: {_short(look)}")
        for place, (axis, one) in enumerate(zip(line[bool(real) :], drawn, strict=False)):
            if one is not None:
                own = _short(_mask(one)[0]) if not heads else ""
                title = f"look of {_short(look)}" if place == 0 and not real else own
                show_image(axis, samples.synthetic(one), title, samples.foreground(one))
    save_figure(figure, path)


def _look(sample: Sample) -> str:
    return sample.columns.get("look_image", "")


def _mask(sample: Sample) -> tuple[str, str, str]:
    """What an image was made from: the name of the mask, and where its part was cut."""
    mask = sample.columns["source_mask"] or sample.columns["label"]
    return name_of(Path(mask).name), sample.columns["crop_top"], sample.columns["crop_left"]


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def _aligned(samples: SampleSet, looks: Sequence[str]) -> dict[str, list[Sample | None]]:
    """For each look the images of the masks that most looks have; empty if less than half of the places are filled."""
    drawn = {(_look(one), _mask(one)): one for one in reversed(samples.samples)}
    counts = Counter(mask for look, mask in drawn if look in looks)
    masks = [mask for mask, _ in counts.most_common(COLUMNS)]
    rows = {look: [drawn.get((look, mask)) for mask in masks] for look in looks}
    filled = sum(one is not None for row in rows.values() for one in row)
    return rows if len(looks) > 1 and 2 * filled >= len(looks) * len(masks) else {}


def _real_images(samples: SampleSet, looks: Sequence[str], image_dir: Path | None) -> dict[str, np.ndarray]:
    """Look -> a square of the real image that has it, if its file is known."""
    paths = {} if image_dir is None else find_images(image_dir)
    paths = {name_of(one.real_path.name): one.real_path for one in samples.samples if one.real_path is not None} | paths
    config = samples.require_config()
    return {look: samples.squares(read_whole(paths[look], config))[0] for look in looks if look in paths}
