"""Requests that wait or run: whether a browser still waits for them, and how far they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Cancelled(Exception):
    """Nobody waits for this request any more."""


class Task:
    """The work for one request. It consists of runs of about the same length, such as runs of the solver.

    Args:
        is_abandoned: returns whether nobody waits for the request any more.
    """

    def __init__(self, is_abandoned: Callable[[], bool]) -> None:
        self.is_abandoned = is_abandoned
        self.share = 0.0  # of the work that is done, 0..1
        self.begun: float | None = None  # time.monotonic() when its turn came
        self.expect(1)

    def begin(self) -> None:
        """Its turn has come."""
        self.begun = time.monotonic()

    def expect(self, runs: int) -> None:
        """The work takes this number of runs."""
        self._runs, self._runs_done, self._share_of_run = runs, 0, 0.0

    def reach(self, share: float) -> None:
        """Note that this share of the present run is done. A smaller share than before begins the next run.

        Raises:
            Cancelled: nobody waits.
        """
        if self.is_abandoned():
            raise Cancelled
        self._runs_done += share < self._share_of_run
        self._share_of_run = share
        self.share = min(1.0, (self._runs_done + share) / self._runs)


class Tasks:
    """The tasks that wait or run, by the ticket that their browser chose."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, Task] = {}

    @contextmanager
    def known_by(self, ticket: str, task: Task) -> Iterator[None]:
        """Answer questions about this ticket inside the block. An empty ticket is known to nobody."""
        with self._lock:
            if ticket:
                self._tasks[ticket] = task
        try:
            yield
        finally:
            with self._lock:
                if self._tasks.get(ticket) is task:
                    del self._tasks[ticket]

    def progress(self, ticket: str) -> dict[str, Any]:
        """State of a task: ``running`` with its share and seconds, ``waiting``, or ``unknown``."""
        with self._lock:
            task = self._tasks.get(ticket)
        if task is None:
            return {"state": "unknown"}
        if task.begun is None:
            return {"state": "waiting"}
        return {"state": "running", "share": task.share, "seconds": time.monotonic() - task.begun}
