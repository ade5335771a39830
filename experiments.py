"""The experiments of evaluate.py, which train segmenters and generators: split, utility."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli import add_device_argument, add_mask_type_argument, add_output_argument, add_real_pairs
from common.arguments import by_share, non_negative_int, percent, positive_fraction, positive_int, seed_number
from common.errors import InputError
from dataset.config import CROPS, DataConfig
from engine.machine import resolve_device

# --- flags -----------------------------------------------------------------------------------------------------------


def add_split(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate.py split``."""
    add_real_pairs(parser, " to divide")
    parser.add_argument("--instances", metavar="FOLDER", help="instance labels of the pairs, copied along to recombine")
    parser.add_argument("--test-data-path", metavar="IMAGES", help="images to test on (default: some of --data-path)")
    parser.add_argument("--test-mask-path", metavar="MASKS", help="their masks")
    parser.add_argument("--test-share", type=positive_fraction, default=0.2, help="share of the pairs to test on")
    parser.add_argument("--shares", type=percent, nargs="+", default=[10, 20, 50, 100], metavar="PERCENT")
    parser.add_argument("--test-instances", metavar="FOLDER", help="instance labels of the test images")
    _add_selections(parser)
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the choice")
    parser.add_argument("--output", type=Path, default=Path("split"), metavar="SPLIT", help="new folder")


def add_utility(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate.py utility``."""
    parser.add_argument("split", metavar="SPLIT", help="folder that evaluate.py split has made")
    parser.add_argument(
        "--synthetic", type=by_share, nargs="+", default=[], metavar="PERCENT=SAMPLE_DIR", help="set of every share"
    )
    trained = "checkpoint of every set, if its settings do not say what its generator was trained on"
    parser.add_argument("--ckpt", type=by_share, nargs="+", default=[], metavar="PERCENT=FILE", help=trained)
    parser.add_argument(
        "--shares", type=percent, nargs="+", metavar="PERCENT", help="shares to run (default: those of --synthetic)"
    )
    add_mask_type_argument(parser)
    parser.add_argument("--steps", type=positive_int, default=500, help="steps of every training, the same in all arms")
    parser.add_argument("--seeds", type=positive_int, help="trainings of every arm (default: 3, 1 with --labels)")
    _add_trial(parser)
    add_device_argument(parser)
    add_output_argument(parser, "utility")


def _add_selections(parser: argparse.ArgumentParser) -> None:
    """Random selections of labelled images, for evaluate.py split."""
    group = parser.add_argument_group("selections of labelled images, in place of --shares")
    group.add_argument("--labels", type=positive_int, nargs="+", metavar="N", help="numbers of labelled images")
    group.add_argument("--selections", type=positive_int, default=5, help="random selections of each number")
    group.add_argument("--groups", type=Path, metavar="CSV", help="table with a column name and one of groups")
    group.add_argument("--group-column", default="group", metavar="COLUMN", help="its column of looks or patients")
    group.add_argument("--whole-groups", action="store_true", help="--labels counts groups: all images of a patient")
    group.add_argument(
        "--test-groups",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="test each selection on N groups of its own",
    )


def _add_trial(parser: argparse.ArgumentParser) -> None:
    """The experiment on such selections, for evaluate.py utility."""
    group = parser.add_argument_group("a split by numbers of labels")
    sets = "holds selection_00/labels_005 and so on, each a folder of practise.py or a set"
    group.add_argument("--sets", type=Path, metavar="FOLDER", help=sets)
    group.add_argument("--labels", type=positive_int, nargs="+", metavar="N", help="numbers to run (default: all)")
    group.add_argument("--selections", type=non_negative_int, nargs="+", metavar="N", help="to run now (default: all)")
    group.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="such as real 'real + synthetic, ignore'")
    group.add_argument("--square", type=positive_int, default=64, metavar="PIXELS", help="side of the training squares")
    group.add_argument("--pseudo-images", type=positive_int, default=60, help="unlabelled images for self-training")
    group.add_argument("--image-size", type=positive_int, metavar="PIXELS", help="without --sets: as for train.py")
    group.add_argument("--in-channels", type=positive_int, default=3, help="without --sets: as for train.py")
    group.add_argument("--crop", choices=CROPS, default="random", help="without --sets: as for train.py")
    group.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="without --sets: as for train.py")
    group.add_argument("--num-classes", type=positive_int, default=2, help="without --sets: as for train.py")


def _trial_config(args: argparse.Namespace) -> DataConfig | None:
    """How images are read if no set says it."""
    if args.image_size is None:
        return None
    names = ("image_size", "num_classes", "crop", "window")
    return DataConfig(**{name: getattr(args, name) for name in names}, channels=args.in_channels)


# --- commands --------------------------------------------------------------------------------------------------------


def run_split(args: argparse.Namespace) -> None:
    """Copy real pairs into test images and nested shares of the others.

    Train a generator on every SPLIT/share_NNN and sample from masks of that share (recombined or not) or simulated
    ones; then run utility.
    """
    from evaluation.label_split import SelectionSettings, make_selections, read_groups
    from evaluation.split import make_split

    if (args.test_data_path is None) != (args.test_mask_path is None):
        raise InputError("--test-data-path and --test-mask-path go together: give both, or none")
    if args.labels:
        settings = SelectionSettings(
            args.labels, args.selections, args.seed, args.test_share, args.whole_groups, args.test_groups
        )
        tested = (args.test_data_path, args.test_mask_path) if args.test_data_path else None
        plans = make_selections(
            args.output, args.data_path, args.mask_path, settings, tested, args.instances, args.test_instances,
            read_groups(args.groups, args.group_column) if args.groups else None,
        )  # fmt: skip
        for plan in plans:
            counts = ", ".join(f"{count}: {len(names)} images" for count, names in plan.shares.items())
            print(f"{plan.folder}: {len(plan.test)} test pairs; labels {counts}")
        return
    plan = make_split(
        args.output, args.data_path, args.mask_path, args.shares, args.test_share, args.seed,
        args.test_data_path, args.test_mask_path, args.instances,
    )  # fmt: skip
    print(f"{len(plan.test)} test pairs: {plan.part(None)}")
    for share, names in plan.shares.items():
        print(f"{share:>3} %: {len(names)} pairs: {plan.part(share)}")


def run_utility(args: argparse.Namespace) -> None:
    """Train a segmenter on real, synthetic, and real + synthetic images at several shares or numbers of labels, with
    the same steps, and test it on real images.

    A synthetic set that has seen more than its share, or the test images, is refused.
    """
    from evaluation.label_split import holds_selections
    from evaluation.output import written_line
    from evaluation.split import read_split
    from evaluation.utility import SECTION, score_utility, write_utility_report
    from synthetic.reader import SampleSet

    if holds_selections(args.split):
        _run_trial(args)
        return
    args.seeds = args.seeds or 3
    sets = {share: SampleSet(path) for share, path in args.synthetic}
    report = score_utility(
        read_split(args.split), sets, dict(args.ckpt), args.shares, args.mask_type, args.steps, range(args.seeds),
        resolve_device(args.device), progress=True,
    )  # fmt: skip
    written = write_utility_report(report, args.output)
    print("\n".join([*SECTION.lines(report.to_dict()), written_line(written)]))


def _run_trial(args: argparse.Namespace) -> None:
    """The utility experiment on a split by numbers of labels."""
    from evaluation.arms import ARMS, arm_of
    from evaluation.label_split import read_selections
    from evaluation.output import written_line
    from evaluation.report import write_page
    from evaluation.trial import TrialSettings, run_trial
    from evaluation.trial_report import write_trial
    from evaluation.utility import SECTION

    plans = read_selections(args.split)
    arms = tuple(map(arm_of, args.arms)) or tuple(arm for arm in ARMS.values() if args.sets or not arm.is_synthetic)
    labels = tuple(args.labels or plans[0].shares)
    settings = TrialSettings(
        arms, labels, args.seeds or 1, args.steps, args.square, args.pseudo_images, args.mask_type, _trial_config(args)
    )
    rows = run_trial(plans, args.sets, settings, args.output, resolve_device(args.device), args.selections)
    content, written = write_trial(rows, args.steps, args.output)
    page = write_page("Does it help?", [(SECTION, content, args.output)], args.output / "utility.html")
    print("\n".join([*SECTION.lines(content), written_line([*written, page])]))
