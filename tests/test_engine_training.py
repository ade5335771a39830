"""One training step: the update does not depend on how a batch is split."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from script_helpers import TINY, run, train_arguments, write_pairs
from torch import nn

import train
from common.errors import STOP_SIGNALS, InputError
from dataset.batches import Batch, WaitingClock
from engine.autoencoder import PixelSpace
from engine.checkpoint import read_checkpoint
from engine.loop import StopRequest, limit_workers, log_progress
from engine.machine import Machine, usable_cores
from engine.run_folder import RunFolder
from engine.training import MOST_SKIPPED_IN_A_ROW, Training, update_ema
from models import SiT
from settings import resolve

BATCH, SIZE = 6, 16


@pytest.fixture
def make_training(tmp_path: Path) -> Callable[..., Training]:
    """A run in memory, always with the same weights, none of which is at its start (where most gradients are 0)."""

    def make(*flags: str) -> Training:
        folders = ["--data-path", str(tmp_path), "--mask-path", str(tmp_path)]
        args = train.parse_args([*folders, *TINY, "--global-batch-size", str(BATCH), "--mask-dropout", "0.4", *flags])
        train.check_arguments(args)
        config = resolve(args)
        config = replace(config, model=replace(config.model, name="SiT-Ti/4", mask_pixels=4))
        machine = Machine(0, 1, torch.device("cpu"), "float32" if args.precision == "auto" else args.precision)
        training = Training(config, machine, PixelSpace())
        training.total_steps = 100
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        training.prepare_model()
        return training

    return make


def make_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    cells = np.kron(rng.integers(0, 2, (BATCH, 4, 4)), np.ones((4, 4)))
    cells[:, :, :5] = rng.integers(0, 2, (BATCH, SIZE, 5))  # some patches of one class, some of both
    image = torch.from_numpy(rng.uniform(-1, 1, (BATCH, 3, SIZE, SIZE)).astype(np.float32))
    return {"image": image, "mask": torch.from_numpy(cells.astype(np.uint8))}


def take_steps(training: Training, count: int = 2) -> dict[str, torch.Tensor]:
    """Gradients of so many steps, the sums for the metrics among them."""
    seen = {}
    for step in range(count):
        training.train_step(training.prepare_batch(make_batch(step)))
        for name, parameter in training.model.named_parameters():
            assert parameter.grad is not None
            seen[f"{step} {name}"] = parameter.grad.clone()
    return {**seen, "sums": training.sums.clone()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
        assert value.norm() > 0, f"{name} says nothing"


@pytest.fixture
def expected(make_training) -> dict[str, torch.Tensor]:
    training = make_training()
    training.share_rows = False
    seen = take_steps(training)
    seen["sums"][2] = 1.0  # what follows compares numbers above 0
    return seen


def close_to(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    found["sums"][2] += 1.0
    assert_close(found, expected)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_a_batch_in_parts_gives_the_update_of_the_whole_batch(make_training, expected, parts):
    training = make_training("--accumulate", str(parts))
    close_to(take_steps(training), expected)
    assert training.step == training.since_log == 2
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {2}


def test_on_a_cpu_in_bf16_attention_is_plain_and_its_update_that_of_the_fused_one(make_training):
    found = {}
    for plain in (True, False):
        training = make_training("--precision", "bf16")
        assert not training.share_rows and not training.model.blocks[0].attn.fused_attn
        training.model.blocks[0].attn.fused_attn = not plain
        found[plain] = take_steps(training, count=1)
    for name, value in found[False].items():
        assert (found[True][name] - value).norm() <= 0.03 * value.norm() + 1e-7, name


@pytest.mark.slow  # a minute of C++
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_compiled_training_takes_the_update_of_a_plain_one(make_training, precision):
    plain, compiled = (
        take_steps(make_training("--precision", precision, *flags), count=1) for flags in ([], ["--compile"])
    )
    for name, value in plain.items():
        assert (compiled[name] - value).norm() <= 0.03 * value.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("flags", "mend"),
    [
        ([], "with other images: evaluate.py data checks them"),
        (["--precision", "bf16"], "with precision float32"),
        (["--precision", "bf16", "--compile"], "without compile"),
        (["--init-from", "old.pt"], "without init_from"),
    ],
)
def test_a_run_without_one_good_step_is_not_told_to_lower_its_rate(make_training, tmp_path, flags, mend, monkeypatch):
    monkeypatch.setattr(SiT, "compile_blocks", lambda model: None)
    training = make_training(*flags)
    batch = make_batch()
    batch["image"][:] = float("nan")
    for _ in range(MOST_SKIPPED_IN_A_ROW):
        training.train_step(training.prepare_batch(batch))
    with pytest.raises(InputError, match=f"step 20: .* not finite 20 times in a row .* Start again {mend}.$"):
        training.check_finite(RunFolder(tmp_path / "run", keep=1))


def test_distinct_rows_give_the_update_of_a_modulation_per_token(make_training, expected):
    training = make_training()
    rows = training.prepare_batch(make_batch())["rows"][0]
    assert len(rows.shares) < BATCH * 16
    close_to(take_steps(training), expected)


def test_recomputed_activations_give_the_same_gradients_bit_for_bit(make_training):
    kept, recomputed = make_training(), make_training("--recompute-activations")
    calls = []
    recomputed.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    one, other = take_steps(kept), take_steps(recomputed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(calls) == 4  # forward and again in the backward pass, in two steps


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler on this machine")
def test_compiled_model_has_one_graph_for_its_blocks_and_is_not_compiled_again(make_training, expected):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    training = make_training("--compile")
    close_to(take_steps(training), expected)
    graphs = counters["stats"]["unique_graphs"]
    sizes = set()
    for seed in range(4):
        batch = make_batch(seed)
        if seed % 2:  # patch n of an image has n pixels of cell: no two alike
            patches = torch.ones(16, 16, dtype=torch.uint8).tril(-1).view(4, 4, 4, 4)
            batch["mask"] = patches.transpose(1, 2).reshape(1, SIZE, SIZE).repeat(BATCH, 1, 1)
        batch = training.prepare_batch(batch)
        sizes.add(len(batch["rows"][0].shares))
        training.train_step(batch)
    assert graphs == counters["stats"]["unique_graphs"] == 2  # the blocks and the last layer
    assert not counters["graph_break"]
    assert sizes == {64, 128}


@pytest.mark.parametrize("bad", [0, BATCH - 1])
def test_a_step_with_one_bad_part_is_left_out_as_a_whole(make_training, bad):
    training = make_training("--accumulate", "3")
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    batch = training.prepare_batch(make_batch())
    batch["image"][bad, 0, 0, 0] = torch.inf
    training.train_step(batch)
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    assert training.step == 1 and training.sums.tolist() == [0, 0, 1]
    training.train_step(training.prepare_batch(make_batch()))
    assert not torch.equal(training.model.overlap.linear.weight, before["overlap.linear.weight"])
    assert training.sums[2] == 1 and training.skipped_in_a_row == 0


@pytest.mark.slow
def test_ranks_that_accumulate_train_as_ranks_that_do_not(tmp_path):
    pairs = write_pairs(tmp_path)
    states = []
    for parts in (1, 2):
        words = train_arguments(*pairs, tmp_path, f"parts_{parts}", 2)
        run(*words, "--accumulate", parts, ranks=2)
        states.append(read_checkpoint(tmp_path / f"parts_{parts}" / "checkpoints" / "0000002.pt")["model"])
    whole, parts = states
    assert all((whole[name] - parts[name]).abs().max() < 1e-5 for name in whole)


@pytest.mark.parametrize(
    ("flags", "prediction", "time_mean", "time_scale"),
    [
        (["--vae", "ema", "--model", "SiT-B/2"], "velocity", 0.0, 1.0),
        (["--vae", "none", "--model", "SiT-Ti/8"], "velocity", 0.0, 1000.0),  # 192 numbers a patch, width 256
        (["--vae", "none", "--model", "SiT-B/16"], "data", -1.2, 1000.0),  # 768 of 768
        (["--vae", "none", "--model", "SiT-B/16", "--in-channels", "1"], "velocity", 0.0, 1000.0),  # 256 of 768
        (["--vae", "none", "--model", "SiT-Ti/8", "--prediction", "data"], "data", -1.2, 1000.0),
        (["--vae", "none", "--model", "SiT-B/16", "--time-mean", "0.3", "--time-scale", "1"], "data", 0.3, 1.0),
    ],
)
def test_the_velocity_is_learned_where_the_width_carries_a_patch(flags, prediction, time_mean, time_scale):
    config = resolve(train.parse_args(["--data-path", "images", "--mask-path", "masks", *flags]))
    assert (config.transport.prediction, config.transport.time_mean) == (prediction, time_mean)
    assert config.transport.loss_weight == ("velocity" if prediction == "data" else None)
    assert config.model.time_scale == time_scale


def test_more_loader_processes_than_the_cores_can_serve_are_not_started(caplog):
    assert limit_workers(0) == 0 and limit_workers(4) == 4 and not caplog.text
    assert limit_workers(1000) == 8 * usable_cores() < 1000
    assert "num_workers 1000" in caplog.text


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Puts the handlers back that pytest had."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_the_loop_to_save_and_end_unless_it_was_ignored_before(own_signals, number):
    """A script runs commands in the background with Ctrl-C ignored, and nohup ignores SIGHUP."""
    signal.signal(number, signal.SIG_IGN)
    stop = StopRequest()
    signal.raise_signal(number)
    assert stop.signal is None
    signal.signal(number, signal.SIG_DFL)
    stop = StopRequest()
    signal.raise_signal(number)
    assert stop.signal == number and stop.exit_code == (130 if number == signal.SIGINT else 143)


def test_ema_follows_its_formula_and_warms_up():
    model = nn.Linear(3, 2)
    ema = copy.deepcopy(model)
    start = ema.weight.clone()
    nn.init.ones_(model.weight)
    update_ema(ema, model, decay=0.99, step=5)
    assert torch.allclose(ema.weight, start * (6 / 15) + 9 / 15)
    before = ema.weight.clone()
    update_ema(ema, model, decay=0.99, step=10**6)
    assert torch.allclose(ema.weight, before * 0.99 + 0.01)


def test_the_speed_of_a_line_counts_the_work_that_a_device_still_has_to_do(make_training, run, monkeypatch):
    training, read = make_training(), Training.read_metrics

    def wait_and_read(self: Training) -> dict[str, float]:
        time.sleep(0.3)  # as for a GPU, which works behind the program
        return read(self)

    monkeypatch.setattr(Training, "read_metrics", wait_and_read)
    started = time.perf_counter()
    training.train_step(training.prepare_batch(make_batch()))
    log_progress(training, run, 1, started, WaitingClock(torch.device("cpu")))
    line = json.loads(run.metrics.read_text())
    assert 0 < line["speed/images_per_sec"] <= BATCH / 0.3 and line["train/loss"] > 0
