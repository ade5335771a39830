"""Pixel sizes by the headers of images, and the warning about folders that mix them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from script_helpers import run_here

import evaluate
from common.errors import InputError
from dataset.config import DataConfig
from dataset.files import encode_tiff
from dataset.folders import PairedFolder
from dataset.mask_folder import MaskFolder
from dataset.scale import pixel_size, scale_warning
from dataset.unlabelled import read_unlabelled

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 48), dtype=np.uint8)


def ome(path: Path, size: float, unit: str | None) -> None:
    metadata: dict = {"axes": "YX", "PhysicalSizeX": size, "PhysicalSizeY": size}
    tifffile.imwrite(path, IMAGE, ome=True, metadata=metadata | ({"PhysicalSizeXUnit": unit} if unit else {}))


def imagej(path: Path, size: float, unit: str | None) -> None:
    tifffile.imwrite(path, IMAGE, imagej=True, resolution=(1 / size, 1 / size), metadata={"unit": unit} if unit else {})


def plain(path: Path, size: float, unit: str | None) -> None:
    tifffile.imwrite(path, IMAGE, resolution=(1 / size, 1 / size), resolutionunit=unit)


@pytest.mark.parametrize(
    ("write", "size", "unit", "micrometres"),
    [
        (ome, 0.5, None, 0.5),
        (ome, 0.5, "\u00b5m", 0.5),
        (ome, 500.0, "nm", 0.5),
        (ome, 0.0005, "mm", 0.5),
        (ome, 1.0, "pixel", None),
        (ome, 0.5, "reference frame", None),
        (imagej, 0.5, "um", 0.5),
        (imagej, 0.5, "micron", 0.5),
        (imagej, 0.5, "\\u00B5m", 0.5),
        (imagej, 0.0005, "mm", 0.5),
        (imagej, 0.5, "pixel", None),
        (imagej, 0.5, None, None),
        (plain, 0.5e-4, "CENTIMETER", 0.5),
        (plain, 0.5 / 25_400, "INCH", 0.5),
        (plain, 1 / 72, "INCH", None),  # a program's habit, no calibration
        (plain, 1 / 300, "INCH", None),
        (plain, 1 / 28.35, "CENTIMETER", None),
        (plain, 1.0, "NONE", None),
    ],
)
def test_the_size_of_a_pixel_is_read_from_the_header(tmp_path, write, size, unit, micrometres):
    write(tmp_path / "a.tif", size, unit)
    found = pixel_size(tmp_path / "a.tif")
    assert found == (None if micrometres is None else pytest.approx(micrometres, rel=1e-4))


@pytest.mark.parametrize("unit", ['"&#181;m"', '"&#xB5;m"', "'&#x3BC;m'", "'um'"])
def test_xml_may_write_a_unit_in_other_characters(tmp_path, unit):
    text = f'<?xml version="1.0"?><OME><Image><Pixels PhysicalSizeX="0.65" PhysicalSizeXUnit={unit}/></Image></OME>'
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, description=text, metadata=None)
    assert pixel_size(tmp_path / "a.tif") == 0.65


def test_a_scanner_says_it_as_mpp(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, description="Aperio Image Library|AppMag = 40|MPP = 0.2525|Left = 3")
    assert pixel_size(tmp_path / "a.tif") == 0.2525


def test_files_that_do_not_say_it_have_no_size(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png", dpi=(72, 72))
    tifffile.imwrite(tmp_path / "b.tif", IMAGE)
    (tmp_path / "c.tif").write_bytes(b"II*\0damaged")
    (tmp_path / "d.tif").write_bytes((tmp_path / "a.png").read_bytes())
    assert [pixel_size(path) for path in sorted(tmp_path.iterdir())] == [None] * 4
    assert pixel_size(tmp_path / "none.tif") is None


def test_flat_images_of_stacks_keep_it(tmp_path):
    for number, image in enumerate((IMAGE, np.stack([IMAGE] * 3, -1), np.stack([IMAGE] * 2, -1))):
        (tmp_path / f"{number}.tif").write_bytes(encode_tiff(image, pixel_um=0.3245))
        assert pixel_size(tmp_path / f"{number}.tif") == pytest.approx(0.3245, rel=1e-4)


def test_the_warning_names_each_size_with_a_file_and_the_mend():
    (text,) = scale_warning({"a.tif": 0.325, "b.tif": 0.65, "c.tif": 0.327, "d.tif": None})
    assert "0.325 um (2, as a.tif), 0.65 um (1, as b.tif)" in text and "rescale images and masks" in text
    (text,) = scale_warning({f"{number}.tif": 2.0**number for number in range(9)})
    assert "1 um (1, as 0.tif)" in text and "256 um (1, as 8.tif)" in text and "5 more sizes" in text


@pytest.mark.parametrize("sizes", [(), (None, None), (0.325, None), (0.325, 0.325), (0.325, 0.338)])
def test_absent_and_equal_sizes_are_no_reason_to_warn(sizes):
    assert scale_warning({f"{number}.tif": size for number, size in enumerate(sizes)}) == []


def folders(root: Path, sizes: list[float]) -> tuple[Path, Path]:
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number, size in enumerate(sizes):
        rng = np.random.default_rng(number)
        mask = np.zeros((40, 48), np.uint8)
        mask[5:20, 4 + number : 20 + number] = 255
        image = (mask // 3 + rng.integers(0, 60, mask.shape)).astype(np.uint8)
        tifffile.imwrite(root / "images" / f"f{number}.tif", image, imagej=True, resolution=(1 / size,) * 2,
                         metadata={"unit": "um"})  # fmt: skip
        Image.fromarray(mask).save(root / "masks" / f"f{number}.png")
    return root / "images", root / "masks"


def test_files_of_one_name_in_a_folder_per_image_are_told_apart(tmp_path, caplog):
    sizes = [0.2, 0.8, 0.2, 0.8, 0.8]
    images, masks = folders(tmp_path / "flat", sizes)
    for number in range(5):
        inner = tmp_path / "lab" / "ABCDE"[number]
        (inner / "images").mkdir(parents=True)
        (inner / "masks").mkdir()
        (images / f"f{number}.tif").rename(inner / "images" / "image.tif")
        (masks / f"f{number}.png").rename(inner / "masks" / "mask.png")
    data = PairedFolder(tmp_path / "lab", tmp_path / "lab", DataConfig(32, 2, channels=1))
    assert "0.2 um (2, as A/images/image.tif), 0.8 um (3, as B/images/image.tif)" in caplog.text
    caplog.clear()
    read_unlabelled([folders(tmp_path / "new", [0.4])[0]], [], data, progress=False)
    assert "0.2 um (2, as A/images/image.tif), 0.4 um (1, as f0.tif), 0.8 um (3, as B/im" in caplog.text
    for name in "BD":
        (tmp_path / "lab" / name / "images" / "image.tif").write_bytes(b"II*\0")
    with pytest.raises(InputError, match="2 of 5 .* used. B/images/image.tif, D/images/image.tif: cannot be read"):
        PairedFolder(tmp_path / "lab", tmp_path / "lab", DataConfig(32, 2, channels=1))


def test_a_mask_of_one_name_in_each_folder_is_named_with_its_folder(tmp_path):
    for number in range(3):
        (tmp_path / "ABC"[number]).mkdir()
        mask = np.full((40, 48), 255 if number < 2 else 7, np.uint8)
        mask[:20] = 0
        Image.fromarray(mask).save(tmp_path / "ABC"[number] / "mask.png")
    with pytest.raises(InputError, match=r"C/mask\.png"):
        MaskFolder(tmp_path, DataConfig(32, 2), "binary")


@pytest.mark.parametrize(("sizes", "warns"), [([0.5, 0.5, 0.25], True), ([0.5, 0.5, 0.5], False)])
def test_training_and_the_data_report_warn(tmp_path, caplog, sizes, warns):
    images, masks = folders(tmp_path, sizes)
    PairedFolder(images, masks, DataConfig(32, 2, channels=1))
    text = "pixels of the images have different sizes: 0.25 um (1, as f2.tif), 0.5 um (2, as f0.tif)"
    assert (text in caplog.text) == warns
    words = ["data", "--data-path", images, "--mask-path", masks, "--output", tmp_path / "report"]
    assert run_here(evaluate, *words)[0] == 0
    assert (text in (tmp_path / "report" / "data.txt").read_text()) == warns


def test_unlabelled_images_of_another_scale_are_pointed_out(tmp_path, caplog):
    images, masks = folders(tmp_path / "labelled", [0.5, 0.5])
    others, _ = folders(tmp_path / "others", [0.2, 0.2])
    for path in others.iterdir():
        path.rename(path.with_name(f"u{path.name}"))
    labelled = PairedFolder(images, masks, DataConfig(32, 2, channels=1))
    assert "different sizes" not in caplog.text
    read_unlabelled([others], [], labelled, False)
    assert "pixels of the labelled and unlabelled images have different sizes: 0.2 um (2, as uf0.tif)" in caplog.text
