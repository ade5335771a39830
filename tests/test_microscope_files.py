"""Files of microscopes with known pixels: CZI by ZEISS's own writer, ND2 and LIF by the published structures.

Each kind is skipped if its reader is not installed: pip install .[microscopes]. Where a second reader is installed
(nd2reader, readlif), it confirms that the written files are what they should be.
"""

from __future__ import annotations

import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from microscope_writers import write_lif, write_nd2
from script_helpers import run_here

import make_masks
from common.errors import InputError
from dataset.files import read_image_and_kind
from dataset.microscope_files import Choice
from dataset.microscopes import flatten_folder
from dataset.scale import pixel_size

RNG = np.random.default_rng(0)
STACK = RNG.integers(1, 60_000, (3, 4, 2, 20, 24), dtype=np.uint16)  # T, Z, C, Y, X
RGB = RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)
PIXEL_UM = 0.325


def flat(path: Path, **choice) -> tuple[np.ndarray, bool]:
    """The image (H, W, C) that is written for a file, and whether its channels are no colours."""
    output = path.with_suffix("")
    (written,) = flatten_folder(path, output, Choice(**choice))
    size = pixel_size(written)
    assert size is not None and abs(size - PIXEL_UM) < 1e-4
    image = read_image_and_kind(written)
    written.unlink()
    output.rmdir()
    return image


def write_czi(path: Path, planes: list[tuple[np.ndarray, dict]], compression: str | None = None) -> None:
    """(H, W) or (H, W, 3) arrays and where they lie; colours as blue, green, red."""
    czi = pytest.importorskip("pylibCZIrw.czi", reason="needs pylibCZIrw, the package of ZEISS")
    with czi.create_czi(str(path), compression_options=compression) as file:
        for plane, place in planes:
            file.write(data=np.ascontiguousarray(plane.reshape(*plane.shape[:2], -1)), **place)
        file.write_metadata(document_name="drawn", scale_x=PIXEL_UM * 1e-6, scale_y=PIXEL_UM * 1e-6)


def as_nd2(path: Path) -> None:
    pytest.importorskip("nd2", reason="needs nd2")
    write_nd2(path, STACK, "TZCYX", PIXEL_UM)


def as_czi(path: Path) -> None:
    places = np.ndindex(*STACK.shape[:3])
    write_czi(path, [(STACK[t, z, c], {"plane": {"T": t, "Z": z, "C": c}}) for t, z, c in places])


def as_lif(path: Path) -> None:
    pytest.importorskip("liffile", reason="needs liffile")
    write_lif(path, {"field": (STACK, "TZCYX")}, PIXEL_UM)


@pytest.fixture(params=[as_nd2, as_czi, as_lif])
def stack(tmp_path, request) -> Path:
    """A file with three moments, four planes in depth, two channels of 16 bits. Its name has an umlaut and a space."""
    path = tmp_path / f"Zellen \u00e4.{request.param.__name__.removeprefix('as_')}"
    request.param(path)
    return path


def last(planes: np.ndarray) -> np.ndarray:
    return np.moveaxis(planes, 0, -1)


def test_a_plane_of_a_moment_has_the_written_values(stack):
    image, has_channels = flat(stack, z="3", time="2")
    assert image.dtype == np.uint16 and has_channels
    assert np.array_equal(image, last(STACK[1, 2]))


def test_projections_and_channels_have_the_written_values(stack):
    assert np.array_equal(flat(stack, z="max", time="3")[0], last(STACK[2].max(axis=0)))
    mean = np.rint(STACK[:, 0, 1].mean(axis=0)).astype(np.uint16)
    assert np.array_equal(flat(stack, z="1", time="mean", channels=(2,))[0][..., 0], mean)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"time": "1"}, "z: .* has 4 planes along Z"),
        ({"z": "1"}, "time: .* has 3 planes along T"),
        ({"z": "5", "time": "1"}, "z 5: .* has planes 1 to 4"),
        ({"z": "1", "time": "1", "channels": (3,)}, "channels 3: .* has 2"),
        ({"z": "1", "time": "1", "scene": 2}, "scene: .* holds 1 image "),
        ({"z": "1", "time": "1", "axes": "ZCYX"}, "axes ZCYX: .* names its axes itself"),
    ],
)
def test_nothing_is_guessed(stack, choice, words):
    with pytest.raises(InputError, match=words):
        flat(stack, **choice)


def test_a_cut_file_ends_in_one_line(stack):
    content = stack.read_bytes()
    stack.write_bytes(content[: len(content) // 2])
    code, lines = run_here(make_masks, "images", stack, "--output", stack.parent / "out", "--z", "1", "--time", "3")
    assert code == 2 and len(lines) == 1 and not (stack.parent / "out").exists()


# --- ND2 --------------------------------------------------------------------------------------------------------------


def test_nd2_fields_are_taken_by_number(tmp_path):
    pytest.importorskip("nd2", reason="needs nd2")
    write_nd2(tmp_path / "a.nd2", STACK, "PZCYX", PIXEL_UM)  # three fields
    assert np.array_equal(flat(tmp_path / "a.nd2", scene=2, z="4")[0], last(STACK[1, 3]))
    with pytest.raises(InputError, match="scene: .* holds 3 images"):
        flat(tmp_path / "a.nd2", z="4")


def test_nd2_colours_are_stored_as_blue_green_red(tmp_path):
    pytest.importorskip("nd2", reason="needs nd2")
    write_nd2(tmp_path / "a.nd2", RGB[..., ::-1], "YXS", PIXEL_UM)
    image, has_channels = flat(tmp_path / "a.nd2")
    assert not has_channels and np.array_equal(image, RGB)


def test_a_colour_that_does_not_occur_is_no_missing_plane(tmp_path):
    pytest.importorskip("nd2", reason="needs nd2")
    red = RGB * np.array([1, 0, 0], np.uint8)
    write_nd2(tmp_path / "a.nd2", np.stack([red, red // 2])[..., ::-1], "TYXS", PIXEL_UM)
    assert np.array_equal(flat(tmp_path / "a.nd2", time="2")[0], red // 2)


def test_nd2_planes_that_a_stopped_recording_did_not_reach_are_refused(tmp_path):
    pytest.importorskip("nd2", reason="needs nd2")
    write_nd2(tmp_path / "a.nd2", STACK, "TZCYX", PIXEL_UM, recorded=6)  # one moment and two planes of the next
    assert np.array_equal(flat(tmp_path / "a.nd2", z="2", time="2")[0], last(STACK[1, 1]))
    assert np.array_equal(flat(tmp_path / "a.nd2", z="max", time="2")[0], last(STACK[1, :2].max(axis=0)))
    for choice in ({"z": "3", "time": "2"}, {"z": "mean", "time": "2"}, {"z": "max", "time": "3"}):
        with pytest.raises(InputError, match="nothing but 0 in channel 1, 2 of the chosen planes"):
            flat(tmp_path / "a.nd2", **choice)


def test_nd2_without_calibration_has_no_pixel_size(tmp_path):
    pytest.importorskip("nd2", reason="needs nd2")
    write_nd2(tmp_path / "a.nd2", STACK[0, 0], "CYX", None)
    (written,) = flatten_folder(tmp_path / "a.nd2", tmp_path / "out", Choice())
    assert pixel_size(written) is None
    assert np.array_equal(read_image_and_kind(written)[0], last(STACK[0, 0]))


def test_the_written_nd2_is_read_alike_by_a_second_reader(tmp_path):
    second = pytest.importorskip("nd2reader", reason="needs nd2reader")
    write_nd2(tmp_path / "a.nd2", STACK, "TZCYX", PIXEL_UM)
    with second.ND2Reader(str(tmp_path / "a.nd2")) as file:
        assert file.metadata["pixel_microns"] == PIXEL_UM
        for t, z, c in np.ndindex(*STACK.shape[:3]):
            assert np.array_equal(file.get_frame_2D(t=t, z=z, c=c), STACK[t, z, c])


# --- CZI --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zstd0:ExplicitLevel=2", "zstd1:ExplicitLevel=2;PreProcess=HiLoByteUnpack"])
def test_compressed_czi_has_the_written_values(tmp_path, compression):
    write_czi(tmp_path / "a.czi", [(STACK[0, 0, 0], {})], compression)
    assert np.array_equal(flat(tmp_path / "a.czi")[0][..., 0], STACK[0, 0, 0])


def entries(content: bytearray) -> list[int]:
    """Where the descriptions of the parts of a CZI begin: beside each part, and once more in a list of all."""
    places, start = [], content.find(b"DV\x00\x00\x00\x00", 0) if b"DV\x00\x00\x00\x00" in content else -1
    for kind in (b"DV" + struct.pack("<i", pixel) for pixel in (0, 1, 3)):
        start = content.find(kind)
        while start >= 0:
            places.append(start)
            start = content.find(kind, start + 1)
    return sorted(places)


def test_czi_with_jpeg_xr_has_the_written_values(tmp_path):
    path = tmp_path / "a.czi"
    smooth = np.add.outer(np.arange(64) * 300, np.arange(80) * 200).astype(np.uint16)
    write_czi(path, [(smooth, {})])
    content = bytearray(path.read_bytes())
    pixels = content.find(smooth.tobytes())
    packed = imagecodecs.jpegxr_encode(smooth, level=100)
    assert pixels > 0 and len(packed) < smooth.nbytes
    content[pixels : pixels + smooth.nbytes] = packed.ljust(smooth.nbytes, b"\0")
    for place in entries(content):
        content[place + 18 : place + 22] = struct.pack("<i", 4)  # compression: JPEG XR
    path.write_bytes(content)
    assert np.array_equal(flat(path)[0][..., 0], smooth)


def test_a_pyramid_in_a_czi_does_not_cover_the_full_resolution(tmp_path):
    path = tmp_path / "a.czi"
    full, half = STACK[0, 0, 0], STACK[0, 0, 0, ::2, ::2]
    write_czi(path, [(full, {}), (half, {})])
    content = bytearray(path.read_bytes())
    for place in entries(content):
        for axis, whole, stored in (("X", 24, 12), ("Y", 20, 10)):
            at = content.find(axis.encode().ljust(4, b"\0"), place, place + 200)
            begin, size, _, kept = struct.unpack_from("<iifi", content, at + 4)
            assert begin == 0 and size == kept
            if size == stored:
                struct.pack_into("<i", content, at + 8, whole)
                content[place + 22] = 2  # a pyramid over several parts
    path.write_bytes(content)
    assert np.array_equal(flat(path)[0][..., 0], full)


def test_czi_tiles_are_put_together(tmp_path):
    field = RNG.integers(1, 60_000, (40, 66), dtype=np.uint16)
    tiles = [(field[y : y + 20, x : x + 22], {"location": (1000 + x, 7 + y)}) for y in (0, 20) for x in (0, 22, 44)]
    write_czi(tmp_path / "a.czi", tiles)
    assert np.array_equal(flat(tmp_path / "a.czi")[0][..., 0], field)


def test_czi_scenes_are_cut_to_their_own_place(tmp_path):
    first, second = STACK[0, 0, 0], RNG.integers(1, 60_000, (30, 18), dtype=np.uint16)
    write_czi(tmp_path / "a.czi", [(first, {"scene": 0}), (second, {"scene": 1, "location": (5000, -3000)})])
    assert np.array_equal(flat(tmp_path / "a.czi", scene=1)[0][..., 0], first)
    assert np.array_equal(flat(tmp_path / "a.czi", scene=2)[0][..., 0], second)
    with pytest.raises(InputError, match=r"scene: .* holds 2 images .1: 24 x 20, 2: 18 x 30.: give the number"):
        flat(tmp_path / "a.czi")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_czi_colours_are_stored_as_blue_green_red(tmp_path, dtype):
    picture = RGB.astype(dtype) * (1 if dtype == np.uint8 else 200)
    write_czi(tmp_path / "a.czi", [(picture[..., ::-1], {})])
    image, has_channels = flat(tmp_path / "a.czi")
    assert not has_channels and image.dtype == dtype and np.array_equal(image, picture)


def test_czi_of_float_values_keeps_them(tmp_path):
    values = RNG.normal(size=(20, 24)).astype(np.float32)
    write_czi(tmp_path / "a.czi", [(values, {})])
    assert np.array_equal(flat(tmp_path / "a.czi")[0][..., 0], values)


def test_czi_planes_that_were_not_recorded_are_refused(tmp_path):
    write_czi(tmp_path / "a.czi", [(STACK[0, z, 0], {"plane": {"Z": z}}) for z in (0, 1, 3)])
    assert np.array_equal(flat(tmp_path / "a.czi", z="max")[0][..., 0], STACK[0, [0, 1, 3], 0].max(axis=0))
    for z in ("3", "mean"):
        with pytest.raises(InputError, match="nothing but 0 in channel 1 of the chosen planes"):
            flat(tmp_path / "a.czi", z=z)


def test_czi_channels_of_two_kinds_are_refused(tmp_path):
    planes = [(STACK[0, 0, 0], {"plane": {"C": 0}}), (RGB[..., 0], {"plane": {"C": 1}})]
    write_czi(tmp_path / "a.czi", planes)
    with pytest.raises(InputError, match="channels of different kinds .Gray16, Gray8."):
        flat(tmp_path / "a.czi")


# --- LIF --------------------------------------------------------------------------------------------------------------


def test_lif_images_are_taken_by_number_and_named(tmp_path):
    pytest.importorskip("liffile", reason="needs liffile")
    images = {"Series001": (STACK[0], "ZCYX"), "Series002": (STACK[1, 0, :, :10], "CYX")}
    write_lif(tmp_path / "a.lif", images, PIXEL_UM)
    assert np.array_equal(flat(tmp_path / "a.lif", scene=2)[0], last(STACK[1, 0, :, :10]))
    with pytest.raises(InputError, match=r"holds 2 images .1: Series001, 4 x 2 x 20 x 24, 2: Series002"):
        flat(tmp_path / "a.lif", z="1")


def test_lif_colours_are_stored_as_blue_green_red(tmp_path):
    pytest.importorskip("liffile", reason="needs liffile")
    write_lif(tmp_path / "a.lif", {"a": (RGB[..., ::-1], "YXS")}, PIXEL_UM)
    image, has_channels = flat(tmp_path / "a.lif")
    assert not has_channels and np.array_equal(image, RGB)


def test_tiles_of_a_lif_are_not_put_together_by_guess(tmp_path):
    pytest.importorskip("liffile", reason="needs liffile")
    write_lif(tmp_path / "a.lif", {"a": (STACK[:, 0], "MCYX")}, PIXEL_UM)
    with pytest.raises(InputError, match="3 planes along M .tiles of a mosaic that are not merged.: merge"):
        flat(tmp_path / "a.lif")


def test_the_written_lif_is_read_alike_by_a_second_reader(tmp_path):
    second = pytest.importorskip("readlif.reader", reason="needs readlif")
    as_lif(tmp_path / "a.lif")
    image = second.LifFile(tmp_path / "a.lif").get_image(0)
    assert image.scale[0] == pytest.approx(1 / PIXEL_UM)
    for t, z, c in np.ndindex(*STACK.shape[:3]):
        assert np.array_equal(np.array(image.get_frame(t=t, z=z, c=c)), STACK[t, z, c])
