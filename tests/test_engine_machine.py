"""Device and precision fit the machine; processes share the work without a warning."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from script_helpers import PATIENCE, ROOT

from common.errors import InputError
from engine.machine import Machine, resolve_precision

CPU = torch.device("cpu")


def test_a_cpu_without_onednn_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)  # such builds have no operator to ask
    assert resolve_precision("auto", CPU) == "float32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_a_fault_on_the_first_rank_keeps_its_fields():
    def fail() -> None:
        raise InputError("`vae` x: no such folder")

    with pytest.raises(InputError, match="vae x") as caught:
        Machine(0, 1, CPU, "float32").on_main(fail, "fail")
    assert caught.value.marked.startswith("`vae` ")


# One process of two. The second one has a GPU, if the words say so; its driver is asked for no more than this.
START = """
import sys, torch
from common.errors import InputError, with_flags
from engine.machine import start_machine

rank, has_gpu, precision = int(sys.argv[1]), sys.argv[2] == "gpu", sys.argv[3 + int(sys.argv[1])]
torch.cuda.is_available = lambda: has_gpu and rank == 1
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
try:
    machine = start_machine("auto", precision)
    print(machine.device, machine.precision)
except InputError as error:
    print(with_flags(error.marked))
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpu", "float32", "float32"], "--device: process 0 on {0} has cpu, process 1 on {0} has cuda. If one"),
        (["none", "float32", "bf16"], "--precision: process 0 on {0} has float32, process 1 on {0} has bf16. If one"),
    ],
)
def test_processes_that_chose_different_devices_or_precisions_do_not_begin(words, says):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # outlives both, as torchrun's
    usual = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    usual |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(rank), *words], text=True, stdout=subprocess.PIPE,
            env={**os.environ, **usual, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert said[0] == said[1] and said[0].startswith(says.format(socket.gethostname()))


def test_ranks_train_without_a_warning_of_torch(tmp_path):
    code = f"""if True:
        import sys, warnings
        sys.path.insert(0, {str(ROOT)!r})
        import torch, torch.distributed as dist
        from engine.training import without_broadcast
        dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), **without_broadcast())
        assert not model.broadcast_buffers
        dist.destroy_process_group()"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr
