"""Measure data sets: before training, and what sample_ddp.py made: does it follow its masks, is it real, does it help?

    python evaluate.py data --data-path IMAGES --mask-path MASKS                    a look before training
    python evaluate.py threshold SAMPLE_DIR                                         bright against dark, no training
    python evaluate.py grid SAMPLE_DIR                                              do the network's patches show
    python evaluate.py fidelity SAMPLE_DIR --data-path IMAGES --mask-path MASKS     a segmenter against the masks
    python evaluate.py filter SAMPLE_DIR --keep-share 0.8 --output BEST             the images that follow them best
    python evaluate.py realism SAMPLE_DIR --data-path IMAGES --mask-path MASKS      (or --inception-weights FILE)
    python evaluate.py population SAMPLE_DIR                                        number, size, brightness of cells
    python evaluate.py memorisation SAMPLE_DIR --data-path TRAINING --held-out OTHERS
    python evaluate.py report SAMPLE_DIR                                            all of it as one HTML file
    python evaluate.py sweep --ckpt CKPT.pt --data-path IMAGES --mask-path MASKS    which guidance and solver
    python evaluate.py practise --data-path IMAGES --mask-path MASKS --train-flags FLAGS    make what helps, or say no
    python evaluate.py split --data-path IMAGES --mask-path MASKS --output SPLIT    for the next one
    python evaluate.py utility SPLIT --sets PRACTISED                               does it help a segmenter

Measures of a set compare it with real images; their tables, rows per image and pictures go into SAMPLE_DIR/evaluation.
``MEASURE --help`` explains each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cli import (
    add_device_argument,
    add_machine_arguments,
    add_mask_arguments,
    add_mask_type_argument,
    add_mask_values_argument,
    add_output_argument,
    add_real_pairs,
    load_checkpoint,
)
from common.arguments import interval, non_negative_float, positive_fraction, positive_int, seed_number
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from dataset.config import CROPS
from engine.machine import resolve_device, start_machine
from experiments import add_practise, add_split, add_utility, run_practise, run_split, run_utility
from synthetic.manifest import MANIFEST

if TYPE_CHECKING:
    from evaluation.output import Section
    from synthetic.reader import SampleSet


# --- flags -----------------------------------------------------------------------------------------------------------


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-path", required=True, metavar="IMAGES", help="real images")
    parser.add_argument("--mask-path", required=True, metavar="MASKS", help="their masks")
    add_mask_arguments(parser)
    parser.add_argument("--num-classes", type=positive_int, default=2, help="mask classes, background included")
    parser.add_argument(
        "--image-size", type=positive_int, help="side of the training images, checked with --crop random"
    )
    parser.add_argument("--crop", choices=CROPS, default="center", help="as in training")
    add_output_argument(parser, "data_report")


def _add_fidelity(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    add_real_pairs(parser, " that teach the judge")
    add_mask_values_argument(parser)
    _add_judge(parser)
    add_device_argument(parser)


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="set on which evaluate.py fidelity has run")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--min-fidelity", type=positive_fraction, metavar="DICE", help="keep images of at least this fidelity_dice"
    )
    rule.add_argument(
        "--keep-share", type=positive_fraction, metavar="SHARE", help="keep this share of the images, the best ones"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="new folder for a set of the kept images")


def _add_realism(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    parser.add_argument("--data-path", required=True, metavar="IMAGES", help="real images, best unseen in training")
    parser.add_argument("--mask-path", metavar="MASKS", help="their masks, for the judge (without Inception weights)")
    add_mask_type_argument(parser)
    add_mask_values_argument(parser)
    weights = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases; never fetched from here"
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help=weights)
    parser.add_argument("--splits", type=positive_int, default=20, help="random halves of the real images")
    _add_judge(parser)
    add_device_argument(parser)


def _add_population(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    parser.add_argument("--data-path", metavar="IMAGES", help="real images (default: those that the manifest names)")
    parser.add_argument("--mask-path", metavar="MASKS", help="their masks")
    add_mask_type_argument(parser)
    add_mask_values_argument(parser)


def _add_memorisation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="folder that sample_ddp.py has written")
    parser.add_argument("--data-path", required=True, metavar="IMAGES", help="images that the generator learned from")
    parser.add_argument("--mask-path", metavar="MASKS", help="their masks: tells samples made from them apart")
    unseen = "real images that it has not seen (default: each training image beside the others)"
    parser.add_argument("--held-out", metavar="IMAGES", help=unseen)


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_set(parser)
    parser.add_argument("--images", type=positive_int, default=8, help="worst and best images shown, each")
    parser.add_argument("--utility", type=Path, metavar="FOLDER", help="results of the utility command, to include")
    parser.add_argument("--sweep", type=Path, metavar="FOLDER", help="results of the sweep command, to include")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint written by train.py")
    parser.add_argument("--raw-weights", action="store_true", help="the last weights and not their EMA")
    parser.add_argument("--vae", help="where the autoencoder lies now, if not where training found it")
    add_real_pairs(parser, ": some for the sweep, the others for the judge; best unseen in training")
    add_mask_values_argument(parser)
    parser.add_argument("--images", type=positive_int, default=48, help="masks drawn with every setting")
    scales = {"type": non_negative_float, "nargs": "+", "default": [1.0, 1.5, 2.0, 4.0], "metavar": "SCALE"}
    parser.add_argument("--cfg-scales", **scales, help="guidance; 1 is none")
    times = {"type": interval, "nargs": "+", "default": [(0.0, 1.0)], "metavar": "LO:HI"}
    parser.add_argument("--guidance-intervals", **times, help="times at which guidance is on, such as 0:1 0.2:0.8")
    parser.add_argument(
        "--solvers", nargs="+", default=["heun"], metavar="NAME", help="such as euler heun ab2 sde-euler"
    )
    parser.add_argument(
        "--num-steps", type=positive_int, nargs="+", default=[10, 25], metavar="STEPS", help="steps of the solver"
    )
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images drawn at once")
    add_output_argument(parser, "sweep")
    _add_judge(parser)
    add_machine_arguments(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sample_dir", metavar="SAMPLE_DIR", help="folder that sample_ddp.py has written")
    moved = "where the real images are now, if they are no longer where the manifest says"
    parser.add_argument("--real-dir", metavar="FOLDER", help=moved)


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive_int, default=400, help="training steps of the judge")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the judge and of the held-out share")
    parser.add_argument("--cache-dir", default="judges", metavar="FOLDER", help="where trained judges are kept")


# --- commands --------------------------------------------------------------------------------------------------------


def _open_set(args: argparse.Namespace) -> SampleSet:
    from synthetic.reader import SampleSet

    samples = SampleSet(args.sample_dir, getattr(args, "real_dir", None))
    if getattr(args, "mask_values", None) is not None:
        samples.config = samples.require_config().with_mask_values(args.mask_values)
    return samples


def _judge_settings(args: argparse.Namespace) -> dict[str, object]:
    return {"mask_type": args.mask_type, "steps": args.steps, "seed": args.seed, "progress": True}


def _show(section: Section, content: dict, written: str | Sequence[Path], samples: SampleSet | None = None) -> None:
    """Print a result: its table, what it says, how the set was made, and where the files are."""
    from evaluation.output import written_line
    from synthetic.reader import describe_provenance

    made = describe_provenance(samples.provenance()) if samples is not None else []
    print("\n".join([*section.lines(content), *made, written_line(written)]))


def run_data(args: argparse.Namespace) -> None:
    """Report in plain language on a data set before training: counts, sizes, gray values, classes, cells,
    unreadable files, files without partner, copies, and a contact sheet with the masks' outlines.

    The exit code is 0 if training can start, 2 if it cannot.
    """
    from evaluation.data_report import survey, write_data_report

    report, pairs, rule = survey(
        args.data_path, args.mask_path, args.num_classes, args.mask_type, args.image_size, args.crop,
        normalize=args.normalize_masks, mask_values=args.mask_values, progress=True,
    )  # fmt: skip
    written = write_data_report(report, pairs, rule, args.output)
    print("\n".join(report.lines()))
    print(f"written: {', '.join(map(str, written))}")
    if report.problems:
        count = len(report.problems)
        raise InputError(f"{count} problem{'s' * (count > 1)} to mend before training, first: {report.problems[0]}")


def run_threshold(args: argparse.Namespace) -> None:
    """Dice of the Otsu-thresholded images against their masks, beside real images of the same masks, with the gray
    values' mean and standard deviation."""
    from evaluation.grid import grid_line
    from evaluation.threshold import SECTION, score_by_threshold, write_threshold_report

    samples = _open_set(args)
    score = score_by_threshold(samples)
    folder = write_threshold_report(samples, score)
    picture = ", threshold.png" if score.compared else ""
    print(grid_line(samples))
    _show(SECTION, score.to_dict(), f"{folder}/threshold.json, threshold.csv{picture}", samples)


def run_grid(args: argparse.Namespace) -> None:
    """Mean difference of neighbouring pixels across the borders of the network's patches, over the same inside the
    patches, beside the real images of the same masks. 1 is no grid."""
    from evaluation.grid import SECTION, score_grid, write_grid_report

    samples = _open_set(args)
    score = score_grid(samples)
    folder = write_grid_report(samples, score)
    _show(SECTION, score.to_dict(), f"{folder}/grid.json, grid.csv", samples)


def run_fidelity(args: argparse.Namespace) -> None:
    """Agreement of a small U-Net, trained on real pairs (minutes on a CPU at small size, kept for the next set),
    with the masks, beside real images that it has not seen; adds the column fidelity_dice to the manifest."""
    from evaluation.fidelity import SECTION, score_fidelity, write_fidelity_report

    samples = _open_set(args)
    where, device = (args.data_path, args.mask_path, args.cache_dir), resolve_device(args.device)
    report = score_fidelity(samples, *where, device=device, **_judge_settings(args))
    folder = write_fidelity_report(samples, report)
    written = f"{folder}/fidelity.json, and the column fidelity_dice of {samples.folder / MANIFEST}"
    _show(SECTION, report.to_dict(), written, samples)


def run_filter(args: argparse.Namespace) -> None:
    """Keep the images of the highest fidelity_dice.

    The set itself stays as it is: the lists kept.csv and dropped.csv (with reasons) go into SAMPLE_DIR/evaluation,
    copies of the kept images into --output.
    """
    from evaluation.filter import SECTION, filter_set, write_filter_report

    samples = _open_set(args)
    result = filter_set(samples, args.min_fidelity, args.keep_share)
    written = write_filter_report(samples, result, args.output)
    _show(SECTION, result.to_dict(), written)


def run_realism(args: argparse.Namespace) -> None:
    """Distance of the synthetic to real images in a feature space, beside that of real to real images over random
    splits.

    FID and KID with --inception-weights; without, a Frechet distance on the features of the judge of the fidelity
    command, which is no FID.
    """
    from evaluation.fidelity import prepare_judge
    from evaluation.realism import SECTION, describe_weights, inception_features, score_realism, write_realism_report

    samples = _open_set(args)
    if args.inception_weights is not None and samples.require_config().channels not in (1, 3):
        raise InputError(
            f"--inception-weights: Inception takes gray and RGB, the set has {samples.config.channels} channels; "
            "leave the flag out for a distance on the judge's features"
        )
    if args.inception_weights is not None:
        extract = inception_features(args.inception_weights, resolve_device(args.device))
        features = describe_weights(args.inception_weights)
    elif args.mask_path is None:
        raise InputError("give --inception-weights FILE for FID, or --mask-path MASKS for a distance by the judge")
    else:
        where, device = (args.data_path, args.mask_path, args.cache_dir), resolve_device(args.device)
        prepared = prepare_judge(samples, *where, device=device, **_judge_settings(args))
        extract, features = prepared.judge.features, f"deepest layer of judge {prepared.key[:12]}"
    inception = args.inception_weights is not None
    report = score_realism(samples, args.data_path, extract, features, inception, splits=args.splits, seed=args.seed)
    folder = write_realism_report(samples, report)
    _show(SECTION, report.to_dict(), f"{folder}/realism.json, realism.png", samples)


def run_population(args: argparse.Namespace) -> None:
    """Histograms and Wasserstein distances of the cells' number, area, eccentricity, brightness and texture,
    beside the distances of random halves of the real images."""
    from evaluation.population import SECTION, score_population, write_population_report

    if (args.data_path is None) != (args.mask_path is None):
        raise InputError("--data-path and --mask-path go together: give both, or none for the manifest's real images")
    samples = _open_set(args)
    report, synthetic, real = score_population(samples, args.data_path, args.mask_path, args.mask_type)
    folder = write_population_report(samples, report, synthetic, real)
    _show(SECTION, report.to_dict(), f"{folder}/population.json, population.csv, population.png", samples)


def run_memorisation(args: argparse.Namespace) -> None:
    """Distance of every synthetic image to its nearest training image, in any turn or flip, beside the same of
    held-out real images, with the ten closest pairs as a picture."""
    from evaluation.memorisation import SECTION, score_memorisation, write_memorisation_report

    samples = _open_set(args)
    report, closest, paths = score_memorisation(samples, args.data_path, args.held_out, args.mask_path, progress=True)
    folder = write_memorisation_report(samples, report, closest, paths)
    _show(SECTION, report.to_dict(), f"{folder}/memorisation.json, memorisation.csv, memorisation.png", samples)


def run_report(args: argparse.Namespace) -> None:
    """Put all measures of SAMPLE_DIR/evaluation, with their pictures and the worst and best images by fidelity,
    into one HTML file that needs nothing beside it, and into report.json."""
    from evaluation.report import ELSEWHERE, write_report

    samples = _open_set(args)
    others = {name: path for name in ELSEWHERE if (path := getattr(args, name)) is not None}
    page, found, missing = write_report(samples, args.images, others)
    print(f"measures in the report: {', '.join(found)}")
    if missing:
        print(f"not measured yet: {', '.join(missing)}")
    print(f"written: {page}, {page.with_suffix('.json').name}")


def run_sweep(args: argparse.Namespace) -> None:
    """Draw the same masks with every combination of guidance scale, guidance interval, solver and number of steps;
    fidelity and realism of each, one plot and a recommended setting."""
    from evaluation.sweep import (
        SECTION,
        SOLVERS,
        load_sweep_data,
        run_sweep,
        sampler_draw,
        settings_grid,
        write_sweep_report,
    )

    unknown = [name for name in args.solvers if name not in SOLVERS]
    if unknown:
        raise InputError(f"--solvers {unknown[0]}: unknown; choose from {', '.join(SOLVERS)}")
    grid = settings_grid(args.cfg_scales, args.guidance_intervals, args.solvers, args.num_steps)
    machine = start_machine(args.device, args.precision)
    trained = load_checkpoint(args, machine)
    trained = replace(trained, data=trained.data.with_mask_values(args.mask_values))
    data = load_sweep_data(
        trained, args.data_path, args.mask_path, images=args.images, cache_dir=args.cache_dir, device=machine.device,
        **_judge_settings(args),
    )  # fmt: skip
    draw = sampler_draw(trained, machine, data.items, args.seed, args.batch_size)
    classes = trained.data.num_classes
    report = run_sweep(draw, grid, data.real, data.judge, classes, data.separated, args.seed, progress=True)
    written = write_sweep_report(report, args.output)
    _show(SECTION, report.to_dict(), written)


@dataclass(frozen=True)
class Measure:
    """One subcommand. The docstring of ``run`` is the description in its ``--help``."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


MEASURES = {
    "data": Measure("look at images and masks before training", _add_data, run_data),
    "threshold": Measure("Dice of the thresholded images against their masks (no training)", _add_set, run_threshold),
    "grid": Measure("gray steps across the borders of the network's patches over those inside", _add_set, run_grid),
    "fidelity": Measure("agreement of a segmenter trained on real pairs with the masks", _add_fidelity, run_fidelity),
    "filter": Measure("keep the images that follow their masks best", _add_filter, run_filter),
    "realism": Measure(
        "FID and KID, or a distance on the judge's features, beside real against real", _add_realism, run_realism
    ),
    "population": Measure("number, size, shape, brightness and texture of the cells", _add_population, run_population),
    "memorisation": Measure("nearest training image of every synthetic one", _add_memorisation, run_memorisation),
    "report": Measure("one HTML file of all that was measured on a set", _add_report, run_report),
    "sweep": Measure("which guidance and solver to sample with", _add_sweep, run_sweep),
    "split": Measure("test images and shares of the labels, for the utility measure", add_split, run_split),
    "practise": Measure("which synthetic images help a few labels: makes them, too", add_practise, run_practise),
    "utility": Measure("does training on real + synthetic images beat real ones alone", add_utility, run_utility),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of ``evaluate.py``."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="MEASURE")
    for name, measure in MEASURES.items():
        measure.add_flags(commands.add_parser(name, help=measure.help, description=measure.run.__doc__))
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the chosen measure, print its table and say where the files are."""
    start_logging(is_main=not sys.stderr.isatty())  # a terminal has bars, a log file gets lines
    MEASURES[args.command].run(args)


def run() -> None:
    """Entry point of the script and of ``sit-evaluate``."""
    run_command(main, parse_args)


if __name__ == "__main__":
    run()
