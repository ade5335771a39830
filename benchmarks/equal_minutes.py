"""What is best after the same minutes on one CPU core: learning rate, batch, optimiser, shape of the network, a U-Net.

    python benchmarks/equal_minutes.py --train TRAIN --heldout VAL --default-steps 1300 --output OUT \\
        --variants default lr-2e-3 batch-32 muon u-net

TRAIN and VAL hold the folders images and masks. The default takes ``--default-steps``; a variant takes as many steps as
fit in the same time. If its step is another one, a few steps of both in turn give its time over that of the default, so
other work on the machine does not favour either. The images of the held-out masks are measured by the commands of
``evaluate.py``. Run the same command again to continue: trials that have ended stay, one that was cut short starts
anew. Results: OUT/results.md.

    python benchmarks/equal_minutes.py launch [--muon] train.py ...flags...

runs a command with the networks of this benchmark in the table of models: the U-Nets of unet_baseline.py, and SiTs of
other shapes or with the patch embeddings of stems.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measures import COLUMNS, read_measures
from benchmarks.report import table
from benchmarks.stems import convolutions, stemmed_sit, wider_window
from benchmarks.unet_baseline import COMMANDS, add_unets
from common.arguments import positive_int, seed_number
from common.children import run_child
from common.disk import write_json
from common.errors import CommandParser, InputError, run_command
from evaluation.output import number
from models import SiT, SiT_models

SHAPES = {  # depth, width, heads, patch: about as many weights in the blocks as SiT-Ti/8, which has 4, 256, 4, 8
    "SiT-2x352/8": (2, 352, 4, 8),
    "SiT-8x176/8": (8, 176, 4, 8),
}
STEMS = {  # patch embedding and patch size; blocks are those of SiT-Ti/8
    "SiT-convolutions/8": (convolutions, 8),
    "SiT-wider-window/8": (wider_window, 8),
    "SiT-convolutions/4": (convolutions, 4),
}
COMMON = "--vae none --in-channels 1 --image-size 64 --crop random --window 0 99.8 --cfg-scale 1 --num-workers 0"
DEFAULT = {"--model": "SiT-Ti/8", "--global-batch-size": "16", "--lr": "1e-3"}
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "lr-5e-4": {"--lr": "5e-4"},
    "lr-2e-3": {"--lr": "2e-3"},
    "warmup-400": {"--warmup-steps": "400"},
    "lr-2e-3-warmup-400": {"--lr": "2e-3", "--warmup-steps": "400"},
    "batch-8": {"--global-batch-size": "8"},
    "batch-32": {"--global-batch-size": "32"},
    "batch-64": {"--global-batch-size": "64", "--lr": "2e-3"},
    "muon": {"--muon": ""},
    "muon-2e-3": {"--muon": "", "--lr": "2e-3"},
    "early-times": {"--time-sampling": "logit-normal", "--time-mean": "-0.5"},
    "wide-times": {"--time-std": "1.5"},
    "uniform-times": {"--time-sampling": "uniform"},
    "patch-4": {"--model": "SiT-Ti/4"},
    "wide": {"--model": "SiT-2x352/8"},
    "deep": {"--model": "SiT-8x176/8"},
    "stem": {"--model": "SiT-convolutions/8"},
    "wider-window": {"--model": "SiT-wider-window/8"},
    "patch-4-stem": {"--model": "SiT-convolutions/4"},
    "u-net": {"--model": "U-Net"},
    "u-net-lr-2e-3": {"--model": "U-Net", "--lr": "2e-3"},
}
FREE = {"--lr", "--warmup-steps", "--time-sampling", "--time-mean", "--time-std"}  # these leave a step's time as it is
RATE_STEPS = 40  # steps that give the time of a step, after as many to warm up
RATE_TRIES = 3  # of default and variant in turn; the median counts
COOLDOWN = 0.2  # share of the steps over which the learning rate falls


# --------------------------------------------------------------------------------------------------------- the launcher


class MuonAndAdamW:
    """Muon for the matrices inside the blocks, AdamW for everything else; used like one optimiser.

    Source: Jordan et al. 2024, "Muon"; the step is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(self, model: nn.Module, adamw: torch.optim.AdamW, lr: float, weight_decay: float) -> None:
        inside = [value for name, value in model.named_parameters() if "blocks." in name and value.ndim == 2]
        chosen = {id(value) for value in inside}
        for group in adamw.param_groups:
            group["params"] = [value for value in group["params"] if id(value) not in chosen]
        muon = torch.optim.Muon(inside, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both; their learning rates may be set."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """A run with it cannot be continued: this benchmark never does."""
        return {}


def use_muon() -> None:
    """Give every training Muon."""
    from engine.training import Training

    plain = Training.__init__

    def with_muon(self: Any, *given: Any) -> None:
        plain(self, *given)
        settings = self.config.optimiser
        self.optimizer = MuonAndAdamW(self.model, self.optimizer, settings.lr, settings.weight_decay)

    Training.__init__ = with_muon  # type: ignore[method-assign,assignment]


def launch(words: list[str]) -> None:
    """Run a command of the project with more networks, and perhaps with Muon."""
    if words[:1] == ["--muon"]:
        use_muon()
        words = words[1:]
    if not words or words[0] not in COMMANDS:
        print(f"{__doc__}\nAfter launch, give one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    add_unets()
    for name, (depth, width, heads, patch) in SHAPES.items():
        SiT_models[name] = partial(SiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for name, (make_stem, patch) in STEMS.items():
        sizes = {"depth": 4, "hidden_size": 256, "num_heads": 4, "patch_size": patch}
        SiT_models[name] = partial(stemmed_sit, make_stem, **sizes)
    sys.argv = words
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


# ------------------------------------------------------------------------------------------------------- the comparison


class Trial:
    """One variant and seed: trained, sampled, measured; what is done stays done."""

    def __init__(self, variant: str, seed: int, args: argparse.Namespace) -> None:
        self.args, self.variant, self.seed = args, variant, seed
        self.folder = args.output / f"{variant}_{seed}_{args.default_steps}"

    def result(self) -> dict[str, Any]:
        """Numbers of this trial."""
        path = self.folder / "result.json"
        if not path.is_file():
            if self.folder.exists():  # cut short: the time of a continued training says nothing
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            relative = self.relative_time()
            steps = round(self.args.default_steps / relative)
            used = self.train(self.variant, f"run_{steps}", steps, "--cooldown-steps", int(COOLDOWN * steps))
            spent = {"steps": steps, "relative": relative, "seconds": used, "sampling": self.sample(steps)}
            write_json(path, spent | self.measures())
        return json.loads(path.read_text())

    def relative_time(self) -> float:
        """Time of a step of this variant over that of the default."""
        if set(VARIANTS[self.variant]) <= FREE:
            return 1.0
        return median(
            self.seconds_per_step(self.variant, f"rate_{number}")
            / self.seconds_per_step("default", f"rate_default_{number}")
            for number in range(RATE_TRIES)
        )

    def seconds_per_step(self, variant: str, name: str) -> float:
        """Of the last steps of a short training, by the clock."""
        self.train(variant, name, 2 * RATE_STEPS, "--log-every", RATE_STEPS)
        rows = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        speeds = [row["speed/images_per_sec"] for row in rows if "speed/images_per_sec" in row]
        return int(flags_of(variant)["--global-batch-size"]) / speeds[-1]

    def train(self, variant: str, name: str, steps: int, *more: object) -> float:
        """Train a generator; seconds of processor time."""
        flags = flags_of(variant)
        muon = ["--muon"] if "--muon" in flags else []
        words = [word for key, value in flags.items() if key != "--muon" for word in (key, value)]
        return self.run(
            ROOT / "benchmarks/equal_minutes.py", "launch", *muon, "train.py", *COMMON.split(), *words,
            "--data-path", self.args.train / "images", "--mask-path", self.args.train / "masks",
            "--max-steps", steps, "--seed", self.seed, "--results-dir", self.folder, "--run-name", name, *more,
        )  # fmt: skip

    def sample(self, steps: int) -> float:
        """Images of the held-out masks; seconds of processor time."""
        return self.run(
            ROOT / "benchmarks/equal_minutes.py", "launch", "sample_ddp.py", "ODE",
            "--ckpt", self.folder / f"run_{steps}/checkpoints/{steps:07d}.pt", "--samples-per-mask", 2,
            "--data-path", self.args.heldout / "images", "--mask-path", self.args.heldout / "masks",
            "--sample-dir", self.folder / "samples",
        )  # fmt: skip

    def measures(self) -> dict[str, float]:
        """What evaluate.py says of the images."""
        real = ["--data-path", self.args.train / "images", "--mask-path", self.args.train / "masks"]
        judge = ["--cache-dir", self.args.output / "judges"]
        self.evaluate("threshold")
        self.evaluate("grid")
        self.evaluate("fidelity", *real, *judge)
        held = ["--data-path", self.args.heldout / "images", "--mask-path", self.args.heldout / "masks"]
        self.evaluate("realism", *held, *judge)
        return read_measures(self.folder / "samples")

    def evaluate(self, name: str, *flags: object) -> None:
        self.run(ROOT / "evaluate.py", name, self.folder / "samples", *flags)

    def run(self, script: Path, *words: object) -> float:
        """A command of the project; seconds of processor time."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with (self.folder / "log.txt").open("a") as log:
            code = run_child([sys.executable, script, *map(str, words)], output=log)
        if code:
            raise InputError(f"{script.name} {words[0]} ended with {code}: see {self.folder / 'log.txt'}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def flags_of(variant: str) -> dict[str, str]:
    """What train.py gets; --muon is for the launcher."""
    return DEFAULT | VARIANTS[variant]


def table_of(results: Sequence[tuple[str, int, dict[str, Any]]]) -> list[str]:
    """Markdown: one row for each trial."""
    rows = [
        [name, seed, found["steps"], number(found["relative"]), round(found["seconds"]),
         *(number(found[column]) for column in COLUMNS), round(found["sampling"])]
        for name, seed, found in results
    ]  # fmt: skip
    return table(["variant", "seed", "steps", "time of a step", "training, s", *COLUMNS, "sampling, s"], rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="FOLDER", help="holds images and masks to learn")
    parser.add_argument("--heldout", type=Path, required=True, metavar="FOLDER", help="holds images and masks to test")
    parser.add_argument("--default-steps", type=positive_int, default=1300, metavar="N", help="of the default (1300)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where results go")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0], help="of the generators (0)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands
    results = []
    for variant in args.variants:
        for seed in args.seeds:
            results.append((variant, seed, Trial(variant, seed, args).result()))
            (args.output / "results.md").write_text("\n".join(table_of(results)) + "\n")
            print("\n".join(table_of(results[-1:])[2:]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        launch(sys.argv[2:])
    else:
        run_command(main, parse_args)
