"""New masks to generate images from: nuclei drawn from numbers, or a lab's own cells in new layouts.

    python make_masks.py simulate --output masks/ --count 500 --image-size 256 --cell-size 20 --density 0.15 --seed 0
    python make_masks.py simulate --output pairs/ --count 240 --image-size 128 --render       # with images to train on
    python make_masks.py recombine --instances LAB/instances --output masks/ --count 1000 --image-size 256

Written for every image NAME:
    OUTPUT/instances/NAME.png   16-bit, 0 background, 1..n cells
    OUTPUT/masks/NAME.png       8-bit, 0 background, 255 cell
    OUTPUT/images/NAME.png      8-bit gray, with ``simulate --render``
and for the set: statistics.csv (one row per image), summary.csv (the set beside what it was made from), settings.json.

Image n is a function of the seed, n and the settings alone: a set may be made in parts, made longer, or finished after
an interruption by the same command, and every file is the same, byte for byte. Files that stand are never rewritten.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.special import ndtri
from tqdm import tqdm

from errors import InputError, list_some, run_command
from image_files import find_files, read_mask

GENERATOR_VERSION = 1  # goes into settings.json: raise it when the same settings would give other files
LARGEST_LABEL = 65535
LEAST_CELL_AREA = 6  # px; smaller scraps at the border of an image or of a neighbour are no cells
TOUCHING_SHARE = 0.12  # of the simulated cells are laid against another one on purpose, where touching is allowed
TOUCHING_OVERLAP = 0.15  # largest part of a simulated cell that a touching neighbour may cut off
LARGEST_CLUSTER = 6  # cells; larger clumps of a lab's data are taken apart, so that they fit into a new layout
LEAST_SMOOTHED_AREA = 60  # px
LEAST_POOL = 100  # pieces that a recombined layout can draw from, where the data has so many
MOST_EMPTY_PIECES = 1000  # drawn in a row, before the cells count as smaller than a pixel
POSITIONS_TRIED = 60  # per cell, before it is given up
HEADROOM = {True: 0.7, False: 0.45}  # largest reachable share of covered area: touching allowed, not allowed
ROTATIONS = ("free", "quarter", "none")
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


# --- placing pieces on a field ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One cell, or a few that touch, cut out.

    Attributes:
        labels: (h, w) int32, 0 outside, 1..n the cells.
        level: (h, w) float32. Where two cells want one pixel, the lower level has it. Simulated nuclei: 0 at the
            centre, 1 at the rim, so that the border runs midway. Recombined cells: 0, so that who comes first stays.
    """

    labels: np.ndarray
    level: np.ndarray

    @property
    def area(self) -> int:
        return int(np.count_nonzero(self.labels))


class Field:
    """A field of view that is being filled. Pieces may stick out over its border, as cells do in a microscope.

    Args:
        height, width: pixels.
        gap: least number of background pixels between two pieces; 0 lets them touch.
        max_overlap: largest share of a cell's visible area that it may lose to others; counts where gap is 0.
    """

    def __init__(self, height: int, width: int, gap: int, max_overlap: float):
        self.instance_map = np.zeros((height, width), dtype=np.int32)
        self.level = np.full((height, width), np.inf, dtype=np.float32)
        self.covered = 0
        self.centres: list[tuple[float, float, float]] = []  # row, column, radius of every piece on the field
        self._gap = gap
        self._max_overlap = max_overlap
        self._blocked = np.zeros((height, width), dtype=bool)
        self._area = np.zeros(1)  # per id: visible pixels when it was placed, and how many of them it has lost since
        self._lost = np.zeros(1)

    def _window(self, piece: Piece, top: int, left: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where the piece lies on the field, and which part of the piece that is."""
        height, width = self.instance_map.shape
        piece_height, piece_width = piece.labels.shape
        first_row, first_column = min(max(top, 0), height), min(max(left, 0), width)
        rows = slice(first_row, max(first_row, min(top + piece_height, height)))  # empty where the piece lies outside
        columns = slice(first_column, max(first_column, min(left + piece_width, width)))
        part = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        return (rows, columns), part

    def meets_another(self, piece: Piece, top: int, left: int) -> bool:
        where, part = self._window(piece, top, left)
        return bool(np.any((piece.labels[part] > 0) & (self.instance_map[where] > 0)))

    def place(self, piece: Piece, top: int, left: int) -> bool:
        """Lay the piece with its upper left corner at (top, left); False, and no change, where the rules forbid it."""
        where, part = self._window(piece, top, left)
        labels, level = piece.labels[part], piece.level[part]
        inside = labels > 0
        if not inside.any() or np.any(inside & self._blocked[where]):
            return False
        there = self.instance_map[where]
        takes = inside & (level < self.level[where])
        count = int(piece.labels.max())
        area = np.bincount(labels[inside], minlength=count + 1)
        refused = np.bincount(labels[inside & ~takes], minlength=count + 1)
        robbed = np.bincount(there[takes], minlength=len(self._lost))
        robbed[0] = 0
        if np.any(refused > self._max_overlap * area) or np.any(self._lost + robbed > self._max_overlap * self._area):
            return False

        self.covered += int(np.count_nonzero(takes & (there == 0)))
        self._lost = np.concatenate([self._lost + robbed, refused[1:]])
        there[takes] = labels[takes] + len(self._area) - 1  # `there` is a view: this writes the field
        self.level[where][takes] = level[takes]
        self._area = np.concatenate([self._area, area[1:]])
        if self._gap:
            self._block(piece, top, left)
        height, width = piece.labels.shape
        self.centres.append((top + height / 2, left + width / 2, math.sqrt(piece.area / math.pi)))
        return True

    def _block(self, piece: Piece, top: int, left: int) -> None:
        """Keep the piece and `gap` pixels around it free of others."""
        halo = np.pad(piece.labels > 0, self._gap)
        halo = ndimage.binary_dilation(halo, EIGHT_NEIGHBOURS, iterations=self._gap)
        around = Piece(halo.astype(np.int32), piece.level)
        where, part = self._window(around, top - self._gap, left - self._gap)
        self._blocked[where] |= halo[part]


def place_anywhere(field: Field, piece: Piece, rng: np.random.Generator, alone: bool = False) -> bool:
    """Try uniform positions, those that stick out over the border included: no pixel of the field is favoured.

    Args:
        field: the field to place on.
        piece: what to place.
        rng: source of the positions.
        alone: take only a position where the piece covers no other one, even where the field's rules allow that.
    """
    height, width = field.instance_map.shape
    piece_height, piece_width = piece.labels.shape
    tops = rng.integers(1 - piece_height, height, POSITIONS_TRIED).tolist()
    lefts = rng.integers(1 - piece_width, width, POSITIONS_TRIED).tolist()
    return any(
        not (alone and field.meets_another(piece, top, left)) and field.place(piece, top, left)
        for top, left in zip(tops, lefts, strict=True)
    )


def place_beside_another(field: Field, piece: Piece, rng: np.random.Generator) -> bool:
    """Move the piece from a random direction towards a cell until they meet, then press it on a little."""
    height, width = piece.labels.shape
    radius = math.sqrt(piece.area / math.pi)
    for _ in range(POSITIONS_TRIED // 6):
        row, column, other_radius = field.centres[rng.integers(len(field.centres))]
        angle, press = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.25) * radius
        towards = [row - height / 2, column - width / 2, math.sin(angle), math.cos(angle)]
        distance = 1.6 * (radius + other_radius)
        while distance > 0 and not field.meets_another(piece, *_shifted(towards, distance)):
            distance -= 1
        if field.place(piece, *_shifted(towards, distance - press)):
            return True
    return False


def _shifted(towards: list[float], distance: float) -> tuple[int, int]:
    row, column, down, right = towards
    return round(row + distance * down), round(column + distance * right)


def fill(
    field: Field,
    rng: np.random.Generator,
    foreground: float,
    draw_piece: Callable[[], Piece],
    place: Callable[[Field, Piece, np.random.Generator], bool],
) -> None:
    """Put pieces on the field until they cover the share `foreground` of it, or until no more will fit.

    Pieces are drawn first and placed from large to small: placing them as they come would favour the small ones, which
    fit into what is left. What the border cut off and what found no place is drawn anew.
    """
    failed_rounds = 0
    while failed_rounds < 3:
        batch = _draw_batch(rng, foreground * field.instance_map.size - field.covered, draw_piece)
        if not batch:
            return
        placed = sum(place(field, piece, rng) for piece in sorted(batch, key=lambda piece: -piece.area))
        failed_rounds = 0 if placed else failed_rounds + 1


def _draw_batch(rng: np.random.Generator, missing: float, draw_piece: Callable[[], Piece]) -> list[Piece]:
    """Pieces whose area is `missing` on average: the last one is taken with the probability that makes it so.

    Raises:
        InputError: piece after piece has no pixel.
    """
    batch, empty = [], 0
    while missing > 0:
        piece = draw_piece()
        empty = 0 if piece.area else empty + 1
        if empty == MOST_EMPTY_PIECES:
            raise InputError("the cells are smaller than a pixel: give a larger --scale or --cell-size")
        if piece.area > missing and rng.uniform(0, piece.area) > missing:
            break
        batch.append(piece)
        missing -= piece.area
    return batch


def tidy(instance_map: np.ndarray) -> np.ndarray:
    """The largest connected part of every cell, scraps dropped, numbered 1..n without gaps in the order of ids.

    Args:
        instance_map: (H, W) int, 0 background.

    Returns:
        (H, W) int32.
    """
    tidied = np.zeros(instance_map.shape, dtype=np.int32)
    number = 0
    for cell_id, where in enumerate(ndimage.find_objects(instance_map), start=1):
        if where is None:
            continue
        parts, count = ndimage.label(instance_map[where] == cell_id, EIGHT_NEIGHBOURS)
        areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        if areas.max() >= LEAST_CELL_AREA:
            number += 1
            tidied[where][parts == areas.argmax() + 1] = number
    return tidied


# --- simulated nuclei ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NucleiSettings:
    """What a simulated set looks like. Lengths in pixels; spreads are standard deviation / mean.

    Attributes:
        height, width: of the field.
        cell_size: mean diameter of the circle with the nucleus' area.
        size_spread: of the diameter, log-normal.
        elongation: mean ratio of long to short axis, 1 = round.
        irregularity: how far the outline leaves the ellipse, as a share of the radius.
        density: mean share of the field that cells cover, 0..1.
        density_spread: of that share from image to image, log-normal.
        touching: whether cells may touch; if not, a background pixel lies between any two.
        render: whether images are drawn, too.
        seed: of the set.
    """

    height: int
    width: int
    cell_size: float
    size_spread: float
    elongation: float
    irregularity: float
    density: float
    density_spread: float
    touching: bool
    render: bool
    seed: int


def log_normal(standard_normal: float, mean: float, spread: float) -> float:
    """The log-normal value with this mean and standard deviation / mean that belongs to a standard normal one."""
    variance = math.log1p(spread**2)
    return mean * math.exp(math.sqrt(variance) * standard_normal - variance / 2)


def draw_density(settings: NucleiSettings, index: int) -> float:
    """Share of field number `index` that cells are to cover.

    The quantiles of a set follow the golden-ratio sequence from a start of the seed's own: any dozen images in a row
    spread evenly over the distribution, so that a small set, too, has the mean that was asked for.
    """
    start = np.random.default_rng((settings.seed, 0, 2)).random()
    quantile = (start + index * (math.sqrt(5) - 1) / 2) % 1
    density = log_normal(float(ndtri(np.clip(quantile, 0.001, 0.999))), settings.density, settings.density_spread)
    return min(density, HEADROOM[settings.touching])


def draw_nucleus(rng: np.random.Generator, settings: NucleiSettings) -> Piece:
    """A nucleus: an ellipse whose outline is bent by a few slow waves, scaled to exactly the area that was drawn."""
    diameter = max(3.0, log_normal(rng.standard_normal(), settings.cell_size, settings.size_spread))
    ratio = 1 + rng.gamma(4.0, (settings.elongation - 1) / 4)
    turn = rng.uniform(0, 2 * math.pi)
    angles = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    outline = 1 / np.hypot(np.cos(angles - turn) / math.sqrt(ratio), np.sin(angles - turn) * math.sqrt(ratio))
    for waves in range(2, 7):  # one wave would only move the centre; more than six would look rough at this scale
        height = settings.irregularity * rng.normal() * 2 / waves
        outline *= np.maximum(0.5, 1 + height * np.cos(waves * angles + rng.uniform(0, 2 * math.pi)))
    # area of r(angle): half the integral of r squared
    outline *= diameter / 2 / math.sqrt(np.mean(outline**2))

    reach = math.ceil(outline.max()) + 1
    centre = reach + rng.uniform(-0.5, 0.5, 2)
    rows, columns = np.mgrid[: 2 * reach + 1, : 2 * reach + 1]
    rows, columns = rows - centre[0], columns - centre[1]
    rim = np.interp(np.arctan2(rows, columns), angles, outline, period=2 * math.pi)
    level = (np.hypot(rows, columns) / rim).astype(np.float32)
    return Piece((level < 1).astype(np.int32), level)


def simulate_field(settings: NucleiSettings, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Nuclei on field number `index`.

    Returns:
        (H, W) int32 instance map, and (H, W) float32 level: 0 at a nucleus' centre, 1 at its rim, inf outside.
    """
    rng = np.random.default_rng((settings.seed, index, 0))
    overlap = TOUCHING_OVERLAP if settings.touching else 0.0
    field = Field(settings.height, settings.width, gap=0 if settings.touching else 1, max_overlap=overlap)

    def place(field: Field, piece: Piece, rng: np.random.Generator) -> bool:
        if not settings.touching:
            return place_anywhere(field, piece, rng)
        on_purpose = rng.random() < TOUCHING_SHARE
        if (not on_purpose or not field.centres) and place_anywhere(field, piece, rng, alone=True):
            return True
        return bool(field.centres) and place_beside_another(field, piece, rng)

    fill(field, rng, draw_density(settings, index), partial(draw_nucleus, rng, settings), place)
    return tidy(field.instance_map), field.level


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """(H, W) Gaussian noise, blurred by sigma pixels, mean 0 and standard deviation 1 over the ensemble."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    # a Gaussian blur divides the standard deviation of white noise by 2 sqrt(pi) sigma, once it is wider than a pixel
    return noise * max(1.0, 2 * math.sqrt(math.pi) * sigma)


def render_image(instance_map: np.ndarray, level: np.ndarray, cell_size: float, rng: np.random.Generator) -> np.ndarray:
    """A plain fluorescence image of the nuclei: chromatin texture, own brightness, blur, haze, background and noise.

    A toy to learn the commands with, and not a model of any microscope.

    Args:
        instance_map: (H, W) int32.
        level: (H, W) float32, from `simulate_field`.
        cell_size: mean diameter in pixels; textures and blur scale with it.
        rng: for everything that varies.

    Returns:
        (H, W) uint8.
    """
    shape = instance_map.shape
    brightness = np.concatenate([[0.0], np.exp(rng.normal(0, 0.25, int(instance_map.max())))])
    thickness = np.sqrt(np.clip(1 - level**2, 0, 1))  # a nucleus is an ellipsoid: thinner, so darker, at its rim
    coarse, fine = _smooth_noise(rng, shape, 0.13 * cell_size), _smooth_noise(rng, shape, 0.045 * cell_size)
    nucleoli = np.clip(_smooth_noise(rng, shape, 0.08 * cell_size) - 1.3, 0, 0.8)
    chromatin = np.clip(1 + 0.16 * coarse + 0.12 * fine - 0.5 * nucleoli, 0.3, None)
    signal = brightness[instance_map] * (0.6 + 0.4 * thickness) * chromatin

    in_focus = ndimage.gaussian_filter(signal, float(np.clip(0.04 * cell_size, 0.6, 3)))
    haze = rng.uniform(0.03, 0.1) * ndimage.gaussian_filter(signal, 0.6 * cell_size)
    down, right = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    slope = rng.normal(0, 0.2, 2)  # uneven illumination
    background = rng.uniform(0.03, 0.08) * np.exp(slope[0] * down + slope[1] * right)
    photons = rng.uniform(100, 400)  # at signal 1: how noisy the camera's picture is
    light = rng.poisson(photons * (in_focus + haze + background)) / photons + rng.normal(0, 0.01, shape)
    return np.clip(np.rint(light * rng.uniform(110, 150)), 0, 255).astype(np.uint8)


# --- a lab's own cells in new layouts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutSettings:
    """How the cells of a lab are laid out anew.

    Attributes:
        height, width: of the new fields, pixels.
        density: share of the field that cells cover; None: each layout takes that of a random source image.
        density_scale: times that share.
        scale_low, scale_high: every piece is resized by a factor between them.
        rotate: one of ROTATIONS.
        clusters: whether cells that touch in the source stay together.
        gap, max_overlap: see `Field`.
        components: whether the connected parts of the source files are the cells.
        seed: of the set.
        source_sha256: of the source's label files.
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


@dataclass(frozen=True)
class Source:
    """What is known of one source image: its pieces and how often each is to be drawn."""

    foreground: float
    median_area: float  # nan where no cell lies whole in the image
    pieces: list[Piece]
    weights: np.ndarray


def touching_pairs(instance_map: np.ndarray) -> np.ndarray:
    """(N, 2) pairs of ids that meet at a side or a corner of a pixel, each pair once, the smaller id first."""
    height, width = instance_map.shape
    pairs = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        first = instance_map[: height - down, max(0, -right) : width - max(0, right)]
        second = instance_map[down:, max(0, right) : width + min(0, right)]
        meets = (first != second) & (first > 0) & (second > 0)
        pairs.append(np.stack([first[meets], second[meets]], axis=1))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def border_ids(instance_map: np.ndarray) -> np.ndarray:
    """Ids of the cells that the border of the image cuts, or may cut."""
    edges = [instance_map[0], instance_map[-1], instance_map[:, 0], instance_map[:, -1]]
    return np.setdiff1d(np.concatenate(edges), [0])


def group_cells(ids: Iterable[int], pairs: np.ndarray, largest: int) -> list[list[int]]:
    """Part `ids` into groups of at most `largest` cells, each connected by touching `pairs`."""
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
        for member in group:  # grows while it is walked: breadth first
            for neighbour in neighbours[member]:
                if neighbour in left and len(group) < largest:
                    group.append(neighbour)
                    del left[neighbour]
        groups.append(group)
    return groups


def boxes_of(instance_map: np.ndarray) -> np.ndarray:
    """(n, 4) first row, end row, first column, end column of the cells 1..n."""
    boxes = ndimage.find_objects(instance_map)
    return np.array([(box[0].start, box[0].stop, box[1].start, box[1].stop) for box in boxes], int).reshape(-1, 4)


def share_seen_whole(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Share of positions at which a cell of this bounding box that meets the image lies whole in it, at least 0.1.

    The border cuts large cells more often than small ones. Where only whole cells can be used, each is weighted by one
    over this share, and the sizes come out unbiased (Miles 1974, Lantuejoul 1978).
    """
    height, width = shape
    rows, columns = (boxes[:, 1] - boxes[:, 0]) / height, (boxes[:, 3] - boxes[:, 2]) / width
    return np.maximum((1 - rows) * (1 - columns), 0.1)


def cut_pieces(instance_map: np.ndarray, clusters: bool) -> Source:
    """Cut the whole cells out of a source image; those that its border cuts are left."""
    boxes = boxes_of(instance_map)
    ids = np.setdiff1d(np.arange(1, len(boxes) + 1), border_ids(instance_map))
    cell_weights = 1 / share_seen_whole(boxes, instance_map.shape)
    pairs = touching_pairs(instance_map) if clusters else np.zeros((0, 2), int)
    pieces, weights = [], []
    for group in group_cells(ids.tolist(), pairs, LARGEST_CLUSTER):
        members = np.array(group) - 1
        top, left = boxes[members, 0].min(), boxes[members, 2].min()
        around = instance_map[top : boxes[members, 1].max(), left : boxes[members, 3].max()]
        labels = np.zeros(around.shape, dtype=np.int32)
        for number, cell_id in enumerate(group, start=1):
            labels[around == cell_id] = number
        pieces.append(Piece(labels, np.zeros(labels.shape, np.float32)))
        weights.append(cell_weights[members].mean())
    areas = np.bincount(instance_map.ravel())[ids] if len(ids) else np.array([np.nan])
    return Source(
        np.count_nonzero(instance_map) / instance_map.size, float(np.median(areas)), pieces, np.array(weights)
    )


def turn_and_scale(piece: Piece, rng: np.random.Generator, settings: LayoutSettings) -> Piece:
    """Mirror, turn and resize a piece in one step, by nearest neighbour, so that no id is ever mixed."""
    factor = math.exp(rng.uniform(math.log(settings.scale_low), math.log(settings.scale_high)))
    mirror, draw = rng.random() < 0.5, rng.random()
    labels = piece.labels[:, ::-1] if mirror and settings.rotate != "none" else piece.labels
    quarters = {"none": 0.0, "quarter": float(math.floor(4 * draw)), "free": 4 * draw}[settings.rotate]
    cosine, sine = math.cos(quarters * math.pi / 2), math.sin(quarters * math.pi / 2)
    height, width = labels.shape
    # the outermost pixels' centres land inside: +1 keeps a margin for rounding
    new_height = math.ceil(factor * (height * abs(cosine) + width * abs(sine)) - 1e-9) + 1
    new_width = math.ceil(factor * (height * abs(sine) + width * abs(cosine)) - 1e-9) + 1
    rows, columns = np.mgrid[:new_height, :new_width]
    # with the same parity as the source the centre falls on a pixel centre, and quarter turns are exact
    centre_row = _centre(new_height, height if abs(cosine) > abs(sine) else width)
    centre_column = _centre(new_width, width if abs(cosine) > abs(sine) else height)
    down, right = (rows - centre_row) / factor, (columns - centre_column) / factor
    source_rows = np.rint(cosine * down + sine * right + (height - 1) / 2 - 1e-6).astype(int)
    source_columns = np.rint(-sine * down + cosine * right + (width - 1) / 2 - 1e-6).astype(int)
    known = (source_rows >= 0) & (source_rows < height) & (source_columns >= 0) & (source_columns < width)
    turned = np.zeros((new_height, new_width), dtype=np.int32)
    turned[known] = labels[source_rows[known], source_columns[known]]
    if quarters % 1 or factor != 1:
        turned = _take_off_teeth(turned)
    return Piece(turned, np.zeros(turned.shape, np.float32))


def _take_off_teeth(labels: np.ndarray) -> np.ndarray:
    """Majority of every pixel's 3 x 3 neighbourhood: nearest neighbour leaves one-pixel teeth on slanting outlines.

    Small cells stay as they are: they would lose their corners, which are a good part of them.
    """
    votes = [ndimage.uniform_filter((labels == number).astype(np.float32), 3) for number in range(labels.max() + 1)]
    smooth = np.argmax(votes, axis=0).astype(np.int32)
    small = np.flatnonzero(np.bincount(labels.ravel()) < LEAST_SMOOTHED_AREA)
    return np.where(np.isin(labels, small) | np.isin(smooth, small), labels, smooth)


def _centre(size: int, source_size: int) -> float:
    return (size - 1) / 2 if (size - source_size) % 2 == 0 else size / 2 - 1


class Layouts:
    """New layouts from source images; `field(n)` is layout number n.

    Every layout takes one source image as its model: its share of covered area, and cells of its own scale. Where the
    image has few, cells come from those whose median cell area is nearest, until there are LEAST_POOL pieces.
    """

    def __init__(self, sources: list[Source], settings: LayoutSettings):
        self._sources = sources
        self._settings = settings
        self._with_pieces = [source for source in sources if source.pieces]

    def _pool(self, model: Source) -> tuple[list[Piece], np.ndarray]:
        def distance(source: Source) -> float:
            return abs(math.log(source.median_area / model.median_area))

        # an image without a whole cell says nothing about scale: then all are equally near
        known = not math.isnan(model.median_area)
        ordered = sorted(self._with_pieces, key=distance) if known else self._with_pieces
        pieces: list[Piece] = []
        weights: list[np.ndarray] = []
        for source in ordered:
            if known and len(pieces) >= LEAST_POOL:
                break
            pieces.extend(source.pieces)
            weights.append(source.weights)
        weight = np.concatenate(weights)
        return pieces, weight / weight.sum()

    def field(self, index: int) -> np.ndarray:
        """(H, W) int32 instance map of layout number `index`."""
        settings = self._settings
        rng = np.random.default_rng((settings.seed, index, 0))
        model = self._sources[rng.integers(len(self._sources))]
        pieces, weights = self._pool(model)
        field = Field(settings.height, settings.width, settings.gap, settings.max_overlap)
        foreground = settings.density if settings.density is not None else model.foreground * settings.density_scale

        def draw_piece() -> Piece:
            return turn_and_scale(pieces[rng.choice(len(pieces), p=weights)], rng, settings)

        fill(field, rng, foreground, draw_piece, place_anywhere)
        return tidy(field.instance_map)


def read_sources(folder: Path, components: bool) -> dict[str, np.ndarray]:
    """Every instance map of a folder by its name; all that cannot be used are named in one InputError.

    Returns:
        name -> (H, W) int32, ids without gaps.
    """
    files = find_files(folder, "instance labels")
    maps, unusable, one_value = {}, [], []
    for name, path in _progress(files.items(), "reading instances", len(files)):
        try:
            labels = read_mask(path)
        except InputError as error:
            unusable.append(str(error))
            continue
        if labels.ndim != 2 or np.any(labels < 0) or np.any(labels != np.floor(labels)):
            unusable.append(f"{path}: not one layer of whole numbers from 0, shape {labels.shape}, {labels.dtype}")
            continue
        if components:
            maps[name], _ = ndimage.label(labels, EIGHT_NEIGHBOURS, output=np.int32)
            continue
        values, numbers = np.unique(labels, return_inverse=True)
        numbers = numbers.reshape(labels.shape) + (0 if values[0] == 0 else 1)
        maps[name] = numbers.astype(np.int32)
        if maps[name].max() == 1 and ndimage.label(numbers, EIGHT_NEIGHBOURS)[1] > 1:
            one_value.append(name)
    if unusable:
        raise InputError(
            f"{len(unusable)} of {len(files)} files in {folder} are no instance labels: {list_some(unusable)}"
        )
    if len(one_value) > len(maps) / 2:
        raise InputError(
            f"{folder} (--instances) holds one value for all cells ({list_some(one_value)}), and recombining needs a "
            "number for every cell: give instance labels, or --components to take every connected part as one cell"
        )
    return maps


# --- statistics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What one instance map holds. Areas, elongations and weights are those of the cells that no border cuts.

    A cell's weight is one over the image's pixels and over the share of positions at which it would be seen whole, so
    that sets of different image sizes can be compared: every image counts alike, whatever its size.
    """

    pixels: int
    cells: int
    foreground: float
    touching: int
    areas: np.ndarray
    elongations: np.ndarray
    weights: np.ndarray


def measure(instance_map: np.ndarray) -> Measurement:
    """Count and measure the cells of an (H, W) instance map whose ids have no gaps.

    Elongation is the ratio of the axes of the ellipse with the cell's second moments; a pixel counts as a square, which
    has the variance 1/12.
    """
    boxes = boxes_of(instance_map)
    inner = np.setdiff1d(np.arange(1, len(boxes) + 1), border_ids(instance_map))
    areas, elongations = np.zeros(len(inner)), np.zeros(len(inner))
    for number, (top, bottom, left, right) in enumerate(boxes[inner - 1]):
        rows, columns = np.nonzero(instance_map[top:bottom, left:right] == inner[number])
        (down, both), (_, across) = np.cov(rows, columns, bias=True) + np.eye(2) / 12
        middle, spread = (down + across) / 2, math.hypot((down - across) / 2, both)
        areas[number], elongations[number] = len(rows), math.sqrt((middle + spread) / (middle - spread))
    return Measurement(
        pixels=instance_map.size,
        cells=len(boxes),
        foreground=np.count_nonzero(instance_map) / instance_map.size,
        touching=len(np.unique(touching_pairs(instance_map))),
        areas=areas,
        elongations=elongations,
        weights=1 / share_seen_whole(boxes[inner - 1], instance_map.shape) / instance_map.size,
    )


def summarize(measurements: Iterable[Measurement]) -> dict[str, float]:
    """The figures of a set that a reader compares, in the order in which they are shown."""
    measurements = list(measurements)
    crowding = np.array([1e4 * item.cells / item.pixels for item in measurements])
    foreground = np.array([item.foreground for item in measurements])
    areas = np.concatenate([item.areas for item in measurements])
    elongations = np.concatenate([item.elongations for item in measurements])
    weights = np.concatenate([item.weights for item in measurements])

    def mean(values: np.ndarray) -> float:
        return float(np.average(values, weights=weights)) if len(values) else math.nan

    def area_below_which(share: float) -> float:
        order = np.argsort(areas)
        reached = np.cumsum(weights[order])
        return float(areas[order][np.searchsorted(reached, share * reached[-1])]) if len(areas) else math.nan

    touching = np.array([1e4 * item.touching / item.pixels for item in measurements])
    return {
        "images": len(measurements),
        "cells per 100 x 100 pixels": float(crowding.mean()),
        "foreground share, mean": float(foreground.mean()),
        "foreground share, standard deviation": float(foreground.std()),
        "cell diameter in pixels, mean": mean(np.sqrt(4 / math.pi * areas)),
        "cell area in pixels, 10th percentile": area_below_which(0.1),
        "cell area in pixels, median": area_below_which(0.5),
        "cell area in pixels, 90th percentile": area_below_which(0.9),
        "elongation, mean": mean(elongations),
        "share of cells that touch another": float(touching.sum() / max(crowding.sum(), 1e-9)),
    }


def write_statistics(path: Path, measurements: dict[str, Measurement]) -> None:
    """One row per image; area and elongation stay empty where no cell lies whole in the image."""
    rows = [
        ["name", "cells", "whole_cells", "foreground", "touching_cells", "mean_area", "median_area", "mean_elongation"]
    ]
    for name, item in measurements.items():
        shape = ["", "", ""]
        if len(item.areas):
            shape = [f"{np.mean(item.areas):.1f}", f"{np.median(item.areas):.1f}", f"{np.mean(item.elongations):.3f}"]
        rows.append([name, item.cells, len(item.areas), f"{item.foreground:.4f}", item.touching, *shape])
    _write_csv(path, rows)


def write_summary(path: Path, columns: dict[str, dict[str, float]]) -> str:
    """The summaries side by side, as a file and as the text that is returned."""
    names = list(columns)
    table = [
        [measure, *(f"{columns[name][measure]:.4g}" if measure in columns[name] else "" for name in names)]
        for measure in columns[names[0]]
    ]
    _write_csv(path, [["measure", *names], *table])
    return "\n".join(f"{row[0]:<40}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in [["", *names], *table])


def _write_csv(path: Path, rows: list[list[object]]) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    unfinished.replace(path)


# --- files -----------------------------------------------------------------------------------------------------------


def open_set(output: Path, settings: dict[str, object]) -> None:
    """Make the folder of a set, or find the same set there and go on with it.

    Raises:
        InputError: the folder holds something else, or a set that other settings made.
    """
    record = output / "settings.json"
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    if record.is_file():
        try:
            made_with = json.loads(record.read_text())
            different = [key for key in settings if made_with.get(key) != settings[key]]
        except (ValueError, AttributeError):
            raise InputError(
                f"{record} cannot be read, so the set cannot be continued; name another --output"
            ) from None
        if different:
            changes = [f"{key} {made_with.get(key)} and not {settings[key]}" for key in different]
            raise InputError(
                f"--output {output} holds a set made with {list_some(changes)}; name another folder, or give the same "
                "settings to continue it"
            )
        return
    if output.is_dir() and any(output.iterdir()):
        raise InputError(
            f"--output {output} holds files that are no set of this command; name a new or an empty folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    unfinished = record.with_name("settings.json.tmp")
    unfinished.write_text(json.dumps(settings, indent=2) + "\n")
    unfinished.replace(record)


def save_png(array: np.ndarray, path: Path) -> None:
    """Write whole or not at all: an interrupted run leaves no half file under the final name."""
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    Image.fromarray(array).save(unfinished, format="PNG")
    unfinished.replace(path)


def make_set(
    output: Path, prefix: str, count: int, kinds: list[str], make_image: Callable[[int], dict[str, np.ndarray]]
) -> dict[str, Measurement]:
    """Make what is not there yet and measure the set, images of an earlier, longer run included.

    Args:
        output: folder of the set.
        prefix: of every name.
        count: images 0..count-1 are made.
        kinds: sub-folders that hold a file of every image, "instances" the last.
        make_image: index -> array by kind.
    """
    measurements = {}
    for index in _progress(range(count), "masks", count):
        name = f"{prefix}_{index:06d}"
        files = {kind: output / kind / f"{name}.png" for kind in kinds}
        if all(path.is_file() for path in files.values()):
            measurements[name] = measure(read_mask(files["instances"]))
            continue
        arrays = make_image(index)
        for kind, path in files.items():
            if not path.is_file():
                save_png(arrays[kind], path)
        measurements[name] = measure(arrays["instances"])
    earlier = find_files(output / "instances", "instance labels")
    for name in earlier:
        if name not in measurements:
            measurements[name] = measure(read_mask(earlier[name]))
    return dict(sorted(measurements.items()))


def label_files(instance_map: np.ndarray) -> dict[str, np.ndarray]:
    """The instance map as it goes to disk, and the binary mask of the same pixels."""
    if instance_map.max() > LARGEST_LABEL:
        raise InputError(
            f"{instance_map.max()} cells in one image are more than 16 bits can number; lower --image-size"
        )
    return {"masks": np.where(instance_map > 0, 255, 0).astype(np.uint8), "instances": instance_map.astype(np.uint16)}


def _progress(items: Iterable, what: str, total: int) -> Iterator:
    """A progress bar on a terminal; elsewhere a plain line at every tenth part of long work."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total)
        return
    for done, item in enumerate(items):
        if total >= 1000 and done and done % (total // 10) == 0:
            print(f"{what}: {done} of {total}", file=sys.stderr)
        yield item


# --- commands --------------------------------------------------------------------------------------------------------


def run_simulate(args: argparse.Namespace) -> None:
    """The sub-command ``simulate``."""
    height, width = args.image_size
    given = {field.name: getattr(args, field.name) for field in fields(NucleiSettings) if hasattr(args, field.name)}
    settings = NucleiSettings(height=height, width=width, **given)
    open_set(args.output, {"command": "simulate", "generator": GENERATOR_VERSION, **asdict(settings)})

    def make_image(index: int) -> dict[str, np.ndarray]:
        instance_map, level = simulate_field(settings, index)
        files = label_files(instance_map)
        if settings.render:
            rng = np.random.default_rng((settings.seed, index, 1))  # its own: masks are the same with and without it
            files["images"] = render_image(instance_map, level, settings.cell_size, rng)
        return files

    kinds = (["images"] if settings.render else []) + ["masks", "instances"]
    measurements = make_set(args.output, "sim", args.count, kinds, make_image)
    write_statistics(args.output / "statistics.csv", measurements)
    asked = {
        "foreground share, mean": settings.density,
        "foreground share, standard deviation": settings.density * settings.density_spread,
        "cell diameter in pixels, mean": settings.cell_size,
        "elongation, mean": settings.elongation,
    }
    print(write_summary(args.output / "summary.csv", {"made": summarize(measurements.values()), "asked for": asked}))
    print(f"{len(measurements)} images in {args.output}")


def run_recombine(args: argparse.Namespace) -> None:
    """The sub-command ``recombine``."""
    maps = read_sources(args.instances, args.components)
    digest = hashlib.sha256()
    for name, instance_map in sorted(maps.items()):
        digest.update(f"{name} {instance_map.shape}".encode() + instance_map.astype("<i4").tobytes())
    height, width = args.image_size or Counter(item.shape for item in maps.values()).most_common(1)[0][0]
    given = {field.name: getattr(args, field.name) for field in fields(LayoutSettings) if hasattr(args, field.name)}
    settings = LayoutSettings(
        height=height,
        width=width,
        scale_low=args.scale[0],
        scale_high=args.scale[1],
        source_sha256=digest.hexdigest(),
        **given,
    )
    sources = [cut_pieces(item, settings.clusters) for item in maps.values()]
    if not any(source.pieces for source in sources):
        raise InputError(f"{args.instances} (--instances): no cell lies whole in its image, so there is none to place")
    open_set(args.output, {"command": "recombine", "generator": GENERATOR_VERSION, **asdict(settings)})

    layouts = Layouts(sources, settings)
    source = {name: measure(item) for name, item in maps.items()}
    measurements = make_set(
        args.output, "mix", args.count, ["masks", "instances"], lambda index: label_files(layouts.field(index))
    )
    write_statistics(args.output / "statistics.csv", measurements)
    write_statistics(args.output / "source_statistics.csv", source)
    columns = {"made": summarize(measurements.values()), "source": summarize(source.values())}
    print(write_summary(args.output / "summary.csv", columns))
    print(f"{len(measurements)} images in {args.output}")


def check_args(args: argparse.Namespace) -> None:
    """Every number that cannot be meant, in one InputError, before any work."""
    faults = []

    def require(holds: bool, flag: str, value: object, rule: str) -> None:
        if not holds:
            faults.append(f"{flag} {value}: {rule}")

    require(args.count >= 1, "--count", args.count, "at least 1")
    require(args.seed >= 0, "--seed", args.seed, "0 or more")
    if args.image_size is not None:
        shown = " ".join(map(str, args.image_size))
        require(len(args.image_size) in (1, 2), "--image-size", shown, "one number, or height and width")
        require(all(16 <= size <= 16384 for size in args.image_size), "--image-size", shown, "16 to 16384 pixels")
    if args.density is not None:
        limit = HEADROOM[args.touching] if args.command == "simulate" else 0.9
        hint = " (0.7 with --touching)" if limit == HEADROOM[False] else ""
        require(0 < args.density <= limit, "--density", args.density, f"above 0 and at most {limit}{hint}")
    if args.command == "simulate":
        largest = min(args.image_size)
        require(4 <= args.cell_size <= largest, "--cell-size", args.cell_size, f"4 to the image's {largest} pixels")
        require(1 <= args.elongation <= 4, "--elongation", args.elongation, "1 (round) to 4")
        require(0 <= args.size_spread <= 1, "--size-spread", args.size_spread, "0 to 1")
        require(0 <= args.irregularity <= 0.2, "--irregularity", args.irregularity, "0 to 0.2")
        require(0 <= args.density_spread <= 1, "--density-spread", args.density_spread, "0 to 1")
    else:
        low, high = args.scale
        require(0.1 <= low <= high <= 10, "--scale", f"{low} {high}", "LOW at most HIGH, between 0.1 and 10")
        require(0 < args.density_scale <= 10, "--density-scale", args.density_scale, "above 0, at most 10")
        require(0 <= args.gap <= 100, "--gap", args.gap, "0 to 100 pixels")
        require(0 <= args.max_overlap <= 0.9, "--max-overlap", args.max_overlap, "0 to 0.9")
        require(
            not (args.max_overlap and args.gap),
            "--max-overlap",
            args.max_overlap,
            f"has no effect with --gap {args.gap}",
        )
        both = args.density is not None and args.density_scale != 1
        require(not both, "--density-scale", args.density_scale, "has no effect with --density")
    if faults:
        raise InputError("; ".join(faults))


def _add_shared_flags(parser: argparse.ArgumentParser, size: int | None, size_help: str) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder, or one to continue")
    parser.add_argument("--count", type=int, default=100, help="images in all (default: %(default)s)")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=size and [size],
        metavar="PIXELS",
        help=f"one number or H W ({size_help})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the whole set (default: %(default)s)")


def _add_simulate(commands) -> None:
    parser = commands.add_parser(
        "simulate", help="draw nuclei from numbers", description="Draw nuclei from numbers.", allow_abbrev=False
    )
    _add_shared_flags(parser, 256, "default: 256")
    cells = parser.add_argument_group("cells; spreads are standard deviation / mean")
    cells.add_argument("--cell-size", type=float, default=20, help="mean diameter in pixels (default: %(default)s)")
    cells.add_argument("--size-spread", type=float, default=0.2, help="of the diameter (default: %(default)s)")
    cells.add_argument("--elongation", type=float, default=1.35, help="mean long / short axis (default: %(default)s)")
    cells.add_argument(
        "--irregularity",
        type=float,
        default=0.04,
        help="how far outlines leave the ellipse, share of the radius (default: %(default)s)",
    )
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--density",
        type=float,
        default=0.15,
        help="mean share of the image that cells cover, 0..1 (default: %(default)s)",
    )
    layout.add_argument(
        "--density-spread", type=float, default=0.4, help="of that share from image to image (default: %(default)s)"
    )
    layout.add_argument(
        "--touching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether cells may touch (default: they may)",
    )
    parser.add_argument("--render", action="store_true", help="also draw simple fluorescence images of the nuclei")


def _add_recombine(commands) -> None:
    parser = commands.add_parser(
        "recombine",
        help="lay a lab's own cells out anew",
        description="Lay a lab's own cells out anew.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--instances", type=Path, required=True, metavar="FOLDER", help="label files: 0 background, one number per cell"
    )
    parser.add_argument(
        "--components", action="store_true", help="the files are binary masks: take every connected part as one cell"
    )
    _add_shared_flags(parser, None, "default: the most common size of the source")
    cells = parser.add_argument_group("cells")
    cells.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=(0.9, 1.1),
        metavar=("LOW", "HIGH"),
        help="resize each by a factor between (default: 0.9 1.1)",
    )
    cells.add_argument("--rotate", choices=ROTATIONS, default="free", help="turns and mirroring (default: %(default)s)")
    cells.add_argument(
        "--clusters",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"keep cells together that touch in the source, up to {LARGEST_CLUSTER} (default: they stay together)",
    )
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--density",
        type=float,
        help="share of the image that cells cover, 0..1 (default: each image takes a source image's)",
    )
    layout.add_argument("--density-scale", type=float, default=1.0, help="times the source's share (default: 1)")
    layout.add_argument(
        "--gap", type=int, help="least background pixels between pieces (default: 1, or 0 with --max-overlap)"
    )
    layout.add_argument(
        "--max-overlap", type=float, default=0.0, help="largest share of a cell that others may hide (default: 0)"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_simulate(commands)
    _add_recombine(commands)
    args = parser.parse_args(argv)
    if args.command == "recombine" and args.gap is None:
        args.gap = 0 if args.max_overlap else 1
    return args


def main(args: argparse.Namespace) -> None:
    check_args(args)
    if args.image_size is not None and len(args.image_size) == 1:
        args.image_size = args.image_size * 2
    if args.command == "simulate":
        run_simulate(args)
    else:
        run_recombine(args)


if __name__ == "__main__":
    run_command(main, parse_args)
