"""Where a process stands among the others, and what it computes on."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import InputError, one_line
from common.faults import short_line
from engine.peers import Peers, join_peers

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PRECISIONS = ("auto", "bf16", "float32")
DEVICES = ("auto", "cuda", "cpu")
SAME_DEVICE = (
    "If one of them does not find its GPU, mend the driver there (nvidia-smi must show the GPU). Else give all of them "
    "`device` cpu or one `precision`."
)
NOTHING = "nothing"  # what a process has that lacks a name which another one compares
# Connections are made when all processes have met. gloo waits five times as long for one that never comes.
CONNECT_TIMEOUT = timedelta(seconds=30)
# For what the training loop exchanges at each step. Longer work is waited for through the store: see engine/peers.py.
EXCHANGE_TIMEOUT = timedelta(minutes=10)
# A process whose peer is gone must end, and its watchdog must not fire before the exchange does.
NCCL_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "900"}


@dataclass(frozen=True)
class Machine:
    """Where this process stands among the others and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    precision: str  # bf16 or float32
    peers: Peers | None = None  # None if there is one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps of the machine: plain types."""
        return {"world_size": self.world_size, "device": self.device.type, "precision": self.precision}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in bfloat16 inside the block, or in float32 if that is the precision."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # ------------------------------------------------------------- beside the loop: one process may work for hours here

    def sharing_errors(self) -> contextlib.AbstractContextManager[None]:
        """Tell the other processes the error that ends this one; see ``Peers.sharing_errors``."""
        return contextlib.nullcontext() if self.peers is None else self.peers.sharing_errors()

    def progress(self) -> None:
        """Note that this process gets on with its work, so that the others go on waiting for it."""
        if self.peers is not None:
            self.peers.progress()

    def barrier(self, what: str) -> None:
        """Wait for all processes. ``what`` says what they do meanwhile, for the log."""
        if self.peers is not None:
            self.peers.wait_for_all(what)

    @contextlib.contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Rank 0 goes through the block before the others, which then find what it left on disk."""
        if not self.is_main:
            self.barrier(what)
        yield
        if self.is_main:
            self.barrier(what)

    def to_main(self, values: list[Any], what: str) -> list[Any]:
        """The lists of all ranks in one, on rank 0; empty elsewhere."""
        if self.world_size == 1:
            return values
        self.barrier(what)
        lists: list[list[Any]] | None = [[] for _ in range(self.world_size)] if self.is_main else None
        dist.gather_object(values, lists)
        return [value for one in lists or () for value in one]

    def from_main(self, value: Any, what: str) -> Any:
        """What rank 0 has, on every rank."""
        if self.world_size == 1:
            return value
        self.barrier(what)
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, work: Callable[[], Result], what: str) -> Result | None:
        """What ``work`` returns on rank 0, and None elsewhere. If its input is bad or a file fails, every rank ends.

        Args:
            work: done by rank 0 only.
            what: what it does, for the message of the ranks that wait.

        Raises:
            InputError: the fault that rank 0 met, on every rank.
        """
        fault, result = None, None
        if self.is_main:
            try:
                result = work()
            except (InputError, OSError) as error:
                fault = one_line(error)
        fault = self.from_main(fault, what)
        if fault:
            raise InputError(fault)
        return result

    def check_same(self, values: dict[str, Any], mend: str) -> None:
        """Refuse to go on if processes have found different things.

        Args:
            values: plain values by their names, such as {"step": 10}. None: this process does not know it. A name that
                only some processes have is a difference.
            mend: what to do about a difference.

        Raises:
            InputError: on every rank: the first difference, with the processes and their machines.
        """
        if self.peers is None:
            return
        texts = self.peers.gather(json.dumps(values), "compare settings and files")
        found = [json.loads(text) for text in texts]
        for name in dict.fromkeys(name for one in found for name in one):
            has = {rank: one.get(name, NOTHING) for rank, one in enumerate(found)}
            known = {rank: value for rank, value in has.items() if value is not None}
            for rank, value in known.items():
                first = next(iter(known))
                if value != known[first]:
                    one, two = self.peers.name(first), self.peers.name(rank)
                    raise InputError(f"{name}: {one} has {known[first]}, {two} has {value}. {mend}")

    # ------------------------------------------------------------- in the loop: no process waits long for these

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Travels over the CPU, so that no GPU waits for it."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def max_over_ranks(self, value: float) -> float:
        """The largest of the ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values.item()

    def from_all(self, values: Tensor) -> Tensor:
        """Every rank's CPU tensor (n,), stacked (world_size, n)."""
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)


def resolve_device(name: str) -> torch.device:
    """The device of this process: its LOCAL_RANK's GPU, or the CPU.

    Raises:
        InputError: cuda was asked for and there is none, or fewer than processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES='{visible}' hides the others)"
        raise InputError(
            f"`device` {name}: process {local_rank} finds {count} GPUs on this machine{hidden}. "
            "Start fewer processes (nproc_per_node), or give `device` cpu."
        )
    return torch.device("cuda", local_rank)


def resolve_precision(name: str, device: torch.device) -> str:
    """bf16 or float32: auto takes bf16 where the hardware multiplies matrices in it, since emulation is slower."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if not torch.backends.mkldnn.is_available():  # such as on Apple silicon
        return "float32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def start_machine(device: str, precision: str) -> Machine:
    """Join the other processes, if torchrun started several, and choose device and precision.

    gloo joins processes on CPUs; on GPUs nccl moves tensors and gloo what lies on the CPU.

    Raises:
        InputError: the device is not there, or processes have chosen different devices or precisions.
        LostProcess: another process did not come, or cannot be reached.
    """
    world_size = _world_size()
    peers = join_peers() if world_size > 1 else None
    machine = Machine(0 if peers is None else peers.rank, world_size, torch.device("cpu"), "float32", peers)
    with machine.sharing_errors():
        resolved = resolve_device(device)
        if resolved.type == "cuda":
            torch.cuda.set_device(resolved)
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        chosen = resolve_precision(precision, resolved)
        machine.check_same({"`device`": resolved.type, "`precision`": chosen}, SAME_DEVICE)
        if peers is not None:
            _connect(peers, resolved)
        return replace(machine, device=resolved, precision=chosen)


def _world_size() -> int:
    """Number of processes, as the launcher says it.

    Raises:
        InputError: variables of a launcher are left over in the shell.
    """
    mend = "start with torchrun, or run: unset WORLD_SIZE RANK LOCAL_RANK"

    def number(name: str, default: str, possible: range, fault: str) -> int:
        value = os.environ.get(name, default)
        if not value.isdecimal() or int(value) not in possible:
            raise InputError(f"{name}={value} in the environment {fault}: {mend}")
        return int(value)

    count = number("WORLD_SIZE", "1", range(1, sys.maxsize), "is no number of processes")
    if count > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise InputError(f"WORLD_SIZE={count} is set in the environment, but not {', '.join(missing)}: {mend}")
        number("MASTER_PORT", "", range(1, 2**16), "is no port")
    for name in ("RANK", "LOCAL_RANK"):
        number(name, "0", range(count), f"does not fit WORLD_SIZE={count}")
    return count


def _connect(peers: Peers, device: torch.device) -> None:
    """Open the connections for tensors. All processes have met, so that none is late."""
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        for name, value in NCCL_WATCHDOG.items():
            os.environ.setdefault(name, value)
    dist.init_process_group(
        backend, store=peers.store, timeout=CONNECT_TIMEOUT, rank=peers.rank, world_size=len(peers.hosts)
    )
    # torch 2.14 gave it a name without the underscore and warns about the old one.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(EXCHANGE_TIMEOUT)


def stop_machine(machine: Machine) -> None:
    """Leave the other processes when all work is done.

    Not after an error: if the others exit first, torchrun kills this process before it can say its line.
    """
    if machine.peers is not None:
        machine.peers.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def usable_cores() -> int:
    """Number of CPU cores that this process may use. A job or a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_compiler() -> None:
    """Check that torch.compile will find a C++ compiler that works. It needs one for a GPU, too.

    Raises:
        InputError: there is none, or it cannot compile.
    """
    compiler = os.environ.get("CXX", "g++")
    if not has_compiler():
        raise InputError(f"`compile`: no C++ compiler {compiler}. Install it or name one in CXX, or leave it out.")
    _name_the_cache()
    reason = _compiler_fault(compiler)
    if reason:
        raise InputError(
            f"`compile`: the C++ compiler {compiler} cannot compile ({reason}). Mend it or name another one in CXX, or "
            "leave it out."
        )


def _name_the_cache() -> None:
    """Name a folder for compiled code, if torch cannot: it asks for the name of the user, who may have none."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _compiler_fault(compiler: str) -> str:
    """Why a compiler cannot build a small shared library; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text('#include <cmath>\nextern "C" double root(double x) { return std::sqrt(x); }\n')
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return short_line(error)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines[0][:200] if lines else f"exit code {done.returncode}")


def has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile would call is there."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def log_provenance(machine: Machine, seed: int) -> None:
    """First lines of a log: command, commit, versions, device, seed."""
    log_command()
    log_machine(machine, seed)


def log_command() -> None:
    """The part that is known before anything is read: command, commit, versions."""
    logger.info("command: %s", " ".join(sys.argv))
    logger.info("commit: %s; python %s, torch %s", commit(), sys.version.split()[0], torch.__version__)


def log_machine(machine: Machine, seed: int) -> None:
    """The part that a checkpoint may decide: device, precision, seed."""
    name = (
        torch.cuda.get_device_name(machine.device)
        if machine.device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    logger.info(
        "device: %s (%s), precision %s, %d process(es), seed %d",
        machine.device, name, machine.precision, machine.world_size, seed,
    )  # fmt: skip


def commit() -> str:
    """The commit of this checkout, with + where files differ from it; "unknown" outside of git."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip() or "unknown"


def log_machine_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if the machine changed. The batches and their order stay; only the noise differs.

    Args:
        before: ``Machine.describe`` of a checkpoint. Names that this version does not know say nothing.
        now: ``Machine.describe`` of this run.
    """
    for name, value in before.items():
        if name in now and now[name] != value:
            logger.warning(
                "changed on resume: %s: %s -> %s (equal in distribution, not bit for bit)", name, value, now[name]
            )
