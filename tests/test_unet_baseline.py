"""The U-Net baseline trains and samples through the project's own commands, and uses its mask."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from script_helpers import FEW_STEPS, TINY, call, write_pairs

import models
import sample_ddp
from benchmarks import unet_baseline


@pytest.fixture
def unets(monkeypatch):
    """The table of models with U-Nets, for one test."""
    for name in unet_baseline.WIDTHS:
        monkeypatch.setitem(models.SiT_models, name, None)  # taken out again after the test
    unet_baseline.add_unets()


def build(name: str = "U-Net-tiny") -> models.SiT:
    config = {"input_size": 16, "in_channels": 1, "num_classes": 2, "class_dropout_prob": 0.5, "time_scale": 1000.0}
    return models.build_model({"name": name, "mask_pixels": 8, **config})


def test_unet_has_about_as_many_parameters_as_the_model_that_it_is_compared_with(unets):
    numbers = [sum(parameter.numel() for parameter in build(name).parameters()) for name in ("U-Net", "SiT-Ti/8")]
    assert abs(numbers[0] / numbers[1] - 1) < 0.1


@torch.no_grad()
def test_mask_changes_the_output_and_a_dropped_mask_is_the_null_condition(unets):
    torch.manual_seed(0)
    model = build().eval()
    x, t = torch.randn(3, 1, 16, 16), torch.rand(3)
    y = torch.zeros(3, 2, 16, 16)
    y[:, 0, :8], y[:, 1, 8:] = 1, 1
    with_mask, without = model(x, t, y), model(x, t, y, drop=torch.ones(3, dtype=torch.bool))
    assert (with_mask - without).abs().max() > 1e-4
    mixed = model(x, t, y, drop=torch.tensor([False, True, False]))
    torch.testing.assert_close(mixed, torch.stack([with_mask[0], without[1], with_mask[2]]))
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 0.0), without)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 2.0), without + 2 * (with_mask - without))


def test_unet_trains_and_samples_by_the_commands(unets, tmp_path, monkeypatch):
    images, masks = write_pairs(tmp_path)
    results = tmp_path / "results"
    flags = [word if word != "SiT-Ti/8" else "U-Net-tiny" for word in TINY]
    words = ["train.py", "--data-path", images, "--mask-path", masks, *flags, "--results-dir", results,
             "--run-name", "unet", "--max-steps", 2, "--in-channels", 1, "--sample-every", 2]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["unet_baseline.py", *map(str, words)])
    unet_baseline.main()
    metrics = [json.loads(line) for line in (results / "unet" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    assert losses and all(loss > 0 for loss in losses)
    checkpoint = results / "unet" / "checkpoints" / "0000002.pt"
    call(sample_ddp, "ODE", "--ckpt", checkpoint, "--data-path", images, "--mask-path", masks,
         "--sample-dir", tmp_path / "samples", *FEW_STEPS)  # fmt: skip
    assert len(list((tmp_path / "samples" / "images").iterdir())) == 6


def test_another_command_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unet_baseline.py", "make_masks.py"])
    with pytest.raises(SystemExit) as end:
        unet_baseline.main()
    assert end.value.code == 2 and "must be one of train.py" in capsys.readouterr().err
