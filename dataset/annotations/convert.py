"""Convert annotations of other programs to label images: choose readers, pair files with images, write a report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from common.disk import check_folder, is_litter, new_folder, real_path, write_bytes, write_csv
from common.errors import InputError, list_some
from common.log import with_progress
from dataset.annotations import cellpose, coco, colours, geojson, imagej, labelme, stacks
from dataset.annotations.cells import Cell, CellCounts, draw_cells
from dataset.annotations.formats import READ, SUFFIXES, format_of
from dataset.files import FileError, encode_image, encode_tiff, find_files, image_suffix, read_image
from dataset.folder_hints import other_program
from dataset.names import IMAGE_ENDING, IMAGE_SUFFIXES, bare_mask_names, name_of, split_together

Load = Callable[[tuple[int, int]], list[Cell]]  # height and width of the image -> its cells
MAPS = ("instances", "classes")
REPORT = "report.csv"
# Endings that programs add to the name of the image. Longer ones come first.
ENDINGS = ("_annotations", "_cp_masks", "_RoiSet", "_labels", "_masks", "_rois", "_mask", "_seg")
ROUNDING = 1e-3  # gray levels by which 8-bit values differ that were divided by 255


@dataclass(frozen=True)
class ConvertSettings:
    """How to convert.

    Attributes:
        format_name: one of ``FORMATS``. "auto" decides for each file by its suffix and content.
        kind: one of ``MAPS``. "instances" draws ids of cells, "classes" draws numbers of classes.
        classes: names of classes in the order of their numbers, from 1. Only their cells are drawn. Empty: all cells.
        class_colours: see ``colours.cells_of``.
    """

    format_name: str = "auto"
    kind: str = "instances"
    classes: Sequence[str] = ()
    class_colours: Sequence[str] = ()


@dataclass
class Conversion:
    """Result of a conversion.

    Attributes:
        counts: image -> counts of its cells.
        without: images without annotations.
        lonely: annotations without an image.
        asked: classes that were asked for.
        found: classes that cells have.
    """

    counts: dict[str, CellCounts] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    lonely: list[str] = field(default_factory=list)
    asked: Sequence[str] = ()
    found: set[str] = field(default_factory=set)

    def lines(self, most: int = 20) -> list[str]:
        """The report: totals, at most ``most`` images with dropped, overlapping or cut cells, and what else is odd."""
        total = sum(self.counts.values(), CellCounts())
        lines = [f"{len(self.counts)} label images; {total}"]
        cells = self.counts.items()
        odd = [f"{name}: {one}" for name, one in cells if one.dropped or one.overlapping or one.outside]
        lines += odd[:most] + ([f"and {len(odd) - most} more images, see {REPORT}"] if len(odd) > most else [])
        regions = [name for name, one in self.counts.items() if one.enclosing]
        if regions:
            lines.append(
                f"{len(regions)} images have a cell with several other cells inside: {list_some(regions)}. If it is a "
                "region of interest, delete it in the annotations"
            )
        if total.with_nucleus:
            lines.append(
                f"{total.with_nucleus} cells have an outline of their nucleus, too: that of the whole cell is drawn"
            )
        unused = [name for name in self.asked if name not in self.found]
        if unused:
            held = list_some(sorted(self.found), 8)
            lines.append(f"no cell has the class {list_some(unused)}: the files hold {held}")
        if self.without:
            lines.append(f"{len(self.without)} images have no annotations: {list_some(self.without)}")
        if self.lonely:
            lines.append(f"{len(self.lonely)} annotations have no image: {list_some(self.lonely)}")
        return lines


def convert(source: Path, images: Path, output: Path, settings: ConvertSettings) -> Conversion:
    """Write a label TIFF for every image that has annotations, and ``report.csv``, or nothing.

    Args:
        source: file or folder of annotations.
        images: file or folder of their images.
        output: new folder.
        settings: how to convert.

    Raises:
        InputError: files are unreadable, no annotation has an image, or the folder is not empty.
    """
    check_folder(output)
    _check(settings)
    paths = _images(source, images)
    pairs, without, lonely = _pair(source, images, paths, settings)
    if settings.kind == "classes" and not settings.classes:
        raise InputError(_which_classes(source, pairs, paths))
    result = Conversion(without=without, lonely=lonely, asked=settings.classes)
    with new_folder(output) as folder:
        _draw_all(pairs, paths, settings, result, folder)
        if not any(one.written for one in result.counts.values()):
            found = list_some(sorted(result.found), 8) if settings.classes else ""
            held = f"; the files hold the classes {found}" if found else ""
            raise InputError(f"no cell of {source} can be drawn: {result.lines()[0]}{held}")
        _write_report(result, folder / REPORT)
    return result


def _draw_all(
    pairs: Mapping[str, Load], paths: Mapping[str, Path], settings: ConvertSettings, result: Conversion, folder: Path
) -> None:
    """Write the label images, and add to the result what was drawn. Raises InputError with all faults of the files."""
    errors = []
    for name, load in with_progress(pairs.items(), "converting", "image"):
        try:
            content, result.counts[name], names = _draw(paths[name], load, settings)
        except FileError as error:
            errors.append(str(error))
        except InputError:  # of the settings, and so of every file
            raise
        except ValueError as error:
            errors.append(f"annotations of {name}: {error}")
        else:
            result.found |= names
            write_bytes(folder / f"{name}.tif", content)
    if errors:
        raise InputError(f"{len(errors)} of {len(pairs)} annotations cannot be used: {list_some(errors)}")


def _draw(image: Path, load: Load, settings: ConvertSettings) -> tuple[bytes, CellCounts, set[str]]:
    """Label TIFF of one image, counts of its cells, and the names of their classes."""
    size = read_image(image).shape[:2]
    cells = load(size)
    label, counts = draw_cells(cells, size, settings.classes or None, settings.kind == "classes")
    return encode_tiff(label), counts, {cell.name for cell in cells if cell.name}


def _check(settings: ConvertSettings) -> None:
    """Refuse classes and colours that are given twice, words that are no colour, and colours of other formats."""
    if settings.class_colours and settings.format_name not in ("auto", "colours"):
        raise InputError(f"`class_colours` has no effect with format {settings.format_name}: leave it out")
    for field_name, values in (("classes", settings.classes), ("class_colours", settings.class_colours)):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise InputError(f"`{field_name}`: {twice[0]} is given twice")
    wrong = [colour for colour in settings.class_colours if not re.fullmatch("[0-9a-fA-F]{6}", colour)]
    if wrong and list(settings.class_colours) != [colours.EACH_A_CELL]:
        raise InputError(f"`class_colours` {wrong[0]}: a colour is RRGGBB, such as ff0000")


def _write_report(result: Conversion, path: Path) -> None:
    numbers = ("read", "written", "overlapping", "outside")
    rows = []
    for name, one in result.counts.items():
        dropped = "; ".join(f"{count} {reason}" for reason, count in one.dropped.items())
        rows.append((name, *(getattr(one, number) for number in numbers), dropped))
    write_csv(path, ("image", *numbers, "dropped"), rows)


# --- which file belongs to which image -------------------------------------------------------------------------------


def _pair(
    source: Path, images: Path, paths: Mapping[str, Path], settings: ConvertSettings
) -> tuple[dict[str, Load], list[str], list[str]]:
    """Annotations by the name of their image, images without annotations, annotations without an image."""
    loads: dict[str, Load] = {}
    files = _files(source, paths, settings.format_name)
    among_stacks = settings.format_name == "auto" and any(map(stacks.has_pages, files))
    for file in files:
        for name, load in _loads(file, paths, settings, among_stacks).items():
            if name in loads and _is_copy(file, name):
                continue
            if name in loads:
                raise InputError(f"{source} holds two annotations of {name}: keep one of them")
            loads[name] = load
    if not loads:
        kind = "" if settings.format_name == "auto" else f" of the format {settings.format_name}"
        raise InputError(f"{source} holds no annotations{kind}{_others(source)}; {READ}")
    if images.is_file() and len(loads) == 1:  # one of each: whatever their names
        return dict.fromkeys(paths, next(iter(loads.values()))), [], []
    if images.is_file():
        by_name = {known: name for name in paths for known in (name, _stem(images))}
    else:
        by_name = {stem.removesuffix(IMAGE_ENDING): stem for stem in paths} | {stem: stem for stem in paths}
    pairs = _by_image(source, loads, by_name)
    if not pairs:
        mend = ". If they are ROIs of one image, zip them as NAME.zip" if _has_rois(source) else ""
        raise InputError(
            f"no annotation of {source} has the name of an image in {images}: annotations are named "
            f"{list_some(list(loads))}, images {list_some(list(paths))}{mend}"
        )
    lonely = sorted(name for name in loads if name not in by_name)
    return dict(sorted(pairs.items())), sorted(set(paths) - set(pairs)), lonely


def _by_image(source: Path, loads: Mapping[str, Load], by_name: Mapping[str, str]) -> dict[str, Load]:
    """Annotations by the key of their image, which ``by_name`` gives. An image may be reached by two names."""
    pairs: dict[str, Load] = {}
    reached: dict[str, str] = {}
    for name, load in loads.items():
        if name not in by_name:
            continue
        image = by_name[name]
        if image in pairs:
            raise InputError(
                f"{source}: the annotations {reached[image]} and {name} are both of the image {image}: keep one of them"
            )
        pairs[image], reached[image] = load, name
    return pairs


def _images(source: Path, images: Path) -> dict[str, Path]:
    """Images by their names. Masks that lie beside them, and annotations, are none."""
    if images.is_file():
        return {name_of(images.name): images}
    paths = find_files(images, "image")
    if not source.is_dir() or not source.samefile(images):
        return paths
    stems, _ = split_together(paths)
    return {stem: path for stem, path in paths.items() if stem in stems} or paths


def _files(source: Path, images: Mapping[str, Path], format_name: str) -> list[Path]:
    """Files of a format, without the images themselves. Pictures come last: they may be copies of the images."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder")
    own = {real_path(path) for path in images.values()}
    found = [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name.lower().endswith(SUFFIXES[format_name])
        and not path.name.startswith(".")
        and real_path(path) not in own
    ]
    return sorted(found, key=_is_picture)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_copy(path: Path, name: str) -> bool:
    """Whether a picture beside the annotations of an image is the image, or what Cellpose draws from its _seg.npy."""
    own = name_of(path.name)
    return _is_picture(path) and (own == name or own.endswith("_cp_masks"))


def _others(source: Path) -> str:
    """What a folder without annotations holds instead."""
    kinds = Counter(path.suffix.lower() for path in source.iterdir() if path.is_file() and not is_litter(path.name))
    if kinds:
        kind, count = kinds.most_common(1)[0]
        return f" but {count} {kind}{other_program(kind)}" if kind else ""
    inner = [path for path in sorted(source.iterdir()) if path.is_dir() and not is_litter(path.name)]
    if not inner:
        return ""
    mend = "zip the ROIs of each image as NAME.zip" if _has_rois(inner[0]) else f"did you mean {inner[0]}?"
    return f" but folders: {mend}"


def _has_rois(folder: Path) -> bool:
    """Whether a folder holds single ROIs of ImageJ. Their names are not those of images."""
    return folder.is_dir() and any(path.suffix.lower() == ".roi" for path in folder.iterdir())


def _stem(path: Path, names: Container[str] = ()) -> str:
    """The name of the image that a file of annotations belongs to: if possible, one of ``names``."""
    stem = name_of(path.stem)  # NAME.tif.geojson
    ending = next((one for one in ENDINGS if stem.lower().endswith(one.lower()) and len(stem) > len(one)), "")
    shorter = stem[: len(stem) - len(ending)]
    return next((name for name in (stem, shorter, *bare_mask_names(stem)) if name in names), shorter)


def _loads(path: Path, paths: Mapping[str, Path], settings: ConvertSettings, among_stacks: bool) -> dict[str, Load]:
    """Name of the image -> function that reads its cells. A file may hold annotations of many images."""
    format_name = format_of(path, among_stacks) if settings.format_name == "auto" else settings.format_name
    if format_name == "coco":
        return coco.sources(path)
    if format_name == "planes":
        return _planes(path, list(paths))
    readers: dict[str, Callable[..., list[Cell]]] = {
        "cellpose": cellpose.cells_of,
        "imagej": imagej.cells_of,
        "qupath": geojson.cells_of,
        "labelme": labelme.cells_of,
        "colours": partial(colours.cells_of, colours=settings.class_colours),
        "pages": stacks.cells_of,
    }
    name = _stem_of_labelme(path, paths) if format_name == "labelme" else _stem(path, paths)
    return {name: partial(readers[format_name], path)}


def _stem_of_labelme(path: Path, paths: Mapping[str, Path]) -> str:
    """The name of the image: that of the file, or the one in it if there is no such image."""
    stem, named = _stem(path, paths), labelme.image_name(path)
    inner = _stem(Path(named), paths) if named else stem
    if stem in paths and inner in paths and inner != stem:
        raise FileError(
            path, f"says that its image is {named}, and there is {paths[stem].name}, too: rename one of them"
        )
    return inner if inner in paths else stem


def _planes(path: Path, names: Sequence[str]) -> dict[str, Load]:
    """Readers of an array for N images, which belong to the images in the order of their names."""
    array = stacks.read_array(path)
    if array.ndim != 4 or len(array) != len(names):
        shape = " x ".join(map(str, array.shape))
        raise FileError(path, f"has the shape {shape}: ({len(names)}, height, width, classes) is needed, one per image")
    ordered, by_number = sorted(names), sorted(names, key=_by_number)
    if ordered != by_number:
        raise FileError(
            path, f"belongs to images in an order that their names do not tell: {list_some(ordered)} by letters, "
            f"{list_some(by_number)} by numbers. Rename them with as many digits each",
        )  # fmt: skip
    background = stacks.background_of(path, array)

    def load(index: int, size: tuple[int, int]) -> list[Cell]:
        if array.shape[1:3] != size:
            first = ": its classes must be the last axis" if array.shape[2:4] == size else ""
            raise FileError(
                path, f"has {array.shape[2]} x {array.shape[1]} pixels, but an image {size[1]} x {size[0]}{first}"
            )
        return stacks.cells_of_planes(path, np.asarray(array[index]), background)

    return {name: partial(load, index) for index, name in enumerate(ordered)}


def _by_number(name: str) -> list[tuple[int, str]]:
    """Key that sorts a9 before a10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", name)]


def _which_classes(source: Path, pairs: Mapping[str, Load], paths: Mapping[str, Path]) -> str:
    """What to give: the names of all classes, the most frequent first."""
    names: Counter[str] = Counter()
    for name, load in pairs.items():
        names.update(cell.name for cell in load(read_image(paths[name]).shape[:2]) if not cell.unusable)
    found = " ".join(f"{name!r}" if " " in name else name for name, _ in names.most_common() if name)
    without = f" {names['']} cells have none." if names[""] else ""
    return (
        f"`classes`: give their names in the order of their numbers, from 1; {source} holds: {found or 'none'}."
        f"{without}"
    )


# --- images in one array ---------------------------------------------------------------------------------------------


def unpack_images(array_path: Path, folder: Path) -> Path:
    """Write the images of a (N, H, W) or (N, H, W, 3) array as files of their own, as PanNuke's need it.

    All files have one type. Three channels are RGB.

    Returns:
        The folder.

    Raises:
        InputError: the folder holds something, or the array no images.
    """
    array = stacks.read_array(array_path)
    check_folder(folder)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)) or not array.size:
        shape = " x ".join(map(str, array.shape))
        raise FileError(array_path, f"has the shape {shape}: (images, height, width) or (images, height, width, 3)")
    folder.mkdir(parents=True, exist_ok=True)
    dtype, factor = _type_of_files(array)
    for index in with_progress(range(len(array)), "writing images", "image"):
        image = np.asarray(array[index]).reshape(*array.shape[1:3], -1)
        image = image if dtype == array.dtype else np.rint(image * factor).astype(dtype)
        path = folder / f"{array_path.stem}_{index:06d}{image_suffix(image.shape[2], dtype)}"
        write_bytes(path, encode_image(image))
    return folder


def _type_of_files(array: np.ndarray) -> tuple[np.dtype, int]:
    """Type of the files of all images, and the factor on their values.

    8 bits if these hold every value: PanNuke keeps 8-bit colours as float64, others divide them by 255. Whole numbers
    may also fit into 16 bits.
    """
    if array.dtype == bool:
        return np.dtype(np.uint8), 255
    if array.dtype in (np.uint8, np.uint16):
        return array.dtype, 1
    low, high, whole, parts = np.inf, -np.inf, True, array.dtype.kind == "f"  # parts: multiples of 1 / 255
    for image in array:
        low, high = min(low, image.min()), max(high, image.max())
        whole = whole and bool((image == np.round(image)).all())
        if parts:
            levels = image * 255.0
            parts = bool(np.abs(levels - np.round(levels)).max() < ROUNDING)
    if parts and low >= 0 and high <= 1:
        return np.dtype(np.uint8), 255
    if whole and low >= 0 and high <= 65535:
        return np.dtype(np.uint8 if high <= 255 else np.uint16), 1
    return array.dtype, 1
