"""Batches of training: every image once per epoch, in an order that a resumed run repeats."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils.data import Dataset

from common.errors import STOP_SIGNALS, InputError
from dataset.batches import StepBatches, WaitingClock, make_loader, prefetch
from dataset.files import FileError

ROOT = Path(__file__).parents[1]


def batches(steps: range, rank: int = 0, world_size: int = 1, items: int = 7, size: int = 4) -> list:
    return list(StepBatches(items, size, steps, seed=3, rank=rank, world_size=world_size))


def test_every_image_is_seen_once_per_epoch_across_batches():
    keys = [key for batch in batches(range(7)) for key in batch]  # 7 steps x 4 = 4 epochs of 7
    assert all(Counter(index for index, _ in keys[7 * epoch : 7 * epoch + 7]).total() == 7 for epoch in range(4))
    assert all(len({index for index, _ in keys[7 * epoch : 7 * epoch + 7]}) == 7 for epoch in range(4))
    assert [draw for _, draw in keys] == list(range(28))


def test_epochs_have_different_orders():
    keys = [index for batch in batches(range(7)) for index, _ in batch]
    assert keys[:7] != keys[7:14]


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one():
    assert batches(range(9))[5:] == batches(range(5, 9))


def test_another_batch_size_goes_on_where_the_images_seen_end():
    before = [key for batch in StepBatches(7, 4, range(5), 3, 0, 1) for key in batch]
    after = [key for batch in StepBatches(7, 6, range(5, 9), 3, 0, 1, images_seen=20) for key in batch]
    assert before + after == [key for batch in StepBatches(7, 1, range(44), 3, 0, 1) for key in batch]


def test_ranks_share_out_the_same_global_batch():
    whole, halves = batches(range(5)), [batches(range(5), rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    assert all(len(batch) == 2 for half in halves for batch in half)


def test_a_set_smaller_than_a_batch_is_seen_several_times():
    (batch,) = batches(range(1), items=3, size=8)
    assert set(Counter(index for index, _ in batch).values()) <= {2, 3}


def test_prefetch_keeps_the_order_and_prepares_every_batch():
    assert list(prefetch([{"n": n} for n in range(7)], lambda batch: batch["n"] ** 2)) == [n**2 for n in range(7)]


def test_prefetch_hands_on_what_went_wrong():
    def refuse(batch: dict) -> dict:
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        next(prefetch([{}], refuse))


class Torn(Dataset):
    """A file that is gone when it is read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: tuple[int, int]) -> int:
        if key[0] == 2:
            raise FileError("image.png", "no such file")
        return key[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_missing_is_one_line_whoever_reads_it(workers):
    loader = make_loader(Torn(), StepBatches(4, 4, range(1), 0, 0, 1), workers, pin_memory=False)
    with pytest.raises(InputError, match=r"^image\.png: no such file$"):
        list(prefetch(loader, lambda batch: batch))


def test_a_program_that_ends_while_an_error_holds_its_loader_does_not_wait_for_it():
    """The loader process ignores the signal by which Python ends its children: the program once waited forever."""
    program = """
import sys
from test_dataset_batches import InputError, StepBatches, Torn, make_loader, prefetch

def run():
    loader = make_loader(Torn(), StepBatches(4, 4, range(1), 0, 0, 1), 1, pin_memory=False)
    list(prefetch(loader, lambda batch: batch))

try:
    run()
except InputError:
    sys.exit(2)
"""
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": places}, timeout=100)
    assert done.returncode == 2


class Loaders(Dataset):
    """Each item is the id of the process that loads it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: tuple[int, int]) -> int:
        return os.getpid()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_a_loader_process_leaves_the_batches_to_the_run(number):
    """torchrun and Slurm send a signal to every process of a run. The run still needs batches until it has saved."""
    loader = make_loader(Loaders(), StepBatches(1, 1, range(40), 0, 0, 1), workers=1, pin_memory=False)
    batches = iter(loader)
    child = next(batches).item()
    assert child != os.getpid()
    os.kill(child, number)
    assert [batch.item() for batch in batches] == [child] * 39


def test_prefetch_works_while_a_batch_is_used():
    fetched = []
    stream = prefetch(({"n": n} for n in range(9)), lambda batch: fetched.append(batch["n"]) or batch)
    next(stream)
    deadline = time.monotonic() + 10
    while fetched != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert fetched == [0, 1, 2]  # two more than were asked for, and no more
    stream.close()


def test_waiting_is_the_time_until_batches_come_and_not_the_time_of_steps():
    def late():
        for n in range(3):
            time.sleep(0.05)
            yield {"n": n}

    clock, started = WaitingClock(torch.device("cpu")), time.perf_counter()
    for _ in clock.watch(late()):
        time.sleep(0.1)
    total, waited = time.perf_counter() - started, clock.read_seconds()
    assert 0.15 <= waited <= total - 0.3
    assert clock.read_seconds() == 0


class LateEvent:
    """A time on the clock of a device that works behind the program, with the rules of torch.cuda.Event.

    The device has done the first ``done`` of all recorded events.
    """

    recorded: ClassVar[list[LateEvent]] = []
    done = 0

    def record(self) -> None:
        self.recorded.append(self)

    def synchronize(self) -> None:
        LateEvent.done = max(LateEvent.done, self.recorded.index(self) + 1)

    def elapsed_time(self, end: LateEvent) -> float:
        first, last = self.recorded.index(self), self.recorded.index(end)
        if max(first, last) >= self.done:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1000.0 * (last - first)


def test_waiting_on_a_gpu_is_read_when_the_gpu_has_come_so_far(monkeypatch):
    monkeypatch.setattr(LateEvent, "recorded", [])
    monkeypatch.setattr(LateEvent, "done", 0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: LateEvent())
    clock = WaitingClock(torch.device("cuda"))
    list(clock.watch([{"n": 0}, {"n": 1}]))
    assert clock.read_seconds() == 2  # one second for each batch
    assert LateEvent.done == 4 < len(LateEvent.recorded)  # it waits for the arrival of the last batch, not longer
    assert clock.read_seconds() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_waiting_is_read_while_a_gpu_still_works():
    device = torch.device("cuda")
    clock, numbers = WaitingClock(device), torch.rand(4096, 4096, device=device)
    for _ in clock.watch([{"n": 0}, {"n": 1}]):
        for _ in range(50):
            numbers = torch.nn.functional.normalize(numbers @ numbers)
    assert 0 <= clock.read_seconds() < 60
