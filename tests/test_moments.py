"""One of two processes dies, stops or meets a full disk at each moment of a run (make test-slow).

Workers are forked, so that a launch takes no imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from script_helpers import PATIENCE, ROOT, train_arguments, write_pairs

from engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

# Each line of its input is a launch: what happens, where, to whom, how often torchrun restarts, and the flags.
LAUNCHES = """
import contextlib, errno, importlib, json, os, signal, subprocess, sys, time
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
import diffusers.models.autoencoders.autoencoder_kl
import train
from common import errors
from engine import peers

# Seconds in place of the minutes after which a silent process counts as gone.
peers.BEAT_SECONDS, peers.LOOK_SECONDS, peers.SILENT_SECONDS, errors.FIRST_RANK_SPEAKS_SECONDS = 0.5, 3, 12, 0.5


def happen(what):
    if what == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
    if what == "pause":
        subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "term":
        os.kill(os.getpid(), signal.SIGTERM)


def worker(name, what, place, victim, words):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a command of torchrun; torch raises an error in functions
    # What the processes say goes into a file of the launch.
    log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    if what and int(os.environ["RANK"]) == victim and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        module, _, path = place.partition(":")
        owner, names = importlib.import_module(module), path.split(".")
        for one in names[:-1]:
            owner = getattr(owner, one)
        before, calls = getattr(owner, names[-1]), []

        def instead(*values, **named):
            calls.append(1)
            if len(calls) == 2 or names[-1] != "train_step":
                happen(what)
            return before(*values, **named)

        setattr(owner, names[-1], instead)
    sys.argv = words
    with contextlib.suppress(SystemExit):
        errors.run_command(train.main, lambda: train.parse_args(words[1:]))
        return
    os._exit(1)


if __name__ == "__main__":
    for line in sys.stdin:
        name, what, place, victim, restarts, words = json.loads(line)
        begun = time.monotonic()
        config = LaunchConfig(
            1, 1, 2, run_id=os.path.basename(name), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            max_restarts=restarts, monitor_interval=0.05, start_method="fork",
        )
        try:
            elastic_launch(config, worker)(name, what, place, victim, words)
            code = 0
        except ChildFailedError:
            code = 1
        print(json.dumps([code, time.monotonic() - begun]), flush=True)
"""
# Where a process of a training is, and which one. The last step is the sixth; a checkpoint is made at each third.
MOMENTS = {
    "joins": ("train:start_machine", 1),
    "reads": ("train:PairedFolder", 0),
    "compares": ("train:agree_on_run", 1),
    "measures looks": ("train:set_looks", 1),
    "encodes": ("engine.latents:LatentPairs.encode", 1),
    "begins": ("engine.loop:take_steps", 0),
    "trains": ("engine.training:Training.train_step", 1),
    "saves": ("engine.run_folder:RunFolder.save", 0),
    "previews": ("engine.loop:save_preview", 0),
    "ends": ("engine.loop:export_weights", 0),
}
FLAGS = ["--max-steps", "6", "--log-every", "1", "--ckpt-every", "3", "--look", "reference"]


class Launches:
    """Runs of one tiny training, each with something that happens at a moment of it.

    Args:
        folder: for all files.
        autoencoder: folder of a tiny one.
    """

    def __init__(self, folder: Path, autoencoder: Path) -> None:
        self.folder, self.autoencoder = folder, autoencoder
        self.pairs = write_pairs(folder, size=(36, 40))
        script = folder / "launches.py"
        script.write_text(LAUNCHES)
        self.process = subprocess.Popen(
            [sys.executable, script], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(folder / "agents").open("w"), env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self.launch("whole")[0] == 0, (folder / "whole").read_text()

    def launch(self, name: str, what: str = "", moment: str = "joins", restarts: int = 0) -> tuple[int, float, str]:
        """A launch of two processes. Returns exit code, seconds, and what its processes said."""
        place, victim = MOMENTS[moment]
        words = train_arguments(*self.pairs, self.folder / "runs", name, 6)
        words += ["--vae", str(self.autoencoder), "--image-size", "32", "--model", "SiT-Ti/2", "--crop", "center"]
        words += ["--latent-cache", str(self.folder / "latents" / name), *FLAGS]
        assert self.process.stdin is not None and self.process.stdout is not None
        print(
            json.dumps([str(self.folder / name), what, place, victim, restarts, words]),
            file=self.process.stdin,
            flush=True,
        )
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        said = (self.folder / name).read_text()
        assert line, f"no end after {PATIENCE} s:\n{said}"
        code, seconds = json.loads(line)
        return code, seconds, said


@pytest.fixture(scope="module")
def launches(tmp_path_factory, autoencoder_folder) -> Iterator[Launches]:
    found = Launches(tmp_path_factory.mktemp("moments"), autoencoder_folder)
    yield found
    found.process.kill()


def assert_whole(folder: Path, name: str) -> None:
    """The run has the weights, EMA and losses of the one that nothing happened to, bit for bit."""
    runs = [folder / "runs" / one for one in ("whole", name)]
    one, other = (read_checkpoint(run / "checkpoints" / "0000006.pt") for run in runs)
    assert all(torch.equal(one[part][key], other[part][key]) for part in ("model", "ema") for key in one[part])
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    losses = [[(line["step"], line["train/loss"]) for line in text if "train/loss" in line] for text in lines]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_that_is_killed_loses_nothing(launches, moment):
    """As the system kills one if memory runs out."""
    code, _, said = launches.launch(f"kill {moment}", "kill", moment, restarts=1)
    assert code == 0, said
    assert_whole(launches.folder, f"kill {moment}")


@pytest.mark.parametrize("moment", ["encodes", "saves", "previews"])
def test_a_full_disk_at_one_process_ends_all_in_one_line(launches, moment):
    code, _, said = launches.launch(f"full disk {moment}", "full disk", moment)
    assert code != 0
    assert "a file: No space left on device. Free some space and run the same command again" in said
    assert "Traceback" not in said


def test_a_process_that_stands_still_for_a_while_is_waited_for(launches):
    code, seconds, said = launches.launch("pause", "pause", "trains")
    assert code == 0 and seconds > 4, said
    assert_whole(launches.folder, "pause")


def test_a_signal_to_one_process_saves_and_ends_all_and_the_restarted_ones_go_on(launches):
    code, _, said = launches.launch("term", "term", "trains", restarts=1)
    assert code == 0 and "leaving at step" in said and "continuing after step" in said
    assert_whole(launches.folder, "term")
