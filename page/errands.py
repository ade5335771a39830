"""Requests that are worked on: whether a browser still waits for them, and how far they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Cancelled(Exception):
    """Nobody waits for this request any more."""


class Errand:
    """One request.

    Args:
        gone: whether nobody waits any more.
    """

    def __init__(self, gone: Callable[[], bool]) -> None:
        self.gone = gone
        self.share = 0.0
        self.begun: float | None = None  # time.monotonic() when its turn came
        self._runs, self._run, self._latest = 1, 0, 0.0

    def begin(self) -> None:
        """Its turn has come."""
        self.begun = time.monotonic()

    def expect(self, runs: int) -> None:
        """The work has so many runs of about the same length."""
        self._runs, self._run, self._latest = runs, 0, 0.0

    def reach(self, share: float) -> None:
        """Note that this share of a run is done. A share below the latest one begins the next run.

        Raises:
            Cancelled: nobody waits.
        """
        if self.gone():
            raise Cancelled
        self._run += share < self._latest
        self._latest = share
        self.share = min(1.0, (self._run + share) / self._runs)


class Errands:
    """The requests that run or wait, by the ticket that their browser chose."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errands: dict[str, Errand] = {}

    @contextmanager
    def under(self, ticket: str, errand: Errand) -> Iterator[Errand]:
        """Known by its ticket inside the block. An empty ticket is known to nobody."""
        with self._lock:
            if ticket:
                self._errands.pop(ticket, None)
                self._errands[ticket] = errand
        try:
            yield errand
        finally:
            with self._lock:
                if self._errands.get(ticket) is errand:
                    del self._errands[ticket]

    def progress(self, ticket: str) -> dict[str, Any]:
        """State of a request: ``running`` with its share and seconds, ``waiting``, or ``unknown``."""
        with self._lock:
            errand = self._errands.get(ticket)
        if errand is None:
            return {"state": "unknown"}
        if errand.begun is None:
            return {"state": "waiting"}
        return {"state": "running", "share": errand.share, "seconds": time.monotonic() - errand.begun}
