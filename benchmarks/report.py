"""Output of the benchmark: provenance, tables and a plot."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.machine import Machine, commit
from evaluation.output import new_figure, save_figure

Row = dict[str, Any]


def provenance(args: argparse.Namespace, machine: Machine) -> Row:
    """Command, versions and machine, for the record."""
    on_gpu = machine.device.type == "cuda"
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(machine.device) if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "load_average_at_start": os.getloadavg()[0],
        "weights": str(args.ckpt.name) if args.ckpt else "random",
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{value[0]:.3g} ({value[1]:.3g} to {value[2]:.3g})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(report: Row) -> str:
    """Provenance, notes, and a table per part; a triple is median (lowest to highest)."""
    lines = [f"- {name}: {value}" for name, value in report["run"].items()]
    lines += [f"- {note}" for note in report["notes"]]
    for part, rows in report["parts"].items():
        if not rows:
            continue
        columns = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in ("setup", "flops")]
        lines += ["", f"## {part}"]
        for setup in dict.fromkeys(row["setup"] for row in rows):
            cells = [[shown(row.get(name)) for name in columns] for row in rows if row["setup"] == setup]
            lines += ["", setup, "", *table([name.replace("_", " ") for name in columns], cells)]
    return "\n".join(lines) + "\n"


def plot(report: Row, path: Path) -> None:
    """Bars of the time that each mode takes beside ours, and the scaling of a training step."""
    compared = [row for part in ("training", "sampling") for row in report["parts"].get(part, [])]
    compared = [row for row in compared if row["slower_than_ours"]]
    setups = list(dict.fromkeys(row["setup"] for row in compared))
    scaling = report["parts"].get("scaling", [])
    panels = len(setups) + bool(scaling)
    if not panels:
        return
    figure = new_figure(9, 3.2 * panels)
    axes = figure.subplots(panels, 1, squeeze=False)
    for axis, setup in zip(axes[:, 0], setups, strict=False):
        rows = [row for row in reversed(compared) if row["setup"] == setup]
        middle, low, high = zip(*(row["slower_than_ours"] for row in rows), strict=True)
        below = [m - one for m, one in zip(middle, low, strict=True)]
        above = [one - m for m, one in zip(middle, high, strict=True)]
        axis.barh([row["mode"] for row in rows], middle, xerr=[below, above])
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=setup, xlabel="time beside ours")
    if scaling:
        axis = axes[-1, 0]
        for kind in ("batch", "tokens"):
            rows = [row for row in scaling if kind in row["mode"]]
            axis.plot([row[kind] for row in rows], [row["seconds"][0] for row in rows], marker="o", label=kind)
        axis.set(title="a training step", xscale="log", yscale="log", ylabel="seconds")
        axis.set_xlabel("images per batch, or tokens per image")
        axis.legend()
    save_figure(figure, path)
