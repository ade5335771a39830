"""Make masks: simulated nuclei, your own cells in new layouts, or annotations of other programs as masks.

    python make_masks.py simulate --output masks/ --count 500 --image-size 256 --cell-size 20 --density 0.15 --seed 0
    python make_masks.py simulate --output pairs/ --count 240 --image-size 128 --render       # with images to train on
    python make_masks.py recombine --instances LAB/instances --output masks/ --count 1000 --image-size 256
    python make_masks.py convert ROIS --images IMAGES --output masks/          # annotations of other programs
    python make_masks.py images STACKS --z max --output images/                # stacks of microscopes, one plane each
    python make_masks.py groups --data-path IMAGES --mask-path MASKS --output flat/    # one sub-folder for each group

Files that simulate and recombine write for every image NAME:
    OUTPUT/instances/NAME.png   16-bit, 0 background, 1..n cells
    OUTPUT/masks/NAME.png       8-bit, 0 background, 255 cell
    OUTPUT/classes/NAME.png     16-bit, class maps with the values of your files, with ``recombine --classes``
    OUTPUT/images/NAME.png      8-bit gray, with ``simulate --render``
Files of the set: statistics.csv (one row per image), summary.csv (compares the set with its source), settings.json.

Image n depends only on the seed, n and the settings. Run the same command to continue after an interruption, or with a
larger --count to make the set longer. Every file comes out the same, byte for byte. Existing files are not rewritten.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.errors import end_at_interrupt

    end_at_interrupt()

import argparse
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np

from common.arguments import fraction, non_negative_float, non_negative_int, positive_float, positive_int, seed_number
from common.cells import without_gaps
from common.disk import new_folder, open_work, real_path
from common.errors import CommandParser, InputError, as_flag, run_command
from common.log import say, start_logging
from dataset.annotations.convert import MAPS, ConvertSettings, convert, unpack_images
from dataset.annotations.formats import FORMATS
from dataset.annotations.stacks import ARRAYS
from dataset.config import CROPS
from dataset.groups import TABLE, gather_groups
from dataset.microscope_files import PROJECTIONS, Choice
from dataset.microscopes import flatten_folder
from dataset.views import center_view
from layouts.nuclei import HEADROOM, NucleiSettings, render_image, simulate_field
from layouts.recombine import (
    LARGEST_CLUSTER,
    RESIZE_LIMITS,
    ROTATIONS,
    Layouts,
    LayoutSettings,
    OneValueForAll,
    check_sources,
    cut_pieces,
    read_class_maps,
    read_sources,
    source_digest,
)
from layouts.statistics import Measurement, measure, summarize, write_statistics, write_summary
from layouts.writer import KINDS, label_files, make_set, record_of, with_new_settings

MOST_COVERED = 0.9  # largest density of recombined layouts

# --- commands --------------------------------------------------------------------------------------------------------


def run_simulate(args: argparse.Namespace) -> None:
    """Run the subcommand ``simulate``."""
    height, width = args.image_size
    given = {field.name: getattr(args, field.name) for field in fields(NucleiSettings) if hasattr(args, field.name)}
    settings = NucleiSettings(height=height, width=width, **given)

    def make_image(index: int) -> dict[str, np.ndarray]:
        instance_map, level = simulate_field(settings, index)
        files = label_files(instance_map)
        if settings.render:
            rng = np.random.default_rng((settings.seed, index, 1))  # separate, so that --render does not change masks
            files["images"] = render_image(instance_map, level, settings.cell_size, rng)
        return files

    asked = {
        "foreground share, mean": settings.density,
        "foreground share, standard deviation": settings.density * settings.density_spread,
        "cell diameter in pixels, mean": settings.cell_size,
        "elongation, mean": settings.elongation,
    }
    kinds = (["images"] if settings.render else []) + ["masks", "instances"]
    with open_work(args.output, record_of("simulate", settings), KINDS):
        made = make_set(args.output, "sim", args.count, kinds, make_image)
        finish_set(args.output, made, {"asked for": asked})


def finish_set(
    output: Path, made: dict[str, Measurement], others: dict[str, dict[str, float]], with_classes: bool = False
) -> None:
    """Write the statistics of a set, and its summary beside ``others``. Print the summary."""
    write_statistics(output / "statistics.csv", made)
    say(write_summary(output / "summary.csv", {"made": summarize(made.values())} | others))
    masks = "1 mask" if len(made) == 1 else f"{len(made)} masks"
    say(
        f"{masks}: {output / 'instances'} has one id per cell, {output / 'masks'} the same cells as 0 and 255.\n"
        "summary.csv is the table above, statistics.csv has a row for each mask. sample_ddp.py takes either folder."
    )
    if with_classes:
        say(f"{output / 'classes'} has their classes: give it to sample_ddp.py with --mask-type classes.")


def run_recombine(args: argparse.Namespace) -> None:
    """Run the subcommand ``recombine``."""
    maps, classes = read_cells(args)
    height, width = args.image_size or Counter(item.shape for item in maps.values()).most_common(1)[0][0]
    given = {field.name: getattr(args, field.name) for field in fields(LayoutSettings) if hasattr(args, field.name)}
    settings = LayoutSettings(
        height=height,
        width=width,
        scale_low=args.scale[0],
        scale_high=args.scale[1],
        source_sha256=source_digest(maps),
        classes_sha256=source_digest(classes) if classes else None,
        **given,
    )
    if args.crop == "center":
        maps = {name: without_gaps(centered(item, height)) for name, item in maps.items()}
        classes = {name: centered(item, height) for name, item in classes.items()}
    sources = [cut_pieces(item, settings.clusters, classes.get(name)) for name, item in maps.items()]
    if not any(source.pieces for source in sources):
        why = (
            "the image border cuts every cell" if any(item.any() for item in maps.values()) else "no file holds a cell"
        )
        raise InputError(f"{args.instances} (--instances): {why}, so there is none to place")

    with open_work(args.output, record_of("recombine", settings), KINDS, with_new_settings):
        layouts = Layouts(sources, settings)
        source = {name: measure(item) for name, item in maps.items()}
        kinds = [*(["classes"] if classes else []), "masks", "instances"]
        made = make_set(args.output, "mix", args.count, kinds, lambda index: label_files(*layouts.maps(index)))
        write_statistics(args.output / "source_statistics.csv", source)
        finish_set(args.output, made, {"source": summarize(source.values())}, with_classes=bool(classes))


def read_cells(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Instance maps and class maps of ``recombine`` by name. Without ``--classes``, there are no class maps."""
    try:
        maps = read_sources(args.instances, args.components)
        if not args.components:
            check_sources(args.instances, maps)
    except OneValueForAll as error:
        raise InputError(
            f"--instances: {error}, but recombine needs one number per cell: give instance labels, or use "
            "--components to count every connected part as one cell"
        ) from error
    if args.classes is None:
        return maps, {}
    if not args.components and real_path(args.classes) == real_path(args.instances):
        raise InputError(
            "--classes and --instances are one folder: add --components, so that connected parts are cells"
        )
    return maps, read_class_maps(args.classes, args.instances, maps)


def centered(labels: np.ndarray, side: int) -> np.ndarray:
    """The middle square of a label image (H, W), as training with ``--crop center`` reads it."""
    height, width = labels.shape
    return center_view(height, width, side).apply_labels(labels)


def run_convert(args: argparse.Namespace) -> None:
    """Run the subcommand ``convert``."""
    images = args.images
    in_array = images.is_file() and images.suffix.lower() in ARRAYS
    if in_array != (args.images_output is not None):
        raise InputError("--images-output says where the images of an array (--images FILE.npy) go: give both, or none")
    if in_array and real_path(args.images_output).is_relative_to(real_path(args.output)):
        raise InputError(f"--images-output {args.images_output}: give another folder than --output, and not one in it")
    colours = tuple(colour.lower() for colour in args.class_colours or ())
    settings = ConvertSettings(args.format, args.kind, args.classes or (), colours)
    if in_array:  # its images are only kept if the annotations are good
        with new_folder(args.images_output) as folder:
            result = convert(args.input, unpack_images(images, folder), args.output, settings)
    else:
        result = convert(args.input, images, args.output, settings)
    say("\n".join([*result.lines(), f"written: {args.output}"]))


def run_images(args: argparse.Namespace) -> None:
    """The sub-command ``images``."""
    choice = Choice(args.z, args.time, args.scene, args.channels or (), args.axes or "")
    written = flatten_folder(args.input, args.output, choice)
    say(f"{len(written)} images in {args.output}")


def run_groups(args: argparse.Namespace) -> None:
    """Run the subcommand ``groups``."""
    if (args.data_path is None) != (args.mask_path is None):
        raise InputError("--data-path and --mask-path belong together: give both. --unlabelled-path needs no masks.")
    if args.data_path is None and args.unlabelled_path is None:
        raise InputError("give --data-path and --mask-path, --unlabelled-path, or all three.")
    counts = gather_groups(args.output, args.data_path, args.mask_path, args.unlabelled_path)
    say("\n".join([*(f"{name}: {count} images" for name, count in counts.items()), f"written: {args.output / TABLE}"]))


def check_args(args: argparse.Namespace) -> None:
    """Raise one InputError with all values that are out of range, before any work."""
    faults = []

    def require(holds: bool, flag: str, value: object, rule: str) -> None:
        if not holds:
            faults.append(f"{flag} {value}: {rule}")

    if args.image_size is not None:
        shown = " ".join(map(str, args.image_size))
        require(len(args.image_size) in (1, 2), "--image-size", shown, "one number, or height and width")
        require(all(16 <= size <= 16384 for size in args.image_size), "--image-size", shown, "16 to 16384 pixels")
    if args.density is not None:
        limit = HEADROOM[args.touching] if args.command == "simulate" else MOST_COVERED
        hint = f" ({HEADROOM[True]} with --touching)" if limit == HEADROOM[False] else ""
        require(args.density <= limit, "--density", args.density, f"above 0 and at most {limit}{hint}")
    if args.command == "simulate":
        largest = min(args.image_size)
        require(4 <= args.cell_size <= largest, "--cell-size", args.cell_size, f"4 to the image's {largest} pixels")
        require(1 <= args.elongation <= 4, "--elongation", args.elongation, "1 (round) to 4")
        require(args.irregularity <= 0.2, "--irregularity", args.irregularity, "0 to 0.2")
    else:
        (low, high), (least, most) = args.scale, RESIZE_LIMITS
        span = f"LOW at most HIGH, between {least:g} and {most:g}"
        require(least <= low <= high <= most, "--scale", f"{low} {high}", span)
        require(args.density_scale <= 10, "--density-scale", args.density_scale, "above 0, at most 10")
        require(args.gap <= 100, "--gap", args.gap, "0 to 100 pixels")
        require(args.max_overlap <= 0.9, "--max-overlap", args.max_overlap, "0 to 0.9")
        idle = f"has no effect with --gap {args.gap}"
        require(not (args.max_overlap and args.gap), "--max-overlap", args.max_overlap, idle)
        both = args.density is not None and args.density_scale != 1
        require(not both, "--density-scale", args.density_scale, "has no effect with --density")
        square = args.image_size is not None and len(set(args.image_size)) == 1
        require(args.crop != "center" or square, "--crop", "center", "needs --image-size SIDE, the size of training")
        for name, usual in (("density", None), ("density_scale", 1.0), ("max_overlap", 0.0)):
            value = getattr(args, name)
            require(not args.single or value == usual, as_flag(name), value, "has no effect with --single")
    if faults:
        raise InputError("; ".join(faults))


def _add_shared_flags(parser: argparse.ArgumentParser, size: int | None) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER",
        help="folder to write; a set there with the same settings is continued or extended",
    )  # fmt: skip
    parser.add_argument("--count", type=positive_int, default=100, help="number of images")
    parser.add_argument(
        "--image-size", type=positive_int, nargs="+", default=size and [size], metavar="PIXELS",
        help=f"one number, or height and width (default: {size or 'the most common size of the source'})",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="seed of all random numbers: another seed gives other masks"
    )


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    text = "simulate nuclei of a given size, shape and density"
    parser = commands.add_parser("simulate", help=text, description=f"{text.capitalize()}.")
    _add_shared_flags(parser, 256)
    cells = parser.add_argument_group("cells (a spread is standard deviation / mean)")
    cells.add_argument("--cell-size", type=positive_float, default=20.0, help="mean diameter in pixels")
    cells.add_argument("--size-spread", type=fraction, default=0.2, help="spread of the diameter")
    cells.add_argument(
        "--elongation", type=positive_float, default=1.35, help="mean ratio of long to short axis, 1 to 4"
    )
    cells.add_argument(
        "--irregularity", type=non_negative_float, default=0.04,
        help="how far outlines deviate from an ellipse, as a fraction of the radius, 0 to 0.2",
    )  # fmt: skip
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--density", type=positive_float, default=0.15,
        help="mean fraction of the image that cells cover, above 0, at most "
        f"{HEADROOM[True]} ({HEADROOM[False]} with --no-touching)",
    )  # fmt: skip
    layout.add_argument(
        "--density-spread", type=fraction, default=0.4, help="spread of the density from image to image"
    )
    layout.add_argument(
        "--touching", action=argparse.BooleanOptionalAction, default=True,
        help="whether cells may touch (default: they may)",
    )  # fmt: skip
    parser.add_argument("--render", action="store_true", help="also draw simple fluorescence images of the nuclei")


def _add_recombine(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recombine",
        help="arrange the cells of your own label files in new layouts",
        description="Arrange the cells of your own label files in new layouts.",
    )
    parser.add_argument(
        "--instances", type=Path, required=True, metavar="FOLDER",
        help="label files: 0 is background, each cell has its own number",
    )  # fmt: skip
    parser.add_argument(
        "--components", action="store_true",
        help="the files are binary masks or class maps: count every connected part as one cell",
    )  # fmt: skip
    parser.add_argument(
        "--classes", type=Path, metavar="FOLDER",
        help="class maps of the same images, 0 outside of cells: cells keep the classes of their pixels in "
        "OUTPUT/classes",
    )  # fmt: skip
    parser.add_argument(
        "--crop", choices=CROPS, default="random",
        help="--crop of the model: center resizes all label files to squares of --image-size before cells are cut out",
    )  # fmt: skip
    _add_shared_flags(parser, None)
    cells = parser.add_argument_group("cells")
    cells.add_argument(
        "--scale", type=positive_float, nargs=2, default=(0.9, 1.1), metavar=("LOW", "HIGH"),
        help="resize each cell (or cluster) by a random factor in this range",
    )  # fmt: skip
    turns = "free: mirror cells, turn them by any angle; quarter: mirror, turn by 90, 180 or 270 degrees; none: neither"
    cells.add_argument("--rotate", choices=ROTATIONS, default="free", help=turns)
    cells.add_argument(
        "--clusters", action=argparse.BooleanOptionalAction, default=True,
        help=f"keep touching cells together, up to {LARGEST_CLUSTER} of them (default: yes)",
    )  # fmt: skip
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--single",
        action="store_true",
        help="put one cell (or cluster) into the middle of each image, for images cut out around single cells",
    )
    layout.add_argument(
        "--density", type=positive_float,
        help=f"fraction of the image that cells cover, above 0, at most {MOST_COVERED} (default: that of a random "
        "source image)",
    )  # fmt: skip
    layout.add_argument(
        "--density-scale", type=positive_float, default=1.0,
        help="factor on the density of the source image, without --density",
    )  # fmt: skip
    layout.add_argument(
        "--gap", type=non_negative_int,
        help="least number of background pixels between cells or clusters (default: 1, or 0 with --max-overlap)",
    )  # fmt: skip
    layout.add_argument(
        "--max-overlap", type=fraction, default=0.0, help="largest fraction of a cell that others may hide, 0 to 0.9"
    )


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn annotations of other programs into label images",
        description="Turn annotations of other programs into label images for train.py. Ids are kept. If cells "
        "overlap, the smaller one keeps the pixels.",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="file or folder of annotations")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="IMAGES", help="images of these annotations, with the same names"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="MASKS", help="new folder for label TIFFs")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto",
        help="cellpose: _seg.npy; imagej: .roi and .zip; qupath: GeoJSON; coco, labelme: JSON; colours: pictures whose "
        "colours are classes; pages: one cell per page; planes: .npy of (images, height, width, classes), as PanNuke "
        "(default: by each file's suffix and content)",
    )  # fmt: skip
    parser.add_argument(
        "--kind", choices=MAPS, default="instances", help="write ids of cells, or class ids, which need --classes"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME",
        help="only write cells of these classes; their class ids are 1, 2, ... in this order (default: all cells)",
    )  # fmt: skip
    parser.add_argument(
        "--class-colours", nargs="+", metavar="RRGGBB",
        help="colour of each class, background first; or the word cells: every colour except black means cell",
    )  # fmt: skip
    parser.add_argument(
        "--images-output", type=Path, metavar="FOLDER", help="with --images FILE.npy: new folder for its images"
    )


def _add_images(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "images",
        help="turn stacks of microscopes into flat TIFFs",
        description="Turn stacks of microscopes (OME-TIFF, ImageJ hyperstacks, nd2, czi, lif) into flat TIFFs that "
        "train.py takes. Depth, time and scene are chosen by you and never guessed.",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="file or folder of stacks")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder for flat TIFFs")
    projections = " or ".join(PROJECTIONS)
    needed = "needed if a file has several"
    parser.add_argument("--z", metavar="PLANE", help=f"z slice, from 1, or {projections} of all; {needed}")
    parser.add_argument("--time", metavar="TIMEPOINT", help=f"time point, from 1, or {projections} of all; {needed}")
    parser.add_argument("--scene", type=positive_int, metavar="FIELD", help=f"field of view, from 1; {needed}")
    parser.add_argument("--channels", type=positive_int, nargs="+", help="channels to keep, from 1 (default: all)")
    parser.add_argument("--axes", metavar="LETTERS", help="axes of files that do not name them, such as ZYX or CYX")


def _add_groups(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "groups",
        help="turn one sub-folder per group into flat folders and a table for --groups",
        description="Put images and masks of sub-folders, one for each group such as a patient, into flat folders, and "
        "write groups.csv for --groups. IMAGES/GROUP/NAME.png becomes FOLDER/images/GROUP_NAME.png.",
    )
    parser.add_argument("--data-path", type=Path, metavar="IMAGES", help="sub-folders of images")
    parser.add_argument("--mask-path", type=Path, metavar="MASKS", help="sub-folders of masks, with the same names")
    parser.add_argument("--unlabelled-path", type=Path, metavar="IMAGES", help="sub-folders of images without masks")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="simulate|recombine|convert|images|groups")
    for add in (_add_simulate, _add_recombine, _add_convert, _add_images, _add_groups):
        add(commands)
    args = parser.parse_args(argv)
    if args.command == "recombine" and args.gap is None:
        args.gap = 0 if args.max_overlap else 1
    return args


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=not sys.stderr.isatty())  # a terminal has bars, a log file gets lines
    readers = {"convert": run_convert, "images": run_images, "groups": run_groups}
    if args.command in readers:
        readers[args.command](args)
        return
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
