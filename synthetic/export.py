"""Export a synthetic set to Cellpose, StarDist, COCO, Fiji and QuPath. The files lie in the folder of the set:

    SAMPLE_DIR/cellpose/NAME_img.tif, NAME_masks.tif       uint16 ids, 0 background
    SAMPLE_DIR/stardist/images/NAME.tif, masks/NAME.tif    the same
    SAMPLE_DIR/coco/annotations.json, images/NAME.png      one run-length-encoded annotation per cell
    SAMPLE_DIR/roi/images/NAME.png, rois/NAME.zip          ROIs of ImageJ and Fiji, named by the ids
    SAMPLE_DIR/geojson/images/NAME.png, annotations/NAME.geojson    objects of QuPath, named by the ids

The outlines of ROIs and objects run along pixel edges. So they enclose the same pixels as the label.

An image of several channels that is not RGB becomes a TIFF with one plane per channel (axes CYX). StarDist expects
channels last, and gets them.

Instance labels keep their ids. If an id is above 65,535, the cells of this label are numbered from 1, because a label
image has 16 bits. COCO keeps every id in "instance_id". In binary and class masks, each connected region of a class is
one cell.
"""

from __future__ import annotations

import io
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from common.cells import as_ids, connected_cells, without_gaps
from common.disk import write_bytes, write_json
from common.errors import InputError
from dataset.annotations.outlines import outlines
from dataset.files import encode_tiff, read_image_and_kind, read_mask
from dataset.masks import MaskRule
from synthetic.manifest import label_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedPair:
    """A pair as a segmenter sees it.

    Attributes:
        name: without suffix.
        image_path: the image in the set.
        image: (H, W, C) as it lies there.
        colours: whether three channels are RGB.
        instance_map: (H, W) integers, 0 background; ids of the label as they are.
        class_map: (H, W) uint8, 0 background.
    """

    name: str
    image_path: Path
    image: np.ndarray
    colours: bool
    instance_map: np.ndarray
    class_map: np.ndarray


def check_export(formats: Sequence[str], rule: MaskRule) -> None:
    """Raise InputError if the masks have no cells with outlines."""
    if formats and not rule.is_hard:
        raise InputError(
            f"`export` {formats[0]}: {rule.mask_type} masks have no cells with outlines; leave `export` out."
        )


def export_set(sample_dir: Path, images: Sequence[Path], rule: MaskRule, format_name: str) -> Path:
    """Write the set in another layout. Existing files are replaced.

    Args:
        sample_dir: a complete set of sample_ddp.py.
        images: images of the set. A label has the name of its image.
        rule: what the labels hold.
        format_name: key of ``EXPORTS``.

    Returns:
        The folder of the export.
    """
    folder = sample_dir / format_name
    folder.mkdir(exist_ok=True)
    EXPORTS[format_name](folder, _pairs(sample_dir, images, rule))
    return folder


def instances_of(label: np.ndarray, rule: MaskRule) -> np.ndarray:
    """(H, W) instance map of a label: its own ids, or a new id for each connected region of a class."""
    if rule.mask_type == "instances":
        return as_ids(label)
    cells, classes = np.zeros(label.shape, dtype=np.int64), rule.class_map(label)
    for number in range(1, rule.num_classes):
        regions = connected_cells(classes == number)
        cells = np.where(regions > 0, regions + cells.max(), cells)
    return cells


def label_image(pair: ExportedPair) -> np.ndarray:
    """(H, W) uint16 ids of the cells. They are numbered from 1 if an id needs more than 16 bits.

    Raises:
        InputError: more than 65,535 cells.
    """
    cells, most = pair.instance_map, np.iinfo(np.uint16).max
    if cells.max(initial=0) > most:
        cells = without_gaps(cells)
        logger.info("%s: some ids are above %d, so its cells are numbered from 1", pair.name, most)
    if cells.max(initial=0) > most:
        raise InputError(
            f"{pair.name}: {cells.max()} cells, and a label image of 16 bits holds at most {most}. Export coco, roi or "
            "geojson, which have no such limit, or cut the image into tiles."
        )
    return cells.astype(np.uint16)


def _pairs(sample_dir: Path, images: Sequence[Path], rule: MaskRule) -> Iterator[ExportedPair]:
    for image in images:
        label = read_mask(label_path(sample_dir, image.stem))
        classes = label > 0 if rule.mask_type == "instances" else rule.class_map(label)  # not interior and boundary
        pixels, has_channels = read_image_and_kind(image)
        cells, classes = instances_of(label, rule), classes.astype(np.uint8)
        yield ExportedPair(image.stem, image, pixels, not has_channels, cells, classes)


def _write_tiff(path: Path, array: np.ndarray, planes: bool = True, colours: bool = True) -> None:
    write_bytes(path, encode_tiff(array, planes, colours))


def _cellpose(folder: Path, pairs: Iterator[ExportedPair]) -> None:
    for pair in pairs:
        _write_tiff(folder / f"{pair.name}_img.tif", pair.image, colours=pair.colours)
        _write_tiff(folder / f"{pair.name}_masks.tif", label_image(pair))


def _stardist(folder: Path, pairs: Iterator[ExportedPair]) -> None:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    for pair in pairs:
        _write_tiff(folder / "images" / f"{pair.name}.tif", pair.image, planes=False, colours=pair.colours)
        _write_tiff(folder / "masks" / f"{pair.name}.tif", label_image(pair))


def _coco(folder: Path, pairs: Iterator[ExportedPair]) -> None:
    from pycocotools import mask as rle

    (folder / "images").mkdir(exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    categories: set[int] = set()
    for number, pair in enumerate(pairs, start=1):
        shutil.copyfile(pair.image_path, folder / "images" / pair.image_path.name)
        height, width = pair.instance_map.shape
        images.append({"id": number, "file_name": pair.image_path.name, "height": height, "width": width})
        for cell, place, region in _regions(pair):
            whole = np.zeros((height, width), np.uint8, order="F")
            whole[place] = region
            code = rle.encode(whole)
            category = int(np.bincount(pair.class_map[place][region]).argmax())
            categories.add(category)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "instance_id": cell,
                    "segmentation": {"size": [height, width], "counts": code["counts"].decode()},
                    "area": int(region.sum()),
                    "bbox": rle.toBbox(code).tolist(),
                    "iscrowd": 0,
                }
            )
    named = [{"id": number, "name": class_name(number)} for number in sorted(categories | {1})]
    write_json(folder / "annotations.json", {"images": images, "annotations": annotations, "categories": named})


def class_name(number: int) -> str:
    """Name of a class, from 1."""
    return "cell" if number == 1 else f"class {number}"


def _regions(pair: ExportedPair) -> Iterator[tuple[int, tuple[slice, slice], np.ndarray]]:
    """Id of every cell, the rectangle around it, and its pixels in there."""
    cells = without_gaps(pair.instance_map)
    numbers = np.unique(pair.instance_map[pair.instance_map > 0]).tolist()
    for index, (number, place) in enumerate(zip(numbers, ndimage.find_objects(cells), strict=True), start=1):
        yield number, place, cells[place] == index


def _cells(pair: ExportedPair) -> Iterator[tuple[int, str, list[list[np.ndarray]]]]:
    """Id, class name and outlines of every cell. Points (x, y) are pixel corners of the whole image."""
    for number, place, region in _regions(pair):
        name = class_name(int(np.bincount(pair.class_map[place][region]).argmax()))
        offset = (place[1].start, place[0].start)
        yield number, name, [[ring + offset for ring in polygon] for polygon in outlines(region)]


def _copy_image(folder: Path, pair: ExportedPair, beside: str) -> Path:
    """Copy the image into the export. Returns the folder ``beside`` the images, for annotations."""
    for name in ("images", beside):
        (folder / name).mkdir(exist_ok=True)
    shutil.copyfile(pair.image_path, folder / "images" / pair.image_path.name)
    return folder / beside


def _roi(folder: Path, pairs: Iterator[ExportedPair]) -> None:
    from dataset.annotations.imagej import roi_of

    for pair in pairs:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, _, polygons in _cells(pair):
                entry = zipfile.ZipInfo(f"{number}.roi")  # has a fixed time, so the same set gives the same bytes
                archive.writestr(entry, roi_of([ring for rings in polygons for ring in rings], str(number)).tobytes())
        path = _copy_image(folder, pair, "rois") / f"{pair.name}.zip"
        write_bytes(path, content.getvalue())


def _geojson(folder: Path, pairs: Iterator[ExportedPair]) -> None:
    for pair in pairs:
        features = []
        for number, name, polygons in _cells(pair):
            closed = [[[*ring.tolist(), ring[0].tolist()] for ring in rings] for rings in polygons]
            single = len(closed) == 1
            features.append(
                {
                    "type": "Feature",
                    "geometry": {
                        "type": "Polygon" if single else "MultiPolygon",
                        "coordinates": closed[0] if single else closed,
                    },
                    "properties": {
                        "objectType": "annotation",
                        "name": str(number),
                        "classification": {"name": name},
                    },
                }
            )
        path = _copy_image(folder, pair, "annotations") / f"{pair.name}.geojson"
        write_json(path, {"type": "FeatureCollection", "features": features})


EXPORTS: dict[str, Callable[[Path, Iterator[ExportedPair]], None]] = {
    "cellpose": _cellpose,
    "stardist": _stardist,
    "coco": _coco,
    "roi": _roi,
    "geojson": _geojson,
}
