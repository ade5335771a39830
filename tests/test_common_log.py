"""Lines of the log: times and rates."""

from __future__ import annotations

import logging

import pytest

import common.log
from common.log import Pace, duration, with_progress


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


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (1000.0, 0)])
def test_long_work_says_how_far_it_is_where_there_is_no_terminal(monkeypatch, caplog, seconds, lines):
    monkeypatch.setattr(common.log, "LINE_SECONDS", seconds)
    caplog.set_level(logging.INFO)
    assert list(with_progress("abc", "converting", "image")) == ["a", "b", "c"]
    assert len(caplog.messages) == lines
    assert not lines or caplog.messages[1].startswith("converting: 2 of 3 images, ")
