"""Fixtures: a small network with non-zero output, a small autoencoder folder, and drawn disks on disk."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.run_folder import RunFolder
from models import SiT, SiT_models

# H, W, C, K and the width differ from each other and from every batch size of the tests: a swap of axes shows.
TINY_SIT = {
    "input_size": (12, 8),
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "class_dropout_prob": 0.0,
    "num_classes": 3,
    "mask_pixels": 4,
}


def pytest_sessionstart() -> None:
    """A disk that is nearly full fails tests far from the cause, so no test starts."""
    folder, needed = tempfile.gettempdir(), 3
    free = shutil.disk_usage(folder).free / 2**30
    if free < needed:
        pytest.exit(f"{folder} has {free:.1f} GiB free, the tests need {needed}: delete files or set TMPDIR", 2)
    _hear_ctrl_c()


def _hear_ctrl_c() -> None:
    """Commands that tests start inherit an ignored Ctrl-C, which is what the background job of a script begins with."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the commands that they start, keep out of the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def forget_wandb() -> Iterator[None]:
    """wandb reads its settings once in a process. A test must not get the mode of another one."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as in the processes that tests start: with more threads, sums may have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_block() -> Iterator[None]:
    """SiT-Ti with one block, for commands that run inside this process: training takes a third of the time.

    The width stays, because what the model predicts depends on it.
    """
    whole = {name: build for name, build in SiT_models.items() if name.startswith("SiT-Ti/")}
    SiT_models.update({name: partial(build, depth=1, mlp_ratio=1.0) for name, build in whole.items()})
    yield
    SiT_models.update(whole)


@pytest.fixture
def make_model() -> Callable[..., SiT]:
    """Builds a small SiT (or one with other arguments) in evaluation mode, always with the same weights.

    All weights are moved off their start, where adaLN-Zero and the last layer are zero and the output is, too.
    """

    def make(**arguments: Any) -> SiT:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = SiT(**{**TINY_SIT, **arguments})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def model(make_model: Callable[..., SiT]) -> SiT:
    """The small SiT: input (B, 4, 12, 8), a grid of 6 x 4 tokens, 3 classes, 4 mask pixels per token side."""
    return make_model()


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small diffusers AutoencoderKL: factor 4, 5 latent channels, scale 0.4, shift 0.15; read-only."""
    from diffusers import AutoencoderKL  # seconds to import; most tests do without

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 12, 16),
            layers_per_block=1,
            latent_channels=5,
            norm_num_groups=4,
            scaling_factor=0.4,
            shift_factor=0.15,
        )
    folder = tmp_path_factory.mktemp("autoencoders") / "tiny"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def disk_pairs(tmp_path: Path) -> Path:
    """Folder with images/ and masks/: six pairs of 40 x 52 pixels, two disks each, in files of different suffixes.

    Masks are gray, 0 outside and 255 in a disk; images RGB, about 40 outside and 200 in a disk. Tests may change
    the folder.
    """
    suffixes = [(".png", ".png"), (".jpg", ".png"), (".tif", ".tif"), (".bmp", ".bmp"), (".jpeg", ".tiff")]
    suffixes.append((".png", ".bmp"))
    folder = tmp_path / "pairs"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rows, columns = np.mgrid[:40, :52]
    for number, (image_suffix, mask_suffix) in enumerate(suffixes):
        rng = np.random.default_rng(number)
        cells = np.zeros((40, 52), bool)
        for left in (0, 26):  # one disk in each half, so that they never touch
            row, column = rng.uniform(10, 30), left + rng.uniform(10, 16)
            cells |= (rows - row) ** 2 + (columns - column) ** 2 <= rng.uniform(5, 8) ** 2
        gray = np.where(cells, 200, 40)[..., None] + rng.normal(0, 4, (40, 52, 3))
        Image.fromarray(gray.astype(np.uint8)).save(folder / "images" / f"cell_{number}{image_suffix}")
        Image.fromarray(cells.astype(np.uint8) * 255).save(folder / "masks" / f"cell_{number}{mask_suffix}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder that keeps two checkpoints."""
    folder = RunFolder(tmp_path / "run", keep=2)
    folder.create()
    return folder
