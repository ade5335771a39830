"""New masks to generate images from: nuclei drawn from numbers, or a lab's own cells in new layouts.

    python make_masks.py simulate --output masks/ --count 500 --image-size 256 --cell-size 20 --density 0.15 --seed 0
    python make_masks.py simulate --output pairs/ --count 240 --image-size 128 --render       # with images to train on
    python make_masks.py recombine --instances LAB/instances --output masks/ --count 1000 --image-size 256

Written for every image NAME:
    OUTPUT/instances/NAME.png   16-bit, 0 background, 1..n cells
    OUTPUT/masks/NAME.png       8-bit, 0 background, 255 cell
    OUTPUT/images/NAME.png      8-bit gray, with ``simulate --render``
and for the set: statistics.csv (one row per image), summary.csv (the set beside what it was made from), settings.json.

Image n is a function of the seed, n and the settings alone: a set may be made in parts, made longer, or finished after
an interruption by the same command, and every file is the same, byte for byte. Files that stand are never rewritten.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError, list_some, run_command
from dataset.files import find_files, read_mask
from layouts.nuclei import HEADROOM, NucleiSettings, render_image, simulate_field
from layouts.placing import progress
from layouts.recombine import (
    LARGEST_CLUSTER,
    ROTATIONS,
    Layouts,
    LayoutSettings,
    cut_pieces,
    read_sources,
    source_digest,
)
from layouts.statistics import Measurement, measure, summarize, write_statistics, write_summary

GENERATOR_VERSION = 1  # goes into settings.json: raise it when the same settings would give other files
LARGEST_LABEL = 65535

# --- files -----------------------------------------------------------------------------------------------------------


def open_set(output: Path, settings: dict[str, object]) -> None:
    """Make the folder of a set, or find the same set there and go on with it.

    Raises:
        InputError: the folder holds something else, or a set that other settings made.
    """
    record = output / "settings.json"
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    if record.is_file():
        try:
            made_with = json.loads(record.read_text())
            different = [key for key in settings if made_with.get(key) != settings[key]]
        except (ValueError, AttributeError):
            raise InputError(
                f"{record} cannot be read, so the set cannot be continued; name another --output"
            ) from None
        if different:
            changes = [f"{key} {made_with.get(key)} and not {settings[key]}" for key in different]
            raise InputError(
                f"--output {output} holds a set made with {list_some(changes)}; name another folder, or give the same "
                "settings to continue it"
            )
        return
    if output.is_dir() and any(output.iterdir()):
        raise InputError(
            f"--output {output} holds files that are no set of this command; name a new or an empty folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    unfinished = record.with_name("settings.json.tmp")
    unfinished.write_text(json.dumps(settings, indent=2) + "\n")
    unfinished.replace(record)


def save_png(array: np.ndarray, path: Path) -> None:
    """Write whole or not at all: an interrupted run leaves no half file under the final name."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    Image.fromarray(array).save(unfinished, format="PNG")
    unfinished.replace(path)


def make_set(
    output: Path, prefix: str, count: int, kinds: list[str], make_image: Callable[[int], dict[str, np.ndarray]]
) -> dict[str, Measurement]:
    """Make what is not there yet and measure the set, images of an earlier, longer run included.

    Args:
        output: folder of the set.
        prefix: of every name.
        count: images 0..count-1 are made.
        kinds: sub-folders that hold a file of every image, "instances" the last.
        make_image: index -> array by kind.
    """
    measurements = {}
    for index in progress(range(count), "masks", count):
        name = f"{prefix}_{index:06d}"
        files = {kind: output / kind / f"{name}.png" for kind in kinds}
        if all(path.is_file() for path in files.values()):
            measurements[name] = measure(read_mask(files["instances"]))
            continue
        arrays = make_image(index)
        for kind, path in files.items():
            if not path.is_file():
                save_png(arrays[kind], path)
        measurements[name] = measure(arrays["instances"])
    earlier = find_files(output / "instances", "instance labels")
    for name in earlier:
        if name not in measurements:
            measurements[name] = measure(read_mask(earlier[name]))
    return dict(sorted(measurements.items()))


def label_files(instance_map: np.ndarray) -> dict[str, np.ndarray]:
    """The instance map as it goes to disk, and the binary mask of the same pixels."""
    if instance_map.max() > LARGEST_LABEL:
        raise InputError(
            f"{instance_map.max()} cells in one image are more than 16 bits can number; lower --image-size"
        )
    return {"masks": np.where(instance_map > 0, 255, 0).astype(np.uint8), "instances": instance_map.astype(np.uint16)}


# --- commands --------------------------------------------------------------------------------------------------------


def run_simulate(args: argparse.Namespace) -> None:
    """The sub-command ``simulate``."""
    height, width = args.image_size
    given = {field.name: getattr(args, field.name) for field in fields(NucleiSettings) if hasattr(args, field.name)}
    settings = NucleiSettings(height=height, width=width, **given)
    open_set(args.output, {"command": "simulate", "generator": GENERATOR_VERSION, **asdict(settings)})

    def make_image(index: int) -> dict[str, np.ndarray]:
        instance_map, level = simulate_field(settings, index)
        files = label_files(instance_map)
        if settings.render:
            rng = np.random.default_rng((settings.seed, index, 1))  # its own: masks are the same with and without it
            files["images"] = render_image(instance_map, level, settings.cell_size, rng)
        return files

    kinds = (["images"] if settings.render else []) + ["masks", "instances"]
    measurements = make_set(args.output, "sim", args.count, kinds, make_image)
    write_statistics(args.output / "statistics.csv", measurements)
    asked = {
        "foreground share, mean": settings.density,
        "foreground share, standard deviation": settings.density * settings.density_spread,
        "cell diameter in pixels, mean": settings.cell_size,
        "elongation, mean": settings.elongation,
    }
    print(write_summary(args.output / "summary.csv", {"made": summarize(measurements.values()), "asked for": asked}))
    print(f"{len(measurements)} images in {args.output}")


def run_recombine(args: argparse.Namespace) -> None:
    """The sub-command ``recombine``."""
    maps = read_sources(args.instances, args.components)
    height, width = args.image_size or Counter(item.shape for item in maps.values()).most_common(1)[0][0]
    given = {field.name: getattr(args, field.name) for field in fields(LayoutSettings) if hasattr(args, field.name)}
    settings = LayoutSettings(
        height=height,
        width=width,
        scale_low=args.scale[0],
        scale_high=args.scale[1],
        source_sha256=source_digest(maps),
        **given,
    )
    sources = [cut_pieces(item, settings.clusters) for item in maps.values()]
    if not any(source.pieces for source in sources):
        raise InputError(f"{args.instances} (--instances): no cell lies whole in its image, so there is none to place")
    open_set(args.output, {"command": "recombine", "generator": GENERATOR_VERSION, **asdict(settings)})

    layouts = Layouts(sources, settings)
    source = {name: measure(item) for name, item in maps.items()}
    measurements = make_set(
        args.output, "mix", args.count, ["masks", "instances"], lambda index: label_files(layouts.field(index))
    )
    write_statistics(args.output / "statistics.csv", measurements)
    write_statistics(args.output / "source_statistics.csv", source)
    columns = {"made": summarize(measurements.values()), "source": summarize(source.values())}
    print(write_summary(args.output / "summary.csv", columns))
    print(f"{len(measurements)} images in {args.output}")


def check_args(args: argparse.Namespace) -> None:
    """Every number that cannot be meant, in one InputError, before any work."""
    faults = []

    def require(holds: bool, flag: str, value: object, rule: str) -> None:
        if not holds:
            faults.append(f"{flag} {value}: {rule}")

    require(args.count >= 1, "--count", args.count, "at least 1")
    require(args.seed >= 0, "--seed", args.seed, "0 or more")
    if args.image_size is not None:
        shown = " ".join(map(str, args.image_size))
        require(len(args.image_size) in (1, 2), "--image-size", shown, "one number, or height and width")
        require(all(16 <= size <= 16384 for size in args.image_size), "--image-size", shown, "16 to 16384 pixels")
    if args.density is not None:
        limit = HEADROOM[args.touching] if args.command == "simulate" else 0.9
        hint = " (0.7 with --touching)" if limit == HEADROOM[False] else ""
        require(0 < args.density <= limit, "--density", args.density, f"above 0 and at most {limit}{hint}")
    if args.command == "simulate":
        largest = min(args.image_size)
        require(4 <= args.cell_size <= largest, "--cell-size", args.cell_size, f"4 to the image's {largest} pixels")
        require(1 <= args.elongation <= 4, "--elongation", args.elongation, "1 (round) to 4")
        require(0 <= args.size_spread <= 1, "--size-spread", args.size_spread, "0 to 1")
        require(0 <= args.irregularity <= 0.2, "--irregularity", args.irregularity, "0 to 0.2")
        require(0 <= args.density_spread <= 1, "--density-spread", args.density_spread, "0 to 1")
    else:
        low, high = args.scale
        require(0.1 <= low <= high <= 10, "--scale", f"{low} {high}", "LOW at most HIGH, between 0.1 and 10")
        require(0 < args.density_scale <= 10, "--density-scale", args.density_scale, "above 0, at most 10")
        require(0 <= args.gap <= 100, "--gap", args.gap, "0 to 100 pixels")
        require(0 <= args.max_overlap <= 0.9, "--max-overlap", args.max_overlap, "0 to 0.9")
        require(
            not (args.max_overlap and args.gap),
            "--max-overlap",
            args.max_overlap,
            f"has no effect with --gap {args.gap}",
        )
        both = args.density is not None and args.density_scale != 1
        require(not both, "--density-scale", args.density_scale, "has no effect with --density")
    if faults:
        raise InputError("; ".join(faults))


def _add_shared_flags(parser: argparse.ArgumentParser, size: int | None, size_help: str) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder, or one to continue")
    parser.add_argument("--count", type=int, default=100, help="images in all (default: %(default)s)")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=size and [size],
        metavar="PIXELS",
        help=f"one number or H W ({size_help})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the whole set (default: %(default)s)")


def _add_simulate(commands) -> None:
    parser = commands.add_parser(
        "simulate", help="draw nuclei from numbers", description="Draw nuclei from numbers.", allow_abbrev=False
    )
    _add_shared_flags(parser, 256, "default: 256")
    cells = parser.add_argument_group("cells; spreads are standard deviation / mean")
    cells.add_argument("--cell-size", type=float, default=20, help="mean diameter in pixels (default: %(default)s)")
    cells.add_argument("--size-spread", type=float, default=0.2, help="of the diameter (default: %(default)s)")
    cells.add_argument("--elongation", type=float, default=1.35, help="mean long / short axis (default: %(default)s)")
    cells.add_argument(
        "--irregularity",
        type=float,
        default=0.04,
        help="how far outlines leave the ellipse, share of the radius (default: %(default)s)",
    )
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--density",
        type=float,
        default=0.15,
        help="mean share of the image that cells cover, 0..1 (default: %(default)s)",
    )
    layout.add_argument(
        "--density-spread", type=float, default=0.4, help="of that share from image to image (default: %(default)s)"
    )
    layout.add_argument(
        "--touching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether cells may touch (default: they may)",
    )
    parser.add_argument("--render", action="store_true", help="also draw simple fluorescence images of the nuclei")


def _add_recombine(commands) -> None:
    parser = commands.add_parser(
        "recombine",
        help="lay a lab's own cells out anew",
        description="Lay a lab's own cells out anew.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--instances", type=Path, required=True, metavar="FOLDER", help="label files: 0 background, one number per cell"
    )
    parser.add_argument(
        "--components", action="store_true", help="the files are binary masks: take every connected part as one cell"
    )
    _add_shared_flags(parser, None, "default: the most common size of the source")
    cells = parser.add_argument_group("cells")
    cells.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=(0.9, 1.1),
        metavar=("LOW", "HIGH"),
        help="resize each by a factor between (default: 0.9 1.1)",
    )
    cells.add_argument("--rotate", choices=ROTATIONS, default="free", help="turns and mirroring (default: %(default)s)")
    cells.add_argument(
        "--clusters",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"keep cells together that touch in the source, up to {LARGEST_CLUSTER} (default: they stay together)",
    )
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--density",
        type=float,
        help="share of the image that cells cover, 0..1 (default: each image takes a source image's)",
    )
    layout.add_argument("--density-scale", type=float, default=1.0, help="times the source's share (default: 1)")
    layout.add_argument(
        "--gap", type=int, help="least background pixels between pieces (default: 1, or 0 with --max-overlap)"
    )
    layout.add_argument(
        "--max-overlap", type=float, default=0.0, help="largest share of a cell that others may hide (default: 0)"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_simulate(commands)
    _add_recombine(commands)
    args = parser.parse_args(argv)
    if args.command == "recombine" and args.gap is None:
        args.gap = 0 if args.max_overlap else 1
    return args


def main(args: argparse.Namespace) -> None:
    check_args(args)
    if args.image_size is not None and len(args.image_size) == 1:
        args.image_size = args.image_size * 2
    if args.command == "simulate":
        run_simulate(args)
    else:
        run_recombine(args)


def run() -> None:
    """Entry point of the script and of ``sit-make-masks``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
