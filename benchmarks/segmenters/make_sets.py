"""Training sets for StarDist and Cellpose from labelled images and a set of sample_ddp.py, as practise writes them.

    python benchmarks/segmenters/make_sets.py LABELLED SAMPLES OUTPUT

LABELLED holds images, masks and instances. Writes OUTPUT/real and OUTPUT/real_and_synthetic. Gray images are stretched
between the percentiles 0 and 99.8, as the generators of the nuclei read them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import CommandParser, run_command
from dataset.config import DataConfig
from evaluation.experiments.labelled import LabelledFolders, real_pairs, set_pairs
from evaluation.experiments.practice_report import ALONE, TOGETHER, write_training_set
from synthetic.reader import SampleSet

CONFIG = DataConfig(image_size=64, crop="random", window=(0, 99.8))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path, metavar="LABELLED", help="holds images, masks and instances")
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="folder that sample_ddp.py has written")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="where the two training sets go")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    pairs = real_pairs(LabelledFolders.of_part(args.labelled, "binary"), CONFIG, CONFIG.num_classes)
    real = [(f"real_{pair.name}", pair.item) for pair in pairs]
    made = [(f"synthetic_{Path(pair.name).stem}", pair.item) for pair in set_pairs(SampleSet(args.samples), 2)]
    write_training_set(args.output / ALONE, real)
    write_training_set(args.output / TOGETHER, [*real, *made])


if __name__ == "__main__":
    run_command(main, parse_args)
