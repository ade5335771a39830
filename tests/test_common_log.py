"""Lines of the log: times and rates."""

from __future__ import annotations

import common.log
from common.log import Pace, duration


def test_the_remaining_time_has_days():
    assert [duration(seconds) for seconds in (59.9, 3 * 3600 + 62, 86400, 2 * 86400 + 3661)] == [
        "00:00:59", "03:01:02", "1 day 00:00:00", "2 days 01:01:01",
    ]  # fmt: skip
    assert duration(float("inf")) == "unknown time"


def test_pace_gives_the_rate_and_the_time_that_the_rest_takes(monkeypatch):
    clock = iter([100.0, 110.0, 150.0])
    monkeypatch.setattr(common.log.time, "perf_counter", lambda: next(clock))
    pace = Pace(100, "steps")
    assert pace(20) == "2 steps/s, 00:00:40 left"
    assert pace(100) == "2 steps/s, 00:00:00 left"
