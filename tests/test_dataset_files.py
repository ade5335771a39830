"""Reading and pairing: every file is decoded exactly or refused with a message."""

from __future__ import annotations

import csv
import io
import os
import struct
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import InputError
from dataset import decode
from dataset.decode import FileError
from dataset.files import find_files, find_images, pair_files, read_image, read_mask, read_mask_and_table

READERS = Path(__file__).parents[2] / "shared" / "data" / "readers"
needs_readers = pytest.mark.skipif(not READERS.is_dir(), reason="the reader files in ../shared/data/readers are absent")

HEIGHT, WIDTH = 37, 52


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).max, size=shape, dtype=dtype, endpoint=True)


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.startswith(".tif"):
        tifffile.imwrite(path, array, **options)
    else:
        Image.fromarray(array).save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------------ real files


def manifest_rows() -> list[dict[str, str]]:
    if not READERS.is_dir():
        return []
    with (READERS / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@needs_readers
@pytest.mark.parametrize("row", manifest_rows(), ids=[row["file"][-30:] for row in manifest_rows()])
def test_every_reader_file_is_decoded_as_its_manifest_says_or_refused_in_words(row):
    path = READERS / row["file"]
    if int(row["pages"]) > 1:
        for read in (read_image, read_mask):
            with pytest.raises(InputError, match=r"3-D stack of 31 planes.*make_masks.py images"):
                read(path)
        return
    shape = tuple(int(n) for n in row["shape"].split("x"))
    is_image = row["role"] in ("image", "not an image")
    array = read_image(path) if is_image else read_mask(path)
    assert array.dtype == (np.float32 if is_image and row["dtype"] == "float64" else row["dtype"])
    assert array.shape[:2] == shape[:2]
    if is_image:
        assert array.shape[2] == (3 if len(shape) == 3 else 1)  # the alpha channels of these files are opaque
        assert len(np.unique(array)) <= int(row["unique"])
    else:
        assert len(np.unique(array)) == int(row["unique"])
        assert (array.min(), array.max()) == pytest.approx((float(row["min"]), float(row["max"])))


@needs_readers
@pytest.mark.parametrize(
    ("name", "nuclei", "size"), [("fluo", 7, (256, 256)), ("pw", 10, (256, 320)), ("pp", 12, (256, 320))]
)
def test_dsb_folders_become_one_label_map_each(name, nuclei, size):
    pairs = {pair.name: pair for pair in pair_files(READERS / "dsb_original", READERS / "dsb_original")}
    assert sorted(pairs) == ["fluo", "pp", "pw"]
    labels = read_mask(pairs[name].mask_path)
    assert labels.shape == size == read_image(pairs[name].image_path).shape[:2]
    assert sorted(np.unique(labels)) == list(range(nuclei + 1))
    first = read_mask(sorted((READERS / "dsb_original" / name / "masks").iterdir())[0])
    assert np.array_equal(labels == 1, first > 0)


# ------------------------------------------------------------------------------------------------------ written files


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float16, np.float32])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "packbits"])
def test_tiff_keeps_dtype_and_values(tmp_path, dtype, compression):
    array = noise(HEIGHT, WIDTH, dtype=dtype)
    path = save(tmp_path / "a.tif", array, compression=compression, byteorder=">")
    assert np.array_equal(read_image(path)[:, :, 0], array)
    assert read_image(path).dtype == dtype
    assert np.array_equal(read_mask(path), array)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4"])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.tif"])
def test_numbers_have_the_byte_order_of_this_machine(tmp_path, name, dtype):
    array = noise(HEIGHT, WIDTH, dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)
    if name == "a.tif":
        save(tmp_path / name, array, byteorder=">")
    else:
        (np.save if name == "a.npy" else np.savez)(tmp_path / name, array)
    mask = read_mask(tmp_path / name)
    assert np.array_equal(mask, array) and mask.dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize("writer", ["imagej", "ome", "planar"])
def test_channels_of_a_tiff_come_last(tmp_path, channels, writer):
    array = noise(channels, HEIGHT, WIDTH, dtype=np.uint16)
    if writer == "planar":
        options = {"photometric": "minisblack", "planarconfig": "separate"}
    else:
        options = {writer: True, "metadata": {"axes": "CYX"}}
    path = save(tmp_path / "a.ome.tif", array, **options)
    assert np.array_equal(read_image(path), array.transpose(1, 2, 0))


def test_16_bit_png_keeps_its_bits_gray_and_colour(tmp_path):
    for channels in (1, 3, 4):
        array = noise(HEIGHT, WIDTH, channels, dtype=np.uint16)
        path = tmp_path / f"{channels}.png"
        path.write_bytes(imagecodecs.png_encode(array if channels > 1 else array[:, :, 0]))
        assert np.array_equal(read_image(path), array)
        assert read_image(path).dtype == np.uint16


def test_alpha_is_dropped_only_where_it_is_opaque(tmp_path):
    array = noise(HEIGHT, WIDTH, 4)
    array[:, :, 3] = 255
    assert np.array_equal(read_image(save(tmp_path / "a.png", array)), array[:, :, :3])
    array[3, 5, 3] = 254
    assert read_image(save(tmp_path / "b.png", array)).shape == (HEIGHT, WIDTH, 4)
    with pytest.raises(InputError, match="partly transparent"):
        read_mask(tmp_path / "b.png")


def test_content_decides_and_not_the_suffix(tmp_path):
    array = noise(HEIGHT, WIDTH)
    save(tmp_path / "a.png", array).rename(tmp_path / "a.tif")
    assert np.array_equal(read_mask(tmp_path / "a.tif"), array)


def test_jpeg_and_bmp_and_one_bit_are_read(tmp_path):
    array = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    assert abs(read_image(save(tmp_path / "a.jpg", array)).astype(int) - 90).max() <= 2
    assert np.array_equal(read_image(save(tmp_path / "a.bmp", array)), array)
    cells = noise(HEIGHT, WIDTH) > 127
    Image.fromarray(cells).save(tmp_path / "b.png")
    tifffile.imwrite(tmp_path / "b.tif", cells)
    for name in ("b.png", "b.tif"):
        assert np.array_equal(read_mask(tmp_path / name), np.where(cells, 255, 0))


def test_palette_masks_keep_indices_unless_the_palette_is_gray(tmp_path):
    indices = noise(HEIGHT, WIDTH) % 3
    for name, palette, expected in (
        ("colour", [0, 0, 0, 128, 0, 0, 0, 128, 0], indices),
        ("gray", [255, 255, 255, 0, 0, 0, 7, 7, 7], np.array([255, 0, 7], dtype=np.uint8)[indices]),
    ):
        image = Image.fromarray(indices).convert("P")
        image.putpalette(palette)
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png"), expected)
    assert np.array_equal(read_image(tmp_path / "colour.png")[indices == 1], [[128, 0, 0]] * (indices == 1).sum())


def test_rgb_masks_are_taken_only_without_colour(tmp_path):
    array = np.repeat(noise(HEIGHT, WIDTH, 1), 3, axis=2)
    assert np.array_equal(read_mask(save(tmp_path / "a.png", array)), array[:, :, 0])
    array[0, 0, 0] ^= 1
    with pytest.raises(InputError, match="holds colours"):
        read_mask(save(tmp_path / "b.png", array))


def test_an_axis_of_length_one_makes_no_stack(tmp_path):
    labels = np.arange(HEIGHT * WIDTH, dtype=np.int32).reshape(1, HEIGHT, WIDTH)
    np.save(tmp_path / "a.npy", labels)
    assert np.array_equal(read_mask(tmp_path / "a.npy"), labels[0])


def test_soft_stacks_come_from_npy_npz_and_float_tiff(tmp_path):
    stack = np.random.default_rng(0).dirichlet(np.ones(3), (HEIGHT, WIDTH)).transpose(2, 0, 1).astype(np.float32)
    np.save(tmp_path / "a.npy", stack)
    np.savez_compressed(tmp_path / "b.npz", stack)
    tifffile.imwrite(tmp_path / "c.tif", stack, photometric="minisblack")
    tifffile.imwrite(tmp_path / "d.tif", np.ascontiguousarray(stack.transpose(1, 2, 0)), photometric="rgb")
    for file in sorted(tmp_path.iterdir()):
        assert np.array_equal(read_mask(file), stack), file.name
    tifffile.imwrite(tmp_path / "e.tif", (stack * 255).astype(np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match="3-D stack of 3 planes"):
        read_mask(tmp_path / "e.tif")


# ------------------------------------------------------------------------------------------------------ refusals


class Trap:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("trap_was_sprung"),))


def test_no_file_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", np.array([Trap()], dtype=object))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(InputError, match="Python objects.*is not read"):
            read_mask(tmp_path / name)
    assert not (tmp_path / "trap_was_sprung").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(tmp_path, value):
    array = noise(HEIGHT, WIDTH, dtype=np.float32)
    array[5, 6] = value
    path = save(tmp_path / "a.tif", array)
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match="NaN or infinite"):
            read(path)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("empty.png", lambda p: p.write_bytes(b""), "0 bytes"),
        ("text.png", lambda p: p.write_text("no image, but words"), "damaged or no image file"),
        ("absent.png", lambda p: None, "no such file"),
        ("white.tif", lambda p: Image.new("L", (9, 7)).save(p, tiffinfo={262: 0}), "white is zero"),
        ("complex.tif", lambda p: tifffile.imwrite(p, np.ones((9, 7), np.complex64)), "complex64"),
        ("two.tif", lambda p: [tifffile.imwrite(p, noise(9, n), append=n > 7) for n in (7, 8)], "2 images"),
        ("volume.tif", lambda p: tifffile.imwrite(p, noise(2, 3, 9, 7), photometric="minisblack"),
         "2 x 3 x 9 x 7"),
        ("turned.jpg", lambda p: Image.new("L", (9, 7)).save(p, exif=turned()), "rotation tag"),
        ("film.png", lambda p: Image.new("L", (9, 7)).save(p, save_all=True, append_images=[Image.new("L", (9, 7), 9)]),
         "animation of 2"),
        ("flat.npy", lambda p: np.save(p, np.ones(5)), r"\(H, W\)"),
        ("words.npy", lambda p: np.save(p, np.array([["a"]])), r"\(H, W\)"),
        ("two.npz", lambda p: np.savez(p, a=np.ones((3, 3)), b=np.ones((3, 3))), "2 arrays"),
    ],
)  # fmt: skip
def test_unusable_files_are_refused_in_words(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(InputError, match=words) as caught:
        read_mask(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    content = bytearray(SAMPLES["gray.png"])
    content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(content)
    tifffile.imwrite(tmp_path / "bomb.tif", noise(9, 7), compression="zlib")
    with tifffile.TiffFile(tmp_path / "bomb.tif", mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength"):
            tiff.pages[0].tags[tag].overwrite(70_000)
    np.lib.format.open_memmap(tmp_path / "bomb.npy", "w+", np.uint8, (2, 40000, 40000))  # a sparse file
    start = time.perf_counter()
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(InputError, match=r"GiB.*cut it into tiles"):
            read_mask(file)
    assert time.perf_counter() - start < 2


def test_folders_links_and_pipes_in_place_of_files_are_refused(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("a.png", "no such file|link"),
        ("pipe.png", "not a regular file"),
        ("empty", "without masks of nuclei"),
    ):
        with pytest.raises(InputError, match=words):
            read_mask(tmp_path / name)


def test_folders_of_nuclei_that_do_not_fit_are_refused(tmp_path):
    save(tmp_path / "sizes" / "1.png", np.zeros((5, 6), np.uint8))
    save(tmp_path / "sizes" / "2.png", np.zeros((5, 7), np.uint8))
    with pytest.raises(InputError, match="7 x 5 pixels"):
        read_mask(tmp_path / "sizes")
    save(tmp_path / "gray" / "1.png", noise(5, 6))
    with pytest.raises(InputError, match="no mask of one nucleus"):
        read_mask(tmp_path / "gray")


# ------------------------------------------------------------------------------------------------------ damaged bytes


def sample_bytes() -> dict[str, bytes]:
    gray, colour = noise(19, 23), noise(19, 23, 3)
    deep = noise(19, 23, dtype=np.uint16)
    samples: dict[str, bytes] = {}
    for name, array in (("gray.png", gray), ("colour.png", colour), ("colour.jpg", colour), ("gray.bmp", gray)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, Image.registered_extensions()[name[-4:]])
        samples[name] = buffer.getvalue()
    tiff_options: dict[str, dict[str, Any]] = {
        "raw.tif": {},
        "zlib.tif": {"compression": "zlib", "predictor": True},
        "lzw.tif": {"compression": "lzw", "rowsperstrip": 5},
        "tiles.tif": {"tile": (16, 16)},
    }
    for name, options in tiff_options.items():
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, deep, **options)
        samples[name] = buffer.getvalue()
    for name, write in (("stack.npy", np.save), ("stack.npz", np.savez_compressed)):
        buffer = io.BytesIO()
        write(buffer, np.stack([gray, gray]).astype(np.float32))
        samples[name] = buffer.getvalue()
    samples["deep.png"] = bytes(imagecodecs.png_encode(noise(19, 23, 3, dtype=np.uint16)))
    return samples


SAMPLES = sample_bytes()


def read_or_refuse(path: Path) -> None:
    """Both readers give an array or our own error: any other exception fails the test."""
    for read in (read_mask, read_image):
        try:
            array = read(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert array.ndim in (2, 3)
            assert array.size > 0
            assert array.dtype.kind in "uif"


# The same examples in every run, so that a failure is one of the last change. TRIALS=5000 searches wider.
fuzz = settings(
    max_examples=int(os.environ.get("TRIALS", "200")),
    derandomize="TRIALS" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def small_limit(monkeypatch):
    """A damaged header may claim up to the limit: keep the zeros that are then filled in few."""
    monkeypatch.setattr(decode, "MAX_DECODED_BYTES", 2**24)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("name", sorted(SAMPLES))
@fuzz
@given(data=st.data())
def test_flipped_and_random_bytes_never_raise_anything_else(tmp_path, name, data):
    content = bytearray(SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        # Headers decide most: half of the damage goes there.
        last = data.draw(st.sampled_from([min(200, len(content)) - 1, len(content) - 1]))
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content)
    read_or_refuse(path)


MAGIC = [b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"II+\0", b"\xff\xd8\xff", b"BM", b"PK\3\4", b"\x93NUMPY\1\0"]


@fuzz
@given(start=st.sampled_from(MAGIC), rest=st.binary(max_size=400), suffix=st.sampled_from([".png", ".npy", ".npz"]))
def test_random_files_are_refused(tmp_path, start, rest, suffix):
    path = tmp_path / f"random{suffix}"
    path.write_bytes(start + rest)
    read_or_refuse(path)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_truncated_files_are_refused(tmp_path, name):
    content = SAMPLES[name]
    path = tmp_path / name
    whole = None if name.endswith(".jpg") else read_mask_or_image(tmp_path, name)
    for end in sorted({*range(1, len(content), max(1, len(content) // 60)), int(len(content) * 0.9)}):
        path.write_bytes(content[:end])
        try:
            array = read_mask(path)
        except InputError:
            continue
        # Only what follows the pixels was lost.
        assert whole is not None
        assert np.array_equal(array, whole), f"{end} of {len(content)} bytes gave other pixels"


def read_mask_or_image(folder: Path, name: str) -> np.ndarray | None:
    (folder / name).write_bytes(SAMPLES[name])
    try:
        return read_mask(folder / name)
    except InputError:  # colours
        return None


# ------------------------------------------------------------------------------------------------------ pairing


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def names_of(image_dir: Path, mask_dir: Path) -> list[tuple[str, str, str]]:
    return [(p.name, p.image_path.name, p.mask_path.name) for p in pair_files(image_dir, mask_dir)]


def test_pairs_are_found_by_name_over_mixed_suffixes(tmp_path):
    images = touch(tmp_path / "i", "b.PNG", "a.tif", "c.d.jpeg", "e.ome.tif", ".hidden.png", "notes.txt")
    masks = touch(tmp_path / "m", "a.png", "b.npy", "c.d.bmp", "e.png", "._a.png", "Thumbs.db")
    assert names_of(images, masks) == [
        ("a", "a.tif", "a.png"), ("b", "b.PNG", "b.npy"), ("c.d", "c.d.jpeg", "c.d.bmp"), ("e", "e.ome.tif", "e.png"),
    ]  # fmt: skip


def test_names_of_cellpose_are_understood_in_one_folder_and_in_two(tmp_path):
    one = touch(tmp_path / "one", "a_img.tif", "a_masks.tif", "b.tif", "b_cp_masks.tif", "b_seg.npy",
                "b_outlines_cp_masks.png")  # fmt: skip
    expected = [("a", "a_img.tif", "a_masks.tif"), ("b", "b.tif", "b_cp_masks.tif")]
    assert names_of(one, one) == expected
    images = touch(tmp_path / "i", "a_img.tif", "b.tif")
    masks = touch(tmp_path / "m", "a_masks.tif", "b_cp_masks.tif")
    assert names_of(images, masks) == expected
    with pytest.raises(InputError, match="_cp_masks"):
        pair_files(images, images)


def test_masks_beside_their_images_are_no_images(tmp_path):
    one = touch(tmp_path / "one", "a.tif", "a_masks.tif", "b_img.tif", "b_cp_masks.png")
    assert list(find_images(one)) == ["a", "b_img"]
    masks = touch(tmp_path / "m", "a.npz", "b_img.npz")
    assert names_of(one, masks) == [("a", "a.tif", "a.npz"), ("b_img", "b_img.tif", "b_img.npz")]
    lonely = touch(tmp_path / "lonely", "c.png", "c_masks.png", "two_masks.png")
    assert list(find_images(lonely)) == ["c", "c_masks", "two_masks"]  # no image "two": the word need not mean a mask
    for name in ("d", "d_mask"):
        touch(tmp_path / "folders" / name / "images", "x.png")
    assert list(find_images(tmp_path / "folders")) == ["d", "d_mask"]


def test_only_flows_beside_their_image_are_left_out(tmp_path):
    assert list(find_files(touch(tmp_path / "a", "x.tif", "x_flows.tif"), "image")) == ["x"]
    assert list(find_files(touch(tmp_path / "b", "a-b.png", "a.png", "blood_flows.png"), "image")) == [
        "a", "a-b", "blood_flows",
    ]  # fmt: skip


def test_two_images_for_one_name_are_refused(tmp_path):
    images = touch(tmp_path / "i", "a.png", "a_img.png")
    for index, masks in enumerate((["a.png"], ["a_cp_masks.png", "a_masks.png"], ["a.png", "a_masks.png"])):
        with pytest.raises(InputError, match="one pair of the name a: rename one"):
            pair_files(images, touch(tmp_path / f"m{index}", *masks))


def test_all_missing_partners_are_named_at_once(tmp_path):
    images = touch(tmp_path / "i", *(f"{letter}.png" for letter in "abcdefg"))
    masks = touch(tmp_path / "m", "a.png", "x.png")
    with pytest.raises(InputError, match=r"6 of 7 images .* b, c, d and 3 more; 1 of 2 masks .*: x\."):
        pair_files(images, masks)


def test_folders_that_cannot_be_meant_are_refused(tmp_path):
    touch(tmp_path / "set", "images/a.png", "masks/a.png")
    touch(tmp_path / "twice", "a.png", "a.tif")
    (tmp_path / "empty").mkdir()
    for folder, what, words in (
        ("set", "image", "did you mean .*images"),
        ("set", "mask", "did you mean .*masks"),
        ("empty", "image", "holds no image files"),
        ("absent", "mask", "not found"),
        ("twice", "image", "a.png and a.tif"),
        ("twice/a.png", "image", "it is a file"),
    ):
        with pytest.raises(InputError, match=words):
            find_files(tmp_path / folder, what)


def test_dsb_layouts_pair_by_folder_name(tmp_path):
    root = touch(
        tmp_path / "dsb", "a/images/a.png", "a/masks/1.png", "a/masks/2.png", "b/images/b.png", "b/masks/1.png"
    )
    assert names_of(root, root) == [("a", "a.png", "masks"), ("b", "b.png", "masks")]
    images = touch(tmp_path / "i", "a.png", "b.png")
    masks = touch(tmp_path / "m", "a/1.png", "a/2.png", "b/1.png")
    assert names_of(images, masks) == [("a", "a.png", "a"), ("b", "b.png", "b")]
    assert names_of(images, root) == [("a", "a.png", "masks"), ("b", "b.png", "masks")]


def test_a_hundred_thousand_names_pair_in_seconds(tmp_path, monkeypatch):
    names = [f"{index:06d}.png" for index in range(100_000)]

    class Listing(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    class Entry:
        def __init__(self, name):
            self.name = name

        def is_dir(self):
            return False

    listing = Listing(Entry(name) for name in names)
    for folder in ("i", "m"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("os.scandir", lambda _: listing)
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    start = time.process_time()
    assert len(pair_files(tmp_path / "i", tmp_path / "m")) == 100_000
    assert time.process_time() - start < 8  # of this process: other work on the machine does not count


# ------------------------------------------------------------------------------------------- never wrong in silence


def cells_of(count: int, size: int = 64) -> np.ndarray:
    """Numbered disks in a row, 0 background."""
    rows, columns = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.uint8)
    for index in range(count):
        labels[(rows - 10 - 14 * (index // 4)) ** 2 + (columns - 10 - 14 * (index % 4)) ** 2 < 30] = index + 1
    return labels


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_colour_table_with_white_background_gives_the_numbers_in_every_file(tmp_path, count, suffix):
    table = np.random.default_rng(0).integers(1, 255, (256, 3), dtype=np.uint8)
    table[:2] = [[255, 255, 255], [0, 0, 0]]
    labels, path = cells_of(count), tmp_path / f"a{suffix}"
    if suffix == ".tif":
        tifffile.imwrite(path, labels, photometric="palette", colormap=table.T.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(labels).convert("P")
        image.putpalette(table.ravel().tolist())
        image.save(path)
    mask, kind = read_mask_and_table(path)
    assert np.array_equal(mask, labels) and kind.split()[0] == "coloured" and " 0:ffffff" in kind


def test_a_tiff_with_a_colour_table_of_8_bits_keeps_its_values(tmp_path):
    gray, colours = np.repeat(np.arange(256, dtype=np.uint16)[None], 3, axis=0), noise(3, 256).astype(np.uint16)
    labels = cells_of(5)
    for name, table in (("gray", gray), ("colours", colours)):
        tifffile.imwrite(tmp_path / f"{name}.tif", labels, photometric="palette", colormap=table)
    assert np.array_equal(read_mask(tmp_path / "gray.tif"), labels)
    assert np.array_equal(read_image(tmp_path / "colours.tif"), colours.T[labels])


def test_a_bmp_of_16_bits_is_read(tmp_path):
    """Its rows go from the bottom to the top."""
    colours = np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], "<u2")  # red, green; blue, white
    header = struct.pack("<IiiHHIIiiII3I", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0, 0xF800, 0x07E0, 0x001F)
    start = b"BM" + struct.pack("<IHHI", 14 + len(header) + 8, 0, 0, 14 + len(header))
    (tmp_path / "a.bmp").write_bytes(start + header + colours[::-1].tobytes())
    expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]
    assert read_image(tmp_path / "a.bmp").tolist() == expected


def test_a_rotation_tag_is_refused_in_tiff_and_16_bit_colour_png(tmp_path):
    for read in (read_image, read_mask):
        tifffile.imwrite(tmp_path / "a.tif", noise(5, 6), extratags=[(274, "H", 1, 3, True)])
        with pytest.raises(InputError, match="rotation tag"):
            read(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", noise(5, 6), extratags=[(274, "H", 1, 1, True)])
    assert np.array_equal(read_mask(tmp_path / "b.tif"), noise(5, 6))
    content = imagecodecs.png_encode(noise(5, 6, 3, dtype=np.uint16))
    exif = b"eXIf" + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\0\0\0\0"
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    (tmp_path / "c.png").write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(InputError, match="rotation tag"):
        read_image(tmp_path / "c.png")


def test_splits_are_not_taken_for_folders_of_nuclei(tmp_path):
    for split in ("train", "val", "test"):
        for number in range(4):
            save(tmp_path / "all" / split / f"f{number}.png", np.roll((cells_of(6) > 0) * np.uint8(255), 5 * number, 0))
    with pytest.raises(InputError, match="train.*masks of whole images.*give one of them"):
        find_files(tmp_path / "all", "mask")
    (tmp_path / "all").rename(tmp_path / "odd")
    for split in ("train", "val", "test"):
        (tmp_path / "odd" / split).rename(tmp_path / "odd" / f"day_{split}")
    with pytest.raises(InputError, match="masks of whole images"):
        read_mask(tmp_path / "odd" / "day_train")
    with pytest.raises(InputError, match="did you mean .*day_t.*It holds 4"):
        find_files(tmp_path / "odd", "image")


def test_nuclei_that_overlap_a_little_are_still_one_image(tmp_path):
    labels = cells_of(5)
    for index in range(1, 6):
        nucleus = labels == index
        save(tmp_path / "a" / f"{index}.png", (nucleus | np.roll(nucleus, 1, 0)).astype(np.uint8))
    assert len(np.unique(read_mask(tmp_path / "a"))) == 6


def test_a_folder_of_seg_npy_is_explained(tmp_path):
    for number in range(6):
        np.save(tmp_path / f"f{number}_seg.npy", np.zeros(3))
    with pytest.raises(InputError, match="holds no mask files but 6 _seg.npy of Cellpose.*make_masks.py convert"):
        find_files(tmp_path, "mask")
    save(tmp_path / "f0.png", noise(5, 6))
    with pytest.raises(InputError, match="_masks.*6 _seg.npy of Cellpose"):
        pair_files(tmp_path, tmp_path)


def test_labels_of_two_channels_are_called_so(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", noise(2, 9, 8), photometric="minisblack", metadata={"axes": "CYX"}, imagej=True
    )
    with pytest.raises(InputError, match="holds 2 channels"):
        read_mask(tmp_path / "a.tif")


def test_name_mask_pairs_like_name_masks_and_names_that_look_alike_are_explained(tmp_path):
    save(tmp_path / "images" / "a.png", noise(5, 6))
    mask = save(tmp_path / "masks" / "a_mask.png", noise(5, 6))
    assert [pair.name for pair in pair_files(tmp_path / "images", tmp_path / "masks")] == ["a"]
    mask.rename(tmp_path / "masks" / "A.png")
    with pytest.raises(InputError, match="capital letters or spaces only: a"):
        pair_files(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("name", ["a.roi", "a.geojson", "coco.json"])
def test_a_folder_of_annotations_is_sent_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"annotations of another program .{name}.: make_masks.py convert"):
        find_files(tmp_path, "mask")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "run git lfs pull"),
        (b"<!DOCTYPE html><html>please log in", "a web page and no image"),
        (b"<html>", "a web page and no image"),
    ],
)
def test_what_lies_in_place_of_a_file_is_named(tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(FileError, match=words):
            read(tmp_path / "a.png")


def test_archives_and_files_of_microscopes_are_told_what_to_do(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    for what in ("image", "mask"):
        with pytest.raises(InputError, match="but archives .images.zip.: unpack them"):
            find_files(tmp_path, what)
    (tmp_path / "images.zip").rename(tmp_path / "a.czi")
    with pytest.raises(InputError, match="files of a microscope .a.czi.: make_masks.py images"):
        find_files(tmp_path, "image")


@pytest.mark.parametrize(("image", "mask"), [("photo_{}", "cells_{}"), ("x{}", "y{}"), ("c_{}", "c_{:03d}")])
def test_names_whose_numbers_agree_give_a_hint(tmp_path, image, mask):
    for number in range(3):
        touch(tmp_path / "images", f"{image.format(number)}.png")
        touch(tmp_path / "masks", f"{mask.format(number)}.png")
    with pytest.raises(InputError, match=f"numbers in the names agree .{image.format(0)} and {mask.format(0)}."):
        pair_files(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GIF89a" + bytes(40), "is a GIF: save it as PNG or TIFF"),
        (b"RIFF" + bytes(40), "is a WebP"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
        (b"MATLAB 5.0 MAT-file" + bytes(40), "is a MATLAB file"),
        (b"PK\x03\x04" + bytes(40), "is a zip archive: unpack it"),
        (b"\x1f\x8b\x08" + bytes(40), "is a gzip archive"),
        (b"\x93NUMPY\x01\x00" + bytes(40), "name it .npy"),
        (b"\x00\x05\x16\x07" + bytes(40), "notes of macOS"),
        (b"<?xml version='1.0'?>", "is an XML file"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(40), "is a JPEG 2000"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_another_kind_of_file_under_the_name_of_an_image_is_named(tmp_path, content, words, read):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(FileError, match=words):
        read(tmp_path / "a.png")


def test_colours_that_are_stored_as_ycbcr_without_jpeg_are_refused_and_jpeg_is_decoded(tmp_path):
    rgb = np.zeros((16, 24, 3), np.uint8)
    rgb[:, 12:] = (200, 40, 90)
    Image.fromarray(rgb).convert("YCbCr").save(tmp_path / "raw.tif")
    with pytest.raises(FileError, match="colour space YCbCr"):
        read_image(tmp_path / "raw.tif")
    Image.fromarray(rgb).save(tmp_path / "jpeg.tif", compression="jpeg", quality=95)
    assert np.abs(read_image(tmp_path / "jpeg.tif").astype(int)[:, ::23] - rgb[:, ::23].astype(int)).max() < 12
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "print.tif")
    with pytest.raises(FileError, match="colour space CMYK"):
        read_image(tmp_path / "print.tif")


def test_white_is_zero_is_taken_only_from_one_bit_masks_of_tifffile(tmp_path):
    mask = np.eye(8) > 0
    tifffile.imwrite(tmp_path / "bool.tif", mask)
    assert np.array_equal(read_mask(tmp_path / "bool.tif") > 0, mask)
    tifffile.imwrite(tmp_path / "gray.tif", np.uint8(255) * mask, photometric="miniswhite")
    with pytest.raises(FileError, match="white is zero"):
        read_mask(tmp_path / "gray.tif")


def test_arrays_of_numbers_are_read_and_others_are_named(tmp_path):
    labels = np.arange(12, dtype=np.int64).reshape(3, 4)
    np.save(tmp_path / "axis.npy", labels[..., None])
    assert np.array_equal(read_mask(tmp_path / "axis.npy"), labels)
    np.save(tmp_path / "objects.npy", np.array([labels, "x"], dtype=object), allow_pickle=True)
    with pytest.raises(FileError, match="Python objects"):
        read_mask(tmp_path / "objects.npy")
    np.savez(tmp_path / "two.npz", labels=labels, image=labels)
    with pytest.raises(FileError, match="holds 2 arrays: labels, image. Save the mask alone"):
        read_mask(tmp_path / "two.npz")


def test_stacks_of_masks_are_not_told_to_become_channels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((3, 8, 9), np.uint16), photometric="minisblack")
    with pytest.raises(FileError, match="make_masks.py convert") as caught:
        read_mask(tmp_path / "a.tif")
    assert "CYX" not in str(caught.value)
    with pytest.raises(FileError, match="CYX"):
        read_image(tmp_path / "a.tif")


def test_masks_in_colours_name_the_command_that_reads_them(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(FileError, match="make_masks.py convert"):
        read_mask(tmp_path / "a.png")


def test_one_mask_in_each_folder_is_the_mask_of_the_whole_image(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[2:8, 2:8] = mask[12:18, 12:18] = mask[22:28, 22:28] = 255
    for name in "ab":
        for kind in ("image", "mask"):  # in the singular, too
            (tmp_path / name / kind).mkdir(parents=True)
            Image.fromarray(mask).save(tmp_path / name / kind / "1.png")
    pairs = pair_files(tmp_path, tmp_path)
    assert [(pair.name, pair.mask_path.name) for pair in pairs] == [("a", "1.png"), ("b", "1.png")]
    assert (read_mask(pairs[0].mask_path) == mask).all()


@pytest.mark.parametrize(
    ("suffix", "inverted", "words"),
    [(".png", True, "black on white: background must be 0"), (".jpg", False, "is a JPEG, which blurs the edges")],
)
def test_nuclei_that_cannot_be_read_say_why(tmp_path, suffix, inverted, words):
    for number in range(3):
        nucleus = np.full((32, 32), 255 * inverted, np.uint8)
        nucleus[8 * number + 2 : 8 * number + 7, 10:17] = 255 * (not inverted)
        Image.fromarray(nucleus).save(tmp_path / f"{number}{suffix}")
    with pytest.raises(FileError, match=words):
        read_mask(tmp_path)


def test_a_mask_in_the_transparency_is_not_told_to_drop_it(tmp_path):
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[2:5, 2:5, 3] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    with pytest.raises(FileError, match="holds the mask in its transparency: save its alpha channel as gray"):
        read_mask(tmp_path / "a.png")


def test_a_tag_that_says_nothing_about_rotation_is_let_through(tmp_path):
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    exif = image.getexif()
    exif[274] = 0
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (8, 8, 1)


def test_faults_of_a_file_have_no_words_of_a_decoder_and_name_its_permissions(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(FileError) as caught:
        read_image(tmp_path / "a.png")
    assert str(caught.value).endswith("a.png: cannot be read, it is damaged or no image file")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    with pytest.raises(FileError, match="may not be read by this user"):
        read_image(tmp_path / "a.png")


def test_channels_in_the_last_axis_and_animations_are_refused_with_what_to_do(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((30, 40, 5), np.uint8), photometric="minisblack")
    frames = [Image.fromarray(np.full((8, 9), value, np.uint8)) for value in (1, 2)]
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    for name, words in (("a.tif", "channels in the last axis .30 x 40 x 5.*axes CYX"), ("b.png", "save one of them")):
        with pytest.raises(FileError, match=words):
            read_image(tmp_path / name)
