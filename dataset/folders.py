"""A folder of images and a folder of masks as tensors for training.

``files`` reads a file as stored. ``masks`` decides once per folder what its masks hold. A :class:`View` cuts the same
square out of image, mask and label. The window maps gray values to [-1, 1].
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.disk import file_sha256
from common.errors import InputError, list_some
from common.randomness import derived_seed
from common.spread import evenly
from dataset.agreement import (
    MOST_PAIRS,
    agreement_warnings,
    flat_warning,
    gray_checksum,
    is_flat,
    mask_signature,
    refuse_masks_as_images,
    signature,
)
from dataset.checked_files import CheckedFiles
from dataset.checks import for_all, or_error, read_pair, refuse_bad, refuse_bad_sizes
from dataset.config import DataConfig, Window
from dataset.files import FileError, Pair, list_folders, pair_files, read_mask
from dataset.folder_hints import warn_of_skipped
from dataset.gray import (
    ROBUST_PERCENTILES,
    burnt_in_warning,
    channel_shares,
    colour_warnings,
    default_window_channels,
    image_window,
    is_burnt_in,
    narrow_channels_warning,
    percentile_windows,
    robust_maximum,
    spread_pixels,
    to_tensor,
)
from dataset.looks import measure_draw, measure_spread
from dataset.mask_facts import MaskStats, mask_stats, named_apart
from dataset.mask_warnings import mask_warnings, refuse_one_class
from dataset.masks import decide_mask_rule
from dataset.names import short_names
from dataset.scale import pixel_size, scale_warning
from dataset.views import SYMMETRIES, View, native_view, turn, view_of, view_of_file

logger = logging.getLogger(__name__)
NARROW_IMAGE = 0.02  # of the common gray range


class _Checked(NamedTuple):
    """Facts about a pair, from its first reading."""

    stats: MaskStats
    window: Window
    channels: int
    brightest: float
    darkest: float
    bright: float  # without hot pixels
    dtype: str
    nbytes: int  # of the pixels as decoded
    has_channels: bool  # the file says that its planes are no colours
    channel_shares: tuple[float, ...]
    pixel_um: float | None  # width of a pixel, if the file says it

    def to_plain(self) -> list[Any]:
        """As JSON can hold it."""
        return [self.stats.to_plain(), *self[1:]]

    @classmethod
    def from_plain(cls, plain: list[Any]) -> _Checked:
        """The inverse of :meth:`to_plain`."""
        return cls(MaskStats.from_plain(plain[0]), tuple(map(tuple, plain[1])), *plain[2:])


class _Compared(NamedTuple):
    """What tells whether an image and its mask belong together."""

    image: np.ndarray  # signature
    mask: np.ndarray  # signature
    is_flat: bool  # the image consists of pieces of one gray value
    is_equal: bool  # the image is its own mask
    is_burnt_in: bool  # a scale bar or text was drawn into the image


class TrainingImages(torch.utils.data.Dataset, ABC):
    """Images of a training set by number: what folders with masks and folders without masks share.

    Attributes:
        names: names of the images, sorted.
        image_paths: their files.
        config: how they are read.
        windows: gray window of each image.
        pixel_sizes: width of a pixel of each image in micrometres. None for files that do not say it.
        seed: decides every random choice, together with a draw.
        in_memory: whether all files fit into memory.
    """

    names: list[str]
    image_paths: list[Path]
    config: DataConfig
    windows: list[Window]
    pixel_sizes: list[float | None]
    seed: int
    in_memory: bool

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    @cached_property
    def image_hashes(self) -> list[str]:
        """SHA-256 of every image file."""
        return list(for_all(file_sha256, self.image_paths, "hashing images", progress=False))

    @abstractmethod
    def _kept_image(self, index: int) -> np.ndarray:
        """An image (H, W, C) as stored. With crop "center", the resized square."""

    def look_draw(self, index: int, draw: int) -> np.ndarray:
        """Look numbers (N,) of a random window of the image. It is not the window of the example of this draw."""
        rng = np.random.default_rng(derived_seed(self.seed, draw, 1))
        return measure_draw(self._kept_image(index), self.windows[index], self.config, rng)

    def look_windows(self, index: int) -> np.ndarray:
        """Look numbers (n, N) of windows spread over the image."""
        return measure_spread(self._kept_image(index), self.windows[index], self.config)


def sizes_by_name(folders: Sequence[TrainingImages]) -> dict[str, float | None]:
    """Width of a pixel by name of the image file, of one or several folders."""
    paths = [path for folder in folders for path in folder.image_paths]
    return dict(zip(short_names(paths), [size for folder in folders for size in folder.pixel_sizes], strict=True))


class PairedFolder(TrainingImages):
    """Images and masks for training, paired by name. All are checked before the first step.

    Every file is decoded once at the start. If all files fit into ``memory_gb``, they stay in memory as stored (with
    crop "center", already resized). If not, each access reads the file again, and the next start decodes only new and
    changed files.

    Attributes:
        pairs: the pairs, sorted by name.
        config: as given, with ``window_channels`` decided, and ``window_values`` set if the scope is "dataset".
        rule: how the masks are read.
        stored_channels: largest number of channels of a file; 1 if all are gray.
        colours: whether three channels are RGB. False if the files say that they are not.
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
        learned: str = "auto",
    ) -> None:
        """Read and check all pairs.

        Args:
            config: sizes, classes, crop, window.
            mask_type: one of :data:`MASK_TYPES`.
            augment: flip and turn at random, in the same way for image and mask.
            seed: decides every random choice, together with the draw of :meth:`__getitem__`.
            memory_gb: most memory for decoded files.
            names: use these pairs only. None: all.
            normalize: divide soft maps by their sum. If False, refuse those that do not sum to one.
            learned: type of the masks that a model was trained on, as of ``decide_mask_rule``.

        Raises:
            InputError: files are unusable. The message names them all.
        """
        listings = list_folders(image_dir, mask_dir)
        pairs = pair_files(image_dir, mask_dir, listings)
        known = [path for pair in pairs for path in (pair.image_path, pair.mask_path)]
        warn_of_skipped(listings, known)
        self.pairs = _keep_names(pairs, names, image_dir)
        self.names = [pair.name for pair in self.pairs]
        self.image_paths = [pair.image_path for pair in self.pairs]
        self.config, self.augment, self.seed = config, augment, seed
        self.in_memory = True
        self._latest: tuple[int, np.ndarray, np.ndarray] | None = None  # read last: index, image, mask
        self._images: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._samples: list[np.ndarray] = []  # (n, C) some gray values of each image, for a window over all images
        self._compared = {self.pairs[index].name for index in evenly(len(self.pairs), MOST_PAIRS)}
        self._compared_now: dict[str, _Compared] = {}  # of pairs that were decoded now
        checked = self._read_all(f"pairs of {image_dir} and {mask_dir}", memory_gb * 2**30, progress)
        compared, self._compared_now = dict(sorted(self._compared_now.items())), {}
        refuse_masks_as_images([one.is_equal for one in compared.values()], image_dir, mask_dir)
        _warn(flat_warning(list(compared), [one.is_flat for one in compared.values()]))
        _warn(burnt_in_warning(list(compared), [one.is_burnt_in for one in compared.values()]))
        stats = named_apart([one.stats for one in checked], [pair.mask_path for pair in self.pairs])
        self.rule = decide_mask_rule(
            stats, config.num_classes, mask_type, mask_dir, normalize, config.mask_values, learned
        )
        refuse_one_class(stats, self.rule, mask_dir)
        _warn(mask_warnings(stats, self.rule), f"masks in {mask_dir}: ")
        self._decide_windows(checked)
        small = [one.image for one in compared.values()], [one.mask for one in compared.values()]
        _warn(agreement_warnings(list(compared), *small), f"{image_dir} and {mask_dir}: ")
        notes = _odd_images(checked, self.pairs, self.config)
        notes += narrow_channels_warning([one.channel_shares for one in checked], self.config, checked[0].dtype)
        notes += colour_warnings(self.image_paths, self.stored_channels) + scale_warning(sizes_by_name([self]))
        _warn(notes, f"images in {image_dir}: ")
        for index, mask in enumerate(self._masks):
            self._masks[index] = self._prepare_mask(mask)
        where = "in memory" if self.in_memory else "read again at each access"
        logger.info("%d pairs from %s, %s; %s", len(self.pairs), image_dir, where, self.rule.reason)

    def _decide_windows(self, checked: Sequence[_Checked]) -> None:
        """Set what follows from the files of all images: windows, scale, and whether channels are colours."""
        self.windows = [one.window for one in checked]
        self.dtypes = [np.dtype(one.dtype) for one in checked]
        self.pixel_sizes = [one.pixel_um for one in checked]
        self.stored_channels = max(one.channels for one in checked)
        self.colours = not _all_have_channels(checked, self.pairs, self.config)
        if self.config.window_channels is None:
            decided = default_window_channels(self.config.channels, not self.colours)
            self.config = dataclasses.replace(self.config, window_channels=decided)
        if self._seeks_common_window:
            window = _common_window(self._samples, self.config)
            self.config = dataclasses.replace(self.config, window_values=window)
            self._samples = []
            self.windows = [window] * len(self.pairs)
        _hint_at_window(checked, self.config)

    def _read_all(self, what: str, budget: float, progress: bool) -> list[_Checked]:
        """Facts about all pairs. Fills ``_images`` and ``_masks`` while they fit into the budget, in bytes."""
        memory, known = self._recall()
        if sum(one.nbytes for one in known.values()) > budget:
            self.in_memory = False  # known files are then not decoded now
        else:
            known = {}
        todo = [index for index in range(len(self.pairs)) if index not in known]
        refuse_bad_sizes([self.pairs[index] for index in todo], self.config, what)
        errors = []
        used = 0.0
        check = or_error(lambda index: self._check_pair(self.pairs[index]))
        for index, result in zip(todo, for_all(check, todo, "reading pairs", progress), strict=True):
            if isinstance(result, FileError):
                errors.append(result)
                continue
            image, mask, known[index], sample = result
            if sample is not None:
                self._samples.append(sample)
            if memory is not None:
                memory.remember(self.pairs[index].name, known[index].to_plain())
            used += image.nbytes + mask.nbytes
            if used > budget and self.in_memory:
                self.in_memory = False
                self._images, self._masks = [], []
            if self.in_memory:
                self._images.append(image)
                self._masks.append(mask)
        if memory is not None and not self.in_memory:
            memory.save()
        refuse_bad(errors, len(self.pairs), what)
        return [known[index] for index in range(len(self.pairs))]

    def _recall(self) -> tuple[CheckedFiles | None, dict[int, _Checked]]:
        """Facts from earlier starts, by index. The cache is off if a window over all images must be found."""
        if self._seeks_common_window:
            return None, {}
        first = self.pairs[0]
        folders = [str(path.absolute().parent) for path in (first.image_path, first.mask_path)]
        memory = CheckedFiles(["pairs", *folders, self.config.to_dict()])
        facts = memory.recall({pair.name: [pair.image_path, pair.mask_path] for pair in self.pairs})
        numbers = {pair.name: index for index, pair in enumerate(self.pairs)}
        return memory, {numbers[name]: _Checked.from_plain(plain) for name, plain in facts.items()}

    @property
    def _seeks_common_window(self) -> bool:
        return self.config.window_scope == "dataset" and self.config.window_values is None

    def _check_pair(self, pair: Pair) -> tuple[np.ndarray, np.ndarray, _Checked, np.ndarray | None]:
        image, mask, table, has_channels = read_pair(pair.image_path, pair.mask_path, self.config.channels)
        view = view_of_file(pair.image_path, image.shape, self.config)
        stats = mask_stats(pair.mask_path, mask, pair.mask_path.is_dir(), table)
        config = self.config
        if config.window_channels is None:
            channels = default_window_channels(image.shape[2], has_channels)
            config = dataclasses.replace(config, window_channels=channels)
        # A window over all images is found when all are read.
        window = ((0.0, 1.0),) if self._seeks_common_window else image_window(image, config)
        facts = _Checked(
            stats=stats,
            window=window,
            channels=image.shape[2],
            brightest=float(image.max()),
            darkest=float(image.min()),
            bright=robust_maximum(image),
            dtype=str(image.dtype),
            nbytes=image.nbytes + mask.nbytes,
            has_channels=has_channels,
            channel_shares=channel_shares(image),
            pixel_um=pixel_size(pair.image_path),
        )
        if pair.name in self._compared:
            is_equal = gray_checksum(image) == stats.checksum
            self._compared_now[pair.name] = _Compared(
                signature(image), mask_signature(mask), is_flat(image), is_equal, is_burnt_in(image)
            )
        return self._prepare_image(image, view), mask, facts, self._sample(image)

    def _sample(self, image: np.ndarray) -> np.ndarray | None:
        """(n, C) gray values spread over an image, if a window over all images must be found."""
        if not self._seeks_common_window:
            return None
        most = max(64, min(2**14, 2**24 // len(self.pairs)))  # bounds the memory for all images together
        pixels = spread_pixels(image, max(1, most // image.shape[2]))
        return np.repeat(pixels, self.config.channels // image.shape[2], axis=1)  # a copy; gray counts beside RGB

    def _prepare_image(self, image: np.ndarray, view: View) -> np.ndarray:
        """The image as kept in memory. With crop "center" the view never changes, so the image is resized once."""
        return np.ascontiguousarray(view.apply_image(image)) if self.config.crop == "center" else image

    def _prepare_mask(self, mask: np.ndarray) -> np.ndarray:
        """The mask as kept in memory: a class map, or a soft mask as stored. With crop "center", both are resized."""
        if self.config.crop == "center":
            return self._target(mask, view_of(mask.shape[-2:], self.config))
        return self.rule.class_map(mask) if self.rule.is_hard else mask

    def _target(self, mask: np.ndarray, view: View) -> np.ndarray:
        """(S, S) uint8 class map of a hard mask, (K, S, S) float32 of a soft one."""
        return self.rule.class_map(mask, view) if self.rule.is_hard else self.rule.prob_map(mask, view)

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self.in_memory:
            return self._images[index], self._masks[index]
        latest = self._latest
        if latest is None or latest[0] != index:  # the look of an example comes from the same image
            pair = self.pairs[index]
            image, mask, *_ = read_pair(pair.image_path, pair.mask_path, self.config.channels)
            image = self._prepare_image(image, view_of(image.shape, self.config))
            self._latest = latest = (index, image, self._prepare_mask(mask))
        return latest[1:]

    def _kept_image(self, index: int) -> np.ndarray:
        return self._load(index)[0]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """One example. Every random choice depends on (seed, draw) only.

        Args:
            key: (index of the pair, draw). A training run counts its draws, so a continued run repeats them.

        Returns:
            "image": (C, S, S) float32 in [-1, 1]. "mask": (S, S) uint8 class map, or (K, S, S) float32 for soft masks.
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
        """The mask of :meth:`__getitem__` with crop "center". Does not read the image."""
        mask = self._masks[index] if self.in_memory else self._prepare_mask(read_mask(self.pairs[index].mask_path))
        return torch.from_numpy(np.array(turn(mask, (-2, -1), symmetry)))

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """Like :meth:`__getitem__`, without flips and turns. Without ``rng``, a random crop takes the middle."""
        return self._example(index, rng, 0)

    def _example(self, index: int, rng: np.random.Generator | None, symmetry: int) -> dict[str, Tensor]:
        image, mask = self._load(index)
        if self.config.crop == "random":
            view = native_view(image.shape[0], image.shape[1], self.config.image_size, rng)
            image = view.cut(image)
            mask = view.cut(mask) if self.rule.is_hard else self._target(mask, view)
        image, mask = turn(image, (0, 1), symmetry), turn(mask, (-2, -1), symmetry)
        return {
            "image": to_tensor(image, self.windows[index], self.config.channels),
            "mask": torch.from_numpy(np.array(mask)),  # a copy: callers may write
        }


def _warn(warnings: Iterable[str], where: str = "") -> None:
    for warning in warnings:
        logger.warning("%s%s", where, warning)


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


def _all_have_channels(checked: Sequence[_Checked], pairs: Sequence[Pair], config: DataConfig) -> bool:
    """Whether files with three channels say that these are not colours.

    Raises:
        InputError: the files disagree, and the config does not decide.
    """
    names: dict[bool, list[str]] = {False: [], True: []}
    for one, name in zip(checked, short_names([pair.image_path for pair in pairs]), strict=True):
        if one.channels == 3:
            names[one.has_channels].append(name)
    if names[True] and names[False] and config.window_channels is None:
        raise InputError(
            f"{len(names[False])} images are RGB (as {names[False][0]}), {len(names[True])} hold three channels that "
            f"are no colours (as {names[True][0]}): save all alike, or say how to read them with "
            "window_channels=joint or window_channels=separate"
        )
    return bool(names[True]) and not names[False]


def _common_window(samples: Sequence[np.ndarray], config: DataConfig) -> Window:
    """One window for all images. Each image has about the same weight, regardless of its size."""
    kinds = sorted({str(sample.dtype) for sample in samples})
    if len(kinds) > 1:
        raise InputError(
            f"images hold different kinds of gray values ({', '.join(kinds)}), one window cannot serve them: use "
            "window_scope=image"
        )
    if kinds == ["uint8"] and config.window is None:
        return ((0.0, 255.0),)
    return percentile_windows(np.concatenate(samples), config)


def _hint_at_window(checked: Sequence[_Checked], config: DataConfig) -> None:
    """Warn about dark 8-bit images. They keep their range by default, and a network learns them badly."""
    brightest = float(np.median([one.bright for one in checked]))
    if config.window is None and config.window_values is None and checked[0].dtype == "uint8" and brightest < 128:
        hint = "half of the images stay below gray %g of 255; window=(%g, %g) would stretch each to the full range"
        logger.warning(hint, brightest, *ROBUST_PERCENTILES)


def _odd_images(checked: Sequence[_Checked], pairs: Sequence[Pair], config: DataConfig) -> list[str]:
    """Warnings about images of a single gray value, files of several data types, images dark in the common range."""
    found = []
    named = list(zip(checked, short_names([pair.image_path for pair in pairs]), strict=True))
    blank = [name for one, name in named if one.brightest == one.darkest]
    if config.window_values is not None:
        least = NARROW_IMAGE * max(high - low for low, high in config.window_values)
        narrow = [name for one, name in named if 0 < one.brightest - one.darkest < least]
        if narrow:
            names = list_some(narrow)
            found.append(f"{len(narrow)} use less than 2 % of the common gray range: {names}. Have they another scale?")
    if blank:
        found.append(f"{len(blank)} hold a single gray value: {list_some(blank)}")
    kinds = sorted({one.dtype for one in checked})
    if len(kinds) > 1:
        found.append(f"stored as {', '.join(kinds)}: each kind gets its own gray range")
    return found
