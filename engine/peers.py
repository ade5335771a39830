"""The processes of one launch: how they meet, how they wait for each other, and what became of one that is missing.

The processes share a key-value store (a TCPStore, which torchrun runs). Three things go through it:

1. **A fresh start.** torchrun keeps one store for all restarts of a launch, and the addresses of dead processes stay in
   it. A process that reads one connects to nobody, or waits for a connection that never comes. So the living ones first
   agree on a random token, and use no key without it.
2. **Signs of life.** Every process writes a number every few seconds. Whoever waits sees who is still there, so that
   long work of one process is no error, and a lost machine is noticed in minutes.
3. **Last words.** A process that ends on an error writes its message. The others, on other machines, can then say it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch.distributed as dist

from common.errors import InputError, LostProcess, list_some, one_line, unmarked
from common.faults import fault_of_machine, short_line

logger = logging.getLogger(__name__)
T = TypeVar("T")

MEETING_SECONDS = 300.0  # until all processes have started; imports from a shared disk take minutes
BEAT_SECONDS = 2.0  # between signs of life
SILENT_SECONDS = 120.0  # without a sign of life a process counts as gone
STANDSTILL_SECONDS = 7200.0  # a living process may work so long without a sign of progress
REMINDER_SECONDS = 300.0  # between lines that say who is waited for
LOOK_SECONDS = 10.0  # in which a failed exchange finds out who is gone
STORE_TIMEOUT = timedelta(minutes=2)  # until the store is found
ANSWER_SECONDS = 120.0  # of one request to the store
# In what torch says of a connection, if the error has no class of its own.
EXCHANGE_FAILED = r"\b[Gg]loo\b|NCCL|\bnccl|TCPStore"
TIMED_OUT = r"[Tt]imed? ?out|[Tt]imeout"
REFUSED = r"refused"
CONNECTING = r"[Cc]onnect"


def join_peers() -> Peers:
    """Meet the other processes of this launch.

    Raises:
        LostProcess: not all came. It names those that are missing.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=STORE_TIMEOUT))
    except (RuntimeError, ValueError) as error:
        raise LostProcess(
            f"no answer from {address}, where the processes of a launch meet ({short_line(error)})"
        ) from error
    try:
        fresh, hosts = meet(store, rank, world_size)
    except RuntimeError as error:
        if isinstance(error, LostProcess):
            raise
        raise LostProcess(f"{address}, where the processes of a launch meet, is gone ({short_line(error)})") from error
    return Peers(fresh, rank, hosts)


class Requests:
    """Requests to the store, each with an end.

    torch waits without end for an answer if the machine of the store falls silent, or if the store's process stands
    still. After one request without an answer, all later ones fail at once.

    Args:
        store: of the launch, or a part of it.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._silent = False

    def set(self, key: str, value: str) -> None:
        self._within(lambda: self._store.set(key, value))

    def get(self, key: str) -> str:
        """The value of a key that is there."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[str]:
        return [value.decode() for value in self._within(lambda: self._store.multi_get(list(keys)))]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return self._within(lambda: self._store.check(list(keys)))

    def _within(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, done in a thread that is left behind if it takes too long.

        Raises:
            RuntimeError: no answer in time, or what the request met.
        """
        answers: SimpleQueue[tuple[T | None, RuntimeError | None]] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((work(), None))
            except RuntimeError as error:
                answers.put((None, error))

        if not self._silent:
            threading.Thread(target=ask, daemon=True, name="request to the store").start()
            try:
                found, error = answers.get(timeout=ANSWER_SECONDS)
            except Empty:
                self._silent = True
            else:
                if error is not None:
                    raise error
                return found  # type: ignore[return-value]
        raise dist.DistStoreError(f"the store gives no answer in {_minutes(ANSWER_SECONDS)}")


def meet(store: dist.Store, rank: int, world_size: int) -> tuple[dist.Store, list[str]]:
    """Agree with the living processes on a part of the store that no dead one has written to.

    Every process writes a random name of its own. Rank 0 answers under each name with a token, so that no answer to a
    dead process is taken for one's own. Each confirms under the token, and rank 0 says when all have.

    Args:
        store: shared by all processes; it may hold keys of earlier ones.
        rank: of this process.
        world_size: number of processes.

    Returns:
        The part of the store, and the host of every rank.

    Raises:
        LostProcess: not all came in time.
    """
    name, host, requests = secrets.token_hex(8), socket.gethostname(), Requests(store)
    if rank == 0:
        return dist.PrefixStore(name, store), _gather(requests, name, host, world_size)
    requests.set(f"hello/{rank}", f"{name} {host}")
    token = _read(requests, f"answer/{name}", MEETING_SECONDS)
    if token is None:
        raise LostProcess(
            f"no word from process 0 in {_minutes(MEETING_SECONDS)}; it never started, or is on another network"
        )
    requests.set(f"{token}/here/{rank}", host)
    verdict = _read(requests, f"{token}/all", MEETING_SECONDS + LOOK_SECONDS)  # rank 0 is the first to give up
    if verdict is None:
        raise LostProcess("process 0 is gone: it answered, and said nothing more")
    found = json.loads(verdict)
    if found["problem"]:
        raise LostProcess(found["problem"])
    return dist.PrefixStore(token, store), found["hosts"]


def _gather(requests: Requests, token: str, host: str, world_size: int) -> list[str]:
    """Rank 0's part of ``meet``: answer whoever asks until all have confirmed. Returns the hosts."""
    hosts, deadline = {0: host}, time.monotonic() + MEETING_SECONDS
    while len(hosts) < world_size and time.monotonic() < deadline:
        for other in range(1, world_size):
            if other in hosts:
                continue
            if requests.check([f"{token}/here/{other}"]):
                hosts[other] = requests.get(f"{token}/here/{other}")
            elif requests.check([f"hello/{other}"]):  # of this launch, or of a dead process: both get an answer
                requests.set(f"answer/{requests.get(f'hello/{other}').split()[0]}", token)
        time.sleep(0.02)
    problem = ""
    missing = [other for other in range(world_size) if other not in hosts]
    if missing:
        problem = f"no word from {_missing(requests, missing)} in {_minutes(MEETING_SECONDS)}"
    ordered = [hosts.get(other, "") for other in range(world_size)]
    requests.set(f"{token}/all", json.dumps({"hosts": ordered, "problem": problem}))
    if problem:
        raise LostProcess(problem)
    return ordered


def _missing(requests: Requests, ranks: Iterable[int]) -> str:
    """Ranks, with the host that each had in an earlier attempt of this launch."""
    before = {rank: requests.get(f"hello/{rank}").split()[-1] for rank in ranks if requests.check([f"hello/{rank}"])}
    return list_some([f"process {rank}" + (f" (it was on {before[rank]})" if rank in before else "") for rank in ranks])


def _read(requests: Requests, key: str, seconds: float) -> str | None:
    """The value of a key, as soon as it is there. None if it is not there in time (``seconds``)."""
    deadline = time.monotonic() + seconds
    while not requests.check([key]):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)
    return requests.get(key)


class Peers:
    """This process among the others of its launch.

    Args:
        store: of this attempt alone; see ``meet``.
        rank: of this process.
        hosts: host of every rank.
    """

    def __init__(self, store: dist.Store, rank: int, hosts: list[str]) -> None:
        self.store, self.rank, self.hosts = store, rank, hosts
        self._requests = Requests(store)
        self._progress = 0
        self._waits = 0
        self._left = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="signs of life").start()

    @property
    def several_hosts(self) -> bool:
        return len(set(self.hosts)) > 1

    @property
    def first_on_host(self) -> bool:
        """Whether this process speaks for its machine."""
        return self.hosts.index(self.hosts[self.rank]) == self.rank

    def name(self, rank: int) -> str:
        """``process 1 on nodeb``."""
        return f"process {rank} on {self.hosts[rank]}"

    def progress(self) -> None:
        """Note that this process has got on with its work: a batch, a file, an exchange."""
        self._progress += 1

    def _beat(self) -> None:
        number = 0
        while not self._left.wait(BEAT_SECONDS if number else 0):
            number += 1
            try:
                self.store.set(f"beat/{self.rank}", f"{number} {self._progress}")
            except RuntimeError:  # whoever needs the store says so
                return

    def leave(self, words: str = "") -> None:
        """Stop the signs of life. ``words`` say what this process ended on, for the others."""
        self._left.set()
        if words:
            with contextlib.suppress(RuntimeError):
                self._requests.set(f"words/{self.rank}", words)

    # ------------------------------------------------------------------------------------------------------- waiting

    def arrive(self) -> list[str]:
        """Say that this process has come to the next point where all meet; returns the keys of all for this point."""
        self._waits += 1
        keys = [f"wait/{self._waits}/{rank}" for rank in range(len(self.hosts))]
        self._requests.set(keys[self.rank], "")
        return keys

    def wait_for_all(self, what: str) -> None:
        """Wait until every process has come to this point, for as long as the missing ones live and get on.

        Args:
            what: what the others do meanwhile, for the log.

        Raises:
            LostProcess: a process has ended, is silent, or stands still. It is named.
        """
        watch = _Watch(self, what)
        try:
            keys, pause = self.arrive(), 0.001
            while not self._requests.check(keys):
                if watch.is_due():
                    watch.look([rank for rank, key in enumerate(keys) if not self._requests.check([key])])
                time.sleep(pause)
                pause = min(0.25, pause * 1.5)
        except RuntimeError as error:
            if isinstance(error, LostProcess):
                raise
            raise self.explain(error) from error
        self.progress()

    def gather(self, text: str, what: str) -> list[str]:
        """The texts of all processes, by rank; ``what`` as in ``wait_for_all``, which says what it raises."""
        number = self._waits + 1
        self._requests.set(f"text/{number}/{self.rank}", text)
        self.wait_for_all(what)
        return self._requests.multi_get([f"text/{number}/{rank}" for rank in range(len(self.hosts))])

    def words_of(self, rank: int) -> str:
        """What a process ended on; empty while it lives."""
        key = f"words/{rank}"
        return self._requests.get(key) if self._requests.check([key]) else ""

    def beat_of(self, rank: int) -> tuple[str, str]:
        """The last sign of life, and how far its process is; two texts that change."""
        key = f"beat/{rank}"
        number, _, progress = (self._requests.get(key) if self._requests.check([key]) else "").partition(" ")
        return number, progress

    # ---------------------------------------------------------------------------------------------- what went wrong

    @contextlib.contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Tell the others what this process ends on; name the process that an exchange failed for.

        Raises:
            LostProcess: an exchange failed.
        """
        try:
            yield
        except LostProcess as error:
            self.leave(str(error))
            raise
        except RuntimeError as error:
            fault = fault_of_machine(error, {})  # such as a failed compilation, whose text may hold any word
            if fault or not (isinstance(error, dist.DistError) or re.search(EXCHANGE_FAILED, str(error))):
                self.leave(fault or short_line(error))
                raise
            lost = self.explain(error)
            self.leave(str(lost))
            raise lost from error
        except (InputError, OSError, FloatingPointError) as error:
            self.leave(unmarked(one_line(error)))
            raise
        except BaseException as error:
            self.leave("" if isinstance(error, SystemExit) else type(error).__name__)
            raise

    def explain(self, error: RuntimeError) -> LostProcess:
        """The line for an exchange that failed: who ended with which words, who is silent, or who is behind."""
        others = [rank for rank in range(len(self.hosts)) if rank != self.rank]
        try:
            before = {rank: self.beat_of(rank) for rank in others}
            deadline = time.monotonic() + LOOK_SECONDS
            while time.monotonic() < deadline:
                for rank in others:
                    if words := self.words_of(rank):
                        return LostProcess(_ended(self.name(rank), words))
                time.sleep(0.2)
            gone = [rank for rank in others if self.beat_of(rank)[0] == before[rank][0]]
            if gone:
                return LostProcess(f"{list_some([self.name(rank) for rank in gone])} is gone without a word")
            behind = [rank for rank in others if _number(self.beat_of(rank)[1]) < self._progress]
        except RuntimeError as lost_store:
            return LostProcess(f"the launch has ended, or its network is down ({short_line(lost_store)})")
        timed_out = re.search(TIMED_OUT, str(error))
        if re.search(REFUSED, str(error)) or (timed_out and re.search(CONNECTING, str(error)) and not behind):
            return LostProcess(
                f"a connection to another process {'timed out' if timed_out else 'was refused'}, and every process "
                "lives: a firewall, or the wrong network (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) "
                f"({short_line(error)})"
            )
        if timed_out:
            late = list_some([self.name(rank) for rank in behind]) if behind else "the others"
            return LostProcess(f"waited too long for {late}; every process lives, and one is stuck or very slow")
        return LostProcess(f"the connection to another process broke ({short_line(error)})")


class _Watch:
    """What one wait has seen of the processes that it waits for."""

    def __init__(self, peers: Peers, what: str) -> None:
        self.peers, self.what = peers, what
        self.begun = self.looked = self.said = time.monotonic()
        self._seen: dict[int, tuple[tuple[str, str], float, float]] = {}  # sign of life, when it and progress changed

    def is_due(self) -> bool:
        """Whether the last look was a second ago. A look at many processes takes many requests."""
        return time.monotonic() >= self.looked + min(1.0, SILENT_SECONDS / 4)

    def look(self, missing: list[int]) -> None:
        """Refuse to wait for a process that has ended, is silent or stands still."""
        self.looked = now = time.monotonic()
        for rank in missing:
            name = self.peers.name(rank)
            if words := self.peers.words_of(rank):
                raise LostProcess(_ended(name, words))
            beat = self.peers.beat_of(rank)
            last, alive, moved = self._seen.get(rank, (beat, self.begun, self.begun))
            alive = now if beat[0] != last[0] else alive
            moved = now if beat[1] != last[1] else moved
            self._seen[rank] = beat, alive, moved
            if now > alive + SILENT_SECONDS:
                raise LostProcess(
                    f"{name} has given no sign of life for {_minutes(SILENT_SECONDS)}: it is gone, or its machine"
                )
            if now > moved + STANDSTILL_SECONDS:
                raise LostProcess(f"{name} lives and has not got on for {_minutes(STANDSTILL_SECONDS)} ({self.what})")
        if missing and now > self.said + REMINDER_SECONDS:
            self.said = now
            names = list_some([self.peers.name(rank) for rank in missing])
            logger.warning("waiting for %s (%s) since %s", names, self.what, _minutes(now - self.begun))


def _ended(name: str, words: str) -> str:
    """The words of a process that ended; one that ended for a third one's sake passes on what it heard."""
    return words if words.startswith("process ") else f"{name} ended: {words}"


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
