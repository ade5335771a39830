"""Full disks, file size limits and read-only folders: one clear line, nothing lost, and the same command goes on later.

A limit on the size of a file (RLIMIT_FSIZE) needs no rights; a small real disk (tmpfs) needs root to mount it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_helpers import run_here, train_arguments, write_pairs

import evaluate
import sample_ddp
import train
from engine.checkpoint import read_checkpoint
from evaluation.experiments.split import read_split

pytestmark = pytest.mark.usefixtures("one_block")
STEPS = 4
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def training(pairs: tuple[Path, Path], results: Path) -> list[str]:
    often = ["--ckpt-every", "2", "--log-every", "1", "--sample-every", "3", "--export-safetensors"]
    return [*train_arguments(*pairs, results, "run", STEPS)[1:], *often]


@pytest.fixture(scope="module")
def whole_run(pairs, tmp_path_factory) -> Path:
    """Run folder of a run that nothing disturbed."""
    results = tmp_path_factory.mktemp("results")
    assert run_here(train, *training(pairs, results))[0] == 0
    return results / "run"


def sampling(whole_run: Path, pairs: tuple[Path, Path], sample_dir: Path) -> list[object]:
    checkpoint = whole_run / "checkpoints" / f"{STEPS:07d}.pt"
    words = ["ODE", "--ckpt", checkpoint, "--data-path", pairs[0], "--mask-path", pairs[1], "--sample-dir", sample_dir]
    words += ["--export", "cellpose", "coco", "--npz", "--samples-per-mask", 2, "--num-sampling-steps", 1]
    return [*words, "--device", "cpu", "--precision", "float32", "--per-proc-batch-size", 4]


@pytest.fixture(scope="module")
def whole_set(whole_run, pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "disk" / "set"  # as deep as those of the tests: its paths are relative
    assert run_here(sample_ddp, *sampling(whole_run, pairs, folder))[0] == 0
    assert run_here(evaluate, "threshold", folder)[0] == 0
    return folder


def assert_one_line(code: int, lines: list[str], reason: str) -> None:
    """Exit code 2, the file and the reason in one line, and no traceback above it."""
    assert code == 2, lines
    assert reason in lines[-1] and ".py: error: /" in lines[-1]
    assert not any("Traceback" in line or "Logging error" in line for line in lines)


def assert_same_run(run: Path, whole: Path) -> None:
    name = Path("checkpoints") / f"{STEPS:07d}.pt"
    one, other = read_checkpoint(run / name), read_checkpoint(whole / name)
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    for key, moments in one["opt"]["state"].items():
        assert all(torch.equal(moments[kind], other["opt"]["state"][key][kind]) for kind in moments)
    losses = [
        [
            (line["step"], line.get("train/loss"))
            for line in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())
        ]
        for f in (run, whole)
    ]
    assert losses[0] == losses[1]
    assert {path.name for path in (run / "previews").iterdir()} == {
        path.name for path in (whole / "previews").iterdir()
    }
    exported = read_checkpoint(run / "model.safetensors")
    assert exported["step"] == STEPS
    assert all(torch.equal(exported["ema"][key], value) for key, value in one["ema"].items())


def assert_same_set(folder: Path, whole: Path) -> None:
    names = [{p.relative_to(f) for p in f.rglob("*.*") if p.is_file() and p.suffix != ".json"} for f in (folder, whole)]
    assert names[0] == names[1]  # no file is missing, and no temporary one stays
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names[0])
    assert folder.with_name(f"{folder.name}.npz").read_bytes() == whole.with_name("set.npz").read_bytes()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file grows above ``size`` bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_that_may_write_small_files_only_goes_on_later(pairs, whole_run, tmp_path):
    words = training(pairs, tmp_path)
    for size, file in ((200, "log.txt"), (10**6, "checkpoints/")):
        with largest_file(size):
            code, lines = run_here(train, *words)
        assert_one_line(code, lines, "File too large. The system allows no larger file here")
        assert file in lines[-1]
        assert not list(tmp_path.rglob("*.tmp"))
    assert run_here(train, *words)[0] == 0
    assert_same_run(tmp_path / "run", whole_run)


def test_sampling_that_may_write_small_files_only_goes_on_later(pairs, whole_run, whole_set, tmp_path):
    folder = tmp_path / "disk" / "set"
    words = sampling(whole_run, pairs, folder)
    for size in (100, 3_000, 8_500):  # settings.json, manifest.csv, set.npz as things stand
        with largest_file(size):
            code, lines = run_here(sample_ddp, *words)
        assert_one_line(code, lines, "File too large")
        assert str(tmp_path) in lines[-1]
        assert not list(tmp_path.rglob("*.tmp"))
    with largest_file(500):
        code, lines = run_here(evaluate, "threshold", folder)
    assert_one_line(code, lines, "File too large")
    assert run_here(evaluate, "threshold", folder)[0] == 0
    assert run_here(sample_ddp, *words)[0] == 0
    assert_same_set(folder, whole_set)


@pytest.mark.parametrize("choice", [["--shares", 50, 100], ["--labels", 2, "--selections", 2]])
@pytest.mark.parametrize("kind", ["masks", "nuclei"])
def test_a_split_that_may_write_small_files_only_leaves_nothing(pairs, tmp_path, choice, kind):
    masks = pairs[1]
    if kind == "nuclei":  # a folder of two files for each image
        masks = tmp_path / "nuclei"
        for path in pairs[1].iterdir():
            (masks / path.stem).mkdir(parents=True)
            shutil.copyfile(path, masks / path.stem / "1.png")
            shutil.copyfile(path, masks / path.stem / "2.png")
    output = tmp_path / "split"
    words = ["split", "--data-path", pairs[0], "--mask-path", masks, "--output", output, *choice]
    largest = max(path.stat().st_size for path in pairs[0].iterdir())
    for size in (60, largest + 1):  # the first image or mask; split.json
        with largest_file(size):
            code, lines = run_here(evaluate, *words)
        assert_one_line(code, lines, "File too large")
        assert str(output) in lines[-1] and ".tmp" not in lines[-1]
        assert not output.exists()
    assert run_here(evaluate, *words)[0] == 0
    folder = output if "--shares" in choice else output / "selection_01"
    assert len(read_split(folder).images) == 6
    assert not list(output.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------- a small real disk


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """An empty disk of its own, 600 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a disk needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, free.f_bavail * free.f_frsize - left))


def fill_until_done(disk: Path, command: ModuleType, words: list[object], sizes: list[int]) -> list[str]:
    """Run with more and more space left; what each run that found too little said at its end."""
    said = []
    for left in sizes:
        fill(disk, left)
        code, lines = run_here(command, *words)
        if code == 0:
            break
        assert_one_line(code, lines, "No space left on device. Free some space and run the same command again")
        assert not list(disk.rglob(".*.tmp"))
        said.append(lines[-1])
    (disk / "filler").unlink()
    code, lines = run_here(command, *words)
    assert code == 0, lines
    return said


@pytest.mark.slow
def test_training_on_a_full_disk_goes_on_when_there_is_space(disk, pairs, whole_run):
    sizes = [pages * PAGE for pages in (0, 1, 2, 3, 5)] + [megabytes * 2**20 for megabytes in (6, 16)]
    said = fill_until_done(disk, train, training(pairs, disk), sizes)
    print("\n".join(said))
    assert len(said) >= 6 and any("checkpoints/" in line for line in said)
    assert_same_run(disk / "run", whole_run)


@pytest.mark.slow
def test_sampling_on_a_full_disk_goes_on_when_there_is_space(disk, pairs, whole_run, whole_set):
    sizes = [pages * PAGE for pages in range(60)]
    said = fill_until_done(disk, sample_ddp, sampling(whole_run, pairs, disk / "set"), sizes)
    print("\n".join(said))
    places = (
        "settings.json",
        "images/",
        "masks/",
        "manifest.csv",
        "contact_sheet.png",
        "cellpose/",
        "coco/",
        "set.npz",
    )
    assert {place for place in places if any(place in line for line in said)} >= {"images/", "masks/"}
    fill_until_done(disk, evaluate, ["threshold", disk / "set"], sizes[:12])
    assert_same_set(disk / "set", whole_set)


@pytest.mark.slow
def test_read_only_folders_are_refused_in_one_line_and_stay_as_they_are(disk, pairs, whole_run, whole_set):
    shutil.copytree(whole_run, disk / "run")
    shutil.copytree(whole_set, disk / "whole")
    shutil.copytree(whole_set, disk / "set")
    (disk / "set" / "images" / "cell_1_0001.png").unlink()  # something to do
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    words = [*training(pairs, disk), "--max-steps", STEPS + 1]
    for command, more in (
        (train, words), (train, training(pairs, disk / "new")), (evaluate, ["threshold", disk / "whole"]),
        (sample_ddp, sampling(whole_run, pairs, disk / "set")), (sample_ddp, sampling(whole_run, pairs, disk / "new")),
    ):  # fmt: skip
        code, lines = run_here(command, *more)
        assert_one_line(code, lines, "Read-only file system. Give a folder that may be written to.")
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused_in_one_line(pairs, tmp_path):
    tmp_path.chmod(0o500)
    try:
        code, lines = run_here(train, *training(pairs, tmp_path))
    finally:
        tmp_path.chmod(0o700)
    assert_one_line(code, lines, "Permission denied. Give a folder or file that may be read and written to.")
