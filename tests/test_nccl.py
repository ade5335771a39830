"""Training over GPUs with NCCL, if two GPUs are there (make test-slow). It has not run yet: none were at hand."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from script_helpers import run, train_arguments, write_pairs
from test_faults import kill_rank, start

from engine.checkpoint import read_checkpoint

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"NCCL between processes needs two GPUs, and there are {GPUS}"),
]
NCCL = ["--device", "cuda", "--ckpt-every", "10"]
QUIET = ["--log-every", "1000"]  # nobody reads what it says until it ends


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines]


def test_two_gpus_train_twice_alike(pairs, tmp_path):
    """The same batches and noise; sums may have another order. A CPU is no reference: it draws other noise."""
    run(*train_arguments(*pairs, tmp_path, "gpus", 12), *NCCL, ranks=2)
    run(*train_arguments(*pairs, tmp_path, "again", 12), *NCCL, ranks=2)
    log = (tmp_path / "gpus" / "log.txt").read_text()
    assert "device: cuda" in log and "2 process(es)" in log
    assert losses(tmp_path / "gpus") == pytest.approx(losses(tmp_path / "again"), rel=1e-2)
    weights = read_checkpoint(tmp_path / "gpus" / "checkpoints" / "0000012.pt")["model"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_rank_that_dies_on_a_gpu_ends_the_other_in_minutes(pairs, tmp_path):
    launcher = start(*train_arguments(*pairs, tmp_path, "two", 1_000_000), *NCCL, *QUIET, ranks=2)
    assert kill_rank(launcher, 1, tmp_path / "two" / "checkpoints" / "*.pt", 0.1)
    begun = time.monotonic()
    _, said = launcher.communicate(timeout=180)
    assert launcher.returncode != 0 and "Signal 9 (SIGKILL)" in said
    assert time.monotonic() - begun < 120


def test_torchrun_restarts_ranks_on_gpus_and_they_continue(pairs, tmp_path):
    """NCCL's unique id goes through the store that torchrun keeps from the attempt before."""
    launcher = start(*train_arguments(*pairs, tmp_path, "two", 1_000_000), *NCCL, *QUIET, ranks=2, restarts=2)
    checkpoints = tmp_path / "two" / "checkpoints" / "*.pt"
    assert kill_rank(launcher, 1, checkpoints, 0.1)
    assert kill_rank(launcher, 0, checkpoints, 0.2)  # a new checkpoint: the restarted ranks train
    deadline = time.monotonic() + 180
    newest = max(checkpoints.parent.glob("*.pt"))
    while max(checkpoints.parent.glob("*.pt")) <= newest:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(launcher.pid, signal.SIGTERM)
    _, said = launcher.communicate(timeout=180)
    assert said.count("continuing after step") == 2 and "leaving at step" in said
