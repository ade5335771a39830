"""Image and mask folders as tensors: which part of an image is used and how gray values become [-1, 1].

The way of a file: ``files`` reads it as stored; ``masks`` says once per folder what its masks hold; a
:class:`View` cuts the same square out of image, mask and label; the window maps gray values to [-1, 1].
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.disk import file_sha256
from common.errors import InputError, list_some
from dataset.checked_files import CheckedFiles
from dataset.config import DataConfig, Window
from dataset.files import (
    IMAGE_ENDING,
    MASK_ENDINGS,
    FileError,
    Pair,
    find_files,
    find_images_and_masks,
    match_names,
    pair_files,
    read_image,
    read_mask,
    read_size,
)
from dataset.gray import ROBUST_PERCENTILES, fit_channels, image_window, percentile_windows, to_tensor
from dataset.masks import MaskRule, MaskStats, class_map, decide_mask_rule, mask_stats, one_hot, prob_map
from dataset.views import SYMMETRIES, View, native_view, turn, view_of, view_of_file, whole_view

PAIRS_WORTH_A_LOOK = 2000  # at their headers first
SECONDS_BETWEEN_LINES = 20  # of the log, where no progress bar can be shown
logger = logging.getLogger(__name__)


def _hard_or_soft(mask: np.ndarray, view: View, rule: MaskRule) -> np.ndarray:
    """(S, S) uint8 class map of a hard mask, (K, S, S) float32 of a soft one; hard masks stay hard when resized."""
    height, width = mask.shape[-2:]
    if not rule.is_hard:
        if view.is_native(height, width):
            return prob_map(view.apply_probabilities(mask.reshape(-1, height, width)), rule)
        return view.apply_probabilities(prob_map(mask, rule))
    if view.is_native(height, width):
        return view.cut(class_map(mask, rule))  # touching cells are seen across the square's border
    return class_map(view.apply_labels(mask), rule)  # a boundary drawn after resizing keeps its width


# --------------------------------------------------------------------------------------------------------- data sets


def _for_all(function: Callable[[Any], Any], items: Sequence[Any], title: str, progress: bool) -> Iterable[Any]:
    """``function`` of every item in order, by a few threads: decoders release the interpreter lock."""
    block = 256  # bounds what waits in memory
    spoken = time.monotonic()
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(items), desc=title, unit="file", disable=None if progress else True) as bar,
    ):
        for start in range(0, len(items), block):
            if progress and bar.disable and time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                logger.info("%s: %d of %d", title, start, len(items))
            for result in pool.map(function, items[start : start + block]):
                bar.update()
                yield result


def _or_error(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a FileError instead of raising it, so that all bad files can be named at once."""

    def wrapped(item: Any) -> Any:
        try:
            return function(item)
        except FileError as error:
            return error

    return wrapped


def _refuse_bad(errors: Sequence[FileError], total: int, what: str) -> None:
    """All bad files in one message: files with one fault together, three names of each and how many more."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        names_by_reason: dict[str, list[str]] = {}
        for error in errors:
            names_by_reason.setdefault(error.reason, []).append(error.path.name)
        faults = [f"{list_some(names)}: {reason}" for reason, names in names_by_reason.items()]
        more = f"; and {len(faults) - 3} more faults" if len(faults) > 3 else ""
        raise InputError(f"{len(errors)} of {total} {what} cannot be used. {'; '.join(faults[:3])}{more}")


def refuse_bad_sizes(pairs: Sequence[Pair], config: DataConfig, what: str) -> None:
    """Refuse what the headers of many files show, within seconds: the decode that follows may take long."""
    if len(pairs) < PAIRS_WORTH_A_LOOK:
        return

    def check(pair: Pair) -> None:
        image, mask = read_size(pair.image_path), read_size(pair.mask_path)
        if image is not None:
            view_of_file(pair.image_path, image, config)
        if image is not None and mask is not None:
            _check_same_size(image, mask, pair.image_path, pair.mask_path)

    errors = [one for one in _for_all(_or_error(check), pairs, "reading headers", False) if one is not None]
    _refuse_bad(errors, len(pairs), what)


class _Checked(NamedTuple):
    """What is kept of a pair when it was read for the first time, beside its pixels."""

    stats: MaskStats
    window: Window
    sample: np.ndarray  # (n, C) some gray values, for a window over all images
    brightest: float
    dtype: np.dtype
    nbytes: int  # of the pixels as decoded

    def to_plain(self) -> dict[str, Any]:
        """Plain types; of the sample only its number of channels."""
        plain = self._asdict() | {"stats": self.stats.to_plain(), "dtype": str(self.dtype)}
        return plain | {"sample": self.sample.shape[1]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> _Checked:
        """The inverse of :meth:`to_plain`, with an empty sample."""
        read = {"stats": MaskStats.from_plain(plain["stats"]), "dtype": np.dtype(plain["dtype"])}
        return cls(
            **plain
            | read
            | {"window": _as_tuples(plain["window"]), "sample": np.empty((0, plain["sample"]), read["dtype"])}
        )


def _as_tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _read_pair(pair: Pair, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    image = fit_channels(read_image(pair.image_path), config.channels, pair.image_path)
    mask = read_mask(pair.mask_path)
    _check_same_size(image.shape[:2], mask.shape[-2:], pair.image_path, pair.mask_path)
    return image, mask


def _check_same_size(image: Sequence[int], mask: Sequence[int], image_path: Path, mask_path: Path) -> None:
    """Heights and widths must agree."""
    if tuple(image) != tuple(mask):
        raise FileError(
            mask_path,
            f"has {mask[1]} x {mask[0]} pixels, but its image {image_path.name} {image[1]} x {image[0]}: "
            "they must agree",
        )


class PairedFolder(torch.utils.data.Dataset):
    """Images and masks to train on, paired by name, all checked before the first step.

    Every file is decoded once at the start. As long as they fit ``memory_gb`` they stay in memory as stored (for --crop
    center already resized), else they are read again at each access. Then the next start decodes only files that are
    new or changed.

    Attributes:
        pairs: what is trained on, sorted by name.
        config: with ``window_values`` set where the scope is "dataset".
        rule: what the masks hold.
        windows: gray values of each pair's window.
        dtypes: of each pair's image file.
        stored_channels: most channels of a file; 1 where all are gray.
        in_memory: whether all files fit.
    """

    def __init__(
        self,
        image_dir: str | Path,
        mask_dir: str | Path,
        config: DataConfig,
        mask_type: str = "auto",
        augment: bool = True,
        seed: int = 0,
        memory_gb: float = 4.0,
        progress: bool = False,
        names: Iterable[str] | None = None,
        normalize: bool = False,
    ) -> None:
        """Read and check all pairs.

        Args:
            image_dir: folder of images.
            mask_dir: folder of masks.
            config: sizes, classes, crop, window.
            mask_type: one of :data:`MASK_TYPES`.
            augment: flips and quarter turns, the same for image and mask.
            seed: with the draw of :meth:`__getitem__` it fixes every random choice.
            memory_gb: most memory for decoded files.
            progress: show a progress bar.
            names: keep these pairs only.
            normalize: divide soft maps by their sum instead of refusing those that do not sum to one.

        Raises:
            InputError: any file that cannot be used, all of them in one message.
        """
        self.pairs = _keep_names(pair_files(image_dir, mask_dir), names, image_dir)
        self.config, self.augment, self.seed = config, augment, seed
        self.in_memory = True
        self._images: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        checked = self._read_all(f"pairs of {image_dir} and {mask_dir}", memory_gb * 2**30, progress)
        self.rule = decide_mask_rule([one.stats for one in checked], config.num_classes, mask_type, mask_dir, normalize)
        self.windows = [one.window for one in checked]
        self.dtypes = [one.dtype for one in checked]
        self.stored_channels = max(one.sample.shape[1] for one in checked)
        if config.window_scope == "dataset" and config.window_values is None:
            self.config = dataclasses.replace(config, window_values=_common_window(checked, config))
            self.windows = [self.config.window_values] * len(self.pairs)
        _hint_at_window(checked, self.config)
        for index, mask in enumerate(self._masks):
            self._masks[index] = self._prepare_mask(mask)
        where = "in memory" if self.in_memory else "read again at each access"
        logger.info("%d pairs from %s, %s; %s", len(self.pairs), image_dir, where, self.rule.reason)

    def _read_all(self, what: str, budget: float, progress: bool) -> list[_Checked]:
        """Fill ``_images`` and ``_masks`` while they fit; the pixels are taken out of what is returned."""
        memory, known = self._recall()
        if sum(one.nbytes for one in known.values()) > budget:
            self.in_memory = False  # so that what is known need not be decoded
        else:
            known = {}
        todo = [index for index in range(len(self.pairs)) if index not in known]
        refuse_bad_sizes([self.pairs[index] for index in todo], self.config, what)
        errors = []
        used = 0.0
        check = _or_error(lambda index: self._check_pair(self.pairs[index]))
        for index, result in zip(todo, _for_all(check, todo, "reading pairs", progress), strict=True):
            if isinstance(result, FileError):
                errors.append(result)
                continue
            image, mask, facts = result
            known[index] = facts
            if memory is not None:
                memory.remember(self.pairs[index].name, facts.to_plain())
            used += image.nbytes + mask.nbytes
            if used > budget and self.in_memory:
                self.in_memory = False
                self._images, self._masks = [], []
            if self.in_memory:
                self._images.append(image)
                self._masks.append(mask)
        if memory is not None and not self.in_memory:
            memory.save()
        _refuse_bad(errors, len(self.pairs), what)
        return [known[index] for index in range(len(self.pairs))]

    def _recall(self) -> tuple[CheckedFiles | None, dict[int, _Checked]]:
        """What earlier starts found out, by index. Nothing is remembered where one window is sought for all images."""
        if self._seeks_common_window:
            return None, {}
        first = self.pairs[0]
        folders = [str(path.absolute().parent) for path in (first.image_path, first.mask_path)]
        memory = CheckedFiles(["pairs", *folders, self.config.to_dict()])
        facts = [memory.recall(pair.name, [pair.image_path, pair.mask_path]) for pair in self.pairs]
        return memory, {index: _Checked.from_plain(one) for index, one in enumerate(facts) if one is not None}

    @property
    def _seeks_common_window(self) -> bool:
        return self.config.window_scope == "dataset" and self.config.window_values is None

    def _check_pair(self, pair: Pair) -> tuple[np.ndarray, np.ndarray, _Checked]:
        image, mask = _read_pair(pair, self.config)
        view = view_of_file(pair.image_path, image.shape, self.config)
        stats = mask_stats(pair.mask_path.name, mask, pair.mask_path.is_dir())
        common = self._seeks_common_window
        most = max(64, min(2**14, 2**24 // len(self.pairs)))  # bounds the memory for all images together
        pixels = image.reshape(-1, image.shape[2])
        sample = pixels[:: max(1, image.size // most) if common else pixels.size].copy()  # a view would keep the image
        # The common window follows when all are read.
        window = ((0.0, 1.0),) if common else image_window(image, self.config)
        facts = _Checked(stats, window, sample, float(image.max()), image.dtype, image.nbytes + mask.nbytes)
        return self._prepare_image(image, view), mask, facts

    def _prepare_image(self, image: np.ndarray, view: View) -> np.ndarray:
        """As kept in memory. The view of --crop center never changes, so the work is done once."""
        return np.ascontiguousarray(view.apply_image(image)) if self.config.crop == "center" else image

    def _prepare_mask(self, mask: np.ndarray) -> np.ndarray:
        """As kept in memory: class maps of hard masks, soft masks as stored (resized for --crop center)."""
        if self.config.crop == "center":
            return _hard_or_soft(mask, view_of(mask.shape[-2:], self.config), self.rule)
        return class_map(mask, self.rule) if self.rule.is_hard else mask

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self.in_memory:
            return self._images[index], self._masks[index]
        image, mask = _read_pair(self.pairs[index], self.config)
        return self._prepare_image(image, view_of(image.shape, self.config)), self._prepare_mask(mask)

    @cached_property
    def image_hashes(self) -> list[str]:
        """SHA-256 of every image file."""
        return list(_for_all(file_sha256, [pair.image_path for pair in self.pairs], "hashing images", progress=False))

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One example; every random choice is a function of (seed, draw) and of nothing else.

        Args:
            key: (index of the pair, draw). A training run counts its draws, so that a resumed run repeats them.

        Returns:
            "image": (C, S, S) float32 in [-1, 1]; "mask": (S, S) uint8 class map, or (K, S, S) float32 for soft masks.
        """
        index, draw = key
        rng = self._rng(draw)
        symmetry = int(rng.integers(SYMMETRIES)) if self.augment else 0
        return self._example(index, rng, symmetry)

    def _rng(self, draw: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed % 2**64, draw % 2**64], np.uint64)))

    def symmetry(self, draw: int) -> int:
        """Which flip and turn :meth:`__getitem__` makes in this draw."""
        return int(self._rng(draw).integers(SYMMETRIES)) if self.augment else 0

    def mask(self, index: int, symmetry: int) -> Tensor:
        """The mask of :meth:`__getitem__` alone, for --crop center; the image is not read."""
        mask = self._masks[index] if self.in_memory else self._prepare_mask(read_mask(self.pairs[index].mask_path))
        return torch.from_numpy(np.array(turn(mask, (-2, -1), symmetry)))

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """As :meth:`__getitem__` without flips and turns; --crop random takes the middle unless ``rng`` is given."""
        return self._example(index, rng, 0)

    def _example(self, index: int, rng: np.random.Generator | None, symmetry: int) -> dict[str, Tensor]:
        image, mask = self._load(index)
        if self.config.crop == "random":
            view = native_view(image.shape[0], image.shape[1], self.config.image_size, rng)
            image = view.cut(image)
            mask = view.cut(mask) if self.rule.is_hard else _hard_or_soft(mask, view, self.rule)
        image, mask = turn(image, (0, 1), symmetry), turn(mask, (-2, -1), symmetry)
        return {
            "image": to_tensor(image, self.windows[index], self.config.channels),
            "mask": torch.from_numpy(np.array(mask)),  # a copy: callers may write
        }


def _keep_names(pairs: list[Pair], names: Iterable[str] | None, where: str | Path) -> list[Pair]:
    if names is None:
        return pairs
    wanted = set(names)
    missing = sorted(wanted - {pair.name for pair in pairs})
    if missing:
        raise InputError(f"{len(missing)} of {len(wanted)} names are no pairs of {where}: {list_some(missing)}")
    kept = [pair for pair in pairs if pair.name in wanted]
    if not kept:
        raise InputError(f"no pair of {where} is left: the list of names is empty")
    return kept


def _common_window(checked: Sequence[_Checked], config: DataConfig) -> Window:
    """One window for all images; each image counts about alike, whatever its size."""
    kinds = sorted({str(one.dtype) for one in checked})
    if len(kinds) > 1:
        raise InputError(
            f"images hold different kinds of gray values ({', '.join(kinds)}), one window cannot serve them: use "
            "--window-scope image"
        )
    if kinds == ["uint8"] and config.window is None:
        return ((0.0, 255.0),)
    samples = [np.broadcast_to(one.sample, (len(one.sample), config.channels)) for one in checked]  # gray beside RGB
    return percentile_windows(np.concatenate(samples), config)


def _hint_at_window(checked: Sequence[_Checked], config: DataConfig) -> None:
    """Dark 8-bit images keep their range by default; say so, because a network learns them badly."""
    brightest = float(np.median([one.brightest for one in checked]))
    if config.window is None and config.window_values is None and checked[0].dtype == np.uint8 and brightest < 128:
        hint = "half of the images stay below gray %g of 255; --window %g %g would stretch each to the full range"
        logger.warning(hint, brightest, *ROBUST_PERCENTILES)


@dataclass(frozen=True)
class MaskItem:
    """One mask to generate from, with all that has to lie on the same pixels.

    Attributes:
        name: of the mask, without suffix and without _masks.
        path: its file, or its folder of nuclei.
        view: the part that is used, a square of the training size or the whole field.
        label: (H, W) in the file's own dtype and ids, nearest neighbour; (K, H, W) float for a stack.
        prob_map: (K, H, W) float32, sums to 1.
        image: (C, H, W) float32 in [-1, 1], the real image there, or None.
        window: gray values of the real image that became -1 and 1, or None.
    """

    name: str
    path: Path
    view: View
    label: np.ndarray
    prob_map: np.ndarray
    image: np.ndarray | None
    window: Window | None = None


class MaskFolder:
    """Masks to generate from: a folder or one file, all checked at the start, read again by :meth:`load`.

    Attributes:
        names: sorted.
        paths: name -> mask file (or folder of nuclei).
        image_paths: name -> real image, or None without ``image_dir``.
        rule: what the masks hold.
        config: as given.
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
    ) -> None:
        """Find and check the masks.

        Args:
            mask_path: folder of masks, or one mask file.
            config: that of the checkpoint.
            mask_type: one of :data:`MASK_TYPES`.
            image_dir: keep the masks that have an image here.
            progress: show a progress bar.
            normalize: as in :class:`PairedFolder`.
            whole_scale: take all of every mask, at this scale, instead of the square of the config.

        Raises:
            InputError: any file that cannot be used, all of them in one message.
        """
        if config.window_scope == "dataset" and config.window_values is None and image_dir is not None:
            raise ValueError("window_scope 'dataset' needs window_values: take the config of the training data set")
        self.config = config
        self.whole_scale = whole_scale
        self.paths, self.image_paths = _find_masks(Path(mask_path), image_dir)
        self.names = sorted(self.paths)
        checked = self._read_all(f"masks of {mask_path}", progress)
        self._sizes = {name: size for name, (_, size) in checked.items()}
        stats = [checked[name][0] for name in self.names]
        self.rule = decide_mask_rule(stats, config.num_classes, mask_type, mask_path, normalize)
        logger.info("%d masks from %s; %s", len(self.names), mask_path, self.rule.reason)

    def _read_all(self, what: str, progress: bool) -> dict[str, tuple[MaskStats, tuple[int, int]]]:
        """Facts about every mask, and its height and width; only files that are new or changed are decoded."""
        folders = [
            str(paths[self.names[0]].absolute().parent) for paths in (self.paths, self.image_paths) if paths is not None
        ]
        memory = CheckedFiles(["masks", *folders, self.config.to_dict(), self.whole_scale])
        checked = {}
        for name in self.names:
            images = [] if self.image_paths is None else [self.image_paths[name]]
            facts = memory.recall(name, [self.paths[name], *images])
            if facts is not None:
                checked[name] = MaskStats.from_plain(facts[0]), (facts[1], facts[2])
        todo = [name for name in self.names if name not in checked]
        if self.image_paths is not None and self.whole_scale is None:
            pairs = [Pair(name, self.image_paths[name], self.paths[name]) for name in todo]
            refuse_bad_sizes(pairs, self.config, what)
        errors = []
        for name, result in zip(todo, _for_all(_or_error(self._check), todo, "reading masks", progress), strict=True):
            if isinstance(result, FileError):
                errors.append(result)
                continue
            checked[name] = result
            memory.remember(name, [result[0].to_plain(), *result[1]])
        memory.save()
        _refuse_bad(errors, len(self.names), what)
        return checked

    def _read(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        path = self.paths[name]
        mask = read_mask(path)
        if self.image_paths is None:
            return mask, None
        image_path = self.image_paths[name]
        image = fit_channels(read_image(image_path), self.config.channels, image_path)
        _check_same_size(image.shape[:2], mask.shape[-2:], image_path, path)
        return mask, image

    def _check(self, name: str) -> tuple[MaskStats, tuple[int, int]]:
        """Facts about a mask, and its height and width."""
        mask, _ = self._read(name)
        size = (mask.shape[-2], mask.shape[-1])
        self._view(name, size)
        return mask_stats(self.paths[name].name, mask, self.paths[name].is_dir()), size

    def _view(self, name: str, size: tuple[int, int], rng: np.random.Generator | None = None) -> View:
        if self.whole_scale is not None:
            return whole_view(*size, self.whole_scale)
        return view_of_file(self.paths[name], size, self.config, rng)

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.names)

    def view(self, name: str, rng: np.random.Generator | None = None) -> View:
        """The part that :meth:`load` would take, without reading the file."""
        return self._view(name, self._sizes[name], rng)

    def view_sizes(self) -> set[tuple[int, int]]:
        """Height and width of all masks' views."""
        return {self.view(name).size for name in self.names}

    def load(self, name: str, rng: np.random.Generator | None = None) -> MaskItem:
        """Read one mask and its image. --crop random takes the middle square unless ``rng`` is given."""
        mask, image = self._read(name)
        view = self._view(name, mask.shape[-2:], rng)
        target = _hard_or_soft(mask, view, self.rule)
        if self.rule.is_hard:
            target = one_hot(target, self.rule.num_classes)
        label = view.apply_labels(mask)
        if label.ndim == 3 and label.dtype.kind != "f":  # a stack goes out as float TIFF, the only one that is read
            label = prob_map(label, self.rule)
        window = tensor = None
        if image is not None:
            window = image_window(image, self.config)
            tensor = to_tensor(view.apply_image(image), window, self.config.channels).numpy()
        prob = np.ascontiguousarray(target, dtype=np.float32)
        return MaskItem(name, self.paths[name], view, label.copy(), prob, tensor, window)


def _find_masks(mask_path: Path, image_dir: str | Path | None) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """Masks by name, and the images where ``image_dir`` is given; then only masks that have one are kept."""
    if mask_path.is_dir() and image_dir is not None:
        images, masks = find_images_and_masks(image_dir, mask_path)
    else:
        masks = find_files(mask_path, "mask") if mask_path.is_dir() else {mask_path.stem: mask_path}
        images = find_files(image_dir, "image") if image_dir is not None else {}
    if image_dir is not None:
        pairs, _, lonely = match_names(images, masks)
        if not pairs:
            raise InputError(
                f"none of the {len(lonely)} masks of {mask_path} has an image in {image_dir}: names must agree"
            )
        if lonely:
            logger.info("%d masks without an image in %s are left out: %s", len(lonely), image_dir, list_some(lonely))
        return {pair.name: pair.mask_path for pair in pairs}, {pair.name: pair.image_path for pair in pairs}
    # Cellpose keeps NAME_img and NAME_masks in one folder: only the latter are masks.
    endings = {stem: path for stem, path in masks.items() if stem.endswith(MASK_ENDINGS)}
    beside = {stem.removesuffix(IMAGE_ENDING) for stem in masks if stem not in endings}
    if endings and beside and all(_without_ending(stem) in beside for stem in endings):
        masks = endings
    short = {_without_ending(stem): path for stem, path in masks.items()}
    return (short if len(short) == len(masks) else masks), None


def _without_ending(stem: str) -> str:
    for ending in MASK_ENDINGS:
        if stem.endswith(ending) and stem != ending:
            return stem.removesuffix(ending)
    return stem
