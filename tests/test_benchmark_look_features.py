"""Looks of another kind, for comparison: scripts run with them, and the features are what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.look_features import LEARNED_SIDE, LearnedLook, imagenet_features
from engine.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def coloured_pairs(tmp_path):
    """Folders images and masks: four images of 64 px in three channels."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(np.uint8(255 * (rng.random((64, 64)) < 0.5))).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def script(features: str, name: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "look_features.py"), features, name, *map(str, words)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(("features", "numbers"), [("learned", 3 * LEARNED_SIDE**2), ("imagenet", 192)])
def test_training_and_sampling_use_the_other_looks(coloured_pairs, features, numbers):
    if features == "imagenet":
        pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0 is not installed")
    folder = coloured_pairs
    pairs = ["--data-path", folder / "images", "--mask-path", folder / "masks", "--mask-type", "binary"]
    size = ["--vae", "none", "--model", "SiT-Ti/8", "--image-size", 64, "--in-channels", 3, "--num-workers", 0]
    length = [
        "--look",
        "reference",
        "--max-steps",
        2,
        "--global-batch-size",
        2,
        "--results-dir",
        folder,
        "--run-name",
        "r",
    ]
    script(features, "train.py", *pairs, *size, *length)
    checkpoint = folder / "r" / "checkpoints" / "0000002.pt"
    script(
        features, "sample_ddp.py", "ODE", "--ckpt", checkpoint, "--mask-path", folder / "masks",
        "--mask-type", "binary", "--num-sampling-steps", 2, "--sample-dir", folder / "set",
        "--look-path", folder / "images",
    )  # fmt: skip
    assert len(list((folder / "set" / "images").iterdir())) == 4
    looks = read_checkpoint(checkpoint)["looks"]["numbers"]
    assert len(looks) == 4 and {len(one) for one in looks} == {numbers}


def test_the_learned_encoder_begins_at_zero_and_sees_the_crop():
    torch.manual_seed(0)
    embedder = LearnedLook(3 * LEARNED_SIDE**2, 16)
    crops = torch.randn(2, 3 * LEARNED_SIDE**2)
    assert embedder(crops).std() > 0
    drop = torch.tensor([False, True])
    torch.testing.assert_close(embedder(crops, drop)[1], embedder.null.data)
    embedder.start_at_zero()
    assert not embedder(crops).any()


def test_features_of_imagenet_tell_colours_apart_and_take_gray():
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0 is not installed")
    crop = np.random.default_rng(0).uniform(-1, 1, (3, 48, 48)).astype(np.float32)
    own, other = imagenet_features(crop), imagenet_features(crop[::-1].copy())
    assert own.shape == (192,) and np.abs(own - other).max() > 0.1
    assert imagenet_features(crop[:1]).shape == (192,)
