"""Time several ways in turn, round after round, and compare them within each round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.report import Row
from benchmarks.workloads import Mode, Setup, Timing


def interleave(
    runs: Mapping[str, Callable[[], Any]], rounds: int, deadline: float, always: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Call every run in turn, in every round, until the deadline. Returns the results of each run.

    The runs named by ``always`` run at least once. Others are left out if the first round has no time for them. A run
    that does not fit the memory is left out.
    """
    results: dict[str, list[Any]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            late = time.monotonic() > deadline and any(results.values())
            if name not in results or (late and (number or name not in always)):
                continue
            try:
                results[name].append(run())
            except torch.OutOfMemoryError:
                print(f"  {name}: out of memory")
                del results[name]
                torch.cuda.empty_cache()
    return {name: found for name, found in results.items() if found}


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def ratio(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """By which factor the others are longer than the times, round by round: median, lowest, highest."""
    return spread([other / one for one, other in zip(times, others, strict=False)])


def mode_rows(
    results: dict[str, list[Timing]], setup: Setup, rates: dict[str, list[float]], modes: dict[str, Mode]
) -> list[Row]:
    """One row per mode, compared with ours and with the baseline."""
    seconds = {name: [one.seconds for one in found] for name, found in results.items()}
    rows = []
    for name, found in results.items():
        mode = modes[name]
        rate = statistics.median(rates["bf16" if mode.bf16 else "float32"])
        row = {
            "setup": setup.name,
            "mode": name,
            "seconds": spread(seconds[name]),
            "images_per_second": setup.batch / statistics.median(seconds[name]),
            "slower_than_ours": ratio(seconds["ours"], seconds[name]) if "ours" in seconds else None,
            "faster_than_as_sit": ratio(seconds[name], seconds["as-sit"]) if "as-sit" in seconds else None,
            "utilisation": found[0].flops / statistics.median(seconds[name]) / rate,
            "waiting_share": statistics.median([one.waiting for one in found]),
            "peak_memory_gib": max(one.memory_gib for one in found),
            "network_calls": found[0].calls,
            "seconds_per_call": statistics.median(seconds[name]) / max(1, found[0].calls),
            "flops": found[0].flops,
        }
        rows.append(row)
    if "one condition per image" in seconds and "ours" in seconds:
        factor, _, _ = ratio(seconds["one condition per image"], seconds["ours"])
        rows[0]["modulation_share"] = 1 - 1 / factor
    return rows
