"""No command overwrites its input or foreign files, or writes into a folder of other work."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from script_helpers import TINY, run_here, write_pairs

import evaluate
import sample
import train
from common.errors import InputError
from common.outputs import (
    check_apart,
    check_output_arrays,
    check_output_folder,
    check_output_picture,
    check_output_table,
    maker_note,
)


@pytest.fixture
def pairs(tmp_path) -> tuple[Path, Path]:
    return write_pairs(tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_output_apart_from_the_inputs_is_taken(tmp_path, pairs):
    check_apart(tmp_path / "results", [*pairs, None])
    check_apart(tmp_path, pairs)  # the folder above holds more than the inputs


@pytest.mark.parametrize("name", ["images", "images/results", "images/../images/new.png"])
def test_an_output_among_the_inputs_is_refused(tmp_path, pairs, name):
    with pytest.raises(InputError, match="is read by this command"):
        check_apart(tmp_path / name, pairs)


def test_an_output_that_links_to_an_input_is_refused(tmp_path, pairs):
    (tmp_path / "link").symlink_to(pairs[1])
    (tmp_path / "hard.png").hardlink_to(pairs[1] / "cell_1.png")
    for output, source in ((tmp_path / "link", pairs[1]), (tmp_path / "hard.png", pairs[1] / "cell_1.png")):
        with pytest.raises(InputError, match="is read by this command"):
            check_apart(output, [source])


def test_a_picture_is_written_over_only_if_it_is_ours(tmp_path):
    picture = Image.fromarray(np.zeros((4, 5), np.uint8))
    picture.save(tmp_path / "ours.png", pnginfo=maker_note())
    check_output_picture(tmp_path / "ours.png", [])
    check_output_picture(tmp_path / "new.png", [])
    picture.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    for name in ("plain.png", "text.png", "folder.png"):
        with pytest.raises(InputError, match="did not make it"):
            check_output_picture(tmp_path / name, [])


def test_a_table_is_written_over_only_if_it_has_the_same_header(tmp_path):
    for name, text in (("ours.csv", "a,b\n1,2\n"), ("more.csv", "a,b,c\n"), ("empty.csv", "")):
        (tmp_path / name).write_text(text)
    check_output_table(tmp_path / "ours.csv", ("a", "b"), [])
    check_output_table(tmp_path / "new.csv", ("a", "b"), [])
    for name in ("more.csv", "empty.csv"):
        with pytest.raises(InputError, match="did not make it"):
            check_output_table(tmp_path / name, ("a", "b"), [])


def test_arrays_are_written_over_only_if_all_of_them_are_written_again(tmp_path):
    ours = {"a": (3, 4, 5), "b": (3, 4, 5)}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in ours.items()}
    good = {"same": zeros, "fewer": {"a": zeros["a"]}}
    bad = {
        "none": {},
        "more": zeros | {"c": zeros["a"]},
        "other_shape": {"a": np.zeros((3, 4), np.float32)},
        "other_type": {"a": np.zeros((3, 4, 5))},
        "objects": {"a": np.full((3, 4, 5), None)},
    }
    for name, arrays in (good | bad).items():
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
    whole = (tmp_path / "same.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "folder.npz").mkdir()
    with zipfile.ZipFile(tmp_path / "notes.npz", "w") as archive:
        archive.writestr("a.npy", b"a note")
    for name in ("new", *good):
        check_output_arrays(tmp_path / f"{name}.npz", ours, "float32", [])
    for name in (*bad, "half", "text", "folder", "notes"):
        with pytest.raises(InputError, match=f"{name}.npz exists, and this command did not make it"):
            check_output_arrays(tmp_path / f"{name}.npz", ours, "float32", [])
    with pytest.raises(InputError, match="is read by this command"):
        check_output_arrays(tmp_path / "new.npz", ours, "float32", [tmp_path])


def test_a_folder_is_used_again_only_if_it_holds_results_of_the_command(tmp_path):
    check_output_folder(tmp_path / "new", "data.json", ("problems",), [])
    (tmp_path / "lost+found").mkdir()
    check_output_folder(tmp_path, "data.json", ("problems",), [])
    (tmp_path / "data.json").write_text(json.dumps({"problems": [], "other": 1}))
    (tmp_path / "picture.png").write_bytes(b"")
    check_output_folder(tmp_path, "data.json", ("problems",), [])
    for text in ('{"mine": 1}', "[" * 100_000, "no JSON", "[]"):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(InputError, match=r"holds other files \(data\.json and 1 more\)"):
            check_output_folder(tmp_path, "data.json", ("problems",), [])
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "picture.png", "data.json", (), [])


def test_the_data_report_does_not_go_into_the_images(pairs):
    before = files_of(pairs[0])
    words = ["data", "--data-path", pairs[0], "--mask-path", pairs[1], "--output", pairs[0]]
    code, lines = run_here(evaluate, *words)
    assert code == 2 and f"--output {pairs[0]}: {pairs[0]} is read by this command" in lines[-1]
    assert files_of(pairs[0]) == before


def test_a_preview_does_not_replace_its_mask(pairs, tmp_path):
    mask = pairs[1] / "cell_1.png"
    before = mask.read_bytes()
    words = ["ODE", "--ckpt", tmp_path / "absent.pt", "--mask-path", mask, "--output"]
    code, lines = run_here(sample, *words, mask)
    assert code == 2 and "is read by this command" in lines[-1] and mask.read_bytes() == before
    code, lines = run_here(sample, *words, pairs[1] / "cell_2.png")
    assert code == 2 and "did not make it" in lines[-1]


def start_training(pairs: tuple[Path, Path], results: Path, *more: object) -> tuple[int, list[str]]:
    paths = ["--data-path", pairs[0], "--mask-path", pairs[1], "--results-dir", results]
    return run_here(train, *paths, *TINY, "--max-steps", 1, *more)


def test_a_run_does_not_begin_in_a_folder_of_other_work(pairs, tmp_path):
    other = tmp_path / "results" / "work"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.json").write_text('{"mine": 1}')
    (other / ".sit-0123abcd.tmp").write_bytes(b"half")
    before = files_of(other)
    code, lines = start_training(pairs, tmp_path / "results", "--run-name", "work")
    assert code == 2 and "is no run of train.py" in lines[-1]
    assert files_of(other) == before


def test_a_refused_start_leaves_no_run_folder(pairs, tmp_path):
    (pairs[1] / "cell_3.png").write_bytes(b"damaged")
    for more in (["--run-name", "cells"], []):
        code, lines = start_training(pairs, tmp_path / "results", *more)
        assert code == 2 and "cell_3.png" in "\n".join(lines)
        assert [path.name for path in (tmp_path / "results").iterdir() if path.is_dir()] == []


def test_a_refused_start_leaves_the_folder_of_a_run_that_has_begun(pairs, tmp_path):
    assert start_training(pairs, tmp_path / "results", "--run-name", "cells")[0] == 0
    (pairs[1] / "cell_3.png").write_bytes(b"damaged")
    assert start_training(pairs, tmp_path / "results", "--run-name", "cells", "--max-steps", 2)[0] == 2
    assert (tmp_path / "results" / "cells" / "checkpoints" / "0000001.pt").is_file()


def test_a_loop_of_links_as_input_ends_in_one_line(tmp_path, pairs):
    loop = tmp_path / "loop.pt"
    loop.symlink_to(loop.name)
    few = ["ODE", "--device", "cpu", "--mask-path", pairs[1] / "cell_0.png", "--output", tmp_path / "new.png"]
    for command, *words in (
        (sample, *few, "--ckpt", loop),
        (sample, "ODE", "--device", "cpu", "--mask-path", loop, "--output", tmp_path / "new.png", "--ckpt", pairs[0]),
        (evaluate, "data", "--data-path", loop, "--mask-path", pairs[1], "--output", tmp_path / "report"),
        (evaluate, "filter", loop, "--keep-share", 0.5, "--output", tmp_path / "kept"),
        (train, "--data-path", pairs[0], "--mask-path", loop, "--results-dir", tmp_path / "results", *TINY),
    ):
        code, lines = run_here(command, *words)
        assert code == 2 and len(lines) == 1 and "error:" in lines[0]
        assert str(loop) in lines[0] or str(pairs[0]) in lines[0]
