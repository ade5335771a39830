"""Does the generator repeat its training images: nearest training image of every sample, beside held-out real images.

Images are compared as gray pictures of at most ``SIDE`` pixels a side, in all eight symmetries (training turns and
flips its images) and, under --crop random, at every offset. The distance is sqrt(2 (1 - r)) with r the correlation of
the two pictures: 0 for a copy whatever its brightness and contrast, about 1.4 for unrelated pictures.

How near is too near depends on the images: dim windows with one nucleus resemble each other, real ones too. So samples
count that are nearer to a training image than any reference image is, beside how many of them chance would put there.

A sample made from a training image's own mask has its cells where that image has them and is nearer to it than held-out
images with cells elsewhere can be. So samples are counted apart by whether their mask is one of training, where the
masks are known. How a sample looks beside its nearest training image, in the picture, decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from common.disk import file_sha256, write_csv, write_json
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import find_files, read_image
from dataset.gray import fit_channels, image_window, window_image
from dataset.views import center_view
from evaluation.data_report import image_facts, near_duplicates
from evaluation.output import new_figure, number, save_figure, show_image
from synthetic.reader import SampleSet, describe_provenance, read_real

SIDE = 32
SYMMETRIES = 8
CLOSEST = 10
CANDIDATES = 24
QUERIES, WINDOWS = 64, 4096  # rows of a product: what fits into the cache and the memory
FLAT = 1e-3  # standard deviation of gray in [-1, 1] below which a picture shows nothing that could be repeated


@dataclass(frozen=True)
class Match:
    """Nearest training image of one picture.

    Attributes:
        distance: sqrt(2 (1 - r)), in [0, 2].
        index: of the training image.
        symmetry: turn that brings the training picture onto the other (:func:`turned`).
        top: row of the training picture, in turned small pixels, that lies on the first row of the other.
        left: likewise for columns.
    """

    distance: float
    index: int
    symmetry: int
    top: int = 0
    left: int = 0


def turned(array: np.ndarray, symmetry: int) -> np.ndarray:
    """One of the eight symmetries of the square, of the first two axes: quarter turns, then a flip from 4 on."""
    array = np.rot90(array, symmetry % 4, (0, 1))
    return np.flip(array, 1) if symmetry >= 4 else array


def small_gray(image: np.ndarray, factor: float) -> np.ndarray:
    """Gray picture reduced by area.

    Args:
        image: (H, W, C) float or uint8.
        factor: pixels of the image per pixel of the result, at least 1.

    Returns:
        (round(H / factor), round(W / factor)) float64.
    """
    gray = torch.from_numpy(np.ascontiguousarray(image.mean(axis=-1, dtype=np.float64)))[None, None]
    target = [max(1, round(length / factor)) for length in gray.shape[-2:]]
    return F.adaptive_avg_pool2d(gray, target)[0, 0].numpy()


class NearestTraining:
    """Finds the nearest of the training pictures, for many pictures at once: all heavy work is products of matrices.

    Pictures larger than what is asked for are searched in three steps, each on what the step before leaves over:

    1. At half the resolution, every window against every picture, without regard to turns: an upper bound of their
       correlation in any turn (:func:`turn_free`), 1 for a copy. The :data:`CANDIDATES` training pictures with the
       largest bounds stay.
    2. At half the resolution, all windows of these in all turns: the best turn and place in each.
    3. At full resolution, the windows around that place.

    Args:
        pictures: (h, w) float64 each, at least as large as what is asked for.
        side: (side, side) of the pictures asked for.
    """

    def __init__(self, pictures: Sequence[np.ndarray], side: int) -> None:
        self.pictures, self.side = pictures, side
        self._whole = all(picture.shape == (side, side) for picture in pictures)

    def find(
        self, pictures: Sequence[np.ndarray], skip: Sequence[int] | None = None, progress: bool = False
    ) -> list[Match | None]:
        """Nearest training picture of every picture, None for a flat one.

        Args:
            pictures: (side, side) float64 each.
            skip: for every picture the index of a training picture that does not count (the picture itself).
            progress: show a progress bar.
        """
        shown = [index for index, picture in enumerate(pictures) if picture.std() >= FLAT]
        asked = [pictures[index] for index in shown]
        skipped = np.array([-1 if skip is None else skip[index] for index in shown], int)
        search = self._search_whole if self._whole else self._search_windows
        found: list[Match | None] = [None] * len(pictures)
        for index, picture, places in zip(shown, asked, search(asked, skipped, progress), strict=True):
            found[index] = min((self._exact(picture, *place) for place in places), key=lambda match: match.distance)
        return found

    def _search_whole(self, asked: list[np.ndarray], skipped: np.ndarray, progress: bool) -> Iterator[list[Place]]:
        """The best training picture and turn, where nothing can be shifted."""
        rows = units(np.stack([picture.ravel() for picture in self.pictures]).astype(np.float32))
        for first in _steps(len(asked), QUERIES, "comparing", progress):
            some = slice(first, first + QUERIES)
            turns = np.stack([all_turns(picture) for picture in asked[some]])  # (q, 8, side * side)
            correlation = turns @ rows.T  # (q, 8, n)
            known = np.flatnonzero(skipped[some] >= 0)
            correlation[known, :, skipped[some][known]] = -2
            for best in correlation.reshape(len(turns), -1).argmax(axis=1):
                yield [Place(int(best) % len(rows), int(best) // len(rows), 0, 0)]

    def _search_windows(self, asked: list[np.ndarray], skipped: np.ndarray, progress: bool) -> Iterator[list[Place]]:
        """Steps 1 and 2 of the class: the place in every candidate, for step 3."""
        half = self.side // 2
        turns = np.stack([all_turns(_halved(picture)) for picture in asked]) if asked else np.zeros((0, 8, half**2))
        candidates = self._candidates(turns[:, 0], skipped, progress)  # (q, c)
        places = np.zeros((*candidates.shape, 3), int)
        for index in _steps(len(self.pictures), 1, "comparing", progress):
            queries, columns = np.nonzero(candidates == index)
            kernels = turns[queries].reshape(-1, half**2)  # (q * 8, half * half)
            best = np.full(len(queries), -2, np.float32)
            for part in half_windows(self.pictures[index], half) if len(queries) else ():
                correlation = (kernels @ part.rows.T * part.scale).reshape(len(queries), -1)  # (q, 8 * n)
                symmetry, window = np.divmod(correlation.argmax(axis=1), len(part.rows))
                value = correlation.max(axis=1)
                better = value > best
                found = np.stack([symmetry, part.tops[window], part.lefts[window]], axis=1)
                places[queries[better], columns[better]] = found[better]
                best = np.maximum(best, value)
        for indices, where, unwanted in zip(candidates, places, skipped, strict=True):
            yield [Place(i, *place) for i, place in zip(indices.tolist(), where.tolist(), strict=True) if i != unwanted]

    def _candidates(self, asked: np.ndarray, skipped: np.ndarray, progress: bool) -> np.ndarray:
        """(q, c) indices of the training pictures with the largest bounds.

        Args:
            asked: (q, half * half) float32 pictures at half the resolution, of mean 0 and length 1.
            skipped: (q,) index of the training picture that does not count, or -1.
            progress: show a progress bar.
        """
        half = self.side // 2
        basis = turn_basis(half)
        zeros, ones = np.zeros(len(asked), np.float32), np.ones(len(asked), np.float32)
        wanted = turn_free(asked, zeros, ones, basis).T  # (d + 1, q)
        bounds = np.full((len(self.pictures), len(asked)), -1, np.float32)
        for index in _steps(len(self.pictures), 1, "looking for candidates", progress):
            for part in half_windows(self.pictures[index], half):
                bound = turn_free(part.rows, part.mean, part.scale, basis) @ wanted  # (n, q)
                np.maximum(bounds[index], bound.max(axis=0), out=bounds[index])
        known = np.flatnonzero(skipped >= 0)
        bounds[skipped[known], known] = -2
        return np.argsort(-bounds, axis=0, kind="stable")[:CANDIDATES].T

    def _exact(self, picture: np.ndarray, index: int, symmetry: int, top: int, left: int) -> Match:
        """The best window at most two pixels from a place, in float64."""
        training = self.pictures[index]
        tops, lefts = (
            range(max(0, start - 2), min(length - self.side, start + 2) + 1)
            for start, length in zip((top, left), training.shape, strict=True)
        )
        part = training[tops[0] : tops[-1] + self.side, lefts[0] : lefts[-1] + self.side]
        windows = sliding_window_view(part, (self.side, self.side)).reshape(-1, self.side**2)
        query = units(turned(picture, _inverse(symmetry)).reshape(1, -1))[0]
        correlation = units(windows) @ query
        best = int(correlation.argmax())
        row, column = divmod(best, len(lefts))
        return Match(_distance(correlation[best]), index, symmetry, tops[row], lefts[column])


class Place(NamedTuple):
    """Where a picture may lie in the training pictures; see :class:`Match`."""

    index: int
    symmetry: int
    top: int
    left: int


def _steps(count: int, step: int, title: str, progress: bool) -> Iterator[int]:
    """First numbers of the chunks of so many pictures, with a progress bar over the pictures."""
    with tqdm(total=count, desc=title, unit="image", disable=None if progress else True) as bar:
        for first in range(0, count, step):
            yield first
            bar.update(min(step, count - first))


def units(rows: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and length 1, (n, d) in the dtype given; 0 for a flat row."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    clear = length > FLAT * np.sqrt(rows.shape[1])
    return rows * np.where(clear, 1 / np.where(clear, length, 1), 0).astype(rows.dtype)


def all_turns(picture: np.ndarray) -> np.ndarray:
    """(8, side * side) float32 units: entry s lies on a picture that ``turned(., s)`` brings onto ``picture``."""
    rows = np.stack([turned(picture, _inverse(s)).ravel() for s in range(SYMMETRIES)])
    return units(rows.astype(np.float32))


class Windows(NamedTuple):
    """Windows of a picture as they are, and what makes them units.

    Attributes:
        tops: (n,) first row of each in the picture at full resolution.
        lefts: (n,) first column.
        rows: (n, side * side) float32.
        mean: (n,) of each.
        scale: (n,) 1 / length without the mean; 0 for a flat one.
    """

    tops: np.ndarray
    lefts: np.ndarray
    rows: np.ndarray
    mean: np.ndarray
    scale: np.ndarray


def half_windows(picture: np.ndarray, side: int) -> Iterator[Windows]:
    """All windows at half the resolution, from odd rows and columns too, about :data:`WINDOWS` at a time."""
    for top, left in itertools.product((0, 1), (0, 1)):
        small = _halved(picture[top:, left:])
        if min(small.shape) < side:
            continue
        small = small - small.mean()  # keeps the differences of sums exact
        mean = _window_sums(small, side) / side**2
        length = np.sqrt(np.maximum(_window_sums(small**2, side) - side**2 * mean**2, 0))
        clear = length > FLAT * side
        scale = np.where(clear, 1 / np.where(clear, length, 1), 0)
        windows = sliding_window_view(small.astype(np.float32), (side, side))
        step = max(1, WINDOWS // windows.shape[1])
        for first in range(0, len(windows), step):
            part = slice(first, first + step)
            tops, lefts = np.indices(scale[part].shape).reshape(2, -1)
            yield Windows(
                2 * (first + tops) + top,
                2 * lefts + left,
                windows[part].reshape(-1, side**2),
                mean[part].ravel().astype(np.float32),
                scale[part].ravel().astype(np.float32),
            )


def _window_sums(values: np.ndarray, side: int) -> np.ndarray:
    """Sum over every (side, side) window."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    table[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    return table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]


def turn_basis(side: int) -> np.ndarray:
    """(side * side, d) float32 orthonormal: one column for the pixels that the eight symmetries exchange."""
    numbers = np.arange(side**2).reshape(side, side)
    smallest = np.min([turned(numbers, s) for s in range(SYMMETRIES)], axis=0)
    orbit = np.unique(smallest, return_inverse=True)[1].ravel()
    basis = np.eye(orbit.max() + 1, dtype=np.float32)[orbit]
    return basis / np.linalg.norm(basis, axis=0)


def turn_free(rows: np.ndarray, mean: np.ndarray, scale: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """What turns do not change: the product of two bounds the correlation of the pictures in any turn from above.

    A unit vector u is a part P u that no symmetry changes, and a rest: <u, turned v> = <P u, P v> + <rest of u, turned
    rest of v>, and the last is at most the product of the rests' lengths (Cauchy-Schwarz).

    Args:
        rows: (n, side * side) float32 pictures.
        mean: (n,) of each.
        scale: (n,) 1 / length without the mean; 0 for a flat one.
        basis: of :func:`turn_basis`.

    Returns:
        (n, d + 1): the part in the basis, and the length of the rest.
    """
    part = (rows @ basis - mean[:, None] * basis.sum(axis=0)) * scale[:, None]
    rest = np.sqrt(np.maximum((scale > 0) - (part**2).sum(axis=1), 0))
    return np.concatenate([part, rest[:, None]], axis=1)


def _halved(picture: np.ndarray) -> np.ndarray:
    """Means of blocks of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = (length // 2 * 2 for length in picture.shape)
    return picture[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))


def _inverse(symmetry: int) -> int:
    """The symmetry that undoes another: a flip undoes itself, n quarter turns are undone by 4 - n."""
    return symmetry if symmetry >= 4 else -symmetry % 4


def _distance(correlation: float) -> float:
    return float(np.sqrt(max(0.0, 2 * (1 - correlation))))


# --- the measure -----------------------------------------------------------------------------------------------------


@dataclass
class MemorisationReport:
    """Result of ``score_memorisation``.

    Attributes:
        samples: distance of every synthetic image, None for one of a single gray value.
        reference: distances of the real images that are no training images (or, without such, of each training image
            to the nearest other one).
        reference_is: in words.
        reference_left_out: how many real images show (nearly) what another training image shows and are no yardstick.
        closer_than_any: samples nearer to a training image than any reference image is.
        closer_by_chance: how many that would be on average if samples were like the reference images.
        made_from_training_masks: samples whose source mask is one of training; None where that is not known.
        closer_of_other_masks: of the samples counted in ``closer_than_any`` those made from other masks.
        closest: the nearest pairs.
    """

    training_images: int
    samples: list[float | None]
    reference: list[float]
    reference_is: str
    reference_left_out: int
    closer_than_any: int
    closer_by_chance: float
    made_from_training_masks: int | None
    closer_of_other_masks: int | None
    closest: list[dict]
    provenance: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain types for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The table that the command prints."""
        known = [value for value in self.samples if value is not None]
        lines = [f"{'distance to the nearest training image':44}{'least':>9}{'5 %':>9}{'median':>9}"]
        for title, values in (("synthetic images", known), (self.reference_is, self.reference)):
            cells = np.percentile(values, [0, 5, 50]) if values else [None] * 3
            lines.append(f"{title:44}" + "".join(number(value, 9) for value in cells))
        return lines + self.words() + describe_provenance(self.provenance)

    def words(self) -> list[str]:
        """What the distances say."""
        words = [
            f"{self.closer_than_any} of {len(self.samples)} synthetic images are nearer to a training image than any "
            f"of the {len(self.reference)} reference images; {self.closer_by_chance:.1f} would be by chance"
        ]
        if self.reference_left_out:
            words.append(f"{self.reference_left_out} real images show what another training image shows: left out")
        if self.made_from_training_masks is not None:
            words.append(
                f"{self.made_from_training_masks} synthetic images were made from masks of training and have their "
                f"cells in the same places; of the others {self.closer_of_other_masks} are nearer than any reference"
            )
        return [*words, "0 is a copy, 1.4 unrelated; look at memorisation.png: grain and background tell a copy"]


def score_memorisation(
    samples: SampleSet,
    train_dir: str | Path,
    held_out_dir: str | Path | None = None,
    train_mask_dir: str | Path | None = None,
    progress: bool = False,
) -> tuple[MemorisationReport, list[tuple[int, Match]], list[Path]]:
    """Nearest training image of every sample, beside held-out real images.

    Args:
        samples: the synthetic set.
        train_dir: images that the generator was trained on.
        held_out_dir: real images that it was not trained on.
        train_mask_dir: masks of training, to know which samples were made from them.
        progress: show a progress bar.

    Returns:
        The report, the closest pairs (number of the sample, match) and the training files.

    Raises:
        InputError: fewer than two training images and no held-out ones, or unreadable files.
    """
    config = samples.require_config()
    factor = max(1.0, config.image_size / SIDE)
    side = max(1, round(config.image_size / factor))
    paths = list(find_files(train_dir, "image").values())
    if held_out_dir is None and len(paths) < 2:
        raise InputError(f"{train_dir} holds one image: give held-out real images with --held-out")
    bar = partial(tqdm, unit="image", disable=None if progress else True)
    training = [small_gray(_training_picture(path, config), factor) for path in bar(paths, desc="reading training")]
    squares = (samples.squares(samples.synthetic(one)) for one in bar(samples.samples, desc="reading set"))
    drawn = [[small_gray(_to_unit(square), factor) for square in one] for one in squares]  # several of a large field
    nearest = NearestTraining(training, side)
    found = iter(nearest.find([picture for pictures in drawn for picture in pictures], progress=progress))
    matches = [_closest(itertools.islice(found, len(pictures))) for pictures in drawn]
    alone = held_out_dir is None
    others = paths if alone else list(find_files(held_out_dir, "image").values())
    reference_is = "training images to the nearest other one" if alone else "held-out real images"
    shown_twice = _shown_in_training(paths, others)
    kept = [index for index, path in enumerate(others) if path not in shown_twice]
    if not kept:
        raise InputError(
            f"{held_out_dir or train_dir}: every image shows what an image of training shows, so none says how near a "
            "new one comes: give other real images with --held-out"
        )
    skip = kept if alone else None
    yardstick = bar([others[index] for index in kept], desc="reading reference")
    real = [small_gray(_to_unit(read_real(path, config)), factor) for path in yardstick]
    reference = [match.distance for match in nearest.find(real, skip, progress) if match is not None]
    from_training = _made_from(samples, train_mask_dir)
    least = min(reference, default=0.0)
    near = [match is not None and match.distance < least for match in matches]
    order = sorted((i for i, match in enumerate(matches) if match is not None), key=lambda i: matches[i].distance)
    closest = [(index, matches[index]) for index in order[:CLOSEST]]
    report = MemorisationReport(
        training_images=len(paths),
        samples=[None if match is None else match.distance for match in matches],
        reference=reference,
        reference_is=reference_is,
        reference_left_out=len(others) - len(kept),
        closer_than_any=sum(near),
        closer_by_chance=len(order) / (len(reference) + 1),
        made_from_training_masks=None if from_training is None else sum(from_training),
        closer_of_other_masks=None
        if from_training is None
        else sum(one and not known for one, known in zip(near, from_training, strict=True)),
        closest=[
            {"image": samples.samples[i].columns["image"], "training_image": paths[match.index].name, **asdict(match)}
            for i, match in closest
        ],
        provenance=samples.provenance(),
    )
    return report, closest, paths


def _closest(matches: Iterable[Match | None]) -> Match | None:
    """The nearest of the matches of an image's squares; None where all of them are flat."""
    return min((match for match in matches if match is not None), key=lambda match: match.distance, default=None)


def _shown_in_training(training: Sequence[Path], others: Sequence[Path]) -> set[Path]:
    """The other images that show (nearly) what a training image shows; where they are the training images themselves,
    what another one shows."""
    known, facts = set(map(str, training)), {path: image_facts(path) for path in {*training, *others}}
    pairs = near_duplicates([replace(one, name=str(path)) for path, one in facts.items()])
    found = {Path(name) for first, second, _ in pairs if {first, second} & known for name in (first, second)}
    return (found if others is training else found.union(training)) & set(others)


def _made_from(samples: SampleSet, train_mask_dir: str | Path | None) -> list[bool] | None:
    """Which samples were made from masks of a folder, by the hash in the manifest."""
    if train_mask_dir is None or "source_mask_sha256" not in samples.columns:
        return None
    known = {file_sha256(path) for path in find_files(train_mask_dir, "mask").values()}
    return [sample.columns["source_mask_sha256"] in known for sample in samples.samples]


def _training_picture(path: Path, config: DataConfig) -> np.ndarray:
    """A training image as far as training can show it: the middle square, or with --crop random the whole image."""
    image = fit_channels(read_image(path), config.channels, path)
    if config.crop == "center":
        image = center_view(image.shape[0], image.shape[1], config.image_size).apply_image(image)
    return window_image(image, image_window(image, config))


def _to_unit(image: np.ndarray) -> np.ndarray:
    return image / 127.5 - 1


# --- files -----------------------------------------------------------------------------------------------------------


def write_memorisation_report(
    samples: SampleSet, report: MemorisationReport, closest: list[tuple[int, Match]], paths: list[Path]
) -> Path:
    """Write ``memorisation.json``, ``memorisation.csv`` and the closest pairs, ``memorisation.png``; the folder."""
    folder = samples.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    write_json(folder / "memorisation.json", report.to_dict())
    rows = [
        [sample.columns["image"], "" if value is None else f"{value:.5f}"]
        for sample, value in zip(samples.samples, report.samples, strict=True)
    ]
    write_csv(folder / "memorisation.csv", ["image", "distance"], rows)
    draw_closest(samples, closest, paths, folder / "memorisation.png")
    return folder


def draw_closest(samples: SampleSet, closest: list[tuple[int, Match]], paths: list[Path], path: Path) -> None:
    """The closest pairs side by side, the training image turned and cut as it lies on the sample."""
    if not closest:
        return
    config = samples.require_config()
    factor = max(1.0, config.image_size / SIDE)
    rows = -(-len(closest) // 2)
    figure = new_figure(9, 2.4 * rows)
    axes = figure.subplots(rows, 4, squeeze=False).reshape(-1, 2)
    for axis in axes.ravel():
        axis.set_axis_off()
    for (left, right), (index, match) in zip(axes, closest, strict=False):
        sample = samples.samples[index]
        show_image(left, samples.synthetic(sample), f"synthetic {sample.name[:20]}")
        window = _matching_window(paths[match.index], match, config, factor)
        show_image(right, window, f"training {paths[match.index].stem[:16]}, {match.distance:.2f}")
    save_figure(figure, path)


def _matching_window(path: Path, match: Match, config: DataConfig, factor: float) -> np.ndarray:
    """The part of a training image that a match means, uint8 (S, S, C)."""
    picture = _training_picture(path, config)
    size = config.image_size
    top, left = (min(round(start * factor), max(0, length - size)) for start, length in
                 zip((match.top, match.left), picture.shape[:2], strict=True))  # fmt: skip
    window = turned(picture[top : top + size, left : left + size], match.symmetry)
    return np.rint((window + 1) * 127.5).astype(np.uint8)
