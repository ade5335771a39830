"""Check a data set before training, or measure a synthetic set: does it follow its masks, look real, help a segmenter?

    python evaluate.py data --data-path IMAGES --mask-path MASKS                    check files before training
    python evaluate.py threshold SAMPLE_DIR                                         follows masks? (no training)
    python evaluate.py grid SAMPLE_DIR                                              do the network's patches show?
    python evaluate.py fidelity SAMPLE_DIR --data-path IMAGES --mask-path MASKS     follows masks? (by a segmenter)
    python evaluate.py filter SAMPLE_DIR --keep-share 0.8 --output BEST             keep the best images
    python evaluate.py realism SAMPLE_DIR --data-path IMAGES --mask-path MASKS      looks real? (or FID, see --help)
    python evaluate.py population SAMPLE_DIR                                        number, size, brightness of cells
    python evaluate.py looks SAMPLE_DIR                                             colour, contrast and grain
    python evaluate.py memorisation SAMPLE_DIR --data-path TRAINING --held-out OTHERS
    python evaluate.py report SAMPLE_DIR                                            all results in one HTML file
    python evaluate.py sweep --ckpt CKPT.pt --data-path IMAGES --mask-path MASKS    compare guidance and solvers
    python evaluate.py practise --data-path IMAGES --mask-path MASKS                make images for few labels
    python evaluate.py split --data-path IMAGES --mask-path MASKS --output SPLIT    prepare the utility experiment
    python evaluate.py utility SPLIT --sets PRACTISED                               does it help a segmenter?

Most measures compare synthetic with real images. They write tables and pictures into SAMPLE_DIR/evaluation.
``evaluate.py MEASURE --help`` explains each measure.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.errors import end_at_interrupt

    end_at_interrupt()

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli import (
    add_device_argument,
    add_judge_training,
    add_mask_arguments,
    add_mask_type_argument,
    add_mask_values_argument,
    add_output_argument,
    add_real_pairs,
)
from common.arguments import positive_fraction, positive_int
from common.errors import CommandParser, InputError, run_command
from common.log import say, start_logging
from common.outputs import check_output_folder
from dataset.config import CROPS
from engine.machine import resolve_device
from experiments import (
    add_practise,
    add_split,
    add_sweep,
    add_utility,
    run_practise,
    run_split,
    run_sweep,
    run_utility,
)
from flag_rules import check_needs
from settings import judge_request
from synthetic.manifest import MANIFEST

if TYPE_CHECKING:
    from evaluation.output import Section
    from synthetic.reader import SampleSet


# --- flags -----------------------------------------------------------------------------------------------------------


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-path", required=True, metavar="IMAGES", help="real images")
    parser.add_argument("--mask-path", required=True, metavar="MASKS", help="masks of the real images")
    add_mask_arguments(parser)
    parser.add_argument("--num-classes", type=positive_int, default=2, help="number of classes, background included")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS",
        help="--image-size of the planned training: reports images that are smaller",
    )  # fmt: skip
    parser.add_argument("--crop", choices=CROPS, default="center", help="--crop of the planned training")
    add_output_argument(parser, "data_report")


def _add_fidelity(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    add_real_pairs(parser, " to train the judge (a small segmenter)")
    add_mask_values_argument(parser)
    add_judge_training(parser)
    add_device_argument(parser)


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="set on which evaluate.py fidelity has run")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--min-fidelity", type=positive_fraction, metavar="DICE", help="keep images with at least this fidelity_dice"
    )
    rule.add_argument(
        "--keep-share", type=positive_fraction, metavar="FRACTION",
        help="keep this fraction of the images (0 to 1), the best ones",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also copy the kept images into this new folder")


def _add_realism(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    unseen = "real images, preferably not used to train the generator"
    parser.add_argument("--data-path", required=True, metavar="IMAGES", help=unseen)
    masks = "masks of the real images, to train the judge; not needed with --inception-weights"
    parser.add_argument("--mask-path", metavar="MASKS", help=masks)
    add_mask_type_argument(parser)
    add_mask_values_argument(parser)
    weights = (
        "measure FID and KID with this file: weights-inception-2015-12-05-6726825d.pth from the releases of "
        "torch-fidelity (not downloaded for you)"
    )
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help=weights)
    parser.add_argument("--splits", type=positive_int, default=20, help="how often to split the real images at random")
    add_judge_training(parser)
    add_device_argument(parser)


def _add_population(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    named = "real images to compare with (default: those that the manifest of the set names)"
    parser.add_argument("--data-path", metavar="IMAGES", help=named)
    parser.add_argument("--mask-path", metavar="MASKS", help="masks of these real images")
    add_mask_type_argument(parser)
    add_mask_values_argument(parser)


def _add_looks(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    named = "real images to compare with (default: those that the manifest of the set names)"
    parser.add_argument("--data-path", type=Path, metavar="IMAGES", help=named)


def _add_memorisation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="folder that sample_ddp.py has written")
    parser.add_argument("--data-path", required=True, metavar="IMAGES", help="training images of the generator")
    masks = "training masks of the generator, to count images made from them separately"
    parser.add_argument("--mask-path", metavar="MASKS", help=masks)
    unseen = "real images that were not used in training (default: compare training images with each other)"
    parser.add_argument("--held-out", metavar="IMAGES", help=unseen)


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    shown = "number of worst images to show, and number of best images"
    parser.add_argument("--images", type=positive_int, default=8, metavar="N", help=shown)
    utility = "include the results of evaluate.py utility from this folder"
    parser.add_argument("--utility", type=Path, metavar="FOLDER", help=utility)
    sweep = "include the results of evaluate.py sweep from this folder"
    parser.add_argument("--sweep", type=Path, metavar="FOLDER", help=sweep)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="folder that sample_ddp.py has written")
    moved = "new folder of the real images, if they have moved since sampling"
    parser.add_argument("--real-dir", metavar="FOLDER", help=moved)


# --- commands --------------------------------------------------------------------------------------------------------


def _open_set(args: argparse.Namespace) -> SampleSet:
    from synthetic.reader import SampleSet

    samples = SampleSet(args.sample_dir, getattr(args, "real_dir", None))
    if getattr(args, "mask_values", None) is not None:
        samples.config = samples.require_config().with_mask_values(args.mask_values)
    return samples


def _show(section: Section, content: dict, written: str | Sequence[Path], samples: SampleSet | None = None) -> None:
    """Print a result: table, explanation, how the set was made, and the written files."""
    from evaluation.output import written_line
    from synthetic.reader import describe_provenance

    made = describe_provenance(samples.provenance()) if samples is not None else []
    say("\n".join([*section.lines(content), *made, written_line(written)]))


def run_data(args: argparse.Namespace) -> None:
    """Check a data set before training. Reports counts, sizes, gray values, classes and cells in plain language.

    Lists unreadable files, images without a mask, masks without an image, and duplicates. Draws a contact sheet with
    the outlines of the masks. The exit code is 0 if training can start, 2 if it cannot.
    """
    from evaluation.data_report import survey, write_data_report

    check_output_folder(args.output, "data.json", ("problems", "remarks"), (args.data_path, args.mask_path))
    report, pairs, rule = survey(
        args.data_path, args.mask_path, args.num_classes, args.mask_type, args.image_size, args.crop,
        normalize=args.normalize_masks, mask_values=args.mask_values, progress=True,
    )  # fmt: skip
    written = write_data_report(report, pairs, rule, args.output)
    say("\n".join(report.lines()))
    say(f"written: {', '.join(map(str, written))}")
    if report.problems:
        count = len(report.problems)
        raise InputError(f"{count} problem{'s' * (count > 1)} to fix before training, first: {report.problems[0]}")


def run_threshold(args: argparse.Namespace) -> None:
    """Threshold each image into bright and dark (Otsu), and compare the result with the mask by Dice.

    Does the same with the real images of the same masks. Also reports mean and standard deviation of the gray values.
    Needs no training.
    """
    from evaluation.grid import grid_lines
    from evaluation.threshold import SECTION, score_by_threshold, write_threshold_report

    samples = _open_set(args)
    score = score_by_threshold(samples)
    folder = write_threshold_report(samples, score)
    picture = ", threshold.png" if score.compared else ""
    for line in grid_lines(samples):
        say(line)
    _show(SECTION, score.to_dict(), f"{folder}/threshold.json, threshold.csv{picture}", samples)


def run_grid(args: argparse.Namespace) -> None:
    """Measure whether the network's patches show as a grid.

    The number is the mean difference of neighbouring pixels across patch borders, divided by the mean difference inside
    patches. 1 means no grid. Real images of the same masks are measured as well.
    """
    from evaluation.grid import SECTION, score_grid, write_grid_report

    samples = _open_set(args)
    score = score_grid(samples)
    folder = write_grid_report(samples, score)
    _show(SECTION, score.to_dict(), f"{folder}/grid.json, grid.csv", samples)


def run_fidelity(args: argparse.Namespace) -> None:
    """Segment the synthetic images with a small U-Net (the judge), and compare the result with the masks.

    The judge is trained on real pairs. This takes minutes on a CPU for small images. The next set reuses the judge.
    Real images that it has not seen show the highest score to expect. Adds the column fidelity_dice to the manifest.
    """
    from evaluation.fidelity import SECTION, score_fidelity, write_fidelity_report

    samples = _open_set(args)
    report = score_fidelity(samples, judge_request(args, resolve_device(args.device)))
    folder = write_fidelity_report(samples, report)
    written = f"{folder}/fidelity.json, and the column fidelity_dice of {samples.folder / MANIFEST}"
    _show(SECTION, report.to_dict(), written, samples)


def run_filter(args: argparse.Namespace) -> None:
    """Select the images with the highest fidelity_dice.

    The set itself stays unchanged. The lists kept.csv and dropped.csv (with reasons) go into SAMPLE_DIR/evaluation.
    With --output, the kept images are copied into a new set.
    """
    from evaluation.filter import SECTION, filter_set, write_filter_report

    samples = _open_set(args)
    result = filter_set(samples, args.min_fidelity, args.keep_share)
    written = write_filter_report(samples, result, args.output)
    _show(SECTION, result.to_dict(), written)


def run_realism(args: argparse.Namespace) -> None:
    """Measure how far the synthetic images are from real images, in the features of a network.

    Two random halves of the real images are compared in the same way, many times. If the synthetic images look real,
    both distances are equal. With --inception-weights, the distances are FID and KID. Without it, the distance is a
    Frechet distance on the features of the judge (see evaluate.py fidelity). This distance is not FID.
    """
    from dataset.files import find_images
    from evaluation.fidelity import prepare_judge
    from evaluation.realism import (
        SECTION,
        describe_weights,
        inception_features,
        refuse_too_few,
        score_realism,
        write_realism_report,
    )

    samples = _open_set(args)
    channels = samples.require_config().channels if args.inception_weights is not None else 3
    if channels not in (1, 3):
        raise InputError(
            f"--inception-weights: Inception needs gray or RGB images, but the set has {channels} "
            "channels; leave the flag out to use the judge's features"
        )
    refuse_too_few(len(samples), len(find_images(args.data_path)))
    if args.inception_weights is not None:
        extract = inception_features(args.inception_weights, resolve_device(args.device))
        features = describe_weights(args.inception_weights)
    elif args.mask_path is None:
        raise InputError("give --inception-weights FILE for FID, or --mask-path MASKS to use the judge's features")
    else:
        found, _ = prepare_judge(samples, judge_request(args, resolve_device(args.device)))
        extract, features = found.judge.features, f"deepest layer of judge {found.key[:12]}"
    inception = args.inception_weights is not None
    report = score_realism(samples, args.data_path, extract, features, inception, splits=args.splits, seed=args.seed)
    folder = write_realism_report(samples, report)
    _show(SECTION, report.to_dict(), f"{folder}/realism.json, realism.png", samples)


def run_population(args: argparse.Namespace) -> None:
    """Compare synthetic with real cells: number, area, eccentricity, brightness, contrast and texture.

    Gives histograms and Wasserstein distances. Two random halves of the real images are compared for reference.
    """
    from evaluation.population import SECTION, score_population, write_population_report

    if (args.data_path is None) != (args.mask_path is None):
        raise InputError(
            "--data-path and --mask-path go together: give both, or none to use the manifest's real images"
        )
    samples = _open_set(args)
    report, synthetic, real = score_population(samples, args.data_path, args.mask_path, args.mask_type)
    folder = write_population_report(samples, report, synthetic, real)
    _show(SECTION, asdict(report), f"{folder}/population.json, population.csv, population.png", samples)


def run_looks(args: argparse.Namespace) -> None:
    """Compare the looks of synthetic and real images: colour, contrast and grain, as a few numbers each.

    Gives Wasserstein distances. Two random halves of the real images are compared for reference. Draws a row of images
    for each look of the set.
    """
    from evaluation.looks import SECTION, score_looks, write_looks_report

    samples = _open_set(args)
    report = score_looks(samples, args.data_path)
    folder = write_looks_report(samples, report, args.data_path)
    _show(SECTION, asdict(report), f"{folder}/looks.json{', looks.png' if report.looks else ''}", samples)


def run_memorisation(args: argparse.Namespace) -> None:
    """Find the nearest training image of every synthetic image, in any turn or flip.

    Does the same for held-out real images, for reference. Draws the ten closest pairs.
    """
    from evaluation.memorisation import SECTION, score_memorisation, write_memorisation_report

    samples = _open_set(args)
    report, closest, paths = score_memorisation(samples, args.data_path, args.held_out, args.mask_path, progress=True)
    folder = write_memorisation_report(samples, report, closest, paths)
    _show(SECTION, asdict(report), f"{folder}/memorisation.json, memorisation.csv, memorisation.png", samples)


def run_report(args: argparse.Namespace) -> None:
    """Collect all results of SAMPLE_DIR/evaluation in one HTML file.

    The file is self-contained. It holds tables, plots, and the worst and best images by fidelity. The numbers also go
    into report.json. Also writes a gallery of the set, to sort by fidelity.
    """
    from evaluation.report import ELSEWHERE, write_report
    from synthetic.gallery import GALLERY, write_gallery

    samples = _open_set(args)
    others = {name: path for name in ELSEWHERE if (path := getattr(args, name)) is not None}
    page, found, missing = write_report(samples, args.images, others)
    say(f"measures in the report: {', '.join(found)}")
    if missing:
        say(f"not measured yet: {', '.join(missing)}")
    write_gallery(samples, page.with_name(GALLERY))
    say(f"written: {page}, {page.with_suffix('.json').name}, {GALLERY}")


@dataclass(frozen=True)
class Measure:
    """One subcommand. The docstring of ``run`` is the description in its ``--help``."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


MEASURES = {
    "data": Measure("check images and masks before training", _add_data, run_data),
    "threshold": Measure("do thresholded images agree with their masks? (no training)", _add_set, run_threshold),
    "grid": Measure("do the network's patches show as a grid?", _add_set, run_grid),
    "fidelity": Measure("does a segmenter trained on real images find the masks?", _add_fidelity, run_fidelity),
    "filter": Measure("keep the images that follow their masks best", _add_filter, run_filter),
    "realism": Measure(
        "distance to real images: FID and KID, or by the features of a small segmenter", _add_realism, run_realism
    ),
    "population": Measure("number, size, shape, brightness and texture of cells", _add_population, run_population),
    "looks": Measure("colour, contrast and grain of the images", _add_looks, run_looks),
    "memorisation": Measure("does the generator copy its training images?", _add_memorisation, run_memorisation),
    "report": Measure("collect all results of a set in one HTML file", _add_report, run_report),
    "sweep": Measure("which guidance and solver to use for sampling", add_sweep, run_sweep),
    "split": Measure("divide pairs into test images and labelled images, for utility", add_split, run_split),
    "practise": Measure(
        "make synthetic images for a few labels, and say whether they help", add_practise, run_practise
    ),
    "utility": Measure("do synthetic images beside real ones improve a segmenter?", add_utility, run_utility),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of ``evaluate.py``."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="MEASURE")
    for name, measure in MEASURES.items():
        measure.add_flags(commands.add_parser(name, help=measure.help, description=measure.run.__doc__))
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the chosen measure, print its table and name the written files."""
    start_logging(is_main=not sys.stderr.isatty())  # a terminal shows progress bars, a log file gets lines
    check_needs(args)
    MEASURES[args.command].run(args)


def run() -> None:
    """Entry point of the script and of ``sit-evaluate``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
