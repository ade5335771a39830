"""Memory of checked files: a file is decoded again only if it changed; large folders are checked by file headers."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from script_helpers import ROOT, write_pairs

from benchmarks import many_files
from common.disk import file_sha256
from common.errors import InputError
from dataset import checked_files, checks, mask_folder
from dataset.checked_files import CheckedFiles
from dataset.config import DataConfig
from dataset.files import read_image, read_mask_and_table, read_size
from dataset.folders import PairedFolder
from dataset.mask_facts import MaskStats, mask_stats
from dataset.mask_folder import MaskFolder

CONFIG = DataConfig(16)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the masks decoded so far."""
    names: list[str] = []

    def read(path: Path) -> Any:
        names.append(path.name)
        return read_mask_and_table(path)

    for module in (checks, mask_folder):
        monkeypatch.setattr(module, "read_mask_and_table", read)
    return names


@pytest.mark.parametrize("crop", ["center", "random"])
def test_pairs_beyond_the_memory_are_decoded_once_and_again_where_they_changed(pairs, reads, crop):
    config = DataConfig(16, crop=crop, window=(1, 99))
    first = PairedFolder(*pairs, config, memory_gb=0)
    assert sorted(reads) == [f"cell_{n}.png" for n in range(6)]
    reads.clear()
    second = PairedFolder(*pairs, config, memory_gb=0)
    assert reads == [] and not second.in_memory
    assert second.rule == first.rule and second.windows == first.windows
    Image.fromarray(np.zeros((24, 20), np.uint8)).save(pairs[1] / "cell_2.png")
    PairedFolder(*pairs, config, memory_gb=0)
    assert reads == ["cell_2.png"]
    reads.clear()
    PairedFolder(*pairs, DataConfig(16, crop=crop), memory_gb=0)  # other windows: nothing is known
    assert len(reads) == 6


def test_pairs_that_fit_the_memory_are_read_at_every_start(pairs, reads):
    for _ in range(2):
        assert PairedFolder(*pairs, CONFIG).in_memory
    assert len(reads) == 12


def test_masks_are_decoded_once_and_their_views_stay_known(pairs, reads):
    first = MaskFolder(pairs[1], CONFIG)
    reads.clear()
    second = MaskFolder(pairs[1], CONFIG)
    assert reads == [] and second.rule == first.rule
    assert second.view("cell_3") == second.load("cell_3").view


@pytest.mark.parametrize("package", ["tifffile", "imagecodecs", "scipy"])
def test_files_are_decoded_again_with_another_version_of_a_package_that_reads_them(pairs, reads, monkeypatch, package):
    MaskFolder(pairs[1], CONFIG)
    reads.clear()
    monkeypatch.setattr(checked_files, "version", lambda name: "0.1" if name == package else version(name))
    MaskFolder(pairs[1], CONFIG)
    assert len(reads) == 6


def test_a_package_that_is_not_installed_has_no_version_and_stops_nothing(pairs, monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checked_files, "version", absent)
    assert len(MaskFolder(pairs[1], CONFIG)) == 6


def test_facts_depend_on_all_code_and_packages_that_read_files():
    ours = {path.relative_to(ROOT).as_posix() for path in checked_files.CODE}
    assert {"dataset/files.py", "dataset/annotations/stacks.py", "common/cells.py"} <= ours
    found = set()
    for path in checked_files.CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    # Tensors, progress bars, weights files and locks say nothing about an image or a mask.
    others = found - set(sys.stdlib_module_names) - {"common", "dataset", "torch", "tqdm", "safetensors", "filelock"}
    assert others == set(checked_files.PACKAGES)


def test_a_damaged_file_is_found_at_every_start_and_the_rest_is_remembered(pairs, reads):
    path = pairs[1] / "cell_1.png"
    path.write_bytes(path.read_bytes()[:80])
    for expected in (6, 1):
        reads.clear()
        with pytest.raises(InputError, match=r"cell_1\.png"):
            MaskFolder(pairs[1], CONFIG)
        assert len(reads) == expected


def test_a_folder_of_nuclei_is_decoded_again_when_one_of_its_files_changed(tmp_path, reads):
    for name in ("a", "b"):
        (tmp_path / "nuclei" / name).mkdir(parents=True)
        for number in (1, 2):  # a single file would be the mask of the whole image
            nucleus = np.eye(20, k=5 * number, dtype=np.uint8)
            Image.fromarray(nucleus).save(tmp_path / "nuclei" / name / f"{number}.png")
    MaskFolder(tmp_path / "nuclei", CONFIG)
    reads.clear()
    inner = tmp_path / "nuclei" / "b" / "1.png"
    os.utime(inner, ns=(0, 0))
    MaskFolder(tmp_path / "nuclei", CONFIG)
    assert reads == ["b"]


def test_a_cache_that_cannot_be_written_or_read_costs_a_decode_only(pairs, reads, tmp_path, monkeypatch):
    MaskFolder(pairs[1], CONFIG)
    (stored,) = (tmp_path / "cache").rglob("*.gz")
    stored.write_bytes(stored.read_bytes()[:50])
    reads.clear()
    MaskFolder(pairs[1], CONFIG)
    assert len(reads) == 6
    monkeypatch.setenv("XDG_CACHE_HOME", str(pairs[1] / "cell_0.png"))  # no folder can be made below a file
    MaskFolder(pairs[1], CONFIG)
    assert len(reads) == 12


def test_a_flipped_byte_of_the_cache_costs_a_decode_at_most(tmp_path):
    files = {"a": [Path(__file__)], "b": [ROOT]}
    known = {"a": [1, 2.5, "text"], "b": {"none": None}}
    memory = CheckedFiles("key")
    memory.recall(files)
    for name, facts in known.items():
        memory.remember(name, facts)
    memory.save()
    (stored,) = (tmp_path / "cache").rglob("*.gz")
    whole = stored.read_bytes()
    assert CheckedFiles("key").recall(files) == known
    found = []
    for place in range(len(whole)):
        stored.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found.append(CheckedFiles("key").recall(files))
    assert all(one in ({}, known) for one in found)
    assert found.count(known) < 10  # the time of writing and the like


def test_files_of_the_cache_that_nobody_used_for_long_are_removed(pairs, tmp_path):
    def age(path: Path, days: float) -> None:
        os.utime(path, (time.time() - days * 24 * 3600,) * 2)

    MaskFolder(pairs[1], CONFIG)
    (used,) = (tmp_path / "cache").rglob("*.gz")
    age(used, 100)
    for name, days in (("recent.jsonl.gz", 60), ("old.jsonl.gz", 100), (".sit-0123abcd.tmp", 100)):
        (used.parent / name).touch()
        age(used.parent / name, days)
    MaskFolder(pairs[1], CONFIG)  # uses its own
    MaskFolder(pairs[1], DataConfig(8))  # writes another, and removes what is old
    names = {path.name for path in used.parent.iterdir()}
    assert {used.name, "recent.jsonl.gz"} < names and len(names) == 3


def test_facts_of_a_mask_survive_json():
    rng = np.random.default_rng(0)
    masks = [
        rng.integers(0, 300, (9, 7)).astype(np.uint16),
        np.full((3, 9, 7), 1 / 3, np.float32),
        np.eye(9, dtype="u1"),
    ]
    for mask in masks:
        stats = mask_stats("a", mask)
        assert MaskStats.from_plain(json.loads(json.dumps(stats.to_plain()))) == stats


def test_headers_tell_the_size_that_decoding_tells_or_nothing(disk_pairs):
    sizes = {path.suffix: (read_size(path), read_image(path).shape[:2]) for path in (disk_pairs / "images").iterdir()}
    assert all(by_header in (None, decoded) for by_header, decoded in sizes.values())
    assert all(sizes[suffix][0] == (40, 52) for suffix in (".png", ".jpg", ".jpeg"))
    (disk_pairs / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert read_size(disk_pairs / "broken.png") is None and read_size(disk_pairs / "absent.png") is None


def test_sizes_of_many_files_are_refused_before_any_is_decoded(pairs, reads, monkeypatch):
    monkeypatch.setattr(checks, "PAIRS_WORTH_A_LOOK", 5)
    Image.fromarray(np.zeros((21, 20), np.uint8)).save(pairs[1] / "cell_2.png")
    with pytest.raises(InputError, match=r"cell_2\.png.*20 x 21 pixels.*20 x 24"):
        PairedFolder(*pairs, CONFIG)
    with pytest.raises(InputError, match=r"6 of 6.*smaller than image_size=64"):
        PairedFolder(*pairs, DataConfig(64, crop="random"))
    assert reads == []


def test_the_benchmark_of_many_files_runs(capsys):
    many_files.main(many_files.parse_args(["--count", "20"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[2:6]] == [
        "training, first start", "training, second start", "sampling, first start", "sampling, second start",
    ]  # fmt: skip


def test_a_user_without_a_home_has_no_cache_and_no_error(pairs, reads, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    for _ in range(2):
        assert len(MaskFolder(pairs[1], CONFIG)) == 6
    assert len(reads) == 12


def test_a_pipe_among_many_files_does_not_hang_the_look_at_headers(pairs, monkeypatch):
    monkeypatch.setattr(checks, "PAIRS_WORTH_A_LOOK", 5)
    (pairs[1] / "cell_2.png").unlink()
    os.mkfifo(pairs[1] / "cell_2.png")
    with pytest.raises(InputError, match=r"cell_2\.png.*not a regular file"):
        PairedFolder(*pairs, CONFIG)
    with pytest.raises(InputError, match="not a regular file"):
        file_sha256(pairs[1] / "cell_2.png")
