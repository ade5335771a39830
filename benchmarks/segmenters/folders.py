"""Images and instance labels for other segmenters. Runs in their environments: numpy and Pillow only."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

WINDOW = (0, 99.8)  # percentiles of a whole gray image, between which training sets are stretched


def parser_of(what: str) -> argparse.ArgumentParser:
    """TRAINING_SET, TEST_FOLDER, OUTPUT and the budget."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("train", type=Path, help="folder with images and instances")
    parser.add_argument("test", type=Path, help="the same of test images")
    parser.add_argument("output", type=Path, help="predictions go to OUTPUT/predicted")
    parser.add_argument("--steps", type=int, default=2000, help="batches of 8")
    parser.add_argument("--seed", type=int, default=0, help="of numpy and of the framework")
    add_stretch(parser)
    return parser


def add_stretch(parser: argparse.ArgumentParser) -> None:
    """The flag that says how images without a training set's stretching are read."""
    what = "take gray values as they are, as make_sets.py --no-stretch does (colour images)"
    parser.add_argument("--no-stretch", dest="stretch", action="store_false", help=what)


def unit_gray(image: np.ndarray, stretch: bool) -> np.ndarray:
    """An image (H, W, 3) uint8 as float32: black 0, white 1. Stretched: its percentiles WINDOW become 0 and 1."""
    low, high = np.percentile(image, WINDOW) if stretch else (0.0, 255.0)
    return ((image - low) / max(high - low, 1)).astype(np.float32)


def read_folder(folder: Path) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names, RGB images (H, W, 3) uint8, and instance maps (H, W) int32."""
    paths = sorted((folder / "images").iterdir())
    images = [np.array(Image.open(path).convert("RGB")) for path in paths]
    labels = [np.array(Image.open(folder / "instances" / f"{path.stem}.png")).astype(np.int32) for path in paths]
    return [path.stem for path in paths], images, labels


def half_real(names: list[str]) -> np.ndarray:
    """Probability of each training image: real and synthetic images are drawn equally often."""
    is_real = np.array([name.startswith("real_") for name in names])
    weights = np.where(is_real, 1 / max(1, is_real.sum()), 1 / max(1, (~is_real).sum()))
    return weights / weights.sum()


def write_prediction(output: Path, name: str, cells: np.ndarray) -> None:
    """An instance map as 16-bit PNG in OUTPUT/predicted."""
    folder = output / "predicted"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(cells.astype(np.uint16)).save(folder / f"{name}.png")
