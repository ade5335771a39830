"""The page: masks to begin with, progress, models of latents, soft masks of training."""

from __future__ import annotations

import base64
import io
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_helpers import call, run_here, write_pairs
from test_app import FLAGS, ask, cells, checkpoint_of, order, serving
from tiny_sit import write_checkpoint

import app
import sample
from common.pictures import CLASS_COLORS
from dataset.config import DataConfig
from engine.autoencoder import load_space
from engine.checkpoint import read_checkpoint, save_checkpoint
from page.labels import unpack
from page.masks import StartMasks
from page.service import Service
from page.tasks import Cancelled, Task, Tasks


def label_of(reply: dict) -> np.ndarray:
    return unpack(reply["height"], reply["width"], reply["label"])


# --------------------------------------------------------------------------------------------- masks to begin with


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """masks/: thirty label files of 24 x 20 pixels with one to three cells."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "masks").mkdir()
    for number in range(30):
        label = np.zeros((24, 20), np.uint16)
        for cell in range(1 + number % 3):
            label[8 * cell : 8 * cell + 5, 3:15] = 5 + cell
        Image.fromarray(label).save(folder / "masks" / f"field_{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def starting(folder) -> Iterator[Service]:
    checkpoint = checkpoint_of(folder / "two.pt", 2, crop="random")
    with serving(checkpoint, "--mask-path", folder / "masks", "--mask-type", "instances") as service:
        yield service


def test_masks_of_the_folder_are_shown_some_at_a_time_and_found_by_name(starting, folder):
    assert ask(starting, "/api/model")[1]["masks"] == {"name": f"{folder.name}/masks", "count": 30}
    _, first = ask(starting, "/api/masks", {"contains": "", "first": 0})
    _, rest = ask(starting, "/api/masks", {"contains": "", "first": 15})
    assert first["total"] == rest["total"] == 30
    assert [one["index"] for one in first["masks"] + rest["masks"]] == list(range(30))
    _, found = ask(starting, "/api/masks", {"contains": "FIELD_1", "first": 0})
    assert [one["name"] for one in found["masks"]] == [f"field_{number}" for number in range(10, 20)]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["masks"][2]["picture"]))))
    assert {tuple(color) for color in shown.reshape(-1, 3)} == set(CLASS_COLORS[:2])


def test_a_chosen_mask_keeps_its_cells_whole_or_as_the_square_that_the_model_sees(starting):
    status, whole = ask(starting, "/api/start", {"index": 2, "kind": "cells", "whole": True})
    assert status == 200, whole
    expected = np.zeros((24, 20), np.uint16)
    for cell in range(3):
        expected[8 * cell : 8 * cell + 5, 3:15] = 1 + cell
    assert np.array_equal(label_of(whole), expected)
    _, square = ask(starting, "/api/start", {"index": 2, "kind": "cells", "whole": False})
    parts = [expected[top : top + 16, left : left + 16] for top in range(9) for left in range(5)]
    assert any(np.array_equal(label_of(square) > 0, part > 0) for part in parts)


def test_the_square_of_a_large_mask_shows_its_cells(tmp_path):
    (tmp_path / "masks").mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[2:12, 2:12] = 255  # far from the middle
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    masks = StartMasks(tmp_path / "masks", DataConfig(16, 2, crop="random"), "auto", normalize=False)
    assert np.sum(masks.label(0, "cells", whole=False) > 0) == 80  # the nearest to 0.3 of 256 that a part can be
    picture = masks.thumbnail(0)
    assert np.array_equal(picture[0].numpy() > 0, masks.label(0, "cells", whole=False) > 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/start", {"index": 30, "kind": "cells"}),
        ("/api/start", {"index": -1, "kind": "cells"}),
        ("/api/start", {"index": "../../etc/passwd", "kind": "cells"}),
        ("/api/start", {"index": 0, "kind": "bogus"}),
        ("/api/start", {"index": 0, "kind": "cells", "whole": 1}),
        ("/api/masks", {"contains": 3, "first": 0}),
        ("/api/masks", {"contains": "", "first": -1}),
    ],
)
def test_a_mask_that_is_not_there_is_refused(starting, path, body):
    assert ask(starting, path, body)[0] == 400


def test_masks_of_the_judge_are_the_default_and_a_page_without_masks_says_so(folder, tmp_path):
    images, masks = write_pairs(tmp_path / "real")
    flags = ["--judge-images", images, "--judge-masks", masks, "--judge-steps", 1, "--judge-cache", tmp_path / "judges"]
    checkpoint = checkpoint_of(tmp_path / "two.pt", 2)
    with serving(checkpoint, *flags) as service:
        assert ask(service, "/api/model")[1]["masks"]["count"] == 6
    with serving(checkpoint) as service:
        assert ask(service, "/api/model")[1]["masks"] is None
        assert "without a folder" in ask(service, "/api/masks", {"contains": "", "first": 0})[1]["error"]
    for wrong in (["--mask-path", tmp_path / "none"], ["--mask-type", "instances"]):
        code, lines = run_here(app, "--ckpt", checkpoint, "--port", 0, *FLAGS, *wrong)
        assert code == 2 and "--mask-" in lines[-1]


def test_soft_masks_are_divided_by_their_sum_if_training_did_so(tmp_path):
    """The judge, the masks to begin with and files from the browser."""
    images, masks = write_pairs(tmp_path / "real")
    for path in list(masks.iterdir()):
        cell = np.asarray(Image.open(path)) > 0
        np.save(path.with_suffix(".npy"), np.stack([~cell, cell]).astype(np.float32) / 2)  # sums to a half
        path.unlink()
    state = read_checkpoint(checkpoint_of(tmp_path / "plain.pt", 2))
    state["config"]["train"] = {"normalize_masks": True}
    save_checkpoint(tmp_path / "normalized.pt", state)
    flags = ["--judge-images", images, "--judge-masks", masks, "--judge-steps", 1, "--judge-cache", tmp_path / "judges"]
    with serving(tmp_path / "normalized.pt", *flags) as service:
        _, chosen = ask(service, "/api/start", {"index": 0, "kind": "cells", "whole": True})
        path = min(masks.iterdir())
        status, loaded = ask(service, f"/api/mask?name={path.name}&whole=1", path.read_bytes())
        assert status == 200, loaded
        assert np.array_equal(label_of(chosen), label_of(loaded))
        assert np.array_equal(label_of(chosen) > 0, np.load(path)[1] > 0)
    code, lines = run_here(app, "--ckpt", tmp_path / "plain.pt", "--port", 0, *FLAGS, *flags)
    assert code == 2 and "--normalize-masks" in lines[-1]


# -------------------------------------------------------------------------------------------------------- progress


def test_progress_counts_runs_and_ends_when_nobody_waits():
    here = [True]
    task, known = Task(lambda: not here[0]), Tasks()
    with known.known_by("a", task):
        assert known.progress("a") == {"state": "waiting"}
        task.begin()
        task.expect(2)
        shares = []
        for time in (0.0, 0.5, 0.5, 0.9, 0.0, 0.5):
            task.reach(time)
            shares.append(known.progress("a")["share"])
        assert shares == [0, 0.25, 0.25, 0.45, 0.5, 0.75]
        here[0] = False
        with pytest.raises(Cancelled):
            task.reach(0.9)
    assert known.progress("a") == known.progress("") == {"state": "unknown"}


@pytest.mark.parametrize(
    ("label", "changes"),
    [(cells(), {"count": 1, "num_steps": 4}), (cells(17, 30), {"count": 2, "num_steps": 4, "method": "ab2"})],
)
def test_progress_of_a_drawing_rises_from_zero_to_near_one(starting, monkeypatch, label, changes):
    shares = []
    reach = Task.reach

    def noted(self: Task, share: float) -> None:
        reach(self, share)
        shares.append(starting.tasks.progress("one")["share"])

    monkeypatch.setattr(Task, "reach", noted)
    assert ask(starting, "/api/draw?ticket=one", order(label, **changes))[0] == 200
    assert shares[0] == 0 and shares == sorted(shares) and 0.7 <= shares[-1] <= 1
    assert len(set(shares)) >= 4 * changes["count"]
    assert ask(starting, "/api/progress?of=one")[1] == {"state": "unknown"}


def test_a_random_layout_tells_its_progress_and_ends_when_the_browser_leaves(starting, monkeypatch):
    body = {"height": 256, "width": 256, "kind": "cells", "cell_size": 6, "density": 0.4, "seed": 1}
    shares, closed = [], threading.Event()
    reach = Task.reach

    def noted(self: Task, share: float) -> None:
        shares.append(share)
        if len(shares) == 100:
            monkeypatch.setattr(self, "is_abandoned", lambda: True)
            closed.set()
        reach(self, share)

    monkeypatch.setattr(Task, "reach", noted)
    with pytest.raises(OSError):  # closed without an answer
        ask(starting, "/api/layout", body)
    assert closed.is_set() and len(shares) == 100 and 0 < shares[-1] < 0.5


# --------------------------------------------------------------------------------------------------------- latents


@pytest.mark.parametrize(("height", "width"), [(32, 32), (36, 50)], ids=["square", "tiles"])
def test_a_model_of_latents_draws_what_sample_writes(autoencoder_folder, tmp_path, monkeypatch, height, width):
    sizes = {"name": "SiT-Ti/2", "in_channels": 5, "input_size": 8, "num_heads": 2}
    config = DataConfig(32, 2, channels=3)
    state = read_checkpoint(write_checkpoint(tmp_path / "pixels.pt", config, step=7, **sizes))
    space = {"vae": str(autoencoder_folder), "factor": 4, "channels": 5}
    state["config"]["space"] = space | {"fingerprint": load_space(str(autoencoder_folder)).fingerprint}
    save_checkpoint(tmp_path / "latents.pt", state)
    with serving(tmp_path / "latents.pt") as service:
        status, reply = ask(service, "/api/draw", order(cells(height, width), count=1))
        assert status == 200, reply
        _, way = ask(service, "/api/trajectory", order(cells(height, width), count=1, index=0))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["images"][0]["file"]))))
    assert image.shape == (height, width, 3)
    assert way["frames"][-1] == reply["images"][0]["picture"] and len(set(way["frames"])) == len(way["frames"])
    monkeypatch.chdir(tmp_path)
    Path(reply["mask"]["name"]).write_bytes(base64.b64decode(reply["mask"]["content"]))
    call(sample, *shlex.split(reply["command"])[2:])
    assert Path("samples.png").read_bytes() == base64.b64decode(reply["sheet"])
