"""Faults of the machine, such as too little memory, explained in one line. Bug reports for all other errors."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

SHARED_MEMORY = Path("/dev/shm")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can(?:'|no)t allocate memory|_STATUS_ALLOC_FAILED|bad_alloc|failed to map segment", re.IGNORECASE
)
_TRIED = re.compile(r"tried to allocate ([\d.]+) ?(\w+)", re.IGNORECASE)
_NO_SHARED_MEMORY = re.compile(r"unable to \w+ shared memory|out of shared memory|Bus error", re.IGNORECASE)
# Faults of the GPU or of its driver. Other errors of CUDA may be bugs of ours.
_GPU = re.compile(
    r"devices? (?:is|are) busy or unavailable|no kernel image is available|uncorrectable ECC|GPU is lost|"
    r"driver initialization failed|driver version is insufficient|no CUDA-capable device|CUDA unknown error",
    re.IGNORECASE,
)
_WORKER_DIED = re.compile(r"DataLoader worker .*?(exited unexpectedly|killed by signal: \w+)")
# Flags that decide how much is computed at once. Each command has some of them.
_SIZES = ("model", "image_size", "global_batch_size", "accumulate", "per_proc_batch_size", "batch_size")
_MENDS = {
    "accumulate": "a larger --accumulate (the same update in more parts)",
    "recompute_activations": "--recompute-activations",
    "global_batch_size": "a smaller --global-batch-size",
    "per_proc_batch_size": "a smaller --per-proc-batch-size",
    "batch_size": "a smaller --batch-size",
}
# In errors of torch: places in its sources, and its C++ stack.
_PLACES = re.compile(r"\[[^\]]*/[\w.]+:\d+\]\s*|\nException raised from [\s\S]*")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "tifffile", "diffusers", "monai", "wandb")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def short_line(error: BaseException, most: int = 200) -> str:
    """The first paragraph of an error as one line of at most ``most`` characters. Its type if it has no words."""
    words, _, _ = _PLACES.sub("", str(error)).strip().partition("\n\n")
    return " ".join(words.split())[:most] or type(error).__name__


def fault_of_machine(error: BaseException, values: Mapping[str, Any]) -> str | None:
    """One line about a fault of the machine. None if the error is of another kind.

    Args:
        values: values of the command's flags. The line names the sizes that the command used and flags to change.
    """
    text = f"{type(error).__name__} {error}"
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if isinstance(error, ImportError):
        return package_fault(error)
    if not isinstance(error, (RuntimeError, MemoryError, OSError)):
        return None
    if isinstance(error, RuntimeError) and _NO_SHARED_MEMORY.search(text):
        return _no_shared_memory()
    died = _WORKER_DIED.search(text)
    if died:
        return (
            f"a loader process {died[1]}; if the system killed it, memory ran out: give fewer --num-workers (0 loads "
            "in this process)"
        )
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile: torch.compile cannot build the network ({short_line(error)}). Leave it out"
    if no_memory or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        return _out_of_memory(text, values)
    if _GPU.search(text):
        return f"the GPU cannot be used ({short_line(error)}): see nvidia-smi, or give --device cpu"
    return None


def package_fault(error: BaseException) -> str | None:
    """One line about a package that cannot be imported. None if the error is of another kind."""
    library = isinstance(error, OSError) and ".so" in str(error)  # such as the libraries of CUDA
    if not isinstance(error, ImportError) and not library:
        return None
    said = f"({short_line(error)})"
    if _OUT_OF_MEMORY.search(said):
        return f"too little memory to load a library {said}: give more, by ulimit -v unlimited or --mem of the job"
    name = str(getattr(error, "name", None) or "").partition(".")[0]
    missing = isinstance(error, ModuleNotFoundError)
    what = f"the package {name} is missing" if missing else f"{name or 'a package'} is damaged, or too old or too new"
    words = "" if missing else f" {said}"
    return f"{what}{words}: in this project's folder, run {sys.executable} -m pip install --upgrade -r requirements.txt"


def _no_shared_memory() -> str:
    size = f" is {shutil.disk_usage(SHARED_MEMORY).total / 2**20:.0f} MiB" if SHARED_MEMORY.is_dir() else " is missing"
    return (
        f"the loader processes have no shared memory left ({SHARED_MEMORY}{size}): start the container with "
        "--shm-size 8g or --ipc=host, or give --num-workers 0"
    )


def _out_of_memory(text: str, values: Mapping[str, Any]) -> str:
    where = "the GPU" if re.search(r"CUDA|HIP|CUDNN|CUBLAS|MPS", text) else "this machine"
    tried = _TRIED.search(text)
    asked = f", which was asked for {_readable(*tried.groups())} more" if tried else ""
    sizes = [f"--{name.replace('_', '-')} {values[name]}" for name in _SIZES if values.get(name) is not None]
    ran = f" It ran with {' '.join(sizes)}." if sizes else ""
    mends = [mend for name, mend in _MENDS.items() if name in values and values[name] is not True]
    give = f" Give {', or '.join(mends)}." if mends else ""
    return f"out of memory on {where}{asked}.{ran}{give}"


def _readable(number: str, unit: str) -> str:
    """``8589934592 bytes`` as ``8 GiB``."""
    return f"{float(number) / 2**30:.3g} GiB" if unit == "bytes" else f"{number} {unit}"


def write_bug_report(error: BaseException) -> Path | None:
    """Write a bug report with command, versions and traceback. Secrets of the environment are removed.

    Returns:
        The file, in the current folder or, if this is not writable, in the folder for temporary files. None if both
        fail.
    """
    lines = [
        f"command: {' '.join(sys.argv)}",
        f"process: {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}",
        f"system: {platform.platform()}, Python {platform.python_version()}",
        f"packages: {', '.join(_versions())}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    content = without_secrets("\n".join(lines))
    name = f"bug_report_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}.txt"
    for place in (os.getcwd, tempfile.gettempdir):
        try:
            path = Path(place()) / name
            path.write_text(content, encoding="utf-8", errors="backslashreplace")
        except OSError:  # also if there is no such folder
            continue
        return path
    return None


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def without_secrets(text: str) -> str:
    """Replace values of environment variables that look like secrets, and keys in addresses, by ``***``."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return re.sub(r"(https?://)[^/@\s]+@", r"\1***@", text)
