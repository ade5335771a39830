"""The benchmark runs, counts its arithmetic as torch does, and turns its optimisations off one by one."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench
from benchmarks.flops import sit_flops
from benchmarks.rounds import interleave
from benchmarks.workloads import AS_SIT, TRAINING_SWITCHES, Mode, Setup, TrainingBench, draw_masks, modes_of
from engine.autoencoder import PixelSpace
from engine.machine import Machine
from layers.mask import MaskCondition
from layers.rows import mask_rows

CPU = Machine(rank=0, world_size=1, device=torch.device("cpu"), precision="float32")


def counted(work) -> int:
    """FLOP by torch's own count, with an attention that it sees the products of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("layer", [{}, {"learn_sigma": True}, {"patch_overlap": True}])
def test_arithmetic_of_training_is_what_torch_counts(make_model, layer):
    model = make_model(**layer)
    x, t = torch.randn(5, 4, 12, 8), torch.rand(5)
    class_maps = torch.zeros(5, 24, 16, dtype=torch.uint8)
    y = torch.nn.functional.one_hot(class_maps.long(), 3).permute(0, 3, 1, 2).float()
    for rows in (None, mask_rows(class_maps, 3, model.grid)):
        number = None if rows is None else len(rows.shares)
        flops = sit_flops(model, 5, number)
        with torch.no_grad():
            assert counted(lambda rows=rows: model(x, t, y, rows=rows)) == flops.forward
        assert counted(lambda rows=rows: model(x, t, y, rows=rows).square().sum().backward()) == flops.training


@torch.no_grad()
def test_arithmetic_of_a_solver_step_is_what_torch_counts(model):
    x, t = torch.randn(7, 4, 12, 8), torch.full((7,), 0.3)
    own = model.embed_mask(torch.full((7, 3, 24, 16), 1 / 3))
    shared = model.embed_mask(torch.full((7, 3, 24, 16), 1 / 3), share_rows=True)
    image = MaskCondition(own.embedding[:, :1], own.detail)
    for condition, rows in ((own, 7 * 24), (shared, 64), (image, 7)):
        flops = sit_flops(model, 7, rows, with_mask=False)
        assert counted(lambda condition=condition: model(x, t, condition)) == flops.forward
    assert sit_flops(model, 7, 7, with_mask=False).modulation == 2 * 7 * 32 * (2 * 6 + 2) * 32


def test_every_optimisation_is_turned_alone_and_all_are_off_in_the_baseline():
    ours = Mode(compiled=False)
    modes = modes_of(ours, TRAINING_SWITCHES, PixelSpace())
    assert not any(asdict(modes["as-sit"]).values()) and modes["as-sit"] == AS_SIT
    for name, mode in modes.items():
        word, _, switch = name.partition(" ")
        if word in ("with", "without"):
            changed = [field for field in asdict(ours) if getattr(mode, field) != getattr(ours, field)]
            assert [field.replace("_", " ") for field in changed] == [switch]
            assert getattr(mode, changed[0]) == (word == "with")
    assert "without bf16" in modes and "without cached latents" not in modes and "without compiled" not in modes


@pytest.fixture
def counter(monkeypatch) -> CompileCounter:
    """Compiled graphs run as they are: no C++ compiler is needed."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.mark.usefixtures("one_block")
def test_every_part_writes_numbers_a_table_and_a_plot(tmp_path, counter):
    parts = ["modulation", "training", "sampling", "scaling"]
    words = ["--preset", "tiny", "--device", "cpu", "--parts", *parts, "--output", str(tmp_path / "out" / "tiny")]
    bench.main(bench.parse_args(words))
    report = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert list(report["parts"]) == parts and all(report["parts"].values())
    trained = {row["mode"]: row for row in report["parts"]["training"]}
    assert trained["ours"]["faster_than_as_sit"][0] > 0 and trained["ours"]["slower_than_ours"] == [1, 1, 1]
    assert trained["as-sit"]["flops"] > trained["one condition per image"]["flops"]
    sampled = {row["mode"]: row for row in report["parts"]["sampling"] if "guidance 1" in row["setup"]}
    assert sampled["ours"]["network_calls"] == 2 < sampled["without fixed solver"]["network_calls"]
    assert "## training" in (tmp_path / "out" / "tiny.md").read_text()
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 1000


def test_compiled_twin_trains_the_same_parameters(tmp_path, counter):
    run = TrainingBench(bench.PRESETS["tiny"].training[0], CPU, PixelSpace(), tmp_path / "pairs")
    before = [parameter.clone() for parameter in run.model.parameters()]
    assert run(Mode(compiled=True)).seconds > 0
    assert counter.frame_count > 0
    twin = run.network(Mode(compiled=True))
    assert all(one is other for one, other in zip(run.model.parameters(), twin.parameters(), strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(run.model.parameters(), before, strict=True))


@pytest.mark.slow
def test_two_ranks_take_steps(tmp_path):
    machine_bench = bench.Bench(bench.parse_args(["--preset", "tiny", "--device", "cpu", "--parts", "ranks"]), CPU)
    assert machine_bench.run_ranks(2) > 0


def test_no_round_begins_after_the_deadline():
    runs = {"a": lambda: 1, "b": lambda: 2}
    assert interleave(runs, rounds=3, deadline=0) == {"a": [1]}
    assert interleave(runs, rounds=3, deadline=0, always=("a", "b")) == {"a": [1], "b": [2]}
    assert interleave(runs, rounds=3, deadline=float("inf")) == {"a": [1, 1, 1], "b": [2, 2, 2]}


def test_masks_of_the_benchmark_are_cells_on_background():
    masks = draw_masks(4, 64, num_classes=3)
    assert masks.shape == (4, 64, 64) and set(masks.ravel()) == {0, 1, 2}
    assert 0.05 < (masks > 0).mean() < 0.6


def test_a_network_is_built_on_its_device_with_all_that_belongs_to_it():
    """On a GPU. The device without memory stands for it: positions once stayed on the CPU."""
    model = Setup("SiT-Ti/8", 16, False, batch=2).build(torch.device("meta"))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
