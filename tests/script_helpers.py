"""Run the commands as a user does: in a process of their own, on the CPU, with tiny models and drawn cells."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from PIL import Image

from common.errors import run_command

ROOT = Path(__file__).parents[1]
# Seconds after which a process hangs. It takes seconds alone, and minutes if others use the machine.
PATIENCE = 900
TINY = ["--vae", "none", "--model", "SiT-Ti/8", "--image-size", "16", "--global-batch-size", "4", "--device", "cpu"]
TINY += ["--precision", "float32", "--warmup-steps", "2", "--lr", "1e-3"]

FEW_STEPS = ["--device", "cpu", "--precision", "float32", "--num-sampling-steps", "2", "--per-proc-batch-size", "4"]


def state(step: int) -> dict:
    """A checkpoint with nothing in it but a few numbers that tell the step."""
    space = {"vae": "none", "factor": 1, "channels": 3, "fingerprint": ""}
    config: dict[str, dict] = {"model": {}, "transport": {}, "space": space, "data": {"image_size": 16}}
    return {"model": {"w": torch.arange(6.0) + step}, "ema": {}, "opt": {}, "step": step, "config": config}


def write_pairs(folder: Path, count: int = 6, size: tuple[int, int] = (24, 20), seed: int = 0) -> tuple[Path, Path]:
    """Bright disks on dark ground, and their masks of 0 and 255; the folders of images and masks."""
    rng = np.random.default_rng(seed)
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    rows, columns = np.indices(size)
    for number in range(count):
        row, column = rng.integers(6, 14, 2)
        cell = (rows - row) ** 2 + (columns - column) ** 2 < rng.integers(9, 36)
        image = np.where(cell, 200, 40) + rng.normal(0, 5, size)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(images / f"cell_{number}.png")
        Image.fromarray((cell * 255).astype(np.uint8)).save(masks / f"cell_{number}.png")
    return images, masks


def run(
    *words: object, ranks: int = 1, check: bool = True, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run ``python SCRIPT ...``, or under torchrun with several ranks; one thread each."""
    script, *flags = (str(word) for word in words)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    result = subprocess.run(
        [*launcher, str(ROOT / script), *flags], env=environment, capture_output=True, text=True, timeout=timeout
    )
    if check and result.returncode:
        raise AssertionError(f"{script} {flags} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def exit_code(end: SystemExit) -> int:
    """The exit code of a command, which is always a number: Python would print anything else."""
    assert isinstance(end.code, int)
    return end.code


def call(command: ModuleType, *words: object) -> None:
    """A command in this process: seconds less than :func:`run`, which pays for the imports."""
    command.main(command.parse_args([str(word) for word in words]))


def run_here(command: ModuleType, *words: object) -> tuple[int, list[str]]:
    """Run a command inside this process, which saves seconds of imports.

    Returns:
        exit code, lines on stderr.
    """
    text = io.StringIO()
    argv = [f"{command.__name__}.py", *map(str, words)]
    with contextlib.redirect_stderr(text), mock.patch.object(sys, "argv", argv):
        try:
            run_command(command.main, command.parse_args)
            code = 0
        except SystemExit as end:
            code = exit_code(end)
        finally:
            logging.basicConfig(force=True, handlers=[logging.NullHandler()])  # closes the run's log file
    return code, text.getvalue().splitlines()


def train_arguments(images: Path, masks: Path, results: Path, name: str, steps: int) -> list[str]:
    """``train.py`` with a tiny model for so many steps."""
    arguments = ["train.py", "--data-path", images, "--mask-path", masks, "--results-dir", results, "--run-name", name]
    return [*map(str, arguments), *TINY, "--max-steps", str(steps), "--log-every", "2", "--sample-every", "1000"]
