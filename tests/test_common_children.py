"""Commands that a command starts: they are asked to stop with it, and may save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.children import run_child
from common.errors import STOP_SIGNALS

ROOT = Path(__file__).resolve().parents[1]
# a command that takes a second to save when it is asked to stop
SAVES = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def save(number, frame):
    time.sleep(1)
    (folder / "saved").write_text(str(number))
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, save)
(folder / "ready").touch()
time.sleep(60)
"""
PARENT = """
import sys
from common.children import run_child
run_child([sys.executable, *sys.argv[1:]])
print("went on", flush=True)
"""


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def saving(tmp_path) -> Path:
    (tmp_path / "saves.py").write_text(SAVES)
    return tmp_path / "saves.py"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_parent_lets_the_child_save_and_then_ends_both(number, saving, tmp_path):
    words = [sys.executable, "-c", PARENT, saving, tmp_path]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        wait_for(tmp_path / "ready")
        parent.send_signal(number)
        printed, _ = parent.communicate(timeout=60)
    assert (tmp_path / "saved").read_text() == str(int(number))
    assert parent.returncode == -number and printed == b""


def test_ctrl_c_in_a_terminal_reaches_both_and_the_child_saves(saving, tmp_path):
    words = [sys.executable, "-c", PARENT, saving, tmp_path]
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as parent:
        wait_for(tmp_path / "ready")
        os.killpg(parent.pid, signal.SIGINT)
        parent.wait(60)
    assert (tmp_path / "saved").exists() and parent.returncode == -signal.SIGINT


def test_a_child_whose_time_is_over_may_save(saving, tmp_path):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    assert run_child([sys.executable, saving, tmp_path], 5) is None
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_a_child_that_does_not_end_is_killed(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    assert run_child([sys.executable, "-c", deaf], 3, 0.5) is None
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_and_output_of_a_child(code, tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        assert run_child([sys.executable, "-c", f"print('said'); raise SystemExit({code})"], output=log) == code
    assert (tmp_path / "log.txt").read_text() == "said\n"
