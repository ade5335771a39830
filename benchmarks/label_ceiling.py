"""What all labels of the nuclei give: the ceiling of the benchmark with few labels.

    python benchmarks/label_ceiling.py DATA/nuclei --steps 1500
    python benchmarks/label_ceiling.py DATA/nuclei --steps 1500 --shares fluorescence=3 purple_on_purple=3 \\
        purple_on_white=2 brightfield=2
    python benchmarks/label_ceiling.py DATA/nuclei --labelled split/selection_02/labels_010 --synthetic SAMPLES \\
        --synthetic-share 0.25

Trains the segmenter of ``evaluate.py utility`` on all labelled training images and tests it as the benchmark does.
``--shares`` gives each modality its share of the training squares; without it, every image has the same.
``--labelled`` takes the labelled images of a folder instead. ``--synthetic`` adds a set, ``--looks`` a part of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.arguments import non_negative_int, positive_fraction, positive_int
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from dataset.config import DataConfig
from dataset.groups import read_groups
from evaluation.experiments.instance_score import InstanceScore, score_segmenter
from evaluation.experiments.labelled import LabelledFolders, Named, real_pairs, set_pairs
from evaluation.experiments.segmenter import Phase, Segmenter, SegmenterConfig, train_segmenter
from evaluation.experiments.sources import Labelled
from evaluation.output import number
from synthetic.reader import SampleSet

CONFIG = DataConfig(image_size=64, crop="random", window=(0, 99.8))  # as the generators of the benchmark read images
CPU = torch.device("cpu")


def read_pairs(folder: Path, stretch: bool = True) -> list[Named]:
    """All labelled images of ``train`` or ``val``, stretched between the percentiles of CONFIG or as they are."""
    config = CONFIG if stretch else replace(CONFIG, window=None)
    return real_pairs(LabelledFolders.of_part(folder, "binary"), config, config.num_classes)


def sources(
    pairs: Sequence[Named], modalities: dict[str, str], shares: dict[str, float]
) -> list[tuple[Labelled, float]]:
    """Where squares come from, each with its share."""
    if not shares:
        return [(Labelled([pair.item for pair in pairs]), 1.0)]
    parts = {name: [pair.item for pair in pairs if modalities[pair.name] == name] for name in shares}
    empty = [name for name, items in parts.items() if not items]
    if empty:
        raise InputError(f"`shares`: no image is {empty[0]}; there are {', '.join(sorted(set(modalities.values())))}")
    return [(Labelled(items), shares[name]) for name, items in parts.items()]


def synthetic_source(folder: Path, looks: str) -> Labelled:
    """Pairs of a set of ``sample_ddp.py`` whose look is that of an image with a name that starts with ``looks``."""
    samples = SampleSet(folder)
    looks_of = [sample.columns.get("look_image", "") for sample in samples.samples]
    pairs = zip(looks_of, set_pairs(samples, CONFIG.num_classes), strict=True)
    items = [pair.item for look, pair in pairs if look.startswith(looks)]
    if not items:
        raise InputError(f"{folder} holds no image in a look whose name starts with {looks!r}")
    return Labelled(items)


def named_share(text: str) -> tuple[str, float]:
    """``NAME=SHARE`` with a share above 0."""
    name, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not name or not 0 < share < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SHARE with a share above 0, such as brightfield=2")
    return name, share


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="holds train, val and index.csv")
    parser.add_argument("--steps", type=positive_int, default=SegmenterConfig.steps, help="of the segmenter (1500)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the segmenter (0)")
    parser.add_argument(
        "--labelled", type=Path, metavar="FOLDER", help="train on its labelled images instead of those of train"
    )
    parser.add_argument("--synthetic", type=Path, metavar="SAMPLES", help="train on this set of sample_ddp.py, too")
    parser.add_argument("--synthetic-share", type=positive_fraction, default=0.5, help="of the training squares (0.5)")
    parser.add_argument("--looks", default="", metavar="PREFIX", help="only its images in looks with such names")
    parser.add_argument(
        "--shares", type=named_share, nargs="+", default=[], metavar="NAME=SHARE", help="of the modalities"
    )
    return parser.parse_args(argv)


def show(name: str, score: InstanceScore) -> None:
    values = {"AP 0.5": score.ap50, "0.75": score.ap75, "touching": score.ap50_touching, "Dice": score.dice}
    print(f"{name}: " + ", ".join(f"{key} {number(value)}" for key, value in values.items()))


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    modalities = read_groups(args.data / "index.csv", "modality")
    drawn = sources(read_pairs(args.labelled or args.data / "train"), modalities, dict(args.shares))
    if args.synthetic:
        real = (1 - args.synthetic_share) / sum(share for _, share in drawn)
        drawn = [(source, real * share) for source, share in drawn]
        drawn.append((synthetic_source(args.synthetic, args.looks), args.synthetic_share))
    network = train_segmenter([Phase(1, drawn)], SegmenterConfig(steps=args.steps, seed=args.seed), CPU)
    tested = [(pair.item, modalities[pair.name]) for pair in read_pairs(args.data / "val")]
    score, groups = score_segmenter(Segmenter([network], CPU), tested, CONFIG.num_classes)
    show("all", score)
    for name, one in sorted(groups.items()):
        show(name, one)


if __name__ == "__main__":
    run_command(main, parse_args)
