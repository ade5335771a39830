"""Which program wrote a file of annotations, and what to do with files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataset.annotations import geojson, stacks
from dataset.decode import FileError
from dataset.folder_hints import other_program
from dataset.names import IMAGE_SUFFIXES

FORMATS = ("auto", "cellpose", "imagej", "qupath", "coco", "labelme", "colours", "pages", "planes")
SUFFIXES = {
    "cellpose": ("_seg.npy",),
    "imagej": (".roi", ".zip"),
    "qupath": (".geojson", ".json"),
    "coco": (".json",),
    "labelme": (".json",),
    "colours": IMAGE_SUFFIXES,
    "pages": (*stacks.TIFFS, *stacks.ARRAYS),
    "planes": stacks.ARRAYS,
}
SUFFIXES["auto"] = tuple(dict.fromkeys(suffix for name in SUFFIXES for suffix in SUFFIXES[name]))
READ = (
    "read are _seg.npy of Cellpose, .roi and .zip of ImageJ, .geojson of QuPath, .json of COCO and LabelMe, pictures "
    "in colours, and stacks .tif .npy .npz"
)
# Keys of JSON files of other programs.
_JSON = (
    ({"_via_img_metadata"}, "of VIA, which exports COCO, too"),
    ({"objects", "size"}, "of Supervisely, which exports COCO, too"),
    ({"item", "annotations"}, "of Darwin, which exports COCO, too"),
    ({"data", "annotations"}, "of Label Studio, which exports COCO, too"),
    ({"nuc"}, "of HoVer-Net: save inst_map of its .mat as TIFF"),
    ({"images"}, "of COCO and has no annotations"),
)


def format_of(path: Path, among_stacks: bool = False) -> str:
    """The format of a file, by its suffix. If several formats have this suffix, also by its content.

    Args:
        path: the file.
        among_stacks: other TIFFs of its folder have pages. Then a flat gray one is a stack of one cell.

    Raises:
        FileError: the file is of no such format.
    """
    suffix = path.suffix.lower()
    if path.name.lower().endswith("_seg.npy"):
        return "cellpose"
    if suffix in SUFFIXES["imagej"]:
        return "imagej"
    if suffix == ".geojson":
        return "qupath"
    if suffix == ".json":
        return _format_of_json(path, geojson.read_annotations(path))
    if suffix in stacks.ARRAYS:
        return "planes" if stacks.is_image_stack(path) else "pages"
    if suffix not in IMAGE_SUFFIXES:
        raise FileError(path, f"is of no format that is read{other_program(suffix)}; {READ}")
    is_stack = stacks.has_pages(path) or (among_stacks and stacks.is_flat_and_gray(path))
    return "pages" if is_stack else "colours"


def _format_of_json(path: Path, content: Any) -> str:
    """Which of the programs wrote a JSON file."""
    first = content[0] if isinstance(content, list) and content else content
    keys = set(first) if isinstance(first, dict) else set()
    if isinstance(content, dict) and "shapes" in keys:
        return "labelme"
    if isinstance(content, dict) and {"images", "annotations"} <= keys:
        return "coco"
    if content == [] or "type" in keys:
        return "qupath"
    known = next((f"it is {words}" for marks, words in _JSON if marks <= keys), "")
    if (
        keys
        and isinstance(content, dict)
        and all(isinstance(one, dict) and "regions" in one for one in content.values())
    ):
        known = "it is of VIA, which exports COCO, too"
    raise FileError(path, f"is no GeoJSON and no file of COCO or LabelMe{f': {known}' if known else ''}")
