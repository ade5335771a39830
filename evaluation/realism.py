"""Realism: do synthetic images look like real ones? Compares the distributions of their features.

With Inception weights, the measures are FID (Heusel et al. 2017, arXiv 1706.08500) and KID (Binkowski et al. 2018,
arXiv 1801.01401) on the features of torch-fidelity. Without them, the measure is a Frechet distance on features of the
judge of ``evaluate.py fidelity``, along the main directions in which real images differ. This distance is not FID.

Every distance shrinks as the number of images grows, and two sets of real images are not at distance 0. Therefore the
real images are split at random into two halves, many times. Each split compares real half with real half, and synthetic
images with the same real half, at equal numbers of images. Compare these two numbers with each other only.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from common.disk import file_sha256, real_path, write_json
from common.errors import InputError
from common.faults import short_line
from common.randomness import one_of_each
from dataset.config import DataConfig
from dataset.files import find_images
from evaluation.fidelity import CROPS_PER_IMAGE
from evaluation.output import Section, Table, new_figure, results_folder, save_figure, with_spread
from synthetic.reader import SampleSet, read_real

logger = logging.getLogger(__name__)
SPLITS = 20
LEAST_REAL, LEAST_SYNTHETIC = 4, 2
COMPONENTS = 16
FEATURE_BATCH = 32  # images whose features are computed at once
JUDGE_DISTANCE = "Frechet distance on judge features"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256_START = "6726825d"
Extractor = Callable[[Sequence[np.ndarray]], np.ndarray]  # B images uint8 (S, S, C) -> (B, D) float64
Distance = Callable[[np.ndarray, np.ndarray], float]


@dataclass
class Distances:
    """Values of one distance over the random splits.

    Attributes:
        name: FID, KID, or the Frechet distance on the judge's features.
        images_compared: images on each side of every comparison.
        synthetic: per split, synthetic images against the first real half.
        real: per split, the second real half against the first.
        whole: all synthetic against all real images. Do not compare it with the splits: it uses more images.
    """

    name: str
    images_compared: int
    synthetic: list[float]
    real: list[float]
    whole: float


@dataclass
class RealismReport:
    """Result of ``score_realism``.

    Attributes:
        distances: FID and KID, or the distance on the judge's features.
        features: name of the features.
        synthetic_images, real_images: numbers of images.
        real_crops: crops of the real images.
        window: the gray range of all images, in words.
        provenance: see ``SampleSet.provenance``.
    """

    distances: list[Distances]
    features: str
    synthetic_images: int
    real_images: int
    real_crops: int
    window: str
    provenance: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain types for JSON, with mean and standard deviation of each list."""
        content = asdict(self)
        for entry in content["distances"]:
            for kind in ("synthetic", "real"):
                entry[f"{kind}_mean"] = float(np.mean(entry[kind]))
                entry[f"{kind}_std"] = float(np.std(entry[kind]))
        return content


def _table(content: dict) -> Table:
    rows = []
    for one in content["distances"]:
        for kind in ("synthetic", "real"):
            mean = with_spread(one[f"{kind}_mean"], one[f"{kind}_std"])
            name = f"{one['name']}, {kind} - real"
            rows.append([name, mean, min(one[kind]), max(one[kind]), one["images_compared"]])
        rows.append([f"{one['name']}, all images", one["whole"], None, None, None])
    return Table(["", "mean ± standard deviation", "smallest", "largest", "images on each side"], rows)


def _notes(content: dict) -> list[str]:
    return [
        f"{len(content['distances'][0]['real'])} random splits of {content['real_images']} real images; "
        f"{content['synthetic_images']} synthetic images",
        f"features: {content['features']}; gray values: {content['window']}",
    ]


SECTION = Section(
    "realism",
    "Realism: does it look real? (distances of features)",
    "Distance of synthetic to real images, and of real to real images, over random splits with equal numbers of "
    "images. If a set looks like the real images, both distances are equal.",
    _table,
    _notes,
    ("realism.png",),
)


# --- distances -------------------------------------------------------------------------------------------------------


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two Gaussians with the features' means and covariances.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). With C = A' A the last trace is the nuclear norm of A1 A2', which
    is exact, fast if there are fewer images than features, and needs no root of a singular matrix.

    Source: Dowson and Landau 1982; for images Heusel et al. 2017, arXiv 1706.08500.

    Args:
        first: (n, D).
        second: (m, D).

    Raises:
        ValueError: fewer than two rows, or different numbers of columns.
    """
    if first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features of shapes {first.shape} and {second.shape}")
    (mean_1, root_1), (mean_2, root_2) = _mean_and_root(first), _mean_and_root(second)
    traces = (root_1**2).sum() + (root_2**2).sum()
    cross = np.linalg.svd(root_1 @ root_2.T, compute_uv=False).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + traces - 2 * cross)


def _mean_and_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) of features (n, D), and a root A (k, D) of their covariance A' A, with k at most D."""
    mean = features.mean(axis=0, dtype=np.float64)
    root = (features - mean) / np.sqrt(len(features) - 1)  # (n, D)
    return mean, np.asarray(np.linalg.qr(root, mode="r")) if len(root) > root.shape[1] else root


def kernel_inception_distance(first: np.ndarray, second: np.ndarray) -> float:
    """KID: unbiased squared MMD with torch-fidelity's cubic kernel, on equal numbers of images (at most 1000 a side).

    Source: Binkowski et al. 2018, arXiv 1801.01401.

    Args:
        first: (n, D).
        second: (m, D).
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(len(first), len(second), 1000)
    subsets = 1 if size == len(first) == len(second) else 20
    found = kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return float(found[KEY_METRIC_KID_MEAN])


def compare_with_splits(
    name: str,
    distance: Distance,
    synthetic: np.ndarray,
    real: np.ndarray,
    groups: np.ndarray,
    splits: int = SPLITS,
    seed: int = 0,
    partners: np.ndarray | None = None,
) -> Distances:
    """Distance of synthetic to real features, and of real to real features, at equal numbers of images.

    A synthetic image has the same layout as the real image of its mask. If partners are known, each split therefore
    prefers synthetic images whose masks do not belong to the real half they are compared with. The two real halves have
    different masks as well.

    Args:
        name: name of the distance.
        distance: function of (n, D) and (n, D) features.
        synthetic: (N, D).
        real: (M, D).
        groups: (M,) image that each real row was cropped from. A split uses one crop of each image.
        seed: seed of the splits and of the choice of synthetic images.
        partners: (N,) group of the real image of each synthetic image's mask, -1 if there is none.

    Raises:
        InputError: there are too few images.
    """
    images = np.unique(groups)
    refuse_too_few(len(synthetic), len(images))
    rng = np.random.default_rng(seed)
    against_synthetic, against_real = [], []
    count = min(len(synthetic), len(images) // 2)
    for _ in range(splits):
        rows = one_of_each(groups, rng)
        order = rng.permutation(len(synthetic))
        if partners is not None:  # images of other masks come first
            order = order[np.argsort(np.isin(partners[order], groups[rows[:count]]), kind="stable")]
        against_synthetic.append(distance(synthetic[order[:count]], real[rows[:count]]))
        against_real.append(distance(real[rows[-count:]], real[rows[:count]]))
    return Distances(name, count, against_synthetic, against_real, distance(synthetic, real))


def refuse_too_few(synthetic: int, real: int) -> None:
    """Raise an InputError if these numbers of images cannot be compared."""
    if real < LEAST_REAL or synthetic < LEAST_SYNTHETIC:
        raise InputError(
            f"{synthetic} synthetic and {real} real images are too few to compare; at least {LEAST_SYNTHETIC} and "
            f"{LEAST_REAL} are needed, better some hundred"
        )


def real_components(features: np.ndarray, real: np.ndarray, images: int | None = None) -> np.ndarray:
    """Whitened principal components: features along the main directions of the real images, each with unit spread.

    Raw features of a network have arbitrary scales and are correlated, so that brightness alone decides. The record
    compares both: benchmarks/design_choices.md.

    Args:
        features: (N, D).
        real: (M, D).
        images: number of real images, if ``real`` has several crops of each; None: M.

    Returns:
        (N, k). k is :data:`COMPONENTS`, or less if the real images span fewer directions, or if there are fewer than
        four real images per direction.
    """
    mean, spread = real.mean(axis=0), real.std(axis=0)
    varies = spread > 1e-6 * max(float(spread.max()), 1e-12)
    standard = (real - mean)[:, varies] / spread[varies]
    _, lengths, directions = np.linalg.svd(standard, full_matrices=False)
    known = int((lengths > 1e-6 * lengths[0]).sum()) if len(lengths) else 0
    count = max(1, min(COMPONENTS, known, (images or len(real)) // 4))
    scale = lengths[:count] / np.sqrt(len(real) - 1)
    return ((features - mean)[:, varies] / spread[varies]) @ (directions[:count].T / scale)


# --- features --------------------------------------------------------------------------------------------------------


def inception_features(weights: Path, device: torch.device) -> Extractor:
    """The 2048 pooled features of torch-fidelity's Inception. The weights come from a file; nothing is downloaded.

    Raises:
        InputError: the file is missing, holds other weights, or would run code.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if not weights.is_file():
        raise InputError(
            f"Inception weights {weights}: no such file. Download {INCEPTION_URL} once, or leave the weights out: the "
            "judge's features are then used"
        )
    try:
        # torch-fidelity would run code in the file. So read it safely here, and pass a clean copy on.
        state = torch.load(weights, map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
    except Exception as error:  # a damaged or foreign file can raise anything
        raise InputError(
            f"{weights} holds other weights than {INCEPTION_URL} ({type(error).__name__}: {short_line(error)})"
        ) from error
    network = network.to(device).eval()

    @torch.inference_mode()
    def extract(images: Sequence[np.ndarray]) -> np.ndarray:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)  # (B, 3, S, S) uint8
        return network(batch)[0].double().cpu().numpy()

    return extract


def describe_weights(weights: Path) -> str:
    """Text that says whether the weights are the published ones, by their hash."""
    digest = file_sha256(weights)
    if digest.startswith(INCEPTION_SHA256_START):
        return "Inception of torch-fidelity"
    logger.warning("%s is not the published file: do not compare its numbers with published FIDs", weights)
    return f"Inception weights with sha256 {digest[:12]}, which are not the published ones"


def extract_all(extract: Extractor, images: Iterable[np.ndarray]) -> np.ndarray:
    """(N, D) features of N images uint8 (S, S, C)."""
    images = iter(images)
    batches = iter(lambda: list(islice(images, FEATURE_BATCH)), [])  # until a batch is empty
    return np.concatenate([extract(batch) for batch in batches])


def real_crops(image_dir: str | Path, config: DataConfig, seed: int = 0) -> tuple[list[Path], Iterator[np.ndarray]]:
    """All real images of a folder, read as in training. With random crops, each image gives several crops.

    Returns:
        For every crop its file; and the crops as uint8 (S, S, C), each read when it is asked for.
    """
    often = CROPS_PER_IMAGE if config.crop == "random" else 1
    files = enumerate(find_images(image_dir).values())
    crops = [(path, [seed, index, crop]) for index, path in files for crop in range(often)]
    images = (read_real(path, config, np.random.default_rng(seeds)) for path, seeds in crops)
    return [path for path, _ in crops], images


def describe_window(config: DataConfig) -> str:
    """Text that names the gray range of real and synthetic images."""
    if config.window_values is not None:
        ranges = " and ".join(f"{low:g} to {high:g}" for low, high in config.window_values)
        return f"{ranges} for all images, as in training"
    if config.window is not None:
        return f"percentiles {config.window[0]:g} to {config.window[1]:g} of each image, as in training"
    return "0 to 255 of 8-bit images, robust percentiles of others, as in training"


# --- the measure -----------------------------------------------------------------------------------------------------


def score_realism(
    samples: SampleSet,
    image_dir: str | Path,
    extract: Extractor,
    features: str,
    inception: bool,
    splits: int = SPLITS,
    seed: int = 0,
) -> RealismReport:
    """Distances between the set and the real images of a folder.

    Args:
        samples: the synthetic set. Inception needs gray or RGB images.
        image_dir: real images, preferably ones that the generator has not seen.
        features: text that names the features.
        inception: whether the features are Inception's. If so, compute FID and KID; if not, :data:`JUDGE_DISTANCE`.
        seed: seed of the splits and crops.
    """
    config = samples.require_config()
    paths, real = real_crops(image_dir, config, seed)
    number_of = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    groups = np.array([number_of[path] for path in paths])
    real_features = extract_all(extract, real)
    rng = np.random.default_rng(seed)  # one random square of each large field, as one crop of each real image
    squares = (samples.squares(samples.synthetic(sample)) for sample in samples.samples)
    synthetic_features = extract_all(extract, (parts[rng.integers(len(parts))] for parts in squares))
    measures: dict[str, Distance]
    if inception:
        measures = {"FID": frechet_distance, "KID": kernel_inception_distance}
    else:
        measures = {JUDGE_DISTANCE: frechet_distance}
        synthetic_features = real_components(synthetic_features, real_features, len(number_of))
        real_features = real_components(real_features, real_features, len(number_of))
    places = {real_path(path): number for path, number in number_of.items()}
    partners = np.array([places.get(real_path(one.real_path), -1) if one.real_path else -1 for one in samples.samples])
    distances = [
        compare_with_splits(name, distance, synthetic_features, real_features, groups, splits, seed, partners)
        for name, distance in measures.items()
    ]
    return RealismReport(
        distances=distances,
        features=features,
        synthetic_images=len(samples),
        real_images=len(number_of),
        real_crops=len(paths),
        window=describe_window(config),
        provenance=samples.provenance(),
    )


def write_realism_report(samples: SampleSet, report: RealismReport) -> Path:
    """Write ``realism.json`` and ``realism.png`` into ``SAMPLE_DIR/evaluation``. Returns the folder."""
    folder = results_folder(samples)
    write_json(folder / "realism.json", report.to_dict())
    figure = new_figure(4.2 * len(report.distances), 3.2)
    axes = figure.subplots(1, len(report.distances), squeeze=False)[0]
    for axis, one in zip(axes, report.distances, strict=True):
        for place, values in enumerate((one.real, one.synthetic)):
            spread = np.linspace(-0.15, 0.15, len(values))  # keeps equal values visible
            axis.plot(place + spread, values, "o", markersize=4, alpha=0.7)
        axis.set_xticks([0, 1], ["real - real", "synthetic - real"])
        axis.set_xlim(-0.5, 1.5)
        axis.set_title(one.name, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    save_figure(figure, folder / "realism.png")
    return folder
