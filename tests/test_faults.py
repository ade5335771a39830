"""Runs that are killed at random moments: nothing is lost, and they end like undisturbed runs (make test-slow)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from script_helpers import PATIENCE, ROOT, run, train_arguments, write_pairs

from engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
STEPS = 300
MOST_KILLS = 6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def start(*words: object, ranks: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    """The command in a session of its own, so that signals to the tests do not reach it."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher += [f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [*launcher, ROOT / str(words[0]), *map(str, words[1:])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_new_file(process: subprocess.Popen[str], seen: Path) -> None:
    """Until one file more matches ``seen``, or the process has ended. If neither comes, the test fails."""
    before, deadline = set(seen.parent.glob(seen.name)), time.monotonic() + PATIENCE
    while process.poll() is None and set(seen.parent.glob(seen.name)) <= before:
        assert time.monotonic() < deadline, f"no new {seen}"
        time.sleep(0.02)


def sample_unbroken(pairs: tuple[Path, Path], folder: Path, samples_per_mask: int) -> list[object]:
    """Train a model and draw a whole set in FOLDER/whole; the command, which lacks its --sample-dir only."""
    run(*train_arguments(*pairs, folder, "model", 2))
    checkpoint = folder / "model" / "checkpoints" / "0000002.pt"
    fixed = ["--device", "cpu", "--precision", "float32", "--per-proc-batch-size", 2, "--num-sampling-steps", 4]
    words = ["sample_ddp.py", "ODE", "--ckpt", checkpoint, "--mask-path", pairs[1]]
    words += ["--samples-per-mask", samples_per_mask, *fixed]
    run(*words, "--sample-dir", folder / "whole")
    return words


def descendants(pid: int) -> list[int]:
    """Processes that this one started, and those that they started. torchrun gives each rank a session of its own."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    children = [int(word) for word in found.stdout.split()]
    return [*children, *(one for child in children for one in descendants(child))]


def signal_all(process: subprocess.Popen[str], number: int) -> None:
    """Send a signal to a launch: to the launcher first, then to all its ranks and their loader processes."""
    for pid in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_until_done(words: list[object], seen: Path, number: int, ranks: int = 1) -> int:
    """Start, kill when a file matching ``seen`` is there and some random time has passed, and start again.

    Args:
        words: the command.
        seen: pattern of files that show that work has begun.
        number: signal to send.
        ranks: processes.

    Returns:
        How often it was killed before it ended by itself.
    """
    rng = random.Random(0)
    for kills in range(MOST_KILLS):
        process = start(*words, ranks=ranks)
        wait_for_new_file(process, seen)
        try:
            process.wait(rng.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            signal_all(process, number)
        process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            return kills
    run(*words, ranks=ranks)
    return MOST_KILLS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_killed_training_ends_with_the_weights_of_an_unbroken_run(pairs, tmp_path, number):
    fast = ["--ckpt-every", "20", "--log-every", "10"]
    run(*train_arguments(*pairs, tmp_path, "whole", STEPS), *fast)
    killed = [*train_arguments(*pairs, tmp_path, "killed", STEPS), *fast]
    assert kill_until_done(killed, tmp_path / "killed" / "checkpoints" / "*.pt", number) > 0
    one, other = (read_checkpoint(tmp_path / name / "checkpoints" / f"{STEPS:07d}.pt") for name in ("whole", "killed"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    whole, resumed = ([json.loads(line) for line in text] for text in lines)
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]  # no gap, no line twice
    assert [line.get("train/loss") for line in resumed] == [line.get("train/loss") for line in whole]


def test_a_signal_to_a_launch_reaches_its_ranks(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1], str(os.getpid())).touch()\ntime.sleep(3600)"
    )
    (tmp_path / "pids").mkdir()
    launch = start(tmp_path / "rank.py", tmp_path / "pids", ranks=2)
    deadline = time.monotonic() + PATIENCE
    while len(pids := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < 2:
        assert time.monotonic() < deadline and launch.poll() is None
        time.sleep(0.05)
    signal_all(launch, signal.SIGKILL)
    launch.communicate(timeout=PATIENCE)
    assert_gone(pids)  # the ranks sleep for minutes more


def assert_gone(pids: list[int], seconds: float = 60) -> None:
    """Every process ends soon."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if Path(f"/proc/{pid}/stat").exists()]:
        assert time.monotonic() < deadline, f"processes {left} stay behind"
        time.sleep(0.05)


def end_of_launch(launch: subprocess.Popen[str], seen: Path, *numbers: int, pause: float = 0.3) -> str:
    """Send signals to torchrun alone, one after the other, as soon as there is a new file. What the launch says."""
    wait_for_new_file(launch, seen)
    processes = descendants(launch.pid)
    for number in numbers:
        assert launch.poll() is None, launch.communicate()[1]
        launch.send_signal(number)
        time.sleep(pause)
    _, said = launch.communicate(timeout=PATIENCE)
    assert launch.returncode != 0
    assert_gone(processes)
    return said


def test_a_signal_to_torchrun_saves_and_leaves_no_process_behind(pairs, tmp_path):
    """Ctrl-C, Ctrl-C twice, SIGTERM, a closed terminal. Loader processes get the signals, too."""
    flags = ["--ckpt-every", "20", "--num-workers", "1"]
    words = [*train_arguments(*pairs, tmp_path, "stopped", 1000), *flags]
    checkpoints, last = tmp_path / "stopped" / "checkpoints" / "*.pt", 0
    for numbers in ([signal.SIGINT], [signal.SIGINT] * 2, [signal.SIGTERM], [signal.SIGHUP]):
        said = end_of_launch(start(*words, ranks=2), checkpoints, *numbers)
        assert "leaving at step" in said and "DataLoader" not in said, said
        assert f"continuing after step {last}" in said or not last
        saved = max(int(path.stem) for path in checkpoints.parent.glob("*.pt"))
        assert f"leaving at step {saved}" in said and saved > last
        last = saved
    last += 10
    run(*words, "--max-steps", last, ranks=2)
    run(*train_arguments(*pairs, tmp_path, "whole", last), *flags, ranks=2)
    one, other = (read_checkpoint(tmp_path / name / "checkpoints" / f"{last:07d}.pt") for name in ("whole", "stopped"))
    assert all(torch.equal(one[part][key], other[part][key]) for part in ("model", "ema") for key in one[part])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_sampling_goes_on_after_a_signal_to_torchrun(pairs, tmp_path, number):
    words = sample_unbroken(pairs, tmp_path, samples_per_mask=20)
    broken = tmp_path / "broken"
    said = end_of_launch(start(*words, "--sample-dir", broken, ranks=2), broken / "images" / "*.png", number)
    assert "a bug of ours" not in said, said
    run(*words, "--sample-dir", broken)
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "whole", broken)
    ]
    assert files[1] == files[0]


def test_killed_sampling_of_two_ranks_ends_with_the_bytes_of_an_unbroken_one(pairs, tmp_path):
    words = sample_unbroken(pairs, tmp_path, samples_per_mask=6)
    broken = tmp_path / "broken"
    assert kill_until_done([*words, "--sample-dir", broken], broken / "images" / "*.png", signal.SIGKILL, ranks=2) > 0
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.*") if p.is_file()} for f in (tmp_path / "whole", broken)
    ]
    assert files[1] == files[0]


def pid_of_rank(launcher: subprocess.Popen[str], rank: int) -> int | None:
    """The process that torchrun runs as this rank now, where it runs."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        try:
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                return int(pid)
        except OSError:  # it has ended meanwhile
            continue
    return None


def kill_rank(launcher: subprocess.Popen[str], rank: int, seen: Path, wait: float) -> bool:
    """Kill one rank so many seconds after another file matching ``seen`` is there; False where all ended before."""
    wait_for_new_file(launcher, seen)
    time.sleep(wait)
    pid = pid_of_rank(launcher, rank)
    if pid is None:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def test_sampling_goes_on_after_either_of_two_ranks_was_killed_at_random_moments(pairs, tmp_path):
    words = sample_unbroken(pairs, tmp_path, samples_per_mask=12)
    rng, kills, broken = random.Random(1), 0, tmp_path / "broken"
    for number in range(MOST_KILLS):
        launcher = start(*words, "--sample-dir", broken, ranks=2)
        kills += kill_rank(launcher, number % 2, broken / "images" / "*.png", rng.uniform(0, 0.3))
        launcher.communicate(timeout=PATIENCE)
        if launcher.returncode == 0:
            break
    run(*words, "--sample-dir", broken)
    print(f"{kills} kills of one rank of two")
    assert kills >= 2
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "whole", broken)
    ]
    assert files[1] == files[0]


def test_a_run_goes_on_in_its_folder_when_torchrun_restarts_its_ranks(pairs, tmp_path):
    often = ["--ckpt-every", "10", "--log-every", "7"]
    run(*train_arguments(*pairs, tmp_path / "whole", "run", 60), *often, ranks=2)
    killed = [*train_arguments(*pairs, tmp_path / "killed", "run", 60), *often]
    launcher = start(*killed, ranks=2, restarts=3)
    folder = tmp_path / "killed" / "run"
    assert kill_rank(launcher, 1, folder / "checkpoints" / "*.pt", 0.1)
    assert kill_rank(launcher, 0, folder / "checkpoints" / "*.pt", 0.2)
    _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0, said
    assert said.count("continuing after step") == 2
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [folder.name]
    runs = [tmp_path / "whole" / folder.name, folder]
    one, other = (read_checkpoint(run / "checkpoints" / "0000060.pt") for run in runs)
    assert all(torch.equal(one[part][key], other[part][key]) for part in ("model", "ema") for key in one[part])
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    wanted = ("step", "train/loss", "train/grad_norm")
    assert [[line.get(name) for name in wanted] for line in lines[1]] == [
        [line.get(name) for name in wanted] for line in lines[0]
    ]


def test_a_rank_says_an_error_that_it_alone_has(pairs, tmp_path):
    run(*train_arguments(*pairs, tmp_path, "model", 1))
    in_the_way = tmp_path / "set" / "images" / "cell_1.png"
    checkpoint = tmp_path / "model" / "checkpoints" / "0000001.pt"
    words = ["sample_ddp.py", "ODE", "--ckpt", checkpoint, "--mask-path", pairs[1], "--sample-dir", tmp_path / "set"]
    words += ["--num-sampling-steps", 1, "--device", "cpu"]
    run(*words)
    in_the_way.unlink()
    (in_the_way / "inside").mkdir(parents=True)
    failed = run(*words, ranks=2, check=False)
    assert failed.returncode != 0
    assert f"sample_ddp.py: error (process 1): {in_the_way}: Is a directory." in failed.stderr


def test_a_rank_that_dies_ends_the_others(pairs, tmp_path):
    """In words, unless torchrun ends the others first. The one traceback is torchrun's own, which names the culprit."""
    process = start(*train_arguments(*pairs, tmp_path, "two", 100_000), "--ckpt-every", "5", ranks=2)
    while not list((tmp_path / "two" / "checkpoints").glob("*.pt")) and process.poll() is None:
        time.sleep(0.05)
    os.kill(pid_of_rank(process, 1), signal.SIGKILL)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said  # torchrun names the one that died
    assert said.count("Traceback") == 1 and "ChildFailedError" in said.partition("Traceback")[2]
    last_words = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert all(
        re.fullmatch(r"train.py: process 0 on \S+ ends: process 1 on \S+ is gone.*", line) for line in last_words
    )
    assert time.monotonic() - begun < 60
