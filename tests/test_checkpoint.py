"""Checkpoints are whole or absent and run nothing; run folders are numbered, locked and pruned."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.disk import file_sha256, write_atomically
from common.errors import InputError, one_line
from engine import checkpoint
from engine.checkpoint import (
    RunFolder,
    choose_run_folder,
    export_safetensors,
    launch_id,
    read_checkpoint,
    save_checkpoint,
)


def state(step: int) -> dict:
    config = {"model": {}, "transport": {}, "space": {}, "data": {}}
    return {"model": {"w": torch.arange(6.0) + step}, "ema": {}, "opt": {}, "step": step, "config": config}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run", keep=2)
    folder.create()
    return folder


def test_a_checkpoint_is_read_as_it_was_written(run):
    path = run.save(state(3))
    assert path.name == "0000003.pt"
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.arange(6.0) + 3)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(run, monkeypatch):
    path = run.save(state(1))
    before = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half of it")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="Is the disk full"):
        save_checkpoint(path, state(1))
    assert path.read_bytes() == before
    assert [file.name for file in run.checkpoints.iterdir()] == ["0000001.pt"]


def test_a_write_that_fails_names_the_file_and_the_mend(tmp_path, monkeypatch):
    def full_disk(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "a.json", full_disk)
    assert one_line(caught.value).startswith(f"{tmp_path / 'a.json'}: No space left on device. Free some space")


def test_a_name_as_long_as_names_go_is_written(tmp_path):
    write_atomically(tmp_path / ("n" * 255), lambda file: file.write(b"content"))
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]


def test_only_the_newest_are_kept(run):
    for step in (1, 2, 10, 11):
        run.save(state(step))
    assert run.steps() == [10, 11]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_newest_falls_back_to_the_one_before(run, damage, caplog):
    run.save(state(1))
    path = run.save(state(2))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[content.index(torch.tensor([4.0, 5.0]).numpy().tobytes())] ^= (
            1  # inside a tensor: only a checksum sees it
        )
    path.write_bytes({"truncated": content[:-200], "empty": b"", "text": b"<html>", "flipped": content}[damage])
    assert run.newest()["step"] == 1
    assert "0000002.pt" in caplog.text and "Falling back" in caplog.text


def test_all_damaged_is_said_and_nothing_is_removed(run):
    path = run.save(state(1))
    path.write_bytes(b"")
    with pytest.raises(InputError, match="all 1 checkpoints are damaged"):
        run.newest()
    assert path.exists()


def test_a_new_run_has_no_newest(run):
    assert run.newest() is None


def test_a_file_of_another_project_is_refused_by_its_missing_parts(tmp_path):
    torch.save({"model": {}, "ema": {}}, tmp_path / "sit.pt")
    with pytest.raises(InputError, match="has no opt, step, config"):
        read_checkpoint(tmp_path / "sit.pt")


def test_exported_weights_are_read_with_their_config_and_without_the_command_line(tmp_path):
    whole = state(5) | {"ema": {"w": torch.arange(3.0)}}
    whole["config"] |= {"model": {"name": "SiT-Ti/8"}, "train": {"data_path": "/home/someone"}}
    export_safetensors(tmp_path / "model.safetensors", whole)
    again = read_checkpoint(tmp_path / "model.safetensors")
    assert again["step"] == 5 and again["config"]["model"] == {"name": "SiT-Ti/8"}
    assert torch.equal(again["ema"]["w"], torch.arange(3.0))
    assert b"someone" not in (tmp_path / "model.safetensors").read_bytes()


def test_a_file_that_would_unpack_to_more_than_its_size_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    begun = time.perf_counter()
    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "bomb.pt")
    assert time.perf_counter() - begun < 1


class Poison:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("part", ["model", "opt", "config"])
def test_a_poisoned_checkpoint_runs_nothing(tmp_path, part):
    torch.save(state(1) | {part: Poison(tmp_path / "ran")}, tmp_path / "poison.pt")
    with pytest.raises(InputError, match="would run code"):
        read_checkpoint(tmp_path / "poison.pt")
    assert not (tmp_path / "ran").exists()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    pickled=st.binary(max_size=60),
    start=st.sampled_from([b"", b"\x80\x02}q\x00", b"\x80\x02ccollections\nOrderedDict\n"]),
)
def test_random_pickles_in_a_whole_archive_are_refused_in_words(tmp_path_factory, pickled, start):
    path = tmp_path_factory.mktemp("random") / "random.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", start + pickled)
        archive.writestr("archive/version", b"3")
        archive.writestr("archive/byteorder", b"little")
    with pytest.raises(InputError):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_damaged_export_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "model.safetensors")


def test_a_second_process_is_kept_out_and_the_loader_processes_of_a_killed_one_keep_nobody_out(run):
    code = f"""if True:
        import os, time
        from pathlib import Path
        from engine.checkpoint import RunFolder
        first = RunFolder(Path({str(run.path)!r}), 1)
        first.lock()
        if os.fork() == 0:
            os.close(1)
            time.sleep(600)
        print(os.getpid(), flush=True)
        time.sleep(600)"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        parent.stdout.readline()
        with pytest.raises(InputError, match="another process works"):
            run.lock()
        parent.kill()
        parent.wait()
        run.lock()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def test_what_a_killed_process_left_half_written_is_cleared_away(run):
    leftover = run.checkpoints / ".sit-0123abcd.tmp"
    leftover.write_bytes(b"half")
    run.lock()
    assert not leftover.exists()


def test_numbers_of_run_folders_are_never_reused(tmp_path):
    for name in ("000-SiT", "001-SiT", "007-SiT", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "000-SiT").rmdir()
    assert choose_run_folder(tmp_path, None, "SiT-B/2 x").name == "008-SiT-B-2-x"
    assert choose_run_folder(tmp_path, "mine", "SiT").name == "mine"


def test_workers_that_torchrun_starts_again_continue_the_folder_of_their_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for name, launch in (("000-SiT", "other"), ("001-SiT", launch_id()), ("002-SiT", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".launch").write_text(launch)
    assert choose_run_folder(tmp_path, None, "SiT").name == "001-SiT"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert choose_run_folder(tmp_path, None, "SiT").name == "003-SiT"


def test_a_command_started_twice_from_one_shell_is_no_restart(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    (tmp_path / "000-SiT").mkdir()
    (tmp_path / "000-SiT" / ".launch").write_text(launch_id())
    assert choose_run_folder(tmp_path, None, "SiT").name == "001-SiT"


def test_metrics_after_the_resumed_step_and_torn_lines_are_cut(run):
    for step in (2, 4, 6):
        run.log_metrics({"step": step, "train/loss": step / 10})
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "tra')
    run.cut_metrics(4)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [2, 4]


def test_hash_of_a_folder_follows_its_files(tmp_path):
    (tmp_path / "a").write_text("one")
    first = file_sha256(tmp_path)
    (tmp_path / "b").write_text("two")
    assert file_sha256(tmp_path) != first
    assert len(file_sha256(tmp_path / "a")) == 64
