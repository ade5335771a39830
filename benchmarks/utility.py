"""Do synthetic images help a segmenter: three benchmarks on real data, in stages of minutes on one core.

    python benchmarks/utility.py nuclei --data DATA --minutes 30

DATA holds the folders nuclei, histology and leukocytes, as the record benchmarks/utility.md describes them. Run the
same command until it says that nothing is left: every stage continues what it began. --labels and --selections run a
part.
Results: OUTPUT/NAME/utility/utility.html and a practice.html for every selection.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.arguments import non_negative_int, positive_float, positive_int, seed_number
from common.children import SAVING_SECONDS, run_child
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging

logger = logging.getLogger("benchmarks.utility")
GENERATOR = "--vae none --model SiT-Ti/8 --image-size 64 --global-batch-size 32 --lr 1e-3"
SAMPLER = "--sampling-method ab2 --num-sampling-steps 16"
ARMS = (
    "real", "real, longer", "copy-paste", "self-training", "real + synthetic", "real + synthetic, ignore",
    "real + synthetic, practise", "real + synthetic, both rules", "copy-paste + synthetic, both rules",
    "synthetic then real", "synthetic then real, both rules", "80 % synthetic", "80 % synthetic, both rules",
)  # fmt: skip
STAGES = ("split", "practise", "utility")


@dataclass(frozen=True)
class Benchmark:
    """One data set and how it is used.

    Attributes:
        folder: in DATA.
        labels: numbers of labels.
        split: flags of ``evaluate.py split``; DATA stands for the folder.
        train: flags of ``train.py``, without the number of steps.
        mask_type: what the masks hold.
        instances: whether there are instance labels.
    """

    folder: str
    labels: tuple[int, ...]
    split: tuple[str, ...]
    train: str
    mask_type: str
    instances: bool


TESTED = ("--test-data-path", "DATA/val/images", "--test-mask-path", "DATA/val/masks")
BENCHMARKS = {
    "nuclei": Benchmark(
        "nuclei",
        (3, 5, 10, 30),
        (*TESTED, "--test-instances", "DATA/val/instances", "--group-column", "modality"),
        f"{GENERATOR} --crop random --window 0 99.8 --num-classes 3",
        "binary",
        True,
    ),
    "histology": Benchmark(
        "histology",
        (2, 4),
        ("--group-column", "patient", "--whole-groups", "--test-groups", "3"),
        f"{GENERATOR} --crop random",
        "binary",
        True,
    ),
    "leukocytes": Benchmark(
        "leukocytes",
        (6, 20),  # 3 and 10 of each of the two looks
        (*TESTED, "--group-column", "look"),
        f"{GENERATOR} --crop center --num-classes 3",
        "classes",
        False,
    ),
}


def split_command(one: Benchmark, data: Path, output: Path, args: argparse.Namespace) -> list[str]:
    """``evaluate.py split`` of a benchmark."""
    folder = data / one.folder
    words = ["split", "--data-path", f"{folder}/train/images", "--mask-path", f"{folder}/train/masks"]
    words += ["--instances", f"{folder}/train/instances"] if one.instances else []
    words += [word.replace("DATA", str(folder)) for word in one.split]
    words += ["--groups", f"{folder}/index.csv", "--labels", *map(str, one.labels)]
    words += ["--selections", str(args.selections_made), "--seed", str(args.seed)]
    return [*words, "--output", str(output / "split")]


def practise_command(one: Benchmark, output: Path, case: Path, args: argparse.Namespace) -> list[str]:
    """``evaluate.py practise`` of a selection and a number of labels."""
    part = output / "split" / case
    cooldown = args.generator_steps // 4
    words = ["practise", "--data-path", f"{part}/images", "--mask-path", f"{part}/masks", "--mask-type", one.mask_type]
    words += ["--instances", f"{part}/instances"] if one.instances else []
    words += ["--unlabelled-path", f"{part}/unlabelled/images", "--output", f"{output}/sets/{case}"]
    train = f"{one.train} --max-steps {args.generator_steps} --cooldown-steps {cooldown} {args.train_flags}".strip()
    words += ["--train-flags", train, "--sample-flags", f"{SAMPLER} {args.sample_flags}".strip()]
    words += ["--masks", str(args.masks), "--most-rounds", str(args.most_rounds)]
    words += ["--most-draws", str(args.most_draws)] if args.most_rounds else []
    words += ["--folds", str(args.folds), "--steps", str(args.steps), "--seed", str(args.seed)]
    return [*words, *args.practise_flags.split()]


def utility_command(one: Benchmark, output: Path, case: Path, args: argparse.Namespace) -> list[str]:
    """``evaluate.py utility`` of one case; results of all cases are in one folder."""
    selection, labels = int(case.parent.name.rpartition("_")[2]), int(case.name.rpartition("_")[2])
    words = ["utility", f"{output}/split", "--sets", f"{output}/sets", "--labels", str(labels), "--selections"]
    words += [str(selection), "--mask-type", one.mask_type, "--steps", str(args.steps), "--seeds", str(args.seeds)]
    return [*words, "--output", f"{output}/utility", "--arms", *args.arms]


def plan(name: str, data: Path, output: Path, args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """All command lines of ``evaluate.py``, in order, each with the file that says that it is done."""
    one, place = BENCHMARKS[name], output / name
    labels = args.labels or one.labels
    unknown = sorted(set(labels) - set(one.labels))
    if unknown:
        raise InputError(f"--labels {unknown[0]}: {name} has {', '.join(map(str, one.labels))}")
    chosen = range(args.selections_made) if args.selections is None else args.selections
    cases = [Path(f"selection_{number:02d}/labels_{count:03d}") for number in chosen for count in labels]
    jobs = []
    if "split" in args.stages:
        jobs.append((place / "split" / "selections.json", split_command(one, data, place, args)))
    for case in cases:
        if "practise" in args.stages:
            jobs.append((place / "sets" / case / "practice.html", practise_command(one, place, case, args)))
        if "utility" in args.stages:
            done = place / "utility" / "done" / f"{case.parent.name}_{case.name}"
            jobs.append((done, utility_command(one, place, case, args)))
    return jobs


def run_for(words: Sequence[str], seconds: float) -> bool:
    """``evaluate.py`` for at most so long; whether it has ended by itself.

    When the time is over it gets SIGTERM and passes it on to its trainings, which keep what they have.

    Raises:
        InputError: it ended with an error.
    """
    code = run_child([sys.executable, ROOT / "evaluate.py", *words], seconds, 2 * SAVING_SECONDS)
    if code:
        raise InputError(f"evaluate.py {words[0]} ended with exit code {code}; its message is above")
    return code is not None


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    end = time.monotonic() + 60 * args.minutes
    jobs = [(done, words) for done, words in plan(args.name, args.data, args.output, args) if not done.exists()]
    for number, (done, words) in enumerate(jobs):
        left = end - time.monotonic()
        if left <= 0 or not run_for(words, left):
            print(f"time is over; {len(jobs) - number} of {len(jobs)} commands are left: run the same command again")
            return
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
        logger.info("%d of %d commands done", number + 1, len(jobs))
    print(f"nothing is left to do; see {args.output / args.name / 'utility' / 'utility.html'}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--data", type=Path, required=True, metavar="DATA", help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("utility"), metavar="OUTPUT", help="results (utility)")
    parser.add_argument("--minutes", type=positive_float, default=30.0, help="stop after so long (30)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="(all)")
    parser.add_argument("--labels", type=positive_int, nargs="+", metavar="N", help="numbers to run now (all)")
    parser.add_argument("--selections", type=non_negative_int, nargs="+", metavar="N", help="to run now (all)")
    parser.add_argument("--selections-made", type=positive_int, default=5, help="random selections of the split (5)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help="of evaluate.py utility (13)")
    parser.add_argument("--seeds", type=positive_int, default=1, help="trainings of every arm (1)")
    parser.add_argument("--steps", type=positive_int, default=1500, help="of every segmenter (1500)")
    parser.add_argument("--generator-steps", type=positive_int, default=1500, help="of every generator (1500)")
    parser.add_argument("--train-flags", default="", metavar="FLAGS", help="more flags of train.py, in quotes")
    parser.add_argument("--sample-flags", default="", metavar="FLAGS", help="more flags of sample_ddp.py, in quotes")
    more = "more flags of evaluate.py practise, as in --practise-flags=--no-pseudo-masks"
    parser.add_argument("--practise-flags", default="", metavar="FLAGS", help=more)
    parser.add_argument("--masks", type=positive_int, default=200, help="new masks (200)")
    parser.add_argument("--most-rounds", type=non_negative_int, default=2, help="rounds after the first (2)")
    parser.add_argument("--most-draws", type=positive_int, default=8, help="images of the hardest mask (8)")
    parser.add_argument("--folds", type=positive_int, default=2, help="of the cross-validation (2)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of every draw (0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse_args)
