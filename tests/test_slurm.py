"""The batch scripts of cluster/ under a Slurm of their own (make test-slow; needs root and slurm-wlm)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from script_helpers import FEW_STEPS, PATIENCE, ROOT, run, train_arguments, write_pairs

from engine.checkpoint import read_checkpoint

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed (apt-get install slurm-wlm munge): no {MISSING}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start Slurm"),
]
# One node with two devices that count as GPUs. It claims more cores than there are. A requeued job waits until the
# credential of its last start has expired: half a minute here, two minutes by default.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=30
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
MpiDefault=none
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def wait_until(met: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a user of the cluster. Its daemons end with the tests."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool", "tools"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    for number in range(2):
        os.mknod(folder / f"gpu{number}", 0o20600, os.makedev(1, 3))  # as /dev/null
    (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=free_ports()))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    for name, words in {"torchrun": "-m torch.distributed.run", "python": ""}.items():
        (folder / "tools" / name).write_text(f'#!/bin/bash\nexec {sys.executable} {words} "$@"\n')
        (folder / "tools" / name).chmod(0o755)
    path = f"{folder / 'tools'}:{os.environ['PATH']}:/usr/sbin"
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    environment["REQUEUE_AFTER_SECONDS"] = "0"
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    daemons = [
        ["munged", "--foreground", "--force", *(f"--{flag}={folder / 'munge' / name}" for flag, name in munge.items())],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    with contextlib.ExitStack() as left, (folder / "daemons.log").open("w") as log:
        for daemon_words in daemons:
            daemon = subprocess.Popen(daemon_words, env=environment, stdout=log, stderr=log)
            left.callback(daemon.wait, 60)
            left.callback(daemon.terminate)
            if daemon_words[0] == "munged":
                wait_until((folder / "munge" / "socket").exists, "munged does not start")

        def is_idle() -> bool:
            said = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
            return said.stdout.strip() == "idle"

        wait_until(is_idle, f"Slurm does not start: see {folder}/daemons.log")
        yield environment
        subprocess.run(["scancel", "--user", "root"], env=environment, check=True)
        wait_until(is_idle, "jobs do not end")


def slurm(cluster: dict[str, str], *words: object) -> str:
    done = subprocess.run(list(map(str, words)), env=cluster, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def state_of(cluster: dict[str, str], job: str) -> str:
    return slurm(cluster, "scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


def test_a_job_that_gets_its_warning_saves_is_requeued_and_ends_like_an_unbroken_one(pairs, cluster, tmp_path):
    """The warning before the time limit, sent to the steps by hand, because time limits are whole minutes."""
    words = train_arguments(*pairs, tmp_path, "cells", 120)[1:]
    flags = ["--gpus-per-node=2", "--cpus-per-task=4", f"--output={tmp_path}/job.out"]
    script = ["cluster/train.sbatch", *words, "--ckpt-every", 1000, "--num-workers", 1]
    job = slurm(cluster, "sbatch", "--parsable", *flags, *script).strip()
    run_folder, said = tmp_path / "cells", tmp_path / "job.out"
    wait_until(lambda: (run_folder / "metrics.jsonl").exists(), "the job does not start")
    slurm(cluster, "scancel", f"--signal={signal.SIGUSR1.name[3:]}", job)
    wait_until(lambda: state_of(cluster, job) == "PENDING", "the job is not requeued")
    (saved,) = (run_folder / "checkpoints").glob("*.pt")
    assert 0 < int(saved.stem) < 120 and f"leaving at step {int(saved.stem)}" in said.read_text()

    wait_until(lambda: state_of(cluster, job) in ("COMPLETED", "FAILED"), "the job does not end")
    assert state_of(cluster, job) == "COMPLETED", said.read_text()
    assert f"continuing after step {int(saved.stem)}" in said.read_text()
    run(*train_arguments(*pairs, tmp_path, "whole", 120), ranks=2)
    one, other = (read_checkpoint(tmp_path / name / "checkpoints/0000120.pt") for name in ("whole", "cells"))
    assert all(torch.equal(one[part][key], other[part][key]) for part in ("model", "ema") for key in one[part])


def test_an_array_makes_a_whole_set(pairs, cluster, tmp_path):
    run(*train_arguments(*pairs, tmp_path, "model", 2))
    words = ["ODE", "--ckpt", tmp_path / "model/checkpoints/0000002.pt", "--mask-path", pairs[1], *FEW_STEPS]
    flags = ["--gpus-per-node=1", "--cpus-per-task=2", "--array=4-6", f"--output={tmp_path}/%a.out", "--wait"]
    slurm(cluster, "sbatch", *flags, "cluster/sample.sbatch", *words, "--sample-dir", tmp_path / "set")
    assert len((tmp_path / "set" / "manifest.csv").read_text().splitlines()) == 7
