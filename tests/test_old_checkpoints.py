"""A checkpoint written by an older commit resumes and samples.

``data/run_of_d98b8db.pt`` is step 3 of a run of that commit on the drawn pairs of ``write_pairs``, with a model of one
block of width 16 registered as SiT-Ti/8:

    train.py --vae none --model SiT-Ti/8 --image-size 16 --in-channels 1 --window 1 99 --mask-dropout 0.2 --seed 3 \\
        --global-batch-size 4 --accumulate 2 --warmup-steps 2 --lr 1e-3 --weight-decay 0.01 --ema-decay 0.9 \\
        --device cpu --precision float32 --max-steps 3 --log-every 1 --sample-every 1000 --keep 5
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_helpers import FEW_STEPS, call, run_here, write_pairs

import models
import sample
import train
from engine.checkpoint import read_checkpoint

OLD = Path(__file__).parent / "data" / "run_of_d98b8db.pt"
# Loss and gradient norm of steps 4 to 6 as that commit took them.
LOSSES = [0.9865003824234009, 1.3732331991195679, 1.7790703773498535]
NORMS = [0.44283267855644226, 0.6470130681991577, 1.0578376054763794]


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    tiny = partial(models.SiT, depth=1, hidden_size=16, num_heads=2, patch_size=8)
    monkeypatch.setitem(models.SiT_models, "SiT-Ti/8", tiny)


def test_it_resumes_with_its_own_settings_and_takes_the_steps_that_the_old_code_took(tmp_path):
    images, masks = write_pairs(tmp_path / "pairs")
    words = ["--data-path", images, "--mask-path", masks, "--results-dir", tmp_path, "--run-name", "new"]
    code, lines = run_here(train, *words, "--device", "cpu", "--ckpt", OLD, "--max-steps", 6)
    assert code == 0, lines
    assert any("changed on resume: --max-steps: 3 -> 6" in line for line in lines)
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "preview/grid" not in line]
    assert [line["step"] for line in found] == [4, 5, 6]
    assert [line["train/loss"] for line in found] == pytest.approx(LOSSES, rel=1e-4)
    assert [line["train/grad_norm"] for line in found] == pytest.approx(NORMS, rel=1e-3)
    old, new = (read_checkpoint(path) for path in (OLD, tmp_path / "new" / "checkpoints" / "0000006.pt"))
    younger = {"patch_overlap": False, "look_numbers": 0, "look_dropout_prob": 0.0}
    assert new["config"]["model"] == old["config"]["model"] | younger
    assert new["config"]["data"] == old["config"]["data"] | {"mask_values": None}  # the argument is younger
    for part in ("transport", "space"):
        assert new["config"][part] == old["config"][part]


def test_a_flag_that_contradicts_it_is_refused(tmp_path):
    images, masks = write_pairs(tmp_path / "pairs")
    words = ["--data-path", images, "--mask-path", masks, "--results-dir", tmp_path, "--ckpt", OLD]
    code, lines = run_here(train, *words, "--window", 0, 99, "--prediction", "velocity")
    assert code == 2 and "--prediction velocity (the checkpoint has data)" in lines[-1]
    assert "--window 0 99 (the checkpoint has 1 99)" in lines[-1]


def test_it_samples(tmp_path):
    _, masks = write_pairs(tmp_path / "pairs")
    paths = ["--ckpt", OLD, "--mask-path", masks / "cell_0.png", "--output", tmp_path / "grid.png"]
    call(sample, "ODE", *paths, *FEW_STEPS, "--num-samples", 1)
    with Image.open(tmp_path / "grid.png") as picture:
        assert np.asarray(picture).std() > 0
