"""Labels of one look, unlabelled images of another: do synthetic pairs in the other look help a segmenter?

    python benchmarks/looks.py histology --data DATA --output OUT --folds 03 04 --steps 4000 --seeds 0 1 2
    python benchmarks/looks.py leukocytes --data DATA --output OUT --steps 4000 --seeds 0 1 2 --pseudo-masks

DATA holds the folders histology and leukocytes, as the record benchmarks/looks.md describes them. Run the same command
until it says that nothing is left: every stage continues what it began. --minutes ends a call early, and so does
SIGTERM. Other settings need another --output.

Stages, for each fold: files -> generator -> sets -> segmenters of all arms and seeds -> table. With --pseudo-masks the
generator also sees the probabilities that a segmenter with colour transfer gives to the unlabelled images.
Results: OUT/NAME/FOLD/scores/*.json, a picture OUT/NAME/FOLD/pairs.png, and OUT/NAME/results.md, which also holds what
an unfinished call has found.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.color import lab2rgb, rgb2lab
from torch.nn.functional import one_hot

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.look_features import CHANGES
from benchmarks.report import table
from common.arguments import positive_float, positive_int, seed_number
from common.children import run_child
from common.disk import write_json
from common.errors import CommandParser, InputError, run_command
from common.log import start_logging
from common.pictures import captioned_sheet, from_uint8, mask_picture
from common.spread import evenly
from dataset.config import DataConfig
from dataset.views import native_view
from evaluation.experiments.instance_score import score_segmenter
from evaluation.experiments.labelled import LabelledFolders, Named, real_pairs, set_pairs
from evaluation.experiments.segmenter import Phase, Segmenter, SegmenterConfig, Source, Square, train_segmenter
from evaluation.experiments.sources import Labelled, pseudo_label
from evaluation.output import mean_and_spread
from synthetic.reader import SampleSet

logger = logging.getLogger("benchmarks.looks")
SIDE = 64
GENERATOR = f"--vae none --model SiT-Ti/8 --image-size {SIDE} --lr 1e-3 --in-channels 3"
SAMPLER = "--sampling-method ab2 --num-sampling-steps 16"
SURE = 0.9  # probability from which on a pixel of a pseudo-label counts
TEACHER = "real + colour transfer"  # its segmenter makes the pseudo-labels
ARMS = (
    "real", "real + photometric", TEACHER, "real + pseudo-labels", "real + synthetic in training looks",
    "real + synthetic in the new look", "real + synthetic in the new look + colour transfer", "ceiling",
)  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """One data set: which images have labels, and how they are read.

    Attributes:
        column: of index.csv: what tells the looks.
        crop: as of train.py.
        mask_type: what the masks hold.
        per_mask: synthetic images of each mask, unless the command line says another number.
    """

    column: str
    num_classes: int
    crop: str
    mask_type: str
    per_mask: int


BENCHMARKS = {
    "histology": Benchmark("patient", 2, "random", "binary", 16),
    "leukocytes": Benchmark("look", 3, "center", "classes", 1),
}


class OutOfTime(Exception):
    """The minutes of this call are used up; the same command continues."""


# ------------------------------------------------------------------------------------------------------ cheap rivals


def colour_moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (3,) of the CIELAB channels of a uint8 image (H, W, 3)."""
    lab = rgb2lab(image)
    return lab.mean((0, 1)), lab.std((0, 1))


def transfer_colours(image: np.ndarray, target: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """An image with the moments of another one, see :func:`colour_moments`. uint8 (H, W, 3) -> the same.

    Source: Reinhard et al. 2001, "Color transfer between images", doi:10.1109/38.946629.
    """
    lab, (mean, spread) = rgb2lab(image), target
    scaled = (lab - lab.mean((0, 1))) * (spread / np.maximum(lab.std((0, 1)), 1e-3))
    return np.rint(255 * np.clip(lab2rgb(scaled + mean), 0, 1)).astype(np.uint8)


def change_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strong photometric change: gain and offset of every CIELAB channel, gamma. uint8 (H, W, 3) -> the same."""
    lab = rgb2lab(255 * (image / 255) ** np.exp(rng.normal(0, 0.4)) / 255)
    centre = lab.mean((0, 1))
    lab = (lab - centre) * np.exp(rng.normal(0, 0.4, 3)) + centre + rng.normal(0, (12, 15, 15))
    return np.rint(255 * np.clip(lab2rgb(lab), 0, 1)).astype(np.uint8)


class Recoloured:
    """Squares of a source, half of them in other colours.

    Args:
        source: where squares come from.
        targets: images whose colours they take; none: random colours.
    """

    def __init__(self, source: Source, targets: Sequence[np.ndarray]) -> None:
        self.source, self.targets = source, [colour_moments(image) for image in targets]

    def draw(self, rng: np.random.Generator, side: int) -> Square:
        """One square of this side."""
        square = self.source.draw(rng, side)
        if rng.random() < 0.5:
            return square
        if not self.targets:
            return square._replace(image=change_colours(square.image, rng))
        target = self.targets[rng.integers(len(self.targets))]
        return square._replace(image=transfer_colours(square.image, target))


# -------------------------------------------------------------------------------------------------------------- folds


class Fold:
    """One benchmark with one look held out: labels of all others, unlabelled images of it, test images of it.

    In histology every second image of the patient is for the test, and the others are unlabelled; their labels serve
    the ceiling only.
    """

    def __init__(self, name: str, data: Path, held_out: str, folder: Path, args: argparse.Namespace) -> None:
        self.benchmark, self.folder, self.args = BENCHMARKS[name], folder, args
        self.config = DataConfig(SIDE, self.benchmark.num_classes, self.benchmark.crop)
        with (data / name / "index.csv").open(newline="") as stream:
            rows = sorted(csv.DictReader(stream), key=lambda row: row["name"])
        new = [row for row in rows if row[self.benchmark.column] == held_out]
        if not new:
            known = sorted({row[self.benchmark.column] for row in rows})
            raise InputError(f"{held_out!r} is no {self.benchmark.column} of {name}; choose from {', '.join(known)}")
        if name == "leukocytes":
            parts = {split: [row for row in new if row["split"] == split] for split in ("train", "val")}
            test, adapt = parts["val"], parts["train"]
            labelled = [row for row in rows if row not in new and row["split"] == "train"]
        else:
            test, adapt = new[1::2], new[::2]
            labelled = [row for row in rows if row not in new]
        self.members = {"labelled": labelled, "new": adapt, "test": test}
        self.data = data / name
        self._teacher: Segmenter | None = None

    def link(self) -> None:
        """Folders labelled/, new/ and test/ with images/, masks/ and instances/, as links."""
        for part, rows in self.members.items():
            for kind in ("images", "masks", "instances"):
                target = self.folder / part / kind
                if not (self.data / "train" / kind).is_dir():
                    continue
                target.mkdir(parents=True, exist_ok=True)
                for row in rows:
                    link = target / row["name"]
                    if not link.is_symlink():
                        link.symlink_to((self.data / row["split"] / kind / row["name"]).resolve())

    def pairs(self, part: str) -> list[Named]:
        """Labelled images of a part."""
        folders = LabelledFolders.of_part(self.folder / part, self.benchmark.mask_type)
        return real_pairs(folders, self.config, self.benchmark.num_classes)

    # ------------------------------------------------------------------------------------------------- the generator

    @property
    def run_name(self) -> str:
        """Of the generator."""
        return "generator_pseudo" if self.args.pseudo_masks else "generator"

    def train_generator(self) -> Path:
        """The generator's last checkpoint."""
        last = self.folder / "results" / self.run_name / "checkpoints" / f"{self.args.steps:07d}.pt"
        if not last.is_file():
            new: list[Path | str] = [self.folder / "new" / "images"]
            if self.args.pseudo_masks:
                self.write_pseudo_masks()
                new = [self.folder / "pseudo" / "images", "--unlabelled-mask-path", self.folder / "pseudo" / "masks"]
            flags = [*GENERATOR.split(), "--crop", self.benchmark.crop, "--num-classes", self.benchmark.num_classes]
            flags += ["--mask-type", self.benchmark.mask_type, "--look", "reference", "--unlabelled-path", *new]
            flags += ["--unlabelled-share", self.args.unlabelled_share, "--look-dropout", self.args.look_dropout]
            flags += ["--max-steps", self.args.steps, "--cooldown-steps", self.args.steps // 5]
            flags += ["--global-batch-size", self.args.batch_size, "--ckpt-every", max(1, self.args.steps // 4)]
            flags += ["--data-path", self.folder / "labelled" / "images"]
            flags += ["--mask-path", self.folder / "labelled" / "masks"]
            flags += ["--results-dir", self.folder / "results", "--run-name", self.run_name]
            flags += self.args.train_flags.split()
            self.run("train.py", *flags)
        return last

    def write_pseudo_masks(self) -> None:
        """new/ as the models see it, and the probabilities of a segmenter that learned with colour transfer."""
        folder = self.folder / "pseudo"
        if (folder / "done").is_file():
            return
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        images, segmenter = self.pairs("new"), self.teacher()  # their labels are not used
        for name, item in images:
            Image.fromarray(item.image).save(folder / "images" / f"{name}.png")
            classes, _ = segmenter.probabilities(item.image)
            if len(classes) == 2:
                Image.fromarray(np.rint(255 * classes[1]).astype(np.uint8)).save(folder / "masks" / f"{name}.png")
            else:
                np.save(folder / "masks" / f"{name}.npy", classes / classes.sum(0))
        (folder / "done").touch()

    def teacher(self) -> Segmenter:
        """The segmenter that learned the labelled images with colour transfer to the unlabelled ones."""
        if self._teacher is None:
            self._teacher = self.train_arm(TEACHER, seed=0)
        return self._teacher

    def make_set(self, look: str) -> SampleSet:
        """The set in the "new" look or in "training" looks; what is there is kept."""
        folder = self.folder / f"set_{self.run_name}_{look}"
        done = folder / "whole"
        if not done.is_file():
            kind, mask_type = "masks", self.benchmark.mask_type
            if (self.folder / "labelled" / "instances").is_dir():  # so that the labels tell touching cells apart
                kind, mask_type = "instances", "instances"
            flags = ["ODE", "--ckpt", self.train_generator(), "--mask-path", self.folder / "labelled" / kind]
            flags += ["--mask-type", mask_type, "--sample-dir", folder, *SAMPLER.split()]
            flags += ["--samples-per-mask", self.args.per_mask or self.benchmark.per_mask]
            flags += ["--look-scale", self.args.look_scale, "--cfg-scale", self.args.cfg_scale]
            # All training images include the new look's; those of the labelled folder are the training looks.
            part = "new" if look == "new" else "labelled"
            self.run("sample_ddp.py", *flags, "--look-path", self.folder / part / "images")
            done.touch()
        return SampleSet(folder)

    def write_picture(self) -> None:
        """``pairs.png``: of eight synthetic images in the new look the mask, its own image, the image, its look's."""
        folder = self.folder / f"set_{self.run_name}_new"
        if not (folder / "whole").is_file():
            return
        samples = SampleSet(folder)
        own, new = ({pair.name: pair.item.image for pair in self.pairs(part)} for part in ("labelled", "new"))
        with_cells = [sample for sample in samples.samples if samples.foreground(sample).any()]
        columns = []
        for sample in (with_cells[index] for index in evenly(len(with_cells), 8)):
            classes = torch.from_numpy(samples.class_map(sample).astype(np.int64))
            prob_map = one_hot(classes, self.config.num_classes).permute(2, 0, 1)
            synthetic, source = from_uint8(samples.synthetic(sample)), Path(sample.columns["source_mask"]).stem
            its_image, look_of = own[source], new[sample.columns["look_image"]]
            if self.benchmark.crop == "random":  # these are whole images
                assert sample.view is not None  # sample_ddp.py writes it
                its_image = sample.view.cut(its_image)
                height, width = look_of.shape[:2]
                look_of = native_view(height, width, SIDE).cut(look_of)
            columns.append([mask_picture(prob_map), from_uint8(its_image), synthetic, from_uint8(look_of)])
        sheet = captioned_sheet(("mask", "its image", "synthetic", "look of"), columns)
        Image.fromarray(sheet).save(self.folder / "pairs.png")

    def run(self, script: str, *words: object) -> None:
        """A command of the project, until it is done or the time is up."""
        left = max(1.0, self.args.deadline - time.monotonic())
        start: list[str | Path] = [ROOT / script]
        if self.args.look_features != "fixed":
            start = [ROOT / "benchmarks" / "look_features.py", self.args.look_features, script]
        code = run_child([sys.executable, *start, *map(str, words)], left)
        if code is None:
            raise OutOfTime
        if code:
            raise InputError(f"{script} ended with {code}: see above")

    # ------------------------------------------------------------------------------------------------ the segmenters

    def phases(self, arm: str) -> list[Phase]:
        """What the segmenter of an arm sees."""
        if arm == "ceiling":
            return [Phase(1, [(Labelled([one.item for one in self.pairs("new")]), 1)])]
        own: Source = Labelled([one.item for one in self.pairs("labelled")])
        if arm == "real + photometric":
            own = Recoloured(own, [])
        if arm.endswith("colour transfer"):
            own = Recoloured(own, [one.item.image for one in self.pairs("new")])
        if arm == "real + pseudo-labels":
            other = [pseudo_label(one.item.image, self.teacher(), SURE) for one in self.pairs("new")]
        elif "synthetic" in arm:
            made = self.make_set("training" if "training" in arm else "new")
            other = [one.item for one in set_pairs(made, self.config.num_classes)]
        else:
            return [Phase(1, [(own, 1)])]
        return [Phase(1, [(own, 0.5), (Labelled(other), 0.5)])]

    def train_arm(self, arm: str, seed: int) -> Segmenter:
        """A segmenter trained as the arm says."""
        phases = self.phases(arm)
        if time.monotonic() > self.args.deadline:
            raise OutOfTime
        config = SegmenterConfig(self.config.num_classes, crop=SIDE, steps=self.args.segmenter_steps, seed=seed)
        return Segmenter([train_segmenter(phases, config, torch.device("cpu"))], torch.device("cpu"))

    def score(self, arm: str, seed: int) -> dict:
        """Scores of one training, read if they are there."""
        generator = f"{self.run_name} " if "synthetic" in arm else ""
        path = self.folder / "scores" / f"{generator}{arm} {seed}.json"
        if not path.is_file():
            test = [(one.item, "test") for one in self.pairs("test")]
            segmenter = self.teacher() if (arm, seed) == (TEACHER, 0) else self.train_arm(arm, seed)
            score, _ = score_segmenter(segmenter, test, self.config.num_classes)
            path.parent.mkdir(exist_ok=True)
            write_json(path, asdict(score))
            logger.info("%s, %s, seed %d: AP50 %s, Dice %s", self.folder.name, arm, seed, score.ap50, score.dice)
        return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------------------ results


def table_of(scores: dict[str, list[dict]], num_classes: int) -> list[str]:
    """Markdown: mean and sample standard deviation over folds and seeds of every arm."""
    classes = [f"Dice of class {number}" for number in range(1, num_classes)] if num_classes > 2 else []
    rows = []
    for arm, found in scores.items():
        measured = [[one["ap50"] for one in found], [one["dice"] for one in found]]
        measured += [[one["class_dice"][number] for one in found] for number in range(len(classes))]
        cells = [arm, len(found)]
        for mean, spread in map(mean_and_spread, measured):
            cells.append("-" if mean is None else f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
        rows.append(cells)
    return table(["arm", "trainings", "AP at 0.5", "Dice", *classes], rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--data", type=Path, required=True, metavar="DATA", help="folder with histology and leukocytes")
    parser.add_argument("--output", type=Path, default=Path("results/looks"), metavar="FOLDER", help="where results go")
    parser.add_argument(
        "--folds", nargs="+", metavar="LOOK", help="looks held out, one fold each (default: patients 03 and 04; purple)"
    )
    parser.add_argument("--steps", type=positive_int, default=4000, help="steps of the generator")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images of a step of the generator")
    parser.add_argument("--segmenter-steps", type=positive_int, default=500, help="steps of a segmenter")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], help="of the segmenters")
    parser.add_argument(
        "--per-mask", type=positive_int, help="synthetic images of each mask (default: 16; leukocytes 1)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--pseudo-masks", action="store_true", help="give the generator soft pseudo-masks, too")
    parser.add_argument(
        "--look-features", choices=("fixed", *CHANGES), default="fixed", help="what describes a look (fixed numbers)"
    )
    parser.add_argument("--train-flags", default="", metavar="FLAGS", help="more flags of train.py, in quotes")
    parser.add_argument("--unlabelled-share", type=positive_float, default=0.25, help="as of train.py")
    parser.add_argument("--look-dropout", type=positive_float, default=0.15, help="as of train.py")
    parser.add_argument("--look-scale", type=positive_float, default=1.0, help="as of sample_ddp.py")
    parser.add_argument("--cfg-scale", type=positive_float, default=1.0, help="as of sample_ddp.py")
    parser.add_argument("--minutes", type=positive_float, default=1e6, help="end this call after so many minutes")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    start_logging(is_main=True)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, end_early)
    warnings.filterwarnings("ignore", "Conversion from CIE-LAB")  # colours outside of RGB are cut
    args.deadline = time.monotonic() + 60 * args.minutes
    folds = args.folds or (["purple"] if args.benchmark == "leukocytes" else ["03", "04"])
    scores: dict[str, list[dict]] = {arm: [] for arm in args.arms}
    done = False
    try:
        for held_out in folds:
            fold = Fold(args.benchmark, args.data, held_out, args.output / args.benchmark / held_out, args)
            fold.link()
            for arm in args.arms:
                for seed in args.seeds:
                    scores[arm].append(fold.score(arm, seed))
            fold.write_picture()
        done = True
    except OutOfTime:
        pass
    words = " ".join(sys.argv[1:])
    lines = [f"`python benchmarks/looks.py {words}`", "", *table_of(scores, BENCHMARKS[args.benchmark].num_classes)]
    path = args.output / args.benchmark / ("results_pseudo.md" if args.pseudo_masks else "results.md")
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    logger.info("nothing is left: see %s" if done else "time is up, the same command continues: see %s", path)


def end_early(signal_number: int, frame: object) -> None:
    """What SIGTERM does."""
    raise OutOfTime


if __name__ == "__main__":
    run_command(main, parse_args)
