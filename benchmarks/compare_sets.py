"""Draws sets of images of the same masks below each other, and the real images last.

    python benchmarks/compare_sets.py heun=SAMPLES ab2=SAMPLES --output solver.png

Shows images of ``--count`` masks, evenly spread over the sets. ``--gamma`` below 1 brightens dark gray values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.arguments import positive_float, positive_int
from common.errors import CommandParser, InputError, run_command
from common.pictures import as_rgb, captioned_sheet, from_uint8
from common.spread import evenly
from synthetic.reader import SampleSet


def picture(image: np.ndarray, gamma: float) -> Tensor:
    """uint8 image -> (3, H, W) in [-1, 1], brightened."""
    return from_uint8((255 * (as_rgb(image) / 255) ** gamma).round().astype(np.uint8))


def sheet(sets: dict[str, SampleSet], count: int, gamma: float) -> np.ndarray:
    """One row of images for each set, then the real ones: (H, W, 3) uint8.

    Raises:
        InputError: the sets hold images of other masks, or no real images.
    """
    first = next(iter(sets.values()))
    names = [sample.columns["image"] for sample in first.samples]
    for samples in sets.values():
        if [sample.columns["image"] for sample in samples.samples] != names:
            raise InputError(f"{samples.folder} holds other images than {first.folder}")
        if not samples.has_real:
            raise InputError(f"{samples.folder} names no real images: sample it with `data_path`")
    columns = []
    for number in evenly(len(names), count):
        drawn = [samples.synthetic(samples.samples[number]) for samples in sets.values()]
        columns.append([picture(image, gamma) for image in (*drawn, first.real(first.samples[number]))])
    return captioned_sheet([*sets, "real"], columns)


def named_set(text: str) -> tuple[str, Path]:
    """``NAME=SAMPLES``."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SAMPLES, such as heun=samples")
    return name, Path(folder)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=named_set, nargs="+", metavar="NAME=SAMPLES", help="folders of sample_ddp.py")
    parser.add_argument("--count", type=positive_int, default=8, help="images of a row (8)")
    parser.add_argument("--gamma", type=positive_float, default=0.6, help="1 leaves the gray values as they are (0.6)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a PNG file")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    sets = {name: SampleSet(folder) for name, folder in args.sets}
    Image.fromarray(sheet(sets, args.count, args.gamma)).save(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_command(main, parse_args)
