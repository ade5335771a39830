"""What a model learns of looks: images without labels, in their own look, follow their masks (make test-slow)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from drawn_sets import disk, place
from PIL import Image
from script_helpers import run_here

import sample_ddp
import train
from evaluation.instances import dice
from evaluation.threshold import thresholded, to_gray

SIDE = 48


def draw_field(rng: np.random.Generator, cell: float, background: float) -> tuple[np.ndarray, np.ndarray]:
    """Image (SIDE, SIDE) uint8 with three disks, and its mask bool. Brightness differs from image to image."""
    mask = np.zeros((SIDE, SIDE), bool)
    for _ in range(3):
        mask |= disk(SIDE, *place(rng, 6, SIDE - 6), rng.uniform(5, 8))
    image = np.where(mask, cell, background) + rng.normal(0, 10) + rng.normal(0, 6, mask.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def write_look(folder: Path, count: int, cell: float, background: float, seed: int) -> None:
    """images/, masks/ and soft/ (probabilities that a threshold guesses) of one look."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks", "soft"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        image, mask = draw_field(rng, cell, background)
        guess = thresholded(image / 255, cell > background)
        name = f"{folder.name}_{number:02d}.png"
        Image.fromarray(image).save(folder / "images" / name)
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / "masks" / name)
        Image.fromarray(np.where(guess, 230, 25).astype(np.uint8)).save(folder / "soft" / name)


@pytest.mark.slow
def test_images_in_a_look_without_labels_follow_their_masks(tmp_path):
    """Labels of bright cells on dark; dark cells on bright have pseudo-masks that a threshold guessed.

    Without pseudo-masks the cells stay bright (benchmarks/looks.md).
    """
    write_look(tmp_path / "labelled", 40, 190, 50, seed=0)
    write_look(tmp_path / "others", 40, 60, 200, seed=1)
    write_look(tmp_path / "new", 20, 190, 50, seed=2)
    words = ["--data-path", tmp_path / "labelled/images", "--mask-path", tmp_path / "labelled/masks", "--vae", "none"]
    words += ["--in-channels", 1, "--model", "SiT-Ti/8", "--image-size", 32, "--crop", "random", "--max-steps", 500]
    words += ["--global-batch-size", 16, "--lr", 2e-3, "--cooldown-steps", 200, "--ema-decay", 0.995]
    words += ["--look", "reference"]
    words += ["--unlabelled-path", tmp_path / "others/images", "--unlabelled-share", 0.4, "--device", "cpu"]
    words += ["--unlabelled-mask-path", tmp_path / "others/soft"]
    assert run_here(train, *words, "--results-dir", tmp_path, "--run-name", "run", "--sample-every", 10000)[0] == 0
    words = ["ODE", "--ckpt", tmp_path / "run/checkpoints/0000500.pt", "--mask-path", tmp_path / "new/masks"]
    words += ["--sample-dir", tmp_path / "set", "--look-path", tmp_path / "others/images", "--device", "cpu"]
    assert run_here(sample_ddp, *words, "--sampling-method", "ab2", "--num-sampling-steps", 16)[0] == 0
    with (tmp_path / "set" / "manifest.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    images = [to_gray(np.asarray(Image.open(tmp_path / "set" / row["image"]))[..., None]) for row in rows]
    masks = [np.asarray(Image.open(tmp_path / "set" / row["label"])) > 0 for row in rows]
    found = [dice(thresholded(image, brighter=False), mask) for image, mask in zip(images, masks, strict=True)]
    assert np.mean(images) > 0.5
    assert np.mean(found) > 0.8
