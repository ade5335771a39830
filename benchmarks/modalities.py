"""Four modalities of nuclei: one generator for all, with looks or without, or a generator for each?

    python benchmarks/modalities.py --data DATA --output OUT --steps 2500

DATA is laid out as the record benchmarks/looks.md describes it. The images of the three rare modalities, those of both
splits, are cut into folds by field, and each fold is held out once. Fluorescence keeps its split. In each fold every
generator trains for the same number of steps, makes images of the held-out masks, and these are measured by modality.
The generator of the fluorescence is that of fold 0, because its images are the same in all folds.

Run the same command until it says that nothing is left: what has ended stays. Results: OUT/results.md, and images of
every generator in OUT/kinds.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measures import COLUMNS, read_measures
from benchmarks.report import table
from common.arguments import positive_int, seed_number
from common.children import run_child
from common.disk import write_json
from common.errors import CommandParser, InputError, run_command
from common.pictures import captioned_sheet, from_uint8
from common.spread import evenly
from evaluation.output import number
from synthetic.reader import SampleSet

GENERATOR = "--vae none --model SiT-Ti/8 --image-size 64 --in-channels 3 --crop random --window 0 99.8 --num-classes 3"
TRAINING = "--mask-type instances --lr 1e-3 --cfg-scale 1 --num-workers 0"
MODALITIES = ("fluorescence", "purple_on_purple", "purple_on_white", "brightfield")
SAMPLES = {"fluorescence": 2, "purple_on_purple": 4, "purple_on_white": 8, "brightfield": 16}  # of each mask
JOINT = {
    "one, no looks": [],
    "one, looks": ["--look", "reference"],
    "one, looks, balanced": ["--look", "reference", "--balance-groups"],
}
ARMS = (*JOINT, "one each")
LOOKS = ("looks", "looks, real", "distance, real")


class Fold:
    """The files of one fold: ``train``, ``train_MODALITY`` and ``test_MODALITY``, as links.

    Args:
        index: rows of index.csv.
        part: which fields of the rare modalities are held out.
    """

    def __init__(self, index: Sequence[dict[str, str]], part: int, args: argparse.Namespace) -> None:
        self.part, self.args, self.folder = part, args, args.output / f"fold_{part}"
        for modality in MODALITIES:
            rows = [row for row in index if row["modality"] == modality]
            held_out = {row["name"] for row in rows if row["split"] == "val"}
            if modality != "fluorescence":
                fields = sorted({row["mosaic_group"] for row in rows})
                random.Random(args.seed).shuffle(fields)
                mine = set(fields[part :: args.folds])
                held_out = {row["name"] for row in rows if row["mosaic_group"] in mine}
            for row in rows:
                kinds = (f"test_{modality}",) if row["name"] in held_out else ("train", f"train_{modality}")
                for kind in kinds:
                    self.link(kind, row)

    def link(self, part: str, row: dict[str, str]) -> None:
        for kind in ("images", "instances"):
            link = self.folder / part / kind / row["name"]
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to((self.args.data / "nuclei" / row["split"] / kind / row["name"]).resolve())

    def pairs(self, part: str) -> list[object]:
        """Flags that name images and masks."""
        folder = self.folder / part
        return ["--data-path", folder / "images", "--mask-path", folder / "instances"]

    def result(self, arm: str, modality: str) -> dict[str, Any] | None:
        """Numbers of an arm on one modality; None for what another fold measures."""
        alone = arm not in JOINT
        if alone and modality == "fluorescence" and self.part:
            return None
        samples = self.folder / f"samples_{named(arm)}_{modality}"
        path = samples / "result.json"
        if not path.is_file():
            checkpoint = self.train(f"train_{modality}" if alone else "train", arm)
            flags = ["--look-group", modality] if "--look" in JOINT.get(arm, []) else []
            self.run(
                "sample_ddp.py", "ODE", "--ckpt", checkpoint, *self.pairs(f"test_{modality}"), "--sample-dir", samples,
                "--samples-per-mask", SAMPLES[modality], "--mask-type", "instances", *flags,
            )  # fmt: skip
            write_json(path, self.measures(samples, modality))
        return json.loads(path.read_text())

    def train(self, part: str, arm: str) -> Path:
        """The last checkpoint of a generator."""
        steps = self.args.steps
        name = f"{part}_{named(arm)}"
        last = self.folder / "results" / name / "checkpoints" / f"{steps:07d}.pt"
        if not last.is_file():
            groups = ["--groups", self.args.data / "nuclei" / "index.csv", "--group-column", "modality"]
            self.run(
                "train.py", *GENERATOR.split(), *TRAINING.split(), *self.pairs(part), *groups, *JOINT.get(arm, []),
                "--global-batch-size", self.args.batch_size, "--max-steps", steps, "--cooldown-steps", steps // 5,
                "--ckpt-every", max(1, steps // 4), "--seed", self.args.seed,
                "--results-dir", self.folder / "results", "--run-name", name,
            )  # fmt: skip
        return last

    def measures(self, samples: Path, modality: str) -> dict[str, float]:
        """What evaluate.py says of a set."""
        train, test = self.pairs(f"train_{modality}"), self.pairs(f"test_{modality}")
        judge = ["--mask-type", "instances", "--cache-dir", self.folder / "judges"]
        for measure, flags in (
            ("threshold", []),
            ("grid", []),
            ("fidelity", [*train, *judge]),
            ("looks", test[:2]),
            ("realism", [*test, *judge]),
        ):
            self.run("evaluate.py", measure, samples, *flags)
        return read_measures(samples) | look_distances(samples)

    def run(self, script: str, *words: object) -> None:
        code = run_child([sys.executable, ROOT / script, *map(str, words)])
        if code:
            raise InputError(f"{script} ended with {code}: see above")


def named(arm: str) -> str:
    """An arm as part of a file name."""
    return arm.replace(", ", "_").replace(" ", "_")


def look_distances(samples: Path) -> dict[str, float]:
    """Mean distance of the looks to those of real images, that of real halves, and the distance of real halves."""
    looks, realism = (
        json.loads((samples / "evaluation" / f"{name}.json").read_text()) for name in ("looks", "realism")
    )
    numbers = list(looks["numbers"].values())
    values = (
        sum(one["distance"] for one in numbers) / len(numbers),
        sum(one["real_distance"] for one in numbers) / len(numbers),
        realism["distances"][0]["real_mean"],
    )
    return dict(zip(LOOKS, values, strict=True))


def write_picture(output: Path) -> None:
    """``kinds.png``: rows are real images and the generators of fold 0, columns three fuller masks of each modality."""
    folder = output / "fold_0"
    made = [arm for arm in ARMS if all((folder / f"samples_{named(arm)}_{one}").is_dir() for one in MODALITIES)]
    columns = []
    for modality in MODALITIES:
        sets = [SampleSet(folder / f"samples_{named(arm)}_{modality}") for arm in made]
        covers = [sets[0].foreground(one).mean() for one in sets[0].samples]
        fuller = [row for row, cover in enumerate(covers) if cover >= statistics.median(covers)]
        for row in (fuller[place] for place in evenly(len(fuller), 3)):
            pictures = [sets[0].real(sets[0].samples[row]), *(one.synthetic(one.samples[row]) for one in sets)]
            columns.append([from_uint8(picture) for picture in pictures])
    captions = ["real", *(arm.removeprefix("one, ").removeprefix("looks, ") for arm in made)]
    Image.fromarray(captioned_sheet(captions, columns)).save(output / "kinds.png")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DATA", help="holds the folder nuclei")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where results go")
    parser.add_argument("--steps", type=positive_int, default=2500, help="of every generator (2500)")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="of every generator (16)")
    parser.add_argument("--folds", type=positive_int, default=2, help="of the rare modalities (2)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seed", type=seed_number, default=0, help="of the folds and the generators (0)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands
    with (args.data / "nuclei" / "index.csv").open(newline="") as stream:
        index = list(csv.DictReader(stream))
    rows = []
    for arm in args.arms:
        for part in range(args.folds):
            fold = Fold(index, part, args)
            for modality in MODALITIES:
                found = fold.result(arm, modality)
                if found is not None:
                    rows.append([modality, arm, part, *(number(found[column]) for column in (*COLUMNS, *LOOKS))])
                    lines = table(["modality", "generator", "fold", *COLUMNS, *LOOKS], sorted(rows))
                    (args.output / "results.md").write_text("\n".join(lines) + "\n")
    write_picture(args.output)
    print(f"nothing is left to do; see {args.output / 'results.md'} and kinds.png beside it")


if __name__ == "__main__":
    run_command(main, parse_args)
