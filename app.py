"""A page in the browser: draw a mask, see the image.

    python app.py --ckpt CKPT.pt

Open the address that it prints. The page needs no network, and no other machine can reach it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.errors import end_at_interrupt

    end_at_interrupt()

import argparse
import contextlib
import errno
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cli import add_checkpoint_arguments, add_judge_arguments, add_machine_arguments
from common.arguments import non_negative_int
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from common.pictures import repeat_gray
from dataset.masks import MASK_TYPES
from engine.machine import Machine, start_machine
from engine.sampling import TrainedModel
from flag_rules import check_needs
from page.drawing import Drawer, JudgeCall, Verdict
from page.labels import LEAST_SIDE, MOST_SIDE
from page.masks import StartMasks
from page.service import ADDRESS, Service
from settings import load_checkpoint, own_judge_request

logger = logging.getLogger("app")
LARGEST_PORT = 65535


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    add_checkpoint_arguments(parser.add_argument_group("model"))
    group = parser.add_argument_group("page")
    group.add_argument("--port", type=non_negative_int, default=7860, help="port of the page; 0 takes a free one")
    group.add_argument(
        "--mask-path", type=Path, metavar="MASKS", help="masks to begin a drawing with (default: --judge-masks)"
    )
    group.add_argument("--mask-type", choices=MASK_TYPES, default="auto", help="meaning of the values of --mask-path")
    group = parser.add_argument_group("show how well each image follows its mask, by a small segmenter")
    add_judge_arguments(group)
    add_machine_arguments(parser)
    return parser.parse_args(argv)


def start_service(args: argparse.Namespace) -> Service:
    """The page, ready to serve.

    Raises:
        InputError: files that cannot be used, a model whose images fit no canvas, or a port that is taken.
    """
    check_needs(args)
    if (args.judge_images is None) != (args.judge_masks is None):
        raise InputError("--judge-images and --judge-masks belong together: give both.")
    if args.port > LARGEST_PORT:
        raise InputError(f"--port {args.port}: the largest port is {LARGEST_PORT}.")
    with contextlib.ExitStack() as until_served:
        listener = until_served.enter_context(open_port(args.port))  # before the judge, whose training takes minutes
        machine = start_machine(args.device, args.precision)
        trained = load_checkpoint(args, machine)
        if not LEAST_SIDE <= trained.data.image_size <= MOST_SIDE:
            raise InputError(
                f"{args.ckpt}: the model draws squares of {trained.data.image_size} pixels a side, and the page "
                f"{LEAST_SIDE} to {MOST_SIDE}: use sample.py."
            )
        given = {name: getattr(args, name) for name in ("ckpt", "raw_weights", "vae") if name in args.given}
        masks = find_masks(args, trained)
        service = Service(listener, Drawer(trained, machine, given, train_judge(args, trained, machine), masks))
        until_served.pop_all()
    return service


def open_port(port: int) -> socket.socket:
    """A socket that listens on this port of this machine. A browser that comes before the page is served, waits."""
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise InputError(f"--port {port}: {error.strerror}. Give another one, or 0 for a free one.") from error


def find_masks(args: argparse.Namespace, trained: TrainedModel) -> StartMasks | None:
    """Masks to begin a drawing with: of --mask-path, else those of the judge."""
    folder, mask_type = args.mask_path, args.mask_type
    if folder is not None and not folder.is_dir():
        raise InputError(f"--mask-path {folder}: no such folder.")
    if folder is None:
        folder, mask_type = args.judge_masks, args.judge_mask_type or "auto"
    if folder is None:
        return None
    return StartMasks(folder, trained.data, mask_type, trained.normalize_masks, trained.mask_type)


def train_judge(args: argparse.Namespace, trained: TrainedModel, machine: Machine) -> JudgeCall | None:
    """With --judge-images: a segmenter trained on these pairs, or the same from the cache."""
    if args.judge_images is None:
        return None
    from evaluation.fidelity import fidelity_of  # seconds to import
    from evaluation.judge import judge_of_folders

    request = own_judge_request(args, machine.device)
    judge = judge_of_folders(request, trained.data, trained.normalize_masks, trained.mask_type).judge

    def find_cells(image: np.ndarray, truth: np.ndarray) -> Verdict:
        found = judge.class_maps([repeat_gray(image)])[0] > 0
        return Verdict(found, fidelity_of(found, truth))

    return find_cells


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    with start_service(args) as service:
        step = service.drawer.trained.step
        logger.info("%s, step %d: open %s in a browser; Ctrl-C ends the page", args.ckpt, step, service.url)
        service.serve_forever()


def run() -> None:
    """Entry point of the script and of ``sit-app``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
