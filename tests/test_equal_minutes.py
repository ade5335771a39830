"""The comparison at equal minutes: its networks, its second optimiser, its numbers."""

from __future__ import annotations

import json

import pytest
import torch

import models
from benchmarks import equal_minutes
from benchmarks.stems import stemmed_sit
from common.errors import InputError
from layers.transformer import PatchEmbed
from train import parse_args


@pytest.fixture
def model():
    """A small SiT with one block."""
    config = {"input_size": 16, "in_channels": 1, "num_classes": 2, "mask_pixels": 8, "depth": 1, "mlp_ratio": 1.0}
    torch.manual_seed(0)
    return models.build_model({"name": "SiT-Ti/8", **config})


def both_optimisers(model):
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    return equal_minutes.MuonAndAdamW(model, adamw, lr=0.1, weight_decay=0.0)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(model):
    muon, adamw = both_optimisers(model).parts
    names = {id(value): name for name, value in model.named_parameters()}
    inside = [names[id(value)] for group in muon.param_groups for value in group["params"]]
    rest = [names[id(value)] for group in adamw.param_groups for value in group["params"]]
    assert sorted(inside + rest) == sorted(names.values())
    assert "blocks.0.attn.qkv.weight" in inside and "blocks.0.attn.qkv.bias" in rest
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in inside)


def test_a_step_moves_the_weights_of_both_by_the_learning_rate_that_is_set(model):
    optimiser = both_optimisers(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for factor in (0.0, 1.0):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * factor
        for value in model.parameters():
            value.grad = torch.randn_like(value)
        optimiser.step()
        moved = {name: not torch.equal(value, before[name]) for name, value in model.named_parameters()}
        assert set(moved.values()) == {factor > 0}
    optimiser.zero_grad()
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("name", equal_minutes.VARIANTS)
def test_train_knows_the_flags_of_a_variant(name, monkeypatch):
    for shape, (depth, width, heads, patch) in equal_minutes.SHAPES.items():
        monkeypatch.setitem(models.SiT_models, shape, None)
        assert width % heads == 0 and depth > 0 and 64 % patch == 0
    for stemmed in equal_minutes.STEMS:
        monkeypatch.setitem(models.SiT_models, stemmed, None)
    monkeypatch.setitem(models.SiT_models, "U-Net", None)
    flags = equal_minutes.flags_of(name)
    words = [word for key, value in flags.items() if key != "--muon" for word in (key, value)]
    args = parse_args(["--data-path", "a", "--mask-path", "b", *equal_minutes.COMMON.split(), *words])
    assert args.lr == float(flags["--lr"]) and args.model == flags["--model"]


@pytest.mark.parametrize(("make_stem", "patch"), equal_minutes.STEMS.values())
def test_a_stem_starts_as_the_plain_embedding_and_then_sees_beyond_its_patch(make_stem, patch):
    config = {"hidden_size": 8, "patch_size": patch, "in_channels": 1, "depth": 1, "num_heads": 1, "input_size": 32}
    model = stemmed_sit(make_stem, **config)
    embed, image = model.x_embedder, torch.randn(1, 1, 32, 32)
    assert torch.equal(embed(image), PatchEmbed.forward(embed, image))
    assert set(models.SiT(**config).state_dict()) < set(model.state_dict())
    last = list(embed.stem.children())[-1]
    torch.nn.init.normal_(last.weight)
    other = image.clone()
    other[..., patch - 1] += 1  # the last column of the first patch of each row
    changed = (embed(other) != embed(image)).any(dim=2).reshape(32 // patch, -1).any(dim=0)
    assert changed[:2].all() and not changed[2:].any()


def test_measures_are_those_that_evaluate_has_written(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    written = {
        "grid": {"grid_synthetic": 1.02, "grain_ratio": 1.3},
        "threshold": {"dice_ratio": 0.98, "mean_difference": -0.1, "std_difference": 0.2},
        "fidelity": {
            "synthetic": {"dice": 0.45, "ap": {"0.5": 0.3}}, "real": {"dice": 0.9, "ap": {"0.5": 0.4}},
        },
        "realism": {"distances": [{"synthetic": [9.0, 11.0]}]},
    }  # fmt: skip
    for name, content in written.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    found = equal_minutes.read_measures(tmp_path)
    assert list(found) == list(equal_minutes.COLUMNS)
    assert list(found.values()) == pytest.approx([1.02, 1.3, 0.5, 0.75, 0.98, 0.9, 1.2, 10.0])


def test_a_trial_that_was_cut_short_starts_anew_and_one_that_ended_stays(monkeypatch, tmp_path):
    words = ["--train", str(tmp_path), "--heldout", str(tmp_path), "--output", str(tmp_path)]
    trial = equal_minutes.Trial("default", 0, equal_minutes.parse_args(words))
    left = trial.folder / "run_9" / "half.txt"
    left.parent.mkdir(parents=True)
    left.touch()

    def stop(self, *words):
        assert not left.exists()
        raise InputError("stopped")

    monkeypatch.setattr(equal_minutes.Trial, "run", stop)
    with pytest.raises(InputError, match="stopped"):
        trial.result()
    (trial.folder / "result.json").write_text('{"steps": 9}')
    assert trial.result() == {"steps": 9}


def test_variant_takes_as_many_steps_as_fit_in_the_time_of_the_default(monkeypatch, tmp_path):
    """Batches of 32 at 40 images/s take 0.8 s, those of 16 at 64 images/s 0.25 s: 3.2 times as long."""
    words = ["--train", str(tmp_path), "--heldout", str(tmp_path), "--output", str(tmp_path)]
    trial = equal_minutes.Trial("batch-32", 0, equal_minutes.parse_args([*words, "--default-steps", "320"]))
    trained = []

    def train(self, variant, name, steps, *more):
        trained.append((variant, steps))
        (self.folder / name).mkdir()
        speeds = [1.0, 40.0 if variant == "batch-32" else 64.0]  # the first steps warm up
        rows = [{"speed/images_per_sec": speed} for speed in speeds] + [{"preview/grid": 1.0}]
        (self.folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 5.0

    monkeypatch.setattr(equal_minutes.Trial, "train", train)
    monkeypatch.setattr(equal_minutes.Trial, "sample", lambda self, steps: 2.0)
    monkeypatch.setattr(equal_minutes.Trial, "measures", lambda self: {})
    found = trial.result()
    assert found == {"steps": 100, "relative": pytest.approx(3.2), "seconds": 5.0, "sampling": 2.0}
    assert trained == [("batch-32", 80), ("default", 80)] * 3 + [("batch-32", 100)]


def test_variant_that_changes_no_step_takes_those_of_the_default(tmp_path):
    words = ["--train", str(tmp_path), "--heldout", str(tmp_path), "--output", str(tmp_path)]
    args = equal_minutes.parse_args(words)
    trials = [equal_minutes.Trial(name, 0, args) for name in ("default", "wide-times", "lr-2e-3")]
    assert [trial.relative_time() for trial in trials] == [1, 1, 1]
