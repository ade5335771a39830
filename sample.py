"""Preview: several images from one mask, in one picture with the mask first.

    python sample.py ODE --ckpt CKPT.pt --mask-path MASK.png --num-classes 2 --image-size 256 --num-samples 4 \\
        --output samples.png

Model, sizes, classes, space and transport come from the checkpoint. ``sample.py SDE`` samples with noise added on the
way. ``sample_ddp.py`` makes whole data sets.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from checkpoint import write_atomically
from data import MaskFolder
from errors import CommandParser, InputError, run_command
from sampling import ImageSampler, SamplingSettings, image_seed, load_trained
from train_utils import (
    add_machine_arguments,
    add_mask_arguments,
    add_sampling_arguments,
    add_solver_parsers,
    grid_image,
    mask_picture,
    positive_int,
    start_logging,
    start_machine,
)

logger = logging.getLogger("sample")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    for mode in add_solver_parsers(parser).values():
        group = mode.add_argument_group("input and output")
        group.add_argument("--mask-path", type=Path, required=True, metavar="MASK", help="one mask file")
        add_mask_arguments(group)
        group.add_argument(
            "--num-samples", "--num-fid-samples", type=positive_int, default=4, help="images to draw from the mask"
        )
        group.add_argument("--output", type=Path, default=Path("samples.png"), help="picture to write (PNG)")
        add_sampling_arguments(mode, cfg_scale=1.0)
        add_machine_arguments(mode)
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError for what would only fail after the work."""
    if not args.mask_path.is_file():
        raise InputError(
            f"--mask-path {args.mask_path}: no such file. sample.py takes one mask, sample_ddp.py a folder."
        )
    if args.output.suffix.lower() != ".png":
        raise InputError(f"--output {args.output}: the picture is written as .png.")
    if not args.output.absolute().parent.is_dir():
        raise InputError(f"--output {args.output}: its folder does not exist.")


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    check_arguments(args)
    settings = SamplingSettings.from_args(args)
    machine = start_machine(args.device, args.precision)
    trained = load_trained(args, machine)
    masks = MaskFolder(args.mask_path, trained.data, args.mask_type, normalize=args.normalize_masks)
    item = masks.load(masks.names[0])
    logger.info("%s: %s: %s", args.mask_path, masks.rule.mask_type, masks.rule.reason)

    sampler = ImageSampler(trained.model, trained.transport, trained.space, machine, settings)
    prob_map = torch.as_tensor(item.prob_map)
    images = []
    for first in range(0, args.num_samples, args.per_proc_batch_size):
        indices = range(first, min(first + args.per_proc_batch_size, args.num_samples))
        seeds = [image_seed(args.seed, index) for index in indices]
        images += sampler(prob_map.expand(len(seeds), -1, -1, -1), seeds).cpu()
    write_grid(args.output, [mask_picture(prob_map), *images])
    logger.info(
        "%s: the mask and %d images at guidance %g, %s %s, %d network calls each",
        args.output, len(images), settings.cfg_scale, settings.mode, settings.method, sampler.nfe,
    )  # fmt: skip


def write_grid(path: Path, tiles: list[torch.Tensor]) -> None:
    """Tiles (3, S, S) in [-1, 1] as one picture, about twice as wide as high, white where a row is not full."""
    columns = min(len(tiles), max(5, math.ceil(math.sqrt(2 * len(tiles)))))
    tiles = tiles + [torch.ones_like(tiles[0])] * (-len(tiles) % columns)
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    picture = Image.fromarray(grid_image(rows))
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


if __name__ == "__main__":
    run_command(main, parse_args)
