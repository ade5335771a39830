"""Measure a synthetic set of sample_ddp.py: do the images follow their masks, beside real images of the same masks.

    python evaluate.py threshold SAMPLE_DIR
    python evaluate.py fidelity SAMPLE_DIR --data-path IMAGES --mask-path MASKS

``threshold`` needs no training: Dice of the Otsu-thresholded images against their masks, synthetic beside real, with
the gray values' mean and standard deviation. ``fidelity`` trains a small U-Net on real pairs (minutes
on a CPU at small size, kept for the next set) and compares what it finds in the images with their masks, beside real
images that it has not seen. Tables, rows per image and pictures go into SAMPLE_DIR/evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data import MASK_TYPES
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
    fidelity = commands.add_parser(
        "fidelity",
        help="agreement of a segmenter trained on real pairs with the masks",
        description="Agreement of a small U-Net, trained on real pairs, with the masks; adds the column fidelity_dice "
        "to the manifest.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_set_arguments(fidelity)
    fidelity.add_argument("--data-path", required=True, metavar="IMAGES", help="real images that teach the judge")
    fidelity.add_argument("--mask-path", required=True, metavar="MASKS", help="their masks")
    fidelity.add_argument("--mask-type", choices=MASK_TYPES, default="auto", help="what the mask files hold")
    fidelity.add_argument("--steps", type=_positive, default=400, help="training steps of the judge")
    fidelity.add_argument("--seed", type=int, default=0, help="seed of the judge and of the held-out share")
    fidelity.add_argument("--cache-dir", default="judges", metavar="FOLDER", help="where trained judges are kept")
    return parser.parse_args(argv)


def _add_set_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="folder that sample_ddp.py has written")
    parser.add_argument(
        "--real-dir",
        metavar="FOLDER",
        help="where the real images are now, if they are no longer where the manifest says",
    )


def _positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


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


def run_fidelity(args: argparse.Namespace) -> None:
    """``evaluate.py fidelity``."""
    from evaluation.fidelity import score_fidelity, write_fidelity_report
    from evaluation.samples import SampleSet

    samples = SampleSet(args.sample_dir, args.real_dir)
    report = score_fidelity(
        samples,
        args.data_path,
        args.mask_path,
        args.cache_dir,
        mask_type=args.mask_type,
        steps=args.steps,
        seed=args.seed,
        progress=True,
    )
    folder = write_fidelity_report(samples, report)
    print("\n".join(report.lines()))
    print(f"written: {folder}/fidelity.json, and the column fidelity_dice of {samples.folder}/manifest.csv")


COMMANDS = {"threshold": run_threshold, "fidelity": run_fidelity}

if __name__ == "__main__":
    run_command(main, parse_args)
