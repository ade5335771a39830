"""How the interiors of cells become seeds: scores of several saddles, on labelled images that no selection holds.

    python benchmarks/cell_seeds.py DATA/nuclei utility/nuclei/split --selection 1

Trains the segmenter of ``evaluate.py utility`` on the ten labels of a selection. Seventy training images that are
labelled in no selection choose the saddle; test images have no part in it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.label_ceiling import CONFIG, CPU, read_pairs
from common.arguments import non_negative_int, positive_int
from common.errors import CommandParser, run_command
from common.log import start_logging
from dataset.groups import read_groups
from evaluation.experiments.instance_score import ScoreSums
from evaluation.experiments.labelled import Named
from evaluation.experiments.segmenter import (
    SMOOTHING,
    Found,
    Phase,
    Segmenter,
    SegmenterConfig,
    find_seeds,
    grow_cells,
    train_segmenter,
)
from evaluation.experiments.sources import Labelled
from evaluation.output import number

CHOSEN = {"fluorescence": 50, "purple_on_purple": 10, "purple_on_white": 6, "brightfield": 4}
LEVEL = 0.5  # connected interiors above it were the seeds before
SADDLES = (0.1, 0.2, 0.25, 0.3, 0.4)


def connected(interior: np.ndarray) -> np.ndarray:
    """One seed for each connected interior."""
    return ndimage.label(interior > LEVEL)[0]


def tops(saddle: float) -> Callable[[np.ndarray], np.ndarray]:
    """One seed for each top that stands out by ``saddle``."""
    return lambda interior: find_seeds(interior, saddle)


def choosing_images(data: Path, split: Path, modalities: dict[str, str]) -> list[Named]:
    """Random training images of each modality that are labelled in no selection."""
    labelled = {path.stem for path in split.glob("selection_*/labels_010/images/*")}
    pairs = [pair for pair in read_pairs(data / "train") if pair.name not in labelled]
    np.random.default_rng(0).shuffle(pairs)
    taken: Counter[str] = Counter()
    chosen = []
    for pair in pairs:
        modality = modalities[pair.name]
        if taken[modality] < CHOSEN.get(modality, 0):
            taken[modality] += 1
            chosen.append(pair)
    return chosen


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="holds train and index.csv")
    parser.add_argument("split", type=Path, metavar="SPLIT", help="split of benchmarks/utility.py")
    parser.add_argument("--selection", type=non_negative_int, default=1, help="whose ten labels train it (1)")
    parser.add_argument("--steps", type=positive_int, default=SegmenterConfig.steps, help="of the segmenter (1500)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    modalities = read_groups(args.data / "index.csv", "modality")
    real = Labelled([pair.item for pair in read_pairs(args.split / f"selection_{args.selection:02d}" / "labels_010")])
    network = train_segmenter([Phase(1, [(real, 1.0)])], SegmenterConfig(steps=args.steps), CPU)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {"connected interiors": connected}
    ways |= {f"saddle {saddle}": tops(saddle) for saddle in SADDLES}
    sums = {name: ScoreSums(CONFIG.num_classes) for name in ways}
    segmenter = Segmenter([network], CPU)
    for pair in choosing_images(args.data, args.split, modalities):
        classes, interior = segmenter.probabilities(pair.item.image)
        best = classes.argmax(0).astype(np.uint8)
        interior = ndimage.gaussian_filter(interior, SMOOTHING)
        for name, seeds_of in ways.items():
            cells = grow_cells(best > 0, interior, seeds_of(interior))
            sums[name].add(Found(best, cells, classes.max(0)), pair.item)
    for name, one in sums.items():
        score = one.score()
        print(f"{name}: AP 0.5 {number(score.ap50)}, 0.75 {number(score.ap75)}, touching {number(score.ap50_touching)}")


if __name__ == "__main__":
    run_command(main, parse_args)
