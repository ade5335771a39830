"""Batches of training steps: which images they hold, loading in the background, and the time spent waiting."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data import Sampler as BatchSampler

from common.errors import STOP_SIGNALS, InputError, one_line
from dataset.groups import members_of

Batch = dict[str, Any]
READY_BATCHES = 2  # fetched before they are asked for


class StepBatches(BatchSampler):
    """Keys (index, draw) of the batch of each training step on one rank.

    The data set is an endless stream. Epoch e is a permutation that depends on (seed, e). Each step takes the next
    ``global_batch_size`` positions of the stream, and the ranks divide them. So the images of a step depend on the seed
    and on the number of images before it. They do not depend on the number of ranks or workers, or on interruptions. If
    the set is smaller than a batch, a batch holds images several times.

    Unlabelled images are a second stream. They get an evenly spread fraction of the positions.

    Args:
        num_items: number of images in the data set.
        global_batch_size: images per step over all ranks, a multiple of the number of ranks.
        steps: steps to take, such as range(first, last).
        seed: seed of the permutations.
        rank: number of this process.
        world_size: number of processes.
        images_seen: images before the first of these steps. None: steps.start x global_batch_size.
        num_unlabelled: number of unlabelled images. Their indices follow those of the labelled ones.
        unlabelled_share: fraction of positions for unlabelled images, below 1, rounded to thousandths.
        groups: group of each image, labelled ones first. Each group comes equally often. Empty: each image does.
    """

    def __init__(
        self,
        num_items: int,
        global_batch_size: int,
        steps: range,
        seed: int,
        rank: int,
        world_size: int,
        images_seen: int | None = None,
        num_unlabelled: int = 0,
        unlabelled_share: float = 0.0,
        groups: Sequence[str] = (),
    ) -> None:
        self.num_items = num_items
        self.global_batch_size = global_batch_size
        self.steps = steps
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.images_seen = steps.start * global_batch_size if images_seen is None else images_seen
        self.num_unlabelled = num_unlabelled
        self.unlabelled_thousandths = round(1000 * unlabelled_share) if num_unlabelled else 0
        self.groups = groups

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        labelled = _stream(self.num_items, (self.seed,), self.groups[: self.num_items])
        unlabelled = _stream(self.num_unlabelled, (self.seed, 1), self.groups[self.num_items :])
        for number in range(len(self.steps)):
            first = self.images_seen + number * self.global_batch_size
            mine = range(first + (self.rank - first) % self.world_size, first + self.global_batch_size, self.world_size)
            keys = []
            for position in mine:
                before = position * self.unlabelled_thousandths // 1000  # unlabelled images before this position
                if (position + 1) * self.unlabelled_thousandths // 1000 > before:
                    index = self.num_items + unlabelled[before]
                else:
                    index = labelled[position - before]
                keys.append((index, position))
            yield keys


class _Stream:
    """Endless indices: one permutation after the other. Each depends on the seed and its number only."""

    def __init__(self, num_items: int, seed: tuple[int, ...]) -> None:
        self.num_items, self.seed = num_items, seed
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> int:
        if number // self.num_items != self.epoch:
            self.epoch = number // self.num_items
            self.order = np.random.default_rng((*self.seed, self.epoch)).permutation(self.num_items)
        return int(self.order[number % self.num_items])


class _BalancedStream:
    """Endless indices: the groups in turn. Each group has its own stream of members."""

    def __init__(self, seed: tuple[int, ...], groups: Sequence[str]) -> None:
        self.members = members_of(groups)
        self.streams = [_Stream(len(one), (*seed, 2, number)) for number, one in enumerate(self.members)]

    def __getitem__(self, number: int) -> int:
        turn, group = divmod(number, len(self.members))
        return self.members[group][self.streams[group][turn]]


def _stream(num_items: int, seed: tuple[int, ...], groups: Sequence[str]) -> _Stream | _BalancedStream:
    return _BalancedStream(seed, groups) if groups else _Stream(num_items, seed)


class CarefulDataset(Dataset):
    """Returns faults of the user's files instead of raising them.

    A loader process would turn an exception into a traceback in one string.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self.dataset[key]
        except (InputError, OSError) as error:
            return InputError(one_line(error))


def collate(items: list[Any]) -> Batch | InputError:
    """A batch, or the first fault among its items."""
    return next((item for item in items if isinstance(item, InputError)), None) or default_collate(items)


def make_loader(dataset: Dataset, batches: StepBatches, workers: int, pin_memory: bool) -> DataLoader:
    """Loader of the batches, with ``workers`` processes. With 0, this process loads them."""
    return DataLoader(
        CarefulDataset(dataset), batch_sampler=batches, collate_fn=collate,
        num_workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0, worker_init_fn=outlive_signals,
        # forked processes share the images in memory
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )  # fmt: skip


def outlive_signals(worker: int) -> None:
    """Ignore signals that ask a run to end, in a loader process.

    torchrun and Slurm send them to all processes of a run. The run needs batches until it has saved. Then it ends its
    loader processes. If it is killed, they end by themselves within seconds.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_loaders() -> None:
    """Kill the loader processes that are left when the program ends.

    An error can hold them: its traceback knows their loader. Python ends its children by a signal that loaders ignore,
    and would then wait for them forever.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def prefetch(batches: Iterable[Batch | InputError], prepare: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """``prepare(batch)`` of every batch in order. One thread loads ahead while earlier batches are used.

    Raises:
        InputError: a batch could not be loaded.
    """
    iterator = iter(batches)  # in this thread, because a loader takes one number from torch's global generator
    atexit.unregister(end_loaders)
    atexit.register(end_loaders)  # after the loader has registered its own: what is registered last runs first

    def fetch() -> Batch | None:
        batch = next(iterator, None)
        if isinstance(batch, InputError):
            raise batch
        return None if batch is None else prepare(batch)

    with ThreadPoolExecutor(1) as pool:
        ready = deque(pool.submit(fetch) for _ in range(READY_BATCHES))
        while (batch := ready.popleft().result()) is not None:
            ready.append(pool.submit(fetch))
            yield batch


class WaitingClock:
    """Measures how long the device is idle because the next batch is late.

    A GPU works behind the program. There, the time runs on the clock of the GPU, from the end of a step's work to the
    arrival of the next batch. Steps do not wait for the device; only ``read_seconds`` does.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._waits: list[tuple[Any, Any]] = []  # begin and end

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Return the same batches, and measure the time until each arrives."""
        iterator = iter(batches)
        while True:
            begin = self._now()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waits.append((begin, self._now()))
            yield batch

    def read_seconds(self) -> float:
        """Seconds of waiting since the last call. Waits until the device has reached the last batch."""
        waits, self._waits = self._waits, []
        if self.on_gpu and waits:
            waits[-1][1].synchronize()  # a GPU can only subtract times that it has reached
            return sum(begin.elapsed_time(end) for begin, end in waits) / 1000
        return sum(end - begin for begin, end in waits)
