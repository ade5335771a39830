"""Two machines on one: network namespaces of Linux, each with an address, a host name and a disk of its own.

Needs root, ``ip`` and ``unshare``. Nothing stays behind: the namespaces are removed, and /etc/hosts and the folder of
the disk are bound for the processes of a machine only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from script_helpers import PATIENCE, ROOT

DEVICE, PORT = "eth0", 29400
# torchrun 2.14 lets no new agent join a launch otherwise: it waits 60 s for an address that nobody writes, and all end.
MAY_RETURN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
NAMES = ("nodea", "nodeb")
# As Debian writes it: a machine's own name is a loopback address, which no other machine can use.
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {own}\n{other_address} {other}\n"
ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind "$3" "$4"; shift 4; exec "$@"'


def ip(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=False)


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "network namespaces need the programs ip and unshare"
    probe = f"sit{os.getpid()}probe"
    made = ip("netns", "add", probe)
    ip("netns", "del", probe)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


class Node:
    """One machine.

    Args:
        number: 0 or 1; its place in ``NAMES``.
        folder: for its files.
        local: path that shows this machine's own disk to its processes.
    """

    def __init__(self, number: int, folder: Path, local: Path) -> None:
        self.number, self.name, self.folder, self.local = number, NAMES[number], folder, local
        self.namespace = f"sit{os.getpid()}{self.name}"
        self.disk = folder / f"disk_of_{self.name}"
        self.disk.mkdir()
        self.hosts = folder / f"hosts_of_{self.name}"
        addresses = [f"10.77.{os.getpid() % 250}.{one + 1}" for one in range(2)]
        self.address = addresses[number]
        self.hosts.write_text(HOSTS.format(own=self.name, other=NAMES[1 - number], other_address=addresses[1 - number]))

    def do(self, *words: object) -> None:
        """A command of ``ip`` inside of this machine."""
        done = ip("-n", self.namespace, *words)
        assert done.returncode == 0, done.stderr

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        """A command on this machine. What it says stands in ``log`` of the process that is returned."""
        log = self.folder / f"log_{self.name}_{time.monotonic_ns()}"
        inside = [self.name, self.hosts, self.disk, self.local, *words]
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "bash", "-ec", ENTER, "-"]
        process = subprocess.Popen(
            [*command, *map(str, inside)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": DEVICE, **environment},
            stdout=subprocess.DEVNULL,
            stderr=log.open("w"),
            start_new_session=True,
            text=True,
        )
        process.log = log  # type: ignore[attr-defined]
        return process

    def launch(self, *words: object, nodes: str = "2", restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
        """A script under torchrun, with one process on each machine."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={NAMES[0]}:{PORT}", "--rdzv-id=job"]
        torchrun += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        return self.start(*torchrun, ROOT / str(words[0]), *words[1:], **environment)

    def run(self, *words: object, check: bool = True) -> str:
        """A script without torchrun, to its end. Returns what it says."""
        process = self.start(sys.executable, ROOT / str(words[0]), *words[1:])
        code, said = end_of(process)
        assert code == 0 or not check, said
        return said

    def processes(self) -> list[str]:
        """Ids of the processes of this machine."""
        return ip("netns", "pids", self.namespace).stdout.split()

    def commands(self) -> list[str]:
        """Command lines of the processes of this machine."""
        files = [Path("/proc", pid, "cmdline") for pid in self.processes()]
        return [file.read_text().replace("\0", " ") for file in files if file.exists()]

    def kill(self) -> None:
        """Every process of this machine ends at once."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)


def said_by(process: subprocess.Popen[str]) -> str:
    return process.log.read_text(errors="replace")  # type: ignore[attr-defined]


def end_of(process: subprocess.Popen[str], seconds: float = PATIENCE) -> tuple[int, str]:
    """Exit code, and what it said."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {seconds:g} s:\n{said_by(process)}") from None
    return code, said_by(process)


def wait_until_said(process: subprocess.Popen[str], words: str, times: int = 1, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while said_by(process).count(words) < times:
        assert process.poll() is None and time.monotonic() < deadline, f"no {words!r}:\n{said_by(process)}"
        time.sleep(0.05)


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[Sequence[Node]]:
    """Two machines that reach each other; they are removed at the end, with all their processes."""
    local = folder / "local"
    local.mkdir()
    nodes = [Node(number, folder, local) for number in range(2)]
    try:
        for node in nodes:
            made = ip("netns", "add", node.namespace)
            assert made.returncode == 0, made.stderr
        one, other = (node.namespace for node in nodes)
        made = ip("link", "add", DEVICE, "netns", one, "type", "veth", "peer", "name", DEVICE, "netns", other)
        assert made.returncode == 0, made.stderr
        for node in nodes:
            node.do("addr", "add", f"{node.address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                node.do("link", "set", device, "up")
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            ip("netns", "del", node.namespace)
