"""New layouts of the cells of existing label images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from common.cells import are_noise, connected_cells, meetings, touches_border, without_gaps
from common.disk import SETTINGS
from common.errors import InputError, list_some
from common.log import with_progress
from common.plain import read_json
from dataset.files import find_files, match_names, read_mask
from dataset.mask_facts import mask_stats
from dataset.mask_warnings import refuse_no_labels
from dataset.names import bare_mask_name, without_images
from dataset.views import turn
from layouts.placing import LEAST_CELL_AREA, Field, Piece, fill, fits_whole, place_anywhere, place_in_middle, tidy

ID_LIMIT = 2**63  # ids are sorted as 64-bit integers
LARGEST_CLUSTER = 6  # cells; larger clusters are split, so that they fit into a new layout
LEAST_SMOOTHED_AREA = 60  # pixels; smaller cells keep their outline
TURNS_TRIED = 50  # other turns and sizes of a single cell that does not fit into the image whole
MOST_SCRAPS = 1000  # after this many pieces in a row that are too small, all cells count as too small
LEAST_POOL = 100  # least number of pieces to choose from for a layout, if the data has that many
LARGEST_CLASS, MOST_CLASSES = 65535, 64  # largest stored value, and most values in a class map
ORIGIN_NOTES = ("source_sha256", "segmenter_images_sha256", "parts")  # keys in settings.json of a folder of masks
RESIZE_LIMITS = (0.01, 10.0)  # least and largest factor on the size of cells
ROTATIONS = ("free", "quarter", "none")


@dataclass(frozen=True)
class LayoutSettings:
    """Settings of new layouts.

    Attributes:
        height, width: size of the new fields in pixels.
        density: fraction of the field that cells cover. None: use that of a random source image for each layout.
        density_scale: factor on the density of the source image.
        scale_low, scale_high: range of the random factor that resizes each piece.
        rotate: one of ROTATIONS.
        clusters: whether touching cells of the source stay together.
        gap, max_overlap: see `Field`.
        components: whether each connected part of the source files is a cell.
        seed: seed of the set.
        source_sha256: digest of the source's label files.
        classes_sha256: digest of the source's class maps; None without them.
        crop: as of DataConfig. "center": label files are resized to squares first.
        single: whether each layout is one piece in the middle.
    """

    height: int
    width: int
    density: float | None
    density_scale: float
    scale_low: float
    scale_high: float
    rotate: str
    clusters: bool
    gap: int
    max_overlap: float
    components: bool
    seed: int
    source_sha256: str
    classes_sha256: str | None = None
    crop: str = "random"
    single: bool = False


class OneValueForAll(InputError):
    """The label files do not number their cells: most files hold a single value for all cells."""


@dataclass(frozen=True)
class Source:
    """One source image: its covered fraction, its pieces, and the weight of each piece in random choices."""

    foreground: float
    median_area: float  # nan if the image border cuts every cell
    pieces: list[Piece]
    weights: np.ndarray


def touching_pairs(instance_map: np.ndarray) -> np.ndarray:
    """(N, 2) pairs of ids that touch at a side or a corner of a pixel. Each pair is listed once, smaller id first."""
    pairs = [
        np.stack([instance_map[first][meets], instance_map[second][meets]], axis=1)
        for first, second, meets in meetings(instance_map)
    ]
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def group_cells(ids: Iterable[int], pairs: np.ndarray, largest: int) -> list[list[int]]:
    """Divide `ids` into groups of at most `largest` cells. The cells of a group are connected by touching `pairs`."""
    left = dict.fromkeys(sorted(ids))
    neighbours: dict[int, list[int]] = {cell_id: [] for cell_id in left}
    for first, second in pairs.tolist():
        if first in neighbours and second in neighbours:
            neighbours[first].append(second)
            neighbours[second].append(first)
    groups = []
    while left:
        group = [next(iter(left))]
        del left[group[0]]
        for member in group:  # the list grows during the loop: breadth-first search
            for neighbour in neighbours[member]:
                if neighbour in left and len(group) < largest:
                    group.append(neighbour)
                    del left[neighbour]
        groups.append(group)
    return groups


def boxes_of(instance_map: np.ndarray) -> np.ndarray:
    """(n, 4) bounding boxes of the cells 1..n: first row, end row, first column, end column."""
    boxes = ndimage.find_objects(instance_map)
    return np.array([(box[0].start, box[0].stop, box[1].start, box[1].stop) for box in boxes], int).reshape(-1, 4)


def share_seen_whole(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Probability that a cell with this bounding box is seen whole, if its corner lies in the image. At least 0.1.

    The border cuts large cells more often than small ones. Only whole cells are used here. Weighting each by one over
    this probability makes the distribution of sizes unbiased (Miles 1974, Lantuejoul 1978).
    """
    height, width = shape
    rows, columns = (boxes[:, 1] - boxes[:, 0]) / height, (boxes[:, 3] - boxes[:, 2]) / width
    return np.maximum((1 - rows) * (1 - columns), 0.1)


def cut_pieces(instance_map: np.ndarray, clusters: bool, class_map: np.ndarray | None = None) -> Source:
    """Cut the whole cells, with their classes, out of a source image. Skips cells that touch its border."""
    boxes = boxes_of(instance_map)
    ids = np.setdiff1d(np.arange(1, len(boxes) + 1), touches_border(instance_map))
    cell_weights = 1 / share_seen_whole(boxes, instance_map.shape)
    pairs = touching_pairs(instance_map) if clusters else np.zeros((0, 2), int)
    pieces, weights = [], []
    for group in group_cells(ids.tolist(), pairs, LARGEST_CLUSTER):
        members = np.array(group) - 1
        top, left = boxes[members, 0].min(), boxes[members, 2].min()
        box = slice(top, boxes[members, 1].max()), slice(left, boxes[members, 3].max())
        labels = np.zeros(instance_map[box].shape, dtype=np.int32)
        for number, cell_id in enumerate(group, start=1):
            labels[instance_map[box] == cell_id] = number
        classes = None if class_map is None else np.where(labels > 0, class_map[box], 0)
        pieces.append(Piece(labels, np.zeros(labels.shape, np.float32), classes))
        weights.append(cell_weights[members].mean())
    areas = np.bincount(instance_map.ravel())[ids] if len(ids) else np.array([np.nan])
    return Source(
        np.count_nonzero(instance_map) / instance_map.size, float(np.median(areas)), pieces, np.array(weights)
    )


def turn_and_scale(piece: Piece, rng: np.random.Generator, settings: LayoutSettings) -> Piece:
    """Mirror, turn and resize a piece at random. Mirroring and quarter turns keep every pixel."""
    factor = math.exp(rng.uniform(math.log(settings.scale_low), math.log(settings.scale_high)))
    mirror, quarters = rng.random() < 0.5, 4 * rng.random()
    angle = quarters % 1 * math.pi / 2 if settings.rotate == "free" else 0.0
    resampled = bool(angle) or factor != 1

    def move(array: np.ndarray) -> np.ndarray:
        if settings.rotate != "none":
            array = np.ascontiguousarray(turn(array, (0, 1), int(quarters) + 4 * mirror))
        return _resample(array, angle, factor) if resampled else array

    rough = move(piece.labels)
    labels = _take_off_teeth(rough) if resampled else rough
    classes = None if piece.classes is None else _spread_to(labels, rough, move(piece.classes))
    return Piece(labels, np.zeros(labels.shape, np.float32), classes)


def _spread_to(labels: np.ndarray, rough: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Classes (h, w) of the cells of ``labels``, from those of the cells of ``rough``.

    A pixel that is new in its cell takes the class of the nearest pixel that was in this cell before.
    """
    spread = np.where(labels > 0, classes, 0)
    for cell in np.unique(labels[(labels != rough) & (labels > 0)]):
        nearest = ndimage.distance_transform_edt(rough != cell, return_distances=False, return_indices=True)
        changed = (labels == cell) & (rough != cell)
        spread[changed] = classes[tuple(nearest)][changed]
    return spread


def _resample(labels: np.ndarray, angle: float, factor: float) -> np.ndarray:
    """Turn by 0 to 90 degrees and resize in one step. Nearest neighbour keeps ids from mixing.

    Args:
        labels: (h, w) int32.
        angle: radians, 0 to pi / 2.
        factor: new length over old length.

    Returns:
        (h', w') int32, just large enough for the turned piece.
    """
    (height, width), cosine, sine = labels.shape, math.cos(angle), math.sin(angle)
    lengths = height * cosine + width * sine, height * sine + width * cosine
    shape = tuple(max(1, math.ceil(factor * length - 1e-9)) for length in lengths)
    back = np.array([[cosine, sine], [-sine, cosine]]) / factor  # from a new pixel to the old one, about the centres
    centre, new_centre = (np.array(labels.shape) - 1) / 2, (np.array(shape) - 1) / 2
    # grid-constant: pixels extend half a pixel beyond their centres
    return ndimage.affine_transform(
        labels, back, offset=centre - back @ new_centre, output_shape=shape, order=0, mode="grid-constant"
    )


def _take_off_teeth(labels: np.ndarray) -> np.ndarray:
    """Smooth outlines: each pixel gets the majority of its 3 x 3 neighbourhood.

    Nearest-neighbour turning leaves one-pixel steps on slanted outlines. Small cells stay unchanged, because they would
    lose a large part of their area.
    """
    numbers = np.union1d(0, labels).astype(np.int32)
    votes = [ndimage.uniform_filter((labels == number).astype(np.float32), 3) for number in numbers]
    smooth = numbers[np.argmax(votes, axis=0)]
    small = np.flatnonzero(np.bincount(labels.ravel()) < LEAST_SMOOTHED_AREA)
    return np.where(np.isin(labels, small) | np.isin(smooth, small), labels, smooth)


class Layouts:
    """New layouts from source images. `maps(n)` is layout number n.

    Every layout imitates one random source image: its covered fraction and the scale of its cells. If the image has few
    cells, the layout also uses cells of the images with the most similar median cell area, up to LEAST_POOL pieces.
    """

    def __init__(self, sources: list[Source], settings: LayoutSettings):
        self._sources = sources
        self._settings = settings
        self._with_pieces = [source for source in sources if source.pieces]

    def _pool(self, model: Source) -> tuple[list[Piece], np.ndarray]:
        def distance(source: Source) -> float:
            return abs(math.log(source.median_area / model.median_area))

        # the scale of an image without a whole cell is unknown: use all images
        known = not math.isnan(model.median_area)
        ordered = sorted(self._with_pieces, key=distance) if known else self._with_pieces
        pieces: list[Piece] = []
        weights: list[np.ndarray] = []
        for source in ordered:
            if known and len(pieces) >= LEAST_POOL:
                break
            pieces.extend(source.pieces)
            # the border cuts none of them, so large ones are not missed more often
            weights.append(np.ones(len(source.pieces)) if self._settings.single else source.weights)
        weight = np.concatenate(weights)
        return pieces, weight / weight.sum()

    def maps(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Instance map (H, W) int32 and class map (H, W) uint16 of layout number `index`. Without classes, that is 0.

        Raises:
            InputError: no cell is left at this scale.
        """
        settings = self._settings
        rng = np.random.default_rng((settings.seed, index, 0))
        model = self._sources[rng.integers(len(self._sources))]
        pieces, weights = self._pool(model)
        field = Field(settings.height, settings.width, settings.gap, settings.max_overlap)
        foreground = settings.density if settings.density is not None else model.foreground * settings.density_scale

        def turned(own: Piece) -> Piece:
            for _ in range(TURNS_TRIED if settings.single else 1):
                piece = turn_and_scale(own, rng, settings)
                if piece.area < LEAST_CELL_AREA or fits_whole(field, piece):
                    break
            return piece

        def draw_piece() -> Piece:
            for _ in range(MOST_SCRAPS):
                piece = turned(pieces[rng.choice(len(pieces), p=weights)])
                if piece.area >= LEAST_CELL_AREA:  # tidy would drop a smaller one
                    return piece
            raise InputError(f"the cells have fewer than {LEAST_CELL_AREA} pixels: give a larger `scale`")

        if settings.single:
            if not any(place_in_middle(field, draw_piece(), rng) for _ in range(MOST_SCRAPS)):
                raise InputError("no cell has a pixel in the middle of the image: give a smaller `scale`")
        else:
            fill(field, rng, foreground, draw_piece, place_anywhere)
        instance_map = tidy(field.instance_map)
        return instance_map, np.where(instance_map > 0, field.class_map, 0)


def source_digest(instance_maps: Mapping[str, np.ndarray]) -> str:
    """Digest that identifies the source cells: sha256 over names, shapes and ids of all instance maps.

    ``make_masks.py recombine`` writes it into its settings. ``evaluate.py utility`` compares it with the cells of a
    share of the labels.
    """
    digest = hashlib.sha256()
    for name, instance_map in sorted(instance_maps.items()):
        digest.update(f"{name} {instance_map.shape}".encode() + instance_map.astype("<i4").tobytes())
    return digest.hexdigest()


def read_class_maps(folder: Path, cell_folder: Path, maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Class maps of the images whose cells were read. Files are paired by name, as masks and images are.

    Args:
        folder: class maps. 0 is background.
        cell_folder: as of :func:`read_sources`.
        maps: what it returned.

    Returns:
        name -> (H, W) uint16, the stored values.

    Raises:
        InputError: lists all class maps that are missing or do not fit.
    """
    files = find_files(cell_folder, "instance labels")
    class_files = without_images(find_files(folder, "class map"))
    bare = {bare_mask_name(name): files[name] for name in maps}  # a_label.png belongs to a_mask.png and to a.png
    pairs, lonely, _ = match_names(bare if len(bare) == len(maps) else {n: files[n] for n in maps}, class_files)
    if lonely:
        raise InputError(
            f"{len(lonely)} of {len(maps)} label files in {cell_folder} have no class map in {folder}: "
            f"{list_some(lonely)}"
        )
    names = {files[name]: name for name in maps}
    found, faults = {}, []
    for pair in pairs:
        name = names[pair.image_path]
        try:
            found[name] = _checked_classes(pair.mask_path, maps[name])
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError(f"{len(faults)} of {len(pairs)} class maps do not fit: {list_some(faults)}")
    if not any(classes[maps[name] > 0].any() for name, classes in found.items()):
        raise InputError(f"the class maps in {folder} are 0 in all cells")
    return found


def _checked_classes(path: Path, cells: np.ndarray) -> np.ndarray:
    """One class map (H, W) uint16, for the instance map of its image."""
    classes = read_mask(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder of nuclei, not a class map")
    if classes.shape != cells.shape:
        own, wanted = (" x ".join(map(str, one.shape[::-1])) for one in (classes, cells))
        raise InputError(f"{path} has {own} pixels, but its label file {wanted}")
    if classes.min() < 0 or classes.max() > LARGEST_CLASS or np.any(classes != np.floor(classes)):
        raise InputError(f"{path} does not hold whole numbers from 0 to {LARGEST_CLASS}")
    if (count := len(np.unique(classes))) > MOST_CLASSES:
        raise InputError(f"{path} holds {count} values, so these are gray values, not classes")
    outside = classes[cells == 0]
    if 2 * np.count_nonzero(outside) > outside.size:
        raise InputError(f"{path}: most pixels outside of cells are not 0, but background must be 0")
    return classes.astype(np.uint16)


def read_origin(folder: Path) -> dict[str, Any] | None:
    """How a folder of masks was made: the command, and the facts that leak checks need.

    These are the source digest of recombined masks, the training images of the segmenter of pseudo-masks, and the
    origins of the parts of merged folders.

    Returns:
        None if the origin is unknown.
    """
    try:
        settings = read_json(folder.parent / SETTINGS, "make the masks again")
        origin = {name: settings[name] for name in ("command", *ORIGIN_NOTES) if settings.get(name)}
    except ValueError:
        return None
    return origin if origin.get("command") in ("simulate", "recombine", "pseudo", "merged") else None


def read_sources(folder: Path, components: bool) -> dict[str, np.ndarray]:
    """Read all instance maps of a folder.

    Args:
        folder: label files, 0 background.
        components: count every connected part as one cell, whatever its value.

    Returns:
        name -> (H, W) int32, ids without gaps.

    Raises:
        InputError: lists all unusable files.
        OneValueForAll: most files hold a single value for all cells, and ``components`` is off.
    """
    files = without_images(find_files(folder, "instance labels"))
    maps, unusable, one_value = {}, [], []
    for name, path in with_progress(files.items(), "reading instances", "file"):
        try:
            labels = read_mask(path)
        except InputError as error:
            unusable.append(str(error))
            continue
        in_range = labels.min() >= 0 and float(labels.max()) < ID_LIMIT
        if labels.ndim != 2 or not in_range or np.any(labels != np.floor(labels)):
            unusable.append(
                f"{path}: not a single layer of whole numbers from 0 and below 2^63 (shape {labels.shape}, "
                f"{labels.dtype})"
            )
            continue
        maps[name] = connected_cells(labels) if components else without_gaps(labels)
        if are_noise(maps[name].max(), labels.size):
            unusable.append(f"{path}: {maps[name].max()} cells in {labels.size} pixels cannot be cells")
            continue
        if maps[name].max() == 1 and connected_cells(labels).max() > 1:
            one_value.append(name)
    if unusable:
        raise InputError(
            f"{len(unusable)} of {len(files)} files in {folder} are not instance labels: {list_some(unusable)}"
        )
    if len(one_value) > len(maps) / 2:
        raise OneValueForAll(f"{folder} holds a single value for all cells ({list_some(one_value)})")
    return maps


def check_sources(folder: Path, maps: dict[str, np.ndarray]) -> None:
    """Refuse sources that hold classes, gray values or a background that is not 0, instead of numbered cells.

    Args:
        folder: as in :func:`read_sources`.
        maps: what it returned without ``components``.

    Raises:
        InputError: the sources are no labels of cells.
    """
    files = find_files(folder, "instance labels")
    stats = [mask_stats(files[name].name, labels, files[name].is_dir()) for name, labels in maps.items()]
    refuse_no_labels(stats, folder)
