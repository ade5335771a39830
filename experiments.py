"""The experiments of evaluate.py, which train segmenters or sample a generator: split, utility, practise, sweep."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cli import (
    add_checkpoint_arguments,
    add_device_argument,
    add_judge_training,
    add_machine_arguments,
    add_mask_type_argument,
    add_mask_values_argument,
    add_output_argument,
    add_real_pairs,
    time_shift,
)
from common.arguments import (
    MOST,
    batch_size,
    by_share,
    fraction,
    guidance_scale,
    interval,
    non_negative_int,
    number,
    percent,
    percentile,
    positive_float,
    positive_fraction,
    positive_int,
    seed_number,
)
from common.errors import InputError, as_flag
from common.log import say
from common.outputs import check_output_folder
from dataset.config import CROPS, DataConfig
from engine.machine import resolve_device, start_machine
from settings import judge_request, load_checkpoint
from transport import ODE_METHOD, ODE_STEPS, TIME_SHIFT

if TYPE_CHECKING:
    from evaluation.experiments.labelled import LabelledFolders

# The best images for ten labelled nuclei images on one CPU core (benchmarks/utility.md).
PRACTISE_TRAINING = "--preset nuclei-64-cpu --in-channels 3 --max-steps 2000 --cooldown-steps 500"
PRACTISE_SAMPLING = "--cfg-scale 1.5 --sampling-method ab2 --num-sampling-steps 16"
SEGMENTER_STEPS = 1500  # as in SegmenterConfig, which takes seconds to import

# --- flags -----------------------------------------------------------------------------------------------------------


def add_split(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate.py split``."""
    add_real_pairs(parser, " to divide into test images and labelled images")
    parser.add_argument(
        "--instances", metavar="FOLDER", help="label images with one id per cell, copied for make_masks.py recombine"
    )
    parser.add_argument("--test-data-path", metavar="IMAGES", help="images to test on (default: some of --data-path)")
    parser.add_argument("--test-mask-path", metavar="MASKS", help="masks of --test-data-path")
    parser.add_argument("--test-share", type=positive_fraction, default=0.2, help="fraction of the pairs to test on")
    shares = "make one folder for each of these percentages of the labelled pairs"
    parser.add_argument("--shares", type=percent, nargs="+", default=[10, 20, 50, 100], metavar="PERCENT", help=shares)
    parser.add_argument(
        "--test-instances", metavar="FOLDER", help="label images of --test-data-path with one id per cell"
    )
    _add_selections(parser)
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="seed of the choice: another seed chooses other pairs"
    )
    parser.add_argument("--output", type=Path, default=Path("split"), metavar="SPLIT", help="new folder")


def add_utility(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate.py utility``."""
    parser.add_argument("split", metavar="SPLIT", help="folder that evaluate.py split has made")
    parser.add_argument(
        "--synthetic", type=by_share, nargs="+", default=[], metavar="PERCENT=SAMPLE_DIR",
        help="a synthetic set for each share, such as 10=samples_010",
    )  # fmt: skip
    trained = "checkpoint of every set, if its settings do not say what its generator was trained on"
    parser.add_argument("--ckpt", type=by_share, nargs="+", default=[], metavar="PERCENT=FILE", help=trained)
    parser.add_argument(
        "--shares", type=percent, nargs="+", metavar="PERCENT",
        help="shares to run, in percent (default: as --synthetic)",
    )  # fmt: skip
    add_mask_type_argument(parser)
    add_mask_values_argument(parser)
    parser.add_argument("--steps", type=positive_int, default=SEGMENTER_STEPS, help="training steps of every segmenter")
    parser.add_argument(
        "--seeds", type=positive_int,
        help="trainings of each arm, with seeds 0, 1, ... (default: 3; 1 for a split by numbers of labels)",
    )  # fmt: skip
    _add_trial(parser)
    add_device_argument(parser)
    add_output_argument(parser, "utility")


def add_practise(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate.py practise``."""
    add_real_pairs(parser, " with labels, two or more")
    add_mask_values_argument(parser)
    ids = "label images of the pairs with one id per cell (default: the masks, if they hold ids; in other masks, "
    ids += "touching cells count as one)"
    parser.add_argument("--instances", type=Path, metavar="FOLDER", help=ids)
    parser.add_argument("--unlabelled-path", type=Path, metavar="IMAGES", help="images without labels, if you have any")
    parser.add_argument(
        "--output", type=Path, default=Path("practice"), metavar="FOLDER", help="new folder, or one to continue"
    )
    train = (
        f"flags of train.py, in one pair of quotes (default: {PRACTISE_TRAINING}; with --instances also "
        "--num-classes 3, with --unlabelled-path also --unlabelled-share 0.5); with --unlabelled-path, "
        "--look reference is added to your own flags, too, unless they hold --look"
    )
    parser.add_argument("--train-flags", type=shlex.split, metavar="FLAGS", help=train)
    sample = "flags of sample_ddp.py, in one pair of quotes"
    parser.add_argument("--sample-flags", type=shlex.split, default=PRACTISE_SAMPLING, metavar="FLAGS", help=sample)
    group = parser.add_argument_group("masks and rounds")
    group.add_argument(
        "--masks", type=positive_int, default=100, metavar="N", help="number of new masks to make images of"
    )
    group.add_argument(
        "--simulated-share",
        type=fraction,
        metavar="FRACTION",
        help="fraction of the new masks to simulate (default: 0.25, or 0 if the masks hold classes)",
    )
    group.add_argument(
        "--pseudo-share", type=fraction, metavar="FRACTION",
        help="fraction of the new masks to take from a segmentation of the unlabelled images (default: 0, or 0.5 if "
        "the masks hold classes)",
    )  # fmt: skip
    group.add_argument(
        "--no-pseudo-masks", dest="pseudo_masks", action="store_false",
        help="train the generator on unlabelled images without pseudo-masks (the masks that a segmenter finds)",
    )  # fmt: skip
    more = "trainings of the generator; each after the first gets better pseudo-masks from a segmenter of its images"
    group.add_argument("--generators", type=positive_int, default=1, metavar="N", help=more)
    rounds = "largest number of further rounds, which draw hard masks again; 0 makes one image of each mask"
    group.add_argument("--most-rounds", type=non_negative_int, default=0, metavar="N", help=rounds)
    group.add_argument(
        "--most-draws", type=positive_int, default=20,
        help="number of images of the hardest mask; the others get fewer",
    )  # fmt: skip
    factor = "ignore synthetic pixels whose loss is above this factor times the mean loss of their class on real images"
    group.add_argument("--ignore-factor", type=positive_float, default=1.25, metavar="FACTOR", help=factor)
    group = parser.add_argument_group("segmenters")
    group.add_argument(
        "--folds", type=number(int, 2, MOST), default=3, help="number of parts of the labels for cross-validation"
    )
    group.add_argument("--steps", type=positive_int, default=SEGMENTER_STEPS, help="training steps of every segmenter")
    group.add_argument("--square", type=positive_int, default=64, metavar="PIXELS", help="side of the training squares")
    group.add_argument(
        "--unlabelled-images", type=positive_int, default=60,
        help="number of unlabelled images to segment for counting cells",
    )  # fmt: skip
    group.add_argument("--seed", type=seed_number, default=0, help="seed of all random numbers")
    add_device_argument(parser)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Flags of ``evaluate.py sweep``."""
    add_checkpoint_arguments(parser)
    add_real_pairs(parser, ", preferably not used in training: some to sample, the others to train the judge")
    add_mask_values_argument(parser)
    parser.add_argument(
        "--images", type=positive_int, default=48, metavar="N", help="masks to sample with every setting"
    )
    parser.add_argument(
        "--cfg-scales", type=guidance_scale, nargs="+", default=[1.0, 1.5, 2.0, 4.0], metavar="SCALE",
        help="scales of classifier-free guidance to compare; 1 means none",
    )  # fmt: skip
    spans = "time intervals of guidance to compare, such as 0:1 0.2:0.8; 0 is noise, 1 is data (default: 0:1)"
    parser.add_argument(
        "--guidance-intervals", type=interval, nargs="+", default=[(0.0, 1.0)], metavar="LO:HI", help=spans
    )
    parser.add_argument(
        "--solvers", nargs="+", default=[ODE_METHOD], metavar="NAME",
        help="solvers to compare, such as euler heun ab2 sde-euler",
    )  # fmt: skip
    parser.add_argument(
        "--num-steps", type=positive_int, nargs="+", default=[16, ODE_STEPS], metavar="STEPS",
        help="numbers of steps to compare",
    )  # fmt: skip
    parser.add_argument(
        "--time-shifts", type=time_shift, nargs="+", default=[TIME_SHIFT], metavar="FACTOR",
        help="time shifts of the ODE solvers to compare; 1 gives equal steps",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=batch_size, default=32, help="images to sample at once; limits memory")
    add_output_argument(parser, "sweep")
    add_judge_training(parser, "seed of the judge's training, of the choice of held-out images, and of the noise")
    add_machine_arguments(parser)


def _add_selections(parser: argparse.ArgumentParser) -> None:
    """Random selections of labelled images, for evaluate.py split."""
    group = parser.add_argument_group("selections of labelled images, in place of --shares")
    group.add_argument(
        "--labels", type=positive_int, nargs="+", metavar="N", help="numbers of labelled images to select"
    )
    group.add_argument("--selections", type=positive_int, default=5, help="how many random selections of each number")
    group.add_argument("--groups", type=Path, metavar="CSV", help="table with a column 'name' and one of groups")
    group.add_argument(
        "--group-column", default="group", metavar="COLUMN", help="column of the groups, such as look or patient"
    )
    group.add_argument(
        "--whole-groups", action="store_true", help="--labels counts groups, such as patients, with all their images"
    )
    group.add_argument(
        "--test-groups", type=non_negative_int, default=0, metavar="N",
        help="test each selection on N groups that it does not use otherwise",
    )  # fmt: skip


def _add_trial(parser: argparse.ArgumentParser) -> None:
    """The experiment on such selections, for evaluate.py utility."""
    group = parser.add_argument_group("training, and a split by numbers of labels")
    sets = (
        "folder that holds selection_00/labels_005 and so on: each a folder of evaluate.py practise or a synthetic set"
    )
    group.add_argument("--sets", type=Path, metavar="FOLDER", help=sets)
    group.add_argument(
        "--labels", type=positive_int, nargs="+", metavar="N", help="numbers of labels to run (default: all)"
    )
    group.add_argument(
        "--selections", type=non_negative_int, nargs="+", metavar="N",
        help="which selections to run, from 0 (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM",
        help="arms to run, such as real 'real + synthetic, ignore' (default: all, without --sets those of real images; "
        "of shares: real, synthetic, real + synthetic)",
    )  # fmt: skip
    group.add_argument("--square", type=positive_int, default=64, metavar="PIXELS", help="side of the training squares")
    group.add_argument(
        "--pseudo-images", type=positive_int, default=60, help="number of unlabelled images for self-training"
    )
    group.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="without --sets: as for train.py, needed"
    )
    group.add_argument("--in-channels", type=positive_int, default=3, help="without --sets: as for train.py")
    group.add_argument("--crop", choices=CROPS, default="random", help="without --sets: as for train.py")
    group.add_argument(
        "--window", type=percentile, nargs=2, metavar=("LOW", "HIGH"), help="without --sets: as for train.py"
    )
    group.add_argument("--num-classes", type=positive_int, default=2, help="without --sets: as for train.py")


def _refuse_flags_of_the_other_split(args: argparse.Namespace, by_labels: bool) -> None:
    for name in ("synthetic", "ckpt", "shares") if by_labels else ("sets", "labels", "selections"):
        if getattr(args, name):
            unit = "numbers of labels" if by_labels else "shares of the labels"
            raise InputError(f"{as_flag(name)} has no effect on a split by {unit}: leave it out.")


def _refuse_sets_without_effect(args: argparse.Namespace) -> None:
    """Every set and checkpoint must belong to a share that runs, and each share has one."""
    shares = args.shares or [share for share, _ in args.synthetic]
    for name in ("synthetic", "ckpt"):
        given = [share for share, _ in getattr(args, name)]
        for share in given:
            if given.count(share) > 1:
                raise InputError(f"{as_flag(name)} {share}=... is given {given.count(share)} times: give one.")
            if share not in shares:
                raise InputError(
                    f"{as_flag(name)} {share}=... has no effect: {share} % is not among the shares that run."
                )


def _trial_config(args: argparse.Namespace) -> DataConfig | None:
    """How images are read if no set of the same number of labels says it."""
    from evaluation.experiments.labelled import segmenter_classes
    from synthetic.reader import SampleSet

    if args.synthetic:
        samples = SampleSet(args.synthetic[0][1])
        config = samples.require_config()
        return replace(config, num_classes=segmenter_classes(samples, config))
    if args.image_size is None:
        return None
    names = ("image_size", "num_classes", "crop", "window", "mask_values")
    return DataConfig(**{name: getattr(args, name) for name in names}, channels=args.in_channels)


# --- commands --------------------------------------------------------------------------------------------------------


def run_split(args: argparse.Namespace) -> None:
    """Copy real pairs into test images and parts of the others, for a study with evaluate.py utility.

    The parts are random selections of some numbers of labelled images (--labels), or shares in percent (--shares).
    Next, make synthetic images for each part (docs/utility.md says how), and run utility.
    """
    from dataset.groups import read_groups
    from evaluation.experiments.label_split import SelectionSettings, make_selections
    from evaluation.experiments.split import make_split

    if (args.test_data_path is None) != (args.test_mask_path is None):
        raise InputError("--test-data-path and --test-mask-path go together: give both, or none")
    folders = (args.data_path, args.mask_path)
    tested = (args.test_data_path, args.test_mask_path) if args.test_data_path else None
    if args.labels:
        settings = SelectionSettings(
            args.labels, args.selections, args.seed, args.test_share, args.whole_groups, args.test_groups
        )
        plans = make_selections(
            args.output, folders, settings, tested, args.instances, args.test_instances,
            read_groups(args.groups, args.group_column) if args.groups else None,
        )  # fmt: skip
        for plan in plans:
            counts = ", ".join(f"{count}: {len(names)} images" for count, names in plan.shares.items())
            say(f"{plan.folder}: {len(plan.test)} test pairs; labels {counts}")
        return
    plan = make_split(
        args.output, folders, args.shares, args.test_share, args.seed, tested, args.instances, args.test_instances
    )
    say(f"{len(plan.test)} test pairs in {plan.part(None)}")
    for share, names in plan.shares.items():
        pairs = "pair" if len(names) == 1 else "pairs"
        say(f"{share:>3} %: {len(names)} {pairs} in {plan.part(share)}")


def run_utility(args: argparse.Namespace) -> None:
    """Train a segmenter on real, synthetic, and real + synthetic images at several shares or numbers of labels, with
    the same steps ("real, longer": three times as many), and test it on real images.

    A synthetic set that has seen more than its share, or the test images, is refused.
    """
    from evaluation.experiments.arms import ARMS, SHARE_ARMS, arm_of
    from evaluation.experiments.label_split import holds_selections, read_selections
    from evaluation.experiments.split import read_split
    from evaluation.experiments.trial import Study, TrialSettings, run_trial
    from evaluation.experiments.trial_report import SECTION, write_trial
    from evaluation.output import written_line
    from evaluation.report import write_page

    by_labels = holds_selections(args.split)
    _refuse_flags_of_the_other_split(args, by_labels)
    _refuse_sets_without_effect(args)
    plans = read_selections(args.split) if by_labels else [read_split(args.split)]
    sets = args.sets if by_labels else dict(args.synthetic)
    labels = (args.labels or plans[0].shares) if by_labels else args.shares or sorted(sets)
    known = (ARMS if by_labels else SHARE_ARMS).values()
    arms = [arm_of(name) for name in args.arms] or [arm for arm in known if sets or not arm.is_synthetic]
    settings = TrialSettings(
        tuple(arms), tuple(labels), args.seeds or (1 if by_labels else 3), args.steps, args.square, args.pseudo_images,
        args.mask_type, args.mask_values, _trial_config(args),
    )  # fmt: skip
    study = Study(plans, sets, settings, dict(args.ckpt))
    rows = run_trial(study, args.output, resolve_device(args.device), args.selections)
    content, written = write_trial(rows, args.steps, args.output, plans[0].unit)
    page = write_page("Does it help?", [(SECTION, content, args.output)], args.output / "utility.html")
    say("\n".join([*SECTION.lines(content), written_line([*written, page])]))


def _labelled_folders(args: argparse.Namespace) -> LabelledFolders:
    """Where the labels of practise lie. Masks that hold one id per cell are the instances, too."""
    from evaluation.experiments.labelled import LabelledFolders

    folders = LabelledFolders(Path(args.data_path), Path(args.mask_path), args.instances, args.mask_type)
    if args.mask_values:
        return folders
    return folders.with_ids_of_masks(_num_classes(args.train_flags or []))


def _num_classes(flags: Sequence[str]) -> int:
    """K in flags of train.py; its default if they do not say it. What else they hold, train.py will check."""
    words = [part for flag in flags for part in flag.split("=")]
    given = words[words.index("--num-classes") + 1 :][:1] if "--num-classes" in words else []
    return int(given[0]) if given and given[0].isdecimal() else DataConfig.num_classes


def _generator_flags(args: argparse.Namespace, has_instances: bool) -> list[str]:
    """Flags of train.py for practise: the user's own, or those that were measured."""
    flags = args.train_flags
    if flags is None:
        flags = PRACTISE_TRAINING.split()
        flags += ["--num-classes", "3"] if has_instances else []
        flags += ["--num-classes", str(len(args.mask_values))] if args.mask_values else []
        flags += ["--unlabelled-share", "0.5"] if args.unlabelled_path else []
    return [*flags, "--mask-values", *map(str, args.mask_values)] if args.mask_values else flags


def run_practise(args: argparse.Namespace) -> None:
    """Find out which synthetic images help a few labelled ones, and make them.

    Trains a generator, makes masks that follow the unlabelled images, and samples them. Pixels that were drawn wrongly
    are ignored. Masks that the segmenter finds hard are drawn again, until the cross-validated score stops rising. The
    page practice.html says which set to use, or that none helps. Run the same command to continue.
    """
    from evaluation.experiments.practice import Practice
    from evaluation.experiments.practice_commands import CommandTools, segmenter_commands
    from evaluation.experiments.practice_report import PAGE, SECTION, TRAINING_SETS, write_practice
    from evaluation.experiments.practice_settings import PracticeSettings
    from evaluation.output import written_line
    from evaluation.report import write_page

    if args.mask_values and (args.instances or len(args.mask_values) == 2):
        raise InputError("--mask-values is for masks of three or more classes without --instances: leave it out.")
    folders = _labelled_folders(args)
    args.train_flags = _generator_flags(args, folders.instances is not None)
    given = vars(args) | {"crop": args.square}
    settings = PracticeSettings(**{one.name: given[one.name] for one in fields(PracticeSettings)})
    tools = CommandTools(args.train_flags, args.sample_flags, args.device)
    practice = Practice(folders, args.unlabelled_path, settings, tools, args.output, resolve_device(args.device))
    content = practice.run() | {"commands": segmenter_commands(args.output / TRAINING_SETS)}
    content, written = write_practice(practice, content)
    page = write_page("Practice", [(SECTION, content, args.output)], args.output / PAGE)
    say("\n".join([*SECTION.lines(content), written_line([*written, page])]))


def run_sweep(args: argparse.Namespace) -> None:
    """Sample the same masks with every combination of guidance scale, guidance interval, solver and number of steps.

    Measures fidelity and realism of each combination. Writes a table and a plot, and recommends a setting.
    """
    from evaluation.output import written_line
    from evaluation.sweep import (
        SECTION,
        SOLVERS,
        load_sweep_data,
        run_sweep,
        sampler_draw,
        settings_grid,
        write_sweep_report,
    )

    inputs = (args.ckpt, args.data_path, args.mask_path)
    check_output_folder(args.output, "sweep.json", ("rows", "recommended"), inputs)
    unknown = [name for name in args.solvers if name not in SOLVERS]
    if unknown:
        raise InputError(f"--solvers {unknown[0]}: unknown; choose from {', '.join(SOLVERS)}")
    grid = settings_grid(args.cfg_scales, args.guidance_intervals, args.solvers, args.num_steps, args.time_shifts)
    machine = start_machine(args.device, args.precision)
    trained = load_checkpoint(args, machine)
    trained = replace(trained, data=trained.data.with_mask_values(args.mask_values))
    data = load_sweep_data(trained, judge_request(args, machine.device), args.images)
    draw = sampler_draw(trained, machine, data.items, args.seed, args.batch_size)
    classes = trained.data.num_classes
    report = run_sweep(draw, grid, data.real, data.judge, classes, data.separated, args.seed, progress=True)
    written = write_sweep_report(report, args.output)
    say("\n".join([*SECTION.lines(report.to_dict()), written_line(written)]))
