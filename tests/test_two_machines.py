"""Several machines: training and sampling over two, and what happens if one of them dies (make test-slow, as root)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from script_helpers import FEW_STEPS, ROOT, call, run, train_arguments, write_pairs
from test_faults import kill_rank, wait_for_new_file
from two_machines import DEVICE, MAY_RETURN, Node, end_of, said_by, two_machines, wait_until_said, why_not

import sample_ddp
from engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
OFTEN = ["--ckpt-every", "5", "--log-every", "7"]
# train.py with seconds in place of the minutes after which a silent machine counts as lost.
IMPATIENT = """
import datetime, train
from engine import machine, peers
machine.EXCHANGE_TIMEOUT = datetime.timedelta(seconds=8)
peers.SILENT_SECONDS, peers.ANSWER_SECONDS, peers.LOOK_SECONDS = 8, 6, 5
train.run()
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Sequence[Node]]:
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "machines").mkdir()
    with two_machines(tmp_path / "machines") as both:
        yield both


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    """Weights, EMA and losses, bit for bit."""
    states = [read_checkpoint(run / "checkpoints" / f"{step:07d}.pt") for run in (one, other)]
    for part in ("model", "ema"):
        assert all(torch.equal(states[0][part][key], states[1][part][key]) for key in states[0][part])
    wanted = ("step", "train/loss", "train/grad_norm")
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    whole, broken = (
        {line["step"]: [line[name] for name in wanted] for line in text if "train/loss" in line} for text in lines
    )
    assert {number: whole[number] for number in broken if number in whole} == {
        number: broken[number] for number in broken if number in whole
    }


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_over_two_machines_outlives_a_process_and_a_machine_and_goes_on_on_one(nodes, pairs, tmp_path):
    """With the weights of a run that was never disturbed, on one machine."""
    first, second = nodes
    run(*train_arguments(*pairs, tmp_path / "whole", "run", 49), *OFTEN, ranks=2)
    folder = tmp_path / "shared" / "run"
    words = [*train_arguments(*pairs, tmp_path / "shared", "run", 42), *OFTEN]
    one, other = (node.launch(*words, restarts=4, **MAY_RETURN) for node in nodes)
    checkpoints = folder / "checkpoints" / "*.pt"
    assert kill_rank(other, 1, checkpoints, 0.1), said_by(other)
    wait_until_said(one, "continuing after step")
    wait_for_new_file(one, checkpoints)
    second.kill()
    assert other.wait(10) != 0
    time.sleep(1)
    other = second.launch(*words, restarts=4, **MAY_RETURN)
    for process in (one, other):
        code, said = end_of(process)
        assert code == 0, said
    assert said_by(one).count("continuing after step") == 2
    assert "process 1 on nodeb" in said_by(one)  # who was lost, in the log of the other machine

    run(*train_arguments(*pairs, tmp_path / "shared", "run", 49), *OFTEN, ranks=2)
    assert_equal_runs(tmp_path / "whole" / "run", folder, 49)


def test_a_run_goes_on_with_fewer_machines_and_takes_a_returning_one_in(nodes, pairs, tmp_path):
    """``--nnodes=1:2``: other numbers of processes see the same batches; the weights are equal in distribution only."""
    first, second = nodes
    words = [*train_arguments(*pairs, tmp_path, "run", 100_000), "--ckpt-every", "5"]
    one, other = (node.launch(*words, nodes="1:2", restarts=4, **MAY_RETURN) for node in nodes)
    wait_for_new_file(one, tmp_path / "run" / "checkpoints" / "*.pt")
    second.kill()
    assert other.wait(10) != 0
    wait_until_said(one, "changed on resume: world_size: 2 -> 1")
    wait_for_new_file(one, tmp_path / "run" / "checkpoints" / "*.pt")
    other = second.launch(*words, nodes="1:2", restarts=4, **MAY_RETURN)
    wait_until_said(one, "changed on resume: world_size: 1 -> 2")
    wait_for_new_file(one, tmp_path / "run" / "checkpoints" / "*.pt")
    for process in (one, other):
        os.kill(process.pid, signal.SIGTERM)
    for process in (one, other):
        _, said = end_of(process)
        assert "leaving at step" in said or process is other
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and set(range(2, steps[-1] + 1, 2)) <= set(steps)


def test_after_a_restart_the_death_of_the_first_machine_ends_the_other_and_one_machine_continues(
    nodes, pairs, tmp_path
):
    first, second = nodes
    words = [*train_arguments(*pairs, tmp_path, "run", 100_000), "--ckpt-every", "5"]
    one, other = (node.launch(*words, restarts=2) for node in nodes)
    assert kill_rank(other, 1, tmp_path / "run" / "checkpoints" / "*.pt", 0.1)
    wait_until_said(one, "continuing after step")  # a restart of processes needs no variable of torchrun
    wait_for_new_file(one, tmp_path / "run" / "checkpoints" / "*.pt")
    first.kill()
    begun = time.monotonic()
    assert one.wait(10) != 0
    code, said = end_of(other, 120)
    # torchrun has lost its store. It ends its process, which may not come to its own line.
    assert code != 0 and ("train.py: process 1 on nodeb ends: " in said or "RendezvousConnectionError" in said)
    while second.processes():
        assert time.monotonic() - begun < 120, "a process stays behind"
        time.sleep(0.1)
    newest = max(int(path.stem) for path in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    said = second.run(*train_arguments(*pairs, tmp_path, "run", newest + 3))
    assert f"continuing after step {newest}" in said and "world_size: 2 -> 1" in said


def test_a_machine_that_falls_silent_ends_all_processes_in_words(nodes, pairs, tmp_path):
    """Its network device goes down, and every connection stays open: no packet says that the other one is gone."""
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    words = [script, *train_arguments(*pairs, tmp_path, "run", 100_000)[1:], "--ckpt-every", "5"]
    one, other = (node.launch(*words, PYTHONPATH=str(ROOT)) for node in nodes)
    wait_for_new_file(one, tmp_path / "run" / "checkpoints" / "*.pt")
    nodes[1].do("link", "set", DEVICE, "down")
    wait_until_said(one, "process 0 on nodea ends: process 1 on nodeb is gone without a word", seconds=60)
    wait_until_said(other, "process 1 on nodeb ends: the launch has ended, or its network is down", seconds=60)
    assert end_of(one, 60)[0] != 0  # torchrun on the other machine waits until the system closes its connection
    commands = [command for node in nodes for command in node.commands()]
    assert not [command for command in commands if "impatient.py" in command and "torch.distributed.run" not in command]
    assert list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_results_folders_that_are_not_shared_are_refused_before_the_first_step(nodes, pairs, tmp_path):
    """One machine would go on from the checkpoint, and the other begin anew."""
    first, _ = nodes
    words = train_arguments(*pairs, first.local / "results", "run", 4)
    first.run(*train_arguments(*pairs, first.local / "results", "run", 2))
    both = [node.launch(*words) for node in nodes]
    said = [end_of(process) for process in both]
    assert all(code != 0 for code, _ in said)
    assert "checkpoint to continue from: process 0 on nodea has 0000002.pt" in said[0][1]
    assert "put it on a disk that all machines share" in said[0][1]
    assert [path.name for path in (first.disk / "results" / "run" / "checkpoints").iterdir()] == ["0000002.pt"]


def test_different_flags_on_two_machines_are_refused_before_the_first_step(nodes, pairs, tmp_path):
    words = train_arguments(*pairs, tmp_path / "results", "run", 4)
    both = [node.launch(*words, "--lr", f"0.00{node.number + 1}") for node in nodes]
    said = [end_of(process) for process in both]
    assert all(code != 0 for code, _ in said)
    assert "--lr: process 0 on nodea has 0.001, process 1 on nodeb has 0.002" in said[0][1]
    assert not list((tmp_path / "results").glob("run/checkpoints/*.pt"))


def test_the_name_of_a_machine_that_is_a_loopback_address_ends_in_words(nodes, pairs, tmp_path):
    """Without GLOO_SOCKET_IFNAME, each machine tells the others the address of its own name, as /etc/hosts has it."""
    words = train_arguments(*pairs, tmp_path, "run", 2)
    both = [node.launch(*words, GLOO_SOCKET_IFNAME="") for node in nodes]
    said = [end_of(process) for process in both]
    assert all(code != 0 for code, _ in said)
    assert any("GLOO_SOCKET_IFNAME" in text for _, text in said), said


def test_two_machines_make_the_set_of_one(nodes, pairs, tmp_path):
    run(*train_arguments(*pairs, tmp_path, "model", 2))
    words = ["sample_ddp.py", "ODE", "--ckpt", tmp_path / "model/checkpoints/0000002.pt", "--mask-path", pairs[1]]
    words += [*FEW_STEPS, "--samples-per-mask", "3"]
    call(sample_ddp, *words[1:], "--sample-dir", tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")

    shared = [node.launch(*words, "--sample-dir", tmp_path / "shared") for node in nodes]
    for process in shared:
        code, said = end_of(process)
        assert code == 0, said
    assert files_of(tmp_path / "shared") == wanted

    local = nodes[0].local / "set"
    refused = [end_of(process) for process in [node.launch(*words, "--sample-dir", local) for node in nodes]]
    assert all(code != 0 for code, _ in refused)
    assert "--sample-dir: put it on a disk that all machines share, or start each machine" in refused[0][1]

    local = nodes[0].local / "parts"
    for node in nodes:
        node.run(*words, "--sample-dir", local, "--shard", f"{node.number + 1}/2")
        parts = node.disk / "parts"
        assert not (parts / "manifest.csv").exists() and len(list((parts / "images").iterdir())) == 9
        shutil.copytree(parts, tmp_path / "joined", dirs_exist_ok=True)
    call(sample_ddp, *words[1:], "--sample-dir", tmp_path / "joined")
    made = files_of(tmp_path / "joined")
    assert {path: made.get(path) for path in wanted} == wanted


def test_nothing_of_the_machines_stays_behind(nodes, tmp_path):
    first, _ = nodes
    process = first.start("sleep", "300")
    first.kill()
    assert process.wait(10) == -signal.SIGKILL
    pinged = subprocess.run(
        ["ip", "netns", "exec", first.namespace, "bash", "-c", f"exec 3<>/dev/tcp/{nodes[1].address}/1"],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    assert "refused" in pinged.stderr  # it is reached, and nobody listens
