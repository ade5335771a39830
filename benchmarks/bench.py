"""Measure the speed of training and sampling, and compare it with the way SiT works, in one run of the same code.

    make bench                                  # CPU: a few minutes on two idle cores
    make bench PRESET=gpu                       # one GPU: within ten minutes; diffusers is not needed
    python benchmarks/bench.py --preset cpu --parts sampling --ckpt CKPT.pt --minutes 3

Writes OUTPUT.json, OUTPUT.md (a table) and OUTPUT.png after every part. ``as-sit`` is the baseline: float32 (or TF32),
an online autoencoder, a modulation per token, a Python EMA loop, AdamW that is not fused, dopri5, guidance that doubles
everywhere, and PNGs on the main thread. ``without X`` is this project with one optimisation turned off. ``with X`` has
one turned on that is off by default. ``--as-sit`` only times this project and the baseline.

All modes of a table run in turn, round after round, on the same weights. A ratio is the median over the rounds of the
ratio within a round, given with the lowest and the highest. Absolute numbers only hold for a quiet machine. Utilisation
is the arithmetic that was really computed, divided by the rate of a large matrix product in the same precision and the
same rounds.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.flops import matrix_rate, sit_flops, synchronize
from benchmarks.report import Row, markdown, plot, provenance
from benchmarks.rounds import interleave, mode_rows, ratio, spread
from benchmarks.workloads import (
    AS_SIT,
    LATENT_FACTOR,
    NUM_CLASSES,
    SAMPLING_SWITCHES,
    TRAINING_SWITCHES,
    Mode,
    SamplingBench,
    Setup,
    Timing,
    TrainingBench,
    draw_masks,
    modes_of,
    sd_autoencoder,
)
from cli import add_device_argument
from common.arguments import positive_float, positive_int
from common.disk import write_atomically, write_json
from common.errors import CommandParser, InputError, run_command
from dataset.masks import to_prob_map
from engine.autoencoder import PixelSpace, Space
from engine.checkpoint import read_checkpoint
from engine.machine import Machine, has_compiler, start_machine, stop_machine
from engine.sampling import SamplingSettings
from layers.mask import MaskCondition
from models import SiT, build_model, patch_size


@dataclass(frozen=True)
class Preset:
    """What to time, and for how long at most."""

    training: tuple[Setup, ...]
    sampling: tuple[Setup, ...]
    modulation: tuple[Setup, ...]
    scaling: Setup  # batch and image size are replaced
    scaling_batches: tuple[int, ...]
    scaling_sides: tuple[int, ...]  # tokens per side
    compiled: bool
    matrix_side: int
    rounds: int
    minutes: float


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network in sampling."""

    setup: Setup
    masks: str
    y: torch.Tensor  # (B, K, S, S)
    precision: str
    compiled: bool


PRESETS = {
    "cpu": Preset(
        training=(Setup("SiT-S/2", 128, True, batch=4), Setup("SiT-Ti/8", 64, False, batch=32)),
        sampling=(Setup("SiT-Ti/8", 64, False, batch=16, steps=8), Setup("SiT-S/2", 128, True, batch=2, steps=8)),
        modulation=(Setup("SiT-S/2", 256, True, batch=8), Setup("SiT-B/2", 256, True, batch=8, brief=True)),
        scaling=Setup("SiT-Ti/2", 128, True, batch=2),
        scaling_batches=(1, 2, 4, 8),
        scaling_sides=(8, 16, 32),
        compiled=False,
        matrix_side=1024,
        rounds=3,
        minutes=6,
    ),
    "gpu": Preset(
        training=(
            Setup("SiT-XL/2", 256, True, batch=32, steps=4),
            Setup("SiT-B/2", 256, True, batch=128, steps=6, brief=True),
            Setup("SiT-B/16", 256, False, batch=128, steps=6, brief=True),
        ),
        sampling=(Setup("SiT-XL/2", 256, True, batch=32, steps=25), Setup("SiT-B/16", 256, False, batch=64, steps=25)),
        modulation=(Setup("SiT-XL/2", 256, True, batch=32),),
        scaling=Setup("SiT-B/2", 256, True, batch=32, steps=4),
        scaling_batches=(8, 32, 128),
        scaling_sides=(8, 16, 32),
        compiled=True,
        matrix_side=8192,
        rounds=3,
        minutes=8.5,
    ),
    "tiny": Preset(  # for the tests: every part in seconds, and no number that means anything
        training=(Setup("SiT-Ti/8", 16, False, batch=2),),
        sampling=(Setup("SiT-Ti/8", 16, False, batch=2, steps=1),),
        modulation=(Setup("SiT-Ti/8", 32, False, batch=2),),
        scaling=Setup("SiT-Ti/2", 32, True, batch=1),
        scaling_batches=(1, 2),
        scaling_sides=(1, 2),
        compiled=False,
        matrix_side=64,
        rounds=1,
        minutes=60,
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu", help="what to time (default: cpu)")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run (default: all)"
    )
    parser.add_argument(
        "--as-sit", action="store_true", help="only time this project and the baseline, not each optimisation"
    )
    parser.add_argument("--rounds", type=positive_int, help="number of interleaved repeats (default: from the preset)")
    parser.add_argument("--minutes", type=positive_float, help="longest time, approximately (default: from the preset)")
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="sample with this network instead of random weights")
    parser.add_argument(
        "--output", type=Path, default=Path("bench/result"), help="output files, without suffix (default: bench/result)"
    )
    add_device_argument(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one rank of the part "ranks"
    return parser.parse_args(argv)


class Bench:
    """Settings and results of one run of the benchmark."""

    def __init__(self, args: argparse.Namespace, machine: Machine) -> None:
        self.args, self.machine = args, machine
        self.preset = PRESETS[args.preset]
        self.rounds = args.rounds or self.preset.rounds
        self.ours = Mode(compiled=self.preset.compiled)
        self.minutes = args.minutes or self.preset.minutes
        self.notes: list[str] = []
        self.space: Space | None = None
        needs_autoencoder = {"training", "sampling"} & set(args.parts)
        if needs_autoencoder and any(setup.latents for setup in self.preset.training):
            try:
                self.space = sd_autoencoder(machine.device)
            except ImportError:
                self.notes.append("diffusers is not installed: the online autoencoder and decoding were left out")

    def modes(self, setup: Setup, switches: tuple[str, ...]) -> dict[str, Mode]:
        space = self.space if setup.latents and self.space is not None else PixelSpace()
        ours, on_cpu = self.ours, self.machine.device.type == "cpu"
        if switches is TRAINING_SWITCHES and on_cpu:
            ours = replace(ours, distinct_rows=False)  # as train.py does in bf16
        switches = tuple(name for name in switches if name != "plain_attention" or on_cpu)
        modes = modes_of(ours, switches, space)
        if setup.latents and self.space is None:  # the baseline without its autoencoder is the better for it
            modes["as-sit"] = replace(AS_SIT, cached_latents=True)
        if self.args.as_sit or setup.brief:
            names = ("ours", "as-sit") if self.args.as_sit else ("ours", "as-sit", "without distinct rows")
            return {name: modes[name] for name in names}
        return modes

    def rates(self) -> dict[str, float]:
        """Matrix rate per precision, now."""
        dtypes = {"bf16": torch.bfloat16, "float32": torch.float32}
        side = self.preset.matrix_side
        return {name: matrix_rate(self.machine.device, dtype, side) for name, dtype in dtypes.items()}

    def compare(self, bench: Callable[[Mode], Timing], setup: Setup, modes: dict[str, Mode], end: float) -> list[Row]:
        runs: dict[str, Callable[[], Any]] = {name: partial(bench, mode) for name, mode in modes.items()}
        results = interleave({"rates": self.rates} | runs, self.rounds, end, always=("rates", "ours", "as-sit"))
        found = results.pop("rates")
        return mode_rows(results, setup, {name: [one[name] for one in found] for name in found[0]}, modes)

    # ---- parts

    def training(self, end: float) -> list[Row]:
        rows = []
        for number, setup in enumerate(self.preset.training):
            with tempfile.TemporaryDirectory() as folder:
                bench = TrainingBench(setup, self.machine, self.space if setup.latents else PixelSpace(), Path(folder))
                deadline = deadline_of(end, number, len(self.preset.training))
                rows += self.compare(bench, setup, self.modes(setup, TRAINING_SWITCHES), deadline)
            del bench
            free(self.machine)
        return rows

    def sampling(self, end: float) -> list[Row]:
        chosen = self.preset.sampling[:1] if self.args.ckpt else self.preset.sampling  # --ckpt brings its own network
        setups = [(setup, guidance) for setup in chosen for guidance in (1.0, 4.0)]
        rows = []
        for number, (setup, guidance) in enumerate(setups):
            setup, model = self.trained(setup)
            space = (self.space or PixelSpace(4)) if setup.latents else PixelSpace()
            with tempfile.TemporaryDirectory() as folder:
                bench = SamplingBench(setup, self.machine, space, Path(folder), guidance, model)
                deadline = deadline_of(end, number, len(setups))
                part = self.compare(bench, setup, self.modes(setup, SAMPLING_SWITCHES), deadline)
            solver = f"{setup.steps} steps of {SamplingSettings().method}"
            rows += [row | {"setup": f"{setup.name}, {solver}, guidance {guidance:g}"} for row in part]
            del bench
            free(self.machine)
        return rows

    def trained(self, setup: Setup) -> tuple[Setup, SiT | None]:
        """The network of --ckpt in place of the setup's, so that an adaptive solver has a real flow to follow."""
        if self.args.ckpt is None:
            return setup, None
        state = read_checkpoint(self.args.ckpt)
        config = state["config"]
        if config["data"]["num_classes"] != NUM_CLASSES:
            raise InputError(f"--ckpt {self.args.ckpt}: the benchmark draws masks of two classes only.")
        model = build_model(config["model"]).to(self.machine.device)
        model.load_state_dict(state["ema"])
        latents = config["space"]["vae"] != PixelSpace.name
        return replace(
            setup, model=config["model"]["name"], image_size=config["data"]["image_size"], latents=latents
        ), model

    @torch.inference_mode()
    def modulation(self, end: float) -> list[Row]:
        """One network call of a solver step: modulation per token, per distinct row, per image."""
        calls = [call for setup in self.preset.modulation for call in self.network_calls(setup)]
        return [self.modulation_row(call, deadline_of(end, number, len(calls))) for number, call in enumerate(calls)]

    def network_calls(self, setup: Setup) -> list[NetworkCall]:
        """Binary masks in the precision at hand and in float32, each also compiled where there is a compiler; then two
        other kinds of mask."""
        size, batch = setup.image_size, setup.batch
        precisions = dict.fromkeys((self.machine.precision, "float32"))
        compiled = [False, True] if has_compiler() else [False]
        ways = list(itertools.product(precisions, compiled))
        binary = to_prob_map(torch.from_numpy(draw_masks(batch, size)), NUM_CLASSES)
        calls = [NetworkCall(setup, "binary", binary, *way) for way in ways]
        if setup.brief:
            return calls
        fine = to_prob_map(torch.from_numpy(draw_masks(batch, 3 * size)), NUM_CLASSES)
        resized = torch.nn.functional.interpolate(fine, (size, size), mode="area")
        three = to_prob_map(torch.from_numpy(draw_masks(batch, size, num_classes=3)), 3)
        return [
            *calls,
            NetworkCall(setup, "binary, resized by area", resized, *ways[0]),
            NetworkCall(setup, "three classes", three, *ways[0]),
        ]

    def modulation_row(self, call: NetworkCall, end: float) -> Row:
        """The three modulations of one call."""
        machine = replace(self.machine, precision=call.precision)
        y = call.y.to(machine.device)
        model = call.setup.build(machine.device, num_classes=y.shape[1]).eval().requires_grad_(False)
        if machine.precision == "bf16":
            model.keep_weights_in(torch.bfloat16)
        if call.compiled:
            model.compile_blocks()
        with machine.autocast():
            own, shared = model.embed_mask(y), replace(model.embed_mask(y, share_rows=True), kept=None)
        image = MaskCondition(own.embedding[:, :1], own.detail)
        conditions = {"per token": own, "distinct rows": shared, "per image": image}
        runs = {name: partial(time_calls, model, condition, machine, len(y)) for name, condition in conditions.items()}
        times = interleave(runs, max(5, self.rounds), end, always=list(runs))
        tokens, flops = len(y) * model.pos_embed.shape[1], sit_flops(model, len(y))
        return {
            "setup": f"{call.setup.name}, one network call",
            "mode": f"{call.masks}, {call.precision}" + ", compiled" * call.compiled,
            "distinct_rows": tokens if shared.row_of_token is None else len(shared.embedding),
            "tokens": tokens,
            "seconds": spread(times["distinct rows"]),
            "per_token_takes": ratio(times["distinct rows"], times["per token"]),
            "per_image_takes": ratio(times["distinct rows"], times["per image"]),
            "modulation_flops_share": flops.modulation / flops.forward,
        }

    def scaling(self, end: float) -> list[Row]:
        """A training step with more images, and with more tokens per image."""
        base = self.preset.scaling
        unit = patch_size(base.model) * (LATENT_FACTOR if base.latents else 1)
        setups = {f"batch {n}": replace(base, batch=n) for n in self.preset.scaling_batches}
        setups |= {f"{n * n} tokens": replace(base, image_size=n * unit) for n in self.preset.scaling_sides}
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            benches = {
                name: TrainingBench(setup, self.machine, None if setup.latents else PixelSpace(), Path(folder) / name)
                for name, setup in setups.items()
            }
            runs = {name: partial(bench, self.ours) for name, bench in benches.items()}
            results = interleave(runs, self.rounds, end)
        for name, found in results.items():
            per_image = [one.seconds / setups[name].batch for one in found]
            rows.append(
                {
                    "setup": setups[name].name,
                    "mode": name,
                    "tokens": benches[name].model.pos_embed.shape[1],
                    "batch": setups[name].batch,
                    "seconds": spread([one.seconds for one in found]),
                    "seconds_per_image": spread(per_image),
                    "flops": found[0].flops,
                    "peak_memory_gib": max(one.memory_gib for one in found),
                }
            )
        free(self.machine)
        return rows

    def ranks(self, end: float) -> list[Row]:
        """The same batch per process with one and two processes, one thread (or GPU) each."""
        if self.machine.device.type == "cuda" and torch.cuda.device_count() < 2:
            self.notes.append("one GPU: the comparison of one and two ranks was left out")
            return []
        runs = {f"{n} rank{'s' * (n > 1)}": partial(self.run_ranks, n) for n in (1, 2)}
        times = interleave(runs, self.rounds, end)
        return [
            {
                "setup": f"{self.preset.scaling.name} per rank",
                "mode": name,
                "seconds": spread(found),
                "time_of_one_rank_over_this": ratio(found, times["1 rank"]),
            }
            for name, found in times.items()
        ]

    def run_ranks(self, count: int) -> float:
        """Seconds per step of so many processes."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "worker"
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            words += [str(Path(__file__)), "--worker", "--preset", self.args.preset, "--output", str(output)]
            words += ["--device", self.machine.device.type]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"a run with {count} processes failed:\n{result.stderr[-2000:]}")
            return json.loads(output.with_suffix(".json").read_text())


PARTS = {"modulation": 1, "training": 5, "sampling": 4, "scaling": 1, "ranks": 1}  # shares of the time


def rank_worker(args: argparse.Namespace, machine: Machine) -> None:
    """One rank: steps under DistributedDataParallel; rank 0 writes the seconds per step."""
    setup = replace(PRESETS[args.preset].scaling, steps=5)
    with tempfile.TemporaryDirectory() as folder:
        bench = TrainingBench(setup, machine, None if setup.latents else PixelSpace(), Path(folder))
        if machine.world_size > 1:
            device_ids = [machine.device.index] if machine.device.type == "cuda" else None
            bench.wrapped = DistributedDataParallel(bench.model, device_ids=device_ids, gradient_as_bucket_view=True)
        timing = bench(Mode(compiled=False))
    if machine.is_main:
        write_json(args.output.with_suffix(".json"), timing.seconds)


def time_calls(model: SiT, condition: MaskCondition, machine: Machine, batch: int) -> float:
    """Seconds of one network call."""
    device = machine.device
    height, width = (side * model.patch_size for side in model.grid)
    x = torch.randn(batch, model.in_channels, height, width, device=device)
    t = torch.full((batch,), 0.3, device=device)
    with machine.autocast():
        model(x, t, condition)
        synchronize(device)
        started = time.perf_counter()
        for _ in range(2):
            model(x, t, condition)
        synchronize(device)
    return (time.perf_counter() - started) / 2


def deadline_of(end: float, number: int, count: int) -> float:
    """Deadline of task ``number`` of ``count``, so that all tasks end in time."""
    now = time.monotonic()
    return now + max(0.0, end - now) / (count - number)


def free(machine: Machine) -> None:
    """Free the memory of the previous setup, including compiled code."""
    torch.compiler.reset()
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def main(args: argparse.Namespace) -> None:
    machine = start_machine(args.device, "auto")
    if args.worker:
        rank_worker(args, machine)
        stop_machine(machine)
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = 64  # one process times many modes; a command has one
    bench = Bench(args, machine)
    report: Row = {"run": provenance(args, machine), "notes": bench.notes, "parts": {}}
    end = time.monotonic() + 60 * bench.minutes
    for number, part in enumerate(args.parts):
        print(f"{part} ...", flush=True)
        now, left = time.monotonic(), sum(PARTS[name] for name in args.parts[number:])
        report["parts"][part] = getattr(bench, part)(now + max(0.0, end - now) * PARTS[part] / left)
        report["run"]["load_average_at_end"] = os.getloadavg()[0]
        write_json(args.output.with_suffix(".json"), report)
        write_atomically(args.output.with_suffix(".md"), lambda file: file.write(markdown(report).encode()))
        plot(report, args.output.with_suffix(".png"))
    print(markdown(report))
    print(f"{args.output}.json, .md, .png")


if __name__ == "__main__":
    run_command(main, parse_args)
