"""What evaluate.py has written about a set, as numbers of a table."""

from __future__ import annotations

import json
from pathlib import Path

COLUMNS = (
    "grid",
    "grain",
    "Dice of the judge",
    "AP 0.5",
    "Dice of the threshold",
    "mean",
    "standard deviation",
    "distance",
)


def read_measures(samples: Path) -> dict[str, float]:
    """The columns. Dice, AP, mean and standard deviation are synthetic over real."""
    found = {
        name: json.loads((samples / "evaluation" / f"{name}.json").read_text())
        for name in ("grid", "threshold", "fidelity", "realism")
    }
    synthetic, real = found["fidelity"]["synthetic"], found["fidelity"]["real"]
    distances = found["realism"]["distances"][0]["synthetic"]
    values = (
        found["grid"]["grid_synthetic"],
        found["grid"]["grain_ratio"],
        synthetic["dice"] / real["dice"],
        synthetic["ap"]["0.5"] / real["ap"]["0.5"],
        found["threshold"]["dice_ratio"],
        1 + found["threshold"]["mean_difference"],
        1 + found["threshold"]["std_difference"],
        sum(distances) / len(distances),
    )
    return dict(zip(COLUMNS, values, strict=True))
