"""Exported sets hold the ids of the labels, in the layouts of the tools and readable by their own readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from common.errors import InputError
from dataset.files import encode_image, image_suffix
from dataset.masks import MaskRule
from synthetic.export import ExportedPair, check_export, export_set, instances_of, label_image

INSTANCES = MaskRule("instances", 2, 1, "")
BINARY = MaskRule("binary", 2, 255, "")
NAMES = ["a", "a.b_0001"]  # the first with a dot is also a name and a suffix


def labels() -> np.ndarray:
    """(20, 24) uint16: three cells with ids that are not consecutive, two of them touching."""
    label = np.zeros((20, 24), dtype=np.uint16)
    label[2:8, 3:9], label[2:8, 9:14], label[12:18, 15:22] = 7, 300, 41
    return label


@pytest.fixture
def sample_dir(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in NAMES:
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(labels()).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def images(sample_dir: Path) -> list[Path]:
    return [sample_dir / "images" / f"{name}.png" for name in NAMES]


@pytest.mark.parametrize(
    ("layout", "image", "label"),
    [("cellpose", "{}_img.tif", "{}_masks.tif"), ("stardist", "images/{}.tif", "masks/{}.tif")],
)
def test_tiffs_hold_the_image_and_the_original_ids(sample_dir, layout, image, label):
    folder = export_set(sample_dir, images(sample_dir), INSTANCES, layout)
    for name in NAMES:
        written = tifffile.imread(folder / label.format(name))
        assert written.dtype == np.uint16 and np.array_equal(written, labels())
        with Image.open(sample_dir / "images" / f"{name}.png") as picture:
            assert np.array_equal(tifffile.imread(folder / image.format(name)), np.array(picture))
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 4


@pytest.mark.parametrize("kind", ["RGB", "gray", "two channels", "float"])
def test_cellpose_reads_its_folder(sample_dir, kind):
    """By cellpose.io itself, where it is installed: pip install cellpose."""
    io = pytest.importorskip("cellpose.io")
    rng = np.random.default_rng(1)
    shape = {"RGB": (20, 24, 3), "two channels": (20, 24, 2)}.get(kind, (20, 24, 1))
    written = {}
    for path in images(sample_dir):
        path.unlink()
        array = rng.integers(0, 60000, shape).astype(np.float32 if kind == "float" else np.uint16)
        written[path.stem] = array
        path.with_suffix(image_suffix(shape[2], array.dtype)).write_bytes(encode_image(array))
    folder = export_set(sample_dir, sorted((sample_dir / "images").iterdir()), INSTANCES, "cellpose")
    read, read_labels, names = io.load_images_labels(str(folder), image_filter="_img")
    names = [Path(name).name.removesuffix("_img.tif") for name in names]
    assert sorted(names) == NAMES
    for name, image, label in zip(names, read, read_labels, strict=True):
        assert label.dtype == np.uint16 and np.array_equal(label, labels())
        array = written[name].transpose(2, 0, 1) if kind == "two channels" else written[name].squeeze()
        assert image.dtype == array.dtype and np.array_equal(image, array)


def test_coco_is_read_back_with_every_cell(sample_dir):
    coco = pytest.importorskip("pycocotools.coco")
    folder = export_set(sample_dir, images(sample_dir), INSTANCES, "coco")
    dataset = coco.COCO(folder / "annotations.json")
    (number,) = [one["id"] for one in dataset.loadImgs(dataset.getImgIds()) if one["file_name"] == "a.b_0001.png"]
    cells = dataset.loadAnns(dataset.getAnnIds(imgIds=number))
    assert sorted(cell["instance_id"] for cell in cells) == [7, 41, 300]
    for cell in cells:
        assert np.array_equal(dataset.annToMask(cell) > 0, labels() == cell["instance_id"])
        assert cell["area"] == (labels() == cell["instance_id"]).sum()
    assert next(cell["bbox"] for cell in cells if cell["instance_id"] == 41) == [15, 12, 7, 6]
    assert (folder / "images" / "a.png").is_file()
    assert [one["name"] for one in json.loads((folder / "annotations.json").read_text())["categories"]] == ["cell"]


def test_connected_regions_of_a_binary_mask_become_cells():
    cells = instances_of((labels() > 0).astype(np.uint8) * 255, BINARY)
    assert sorted(np.unique(cells)) == [0, 1, 2]  # the touching two are one region
    assert len(np.unique(cells[2:8, 3:14])) == 1


def test_regions_of_different_classes_are_different_cells():
    classes = np.zeros((6, 9), dtype=np.uint8)
    classes[1:5, 1:4], classes[1:5, 4:8] = 1, 2
    assert sorted(np.unique(instances_of(classes, MaskRule("classes", 3, 1, "")))) == [0, 1, 2]


def test_large_ids_are_numbered_anew_in_label_images_and_kept_in_coco(sample_dir):
    large = labels().astype(np.int32)
    large[large == 300] = 150_009
    (sample_dir / "masks" / "a.png").unlink()
    tifffile.imwrite(sample_dir / "masks" / "a.tif", large)
    for layout, label in (("cellpose", "{}_masks.tif"), ("stardist", "masks/{}.tif")):
        folder = export_set(sample_dir, images(sample_dir), INSTANCES, layout)
        written = tifffile.imread(folder / label.format("a"))
        assert written.dtype == np.uint16 and set(np.unique(written)) == {0, 1, 2, 3}
        assert np.array_equal(written == 3, large == 150_009)
        assert set(np.unique(tifffile.imread(folder / label.format(NAMES[1])))) == {0, 7, 41, 300}  # as they were
    folder = export_set(sample_dir, images(sample_dir), INSTANCES, "coco")
    found = json.loads((folder / "annotations.json").read_text())["annotations"]
    assert sorted(one["instance_id"] for one in found if one["image_id"] == 1) == [7, 41, 150_009]


def test_more_cells_than_16_bits_can_number_are_refused_by_name(sample_dir):
    many = np.arange(1, 66_001, dtype=np.int32).reshape(220, 300)
    pair = ExportedPair("a", sample_dir / "a.png", many, True, many, many)
    with pytest.raises(InputError, match="a: 66000 cells"):
        label_image(pair)


def test_probability_masks_are_refused_before_the_work():
    with pytest.raises(InputError, match="export coco: probability"):
        check_export(["coco"], MaskRule("probability", 2, 255, ""))
    check_export([], MaskRule("probability", 2, 255, ""))
