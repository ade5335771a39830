"""Launches of several processes through torchrun's own agent: restarts, signals, machines (make test-slow)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from script_helpers import PATIENCE, ROOT

pytestmark = pytest.mark.slow

# Workers are forked, so that a restart takes no imports. Each attempt but the last one kills a worker, and one is late.
RESTARTS = """
import os, random, sys, threading, time
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from engine.machine import start_machine

MOMENTS = ("before", "during", "after", "exchange", "wait")


def worker(restarts):
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rng = random.Random(attempt)  # the same on both ranks
    moment, victim, late, seconds = rng.choice(MOMENTS), rng.randrange(2), rng.randrange(2), rng.choice((0, 0.1, 0.5))
    dies = attempt < restarts and rank == victim
    if attempt and rank == late:
        time.sleep(seconds)
    if dies and moment == "before":
        os._exit(1)
    if dies and moment == "during":
        threading.Timer(0.03, os._exit, [1]).start()
    machine = start_machine("cpu", "float32")
    if dies and moment == "after":
        os._exit(1)
    machine.any_rank(False)
    if dies and moment in ("exchange", "wait"):
        time.sleep(0.1)
        os._exit(1)
    if moment == "exchange":
        machine.any_rank(False)
    machine.barrier("meet")
    if attempt == restarts:
        print("done", rank, flush=True)
    time.sleep(20 if attempt < restarts else 0)


if __name__ == "__main__":
    restarts = int(sys.argv[1])
    config = LaunchConfig(
        1, 1, 2, run_id="restarts", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
        monitor_interval=0.05, start_method="fork",
    )
    elastic_launch(config, worker)(restarts)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_a_launch_goes_on_after_every_restart_whoever_dies_whenever_and_whoever_is_late(tmp_path: Path):
    """torchrun keeps the addresses of dead processes: without a fresh start, about half of the restarts fail."""
    (tmp_path / "restarts.py").write_text(RESTARTS)
    words = [sys.executable, str(tmp_path / "restarts.py"), "50"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n")) == ["", "done 0", "done 1"]
