"""Sweep: which guidance and solver to sample with. Compares fidelity and realism over a grid and recommends a setting.

Every setting samples the same masks with the same noise. The same judge rates all of them: a segmenter trained on real
pairs that the sweep does not use. Its agreement with the real images of the same masks is the ceiling of fidelity. The
distance between real images is the floor of the distance.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.arguments import number_as_text
from common.disk import write_csv, write_json
from common.errors import InputError
from common.pictures import repeat_gray, to_uint8
from common.randomness import divide
from dataset.files import pair_files
from dataset.look_choice import choose_looks
from dataset.mask_folder import MaskFolder, MaskItem
from engine.machine import Machine
from engine.sampling import ImageSampler, SamplingSettings, TrainedModel, image_seed, is_in_interval
from evaluation.fidelity import LabelledImage, labelled_image, score_agreement
from evaluation.image_facts import group_near_duplicates, groups_to_divide
from evaluation.judge import Judge, JudgeRequest, judge_of_folders
from evaluation.output import Section, Table, new_figure, save_figure
from evaluation.realism import compare_with_splits, extract_all, frechet_distance, real_components
from evaluation.threshold import to_gray
from transport import ODE_METHODS, SDE_METHODS, TIME_SHIFT
from transport.integrators import shifted_times

logger = logging.getLogger(__name__)
# Solvers with a fixed number of steps. Adaptive solvers choose their own cost, so they cannot be compared here.
SOLVERS = {name: ("ODE", name) for name, method in ODE_METHODS.items() if not method.adaptive} | {
    f"sde-{name.lower()}": ("SDE", name) for name in SDE_METHODS
}
NO_INTERVAL = (0.0, 1.0)
LEAST_IMAGES = 4
NAMED_POINTS = 30  # the plot names its points up to this number; more names would overlap
FIDELITY_TOLERANCE = 0.02  # a Dice this far below the best still counts as best
DISTANCE_TOLERANCE = 1.1  # a distance of this times the smallest still counts as smallest
Draw = Callable[[SamplingSettings], tuple[list[np.ndarray], int]]  # -> images uint8 (S, S, C), network calls


def settings_grid(
    scales: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    solvers: Sequence[str],
    steps: Sequence[int],
    shifts: Sequence[float] = (TIME_SHIFT,),
) -> list[SamplingSettings]:
    """All combinations. Scale 1 means no guidance, so it is combined with one interval only. SDE solvers have no shift.

    Raises:
        ValueError: a solver is not in :data:`SOLVERS`.
        InputError: an interval is empty.
    """
    unknown = [name for name in solvers if name not in SOLVERS]
    if unknown:
        raise ValueError(f"unknown solver {unknown[0]!r}; choose one of {', '.join(SOLVERS)}")
    empty = [interval for interval in intervals if interval[0] >= interval[1]]
    if empty:
        raise InputError(f"guidance interval {empty[0][0]:g}:{empty[0][1]:g}: the first time must be the smaller one")
    grid: dict[SamplingSettings, None] = {}
    for solver, count, scale, interval, shift in itertools.product(solvers, steps, scales, intervals, shifts):
        mode, method = SOLVERS[solver]
        span = NO_INTERVAL if scale == 1 else (interval[0], interval[1])
        own = shift if mode == "ODE" else TIME_SHIFT
        grid[SamplingSettings(mode, method, count, scale, guidance_interval=span, time_shift=own)] = None
    return list(grid)


@dataclass(frozen=True)
class SweepRow:
    """One setting and its results.

    Attributes:
        settings: settings of the sampler.
        fidelity: mean Dice of the judge's segmentation with the masks.
        distance: Frechet distance to real images on the judge's features, mean over the splits.
        mean: mean gray value of the images, 0..1. Guidance changes it.
        std: standard deviation of the gray values.
        network_calls: forward passes per image. A guided step counts twice.
        seconds: sampling time per image.
    """

    settings: SamplingSettings
    fidelity: float
    distance: float
    mean: float
    std: float
    network_calls: float
    seconds: float

    @property
    def name(self) -> str:
        """Short name for tables and plots."""
        settings = self.settings
        span = "" if settings.guidance_interval == NO_INTERVAL else " in {:g}:{:g}".format(*settings.guidance_interval)
        solver = settings.method if settings.mode == "ODE" else f"sde-{settings.method.lower()}"
        steps = "1 step" if settings.num_steps == 1 else f"{settings.num_steps} steps"
        shift = "" if settings.time_shift == TIME_SHIFT else f", shift {settings.time_shift:g}"
        return f"guidance {settings.cfg_scale:g}{span}, {solver}, {steps}{shift}"

    def flags(self) -> str:
        """The setting as flags of sample.py and sample_ddp.py."""
        settings = self.settings
        words = [settings.mode, f"--sampling-method {settings.method}", f"--num-sampling-steps {settings.num_steps}"]
        words.append(f"--cfg-scale {number_as_text(settings.cfg_scale)}")
        if settings.guidance_interval != NO_INTERVAL:
            words.append(f"--guidance-interval {' '.join(map(number_as_text, settings.guidance_interval))}")
        if settings.time_shift != TIME_SHIFT:
            words.append(f"--time-shift {number_as_text(settings.time_shift)}")
        return " ".join(words)


@dataclass
class SweepReport:
    """Result of ``run_sweep``."""

    rows: list[SweepRow]
    recommended: int
    real_fidelity: float
    real_distance: float
    real_distance_std: float
    real_mean: float
    real_std: float
    images: int

    def to_dict(self) -> dict:
        """Plain types for JSON."""
        rows = [asdict(row) | {"settings": row.settings.to_dict(), "name": row.name} for row in self.rows]
        return asdict(self) | {"rows": rows, "recommended_flags": self.rows[self.recommended].flags()}


def _table(content: dict) -> Table:
    names = ("fidelity", "distance", "mean", "std", "network_calls", "seconds")
    rows = []
    for index, one in enumerate(content["rows"]):
        mark = " <- recommended" if index == content["recommended"] else ""
        rows.append([one["name"] + mark, *(one[name] for name in names)])
    rows.append(["real images", *(content[f"real_{name}"] for name in names[:4]), None, None])
    columns = ["", "fidelity", "distance", "mean gray", "std of gray", "network calls", "seconds per image"]
    return Table(columns, rows)


SECTION = Section(
    "sweep",
    "Guidance and solver",
    "Fidelity: Dice of the judge with the masks. Distance: Frechet distance to real images on the judge's features. "
    f"The recommended setting is found in three steps: keep the settings within {FIDELITY_TOLERANCE:g} of the best "
    "fidelity (a fidelity above that of real images counts as theirs), keep those within "
    f"{(DISTANCE_TOLERANCE - 1) * 100:.0f} % of the smallest distance, take the one with the fewest network calls.",
    _table,
    lambda content: [f"{content['images']} masks; sample with: {content['recommended_flags']}"],
    ("sweep.png",),
)


def recommend(rows: Sequence[SweepRow], real_fidelity: float) -> int:
    """Index of the recommended setting.

    1. Keep the settings whose fidelity is within :data:`FIDELITY_TOLERANCE` of the best. A fidelity above that of real
       images counts as theirs, because such images exaggerate their cells.
    2. Of these, keep those with a distance of at most :data:`DISTANCE_TOLERANCE` times the smallest.
    3. Of these, take the one with the fewest network calls. If several are equal, take the smallest distance.
    """
    capped = [min(row.fidelity, real_fidelity) for row in rows]
    best = max(capped)
    faithful = [index for index, value in enumerate(capped) if value >= best - FIDELITY_TOLERANCE]
    limit = DISTANCE_TOLERANCE * min(max(rows[index].distance, 0.0) for index in faithful)
    near = [index for index in faithful if rows[index].distance <= limit]
    return min(near, key=lambda index: (rows[index].network_calls, rows[index].distance))


def run_sweep(
    draw: Draw,
    grid: Sequence[SamplingSettings],
    real: Sequence[LabelledImage],
    judge: Judge,
    num_classes: int,
    separated: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> SweepReport:
    """Sample and judge every setting.

    Args:
        draw: function that samples one image for the mask of each entry of ``real``.
        real: real images of the masks, with the masks.
        judge: segmenter that has seen none of these images.
        separated: whether class 2 is the border between cells.
        seed: seed of the splits of the real images.

    Raises:
        InputError: there are fewer than four masks.
    """
    if len(real) < LEAST_IMAGES:
        raise InputError(f"{len(real)} masks are too few to compare settings; at least {LEAST_IMAGES}, better 50")
    raw = extract_all(judge.features, (item.image for item in real))
    features = real_components(raw, raw)
    groups = np.arange(len(real))
    floor = compare_with_splits("", frechet_distance, features, features, groups, seed=seed).real
    rows = []
    for settings in tqdm(grid, desc="settings", disable=None if progress else True):
        started = time.perf_counter()
        images, calls = draw(settings)
        seconds = (time.perf_counter() - started) / len(images)
        drawn = [item._replace(image=image) for item, image in zip(real, images, strict=True)]
        score = score_agreement(judge.class_maps, iter(drawn), num_classes, separated)
        ours = real_components(extract_all(judge.features, images), raw)
        found = compare_with_splits("", frechet_distance, ours, features, groups, seed=seed, partners=groups).synthetic
        mean, std = _gray_statistics(images)
        fidelity = float(np.mean(score.per_image)) if score.dice is None else score.dice
        rows.append(SweepRow(settings, fidelity, float(np.mean(found)), mean, std, _cost(settings, calls), seconds))
        logger.info("%s: fidelity %.3f, distance %.3g", rows[-1].name, fidelity, rows[-1].distance)
    ceiling = score_agreement(judge.class_maps, iter(real), num_classes, separated)
    real_fidelity = float(np.mean(ceiling.per_image)) if ceiling.dice is None else ceiling.dice
    mean, std = _gray_statistics([item.image for item in real])
    return SweepReport(
        rows=rows,
        recommended=recommend(rows, real_fidelity),
        real_fidelity=real_fidelity,
        real_distance=float(np.mean(floor)),
        real_distance_std=float(np.std(floor)),
        real_mean=mean,
        real_std=std,
        images=len(real),
    )


def _gray_statistics(images: Sequence[np.ndarray]) -> tuple[float, float]:
    gray = np.stack([to_gray(image) for image in images])
    return float(gray.mean()), float(gray.std())


def _cost(settings: SamplingSettings, calls: int) -> float:
    """Forward passes per image. A guided call needs two; the share of guided steps stands for that of guided calls."""
    if settings.cfg_scale == 1:
        return float(calls)
    shift = settings.time_shift if settings.mode == "ODE" else 1.0
    times, (low, high) = shifted_times(0.0, 1.0, settings.num_steps, shift)[:-1], settings.guidance_interval
    return calls * (1 + sum(is_in_interval(t, low, high) for t in times) / len(times))


# --- from checkpoint and folders -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepData:
    """Masks to sample with their real images, and a judge that has seen neither."""

    items: list[MaskItem]
    real: list[LabelledImage]
    judge: Judge
    separated: bool


def load_sweep_data(trained: TrainedModel, request: JudgeRequest, images: int) -> SweepData:
    """Choose ``images`` pairs by a hash of seed and name, and train the judge on the others.

    Images that show nearly the same, such as one image under two names, stay together.

    Raises:
        InputError: files are unusable, or there are too few pairs for masks and judge.
    """
    if images < LEAST_IMAGES:
        raise InputError(f"`images` {images}: too few masks to compare settings; give at least {LEAST_IMAGES}")
    found = pair_files(request.images, request.masks)
    if len(found) < 2 * LEAST_IMAGES:
        raise InputError(
            f"{request.images} holds {len(found)} pairs; a sweep needs at least {2 * LEAST_IMAGES}, half for the judge"
        )
    groups = groups_to_divide(group_near_duplicates(found))
    chosen, rest = divide(groups, min(images, len(found) // 2), request.seed)
    if len(chosen) < LEAST_IMAGES:
        raise InputError(
            f"`images` {images}: images that show nearly the same stay together, which leaves {len(chosen)} masks to "
            f"compare settings; give at least {images + LEAST_IMAGES}"
        )
    normalize = trained.normalize_masks
    judge, _, _, pairs = judge_of_folders(request, trained.data, normalize, trained.mask_type, rest)
    masks = MaskFolder(request.masks, pairs.config, pairs.rule.mask_type, request.images, normalize=normalize)
    seeds = [np.random.default_rng([request.seed, place]) for place in range(len(chosen))]
    items = [masks.load(name, rng=rng) for name, rng in zip(sorted(chosen), seeds, strict=True)]
    return SweepData(items, [labelled_image(item, masks.rule) for item in items], judge, pairs.rule.has_boundary)


def sampler_draw(
    trained: TrainedModel, machine: Machine, items: Sequence[MaskItem], seed: int = 0, batch_size: int = 32
) -> Draw:
    """A function that samples all masks with one setting. Image i gets the same noise for every setting."""
    prob_maps = torch.stack([torch.as_tensor(item.prob_map) for item in items])  # (n, K, S, S)
    seeds = [image_seed(seed, index) for index in range(len(items))]
    looks = None
    if trained.looks is not None:  # of training images, drawn by the seed as sample_ddp.py does
        choice = choose_looks(trained.looks, trained.data, "training", None, None)
        looks = choice.batch(seed, range(len(items)), items)

    @torch.inference_mode()
    def draw(settings: SamplingSettings) -> tuple[list[np.ndarray], int]:
        sampler = ImageSampler(trained.model, trained.transport, trained.space, machine, settings)
        images: list[np.ndarray] = []
        for first in range(0, len(items), batch_size):
            part = slice(first, first + batch_size)
            drawn = sampler(prob_maps[part], seeds[part], looks=None if looks is None else looks[part])
            images += [repeat_gray(to_uint8(image)) for image in drawn]
        return images, sampler.nfe

    return draw


# --- files -----------------------------------------------------------------------------------------------------------


def write_sweep_report(report: SweepReport, output: Path) -> list[Path]:
    """Write ``sweep.json``, ``sweep.csv`` and ``sweep.png``. Returns the paths."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "sweep.json", report.to_dict())
    columns = ["setting", "flags", "fidelity", "distance", "mean", "std", "network_calls", "seconds", "recommended"]
    rows = [
        [row.name, row.flags(), *(f"{getattr(row, name):.6g}" for name in columns[2:8]), int(i == report.recommended)]
        for i, row in enumerate(report.rows)
    ]
    write_csv(output / "sweep.csv", columns, rows)
    draw_sweep(report, output / "sweep.png")
    return [output / name for name in ("sweep.json", "sweep.csv", "sweep.png")]


def draw_sweep(report: SweepReport, path: Path) -> None:
    """Plot fidelity against distance. Colour: guidance scale. Marker: solver. Size: network calls."""
    figure = new_figure(8, 5.2)
    axis = figure.subplots()
    scales = sorted({row.settings.cfg_scale for row in report.rows})
    solvers = sorted({(row.settings.mode, row.settings.method) for row in report.rows})
    most = max(row.network_calls for row in report.rows)
    shown = set()
    for row in report.rows:
        solver = (row.settings.mode, row.settings.method)
        label = f"guidance {row.settings.cfg_scale:g}, {' '.join(solver)}"
        axis.scatter(
            row.fidelity,
            row.distance,
            s=30 + 120 * row.network_calls / most,
            color=f"C{scales.index(row.settings.cfg_scale) % 10}",
            marker="osD^vP*X"[solvers.index(solver) % 8],
            alpha=0.75,
            label=None if label in shown else label,
        )
        shown.add(label)
        if len(report.rows) <= NAMED_POINTS and row is not report.rows[report.recommended]:
            axis.annotate(row.name.partition(", ")[2] if row.settings.guidance_interval == NO_INTERVAL else row.name,
                          (row.fidelity, row.distance), (7, -8), textcoords="offset points", fontsize=6)  # fmt: skip
    best = report.rows[report.recommended]
    axis.scatter(best.fidelity, best.distance, s=330, facecolors="none", edgecolors="black", linewidths=1.5)
    axis.annotate(best.name, (best.fidelity, best.distance), (8, 10), textcoords="offset points", fontsize=8)
    axis.axvline(report.real_fidelity, color="gray", linestyle="--", linewidth=1, label="real images")
    axis.axhline(report.real_distance, color="gray", linestyle=":", linewidth=1, label="real - real")
    axis.set_xlabel("fidelity (Dice of the judge with the mask), higher is better")
    axis.set_ylabel("Frechet distance on judge features, lower is better")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    save_figure(figure, path)
