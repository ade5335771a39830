"""Processes of a launch meet, wait for each other and name the one that is missing; threads stand for processes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from script_helpers import state, write_pairs
from torch._inductor.exc import CppCompileError

import sample_ddp
import train
from common.errors import InputError, LostProcess, with_flags
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.unlabelled import UnlabelledFolder
from engine import agreement, peers
from engine.agreement import agree_on_checkpoint, agree_on_run, agree_on_set
from engine.checkpoint import save_checkpoint
from engine.machine import Machine
from engine.peers import Peers, meet
from engine.run_folder import RunFolder
from settings import resolve, sampling_settings


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Everything that takes minutes takes tenths of a second."""
    bounds = {"MEETING": 1.0, "BEAT": 0.02, "SILENT": 0.4, "LOOK": 0.3, "STANDSTILL": 0.8, "ANSWER": 0.4}
    for name, seconds in bounds.items():
        monkeypatch.setattr(peers, f"{name}_SECONDS", seconds)


def together(*work: Callable[[], object]) -> list[object]:
    """All at once; an exception counts as a result."""
    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(one) for one in work]
        return [future.exception() or future.result() for future in futures]


@contextlib.contextmanager
def launch(*hosts: str) -> Iterator[list[Peers]]:
    """Processes that have met."""
    store = dist.HashStore()
    found = [Peers(store, rank, list(hosts)) for rank in range(len(hosts))]
    try:
        yield found
    finally:
        for one in found:
            one.leave()


def late(seconds: float, work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        time.sleep(seconds)
        return work()

    return run


@pytest.mark.parametrize("last", [0, 1, 2])
def test_living_processes_share_a_part_of_the_store_that_dead_ones_never_wrote_to(last):
    store = dist.HashStore()
    before = together(*(lambda rank=rank: meet(store, rank, 3) for rank in range(3)))
    for part, _ in before:
        part.set("address/0", "of a dead process")
    delays = [0.2 if rank == last else 0.0 for rank in range(3)]
    now = together(*(late(delay, lambda rank=rank: meet(store, rank, 3)) for rank, delay in enumerate(delays)))
    parts = [part for part, _ in now]
    assert not any(part.check(["address/0"]) for part in parts)
    parts[0].set("address/0", "of a living one")
    assert {part.get("address/0") for part in parts} == {b"of a living one"}
    assert all(len(hosts) == 3 for _, hosts in now)


def test_a_process_that_died_in_the_middle_of_the_meeting_is_not_taken_for_its_successor():
    """Its name is in the store and gets an answer, which nobody reads."""
    store = dist.HashStore()
    store.set("hello/1", "0123456789abcdef nodeb")
    one, other = together(lambda: meet(store, 0, 2), late(0.2, lambda: meet(store, 1, 2)))
    assert store.check(["answer/0123456789abcdef"])
    one[0].set("key", "value")
    assert other[0].get("key") == b"value"


def test_a_process_that_does_not_come_is_named_to_all_with_the_machine_that_it_was_on():
    store = dist.HashStore()
    store.set("hello/2", "0123456789abcdef nodec")
    errors = together(lambda: meet(store, 0, 4), lambda: meet(store, 1, 4))
    assert {str(error) for error in errors} == {"no word from process 2 (it was on nodec), process 3 in 1 s"}
    assert all(isinstance(error, LostProcess) for error in errors)


def test_without_the_first_process_the_others_end():
    with pytest.raises(LostProcess, match="no word from process 0"):
        meet(dist.HashStore(), 1, 2)


def test_a_wait_lasts_as_long_as_the_others_get_on():
    def work(one: Peers) -> None:
        for _ in range(12):
            time.sleep(0.1)  # 1.2 s in all, above every bound
            one.progress()
        one.wait_for_all("work")

    with launch("nodea", "nodeb") as (first, second):
        assert together(lambda: first.wait_for_all("work"), lambda: work(second)) == [None, None]


def test_a_wait_for_many_asks_the_store_for_each_once_a_second_only(monkeypatch):
    """All ask the same store: as many requests as processes, for each of them."""
    monkeypatch.setattr(peers, "SILENT_SECONDS", 120.0)
    requests, check = [], peers.Requests.check
    monkeypatch.setattr(peers.Requests, "check", lambda self, keys: requests.append(keys) or check(self, keys))
    with launch(*("nodea" for _ in range(16))) as (first, *others):
        together(lambda: first.wait_for_all("work"), late(0.5, lambda: [one.arrive() for one in others]))
    assert len(requests) < 40


def test_who_waits_hears_what_another_process_ended_on():
    def fail(one: Peers) -> None:
        with one.sharing_errors():
            raise InputError("images/a.png: no such file")

    with launch("nodea", "nodeb") as (first, second):
        error, _ = together(lambda: first.wait_for_all("work"), lambda: fail(second))
    assert str(error) == "process 1 on nodeb ended: images/a.png: no such file"


def test_a_process_that_ends_for_the_sake_of_another_passes_on_whose():
    def follow(one: Peers) -> None:
        with one.sharing_errors():
            one.wait_for_all("work")

    with launch("nodea", "nodeb", "nodec") as (first, second, third):
        third.leave("full disk")
        errors = together(lambda: first.wait_for_all("work"), lambda: follow(second))
        late_one = together(lambda: first.wait_for_all("work"))
    assert {str(error) for error in [*errors, *late_one]} == {"process 2 on nodec ended: full disk"}


def test_a_process_without_a_sign_of_life_counts_as_gone():
    with launch("nodea", "nodeb") as (first, second):
        second.leave()
        begun = time.monotonic()
        with pytest.raises(LostProcess, match="process 1 on nodeb has given no sign of life"):
            first.wait_for_all("work")
        assert time.monotonic() - begun < 2


def test_a_process_that_lives_and_stands_still_is_not_waited_for_without_end():
    line = r"process 1 on nodeb lives and has not got on .* .encode images"
    with launch("nodea", "nodeb") as (first, _), pytest.raises(LostProcess, match=line):
        first.wait_for_all("encode images")


def test_a_long_wait_is_said(monkeypatch, caplog):
    monkeypatch.setattr(peers, "REMINDER_SECONDS", 0.2)
    with launch("nodea", "nodeb") as (first, second):
        together(lambda: first.wait_for_all("work"), late(0.5, lambda: second.wait_for_all("work")))
    assert "waiting for process 1 on nodeb (work)" in caplog.text


@pytest.mark.parametrize(
    ("torch_says", "ours"),
    [
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", "process 1 on nodeb is gone"),
        ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1ms for send", "process 1 on nodeb is gone"),
    ],
)
def test_a_failed_exchange_names_the_process_that_is_gone(torch_says, ours):
    with launch("nodea", "nodeb", "nodec") as (first, second, _):
        second.leave()
        with pytest.raises(LostProcess, match=f"^{ours} without a word$"), first.sharing_errors():
            raise RuntimeError(torch_says)


def test_a_timeout_a_refusal_and_a_broken_connection_are_told_apart_where_all_live():
    def said(text: str) -> str:
        with launch("nodea", "nodeb", "nodec") as (first, second, _):
            second.progress()
            first.progress()
            time.sleep(0.1)
            with pytest.raises(LostProcess) as caught, first.sharing_errors():
                raise RuntimeError(f"[/build/gloo/transport/tcp/pair.cc:81] {text}")
            return str(caught.value)

    assert said("Timed out waiting 600000ms").startswith("waited too long for process 2 on nodec; every process lives")
    assert "refused" in said("Connect error: Connection refused") and "GLOO_SOCKET_IFNAME" in said("refused")
    assert said(
        "Broken pipe"
    ) == "the connection to another process broke (pair.cc:81 Broken pipe)" or "Broken pipe" in said("Broken pipe")


@pytest.mark.parametrize(
    "torch_says", ["Connect timeout [127.0.1.1]:4711", "Gloo connectFullMesh failed with timed out connecting: x"]
)
def test_a_connection_that_times_out_at_the_start_names_the_variables_of_the_network(torch_says):
    """A machine whose name is a loopback address tells it to the others, and waits for them in vain."""
    with launch("nodea", "nodeb") as (first, _), pytest.raises(LostProcess) as caught, first.sharing_errors():
        raise RuntimeError(f"[/gloo/transport/tcp/device.cc:81] {torch_says}")
    assert "timed out, and every process lives" in str(caught.value) and "GLOO_SOCKET_IFNAME" in str(caught.value)


class StoreOfASilentMachine:
    """A store that gives no answer once it is silent; torch sets no end to such a request."""

    def __init__(self) -> None:
        self.store, self.is_silent, self.end = dist.HashStore(), False, threading.Event()

    def __getattr__(self, name: str) -> Callable[..., object]:
        def request(*values: object) -> object:
            if self.is_silent:
                self.end.wait(20)
            return getattr(self.store, name)(*values)

        return request


@pytest.mark.parametrize("moment", ["wait", "exchange"])
def test_a_silent_machine_of_the_store_ends_every_wait_in_words(moment):
    store = StoreOfASilentMachine()
    one = Peers(store, 1, ["nodea", "nodeb"])
    store.is_silent = True
    begun = time.monotonic()
    with pytest.raises(LostProcess, match="network is down .the store gives no answer in 0 s"), one.sharing_errors():
        if moment == "wait":
            one.wait_for_all("work")
        raise RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1ms for send")
    assert time.monotonic() - begun < 1.2  # one request has to wait, and not each of them
    store.end.set()


COMPILER = CppCompileError(["g++", "a.cpp"], "error: tmp3.store(out_ptr0 + gloo);")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("shapes do not match"), "shapes do not match"),
        (RuntimeError("cannot restore the weights"), "cannot restore the weights"),
        (RuntimeError("/home/igloo/a.pt: tmp3.store(out_ptr0)"), "/home/igloo/a.pt: tmp3.store(out_ptr0)"),
        (COMPILER, "--compile: torch.compile cannot build the network"),
        (RuntimeError("NCCL error: out of memory"), "out of memory on this machine"),
    ],
)
def test_an_error_of_our_own_is_no_lost_process(error, words):
    with launch("nodea", "nodeb") as (first, second):
        with pytest.raises(type(error)) as caught, first.sharing_errors():
            raise error
        assert caught.value is error and second.words_of(0).startswith(words)


@pytest.mark.parametrize("kind", [dist.DistStoreError, dist.DistNetworkError, dist.DistBackendError])
def test_an_error_of_a_class_for_connections_is_one_whatever_it_says(kind):
    with launch("nodea", "nodeb") as (first, second):
        second.leave("full disk")
        with pytest.raises(LostProcess, match="process 1 on nodeb ended: full disk"), first.sharing_errors():
            raise kind("failed to recv, got 0 bytes")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([{"step": 3, "data": None}] * 2, None),
        ([{"step": 3, "data": None}, {"step": 3, "data": 1}], None),  # None: not known there
        ([{"step": 0}, {"step": 1}], "step: process 0 on nodea has 0, process 1 on nodeb has 1. Mend it."),
        ([{}, {"scale": 2}], "scale: process 0 on nodea has nothing, process 1 on nodeb has 2. Mend it."),
        ([{"scale": 2}, {}], "scale: process 0 on nodea has 2, process 1 on nodeb has nothing. Mend it."),
    ],
)
def test_processes_that_found_different_things_all_end_with_the_same_line(found, says):
    cpu = torch.device("cpu")
    with launch("nodea", "nodeb") as both:
        machines = [Machine(one.rank, 2, cpu, "float32", one) for one in both]
        work = [
            lambda machine=machine, values=values: machine.check_same(values, "Mend it.")
            for machine, values in zip(machines, found, strict=True)
        ]
        errors = together(*work)
    assert [str(error) for error in errors] == [str(says)] * 2


@pytest.mark.parametrize("has", ["nothing", "another", "more"])
def test_a_run_does_not_begin_if_a_process_sees_another_checkpoint(tmp_path, monkeypatch, has):
    """Folders that are not shared: one process would continue and the other begin anew, without a word."""
    monkeypatch.setattr(agreement, "SEEN_AFTER_SECONDS", 0.1)
    folders = [RunFolder(tmp_path / name / "run", keep=2) for name in ("nodea", "nodeb")]
    for number, folder in enumerate(folders):
        folder.create()
        if has == "another" or (has == "nothing") == (number == 0):
            folder.save(state(10) | {"note": number})
    paths = [folder.checkpoint_path(10) if has != "more" else None for folder in folders]
    with launch("nodea", "nodeb") as both:
        machines = [Machine(one.rank, 2, torch.device("cpu"), "float32", one) for one in both]
        work = [
            lambda machine=machine, folder=folder, path=path: agree_on_checkpoint(machine, folder, path)
            for machine, folder, path in zip(machines, folders, paths, strict=True)
        ]
        errors = together(*work)
        said = [str(error).partition(" All processes must see ")[0] for error in errors]
        assert said[0] == said[1] and said[0].startswith("checkpoint to continue from: process 0 on nodea has ")
        assert all(isinstance(error, InputError) and "put it on a disk" in str(error) for error in errors)
        shared = [lambda machine=machine: agree_on_checkpoint(machine, folders[1], None) for machine in machines]
        assert together(*shared) == [None, None]


@pytest.mark.parametrize("is_own", [True, False])
def test_the_place_that_all_must_see_is_that_of_the_checkpoint(tmp_path, monkeypatch, is_own):
    """A checkpoint of another run may lie on a local disk, while the run folder is shared."""
    monkeypatch.setattr(agreement, "SEEN_AFTER_SECONDS", 0.1)
    folder = RunFolder(tmp_path / "results" / "run", keep=2)
    folder.create()
    path = folder.checkpoint_path(10) if is_own else tmp_path / "local" / "0000010.pt"
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, state(10))
    seen = [path, path.with_name("absent.pt")]  # by each of the machines
    with launch("nodea", "nodeb") as both:
        machines = [Machine(one.rank, 2, torch.device("cpu"), "float32", one) for one in both]
        work = [
            lambda machine=machine, own=own: agree_on_checkpoint(machine, folder, own)
            for machine, own in zip(machines, seen, strict=True)
        ]
        errors = together(*work)
    place = tmp_path / "results" if is_own else tmp_path / "local"
    assert all(f"All processes must see {place}: put it on a disk" in str(error) for error in errors)


DATA = DataConfig(image_size=16, crop="random", channels=1)
WORDS = ["--data-path", "i", "--mask-path", "m", "--vae", "none", "--image-size", "16", "--model", "SiT-Ti/8"]


def agree(tmp_path: Path, *others: dict[str, Any]) -> list[str]:
    """What every process says; each has its own flags, groups, and files of other seeds. The last two share a host."""
    usual: dict[str, Any]
    usual = {"flags": [], "groups": ["a", "b", "b"] * 3, "seed": 0, "count": 6, "new": 1, "unlabelled": 3}
    usual |= {"autoencoder": "a", "cache": None}
    runs = []
    for number, own in enumerate(others):
        it = usual | own
        pairs = PairedFolder(*write_pairs(tmp_path / f"pairs_{number}", it["count"], seed=it["seed"]), DATA)
        images, _ = write_pairs(tmp_path / f"more_{number}", it["unlabelled"], (30, 24), seed=it["new"])
        unlabelled = [UnlabelledFolder(images, DATA, seed=0, progress=False)]
        config = resolve(train.parse_args([*WORDS, *it["flags"]]))
        config = replace(config, train=replace(config.train, latent_cache=it["cache"]))
        runs.append((config, pairs, unlabelled, it["groups"], it["autoencoder"]))
    with launch("nodea", "nodeb", "nodeb") as three:
        machines = [Machine(one.rank, 3, torch.device("cpu"), "float32", one) for one in three]
        work = [
            lambda machine=machine, run=run: agree_on_run(machine, *run)
            for machine, run in zip(machines, runs, strict=True)
        ]
        return [str(error).partition(". Give the same")[0] for error in together(*work)]


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"flags": ["--lr", "2e-3"]}, "lr: process 0 on nodea has 0.0001, process 2 on nodeb has 0.002"),
        ({"flags": ["--max-steps", "7"]}, "max_steps: process 0 on nodea has None, process 2 on nodeb has 7"),
        ({"count": 5}, "number of pairs: process 0 on nodea has 6, process 2 on nodeb has 5"),
        ({"unlabelled": 4}, "number of unlabelled images: process 0 on nodea has 3, process 2 on nodeb has 4"),
        ({"groups": ["a", "b", "c"] * 3}, "number of groups: process 0 on nodea has 2, process 2 on nodeb has 3"),
        ({"groups": ["b", "a", "b"] * 3}, "groups of the images: process 0 on nodea has checksum "),
        ({"groups": []}, "number of groups: process 0 on nodea has 2, process 2 on nodeb has 0"),
        ({"autoencoder": "b"}, "autoencoder: process 0 on nodea has a, process 2 on nodeb has b"),
        ({"cache": "kept"}, "latent_cache: process 0 on nodea has no value, process 2 on nodeb has a folder"),
    ],
)
def test_processes_with_other_settings_or_groups_do_not_begin(tmp_path, own, says):
    said = agree(tmp_path, {}, {}, own)
    assert len(set(said)) == 1 and said[0].startswith(says)


@pytest.mark.parametrize(
    ("own", "says"), [({"seed": 1}, "content of the files: "), ({"new": 2}, "content of the unlabelled images: ")]
)
def test_one_process_of_each_machine_compares_the_content_of_the_files(tmp_path, own, says):
    said = agree(tmp_path, {}, own, own)
    assert len(set(said)) == 1 and said[0].startswith(says)


def test_equal_runs_begin_and_each_machine_may_keep_its_files_elsewhere(tmp_path):
    own = {"flags": ["--num-workers", "1", "--results-dir", "elsewhere", "--device", "cpu"]}
    first, second = {"cache": "a"}, {"cache": "b", "flags": ["--num-workers", "2"]}
    assert agree(tmp_path, first, second, own | {"cache": "c"}) == ["None"] * 3


SET = ["ODE", "--ckpt", "c.pt", "--mask-path", "m"]
LOOK = {"source": "training", "index": None}
JUDGE = ["--judge-images", "i", "--judge-masks", "m"]


@pytest.mark.parametrize(
    ("flags", "own", "name", "values"),
    [
        ([], {"seed": 1}, "seed", ["0", "1"]),
        ([], {"names": ["x" * 99]}, "names", ["checksum", "checksum"]),
        (["--cfg-scale", "2"], {}, "sampling cfg_scale", ["1.0", "2.0"]),
        (["--look-scale", "2"], {}, "sampling look_scale", ["nothing", "2.0"]),
        ([], {"look": LOOK | {"groups": ["g1"]}}, "look groups", ["nothing", "['g1']"]),
        ([], {"look": LOOK | {"balanced": True}}, "look balanced", ["nothing", "True"]),
        ([], {"look": None}, "look source", ["training", "nothing"]),
        (["--shard", "2/2"], {}, "--shard", ["nothing", "2/2"]),
        (["--min-fidelity", "0.8", *JUDGE], {}, "--min-fidelity", ["nothing", "0.8"]),
    ],
)
@pytest.mark.parametrize("is_first", [False, True])
def test_processes_with_other_settings_make_no_mixed_set(flags, own, name, values, is_first):
    """What is not set has no key in the settings, be it on the first process or on another one."""
    usual: dict[str, Any] = {"seed": 0, "look": LOOK, "precision": "auto", "names": ["y" * 99]}

    def settings(words: list[str], made_with: dict[str, Any]) -> dict[str, Any]:
        args = sample_ddp.parse_args([*SET, *words])
        return sample_ddp.compared(args, {**usual, "sampling": sampling_settings(args).to_dict(), **made_with})

    found = [settings([], {}), settings([], {}), settings(flags, own)]
    with launch("nodea", "nodeb", "nodeb") as three:
        machines = [Machine(one.rank, 3, torch.device("cpu"), "float32", one) for one in three]
        work = [
            lambda machine=machine, one=one: agree_on_set(machine, one, [])
            for machine, one in zip(machines, reversed(found) if is_first else found, strict=True)
        ]
        said = [with_flags(error.marked) for error in together(*work) if isinstance(error, InputError)]
    one, two = reversed(values) if is_first else values
    place = "process 1 on nodeb" if is_first else "process 2 on nodeb"
    assert len(said) == 3 and len(set(said)) == 1 and "Give the same command" in said[0]
    assert said[0].startswith(f"{name}: process 0 on nodea has {one}") and f", {place} has {two}" in said[0]


def test_machines_with_other_masks_of_the_same_names_make_no_mixed_set(tmp_path):
    folders = [write_pairs(tmp_path / str(seed), 2, seed=seed)[1] for seed in (0, 1)]
    paths = [sorted(folder.iterdir()) for folder in folders]
    with launch("nodea", "nodeb") as both:
        machines = [Machine(one.rank, 2, torch.device("cpu"), "float32", one) for one in both]
        same = [lambda machine=machine: agree_on_set(machine, {}, paths[0]) for machine in machines]
        assert together(*same) == [None, None]
        others = [
            lambda machine=machine, own=own: agree_on_set(machine, {}, own)
            for machine, own in zip(machines, paths, strict=True)
        ]
        assert all(str(error).startswith("content of the masks: ") for error in together(*others))
