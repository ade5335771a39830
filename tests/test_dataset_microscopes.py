"""Stacks of microscopes: the requested plane or projection, and an error line if none is requested."""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from script_helpers import run_here

import make_masks
from common.errors import InputError
from dataset.files import find_images, read_image_and_kind
from dataset.microscope_files import Choice, read_stack
from dataset.microscopes import flatten_folder

STACK = np.random.default_rng(0).integers(0, 60_000, (3, 4, 2, 20, 24), dtype=np.uint16)  # T, Z, C, Y, X


@pytest.fixture(params=["a.tif", "a.ome.tif"])
def folder(tmp_path, request) -> Path:
    """One hyperstack of ImageJ, or one OME-TIFF."""
    (tmp_path / "in").mkdir()
    options: dict[str, Any] = {"imagej": True} if request.param == "a.tif" else {"ome": True}
    tifffile.imwrite(tmp_path / "in" / request.param, STACK, metadata={"axes": "TZCYX"}, **options)
    return tmp_path / "in"


def flat(folder: Path, **choice) -> np.ndarray:
    """The image (H, W, C) that is written."""
    (path,) = flatten_folder(folder, folder.parent / "out", Choice(**choice))
    assert path.name == "a.tif"
    image, has_channels = read_image_and_kind(path)
    assert has_channels == (image.shape[2] > 1)
    return image


def channels_last(planes: np.ndarray) -> np.ndarray:
    return planes.transpose(1, 2, 0)


def test_a_plane_counts_from_one(folder):
    assert np.array_equal(flat(folder, z="3", time="1"), channels_last(STACK[0, 2]))


def test_projections_go_along_their_axis_and_keep_the_type(folder):
    expected = np.rint(STACK[1].mean(axis=0)).astype(np.uint16)
    assert np.array_equal(flat(folder, z="mean", time="2"), channels_last(expected))


def test_channels_are_kept_in_the_given_order(folder):
    image = flat(folder, z="max", time="max", channels=(2,))
    assert np.array_equal(image[..., 0], STACK.max(axis=(0, 1))[1])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"time": "1"}, "z: .* has 4 planes along Z: say which, by a number from 1 to 4, or max or mean"),
        ({"z": "1"}, "time: .* has 3 planes along T"),
        ({"z": "5", "time": "1"}, "z 5: .* has planes 1 to 4"),
        ({"z": "middle", "time": "1"}, "z middle"),
        ({"z": "1", "time": "1", "channels": (3,)}, "channels 3: .* has 2"),
    ],
)
def test_nothing_is_guessed(folder, choice, words):
    with pytest.raises(InputError, match=words):
        flat(folder, **choice)
    assert not (folder.parent / "out").exists()


def test_the_command_names_its_flags_and_writes_what_training_reads(tmp_path):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", STACK[0], imagej=True, metadata={"axes": "ZCYX"})
    words = ["images", tmp_path / "in", "--output", tmp_path / "out"]
    code, lines = run_here(make_masks, *words)
    assert code == 2 and "--z:" in lines[-1]
    assert run_here(make_masks, *words, "--z", "2")[0] == 0
    assert np.array_equal(read_image_and_kind(tmp_path / "out" / "a.tif")[0], channels_last(STACK[0, 1]))


def test_a_channel_that_does_not_exist_is_named_with_the_flag_of_this_command(folder):
    words = ["images", folder, "--output", folder.parent / "out", "--z", "1", "--time", "1", "--channels", "3"]
    code, lines = run_here(make_masks, *words)
    assert code == 2 and "--channels 3: " in lines[-1] and lines[-1].endswith(".tif has 2")


def test_a_plane_that_does_not_exist_is_refused_in_flat_files_too(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK[0, 0, 0])
    with pytest.raises(InputError, match="z 3: .*a.tif has one plane"):
        flatten_folder(tmp_path / "a.tif", tmp_path / "out", Choice(z="3"))
    (path,) = flatten_folder(tmp_path / "a.tif", tmp_path / "out", Choice(z="max"))  # a folder may hold both kinds
    assert np.array_equal(read_image_and_kind(path)[0][..., 0], STACK[0, 0, 0])


def test_the_mean_of_bits_is_rounded(tmp_path):
    planes = np.zeros((4, 8, 9), bool)
    planes[:1, :4], planes[:3, 4:] = True, True  # a quarter, three quarters
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack", metadata={"axes": "ZYX"})
    (path,) = flatten_folder(tmp_path / "a.tif", tmp_path / "out", Choice(z="mean"))
    assert np.array_equal(read_image_and_kind(path)[0][..., 0] > 0, np.arange(8)[:, None].repeat(9, 1) >= 4)


def test_empty_planes_do_not_darken_a_mean(tmp_path):
    planes = STACK[0, :, 0].copy()
    planes[2] = 0  # filled in, as a recording or a registration does
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match="nothing but 0 in channel 1 of the chosen planes"):
        flatten_folder(tmp_path / "a.tif", tmp_path / "out", Choice(z="mean"))
    (path,) = flatten_folder(tmp_path / "a.tif", tmp_path / "out", Choice(z="max"))
    assert np.array_equal(read_image_and_kind(path)[0][..., 0], planes.max(axis=0))


def test_axes_without_a_name_must_be_named(tmp_path):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", STACK[0, :, 0], photometric="minisblack")
    with pytest.raises(InputError, match="does not name its dimensions .4 x 20 x 24, read as QYX"):
        flat(tmp_path / "in", z="1")
    assert np.array_equal(flat(tmp_path / "in", z="2", axes="ZYX")[..., 0], STACK[0, 1, 0])


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ("CYX", {"ome": True}),
        ("CYX", {"imagej": True}),
        ("CYX", {"photometric": "minisblack"}),
        ("YXS", {"photometric": "rgb"}),
    ],
)
def test_axes_that_a_file_names_are_never_read_as_others(tmp_path, axes, options):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "plain.tif", STACK[0, :3, 0], photometric="minisblack")
    array = STACK[0, :3, 0] if axes == "CYX" else np.zeros((20, 24, 3), np.uint8)
    tifffile.imwrite(tmp_path / "in" / "named.ome.tif", array, metadata={"axes": axes}, **options)
    words = ["images", tmp_path / "in", "--output", tmp_path / "out", "--z", "max", "--axes", "ZYX"]
    code, lines = run_here(make_masks, *words)
    assert code == 2 and f"--axes ZYX: {tmp_path}/in/named.ome.tif names its axes itself ({axes})" in lines[-1]
    assert not (tmp_path / "out").exists()


def test_axes_are_given_for_files_that_need_them_beside_flat_ones(tmp_path):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "flat.tif", STACK[0, 0, 0])
    tifffile.imwrite(tmp_path / "in" / "named.ome.tif", STACK[0, :, 0], ome=True, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=r"axes ZYX has no effect: no file of \S+in needs it"):
        flat(tmp_path / "in", z="max", axes="ZYX")
    tifffile.imwrite(tmp_path / "in" / "last.tif", STACK[0, :, 0].transpose(1, 2, 0), photometric="minisblack")
    with pytest.raises(InputError, match=r"named.ome.tif names its axes itself"):
        flat(tmp_path / "in", z="max", axes="YXZ")
    (tmp_path / "in" / "named.ome.tif").unlink()
    written = flatten_folder(tmp_path / "in", tmp_path / "out", Choice(z="max", axes="YXZ"))
    assert np.array_equal(read_image_and_kind(written[0])[0][..., 0], STACK[0, 0, 0])
    assert np.array_equal(read_image_and_kind(written[1])[0][..., 0], STACK[0, :, 0].max(axis=0))


def test_a_wrong_number_of_axes_is_said_with_one_flag(folder):
    words = ["images", folder, "--z", 1, "--time", 1, "--axes", "TYX", "--output", folder.parent / "out"]
    code, lines = run_here(make_masks, *words)
    assert code == 2 and re.search(r"error: --axes TYX: \S+ has 5 axes \(TZCYX\)$", lines[-1])


def test_files_of_several_images_need_a_scene(tmp_path):
    (tmp_path / "in").mkdir()
    with tifffile.TiffWriter(tmp_path / "in" / "a.ome.tif", ome=True) as file:
        file.write(STACK[0, 0, 0])
        file.write(STACK[0, 0, 1, :10])
    with pytest.raises(InputError, match="scene: .* holds 2 images"):
        flat(tmp_path / "in")
    assert np.array_equal(flat(tmp_path / "in", scene=2)[..., 0], STACK[0, 0, 1, :10])


def test_rgb_stays_rgb(tmp_path):
    (tmp_path / "in").mkdir()
    picture = np.random.default_rng(1).integers(0, 255, (5, 20, 24, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "in" / "a.tif", picture, imagej=True, metadata={"axes": "ZYXS"})
    (path,) = flatten_folder(tmp_path / "in", tmp_path / "out", Choice(z="4"))
    image, has_channels = read_image_and_kind(path)
    assert not has_channels and np.array_equal(image, picture[3])


@pytest.mark.parametrize(("suffix", "package"), [(".nd2", "nd2"), (".czi", "pylibCZIrw"), (".lif", "liffile")])
def test_a_missing_reader_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, suffix, package):
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{suffix} files need the package {package}: pip install {package}, or"):
        flatten_folder(tmp_path / f"a{suffix}", tmp_path / "out", Choice())


@pytest.mark.parametrize("suffix", [".nd2", ".czi", ".lif"])
def test_damaged_files_end_in_one_line_with_the_installed_reader(tmp_path, suffix):
    pytest.importorskip({".nd2": "nd2", ".czi": "pylibCZIrw", ".lif": "liffile"}[suffix])
    (tmp_path / f"a{suffix}").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="damaged or of another kind"):
        flatten_folder(tmp_path / f"a{suffix}", tmp_path / "out", Choice())


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (1, {"extratags": [(274, "H", 1, 3, True)]}, "rotation tag"),
        (1, {"photometric": "miniswhite"}, "white is zero"),
        (np.nan, {}, "NaN"),
    ],
)
def test_stacks_are_refused_for_what_flat_images_are(tmp_path, values, options, words):
    planes = np.full((2, 8, 9), values, np.float32 if values != values else np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", planes, **({"photometric": "minisblack"} | options), metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=words):
        flatten_folder(tmp_path / "a.tif", tmp_path / "out", Choice(z="max"))
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_refused_before_the_input_is_looked_at(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.tif").touch()
    with pytest.raises(InputError, match="out is not empty"):
        flatten_folder(tmp_path / "none", tmp_path / "out", Choice())


def test_files_and_sub_folders_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "in" / "more").mkdir(parents=True)
    for name in ("a.tif", "more/b.tif"):
        tifffile.imwrite(tmp_path / "in" / name, STACK[0, 0, 0])
    (tmp_path / "in" / "more" / "c.nd2").touch()
    (tmp_path / "in" / "d.oib").touch()
    (tmp_path / "in" / "e.png").touch()
    assert len(flatten_folder(tmp_path / "in", tmp_path / "out", Choice())) == 1
    assert "files of a kind that is not read: d.oib, e.png" in caplog.text
    assert "files in the sub-folder more (2) are not read" in caplog.text


@pytest.mark.parametrize("ending", [".OME.TIF", ".ome.tif", ".TIFF"])
def test_a_flat_image_has_the_name_that_a_folder_of_images_gives_it(tmp_path, ending):
    (tmp_path / "in").mkdir()
    accent = unicodedata.normalize("NFD", "zélle.1")
    tifffile.imwrite(tmp_path / "in" / f"{accent}{ending}", STACK[0, 0, 0])
    (path,) = flatten_folder(tmp_path / "in", tmp_path / "out", Choice())
    assert path.name == "zélle.1.tif"
    assert list(find_images(tmp_path / "in")) == list(find_images(tmp_path / "out")) == ["zélle.1"]
    tifffile.imwrite(tmp_path / "in" / "zélle.1.tif", STACK[0, 0, 0])
    with pytest.raises(InputError, match="two files with one name: zélle.1"):
        flatten_folder(tmp_path / "in", tmp_path / "new", Choice())


def test_files_are_written_one_by_one_and_only_all_of_them_stay(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(4):
        tifffile.imwrite(tmp_path / "in" / f"a{number}.tif", STACK[0, 0, 0] + number)
    written = []

    def counted(*given: Any) -> Any:
        written.append(len(list((tmp_path / "out").rglob("*.tif"))))
        return read_stack(*given)

    monkeypatch.setattr("dataset.microscopes.read_stack", counted)
    assert len(flatten_folder(tmp_path / "in", tmp_path / "out", Choice())) == 4 and written == [0, 1, 2, 3]
    (tmp_path / "in" / "a3.tif").write_bytes((tmp_path / "in" / "a3.tif").read_bytes()[:300])
    with pytest.raises(InputError, match=r"a3\.tif"):
        flatten_folder(tmp_path / "in", tmp_path / "again", Choice())
    assert not (tmp_path / "again").exists()
