"""Presets of train.py: the flags of runs that have been measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Flags of a run that has been measured.

    Attributes:
        flags: as on a command line.
        record: file with the measurement.
        ratio: its Dice ratio, as the record writes it.
        needs: flags that the user adds.
    """

    flags: str
    record: str
    ratio: str
    needs: tuple[str, ...] = ()


PIXELS = "--vae none --model SiT-Ti/8 --crop random --lr 1e-3"
GRAY_WINDOW = "--in-channels 1 --window 0 99.8"
GRAY = f"{PIXELS} {GRAY_WINDOW}"
SMALL = f"{GRAY} --image-size 64 --global-batch-size 16 --cfg-scale 1"
NUCLEI = "benchmarks/reference_nuclei/README.md"
PRESETS = {
    "quickstart": Preset(f"{SMALL} --cooldown-steps 160 --max-steps 800", "benchmarks/grid.md", "0.981"),
    "nuclei-64-cpu": Preset(f"{SMALL} --cooldown-steps 840 --max-steps 4200", NUCLEI, "0.994"),
    "nuclei-128-cpu": Preset(
        f"{GRAY} --image-size 128 --global-batch-size 32 --cooldown-steps 700 --max-steps 2500 --cfg-scale 1",
        NUCLEI,
        "0.998",
        ("init_from",),
    ),
    "nuclei-256-gpu": Preset(
        f"--vae none --model SiT-S/8 --crop random --lr 5e-4 {GRAY_WINDOW} --image-size 256 --global-batch-size 32 "
        "--cooldown-steps 800 --max-steps 4300 --cfg-scale 1",
        NUCLEI,
        "1.005",
    ),
    "histology-64-cpu": Preset(
        f"{PIXELS} --in-channels 3 --image-size 64 --global-batch-size 32 --cooldown-steps 2000 --max-steps 10000",
        NUCLEI,
        "0.953",
    ),
}
