"""Checkpoints are complete or absent, and reading them runs no code."""

from __future__ import annotations

import errno
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from script_helpers import state

from common.disk import file_sha256, write_atomically
from common.errors import InputError, one_line
from engine import checkpoint
from engine.checkpoint import export_safetensors, read_checkpoint, save_checkpoint


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


def test_a_file_of_another_project_is_refused_by_its_missing_parts(tmp_path):
    torch.save({"model": {}, "ema": {}}, tmp_path / "sit.pt")
    with pytest.raises(InputError, match="has no opt, step, config"):
        read_checkpoint(tmp_path / "sit.pt")


def test_exported_weights_are_read_with_their_config_and_without_the_command_line(tmp_path):
    whole = state(5) | {"ema": {"w": torch.arange(3.0)}, "trained_on": ["a", "b"], "intensity": {"channels": 1}}
    whole["config"] |= {"model": {"name": "SiT-Ti/8"}, "train": {"data_path": "/home/someone"}}
    export_safetensors(tmp_path / "model.safetensors", whole)
    again = read_checkpoint(tmp_path / "model.safetensors")
    assert again["trained_on"] == ["a", "b"] and again["intensity"] == {"channels": 1}
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


def test_what_the_pickle_claims_beyond_the_file_is_refused(tmp_path):
    torch.save(state(1) | {"ema": {"w": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "stretched.pt")
    torch.save(state(1) | {"ema": bytearray(9)}, tmp_path / "bytes.pt")  # bytearray(10**12) would be as short
    torch.save(state(1) | {"ema": {"w": torch.zeros(3, device="meta")}}, tmp_path / "meta.pt")
    for name in ("stretched", "bytes", "meta"):
        with pytest.raises(InputError, match="damaged or not a checkpoint"):
            read_checkpoint(tmp_path / f"{name}.pt")


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


def test_hash_of_a_folder_follows_its_files(tmp_path):
    (tmp_path / "a").write_text("one")
    first = file_sha256(tmp_path)
    (tmp_path / "b").write_text("two")
    assert file_sha256(tmp_path) != first
    assert len(file_sha256(tmp_path / "a")) == 64
