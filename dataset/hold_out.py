"""Split a folder of images and masks into train/ and heldout/ by links, for ``make quickstart DATA=FOLDER``.

    python -m dataset.hold_out DATA OUTPUT

DATA holds the folders images/ and masks/, or images and masks side by side in any layout that training takes. The last
fifth by name is held out, not every fifth image. So most neighbours in a series (such as tiles of one slide) stay in
the same part.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from common.disk import write_bytes
from common.errors import CommandParser, InputError, list_some, run_command
from dataset.files import Pair, find_images_and_masks, mark_nuclei, match_names

LEAST_PAIRS = 5
PARTS = ("train", "heldout")
FILES = "files.txt"  # what an earlier call linked
logger = logging.getLogger(__name__)


def hold_out(data: Path, output: Path) -> list[str]:
    """Link all pairs of ``data`` into ``output``/train and ``output``/heldout, each with images/ and masks/.

    Returns:
        Lines that say what was done, and which files have no partner.

    Raises:
        InputError: there are fewer than :data:`LEAST_PAIRS` pairs, or ``output`` was made from other pairs.
    """
    folders = (data / "images", data / "masks")
    image_dir, mask_dir = folders if all(folder.is_dir() for folder in folders) else (data, data)
    pairs, lonely_images, lonely_masks = match_names(*find_images_and_masks(image_dir, mask_dir))
    if len(pairs) < LEAST_PAIRS:
        lonely = "".join(
            f"; {len(names)} {what} found no partner: {list_some(names)}"
            for what, names in (("images", lonely_images), ("masks", lonely_masks))
            if names
        )
        raise InputError(f"{data} holds {len(pairs)} pairs of image and mask; {LEAST_PAIRS} is the least{lonely}")
    first_held_out = -(-len(pairs) * 4 // 5)
    parts = {"train": pairs[:first_held_out], "heldout": pairs[first_held_out:]}
    _refuse_other_files(output, parts, data)
    for part, members in parts.items():
        _link(members, output / part)
    lines = [f"{len(pairs)} pairs of {data}, the last fifth by name held out"]
    if lonely_images:
        lines.append(f"{len(lonely_images)} images have no mask and are left out: {list_some(lonely_images)}")
    if lonely_masks:
        lines.append(f"{len(lonely_masks)} masks have no image and are left out: {list_some(lonely_masks)}")
    return lines


def _refuse_other_files(output: Path, parts: dict[str, list[Pair]], data: Path) -> None:
    """Refuse a folder whose files have changed, because held-out images could become training images."""
    names = "".join(f"{part}/{pair.name}\n" for part, members in parts.items() for pair in members)
    record = output / FILES
    if record.exists() and record.read_text(encoding="utf-8") != names:
        raise InputError(
            f"{data} holds other images than before, and what was held out may change: remove {output} to start anew"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(record, names.encode())


def _link(pairs: list[Pair], folder: Path) -> None:
    """Link image and mask of each pair under the name of the pair. Removes older links."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for old in (folder / kind).iterdir():
            if old.is_symlink():
                old.unlink()
    for pair in pairs:
        for kind, path in (("images", pair.image_path), ("masks", pair.mask_path)):
            suffix = "" if path.is_dir() else path.suffix  # a folder of nuclei has none
            (folder / kind / f"{pair.name}{suffix}").symlink_to(path.absolute(), target_is_directory=path.is_dir())
    mark_nuclei(folder)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="hold_out", description="Link the pairs of a folder into train/ and heldout/.")
    parser.add_argument("data", type=Path, help="folder with images/ and masks/, or with images and masks side by side")
    parser.add_argument("output", type=Path, help="gets train/ and heldout/, each with images/ and masks/")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Link the pairs and say what was done."""
    logging.basicConfig(level=logging.INFO, format="quickstart: %(message)s", stream=sys.stdout)
    for line in hold_out(args.data, args.output):
        logger.info("%s", line)


if __name__ == "__main__":
    run_command(main, parse_args)
