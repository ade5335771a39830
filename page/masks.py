"""Masks of a folder, to begin a drawing with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import InputError
from common.pictures import mask_picture
from dataset.config import DataConfig
from dataset.files import read_mask
from dataset.mask_folder import MaskFolder
from dataset.views import View, view_of, whole_view
from page.labels import label_of_mask

MOST_AT_ONCE = 15  # thumbnails of one answer
THUMBNAIL_SIDE = 96  # pixels, at most
BEST_COVER = 0.3  # of a large mask, the square is taken whose cover by cells is nearest to this


class StartMasks:
    """A folder of masks to choose from; all of them are checked at the start, as for ``sample_ddp.py``.

    Args:
        mask_dir: folder of masks.
        config: of the checkpoint.
        mask_type: what the masks hold, one of ``MASK_TYPES``.
        normalize: divide soft masks by their sum.

    Raises:
        InputError: masks that cannot be used.
    """

    def __init__(self, mask_dir: Path, config: DataConfig, mask_type: str, normalize: bool) -> None:
        self.folder = MaskFolder(mask_dir, config, mask_type, progress=True, normalize=normalize)
        self.name = "/".join(mask_dir.resolve().parts[-2:])
        self.names = self.folder.names

    def find(self, contains: str, first: int) -> tuple[int, list[int]]:
        """How many masks have this text in their names, and the numbers of some of them, from the ``first`` on."""
        found = [number for number, name in enumerate(self.names) if contains.casefold() in name.casefold()]
        return len(found), found[first : first + MOST_AT_ONCE]

    def thumbnails(self, numbers: list[int]) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Number and name of masks, and small pictures (3, h, w) in [-1, 1]."""
        shown = []
        for number in numbers:
            mask = self._read(number)
            prob_map = self.folder.rule.prob_map(mask, self._square(number, mask))
            picture = mask_picture(torch.from_numpy(np.ascontiguousarray(prob_map)))
            step = -(-max(picture.shape[1:]) // THUMBNAIL_SIDE)
            shown.append(({"index": number, "name": self.names[number]}, picture[:, ::step, ::step]))
        return shown

    def label(self, number: int, kind: str, whole: bool) -> np.ndarray:
        """(H, W) uint16 label map of a mask, or of its square that the thumbnail shows.

        Raises:
            InputError: there is no such mask, or it is too large for a canvas.
        """
        if not 0 <= number < len(self.names):
            raise InputError(f"index {number}: there are {len(self.names)} masks, counted from 0.")
        mask = self._read(number)
        view = whole_view(*mask.shape[-2:]) if whole else self._square(number, mask)
        return label_of_mask(mask, self.folder.rule, kind, view)

    def _read(self, number: int) -> np.ndarray:
        return read_mask(self.folder.paths[self.names[number]])

    def _square(self, number: int, mask: np.ndarray) -> View:
        """A square of the training size that shows cells: large masks have many empty ones."""
        config, side = self.folder.config, self.folder.config.image_size
        view = view_of(mask.shape[-2:], config)
        if config.crop != "random":
            return view
        sums = np.pad((self.folder.rule.class_map(mask) > 0).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        cells = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]  # of each square
        distance = np.abs(cells / side**2 - BEST_COVER)
        top, left = np.unravel_index(distance.argmin(), distance.shape)
        return replace(view, top=int(top), left=int(left))
