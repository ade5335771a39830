"""Faults of the machine end in one line that helps; other errors are reported as a bug, with a file."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from script_helpers import exit_code

from common.errors import CommandParser, InputError, run_command
from common.faults import fault_of_machine, short_line, without_secrets, write_bug_report
from engine.machine import check_compiler, start_machine
from evaluation.output import new_figure

ROOT = Path(__file__).parents[1]
TRAINING = argparse.Namespace(
    model="SiT-B/8", image_size=256, global_batch_size=512, accumulate=1, recompute_activations=False
)
SAMPLING = argparse.Namespace(model=None, image_size=64, per_proc_batch_size=16384)


def end(monkeypatch, capsys, tmp_path, error: Exception, args: argparse.Namespace = TRAINING) -> tuple[int, str]:
    """Exit code and stderr of a command whose work ends with this error, in an empty folder."""

    def main(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-path", "images"])
    with pytest.raises(SystemExit) as ended:
        run_command(main, lambda: args)
    return exit_code(ended.value), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  no such\n\tlayer \n"), "no such layer"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("x" * 999), "x" * 200),
        (RuntimeError("C++ compile error\n\nCommand:\ng++ a.cpp"), "C++ compile error"),
        (RuntimeError("[/build/gloo/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:9"),
         "Connection closed by peer [10.0.0.1]:9"),
        (RuntimeError("Broken pipe\nException raised from sendBytes at /torch/Utils.hpp:1\nframe #0"), "Broken pipe"),
    ],
)  # fmt: skip
def test_an_error_is_one_short_line_with_words(error, line):
    assert short_line(error) == line


def test_memory_that_really_runs_out_is_known_by_its_text():
    for allocate in (lambda: torch.empty(2**60), lambda: np.empty(2**58)):
        with pytest.raises((RuntimeError, MemoryError)) as failed:
            allocate()
        assert fault_of_machine(failed.value, vars(TRAINING)).startswith("out of memory on this machine")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_a_gpu_out_of_memory_names_sizes_and_flags(monkeypatch, capsys, tmp_path, error):
    code, text = end(monkeypatch, capsys, tmp_path, error)
    assert code == 2 and len(text.splitlines()) == 1
    assert "out of memory on the GPU" in text
    assert "--model SiT-B/8 --image-size 256 --global-batch-size 512 --accumulate 1" in text
    for flag in ("--accumulate", "--recompute-activations", "--global-batch-size"):
        assert flag in text.partition(" Give ")[2]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be reported later",
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA driver initialization failed, you might not have a CUDA gpu.",
    ],
)
def test_a_gpu_that_cannot_be_used_is_named(monkeypatch, capsys, tmp_path, text):
    code, line = end(monkeypatch, capsys, tmp_path, RuntimeError(text))
    assert code == 2 and len(line.splitlines()) == 1
    assert "the GPU cannot be used" in line and "--device cpu" in line


def test_an_assertion_of_a_kernel_is_a_bug():
    assert fault_of_machine(RuntimeError("CUDA error: device-side assert triggered"), {}) is None


def test_sampling_out_of_memory_names_its_own_flag(monkeypatch, capsys, tmp_path):
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                         "you tried to allocate 8589934592 bytes. Error code 12")  # fmt: skip
    code, text = end(monkeypatch, capsys, tmp_path, error, SAMPLING)
    assert code == 2 and len(text.splitlines()) == 1
    assert "8 GiB" in text and "--image-size 64 --per-proc-batch-size 16384" in text
    assert text.endswith("Give a smaller --per-proc-batch-size.\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...\nRuntimeError: unable to "
            "allocate shared memory(shm) for file </torch_12_34>: No space left on device (28)",
            ["/dev/shm", "--shm-size", "--ipc=host", "--num-workers 0"],
        ),
        ("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers are out "
         "of shared memory. Please try to raise your shared memory limit.", ["/dev/shm"]),
        ("DataLoader worker (pid 5) is killed by signal: Killed. ", ["killed by signal: Killed", "--num-workers"]),
        ("DataLoader worker (pid(s) 5, 6) exited unexpectedly", ["exited unexpectedly", "--num-workers"]),
    ],
)  # fmt: skip
def test_faults_of_loader_processes_end_in_one_line(monkeypatch, capsys, tmp_path, text, words):
    code, line = end(monkeypatch, capsys, tmp_path, RuntimeError(text))
    assert code == 2 and len(line.splitlines()) == 1
    assert all(word in line for word in words)


def test_a_bug_of_ours_shows_the_traceback_and_writes_a_file_without_keys(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "5ec2e70123456789")
    code, text = end(monkeypatch, capsys, tmp_path, KeyError("at https://user:pw@host with 5ec2e70123456789"))
    assert code == 1 and "Traceback" in text and "bug of ours" in text
    (file,) = tmp_path.glob("bug_report_*.txt")
    assert str(file) in text
    content = file.read_text()
    for part in (
        "train.py --data-path images",
        f"torch {torch.__version__.partition('+')[0]}",
        "KeyError",
        "Traceback",
    ):
        assert part in content
    assert "5ec2e70123456789" not in content and "user:pw" not in content


def test_errors_of_the_user_stay_one_line_and_write_no_file(monkeypatch, capsys, tmp_path):
    code, text = end(monkeypatch, capsys, tmp_path, InputError("`image_size` 0 is wrong"))
    assert code == 2 and text == "train.py: error: --image-size 0 is wrong\n"
    assert not list(tmp_path.iterdir())


def test_secrets_are_replaced(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    assert without_secrets("token hf_abcdefgh at http://a:b@c/d") == "token *** at http://***@c/d"


def test_windows_is_told_of_wsl_at_once():
    program = "import sys; sys.platform = 'win32'; import train"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "WSL" in done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set in the environment, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four in the environment is no number"),
        ({"RANK": "1"}, "RANK=1 in the environment does not fit WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT=x .* is no port"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 in the environment does not fit WORLD_SIZE=1"),
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK=abc in the environment does not fit WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 .* WORLD_SIZE=2"),
    ],
)
def test_variables_of_a_launcher_that_are_left_over_are_named(monkeypatch, variables, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words + ".*unset WORLD_SIZE RANK"):
        start_machine("cpu", "float32")


def test_a_compiler_that_cannot_compile_is_said_with_its_words(monkeypatch, tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: cmath: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(InputError, match="broken-c.. cannot compile .fatal error: cmath"):
        check_compiler()


def test_a_failure_of_the_compiler_later_on_says_to_leave_compile_out(monkeypatch, capsys, tmp_path):
    from torch._inductor.exc import InductorError

    code, text = end(monkeypatch, capsys, tmp_path, InductorError(RuntimeError("C++ compile error"), "x.py"))
    assert code == 2 and len(text.splitlines()) == 1 and "--compile" in text and "Leave it out" in text


def test_an_interrupt_needs_no_words(monkeypatch):
    def main(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(main, lambda: CommandParser().parse_args([]))
    assert ended.value.code == 130


@pytest.mark.parametrize("command", ["app", "train", "sample", "sample_ddp", "evaluate", "make_masks"])
def test_ctrl_c_during_the_imports_ends_in_one_line(tmp_path, command):
    interrupted = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"
    (tmp_path / "numpy.py").write_text(interrupted)
    words = [sys.executable, ROOT / f"{command}.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{command}.py: interrupted\n")


START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train.py']; "
START += "from common.errors import end_at_interrupt; end_at_interrupt(); "


def test_a_deleted_current_folder_ends_in_one_line(tmp_path):
    script = f'mkdir gone && cd gone && rmdir ../gone && {sys.executable} -c "$0"'
    done = subprocess.run(["bash", "-c", script, START], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "train.py: error: the current folder was deleted: change to another one with cd"


@pytest.mark.parametrize("closed", ["1", "2", "0"])
def test_closed_streams_take_output_and_no_file_gets_it(tmp_path, closed):
    rest = "print('out'); print('err', file=sys.stderr); file = open('kept.txt', 'w'); import os; os.write(2, b'more')"
    script = f'{sys.executable} -c "$0" {closed}>&-'
    done = subprocess.run(
        ["bash", "-c", script, START + rest], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept.txt").read_text() == ""


def test_a_wrong_backend_of_matplotlib_does_no_harm(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://that_is_not_there")
    new_figure(1, 1)
    assert os.environ["MPLBACKEND"] == "agg"


HIDDEN = """
import os, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["HIDE"]:
            if os.environ["HOW"] == "missing":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if os.environ["HOW"] == "old":
                raise ImportError(f"cannot import name 'new_function' from {name!r}", name=name)
            raise OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "the package numpy is missing: "),
        ("old", "numpy is damaged, or too old or too new (cannot import name 'new_function'"),
        ("library", "a package is damaged, or too old or too new (libcudart.so.12: cannot open"),
    ],
)
def test_a_package_that_cannot_be_imported_ends_in_one_line_with_the_command_that_helps(tmp_path, how, words):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HIDE": "numpy", "HOW": how}
    command = [sys.executable, ROOT / "make_masks.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr and f"{sys.executable} -m pip install --upgrade -r requirements.txt" in done.stderr


def test_a_package_that_is_only_needed_later_is_named_too(monkeypatch, capsys, tmp_path):
    error = ModuleNotFoundError("No module named 'pycocotools'", name="pycocotools")
    code, text = end(monkeypatch, capsys, tmp_path, error)
    assert code == 2 and "the package pycocotools is missing" in text and len(text.splitlines()) == 1


def test_a_library_that_memory_cannot_hold_is_not_called_damaged(monkeypatch, capsys, tmp_path):
    error = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    code, text = end(monkeypatch, capsys, tmp_path, error)
    assert code == 2 and "too little memory to load a library (libtorch_cpu.so" in text and "ulimit -v" in text
    assert "pip" not in text


def test_a_wrong_flag_is_said_although_a_launcher_left_its_variables(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        CommandParser(prog="train.py").parse_args(["--nope"])
    assert "unrecognized arguments: --nope" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        CommandParser(prog="train.py").parse_args(["--nope"])
    assert capsys.readouterr().err == ""


def test_a_path_of_windows_is_translated(monkeypatch, capsys, tmp_path):
    _, text = end(monkeypatch, capsys, tmp_path, InputError(r"C:\lab\images: not found"))
    assert text.endswith(r"not found. In WSL, C:\data is /mnt/c/data." + "\n")
    _, text = end(monkeypatch, capsys, tmp_path, InputError("a:b, abc:\\n: not found"))
    assert "WSL" not in text


SAY = "import sys; from common.log import say; say('Zölle µ'); say('more'); print('end', file=sys.stderr)"


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1"])
def test_characters_that_stdout_cannot_show_are_escaped(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", START + SAY], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(b"Z") and done.stderr == b"end\n"


def test_nobody_need_read_the_results(tmp_path):
    for rest in (SAY, "from common.errors import CommandParser; CommandParser().parse_args(['--help'])"):
        program = f"import time; time.sleep(0.3); {START}{rest}"
        script = f'{sys.executable} -c "$0" | true; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", script, program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Broken" not in done.stderr, done.stderr


def test_a_bug_report_needs_no_folder(monkeypatch):
    def missing() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("os.getcwd", missing)
    monkeypatch.setattr("tempfile.gettempdir", missing)
    assert write_bug_report(KeyError("x")) is None


def test_a_user_without_a_name_gets_a_folder_for_compiled_code(monkeypatch):
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("engine.machine.has_compiler", lambda: True)
    monkeypatch.setattr("engine.machine._compiler_fault", lambda compiler: "")
    check_compiler()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith(f"torchinductor_{os.getuid()}")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
