"""Measure time and memory to check a large data set.

    python benchmarks/many_files.py --count 100000

Writes this many simulated pairs of 32 x 32 pixels into a temporary folder, and removes them at the end. Prints the
seconds for names and pairs, for the headers, and for the first and second start of training and sampling with data that
do not fit into memory. The second start decodes nothing. Takes about ten minutes on two idle cores at 100,000 pairs,
most of it for the first decoding. Seconds of CPU time are printed as well, because a busy machine changes them less.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.workloads import draw_masks, process_memory
from common.arguments import positive_int
from common.errors import CommandParser, run_command
from dataset.checks import refuse_bad_sizes
from dataset.config import DataConfig
from dataset.files import encode_image, pair_files
from dataset.folders import PairedFolder
from dataset.mask_folder import MaskFolder

SIZE = 32
KINDS = 50  # different pairs; the others repeat them under other names


def write_pairs(folder: Path, count: int) -> tuple[Path, Path]:
    """Write ``count`` pairs of small PNG files. Returns the folders of images and masks."""
    images, masks = folder / "images", folder / "masks"
    images.mkdir()
    masks.mkdir()
    rng = np.random.default_rng(0)
    kinds = [
        (encode_image(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)), encode_image(255 * mask[:, :, None]))
        for mask in draw_masks(KINDS, SIZE)
    ]
    for number in range(count):
        image, mask = kinds[number % KINDS]
        (images / f"cell_{number:06d}.png").write_bytes(image)
        (masks / f"cell_{number:06d}.png").write_bytes(mask)
    return images, masks


def report(title: str, work: Callable[[], Any], files: int) -> None:
    """Run ``work`` and print its seconds, and the memory that its result holds, per file."""
    gc.collect()
    before = process_memory("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    gc.collect()
    kept = (process_memory("VmRSS") - before) / files
    print(f"{title}: {seconds:.1f} s ({cpu:.1f} s of CPU), {kept:.0f} bytes per file stay", flush=True)
    del result


def main(args: argparse.Namespace) -> None:
    config = DataConfig(SIZE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        images, masks = write_pairs(folder, args.count)
        report("names and pairs", lambda: pair_files(images, masks), 2 * args.count)
        report("headers", partial(refuse_bad_sizes, pair_files(images, masks), config, "pairs"), 2 * args.count)
        for start in ("first", "second"):
            title = f"training, {start} start"
            report(title, lambda: PairedFolder(images, masks, config, memory_gb=0), 2 * args.count)
        for start in ("first", "second"):
            report(f"sampling, {start} start", lambda: MaskFolder(masks, config), args.count)
        print(f"remembered in {sum(path.stat().st_size for path in (folder / 'cache').rglob('*.gz')) / 2**20:.1f} MiB")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=positive_int, default=100_000, help="number of pairs (default: 100000)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse_args)
