"""Label maps of the page: to and from the browser, from a mask file, from a random layout."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common.cells import connected_cells, without_gaps
from common.errors import InputError
from dataset.config import DataConfig
from dataset.decode import decoding_at_most
from dataset.files import read_mask_and_table
from dataset.mask_facts import mask_stats
from dataset.masks import MASK_TYPES, MaskRule, decide_mask_rule
from dataset.names import MASK_SUFFIXES
from dataset.views import View, view_of, whole_view
from layouts.nuclei import HEADROOM, NucleiSettings, simulate_field
from page.uploads import uploaded

LEAST_SIDE, MOST_SIDE = 4, 1024  # pixels of a canvas
LARGEST_LABEL = 65535
MOST_DECODED = 2**26  # bytes of an uploaded mask: a few seconds of work; others wait meanwhile
BEST_COVER = 0.3  # of a large mask, the square is shown whose cell fraction is nearest to this
CELLS, CLASSES = "cells", "classes"  # a label holds cell numbers, or class numbers


def label_kinds(config: DataConfig, mask_type: str) -> tuple[str, ...]:
    """What a person may draw for this model, the likely kind first.

    Args:
        config: of the checkpoint.
        mask_type: that training was given.
    """
    if config.mask_values is not None or config.num_classes > 3:
        return (CLASSES,)
    if config.num_classes == 2:
        return (CELLS,)
    return (CLASSES, CELLS) if mask_type == "classes" else (CELLS, CLASSES)


def check_size(height: int, width: int) -> None:
    """Refuse a canvas before anything of its size is made.

    Raises:
        InputError: a side is too short or too long.
    """
    for name, side in (("height", height), ("width", width)):
        if not LEAST_SIDE <= side <= MOST_SIDE:
            raise InputError(f"{name} {side}: a canvas has {LEAST_SIDE} to {MOST_SIDE} pixels a side.")


def pack(label: np.ndarray) -> dict[str, Any]:
    """A label map (H, W) for JSON: its size, and its pixels as base64 of 16-bit numbers, low byte first."""
    content = base64.b64encode(np.ascontiguousarray(label, dtype="<u2").tobytes()).decode()
    return {"height": label.shape[0], "width": label.shape[1], "label": content}


def unpack(height: int, width: int, content: str) -> np.ndarray:
    """The inverse of :func:`pack`.

    Returns:
        (H, W) uint16.

    Raises:
        InputError: a size out of bounds, or other than so many pixels.
    """
    check_size(height, width)
    try:
        pixels = base64.b64decode(content, validate=True)
    except ValueError as error:
        raise InputError("label: no base64.") from error
    if len(pixels) != 2 * height * width:
        raise InputError(f"label: {len(pixels)} bytes, but {width} x {height} pixels have {2 * height * width}.")
    return np.frombuffer(pixels, dtype="<u2").reshape(height, width).astype(np.uint16)


def read_label(
    content: bytes,
    name: str,
    config: DataConfig,
    kind: str,
    mask_type: str = "auto",
    whole: bool = False,
    normalize: bool = False,
    learned: str = "auto",
) -> np.ndarray:
    """A mask file from the browser as a label map.

    Args:
        content: of the file.
        name: that the user's file has. Only its suffix is used; messages show it.
        config: of the checkpoint.
        kind: :data:`CELLS` or :data:`CLASSES`.
        mask_type: what the file holds, one of ``MASK_TYPES``.
        whole: take all of the mask, not the square that the model sees.
        normalize: divide soft masks by their sum.
        learned: type of the masks in training, as of ``decide_mask_rule``.

    Returns:
        (H, W) uint16. A soft mask becomes its most probable classes.

    Raises:
        InputError: the file cannot be read, is unclear, decodes to more than :data:`MOST_DECODED` bytes, or is too
            large for a canvas.
    """
    if mask_type not in MASK_TYPES:
        raise InputError(f"mask type {mask_type!r} is unknown; choose one of {', '.join(MASK_TYPES)}.")
    with uploaded(content, name, MASK_SUFFIXES) as path, decoding_at_most(MOST_DECODED):
        mask, table = read_mask_and_table(path)
        facts = [mask_stats(name, mask, False, table)]
        rule = decide_mask_rule(facts, config.num_classes, mask_type, name, normalize, config.mask_values, learned)
        return label_of_mask(mask, rule, kind, view_on_canvas(mask, rule, config, whole))


def view_on_canvas(mask: np.ndarray, rule: MaskRule, config: DataConfig, whole: bool) -> View:
    """The part of a mask that a drawing begins with: all of it, or the square that the model sees.

    For models of squares at native scale, this is the square that shows cells best: large masks have many empty ones.

    Raises:
        InputError: all of the mask is too large for a canvas, or the mask is smaller than the square.
    """
    shape = mask.shape[-2:]
    if whole:
        if max(shape) > MOST_SIDE:
            raise InputError(
                f"The mask has {shape[1]} x {shape[0]} pixels, and a canvas at most {MOST_SIDE} a side. Load the "
                "square that the model sees, or cut the mask into pieces first."
            )
        return whole_view(*shape)
    view, side = view_of(shape, config), config.image_size
    if config.crop != "random":
        return view
    step = max(1, side // 16)
    cells = torch.from_numpy(rule.class_map(mask) > 0)[None].float()
    columns = F.avg_pool2d(cells, (side, 1), (step, 1), divisor_override=1)  # sums; exact
    sums = F.avg_pool2d(columns, (1, side), (1, step), divisor_override=1)[0].double().numpy()  # of each square
    row, column = np.unravel_index(np.abs(sums / side**2 - BEST_COVER).argmin(), sums.shape)
    return replace(view, top=step * int(row), left=step * int(column))


def label_of_mask(mask: np.ndarray, rule: MaskRule, kind: str, view: View) -> np.ndarray:
    """(H, W) uint16 label map of a part of a mask as stored. Other arguments and errors as in :func:`read_label`."""
    check_size(*view.size)
    if kind == CELLS and rule.mask_type == "instances":
        return _cells(view.apply_labels(mask))
    classes = rule.class_map(mask, view)
    return classes.astype(np.uint16) if kind == CLASSES else cells_of_classes(classes)


def cells_of_classes(class_map: np.ndarray) -> np.ndarray:
    """(H, W) uint16 label map of the connected areas of class 1. All other classes become background."""
    return _cells(connected_cells(class_map == 1))


def _cells(instance_map: np.ndarray) -> np.ndarray:
    """An instance map as a label map of cells, numbered without gaps."""
    cells = without_gaps(instance_map)
    if cells.max() > LARGEST_LABEL:
        raise InputError(f"{cells.max()} cells are more than 16 bits can number.")
    return cells.astype(np.uint16)


def random_label(
    height: int,
    width: int,
    cell_size: float,
    density: float,
    seed: int,
    kind: str,
    num_classes: int,
    before_piece: Callable[[float], None] = lambda share: None,
) -> np.ndarray:
    """A random layout of simulated nuclei. If the label holds classes, each nucleus has a random one.

    Args:
        height, width: of the canvas in pixels.
        cell_size: mean diameter in pixels.
        density: fraction of the canvas that cells cover.
        seed: of the layout.
        kind: :data:`CELLS` or :data:`CLASSES`.
        num_classes: of the model, with the background.
        before_piece: called with the share of the work that is done.

    Returns:
        (H, W) uint16.

    Raises:
        InputError: a number out of bounds.
    """
    check_size(height, width)
    if not 4 <= cell_size <= min(height, width):
        raise InputError(f"cell size {cell_size:g}: give 4 to {min(height, width)} pixels.")
    if not 0 < density <= HEADROOM[True]:
        raise InputError(f"density {density:g}: give a share above 0, at most {HEADROOM[True]:g}.")
    settings = NucleiSettings(
        height, width, cell_size, size_spread=0.2, elongation=1.35, irregularity=0.04, density=density,
        density_spread=0.2, touching=True, render=False, seed=seed,
    )  # fmt: skip
    cells, _ = simulate_field(settings, 0, before_piece)
    if kind == CELLS:
        return cells.astype(np.uint16)
    classes = np.random.default_rng((seed, 1)).integers(1, num_classes, int(cells.max()) + 1)
    classes[0] = 0
    return classes[cells].astype(np.uint16)
