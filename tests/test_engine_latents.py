"""Latents that are encoded once: the posterior of every symmetry is reused, and encoded again if something changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from script_helpers import run, train_arguments
from test_engine_peers import launch, together

import engine.latents
import train
from common.errors import InputError
from dataset.config import DataConfig
from dataset.folders import PairedFolder
from dataset.views import SYMMETRIES
from engine.autoencoder import LatentSpace, load_space
from engine.checkpoint import read_checkpoint
from engine.latents import LatentPairs, latent_key
from engine.machine import Machine

SIZE = 24
DRAWS = range(40)
ALONE = Machine(0, 1, torch.device("cpu"), "float32")


@pytest.fixture
def space(autoencoder_folder: Path) -> LatentSpace:
    space = load_space(str(autoencoder_folder))
    assert isinstance(space, LatentSpace)
    return space


@pytest.fixture
def pairs(disk_pairs: Path) -> PairedFolder:
    return PairedFolder(disk_pairs / "images", disk_pairs / "masks", DataConfig(SIZE))


class ListingLatents(LatentPairs):
    """Lists the images that it encodes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.encoded: list[int] = []

    def encode(self, index: int) -> Any:
        self.encoded.append(index)
        return super().encode(index)


@pytest.fixture
def make_latents(pairs: PairedFolder, space: LatentSpace, tmp_path: Path) -> Callable[..., ListingLatents]:
    """Latents of the six pairs, prepared; ``encoded`` of the result lists the images that were encoded for it."""

    def make(pairs: PairedFolder = pairs) -> ListingLatents:
        latents = ListingLatents(pairs, space, tmp_path / "latents", pairs.image_hashes)
        latents.prepare(ALONE)
        return latents

    return make


def test_every_view_has_the_posterior_of_the_image_turned_so(make_latents, pairs, space):
    latents = make_latents()
    assert {pairs.symmetry(draw) for draw in DRAWS} == set(range(SYMMETRIES))
    for draw in DRAWS:
        key = (draw % len(pairs), draw)
        found, online = latents[key], pairs[key]
        mean, std = space.moments(online["image"][None])
        torch.testing.assert_close(found["moments"], torch.cat([mean, std]), rtol=0, atol=1e-6)
        assert torch.equal(found["mask"], online["mask"])
    assert found["moments"].shape == (2, 5, SIZE // 4, SIZE // 4)


def test_views_of_an_image_differ(make_latents):
    moments = make_latents().encode(2)
    assert all((moments[i] - moments[j]).abs().max() > 0.01 for i in range(SYMMETRIES) for j in range(i))


def test_draws_are_new_each_time_and_have_mean_and_std_of_the_posterior(make_latents, space):
    torch.manual_seed(0)
    count = 4000
    mean, std = make_latents()[(0, 0)]["moments"]
    draws = space.draw(mean.expand(count, -1, -1, -1), std.expand(count, -1, -1, -1))
    score = (draws - mean) / std
    assert score.mean(0).abs().max() < 5 / count**0.5
    assert (score.std(0) - 1).abs().max() < 5 / (2 * count) ** 0.5


def test_same_noise_gives_the_latents_of_online_encoding(make_latents, pairs, space):
    latents, key = make_latents(), (3, 5)
    torch.manual_seed(7)
    drawn = space.draw(*latents[key]["moments"][:, None])
    torch.manual_seed(7)
    torch.testing.assert_close(drawn, space.encode(pairs[key]["image"][None]), rtol=0, atol=1e-6)


def test_second_run_encodes_nothing_and_reads_the_same(make_latents, monkeypatch):
    first, second = make_latents(), make_latents()
    monkeypatch.setattr(engine.latents, "MEMORY_GB", 0)
    from_disk = make_latents()
    assert first.encoded == [0, 1, 2, 3, 4, 5] and second.encoded == from_disk.encoded == []
    assert second.in_memory and not from_disk.in_memory
    for draw in DRAWS:
        key = (draw % 6, draw)
        assert torch.equal(first[key]["moments"], second[key]["moments"])
        assert torch.equal(first[key]["moments"], from_disk[key]["moments"])


def test_interrupted_encoding_goes_on(make_latents, monkeypatch, pairs, space, tmp_path):
    stopped = LatentPairs(pairs, space, tmp_path / "latents", pairs.image_hashes)
    encode = stopped.encode

    def stop_at_four(index: int) -> torch.Tensor:
        if index == 4:
            raise KeyboardInterrupt
        return encode(index)

    monkeypatch.setattr(stopped, "encode", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        stopped.prepare(ALONE)
    assert make_latents().encoded == [4, 5]
    assert not list((tmp_path / "latents").glob("*.tmp"))


def test_changed_image_is_encoded_anew_and_no_other(make_latents, pairs, disk_pairs):
    make_latents()
    path = pairs.pairs[1].image_path
    Image.open(path).rotate(180).save(path)
    changed = PairedFolder(disk_pairs / "images", disk_pairs / "masks", DataConfig(SIZE))
    assert make_latents(changed).encoded == [1]


@pytest.mark.parametrize("damage", ["cut", "byte", "empty"])
def test_damaged_file_is_made_anew_with_a_word(make_latents, caplog, damage):
    latents = make_latents()
    path, content = latents.paths[2], latents.paths[2].read_bytes()
    changed = bytearray(content)
    changed[-100] ^= 1
    path.write_bytes({"cut": content[:-50], "byte": bytes(changed), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert make_latents().encoded == [2]
    assert f"{path} is damaged" in caplog.text
    assert path.read_bytes() == content


def test_ranks_share_out_the_work(pairs, space, tmp_path):
    latents = LatentPairs(pairs, space, tmp_path / "latents", pairs.image_hashes)
    (tmp_path / "latents").mkdir()
    assert latents._encode_share(0, 4, ALONE) == 2  # images 0 and 4
    assert [path.is_file() for path in latents.paths] == [True, False, False, False, True, False]
    assert sum(latents._encode_share(rank, 4, ALONE) for rank in (1, 2, 3)) == 4


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_file_of_a_machine_without_the_others_disk_is_made_anew(
    make_latents, pairs, space, tmp_path, monkeypatch, damaged
):
    """Two machines with one process each: the files of the first one's share lie on the second one, too."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    path = make_latents().paths[damaged]
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with launch("nodea", "nodeb") as both:
        disks = [tmp_path / "disk_of_nodea", tmp_path / "latents"]
        machines = [Machine(one.rank, 2, ALONE.device, "float32", one) for one in both]
        latents = [ListingLatents(pairs, space, disk, pairs.image_hashes) for disk in disks]
        work = [
            lambda one=one, machine=machine: one.prepare(machine)
            for one, machine in zip(latents, machines, strict=True)
        ]
        assert together(*work) == [None, None]
    assert [sorted(one.encoded) for one in latents] == [[0, 1, 2, 3, 4, 5], [damaged]]
    assert path.read_bytes() == content


def test_key_knows_all_that_changes_an_image(space):
    config = DataConfig(SIZE)
    other_space = dataclasses.make_dataclass("Other", ["fingerprint"])("0" * 16)
    keys = {
        latent_key(space, config, "a"),
        latent_key(space, config, "b"),
        latent_key(other_space, config, "a"),
        *(latent_key(space, dataclasses.replace(config, **change), "a") for change in (
            {"image_size": 32}, {"window": (1, 99)}, {"window_values": ((3, 200),) * 3},
        )),
    }  # fmt: skip
    assert len(keys) == 6
    assert latent_key(space, DataConfig(SIZE, num_classes=3), "a") == latent_key(space, config, "a")


def test_full_disk_is_said_before_anything_is_encoded(make_latents, monkeypatch):
    monkeypatch.setattr("engine.latents.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="latent_cache .* are free"):
        make_latents()


# --- training --------------------------------------------------------------------------------------------------------


def words(disk_pairs: Path, results: Path, name: str, steps: int, autoencoder: Path) -> list[str]:
    arguments = train_arguments(disk_pairs / "images", disk_pairs / "masks", results, name, steps)
    return [*arguments, "--vae", str(autoencoder), "--model", "SiT-Ti/2", "--image-size", str(SIZE)]


def last_weights(results: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return read_checkpoint(results / name / "checkpoints" / f"{step:07d}.pt")["model"]


@pytest.mark.usefixtures("one_block")
def test_training_resumes_bit_for_bit_and_equals_online_encoding(disk_pairs, autoencoder_folder, tmp_path):
    cache = ("--latent-cache", str(tmp_path / "kept"))
    plan = [("whole", 4, cache), ("halves", 2, cache), ("halves", 4, cache), ("online", 4, ("--latent-cache", "none"))]
    for name, steps, more in plan:
        command = [*words(disk_pairs, tmp_path, name, steps, autoencoder_folder), *more]
        train.main(train.parse_args(command[1:]))
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 6
    whole, halves, online = (last_weights(tmp_path, name, 4) for name in ("whole", "halves", "online"))
    for name, value in whole.items():
        assert torch.equal(halves[name], value)
        assert (online[name] - value).abs().max() < 1e-4  # four steps of 1e-3 went into it
    assert "latents of 6 images" in (tmp_path / "whole" / "log.txt").read_text()
    assert "latents" not in (tmp_path / "online" / "log.txt").read_text().split("command", 1)[1].split("\n", 1)[1]


@pytest.mark.usefixtures("one_block")
def test_either_all_folders_are_encoded_or_none(disk_pairs, autoencoder_folder, tmp_path):
    """The run is long enough to gain from latents of the labelled images, but not of all."""
    new = tmp_path / "new"
    new.mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(new / f"{number}.png")
    command = [*words(disk_pairs, tmp_path, "mixed", 6 * 8 // 4, autoencoder_folder), "--unlabelled-path", str(new)]
    args = train.parse_args([*command[1:], "--look", "none", "--global-batch-size", "4"])
    train.main(args)
    assert "encoded at each step" in (tmp_path / "mixed" / "log.txt").read_text()


@pytest.mark.usefixtures("one_block")
def test_short_run_encodes_online_and_says_so(disk_pairs, autoencoder_folder, tmp_path):
    train.main(train.parse_args(words(disk_pairs, tmp_path, "short", 1, autoencoder_folder)[1:]))
    assert "encoded at each step" in (tmp_path / "short" / "log.txt").read_text()
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    "change", [["--vae", "none", "--model", "SiT-Ti/8"], ["--crop", "random"]], ids=["pixels", "windows"]
)
def test_flag_without_effect_is_refused(disk_pairs, autoencoder_folder, tmp_path, change):
    command = words(disk_pairs, tmp_path, "bad", 1, autoencoder_folder)
    with pytest.raises(InputError, match="--latent-cache has no effect with"):
        train.main(train.parse_args([*command[1:], "--latent-cache", str(tmp_path), *change]))


@pytest.mark.slow
def test_two_ranks_fill_one_cache(disk_pairs, autoencoder_folder, tmp_path):
    command = words(disk_pairs, tmp_path, "two", 2, autoencoder_folder)
    result = run(*command, "--latent-cache", tmp_path / "kept", ranks=2)
    assert "3 encoded now by this process" in result.stderr
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 6
