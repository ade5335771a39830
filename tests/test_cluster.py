"""The batch scripts of cluster/, run with stand-ins for Slurm's commands (make test-slow)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from script_helpers import FEW_STEPS, PATIENCE, ROOT, run, train_arguments, write_pairs

from engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """Environment of a job of one node and two processes. ``srun`` runs its command; ``scontrol`` notes a requeue."""
    tools = tmp_path / "tools"
    tools.mkdir()
    notes = tmp_path / "requeued"
    scripts = {
        "srun": f'while [[ $1 == --* ]]; do echo "$1" >> {tmp_path}/flags_of_srun; shift; done; exec "$@"',
        "scontrol": f'if [ "$1" = requeue ]; then echo "$2" >> {notes}; else echo localhost; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, line in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "2", "REQUEUE_AFTER_SECONDS": "0", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}"}


def processes_of(parent: int) -> list[int]:
    """Process ids of all descendants, as Slurm signals every process of a step."""
    found = subprocess.run(["pgrep", "--parent", str(parent)], capture_output=True, text=True, check=False).stdout
    children = [int(line) for line in found.split()]
    return [*children, *(below for child in children for below in processes_of(child))]


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def stopped_job(script: list[str], environment: dict[str, str], metrics: Path, number: signal.Signals) -> str:
    """Start a job, and send a signal to its processes when it has written a line of metrics. What it says.

    SIGUSR1 is the warning before the time limit, which the shell of the job does not get. SIGTERM ends a job for a more
    urgent one, with its shell.
    """
    before = lines_of(metrics)
    job = subprocess.Popen(script, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while lines_of(metrics) <= before:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    processes = processes_of(job.pid)
    for process in [job.pid, *processes] if number == signal.SIGTERM else processes:
        with contextlib.suppress(ProcessLookupError):  # torchrun was faster to end it
            os.kill(process, number)
    _, said = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0 and "leaving at step" in said and "Traceback" not in said.partition("leaving at")[0]
    deadline = time.monotonic() + 60
    while left := [process for process in processes if Path(f"/proc/{process}/stat").exists()]:
        assert time.monotonic() < deadline, f"{left} stay behind"
        time.sleep(0.1)
    return said


def test_a_job_that_is_stopped_saves_is_requeued_and_continues(pairs, slurm, tmp_path):
    """At its time limit, then for a more urgent job. Loader processes get the signals, too."""
    words = [str(word) for word in train_arguments(*pairs, tmp_path / "jobs", "cells", 120)[1:]]
    script = ["bash", "cluster/train.sbatch", *words, "--ckpt-every", "1000", "--num-workers", "1"]
    folder, requeued = tmp_path / "jobs" / "cells", tmp_path / "requeued"
    stopped_job(script, slurm, folder / "metrics.jsonl", signal.SIGUSR1)
    assert requeued.read_text() == "4711\n"
    (saved,) = (folder / "checkpoints").glob("*.pt")
    assert 0 < int(saved.stem) < 120

    said = stopped_job(script, slurm | {"SLURM_RESTART_COUNT": "1"}, folder / "metrics.jsonl", signal.SIGTERM)
    assert f"continuing after step {int(saved.stem)}" in said
    assert requeued.read_text() == "4711\n"
    newest = max(folder.glob("checkpoints/*.pt"))
    assert int(saved.stem) < int(newest.stem) < 120

    last = {**slurm, "SLURM_RESTART_COUNT": "2"}
    again = subprocess.run(script, cwd=ROOT, env=last, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert again.returncode == 0, again.stderr
    assert f"continuing after step {int(newest.stem)}" in again.stderr
    assert requeued.read_text() == "4711\n"
    run(*train_arguments(*pairs, tmp_path / "whole", "cells", 120), ranks=2)
    one, other = (read_checkpoint(tmp_path / name / "cells/checkpoints/0000120.pt") for name in ("whole", "jobs"))
    assert all(torch.equal(one[part][key], other[part][key]) for part in ("model", "ema") for key in one[part])


def test_a_job_that_fails_at_once_is_not_requeued(pairs, slurm, tmp_path):
    words = [str(word) for word in train_arguments(*pairs, tmp_path / "jobs", "cells", 60)[1:]]
    script = ["bash", "cluster/train.sbatch", *words, "--data-path", str(tmp_path / "absent")]
    job = {**slurm, "REQUEUE_AFTER_SECONDS": "600"}
    failed = subprocess.run(script, cwd=ROOT, env=job, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert failed.returncode != 0 and "absent" in failed.stderr
    assert not (tmp_path / "requeued").exists()


def test_a_job_is_not_requeued_without_end(slurm, tmp_path):
    """Such as a run whose weights blow up after each start."""
    (tmp_path / "tools" / "torchrun").write_text("#!/bin/bash\nexit 1\n")
    for restarts, requeues in (("0", 1), ("49", 2), ("50", 2)):
        job = slurm | {"SLURM_RESTART_COUNT": restarts}
        failed = subprocess.run(["bash", "cluster/train.sbatch"], cwd=ROOT, env=job, capture_output=True, text=True)
        assert failed.returncode == 1
        assert lines_of(tmp_path / "requeued") == requeues
    assert "not requeued: this job was restarted 50 times" in failed.stderr


def test_the_tasks_of_an_array_make_a_whole_set(pairs, slurm, tmp_path):
    run(*train_arguments(*pairs, tmp_path, "model", 2))
    words = ["ODE", "--ckpt", tmp_path / "model" / "checkpoints" / "0000002.pt", "--mask-path", pairs[1], *FEW_STEPS]
    for number in (8, 7, 9):
        array = {
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_MIN": "7",
            "SLURM_ARRAY_TASK_MAX": "9",
            "SLURM_ARRAY_TASK_COUNT": "3",
        }
        script = ["bash", "cluster/sample.sbatch", *map(str, words), "--sample-dir", str(tmp_path / "set")]
        assert not (tmp_path / "set" / "manifest.csv").exists()
        subprocess.run(script, cwd=ROOT, env=slurm | array, check=True, timeout=PATIENCE)
    assert len((tmp_path / "set" / "manifest.csv").read_text().splitlines()) == 7
    assert (tmp_path / "flags_of_srun").read_text().splitlines() == ["--cpus-per-task=3"] * 3


def test_an_array_with_gaps_is_refused(slurm):
    """Its tasks would make other parts than those that failed."""
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    job = slurm | array | {"SLURM_ARRAY_TASK_COUNT": "2"}
    script = ["bash", "cluster/sample.sbatch", "ODE"]
    refused = subprocess.run(script, cwd=ROOT, env=job, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "submit the whole range again" in refused.stderr
