"""Commands that another command starts, such as the trainings of ``evaluate.py practise``: they end together."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from common.errors import STOP_SIGNALS

SAVING_SECONDS = 60.0  # for a child to save what it has
LOOK_EVERY_SECONDS = 0.5


def run_child(
    command: Sequence[str | Path], seconds: float = math.inf, saving_seconds: float = SAVING_SECONDS,
    output: IO | None = None,
) -> int | None:  # fmt: skip
    """Run a command, for at most ``seconds``; its exit code, or None if the time was over.

    A signal that asks this process to stop asks the child as well. This process then waits until the child has saved,
    and lets the signal do what it did before. (``subprocess.run`` kills the child a quarter of a second after Ctrl-C,
    and leaves it alone after SIGTERM.) When the time is over, the child gets SIGTERM. A child that is still there after
    ``saving_seconds`` is killed. ``output`` takes what it prints.
    """
    asked: list[int] = []
    child: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        child = subprocess.Popen(command, stdout=output, stderr=output)
        for number in asked:  # while it started
            child.send_signal(number)
        code = _wait(child, seconds, lambda: bool(asked))
        if code is None:
            if not asked:
                child.terminate()
            if _wait(child, saving_seconds) is None:
                child.kill()
                child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        signal.raise_signal(asked[0])
    return code


def _wait(child: subprocess.Popen, seconds: float, stop: Callable[[], bool] = lambda: False) -> int | None:
    """Exit code of the child, or None if it is still there: the time is over, or it is asked to stop."""
    end = time.monotonic() + seconds
    while not stop() and (left := end - time.monotonic()) > 0:
        try:
            return child.wait(min(left, LOOK_EVERY_SECONDS))
        except subprocess.TimeoutExpired:
            continue
    return child.poll()
