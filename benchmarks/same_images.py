"""How much an image changes with batch size, precision and compilation, which should not matter.

    python benchmarks/same_images.py --ckpt CKPT.pt --mask-path MASKS

draws the same images (checkpoint, masks, seeds) in several ways and prints, in gray values of 255 as they go into
files, the largest and the mean difference to float32 in batches of 16. A minute or two on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.workloads import first_masks
from cli import add_checkpoint_arguments, add_device_argument
from common.arguments import non_negative_float, positive_int
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from common.pictures import to_uint8
from engine.machine import Machine, has_compiler, start_machine
from engine.sampling import ImageSampler, SamplingSettings, TrainedModel, image_seed
from settings import load_checkpoint

LARGE_BATCH, SMALL_BATCH = 16, 5


@torch.inference_mode()
def draw(
    trained: TrainedModel, machine: Machine, prob_maps: Tensor, args: argparse.Namespace, batch: int, compiled: bool
) -> np.ndarray:
    """(n, H, W, C) uint8 images of the masks (n, K, S, S)."""
    model = copy.deepcopy(trained.model)
    if machine.precision == "bf16":
        model.keep_weights_in(torch.bfloat16)
    settings = SamplingSettings(num_steps=args.num_sampling_steps, cfg_scale=args.cfg_scale)
    sampler = ImageSampler(model, trained.transport, trained.space, machine, settings, compiled)
    seeds = [image_seed(args.seed, index) for index in range(len(prob_maps))]
    parts = [
        sampler(prob_maps[first : first + batch], seeds[first : first + batch], batch)
        for first in range(0, len(seeds), batch)
    ]
    return np.stack([to_uint8(image) for image in torch.cat(parts)])


def differences(images: np.ndarray, reference: np.ndarray) -> tuple[int, float, float]:
    """Largest and mean absolute difference of (n, H, W, C) uint8 images, and the share of equal values."""
    apart = np.abs(images.astype(np.int16) - reference)
    return int(apart.max()), float(apart.mean()), float((apart == 0).mean())


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    machine = start_machine(args.device, "float32")
    trained = load_checkpoint(args, machine)
    prob_maps = first_masks(args.mask_path, trained.data, args.num_images)
    if len(prob_maps) <= SMALL_BATCH:
        raise InputError(f"--mask-path {args.mask_path}: {len(prob_maps)} masks; more than {SMALL_BATCH} are needed.")
    ways = [(precision, batch, False) for precision in ("float32", "bf16") for batch in (LARGE_BATCH, SMALL_BATCH)]
    if has_compiler():
        ways += [("float32", LARGE_BATCH, True), ("bf16", LARGE_BATCH, True)]
    reference: np.ndarray | None = None
    print(f"{len(prob_maps)} images, differences in gray values of 255 to the first row\n")
    print("| precision | batch | compiled | largest | mean | equal |\n|---|---|---|---|---|---|")
    for precision, batch, compiled in ways:
        images = draw(trained, replace(machine, precision=precision), prob_maps, args, batch, compiled)
        reference = images if reference is None else reference
        largest, mean, equal = differences(images, reference)
        print(
            f"| {precision} | {batch} | {'yes' if compiled else 'no'} | {largest} | {mean:.3f} | {equal:.1%} |",
            flush=True,
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_arguments(parser)
    parser.add_argument("--mask-path", type=Path, required=True, metavar="MASKS", help="folder of masks")
    parser.add_argument(
        "--num-images", type=positive_int, default=32, help="number of images, one per mask (default: 32)"
    )
    parser.add_argument("--num-sampling-steps", type=positive_int, default=25, help="steps of Heun (default: 25)")
    parser.add_argument("--cfg-scale", type=non_negative_float, default=1.0, help="guidance scale (default: 1, none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add_device_argument(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse_args)
