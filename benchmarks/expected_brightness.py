"""How bright should images of these masks be? Reads it off the training images, not off a few held-out ones.

    python benchmarks/expected_brightness.py SAMPLE_DIR ... --data-path IMAGES --mask-path MASKS

IMAGES and MASKS are the pairs that the generator was trained on. The held-out real images of a set may happen to be
darker or brighter than training images are. So this fits the mean gray value of training crops as a straight line in
their fraction of cell pixels, and reads off it what the masks of the set would have. Errors are those of 1000
bootstrap samples over whole images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import table
from common.arguments import positive_int
from common.errors import CommandParser, InputError, run_command
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from evaluation.threshold import to_gray
from synthetic.reader import SampleSet

BOOTSTRAP = 1000


def training_crops(data_path: Path, mask_path: Path, config: DataConfig, crops: int) -> np.ndarray:
    """(images, crops, 2) of every training image: fraction of cell pixels and mean gray value, both 0 to 1."""
    pairs = PairedFolder(data_path, mask_path, replace(config, crop="random"))
    rows = []
    for index in range(len(pairs)):
        examples = [pairs[index, draw] for draw in range(crops)]
        rows.append([(float((one["mask"] > 0).float().mean()), float(one["image"].mean() + 1) / 2) for one in examples])
    return np.array(rows)


def crops_of_set(samples: SampleSet) -> np.ndarray:
    """(images, 3) of a set: fraction of cell pixels, mean gray values of the synthetic and of the real image.

    Raises:
        InputError: the set names no real images.
    """
    if not samples.has_real:
        raise InputError(f"{samples.folder} names no real images: sample it with `data_path`")
    grays = ((to_gray(samples.synthetic(one)), to_gray(samples.real(one))) for one in samples.samples)
    means = [(synthetic.mean(), real.mean()) for synthetic, real in grays]
    fractions = [samples.foreground(one).mean() for one in samples.samples]
    return np.column_stack([fractions, np.array(means)])


def expected_grays(training: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Mean gray value of crops with these fractions of cell pixels, on the straight line of the training crops."""
    fraction, gray = training.reshape(-1, 2).T
    return np.polyval(np.polyfit(fraction, gray, 1), fractions)


def expected_with_error(training: np.ndarray, fractions: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The expected mean, and its standard error over training images."""
    picks = rng.integers(len(training), size=(BOOTSTRAP, len(training)))
    means = [expected_grays(training[one], fractions).mean() for one in picks]
    return float(expected_grays(training, fractions).mean()), float(np.std(means))


def error_of_real(rows: np.ndarray, files: Sequence[Path], training: np.ndarray, rng: np.random.Generator) -> float:
    """Standard error of the mean of the real images around the line, over whole images."""
    rest = rows[:, 2] - expected_grays(training, rows[:, 0])
    numbers = np.unique([str(file) for file in files], return_inverse=True)[1]
    means = np.array([rest[numbers == number].mean() for number in range(numbers.max() + 1)])
    return float(np.std([rng.choice(means, len(means)).mean() for _ in range(BOOTSTRAP)]))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, nargs="+", metavar="SAMPLE_DIR", help="sets of sample_ddp.py")
    parser.add_argument("--data-path", type=Path, required=True, metavar="IMAGES", help="training images")
    parser.add_argument("--mask-path", type=Path, required=True, metavar="MASKS", help="their masks")
    parser.add_argument("--crops", type=positive_int, default=8, help="random crops of every training image (8)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    sets = [SampleSet(folder) for folder in args.samples]
    config = sets[0].require_config()
    training = training_crops(args.data_path, args.mask_path, config, args.crops)
    lines = []
    for samples in sets:
        rows, rng = crops_of_set(samples), np.random.default_rng(0)
        expected, error = expected_with_error(training, rows[:, 0], rng)
        of_real = error_of_real(rows, [one.real_path for one in samples.samples if one.real_path], training, rng)
        synthetic, real = rows[:, 1].mean(), rows[:, 2].mean()
        lines.append(
            (samples.folder, f"{synthetic:.4f}", f"{real:.4f} ± {of_real:.4f}", f"{expected:.4f} ± {error:.4f}")
            + (f"{synthetic / real:.3f}", f"{synthetic / expected:.3f}", f"{expected / real:.3f}")
        )
    columns = ("set", "synthetic", "real", "expected", "synthetic / real", "synthetic / expected", "expected / real")
    print("\n".join(table(columns, lines)))


if __name__ == "__main__":
    run_command(main, parse_args)
