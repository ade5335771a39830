"""Masks of a folder, to begin a drawing with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from common.disk import real_path
from common.errors import InputError
from common.pictures import mask_picture
from dataset.config import DataConfig
from dataset.files import read_mask
from dataset.mask_folder import MaskFolder
from page.labels import label_of_mask, view_on_canvas

MOST_AT_ONCE = 15  # thumbnails of one answer
THUMBNAIL_SIDE = 96  # pixels, at most


class StartMasks:
    """A folder of masks to choose from; all of them are checked at the start, as for ``sample_ddp.py``.

    Args:
        mask_dir: folder of masks.
        config: of the checkpoint.
        mask_type: what the masks hold, one of ``MASK_TYPES``.
        normalize: divide soft masks by their sum.
        learned: type of the masks in training, as of ``decide_mask_rule``.

    Raises:
        InputError: masks that cannot be used.
    """

    def __init__(
        self, mask_dir: Path, config: DataConfig, mask_type: str, normalize: bool, learned: str = "auto"
    ) -> None:
        self.folder = MaskFolder(mask_dir, config, mask_type, progress=True, normalize=normalize, learned=learned)
        self.name = "/".join(real_path(mask_dir).parts[-2:])
        self.names = self.folder.names

    def find(self, contains: str, first: int) -> tuple[int, list[int]]:
        """Masks with this text in their names: how many there are, and the numbers of some, from the ``first`` on."""
        found = [number for number, name in enumerate(self.names) if contains.casefold() in name.casefold()]
        return len(found), found[first : first + MOST_AT_ONCE]

    def thumbnail(self, number: int) -> torch.Tensor:
        """A small picture (3, h, w) in [-1, 1] of the square of a mask that the model sees."""
        mask, rule = self._read(number), self.folder.rule
        prob_map = rule.prob_map(mask, view_on_canvas(mask, rule, self.folder.config, whole=False))
        picture = mask_picture(torch.from_numpy(np.ascontiguousarray(prob_map)))
        step = -(-max(picture.shape[1:]) // THUMBNAIL_SIDE)
        return picture[:, ::step, ::step]

    def label(self, number: int, kind: str, whole: bool) -> np.ndarray:
        """(H, W) uint16 label map of a whole mask, or of the square that its thumbnail shows.

        Raises:
            InputError: there is no such mask, or it is too large for a canvas.
        """
        if not 0 <= number < len(self.names):
            raise InputError(f"index {number}: there are {len(self.names)} masks, counted from 0.")
        mask, rule = self._read(number), self.folder.rule
        return label_of_mask(mask, rule, kind, view_on_canvas(mask, rule, self.folder.config, whole))

    def _read(self, number: int) -> np.ndarray:
        return read_mask(self.folder.paths[self.names[number]])
