"""Training sets for StarDist and Cellpose from labelled images and a set of sample_ddp.py, as practise writes them.

    python benchmarks/segmenters/make_sets.py LABELLED SAMPLES OUTPUT

LABELLED holds images, masks and instances. Writes OUTPUT/real and OUTPUT/real_and_synthetic. Labelled images are
stretched between the percentiles 0 and 99.8, as the generators of the nuclei read them. With --no-stretch they stay as
they are, as the generators of histology read them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.label_ceiling import CONFIG, read_pairs
from common.errors import CommandParser, run_command
from evaluation.experiments.labelled import set_pairs
from evaluation.experiments.practice_report import ALONE, TOGETHER, write_training_set
from synthetic.reader import SampleSet


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path, metavar="LABELLED", help="holds images, masks and instances")
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="folder that sample_ddp.py has written")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="where the two training sets go")
    parser.add_argument("--no-stretch", dest="stretch", action="store_false", help="take gray values as they are")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    real = [(f"real_{pair.name}", pair.item) for pair in read_pairs(args.labelled, args.stretch)]
    pairs = set_pairs(SampleSet(args.samples), CONFIG.num_classes)
    made = [(f"synthetic_{Path(pair.name).stem}", pair.item) for pair in pairs]
    write_training_set(args.output / ALONE, real)
    write_training_set(args.output / TOGETHER, real, made)


if __name__ == "__main__":
    run_command(main, parse_args)
