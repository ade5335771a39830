"""A folder of masks to generate images from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import InputError, list_some
from dataset.checked_files import CheckedFiles
from dataset.checks import for_all, or_error, read_pair, refuse_bad, refuse_bad_sizes
from dataset.config import DataConfig, Window
from dataset.files import (
    FileError,
    Pair,
    find_files,
    find_images,
    find_images_and_masks,
    match_names,
    read_mask_and_table,
)
from dataset.folder_hints import Listing, list_folder, warn_of_skipped
from dataset.gray import image_window, to_tensor
from dataset.mask_facts import MaskStats, mask_stats, named_apart
from dataset.mask_warnings import mask_warnings
from dataset.masks import decide_mask_rule
from dataset.names import MASK_ENDINGS, name_of, without_images
from dataset.views import View, view_of_file, whole_view

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskItem:
    """One mask to generate from, with its label and real image of the same pixels.

    Attributes:
        name: name of the mask, without suffix and without _masks.
        path: its file, or its folder of nuclei.
        view: the part to use, a square of the training size or the whole field.
        label: (H, W) with data type and ids of the file, resized by nearest neighbour; (K, H, W) float for a stack.
        prob_map: (K, H, W) float32, sums to 1 over K.
        image: (C, H, W) float32 in [-1, 1], the real image, or None.
        window: gray values of the real image that are mapped to -1 and 1, or None.
    """

    name: str
    path: Path
    view: View
    label: np.ndarray
    prob_map: np.ndarray
    image: np.ndarray | None
    window: Window | None = None


class MaskFolder:
    """Masks to generate from: a folder or one file. All are checked at the start. :meth:`load` reads them again.

    Attributes:
        names: names of the masks, sorted.
        paths: name -> mask file (or folder of nuclei).
        image_paths: name -> real image. None without ``image_dir``.
        sizes: name -> height and width of the mask's file.
        rule: how the masks are read.
    """

    def __init__(
        self,
        mask_path: str | Path,
        config: DataConfig,
        mask_type: str = "auto",
        image_dir: str | Path | None = None,
        progress: bool = False,
        normalize: bool = False,
        whole_scale: float | None = None,
        learned: str = "auto",
    ) -> None:
        """Find and check the masks.

        Args:
            mask_path: folder of masks, or one mask file.
            mask_type: one of :data:`MASK_TYPES`.
            image_dir: use only masks that have an image here.
            normalize: as in :class:`PairedFolder`.
            whole_scale: use whole masks, at this scale, instead of one square.
            learned: type of the masks in training, as of ``decide_mask_rule``.

        Raises:
            InputError: files are unusable. The message names them all.
        """
        if config.window_scope == "dataset" and config.window_values is None and image_dir is not None:
            raise ValueError("window_scope 'dataset' needs window_values: take the config of the training data set")
        self.config = config
        self.whole_scale = whole_scale
        listing = list_folder(mask_path, "mask") if Path(mask_path).is_dir() else None
        self.paths, self.image_paths = _find_masks(Path(mask_path), image_dir, listing)
        self.names = sorted(self.paths)
        warn_of_skipped([listing] if listing else [], self.paths.values())
        checked = self._read_all(f"masks of {mask_path}", progress)
        self.sizes = {name: size for name, (_, size) in checked.items()}
        stats = named_apart([checked[name][0] for name in self.names], [self.paths[name] for name in self.names])
        self.rule = decide_mask_rule(
            stats, config.num_classes, mask_type, mask_path, normalize, config.mask_values, learned
        )
        for warning in mask_warnings(stats, self.rule):
            logger.warning("masks in %s: %s", mask_path, warning)
        count = "1 mask" if len(self.names) == 1 else f"{len(self.names)} masks"
        logger.info("%s from %s; %s", count, mask_path, self.rule.reason)

    def _read_all(self, what: str, progress: bool) -> dict[str, tuple[MaskStats, tuple[int, int]]]:
        """Facts, height and width of every mask. Decodes only new and changed files."""
        folders = [
            str(paths[self.names[0]].absolute().parent) for paths in (self.paths, self.image_paths) if paths is not None
        ]
        memory = CheckedFiles(["masks", *folders, self.config.to_dict(), self.whole_scale])
        images = self.image_paths or {}
        files = {name: [path for path in (self.paths[name], images.get(name)) if path] for name in self.names}
        checked = {
            name: (MaskStats.from_plain(plain[0]), tuple(plain[1])) for name, plain in memory.recall(files).items()
        }
        todo = [name for name in self.names if name not in checked]
        if self.image_paths is not None and self.whole_scale is None:
            pairs = [Pair(name, self.image_paths[name], self.paths[name]) for name in todo]
            refuse_bad_sizes(pairs, self.config, what)
        errors = []
        for name, result in zip(todo, for_all(or_error(self._check), todo, "reading masks", progress), strict=True):
            if isinstance(result, FileError):
                errors.append(result)
                continue
            checked[name] = result
            memory.remember(name, [result[0].to_plain(), result[1]])
        memory.save()
        refuse_bad(errors, len(self.names), what)
        return checked

    def _read(self, name: str) -> tuple[np.ndarray | None, np.ndarray, str]:
        """The image if there is one, the mask, and the kind of its colour table."""
        if self.image_paths is None:
            return None, *read_mask_and_table(self.paths[name])
        pair = read_pair(self.image_paths[name], self.paths[name], self.config.channels)
        return pair.image, pair.mask, pair.table

    def _check(self, name: str) -> tuple[MaskStats, tuple[int, int]]:
        """Facts about a mask, and its height and width."""
        _, mask, table = self._read(name)
        size = (mask.shape[-2], mask.shape[-1])
        self._view(name, size)
        return mask_stats(self.paths[name], mask, self.paths[name].is_dir(), table), size

    def _view(self, name: str, size: tuple[int, int], rng: np.random.Generator | None = None) -> View:
        if self.whole_scale is not None:
            return whole_view(*size, self.whole_scale)
        return view_of_file(self.paths[name], size, self.config, rng)

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.names)

    def view(self, name: str, rng: np.random.Generator | None = None) -> View:
        """The part that :meth:`load` uses. Does not read the file."""
        return self._view(name, self.sizes[name], rng)

    def view_sizes(self) -> set[tuple[int, int]]:
        """Different heights and widths of the views of all masks."""
        return {self.view(name).size for name in self.names}

    def load(self, name: str, rng: np.random.Generator | None = None) -> MaskItem:
        """Read one mask and its image. Without ``rng``, a random crop takes the middle square."""
        image, mask, _ = self._read(name)
        view = self._view(name, mask.shape[-2:], rng)
        label = view.apply_labels(mask)
        if label.ndim == 3 and label.dtype.kind != "f":  # only float stacks can be read again from TIFF
            label = self.rule.prob_map(label)
        window = tensor = None
        if image is not None:
            window = image_window(image, self.config)
            tensor = to_tensor(view.apply_image(image), window, self.config.channels).numpy()
        prob = np.ascontiguousarray(self.rule.prob_map(mask, view), dtype=np.float32)
        return MaskItem(name, self.paths[name], view, label.copy(), prob, tensor, window)


def _find_masks(
    mask_path: Path, image_dir: str | Path | None, listing: Listing | None
) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """Masks by name, and images by name if ``image_dir`` is given. Then masks without an image are left out."""
    if listing and image_dir is not None:
        images, masks = find_images_and_masks(image_dir, mask_path, (None, listing))
    else:
        masks = find_files(mask_path, "mask", listing) if listing else {name_of(mask_path.name): mask_path}
        images = find_images(image_dir) if image_dir is not None else {}
    if image_dir is not None:
        pairs, _, lonely = match_names(images, masks)
        if not pairs:
            raise InputError(
                f"none of the {len(lonely)} masks of {mask_path} has an image in {image_dir}: names must agree"
            )
        if lonely:
            logger.info("%d masks without an image in %s are left out: %s", len(lonely), image_dir, list_some(lonely))
        return {pair.name: pair.mask_path for pair in pairs}, {pair.name: pair.image_path for pair in pairs}
    masks = without_images(masks)
    short = {_without_ending(stem): path for stem, path in masks.items()}
    return (short if len(short) == len(masks) else masks), None


def _without_ending(stem: str) -> str:
    for ending in MASK_ENDINGS:
        if stem.endswith(ending) and stem != ending:
            return stem.removesuffix(ending)
    return stem
