"""Device and precision fit the machine; processes share the work without a warning."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from script_helpers import ROOT

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
