"""Run folders are numbered, locked and pruned."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from script_helpers import state

from common.errors import InputError
from engine.run_folder import RunFolder, choose_run_folder


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
    found, content_of_it = run.newest()
    assert (found, content_of_it["step"]) == (run.checkpoint_path(1), 1)
    assert "0000002.pt" in caplog.text and "Falling back" in caplog.text
    assert sorted(file.name for file in run.checkpoints.iterdir()) == ["0000001.pt", "0000002.pt.damaged"]


def test_all_damaged_is_said_and_nothing_is_removed(run):
    path = run.save(state(1))
    path.write_bytes(b"")
    with pytest.raises(InputError, match="all 1 checkpoints are damaged"):
        run.newest()
    assert path.exists()


def reopened(run: RunFolder) -> RunFolder:
    """The folder as another process finds it."""
    return RunFolder(run.path, run.keep)


def test_damaged_checkpoints_do_not_count_and_the_new_one_stays(run):
    """The newest two damaged, two kept: the next one must not push the only whole one out, nor itself."""
    for step in (10, 20, 30):
        run.save(state(step))
        (run.path / f"copy-{step}").write_bytes(run.checkpoint_path(step).read_bytes())
    (run.path / "copy-10").replace(run.checkpoint_path(10))
    for step in (20, 30):
        run.checkpoint_path(step).write_bytes(b"damaged")
    again = reopened(run)
    assert again.newest()[1]["step"] == 10
    again.save(state(11))
    assert again.steps() == [10, 11]
    assert run.checkpoint_path(20).with_suffix(".pt.damaged").read_bytes() == b"damaged"


def test_a_checkpoint_that_is_damaged_below_the_newest_does_not_count(run):
    for step in (1, 2):
        run.save(state(step))
    run.checkpoint_path(1).write_bytes(b"damaged")
    again = reopened(run)
    assert again.newest()[1]["step"] == 2
    again.save(state(3))
    assert again.steps() == [2, 3] and (run.checkpoints / "0000001.pt.damaged").is_file()


def test_checkpoints_of_later_steps_push_nothing_out(run):
    for step in (40, 50):
        run.save(state(step))
    again = reopened(run)
    again.save(state(7))
    assert again.steps() == [7, 40, 50]


def test_a_disk_that_cannot_be_read_is_no_damage(run, monkeypatch):
    path = run.save(state(1))

    def broken(*arguments: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("common.weights.zipfile.ZipFile", broken)
    with pytest.raises(OSError, match="Input/output error"):
        reopened(run).newest()
    assert path.is_file()


def test_a_new_run_has_no_newest(run):
    assert run.newest() is None


def test_a_second_process_is_kept_out_and_the_loader_processes_of_a_killed_one_keep_nobody_out(run):
    code = f"""if True:
        import os, time
        from pathlib import Path
        from engine.run_folder import RunFolder
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


def test_a_run_that_was_killed_while_its_first_file_was_written_is_a_run(run):
    (run.path / "log.txt").write_text("begun")
    for name in (".lock", ".sit-0123abcd.tmp", "lost+found"):
        (run.path / name).touch()
    assert RunFolder(run.path, 3).create()
    (run.path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        RunFolder(run.path, 3).create()


@pytest.mark.parametrize("torn", [b'{"step": 8, "tra', b'{"step": 2, \x80\xff', b"\0\xc3"])
def test_metrics_after_the_resumed_step_and_torn_lines_are_cut(run, torn):
    for step in (2, 4, 6):
        run.log_metrics({"step": step, "train/loss": step / 10})
    with run.metrics.open("ab") as file:
        file.write(torn)
    run.cut_metrics(4)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [2, 4]


def test_only_the_preview_of_the_resumed_step_is_written_again(run):
    """A picture that the user removed takes no number with it."""
    for step in (2, 4):
        run.log_metrics({"step": step, "preview/grid": 1.0})
    run.cut_metrics(4)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [2]


def test_a_broken_link_takes_its_number(tmp_path):
    """Such as one to a disk that was cleared: no folder can be made in its place."""
    (tmp_path / "004-SiT").symlink_to(tmp_path / "gone")
    (tmp_path / "005-SiT").touch()
    assert choose_run_folder(tmp_path, None, "SiT").name == "006-SiT"


def test_numbers_of_run_folders_are_never_reused(tmp_path):
    for name in ("000-SiT", "001-SiT", "007-SiT", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "000-SiT").rmdir()
    assert choose_run_folder(tmp_path, None, "SiT-B/2 x").name == "008-SiT-B-2-x"
    assert choose_run_folder(tmp_path, "mine", "SiT").name == "mine"


@pytest.mark.parametrize("noted", ["8", "3", "", "what?"])
def test_the_number_of_the_highest_folder_is_not_used_again_after_it_was_deleted(tmp_path, noted):
    (tmp_path / "007-SiT").mkdir()
    (tmp_path / ".last_run").write_text(noted)
    run = RunFolder(choose_run_folder(tmp_path, None, "SiT"), keep=1)
    number = 9 if noted == "8" else 8
    assert run.path.name == f"{number:03d}-SiT"
    run.create()
    shutil.rmtree(run.path)
    assert choose_run_folder(tmp_path, None, "SiT").name == f"{number + 1:03d}-SiT"
    RunFolder(choose_run_folder(tmp_path, "mine", "SiT"), keep=1).create()
    assert choose_run_folder(tmp_path, None, "SiT").name == f"{number + 1:03d}-SiT"


def test_a_run_that_torchrun_may_restart_needs_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="up to 3 times, and only a run with a name continues: give run_name"):
        choose_run_folder(tmp_path, None, "SiT")
    assert choose_run_folder(tmp_path, "mine", "SiT").name == "mine"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert choose_run_folder(tmp_path, None, "SiT").name == "000-SiT"


def test_two_unnamed_starts_at_the_same_moment_get_a_folder_each(tmp_path):
    one, other = (RunFolder(choose_run_folder(tmp_path, None, "SiT"), 3) for _ in range(2))
    assert one.path == other.path
    assert one.create(must_be_new=True) and not other.create(must_be_new=True)
    assert choose_run_folder(tmp_path, None, "SiT").name == "001-SiT"


@pytest.mark.parametrize("counter", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_restarted_run_waits_for_the_lock_of_its_earlier_self(tmp_path, monkeypatch, counter):
    waited = []

    def lock_folder(*_, wait_seconds, **__):
        waited.append(wait_seconds)
        return (tmp_path / "lock").open("a+b")

    monkeypatch.setattr("engine.run_folder.lock_folder", lock_folder)
    for restarts in ("0", "1"):
        monkeypatch.setenv(counter, restarts)
        RunFolder(tmp_path, 3).lock()
    assert waited == [0, 120]


def test_copies_of_checkpoints_that_the_user_made_neither_count_nor_end_a_run(run):
    run.save(state(1))
    for name in ("1.pt", "99.pt", "00000099.pt", "\u00b2.pt", "best.pt"):
        shutil.copy(run.checkpoint_path(1), run.checkpoints / name)
    again = reopened(run)
    assert again.steps() == [1] and again.newest()[1]["step"] == 1
    for step in (2, 3):
        again.save(state(step))
    assert again.steps() == [2, 3] and len(list(run.checkpoints.iterdir())) == 7
