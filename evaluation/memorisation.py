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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import file_sha256, write_json
from data import DataConfig, center_view, find_files, fit_channels, image_window, window_image
from errors import InputError
from evaluation.output import new_figure, number, save_figure, show_image, write_csv
from evaluation.samples import SampleSet, describe_provenance, read_real
from image_files import read_image

SIDE = 32
SYMMETRIES = 8
CLOSEST = 10
CANDIDATES = 16
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
    """Finds the nearest of the training pictures.

    Pictures larger than what is asked for are searched at half the resolution first, and the :data:`CANDIDATES` best of
    them at full: a copy is among those, since it correlates at half the resolution, too.

    Args:
        pictures: (h, w) float64 each, at least as large as what is asked for.
        side: (side, side) of the pictures asked for.
    """

    def __init__(self, pictures: Sequence[np.ndarray], side: int) -> None:
        self.side = side
        self._whole = all(picture.shape == (side, side) for picture in pictures)
        if self._whole:  # every symmetry of every picture is one row
            self._rows = np.stack([_unit(turned(one, s)) for one in pictures for s in range(SYMMETRIES)])
        else:
            self._fine = [_Sliding(picture, side) for picture in pictures]
            self._coarse = [_Sliding(_halved(picture), side // 2) for picture in pictures]

    def __call__(self, picture: np.ndarray, skip: int | None = None) -> Match | None:
        """Nearest training picture, None for a flat one.

        Args:
            picture: (side, side) float64.
            skip: index of a training picture that does not count (the picture itself).
        """
        if picture.std() < FLAT:
            return None
        if self._whole:
            correlation = self._rows @ _unit(picture)
            if skip is not None:
                correlation[skip * SYMMETRIES : (skip + 1) * SYMMETRIES] = -1
            best = int(correlation.argmax())
            return Match(_distance(correlation[best]), best // SYMMETRIES, best % SYMMETRIES)
        coarse = _all_turns(_halved(picture))
        values = [-2.0 if i == skip else one.best(coarse)[0] for i, one in enumerate(self._coarse)]
        candidates = [int(index) for index in np.argsort(values)[::-1][:CANDIDATES] if index != skip]
        fine = _all_turns(picture)
        found = [(*self._fine[index].best(fine), index) for index in candidates]
        value, symmetry, top, left, index = max(found, key=lambda entry: entry[0])
        return Match(_distance(value), index, symmetry, top, left)


class _Sliding:
    """Correlation of small pictures with every window of a larger one, by Fourier transforms in float32."""

    def __init__(self, picture: np.ndarray, side: int) -> None:
        self.valid = tuple(length - side + 1 for length in picture.shape)
        self.shape = tuple(scipy.fft.next_fast_len(length, real=True) for length in picture.shape)
        picture = picture - picture.mean()  # keeps the differences below exact
        self.transform = scipy.fft.rfft2(picture.astype(np.float32), self.shape)
        mean = _window_sums(picture, side) / side**2
        variance = _window_sums(picture**2, side) / side**2 - mean**2
        length = np.sqrt(np.maximum(variance, 0)) * side  # of every window without its mean
        clear = length > FLAT * side
        self.scale = np.where(clear, 1 / np.where(clear, length, 1), 0).astype(
            np.float32
        )  # flat windows: correlation 0

    def best(self, units: np.ndarray) -> tuple[float, int, int, int]:
        """Largest correlation with pictures (n, side, side) of mean 0 and length 1, which one, and where."""
        product = self.transform * np.conj(scipy.fft.rfft2(units, self.shape))
        found = scipy.fft.irfft2(product, self.shape)[:, : self.valid[0], : self.valid[1]] * self.scale
        which, top, left = np.unravel_index(int(found.argmax()), found.shape)
        return float(found[which, top, left]), int(which), int(top), int(left)


def _all_turns(picture: np.ndarray) -> np.ndarray:
    """(8, side, side) float32: entry s lies on a picture that ``turned(., s)`` brings onto ``picture``."""
    units = [_unit(turned(picture, _inverse(s))).reshape(picture.shape) for s in range(SYMMETRIES)]
    return np.stack(units).astype(np.float32)


def _halved(picture: np.ndarray) -> np.ndarray:
    """Means of blocks of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = (length // 2 * 2 for length in picture.shape)
    return picture[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))


def _window_sums(values: np.ndarray, side: int) -> np.ndarray:
    """Sum over every (side, side) window."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    table[1:, 1:] = values.cumsum(axis=0).cumsum(axis=1)
    return table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]


def _inverse(symmetry: int) -> int:
    """The symmetry that undoes another: a flip undoes itself, n quarter turns are undone by 4 - n."""
    return symmetry if symmetry >= 4 else -symmetry % 4


def _unit(picture: np.ndarray) -> np.ndarray:
    """Flat, mean 0, length 1; 0 for a flat picture."""
    flat = picture.ravel() - picture.mean()
    length = np.linalg.norm(flat)
    return flat / length if length > FLAT * np.sqrt(flat.size) else np.zeros_like(flat)


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
    nearest = NearestTraining([small_gray(_training_picture(path, config), factor) for path in paths], side)
    matches = [
        nearest(small_gray(_to_unit(samples.synthetic(sample)), factor))
        for sample in tqdm(samples.samples, desc="comparing", unit="image", disable=None if progress else True)
    ]
    reference, reference_is = _reference(nearest, paths, held_out_dir, config, factor)
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


def _reference(
    nearest: NearestTraining, paths: list[Path], held_out_dir: str | Path | None, config: DataConfig, factor: float
) -> tuple[list[float], str]:
    """Distances of real images that should be no copies, and what they are."""
    if held_out_dir is None:
        matches = [nearest(small_gray(_to_unit(read_real(p, config)), factor), i) for i, p in enumerate(paths)]
        words = "training images to the nearest other one"
    else:
        others = find_files(held_out_dir, "image").values()
        matches = [nearest(small_gray(_to_unit(read_real(path, config)), factor)) for path in others]
        words = "held-out real images"
    return [match.distance for match in matches if match is not None], words


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
        show_image(left, samples.synthetic(sample), sample.name[:30])
        window = _matching_window(paths[match.index], match, config, factor)
        show_image(right, window, f"{paths[match.index].stem[:20]}, {match.distance:.2f}")
    save_figure(figure, path)


def _matching_window(path: Path, match: Match, config: DataConfig, factor: float) -> np.ndarray:
    """The part of a training image that a match means, uint8 (S, S, C)."""
    picture = _training_picture(path, config)
    size = config.image_size
    top, left = (min(round(start * factor), max(0, length - size)) for start, length in
                 zip((match.top, match.left), picture.shape[:2], strict=True))  # fmt: skip
    window = turned(picture[top : top + size, left : left + size], match.symmetry)
    return np.rint((window + 1) * 127.5).astype(np.uint8)
