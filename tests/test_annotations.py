"""Annotations of other programs become label images with known pixels; odd input is counted, named or refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import roifile
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from script_helpers import run_here

import make_masks
from common.errors import InputError
from dataset.annotations import cellpose, coco
from dataset.annotations.cells import Cell, draw_cells, rings_to_cell
from dataset.annotations.convert import ConvertSettings, convert, unpack_images
from dataset.annotations.formats import format_of
from dataset.annotations.imagej import roi_of
from dataset.annotations.outlines import outlines
from dataset.annotations.plain_arrays import Call, NotPlain
from dataset.files import FileError, pair_files, read_image_and_kind, read_mask
from dataset.masks import MaskRule
from synthetic.export import EXPORTS, export_set, instances_of

SIZE = (40, 52)


def drawn() -> np.ndarray:
    """(40, 52) uint16, ids with gaps: a square, a ring, a cell of two pieces, two that touch at a corner."""
    labels = np.zeros(SIZE, np.uint16)
    labels[2:9, 3:11] = 4
    labels[12:24, 5:17] = 9
    labels[15:20, 8:13] = 0
    labels[3:8, 20:26] = labels[3:8, 30:34] = 300
    labels[26:30, 20:24], labels[30:35, 24:30] = 17, 18
    labels[38:40, 48:52] = 21
    return labels


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with one image, a.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, SIZE, dtype=np.uint8)).save(folder / "a.png")
    return folder


def converted(tmp_path: Path, images: Path, source: Path, **given) -> tuple[np.ndarray, object]:
    """The label image of a, and the report."""
    result = convert(source, images, tmp_path / "out", ConvertSettings(**given))
    return read_mask(tmp_path / "out" / "a.tif"), result


def folder_of(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


# ------------------------------------------------------------------------------------------------------ outlines, cells


@given(st.integers(0, 2**30 - 1))
@settings(max_examples=60, deadline=None)
def test_outlines_enclose_exactly_the_pixels_of_any_region(bits):
    mask = np.array([bits >> place & 1 for place in range(30)], bool).reshape(5, 6)
    polygons = outlines(mask)
    found = np.zeros(mask.shape, bool)
    for rings in polygons:
        cell = rings_to_cell(rings)
        found[cell.top : cell.top + cell.mask.shape[0], cell.left : cell.left + cell.mask.shape[1]] |= cell.mask
        assert all(len({tuple(corner) for corner in ring.tolist()}) == len(ring) for ring in rings)
    assert np.array_equal(found, mask)


def test_the_smaller_of_two_overlapping_cells_keeps_the_pixels_and_everything_is_counted():
    def square(top: int, left: int, side: int, number: int) -> Cell:
        return Cell(top, left, np.ones((side, side), bool), number)

    cells = [square(2, 2, 10, 7), square(4, 4, 3, 3), square(-2, 15, 4, 5), square(50, 50, 2, 6)]
    label, counts = draw_cells([*cells, Cell.none("a line")], (20, 30))
    assert (label[4:7, 4:7] == 3).all() and label[2, 2] == 7 and (label[:2, 15:19] == 5).all()
    assert (counts.read, counts.written, counts.overlapping, counts.outside) == (5, 3, 2, 2)
    assert counts.dropped == {"a line": 1, "outside of the image": 1}


def test_a_covered_cell_is_counted_and_equal_ids_are_refused():
    cells = [Cell(0, 0, np.ones((3, 3), bool), 1), Cell(0, 0, np.ones((3, 3), bool), 2)]
    _, counts = draw_cells(cells, (5, 5))
    assert counts.dropped == {"covered by smaller cells": 1} and counts.written == 1
    with pytest.raises(ValueError, match="two cells of the id 1"):
        draw_cells([cells[0], cells[0]], (5, 5))


# -------------------------------------------------------------------------------------- formats, from drawn annotations


def write_set(tmp_path: Path, labels: np.ndarray, name: str = "a") -> Path:
    """A synthetic set of one pair."""
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    Image.fromarray(np.zeros(labels.shape, np.uint8)).save(tmp_path / "set" / "images" / f"{name}.png")
    Image.fromarray(labels).save(tmp_path / "set" / "masks" / f"{name}.png")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("layout", "part"), [("roi", "rois"), ("geojson", "annotations"), ("coco", "annotations.json")]
)
def test_what_we_export_comes_back_with_every_pixel_and_id(tmp_path, layout, part):
    set_dir = write_set(tmp_path, drawn())
    folder = export_set(set_dir, [set_dir / "images" / "a.png"], MaskRule("instances", 2, 1, ""), layout)
    label, result = converted(tmp_path, folder / "images", folder / part)
    assert label.dtype == np.uint16 and np.array_equal(label, drawn())
    assert result.counts["a"].read == result.counts["a"].written == 6 and not result.counts["a"].overlapping


def test_rois_of_an_export_are_read_by_roifile_with_the_same_outlines(tmp_path):
    set_dir = write_set(tmp_path, drawn())
    folder = export_set(set_dir, [set_dir / "images" / "a.png"], MaskRule("instances", 2, 1, ""), "roi")
    rois = {roi.name: roi for roi in roifile.roiread(folder / "rois" / "a.zip")}
    assert set(rois) == {"4", "9", "17", "18", "21", "300"}
    assert rois["4"].roitype.name == "TRACED"
    assert {tuple(corner) for corner in rois["4"].coordinates().tolist()} == {(3, 2), (11, 2), (11, 9), (3, 9)}
    assert rois["9"].composite and len(rois["9"].coordinates(multi=True)) == 2  # with its hole
    assert (rois["300"].left, rois["300"].top, rois["300"].right, rois["300"].bottom) == (20, 3, 34, 8)


def test_geojson_of_an_export_is_plain_geojson_with_holes_and_pieces(tmp_path):
    from matplotlib.path import Path as Outline

    set_dir = write_set(tmp_path, drawn())
    folder = export_set(set_dir, [set_dir / "images" / "a.png"], MaskRule("instances", 2, 1, ""), "geojson")
    content = json.loads((folder / "annotations" / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    rows, columns = np.indices(SIZE) + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], axis=1)
    seen = np.zeros(SIZE, np.uint16)
    for feature in content["features"]:
        geometry, properties = feature["geometry"], feature["properties"]
        assert properties["classification"]["name"] == "cell" and properties["objectType"] == "annotation"
        polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        for outer, *holes in polygons:
            assert outer[0] == outer[-1]
            inside = Outline(outer).contains_points(centres)
            for hole in holes:
                inside &= ~Outline(hole).contains_points(centres)
            seen[inside.reshape(SIZE)] = int(properties["name"])
    assert np.array_equal(seen, drawn())


def test_every_export_has_bytes_that_do_not_change(tmp_path):
    set_dir = write_set(tmp_path, drawn())
    for layout in ("roi", "geojson"):
        made = []
        for _ in range(2):
            folder = export_set(set_dir, [set_dir / "images" / "a.png"], MaskRule("instances", 2, 1, ""), layout)
            made.append([path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()])
        assert made[0] == made[1]
    assert {"cellpose", "stardist", "coco", "roi", "geojson"} == set(EXPORTS)


def test_rois_of_every_kind_of_area_and_none_of_lines_and_points(tmp_path, images):
    source = folder_of(tmp_path)
    kinds = roifile.ROI_TYPE
    box = {"left": 10, "top": 5, "right": 20, "bottom": 15}
    rois = [
        roifile.ImagejRoi(roitype=kinds.RECT, name="box", left=1, top=2, right=6, bottom=5),
        roifile.ImagejRoi(roitype=kinds.OVAL, name="round", **box),
        roifile.ImagejRoi.frompoints(np.array([[25, 5], [35, 5], [35, 15], [25, 15]]), name="free"),
        roifile.ImagejRoi(roitype=kinds.LINE, name="line", x1=0, y1=0, x2=5, y2=5),
        roifile.ImagejRoi.frompoints(np.array([[45.2, 30.2], [60.0, 30.2], [60.0, 35.8], [45.2, 35.8]]), name="out"),
    ]
    rois[2].roitype = kinds.POLYGON
    roifile.roiwrite(source / "a_RoiSet.zip", rois)
    label, result = converted(tmp_path, images, source)
    assert (label[2:5, 1:6] == 1).all() and np.count_nonzero(label == 1) == 15
    assert abs(np.count_nonzero(label == 2) - np.pi * 25) < 5 and label[10, 15] == 2 and label[5, 10] == 0
    assert np.count_nonzero(label == 3) == 100
    assert set(np.unique(label)) == {0, 1, 2, 3, 5} and np.count_nonzero(label == 5) == 7 * 6
    counts = result.counts["a"]
    assert counts.dropped == {"a line": 1} and counts.outside == 1 and counts.read == 5


def test_rois_of_several_slices_are_refused(tmp_path, images):
    source = folder_of(tmp_path)
    square = np.array([[1, 1], [9, 1], [9, 9], [1, 9]])
    roifile.roiwrite(source / "a.zip", [roifile.ImagejRoi.frompoints(square, name=str(k), position=k) for k in (1, 2)])
    with pytest.raises(InputError, match="ROIs of 2 slices"):
        converted(tmp_path, images, source)


def test_cellpose_seg_keeps_its_ids(tmp_path, images):
    source = folder_of(tmp_path)
    content = {"masks": drawn(), "outlines": drawn() * 0, "filename": "a.png", "est_diam": np.float64(3), "list": [1]}
    np.save(source / "a_seg.npy", content)
    label, _ = converted(tmp_path, images, source)
    assert np.array_equal(label, drawn())


class Poison:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "poison",
    [
        Poison(os.system, ("touch {}",)),
        Poison(eval, ("open('{}', 'w')",)),
        Poison(getattr, ("{}", "upper")),
        Poison(np.load, ("{}",)),
        Poison(exec, ("import pathlib; pathlib.Path('{}').touch()",)),
    ],
)
def test_a_poisoned_seg_runs_nothing(tmp_path, protocol, poison):
    target = tmp_path / "ran"
    function, words = poison.call
    poison = Poison(function, tuple(w.format(target) if isinstance(w, str) else w for w in words))
    path = tmp_path / "a_seg.npy"
    array = np.array({"masks": drawn(), "more": poison}, dtype=object)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(array, file, protocol=protocol)
    with pytest.raises(FileError, match="not read|damaged"):
        cellpose.read_seg(path)
    assert not target.exists()


def test_nothing_but_plain_data_can_be_asked_for_by_name():
    assert {name.partition(".")[0] for name in cellpose.PLAIN} == {"numpy", "pathlib", "_codecs"}
    for stand_in in cellpose.PLAIN.values():  # ours: nothing of these modules is called, and no pickle can change it
        assert type(stand_in) is Call and not hasattr(stand_in, "__dict__")
        with pytest.raises(NotPlain):
            stand_in.__setstate__({"_function": eval})
    for module, name in (("builtins", "eval"), ("os", "system"), ("numpy", "load"), ("numpy.testing", "runstring")):
        with pytest.raises(pickle.UnpicklingError):
            cellpose.PlainUnpickler(io.BytesIO()).find_class(module, name)


class FalseType:
    """A data type with an object in it that says it holds none, or holds one without being a list."""

    def __init__(self, flags: int) -> None:
        self.flags = flags

    def __reduce__(self):
        fields = {"a": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, self.flags)


class FalseArray:
    def __init__(self, flags: int) -> None:
        self.flags = flags

    def __reduce__(self):
        state = (1, (4,), FalseType(self.flags), False, b"\x41" * 32)
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state


@pytest.mark.parametrize("flags", [0, 1, 27, 63])
def test_bytes_of_a_file_are_never_taken_for_addresses(tmp_path, flags):
    """NumPy itself follows them and ends the process (flags 1), or keeps them for the next one who looks (0)."""
    path = tmp_path / "a_seg.npy"
    write_seg(path, {"masks": drawn(), "other": FalseArray(flags)})
    assert np.array_equal(cellpose.read_seg(path)["masks"], drawn())
    write_seg(path, {"masks": FalseArray(flags)})
    with pytest.raises(FileError, match="holds something else than numbers"):
        cellpose.read_seg(path)


def write_seg(path: Path, content: dict, protocol: int = 4) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(content, file, protocol=protocol)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_what_cellpose_and_its_users_keep_in_a_seg_is_read(tmp_path, images, protocol):
    folder = folder_of(tmp_path)
    content = {
        "masks": np.asfortranarray(drawn().astype(">u4"))[None], "filename": Path("/data/a.png"), "ismanual": [True],
        "flows": [np.zeros((3, 4), np.uint8), [], None], "est_diam": np.float32(3), "colors": np.zeros((5, 3)),
        "changes": [["01/02/2024, 10:00:00", "deleted mask", [3]]], "diameter": np.nan, "names": np.array(["a", "b"]),
    }  # fmt: skip
    write_seg(folder / "a_seg.npy", content, protocol)
    label, _ = converted(tmp_path, images, folder)
    assert np.array_equal(label, drawn())


@pytest.mark.parametrize("number", [b"r\xff\xff\xff\x0f", b"p268435455\n"])
def test_a_small_seg_cannot_ask_for_gigabytes(tmp_path, number):
    path = tmp_path / "a_seg.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(b"N" + number + b".")
    with pytest.raises(FileError, match="the number 268435455 of an object is no plain data"):
        cellpose.read_seg(path)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (drawn().astype(int) - 1, "negative or broken numbers"),
        (drawn() + 0.5, "negative or broken numbers"),
        (np.stack([drawn()] * 3), "shape .3 x 40 x 52.: one flat label image"),
        (drawn() > 0, "masks of bool"),
        (drawn().tolist(), "it has no masks"),
    ],
)
def test_masks_of_cellpose_that_are_no_labels_are_refused(tmp_path, images, masks, words):
    source = folder_of(tmp_path)
    np.save(source / "a_seg.npy", {"masks": masks})
    with pytest.raises(InputError, match=words):
        converted(tmp_path, images, source)


def test_qupath_holes_pieces_classes_and_what_is_no_area(tmp_path, images):
    source = folder_of(tmp_path)

    def feature(kind: str, coordinates: list, name: str | None) -> dict:
        properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
        return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}

    def square(top: int, left: int, side: int) -> list:
        return [[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]

    features = [
        feature("Polygon", [square(2, 2, 10), square(4, 4, 3)], "Tumor"),
        feature("MultiPolygon", [[square(20, 2, 4)], [square(20, 10, 4)]], "Immune cells"),
        feature("LineString", [[0, 0], [5, 5]], "Tumor"),
        feature("Polygon", [square(30, 30, 5)], None),
    ]
    (source / "a.png.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    with pytest.raises(InputError, match="holds: Tumor 'Immune cells'. 1 cells have none") as refused:
        converted(tmp_path, images, source, kind="classes")
    assert refused.value.marked.startswith("`classes`: ")
    label, result = converted(tmp_path, images, source, kind="classes", classes=["Immune cells", "Tumor"])
    assert (label == 2).sum() == 100 - 9 and label[5, 5] == 0 and (label == 1).sum() == 32
    assert result.counts["a"].dropped == {"a LineString": 1, "another class": 1}


def test_coco_polygons_run_lengths_crowds_and_boxes(tmp_path, images):
    from pycocotools import mask as rle

    code = rle.encode(np.asfortranarray((drawn() == 9).astype(np.uint8)))
    plain = {"size": list(SIZE), "counts": [5, 7, SIZE[0] * SIZE[1] - 12]}
    outline = [[20, 10, 30, 10, 30, 20, 20, 20], [35, 10, 40, 10, 40, 15, 35, 15]]
    shared = {"image_id": 1, "category_id": 1}
    annotations = [
        {"id": 11, "segmentation": outline, **shared},
        {"id": 12, "segmentation": {"size": list(SIZE), "counts": code["counts"].decode()}, **shared},
        {"id": 70_000, "segmentation": plain, **shared},
        {"id": 14, "segmentation": plain, "iscrowd": 1, **shared},
        {"id": 15, "segmentation": [], "bbox": [0, 0, 4, 4], **shared},
    ]
    content = {
        "images": [{"id": 1, "file_name": "train/a.png", "height": 40, "width": 52}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    source = tmp_path / "instances.json"
    source.write_text(json.dumps(content))
    label, result = converted(tmp_path, images, source)
    assert np.array_equal(label == 12, drawn() == 9) and (label == 11).sum() == 125
    assert np.count_nonzero(label == 70_000) == 7 and label.dtype == np.int32
    assert result.counts["a"].dropped == {"a box without an outline": 1, "a crowd: iscrowd is 1": 1}


def test_labelme_shapes_groups_and_masks(tmp_path, images):
    picture = io.BytesIO()
    Image.fromarray(np.full((3, 4), 255, np.uint8)).save(picture, format="PNG")
    painted = base64.b64encode(picture.getvalue()).decode()
    shapes = [
        {"label": "cell", "points": [[2, 2], [10, 2], [10, 8], [2, 8]], "shape_type": "polygon", "group_id": None},
        {"label": "cell", "points": [[20, 2], [26, 8]], "shape_type": "rectangle", "group_id": 1},
        {"label": "cell", "points": [[30, 2], [34, 8]], "shape_type": "rectangle", "group_id": 1},
        {"label": "cell", "points": [[20, 25], [25, 25]], "shape_type": "circle"},
        {"label": "cell", "points": [[40, 30], [43, 32]], "shape_type": "mask", "mask": painted},
        {"label": "cell", "points": [[1, 1]], "shape_type": "point"},
    ]
    source = folder_of(tmp_path)
    content = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 52}
    (source / "a.json").write_text(json.dumps(content))
    label, result = converted(tmp_path, images, source)
    assert [np.count_nonzero(label == k) for k in (1, 2, 4)] == [48, 60, 12]
    assert abs(np.count_nonzero(label == 3) - np.pi * 25) < 6
    assert result.counts["a"].dropped == {"a point": 1}
    (source / "a.json").write_text(json.dumps(content | {"imageHeight": 41}))
    with pytest.raises(InputError, match="52 x 41 pixels, but its image has 52 x 40"):
        convert(source, images, tmp_path / "other", ConvertSettings())


def test_colours_are_classes_if_given_and_the_message_gives_the_flag_to_copy(tmp_path, images):
    source = folder_of(tmp_path)
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[2:9, 3:11], colours[12:20, 5:17] = (255, 0, 0), (0, 128, 255)
    Image.fromarray(colours).save(source / "a_labels.png")
    words = ["convert", source, "--images", images, "--output", tmp_path / "out"]
    code, lines = run_here(make_masks, *words)
    assert code == 2 and "holds the colours 000000 0080ff ff0000" in lines[-1] and "--class-colours cells" in lines[-1]
    code, _ = run_here(make_masks, *words, "--class-colours", "000000", "0080ff", "ff0000")
    assert code == 0
    label = read_mask(tmp_path / "out" / "a.tif")
    assert (label[12:20, 5:17] == 1).all() and (label[2:9, 3:11] == 2).all() and set(np.unique(label)) == {0, 1, 2}
    code, lines = run_here(make_masks, *words[:-1], tmp_path / "less", "--class-colours", "000000", "ff0000")
    assert code == 2 and "1 colours that are not given: 0080ff" in lines[-1]
    code, lines = run_here(make_masks, *words[:-1], tmp_path / "other", "--class-colours", "cells", "--format", "coco")
    assert code == 2 and "error: --class-colours has no effect with format coco: leave it out" in lines[-1]


def test_every_colour_a_cell_and_a_palette_gives_its_numbers(tmp_path, images):
    source = folder_of(tmp_path)
    table = np.arange(301) * 50021 % 16777213 + 1
    packed = np.where(drawn() > 0, table[drawn()], 0)
    Image.fromarray(np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 2).astype(np.uint8)).save(
        source / "a.png"
    )
    label, _ = converted(tmp_path, images, source, class_colours=["cells"])
    assert len(np.unique(label)) == 7
    for number in np.unique(drawn()):
        assert len(np.unique(label[drawn() == number])) == 1
    picture = Image.fromarray((drawn() % 7).astype(np.uint8), "P")
    picture.putpalette([255, 255, 255, 255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 8, 8, 8, 1, 2, 3])
    picture.save(source / "a.png")
    convert(source, images, tmp_path / "palette", ConvertSettings())
    assert np.array_equal(read_mask(tmp_path / "palette" / "a.tif"), drawn() % 7)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_pages_of_one_cell_each_may_overlap(tmp_path, images, suffix):
    source = folder_of(tmp_path)
    pages = np.zeros((4, *SIZE), np.uint8)
    pages[0, 2:12, 2:12], pages[1, 4:7, 4:7], pages[3, 20:25, 20:25] = 255, 255, 1
    path = source / f"a{suffix}"
    np.save(path, pages) if suffix == ".npy" else tifffile.imwrite(path, pages, photometric="minisblack")
    label, result = converted(tmp_path, images, source)
    assert (label[4:7, 4:7] == 2).all() and np.count_nonzero(label == 1) == 91 and np.count_nonzero(label == 4) == 25
    assert result.counts["a"].dropped == {"an empty page": 1} and result.counts["a"].overlapping == 2


def test_pannuke_arrays_give_images_ids_and_classes(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (3, 32, 36, 3)).astype(np.float64)
    planes = np.zeros((3, 32, 36, 4), np.float64)
    planes[:, 2:9, 3:9, 0], planes[:, 12:20, 5:14, 1], planes[2, 22:30, 20:30, 2] = 5, 8, 11
    planes[..., 3] = planes[..., :3].sum(axis=3) == 0
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "masks.npy", planes)
    words = ["convert", tmp_path / "masks.npy", "--images", tmp_path / "images.npy", "--output", tmp_path / "out"]
    assert run_here(make_masks, *words)[0] == 2
    code, lines = run_here(make_masks, *words, "--images-output", tmp_path / "new" / ".." / "out")
    assert code == 2 and "give another folder than --output" in lines[-1]
    assert run_here(make_masks, *words, "--images-output", tmp_path / "png")[0] == 0
    assert np.array_equal(np.array(Image.open(tmp_path / "png" / "images_000001.png")), images[1])
    assert set(np.unique(read_mask(tmp_path / "out" / "images_000001.tif"))) == {0, 5, 8}
    assert set(np.unique(read_mask(tmp_path / "out" / "images_000002.tif"))) == {0, 5, 8, 11}
    given = ConvertSettings(kind="classes", classes=["plane 1", "plane 2", "plane 3"])
    convert(tmp_path / "masks.npy", tmp_path / "png", tmp_path / "classes", given)
    assert (read_mask(tmp_path / "classes" / "images_000002.tif")[22:30, 20:30] == 3).all()
    with pytest.raises(InputError, match="is not empty"):
        unpack_images(tmp_path / "images.npy", tmp_path / "png")


@pytest.mark.parametrize("images_output", ["out", "out/images", "link"])
def test_images_of_an_array_and_their_labels_go_to_two_folders(tmp_path, images_output):
    np.save(tmp_path / "images.npy", np.zeros((2, *SIZE), np.uint8))
    np.save(tmp_path / "masks.npy", planes_of_classes(0, 2))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    words = ["convert", tmp_path / "masks.npy", "--images", tmp_path / "images.npy", "--output", tmp_path / "out"]
    code, lines = run_here(make_masks, *words, "--images-output", tmp_path / images_output)
    assert code == 2 and f"--images-output {tmp_path / images_output}: give another folder" in lines[-1]
    assert not any((tmp_path / "out").iterdir())


def test_faults_of_images_of_an_array_name_the_folder_that_was_given(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((2, *SIZE), np.uint8))
    (tmp_path / "other.geojson").write_text(json.dumps([feature(2, 4, 6)]))
    words = ["convert", tmp_path / "other.geojson", "--images", tmp_path / "images.npy", "--output", tmp_path / "out"]
    code, lines = run_here(make_masks, *words, "--images-output", tmp_path / "png")
    assert code == 2 and f"has the name of an image in {tmp_path / 'png'}: annotations are named" in lines[-1]


LEVELS = np.arange(2 * 6 * 7 * 3).reshape(2, 6, 7, 3)  # 0 to 251


@pytest.mark.parametrize(
    ("array", "stored"),
    [
        (LEVELS.astype(np.int64), LEVELS.astype(np.uint8)),
        (LEVELS.astype(np.float64), LEVELS.astype(np.uint8)),
        ((LEVELS / 255).astype(np.float32), LEVELS.astype(np.uint8)),
        (LEVELS * 200.0, (LEVELS * 200).astype(np.uint16)),
        (LEVELS.astype(np.uint16), LEVELS.astype(np.uint16)),
        (LEVELS > 99, np.where(LEVELS > 99, 255, 0).astype(np.uint8)),
        (LEVELS - 9, LEVELS - 9),
        (LEVELS / 251, (LEVELS / 251).astype(np.float32)),
        ((LEVELS / 251).astype(np.float32)[..., 0], (LEVELS / 251).astype(np.float32)[..., :1]),
    ],
)
def test_images_of_an_array_are_files_of_one_type_and_three_channels_are_colours(tmp_path, array, stored):
    array = np.concatenate([array, np.zeros_like(array[:1])])  # a blank image decides nothing
    np.save(tmp_path / "images.npy", array)
    folder = unpack_images(tmp_path / "images.npy", tmp_path / "out")
    read = [read_image_and_kind(path) for path in sorted(folder.iterdir())]
    assert [image.dtype for image, _ in read] == [stored.dtype] * 3 and not any(kind for _, kind in read)
    assert np.array_equal(np.stack([image for image, _ in read[:2]]), stored) and not read[2][0].any()
    assert len({path.suffix for path in folder.iterdir()}) == 1


# ------------------------------------------------------------------------------------------------------ folders, report


def test_the_report_says_what_has_no_partner_and_what_became_of_the_cells(tmp_path, images, capsys):
    source = folder_of(tmp_path)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / "b.png")
    np.save(source / "a_seg.npy", {"masks": drawn()})
    np.save(source / "c_seg.npy", {"masks": drawn()})
    (source / "._a_seg.npy").write_bytes(b"a Mac's")
    assert run_here(make_masks, "convert", source, "--images", images, "--output", tmp_path / "out")[0] == 0
    text = capsys.readouterr().out
    assert "1 label images; 6 cells read, 6 written" in text
    assert "1 images have no annotations: b" in text and "1 annotations have no image: c" in text
    (row,) = csv.DictReader((tmp_path / "out" / "report.csv").open())
    assert row == {"image": "a", "read": "6", "written": "6", "overlapping": "0", "outside": "0", "dropped": ""}
    code, lines = run_here(make_masks, "convert", source, "--images", images, "--output", tmp_path / "out")
    assert code == 2 and "is not empty" in lines[-1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", "is no JSON"),
        ("a.json", b"[" * 100_000, "is no JSON"),
        ("a.json", b'{"some": 1}', "is no GeoJSON"),
        ("a.geojson", b'{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": 3}}', "is no GeoJSON"),
        ("a.zip", b"PK", "holds no ROIs"),
        ("a.roi", b"Iout", "holds no ROIs"),
        ("a_seg.npy", b"\x93NUMPY", "damaged or no _seg.npy"),
        ("a.npy", b"junk", "damaged or no array"),
        ("a.tif", b"II*\0\x08\0", "damaged or no image file"),
        ("a.txt", b"", "holds no annotations"),
        ("other.geojson", b'{"type": "FeatureCollection", "features": []}', "has the name of an image"),
    ],
)
def test_unusable_files_end_with_one_line_and_nothing_is_written(tmp_path, images, name, content, words):
    source = folder_of(tmp_path)
    (source / name).write_bytes(content)
    code, lines = run_here(make_masks, "convert", source, "--images", images, "--output", tmp_path / "out")
    assert code == 2 and words in lines[-1] and not (tmp_path / "out").exists()


def test_a_zip_of_something_else_is_refused(tmp_path, images):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match="holds no ROIs"):
        convert(tmp_path / "a.zip", images / "a.png", tmp_path / "out", ConvertSettings())


def test_one_file_of_each_pairs_whatever_the_names(tmp_path, images):
    np.save(tmp_path / "something_seg.npy", {"masks": drawn()})
    convert(tmp_path / "something_seg.npy", images / "a.png", tmp_path / "out", ConvertSettings())
    assert np.array_equal(read_mask(tmp_path / "out" / "a.tif"), drawn())
    assert next(csv.DictReader((tmp_path / "out" / "report.csv").open()))["image"] == "a"


@pytest.mark.parametrize("file_names", [("image.png", "image.png"), ("x.png", "y.png")])
def test_labels_have_the_names_by_which_training_pairs_them(tmp_path, file_names):
    source = folder_of(tmp_path)
    for number, (name, file_name) in enumerate(zip("AB", file_names, strict=True), start=1):
        (tmp_path / "images" / name / "images").mkdir(parents=True)
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "images" / name / "images" / file_name)
        (source / f"{name}.geojson").write_text(json.dumps([feature(2, 4, 4 + number)]))
    result = convert(source, tmp_path / "images", tmp_path / "out", ConvertSettings())
    pairs = pair_files(tmp_path / "images", tmp_path / "out")
    assert [pair.name for pair in pairs] == list(result.counts) == ["A", "B"]
    assert [np.count_nonzero(read_mask(pair.mask_path)) for pair in pairs] == [25, 36]


def coco_file(folder: Path, annotations: list[dict], **image: object) -> Path:
    """A COCO file of the image a.png."""
    for one in annotations:
        one.setdefault("image_id", 1)
        one.setdefault("category_id", 1)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 52} | image],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return path


def square(left: int, side: int = 6) -> list[int]:
    return [left, 4, left + side, 4, left + side, 4 + side, left, 4 + side]


@pytest.mark.parametrize("ids", [(0, 1), (5, 5), ("a", "b"), (10**12, 10**12 + 1), (None, None)])
def test_coco_ids_that_fit_no_label_image_become_1_to_n(tmp_path, images, ids):
    annotations = [{"id": ids[0], "segmentation": [square(2)]}, {"id": ids[1], "segmentation": [square(20)]}]
    annotations = [{key: value for key, value in one.items() if value is not None} for one in annotations]
    label, _ = converted(tmp_path, images, coco_file(tmp_path, annotations))
    assert label[5, 3] == 1 and label[5, 21] == 2 and np.count_nonzero(label) == 72


def test_coco_outlines_of_two_corners_are_dropped_and_no_box_is_made_of_them(tmp_path, images):
    annotations = [
        {"id": 1, "segmentation": [[3, 3, 20, 20]]},
        {"id": 2, "segmentation": [[3, 3, 20, 20], square(30)]},
        {"id": 3, "segmentation": [[float("nan")] * 6]},
    ]
    label, result = converted(tmp_path, images, coco_file(tmp_path, annotations))
    assert np.count_nonzero(label == 2) == np.count_nonzero(label) == 36
    assert result.counts["a"].dropped == {
        "an outline of less than three corners": 1, "coordinates that no image has": 1,
    }  # fmt: skip


@pytest.mark.parametrize("image", [{"height": [40]}, {"width": {"a": 1}}, {"height": float("inf")}, {"width": "wide"}])
def test_a_size_of_coco_that_is_no_number_is_refused_in_words(tmp_path, images, image):
    path = coco_file(tmp_path, [{"id": 1, "segmentation": [square(2)]}], **image)
    with pytest.raises(InputError, match="gives a.png a height or width that is no number"):
        converted(tmp_path, images, path)


@pytest.mark.parametrize(
    ("annotations", "image", "words"),
    [
        ([{"id": 1, "image_id": 55, "segmentation": [square(2)]}], {}, "does not list: image_id 55"),
        ([{"id": 1, "segments_info": []}], {}, "panoptic"),
        ([{"id": 1, "segmentation": [square(2)], "iscrowd": 1}], {}, "no cell .* can be drawn.*1 dropped .a crowd"),
        ([{"id": 1, "keypoints": [1, 1, 2]}], {}, "no cell .* can be drawn.*box without an outline"),
        ([], {}, "no cell .* can be drawn: 1 label images; 0 cells read"),
    ],
)
def test_coco_files_without_a_usable_cell_are_refused_in_words(tmp_path, images, annotations, image, words):
    with pytest.raises(InputError, match=words):
        converted(tmp_path, images, coco_file(tmp_path, annotations, **image))
    assert not (tmp_path / "out").exists()


def test_label_images_are_written_one_by_one_and_only_all_of_them_stay(tmp_path, images, monkeypatch):
    content = {"images": [], "annotations": [], "categories": []}
    for number in range(4):
        (images / f"b{number}.png").write_bytes((images / "a.png").read_bytes())
        content["images"].append({"id": number, "file_name": f"b{number}.png"})
        content["annotations"].append({"id": number + 1, "image_id": number, "segmentation": [square(2)]})
    path, written = tmp_path / "coco.json", []
    path.write_text(json.dumps(content))

    def counted(*given):
        written.append(len(list((tmp_path / "out").rglob("*.tif"))))
        return draw_cells(*given)

    monkeypatch.setattr("dataset.annotations.convert.draw_cells", counted)
    convert(path, images, tmp_path / "out", ConvertSettings())
    assert written == [0, 1, 2, 3] and len(list((tmp_path / "out").iterdir())) == 5
    content["images"][3]["height"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="1 of 4 annotations cannot be used"):
        convert(path, images, tmp_path / "again", ConvertSettings())
    assert not (tmp_path / "again").exists()


def test_a_missing_entry_of_coco_is_named(tmp_path, images):
    path = coco_file(tmp_path, [])
    path.write_text(path.read_text().replace("file_name", "filename"))
    with pytest.raises(InputError, match="no COCO file: 'file_name' is missing"):
        convert(path, images, tmp_path / "out", ConvertSettings())


def polygon(left: float, top: float, side: float) -> dict:
    ring = [[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}


@pytest.mark.parametrize("old", [False, True])
def test_a_region_of_qupath_around_cells_is_no_cell(tmp_path, images, old):
    kinds = ["annotation", "detection", "cell", "annotation", "tile"]
    places = [(0, 0, 30), (2, 2, 5), (12, 2, 5), (40, 20, 4), (0, 0, 40)]
    features = [
        {"type": "Feature", "geometry": polygon(*place)}
        | ({"id": f"Path{kind.title()}Object"} if old else {"properties": {"objectType": kind}})
        for kind, place in zip(kinds, places, strict=True)
    ]
    source = folder_of(tmp_path)
    (source / "a.geojson").write_text(json.dumps(features), encoding="utf-16")
    label, result = converted(tmp_path, images, source)
    assert [np.count_nonzero(label == k) for k in (2, 3, 4)] == [25, 25, 16] and np.count_nonzero(label) == 66
    assert result.counts["a"].dropped == {"a region with cells in it": 1, "a tile": 1}


def test_a_collection_of_geometries_is_read(tmp_path, images):
    both = {"type": "GeometryCollection", "geometries": [polygon(2, 2, 5), polygon(20, 2, 5)]}
    source = folder_of(tmp_path)
    (source / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": both}))
    label, _ = converted(tmp_path, images, source)
    assert np.count_nonzero(label == 1) == 50


def test_a_roi_archive_may_hold_folders_and_other_files(tmp_path, images):
    roi = roifile.ImagejRoi.frompoints(np.array([[2, 2], [8, 2], [8, 8], [2, 8]], float)).tobytes()
    source = folder_of(tmp_path)
    with zipfile.ZipFile(source / "a.zip", "w") as archive:
        archive.writestr("one/0001.roi", roi)
        archive.writestr("__MACOSX/one/._0001.roi", b"notes")
        archive.writestr("readme.txt", b"hello")
    label, _ = converted(tmp_path, images, source)
    assert np.count_nonzero(label == 1) == np.count_nonzero(label) == 36
    with zipfile.ZipFile(source / "a.zip", "w") as archive:
        archive.writestr("0002.roi", roi[:40])
    with pytest.raises(InputError, match="a damaged ROI .0002.roi"):
        convert(source, images, tmp_path / "other", ConvertSettings())


def test_labelme_files_belong_to_the_image_that_they_name(tmp_path, images):
    shape = {"label": "cell", "points": [[2, 2], [8, 2], [8, 8]], "shape_type": "polygon"}
    source = folder_of(tmp_path)
    (source / "task 7.json").write_text(json.dumps({"shapes": [shape], "imagePath": "..\\photos\\a.png"}))
    label, _ = converted(tmp_path, images, source)
    assert np.count_nonzero(label == 1)
    (source / "task 7.json").rename(source / "b.json")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / "b.png")
    with pytest.raises(InputError, match="its image is .*a.png, and there is b.png, too"):
        convert(source, images, tmp_path / "other", ConvertSettings())


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.npy", lambda path: np.save(path, drawn()), "is a flat label image already"),
        ("a.tif", lambda path: tifffile.imwrite(path, drawn().astype(np.uint16)), "is a gray mask already"),
        ("a.mat", lambda path: path.write_bytes(b"MATLAB"), "holds no annotations but 1 .mat"),
        ("via.json", lambda path: path.write_text('{"a.png9": {"regions": []}}'), "of VIA, which exports COCO"),
        ("a.zip", lambda path: zipfile.ZipFile(path, "w").close(), "holds no ROIs"),
    ],
)
def test_what_needs_no_conversion_or_another_program_is_said(tmp_path, images, name, write, words):
    source = folder_of(tmp_path)
    write(source / name)
    with pytest.raises(InputError, match=words):
        convert(source, images, tmp_path / "out", ConvertSettings())


@pytest.mark.parametrize("dtype", [np.float64, np.uint64])
def test_cells_of_labels_of_any_type_are_exported_with_whole_ids(dtype):
    rule = MaskRule("instances", 2, 1.0, "")
    cells = instances_of(drawn().astype(dtype), rule)
    assert cells.dtype.kind in "ui" and np.array_equal(cells, drawn())


# ----------------------------------------------------------------------------------- odd members of every kind of file


def roi(left: float, top: float, side: float = 6, **given) -> roifile.ImagejRoi:
    corners = np.array([[left, top], [left + side, top], [left + side, top + side], [left, top + side]], float)
    return roifile.ImagejRoi.frompoints(corners, **given)


def written(folder: Path, content: object, name: str = "a.geojson") -> Path:
    """A folder with one JSON file."""
    (folder / name).write_text(json.dumps(content))
    return folder


def feature(left: float, top: float, side: float, **properties: object) -> dict:
    return {"type": "Feature", "geometry": polygon(left, top, side), "properties": properties}


def test_annotations_beside_their_images_are_read_and_the_images_are_none(tmp_path, images):
    np.save(images / "a_seg.npy", {"masks": drawn()})
    Image.fromarray(drawn()).save(images / "a_cp_masks.png")
    label, result = converted(tmp_path, images, images)
    assert np.array_equal(label, drawn()) and not result.without and not result.lonely
    (images / "a_seg.npy").unlink()
    (images / "a_cp_masks.png").unlink()
    shape = {"label": "cell", "points": [[2, 2], [8, 2], [8, 8], [2, 8]]}
    written(images, {"shapes": [shape], "imagePath": "a.png"}, "a.json")
    convert(images, images, tmp_path / "labelme", ConvertSettings())
    assert np.count_nonzero(read_mask(tmp_path / "labelme" / "a.tif")) == 36
    source = folder_of(tmp_path)
    for file in images.iterdir():
        (source / file.name).write_bytes(file.read_bytes())  # copies of the images beside the annotations
    convert(source, images, tmp_path / "copies", ConvertSettings())
    assert np.count_nonzero(read_mask(tmp_path / "copies" / "a.tif")) == 36


def test_texts_and_pictures_of_an_overlay_are_no_cells(tmp_path, images):
    source = folder_of(tmp_path)
    box = {"roitype": roifile.ROI_TYPE.RECT, "left": 30, "top": 20, "right": 45, "bottom": 30}
    overlay = [
        roifile.ImagejRoi(subtype=getattr(roifile.ROI_SUBTYPE, one), name=one, **box) for one in ("TEXT", "IMAGE")
    ]
    roifile.roiwrite(source / "a.zip", [roi(2, 2, name="cell"), *overlay])
    label, result = converted(tmp_path, images, source)
    assert np.count_nonzero(label == 1) == np.count_nonzero(label) == 36
    assert result.counts["a"].dropped == {"a picture": 1, "a text": 1}


@pytest.mark.parametrize("names", [("001", "1"), ("20231124123059", "20231124123100"), ("0", "1"), ("7", "a/b")])
def test_names_that_are_no_ids_number_the_rois(tmp_path, images, names):
    source = folder_of(tmp_path)
    roifile.roiwrite(source / "a.zip", [roi(2, 2, name=names[0]), roi(20, 2, name=names[1])])
    written(source, [feature(2, 2, 6, name=names[0]), feature(20, 2, 6, name=names[1])], "b.geojson")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / "b.png")
    label, _ = converted(tmp_path, images, source)
    assert label[4, 4] == 1 and label[4, 22] == 2 and np.count_nonzero(label) == 72
    assert np.array_equal(read_mask(tmp_path / "out" / "b.tif"), label)


def test_groups_of_rois_are_classes_and_rois_of_all_slices_go_with_those_of_one(tmp_path, images):
    source = folder_of(tmp_path)
    rois = [roi(2, 2, name="x"), roi(20, 2, name="y", position=0)]
    rois[0].group, rois[1].group = 3, 1
    roifile.roiwrite(source / "a.zip", rois)
    label, _ = converted(tmp_path, images, source, kind="classes", classes=["group 1", "group 3"])
    assert label[4, 4] == 2 and label[4, 22] == 1
    (source / "a.zip").unlink()
    roifile.roiwrite(source / "a.zip", [roi(2, 2, name="x", c=0), roi(20, 2, name="y", c=1)])
    with pytest.raises(InputError, match="ROIs of 2 channels: save those of one channel"):
        convert(source, images, tmp_path / "other", ConvertSettings())


def test_an_archive_without_rois_is_an_image_without_cells(tmp_path, images):
    source = folder_of(tmp_path)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / "b.png")
    roifile.roiwrite(source / "a.zip", [roi(2, 2, name="4")])
    zipfile.ZipFile(source / "b.zip", "w").close()
    converted(tmp_path, images, source)
    assert not read_mask(tmp_path / "out" / "b.tif").any()


def shape_roi(path: list[float]) -> roifile.ImagejRoi:
    """A shape of ImageJ, whose path has numbers for each segment: its kind, then its points."""
    return roifile.ImagejRoi(
        roitype=roifile.ROI_TYPE.RECT, name="7", left=0, top=0, right=30, bottom=30, shape_roi_size=len(path),
        multi_coordinates=np.array(path, np.float32),
    )  # fmt: skip


def test_curves_of_a_shape_are_drawn(tmp_path, images):
    k = 9 * 0.5523  # control points of four curves that make a circle of radius 9 around (20, 20)
    circle = [0, 29, 20, 3, 29, 20 + k, 20 + k, 29, 20, 29, 3, 20 - k, 29, 11, 20 + k, 11, 20]
    circle += [3, 11, 20 - k, 20 - k, 11, 20, 11, 3, 20 + k, 11, 29, 20 - k, 29, 20, 4]
    parabola = [0, 32, 2, 2, 42, 2, 42, 12, 1, 32, 12, 4]
    source = folder_of(tmp_path)
    roifile.roiwrite(source / "a.zip", [shape_roi([*circle, *parabola])])
    label, _ = converted(tmp_path, images, source)
    rows, columns = np.indices(SIZE) + 0.5
    inside = (rows - 20) ** 2 + (columns - 20) ** 2
    assert (label[inside < 8.7**2] == 7).all() and not label[:, :32][inside[:, :32] > 9.3**2].any()
    assert abs(np.count_nonzero(label[:, 32:]) - (50 + 100 / 3)) < 4  # a triangle, and the segment of a parabola


def test_a_shape_of_unknown_segments_is_refused(tmp_path, images):
    source = folder_of(tmp_path)
    roifile.roiwrite(source / "a.zip", [shape_roi([0, 2, 2, 9, 12, 12])])
    with pytest.raises(InputError, match="segment of the kind 9"):
        converted(tmp_path, images, source)


@pytest.mark.parametrize("offset", [0, 40_000, 60_534, 70_000])
def test_outlines_far_from_the_corner_keep_their_place(offset):
    ring = outlines(np.ones((3, 4), bool))[0][0] + (offset, 0)
    again = roifile.ImagejRoi.frombytes(roi_of([ring], "1").tobytes())
    rings = [again.coordinates()] if again.multi_coordinates is None else again.coordinates(multi=True)
    assert {tuple(point) for point in np.asarray(rings[0]).tolist()} == {tuple(point) for point in ring.tolist()}


def test_spots_in_the_cells_of_qupath_are_no_cells_and_nuclei_are_mentioned(tmp_path, images):
    def feature(kind: str, place: tuple[int, int, int], name: str = "") -> dict:
        properties = {"objectType": kind} | ({"classification": {"name": name}} if name else {})
        return {"type": "Feature", "geometry": polygon(*place), "properties": properties}

    cell = feature("cell", (2, 2, 10)) | {"nucleusGeometry": polygon(4, 4, 4)}
    features = [cell, feature("detection", (5, 5, 2)), feature("detection", (30, 5, 4))]
    features.append(feature("detection", (40, 20, 2), "Subcellular spot: Channel 2 object"))
    source = written(folder_of(tmp_path), features)
    label, result = converted(tmp_path, images, source)
    assert [np.count_nonzero(label == number) for number in (1, 2, 3, 4)] == [100, 0, 16, 0]
    assert result.counts["a"].dropped == {"a spot in a cell": 2}
    assert any("1 cells have an outline of their nucleus" in line for line in result.lines())


@pytest.mark.parametrize("start", [2.5, 3.0])
def test_cells_that_share_an_edge_share_no_pixel(tmp_path, images, start):
    source = written(folder_of(tmp_path), [feature(start + 6 * k % 12, start + 6 * (k // 2), 6) for k in range(4)])
    label, result = converted(tmp_path, images, source)
    assert [np.count_nonzero(label == k) for k in (1, 2, 3, 4)] == [36] * 4 and not result.counts["a"].overlapping


def test_outlines_of_a_whole_slide_take_no_more_memory_than_the_image(tmp_path, images):
    far = {"type": "MultiPolygon", "coordinates": [polygon(9, 9, 4)["coordinates"], polygon(9e5, 2, 5)["coordinates"]]}
    source = written(
        folder_of(tmp_path),
        [feature(-6e5, -6e5, 9e6), {"type": "Feature", "geometry": far, "properties": {}}, feature(7e6, 7e6, 9)],
    )
    label, result = converted(tmp_path, images, source)
    assert (label == 2).sum() == 16 and (label == 1).sum() == label.size - 16
    assert result.counts["a"].outside == 3 and result.counts["a"].dropped == {"outside of the image": 1}
    roifile.roiwrite(source / "a.zip", [roifile.ImagejRoi(
        roitype=roifile.ROI_TYPE.OVAL, name="1", left=-4000, top=-4000, right=4000, bottom=4000)])  # fmt: skip
    (source / "a.geojson").unlink()
    convert(source, images, tmp_path / "oval", ConvertSettings())
    assert read_mask(tmp_path / "oval" / "a.tif").all()


def test_classes_that_qupath_ignores_and_cores_of_microarrays_are_no_cells(tmp_path, images):
    names = [{"name": "Region*", "colorRGB": -1}, {"name": "Ignore*"}, {"name": "Tumor"}]
    features = [feature(2 + 10 * k, 2, 6, classification=one) for k, one in enumerate(names)]
    source = written(folder_of(tmp_path), [*features, feature(0, 0, 38, objectType="tma_core")])
    label, result = converted(tmp_path, images, source)
    assert set(np.unique(label)) == {0, 3} and len(result.counts["a"].dropped) == 3


def test_a_cell_around_several_others_is_pointed_out(tmp_path, images):
    source = written(folder_of(tmp_path), [feature(0, 0, 40), *(feature(2 + 9 * k, 2, 5) for k in range(4))])
    _, result = converted(tmp_path, images, source)
    assert any("region of interest" in line for line in result.lines())
    written(source, [feature(0, 0, 20), feature(2, 2, 5), feature(10, 2, 5)])  # a cell, its nucleus and a vacuole
    result = convert(source, images, tmp_path / "other", ConvertSettings())
    assert not any("region of interest" in line for line in result.lines())


def test_a_class_that_no_cell_has_is_named_with_those_that_there_are(tmp_path, images):
    source = written(
        folder_of(tmp_path), [feature(2, 2, 6, classification="Tumor"), feature(20, 2, 6, classification="Immune")]
    )
    _, result = converted(tmp_path, images, source, kind="classes", classes=["Tumor", "Imune"])
    assert "no cell has the class Imune: the files hold Immune, Tumor" in result.lines()
    for names, words in (
        (["tumour"], "no cell .* the files hold the classes Immune, Tumor"),
        (["A", "A"], "given twice"),
    ):
        with pytest.raises(InputError, match=words):
            convert(source, images, tmp_path / "other", ConvertSettings("auto", "classes", names))


def test_ids_of_coco_may_be_text_and_names_may_be_of_a_mac(tmp_path, images):
    (images / "a.png").rename(images / "Zölle.png")
    path = coco_file(
        tmp_path, [{"segmentation": square(2)}, {"segmentation": [square(20)]}], file_name="Zo\u0308lle.JPG"
    )
    content = json.loads(path.read_text())
    content["annotations"][0]["image_id"], content["annotations"][1]["image_id"] = "1", 1.0
    content["images"][0] |= {"height": "40", "width": None}
    content["annotations"][0]["iscrowd"] = "0"
    path.write_text(json.dumps(content))
    convert(path, images, tmp_path / "out", ConvertSettings())
    assert np.count_nonzero(read_mask(tmp_path / "out" / "Zölle.tif")) == 72


@pytest.mark.parametrize(
    "counts", [[5, 10], [5, 10, 10**7], [-5, 10, 2075], "5 10 2065", "o" * 22, "P" * 2000, "short"],
)  # fmt: skip
def test_run_lengths_that_do_not_fill_the_image_are_refused(tmp_path, images, counts):
    from pycocotools import mask as rle

    whole = rle.encode(np.asfortranarray((drawn() == 9).astype(np.uint8)))["counts"].decode()
    counts = whole[:-3] if counts == "short" else counts
    path = coco_file(tmp_path, [{"id": 1, "segmentation": {"size": list(SIZE), "counts": counts}}])
    with pytest.raises(InputError, match="an outline of a.png that cannot be read"):
        convert(path, images, tmp_path / "out", ConvertSettings())


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_run_lengths_are_those_of_pycocotools(runs):
    from pycocotools import mask as rle

    pixels = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)
    pixels = np.append(pixels, np.uint8(0)).reshape(1, -1)
    code = rle.encode(np.asfortranarray(pixels))
    found = coco._filled({"size": list(pixels.shape), "counts": code["counts"].decode()}, pixels.shape)
    assert np.array_equal(found, pixels.astype(bool))


def test_coco_counts_what_reaches_beyond_the_image_and_refuses_names_that_are_alike(tmp_path, images):
    annotations = [{"id": k + 1, "segmentation": [square(left)]} for k, left in enumerate((48, -20, 20))]
    label, result = converted(tmp_path, images, coco_file(tmp_path, annotations))
    assert (label == 1).sum() == 24 and result.counts["a"].outside == 2
    assert result.counts["a"].dropped == {"outside of the image": 1}
    path = coco_file(tmp_path, [])
    content = json.loads(path.read_text())
    for other, words in (
        ({"id": 2, "file_name": "a.tif"}, "two images alike"),
        ({"id": 1, "file_name": "b.png"}, "one id"),
    ):
        path.write_text(json.dumps(content | {"images": [*content["images"], other]}))
        with pytest.raises(InputError, match=words):
            convert(path, images, tmp_path / "other", ConvertSettings())


def test_broken_shapes_of_labelme_are_dropped_or_refused_before_they_fill_the_memory(tmp_path, images):
    bomb = io.BytesIO()
    Image.fromarray(np.zeros((3000, 3000), np.uint8)).save(bomb, format="PNG")
    good = {"label": "cell", "points": [[2, 2], [8, 2], [8, 8], [2, 8]], "shape_type": None}
    shapes = [
        {"label": "cell", "points": [[1, 1]], "shape_type": "circle"},
        {"label": "cell", "points": [], "shape_type": "polygon"},
        {"label": "cell", "points": [[float("nan"), 2], [3, 3], [2, 5]]},
        good,
    ]
    source = written(folder_of(tmp_path), {"shapes": shapes, "imageHeight": "40", "imageWidth": None}, "a.json")
    label, result = converted(tmp_path, images, source)
    assert np.count_nonzero(label == 4) == np.count_nonzero(label) == 36 and len(result.counts["a"].dropped) == 3
    painted = {
        "label": "cell",
        "points": [[2, 2]],
        "shape_type": "mask",
        "mask": base64.b64encode(bomb.getvalue()).decode(),
    }
    written(source, {"shapes": [painted]}, "a.json")
    with pytest.raises(InputError, match="a mask of 3000 x 3000 pixels"):
        convert(source, images, tmp_path / "other", ConvertSettings())


def picture(labels: np.ndarray, background: int = 0) -> Image.Image:
    """Each id in a colour of its own."""
    table = np.stack([(np.arange(400) * k + 90) % 255 + 1 for k in (37, 91, 151)], axis=1).astype(np.uint8)
    table[0] = background
    return Image.fromarray(table[labels])


def test_pictures_in_which_colours_are_no_cells_are_refused(tmp_path, images):
    source = folder_of(tmp_path)
    picture(drawn(), background=255).save(source / "a.png")
    with pytest.raises(InputError, match="no black, and ffffff covers most of it"):
        converted(tmp_path, images, source, class_colours=["cells"])
    picture(drawn()).resize((416, 320), Image.Resampling.NEAREST).resize(
        (52, 40), Image.Resampling.LANCZOS, (1, 1, 410, 310)
    ).save(source / "a.png")
    with pytest.raises(InputError, match="most of them in a few pixels.*antialiasing"):
        converted(tmp_path, images, source, class_colours=["cells"])
    with pytest.raises(InputError, match="000000 is given twice"):
        converted(tmp_path, images, source, class_colours=["000000", "000000"])
    table = Image.fromarray(np.pad(drawn() % 7, 3).astype(np.uint8), "P")
    table.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 8, 8, 8, 1, 2, 3])
    table.save(source / "a.png")
    with pytest.raises(InputError, match="58 x 46 pixels, but its image 52 x 40"):
        converted(tmp_path, images, source)


def pages_of_cells() -> np.ndarray:
    pages = np.zeros((3, *SIZE), np.uint8)
    for number in range(3):
        pages[number, 2:8, 2 + 8 * number : 8 + 8 * number] = 255
    return pages


def test_stacks_in_every_file_and_what_is_none(tmp_path, images):
    source = folder_of(tmp_path)
    pages = pages_of_cells()
    ways = {
        "a.npz": lambda path: np.savez_compressed(path, pages),
        "a.tif": lambda path: tifffile.imwrite(path, pages, imagej=True, truncate=True),
        "a.npy": lambda path: np.save(path, pages > 0),
    }
    for name, write in ways.items():
        write(source / name)
        convert(source, images, tmp_path / f"out of {name}", ConvertSettings())
        label = read_mask(tmp_path / f"out of {name}" / "a.tif")
        assert [np.count_nonzero(label == k) for k in (1, 2, 3)] == [36] * 3
        (source / name).unlink()
    refused = {
        "mostly cell": 255 - pages,
        "the type complex128": pages.astype(complex),
        "the type <U3": pages.astype(str),
        "Python objects": pages.astype(object),
        "its cells must be the first axis": pages.transpose(1, 2, 0),
    }
    for words, array in refused.items():
        np.save(source / "a.npy", array)
        with pytest.raises(InputError, match=words):
            converted(tmp_path, images, source)


@pytest.mark.parametrize("count", [1, 3])
def test_the_format_of_a_tiff_that_lost_or_changed_any_byte_is_known(tmp_path, count):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pages_of_cells()[:count], photometric="minisblack")
    content = path.read_bytes()
    damaged = [content[:end] for end in range(1, 400)]
    damaged += [content[:place] + bytes([value]) + content[place + 1 :] for place in range(250) for value in (0, 255)]
    for one in damaged:
        path.write_bytes(one)
        assert format_of(path, among_stacks=True) in ("pages", "colours")


def test_a_flat_tiff_among_stacks_is_one_cell(tmp_path, images):
    for name in "bc":
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / f"{name}.png")
    source, pages = folder_of(tmp_path), pages_of_cells()
    tifffile.imwrite(source / "a.tif", pages, photometric="minisblack")
    tifffile.imwrite(source / "b.tif", pages[0])
    tifffile.imwrite(source / "c.tif", pages[0] * 0)
    label, result = converted(tmp_path, images, source)
    assert set(np.unique(label)) == {0, 1, 2, 3}
    one = read_mask(tmp_path / "out" / "b.tif")
    assert np.array_equal(one == 1, pages[0] > 0) and one.max() == 1
    assert result.counts["c"].dropped == {"an empty page": 1}
    (source / "a.tif").unlink()
    with pytest.raises(InputError, match="b.tif: is a gray mask already"):
        convert(source, images, tmp_path / "alone", ConvertSettings())


def planes_of_classes(background: int, count: int = 3) -> np.ndarray:
    """(N, H, W, 4): ids of three classes, and the background in the given plane."""
    planes = np.zeros((count, *SIZE, 4), np.int32)
    places = [place for place in range(4) if place != background]
    for number, place in enumerate(places):
        planes[:, 2:9, 3 + 12 * number : 9 + 12 * number, place] = 5 + number
        planes[:, 20:26, 3 + 12 * number : 9 + 12 * number, place] = 15 + number
    planes[..., background] = ~planes.any(axis=3)
    return planes


@pytest.mark.parametrize("background", [0, 3])
def test_the_background_of_planes_may_be_the_first_or_the_last(tmp_path, images, background):
    for name in "bcd":
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / f"{name}.png")
    planes = planes_of_classes(background, 4)
    planes[1, 0, :5, background] = 0  # a few pixels of no plane
    planes[2], planes[3] = 0, 0
    planes[3, ..., background] = 1
    np.save(tmp_path / "masks.npy", planes)
    convert(tmp_path / "masks.npy", images, tmp_path / "out", ConvertSettings())
    for name, ids in {"a": 7, "b": 7, "c": 1, "d": 1}.items():
        assert len(np.unique(read_mask(tmp_path / "out" / f"{name}.tif"))) == ids


@pytest.mark.parametrize("background", [None, 2])
def test_cells_that_leave_no_background_are_kept(tmp_path, images, background):
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / "b.png")
    planes = np.zeros((2, *SIZE, 2 if background is None else 3), np.int32)
    planes[0, 2:9, 3:9, 0], planes[0, 12:20, 5:14, 1] = 4, 5
    planes[1, ..., 0] = 1 + np.arange(SIZE[1]) // 18  # ids 1, 2, 3 fill the image
    if background is not None:
        planes[..., background] = ~planes.any(axis=3)
    np.save(tmp_path / "masks.npy", planes)
    result = convert(tmp_path / "masks.npy", images, tmp_path / "out", ConvertSettings())
    assert np.array_equal(read_mask(tmp_path / "out" / "b.tif"), planes[1, ..., 0])
    assert (result.counts["a"].written, result.counts["b"].written) == (2, 3)


@pytest.mark.parametrize("order", [1, -1])
def test_planes_of_ids_and_classes_are_told_from_planes_of_ids(tmp_path, images, order):
    planes = np.stack([drawn().astype(np.int32), np.where(drawn() > 0, 1 + drawn() % 3, 0)][::order], axis=2)[None]
    np.save(tmp_path / "labels.npy", planes)
    label, _ = converted(tmp_path, images, tmp_path / "labels.npy")
    assert np.array_equal(label, drawn())
    given = ConvertSettings(kind="classes", classes=["class 1", "class 2", "class 3"])
    convert(tmp_path / "labels.npy", images, tmp_path / "classes", given)
    assert np.array_equal(read_mask(tmp_path / "classes" / "a.tif"), np.where(drawn() > 0, 1 + drawn() % 3, 0))


def test_planes_whose_meaning_is_unclear_are_refused(tmp_path, images):
    (images / "a.png").rename(images / "im2.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / "im10.png")
    np.save(tmp_path / "masks.npy", planes_of_classes(3, 2))
    with pytest.raises(InputError, match="im10, im2 by letters, im2, im10 by numbers"):
        convert(tmp_path / "masks.npy", images, tmp_path / "out", ConvertSettings())
    (images / "im10.png").unlink()
    cell = drawn()[None, ..., None] > 0
    wrong = {
        "can both be the background": np.concatenate([cell, ~cell], axis=3).astype(np.uint8),
        "fractions, negative or very large": np.where(planes_of_classes(3, 1) == 5, np.inf, planes_of_classes(3, 1)),
        "its classes must be the last axis": planes_of_classes(3, 1).transpose(0, 3, 1, 2),
    }
    for words, array in wrong.items():
        np.save(tmp_path / "masks.npy", array)
        with pytest.raises(InputError, match=words):
            convert(tmp_path / "masks.npy", images, tmp_path / "out", ConvertSettings())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xml", "<?xml version='1.0'?>", "export COCO from CVAT"),
        ("shapes.csv", "index,shape-type", "in napari a labels layer"),
        ("a.geojson.gz", "x", "unpack it"),
        ("a.json", '{"objects": [], "size": {}}', "of Supervisely"),
        ("a.json", '{"nuc": {}}', "of HoVer-Net"),
        ("a.json", '{"_via_img_metadata": {}}', "of VIA"),
        ("a.json", '[{"data": {}, "annotations": []}]', "of Label Studio"),
        ("a.json", "null", "no GeoJSON"),
    ],
)
def test_files_of_other_programs_are_refused_with_what_to_do(tmp_path, images, name, content, words):
    source = folder_of(tmp_path)
    (source / name).write_text(content)
    for place in (source, source / name):
        with pytest.raises(InputError, match=words):
            convert(place, images, tmp_path / "out", ConvertSettings())


def test_a_format_that_is_given_takes_its_own_files_only(tmp_path, images):
    source = written(folder_of(tmp_path), [feature(2, 2, 6)])
    np.save(source / "a_seg.npy", {"masks": drawn()})
    label, _ = converted(tmp_path, images, source, format_name="qupath")
    assert np.count_nonzero(label) == 36
    with pytest.raises(InputError, match="no annotations of the format imagej"):
        convert(source, images, tmp_path / "other", ConvertSettings("imagej"))
    with pytest.raises(InputError, match="two annotations of a"):
        convert(source, images, tmp_path / "other", ConvertSettings())


@pytest.mark.parametrize("name", ["a_nuclei", "a_Nuclei_annotations", "a.png", "Mask of a"])
def test_annotations_may_have_the_words_that_masks_have(tmp_path, images, name):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{name}.geojson").write_text(json.dumps([feature(2, 4, 6)]))
    label, result = converted(tmp_path, images, tmp_path / "cells")
    assert np.count_nonzero(label) == 36 and not result.lonely


def test_of_two_images_the_exact_name_has_the_annotations(tmp_path, images):
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(images / "a_img.png")
    label, result = converted(tmp_path, images, written(folder_of(tmp_path), [feature(2, 4, 6)]))
    assert np.count_nonzero(label) == 36 and result.without == ["a_img"]


def test_two_annotations_that_reach_one_image_are_refused(tmp_path, images):
    (images / "a.png").rename(images / "a_img.png")
    source = written(folder_of(tmp_path), [feature(2, 4, 6)])
    (source / "a_img.geojson").write_text(json.dumps([feature(2, 4, 6), feature(20, 4, 6)]))
    with pytest.raises(InputError, match="annotations a and a_img are both of the image a_img: keep one"):
        convert(source, images, tmp_path / "out", ConvertSettings())


def test_names_with_the_ending_of_annotations_pair_too(tmp_path, images):
    (images / "a.png").rename(images / "well_rois.png")
    source = folder_of(tmp_path)
    roifile.roiwrite(source / "well_rois.zip", [roi(2, 2, name="4")])
    convert(source, images, tmp_path / "out", ConvertSettings())
    assert (read_mask(tmp_path / "out" / "well_rois.tif") == 4).sum() == 36
    (source / "well_rois.zip").unlink()
    roi(2, 2, name="4").tofile(source / "0001-0002.roi")
    with pytest.raises(InputError, match="zip them as NAME.zip"):
        convert(source, images, tmp_path / "other", ConvertSettings())


def test_a_set_with_odd_cells_comes_back_from_every_export(tmp_path):
    odd = {"leer µ": drawn() * 0, "voll": drawn() * 0 + 7, "all": np.arange(1, drawn().size + 1).reshape(SIZE)}
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for name, label in odd.items():
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "set" / "images" / f"{name}.png")
        Image.fromarray(label.astype(np.uint16)).save(tmp_path / "set" / "masks" / f"{name}.png")
    paths = sorted((tmp_path / "set" / "images").iterdir())
    for layout, part in (("roi", "rois"), ("geojson", "annotations"), ("coco", "annotations.json")):
        folder = export_set(tmp_path / "set", paths, MaskRule("instances", 2, 1, ""), layout)
        convert(folder / part, folder / "images", tmp_path / layout, ConvertSettings())
        for name, label in odd.items():
            assert np.array_equal(read_mask(tmp_path / layout / f"{name}.tif"), label)
