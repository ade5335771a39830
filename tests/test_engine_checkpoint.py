"""Checkpoints are complete or absent, and reading them runs no code."""

from __future__ import annotations

import errno
import pickle
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


def test_known_hashes_are_those_of_the_files_and_hard_links_count_once(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    known: dict[tuple[int, ...], str] = {}
    assert file_sha256(tmp_path / "a", known) == file_sha256(tmp_path / "b", known) == file_sha256(tmp_path / "a")
    assert file_sha256(tmp_path, known) == file_sha256(tmp_path) and len(known) == 1
    (tmp_path / "b").write_text("two and more")
    assert file_sha256(tmp_path / "a", known) == file_sha256(tmp_path / "a") and len(known) == 2


# --- values of the wrong kind ----------------------------------------------------------------------------------------


WRONG_STATES: dict[str, list] = {
    "step": ["x", -5, 10**30, None, torch.tensor([1, 2]), True],
    "ema": [None, [1]],
    "opt": [None, [1]],
    "config": [None, 5, "model transport space data", ["model", "transport", "space", "data"]],
    "trained_on": [5, [1]],
    "intensity": [[1], "x"],
    "looks": [[1]],
}
SPACE = state(1)["config"]["space"]
WRONG_CONFIGS = [
    {"model": None}, {"model": {"name": ["SiT-Ti/8"]}}, {"model": {"time_scale": float("nan")}},
    {"model": {"input_size": 2**70}}, {"data": [1]}, {"data": {"image_size": "32"}}, {"data": {"window": "ab"}},
    {"data": {"window_values": [[1]]}}, {"space": None}, {"space": {"vae": 5}}, {"transport": {"path_type": 3}},
    {"data": {}}, {"data": {"image_size": 10**9}}, {"data": {"image_size": 16, "x": 1}},
    {"space": {}}, {"space": SPACE | {"x": 1}}, {"space": {"vae": "none", "factor": 1, "channels": 3}},
    {"machine": [1]}, {"machine": "cpu"}, {"train": [1]}, {"train": {"mask_type": 1}}, {"train": {"init_from": [1]}},
    {"optimiser": 3},
]  # fmt: skip


def refused(tmp_path, changed) -> str:
    torch.save(changed, tmp_path / "wrong.pt")
    with pytest.raises(InputError) as error:
        read_checkpoint(tmp_path / "wrong.pt")
    return str(error.value)


@pytest.mark.parametrize(("name", "value"), [(name, one) for name, wrong in WRONG_STATES.items() for one in wrong])
def test_a_part_of_the_wrong_kind_is_refused_with_the_file(tmp_path, name, value):
    text = refused(tmp_path, state(1) | {name: value})
    assert "wrong.pt" in text and name in text


@pytest.mark.parametrize("sections", WRONG_CONFIGS, ids=str)
def test_a_configuration_of_the_wrong_kind_is_refused_with_the_file(tmp_path, sections):
    assert "wrong.pt" in refused(tmp_path, state(1) | {"config": state(1)["config"] | sections})


@pytest.mark.parametrize("config", ["[" * 200_000, "1" * 5000, "null", "[]", "5", '{"model": NaN}'])
def test_metadata_of_an_export_that_is_no_configuration_is_refused(tmp_path, config):
    metadata = {"config": config, "step": "2"}
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(checkpoint.safetensors.torch.save({"w": torch.zeros(3)}, metadata))
    with pytest.raises(InputError, match=r"wrong\.safetensors"):
        read_checkpoint(path)


TINY = {"name": "SiT-Ti/8", "depth": 1, "hidden_size": 32, "num_heads": 2, "input_size": 16, "in_channels": 3}
TINY |= {"num_classes": 2, "class_dropout_prob": 0.1}
HUGE = [
    {"depth": 10**9}, {"hidden_size": 3 * 2**30}, {"mask_pixels": 10**6}, {"num_classes": 10**9}, {"depth": 0},
    {"input_size": 8 * 362}, {"input_size": 8 * 2**40}, {"in_channels": 10**9}, {"look_numbers": 10**9},
    {"mlp_ratio": 1e12}, {"patch_size": 1}, {"name": "SiT-XL/2", "depth": 28, "hidden_size": 1152}, {"name": "x"},
]  # fmt: skip


@pytest.mark.parametrize("change", HUGE, ids=str)
def test_a_configuration_that_asks_for_more_than_the_weights_is_refused_before_it_is_built(change, monkeypatch):
    weights = checkpoint.build_model(TINY).state_dict()
    built = []
    build = checkpoint.build_model

    def build_without_memory(config):
        built.append(torch.empty(0).device.type)
        return build(config)

    monkeypatch.setattr(checkpoint, "build_model", build_without_memory)
    with pytest.raises((ValueError, RuntimeError)):
        checkpoint.build_trained(TINY | change, weights)
    assert "cpu" not in built


def test_a_configuration_that_fits_is_built_with_its_weights():
    weights = {name: value + 1 for name, value in checkpoint.build_model(TINY).state_dict().items()}
    for name, value in checkpoint.build_trained(TINY, weights).state_dict().items():
        assert torch.equal(value, weights[name])


def test_an_export_holds_the_name_of_the_autoencoder_and_not_its_path(tmp_path):
    whole = state(5) | {"ema": {"w": torch.arange(3.0)}}
    whole["config"]["space"] = {"vae": "/home/someone/tiny", "factor": 4, "channels": 5, "fingerprint": "ab"}
    export_safetensors(tmp_path / "model.safetensors", whole)
    assert read_checkpoint(tmp_path / "model.safetensors")["config"]["space"]["vae"] == "tiny"
    assert b"someone" not in (tmp_path / "model.safetensors").read_bytes()
    assert whole["config"]["space"]["vae"] == "/home/someone/tiny"


def nested(kind, times: int):
    """A list (or tuple, or dictionary) that holds the one before twice, and so on."""
    value = kind(["x"]) if kind is not dict else {"x": 1}
    for _ in range(times):
        value = {"a": value, "b": value} if kind is dict else kind([value, value])
    return value


@pytest.mark.parametrize("place", ["depth", "step", "extra", "opt"])
@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_a_value_whose_text_has_no_end_is_refused_at_once(tmp_path, kind, place):
    value = nested(kind, 60)
    config = state(1)["config"] | {"model": {"name": "SiT-Ti/8", "depth": value}}
    changed = state(1) | ({"config": config} if place == "depth" else {place: value})
    assert "wrong.pt" in refused(tmp_path, changed)


def test_a_tuple_that_a_dictionary_would_hash_without_end_is_refused_at_once(tmp_path):
    torch.save({}, tmp_path / "wrong.pt")
    with zipfile.ZipFile(tmp_path / "wrong.pt") as archive:
        blocks = {name: archive.read(name) for name in archive.namelist()}
    key = pickle.dumps(nested(tuple, 60), protocol=2)[2:-1]  # without its header and its end
    pickled = b"\x80\x02}" + key + b"K\x01s."  # {key: 1}
    with zipfile.ZipFile(tmp_path / "wrong.pt", "w") as archive:
        for name, content in blocks.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    with pytest.raises(InputError, match="wrong.pt: damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "wrong.pt")


def test_a_list_that_holds_itself_is_refused_and_one_that_occurs_twice_is_read(tmp_path):
    endless: list = [1]
    endless.append(endless)
    assert "wrong.pt" in refused(tmp_path, state(1) | {"extra": endless})
    twice = ["a", ("b", 2)]
    torch.save(state(1) | {"extra": [twice, twice]}, tmp_path / "right.pt")
    assert read_checkpoint(tmp_path / "right.pt")["extra"] == [twice, twice]
