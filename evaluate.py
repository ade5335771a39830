"""Measure a synthetic set of sample_ddp.py: do the images follow their masks, beside real images of the same masks.

    python evaluate.py threshold SAMPLE_DIR

``threshold`` needs no training: Dice of the Otsu-thresholded images against their masks, synthetic beside real, with
the gray values' mean and standard deviation. Tables, rows per image and pictures go into SAMPLE_DIR/evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from errors import run_command


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of ``evaluate.py``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="MEASURE")
    threshold = commands.add_parser(
        "threshold",
        help="Dice of the thresholded images against their masks (no training)",
        description="Dice of the Otsu-thresholded images against their masks, beside real images of the same masks.",
        allow_abbrev=False,
    )
    _add_set_arguments(threshold)
    return parser.parse_args(argv)


def _add_set_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="folder that sample_ddp.py has written")
    parser.add_argument(
        "--real-dir",
        metavar="FOLDER",
        help="where the real images are now, if they are no longer where the manifest says",
    )


def main(args: argparse.Namespace) -> None:
    """Run the chosen measure, print its table and say where the files are."""
    COMMANDS[args.command](args)


def run_threshold(args: argparse.Namespace) -> None:
    """``evaluate.py threshold``."""
    from evaluation.samples import SampleSet
    from evaluation.threshold import score_by_threshold, write_threshold_report

    samples = SampleSet(args.sample_dir, args.real_dir)
    score = score_by_threshold(samples)
    folder = write_threshold_report(samples, score)
    print("\n".join(score.lines()))
    print(f"written: {folder}/threshold.json, threshold.csv" + (", threshold.png" if score.compared else ""))


COMMANDS = {"threshold": run_threshold}

if __name__ == "__main__":
    run_command(main, parse_args)
