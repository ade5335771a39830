"""Preview: several images from one mask, in one picture with the mask first.

    python sample.py ODE --ckpt CKPT.pt --mask-path MASK.png --num-classes 2 --image-size 256 --num-samples 4 \\
        --output samples.png

Model, sizes, classes, space and transport come from the checkpoint. ``sample.py SDE`` adds noise at every step.
``sample_ddp.py`` makes whole data sets.

The ODE also runs backwards, on real images:

    python sample.py ODE --likelihood --ckpt CKPT.pt --data-path IMAGES --mask-path MASKS --output likelihood.csv
    python sample.py ODE --reverse --ckpt CKPT.pt --data-path IMAGES --mask-path MASKS --output round_trip.png
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.errors import end_at_interrupt

    end_at_interrupt()

import argparse
import logging
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from cli import add_machine_arguments, add_mask_arguments, add_sampling_arguments, add_solver_parsers
from common.arguments import number
from common.disk import write_atomically, write_csv
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from common.outputs import check_output_arrays, check_output_picture, check_output_table, maker_note
from common.pictures import grid_image, mask_picture, sheet_png
from dataset.look_choice import LookChoice
from dataset.mask_folder import MaskFolder
from engine.autoencoder import PixelSpace
from engine.machine import check_compiler, start_machine
from engine.sampling import ImageSampler, image_seed
from settings import inputs_of, load_checkpoint, look_choice, open_masks, sampling_settings

logger = logging.getLogger("sample")
MOST_SAMPLES = 10_000  # in one picture; sample_ddp.py makes more
LIKELIHOOD_COLUMNS = ("name", "log_likelihood_nats", "bits_per_dim")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    modes = add_solver_parsers(parser)
    for mode in modes.values():
        group = mode.add_argument_group("input and output")
        group.add_argument("--mask-path", type=Path, required=True, metavar="MASK", help="one mask file")
        add_mask_arguments(group)
        group.add_argument(
            "--num-samples",
            "--num-fid-samples",
            type=number(int, 1, MOST_SAMPLES),
            help="images to sample from the mask (default: 4)",
        )
        group.add_argument("--output", type=Path, help="picture to write (default: samples.png)")
        group.add_argument(
            "--data-path", type=Path, metavar="IMAGES",
            help="real images, paired with the masks by name: for --likelihood, --reverse and --look same",
        )  # fmt: skip
        add_sampling_arguments(mode, cfg_scale=1.0)
        add_machine_arguments(mode, can_compile=True)
    group = modes["ODE"].add_argument_group("real images instead of samples; --mask-path is then a folder")
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--likelihood",
        action="store_true",
        help="write log-likelihood (nats) and bits per dimension of every image to --output (default: likelihood.csv)",
    )
    what.add_argument(
        "--reverse",
        action="store_true",
        help="turn images into noise and back (PNG, and .npz with the noise beside it)",
    )
    args = parser.parse_args(argv)
    args.likelihood, args.reverse = getattr(args, "likelihood", False), getattr(args, "reverse", False)
    args.on_real = args.likelihood or args.reverse
    args.reads_images = args.on_real or args.look == "same"
    args.output = args.output or Path("likelihood.csv" if args.likelihood else "samples.png")
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for what would otherwise fail after sampling."""
    if args.on_real and args.data_path is None:
        raise InputError("--likelihood and --reverse work on real images: give --data-path IMAGES.")
    if not args.on_real and not args.mask_path.is_file():
        what = "this is a folder" if args.mask_path.is_dir() else "no such file"
        raise InputError(
            f"--mask-path {args.mask_path}: {what}. sample.py takes one mask file, sample_ddp.py a folder of masks."
        )
    if args.likelihood and args.compile:
        raise InputError("--compile is not offered for --likelihood, which differentiates the network: leave it out.")
    suffix = ".csv" if args.likelihood else ".png"
    if args.output.suffix.lower() != suffix:
        raise InputError(f"--output {args.output}: the result is written as {suffix}.")
    if not args.output.absolute().parent.is_dir():
        raise InputError(f"--output {args.output}: its folder does not exist.")
    if args.likelihood:
        check_output_table(args.output, LIKELIHOOD_COLUMNS, inputs_of(args))
    else:
        check_output_picture(args.output, inputs_of(args))


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    settings = sampling_settings(args)
    check_arguments(args)
    if args.compile:
        check_compiler()
    machine = start_machine(args.device, args.precision)
    trained = load_checkpoint(args, machine)
    looks = look_choice(args, trained)
    masks = open_masks(args, trained.data, trained.mask_type)
    if looks is not None:
        looks.check_masks(masks.names)
    sampler = ImageSampler(trained.model, trained.transport, trained.space, machine, settings, args.compile)
    if args.likelihood:
        write_likelihoods(args, sampler, masks, looks)
    elif args.reverse:
        write_round_trip(args, sampler, masks, looks)
    else:
        write_samples(args, sampler, masks, looks)


def write_samples(
    args: argparse.Namespace, sampler: ImageSampler, masks: MaskFolder, choice: LookChoice | None
) -> None:
    """Write one picture: the mask, then images sampled from it."""
    item = masks.load(masks.names[0])
    prob_map = torch.as_tensor(item.prob_map)
    indices = range(args.num_samples or 4)
    looks = None if choice is None else choice.batch(args.seed, indices, [item] * len(indices))
    seeds = [image_seed(args.seed, index) for index in indices]
    images = sampler.samples(prob_map, seeds, args.per_proc_batch_size, looks)
    picture = sheet_png([mask_picture(prob_map), *images])
    write_atomically(args.output, lambda file: file.write(picture))
    settings = sampler.settings
    logger.info(
        "%s: the mask and %d images at guidance %g, %s %s, %d network calls each",
        args.output, len(images), settings.cfg_scale, settings.mode, settings.method, sampler.nfe,
    )  # fmt: skip


def write_likelihoods(
    args: argparse.Namespace, sampler: ImageSampler, masks: MaskFolder, choice: LookChoice | None
) -> None:
    """Write a table: log-likelihood of each image in nats, and bits per latent number or per 8-bit gray value."""
    per_gray_value = math.log2(255 / 2) if isinstance(sampler.space, PixelSpace) else 0.0
    rows = []
    for numbers in batches(range(len(masks.names)), args.per_proc_batch_size):
        names, images, prob_maps = load_real(masks, numbers)
        looks = None if choice is None else choice.of_images(images)
        result = sampler.likelihood(images, prob_maps, [image_seed(args.seed, number) for number in numbers], looks)
        for name, logp, bits in zip(names, result.logp.tolist(), result.bits_per_dim.tolist(), strict=True):
            rows.append((name, logp, bits + per_gray_value))
            logger.info("%s: log-likelihood %.1f nats, %.3f bits per dimension", *rows[-1])
    table = [(name, f"{logp:.3f}", f"{bits:.5f}") for name, logp, bits in rows]
    write_csv(args.output, LIKELIHOOD_COLUMNS, table)
    unit = "8-bit gray value" if per_gray_value else "latent number"
    mean = sum(bits for *_, bits in rows) / len(rows)
    logger.info("%s: %d images, mean %.3f bits per %s", args.output, len(rows), mean, unit)


def write_round_trip(
    args: argparse.Namespace, sampler: ImageSampler, masks: MaskFolder, choice: LookChoice | None
) -> None:
    """Write a picture with rows of mask | real | real to noise and back, and the noise of all images as .npz."""
    path = args.output.with_suffix(".npz")
    check_output_arrays(path, dict.fromkeys(masks.names, sampler.latent_shape), "float32", inputs_of(args))
    tiles, errors = [], []
    noises: dict[str, np.ndarray] = {}
    for numbers in batches(range(len(masks.names)), args.per_proc_batch_size):
        names, images, prob_maps = load_real(masks, numbers)
        looks = None if choice is None else choice.of_images(images)
        noise = sampler.encode(images, prob_maps, looks)
        again = sampler.decode(noise, prob_maps, looks).cpu()
        noises |= {name: one.cpu().numpy() for name, one in zip(names, noise, strict=True)}
        errors += (again - images).square().mean((1, 2, 3)).sqrt().tolist()
        for mask, real, back in zip(prob_maps, images, again, strict=True):
            tiles.append([mask_picture(mask), real, back])
    picture = Image.fromarray(grid_image(tiles))
    write_atomically(args.output, lambda file: picture.save(file, format="PNG", pnginfo=maker_note()))
    write_atomically(path, lambda file: write_arrays(file, noises))
    rms = math.sqrt(sum(error**2 for error in errors) / len(errors))
    logger.info(
        "%s: %d images to noise and back, root mean square difference %.4f on [-1, 1] (largest of an image %.4f); "
        "noise in %s", args.output, len(errors), rms, max(errors), path.name,
    )  # fmt: skip


def write_arrays(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz. ``numpy.savez`` cannot do it, because an array may have the name of one of its arguments."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_real(masks: MaskFolder, numbers: Sequence[int]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Names, images (n, C, S, S) in [-1, 1] and masks (n, K, S, S). With random crops, the middle window."""
    items = [masks.load(masks.names[number]) for number in numbers]
    images = torch.stack([torch.as_tensor(item.image) for item in items])
    return [item.name for item in items], images, torch.stack([torch.as_tensor(item.prob_map) for item in items])


def batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def run() -> None:
    """Entry point of the script and of ``sit-sample``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
